"""From settings to a penalty: every method behind one interface."""

import torch
from torch import nn

from unbraid.config import DecorrelationConfig
from unbraid.decorrelation.penalty import SelectiveDecorrelation, attached, entries_of
from unbraid.decorrelation.stats import DecorrelationStats
from unbraid.errors import ConfigError


class NoDecorrelation(nn.Module):
    """The control: a penalty of zero."""

    def forward(self, f=None, *, indices=None, values=None, n_features=None, codes=None, decoder=None):
        """Zero, attached to the codes' graph."""
        entries = entries_of(f, indices, values, n_features, codes)
        zero = attached(entries.values, 0.0, torch.zeros_like(entries.values))
        return zero, DecorrelationStats(path="none", co_activations=entries.co_activations)


def build(config: DecorrelationConfig, n_features: int, d_in: int, seed: int) -> nn.Module:
    """The penalty `config` describes, for an SAE of `n_features` on `d_in` dimensions."""
    if config.method == "none":
        return NoDecorrelation()
    if config.method == "selective":
        return SelectiveDecorrelation(
            fraction=config.fraction,
            measure=config.measure,
            min_support=config.min_support,
            threshold=config.threshold,
            tau=config.tau,
            threshold_decay=config.threshold_decay,
            floor=config.floor,
            max_pairs_per_feature=config.max_pairs_per_feature,
        )
    raise ConfigError(f"decorrelation.method = {config.method!r} is unknown")
