"""Training on activations in hand, without a run folder: no log, no checkpoint, no held-out text."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from unbraid.activations.buffer import ActivationBuffer
from unbraid.activations.handed_in import HandedInActivations, routes
from unbraid.config import (
    BufferConfig,
    DecorrelationConfig,
    OptimiserConfig,
    RunConfig,
    SAEConfig,
    TextConfig,
    TrainingConfig,
    VariantConfig,
)
from unbraid.device import pick_device
from unbraid.distributed.cost import Job, bytes_of_rank
from unbraid.errors import ActivationError, ConfigError, TrainingError
from unbraid.randomness import derive_seed
from unbraid.sae import SAE
from unbraid.sae.crosscoder import by_site
from unbraid.sites import Route, has_layers, is_transcoder, predicts_several
from unbraid.training.fit import Records, train_steps
from unbraid.training.normalisation import Normalisation
from unbraid.training.own_penalty import as_module
from unbraid.training.sae_trainer import SAETrainer, ends, trainer_from_settings
from unbraid.training.start import start_from

MOST_CONTEXTS = 2048
Dictionary = VariantConfig | SAEConfig


def fit(
    dictionaries: Dictionary | Mapping[str, Dictionary],
    activations: Any,
    *,
    tokens: int | None = None,
    batch_tokens: int = 2048,
    seed: int = 0,
    penalty: nn.Module | Callable[..., Any] | None = None,
    callback: Callable[[int, Records | None], Any] | None = None,
    log_every: int = 10,
    device: str = "auto",
) -> dict[str, SAE]:
    """Train dictionaries beside each other on the same batches; they come back acting on raw activations.

    Args:
        dictionaries: settings by name, or one, which is called `sae`. An `SAEConfig` trains with the default optimiser
            and without a penalty; a `VariantConfig` says all three.
        activations: a tensor [rows, D] or whatever `unbraid.train(activations=...)` takes; of several by name, every
            dictionary is trained on each and called `NAME_DICTIONARY`. `{"x -> y": (x, y)}` trains transcoders, which
            read x and predict y.
        tokens: rows to train on; by default all there are, once.
        batch_tokens: rows per step.
        seed: of row order and first weights, for an `SAEConfig`; a `VariantConfig` brings its own for the weights.
        penalty: in the place of the settings', called as `penalty(f, codes=, decoder=)`; see `unbraid.train`.
        callback: called after every step with the steps done and, every `log_every` steps, the metrics by name.
        log_every: steps between measurements.
        device: auto, cpu, cuda, ...

    Raises:
        UnbraidError: there are too few rows for one step, or the rows cannot be used.

    Example:
        >>> import torch, unbraid
        >>> x = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
        >>> topk = unbraid.SAEConfig(architecture="topk", n_features=64, k=4)
        >>> sae = unbraid.fit(topk, x, batch_tokens=256)["sae"]
        >>> sae.encode(x).shape
        torch.Size([4096, 64])
    """
    named = dict(dictionaries) if isinstance(dictionaries, Mapping) else {"sae": dictionaries}
    variants = {name: _complete(settings, seed) for name, settings in named.items()}
    config = _config(seed, tokens, batch_tokens)
    source, place = HandedInActivations(activations, config, held_out=False), pick_device(device)
    rows = source.count_rows(tokens if tokens is not None else 1 << 62)
    if tokens is None and rows is None:
        raise TrainingError("activations are batches of unknown number; expected tokens=, the rows to train on")
    planned = tokens if tokens is not None else rows
    assert planned is not None
    steps = planned // batch_tokens
    if steps < 1 or (rows is not None and rows < steps * batch_tokens):
        raise ActivationError(
            f"activations have {rows} rows and {planned:,} tokens // {batch_tokens:,} a step = {steps} steps were "
            "asked for; expected at least one step and rows for all of them; lower tokens or batch_tokens"
        )
    config = _config(seed, steps * batch_tokens, batch_tokens)
    widths_of_saes = [settings.sae.n_features for settings in variants.values()]
    places = routes(activations)
    _require_what_they_read(list(variants.values()), places)
    jobs = [Job(batch_tokens, max(source.widths), n_features, 0) for _ in places for n_features in widths_of_saes]
    buffer = ActivationBuffer(
        source,
        config.buffer,
        batch_tokens,
        seed,
        planned_rows=steps * batch_tokens,
        device=place,
        reserved=sum(bytes_of_rank(job, 1) for job in jobs),
    )
    buffer.fill()
    own = None if penalty is None else as_module(penalty)
    units = [Normalisation.of(x_RD, site.folder) for site, x_RD in zip(source.sites, buffer.rows(), strict=True)]
    trainers: list[SAETrainer] = []
    for route in places:
        sites, own_units, target = ends(route, source.sites, units)
        widths_out = [source.widths[source.sites.index(site)] for site in route.outputs]
        trainers += [
            trainer_from_settings(
                name if len(places) == 1 else f"{route.folder}_{name}",
                sites,
                settings,
                derive_seed(settings.seed, str(route)),
                own_units,
                place,
                penalty=own,
                steps=steps,
                tokens=steps * batch_tokens,
                target=target,
            )
            for name, settings in variants.items()
        ]
        for trainer in trainers[-len(variants) :]:
            start_from(trainer)
            units_out = own_units if target is None else target.normalise
            trainer.sae.metadata |= by_site(widths_out, units_out.scales(widths_out))
    logged = (lambda step: step % log_every == 0 or step == steps) if callback is not None else (lambda step: False)
    train_steps(trainers, buffer.next_batch, steps, logged=logged, after_step=callback)
    for trainer in trainers:
        trainer.fold()
    return {trainer.name: trainer.sae.requires_grad_(False) for trainer in trainers}


def _complete(settings: Dictionary, seed: int) -> VariantConfig:
    if isinstance(settings, VariantConfig):
        return settings
    return VariantConfig(
        seed=seed, sae=settings, optimiser=OptimiserConfig(), decorrelation=DecorrelationConfig(method="none")
    )


SEVERAL = "those of several sites that are predicted, {'a + b': (a, b)}"
READ_FOR = {
    "sae.skip": (is_transcoder, "a transcoder's, {'x -> y': (x, y)}"),
    "sae.cross_layer": (has_layers, "those of several layers at both ends, {'a + b -> c + d': (a, b, c, d)}"),
    "sae.row_norm": (predicts_several, SEVERAL),
    "decorrelation.by_site": (predicts_several, SEVERAL),
}
"""Setting -> for which activations it is read."""


def _require_what_they_read(variants: Iterable[VariantConfig], places: Sequence[Route]) -> None:
    for name, (fits, words) in READ_FOR.items():
        group, field = name.split(".")
        settings = [getattr(one, group) for one in variants]
        fields = [(one, type(one).model_fields[field]) for one in settings if field in type(one).model_fields]
        given = any(getattr(one, field) != info.default for one, info in fields)
        if given and not any(fits(str(route)) for route in places):
            raise ConfigError(f"{name} is set, and is read for other activations: {words}; drop it, or give such")


def _config(seed: int, tokens: int | None, batch_tokens: int) -> RunConfig:
    """What reading rows asks of a run's settings; the buffer is no larger than the rows there are."""
    text = TextConfig()
    model = RunConfig().model.model_copy(update={"batch_contexts": 8})
    wanted = math.ceil((tokens or (1 << 62)) / text.context_length)
    least = max(2 * model.batch_contexts, math.ceil(2 * batch_tokens / text.context_length))
    return RunConfig(
        seed=seed,
        text=text,
        model=model,
        buffer=BufferConfig(contexts=max(least, min(wanted, MOST_CONTEXTS)), drop_first_position=False),
        training=TrainingConfig(tokens=tokens or 0, batch_tokens=batch_tokens),
    )
