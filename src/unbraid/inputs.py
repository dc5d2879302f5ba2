"""What a caller hands in instead of what the settings name: a model, text, activations, a penalty."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unbraid.activations.cache import CachedActivations
from unbraid.activations.handed_in import HandedInActivations, settings_for
from unbraid.activations.live import LiveActivations, name_of
from unbraid.activations.source import ActivationSource
from unbraid.config import RunConfig, overridden
from unbraid.distributed.ranks import ALONE, Ranks
from unbraid.errors import ConfigError
from unbraid.sites import HANDED_IN
from unbraid.training.own_penalty import as_module


@dataclass(frozen=True)
class Inputs:
    """What was handed in; None for what the settings decide. The meaning of each is that of `unbraid.train`."""

    model: nn.Module | None = None
    tokenizer: Any = None
    text: Any = None
    activations: Any = None
    penalty: nn.Module | Callable[..., Any] | None = None

    @property
    def penalty_module(self) -> nn.Module | None:
        """The penalty as a module."""
        return None if self.penalty is None else as_module(self.penalty)

    def settings(self, config: RunConfig) -> tuple[RunConfig, list[str]]:
        """`config` for these inputs, and what of it is not read beside them: activations bring their own sites.

        Raises:
            ConfigError: inputs contradict each other or the settings.
        """
        others = {
            "model": self.model,
            "tokenizer": self.tokenizer,
            "text": self.text,
            "the setting cache": config.cache,
        }
        given = [name for name, value in others.items() if value is not None]
        if self.activations is not None and given:
            raise ConfigError(
                f"activations were handed in beside {', '.join(given)}; expected one or the other, because activations "
                "take the place of model, text and cache"
            )
        if config.cache is not None and given != ["the setting cache"]:
            raise ConfigError(
                f"the run trains from the cache {config.cache!r}, and {', '.join(given[:-1])} would not be read; "
                "expected cache = none beside them"
            )
        if self.activations is not None:
            return settings_for(config, self.activations), []
        stands_for = {}
        if self.text is not None:
            stands_for["text.source"] = HANDED_IN
        if self.model is not None and name_of(self.model) != config.model.name:
            stands_for["model.name"] = HANDED_IN
        if not stands_for:
            return config, []
        config, dropped = overridden(config, stands_for, "train")
        return config, list(map(str, dropped))

    def open(self, config: RunConfig, device: torch.device, ranks: Ranks = ALONE) -> ActivationSource:
        """Where the run's activations come from.

        Raises:
            UnbraidError: it is not there, or the run was made with activations that have to be handed in again.
        """
        if self.activations is not None:
            return HandedInActivations(self.activations, config)
        if any(site.kind == HANDED_IN for site in config.sites):
            raise ConfigError(
                f"the run was made with activations that were handed in ({', '.join(map(str, config.sites))}); "
                "expected the same again; call unbraid.resume(path, activations=...) in Python"
            )
        if config.cache is not None:
            return CachedActivations(config, Path(config.cache))
        return LiveActivations(config, device, ranks, model=self.model, tokenizer=self.tokenizer, text=self.text)


NOTHING = Inputs()
