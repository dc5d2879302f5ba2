"""From settings to a penalty: every method behind one interface."""

import inspect

from unbraid.config import DecorrelationConfig
from unbraid.decorrelation.base import Penalty
from unbraid.decorrelation.comparators import (
    GlobalDecorrelation,
    NoDecorrelation,
    OrthogonalDecoder,
    RandomPairs,
    StaticGroups,
)
from unbraid.decorrelation.penalty import SelectiveDecorrelation
from unbraid.decorrelation.window import Threshold
from unbraid.distributed.shard import Shard
from unbraid.errors import ConfigError
from unbraid.randomness import derive_seed

SELECTIVE_SETTINGS = [name for name in inspect.signature(SelectiveDecorrelation).parameters if name != "seed"]


def build(config: DecorrelationConfig, n_features: int, d_in: int, seed: int, shard: Shard | None = None) -> Penalty:
    """The penalty `config` describes, for an SAE of `n_features` features on `d_in` dimensions, or a shard of it.

    Raises:
        ConfigError: the settings contradict each other or the SAE's width, or cannot be split over ranks.
    """
    penalty = _penalty(config, n_features, seed)
    if shard is not None and not shard.whole:
        if penalty.space != "codes" or config.path not in ("auto", "coactive"):
            raise ConfigError(
                f"decorrelation.method = {config.method!r} with space = {config.space!r} and path = {config.path!r} "
                f"cannot be split over {shard.ranks.size} ranks; expected a method on codes with path auto or "
                "coactive; change one of them, or set training.feature_shards to 1"
            )
        penalty.shard = shard
    return penalty


def _penalty(config: DecorrelationConfig, n_features: int, seed: int) -> Penalty:
    if config.method == "static_groups" and config.groups > n_features:
        raise ConfigError(
            f"decorrelation.groups = {config.groups} exceeds the SAE's {n_features} features; expected at most one each"
        )
    seed = derive_seed(seed, "decorrelation", config.method)
    if config.method == "none":
        return NoDecorrelation()
    if config.method == "global":
        return GlobalDecorrelation(config.measure, config.interval, seed)
    if config.method == "orthogonal":
        return OrthogonalDecoder(config.chunk, config.interval, seed)
    if config.method == "static_groups":
        threshold = Threshold(config.threshold, config.tau, config.threshold_decay, config.floor)
        return StaticGroups(config.groups, config.measure, threshold, config.interval, seed)
    kind = RandomPairs if config.method == "random_pairs" else SelectiveDecorrelation
    return kind(**{name: getattr(config, name) for name in SELECTIVE_SETTINGS}, seed=seed)
