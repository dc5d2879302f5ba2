"""JumpReLU (Rajamanoharan et al. 2024, arXiv 2407.14435): each feature has a threshold of its own, learned.

The threshold gets its gradient through straight-through windows of width `bandwidth` (the paper's eq. 11 and 12, with a
rectangle kernel): only entries with |pre - threshold| < bandwidth / 2 count, so the sparse path looks at the active
entries and at the few just below the threshold, whose code is zero and whose gradient is not. It is trained directly
rather than as a logarithm, which Adam would barely move, and kept >= 0. The tanh penalty is Anthropic's (Circuits
Updates, January 2025): tanh(4 f) for inputs of mean square norm D, so tanh(4 sqrt(D) f) for ours of mean square norm 1.
"""

from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from unbraid.config import WeightedSAEConfig, above, active_when
from unbraid.kernels import host, workspace
from unbraid.kernels.autograd import active_entries, decode
from unbraid.kernels.codes import Codes
from unbraid.kernels.dense import SlabGradient, dense_autoencode, slabs
from unbraid.kernels.selection import density_above, entries_above
from unbraid.sae.base import SAE
from unbraid.sae.dead import pull_to_threshold
from unbraid.sae.forward import Encoded
from unbraid.sae.registry import register


class JumpReLUConfig(WeightedSAEConfig):
    """A learned threshold for each feature."""

    architecture: Literal["jumprelu"] = "jumprelu"
    bandwidth: float = Field(default=0.001, gt=0.0)
    """Width of the straight-through window around the threshold."""
    jumprelu_sparsity: Annotated[Literal["l0", "tanh"], active_when(lambda1=above(0))] = "l0"
    """Which sparsity loss lambda1 weighs."""
    initial_threshold: float = Field(default=0.001, gt=0.0)
    """Threshold at the start."""


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return pre * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor, None]:  # pyright: ignore
        pre, threshold = ctx.saved_tensors
        window = (pre - threshold).abs() < ctx.bandwidth / 2
        return g * (pre > threshold), g * window * -(threshold / ctx.bandwidth), None


