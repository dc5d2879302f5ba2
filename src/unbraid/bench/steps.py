"""`unbraid bench step`: a training step of every architecture beside one bare encoder product of the same shape.

All take turns in one process on the same stand-in activations. The product is the part of a step nobody can leave out,
so the ratio to it says what an architecture and a penalty cost, and is nearly the same on any machine.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unbraid.bench.timing import Times, take_turns
from unbraid.config import RunConfig, SAEConfig, VariantConfig, WithKConfig
from unbraid.errors import ConfigError
from unbraid.kernels import workspace
from unbraid.presets import PRESETS, with_preset
from unbraid.sae.base import SAE
from unbraid.training.normalisation import Normalisation
from unbraid.training.sae_trainer import SAETrainer, train_step, trainer_from_settings

PRODUCT = "product"
NEVER_DEAD = 1 << 40
"""Tokens; while steps are timed no feature dies."""
ACTIVE = 32
DIRECTIONS = 8192
BATCHES = 8
LR = 1e-7
"""Too small to change how many features of a thresholded SAE are active while it is timed."""


class Shape(NamedTuple):
    """Width read, features, tokens in a batch."""

    d_in: int
    n_features: int
    batch: int

    def __str__(self) -> str:
        return f"{self.d_in} x {self.n_features}, B = {self.batch}"

    @classmethod
    def parse(cls, words: str) -> "Shape":
        """`512x8192x2048`: D x N x B.

        Raises:
            ConfigError: it is nothing like that.
        """
        parts = words.lower().split("x")
        if len(parts) != 3 or not all(part.isdecimal() and 0 < int(part) < 1 << 31 for part in parts):
            raise ConfigError(f"shape {words[:80]!r} is not D x N x B; expected three numbers such as 512x8192x2048")
        return cls(*map(int, parts))


def stand_in_activations(d_in: int, batch: int, count: int, device: str | torch.device, seed: int = 0) -> list[Tensor]:
    """Batches of stand-in activations, E||x||^2 = 1: 32 of 8192 directions each, a few frequent and many rare ones."""
    draws = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(DIRECTIONS, d_in, generator=draws), dim=1)
    batches = []
    for _ in range(count):
        chosen = (torch.rand(batch, ACTIVE, generator=draws) ** 3 * DIRECTIONS).long()
        weights = torch.rand(batch, ACTIVE, generator=draws) + 0.5
        x_BD = F.embedding_bag(chosen, directions, per_sample_weights=weights, mode="sum")
        batches.append((x_BD / x_BD.square().sum(1).mean().sqrt()).to(device))
    return batches


def endless(batches: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """The batches again and again, numbered."""
    return ((step, batches[step % len(batches)]) for step in itertools.count())


@torch.no_grad()
def hold_l0(sae: SAE, x_BD: Tensor, l0: int) -> None:
    """Set the encoder's bias so that `l0` features a row are active: what a trained SAE has, and an untrained not."""
    pre = sae.preactivations(x_BD[:256]).flatten().float()
    cut = pre.kthvalue(max(1, round(pre.numel() * (1 - l0 / sae.n_features)))).values
    bias: Tensor = getattr(sae, "b_gate" if hasattr(sae, "b_gate") else "b_enc")
    bias.sub_(cut)


def settings_of(architecture: str, n_features: int, k: int, penalty: str, precision: str = "float32") -> VariantConfig:
    """Settings of what is timed: the penalty is none, or that of a preset.

    Raises:
        ConfigError: there is no such architecture or preset.
    """
    if architecture not in SAEConfig.kinds():
        raise ConfigError(f"architecture {architecture[:80]!r} is unknown; expected {', '.join(SAEConfig.kinds())}")
    if penalty not in ("none", *PRESETS):
        raise ConfigError(f"decorrelation {penalty[:80]!r} is unknown; expected none, {', '.join(PRESETS)}")
    kind = SAEConfig.kinds()[architecture]
    sae: dict[str, Any] = {"architecture": architecture, "n_features": n_features, "dead_after_tokens": NEVER_DEAD}
    sae |= {"k": k} if issubclass(kind, WithKConfig) else {"lambda1": 0.05}
    decorrelation: Any = {"method": "none"}
    if penalty != "none":
        decorrelation = with_preset(RunConfig(), penalty).decorrelation
    return VariantConfig.model_validate(
        {
            "seed": 0,
            "sae": sae,
            "optimiser": {"warmup_steps": 0, "lr": LR, "precision": precision},
            "decorrelation": decorrelation,
        }
    )


