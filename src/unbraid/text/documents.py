"""What every source of text looks like to the rest of the package: a numbered sequence of documents.

A document's number never changes between runs with the same settings, so a number is all that has to be saved to go
on. Sources hand out whatever they hold at a place, usable or not; `usable_text` is the one judge of what can be
trained on, so that skipping is counted the same way whatever the text comes from.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from unbraid.randomness import derive_seed

BLOCK = 1024
"""Documents that streams and line-based files put in random order at a time."""


class Document(NamedTuple):
    """Document number `index` and what the source holds there: a string, undecodable bytes, or None if not text."""

    index: int
    text: Any


@runtime_checkable
@runtime_checkable
class TextSource(Protocol):
    """Documents in a fixed order that can be entered anywhere."""

    @property
    def identity(self) -> dict[str, Any]:
        """JSON-able description of what text this is; two sources with equal identity hold the same documents."""
        ...

    def documents(self, start: int = 0, bookmark: dict[str, Any] | None = None) -> Iterator[Document]:
        """Documents `start`, `start + 1`, ... to the end. A `bookmark` made at or before `start` saves re-reading.

        Raises:
            TextError: the source cannot be read.
        """
        ...

    def bookmark(self, document: int) -> dict[str, Any] | None:
        """JSON-able hint that makes a later `documents(document, bookmark)` cheap; None where none is needed."""
        ...


class FirstDocuments:
    """The first documents of a source and no more, for a search that must end."""

    def __init__(self, source: TextSource, count: int) -> None:
        self.source, self.count = source, count

    @property
    def identity(self) -> dict[str, Any]:
        """Of the source."""
        return self.source.identity

    def documents(self, start: int = 0, bookmark: dict[str, Any] | None = None) -> Iterator[Document]:
        """Documents `start` to the last of them."""
        return islice(self.source.documents(start, bookmark), max(0, self.count - start))

    def bookmark(self, document: int) -> dict[str, Any] | None:
        """The source's."""
        return self.source.bookmark(document)


def shuffled(count: int, seed: int, *names: str | int) -> list[int]:
    """The numbers below `count` in an order that depends on `seed` and `names` alone."""
    return np.random.Generator(np.random.Philox(derive_seed(seed, *names))).permutation(count).tolist()


def usable_text(value: Any, max_characters: int) -> tuple[str | np.ndarray, str]:
    """`(text, "")`, or `("", reason)` with reason one of "not text", "not UTF-8", "empty", "too large".

    An array of token ids counts as text.
    """
    if isinstance(value, np.ndarray):
        return (value, "") if len(value) else ("", "empty")
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            return "", "not UTF-8"
    if not isinstance(value, str):
        return "", "not text"
    if len(value) > max_characters:
        return "", "too large"
    if not value or value.isspace():
        return "", "empty"
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            return "", "not UTF-8"
    return value, ""
