"""The identities and bounds the engine is built on, each checked by itself."""

from dataclasses import replace

import naive
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_codes import awkward_codes, planted_codes, sparse_codes

from unbraid.decorrelation import coactive
from unbraid.decorrelation.coactive import scaled
from unbraid.decorrelation.comparators import mean_square
from unbraid.decorrelation.decoder_rows import row_moments, unit_rows
from unbraid.decorrelation.penalty import SelectiveDecorrelation
from unbraid.decorrelation.selection import live_pairs, nominal_pairs
from unbraid.kernels.co_activation import co_activations
from unbraid.kernels.codes import Codes


@given(awkward_codes())
def test_mean_and_deviation_of_all_pairs_follow_from_the_token_gram(f_BN):
    correlations_NN = naive.correlation_matrix(f_BN, "cosine")
    z = scaled(Codes.from_dense(f_BN), "cosine")
    z_BN = torch.zeros_like(f_BN)
    z_BN[f_BN > 0] = z.values
    n_live = int((f_BN > 0).any(0).sum())
    off_diagonal = ~torch.eye(f_BN.shape[1], dtype=torch.bool)
    total = float((z_BN.sum(1) ** 2).sum()) - n_live
    squares = float(((z_BN @ z_BN.T) ** 2).sum()) - n_live
    assert abs(float(correlations_NN[off_diagonal].sum()) - total) <= 1e-10 * max(1, n_live**2)
    assert abs(float((correlations_NN[off_diagonal] ** 2).sum()) - squares) <= 1e-10 * max(1, n_live**2)


@given(awkward_codes(), st.sampled_from(["cosine", "pearson"]))
def test_all_three_ways_to_mu_and_sigma_agree(f_BN, measure):
    entries = Codes.from_dense(f_BN)
    chosen = coactive.select(entries, 0.5, measure)
    _, mean, std, n_live = mean_square(entries, measure)
    correlations_NN = naive.correlation_matrix(f_BN, measure)
    live = (f_BN > 0).any(0)
    known = correlations_NN[live][:, live][torch.triu_indices(int(live.sum()), int(live.sum()), 1).unbind()]
    expected = (float(known.mean()), float(known.std(correction=0))) if known.numel() else (0.0, 0.0)
    assert n_live == chosen.n_live
    assert (chosen.mean, chosen.std) == pytest.approx(expected, abs=1e-10)
    assert (mean, std) == pytest.approx(expected, abs=1e-9)


