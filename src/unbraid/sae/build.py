"""From settings to an SAE: the one table of architectures, and the one place an SAE gets its first weights."""

import torch

from unbraid.config import SAEConfig
from unbraid.distributed.shard import Shard
from unbraid.errors import ConfigError
from unbraid.sae.base import SAE
from unbraid.sae.batch_topk import BatchTopKSAE
from unbraid.sae.denoising import DenoisingSAE
from unbraid.sae.gated import GatedSAE
from unbraid.sae.jumprelu import JumpReLUSAE
from unbraid.sae.matryoshka import MatryoshkaSAE
from unbraid.sae.relu import ReLUSAE
from unbraid.sae.sparse_filtering import SparseFilteringSAE
from unbraid.sae.topk import TopKSAE

ARCHITECTURES: dict[str, type[SAE]] = {
    cls.architecture: cls
    for cls in (
        ReLUSAE,
        TopKSAE,
        BatchTopKSAE,
        JumpReLUSAE,
        GatedSAE,
        MatryoshkaSAE,
        DenoisingSAE,
        SparseFilteringSAE,
    )
}


def build(
    config: SAEConfig,
    d_in: int,
    generator: torch.Generator,
    shard: Shard | None = None,
) -> SAE:
    """A fresh SAE: decoder rows random of unit norm, encoder a multiple of their transpose, biases zero.

    Args:
        config: architecture, width and sparsity.
        d_in: model width D.
        generator: the only source of chance; the same state gives the same weights.
        shard: the features this rank holds, with the weights they have in the whole SAE; all of them without it.

    Raises:
        ConfigError: more active features are asked for than there are, or the architecture cannot be split.
    """
    if config.has_k and config.k > config.n_features:
        raise ConfigError(f"sae.k is {config.k} but sae.n_features only {config.n_features}; lower sae.k")
    shard = shard or Shard(config.n_features)
    if config.architecture == "sparse_filtering" and not shard.whole:
        raise ConfigError(
            f"sae.architecture = 'sparse_filtering' looks at all features of a token at once and cannot be split over "
            f"{shard.ranks.size} ranks; expected training.feature_shards = 1"
        )
    return ARCHITECTURES[config.architecture](config, d_in, generator, shard)
