"""Sparse autoencoders: every architecture over one set of shared pieces."""

from unbraid.kernels.codes import Codes
from unbraid.sae.base import SAE
from unbraid.sae.build import ARCHITECTURES, build
from unbraid.sae.forward import Forward
from unbraid.sae.registry import register

__all__ = ["ARCHITECTURES", "SAE", "Codes", "Forward", "build", "register"]
