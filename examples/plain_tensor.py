"""Train SAEs on a tensor of activations: two widths on the same batches, without a run folder."""

import torch

import unbraid

D = 32


def activations(rows: int, seed: int = 0) -> torch.Tensor:
    """Stand-ins for yours: sparse sums of 64 directions, [rows, D]."""
    draws = torch.Generator().manual_seed(seed)
    directions = torch.nn.functional.normalize(torch.randn(64, D, generator=torch.Generator().manual_seed(1)), dim=1)
    codes = torch.rand(rows, 64, generator=draws) * (torch.rand(rows, 64, generator=draws) < 0.05)
    return codes @ directions + 3.0


def main() -> dict[str, float]:
    """Share of the variance each SAE explains on rows it has not seen."""
    settings = {
        name: unbraid.VariantConfig(
            seed=0,
            sae=unbraid.SAEConfig(architecture="topk", n_features=n_features, k=4),
            optimiser=unbraid.OptimiserConfig(lr=3e-3, warmup_steps=10),
            decorrelation=unbraid.DecorrelationConfig(method="none"),
        )
        for name, n_features in (("narrow", 32), ("wide", 128))
    }
    saes = unbraid.fit(settings, activations(65_536), batch_tokens=512)
    x = activations(4_096, seed=2)
    spread = (x - x.mean(0)).square().sum()
    return {name: 1 - float((x - sae(x)).square().sum() / spread) for name, sae in saes.items()}


if __name__ == "__main__":
    print(main())
