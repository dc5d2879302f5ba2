"""The training loop: one model pass feeds every SAE of a run, and the loop reads like the method.

Each SAE (a *trainee*) has its own parameters, optimiser, decorrelation state and generators, all derived from the seed
and its settings, never from its neighbours: trained beside others it ends with the same bytes as trained alone. The
loop ends because it is done or because it raises; a loss that is not finite raises before the weights are touched.
"""

import time
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from unbraid.activations.buffer import ActivationBuffer, RefillInterrupted
from unbraid.activations.rows import ChunkSource, StopSignal, never
from unbraid.config import RunConfig, Site, VariantConfig
from unbraid.decorrelation.build import build as build_decorrelation
from unbraid.decorrelation.stats import DecorrelationStats
from unbraid.errors import TrainingError, UnbraidError
from unbraid.randomness import derive_seed, generator
from unbraid.sae import SAE, Codes
from unbraid.sae.build import build as build_sae
from unbraid.training.checkpoint import list_checkpoints, read_checkpoint, write_checkpoint
from unbraid.training.optimiser import SAEOptimiser
from unbraid.training.precision import encoder_autocast
from unbraid.training.run_folder import JsonLines, RunFolder
from unbraid.training.schedules import learning_rate, warm_up


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
class Trainee:
    """One SAE in training.

    Attributes:
        name: folder and metric name.
        site: index of its site among the run's sites.
        scale: activations are multiplied by this so that E||x||^2 = 1.
        tokens_since_fired: [N] int64.
        updates: successful optimiser steps so far.
    """

    name: str
    site: int
    config: VariantConfig
    scale: float
    sae: SAE
    optimiser: SAEOptimiser
    decorrelate: nn.Module
    generator: torch.Generator
    tokens_since_fired: Tensor
    updates: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold of this trainee, under flat names."""
        groups = {
            "sae": dict(self.sae.state_dict()),
            "optimiser": self.optimiser.state_tensors(),
            "decorrelate": dict(self.decorrelate.state_dict()),
            "trainee": {"generator": self.generator.get_state(), "tokens_since_fired": self.tokens_since_fired},
        }
        return {f"{group}.{name}": tensor for group, tensors in groups.items() for name, tensor in tensors.items()}

    def load_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Go on from `tensors()`."""

        def group(prefix: str) -> dict[str, Tensor]:
            return {
                name.removeprefix(f"{prefix}."): value
                for name, value in tensors.items()
                if name.startswith(f"{prefix}.")
            }

        self.sae.load_state_dict(group("sae"))
        self.optimiser.load_state_tensors(group("optimiser"))
        self.decorrelate.load_state_dict(group("decorrelate"))
        own = group("trainee")
        self.generator.set_state(own["generator"])
        self.tokens_since_fired.copy_(own["tokens_since_fired"])


@dataclass
class Trained:
    """What the loop leaves behind: the trainees, and what the rest of a run must know about how they were fed."""

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
) -> Trained:
    """Train every SAE of `config` to its last step, from the newest checkpoint in `folder` if there is one.

    Raises:
        TrainingInterrupted: `should_stop` said so; a checkpoint was written first.
        TrainingError: a loss or gradient is not finite.
        TextError: the text is used up too early.
    """
    buffer = ActivationBuffer(
        source,
        config.buffer,
        config.training.batch_tokens,
        config.seed,
        planned_rows=config.steps * config.training.batch_tokens,
        device=device,
        should_stop=should_stop,
        on_fill=progress.filling,
    )
    saved = list_checkpoints(folder.checkpoints)
    if saved:
        trainees, done, seconds, offset = _restore(saved[-1], config, buffer, source.d_model, device)
    else:
        try:
            buffer.fill()
        except RefillInterrupted:
            raise TrainingInterrupted("stopped before the first step; nothing to save yet") from None
        trainees, done, offset = _start(config, buffer, device), 0, 0
        seconds = {"buffer": 0.0, "training": 0.0}
    with JsonLines(folder.metrics, offset) as metrics, JsonLines(folder.timing) as timing:
        for step in range(done, config.steps):
            try:
                if should_stop():
                    raise RefillInterrupted
                started = time.perf_counter()
                batch = buffer.next_batch()
            except RefillInterrupted:
                _save(folder, config, step, trainees, buffer, seconds, metrics)
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
                records[trainee.name] = train_step(trainee, batch[trainee.site] * trainee.scale, step, lr, log)

            seconds["buffer"] += fed - started
            seconds["training"] += time.perf_counter() - fed
            line = (
                {"step": finished, "tokens": finished * config.training.batch_tokens, "saes": records} if log else None
            )
            if line is not None:
                metrics.write(line)
                timing.write({"step": finished, **seconds})
            progress.step(finished, line)
            every = config.training.checkpoint_every
            if finished == config.steps or (every and finished % every == 0):
                _save(folder, config, finished, trainees, buffer, seconds, metrics)
    return Trained(trainees, buffer, seconds)


