"""Matryoshka-BatchTopK (Bussmann et al. 2025, arXiv 2503.17547): nested prefixes of the features must each reconstruct.

The loss is the sum over prefixes of ||x - x_hat_prefix||^2. Prefix reconstructions are running sums of the shares of
consecutive feature groups, and the shares of all groups are one sparse product with B * G short rows instead of B.

Two options make credit asymmetric, so that rare features cannot bend common ones. Prefixes may be taken over features
ordered by how often they fire, which keeps the narrow levels for common features however training began. And inner
levels may be detached: a level's loss then trains the features it adds, not those of the levels inside it. Which place
a feature has is kept beside the weights, never in their order, so optimiser, penalty and codes know nothing of it and
the trained SAE is a plain one.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from unbraid.config import active_when
from unbraid.config.checks import wrong
from unbraid.config.sae import LAYERS
from unbraid.kernels.autograd import decode
from unbraid.kernels.codes import Codes
from unbraid.sae.batch_topk import BatchTopKSAE, SharedThresholdConfig
from unbraid.sae.registry import register


class MatryoshkaConfig(SharedThresholdConfig):
    """BatchTopK whose prefixes reconstruct on their own."""

    architecture: Literal["matryoshka"] = "matryoshka"
    matryoshka_widths: list[int] | None = None
    """Nested prefix widths, ascending, the last equal to n_features; none takes N/16, N/4, N."""
    matryoshka_order: Literal["index", "frequency"] = "index"
    """Which features the narrow levels hold: the first ones, or the ones that fire most often."""
    reorder_from: Annotated[int, active_when(matryoshka_order="frequency")] = Field(default=2000, ge=1)
    """Steps before features are first ordered."""
    reorder_every: Annotated[int, active_when(matryoshka_order="frequency")] = Field(default=1000, ge=1)
    """Steps between orderings."""
    frequency_decay: Annotated[float, active_when(matryoshka_order="frequency")] = Field(default=0.99, ge=0.0, lt=1.0)
    """Decay per step of the running firing frequency."""
    cross_layer: Annotated[bool, active_when(model__sites=LAYERS, matryoshka_order="frequency")] = False
    """As for other SAEs; the first features are those of the first layer, so levels must go by frequency."""
    matryoshka_detach: bool = False
    """The loss of an inner level trains only the features it adds to the levels inside it."""
    matryoshka_weights: float | list[float] = 1.0
    """Weight of the inner levels' losses beside the whole reconstruction's: one, or one per inner level."""

    @model_validator(mode="after")
    def _widths_nest(self) -> "MatryoshkaConfig":
        widths = self.matryoshka_widths
        if widths is not None and (
            not widths or widths[0] < 1 or widths != sorted(set(widths)) or widths[-1] != self.n_features
        ):
            raise wrong(
                f"sae.matryoshka_widths is {widths}; expected ascending widths of at least 1, the last equal to "
                f"sae.n_features, {self.n_features}; change one of the two"
            )
        return self

    @model_validator(mode="after")
    def _levels_have_weights(self) -> "MatryoshkaConfig":
        weights, levels = self.matryoshka_weights, len(self.matryoshka_widths or [1, 2, 3]) - 1
        values = weights if isinstance(weights, list) else [weights]
        if (isinstance(weights, list) and len(weights) != levels) or min(values, default=0.0) < 0:
            raise wrong(
                f"sae.matryoshka_weights is {weights}; expected one weight of at least 0, or one for each of the "
                f"{levels} inner levels of sae.matryoshka_widths; change one of the two"
            )
        return self


@register
class MatryoshkaSAE(BatchTopKSAE):
    """BatchTopK whose first `matryoshka_widths` features reconstruct on their own.

    Attributes:
        frequency_N: running share of tokens each feature fires on (order=frequency).
        position_N: each feature's place among all features of all ranks, 0 the most frequent (order=frequency).
        batches: training batches seen (order=frequency).
    """

    settings = MatryoshkaConfig
    config: MatryoshkaConfig
    threshold_kind = "shared"
    written_as = {"sae_lens": "jumprelu", "dictionary_learning": "MatryoshkaBatchTopKSAE"}  # noqa: RUF012
    on_host = ("batches",)

    def add_biases(self) -> None:
        """Also what the order of the features is taken from."""
        super().add_biases()
        self.frequency_N: Tensor
        self.position_N: Tensor
        self.batches: Tensor
        self.register_buffer("frequency_N", torch.zeros(self.n_features), persistent=False)
        self.register_buffer("position_N", torch.arange(self.shard.start, self.shard.end), persistent=False)
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64), persistent=False)

    @property
    def training_buffers(self) -> tuple[str, ...]:
        """Also the order of the features."""
        return (*super().training_buffers, "frequency_N", "position_N", "batches")

    @property
    def by_frequency(self) -> bool:
        """Whether levels hold the most frequent features instead of the first ones."""
        return self.config.matryoshka_order == "frequency"

    def prefix_widths(self) -> list[int]:
        """`matryoshka_widths`, or N/16, N/4, N: how many features each level holds, over all ranks."""
        widths, n = self.config.matryoshka_widths, self.config.n_features
        return widths or [width for width in (n // 16, n // 4) if width > 0] + [n]

    def select(self, pre_BN: Tensor) -> Codes:
        """As BatchTopK; the order follows what fires."""
        codes = super().select(pre_BN)
        if self.by_frequency:
            self._note_firing(codes)
        return codes

    @torch.no_grad()
    def _note_firing(self, codes: Codes) -> None:
        firing_N = codes.firing() / codes.n_rows
        self.frequency_N.lerp_(firing_N.to(self.frequency_N.dtype), 1 - self.config.frequency_decay)
        self.batches += 1
        since = int(self.batches) - self.config.reorder_from
        if since >= 0 and since % self.config.reorder_every == 0:
            frequency = torch.cat(self.shard.ranks.gather_ragged(self.frequency_N))
            position = frequency.argsort(descending=True, stable=True).argsort()
            self.position_N.copy_(position[self.shard.start : self.shard.end])

    def parts_of(self, codes: Codes) -> Tensor:
        """`[B, G, D]`, the share of the features that each level adds."""
        if self.by_frequency:
            split = codes.split(self.prefix_widths(), self.position_N)
        else:
            split = codes.split(self.feature_groups()[0])
        return decode(split, self.W_dec, self.robust.entry_weights).view(codes.n_rows, -1, self.d_out)

    def feature_groups(self) -> tuple[list[int], Tensor | None]:
        """Ends of the levels among the features here, and these in the order of their places."""
        if not self.by_frequency:
            return [self.shard.clamp(width) for width in self.prefix_widths()], None
        if self.shard.whole:
            return self.prefix_widths(), self.position_N.argsort()
        return [int((self.position_N < width).sum()) for width in self.prefix_widths()], self.position_N.argsort()

    def reconstructions(self, parts_BGD: Tensor, constant: Tensor) -> tuple[Tensor, list[tuple[float, Tensor]]]:
        """That of all features, and those of the inner levels with their weights."""
        levels = parts_BGD.shape[1]
        weights = self.config.matryoshka_weights
        weights = weights if isinstance(weights, list) else [weights] * (levels - 1)
        if not self.config.matryoshka_detach:
            *inner, x_hat_BD = (parts_BGD.cumsum(1) + constant.unsqueeze(-2)).unbind(1)
            return x_hat_BD, list(zip(weights, inner, strict=True))
        *parts, _ = parts_BGD.unbind(1)
        inner, inside_BD = [], constant
        for part_BD in parts:
            inner.append(inside_BD + part_BD)
            inside_BD = inner[-1].detach()
        return parts_BGD.sum(1) + constant, list(zip(weights, inner, strict=True))
