"""The pair browser's data: the most entangled pairs of an SAE, what became of them in its twin, and where they meet.

A twin starts from the same weights and sees the same batches, but its features wander; each feature's counterpart is
the twin's feature with the nearest decoder row, and how near it is stands beside every comparison.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from unbraid.evaluation.pairs import View, pair_statistics
from unbraid.reporting.dashboard.features import Excerpt, Firing, excerpt, firing
from unbraid.reporting.dashboard.passes import Csc, HeldOutPass

PAIRS, MIN_SUPPORT = 240, 10
CONTEXTS_EACH = 5
COMPARABLE = 0.5
"""Cosine of decoder rows from which a feature and its counterpart are compared."""


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
        without_large, twin_without_large: the two correlations without rows of large norm.
        entangled_in: "here", "twin" or "both": where it is among the most correlated pairs.
    """

    features: tuple[int, int]
    correlation: float
    together: int
    fires: tuple[int, int]
    decoder_cosine: float
    counterparts: tuple[int, int] | None = None
    match: tuple[float, float] | None = None
    twin_correlation: float | None = None
    without_large: float | None = None
    twin_without_large: float | None = None
    entangled_in: str = "here"

    @property
    def change(self) -> float:
        """Correlation here less that in the twin; 0 without a twin."""
        return 0.0 if self.twin_correlation is None else self.correlation - self.twin_correlation

    @property
    def comparable(self) -> bool:
        """Whether the twin has a counterpart of both features that points nearly the same way."""
        return self.match is not None and min(self.match) >= COMPARABLE

    @property
    def lives_on_large_rows(self) -> bool:
        """Whether rows of large norm carry at least half of the correlation it was chosen for."""
        value, calm = self.correlation, self.without_large
        if self.entangled_in == "twin":
            value, calm = self.twin_correlation, self.twin_without_large
        return value is not None and calm is not None and value > 0 and calm <= value / 2


def pairs_here_or_in_twin(
    codes: Csc,
    W_dec: Tensor,
    twin_codes: Csc | None,
    twin_W_dec: Tensor | None,
    large_R: np.ndarray | None = None,
) -> list[Pair]:
    """The most correlated pairs here and in the twin, those that changed most first.

    A pair of the twin stands for the features here that are nearest to its own, if they are two and fire. Pairs whose
    counterparts point another way (cosine below `COMPARABLE`) come last, because they compare different features.

    Args:
        codes, W_dec: `[R, N]` codes of held-out rows, and the decoder.
        twin_codes, twin_W_dec: the same of the twin, on the same rows.
        large_R: `[R]` which rows have a large norm.
    """
    here = {pair.features: pair for pair in entangled_pairs(codes, W_dec, twin_codes, twin_W_dec)}
    if twin_codes is not None and twin_W_dec is not None:
        unit_ND = nn.functional.normalize(W_dec.float(), dim=1)
        for pair in entangled_pairs(twin_codes, twin_W_dec, codes, W_dec):
            turned = _seen_from_here(pair, codes, unit_ND)
            if turned is not None:
                known = here.setdefault(turned.features, turned)
                # Where the nearest features differ from there and from here, those seen from here are nearer.
                if known.entangled_in == "here" and known.counterparts == turned.counterparts:
                    here[turned.features] = replace(known, entangled_in="both")
    pairs = [_with_calm(pair, codes, twin_codes, large_R) for pair in here.values()]
    return sorted(pairs, key=lambda pair: (not pair.comparable, -abs(pair.change), -pair.correlation, pair.features))


def _seen_from_here(pair: Pair, codes: Csc, unit_ND: Tensor) -> Pair | None:
    """A pair found in the twin as one of its counterparts here; None where they are one feature or never fire."""
    if pair.counterparts is None or pair.match is None or pair.twin_correlation is None:
        return None
    (i, own, match_i), (j, other, match_j) = sorted(zip(pair.counterparts, pair.features, pair.match, strict=True))
    one, second = firing(codes, i), firing(codes, j)
    # The nearest decoder row of a dead feature says nothing about the twin's feature.
    if i == j or not len(one.rows) or not len(second.rows):
        return None
    return Pair(
        features=(i, j),
        correlation=pair.twin_correlation,
        together=len(np.intersect1d(one.rows, second.rows, assume_unique=True)),
        fires=(len(one.rows), len(second.rows)),
        decoder_cosine=float(unit_ND[i] @ unit_ND[j]),
        counterparts=(own, other),
        match=(match_i, match_j),
        twin_correlation=pair.correlation,
        entangled_in="twin",
    )


def _with_calm(pair: Pair, codes: Csc, twin_codes: Csc | None, large_R: np.ndarray | None) -> Pair:
    """The pair with its correlations on rows that are not large."""
    if large_R is None or not large_R.any():
        return replace(pair, without_large=pair.correlation, twin_without_large=pair.twin_correlation)
    twin = None
    if pair.counterparts is not None and twin_codes is not None:
        twin = _correlation(twin_codes, *pair.counterparts, left_out_R=large_R)
    return replace(pair, without_large=_correlation(codes, *pair.features, left_out_R=large_R), twin_without_large=twin)


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
    counterpart_N, match_N = counterparts(unit_ND, twin_W_dec)
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


def counterparts(unit_ND: Tensor, twin_W_dec: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Each feature's nearest decoder row in the twin, `[N]` ids and cosines; `unit_ND` has rows of unit norm."""
    if twin_W_dec is None:
        return None, None
    twin_ND = nn.functional.normalize(twin_W_dec.float(), dim=1)
    best = [(tile @ twin_ND.T).max(dim=1) for tile in unit_ND.split(1024)]
    return torch.cat([part.indices for part in best]), torch.cat([part.values for part in best])


def _correlation(codes: Csc, i: int, j: int, left_out_R: np.ndarray | None = None) -> float:
    one, other = firing(codes, i), firing(codes, j)
    if left_out_R is not None:
        one, other = (Firing(f.rows[~left_out_R[f.rows]], f.values[~left_out_R[f.rows]]) for f in (one, other))
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
