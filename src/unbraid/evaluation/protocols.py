"""What an evaluation needs of an SAE: `encode` and `decode`, plus weights where a metric is about weights.

Nothing here asks for unbraid's own classes: an SAE of another library, or ten lines in a notebook, is evaluated in the
same way.
"""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from unbraid.errors import EvaluationError


@runtime_checkable
class Autoencoder(Protocol):
    """Anything that turns activations `[..., D]` into non-negative codes `[..., N]` and back, row by row."""

    def encode(self, x: Tensor, /) -> Tensor:
        """Codes of raw activations."""
        ...

    def decode(self, f: Tensor, /) -> Tensor:
        """Reconstruction of raw activations."""
        ...


def predicted(sae: Autoencoder, x: Tensor, f: Tensor) -> Tensor:
    """What an SAE makes of the codes `f` of `x`, a transcoder's skip connection included, which `decode` leaves out."""
    skip: Tensor | None = getattr(sae, "W_skip", None)
    return sae.decode(f) if skip is None else sae.decode(f) + x.to(skip.dtype) @ skip


def decoder_rows(sae: object) -> Tensor:
    """`W_dec` as float32 `[N, D]`, detached.

    Raises:
        EvaluationError: there is none, or it is not a matrix.
    """
    return _matrix(sae, "W_dec")


def encoder_columns(sae: object) -> Tensor:
    """`W_enc` as float32 `[D, N]`, detached.

    Raises:
        EvaluationError: there is none, or it is not a matrix.
    """
    return _matrix(sae, "W_enc")


def encoder_bias(sae: object, n_features: int) -> Tensor:
    """`b_enc` (Gated: `b_mag`) as float32 `[N]`, zero where there is none: SAEBench's reading."""
    for name in ("b_enc", "b_mag"):
        bias = getattr(sae, name, None)
        if isinstance(bias, Tensor):
            return bias.detach().float()
    return torch.zeros(n_features)


def _matrix(sae: object, name: str) -> Tensor:
    weight = getattr(sae, name, None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise EvaluationError(
            f"{type(sae).__name__} has no matrix {name}; expected the decoder as W_dec [N, D] and the encoder as "
            "W_enc [D, N]; give the object that attribute or leave out the suites about weights"
        )
    return weight.detach().float()
