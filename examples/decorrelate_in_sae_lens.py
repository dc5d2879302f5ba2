"""Selective decorrelation inside SAELens's own trainer (pip install sae-lens): one overridden method.

    python examples/decorrelate_in_sae_lens.py

A training SAE's `calculate_aux_loss` returns the terms its trainer adds to the reconstruction loss and logs under their
names. The penalty is one more; as a submodule its state would travel with the SAE, so it is kept beside it.
"""

from collections.abc import Iterator

import torch
from sae_lens import LoggingConfig, SAETrainer, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import SAETrainerConfig
from torch import Tensor

import unbraid


class DecorrelatedTopK(TopKTrainingSAE):
    """SAELens's TopK SAE with lambda2 * R(tau) in its loss."""

    def set_decorrelation(self, decorrelate: unbraid.SelectiveDecorrelation, lambda2: float) -> None:
        self.decorrelation = (decorrelate, lambda2)

    def calculate_aux_loss(self, step_input, feature_acts, hidden_pre, sae_out) -> dict[str, Tensor]:
        losses = super().calculate_aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        decorrelate, lambda2 = self.decorrelation
        penalty, self.decorrelation_stats = decorrelate(feature_acts, decoder=self.W_dec)
        return losses | {"decorrelation_loss": lambda2 * penalty}


def batches(d_in: int, rows: int, seed: int) -> Iterator[Tensor]:
    """Stand-in activations: sparse combinations of 4 * d_in directions, some of which come in pairs."""
    draws = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(4 * d_in, d_in, generator=draws), dim=1)
    while True:
        codes = torch.relu(torch.randn(rows, 4 * d_in, generator=draws) - 2.2)
        codes[:, 1::8] = codes[:, ::8] * (0.5 + torch.rand(rows, codes[:, ::8].shape[1], generator=draws))
        yield codes @ directions


def train(lambda2: float, steps: int = 60) -> tuple[TopKTrainingSAE, list[float]]:
    """Train for `steps` steps with SAELens's trainer; the SAE and its mean correlation over S at every step."""
    torch.manual_seed(0)
    sae = DecorrelatedTopK(TopKTrainingSAEConfig(d_in=32, d_sae=256, k=8))
    decorrelate = unbraid.SelectiveDecorrelation(fraction=0.002, window=2)
    sae.set_decorrelation(decorrelate, lambda2)
    correlations: list[float] = []

    def data() -> Iterator[Tensor]:
        for batch in batches(32, 512, seed=0):
            yield batch
            correlations.append(sae.decorrelation_stats.scalars()["mean_selected"])

    config = SAETrainerConfig(
        total_training_samples=steps * 512,
        train_batch_size_samples=512,
        lr=3e-3,
        lr_end=3e-3,
        device="cpu",
        autocast=False,
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        logger=LoggingConfig(log_to_wandb=False),
    )
    SAETrainer(cfg=config, sae=sae, data_provider=data()).fit()
    return sae, correlations


if __name__ == "__main__":
    for lambda2 in (0.0, 1.0):
        _, correlations = train(lambda2, steps=200)
        print(f"lambda2 {lambda2}: mean correlation of the selected pairs {sum(correlations[-20:]) / 20:.4f}")
