"""Exact for codes of any density: tiles of the N x N matrix, each looked at once and thrown away.

O(N^2 B) time, one tile of memory: for evaluating dense codes, and for checking blocks at sizes the oracle cannot hold.
"""

import dataclasses

import torch
from torch import Tensor

from unbraid.decorrelation.decoder_rows import UnitRows, evaluate_rows, select_exactly
from unbraid.decorrelation.entries import Entries, to_dense
from unbraid.decorrelation.hinge import Evaluation
from unbraid.decorrelation.measure import Measure, scaled_columns
from unbraid.decorrelation.selection import Selection, low_support


def select(entries: Entries, fraction: float, measure: Measure, max_pairs_per_feature: int | None = None) -> Selection:
    """S, mu and sigma (Eq. 3, 4) from the live features' tiles."""
    live = (entries.support > 0).nonzero().squeeze(1)
    z_Bn, _ = scaled_columns(to_dense(entries.detach())[:, live], measure)
    chosen = select_exactly(z_Bn.T.contiguous(), fraction, max_pairs_per_feature)
    first, second = live[chosen.first], live[chosen.second]
    low = low_support(entries.support, first, second)
    return dataclasses.replace(chosen, first=first, second=second, low_support=low)


def evaluate(entries: Entries, first: Tensor, second: Tensor, nominal: int, tau: float, measure: Measure) -> Evaluation:
    """R(tau) over given pairs and its gradient at active entries, from dense rows of codes."""
    z_BN, inverse = scaled_columns(to_dense(entries.detach()), measure)
    found = evaluate_rows(UnitRows(z_BN.T.contiguous(), inverse), first, second, nominal, tau)
    gradient = found.gradient[entries.indices, entries.rows]
    return dataclasses.replace(found, gradient=torch.where(entries.support > 1, 1.0, 0.0)[entries.indices] * gradient)
