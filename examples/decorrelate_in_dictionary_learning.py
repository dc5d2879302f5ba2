"""Selective decorrelation inside dictionary_learning's `trainSAE` (pip install dictionary-learning): one override.

    python examples/decorrelate_in_dictionary_learning.py

A trainer's `loss` is what `trainSAE` differentiates. The top-k trainer throws its codes away, so they are computed once
more here, as (indices, values), which the penalty takes without a dense copy.
"""

from collections.abc import Iterator

import torch
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
from dictionary_learning.training import trainSAE
from torch import Tensor

import unbraid


class DecorrelatedTopKTrainer(TopKTrainer):
    """dictionary_learning's TopK trainer with lambda2 * R(tau) in its loss."""

    def __init__(self, decorrelate: unbraid.SelectiveDecorrelation, lambda2: float, **settings):
        super().__init__(**settings)
        self.decorrelate, self.lambda2 = decorrelate, lambda2

    def loss(self, x: Tensor, step: int | None = None, logging: bool = False):
        loss = super().loss(x, step=step, logging=logging)
        if logging:
            return loss
        _, values, indices, _ = self.ae.encode(x, return_topk=True, use_threshold=False)
        penalty, self.stats = self.decorrelate(indices=indices, values=values, n_features=self.ae.dict_size)
        return loss + self.lambda2 * penalty


def batches(d_in: int, rows: int, seed: int) -> Iterator[Tensor]:
    """Stand-in activations: sparse combinations of 4 * d_in directions, some of which come in pairs."""
    draws = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(4 * d_in, d_in, generator=draws), dim=1)
    while True:
        codes = torch.relu(torch.randn(rows, 4 * d_in, generator=draws) - 2.2)
        codes[:, 1::8] = codes[:, ::8] * (0.5 + torch.rand(rows, codes[:, ::8].shape[1], generator=draws))
        yield codes @ directions


def train(lambda2: float, steps: int = 60) -> list[float]:
    """Train for `steps` steps with trainSAE; the mean correlation over S at every step."""
    correlations: list[float] = []

    class Watched(DecorrelatedTopKTrainer):
        def update(self, step: int, x: Tensor):
            loss = super().update(step, x)
            correlations.append(self.stats.scalars()["mean_selected"])
            return loss

    settings = {
        "trainer": Watched,
        "decorrelate": unbraid.SelectiveDecorrelation(fraction=0.002, window=2),
        "lambda2": lambda2,
        "steps": steps,
        "activation_dim": 32,
        "dict_size": 256,
        "k": 8,
        "layer": 0,
        "lm_name": "stand-in",
        "dict_class": AutoEncoderTopK,
        "lr": 3e-3,
        "warmup_steps": 10,
        "seed": 0,
        "device": "cpu",
    }
    trainSAE(batches(32, 512, seed=0), [settings], steps=steps, device="cpu")
    return correlations


if __name__ == "__main__":
    for lambda2 in (0.0, 1.0):
        correlations = train(lambda2, steps=200)
        print(f"lambda2 {lambda2}: mean correlation of the selected pairs {sum(correlations[-20:]) / 20:.4f}")
