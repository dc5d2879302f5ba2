"""Decoder space: value and gradient against autograd, the rotating neighbour lists against the exact search."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_codes import sparse_codes

from unbraid.decorrelation.decoder_rows import NeighbourLists, evaluate_rows, select_exactly, unit_rows
from unbraid.decorrelation.penalty import SelectiveDecorrelation
from unbraid.decorrelation.selection import live_pairs
from unbraid.decorrelation.window import chance_level
from unbraid.errors import CodesError, ConfigError


def clustered_rows(n_features: int, width: int, seed: int = 0) -> torch.Tensor:
    """[N, D] rows of which many lean on a few common directions, so that overlaps differ."""
    draws = torch.Generator().manual_seed(seed)
    centres = torch.randn(n_features // 6, width, generator=draws, dtype=torch.float64)
    rows = centres[torch.randint(n_features // 6, (n_features,), generator=draws)]
    return rows + torch.randn(n_features, width, generator=draws, dtype=torch.float64) * 1.5


def cosines_of(decoder_ND: torch.Tensor) -> torch.Tensor:
    unit_ND = torch.nn.functional.normalize(decoder_ND, dim=1)
    return unit_ND @ unit_ND.T


@given(st.integers(1, 40), st.integers(1, 12), st.sampled_from([0.01, 0.2, 1.0]), st.integers(0, 1000))
def test_decoder_penalty_equals_autograd_through_the_matrix(n_features, width, fraction, seed):
    decoder_ND = torch.randn(n_features, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    if n_features > 3:
        decoder_ND[1] = decoder_ND[2]
        decoder_ND[3] *= 7
    leaf, other = decoder_ND.clone().requires_grad_(), decoder_ND.clone().requires_grad_()
    penalty, stats = SelectiveDecorrelation(fraction, space="decoder", path="tiled")(decoder=leaf)
    known = cosines_of(other)[torch.triu_indices(n_features, n_features, 1).unbind()]
    nominal = max(1, round(fraction * live_pairs(n_features)))
    if n_features < 2:
        assert (penalty.item(), stats.nominal) == (0.0, 0)
        return
    tau = float(known.detach().mean() + known.detach().std(correction=0))
    excess = known.topk(nominal)[0] - tau
    expected = torch.where(excess > 1e-11, excess, 0.0).sum() / nominal
    assert stats.tau == pytest.approx(tau, abs=1e-10)
    assert penalty.item() == pytest.approx(expected.item(), abs=1e-10)
    penalty.backward()
    expected.backward()
    torch.testing.assert_close(leaf.grad, other.grad, rtol=0, atol=1e-9)


def test_the_exact_search_is_the_top_of_the_matrix_across_tiles():
    decoder_ND = clustered_rows(300, 20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unbraid.decorrelation.decoder_rows.TILE", 64)
        chosen = select_exactly(unit_rows(decoder_ND).values, 0.01)
    first, second = torch.triu_indices(300, 300, 1)
    known = cosines_of(decoder_ND)[first, second]
    top = known.topk(chosen.nominal)[1].sort()[0]
    expected = set((first[top] * 300 + second[top]).tolist())
    assert set((chosen.first * 300 + chosen.second).tolist()) == expected
    assert (chosen.mean, chosen.std) == pytest.approx((float(known.mean()), float(known.std(correction=0))), abs=1e-12)


def test_lists_hold_every_features_nearest_rows_after_one_rotation():
    unit_ND = unit_rows(clustered_rows(101, 16)).values
    lists = NeighbourLists(n_neighbours=5, rows_per_scan=20)
    for _ in range(6):
        lists.scan(unit_ND)
    nearest = (unit_ND @ unit_ND.T).fill_diagonal_(-2).topk(5, dim=1)
    assert torch.equal(lists.neighbours.long(), nearest.indices)
    assert int(lists.position) == 0


def test_selection_from_full_lists_is_the_exact_one():
    decoder_ND = clustered_rows(400, 24)
    decorrelate = SelectiveDecorrelation(0.002, space="decoder", scan_rows=50, neighbours=12, refresh=8)
    for _ in range(8):
        _, stats = decorrelate(decoder=decoder_ND)
    exact = decorrelate.exact_selection(decoder_ND)
    assert stats.path == "neighbours" and stats.refreshed
    expected = sorted((exact.first * 400 + exact.second).tolist())
    assert (stats.pairs[:, 0] * 400 + stats.pairs[:, 1]).tolist() == expected
    assert (stats.mean, stats.std) == pytest.approx((exact.mean, exact.std), abs=1e-12)


def test_no_selection_from_half_filled_lists_stays_in_force():
    decoder_ND = clustered_rows(200, 24)
    decoder_ND[-1] = decoder_ND[-2]
    decorrelate = SelectiveDecorrelation(0.002, space="decoder", scan_rows=50, refresh=1000)
    for _ in range(5):
        _, stats = decorrelate(decoder=decoder_ND)
    exact = decorrelate.exact_selection(decoder_ND)
    assert stats.pairs.tolist() == sorted(map(list, zip(exact.first.tolist(), exact.second.tolist(), strict=True)))
    assert [198, 199] in stats.pairs.tolist() and not stats.refreshed


def test_lists_keep_up_with_a_decoder_that_trains():
    """Recall of the true top pairs while rows move about as far a step as Adam at lr 3e-4 moves them."""
    draws = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(clustered_rows(1024, 64).float(), dim=1)
    directions = torch.nn.functional.normalize(torch.randn(1024, 64, generator=draws), dim=1)
    decorrelate = SelectiveDecorrelation(refresh=4, space="decoder", scan_rows=64)
    recalls = []
    for step in range(80):
        rows = torch.nn.functional.normalize(rows + 3e-4 * 64**0.5 * directions, dim=1)
        _, stats = decorrelate(decoder=rows)
        if step >= 32 and stats.refreshed:
            exact = decorrelate.exact_selection(rows)
            true_ids = exact.first * 1024 + exact.second
            ids = stats.pairs[:, 0] * 1024 + stats.pairs[:, 1]
            recalls.append(float(torch.isin(true_ids, ids).double().mean()))
    assert len(recalls) == 12 and min(recalls) >= 0.95


def test_co_active_pairs_are_chosen_by_codes_and_penalised_by_decoder():
    indices_BK, values_BK = sparse_codes(256, 128, 8, seed=0)
    values_BK.requires_grad_()
    decoder_ND = torch.randn(128, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    leaf = decoder_ND.clone().requires_grad_()
    codes = {"indices": indices_BK, "values": values_BK, "n_features": 128}
    penalty, stats = SelectiveDecorrelation(0.01, space="co-active", floor="chance")(**codes, decoder=leaf)
    _, by_codes = SelectiveDecorrelation(0.01)(**codes)
    assert torch.equal(stats.pairs, by_codes.pairs) and stats.cut == by_codes.cut
    cosines = cosines_of(decoder_ND)
    known = cosines[torch.triu_indices(128, 128, 1).unbind()]
    assert stats.tau == max(float(stats.mean + stats.std), chance_level(128, 32)) == chance_level(128, 32)
    assert (stats.mean, stats.std) == pytest.approx((float(known.mean()), float(known.std(correction=0))))
    chosen = cosines[stats.pairs[:, 0], stats.pairs[:, 1]]
    torch.testing.assert_close(stats.correlations, chosen)
    assert penalty.item() == pytest.approx(float(torch.relu(chosen - stats.tau).sum()) / stats.nominal)
    penalty.backward()
    assert values_BK.grad is None and leaf.grad.shape == leaf.shape


def test_gradients_are_tangent_to_the_rows_and_zero_for_rows_of_zeros():
    decoder_ND = clustered_rows(60, 8)
    decoder_ND[7] = 0
    rows = unit_rows(decoder_ND)
    chosen = select_exactly(rows.values, 0.2)
    found = evaluate_rows(rows, dataclasses.replace(chosen, tau=0.1))
    assert float((found.gradient * decoder_ND).sum(1).abs().max()) <= 1e-14
    assert float(found.gradient[7].abs().sum()) == 0.0 < float(found.gradient.abs().sum())


@pytest.mark.parametrize(
    ("decoder_ND", "message"),
    [
        (None, "no decoder was passed"),
        (torch.ones(3), r"\(3,\); expected floating point \[N, D\]"),
        (torch.ones(4, 3), "decoder has 4 rows, but the codes have 3 features"),
    ],
)
def test_a_decoder_that_does_not_fit_the_codes_is_refused(decoder_ND, message):
    with pytest.raises(CodesError, match=message):
        SelectiveDecorrelation(space="co-active")(torch.ones(5, 3), decoder=decoder_ND)


@given(st.integers(2, 30), st.integers(2, 10), st.integers(0, 1000))
def test_only_the_rarer_row_of_a_pair_moves_and_twice_as_far(n_features, width, seed):
    draws = torch.Generator().manual_seed(seed)
    f_BN = torch.rand(50, n_features, dtype=torch.float64, generator=draws).sub(torch.rand(n_features, generator=draws))
    f_BN = f_BN.clamp(min=0)
    decoder_ND = torch.randn(n_features, width, dtype=torch.float64, generator=draws)
    leaf, other = decoder_ND.clone().requires_grad_(), decoder_ND.clone().requires_grad_()
    settings = {"fraction": 0.3, "space": "decoder", "path": "tiled"}
    penalty, stats = SelectiveDecorrelation(**settings, push="rarer")(f_BN, decoder=leaf)
    same, _ = SelectiveDecorrelation(**settings)(decoder=decoder_ND)
    assert penalty.item() == same.item()
    penalty.backward()

    unit_ND = torch.nn.functional.normalize(other, dim=1)
    fired = (f_BN > 0).sum(0).double()
    expected = torch.zeros((), dtype=torch.float64)
    for (i, j), cosine in zip(stats.pairs.tolist(), stats.correlations.tolist(), strict=True):
        if cosine - stats.tau > 1e-11:
            share = 0.5 if fired[i] == fired[j] else float(fired[i] < fired[j])
            by_first, by_second = unit_ND[i] @ unit_ND[j].detach(), unit_ND[i].detach() @ unit_ND[j]
            expected = expected + 2 * (share * by_first + (1 - share) * by_second) / stats.nominal
    if expected.requires_grad:
        expected.backward()
    torch.testing.assert_close(leaf.grad, torch.zeros_like(leaf) if other.grad is None else other.grad)


def test_a_common_row_stays_where_a_rare_one_leans_on_it():
    decoder_ND = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.0, 1.0]]).requires_grad_()
    f_BN = torch.tensor([[1.0, 0.0, 1.0]] * 99 + [[1.0, 1.0, 0.0]])
    penalty, _ = SelectiveDecorrelation(0.3, space="decoder", path="tiled", push="rarer")(f_BN, decoder=decoder_ND)
    penalty.backward()
    moved = decoder_ND.grad.norm(dim=1)
    assert float(moved[1]) > 0 == float(moved[0]) == float(moved[2])


def test_firings_are_remembered_with_the_state_and_need_codes_of_one_width():
    decoder_ND = clustered_rows(24, 8)
    settings = {"space": "co-active", "min_support": 1, "fraction": 0.2, "push": "rarer"}
    first, second = SelectiveDecorrelation(**settings), SelectiveDecorrelation(**settings)
    rising = torch.linspace(0.2, 0.9, 24)
    bars = (rising, rising, rising.flip(0))  # the features that were common are rare in the last batch
    draws = torch.Generator().manual_seed(0)
    batches = [torch.rand(40, 24, generator=draws).sub(bar).clamp(min=0) for bar in bars]
    for f_BN in batches[:2]:
        first(f_BN, decoder=decoder_ND)
    second.load_state_dict(first.state_dict())
    gradients = []
    for decorrelate in (first, second, SelectiveDecorrelation(**settings)):
        leaf = decoder_ND.clone().requires_grad_()
        decorrelate(batches[2], decoder=leaf)[0].backward()
        gradients.append(leaf.grad)
    assert torch.equal(gradients[0], gradients[1]) and not torch.equal(gradients[0], gradients[2])
    with pytest.raises(CodesError, match="these codes have 3 features, those before had 24"):
        first(torch.ones(5, 3), decoder=torch.ones(3, 8))
    with pytest.raises(CodesError, match="0 forms of codes were passed"):
        SelectiveDecorrelation(space="decoder", push="rarer")(decoder=decoder_ND)
    with pytest.raises(ConfigError, match=r"push is read only while decorrelation\.space is decoder or co-active"):
        SelectiveDecorrelation(push="rarer")


def test_before_any_firing_is_known_both_rows_of_a_pair_move_alike():
    decoder_ND = clustered_rows(24, 8)
    leaf, other = decoder_ND.clone().requires_grad_(), decoder_ND.clone().requires_grad_()
    f_BN = torch.rand(40, 24, generator=torch.Generator().manual_seed(0)).double()
    for rows, push in ((leaf, "rarer"), (other, "both")):
        decorrelate = SelectiveDecorrelation(0.2, space="co-active", push=push).eval()
        decorrelate(f_BN, decoder=rows)[0].backward()
    torch.testing.assert_close(leaf.grad, other.grad)
    assert float(leaf.grad.abs().sum()) > 0
