"""SAEs whose weights are far from their initial values, for tests that save, load and look at them."""

import torch
from sae_settings import sae_settings

from unbraid.sae import SAE, build

D, N, K = 12, 40, 5


def make_sae(architecture: str, seed: int = 0, n_features: int = N, **settings) -> SAE:
    generator = torch.Generator().manual_seed(seed)
    sae = build(sae_settings(architecture, n_features=n_features, k=K, **settings), D, generator)
    with torch.no_grad():
        for name, tensor in sae.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(noise.abs() * 0.3 if "threshold" in name else tensor + 0.3 * noise)
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    return sae.eval().requires_grad_(False)
