"""Every path against the N x N oracle: value, tau, S and gradients, on codes chosen to be awkward."""

import naive
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_codes import SparseRows, awkward_codes, sparse_codes
from torch import Tensor

from unbraid.decorrelation.penalty import SelectiveDecorrelation
from unbraid.kernels.codes import Codes

MEASURES = st.sampled_from(["cosine", "pearson"])
FRACTIONS = st.sampled_from([0.02, 0.2, 0.7, 1.0])
SUPPORTS = st.sampled_from([1, 2, 4])


def oracle(f_BN: Tensor, fraction: float, measure: str, min_support: int):
    """R, tau, S and dR/df at active entries, through the N x N matrix and autograd."""
    leaf = f_BN.clone().requires_grad_()
    codes = Codes.from_dense(f_BN)
    codes = codes.where((codes.support >= min_support)[codes.indices])
    chosen = naive.select(codes, fraction, measure)
    tau = chosen.mean + chosen.std
    value, _ = naive.penalty(leaf, chosen.first, chosen.second, chosen.nominal, tau, measure)
    value.backward()
    assert leaf.grad is not None
    return value.detach(), tau, chosen, leaf.grad * (f_BN > 0)


@given(awkward_codes(), FRACTIONS, MEASURES, SUPPORTS)
def test_the_exact_path_equals_the_oracle(f_BN, fraction, measure, min_support):
    value, tau, chosen, gradient_BN = oracle(f_BN, fraction, measure, min_support)
    leaf = f_BN.clone().requires_grad_()
    penalty, stats = SelectiveDecorrelation(fraction, measure=measure, min_support=min_support)(leaf)
    penalty.backward()
    assert abs(penalty - value) <= 1e-10
    assert abs(stats.tau - tau) <= 1e-10
    assert abs(stats.mean - chosen.mean) <= 1e-10
    assert abs(stats.std - chosen.std) <= 1e-10
    assert (stats.n_live, stats.nominal, stats.limit) == (chosen.n_live, chosen.nominal, chosen.limit)
    assert stats.pairs.tolist() == torch.stack([chosen.first, chosen.second], dim=1).tolist()
    found_BN = torch.zeros_like(f_BN) if leaf.grad is None else leaf.grad
    torch.testing.assert_close(found_BN, gradient_BN, rtol=0, atol=1e-10)


@given(awkward_codes(), FRACTIONS, MEASURES)
def test_every_form_of_codes_gives_the_same_bits(f_BN, fraction, measure):
    decorrelate = SelectiveDecorrelation(fraction, measure=measure)
    entries = Codes.from_dense(f_BN)
    dense = f_BN.clone().requires_grad_()
    values_BN = f_BN.flip(1).clone().requires_grad_()
    indices_BN = torch.arange(f_BN.shape[1]).flip(0).expand(f_BN.shape)
    listed = entries.values.clone().requires_grad_()
    codes = SparseRows(entries.offsets, entries.indices, listed, f_BN.shape[1])
    coordinates = f_BN.to_sparse_coo().requires_grad_()
    results = [
        decorrelate(dense)[0],
        decorrelate(coordinates)[0],
        decorrelate(indices=indices_BN, values=values_BN, n_features=f_BN.shape[1])[0],
        decorrelate(codes=codes)[0],
    ]
    assert len({result.item() for result in results}) == 1
    for result in results:
        result.backward()
    if dense.grad is not None:
        assert torch.equal(dense.grad, values_BN.grad.flip(1))
        assert torch.equal(dense.grad[f_BN > 0], listed.grad)
        assert torch.equal(dense.grad, coordinates.grad.to_dense())


@given(awkward_codes(torch.float32), FRACTIONS, MEASURES)
def test_float32_agrees_with_the_float64_oracle_on_what_it_selected(f_BN, fraction, measure):
    leaf = f_BN.clone().requires_grad_()
    penalty, stats = SelectiveDecorrelation(fraction, measure=measure)(leaf)
    penalty.backward()
    double = f_BN.double().requires_grad_()
    value, _ = naive.penalty(double, *stats.pairs.T, stats.nominal, stats.tau + 1e-6, measure)
    value.backward()
    assert abs(penalty.double() - value) <= 1e-4 * max(1.0, abs(value)) + 2e-6
    chosen = naive.select(Codes.from_dense(f_BN.double()), fraction, measure)
    assert abs(stats.tau - chosen.mean - chosen.std) <= 1e-4 * max(abs(stats.tau), 0.01)
    if leaf.grad is not None:
        expected_BN = double.grad * (f_BN > 0)
        assert (leaf.grad - expected_BN).norm() <= 1e-4 * expected_BN.norm() + 1e-6


