"""A run around the training loop: its buffer and log, its checkpoints, and how it stops.

Among many ranks every one runs this on the same batches, with the trainers of its cell and its slice of each; the first
rank writes the logs. Alone, none of the exchanges happens.
"""

import dataclasses
import itertools
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from unbraid.activations.buffer import ActivationBuffer
from unbraid.activations.rows import ChunkSource, RefillInterrupted, StopSignal, never
from unbraid.config import RunConfig
from unbraid.distributed.cost import Job, bytes_of_rank
from unbraid.distributed.mesh import SINGLE, Mesh
from unbraid.distributed.ranks import ALONE
from unbraid.errors import CheckpointError, ConfigError, RowsUsedUp, TrainingError, UnbraidError
from unbraid.json_files import finite
from unbraid.training.changes import require_same_run
from unbraid.training.checkpoint import (
    damaged,
    list_checkpoints,
    read_checkpoint,
    read_run_state,
    write_checkpoint,
)
from unbraid.training.fit import Records, train_steps
from unbraid.training.json_lines import JsonLines
from unbraid.training.normalisation import Normalisation
from unbraid.training.own_penalty import name_of
from unbraid.training.run_folder import RunFolder
from unbraid.training.sae_trainer import SAETrainer, new_trainer
from unbraid.training.sharded_checkpoint import join, overlaps, piece_stem
from unbraid.training.start import start_from
from unbraid.training.stopping import TrainingInterrupted


@runtime_checkable
class Progress(Protocol):
    """Where the loop reports to while it runs."""

    def filling(self, rows: int, capacity: int) -> None:
        """A refill goes on."""
        ...

    def step(self, step: int, record: dict[str, Any] | None) -> None:
        """A step is done; `record` is its line of metrics when it was a logged one."""
        ...


