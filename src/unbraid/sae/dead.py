"""Bringing features back that no longer fire, for both kinds of architecture.

A top-k feature is dead because others are larger: it still has a positive pre-activation, and learns by explaining what
the others left over (Gao et al. 2024, arXiv 2406.04093, appendix A.2). A thresholded feature is dead because it never
reaches its threshold, where its gradient is zero: it is pulled up to it (Anthropic, Circuits Updates January 2025).
Which features are dead decides whether revival works. Near the cut of a top-k a useless feature still fires once in
some hundred thousand tokens, by chance, so waiting for a long silence finds none of them: on the full synthetic world
with 500,000 tokens nothing was ever revived and a quarter of the features died. A feature counts as dead when it fires
less often than `RAREST` times the mean feature, or not once in a small share of the run, whichever waits longer.

Both look at the dead features only, so their cost is that of an SAE as wide as there are dead features, and send
gradients to the encoder.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from unbraid.config import SAEConfig, WithKConfig
from unbraid.distributed.ranks import summed
from unbraid.distributed.shard import among_top_k

if TYPE_CHECKING:
    from unbraid.sae.base import SAE

RAREST = 1 / 50
"""A feature that fires less than this share of k / N, the mean feature's frequency, is of no use."""
SHARE_OF_RUN = 1 / 1000
"""In long runs features may be rarer than that: those that fire this share of the run apart count as alive."""


WITHOUT_K = 1_000_000
"""Tokens, for architectures whose sparsity is not known beforehand."""


def dead_after(config: SAEConfig, run_tokens: int) -> int:
    """Tokens without firing after which a feature counts as dead: `dead_after_tokens`, or from k / N and the run."""
    if config.dead_after_tokens is not None:
        return config.dead_after_tokens
    if not isinstance(config, WithKConfig):
        return WITHOUT_K
    return round(max(config.n_features / config.k / RAREST, run_tokens * SHARE_OF_RUN))


def explain_residual(sae: "SAE", seen_BD: Tensor, residual_BD: Tensor, dead: Tensor, aux_k: int) -> Tensor:
    """Mean over tokens of ||e - e_hat||^2, e_hat decoded from the aux_k largest dead features; e is a constant.

    Args:
        sae: an SAE with b_enc.
        seen_BD: what the encoder saw.
        residual_BD: e = x - x_hat, or y - y_hat of a transcoder.
        dead: the dead features' numbers; at least one on some rank.
        aux_k: active dead features per token; all of them when fewer are dead.
    """
    f_BA = F.linear(seen_BD - sae.input_bias, sae.encoder_ND[dead], sae.b_enc[dead]).relu()
    ranks = sae.shard.ranks
    if aux_k < ranks.total(len(dead))[0]:
        top = f_BA.topk(min(aux_k, len(dead)), dim=1, sorted=False)
        kept = among_top_k(top.values.detach(), aux_k, ranks)
        f_BA = torch.zeros_like(f_BA).scatter(1, top.indices, top.values * kept)
    e_hat_BD = summed(f_BA @ sae.W_dec[dead], ranks)
    return F.mse_loss(e_hat_BD, residual_BD, reduction="sum") / len(seen_BD)


def pull_to_threshold(sae: "SAE", seen_BD: Tensor, dead: Tensor, offset_N: Tensor) -> Tensor:
    """Mean over tokens and sum over dead features of how far the pre-activation is below firing, over N.

    Args:
        sae: any SAE.
        seen_BD: what the encoder saw.
        dead: the dead features' numbers; at least one on some rank.
        offset_N: a feature fires where its product with the centred input plus this is above zero.
    """
    above_BA = F.linear(seen_BD - sae.input_bias, sae.encoder_ND[dead], offset_N[dead])
    missing = summed((-above_BA).relu().sum(), sae.shard.ranks)
    return missing / (len(seen_BD) * sae.config.n_features)
