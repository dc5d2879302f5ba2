"""One SAE in training: its state, its first weights, and the step that changes them.

Each SAE of a run has a trainer with its own parameters, optimiser, decorrelation state and generators, all derived from
the seed and its settings, never from other SAEs: trained beside others it ends with the same bytes as trained
alone. Split by features over ranks, a trainer holds one slice and exchanges in each step what the slices must agree on.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unbraid.activations.rows import side_by_side
from unbraid.config import RunConfig, VariantConfig
from unbraid.decorrelation.base import Penalty
from unbraid.decorrelation.build import build as build_decorrelation
from unbraid.decorrelation.stats import DecorrelationStats
from unbraid.distributed.mesh import SINGLE, Mesh
from unbraid.distributed.shard import Shard
from unbraid.errors import TrainingError
from unbraid.kernels import host
from unbraid.randomness import derive_seed, generator
from unbraid.sae import SAE, Codes, Forward
from unbraid.sae.build import build as build_sae
from unbraid.sae.dead import dead_after
from unbraid.sites import Route, Site, has_layers
from unbraid.training.normalisation import Normalisation
from unbraid.training.optimiser import SAEOptimiser
from unbraid.training.precision import encoder_autocast
from unbraid.training.schedules import warm_up


class Target(NamedTuple):
    """What a transcoder predicts.

    Attributes:
        sites: indices among the sites that batches hold.
        normalise: from raw activations to training units, by statistics of these sites' own.
        has_layers: whether each belongs to one that is read.
    """

    sites: tuple[int, ...]
    normalise: Normalisation
    has_layers: bool = False


@dataclass
class SAETrainer:
    """An SAE in training and everything that its steps need.

    Attributes:
        name, sites: of folder and metrics; indices of what it reads among the sites that batches hold.
        normalise: from raw activations to training units.
        tokens_since_fired: [N] int64, of the features held here.
        steps: those planned, for schedules; 0 without any.
        dead_after: tokens without firing after which a feature is dead.
        updates: successful optimiser steps so far.
        target: what a transcoder predicts; None for an SAE.
        silence: no feature has been silent for more tokens; none: not known.
    """

    name: str
    sites: tuple[int, ...]
    config: VariantConfig
    normalise: Normalisation
    sae: SAE
    optimiser: SAEOptimiser
    decorrelate: nn.Module
    generator: torch.Generator
    tokens_since_fired: Tensor
    steps: int
    dead_after: int
    updates: int = 0
    target: Target | None = None
    silence: int | None = 0

    @property
    def shard(self) -> Shard:
        """The features held here."""
        return self.sae.shard

    def rows(self, batch: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """What is read of a batch of raw activations, one tensor a site, and what a transcoder predicts, both in
        training units."""
        x_BD = self.normalise(side_by_side(batch, self.sites))
        return x_BD, None if self.target is None else self.target.normalise(side_by_side(batch, self.target.sites))

    def fold(self) -> None:
        """Make the SAE act on raw activations instead of training units."""
        out = self.normalise if self.target is None else self.target.normalise
        self.sae.fold(self.normalise.mean_D, self.normalise.scale, out.mean_D, out.scale)

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold of this trainer, under flat names.

        Raises:
            TrainingError: see `require_finite`.
        """
        self.require_finite()
        groups = {
            "sae": self.sae.state_dict() | {name: self.sae.get_buffer(name) for name in self.sae.training_buffers},
            "optimiser": self.optimiser.state_tensors(),
            "decorrelate": dict(self.decorrelate.state_dict()),
            "trainee": {
                "generator": self.generator.get_state(),
                "tokens_since_fired": self.tokens_since_fired,
                "mean": self.normalise.mean_D,
                "scale": torch.as_tensor(self.normalise.scale, dtype=torch.float64),
                "updates": torch.tensor(self.updates),
            },
        }
        if self.target is not None:
            groups["trainee"] |= {
                "mean_out": self.target.normalise.mean_D,
                "scale_out": torch.as_tensor(self.target.normalise.scale, dtype=torch.float64),
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

        sae = group("sae")
        for name in self.sae.training_buffers:
            self.sae.get_buffer(name).copy_(sae.pop(name))
        self.sae.load_state_dict(sae)
        self.optimiser.load_state_tensors(group("optimiser"))
        self.decorrelate.load_state_dict(group("decorrelate"))
        own = group("trainee")
        self.generator.set_state(own["generator"])
        self.tokens_since_fired.copy_(own["tokens_since_fired"])
        self.updates, self.silence = int(own["updates"]), None
        device = self.tokens_since_fired.device
        self.normalise = replace(self.normalise, mean_D=own["mean"], scale=_scale(own["scale"])).to(device)
        if self.target is not None:
            units = replace(self.target.normalise, mean_D=own["mean_out"], scale=_scale(own["scale_out"])).to(device)
            self.target = self.target._replace(normalise=units)

    def require_finite(self) -> None:
        """Look whether every step so far was finite, on an accelerator; a CPU looks at each step.

        Raises:
            TrainingError: one was not. The weights are as before it; the trainer can go on from them.
        """
        if host.reading_waits(self.optimiser.failed_at):
            self._require_no_failure(int(self.optimiser.failed_at))

    def _require_no_failure(self, failed_at: int) -> None:
        if failed_at:
            self.updates = failed_at - 1
            self.optimiser.failed_at.zero_()
            raise TrainingError(not_finite(self.name, "or its gradient was not finite", failed_at))

    def dead(self) -> Tensor | None:
        """[N] which features count as dead; none where it is known that none does."""
        if self.config.sae.revival_weight == 0:
            return None
        if self.shard.ranks.size == 1:  # Ranks must agree on whether there are any.
            if self.silence is None:
                self.silence = int(self.tokens_since_fired.amax())
            if self.silence < self.dead_after:
                return None
        return self.tokens_since_fired >= self.dead_after


def _scale(stored: Tensor) -> float | Tensor:
    """A scale as a checkpoint holds it: a number, or one for each column."""
    return float(stored) if stored.ndim == 0 else stored


def not_finite(name: str, what: str, step: int) -> str:
    """The message of a step, counted from 1, that was given up."""
    return (
        f"the loss of {name} {what} at step {step}; expected a finite number; its weights are as after the last good "
        "step; lower optimiser.lr, set optimiser.clip_norm, or lower decorrelation.lambda2"
    )


def new_trainer(
    config: RunConfig,
    place: int,
    variant: str,
    normalise: Sequence[Normalisation],
    device: torch.device,
    mesh: Mesh = SINGLE,
    penalty: nn.Module | None = None,
) -> SAETrainer:
    """The trainer of one SAE of a run before its first step, with the slice of features that this rank holds.

    Args:
        config: the run.
        place: index of its route among the run's.
        variant: name of its variant.
        normalise: from raw activations to training units, one for each site of the run.
        device: where it is trained.
        mesh: who else trains it.
        penalty: one in the place of the settings'; copied.
    """
    settings, route = config.variant(variant), config.routes[place]
    name, seed = config.sae_name(route, variant), derive_seed(settings.seed, str(route))
    shard, tokens = mesh.shard(settings.sae.n_features), config.training.tokens
    sites, units, target = ends(route, config.sites, normalise)
    return trainer_from_settings(
        name, sites, settings, seed, units, device, shard, penalty, config.steps, tokens, target
    )


def ends(
    route: Route, sites: Sequence[Site], normalise: Sequence[Normalisation]
) -> tuple[tuple[int, ...], Normalisation, Target | None]:
    """Which of the sites a dictionary reads, in which units, and what it predicts if it is a transcoder."""
    inputs, outputs = (tuple(sites.index(site) for site in end) for end in route)
    units = [Normalisation.side_by_side([normalise[site] for site in end]) for end in (inputs, outputs)]
    target = Target(outputs, units[1], has_layers(str(route))) if route.is_transcoder else None
    return inputs, units[0], target


def trainer_from_settings(
    name: str,
    sites: tuple[int, ...],
    settings: VariantConfig,
    seed: int,
    normalise: Normalisation,
    device: torch.device,
    shard: Shard | None = None,
    penalty: nn.Module | None = None,
    steps: int = 0,
    tokens: int = 0,
    target: Target | None = None,
) -> SAETrainer:
    """A trainer of these settings before its first step; all of its randomness comes from `seed`; see `new_trainer`.

    `steps` and `tokens` are those of the whole training: what falls over time and which features are dead depend on
    them. A transcoder has a `target`.
    """
    d_out, widths = (None, ()) if target is None else (len(target.normalise.mean_D), target.normalise.widths)
    predicted = normalise.widths if target is None else widths
    config = settings.sae if target is not None and target.has_layers else settings.sae.without_layers()
    sae = build_sae(config, len(normalise.mean_D), generator(seed, "init"), shard, d_out, (normalise.widths, widths))
    if penalty is None:
        own = settings.decorrelation, settings.sae.n_features, derive_seed(seed, "pairs"), shard
        penalty = build_decorrelation(*own, predicted)
    else:
        penalty = copy.deepcopy(penalty)
    return SAETrainer(
        name=name,
        sites=sites,
        config=settings,
        normalise=normalise.to(device),
        sae=sae.to(device),
        optimiser=SAEOptimiser(sae, settings.optimiser, predicted),
        decorrelate=penalty.to(device),
        generator=generator(seed, "training", device=device),
        tokens_since_fired=torch.zeros(sae.n_features, dtype=torch.long, device=device),
        steps=steps,
        dead_after=dead_after(settings.sae, tokens),
        target=None if target is None else target._replace(normalise=target.normalise.to(device)),
    )


def train_step(
    trainer: SAETrainer, x_BD: Tensor, step: int, lr: float, log: bool, y_BM: Tensor | None = None
) -> dict[str, Any] | None:
    """One update of one SAE: forward, Eq. 1, backward, Adam, unit rows; its line of metrics when `log`.

    A transcoder predicts `y_BM`; an SAE reconstructs `x_BD`.

    On an accelerator nothing is read from the device unless the step is logged, but for what the architecture and the
    penalty read themselves.

    Raises:
        TrainingError: the loss or its gradient is not finite, in this step or, on an accelerator, in one since a step
            was last logged; the weights are as before it.
    """
    sae, settings = trainer.sae, trainer.config
    lambda1 = settings.sae.sparsity_weight * warm_up(step, settings.optimiser.sparsity_warmup_steps)
    lambda2 = settings.decorrelation.weight * warm_up(step, settings.optimiser.decorrelation_warmup_steps)

    sae.begin_step(step, trainer.steps)
    dead_N = trainer.dead()
    with encoder_autocast(settings.optimiser.precision, x_BD.device):
        out = sae.training_forward(x_BD, dead_N, trainer.generator, y_BM=y_BM)
    loss = out.reconstruction + lambda1 * out.sparsity + out.auxiliary
    waits = host.reading_waits(loss)
    if not waits and not loss.isfinite():
        raise TrainingError(not_finite(trainer.name, f"became {loss.item()}", step + 1))
    penalty, stats = None, None
    dense, sparse = (None, out.codes) if isinstance(out.codes, Codes) else (out.codes, None)
    if sparse is not None and not isinstance(trainer.decorrelate, Penalty):
        sparse = sparse.without_padding()
    if lambda2 > 0 or log:
        with torch.set_grad_enabled(lambda2 > 0):
            penalty, stats = trainer.decorrelate(dense, codes=sparse, decoder=sae.W_dec)
    else:  # What a penalty remembers must not depend on how often it is logged.
        advance = trainer.decorrelate.advance if isinstance(trainer.decorrelate, Penalty) else trainer.decorrelate
        with torch.no_grad():
            advance(dense, codes=sparse, decoder=sae.W_dec)
    if penalty is not None and lambda2 > 0:
        loss = loss + lambda2 * penalty
    trainer.optimiser.zero_grad()
    loss.backward()
    gradient_norm = trainer.optimiser.step(lr, step + 1, loss)
    trainer.updates += 1
    _note_firing(trainer, out, len(x_BD))
    if not log:
        return None
    with torch.no_grad():
        ranks = trainer.shard.ranks
        wanted_BM = x_BD if y_BM is None else y_BM
        variance = (wanted_BM - wanted_BM.mean(0)).double().square().sum()
        unexplained = (wanted_BM - out.x_hat_BD).double().square().sum()
        counts = ranks.sum(torch.stack([_active(out.codes), _dead(trainer)]))
        # One read for all of them.
        measured = [trainer.optimiser.failed_at, loss, out.reconstruction, out.sparsity, out.auxiliary, variance]
        measured += [unexplained / variance, *counts]
        measured += [gradient_norm] if isinstance(gradient_norm, Tensor) else []
        measured += [penalty] if penalty is not None else []
        numbers = torch.stack([number.detach().double() for number in measured]).tolist()
        failed_at, total, reconstruction, sparsity, auxiliary, spread, left, active, dead, *rest = numbers
        trainer._require_no_failure(int(failed_at))
        penalised = penalty is not None and getattr(stats, "penalised", True)
        record = {
            "loss": total,
            "reconstruction": reconstruction,
            "sparsity": sparsity,
            "auxiliary": auxiliary,
            "penalty": rest[-1] if penalised else None,
            "l0": active / len(x_BD),
            "r2": 1 - left if spread > 0 else None,
            "dead_fraction": dead / trainer.shard.n_features,
            "grad_norm": rest[0] if isinstance(gradient_norm, Tensor) else gradient_norm,
            "updates": trainer.updates,
            "path": out.path,
            "lr": lr,
            "lambda1": lambda1,
            "lambda2": lambda2,
        }
        if isinstance(stats, DecorrelationStats):
            return record | correlation_record(stats.from_all(ranks))
        return record | {"decorrelation": numbers_of(stats)}


def correlation_record(stats: DecorrelationStats) -> dict[str, Any]:
    """What metrics.jsonl says about correlation; `correlation_top` is the mean over the nominal |S|."""
    scalars = stats.scalars()
    return {
        "tau": scalars["tau"],
        "correlation_mean": scalars["mean"],
        "correlation_std": scalars["std"],
        "correlation_top": None if math.isnan(stats.top) else stats.top,
        "pairs": scalars["pairs"],
        "decorrelation": scalars,
    }


def numbers_of(stats: Any) -> dict[str, float]:
    """What can be logged of whatever a penalty of one's own returns beside its value: the numbers of a dict."""
    if not isinstance(stats, dict):
        return {}
    scalars = {str(name): value.item() if isinstance(value, Tensor) else value for name, value in stats.items()}
    return {name: float(value) for name, value in scalars.items() if isinstance(value, int | float)}


def _active(codes: Codes | Tensor) -> Tensor:
    """How many entries are active, in float64."""
    if not isinstance(codes, Codes):
        return (codes != 0).sum().double()
    return (codes.values > 0).sum().double() if codes.padded else codes.offsets[-1].double()


def _dead(trainer: SAETrainer) -> Tensor:
    """How many features count as dead now, in float64."""
    return (trainer.tokens_since_fired >= trainer.dead_after).sum().double()


@torch.no_grad()
def _note_firing(trainer: SAETrainer, out: Forward, tokens: int) -> None:
    fired_N = torch.zeros_like(trainer.tokens_since_fired, dtype=torch.bool)
    if not isinstance(out.codes, Codes):
        fired_N = out.codes.amax(0) > 0
    elif out.codes.padded:
        fired_N = out.codes.firing() > 0
    else:
        fired_N[out.codes.indices] = True
    trainer.tokens_since_fired += tokens
    trainer.tokens_since_fired[fired_N] = 0
    if trainer.silence is not None:
        # Where none was found dead the bound was too high: it is measured again before the next step.
        known = out.revived > 0 or trainer.silence < trainer.dead_after
        trainer.silence = trainer.silence + tokens if known else None
