"""The training loop: one model pass feeds every SAE of a run, and the loop reads like the method.

The loop ends because it is done or because it raises; a loss that is not finite raises before the weights are touched.

Among many ranks every one runs this loop on the same batches, with the trainees of its cell and its slice of each; the
first rank writes the logs. Alone, none of the exchanges happens.
"""

import dataclasses
import itertools
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from unbraid.activations.buffer import ActivationBuffer, RefillInterrupted
from unbraid.activations.rows import ChunkSource, StopSignal, never
from unbraid.config import RunConfig
from unbraid.distributed.mesh import SINGLE, Mesh
from unbraid.distributed.ranks import ALONE
from unbraid.errors import UnbraidError
from unbraid.training.checkpoint import list_checkpoints, read_checkpoint, write_checkpoint
from unbraid.training.normalisation import Normalisation
from unbraid.training.pieces import join, overlaps, piece_stem
from unbraid.training.run_folder import JsonLines, RunFolder
from unbraid.training.schedules import learning_rate
from unbraid.training.trainee import Trainee, new_trainee, train_step


class TrainingInterrupted(UnbraidError):
    """The run was asked to stop; a checkpoint was written and the run can be resumed.

    Attributes:
        exit_code: what the command line exits with: 128 + the signal's number, as shells do.
    """

    exit_code: int = 130


@runtime_checkable
class Progress(Protocol):
    """Where the loop reports to while it runs."""

    def filling(self, rows: int, capacity: int) -> None:
        """A refill goes on."""
        ...

    def step(self, step: int, record: dict[str, Any] | None) -> None:
        """A step is done; `record` is its line of metrics when it was a logged one."""
        ...


@dataclass
class Trained:
    """What the loop leaves behind: the trainees this rank answers for, whole, and how they were fed."""

    trainees: list[Trainee]
    buffer: ActivationBuffer
    seconds: dict[str, float] = field(default_factory=dict)


def train_saes(
    folder: RunFolder,
    config: RunConfig,
    source: ChunkSource,
    device: torch.device,
    progress: Progress,
    should_stop: StopSignal = never,
    mesh: Mesh = SINGLE,
) -> Trained:
    """Train every SAE of `config` to its last step, from the newest checkpoint in `folder` if there is one.

    Among many ranks all must call this, with a `source` that gives each the same chunks.

    Raises:
        TrainingInterrupted: `should_stop` said so; a checkpoint was written first.
        TrainingError: a loss or gradient is not finite.
        TextError: the text is used up too early.
    """
    everyone = mesh.everyone
    stop = lambda: everyone.any(should_stop())  # noqa: E731
    buffer = ActivationBuffer(
        source,
        config.buffer,
        config.training.batch_tokens,
        config.seed,
        planned_rows=config.steps * config.training.batch_tokens,
        device=device,
        should_stop=stop,
        on_fill=progress.filling,
    )
    saved = list_checkpoints(folder.checkpoints)
    if saved:
        trainees, done, seconds, offset = _restore(saved[-1], config, buffer, source.widths, device, mesh)
    else:
        try:
            buffer.fill()
        except RefillInterrupted:
            raise TrainingInterrupted("stopped before the first step; nothing to save yet") from None
        trainees, done, offset = _start(config, buffer, device, mesh), 0, 0
        seconds = {"buffer": 0.0, "training": 0.0}
    with (
        JsonLines(folder.metrics, offset, everyone) as metrics,
        JsonLines(folder.timing, ranks=everyone) as timing,
    ):
        for step in range(done, config.steps):
            try:
                if stop():
                    raise RefillInterrupted
                started = time.perf_counter()
                batch = buffer.next_batch()
            except RefillInterrupted:
                _save(folder, config, step, trainees, buffer, seconds, metrics, mesh)
                raise TrainingInterrupted(
                    f"stopped after step {step} of {config.steps}; a checkpoint was written; go on with "
                    f"`unbraid resume {folder.path}`"
                ) from None
            fed = time.perf_counter()

            finished = step + 1
            log = finished == 1 or finished % config.training.log_every == 0 or finished == config.steps
            records: dict[str, Any] = {}
            for trainee in trainees:
                lr = learning_rate(trainee.config.optimiser, step, config.steps)
                records[trainee.name] = train_step(trainee, trainee.normalise(batch[trainee.site]), step, lr, log)

            seconds["buffer"] += fed - started
            seconds["training"] += time.perf_counter() - fed
            line = None
            if log:
                records = everyone.united(records)
                saes = {name: records[name] for name in config.sae_names}
                line = {"step": finished, "tokens": finished * config.training.batch_tokens, "saes": saes}
                metrics.write(line)
                timing.write({"step": finished, **seconds})
            progress.step(finished, line)
            every = config.training.checkpoint_every
            if finished == config.steps or (every and finished % every == 0):
                _save(folder, config, finished, trainees, buffer, seconds, metrics, mesh)
    if mesh.shards.size > 1:  # The first rank of each cell puts its SAEs together, to be measured and exported.
        whole = dataclasses.replace(mesh, shards=ALONE)
        last = list_checkpoints(folder.checkpoints)[-1]
        trainees = _restore(last, config, buffer, source.widths, device, whole)[0] if mesh.shards.first else []
    return Trained(trainees, buffer, seconds)


