"""Sparse autoencoders: every architecture over one set of shared pieces."""

from unbraid.kernels.codes import Codes
from unbraid.sae.base import SAE, Forward
from unbraid.sae.build import build

__all__ = ["SAE", "Codes", "Forward", "build"]
