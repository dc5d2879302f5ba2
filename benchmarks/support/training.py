"""What the penalty is timed in: TopK SAEs as a run trains them, on stand-in activations."""

import torch
from torch import Tensor

from unbraid.bench.steps import endless, stand_in_activations
from unbraid.config import DecorrelationConfig, OptimiserConfig, SAEConfig, VariantConfig
from unbraid.training.normalisation import Normalisation
from unbraid.training.sae_trainer import SAETrainer, train_step, trainer_from_settings

__all__ = ["B", "D", "K", "N", "activations", "endless", "step", "trainer"]

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
    return trainer_from_settings("topk", (0,), settings, 0, Normalisation.none(D), torch.device(device))


def activations(count: int, device: str, seed: int = 0) -> list[Tensor]:
    """Batches of stand-in activations of the shape above."""
    return stand_in_activations(D, B, count, device, seed)


def step(trained: SAETrainer, number: int, x_BD: Tensor) -> None:
    """One training step."""
    train_step(trained, x_BD, number, trained.config.optimiser.lr, log=False)
