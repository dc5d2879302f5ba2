"""BatchTopK (Bussmann et al. 2024, arXiv 2412.06410): B * k active entries a batch, shared out among its tokens.

Which entries are active depends on the whole batch, so inference needs a threshold of its own: a running mean of the
smallest active value of each training batch. It starts at the first batch's, so even a short run has one.
"""

import torch
from torch import Tensor

from unbraid.distributed.shard import among_top
from unbraid.kernels.codes import Codes
from unbraid.kernels.selection import batch_top_k
from unbraid.sae.topk import TopKSAE

GUESS = 0.9
"""Candidates are the entries above this share of the running threshold; one batch's cut rarely falls below it."""


class BatchTopKSAE(TopKSAE):
    """f keeps the B * k largest entries of relu(pre) in training, the entries above `threshold` in inference."""

    architecture = "batch_topk"
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
        codes = batch_top_k(pre_BN, min(count, pre_BN.numel()), GUESS * float(self.threshold))
        if not shard.whole:
            keys = codes.rows() * shard.n_features + codes.indices + shard.start
            codes = codes.where(among_top(codes.values, keys, count, shard.ranks))
        values = codes.values
        smallest = shard.ranks.min(values.amin() if values.numel() else values.new_full((), torch.inf))
        if smallest < torch.inf:
            weight = (1 - self.config.threshold_decay) * (self.threshold > 0) + 1.0 * (self.threshold == 0)
            self.threshold += weight * (smallest - self.threshold)
        return codes
