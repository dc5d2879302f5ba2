"""Whole cross-layer transcoders: each feature reads one site, and writes into that site's output and all later ones.

Of L sites read and L predicted, features come in L blocks of nearly the same size. Block l reads site l and writes into
outputs l to L - 1; all other weights are zero and stay so: y_k = sum over l <= k of f_l W_dec[l, k] + b_k (Ameisen et
al. 2025, Circuit Tracing), and where there is a skip connection x_k W_skip[k] beside it. It is one dictionary, trained
in one pass, in which the features of all layers share what sparsity allows.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from unbraid.distributed.shard import Shard
from unbraid.errors import ConfigError

if TYPE_CHECKING:
    from unbraid.sae.base import SAE


class Block(NamedTuple):
    """The features of one layer that are held here, the columns they read, and those their layer's output has."""

    features: slice
    reads: slice
    writes: slice


@dataclass(frozen=True)
class CrossLayer:
    """Which weights of a dictionary of L sites are not zero.

    Attributes:
        widths_in, widths_out: of each site, at both ends.
        shard: the features held here.
    """

    widths_in: tuple[int, ...]
    widths_out: tuple[int, ...]
    shard: Shard

    def __post_init__(self):
        layers = len(self.widths_in)
        if layers != len(self.widths_out) or layers < 2:
            raise ConfigError(
                f"sae.cross_layer: {layers} sites are read and {len(self.widths_out)} predicted; expected as many of "
                "both, two at least, as in A + B -> C + D; change model.sites or set sae.cross_layer to false"
            )
        if self.shard.n_features < layers:
            raise ConfigError(
                f"sae.n_features is {self.shard.n_features} and there are {layers} layers; expected a feature for each"
            )

    def blocks(self) -> Iterator[Block]:
        """One for each layer, in order."""
        n_features, layers = self.shard.n_features, len(self.widths_in)
        ends = [0, *(self.shard.clamp(n_features * (layer + 1) // layers) for layer in range(layers))]
        reads, writes = ([0, *accumulate(widths)] for widths in (self.widths_in, self.widths_out))
        for layer in range(layers):
            yield Block(*(slice(at[layer], at[layer + 1]) for at in (ends, reads, writes)))

    def products(
        self, pre_BN: Tensor, centred_BD: Tensor, encoder_ND: Tensor, bias_N: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
        """What must be multiplied, and into where: of each layer its own columns, an L-th of the whole product."""
        for features, reads, _ in self.blocks():
            if features.start < features.stop:
                bias = None if bias_N is None else bias_N[features]
                yield pre_BN[:, features], centred_BD[:, reads], encoder_ND[features, reads], bias

    @torch.no_grad()
    def zero_elsewhere(self, encoder_ND: Tensor | None, W_dec: Tensor | None, W_skip: Tensor | None) -> None:
        """Set to zero, in place, what must be of weights or of their gradients."""
        for features, reads, writes in self.blocks():
            if encoder_ND is not None:
                encoder_ND[features, : reads.start] = 0
                encoder_ND[features, reads.stop :] = 0
            if W_dec is not None:
                W_dec[features, : writes.start] = 0
            if W_skip is not None:
                W_skip[reads, : writes.start] = 0
                W_skip[reads, writes.stop :] = 0

    def zero_gradients(self, sae: "SAE") -> None:
        """Leave gradients only where there are weights."""
        weights = (sae.encoder_ND, sae.W_dec, sae.W_skip)
        self.zero_elsewhere(*(None if weight is None else weight.grad for weight in weights))

    @torch.no_grad()
    def begin(self, sae: "SAE") -> None:
        """Leave the first weights only where they belong, rows as long as before."""
        rows = (sae.encoder_ND, sae.W_dec)
        norms = [weight.norm(dim=1, keepdim=True) for weight in rows]
        self.zero_elsewhere(*rows, sae.W_skip)
        for weight, norm_N1 in zip(rows, norms, strict=True):
            weight.copy_(F.normalize(weight, dim=1) * norm_N1)

    @torch.no_grad()
    def holds(self, encoder_ND: Tensor, W_dec: Tensor, W_skip: Tensor | None) -> bool:
        """Whether all weights are where they belong."""
        weights = (encoder_ND, W_dec, W_skip)
        copies = [None if weight is None else weight.clone() for weight in weights]
        self.zero_elsewhere(*copies)
        kept = zip(weights, copies, strict=True)
        return all(weight is None or copy is None or torch.equal(weight, copy) for weight, copy in kept)