def _save(
    folder: RunFolder,
    config: RunConfig,
    step: int,
    trainees: list[Trainee],
    buffer: ActivationBuffer,
    seconds: dict[str, float],
    metrics: JsonLines,
    mesh: Mesh,
) -> None:
    """A checkpoint after `step` steps; the last one leaves out the buffer, which nothing will read again."""
    tensors, buffer_data = buffer.state() if step < config.steps else ({}, buffer.final_state())
    state = {
        "step": step,
        "metrics_offset": metrics.sync(),
        "buffer": buffer_data,
        "seconds": seconds,
    }
    groups = {piece_stem(f"sae-{trainee.name}", trainee.shard): trainee.tensors() for trainee in trainees}
    if mesh.everyone.first:
        groups["buffer"] = tensors
    write_checkpoint(folder.checkpoints, step, groups, state, config.training.keep_checkpoints, mesh.everyone)


def _trained_here(config: RunConfig, mesh: Mesh) -> list[tuple[int, str]]:
    """(index of the site, variant) of every SAE that lives on this rank."""
    places = itertools.product(range(len(config.sites)), config.variants)
    return [place for number, place in enumerate(places) if mesh.trains(number)]


def _start(config: RunConfig, buffer: ActivationBuffer, device: torch.device, mesh: Mesh) -> list[Trainee]:
    """New trainees, with mean and scale taken from the rows of the first fill."""
    rows = zip(config.sites, buffer.rows(), strict=True)
    normalise = [Normalisation.of(rows_RD, str(site)) for site, rows_RD in rows]
    return [
        new_trainee(config, site, variant, normalise[site], device, mesh)
        for site, variant in _trained_here(config, mesh)
    ]


def _restore(
    path: Path, config: RunConfig, buffer: ActivationBuffer, widths: list[int], device: torch.device, mesh: Mesh
) -> tuple[list[Trainee], int, dict[str, float], int]:
    trainees = [
        new_trainee(config, site, variant, Normalisation.none(widths[site]), device, mesh)
        for site, variant in _trained_here(config, mesh)
    ]
    stems = {f"sae-{trainee.name}": trainee for trainee in trainees}

    def wanted(file: str) -> bool:
        return file == "buffer" or any(overlaps(stem, file, trainee.shard) for stem, trainee in stems.items())

    tensors, state = read_checkpoint(path, wanted)
    done = state["step"]
    if done < config.steps:
        buffer.load_state(tensors["buffer"], state["buffer"])
    else:
        buffer.load_final_state(state["buffer"])
    for stem, trainee in stems.items():
        trainee.load_tensors(join(tensors, stem, trainee.shard, trainee.sae.shared))
        trainee.updates = done
    return trainees, done, state["seconds"], state["metrics_offset"]
