"""Steps of unbraid, as its own training loop takes them (without decorrelation, which no peer has)."""

import itertools

import torch
from feed import Feed, bias_for_l0, settings_from_arguments

from unbraid.config import DecorrelationConfig, OptimiserConfig, SAEConfig, VariantConfig
from unbraid.sae import Codes
from unbraid.training.normalisation import Normalisation
from unbraid.training.sae_trainer import train_step, trainer_from_settings

settings = settings_from_arguments()
config = VariantConfig(
    seed=settings["seed"],
    sae=SAEConfig(
        architecture=settings["architecture"],
        n_features=settings["n_features"],
        k=settings["k"],
        lambda1=settings["lambda1"],
        **settings.get("sae", {}),
    ),
    decorrelation=DecorrelationConfig(method="none", lambda2=0.0),
    optimiser=OptimiserConfig(lr=settings["lr"], warmup_steps=0),
)


def score(x):
    out = sae.training_forward(x, None, torch.Generator().manual_seed(0))
    return out.x_hat_BD, out.codes.to_dense() if isinstance(out.codes, Codes) else out.codes


feed = Feed(settings, score)
trainer = trainer_from_settings(
    "benchmark", 0, config, config.seed, Normalisation.none(settings["d_in"]), torch.device("cpu")
)
sae = trainer.sae
with torch.no_grad():
    sae.b_dec.copy_(feed.batches[0].mean(0))
if settings["l0"]:
    with torch.no_grad():
        bias = sae.b_gate if settings["architecture"] == "gated" else sae.b_enc
        bias += bias_for_l0(sae.preactivations(feed.batches[0][:256]), settings["l0"])
if settings["path"] != "auto":
    forward = sae.training_forward
    sae.training_forward = lambda x, dead, chance: forward(x, dead, chance, path=settings["path"])
for step, x in zip(itertools.count(), feed, strict=False):
    trainer.tokens_since_fired[: settings["dead"]] = trainer.dead_after
    train_step(trainer, x, step, settings["lr"], log=False)