def test_mu_and_sigma_of_decoder_rows_follow_from_their_gram():
    decoder_ND = torch.randn(90, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    cosines = torch.nn.functional.cosine_similarity(decoder_ND[:, None], decoder_ND[None], dim=2)
    known = cosines[torch.triu_indices(90, 90, 1).unbind()]
    expected = float(known.mean()), float(known.std(correction=0))
    for rows in (decoder_ND, decoder_ND * torch.linspace(0.1, 9, 90).unsqueeze(1).double()):
        assert row_moments(unit_rows(rows).values) == pytest.approx(expected, abs=1e-12)


@given(awkward_codes())
def test_only_co_active_pairs_correlate_and_w_counts_them(f_BN):
    entries = Codes.from_dense(f_BN)
    fires = (f_BN > 0).long()
    together_NN = fires.T @ fires
    correlations_NN = naive.correlation_matrix(f_BN, "cosine")
    assert torch.equal(correlations_NN > 0, together_NN > 0)
    assert entries.co_activations() == int(together_NN.triu(1).sum())


@given(awkward_codes(), st.sampled_from([1, 7, 1_000_000]))
def test_co_activations_list_every_pair_once_with_its_dot(f_BN, per_chunk):
    entries = Codes.from_dense(f_BN)
    found_NN = torch.zeros(f_BN.shape[1], f_BN.shape[1], dtype=torch.float64)
    seen_NN = torch.zeros_like(found_NN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unbraid.kernels.co_activation.PAIRS_PER_CHUNK", per_chunk)
        for dots, first, second in co_activations(entries):
            assert bool((first < second).all())
            found_NN[first, second] += dots
            seen_NN[first, second] += 1
    fires = (f_BN > 0).double()
    torch.testing.assert_close(found_NN, (f_BN.T @ f_BN).triu(1), rtol=1e-12, atol=1e-12)
    assert torch.equal(seen_NN, ((fires.T @ fires).triu(1) > 0).double())


def ids_of(chosen) -> set[tuple[int, int]]:
    return set(zip(chosen.first.tolist(), chosen.second.tolist(), strict=True))


def chosen_pairs(entries) -> set[tuple[int, int]]:
    chosen = coactive.select(entries, 0.01, "cosine")
    pairs = ids_of(chosen)
    assert len(pairs) == chosen.nominal > 2000
    return pairs


def test_selection_is_the_same_by_loop_and_by_listing_in_chunks_of_any_size():
    entries = Codes.from_topk(*sparse_codes(300, 700, 20, seed=5), n_features=700)
    expected = chosen_pairs(entries)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unbraid.decorrelation.coactive.loops_take", lambda _: False)
        for per_chunk in (1_000_000, 5_000, 300):
            patch.setattr("unbraid.kernels.co_activation.PAIRS_PER_CHUNK", per_chunk)
            assert chosen_pairs(entries) == expected


@given(awkward_codes(), st.sampled_from(["cosine", "pearson"]), st.sampled_from([0.05, 0.5, 1.0]))
def test_the_loops_agree_with_the_lists_that_other_devices_work_from(f_BN, measure, fraction):
    entries = Codes.from_dense(f_BN)
    by_loop = coactive.select(entries, fraction, measure)
    pushed = coactive.evaluate(entries, replace(by_loop, tau=by_loop.mean), measure)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unbraid.decorrelation.coactive.loops_take", lambda _: False)
        by_lists = coactive.select(entries, fraction, measure)
        listed = coactive.evaluate(entries, replace(by_loop, tau=by_loop.mean), measure)
    assert ids_of(by_loop) == ids_of(by_lists)
    assert [by_loop.mean, by_loop.std] == pytest.approx([by_lists.mean, by_lists.std], rel=1e-10, abs=1e-12)
    assert pushed.penalty == pytest.approx(listed.penalty, rel=1e-10, abs=1e-12)
    torch.testing.assert_close(pushed.correlations, listed.correlations, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(pushed.gradient, listed.gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("measure", ["cosine", "pearson"])
@pytest.mark.parametrize("n_features", [60, 900, 40_000])
def test_few_pairs_of_a_feature_and_many_are_pushed_as_by_lists(n_features, measure):
    """From features that fire on every third row to features most of which fire once."""
    entries, later = (Codes.from_topk(*sparse_codes(300, n_features, 20, seed), n_features) for seed in (8, 9))
    chosen = coactive.select(entries, 1.0, measure)
    shuffled = torch.randperm(chosen.first.numel(), generator=torch.Generator().manual_seed(0))
    some = shuffled[: len(shuffled) // 5].sort().values
    for batch, kept in ((entries, slice(None)), (entries, some), (entries, shuffled), (later, slice(None))):
        pairs = replace(chosen, first=chosen.first[kept], second=chosen.second[kept], tau=chosen.mean + chosen.std)
        pushed = coactive.evaluate(batch, pairs, measure)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("unbraid.decorrelation.coactive.loops_take", lambda _: False)
            listed = coactive.evaluate(batch, pairs, measure)
        assert pushed.penalty == pytest.approx(listed.penalty, rel=1e-10) and pushed.penalty > 0
        torch.testing.assert_close(pushed.correlations, listed.correlations, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(pushed.gradient, listed.gradient, rtol=1e-9, atol=1e-15)


def test_the_same_codes_give_the_same_bits_on_any_number_of_threads():
    entries = Codes.from_topk(*sparse_codes(512, 900, 20, seed=6), n_features=900)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            chosen = coactive.select(entries, 0.01, "pearson")
            pairs = replace(chosen, tau=chosen.mean + chosen.std)
            found.append((chosen, coactive.evaluate(entries, pairs, "pearson")))
    finally:
        torch.set_num_threads(threads)
    chosen, pushed = found[0]
    for other, other_pushed in found[1:]:
        assert (other.mean, other.std, other_pushed.penalty) == (chosen.mean, chosen.std, pushed.penalty)
        assert torch.equal(other.first, chosen.first) and torch.equal(other.second, chosen.second)
        assert torch.equal(other.correlations, chosen.correlations)
        assert torch.equal(other_pushed.gradient, pushed.gradient)


@pytest.mark.parametrize("form", ["cosine", "pearson"])
def test_repeats_are_the_same_to_the_bit(form):
    indices_BK, values_BK = sparse_codes(1024, 4096, 32, seed=2)
    runs = []
    for _ in range(3):
        leaf = values_BK.clone().requires_grad_()
        penalty, stats = SelectiveDecorrelation(measure=form)(indices=indices_BK, values=leaf, n_features=4096)
        penalty.backward()
        runs.append((penalty.item(), stats.tau, stats.mean, stats.std, leaf.grad, stats.pairs, stats.correlations))
    for run in runs[1:]:
        assert run[:4] == runs[0][:4]
        assert all(torch.equal(new, old) for new, old in zip(run[4:], runs[0][4:], strict=True))


def test_beyond_a_width_every_co_active_pair_is_selected_and_the_log_says_so():
    indices_BK, values_BK = torch.randint(10**6, (2048, 4)), torch.rand(2048, 4) + 0.1
    codes = {"indices": indices_BK, "values": values_BK, "n_features": 10**6}
    _, stats = SelectiveDecorrelation()(**codes)
    assert (stats.limit, stats.pairs.shape[0]) == ("co-activation", stats.co_activations)
    assert stats.nominal == round(1e-3 * live_pairs(stats.n_live)) > stats.co_activations
    _, stats = SelectiveDecorrelation(max_pairs_per_feature=1)(**codes)
    assert (stats.limit, stats.pairs.shape[0]) == ("max_pairs_per_feature", stats.n_live)


@pytest.mark.parametrize(
    ("n_live", "fraction", "cap", "expected"),
    [
        (0, 0.5, None, (0, "fraction")),
        (1, 0.5, 3, (0, "fraction")),
        (2, 1e-6, None, (1, "fraction")),
        (1000, 0.001, None, (500, "fraction")),
        (1000, 0.5, 2, (2000, "max_pairs_per_feature")),
        (10, 0.1, 2, (4, "fraction")),
    ],
)
def test_the_nominal_count(n_live, fraction, cap, expected):
    assert nominal_pairs(n_live, fraction, cap) == expected


@pytest.fixture(scope="module")
def planted():
    """16 batches of 16k features with 750 true pairs, and the ids of these."""
    batches = [planted_codes(2048, 16_384, 750, seed=seed) for seed in range(16)]
    pairs = batches[0][1]
    return [codes for codes, _ in batches], pairs[:, 0] * 16_384 + pairs[:, 1]


def precision(planted, **settings) -> float:
    """Share of the top 750 pairs that are true ones."""
    batches, truth = planted
    decorrelate = SelectiveDecorrelation(750 / live_pairs(16_384), **settings)
    for codes in batches[: settings.get("window", 1)]:
        _, stats = decorrelate(codes=codes)
    ids = stats.pairs[:, 0] * 16_384 + stats.pairs[:, 1]
    return float(torch.isin(ids, truth).double().sum()) / 750


def test_one_batch_selects_noise_and_a_window_selects_the_planted_pairs(planted):
    assert precision(planted, window=1) <= 0.1
    assert precision(planted, window=1, min_support=4) >= 0.25
    assert precision(planted, window=4) >= 0.95


@pytest.mark.slow
def test_a_window_of_16_batches_selects_the_planted_pairs_alone(planted):
    assert precision(planted, window=16) >= 0.99


def test_two_batches_of_one_source_hardly_share_their_selections(planted):
    one, other = (SelectiveDecorrelation()(codes=codes)[1] for codes in planted[0][:2])
    assert other.overlap_with(one) < 0.05
    assert one.low_support > 0.8


def test_wide_dictionaries_cost_no_more_than_their_active_entries():
    """The bitmap of `meetings` has a word per 64 rows of each *live* feature, whatever N is."""
    entries = Codes.from_topk(torch.tensor([[5, 999_999], [5, 3]]), torch.ones(2, 2), n_features=1_000_000)
    assert coactive.firing_bitmap(entries)[0].numel() == 4


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20))
def test_bits_are_counted_right_in_words_of_either_sign(words):
    counted = coactive.popcount(torch.tensor(words, dtype=torch.int64))
    assert counted.tolist() == [(word & (2**64 - 1)).bit_count() for word in words]
