"""TopK (Gao et al. 2024, arXiv 2406.04093): the k largest pre-activations of each token, after a ReLU."""

import torch
from torch import Tensor

from unbraid.distributed.shard import among_top_k
from unbraid.kernels.codes import Codes
from unbraid.kernels.selection import top_k
from unbraid.sae.base import SAE
from unbraid.sae.dead import explain_residual


class TopKSAE(SAE):
    """f keeps the k largest entries of relu(pre) in each row."""

    architecture = "topk"

    def initial_share(self) -> float:
        """k / N, of the positive half at most."""
        return min(super().initial_share(), self.config.k / self.config.n_features)

    def encode(self, x: Tensor) -> Tensor:
        """Codes, `[..., N]`."""
        pre = self.preactivations(x)
        values, indices = pre.topk(self.config.k, dim=-1, sorted=False)
        return torch.zeros_like(pre).scatter(-1, indices, values.relu())

    def density(self, pre_BN: Tensor) -> float:
        """k / N."""
        return self.config.k / self.config.n_features

    def select(self, pre_BN: Tensor) -> Codes:
        """The k largest of each row, less those that are not positive."""
        k = min(self.config.k, self.n_features)
        values_BK, features_BK = top_k(pre_BN, k)
        values, features = values_BK.flatten(), features_BK.flatten()
        rows = torch.arange(len(pre_BN), device=pre_BN.device).repeat_interleave(k)
        kept = ((values_BK > 0) & among_top_k(values_BK, self.config.k, self.shard.ranks)).flatten()
        if not kept.all():
            values, features, rows = values[kept], features[kept], rows[kept]
        return Codes.from_rows(rows, features, values, len(pre_BN), self.n_features)

    def revival(self, seen_BD: Tensor, residual_BD: Tensor, dead_N: Tensor) -> Tensor:
        """Dead features explain the residual (aux-k), weighted."""
        aux_k = self.d_in // 2 if self.config.aux_k is None else self.config.aux_k
        if aux_k == 0:
            return seen_BD.new_zeros(())
        return self.config.aux_weight * explain_residual(self, seen_BD, residual_BD, dead_N, aux_k)
