"""What every sparse autoencoder shares: its weights, its faces, and how a training step looks at it.

An architecture is one small class that says how pre-activations become codes, once for inference (`encode`: every row
on its own, any leading dimensions) and once for training (`training_forward`: a whole batch, with losses). The
encoder is stored as rows, one a feature, like the decoder: its gradient is then built feature by feature from the
active entries, and both matrices are optimised by the same code. `W_enc` shows it in the usual [D, N] orientation.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from unbraid.config import SAEConfig
from unbraid.sae.codes import Codes

Path = Literal["dense", "sparse"]


@dataclass
class Forward:
    """What a training step needs from one pass over a batch.

    Attributes:
        x_hat_BD: reconstruction.
        codes: `Codes` on the sparse path, a dense `[B, N]` tensor on the dense one; carries gradients.
        reconstruction: mean over tokens of ||x - x_hat||^2.
        sparsity: to be weighted by lambda1; zero where sparsity is structural (top-k family).
        auxiliary: further losses, already weighted.
        path: which of the two equivalent computations ran.
    """

    x_hat_BD: Tensor
    codes: Codes | Tensor
    reconstruction: Tensor
    sparsity: Tensor
    auxiliary: Tensor
    path: Path


class SAE(nn.Module):
    """Base of every architecture: x -> f = encode(x) -> x_hat = f W_dec + b_dec.

    Attributes:
        encoder_ND: encoder, one row a feature; `W_enc` is its transpose.
        b_enc: `[N]`.
        W_dec: `[N, D]`, rows of unit L2 norm.
        b_dec: `[D]`, subtracted before the encoder, added after the decoder.
    """

    architecture: ClassVar[str]
    scaled_with_input: ClassVar[tuple[str, ...]] = ("b_enc",)
    """Parameters and buffers in units of pre-activations, which `fold_scale` divides."""

    def __init__(self, config: SAEConfig, d_in: int, generator: torch.Generator, mean_D: Tensor | None = None):
        super().__init__()
        self.config = config
        self.d_in = d_in
        self.n_features = config.n_features
        W_dec = F.normalize(torch.randn(config.n_features, d_in, generator=generator), dim=1)
        self.encoder_ND = nn.Parameter(W_dec * config.decoder_init_norm)
        self.b_enc = nn.Parameter(torch.zeros(config.n_features))
        self.W_dec = nn.Parameter(W_dec)
        self.b_dec = nn.Parameter(torch.zeros(d_in) if mean_D is None else mean_D.detach().float().cpu().clone())

    @property
    def W_enc(self) -> Float[Tensor, "D N"]:
        """The encoder as [D, N], the orientation SAELens uses."""
        return self.encoder_ND.T

    def preactivations(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows N"]:
        """(x - b_dec) W_enc + b_enc."""
        return F.linear(x - self.b_dec, self.encoder_ND, self.b_enc)

    def encode(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows N"]:
        """Codes of raw activations, in inference form: each row independent of the others."""
        raise TypeError(f"{type(self).__name__} is not an architecture; build one with unbraid.sae.build")

    def decode(self, f: Float[Tensor, "*rows N"]) -> Float[Tensor, "*rows D"]:
        """Reconstruction from codes."""
        return f @ self.W_dec + self.b_dec

    def forward(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        """Reconstruction of raw activations, in inference form."""
        return self.decode(self.encode(x))

    def training_forward(
        self,
        x_BD: Float[Tensor, "B D"],
        dead_N: Bool[Tensor, " N"] | None = None,
        generator: torch.Generator | None = None,
        path: Literal["auto", "dense", "sparse"] = "auto",
    ) -> Forward:
        """One training pass over a batch.

        Args:
            x_BD: activations scaled so that E||x||^2 = 1.
            dead_N: features that have not fired for long, revived by the auxiliary loss.
            generator: chance for architectures that use it (denoising).
            path: force one of the equivalent computations; auto takes the faster one for this batch's density.
        """
        raise TypeError(f"{type(self).__name__} is not an architecture; build one with unbraid.sae.build")

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        """Turn an SAE that acts on `x * scale` into one that acts on raw `x`, in place.

        Decoder rows keep unit norm, so codes come out divided by `scale`, and with them every bias and threshold.
        """
        self.b_dec /= scale
        for name in self.scaled_with_input:
            getattr(self, name).div_(scale)

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        """Give every decoder row unit L2 norm."""
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
