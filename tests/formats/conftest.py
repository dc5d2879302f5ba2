"""One SAE of every architecture there is, and activations to try them on."""

import pytest
import torch
from sae_samples import D, make_sae

from unbraid.sae import SAE
from unbraid.sae.build import ARCHITECTURES


@pytest.fixture(params=sorted(ARCHITECTURES))
def any_sae(request: pytest.FixtureRequest) -> SAE:
    return make_sae(request.param)


@pytest.fixture
def x() -> torch.Tensor:
    """Activations [2, 150, D] with a mean."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 150, D, generator=generator) * 1.5 + torch.randn(D, generator=generator)
