"""From settings to an SAE: the one table of architectures, and the one place an SAE gets its first weights."""

import torch

from unbraid.config import SAEConfig
from unbraid.distributed.shard import Shard
from unbraid.errors import ConfigError
from unbraid.sae import batch_topk, denoising, gated, jumprelu, matryoshka, relu, sparse_filtering, topk
from unbraid.sae.base import SAE
from unbraid.sae.cross_layer import CrossLayer
from unbraid.sae.site_norms import scale_rows

BUILT_IN = (relu, topk, batch_topk, jumprelu, gated, matryoshka, denoising, sparse_filtering)
"""Importing them registers them."""
ARCHITECTURES = SAEConfig.registry.readers()


def build(
    config: SAEConfig,
    d_in: int,
    generator: torch.Generator,
    shard: Shard | None = None,
    d_out: int | None = None,
    widths: tuple[tuple[int, ...], tuple[int, ...]] = ((), ()),
) -> SAE:
    """A fresh SAE: decoder rows random of unit norm, encoder a multiple of their transpose, biases zero.

    The encoder of a transcoder is a multiple of random unit rows of its own.

    Args:
        config: architecture, width and sparsity.
        d_in: model width D.
        generator: the only source of chance; the same state gives the same weights.
        shard: the features this rank holds, with the weights they have in the whole SAE; all of them without it.
        d_out: width M of what a transcoder predicts, which may be D; an SAE without it.
        widths: of each site read, and of each that a transcoder predicts, where they are several.

    Raises:
        ConfigError: the architecture cannot be split, or has fewer features than layers.
    """
    shard = shard or Shard(config.n_features)
    architecture = ARCHITECTURES[config.kind]
    if not architecture.can_be_split and not shard.whole:
        raise ConfigError(
            f"sae.architecture = {config.kind!r} looks at all features of a token at once and cannot be split over "
            f"{shard.ranks.size} ranks; expected training.feature_shards = 1"
        )
    sae = architecture(config, d_in, generator, shard, d_out)
    if config.cross_layer and len(widths[0]) == len(widths[1]) > 1:
        sae.cross_layer = CrossLayer(*widths, shard)
        sae.cross_layer.begin(sae)
    widths_out = widths[1] or (() if sae.is_transcoder else widths[0])
    if config.row_norm == "sum" and widths_out:
        scale_rows(sae, widths_out)
    return sae
