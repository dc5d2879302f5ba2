"""`SelectiveDecorrelation`, the penalty to add to any SAE's loss.

Every path works out value and gradient together, by hand, and `attached` hands them to autograd as one node: nothing
of the selection is recorded, and the gradient reaches active entries only.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from unbraid.decorrelation import coactive
from unbraid.decorrelation.entries import Entries, SparseCodes, from_codes, from_dense, from_indices
from unbraid.decorrelation.measure import Measure
from unbraid.decorrelation.stats import DecorrelationStats
from unbraid.decorrelation.threshold import Threshold, ThresholdKind
from unbraid.errors import CodesError


class _KnownGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, source: Tensor, value: float, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        dtype = torch.promote_types(source.dtype, torch.float32)
        return torch.tensor(value, dtype=dtype, device=source.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * grads[0].to(gradient.dtype), None, None


def attached(source: Tensor, value: float, gradient: Tensor) -> Tensor:
    """A scalar that is `value` and whose gradient with respect to `source` is `gradient`; once differentiable."""
    return _KnownGradient.apply(source, value, gradient.to(source.dtype))  # pyright: ignore[reportReturnType]


class SelectiveDecorrelation(nn.Module):
    """R(tau) of Eq. 2-4."""

    def __init__(
        self,
        fraction: float = 1e-3,
        measure: Measure = "cosine",
        min_support: int = 1,
        threshold: ThresholdKind = "batch",
        tau: float = 0.2,
        threshold_decay: float = 0.99,
        floor: float | None = None,
        max_pairs_per_feature: int | None = None,
    ):
        super().__init__()
        self.fraction, self.measure, self.min_support = fraction, measure, min_support
        self.max_pairs_per_feature = max_pairs_per_feature
        self.threshold = Threshold(threshold, tau, threshold_decay, floor)

    @torch.compiler.disable
    def forward(
        self,
        f: Tensor | None = None,
        *,
        indices: Tensor | None = None,
        values: Tensor | None = None,
        n_features: int | None = None,
        codes: SparseCodes | None = None,
        decoder: Tensor | None = None,
    ) -> tuple[Tensor, DecorrelationStats]:
        """The penalty of one batch, unweighted by lambda2, and what was found."""
        entries = entries_of(f, indices, values, n_features, codes)
        chosen = coactive.supported(entries, self.min_support)
        selection = coactive.select(chosen, self.fraction, self.measure, self.max_pairs_per_feature)
        tau = self.threshold(selection.mean, selection.std, entries.n_features, entries.n_rows)
        found = coactive.evaluate(entries, selection.pair_ids, selection.nominal, tau, self.measure)
        pairs = torch.stack([selection.pair_ids // entries.n_features, selection.pair_ids % entries.n_features], 1)
        stats = DecorrelationStats(
            path="coactive",
            penalty=found.penalty,
            tau=tau,
            mean=selection.mean,
            std=selection.std,
            cut=selection.cut,
            pairs=pairs,
            correlations=found.correlations,
            n_live=selection.n_live,
            nominal=selection.nominal,
            limit=selection.limit,
            co_activations=entries.co_activations,
        )
        return attached(entries.values, found.penalty, found.gradient), stats


def entries_of(
    f: Tensor | None, indices: Tensor | None, values: Tensor | None, n_features: int | None, codes: SparseCodes | None
) -> Entries:
    """The active entries of whichever form of codes was passed.

    Raises:
        CodesError: none or several forms were passed, or n_features is missing.
    """
    forms = [f is not None, indices is not None or values is not None, codes is not None]
    if sum(forms) != 1:
        raise CodesError(f"{sum(forms)} forms of codes were passed; expected one of f, (indices, values), codes")
    if codes is not None:
        return from_codes(codes)
    if f is not None:
        return from_dense(f)
    if indices is None or values is None or n_features is None:
        raise CodesError("indices, values and n_features belong together; pass all three")
    return from_indices(indices, values, n_features)
