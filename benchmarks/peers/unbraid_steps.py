"""Steps of unbraid, as its own training loop takes them (without decorrelation, which no peer has)."""

import functools
import itertools

import torch
from feed import Feed, bias_for_l0, settings_from_arguments

from unbraid.config import DecorrelationConfig, OptimiserConfig, SAEConfig, VariantConfig
from unbraid.sae import Codes
from unbraid.training.normalisation import Normalisation
from unbraid.training.sae_trainer import train_step, trainer_from_settings


def config_of(settings: dict) -> VariantConfig:
    """The same settings in our words."""
    sparsity = {"lambda1": settings["lambda1"]} if settings["lambda1"] else {"k": settings["k"]}
    shape = {name: settings[name] for name in ("architecture", "n_features", "dead_after_tokens")}
    return VariantConfig(
        seed=settings["seed"],
        sae=SAEConfig(**shape, **sparsity, **settings["sae"]),
        decorrelation=DecorrelationConfig(method="none"),
        optimiser=OptimiserConfig(lr=settings["lr"], warmup_steps=0),
    )


def main() -> None:
    """Steps, whenever they are ordered."""
    settings = settings_from_arguments()
    config = config_of(settings)
    device = torch.device(settings["device"])
    normalise = Normalisation.none(settings["d_in"])
    trainer = trainer_from_settings("benchmark", (0,), config, config.seed, normalise, device)
    sae = trainer.sae

    def score(x):
        out = sae.training_forward(x, None, torch.Generator(device).manual_seed(0))
        return out.x_hat_BD, out.codes.to_dense() if isinstance(out.codes, Codes) else out.codes

    feed = Feed(settings, score)
    with torch.no_grad():
        sae.b_dec.copy_(feed.batches[0].mean(0))
    if settings["l0"]:
        with torch.no_grad():
            bias = sae.b_gate if settings["architecture"] == "gated" else sae.b_enc
            bias += bias_for_l0(sae.preactivations(feed.batches[0][:256]), settings["l0"])
    if settings["path"] != "auto":
        sae.training_forward = functools.partial(sae.training_forward, path=settings["path"])
    for step, x in zip(itertools.count(), feed, strict=False):
        trainer.tokens_since_fired[: settings["dead"]] = trainer.dead_after
        train_step(trainer, x, step, settings["lr"], log=False)


if __name__ == "__main__":
    main()
