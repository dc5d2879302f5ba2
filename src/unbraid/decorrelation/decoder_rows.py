"""Decoder space: the overlap of decoder rows instead of the correlation of codes.

mu and sigma over all N(N-1)/2 pairs come from the D x D Gram matrix, the penalty from the pairs of S alone, and the top
pairs either exactly, from tiles of the N x N matrix that are looked at once and thrown away, or from lists of each
row's nearest neighbours. Decoders move slowly, so nobody needs the N x N cosines of every step: one rotating chunk of c
rows is compared with all others, O(N c D), and each of its features keeps its nearest. Selection reads the lists,
O(N m).
"""

import functools

import torch
from jaxtyping import Float, Int
from torch import Tensor

from unbraid.decorrelation.selection import (
    Evaluation,
    Scaled,
    Selection,
    TopPairs,
    add_at,
    grid,
    hinge_weights,
    live_pairs,
    moments,
    nominal_pairs,
    steps_per_unit,
)
from unbraid.decorrelation.window import ElasticState
from unbraid.errors import CodesError
from unbraid.kernels.codes import require_numbers, starts
from unbraid.kernels.products import segment_sums

TILE = 1024
UNKNOWN = -2.0
WHOLE = slice(None)
SAFE = 1e15
"""Norms between 1 / this and this have squares in float32's range."""


def require_decoder(decoder: Tensor | None, n_features: int | None, device: torch.device | None) -> Tensor:
    """The decoder, if it is one.

    Raises:
        CodesError: it is missing, not a floating-point matrix, or does not fit the codes.
    """
    if decoder is None:
        raise CodesError("this penalty compares decoder rows, but no decoder was passed; pass decoder=W_dec [N, D]")
    if not isinstance(decoder, Tensor) or decoder.ndim != 2 or not decoder.is_floating_point():
        found = f"{decoder.dtype} of shape {tuple(decoder.shape)}" if isinstance(decoder, Tensor) else type(decoder)
        raise CodesError(f"decoder is {found}; expected floating point [N, D], one row per feature; pass W_dec")
    require_numbers(decoder, "decoder rows")
    if decoder.numel() == 0:
        raise CodesError(f"decoder has shape {tuple(decoder.shape)}; expected [N, D] with N and D >= 1; pass W_dec")
    if n_features is not None and decoder.shape[0] != n_features:
        raise CodesError(
            f"decoder has {decoder.shape[0]} rows, but the codes have {n_features} features; expected [N, D]; pass "
            "W_dec, transposed if your SAE stores it as [D, N]"
        )
    if device is not None and decoder.device != device:
        raise CodesError(f"decoder is on {decoder.device}, codes on {device}; expected one device; move one of them")
    return decoder


def unit_rows(matrix_ND: Float[Tensor, "N D"]) -> Scaled:
    """Rows over their norms, in float32 (float64 for float64).

    Raises:
        CodesError: a row is not finite.
    """
    dtype = torch.promote_types(matrix_ND.dtype, torch.float32)
    matrix_ND = matrix_ND.detach()
    norms = torch.linalg.vector_norm(matrix_ND, dim=1, dtype=dtype)
    if norms.numel():
        low, high = torch.stack(torch.aminmax(norms)).tolist()
        if not 1 / SAFE < low <= high < SAFE:
            return _unit_rows_of_any_size(matrix_ND, dtype)
    inverse = torch.where(norms > 0, norms, torch.inf).reciprocal()
    return Scaled(matrix_ND.to(dtype) * inverse.unsqueeze(1), inverse.double())


def _unit_rows_of_any_size(matrix_ND: Tensor, dtype: torch.dtype) -> Scaled:
    """The same where squares leave the range of the dtype, or a row is zero or not finite."""
    largest = matrix_ND.abs().amax(1).double()
    if not bool(largest.isfinite().all()):
        rows = (~largest.isfinite()).nonzero().squeeze(1)
        raise CodesError(
            f"decoder rows {', '.join(map(str, rows[:5].tolist()))}{', ...' if len(rows) > 5 else ''} hold NaN or "
            "infinity; expected finite numbers; look for the step at which training diverged"
        )
    scale = torch.where(largest > 0, largest, 1.0)
    norms = torch.linalg.vector_norm(matrix_ND.double() / scale.unsqueeze(1), dim=1)
    inverse = torch.where(norms > 0, norms, torch.inf).reciprocal()
    unit_ND = (matrix_ND.double() / scale.unsqueeze(1) * inverse.unsqueeze(1)).to(dtype)
    return Scaled(unit_ND, inverse / scale)


def row_moments(unit_ND: Float[Tensor, "N D"]) -> tuple[float, float]:
    """mu and sigma of the cosines of all pairs of rows, O(N D^2): sum C = |sum d|^2 - N, sum C^2 = |D^T D|^2 - N."""
    gram = unit_ND.T @ unit_ND if unit_ND.shape[0] > unit_ND.shape[1] else unit_ND @ unit_ND.T
    norm, own_squares, total, gram_norm = torch.stack(
        [
            torch.linalg.vector_norm(unit_ND, dtype=torch.float64),
            (torch.linalg.vector_norm(unit_ND, dim=1, dtype=torch.float64) ** 4).sum(),
            (unit_ND.sum(0, dtype=torch.float64) ** 2).sum(),
            torch.linalg.vector_norm(gram, dtype=torch.float64),
        ]
    ).tolist()
    return moments((total - norm**2) / 2, (gram_norm**2 - own_squares) / 2, live_pairs(unit_ND.shape[0]))


