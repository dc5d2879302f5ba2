"""R^2 is true, batches do not matter, and what cannot be measured is refused."""

import pytest
import torch

from unbraid.errors import EvaluationError
from unbraid.evaluation.controls import LinearSAE, pca_control
from unbraid.evaluation.core import core_metrics
from unbraid.evaluation.geometry import max_cosines, seed_agreement
from unbraid.evaluation.intervals import bootstrap_interval, mean_interval
from unbraid.evaluation.splice import preservation
from unbraid.randomness import generator


def activations(contexts: int = 64, tokens: int = 8, width: int = 12, offset: float = 30.0):
    chance = generator(0, "activations")
    x = torch.randn(contexts, tokens, width, generator=chance) * torch.linspace(0.2, 3, width) + offset
    keep = torch.rand(contexts, tokens, generator=chance) > 0.1
    return x, keep


def some_sae(width: int = 12, n: int = 30, k: int | None = 4, offset: float = 30.0) -> LinearSAE:
    rows = torch.nn.functional.normalize(torch.randn(n, width, generator=generator(1, "rows")), dim=1)
    return LinearSAE(rows.T.contiguous(), torch.zeros(n), rows, torch.full((width,), offset), k)


class Constant:
    """Predicts the mean, whatever it sees."""

    def __init__(self, mean: torch.Tensor):
        self.mean = mean

    def encode(self, x):
        return x.new_zeros(*x.shape[:-1], 3)

    def decode(self, f):
        return self.mean.expand(*f.shape[:-1], -1)


def test_a_constant_predictor_has_r2_zero_and_the_published_formula_does_not():
    x, keep = activations(offset=0.0)
    x = x + 3.0
    metrics = core_metrics(Constant(x[keep].mean(0)), [(x, keep)]).categories["reconstruction_quality"]
    assert metrics["r2"] == pytest.approx(0.0, abs=1e-6)
    assert abs(metrics["saebench_explained_variance"]) > 0.3


@pytest.mark.parametrize("sae", [some_sae(), some_sae(k=None), pca_control(activations()[0].flatten(0, 1), 5.0)])
def test_core_metrics_do_not_depend_on_the_batch_size(sae):
    x, keep = activations()
    reference = core_metrics(sae, [(x, keep)])
    for size, at_once in ((1, 1), (64, 64), (5, 100)):
        batches = zip(x.split(size), keep.split(size), strict=True)
        again = core_metrics(sae, batches, tokens_at_once=at_once)
        for category, metrics in reference.categories.items():
            assert again.categories[category] == pytest.approx(metrics, rel=1e-6, abs=1e-6), category
        for name, values in reference.features.items():
            torch.testing.assert_close(again.features[name], values, rtol=1e-6, atol=1e-6, equal_nan=True)


def test_r2_survives_a_mean_a_million_times_the_spread():
    x, keep = activations(offset=0.0)
    x = x.double()
    small = core_metrics(Constant(x[keep].mean(0) + 0.5), [(x, keep)]).categories["reconstruction_quality"]["r2"]
    x = x + 1e6
    large = core_metrics(Constant(x[keep].mean(0) + 0.5), [(x, keep)]).categories["reconstruction_quality"]["r2"]
    assert large == pytest.approx(small, abs=1e-6)


def test_a_metric_about_weights_is_left_out_where_there_are_none():
    x, keep = activations()
    core = core_metrics(Constant(x[keep].mean(0)), [(x, keep)])
    assert (
        "encoder_norm" not in core.features and "average_max_decoder_cosine_sim" not in core.categories["misc_metrics"]
    )
    assert core.categories["misc_metrics"]["frac_alive"] == 0


def test_no_token_to_measure_on_is_refused():
    x, keep = activations()
    with pytest.raises(EvaluationError, match="no token is left"):
        core_metrics(some_sae(), [(x, torch.zeros_like(keep))])


class TinyModel:
    """Logits are a fixed matrix of the activations, which are an embedding."""

    def __init__(self):
        chance = generator(2, "model")
        self.embedding = torch.randn(20, 12, generator=chance)
        self.head = torch.randn(12, 20, generator=chance)

    def logits(self, tokens, site=None, replace=None):
        x = self.embedding[tokens]
        return (x if replace is None else replace(x)) @ self.head


