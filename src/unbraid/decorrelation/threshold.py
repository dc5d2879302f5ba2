"""tau of Eq. 4 and the ways to keep it from chasing its own success.

mu + sigma falls as pairs come apart, so a penalty that aims at it never stops: the adaptive threshold ratchets down
until it pushes apart what chance alone would put together. A floor stops it there.
"""

import math
from typing import Literal

import torch
from torch import nn

from unbraid.errors import ConfigError

ThresholdKind = Literal["batch", "running", "fixed"]


def chance_level(n_features: int, n_dimensions: int) -> float:
    """sqrt(2 ln N / D): about the largest cosine a feature has with N random directions in D dimensions, at most 1."""
    return min(1.0, math.sqrt(2 * math.log(max(n_features, 1)) / max(n_dimensions, 1)))


class Threshold(nn.Module):
    """tau from mu and sigma: of the latest selection, as a running mean over selections, or fixed; with a floor.

    Args:
        kind: batch (mu + sigma), running (its exponential mean), or fixed.
        tau: the fixed threshold.
        decay: of the running mean, which starts at the first value it sees.
        floor: tau never falls below it: a number, "chance" (`chance_level` of the vectors compared), or none.
    """

    running: torch.Tensor

    def __init__(self, kind: ThresholdKind, tau: float, decay: float, floor: float | Literal["chance"] | None):
        super().__init__()
        if kind not in ("batch", "running", "fixed"):
            raise ConfigError(f"threshold = {kind!r} is unknown; expected batch, running or fixed")
        if isinstance(floor, str) and floor != "chance":
            raise ConfigError(f"floor = {floor!r} is unknown; expected a number, chance or none")
        self.kind, self.tau, self.decay, self.floor = kind, tau, decay, floor
        unset = torch.tensor(math.inf, dtype=torch.float64)
        self.register_buffer("running", unset, persistent=kind == "running")

    def forward(self, mean: float, std: float, n_features: int, n_dimensions: int) -> float:
        """tau after a selection with this mu and sigma among `n_features` vectors of `n_dimensions`."""
        tau = self.tau if self.kind == "fixed" else mean + std
        if self.kind == "running":
            before = float(self.running)
            if math.isfinite(before):
                tau = self.decay * before + (1 - self.decay) * tau
            if self.training:
                self.running.fill_(tau)
        return self.floored(tau, n_features, n_dimensions)

    def floored(self, tau: float, n_features: int, n_dimensions: int) -> float:
        """`tau`, or the floor where that is higher."""
        if self.floor is None:
            return tau
        return max(tau, chance_level(n_features, n_dimensions) if self.floor == "chance" else float(self.floor))
