"""Held-out correlation: planted entanglement is found, intervals cover, a twin's reduction is exact."""

import numpy as np
import pytest
import torch

from unbraid.evaluation.correlation import measure_correlation
from unbraid.randomness import generator


def sparse_noise(n_tokens: int, n_features: int, density: float, seed: int) -> torch.Tensor:
    chance = generator(seed, "noise")
    active = torch.rand(n_tokens, n_features, generator=chance) < density
    return torch.rand(n_tokens, n_features, generator=chance) * active


def test_planted_pairs_are_counted_as_entangled_and_raise_the_top():
    noise = sparse_noise(4096, 60, 0.05, 0)
    planted = noise.clone()
    planted[:, 1::2][:, :5] = planted[:, 0::2][:, :5]
    before = measure_correlation(noise.split(500), 60, fraction=5 / 1770, replicates=5).report
    after = measure_correlation(planted.split(500), 60, fraction=5 / 1770, replicates=5).report
    assert before["cosine"]["entangled"] == 0 and after["cosine"]["entangled"] == 5
    assert after["cosine"]["top"] == pytest.approx(1.0) and before["cosine"]["top"] < 0.3
    assert before["pearson"]["top"] < before["cosine"]["top"]
    assert after["windows"]["n_windows"] == 2 and after["windows"]["top"] == pytest.approx(1.0)


def test_rare_features_count_only_where_the_view_lets_them():
    noise = sparse_noise(2048, 30, 0.1, 1)
    noise[:, :2] = 0
    noise[7, :2] = 1.0  # two features that fire once, together
    report = measure_correlation([noise], 30, replicates=2).report
    assert report["cosine"]["entangled"] == 1 and report["cosine_supported"]["entangled"] == 0
    assert report["cosine"]["n_live"] == 30 and report["cosine_supported"]["n_live"] == 28


def test_the_interval_is_as_wide_as_the_estimate_scatters_over_fresh_tokens():
    reports = [measure_correlation([sparse_noise(2048, 40, 0.1, seed)], 40).report for seed in range(12)]
    estimates = np.array([report["cosine"]["mean"] for report in reports])
    widths = np.array([np.diff(report["cosine"]["mean_interval"])[0] / (2 * 1.96) for report in reports])
    assert 0.5 < widths.mean() / estimates.std(ddof=1) < 2


def test_the_reduction_against_a_twin_is_one_minus_the_ratio_and_zero_against_itself():
    noise, other = sparse_noise(2048, 40, 0.1, 1), sparse_noise(2048, 40, 0.2, 2)
    own, twin = (measure_correlation([codes], 40, replicates=5) for codes in (noise, other))
    found = own.reduction(twin)["cosine"]
    assert found["top"] == pytest.approx(1 - own.report["cosine"]["top"] / twin.report["cosine"]["top"])
    low, high = found["top_interval"]
    assert low < found["top"] < high
    same = own.reduction(own)["cosine"]
    assert same["mean"] == 0 and same["mean_interval"] == (0, 0)


@pytest.mark.parametrize("measure", ["cosine", "pearson"])
def test_a_resampled_statistic_is_that_of_the_repeated_tokens(measure, monkeypatch):
    from unbraid.evaluation import resampling
    from unbraid.evaluation.pairs import View, pair_statistics, stack_codes

    monkeypatch.setattr(resampling, "STACK_ENTRIES", 500)
    codes = stack_codes([sparse_noise(600, 25, 0.3, 3)], 25)
    group_of_row = np.arange(600) // 100
    draws = np.array([[1, 1, 1, 1, 1, 1], [2, 0, 1, 3, 0, 0]])
    views = [View(measure)]
    (found,) = resampling.resampled(codes, group_of_row, draws, views, [0.0], 0.05, {"q90": 0.9})
    for sample, draw in enumerate(draws):
        repeated = codes[np.repeat(np.arange(600), draw[group_of_row])]
        (exact,) = pair_statistics(repeated, views, keep=0.2)
        assert found["mean"][sample] == pytest.approx(exact.mean, abs=1e-6)
        assert found["std"][sample] == pytest.approx(exact.std, abs=1e-6)
        assert found["top"][sample] == pytest.approx(exact.top_mean(15), abs=1 / resampling.BINS)
        assert found["q90"][sample] == pytest.approx(exact.quantile(0.9), abs=1 / resampling.BINS)