def select_exactly(
    unit_ND: Float[Tensor, "N D"], fraction: float, max_pairs_per_feature: int | None = None
) -> Selection:
    """The true top pairs of rows by cosine: O(N^2 D) time, one tile of memory."""
    n_rows = unit_ND.shape[0]
    wanted, limit = nominal_pairs(n_rows, fraction, max_pairs_per_feature)
    top = TopPairs(wanted, n_rows, unit_ND.dtype, unit_ND.device)
    total = squares = 0.0
    for start in range(0, n_rows, TILE):
        for other in range(start, n_rows, TILE):
            tile = unit_ND[start : start + TILE] @ unit_ND[other : other + TILE].T
            if other == start:
                tile.masked_fill_(torch.ones_like(tile, dtype=torch.bool).tril_(), 0.0)
            total += float(tile.sum(dtype=torch.float64))
            squares += float(torch.linalg.vector_norm(tile, dtype=torch.float64)) ** 2
            at_tile = functools.partial(_places, start, other, tile.shape[1])
            top.add(tile.reshape(-1), at_tile)
    first, second, cosines = top.result()
    mean, std = moments(total, squares, live_pairs(n_rows))
    limit = "co-activation" if first.numel() < wanted else limit
    return Selection(first, second, cosines, wanted, mean, std, n_rows, limit)


def _places(first_row: int, first_column: int, n_columns: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    return positions // n_columns + first_row, positions % n_columns + first_column


def pair_cosines(
    unit_ND: Float[Tensor, "N D"], first: Int[Tensor, " P"], second: Int[Tensor, " P"]
) -> Float[Tensor, " P"]:
    """Cosines of given pairs of rows."""
    if unit_ND.is_cuda:
        parts = zip(first.split(65536), second.split(65536), strict=True)
        return torch.cat([unit_ND.new_empty(0), *((unit_ND[i] * unit_ND[j]).sum(1) for i, j in parts)])
    n_rows = unit_ND.shape[0]
    first, order = torch.sort(first, stable=True)
    places = torch.sparse_csr_tensor(
        starts(first, n_rows), second[order], unit_ND.new_zeros(order.numel()), (n_rows, n_rows), check_invariants=False
    )
    cosines = torch.sparse.sampled_addmm(places, unit_ND, unit_ND.T, beta=0.0).values()
    return torch.empty_like(cosines).index_copy_(0, order, cosines)


def evaluate_rows(
    rows: Scaled, selection: Selection, share: Float[Tensor, " P"] | None = None, columns: slice = WHOLE
) -> Evaluation:
    """R(tau) over the selected pairs of rows, and its gradient [N, D] with respect to the rows before scaling.

    Args:
        rows: all rows, scaled.
        selection: the pairs, |S| and tau.
        share: how much of a pair's push goes to its first row, the rest to the second; halves where not given, which
            is the gradient of R. Any other share pushes a pair as hard, by other rows.
        columns: the part of the rows that is compared: C is then that part's share in the cosine of whole rows.
    """
    unit_ND, first, second = rows.values, selection.first, selection.second
    n_rows, part_ND = unit_ND.shape[0], unit_ND[:, columns].contiguous()
    cosines = pair_cosines(part_ND, first, second).double()
    weights = hinge_weights(cosines, selection, unit_ND.dtype)
    penalty = float(((cosines - selection.tau) * weights).sum())
    above = (weights > 0).nonzero().squeeze(1)
    first, second = first[above], second[above]
    on_first = on_second = weights[above]
    if share is not None:
        on_first, on_second = 2 * share[above] * on_first, 2 * (1 - share[above]) * on_second
    own = add_at(torch.zeros_like(rows.inverse_norm), first, on_first * cosines[above])
    own = add_at(own, second, on_second * cosines[above])
    ends, order = torch.sort(torch.cat([first, second]), stable=True)
    partners = torch.cat([second, first])[order]
    pulls = torch.cat([on_first, on_second])[order].to(unit_ND.dtype)
    if partners.numel() == 0:
        return Evaluation(penalty, torch.zeros_like(unit_ND), cosines)
    pulled = segment_sums(starts(ends, n_rows), partners, pulls, part_ND)
    gradient = pulled if columns == WHOLE else torch.zeros_like(unit_ND)
    gradient[:, columns] = pulled
    gradient = gradient.addcmul_(unit_ND, own.to(unit_ND.dtype).unsqueeze(1), value=-1)
    return Evaluation(penalty, gradient.mul_(rows.inverse_norm.to(unit_ND.dtype).unsqueeze(1)), cosines)


class NeighbourLists(ElasticState):
    """For each feature the `n_neighbours` other rows of largest cosine when it was last looked at.

    Args:
        n_neighbours: m, entries per list.
        rows_per_scan: c, features looked at in one scan.
    """

    neighbours: Tensor
    cosines: Tensor
    position: Tensor
    on_host = ("position",)

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
                position=torch.zeros((), dtype=torch.int64),
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

    def select(self, unit_ND: Tensor, fraction: float, max_pairs_per_feature: int | None) -> Selection:
        """The top pairs among the lists, by their cosines now; mu and sigma over all pairs, exactly."""
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
