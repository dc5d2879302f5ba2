"""Several visits of a model's places at once, and passes that begin at a later block."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from unbraid.activations.hooks import Place, Visit, visited


class StopPass(Exception):
    """Ends a model pass once everything wanted has been seen."""


@contextmanager
def hooked(visits: Sequence[tuple[Place, Visit]]) -> Iterator[None]:
    """Visit each place while the block lasts; visits of one place happen in this order."""
    with ExitStack() as stack:
        for place, visit in visits:
            stack.enter_context(visited(place, visit))
        yield


def block_of(blocks: nn.ModuleList, place: Place) -> int:
    """The block a place is in; 0 for one outside the blocks, so that nothing is skipped for it."""
    inside = (number for number, block in enumerate(blocks) if any(place.module is one for one in block.modules()))
    return next(inside, 0)


@contextmanager
def restarted(blocks: nn.ModuleList, layer: int, output: Any) -> Iterator[None]:
    """Skip the blocks before `layer`: the last of them returns `output` (what it gave before), the others their input.

    Nothing is skipped for layer 0.
    """
    skipped: list[Any] = list(blocks)[:layer]
    try:
        for block in skipped[:-1]:
            block.forward = lambda *args, **kwargs: args[0] if args else kwargs["hidden_states"]
        for block in skipped[-1:]:
            block.forward = lambda *args, **kwargs: output
        yield
    finally:
        for block in skipped:
            block.__dict__.pop("forward", None)
