"""From settings to a penalty: every method behind one interface."""

from collections.abc import Sequence

from unbraid.config import DecorrelationConfig
from unbraid.decorrelation.base import Penalty
from unbraid.decorrelation.by_site import BySite
from unbraid.decorrelation.penalty import SelectiveConfig
from unbraid.distributed.shard import Shard
from unbraid.errors import ConfigError
from unbraid.randomness import derive_seed


def build(
    config: DecorrelationConfig,
    n_features: int,
    seed: int,
    shard: Shard | None = None,
    widths: Sequence[int] = (),
) -> Penalty:
    """The penalty `config` describes, for an SAE of `n_features` features, or a shard of it.

    `widths` are those of the sites it predicts, where they are several.

    Raises:
        ConfigError: the settings contradict each other or the SAE's width, or cannot be split over ranks.
    """
    problem = config.problem_with_width(n_features)
    if problem is not None:
        raise ConfigError(problem)
    seed = derive_seed(seed, "decorrelation", config.kind)
    if isinstance(config, SelectiveConfig) and config.by_site and len(widths) > 1:
        penalty: Penalty = BySite.from_settings(config, seed, widths)
    else:
        penalty = DecorrelationConfig.registry.readers()[config.kind].from_settings(config, seed)
    if shard is not None and not shard.whole:
        if not config.can_be_split:
            raise ConfigError(
                f"decorrelation.method = {config.kind!r} chooses pairs on a path of one rank and cannot be split over "
                f"{shard.ranks.size} ranks; expected path auto or coactive, and not random pairs by decoder rows; "
                "change one of them, or set training.feature_shards to 1"
            )
        penalty.split(shard)
    return penalty
