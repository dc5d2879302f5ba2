"""The nearest decoder rows of every feature, kept up to date by looking at a few rows each step.

Decoders move slowly, so nobody needs the N x N cosines of every step: one rotating chunk of c rows is compared with
all others, O(N c D), and each of its features keeps its nearest neighbours. Selection reads these lists, O(N m).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from unbraid.decorrelation.decoder_rows import UnitRows, pair_cosines, row_moments
from unbraid.decorrelation.selection import Selection, grid, nominal_pairs, steps_per_unit
from unbraid.decorrelation.window import ElasticState

UNKNOWN = -2.0


class NeighbourLists(ElasticState):
    """For each feature the `n_neighbours` other rows of largest cosine when it was last looked at.

    Args:
        n_neighbours: m, entries per list.
        rows_per_scan: c, features looked at in one scan.
    """

    neighbours: Tensor
    cosines: Tensor
    position: Tensor

    def __init__(self, n_neighbours: int, rows_per_scan: int):
        super().__init__()
        self.n_neighbours, self.rows_per_scan = n_neighbours, rows_per_scan
        self.register_buffer("neighbours", torch.empty(0, n_neighbours, dtype=torch.int32))
        self.register_buffer("cosines", torch.empty(0, n_neighbours))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @property
    def complete(self) -> bool:
        """Whether every feature has been looked at."""
        return bool((self.cosines[-1:] > UNKNOWN).any())

    def scan(self, unit_ND: Float[Tensor, "N D"]) -> None:
        """Look at the next chunk of rows."""
        n_rows = unit_ND.shape[0]
        width = min(self.n_neighbours, n_rows - 1)
        if self.neighbours.shape != (n_rows, width):
            self.remember(
                neighbours=torch.zeros(n_rows, width, dtype=torch.int32, device=unit_ND.device),
                cosines=torch.full((n_rows, width), UNKNOWN, device=unit_ND.device),
                position=torch.zeros((), dtype=torch.int64, device=unit_ND.device),
            )
        if width == 0:
            return
        start = int(self.position)
        end = min(start + self.rows_per_scan, n_rows)
        cosines = unit_ND[start:end] @ unit_ND.T
        own = torch.arange(start, end, device=unit_ND.device)
        cosines[own - start, own] = UNKNOWN
        nearest = cosines.topk(width, dim=1)
        self.cosines[start:end] = nearest.values.to(self.cosines.dtype)
        self.neighbours[start:end] = nearest.indices.int()
        self.position.fill_(end % n_rows)

    def select(self, rows: UnitRows, fraction: float, max_pairs_per_feature: int | None) -> Selection:
        """The top pairs among the lists, by their cosines now; mu and sigma over all pairs, exactly."""
        unit_ND = rows.unit_ND
        n_rows = unit_ND.shape[0]
        wanted, limit = nominal_pairs(n_rows, fraction, max_pairs_per_feature)
        mean, std = row_moments(unit_ND)
        ids = self._candidates(n_rows, 2 * wanted)
        cosines = pair_cosines(unit_ND, ids // n_rows, ids % n_rows)
        ranks = grid(cosines, steps_per_unit(cosines.dtype))
        order = torch.sort(ranks, descending=True, stable=True)[1][:wanted]
        order = torch.sort(order[ranks[order] > 0])[0]
        limit = "co-activation" if order.numel() < wanted else limit
        ids = ids[order]
        return Selection(ids // n_rows, ids % n_rows, cosines[order], wanted, mean, std, n_rows, limit)

    def _candidates(self, n_rows: int, wanted: int) -> Tensor:
        """Pair ids of the `wanted` best listed pairs by the cosines noted with them, ascending, each once."""
        noted = self.cosines.reshape(-1)
        if noted.numel() > 2 * wanted:
            bar = torch.topk(noted, 2 * wanted, sorted=False)[0].min()
            listed = (noted >= bar).nonzero().squeeze(1)
        else:
            listed = (noted > UNKNOWN).nonzero().squeeze(1)
        listed = listed[noted[listed] > UNKNOWN]
        features = listed // max(self.cosines.shape[1], 1)
        others = self.neighbours.reshape(-1)[listed].long()
        ids = torch.minimum(features, others) * n_rows + torch.maximum(features, others)
        return torch.unique(ids)
