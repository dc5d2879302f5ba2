"""Sparse autoencoders: every architecture over one set of shared pieces."""

from unbraid.sae.base import SAE, Forward
from unbraid.sae.build import build
from unbraid.sae.codes import Codes

__all__ = ["SAE", "Codes", "Forward", "build"]
