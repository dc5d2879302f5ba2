"""`unbraid compare SAE_A SAE_B`: which feature of one SAE is which of the other.

Features are matched one to one by the cosine of their decoder rows (`unbraid.match`). How similar random rows of the
same shape would be stands beside it, because a high cosine means little where the activations are narrow.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unbraid.errors import EvaluationError
from unbraid.feature_model.matching import HUNGARIAN_UP_TO, Match, match
from unbraid.formats import load
from unbraid.progress import number
from unbraid.randomness import generator
from unbraid.sae import SAE

SHARED_ABOVE = (0.9, 0.7)
"""Cosines above which features count as shared, strictly and loosely; 0.7 is usual for SAEs of two seeds."""
SHOWN = 10
CHANCE_UP_TO = 2304
"""Features up to which random rows are matched as well: the match takes seconds beyond."""


@dataclass(frozen=True, eq=False)
class SAEComparison:
    """Two SAEs and their features' match.

    Attributes:
        names: what the two were called by.
        saes: the two.
        match: the features of the first in the second.
        chance: mean cosine of a match of random rows of the same shape; None for large dictionaries.
    """

    names: tuple[str, str]
    saes: tuple[SAE, SAE]
    match: Match
    chance: float | None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values; what does not apply is None."""
        return {
            "saes": [_described(name, sae) for name, sae in zip(self.names, self.saes, strict=True)],
            "match": self.numbers(),
            "pairs": self.pairs(),
            "orphans": self.match.orphans.tolist(),
        }

    def pairs(self) -> list[dict[str, Any]]:
        """Matched features, most similar first; `runner-up` is None where the second SAE has one feature."""
        rows = self.match.to_table().rows
        return [row | {"runner-up": row["runner-up"] if row["runner-up"] >= -1.5 else None} for row in rows]

    def numbers(self) -> dict[str, Any]:
        """The match in a few numbers."""
        cosine = self.match.cosine
        shared = {f"shared_above_{least}": int((cosine > least).sum()) for least in SHARED_ABOVE}
        mean, median = (float(cosine.mean()), float(cosine.median())) if len(cosine) else (None, None)
        return {
            "matched": len(cosine),
            "mean_cosine": mean,
            "median_cosine": median,
            "mean_cosine_of_random_rows": self.chance,
            **shared,
            "only_in_a": len(self.match.orphans),
            "only_in_b": self.saes[1].W_dec.shape[0] - len(cosine),
        }

    def __str__(self) -> str:
        lines = [f"{mark}  {name}\n   {sae!r}" for mark, name, sae in zip("AB", self.names, self.saes, strict=True)]
        found = self.numbers()
        beside = "" if self.chance is None else f" (random rows of these shapes: {number(self.chance)})"
        lines += [
            "",
            f"{found['matched']:,} features matched one to one by the cosine of their decoder rows: mean "
            f"{number(found['mean_cosine'])}, median {number(found['median_cosine'])}{beside}",
            *(f"{found[f'shared_above_{least}']:,} with a cosine above {least}" for least in SHARED_ABOVE),
            f"without a partner: {found['only_in_a']:,} of A, {found['only_in_b']:,} of B",
        ]
        rows = self.pairs()
        lines += ["", "feature of A  feature of B  cosine  A's next best"]
        middle = rows[SHOWN:-SHOWN]
        for row in [*rows[:SHOWN], *([None] if middle else []), *rows[max(SHOWN, len(rows) - SHOWN) :]]:
            if row is None:
                lines.append(f"... {len(middle):,} more; --json lists all")
                continue
            shown = "-" if row["runner-up"] is None else f"{row['runner-up']:.3f}"
            lines.append(f"{row['a']:>12}  {row['b']:>12}  {row['cosine']:>6.3f}  {shown:>13}")
        return "\n".join(lines)


def compare_saes(a: Path | str, b: Path | str) -> SAEComparison:
    """Match the features of two SAEs.

    Args:
        a, b: SAE folders in any known layout, or names that `unbraid.load` takes.

    Raises:
        FormatError: one of them is no SAE.
        EvaluationError: they read activations of different widths.
    """
    saes = load(a), load(b)
    if saes[0].d_out != saes[1].d_out:
        raise EvaluationError(
            f"{str(a)!r} writes activations of width {saes[0].d_out} and {str(b)!r} of width {saes[1].d_out}; expected "
            "the same width; compare two SAEs of one site of one model"
        )
    return SAEComparison((str(a), str(b)), saes, match(*saes), _chance(*saes))


def _chance(a: SAE, b: SAE) -> float | None:
    if max(a.W_dec.shape[0], b.W_dec.shape[0]) > min(CHANCE_UP_TO, HUNGARIAN_UP_TO):
        return None
    draws = generator(0, "random rows to compare with")
    rows = [_Rows(nn.functional.normalize(torch.randn(sae.W_dec.shape, generator=draws), dim=1)) for sae in (a, b)]
    cosine = match(*rows).cosine
    return float(cosine.mean()) if len(cosine) else None


@dataclass
class _Rows:
    W_dec: torch.Tensor


def _described(name: str, sae: SAE) -> dict[str, Any]:
    return {
        "path": name,
        "architecture": sae.architecture,
        "n_features": sae.W_dec.shape[0],
        "d_in": sae.d_in,
        "k": sae.k,
        "site": sae.metadata.get("hook_name"),
        "model": sae.metadata.get("model_name"),
        "trained_tokens": sae.metadata.get("training_tokens"),
    }
