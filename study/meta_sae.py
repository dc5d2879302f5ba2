"""A rival that the library does not offer: rows that a small SAE of the decoder can rebuild are penalised.

After Levinson 2026 (arXiv 2604.03436): beside the SAE a *meta-SAE* learns to reconstruct its decoder rows from a few
directions each; a row that it explains is a mixture of what other rows are made of, and is pushed to be less so.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH_SHARE, K, LR = 4, 4, 1e-3
"""The meta-SAE's features are a quarter of the SAE's; active ones a row; its Adam's rate."""


class MetaSAEPenalty(nn.Module):
    """Mean explained share of the decoder rows, 1 - ||w - w_hat||^2; the meta-SAE learns at each call.

    Args:
        seed: of the meta-SAE's first directions.
    """

    def __init__(self, seed: int):
        super().__init__()
        self.seed, self.meta, self.adam = seed, None, None

    def forward(self, f: Tensor | None = None, *, codes: object = None, decoder: Tensor) -> tuple[Tensor, None]:
        """The penalty, whose gradient reaches the decoder alone; there are no stats."""
        rows_ND = F.normalize(decoder, dim=1)
        with torch.enable_grad():
            if self.meta is None:
                chance = torch.Generator().manual_seed(self.seed)
                first = torch.randn(len(rows_ND) // WIDTH_SHARE, rows_ND.shape[1], generator=chance)
                self.meta = nn.Parameter(F.normalize(first, dim=1))
                self.adam = torch.optim.Adam([self.meta], lr=LR)
            assert self.adam is not None
            self.adam.zero_grad()
            left = rows_ND.detach() - self._rebuilt(rows_ND.detach(), self.meta)
            left.square().sum(1).mean().backward()
            self.adam.step()
        left = rows_ND - self._rebuilt(rows_ND, self.meta.detach())
        return 1 - left.square().sum(1).mean(), None

    @staticmethod
    def _rebuilt(rows_ND: Tensor, meta: Tensor) -> Tensor:
        unit = F.normalize(meta, dim=1)
        top = (rows_ND @ unit.T).relu().topk(K)
        return torch.zeros(len(rows_ND), len(unit)).scatter(1, top.indices, top.values) @ unit