def _save(
    folder: RunFolder,
    config: RunConfig,
    step: int,
    trainees: list[Trainee],
    buffer: ActivationBuffer,
    seconds: dict[str, float],
    metrics: JsonLines,
) -> None:
    """A checkpoint after `step` steps; the last one leaves out the buffer, which nothing will read again."""
    tensors, buffer_data = buffer.state() if step < config.steps else ({}, buffer.final_state())
    state = {
        "step": step,
        "metrics_offset": metrics.sync(),
        "scales": {trainee.name: trainee.scale for trainee in trainees},
        "buffer": buffer_data,
        "seconds": seconds,
    }
    groups = {"buffer": tensors} | {f"sae-{trainee.name}": trainee.tensors() for trainee in trainees}
    write_checkpoint(folder.checkpoints, step, groups, state, config.training.keep_checkpoints)


def train_step(trainee: Trainee, x_BD: Tensor, step: int, lr: float, log: bool) -> dict[str, Any] | None:
    """One update of one SAE: forward, Eq. 1, backward, Adam, unit rows; its line of metrics when `log`.

    Raises:
        TrainingError: the loss or its gradient is not finite; the weights are as they were.
    """
    sae, settings = trainee.sae, trainee.config
    lambda1 = settings.sae.lambda1 * warm_up(step, settings.optimiser.sparsity_warmup_steps)
    lambda2 = settings.decorrelation.lambda2 * warm_up(step, settings.optimiser.decorrelation_warmup_steps)

    dead_N = trainee.tokens_since_fired >= settings.sae.dead_after_tokens
    with encoder_autocast(settings.optimiser.precision, x_BD.device):
        out = sae.training_forward(x_BD, dead_N, trainee.generator)
    loss = out.reconstruction + lambda1 * out.sparsity + out.auxiliary
    if not loss.isfinite():
        raise TrainingError(
            f"the loss of {trainee.name} became {loss.item()} at step {step + 1}; expected a finite number; its "
            "weights are as "
            "after the last good step; lower optimiser.lr, set optimiser.clip_norm, or lower decorrelation.lambda2"
        )
    penalty, stats = None, None
    if lambda2 > 0 or log:
        with torch.set_grad_enabled(lambda2 > 0):
            penalty, stats = _decorrelate(trainee.decorrelate, out.codes, sae.W_dec)
    if penalty is not None and lambda2 > 0:
        loss = loss + lambda2 * penalty
    trainee.optimiser.zero_grad()
    loss.backward()
    gradient_norm = trainee.optimiser.step(lr)
    trainee.updates += 1
    _note_firing(trainee, out.codes, len(x_BD))
    if not log:
        return None
    with torch.no_grad():
        variance = (x_BD - x_BD.mean(0)).double().square().sum()
        active = out.codes.values.numel() if isinstance(out.codes, Codes) else int((out.codes != 0).sum())
        record = {
            "loss": loss.item(),
            "reconstruction": out.reconstruction.item(),
            "sparsity": out.sparsity.item(),
            "auxiliary": out.auxiliary.item(),
            "penalty": penalty.item() if penalty is not None else None,
            "l0": active / len(x_BD),
            "r2": 1 - ((x_BD - out.x_hat_BD).double().square().sum() / variance).item(),
            "dead_fraction": (trainee.tokens_since_fired >= settings.sae.dead_after_tokens).double().mean().item(),
            "grad_norm": float(gradient_norm),
            "updates": trainee.updates,
            "path": out.path,
            "lr": lr,
            "lambda1": lambda1,
            "lambda2": lambda2,
        }
        return record | (correlation_record(stats) if stats is not None else {})


