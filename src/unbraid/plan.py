"""What a run is going to do, and whether it can: everything that can be known is checked before the first step.

A `Plan` prints itself; `unbraid train RECIPE --dry-run` shows it and stops there.
"""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from unbraid.activations.rows import RowFilter
from unbraid.activations.source import ActivationSource
from unbraid.config import RunConfig
from unbraid.errors import ConfigError, TextError, TrainingError
from unbraid.files import free_bytes
from unbraid.progress import clock
from unbraid.training.normalisation import Normalisation
from unbraid.training.sae_trainer import new_trainer, train_step
from unbraid.training.start import check_starts

WEIGHT_COPIES = 4
"""In memory: weights, their gradients, and Adam's two moments."""
SAVED_COPIES = 3
"""In a checkpoint: weights and the two moments."""
ALLOWANCE_BYTES = 1 << 20
"""For logs, figures and the summary."""


@dataclass(frozen=True)
class Plan:
    """A run that has passed every check.

    Attributes:
        config: its settings.
        source: what activations come from, in words.
        rows: usable training rows found, counted no further than needed; none where that cannot be known.
        memory_bytes: weights, gradients, optimiser and buffer.
        disk_bytes: checkpoints and exported SAEs at their largest; `free` is the space there is.
        seconds: estimate for the whole run; none where nothing was timed.
        dropped: values of a recipe that no longer apply.
    """

    config: RunConfig
    source: str
    rows: int | None
    memory_bytes: int
    disk_bytes: int
    free: int
    seconds: float | None
    dropped: Sequence[str] = ()

    def __str__(self) -> str:
        config, training = self.config, self.config.training
        saes = "SAE" if len(config.sae_names) == 1 else "SAEs"
        found = "cannot be counted beforehand" if self.rows is None else f"{self.rows:,} rows found, enough"
        lines = [
            f"plan: {config.steps:,} steps of {training.batch_tokens:,} tokens "
            f"({config.steps * training.batch_tokens:,} tokens) for {len(config.sae_names)} {saes}: "
            f"{', '.join(config.sae_names)}",
            f"  activations: {self.source}",
            f"  training text: {found}; held-out text: found",
            f"  memory: {size(self.memory_bytes)} for SAEs and buffer; disk: {size(self.disk_bytes)} of "
            f"{size(self.free)} free",
        ]
        if self.seconds is not None:
            lines.append(f"  time: about {clock(self.seconds)}, by two model passes and one step of each SAE")
        lines += [f"  left out, because it does not apply: {dropped}" for dropped in self.dropped]
        return "\n".join(lines)


def check_settings(config: RunConfig) -> None:
    """What the settings alone can tell.

    Raises:
        ConfigError: there would be no step, or nothing to measure on.
    """
    tokens, batch = config.training.tokens, config.training.batch_tokens
    if config.steps < 1:
        raise ConfigError(
            f"training.tokens = {tokens:,} // training.batch_tokens = {batch:,} gives {config.steps} steps; expected "
            f"at least 1; raise training.tokens to {batch:,} or more, or lower training.batch_tokens"
        )
    if config.text.held_out_fraction == 0:
        raise ConfigError(
            "text.held_out_fraction = 0 leaves no held-out text, and every run is measured on some; expected more than "
            "0, such as 0.02; raise text.held_out_fraction"
        )


def check_machine(config: RunConfig, device: torch.device, ranks: int) -> None:
    """What was asked for and this device, or this number of processes, would not do.

    Raises:
        ConfigError: a setting would change nothing here.
    """
    if config.training.tf32 and device.type != "cuda":
        raise ConfigError(
            f"training.tf32 is read on CUDA devices only, and the run is on {device}; expected false there; drop it, "
            "or set training.device to cuda"
        )
    if config.training.feature_shards is not None and ranks == 1:
        raise ConfigError(
            f"training.feature_shards = {config.training.feature_shards} is read only among several processes, and "
            "this is one alone; drop it, or start the run with `unbraid launch --ranks N --run train ...`"
        )


def make_plan(
    config: RunConfig,
    source: ActivationSource,
    device: torch.device,
    place: Path,
    *,
    dropped: Sequence[str] = (),
    timed: bool = False,
    first: bool = True,
) -> Plan:
    """Check a run against the machine, the model and the text that are there.

    Args:
        config: the run.
        source: where its activations come from; among ranks all must call this together.
        device: where SAEs are trained.
        place: the run folder, which need not exist.
        dropped: values of a recipe that no longer apply, to be listed.
        timed: also make two steps of each SAE, to estimate the time.
        first: whether this rank counts the text.

    Raises:
        UnbraidError: the run cannot be made; with what to change.
    """
    check_settings(config)
    check_starts(config, source.widths)
    memory, disk = memory_bytes(config, source.widths), disk_bytes(config, source.widths)
    free = free_bytes(_existing(place))
    if disk > free:
        raise TrainingError(
            f"the run needs {size(disk)} of disk at its largest ({config.training.keep_checkpoints + 1} checkpoints "
            f"and the SAEs), and {str(place)!r} has {size(free)} free; free some space, lower "
            "training.keep_checkpoints or buffer.contexts, or choose another --run"
        )
    available = _memory_of(device)
    if available is not None and memory > available:
        raise TrainingError(
            f"SAEs and buffer need {size(memory)} of memory and {device} has {size(available)} in all; lower "
            "sae.n_features, buffer.contexts or the number of variants and sites"
        )
    rows = check_text(config, source) if first else None
    seconds = _rehearse(config, source, device, timed)
    return Plan(config, source.description, rows, memory, disk, free, seconds, dropped)


