"""The entangled partners of one feature, and what became of each pair in the twin."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unbraid.errors import FeatureError
from unbraid.feature_model.dictionaries import Dictionary, Feature
from unbraid.feature_model.tables import Table


@dataclass(frozen=True, repr=False)
class PairTable(Table):
    """Partners, most entangled first.

    Attributes:
        counterpart: address of the twin's feature with the nearest decoder row; None without a twin.
        likeness: cosine of the two rows.
    """

    counterpart: str | None = None
    likeness: float | None = None


@torch.no_grad()
def entangled_with(fm: Any, feature: Feature, k: int) -> PairTable:
    """See `FeatureModel.pairs`: by correlation of codes on held-out text, else by cosine of decoder rows."""
    if k < 1:
        raise FeatureError(f"k={k}; expected at least 1")
    assert feature.index is not None
    dictionary = feature.dictionary
    cosine_N = cosines(dictionary, dictionary.W_dec[feature.index])
    twin = fm.dictionaries[fm.twins[dictionary.name]] if dictionary.name in fm.twins else None
    codes = fm.held_out.seen.codes if fm.has_held_out else None
    correlation_N = None if codes is None else correlations(codes[dictionary.name], feature.index)
    order_N = cosine_N.numpy().copy() if correlation_N is None else correlation_N.copy()
    order_N[feature.index] = -np.inf
    counterpart = None if twin is None else nearest(twin, dictionary.W_dec[feature.index])
    twin_N = None
    if twin is not None and counterpart is not None and codes is not None:
        twin_N = correlations(codes[twin.name], counterpart[0])
    rows = []
    for index in np.argsort(-order_N, kind="stable")[:k].tolist():
        if index == feature.index or (correlation_N is not None and correlation_N[index] <= 0):
            continue
        row: dict[str, Any] = {"partner": f"{dictionary.name}/{index}", "correlation": None}
        row["cosine"] = float(cosine_N[index])
        if codes is not None and correlation_N is not None:
            row["correlation"] = float(correlation_N[index])
            row |= _together(codes[dictionary.name], feature.index, index)
        if twin is not None and counterpart is not None:
            partner, likeness = nearest(twin, dictionary.W_dec[index])
            row |= {"twin partner": f"{twin.name}/{partner}", "twin likeness": likeness}
            row["twin correlation"] = None if twin_N is None else float(twin_N[partner])
        rows.append(row | {"words": fm.words(dictionary.name, index)})
    columns = ["partner", *(["correlation"] if correlation_N is not None else []), "cosine"]
    columns += ["together", "fires"] if correlation_N is not None else []
    columns += ["twin partner", "twin likeness", "twin correlation"] if twin is not None else []
    address = None if twin is None or counterpart is None else f"{twin.name}/{counterpart[0]}"
    note = () if address is None or counterpart is None else (f"in the twin: {address} (cosine {counterpart[1]:.2f})",)
    likeness = None if counterpart is None else counterpart[1]
    return PairTable([*columns, "words"], rows, f"entangled with {feature}", note, address, likeness)


def cosines(dictionary: Dictionary, row_M: Tensor) -> Tensor:
    """Cosines `[N]` of a direction with a dictionary's decoder rows."""
    unit_NM = nn.functional.normalize(dictionary.W_dec, dim=1)
    return (unit_NM @ nn.functional.normalize(row_M, dim=0)).cpu()


def nearest(dictionary: Dictionary, row_M: Tensor) -> tuple[int, float]:
    """The feature whose decoder row is nearest to a direction, and the cosine."""
    best = cosines(dictionary, row_M).max(dim=0)
    return int(best.indices), float(best.values)


def correlations(codes: Any, index: int) -> np.ndarray:
    """Cosines `[N]` of a feature's codes with those of every feature, from sparse `[R, N]` codes by column."""
    norms = np.sqrt(np.asarray((codes.astype(np.float64) ** 2).sum(axis=0)).ravel())
    products = np.asarray((codes[:, [index]].T.astype(np.float64) @ codes).todense()).ravel()
    return products / np.maximum(norms * norms[index], 1e-30)


def _together(codes: Any, i: int, j: int) -> dict[str, int]:
    one, other = (codes.indices[codes.indptr[n] : codes.indptr[n + 1]] for n in (i, j))
    return {"together": len(np.intersect1d(one, other, assume_unique=True)), "fires": len(other)}
