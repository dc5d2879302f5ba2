"""Pseudo-text for trying things out: no download, any document on demand, and enough structure to learn from.

Each document has a topic; each topic is a Markov chain over made-up words whose successors follow Zipf's law, so
there are frequent and rare words, topic words and fixed phrases. Document `i` depends on the seed and `i` alone.
"""

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from unbraid.randomness import derive_seed
from unbraid.text.documents import Document

SYLLABLES = tuple(consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou")
WORDS = tuple(first + second for first in SYLLABLES[::5] + SYLLABLES[2::5] for second in SYLLABLES[1::5])
N_TOPICS = 12
N_SUCCESSORS = 24
RESTART = 0.08
"""Chance that the next word is drawn from the topic instead of following the last word."""


class GeneratedSource:
    """Endless documents of 60 to 400 made-up words in sentences."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    @property
    def identity(self) -> dict[str, Any]:
        """The seed decides everything."""
        return {"source": "generated", "seed": self.seed}

    def bookmark(self, document: int) -> None:
        """Any document is made on demand."""
        return None

    def documents(self, start: int = 0, bookmark: dict[str, Any] | None = None) -> Iterator[Document]:
        """Documents `start`, `start + 1`, ... without end."""
        index = start
        while True:
            yield Document(index, self.text(index))
            index += 1

    def text(self, index: int) -> str:
        """Document number `index`."""
        rng = np.random.Generator(np.random.Philox(derive_seed(self.seed, "generated", index)))
        successors, favourites, zipf = self._language
        topic = int(rng.integers(N_TOPICS))
        length = int(rng.integers(60, 400))
        ranks = rng.choice(N_SUCCESSORS, size=length, p=zipf).tolist()
        restarts = (rng.random(length) < RESTART).tolist()
        breaks = (rng.random(length) < 0.1).tolist()
        follow, favourite = successors[topic], favourites[topic]
        words: list[str] = []
        word = favourite[ranks[0]]
        for rank, restart, sentence_ends in zip(ranks, restarts, breaks, strict=True):
            word = favourite[rank] if restart else follow[word][rank]
            words.append(WORDS[word] + "." if sentence_ends else WORDS[word])
        return " ".join(words)

    @cached_property
    def _language(self) -> tuple[list[list[list[int]]], list[list[int]], np.ndarray]:
        rng = np.random.Generator(np.random.Philox(derive_seed(self.seed, "generated", "language")))
        favourites = np.stack([rng.permutation(len(WORDS))[:N_SUCCESSORS] for _ in range(N_TOPICS)])
        frequency = 1.0 / np.arange(1, len(WORDS) + 1)
        common = rng.choice(len(WORDS), size=(len(WORDS), N_SUCCESSORS), p=frequency / frequency.sum())
        of_topic = rng.random((N_TOPICS, len(WORDS), N_SUCCESSORS)) < 0.4
        topical = favourites[np.arange(N_TOPICS)[:, None, None], rng.integers(N_SUCCESSORS, size=of_topic.shape)]
        zipf = 1.0 / np.arange(1, N_SUCCESSORS + 1)
        return np.where(of_topic, topical, common).tolist(), favourites.tolist(), zipf / zipf.sum()
