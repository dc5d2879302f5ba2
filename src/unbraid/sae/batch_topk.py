"""BatchTopK (Bussmann et al. 2024, arXiv 2412.06410): B * k active entries per batch, however they fall on its tokens.

Which entries are active depends on the whole batch, so inference needs a threshold of its own: a running mean of the
smallest active value of each training batch. It starts at the first batch's, so even a short run has one.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from unbraid.config import WithKConfig
from unbraid.distributed.shard import among_top
from unbraid.kernels.codes import Codes
from unbraid.kernels.selection import batch_top_k, batch_top_k_padded
from unbraid.sae.registry import register
from unbraid.sae.topk import TopKSAE

GUESS = 0.9
"""Candidates are the entries above this share of the running threshold; one batch's cut rarely falls below it."""


class SharedThresholdConfig(WithKConfig):
    """Architectures whose training picks from a whole batch and whose inference needs a threshold."""

    threshold_decay: float = Field(default=0.9, ge=0.0, lt=1.0)
    """Decay of the running mean that is the inference threshold."""


class BatchTopKConfig(SharedThresholdConfig):
    """B * k largest of a batch."""

    architecture: Literal["batch_topk"] = "batch_topk"


@register
class BatchTopKSAE(TopKSAE):
    """f keeps the B * k largest entries of relu(pre) in training, the entries above `threshold` in inference."""

    settings = BatchTopKConfig
    config: SharedThresholdConfig
    threshold_kind = "shared"
    written_as = {"sae_lens": "jumprelu", "dictionary_learning": "BatchTopKSAE"}  # noqa: RUF012
    scaled_with_input = ("b_enc", "threshold")

    def add_biases(self) -> None:
        """b_enc and the inference threshold, zero until the first training batch."""
        super().add_biases()
        self.threshold: Tensor
        self.register_buffer("threshold", torch.zeros(()))

    def encode(self, x: Tensor) -> Tensor:
        """Codes, `[..., N]`."""
        pre = self.preactivations(x)
        return pre.relu() * (pre > self.threshold)

    def select(self, pre_BN: Tensor) -> Codes:
        """The B * k largest positive entries of the batch; the threshold follows the smallest of them."""
        count, shard = round(len(pre_BN) * self.training_k), self.shard
        if self.selects_padded(pre_BN):
            codes = batch_top_k_padded(pre_BN, min(count, pre_BN.numel()))
            codes = codes.with_padding(codes.values)
            self._follow(codes.values.where(codes.values > 0, torch.inf).amin())
            return codes
        codes = batch_top_k(pre_BN, min(count, pre_BN.numel()), GUESS * float(self.threshold))
        if not shard.whole:
            keys = codes.rows() * shard.n_features + codes.indices + shard.start
            codes = codes.where(among_top(codes.values, keys, count, shard.ranks))
        values = codes.values
        self._follow(shard.ranks.min(values.amin() if values.numel() else values.new_full((), torch.inf)))
        return codes

    @torch.no_grad()
    def _follow(self, smallest: Tensor) -> None:
        """Move the threshold towards the smallest active value of a batch; infinity when there was none."""
        weight = (1 - self.config.threshold_decay) * (self.threshold > 0) + 1.0 * (self.threshold == 0)
        moved = self.threshold + weight * (smallest - self.threshold)
        self.threshold.copy_(torch.where(smallest < torch.inf, moved, self.threshold))
