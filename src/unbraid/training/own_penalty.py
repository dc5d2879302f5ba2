"""A penalty that a caller hands in: any module or function `penalty(f, codes=, decoder=) -> (scalar, anything)`."""

from collections.abc import Callable
from typing import Any

from torch import nn

from unbraid.errors import ConfigError


class FunctionPenalty(nn.Module):
    """A function as a module without state."""

    def __init__(self, function: Callable[..., Any]):
        super().__init__()
        self.function = function

    def forward(self, f: Any = None, **arguments: Any) -> Any:
        """What the function says."""
        return self.function(f, **arguments)


def as_module(penalty: nn.Module | Callable[..., Any]) -> nn.Module:
    """A penalty as a module, whose state checkpoints keep.

    Raises:
        ConfigError: it cannot be called.
    """
    if isinstance(penalty, nn.Module):
        return penalty
    if not callable(penalty):
        raise ConfigError(
            f"penalty is a {type(penalty).__name__}; expected a module or function called as "
            "penalty(f, codes=codes, decoder=W_dec) that returns (scalar, anything)"
        )
    return FunctionPenalty(penalty)


def name_of(penalty: nn.Module) -> str:
    """What a checkpoint remembers of it."""
    own = penalty.function if isinstance(penalty, FunctionPenalty) else penalty
    return getattr(own, "__qualname__", type(own).__name__)