def check_text(config: RunConfig, source: ActivationSource) -> int | None:
    """Usable training rows, counted no further than needed; there must be enough, and held-out text.

    Rows of a norm beyond the limit cannot be told before the model has run; where they are what is missing in the end,
    the run ends early.

    Raises:
        TextError: with the arithmetic of how many steps the text yields.
    """
    needed = config.steps * config.training.batch_tokens
    epochs = config.training.epochs
    found = source.count_rows(math.ceil(needed / epochs))
    found = None if found is None else found * epochs
    if found is not None and found < needed:
        steps = found // config.training.batch_tokens
        readings = "" if epochs == 1 else f" in {epochs} readings (training.epochs)"
        raise TextError(
            f"the text is too small: it gives {found:,} token rows{readings} = {steps:,} steps of "
            f"training.batch_tokens = {config.training.batch_tokens:,}; the run needs {needed:,} rows for "
            f"{config.steps:,} steps; give more text, raise training.epochs to read it again, or lower training.tokens "
            f"to {steps * config.training.batch_tokens:,}"
        )
    if not source.has_held_out_rows():
        raise TextError(
            f"no held-out text: text.held_out_fraction = {config.text.held_out_fraction} of the documents gave no full "
            f"context of {config.text.context_length} tokens; give more or shorter documents, or raise "
            "text.held_out_fraction"
        )
    return found


def _rehearse(config: RunConfig, source: ActivationSource, device: torch.device, timed: bool) -> float | None:
    """Pass the first training and held-out contexts through the model; the estimate of the run's seconds if `timed`.

    Raises:
        UnbraidError: a site never fires, a value is not finite, nothing varies, or every held-out row is left out.
    """
    rows_filter = RowFilter(config.buffer, config.sites, source.special_ids)
    chunks = source.chunks(None)
    chunk = next(chunks, None)
    if chunk is None:
        raise TextError(
            f"the text gives no full context of {config.text.context_length} tokens; give more text, or lower "
            "text.context_length"
        )
    rows = rows_filter(chunk)
    for site, rows_RD in zip(config.sites, rows, strict=True):
        Normalisation.of(rows_RD.float(), str(site))
    if not any(len(rows_filter(held_out)[0]) for held_out in source.chunks(None, held_out=True)):
        raise TextError(
            "every row of the held-out text is left out by the row filter (special tokens, first positions, norms "
            f"beyond buffer.norm_limit = {config.buffer.norm_limit} medians); give more text, or raise "
            "text.held_out_fraction or buffer.norm_limit"
        )
    if not timed:
        return None
    began = time.perf_counter()
    next(chunks, None)  # the second: what is done once was done for the first
    passed = time.perf_counter() - began
    tokens = config.steps * config.training.batch_tokens
    steps = sum(_seconds_of_a_step(config, place, variant, rows, device) for place, variant in _places(config))
    return tokens * passed / max(1, chunk.tokens_BT.numel()) + config.steps * steps


def _seconds_of_a_step(
    config: RunConfig, place: int, variant: str, rows: Sequence[torch.Tensor], device: torch.device
) -> float:
    rows, tokens = [x_RD.to(device, torch.float32) for x_RD in rows], config.training.batch_tokens
    batch = [x_RD.repeat(math.ceil(tokens / len(x_RD)), 1)[:tokens] for x_RD in rows]
    trainer = new_trainer(config, place, variant, [Normalisation.of(x_RD) for x_RD in rows], device)
    began = time.perf_counter()
    for step in range(2):  # the second is timed
        began = time.perf_counter()
        x_BD, y_BM = trainer.rows(batch)
        train_step(trainer, x_BD, step, trainer.config.optimiser.lr, log=False, y_BM=y_BM)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter() - began


def _places(config: RunConfig) -> list[tuple[int, str]]:
    return [(place, variant) for place in range(len(config.routes)) for variant in config.variants]


def _weight_bytes(config: RunConfig, widths: Sequence[int]) -> int:
    """Of all SAEs of a run, in float32."""
    numbers = 0
    for place, variant in _places(config):
        sae = config.variant(variant).sae
        d, m = (sum(widths[config.sites.index(site)] for site in end) for end in config.routes[place])
        has_skip = sae.skip and config.routes[place].is_transcoder
        numbers += sae.n_features * (d + m + 2) + m + (d * m if has_skip else 0)
    return 4 * numbers


def _buffer_bytes(config: RunConfig, widths: Sequence[int]) -> int:
    """Of the buffer's rows, which are never more than the run takes in all."""
    rows = min(config.buffer.contexts * config.text.context_length, config.steps * config.training.batch_tokens)
    rows = max(rows, config.model.batch_contexts * config.text.context_length)
    return rows * sum(widths) * getattr(torch, config.buffer.dtype).itemsize


def memory_bytes(config: RunConfig, widths: Sequence[int]) -> int:
    """Weights, gradients, optimiser state and buffer."""
    return WEIGHT_COPIES * _weight_bytes(config, widths) + _buffer_bytes(config, widths)


def disk_bytes(config: RunConfig, widths: Sequence[int]) -> int:
    """All checkpoints kept, the one being written, and the exported SAEs."""
    weights = _weight_bytes(config, widths)
    checkpoint = SAVED_COPIES * weights + _buffer_bytes(config, widths)
    return (config.training.keep_checkpoints + 1) * checkpoint + weights + ALLOWANCE_BYTES


def size(n_bytes: int) -> str:
    """`1.4 MiB`, `7.2 GiB`."""
    return f"{n_bytes / 2**30:,.1f} GiB" if n_bytes >= 2**30 else f"{n_bytes / 2**20:,.1f} MiB"


def _existing(place: Path) -> Path:
    """The nearest folder that is there already."""
    return next(path for path in (place.absolute(), *place.absolute().parents) if path.exists())


def _memory_of(device: torch.device) -> int | None:
    """All memory of a device; none where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
