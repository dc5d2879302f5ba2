"""How an architecture becomes known: its name, its settings and its class in one line, here or in a user's module.

class MineConfig(SAEConfig):
    architecture: Literal["mine"] = "mine"
    reach: float = 1.0

@register
class MineSAE(ReLUSAE):
    settings = MineConfig
"""

from typing import TypeVar

from unbraid.config import SAEConfig
from unbraid.errors import ConfigError

ClassT = TypeVar("ClassT", bound=type)


def register(architecture: ClassT) -> ClassT:
    """Make an architecture known under the default of its settings' `architecture`.

    Raises:
        ConfigError: the class names no settings of its own, or the name is taken.
    """
    settings = vars(architecture).get("settings")
    if not (isinstance(settings, type) and issubclass(settings, SAEConfig)) or settings is SAEConfig:
        raise ConfigError(
            f"{architecture.__qualname__}.settings is {settings!r}; expected a subclass of SAEConfig of its own"
        )
    name = settings.model_fields["architecture"].default
    SAEConfig.registry.add(name, architecture)
    return architecture