def training_bytes(config: RunConfig, widths: Sequence[int], mesh: Mesh = SINGLE) -> int:
    """Memory that the SAEs of this rank take in training, activations of a step included."""
    rows, total = config.training.batch_tokens, 0
    for number, (route, variant) in enumerate(itertools.product(config.routes, config.variants)):
        if mesh.trains(number):
            d_in, d_out = (sum(widths[config.sites.index(site)] for site in end) for end in route)
            job = Job(rows, -(-(d_in + d_out) // 2), config.variant(variant).sae.n_features, 0)
            total += bytes_of_rank(job, mesh.shards.size)
    return total


@dataclass
class Trained:
    """What the loop leaves behind: the trainers of this rank, whole, and how they were fed.

    Attributes:
        steps: steps executed; fewer than planned when the text ended early.
    """

    trainers: list[SAETrainer]
    buffer: ActivationBuffer
    steps: int
    seconds: dict[str, float] = field(default_factory=dict)


def train_saes(
    folder: RunFolder,
    config: RunConfig,
    source: ChunkSource,
    device: torch.device,
    progress: Progress,
    should_stop: StopSignal = never,
    mesh: Mesh = SINGLE,
    penalty: nn.Module | None = None,
) -> Trained:
    """Train every SAE of `config` as far as planned or as the text lasts, from the newest checkpoint in `folder`.

    Among many ranks all must call this, with a `source` that gives each the same chunks.

    Args:
        folder: where logs and checkpoints go.
        config: the run's settings, changes included.
        source: where activations come from.
        device: where SAEs are trained.
        progress: told of every step.
        should_stop: asked between steps and while the buffer is filled.
        mesh: who trains what.
        penalty: a penalty of one's own in the place of the settings'; every SAE gets a copy.

    Raises:
        TrainingInterrupted: `should_stop` said so; a checkpoint was written first.
        TrainingError: a loss or gradient is not finite; a checkpoint of the steps before was written.
        CheckpointError: the newest checkpoint is damaged, or of another run.
        RowsUsedUp: the text ends before the first step.
    """
    run = _Session(folder, config, source, device, progress, should_stop, mesh, penalty)
    try:
        with run.metrics, run.timing:
            run.train()
    except RefillInterrupted:
        raise TrainingInterrupted("stopped before the first step; nothing to save yet") from None
    if mesh.shards.size > 1:  # The first rank of each cell puts its SAEs together, to be measured and exported.
        whole = dataclasses.replace(mesh, shards=ALONE)
        last = list_checkpoints(folder.checkpoints)[-1]
        run.trainers = run.restored(last, whole) if mesh.shards.first else []
    return Trained(run.trainers, run.buffer, run.done, run.seconds)


class _Session:
    """One process's part of a run: what changes from step to step, and how it is logged and saved."""

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        source: ChunkSource,
        device: torch.device,
        progress: Progress,
        should_stop: StopSignal,
        mesh: Mesh,
        penalty: nn.Module | None,
    ):
        self.folder, self.config, self.source, self.device = folder, config, source, device
        self.progress, self.mesh, self.everyone, self.penalty = progress, mesh, mesh.everyone, penalty
        self.first_settings = folder.first_settings
        self.identity = source.identity if penalty is None else source.identity | {"penalty": name_of(penalty)}
        if penalty is not None and mesh.shards.size > 1:
            raise ConfigError(
                f"the penalty {name_of(penalty)!r} was handed in and would see one slice of the features on each of "
                f"{mesh.shards.size} ranks; expected training.feature_shards = 1"
            )
        self.stop = should_stop if self.everyone.size == 1 else lambda: self.everyone.any(should_stop())
        self.done, self.seconds, offset = 0, {"buffer": 0.0, "training": 0.0}, 0
        self.fed = 0.0
        self.buffer = ActivationBuffer(
            source,
            config.buffer,
            config.training.batch_tokens,
            config.seed,
            planned_rows=config.steps * config.training.batch_tokens,
            device=device,
            reserved=training_bytes(config, source.widths, mesh),
            should_stop=self.stop,
            on_fill=progress.filling,
        )
        saved = list_checkpoints(folder.checkpoints)
        if saved:
            self.trainers = self.restored(saved[-1], mesh)
            state = read_run_state(saved[-1])
            self.done, self.seconds, offset = state["step"], state["seconds"], state["metrics_offset"]
        else:
            self.trainers = []
        self.metrics = JsonLines(folder.metrics, offset, self.everyone)
        self.timing = JsonLines(folder.timing, ranks=self.everyone)

    def train(self) -> None:
        """From where the run stands to its end."""
        if not self.trainers and self.done == 0:
            self.buffer.fill()
            self.trainers = self.started()
        try:
            self.done = train_steps(
                self.trainers,
                self.next_batch,
                self.config.steps,
                done=self.done,
                logged=self.is_logged,
                after_step=self.after_step,
            )
        except RefillInterrupted:
            self.save()
            raise TrainingInterrupted(
                f"stopped after step {self.done} of {self.config.steps}; a checkpoint was written; go on with "
                f"`unbraid resume {self.folder.path}`"
            ) from None
        except Exception as error:
            self.save_after(error)
            raise
        self.save()

    def next_batch(self) -> list[Tensor]:
        """Rows of the next step, or the end of the run because somebody asked for it."""
        if self.stop():
            raise RefillInterrupted
        started = time.perf_counter()
        batch = self.buffer.next_batch()
        self.fed = time.perf_counter()
        self.seconds["buffer"] += self.fed - started
        return batch

    def is_logged(self, step: int) -> bool:
        """Whether a finished step is measured."""
        return step == 1 or step % self.config.training.log_every == 0 or step == self.config.steps

    def after_step(self, step: int, records: Records | None) -> None:
        """Log, show and save."""
        self.done = step
        self.buffer.settle()
        self.seconds["training"] += time.perf_counter() - self.fed
        line = None
        if records is not None:
            united = self.everyone.united(records)
            saes = {name: united[name] for name in self.config.sae_names if name in united}
            line = finite({"step": step, "tokens": step * self.config.training.batch_tokens, "saes": saes})
            self.metrics.write(line)
            self.timing.write({"step": step, **self.seconds})
        self.progress.step(step, line)
        every = self.config.training.checkpoint_every
        if step < self.config.steps and every and step % every == 0:
            self.save()

    def save_after(self, error: Exception) -> None:
        """A checkpoint of the steps before an error, which is told of it; alone, and if there was a step at all."""
        if self.done == 0 or self.everyone.size > 1 or isinstance(error, CheckpointError | RowsUsedUp):
            return
        self.buffer.take_back()
        with suppress(Exception):  # The error itself matters more than one in saving.
            self.save(keep=self.config.training.keep_checkpoints + 1)
            if isinstance(error, UnbraidError):
                error.args = (
                    f"{error}; the run stands after step {self.done}: go on with `unbraid resume {self.folder.path}`",
                )

    def save(self, keep: int | None = None) -> None:
        """A checkpoint of where the run stands."""
        tensors, buffer_data = self.buffer.state()
        state = {
            "step": self.done,
            "metrics_offset": self.metrics.sync(),
            "run": {"settings": self.first_settings, "source": self.identity},
            "buffer": buffer_data,
            "seconds": self.seconds,
        }
        groups = {piece_stem(f"sae-{t.name}", t.shard): t.tensors() for t in self.trainers}
        if self.everyone.first:
            groups["buffer"] = tensors
        keep = keep or self.config.training.keep_checkpoints
        write_checkpoint(self.folder.checkpoints, self.done, groups, state, keep, self.everyone)

    def started(self) -> list[SAETrainer]:
        """New trainers, with mean and scale taken from the rows of the first fill."""
        rows = zip(self.config.sites, self.buffer.rows(), strict=True)
        trainers = self._new([Normalisation.of(rows_RD, str(site)) for site, rows_RD in rows], self.mesh)
        for trainer in trainers:
            start_from(trainer)
        return trainers

    def restored(self, path: Path, mesh: Mesh) -> list[SAETrainer]:
        """The trainers of a checkpoint; the buffer goes back to it as well."""
        state = read_run_state(path)
        require_same_run(path, state["run"], self.first_settings, self.identity)
        trainers = self._new([Normalisation.none(width) for width in self.source.widths], mesh)
        stems = {f"sae-{trainer.name}": trainer for trainer in trainers}

        def wanted(file: str) -> bool:
            return file == "buffer" or any(overlaps(stem, file, trainer.shard) for stem, trainer in stems.items())

        tensors, _ = read_checkpoint(path, wanted)
        try:
            self.buffer.load_state(tensors["buffer"], state["buffer"])
            for stem, trainer in stems.items():
                trainer.load_tensors(join(tensors, stem, trainer.shard, trainer.sae.shared))
        except torch.OutOfMemoryError:
            raise
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError, TrainingError) as error:
            raise CheckpointError(damaged(path, f"{type(error).__name__}: {str(error)[:200]}")) from error
        return trainers

    def _new(self, normalise: Sequence[Normalisation], mesh: Mesh) -> list[SAETrainer]:
        places = itertools.product(range(len(self.config.routes)), self.config.variants)
        return [
            new_trainer(self.config, place, variant, normalise, self.device, mesh, self.penalty)
            for number, (place, variant) in enumerate(places)
            if mesh.trains(number)
        ]