def correlation_record(stats: DecorrelationStats) -> dict[str, Any]:
    """What metrics.jsonl says about correlation; `correlation_top` is the mean over the nominal |S|."""
    return {
        "tau": stats.tau,
        "correlation_mean": stats.mean,
        "correlation_std": stats.std,
        "correlation_top": float(stats.correlations.double().sum()) / max(1, stats.nominal),
        "pairs": len(stats.pairs),
        "decorrelation": stats.scalars(),
    }


def _decorrelate(decorrelate: nn.Module, codes: Codes | Tensor, W_dec: Tensor) -> tuple[Tensor, DecorrelationStats]:
    if isinstance(codes, Codes):
        return decorrelate(codes=codes, decoder=W_dec)
    return decorrelate(codes, decoder=W_dec)


@torch.no_grad()
def _note_firing(trainee: Trainee, codes: Codes | Tensor, tokens: int) -> None:
    fired_N = torch.zeros_like(trainee.tokens_since_fired, dtype=torch.bool)
    if isinstance(codes, Codes):
        fired_N[codes.indices] = True
    else:
        fired_N = (codes > 0).any(0)
    trainee.tokens_since_fired += tokens
    trainee.tokens_since_fired[fired_N] = 0


def _start(config: RunConfig, buffer: ActivationBuffer, device: torch.device) -> list[Trainee]:
    """New trainees, with scale and decoder bias taken from the rows of the first fill."""
    trainees: list[Trainee] = []
    for site, rows_RD in enumerate(buffer.rows()):
        if len(rows_RD) == 0:
            raise TrainingError("no row survived the buffer's filter; raise buffer.norm_limit or check the text")
        scale = float(rows_RD.double().square().sum(1).mean().rsqrt())
        mean_D = (rows_RD.double().mean(0) * scale).float()
        for variant in config.variants:
            trainees.append(_new_trainee(config, config.sites[site], site, variant, scale, mean_D, device))
    return trainees


def _new_trainee(
    config: RunConfig, site: Site, index: int, variant: str, scale: float, mean_D: Tensor, device: torch.device
) -> Trainee:
    settings = config.variant(variant)
    seed = derive_seed(settings.seed, str(site))
    sae = build_sae(settings.sae, len(mean_D), generator(seed, "init"), mean_D).to(device)
    return Trainee(
        name=config.sae_name(site, variant),
        site=index,
        config=settings,
        scale=scale,
        sae=sae,
        optimiser=SAEOptimiser(sae, settings.optimiser),
        decorrelate=build_decorrelation(
            settings.decorrelation, sae.n_features, sae.d_in, derive_seed(seed, "pairs")
        ).to(device),
        generator=generator(seed, "training", device=device),
        tokens_since_fired=torch.zeros(sae.n_features, dtype=torch.long, device=device),
    )


def _restore(
    path: Any, config: RunConfig, buffer: ActivationBuffer, d_model: int, device: torch.device
) -> tuple[list[Trainee], int, dict[str, float], int]:
    tensors, state = read_checkpoint(path)
    done = state["step"]
    if done < config.steps:
        buffer.load_state(tensors["buffer"], state["buffer"])
    else:
        buffer.load_final_state(state["buffer"])
    trainees: list[Trainee] = []
    for index, site in enumerate(config.sites):
        for variant in config.variants:
            scale = state["scales"][config.sae_name(site, variant)]
            trainee = _new_trainee(config, site, index, variant, scale, torch.zeros(d_model), device)
            trainee.load_tensors(tensors[f"sae-{trainee.name}"])
            trainee.updates = done
            trainees.append(trainee)
    return trainees, done, state["seconds"], state["metrics_offset"]
