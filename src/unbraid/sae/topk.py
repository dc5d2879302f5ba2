"""TopK (Gao et al. 2024, arXiv 2406.04093): the k largest pre-activations of each token, after a ReLU."""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from unbraid.config import WithKConfig
from unbraid.distributed.shard import among_top_k
from unbraid.kernels import host
from unbraid.kernels.codes import Codes
from unbraid.kernels.selection import top_k
from unbraid.sae.base import SAE
from unbraid.sae.dead import explain_residual
from unbraid.sae.registry import register


def on_the_way(start: int, end: int, shape: str, share: float) -> float:
    """A value on its way from `start` to `end` when `share` (0 to 1) of the steps is done.

        >>> on_the_way(80, 25, "linear", 0.5), on_the_way(64, 16, "geometric", 0.5)
        (52.5, 32.0)

    Args:
        start, end: both above 0.
        shape: linear; geometric (equal ratios); cosine (slow at both ends).
        share: how far.
    """
    if shape == "geometric":
        return start * (end / start) ** share
    return start + (end - start) * (share if shape == "linear" else (1 - math.cos(math.pi * share)) / 2)


class TopKConfig(WithKConfig):
    """The k largest of each token."""

    architecture: Literal["topk"] = "topk"


@register
class TopKSAE(SAE):
    """f keeps the k largest entries of relu(pre) in each row."""

    settings = TopKConfig
    config: WithKConfig
    written_as = {"sae_lens": "topk", "dictionary_learning": "AutoEncoderTopK", "sparsify": "topk"}  # noqa: RUF012

    def __init__(self, config: WithKConfig, *args: Any):
        self.training_k = float(config.k_start or config.k)
        super().__init__(config, *args)

    def begin_step(self, step: int, steps: int) -> None:
        """k falls from `k_start` to `k` over the first `k_fall` of the steps, and stays there."""
        super().begin_step(step, steps)
        if self.config.k_start is not None:
            falling = self.config.k_fall * steps
            share = min(1.0, step / falling) if falling > 0 else 1.0
            self.training_k = on_the_way(self.config.k_start, self.config.k, self.config.k_shape, share)

    def initial_share(self) -> float:
        """k / N, of the positive half at most."""
        return min(super().initial_share(), self.training_k / self.config.n_features)

    def encode(self, x: Tensor) -> Tensor:
        """Codes, `[..., N]`."""
        pre = self.preactivations(x)
        values, indices = pre.topk(self.config.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, indices, values.relu())

    def density(self, pre_BN: Tensor) -> float:
        """k / N."""
        return self.training_k / self.config.n_features

    def selects_padded(self, pre_BN: Tensor) -> bool:
        """Whether entries that are not positive are left among the selected ones: where counting them would wait."""
        return self.shard.whole and host.reading_waits(pre_BN)

    def select(self, pre_BN: Tensor) -> Codes:
        """The k largest of each row, less those that are not positive (with padding on an accelerator)."""
        all_k = round(self.training_k)
        k = min(all_k, self.n_features)
        values_BK, features_BK = top_k(pre_BN, k)
        values, features = values_BK.flatten(), features_BK.flatten()
        rows = torch.arange(len(pre_BN), device=pre_BN.device).repeat_interleave(k)
        if self.selects_padded(pre_BN):
            codes = Codes.from_rows(rows, features, values, len(pre_BN), self.n_features)
            return codes.with_padding(values)
        kept = ((values_BK > 0) & among_top_k(values_BK, all_k, self.shard.ranks)).flatten()
        if not kept.all():
            values, features, rows = values[kept], features[kept], rows[kept]
        return Codes.from_rows(rows, features, values, len(pre_BN), self.n_features)

    def revival(self, seen_BD: Tensor, residual_BD: Tensor, dead: Tensor) -> Tensor:
        """Dead features explain the residual (aux-k), weighted."""
        aux_k = self.d_in // 2 if self.config.aux_k is None else self.config.aux_k
        if aux_k == 0:
            return seen_BD.new_zeros(())
        return self.config.revival_weight * explain_residual(self, seen_BD, residual_BD, dead, aux_k)
