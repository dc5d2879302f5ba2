"""The paper's metrics of one SAE on held-out rows: reconstruction, sparsity and correlation.

Sums run in float64 over any number of batches, so R^2 is one number over all tokens and does not depend on how they
were cut. Codes are taken in inference form, as a user of the exported SAE gets them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from unbraid.errors import EvaluationError
from unbraid.evaluation.correlation import correlation_summary
from unbraid.evaluation.explained import ExplainedVariance
from unbraid.evaluation.protocols import predicted
from unbraid.sae import Codes

ROWS_AT_ONCE = 2048


@dataclass(frozen=True)
class HeldOutMetrics:
    """Means over held-out tokens.

    Attributes:
        l0: active features per token.
        l1: sum of the code, in the units the SAE was given.
        r2: 1 - sum ||x - x_hat||^2 / sum ||x - mean||^2; of what is predicted for a transcoder.
        reconstruction_error: mean ||x - x_hat||^2, in the squared units the SAE was given.
        correlation_mean: mean correlation of all pairs of live features.
        correlation_std: its spread over those pairs.
        correlation_top: mean over the most correlated pairs.
        live_fraction: share of features that fired on these tokens.
        frequency_N: `[N]` share of tokens each feature fired on.
        r2_by_site: the same as r2 of each site that is predicted.
    """

    l0: float
    l1: float
    r2: float
    reconstruction_error: float
    correlation_mean: float
    correlation_std: float
    correlation_top: float
    live_fraction: float
    frequency_N: Tensor
    r2_by_site: list[float]

    def as_dict(self) -> dict[str, float]:
        """Metric name -> value, the scalar ones."""
        scalars = [field.name for field in fields(self) if field.name not in ("frequency_N", "r2_by_site")]
        return {name: getattr(self, name) for name in scalars}


@torch.no_grad()
def held_out_metrics(
    sae: Any,
    batches: Iterable[Tensor | tuple[Tensor, Tensor]],
    fraction: float,
    widths_out: Sequence[int] = (),
) -> HeldOutMetrics:
    """Measure one SAE.

    Args:
        sae: anything with `encode`, `decode` and `n_features`.
        batches: activation rows `[R, D]` in the units the SAE takes; for a transcoder pairs of them and of the rows
            `[R, M]` that it is to predict, in the units it gives.
        fraction: share of the pairs that counts as the top.
        widths_out: width of each site that is predicted, where these are several.

    Raises:
        EvaluationError: there are no rows.
    """
    active, total, explained = 0.0, 0.0, ExplainedVariance()
    by_site = [ExplainedVariance() for _ in widths_out]
    codes: list[Codes] = []
    fired_N = torch.zeros(sae.n_features, dtype=torch.double)
    for batch in batches:
        x_RD, y_RM = (batch, batch) if isinstance(batch, Tensor) else batch
        for x_BD, y_BM in zip(x_RD.split(ROWS_AT_ONCE), y_RM.split(ROWS_AT_ONCE), strict=True):
            f_BN = sae.encode(x_BD)
            y_hat_BM = predicted(sae, x_BD, f_BN)
            explained.add(y_BM, y_hat_BM)
            if len(by_site) > 1:
                for one, wanted, found in zip(
                    by_site, y_BM.split(widths_out, 1), y_hat_BM.split(widths_out, 1), strict=True
                ):
                    one.add(wanted, found)
            active += float((f_BN != 0).double().sum())
            total += float(f_BN.double().sum())
            fired_N += (f_BN != 0).double().sum(0).cpu()
            codes.append(Codes.from_dense(f_BN.cpu()))
    tokens = explained.n_tokens
    if tokens == 0:
        raise EvaluationError("no held-out rows to measure on; expected at least one")
    correlation = correlation_summary(codes, sae.n_features, fraction)
    return HeldOutMetrics(
        l0=active / tokens,
        l1=total / tokens,
        r2=explained.r2,
        reconstruction_error=explained.residual / tokens,
        correlation_mean=correlation.mean,
        correlation_std=correlation.std,
        correlation_top=correlation.top,
        live_fraction=correlation.n_live / sae.n_features,
        frequency_N=(fired_N / tokens).float(),
        r2_by_site=[one.r2 for one in by_site] if len(by_site) > 1 else [explained.r2],
    )
