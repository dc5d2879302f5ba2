"""The pair browser's data: the most entangled pairs of an SAE, what became of them in its twin, and where they meet.

A twin starts from the same weights and sees the same batches, but its features wander; each feature's counterpart is
the twin's feature with the nearest decoder row, and how near it is stands beside every comparison.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from unbraid.evaluation.pairs import View, pair_statistics
from unbraid.reporting.dashboard.features import Excerpt, Firing, excerpt, firing
from unbraid.reporting.dashboard.passes import Csc, HeldOutPass

PAIRS, MIN_SUPPORT = 240, 10
CONTEXTS_EACH = 5


@dataclass(frozen=True)
class Pair:
    """Two entangled features.

    Attributes:
        features: their ids, ascending.
        correlation: of their codes on held-out text.
        together, fires: tokens on which both fire, and each.
        decoder_cosine: of their decoder rows.
        counterparts: nearest features of the twin (None without a twin), with the cosines of that match.
        twin_correlation: of the counterparts' codes; 1 where both have the same counterpart.
    """

    features: tuple[int, int]
    correlation: float
    together: int
    fires: tuple[int, int]
    decoder_cosine: float
    counterparts: tuple[int, int] | None = None
    match: tuple[float, float] | None = None
    twin_correlation: float | None = None


@torch.no_grad()
def entangled_pairs(codes: Csc, W_dec: Tensor, twin_codes: Csc | None, twin_W_dec: Tensor | None) -> list[Pair]:
    """The most correlated pairs among features that fired at least `MIN_SUPPORT` times, most correlated first.

    Args:
        codes: `[R, N]` codes of held-out rows.
        W_dec: `[N, D]`.
        twin_codes, twin_W_dec: the same of the twin, on the same rows.
    """
    live = int((np.diff(codes.indptr) >= MIN_SUPPORT).sum())
    if live < 2:
        return []
    share = min(1.0, PAIRS / (live * (live - 1) / 2))
    (statistics,) = pair_statistics(codes.tocsr(), [View(min_support=MIN_SUPPORT)], keep=share)
    unit_ND = nn.functional.normalize(W_dec.float(), dim=1)
    counterpart_N, match_N = _counterparts(unit_ND, twin_W_dec)
    found: list[Pair] = []
    for (i, j), correlation in zip(statistics.pairs.tolist(), statistics.values.tolist(), strict=True):
        one, other = firing(codes, i), firing(codes, j)
        twins = None if counterpart_N is None else (int(counterpart_N[i]), int(counterpart_N[j]))
        found.append(
            Pair(
                features=(i, j),
                correlation=correlation,
                together=len(np.intersect1d(one.rows, other.rows, assume_unique=True)),
                fires=(len(one.rows), len(other.rows)),
                decoder_cosine=float(unit_ND[i] @ unit_ND[j]),
                counterparts=twins,
                match=None if match_N is None else (float(match_N[i]), float(match_N[j])),
                twin_correlation=None if twins is None or twin_codes is None else _correlation(twin_codes, *twins),
            )
        )
    return found


def _counterparts(unit_ND: Tensor, twin_W_dec: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    if twin_W_dec is None:
        return None, None
    twin_ND = nn.functional.normalize(twin_W_dec.float(), dim=1)
    best = [(tile @ twin_ND.T).max(dim=1) for tile in unit_ND.split(1024)]
    return torch.cat([part.indices for part in best]), torch.cat([part.values for part in best])


def _correlation(codes: Csc, i: int, j: int) -> float:
    one, other = firing(codes, i), firing(codes, j)
    norm = float(np.linalg.norm(one.values)) * float(np.linalg.norm(other.values))
    if i == j or norm == 0:
        return float(i == j and norm > 0)
    _, at_one, at_other = np.intersect1d(one.rows, other.rows, assume_unique=True, return_indices=True)
    return float(one.values[at_one].astype(np.float64) @ other.values[at_other].astype(np.float64)) / norm


def pair_contexts(held_out: HeldOutPass, codes: Csc, pair: Pair) -> dict[str, list[Excerpt]]:
    """Contexts where both fire on a token, and where one fires on a token without the other, strongest first."""
    one, other = (firing(codes, feature) for feature in pair.features)
    _, at_one, at_other = np.intersect1d(one.rows, other.rows, assume_unique=True, return_indices=True)
    peaks = one.values.max(initial=0.0), other.values.max(initial=0.0)  # 0 of a feature that is silent here
    strength = np.minimum(one.values[at_one] / peaks[0], other.values[at_other] / peaks[1])
    both = one.rows[at_one[np.argsort(-strength, kind="stable")]]
    rows = {"both": both, "first": alone(held_out, one, other), "second": alone(held_out, other, one)}
    return {
        what: [excerpt(held_out, row, [one, other]) for row in _one_a_context(held_out, candidates)]
        for what, candidates in rows.items()
    }


def alone(held_out: HeldOutPass, one: Firing, other: Firing) -> np.ndarray:
    """Rows where `one` fires without `other`, strongest first; those from contexts without `other` before the rest."""
    apart = ~np.isin(one.rows, other.rows, assume_unique=True)
    rows, values = one.rows[apart], one.values[apart]
    shared = np.isin(held_out.context_R[rows], held_out.context_R[other.rows])
    return rows[np.lexsort((-values, shared))]


def _one_a_context(held_out: HeldOutPass, rows: np.ndarray) -> list[int]:
    _, first = np.unique(held_out.context_R[rows], return_index=True)
    return [int(row) for row in rows[np.sort(first)][:CONTEXTS_EACH]]
