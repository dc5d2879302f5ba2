"""Gated SAE (Rajamanoharan et al. 2024, arXiv 2404.16014): one path decides which features fire, another how strongly.

Both share the encoder product u = (x - b_dec) W_enc: a feature is open where u + b_gate > 0, and its magnitude is
relu(exp(r_mag) u + b_mag). The L1 penalty acts on the gate, relu(u + b_gate), and the gate learns to detect through an
auxiliary reconstruction by a frozen copy of the decoder (eq. 8 there), so magnitudes do not shrink.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from unbraid.config import WeightedSAEConfig
from unbraid.distributed.ranks import summed
from unbraid.kernels import host, workspace
from unbraid.kernels.autograd import active_entries, decode
from unbraid.kernels.codes import Codes
from unbraid.kernels.dense_gated import dense_gated
from unbraid.kernels.selection import density_above, entries_above
from unbraid.sae.base import SAE
from unbraid.sae.dead import pull_to_threshold
from unbraid.sae.forward import Encoded, squared_error
from unbraid.sae.registry import register


class GatedConfig(WeightedSAEConfig):
    """A gate and a magnitude for each feature, with L1 on the gate."""

    architecture: Literal["gated"] = "gated"


@register
class GatedSAE(SAE):
    """f = 1[u + b_gate > 0] * relu(exp(r_mag) u + b_mag); sparsity = mean over tokens of ||relu(u + b_gate)||_1."""

    settings = GatedConfig
    written_as = SAE.written_as | {"sae_lens": "gated", "dictionary_learning": "GatedAutoEncoder"}
    scaled_with_input = ("b_gate", "b_mag")

    def add_biases(self) -> None:
        """Gate and magnitude biases, and the magnitude's log scale."""
        self.b_gate = nn.Parameter(torch.zeros(self.n_features))
        self.b_mag = nn.Parameter(torch.zeros(self.n_features))
        self.r_mag = nn.Parameter(torch.zeros(self.n_features))

    def preactivations(self, x: Tensor) -> Tensor:
        """Those of the gate: (x - b_dec) W_enc + b_gate."""
        return torch.nn.functional.linear(self.centred(x), self.encoder_ND, self.b_gate)

    def encode(self, x: Tensor) -> Tensor:
        """Codes, `[..., N]`."""
        u = torch.nn.functional.linear(self.centred(x), self.encoder_ND)
        return (u * self.r_mag.exp() + self.b_mag).relu() * (u > -self.b_gate)

    def shift_input(self, shift_N: Tensor) -> None:
        """See `SAE.shift_input`; the gate's bias takes the shift, the magnitude's the shift times its scale."""
        self.b_gate.copy_(self.b_gate.double() - shift_N)
        self.b_mag.copy_(self.b_mag.double() - self.r_mag.double().exp() * shift_N)

    def product_bias(self) -> None:
        """None: gate and magnitude add different ones."""

    def density(self, pre_BN: Tensor) -> float:
        """Share of open gates."""
        return density_above(pre_BN, -self.b_gate.detach())

    def select(self, pre_BN: Tensor) -> Codes:
        """The open gates, with the product there."""
        return entries_above(pre_BN, -self.b_gate.detach())

    def encode_sparse(self, target_BD: Tensor, seen_BD: Tensor, centred_BD: Tensor, pre_BN: Tensor) -> Encoded:
        """Codes and reconstruction from the open gates only."""
        open_gates = self.select(pre_BN)
        workspace.give(pre_BN)
        open_gates = open_gates.with_values(open_gates.values.to(self.W_dec.dtype))
        open_gates = active_entries(seen_BD, self.input_bias, self.encoder_ND, None, centred_BD, open_gates)
        u = open_gates.values
        b_gate, b_mag, r_mag = (p.index_select(0, open_gates.indices) for p in (self.b_gate, self.b_mag, self.r_mag))
        gate = (u + b_gate).relu()
        codes = open_gates.with_values((u * r_mag.exp() + b_mag).relu())
        waits = host.reading_waits(u)
        codes = codes.with_padding(codes.values) if waits else codes
        parts_BD = decode(codes, self.W_dec, self.robust.entry_weights)
        gate_hat_BD = decode(open_gates.with_values(gate), self.W_dec.detach())
        active = codes.values.detach() > 0
        if not waits and not active.all():
            codes = codes.where(active)
        detection = squared_error(target_BD, summed(gate_hat_BD, self.shard.ranks) + self.b_dec.detach())
        return Encoded(codes, parts_BD.unsqueeze(1), gate.sum() / len(seen_BD), detection)

    def encode_dense(self, target_BD: Tensor, seen_BD: Tensor, centred_BD: Tensor, pre_BN: Tensor) -> Encoded:
        """The same from whole matrices."""
        f_BN, parts_BD, gate_hat_BD, gate_l1 = dense_gated(
            seen_BD,
            self.input_bias,
            self.encoder_ND,
            self.b_gate,
            self.b_mag,
            self.r_mag,
            self.W_dec,
            centred_BD,
            pre_BN.to(self.W_dec.dtype),
            self.robust.feature_weights,
        )
        detection = squared_error(target_BD, summed(gate_hat_BD, self.shard.ranks) + self.b_dec.detach())
        return Encoded(f_BN, parts_BD.unsqueeze(1), gate_l1 / len(seen_BD), detection)

    def revival(self, seen_BD: Tensor, residual_BD: Tensor, dead: Tensor) -> Tensor:
        """Dead features' gates are pulled open, weighted."""
        return self.config.revival_weight * pull_to_threshold(self, seen_BD, dead, self.b_gate)