class Identity:
    def encode(self, x):
        return x

    def decode(self, f):
        return f


def test_splicing_the_identity_loses_nothing_and_zeroing_everything_loses_all():
    model, tokens = TinyModel(), torch.randint(1, 20, (6, 9), generator=generator(3, "tokens"))

    class Zero(Identity):
        def decode(self, f):
            return f * 0

    scores = preservation(model, {None: {"same": Identity(), "zero": Zero()}}, [(tokens, tokens > 0)])
    for name, score in (("same", 1.0), ("zero", 0.0)):
        assert scores[name]["model_behavior_preservation"]["kl_div_score"] == pytest.approx(score, abs=1e-6)
        assert scores[name]["model_performance_preservation"]["ce_loss_score"] == pytest.approx(score, abs=1e-6)
        low, high = scores[name]["model_behavior_preservation"]["kl_div_score_interval"]
        assert low <= score + 1e-6 and high >= score - 1e-6


def test_special_positions_keep_their_activations_when_spliced():
    model, tokens = TinyModel(), torch.randint(1, 20, (4, 9), generator=generator(3, "tokens"))
    tokens[:, 0] = 0
    seen = []

    class Recorder(TinyModel):
        def logits(self, tokens, site=None, replace=None):
            def spy(x):
                seen.append((x, replace(x)))
                return seen[-1][1]

            return super().logits(tokens, site, None if replace is None else spy)

    preservation(Recorder(), {None: {"sae": some_sae(offset=0.0)}}, [(tokens, tokens > 0)])
    spliced = [(x, y) for x, y in seen if y.any()]
    assert len(spliced) == 4
    for x, y in spliced:
        assert torch.equal(x[:, 0], y[:, 0]) and not torch.equal(x[:, 1:], y[:, 1:])
    assert model.head.shape == (12, 20)


def test_max_cosines_leave_the_row_itself_out_in_every_tile(monkeypatch):
    rows = torch.randn(37, 9, generator=generator(4, "rows"))
    unit = torch.nn.functional.normalize(rows, dim=1)
    expected = (unit @ unit.T).fill_diagonal_(-2).max(1).values
    monkeypatch.setattr("unbraid.evaluation.geometry.TILE_ENTRIES", 100)
    torch.testing.assert_close(max_cosines(rows), expected)


def test_an_sae_agrees_with_its_shuffled_self_and_not_with_noise():
    rows = torch.randn(40, 30, generator=generator(5, "rows"))
    shuffled = 3 * rows[torch.randperm(40, generator=generator(6, "order"))]
    assert seed_agreement(rows, shuffled) == pytest.approx(1.0)
    assert seed_agreement(rows, torch.randn(40, 30, generator=generator(7, "rows"))) < 0.5


def test_the_bootstrap_interval_of_a_mean_has_its_textbook_width():
    import numpy as np

    values = np.random.default_rng(0).normal(size=400)
    low, high = mean_interval(values)
    assert (high - low) / (2 * 1.96 * values.std() / 20) == pytest.approx(1.0, abs=0.1)
    assert low < values.mean() < high
    assert bootstrap_interval(lambda counts: counts.sum(1), 1) is None


def test_rows_composed_of_fewer_directions_have_the_higher_composition_rate():
    from unbraid.evaluation.geometry import composition_rate

    chance = generator(8, "rows")
    base = torch.nn.functional.normalize(torch.randn(12, 24, generator=chance), dim=1)
    composed = torch.stack([base[torch.randperm(12, generator=chance)[:2]].sum(0) for _ in range(96)])
    atomic = torch.randn(96, 24, generator=chance)
    rates = {name: composition_rate(rows, steps=150) for name, rows in (("composed", composed), ("atomic", atomic))}
    assert rates["composed"] > rates["atomic"] + 0.1 and rates["composed"] <= 1
    assert composition_rate(7 * composed, steps=20) == pytest.approx(composition_rate(composed, steps=20), rel=1e-3)
