"""From settings to a penalty: every method behind one interface."""

from unbraid.config import DecorrelationConfig
from unbraid.decorrelation.base import Penalty
from unbraid.distributed.shard import Shard
from unbraid.errors import ConfigError
from unbraid.randomness import derive_seed


def build(config: DecorrelationConfig, n_features: int, d_in: int, seed: int, shard: Shard | None = None) -> Penalty:
    """The penalty `config` describes, for an SAE of `n_features` features on `d_in` dimensions, or a shard of it.

    Raises:
        ConfigError: the settings contradict each other or the SAE's width, or cannot be split over ranks.
    """
    problem = config.problem_with_width(n_features)
    if problem is not None:
        raise ConfigError(problem)
    seed = derive_seed(seed, "decorrelation", config.kind)
    penalty = DecorrelationConfig.registry.readers()[config.kind].from_settings(config, seed)
    if shard is not None and not shard.whole:
        if not config.can_be_split:
            raise ConfigError(
                f"decorrelation.method = {config.kind!r} looks at the whole decoder, or takes a path of one rank, and "
                f"cannot be split over {shard.ranks.size} ranks; expected a method on codes with path auto or "
                "coactive; change one of them, or set training.feature_shards to 1"
            )
        penalty.shard = shard
    return penalty
