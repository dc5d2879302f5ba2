"""Probes fit what logistic regression fits, find the column that knows, and read real labelled text."""

import numpy as np
import pytest
import torch

from unbraid.config import ProbingConfig
from unbraid.errors import EvaluationError
from unbraid.evaluation import probing
from unbraid.evaluation.probes import area_under_curve, fit_probe, score_probe, top_columns
from unbraid.evaluation.probing import load_task, probe_task, summarise_probing, task_activations


def labelled(n: int = 300, width: int = 20, knows: int = 7, seed: int = 0):
    rng = np.random.default_rng(seed)
    y = np.tile([1, 0], n // 2)
    x = rng.normal(size=(n, width)).clip(0)
    x[:, knows] = y * rng.uniform(1, 2, n) * (rng.random(n) < 0.9)
    return x.astype(np.float32), y


def test_the_fit_is_the_minimum_of_its_loss():
    x, y = labelled()
    probe = fit_probe(x, y)
    z = x / probe.scale
    margins = (2 * y - 1) * (z @ probe.weights + probe.bias)
    slope = -(2 * y - 1) / (1 + np.exp(margins))
    np.testing.assert_allclose(z.T @ slope + probe.weights, 0, atol=1e-2)
    assert abs(slope.sum()) < 1e-2


def test_the_column_that_knows_is_chosen_and_enough():
    x, y = labelled()
    assert top_columns(x[:200], y[:200], 1).tolist() == [7]
    score = score_probe(fit_probe(x[:200], y[:200], np.array([7])), x[200:], y[200:])
    assert score.accuracy > 0.9 and score.auc > 0.9


def test_the_units_of_a_column_do_not_matter():
    x, y = labelled()
    a, b = (score_probe(fit_probe(s * x[:200], y[:200]), s * x[200:], y[200:]) for s in (1.0, 1e-3))
    assert a == b


def test_the_area_under_the_curve_counts_ties_as_half():
    assert area_under_curve(np.array([0.0, 0, 0, 0]), np.array([1, 0, 1, 0])) == 0.5
    assert area_under_curve(np.array([2.0, 1, 3, 0]), np.array([1, 0, 1, 0])) == 1.0
    assert np.isnan(area_under_curve(np.array([1.0]), np.array([1])))


def test_an_sae_whose_feature_is_the_label_beats_the_channels():
    rng = np.random.default_rng(0)
    y = np.tile([1, 0], 150)
    direction = rng.normal(size=16)
    x = torch.from_numpy(rng.normal(size=(300, 16)) + 0.6 * np.outer(y, direction)).float()

    class Reader:
        def encode(self, x):
            return (x @ torch.from_numpy(direction).float()[:, None] - 0.3 * float(direction @ direction)).relu()

        def decode(self, f):
            return f

    scores = {"task": probe_task({"sae": Reader()}, x, y, 200)}
    report = summarise_probing(scores, "sae")
    assert report["sae"]["sae_top_1_test_accuracy"] > report["llm"]["llm_top_1_test_accuracy"] + 0.05
    assert report["llm"]["llm_test_accuracy"] > 0.8
    assert report["tasks"]["task"]["sae_top_1"]["auc"] > 0.9


def test_there_are_twelve_tasks_and_each_has_enough_balanced_distinct_texts():
    settings = ProbingConfig()
    assert len(settings.tasks) >= 12
    for file in settings.tasks[:2] + settings.tasks[6:9]:
        texts, labels = load_task(file, settings.train + settings.test)
        assert len(set(texts)) == len(texts) == 192 and labels.mean() == 0.5


def test_a_missing_task_is_refused_with_a_reason():
    with pytest.raises(EvaluationError, match="there is no task file"):
        load_task("nonsense", 10)
    with pytest.raises(EvaluationError, match="expected 100000 of each"):
        load_task("96_spam_is", 200_000)


class CharacterModel:
    """Activations are running character counts: causal, and different at every token."""

    sites = ("a", "b")
    identity = {"name": "characters"}  # noqa: RUF012
    passes = 0

    class tokenizer:
        bos_token_id = 1

        def __init__(self, text, add_special_tokens):
            self.ids = [2 + ord(c) % 30 for c in text]

        def __getitem__(self, key):
            return self.ids

    def activations(self, tokens, mask):
        type(self).passes += 1
        counts = torch.nn.functional.one_hot(tokens, 32).cumsum(1).float()
        return [counts, 2 * counts]


def test_activations_are_those_of_the_last_token_of_the_beginning_and_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("UNBRAID_CACHE", str(tmp_path))
    texts, labels = ["abc", "a longer text than that", "x"] * 8, np.zeros(24)
    monkeypatch.setattr(probing, "load_task", lambda file, n: (texts, labels))
    model, settings = CharacterModel(), ProbingConfig(max_tokens=10)
    (a, b), _ = task_activations(model, "any", settings)
    for row, text in enumerate(texts):
        expected = torch.bincount(torch.tensor([1, *(2 + ord(c) % 30 for c in text)][:10]), minlength=32)
        torch.testing.assert_close(a[row], expected.float())
    torch.testing.assert_close(b, 2 * a)
    before = CharacterModel.passes
    task_activations(model, "any", settings)
    assert CharacterModel.passes == before
