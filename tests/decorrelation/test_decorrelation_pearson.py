"""Pearson correlation of features that hardly vary beside their mean, on every path, against the float64 oracle."""

import naive
import pytest
import torch
from torch import Tensor

from unbraid.decorrelation import coactive
from unbraid.decorrelation.comparators import mean_square
from unbraid.decorrelation.penalty import SelectiveDecorrelation
from unbraid.distributed.shard import Shard
from unbraid.kernels.codes import Codes

PATHS = {
    "loops": {},
    "lists": {},
    "blocks": {"path": "blocks"},
    "window": {"window": 2},
}
RATIOS = [10.0**exponent for exponent in range(10)]


def codes_with(ratio: float, dtype: torch.dtype, n_rows: int = 500) -> Tensor:
    """[B, 24]: features with mean / sd = ratio that overlap, one that never varies, one off once, and sparse ones."""
    draws = torch.Generator().manual_seed(0)
    f_BN = torch.randn(n_rows, 24, dtype=torch.float64, generator=draws)
    f_BN[:, :14] += f_BN[:, :1] + 1.4 * ratio
    f_BN[:, 13] = ratio + 0.1
    f_BN[7, 12] = 0
    return f_BN.relu().to(dtype)


def oracle(f_BN: Tensor, stats) -> tuple[Tensor, Tensor, Tensor]:
    """All correlations, R over the pairs that were selected and its gradient, in float64."""
    leaf = f_BN.double().clone().requires_grad_()
    value, _ = naive.penalty(leaf, *stats.pairs.T, stats.nominal, stats.tau, "pearson")
    value.backward()
    return naive.correlation_matrix(f_BN, "pearson"), value.detach(), leaf.grad * (f_BN > 0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", RATIOS)
def test_a_mean_far_above_the_spread_changes_nothing(ratio, dtype, path, monkeypatch):
    if path == "lists":
        monkeypatch.setattr("unbraid.decorrelation.coactive.loops_take", lambda _: False)
    f_BN = codes_with(ratio, dtype)
    decorrelate = SelectiveDecorrelation(0.2, measure="pearson", **PATHS[path])
    for rows in f_BN.split(250) if path == "window" else (f_BN,):
        leaf = rows.clone().requires_grad_()
        penalty, stats = decorrelate(leaf)
    penalty.backward()
    correlations_NN, value, gradient_BN = oracle(leaf.detach(), stats)
    if path == "window":
        correlations_NN = naive.correlation_matrix(f_BN, "pearson")
    known = correlations_NN[torch.triu_indices(24, 24, 1).unbind()]
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    assert stats.mean == pytest.approx(float(known.mean()), abs=tolerance)
    assert stats.std == pytest.approx(float(known.std(correction=0)), abs=tolerance)
    assert float(known.topk(len(stats.pairs)).values.min()) == pytest.approx(stats.cut, abs=tolerance)
    assert penalty.item() == pytest.approx(value.item(), abs=tolerance)
    # float32 codes receive a gradient of their own precision.
    assert (leaf.grad.double() - gradient_BN).norm() <= max(tolerance, 1e-6) * gradient_BN.norm() + 1e-15


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ratio", RATIOS)
def test_the_mean_square_over_all_pairs_too(ratio, dtype):
    f_BN = codes_with(ratio, dtype, n_rows=200)
    found, mean, std, _ = mean_square(Codes.from_dense(f_BN), "pearson")
    leaf = f_BN.double().clone().requires_grad_()
    known = naive.correlation_matrix(leaf, "pearson")[torch.triu_indices(24, 24, 1).unbind()]
    known.square().mean().backward()
    known = known.detach()
    assert (mean, std) == pytest.approx((float(known.mean()), float(known.std(correction=0))), abs=1e-9)
    assert (found.gradient - leaf.grad[f_BN > 0]).norm() <= 1e-6 * leaf.grad.norm()


@pytest.mark.parametrize("take", [True, False], ids=["loops", "lists"])
@pytest.mark.parametrize("size", [1 + 1e-9, 1.01, 2.0, 1e3])
def test_correlations_beyond_one_are_ranked_first_and_counted_in_the_last_bin(size, take, monkeypatch):
    """Rounding that grew would show as C > 1; it must neither be lost nor written past the histogram."""
    monkeypatch.setattr("unbraid.decorrelation.coactive.loops_take", lambda _: take)
    codes = Codes.from_dense(torch.rand(50, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.1)
    z = coactive.scaled(codes, "cosine")
    larger = z._replace(values=z.values * size)
    for wanted in (10, 780):
        chosen = coactive.best(codes.with_values(larger.values), larger, wanted, codes, Shard(40))
        expected = coactive.best(codes.with_values(z.values), z, wanted, codes, Shard(40))
        torch.testing.assert_close(chosen[2], expected[2] * size**2, rtol=1e-9, atol=0)
        assert all(torch.equal(mine, other) for mine, other in zip(chosen[:2], expected[:2], strict=True))
