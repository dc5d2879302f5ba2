"""A chunk source without a model: rows that say which token they are, so tests can see what happened to each."""

from collections.abc import Iterator
from typing import Any

import torch

from unbraid.activations.rows import Chunk
from unbraid.randomness import generator
from unbraid.sites import Site

BOS = 0


class FakeSource:
    """`contexts` contexts of T tokens; coordinate 0 of a row is its running number, the rest is seeded noise."""

    def __init__(
        self, contexts: int, context_length: int = 8, d_model: int = 4, batch_contexts: int = 4, n_sites: int = 1
    ):
        self.contexts, self.context_length, self.d_model = contexts, context_length, d_model
        self.widths = [d_model] * n_sites
        self.batch_contexts = batch_contexts
        self.sites = [Site("resid_post", layer) for layer in range(n_sites)]
        self.special_ids = frozenset({BOS})
        self.identity = {"source": "fake"}
        self.passes = 0
        self.spoil: dict[int, float] = {}

    def chunks(self, position: dict[str, Any] | None, held_out: bool = False) -> Iterator[Chunk]:
        start = position["context"] if position else 0
        for first in range(start, self.contexts, self.batch_contexts):
            self.passes += 1
            last = min(first + self.batch_contexts, self.contexts)
            shape = (last - first, self.context_length)
            number_BT = torch.arange(first * self.context_length, last * self.context_length).view(shape)
            tokens_BT = torch.ones(shape, dtype=torch.long)
            tokens_BT[:, 0] = BOS
            noise = torch.rand(*shape, self.d_model, generator=generator(7, "fake", first))
            activations = []
            for site in range(len(self.sites)):
                x_BTD = noise + site
                x_BTD[..., 0] = number_BT % 97 / 97 + 1
                x_BTD[..., -1] = number_BT.float()
                x_BTD[..., -1] /= self.contexts * self.context_length
                for row, value in self.spoil.items():
                    x_BTD[number_BT == row] = value
                activations.append(x_BTD)
            yield Chunk(tokens_BT, activations, {"context": last})

    def row_numbers(self, x_BD: torch.Tensor) -> list[int]:
        return (x_BD[:, -1] * self.contexts * self.context_length).round().long().tolist()