@pytest.mark.parametrize("measure", ["cosine", "pearson"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_real_sized_batch_equals_the_oracle(measure, dtype):
    indices_BK, values_BK = sparse_codes(512, 1024, 24, seed=0)
    f_BN = torch.zeros(512, 1024, dtype=dtype).scatter_(1, indices_BK, values_BK.to(dtype))
    value, tau, chosen, gradient_BN = oracle(f_BN.double(), 1e-3, measure, 1)
    leaf = f_BN.clone().requires_grad_()
    penalty, stats = SelectiveDecorrelation(1e-3, measure=measure)(leaf)
    penalty.backward()
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    assert abs(penalty.double() - value) <= tolerance * abs(value)
    assert abs(stats.tau - tau) <= tolerance * tau
    ids = stats.pairs[:, 0] * 1024 + stats.pairs[:, 1]
    assert float(torch.isin(ids, chosen.first * 1024 + chosen.second).double().mean()) >= (
        1.0 if dtype == torch.float64 else 0.99
    )
    assert (leaf.grad.double() - gradient_BN).norm() <= tolerance * gradient_BN.norm()


def test_ties_at_the_cut_go_to_the_lowest_pair_ids():
    f_BN = torch.ones(1, 40, dtype=torch.float64)
    _, stats = SelectiveDecorrelation(0.01)(f_BN)
    assert stats.pairs.tolist() == [[0, j] for j in range(1, 9)]


def test_an_empty_batch_is_zero_with_its_graph_intact():
    for f_BN in (torch.zeros(0, 5), torch.zeros(7, 5), torch.zeros(3, 1)):
        leaf = f_BN.clone().requires_grad_()
        penalty, stats = SelectiveDecorrelation()(leaf)
        (penalty + leaf.sum()).backward()
        assert penalty.item() == 0.0 and stats.tau == 0.0 and stats.pairs.shape == (0, 2)
        assert torch.equal(leaf.grad, torch.ones_like(leaf))


def test_a_feature_that_fires_once_gets_exactly_zero_gradient():
    indices_BK, values_BK = sparse_codes(256, 1024, 8, seed=3)
    values_BK.requires_grad_()
    for measure in ("cosine", "pearson"):
        values_BK.grad = None
        penalty, stats = SelectiveDecorrelation(0.01, measure=measure)(
            indices=indices_BK, values=values_BK, n_features=1024
        )
        penalty.backward()
        support = torch.bincount(indices_BK.flatten(), minlength=1024)
        once = support[indices_BK] == 1
        assert int(once.sum()) > 20 and stats.low_support > 0.5
        assert torch.equal(values_BK.grad[once], torch.zeros(int(once.sum())))
        assert float(values_BK.grad[~once].abs().sum()) > 0


def test_a_feature_named_twice_in_a_row_counts_with_its_sum():
    indices_BK = torch.tensor([[0, 1, 1], [0, 1, 2], [2, 1, 0]])
    values_BK = torch.tensor([[1.0, 2.0, 3.0], [2.0, 1.0, 0.0], [0.0, 4.0, 1.0]], requires_grad=True)
    dense = torch.zeros(3, 3).scatter_add(1, indices_BK, values_BK)
    penalties = [
        SelectiveDecorrelation(1.0, threshold="fixed", tau=0.1)(indices=indices_BK, values=values_BK, n_features=3)[0],
        SelectiveDecorrelation(1.0, threshold="fixed", tau=0.1)(dense)[0],
    ]
    assert penalties[0].item() == penalties[1].item() > 0
    gradients = [torch.autograd.grad(penalty, values_BK)[0] for penalty in penalties]
    assert torch.equal(*gradients)
