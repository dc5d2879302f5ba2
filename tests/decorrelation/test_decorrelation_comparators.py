"""The comparators: each against the formula it stands for, all behind one interface."""

import naive
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_codes import awkward_codes, sparse_codes

from unbraid.config import DecorrelationConfig
from unbraid.decorrelation.build import build
from unbraid.decorrelation.comparators import (
    GlobalDecorrelation,
    OrthogonalDecoder,
    RandomPairs,
    StaticGroups,
    distinct_numbers,
    pairs_of_numbers,
)
from unbraid.decorrelation.selection import live_pairs
from unbraid.decorrelation.window import Threshold
from unbraid.errors import ConfigError
from unbraid.randomness import generator

METHODS = ["none", "selective", "global", "static_groups", "orthogonal", "random_pairs"]


def upper(matrix_NN: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """The entries above the diagonal between live features."""
    kept = matrix_NN[live][:, live]
    return kept[torch.triu_indices(len(kept), len(kept), 1).unbind()]


@given(awkward_codes(), st.sampled_from(["cosine", "pearson"]), st.sampled_from([1, 3, 64]))
def test_the_global_penalty_equals_the_mean_square_of_the_matrix(f_BN, measure, rare):
    leaf, other = f_BN.clone().requires_grad_(), f_BN.clone().requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unbraid.decorrelation.comparators.RARE", rare)
        patch.setattr("unbraid.decorrelation.comparators.MEETINGS", 2 * rare**2)
        patch.setattr("unbraid.decorrelation.comparators.COLUMNS", 3)
        penalty, stats = GlobalDecorrelation(measure, interval=1, seed=0)(leaf)
    known = upper(naive.correlation_matrix(other, measure), (f_BN > 0).any(0))
    expected = (known**2).mean() if known.numel() else known.sum()
    assert abs(penalty - expected) <= 1e-10 and stats.nominal == known.numel()
    penalty.backward()
    expected.backward()
    found_BN = torch.zeros_like(f_BN) if leaf.grad is None else leaf.grad
    torch.testing.assert_close(found_BN, other.grad * (f_BN > 0), rtol=0, atol=1e-10)


@given(awkward_codes(), st.sampled_from(["cosine", "pearson"]), st.integers(1, 4))
def test_static_groups_penalise_every_pair_inside_a_fixed_subset(f_BN, measure, groups):
    leaf, other = f_BN.clone().requires_grad_(), f_BN.clone().requires_grad_()
    decorrelate = StaticGroups(groups, measure, Threshold("batch", 0.2, 0.9, None), interval=1, seed=3)
    penalty, stats = decorrelate(leaf)
    group_N = decorrelate.group_of(f_BN.shape[1])
    together = (group_N[:, None] == group_N[None]).triu(1)
    live = (f_BN > 0).any(0)
    together &= live[:, None] & live[None]
    known = naive.correlation_matrix(other, measure)[together]
    if known.numel() == 0:
        assert penalty.item() == 0.0
        return
    mean, std = float(known.detach().mean()), float(known.detach().std(correction=0))
    assert (stats.mean, stats.std) == pytest.approx((mean, std), abs=1e-9)
    excess = torch.where(known > 1e-11, known - mean - std, 0.0)
    expected = torch.where(excess > 1 / 2**36, excess, 0.0).sum() / known.numel()
    assert abs(penalty - expected) <= 1e-8
    penalty.backward()
    expected.backward()
    found_BN = torch.zeros_like(f_BN) if leaf.grad is None else leaf.grad
    torch.testing.assert_close(found_BN, other.grad * (f_BN > 0), rtol=0, atol=1e-8)


def test_groups_are_fixed_even_and_cover_everything():
    decorrelate = StaticGroups(8, "cosine", Threshold("batch", 0.2, 0.9, None), interval=1, seed=3)
    sizes = torch.bincount(decorrelate.group_of(1001))
    assert sizes.tolist() == [126] + [125] * 7
    assert torch.equal(decorrelate.group_of(1001), decorrelate.group_of(1001))


@given(st.integers(2, 50), st.integers(2, 20), st.integers(1, 8), st.integers(0, 999))
def test_the_orthogonal_penalty_is_the_formula_of_ortsae(n_features, chunk, width, seed):
    decoder_ND = torch.randn(n_features, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    leaf, other = decoder_ND.clone().requires_grad_(), decoder_ND.clone().requires_grad_()
    penalty, _ = OrthogonalDecoder(chunk, interval=1, seed=seed)(decoder=leaf)
    order = torch.randperm(n_features, generator=generator(seed, "orthogonal", 1))
    terms = []
    for part in order.tensor_split(-(-n_features // chunk)):
        if part.numel() > 1:
            unit = torch.nn.functional.normalize(other[part], dim=1)
            cosines = (unit @ unit.T).masked_fill(torch.eye(part.numel(), dtype=torch.bool), -2.0)
            terms.append((cosines.max(1).values ** 2).mean())
    expected = torch.stack(terms).mean()
    assert penalty.item() == pytest.approx(expected.item(), abs=1e-12)
    penalty.backward()
    expected.backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=0, atol=1e-12)


def test_orthogonal_chunks_are_drawn_anew_each_step_and_again_after_a_restart():
    decoder_ND = torch.randn(300, 24, generator=torch.Generator().manual_seed(0))
    one, other = (OrthogonalDecoder(50, interval=1, seed=5) for _ in range(2))
    values = [one(decoder=decoder_ND)[0].item() for _ in range(4)]
    assert len(set(values)) == 4
    for _ in range(2):
        other(decoder=decoder_ND)
    resumed = OrthogonalDecoder(50, interval=1, seed=5)
    resumed.load_state_dict(other.state_dict())
    assert [resumed(decoder=decoder_ND)[0].item() for _ in range(2)] == values[2:]


def test_random_pairs_are_as_many_as_s_live_distinct_and_hinged_at_the_same_tau():
    indices_BK, values_BK = sparse_codes(256, 600, 12, seed=0)
    codes = {"indices": indices_BK, "values": values_BK, "n_features": 600}
    _, selective = build(DecorrelationConfig(fraction=0.01), 600, seed=0)(**codes)
    decorrelate = RandomPairs(0.01)
    _, stats = decorrelate(**codes)
    assert stats.pairs.shape == selective.pairs.shape and stats.tau == selective.tau
    assert len({tuple(pair) for pair in stats.pairs.tolist()}) == selective.nominal
    live = torch.bincount(indices_BK.flatten(), minlength=600) > 0
    assert bool(live[stats.pairs].all()) and bool((stats.pairs[:, 0] < stats.pairs[:, 1]).all())
    assert stats.overlap_with(selective) < 0.1
    assert torch.equal(decorrelate(**codes)[1].pairs, stats.pairs)


@given(st.integers(1, 60), st.integers(0, 99))
def test_numbers_are_drawn_without_repetition_and_uniformly_enough(below, seed):
    for count in {1, below // 3, below}:
        numbers = distinct_numbers(below, count, seed)
        assert numbers.numel() == count == len(set(numbers.tolist()))
        assert count == 0 or (int(numbers.min()) >= 0 and int(numbers.max()) < below)


def test_pair_numbers_name_every_pair_once():
    first, second = pairs_of_numbers(torch.arange(live_pairs(70)))
    assert {(i, j) for i, j in zip(first.tolist(), second.tolist(), strict=True)} == {
        (i, j) for j in range(70) for i in range(j)
    }
    n_features = 3_000_000
    far = torch.tensor([live_pairs(n_features) - 1, live_pairs(n_features - 1)])
    first, second = pairs_of_numbers(far)
    assert second.tolist() == [n_features - 1] * 2 and first.tolist() == [n_features - 2, 0]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("interval", [1, 3])
def test_every_method_answers_every_form_of_codes_and_repeats(method, interval):
    indices_BK, values_BK = sparse_codes(128, 300, 8, seed=1)
    own = {"none": {}, "static_groups": {"groups": 5, "interval": interval}}
    own["orthogonal"] = {"chunk": 64, "interval": interval}
    config = DecorrelationConfig(method=method, fraction=0.01, **own.get(method, {"interval": interval}))
    decoder_ND = torch.randn(300, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    dense_BN = torch.zeros(128, 300).scatter(1, indices_BK, values_BK).requires_grad_()
    values_BK.requires_grad_()
    runs = []
    for forms in ({"f": dense_BN}, {"indices": indices_BK, "values": values_BK, "n_features": 300}):
        for _ in range(2):
            decorrelate = build(config, 300, seed=0)
            results = [decorrelate(**forms, decoder=decoder_ND) for _ in range(4)]
            assert all(penalty.requires_grad and penalty.ndim == 0 for penalty, _ in results)
            assert all(stats.scalars()["path"] for _, stats in results)
            runs.append([penalty.item() for penalty, _ in results])
            assert all(isinstance(tensor, torch.Tensor) for tensor in decorrelate.state_dict().values())
    assert runs[0] == runs[1] == runs[2] == runs[3]
    acted = [value != 0.0 for value in runs[0]]
    assert acted == [method not in ("none",) and step % interval == 0 for step in range(4)] or method == "random_pairs"


def test_more_groups_than_features_are_refused():
    with pytest.raises(ConfigError, match="groups = 64 exceeds the SAE's 32 features"):
        build(DecorrelationConfig(method="static_groups"), 32, seed=0)
