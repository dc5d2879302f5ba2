"""What a metric says about things that have learned nothing: the floor every table must show beside an SAE.

A random SAE of the same width and sparsity, the SAE's own decoder with its rows shuffled (right directions, wrong
features), and PCA with as many components as the SAE has active features.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from unbraid.evaluation.protocols import Autoencoder, decoder_rows


@dataclass(frozen=True, eq=False)
class LinearSAE:
    """An autoencoder given by its weights: `relu((x - b_dec) W_enc + b_enc)`, then the `k` largest (None keeps all).

    Attributes:
        W_enc: `[D, N]`.
        b_enc: `[N]`.
        W_dec: `[N, D]`.
        b_dec: `[D]`.
        k: how many features a row may use.
    """

    W_enc: Float[Tensor, "D N"]
    b_enc: Float[Tensor, " N"]
    W_dec: Float[Tensor, "N D"]
    b_dec: Float[Tensor, " D"]
    k: int | None = None

    def encode(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows N"]:
        """Codes of raw activations."""
        f = ((x - self.b_dec) @ self.W_enc + self.b_enc).relu()
        if self.k is None or self.k >= f.shape[-1]:
            return f
        values, indices = f.topk(self.k, dim=-1)
        return torch.zeros_like(f).scatter(-1, indices, values)

    def decode(self, f: Float[Tensor, "*rows N"]) -> Float[Tensor, "*rows D"]:
        """Reconstruction from codes."""
        return f @ self.W_dec + self.b_dec


@dataclass(frozen=True, eq=False)
class PermutedDecoder:
    """The codes of `sae`, decoded with its decoder rows in another order."""

    sae: Autoencoder
    W_enc: Float[Tensor, "D N"] | None
    W_dec: Float[Tensor, "N D"]
    b_dec: Float[Tensor, " D"]

    def encode(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows N"]:
        """The codes of the SAE itself."""
        return self.sae.encode(x)

    def decode(self, f: Float[Tensor, "*rows N"]) -> Float[Tensor, "*rows D"]:
        """Reconstruction through the shuffled rows."""
        return f @ self.W_dec + self.b_dec


def controls_of(
    sae: Autoencoder, x_BD: Float[Tensor, "B D"], generator: torch.Generator
) -> dict[str, LinearSAE | PermutedDecoder]:
    """The controls of `sae` by name, as sparse as it is on the activations `x_BD` they are fitted to."""
    l0 = mean_l0(sae, x_BD)
    return {
        "random": random_control(sae, x_BD, l0, generator),
        "permuted": permuted_control(sae, generator),
        "pca": pca_control(x_BD, l0),
    }


@torch.no_grad()
def mean_l0(sae: Autoencoder, x_BD: Float[Tensor, "B D"]) -> float:
    """Active features per row."""
    return float((sae.encode(x_BD) != 0).sum(-1).double().mean())


def random_control(sae: object, x_BD: Float[Tensor, "B D"], l0: float, generator: torch.Generator) -> LinearSAE:
    """A random SAE of the width of `sae`: unit decoder rows, tied encoder, the `round(l0)` largest features a token."""
    W_dec = decoder_rows(sae)
    rows = F.normalize(torch.randn(W_dec.shape, generator=generator), dim=1).to(W_dec.device)
    bias = torch.zeros(len(rows), device=W_dec.device)
    return LinearSAE(rows.T, bias, rows, x_BD.float().mean(0), max(1, round(l0)))


def permuted_control(sae: Autoencoder, generator: torch.Generator) -> PermutedDecoder:
    """`sae` with its decoder rows shuffled."""
    W_dec = decoder_rows(sae)
    order = torch.randperm(len(W_dec), generator=generator).to(W_dec.device)
    encoder = getattr(sae, "W_enc", None)
    bias = getattr(sae, "b_dec", None)
    bias = bias.detach().float() if isinstance(bias, Tensor) else W_dec.new_zeros(W_dec.shape[1])
    return PermutedDecoder(sae, encoder.detach().float() if isinstance(encoder, Tensor) else None, W_dec[order], bias)


def pca_control(x_BD: Float[Tensor, "B D"], l0: float) -> LinearSAE:
    """The first `round(l0)` principal components, each as a positive and a negative feature: codes stay non-negative
    and a token uses as many of them as the SAE uses features."""
    x_BD = x_BD.double()
    mean_D = x_BD.mean(0)
    k = min(max(1, round(l0)), x_BD.shape[1])
    _, vectors = torch.linalg.eigh((x_BD - mean_D).T @ (x_BD - mean_D))
    rows = vectors[:, -k:].flip(1).T.float()
    rows = torch.cat([rows, -rows])
    return LinearSAE(rows.T.contiguous(), rows.new_zeros(2 * k), rows, mean_D.float())