class _CountAbove(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, threshold_N: Tensor, active: Tensor, in_window_N: Tensor, bandwidth: float) -> Tensor:  # pyright: ignore
        ctx.save_for_backward(in_window_N)
        ctx.bandwidth = bandwidth
        return active.to(threshold_N.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:  # pyright: ignore
        (in_window_N,) = ctx.saved_tensors
        return g * in_window_N * -(1 / ctx.bandwidth), None, None, None


@register
class JumpReLUSAE(SAE):
    """f = pre where pre > threshold, else 0; sparsity = mean L0, or a tanh of the codes."""

    settings = JumpReLUConfig
    config: JumpReLUConfig
    threshold_kind = "per_feature"
    written_as = SAE.written_as | {"sae_lens": "jumprelu", "dictionary_learning": "JumpReluAutoEncoder"}
    scaled_with_input = ("b_enc", "threshold")

    def add_biases(self) -> None:
        """b_enc and one threshold a feature."""
        super().add_biases()
        self.threshold = nn.Parameter(torch.full((self.n_features,), self.config.initial_threshold))

    def encode(self, x: Tensor) -> Tensor:
        """Codes, `[..., N]`."""
        pre = self.preactivations(x)
        return pre.relu() * (pre > self.threshold)

    def density(self, pre_BN: Tensor) -> float:
        """Share of entries above the lower edge of their window."""
        return density_above(pre_BN, self._lower_edge())

    def select(self, pre_BN: Tensor) -> Codes:
        """Entries above the lower edge of their feature's window: more than the active ones."""
        return entries_above(pre_BN, self._lower_edge())

    def encode_sparse(self, target_BD: Tensor, seen_BD: Tensor, centred_BD: Tensor, pre_BN: Tensor) -> Encoded:
        """Codes and reconstruction from active entries and those just below their threshold."""
        near = self.select(pre_BN)
        workspace.give(pre_BN)
        near = near.with_values(near.values.to(self.W_dec.dtype))
        near = active_entries(seen_BD, self.input_bias, self.encoder_ND, self.b_enc, centred_BD, near)
        pre, threshold = near.values, self.threshold.index_select(0, near.indices)
        f: Any = _Jump.apply(pre, threshold, self.config.bandwidth)
        waits = host.reading_waits(f)
        codes = near.with_padding(f) if waits else near.with_values(f)
        parts_BD = decode(codes, self.W_dec, self.robust.entry_weights)
        active = f.detach() > 0
        codes = codes if waits else codes.where(active)
        if self.config.jumprelu_sparsity == "tanh":
            sparsity = self._tanh(f).sum() / len(seen_BD)
        else:
            window = (pre.detach() - threshold.detach()).abs() < self.config.bandwidth / 2
            in_window_N = torch.zeros_like(self.threshold).index_add_(0, near.indices, window.to(f.dtype))
            sparsity = _CountAbove.apply(self.threshold, active.sum(), in_window_N, self.config.bandwidth) / len(
                seen_BD
            )
        return Encoded(codes, parts_BD.unsqueeze(1), sparsity, seen_BD.new_zeros(()))

    def encode_dense(self, target_BD: Tensor, seen_BD: Tensor, centred_BD: Tensor, pre_BN: Tensor) -> Encoded:
        """The same from whole matrices."""
        with torch.no_grad():
            pre_BN = pre_BN.to(self.W_dec.dtype)
            lower_N, upper_N = self._lower_edge(), self.threshold + self.config.bandwidth / 2
            window_BN = pre_BN > lower_N
            window_BN &= pre_BN < upper_N
            pre_BN.masked_fill_(pre_BN <= self.threshold, 0.0)
            penalty, penalty_gradient = self.dense_sparsity(pre_BN)
        f_BN, parts_BGD, sparsity = dense_autoencode(
            seen_BD,
            self.input_bias,
            self.encoder_ND,
            self.b_enc,
            self.W_dec,
            centred_BD,
            pre_BN,
            [self.n_features],
            None,
            self.threshold,
            window_BN,
            self.config.bandwidth,
            penalty,
            penalty_gradient,
            self.robust.feature_weights,
        )
        if self.config.jumprelu_sparsity == "l0":
            active = f_BN.detach().count_nonzero()
            in_window_N = torch.cat([window_BN[:, part].sum(0) for _, part in slabs([self.n_features])]).to(f_BN.dtype)
            sparsity = _CountAbove.apply(self.threshold, active, in_window_N, self.config.bandwidth) / len(seen_BD)
        return Encoded(f_BN, parts_BGD, sparsity, seen_BD.new_zeros(()))

    @torch.no_grad()
    def dense_sparsity(self, f_BN: Tensor) -> tuple[Tensor | None, SlabGradient | None]:
        """The tanh penalty on dense codes; L0 has no gradient in the codes."""
        if self.config.jumprelu_sparsity == "l0":
            return None, None
        total = torch.stack([self._tanh(f_BN[:, part]).sum() for _, part in slabs([self.n_features])]).sum()
        slope = 4 * self.d_out**0.5 / len(f_BN)
        return total / len(f_BN), lambda f, _: self._tanh(f).square_().neg_().add_(1).mul_(slope)

    def revival(self, seen_BD: Tensor, residual_BD: Tensor, dead: Tensor) -> Tensor:
        """Dead features' pre-activations are pulled up to their thresholds, weighted."""
        offset_N = self.b_enc - self.threshold
        return self.config.revival_weight * pull_to_threshold(self, seen_BD, dead, offset_N)

    @torch.no_grad()
    def constrain(self) -> None:
        """Thresholds stay >= 0."""
        self.threshold.clamp_(min=0.0)

    def _lower_edge(self) -> Tensor:
        return self.threshold.detach() - self.config.bandwidth / 2

    def _tanh(self, f: Tensor) -> Tensor:
        return torch.tanh(4 * self.d_out**0.5 * f)
