"""Random blocks for dense codes: unbiased, exact where one block holds everything, dispatched by a stated budget."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_codes import awkward_codes

from unbraid.decorrelation.blocks import Blocks
from unbraid.decorrelation.penalty import SelectiveDecorrelation
from unbraid.kernels.codes import Codes


def half_dense(n_rows: int, n_features: int, seed: int = 0) -> torch.Tensor:
    """Codes of a ReLU SAE at the start: half on. Half of the inputs' energy is their mean, as in language models."""
    draws = torch.Generator().manual_seed(seed)
    width = n_features // 8
    spectrum_D = (torch.arange(width) + 1.0) ** -0.5
    x_BD = torch.randn(n_rows, width, generator=draws) * spectrum_D / spectrum_D.norm()
    x_BD = x_BD + torch.nn.functional.normalize(torch.randn(width, generator=draws), dim=0)
    encoder_DN = torch.nn.functional.normalize(torch.randn(width, n_features, generator=draws), dim=0)
    return torch.relu(x_BD @ encoder_DN)


@given(awkward_codes(), st.sampled_from(["cosine", "pearson"]), st.sampled_from([1, 3]))
def test_one_block_of_everything_equals_the_exact_path(f_BN, measure, min_support):
    results = []
    for settings in ({"path": "blocks", "block": 64}, {"path": "coactive"}):
        leaf = f_BN.clone().requires_grad_()
        decorrelate = SelectiveDecorrelation(0.2, measure=measure, min_support=min_support, **settings)
        penalty, stats = decorrelate(leaf)
        penalty.backward()
        gradient_BN = torch.zeros_like(f_BN) if leaf.grad is None else leaf.grad
        results.append((penalty.item(), stats, gradient_BN))
    (value, stats, gradient_BN), (expected, exact, expected_BN) = results
    assert value == pytest.approx(expected, abs=1e-9)
    assert (stats.tau, stats.mean, stats.std) == pytest.approx((exact.tau, exact.mean, exact.std), abs=1e-7)
    assert stats.pairs.tolist() == exact.pairs.tolist() and stats.nominal == exact.nominal
    torch.testing.assert_close(gradient_BN, expected_BN, rtol=0, atol=1e-7)


@given(awkward_codes(), st.sampled_from(["cosine", "pearson"]), st.integers(2, 5))
def test_dense_and_sparse_forms_of_codes_give_the_same_blocks(f_BN, measure, block):
    dense = f_BN.clone().requires_grad_()
    values = f_BN.clone().requires_grad_()
    decorrelate = SelectiveDecorrelation(0.3, measure=measure, path="blocks", block=block)
    one, stats = decorrelate(dense)
    other, sparse_stats = decorrelate(
        indices=torch.arange(f_BN.shape[1]).expand(f_BN.shape), values=values, n_features=f_BN.shape[1]
    )
    if torch.equal(stats.pairs, sparse_stats.pairs):
        assert one.item() == pytest.approx(other.item(), abs=1e-12)
        one.backward()
        other.backward()
        if dense.grad is not None:
            torch.testing.assert_close(dense.grad, values.grad, rtol=0, atol=1e-12)
    assert stats.co_activations == sparse_stats.co_activations == Codes.from_dense(f_BN).co_activations()


def test_the_mean_over_200_partitions_is_the_oracle_within_one_percent():
    f_BN = half_dense(128, 512)
    exact, _ = SelectiveDecorrelation(path="coactive", fraction=0.01)(f_BN)
    values = []
    for seed in range(200):
        chosen = Blocks(f_BN, 64, 1, "cosine", seed).select(0.01, None)
        excess = chosen.correlations - chosen.mean - chosen.std
        values.append(float(torch.relu(excess).sum()) / chosen.nominal)
    assert float(torch.tensor(values).mean()) == pytest.approx(exact.item(), rel=0.01)


@pytest.mark.slow
def test_gradients_of_blocks_of_512_point_where_the_exact_ones_do():
    f_BN = half_dense(1024, 4096)
    gradients = []
    for block in (4096, 512):
        leaf = f_BN.clone().requires_grad_()
        SelectiveDecorrelation(path="blocks", block=block)(leaf)[0].backward()
        gradients.append(leaf.grad.flatten().double())
    assert float(torch.nn.functional.cosine_similarity(*gradients, dim=0)) >= 0.85


def test_the_budget_decides_the_path_and_the_log_says_which():
    f_BN = half_dense(32, 128)
    _, dense = SelectiveDecorrelation(pair_budget=1000)(f_BN)
    assert (dense.path, dense.co_activations > 1000) == ("blocks", True)
    _, exact = SelectiveDecorrelation(pair_budget=dense.co_activations)(f_BN)
    assert (exact.path, exact.co_activations) == ("coactive", dense.co_activations)


def test_gradients_reach_active_entries_only():
    leaf = half_dense(64, 256).requires_grad_()
    penalty, _ = SelectiveDecorrelation(0.01, path="blocks", block=64)(leaf)
    penalty.backward()
    assert float(leaf.grad[leaf == 0].abs().sum()) == 0.0 < float(leaf.grad.abs().sum())


def test_blocks_repeat_for_the_same_codes_and_differ_for_others():
    f_BN, other_BN = half_dense(64, 256), half_dense(64, 256, seed=1)
    decorrelate = SelectiveDecorrelation(0.01, path="blocks", block=32)
    first, again, other = decorrelate(f_BN)[1], decorrelate(f_BN)[1], decorrelate(other_BN)[1]
    assert torch.equal(first.pairs, again.pairs) and first.penalty == again.penalty
    assert first.overlap_with(other) < 0.5


def test_codes_too_dense_for_a_window_are_penalised_by_themselves_until_they_thin_out():
    decorrelate = SelectiveDecorrelation(0.01, window=2, pair_budget=40_000, block=64)
    dense_BN = half_dense(32, 256)
    thin_BN = torch.where(dense_BN > dense_BN.quantile(0.95), dense_BN, 0.0)
    paths = [decorrelate(f_BN)[1].path for f_BN in (dense_BN, dense_BN, thin_BN, thin_BN, dense_BN, thin_BN)]
    assert paths == ["blocks", "blocks", "filling", "coactive", "blocks", "coactive"]