class Steps:
    """A contender: some training steps a call."""

    def __init__(self, settings: VariantConfig, batches: list[Tensor], k: int, steps: int):
        device = batches[0].device
        normalise = Normalisation.none(batches[0].shape[1])
        self.trainer: SAETrainer = trainer_from_settings("bench", (0,), settings, 0, normalise, device)
        self.steps, self._feed = steps, endless(batches)
        if self.trainer.sae.k is None:
            hold_l0(self.trainer.sae, batches[0], k)

    def __call__(self) -> None:
        """The steps of one turn, none of them logged."""
        for number, x_BD in itertools.islice(self._feed, self.steps):
            train_step(self.trainer, x_BD, number, LR, log=False)


def bare_product(batches: list[Tensor], n_features: int, steps: int, precision: str) -> Callable[[], None]:
    """A contender: the encoder's product alone, into memory that is used again."""
    x_BD = batches[0]
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    weights = F.normalize(torch.randn(n_features, x_BD.shape[1], generator=torch.Generator().manual_seed(0)), dim=1)
    weights, bias = weights.to(x_BD.device, dtype), torch.zeros(n_features, device=x_BD.device, dtype=dtype)
    out = torch.empty(len(x_BD), n_features, device=x_BD.device, dtype=dtype)

    def multiply() -> None:
        for _ in range(steps):
            torch.addmm(bias, x_BD.to(dtype), weights.T, out=out)

    return multiply


def measure_steps(
    shape: Shape,
    architectures: Sequence[str],
    penalties: Sequence[str],
    k: int,
    device: torch.device,
    rounds: int,
    steps: int,
    precision: str = "float32",
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Times of a step of each architecture with each penalty at one shape, and of the product.

    Args:
        shape: D, N and B.
        architectures: names.
        penalties: none, or presets whose penalty is taken.
        k: active features a row; thresholded architectures are held there.
        device: where.
        rounds: turns of each.
        steps: in a turn.
        precision: of the encoder's product.
        say: told what is being prepared.

    Returns:
        A row for each: `what`, `penalty`, times of one step, `rows_per_second`, `products` (wall time over that of the
        bare product).
    """
    if k >= shape.n_features:
        raise ConfigError(f"k = {k} of {shape.n_features} features; expected fewer; lower k or widen the shape")
    batches = stand_in_activations(shape.d_in, shape.batch, BATCHES, device)
    contenders: dict[str, Callable[[], None]] = {PRODUCT: bare_product(batches, shape.n_features, steps, precision)}
    named: dict[str, tuple[str, str]] = {PRODUCT: (PRODUCT, "none")}
    for architecture, penalty in itertools.product(architectures, penalties):
        name = architecture if penalty == "none" else f"{architecture} + {penalty}"
        say(f"{shape}: {name}")
        settings = settings_of(architecture, shape.n_features, k, penalty, precision)
        contenders[name], named[name] = Steps(settings, batches, k, steps), (architecture, penalty)
    found = take_turns(contenders, rounds, device.type)
    workspace.drop()
    return [_row(shape, k, *named[name], times, steps, found[PRODUCT]) for name, times in found.items()]


def _row(shape: Shape, k: int, what: str, penalty: str, times: Times, steps: int, product: Times) -> dict[str, Any]:
    report, bare = per_step(times.report(), steps), per_step(product.report(), steps)
    return {
        "what": what,
        "penalty": penalty,
        "shape": shape._asdict() | {"k": k},
        **report,
        "rows_per_second": round(shape.batch / report["wall_ms"] * 1e3) if report["wall_ms"] else None,
        "products": round(report["wall_ms"] / bare["wall_ms"], 2) if bare["wall_ms"] else None,
    }


def per_step(report: dict[str, Any], steps: int) -> dict[str, Any]:
    """The report of turns of several steps as one of a single step."""
    per = {name: round(report[name] / steps, 3) for name in ("wall_ms", "cpu_ms")}
    return report | per | {"wall_ms_quartiles": [round(value / steps, 3) for value in report["wall_ms_quartiles"]]}
