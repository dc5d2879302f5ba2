"""What besides its own feature a latent's decoder row contains, on a world where the features are known.

*Hedging*: an SAE too narrow for all features gains by mixing features that fire together (arXiv 2505.11756). The best
least-squares row of a latent that follows feature g is sum_h beta_gh d_h, with beta_gh = Cov(f_h, f_g) / Var(f_g). We
regress what the row contains of other features on those slopes: 0 is a pure row, 1 the full mixture.

*Composition*: a child that is only ever seen with its parent can be stored as parent + child. We report how much of
the parent's direction the rows of children contain, relative to the child's own: 0 is a pure row.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from unbraid.synthetic.world import World

FOLLOWS = 0.5  # a row less parallel than this to its feature is not a version of it
STRONG_SLOPE = 0.05  # weaker slopes are sampling noise
TILE_ENTRIES = 1 << 23


@dataclass(frozen=True)
class Mixing:
    """Hedging and composition, None where no latent could show it."""

    hedging: float | None
    composition: float | None


def mixing(
    W_dec: Float[Tensor, "N D"],
    feature_N: Int[Tensor, " N"],
    cosine_N: Float[Tensor, " N"],
    world: World,
    true_codes: Any,
) -> Mixing:
    """Measure hedging and composition of every latent that follows its feature (|cosine| >= 0.5).

    Args:
        W_dec: decoder rows.
        feature_N: the feature each latent stands for.
        cosine_N: |cosine| with it.
        world: the truth.
        true_codes: `[T, G]` sparse matrix of true codes, for the slopes.
    """
    followers = (cosine_N >= FOLLOWS).nonzero().squeeze(1)
    parents = world.parents.cpu().numpy()
    ancestors = _ancestors(parents)
    n_tokens, n_features = true_codes.shape
    mean = np.asarray(true_codes.sum(axis=0)).ravel() / n_tokens
    variance = np.asarray((true_codes**2).sum(axis=0)).ravel() / n_tokens - mean**2
    by_feature = true_codes.T.tocsr()
    explained, strength, contained = 0.0, 0.0, []
    for part in followers.split(max(1, TILE_ENTRIES // n_features)):
        features = feature_N[part]
        shares = _contents(W_dec[part], features, world.dictionary).double().cpu().numpy()
        own = features.cpu().numpy()
        rows = np.arange(len(own))
        slopes = (by_feature[own] @ true_codes).toarray() / n_tokens - np.outer(mean[own], mean)
        slopes /= np.where(variance[own] > 0, variance[own], np.inf)[:, None]
        slopes[np.abs(slopes) < STRONG_SLOPE] = 0
        slopes[rows, own] = 0
        for level in ancestors:
            has = level[own] >= 0
            slopes[rows[has], level[own][has]] = 0
        explained += float((shares * slopes).sum())
        strength += float((slopes**2).sum())
        has_parent = parents[own] >= 0
        contained.append(shares[rows[has_parent], parents[own][has_parent]])
    contents = np.concatenate(contained) if contained else np.zeros(0)
    return Mixing(
        hedging=explained / strength if strength > 0 else None,
        composition=float(contents.mean()) if len(contents) else None,
    )


def _contents(rows_MD: Tensor, features: Tensor, dictionary: Tensor) -> Tensor:
    """What each row contains of every feature, beyond and relative to its own one."""
    own = dictionary[features]
    along = (rows_MD * own).sum(1, keepdim=True)
    return (rows_MD - along * own) @ dictionary.T / torch.where(along == 0, torch.inf, along)


def _ancestors(parents: np.ndarray) -> list[np.ndarray]:
    levels = [parents]
    while (levels[-1] >= 0).any():
        above = levels[-1]
        levels.append(np.where(above >= 0, parents[above], -1))
    return levels[:-1] or [parents]
