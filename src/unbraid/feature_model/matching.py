"""Which feature of one dictionary is which of another: one to one."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unbraid.errors import FeatureError
from unbraid.feature_model.tables import Result, Table

HUNGARIAN_UP_TO = 8192
ROWS_AT_ONCE = 1024


@dataclass(frozen=True, eq=False, repr=False)
class Match(Result):
    """A one-to-one match of features.

    Attributes:
        pairs: `[M, 2]` feature of a, feature of b, by feature of a.
        cosine: `[M]` of their decoder rows or codes.
        runner_up: `[M]` the best cosine of a's feature with any other feature of b.
        orphans: features of a without a match.
    """

    pairs: Tensor
    cosine: Tensor
    runner_up: Tensor
    orphans: Tensor

    def to_table(self) -> Table:
        """Pairs, best first."""
        order = self.cosine.argsort(descending=True, stable=True).tolist()
        rows = [
            {"a": int(self.pairs[m, 0]), "b": int(self.pairs[m, 1])}
            | {"cosine": float(self.cosine[m]), "runner-up": float(self.runner_up[m])}
            for m in order
        ]
        return Table(["a", "b", "cosine", "runner-up"], rows, f"{len(rows)} pairs, {len(self.orphans)} orphans")

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {"pairs": self.to_table().rows, "orphans": self.orphans.tolist()}


@torch.no_grad()
def match(a: Any, b: Any, *, by: str = "decoder", x: Tensor | None = None) -> Match:
    """Match the features of two dictionaries one to one.

    Up to 8192 features the match is the assignment with the largest sum of cosines; beyond, pairs that are each
    other's nearest.

    Args:
        a, b: dictionaries with `W_dec` (and `encode`, for codes).
        by: compare decoder rows, or codes on `x`.
        x: activation rows `[R, D]`, for `by="codes"`.

    Raises:
        FeatureError: the dictionaries differ in width, or `x` is missing.

    Example:
        >>> saes = unbraid.Run("runs/tiny").saes
        >>> found = match(saes["resid_post.1_decorrelated"], saes["resid_post.1_twin"])
        >>> len(found.pairs), bool(found.cosine.mean() > 0.9)
        (128, True)
    """
    one, other = _rows(a, by, x), _rows(b, by, x)
    if one.shape[1] != other.shape[1]:
        raise FeatureError(f"decoder rows are {one.shape[1]} and {other.shape[1]} wide; expected equal widths")
    cosine = _hungarian if max(len(one), len(other)) <= HUNGARIAN_UP_TO else _mutual
    return cosine(one, other)


def _rows(sae: Any, by: str, x: Tensor | None) -> Tensor:
    """Unit rows `[N, .]` to compare."""
    if by == "decoder":
        W_dec = getattr(sae, "W_dec", None)
        if not isinstance(W_dec, Tensor) or W_dec.ndim != 2:
            raise FeatureError(f"a {type(sae).__name__} has no matrix W_dec; expected [N, D]")
        return nn.functional.normalize(W_dec.detach().float(), dim=1).cpu()
    if by != "codes":
        raise FeatureError(f"by={by!r} is unknown; expected 'decoder' or 'codes'")
    if x is None or x.ndim != 2 or len(x) == 0:
        raise FeatureError("matching by codes needs activations; expected x of shape [rows, D]")
    codes = torch.cat([sae.encode(part).detach().float() for part in x.split(ROWS_AT_ONCE)])
    return nn.functional.normalize(codes.T, dim=1).cpu()


def _hungarian(one: Tensor, other: Tensor) -> Match:
    from scipy.optimize import linear_sum_assignment

    cosine = one @ other.T
    rows, columns = (torch.from_numpy(part) for part in linear_sum_assignment(-cosine.double().numpy()))
    found = cosine[rows, columns].clone()
    cosine[rows, columns] = -torch.inf
    runner_up = cosine[rows].max(dim=1).values
    return _matched(rows, columns, found, runner_up, len(one))


def _mutual(one: Tensor, other: Tensor) -> Match:
    near, second, to = [], [], []
    back = torch.full((len(other),), -torch.inf)
    back_to = torch.zeros(len(other), dtype=torch.long)
    for first in range(0, len(one), ROWS_AT_ONCE):
        tile = one[first : first + ROWS_AT_ONCE] @ other.T
        best = tile.topk(min(2, tile.shape[1]), dim=1)
        near.append(best.values[:, 0])
        second.append(best.values[:, -1])
        to.append(best.indices[:, 0])
        column = tile.max(dim=0)
        better = column.values > back
        back = torch.where(better, column.values, back)
        back_to = torch.where(better, column.indices + first, back_to)
    nearest = torch.cat(to)
    rows = (back_to[nearest] == torch.arange(len(one))).nonzero().flatten()
    return _matched(rows, nearest[rows], torch.cat(near)[rows], torch.cat(second)[rows], len(one))


def _matched(rows: Tensor, columns: Tensor, cosine: Tensor, runner_up: Tensor, n: int) -> Match:
    orphans = torch.ones(n, dtype=torch.bool)
    orphans[rows] = False
    return Match(torch.stack([rows, columns], 1), cosine, runner_up, orphans.nonzero().flatten())
