"""Robust decoder rows: tokens that an SAE reconstructs badly teach its decoder less.

A token with a large error is most often one where a feature fires that the SAE has no latent for. Least squares mixes
such features into the rows of those that fire with them (hedging, arXiv 2505.11756); a loss that counts these tokens
less mixes in less. The encoder keeps the plain gradient; the decoder's, of the loss L, changes:

    dL/dW_n = sum_b f_bn dL/dx_hat_b     becomes     sum_b v_bn f_bn dL/dx_hat_b,

    v_bn = w_bn / mean_n w,     w_bn = (e_b / mean_n e + FLOOR) ** -p,     e_b = ||x_b - x_hat_b||^2.

mean_n runs over the tokens on which feature n fires, decaying by DECAY a step. The power p rises from 0 to `sae.robust`
while training goes from `sae.robust_from` to `sae.robust_until` of its steps: before features are there, a large error
says nothing. Idea and constants: pilots of ours on worlds whose features are known (docs/study.md).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from unbraid.config import SAEConfig
from unbraid.kernels.autograd import EntryWeights
from unbraid.kernels.codes import Codes
from unbraid.kernels.dense import FeatureWeights, slabs
from unbraid.kernels.products import sums_by_feature

FLOOR = 0.3
DECAY = 0.95
TINY = 1e-30


class RobustRows(nn.Module):
    """What the weights of one SAE are made of; `note` fills it in the forward pass, the backward pass reads weights.

    Attributes:
        power: p, now; 0 leaves every gradient plain, and nothing is kept where it stays 0.
        fired_N: decaying sum of the tokens on which each feature fires.
        error_N, weight_N: of these tokens' errors, and of their weights.
    """

    fired_N: Tensor
    error_N: Tensor
    weight_N: Tensor

    def __init__(self, config: SAEConfig, n_features: int):
        super().__init__()
        self.config, self.power = config, 0.0
        for name in ("fired_N", "error_N", "weight_N") if config.robust > 0 else ():
            self.register_buffer(name, torch.zeros(n_features), persistent=False)
        self.error_B = torch.zeros(0)

    def begin_step(self, step: int, steps: int) -> None:
        """Take up the power of a step, counted from 0, of `steps` in all."""
        share = step / steps if steps else 1.0
        self.power = power_at(share, self.config.robust_from, self.config.robust_until, self.config.robust)

    @property
    def entry_weights(self) -> EntryWeights | None:
        """v at the entries of sparse codes, once the batch is noted; none while all tokens count alike."""
        return self.of_entries if self.power > 0 else None

    @property
    def feature_weights(self) -> FeatureWeights | None:
        """v of all tokens for some features, likewise."""
        return self.of_features if self.power > 0 else None

    @torch.no_grad()
    def note(self, codes: Codes | Tensor, y_BM: Float[Tensor, "B M"], y_hat_BM: Float[Tensor, "B M"]) -> None:
        """Take up a batch: its codes, what was to be predicted, and the prediction."""
        if self.power == 0:
            return
        self.error_B = error_B = (y_BM - y_hat_BM).square().sum(1)
        if isinstance(codes, Codes):
            fires = (codes.values > 0).to(error_B.dtype)
            self._add(self.fired_N, sums_by_feature(codes.with_values(fires)))
            self._add(self.error_N, sums_by_feature(codes.with_values(fires * error_B[codes.rows()])))
            weights = self._plain(error_B[codes.rows()], codes.indices)
            self._add(self.weight_N, sums_by_feature(codes.with_values(fires * weights)))
            return
        fires_BN = codes > 0
        self._add(self.fired_N, fires_BN.sum(0))
        for _, part in slabs([codes.shape[1]]):
            fires = fires_BN[:, part].to(error_B.dtype)
            self.error_N[part] = DECAY * self.error_N[part] + error_B @ fires
            weights = self._plain(error_B[:, None], part)
            self.weight_N[part] = DECAY * self.weight_N[part] + (weights * fires).sum(0)

    def of_entries(self, codes: Codes) -> Float[Tensor, " nnz"]:
        """v at the entries of sparse codes, whose rows may be several for each token, one for each level."""
        tokens = codes.rows() // (codes.n_rows // len(self.error_B))
        return self._plain(self.error_B[tokens], codes.indices) * self._scale(codes.indices)

    def of_features(self, features: slice | Int[Tensor, " n"]) -> Float[Tensor, "B n"]:
        """v of all tokens for these features."""
        return self._plain(self.error_B[:, None], features) * self._scale(features)

    def _plain(self, error: Tensor, features: slice | Tensor) -> Tensor:
        mean_N = self.error_N / self.fired_N.clamp(min=TINY)
        return (error / mean_N.clamp(min=TINY)[features] + FLOOR) ** -self.power

    def _scale(self, features: slice | Tensor) -> Tensor:
        return (self.fired_N / self.weight_N.clamp(min=TINY))[features]

    @staticmethod
    def _add(total_N: Tensor, of_batch_N: Tensor) -> None:
        total_N.mul_(DECAY).add_(of_batch_N.to(total_N.dtype))


def power_at(share: float, start: float, end: float, power: float) -> float:
    """p when `share` of the steps is done: it rises linearly.

    >>> power_at(0.5, 0.4, 0.8, 2.0)
    0.5
    """
    return power * min(1.0, max(0.0, (share - start) / (end - start))) if end > start else power * (share >= end)
