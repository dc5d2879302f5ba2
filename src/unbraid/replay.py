"""Anything that can be iterated, read again from any place: exactly where it saves its position, else from the start.

Text and activations that a caller hands in are read several times: when a run is planned, while it trains, after a
resume, for held-out metrics. An object with `state_dict` and `load_state_dict` (a `datasets` stream, a
`StatefulDataLoader`) is entered where it stood; anything else is read from its beginning and what was used is skipped.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from unbraid.errors import UnbraidError


class Replay:
    """A source of items that can be entered at any item.

    Args:
        source: an iterable that can be iterated again, or a function without arguments that returns an iterator.
        what: its name in messages.
        error: raised when it cannot be read again.
    """

    def __init__(self, source: Any, what: str, error: type[UnbraidError]):
        self.source, self.what = source, what
        self.saves_its_place = hasattr(source, "state_dict") and hasattr(source, "load_state_dict")
        if not callable(source) and not isinstance(source, Iterable):
            raise error(f"{what} is a {type(source).__name__}, which cannot be iterated; expected an iterable")
        if not self.saves_its_place and isinstance(source, Iterator):
            raise error(
                f"{what} is a {type(source).__name__}, which can be read only once, and a run reads it several times; "
                f"expected a list, a data set, or a function that starts it anew; pass {what}=lambda: ..."
            )
        self._start = self.source.state_dict() if self.saves_its_place else None

    @property
    def resumes(self) -> str:
        """How a resumed run finds its place, for the log."""
        if self.saves_its_place:
            return f"{self.what} saves its place: a resumed run goes on there"
        return f"{self.what} cannot save its place: a resumed run reads it again from the start and skips what it used"

    def items(self, start: int = 0, state: Any = None) -> Iterator[tuple[int, Any, Any]]:
        """(number, item, state before it) from item `start` on; a `state` from before item `start` saves re-reading.

        `state` is what this method gave with item `start`; without it everything before is read and skipped.
        """
        first = start if state is not None and self.saves_its_place else 0
        if self.saves_its_place:
            self.source.load_state_dict(self._start if state is None else state)
        iterator = iter(self._opened())
        mode = _GradientMode()
        number = first
        try:
            while True:
                before = self.source.state_dict() if self.saves_its_place else None
                with mode:
                    item = next(iterator, _END)
                if item is _END:
                    return
                if number >= start:
                    yield number, item, before
                number += 1
        finally:
            with mode:
                getattr(iterator, "close", bool)()

    def _opened(self) -> Any:
        return self.source() if callable(self.source) else self.source


_END = object()


class _GradientMode:
    """The reader's and a generator's own: one that yields inside `torch.no_grad()` must not turn off the reader's."""

    def __init__(self) -> None:
        self.inside = torch.is_grad_enabled()

    def __enter__(self) -> None:
        self.outside = torch.is_grad_enabled()
        torch.set_grad_enabled(self.inside)

    def __exit__(self, *_: object) -> None:
        self.inside = torch.is_grad_enabled()
        torch.set_grad_enabled(self.outside)
