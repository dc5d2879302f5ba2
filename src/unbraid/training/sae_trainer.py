"""One SAE in training: its state, its first weights, and the step that changes them.

Each SAE of a run has a trainer with its own parameters, optimiser, decorrelation state and generators, all derived from
the seed and its settings, never from other SAEs: trained beside others it ends with the same bytes as trained
alone. Split by features over ranks, a trainer holds one slice and exchanges in each step what the slices must agree on.
"""

import copy
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unbraid.config import RunConfig, VariantConfig
from unbraid.decorrelation.base import Penalty
from unbraid.decorrelation.build import build as build_decorrelation
from unbraid.decorrelation.stats import DecorrelationStats
from unbraid.distributed.mesh import SINGLE, Mesh
from unbraid.distributed.shard import Shard
from unbraid.errors import TrainingError
from unbraid.randomness import derive_seed, generator
from unbraid.sae import SAE, Codes
from unbraid.sae.build import build as build_sae
from unbraid.sae.dead import dead_after
from unbraid.training.normalisation import Normalisation
from unbraid.training.optimiser import SAEOptimiser
from unbraid.training.precision import encoder_autocast
from unbraid.training.schedules import warm_up


@dataclass
class SAETrainer:
    """An SAE in training and everything that its steps need.

    Attributes:
        name: folder and metric name.
        site: index of its site among the run's sites.
        normalise: from raw activations to training units.
        tokens_since_fired: [N] int64, of the features held here.
        steps: those planned, for schedules; 0 without any.
        dead_after: tokens without firing after which a feature is dead.
        updates: successful optimiser steps so far.
    """

    name: str
    site: int
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

    @property
    def shard(self) -> Shard:
        """The features held here."""
        return self.sae.shard

    def tensors(self) -> dict[str, Tensor]:
        """Everything a checkpoint must hold of this trainer, under flat names."""
        groups = {
            "sae": self.sae.state_dict() | {name: getattr(self.sae, name) for name in self.sae.training_buffers},
            "optimiser": self.optimiser.state_tensors(),
            "decorrelate": dict(self.decorrelate.state_dict()),
            "trainee": {
                "generator": self.generator.get_state(),
                "tokens_since_fired": self.tokens_since_fired,
                "mean": self.normalise.mean_D,
                "scale": torch.tensor(self.normalise.scale, dtype=torch.float64),
                "updates": torch.tensor(self.updates),
            },
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
            getattr(self.sae, name).copy_(sae.pop(name))
        self.sae.load_state_dict(sae)
        self.optimiser.load_state_tensors(group("optimiser"))
        self.decorrelate.load_state_dict(group("decorrelate"))
        own = group("trainee")
        self.generator.set_state(own["generator"])
        self.tokens_since_fired.copy_(own["tokens_since_fired"])
        self.updates = int(own["updates"])
        self.normalise = Normalisation(own["mean"].to(self.tokens_since_fired.device), float(own["scale"]))


def new_trainer(
    config: RunConfig,
    site: int,
    variant: str,
    normalise: Normalisation,
    device: torch.device,
    mesh: Mesh = SINGLE,
    penalty: nn.Module | None = None,
) -> SAETrainer:
    """The trainer of one SAE of a run before its first step, with the slice of features that this rank holds.

    Args:
        config: the run.
        site: index of where its activations are read among the run's sites.
        variant: name of its variant.
        normalise: from raw activations to training units.
        device: where it is trained.
        mesh: who else trains it.
        penalty: one in the place of the settings'; copied.
    """
    settings, place = config.variant(variant), config.sites[site]
    name, seed = config.sae_name(place, variant), derive_seed(settings.seed, str(place))
    shard, tokens = mesh.shard(settings.sae.n_features), config.training.tokens
    return trainer_from_settings(name, site, settings, seed, normalise, device, shard, penalty, config.steps, tokens)


def trainer_from_settings(
    name: str,
    site: int,
    settings: VariantConfig,
    seed: int,
    normalise: Normalisation,
    device: torch.device,
    shard: Shard | None = None,
    penalty: nn.Module | None = None,
    steps: int = 0,
    tokens: int = 0,
) -> SAETrainer:
    """A trainer of these settings before its first step; all of its randomness comes from `seed`; see `new_trainer`.

    `steps` and `tokens` are those of the whole training: what falls over time and which features are dead depend on
    them.
    """
    sae = build_sae(settings.sae, len(normalise.mean_D), generator(seed, "init"), shard).to(device)
    if penalty is None:
        own = settings.decorrelation, settings.sae.n_features, sae.d_in, derive_seed(seed, "pairs"), shard
        penalty = build_decorrelation(*own)
    else:
        penalty = copy.deepcopy(penalty)
    return SAETrainer(
        name=name,
        site=site,
        config=settings,
        normalise=normalise.to(device),
        sae=sae,
        optimiser=SAEOptimiser(sae, settings.optimiser),
        decorrelate=penalty.to(device),
        generator=generator(seed, "training", device=device),
        tokens_since_fired=torch.zeros(sae.n_features, dtype=torch.long, device=device),
        steps=steps,
        dead_after=dead_after(settings.sae, tokens),
    )


def train_step(trainer: SAETrainer, x_BD: Tensor, step: int, lr: float, log: bool) -> dict[str, Any] | None:
    """One update of one SAE: forward, Eq. 1, backward, Adam, unit rows; its line of metrics when `log`.

    Raises:
        TrainingError: the loss or its gradient is not finite; the weights are as they were.
    """
    sae, settings = trainer.sae, trainer.config
    lambda1 = settings.sae.sparsity_weight * warm_up(step, settings.optimiser.sparsity_warmup_steps)
    lambda2 = settings.decorrelation.weight * warm_up(step, settings.optimiser.decorrelation_warmup_steps)

    sae.begin_step(step, trainer.steps)
    dead_N = trainer.tokens_since_fired >= trainer.dead_after
    with encoder_autocast(settings.optimiser.precision, x_BD.device):
        out = sae.training_forward(x_BD, dead_N, trainer.generator)
    loss = out.reconstruction + lambda1 * out.sparsity + out.auxiliary
    if not loss.isfinite():
        raise TrainingError(
            f"the loss of {trainer.name} became {loss.item()} at step {step + 1}; expected a finite number; its "
            "weights are as after the last good step; lower optimiser.lr, set optimiser.clip_norm, or lower "
            "decorrelation.lambda2"
        )
    penalty, stats = None, None
    dense, sparse = (None, out.codes) if isinstance(out.codes, Codes) else (out.codes, None)
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
    gradient_norm = trainer.optimiser.step(lr)
    trainer.updates += 1
    _note_firing(trainer, out.codes, len(x_BD))
    if not log:
        return None
    with torch.no_grad():
        ranks = trainer.shard.ranks
        variance = (x_BD - x_BD.mean(0)).double().square().sum()
        active = out.codes.values.numel() if isinstance(out.codes, Codes) else int((out.codes != 0).sum())
        dead = int((trainer.tokens_since_fired >= trainer.dead_after).sum())
        active, dead = ranks.total(active, dead)
        record = {
            "loss": loss.item(),
            "reconstruction": out.reconstruction.item(),
            "sparsity": out.sparsity.item(),
            "auxiliary": out.auxiliary.item(),
            "penalty": penalty.item() if penalty is not None and getattr(stats, "penalised", True) else None,
            "l0": active / len(x_BD),
            "r2": 1 - ((x_BD - out.x_hat_BD).double().square().sum() / variance).item() if variance > 0 else None,
            "dead_fraction": dead / trainer.shard.n_features,
            "grad_norm": float(gradient_norm),
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


@torch.no_grad()
def _note_firing(trainer: SAETrainer, codes: Codes | Tensor, tokens: int) -> None:
    fired_N = torch.zeros_like(trainer.tokens_since_fired, dtype=torch.bool)
    if isinstance(codes, Codes):
        fired_N[codes.indices] = True
    else:
        fired_N = codes.amax(0) > 0
    trainer.tokens_since_fired += tokens
    trainer.tokens_since_fired[fired_N] = 0
