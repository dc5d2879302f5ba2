"""What the penalty is timed in: TopK SAEs as a run trains them, on stand-in activations."""

from collections.abc import Iterator

import torch
from torch import Tensor

from unbraid.config import DecorrelationConfig, OptimiserConfig, SAEConfig, VariantConfig
from unbraid.training.normalisation import Normalisation
from unbraid.training.sae_trainer import SAETrainer, train_step, trainer_from_settings

B, D, K = 2048, 576, 64
N = 16_384


def trainer(n_features: int, device: str, decorrelation: DecorrelationConfig) -> SAETrainer:
    """A TopK SAE with its optimiser and penalty, as a run builds them; no feature of it dies while it is timed."""
    settings = VariantConfig(
        seed=0,
        sae=SAEConfig(architecture="topk", n_features=n_features, k=K, dead_after_tokens=1_000_000),
        optimiser=OptimiserConfig(warmup_steps=0),
        decorrelation=decorrelation,
    )
    return trainer_from_settings("topk", 0, settings, 0, Normalisation.none(D), torch.device(device))


def activations(count: int, device: str, seed: int = 0) -> list[Tensor]:
    """Batches of stand-in activations, E||x||^2 = 1: 32 of 8192 directions each, a few frequent and many rare ones."""
    draws = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(8192, D, generator=draws), dim=1)
    batches = []
    for _ in range(count):
        chosen = (torch.rand(B, 32, generator=draws) ** 3 * len(directions)).long()
        weights = torch.rand(B, 32, generator=draws) + 0.5
        x_BD = torch.nn.functional.embedding_bag(chosen, directions, per_sample_weights=weights, mode="sum")
        batches.append((x_BD / x_BD.square().sum(1).mean().sqrt()).to(device))
    return batches


def endless(batches: list[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """The batches again and again, numbered."""
    step = 0
    while True:
        yield step, batches[step % len(batches)]
        step += 1


def step(trained: SAETrainer, number: int, x_BD: Tensor) -> None:
    """One training step."""
    train_step(trained, x_BD, number, trained.config.optimiser.lr, log=False)
