"""What every source of text looks like to the rest of the package: a numbered sequence of documents.

A document's number never changes between runs with the same settings, so a number is all that has to be saved to go
on. A document is a string, a chat (a list of messages) or a list of token ids. Sources hand out whatever they hold at a
place, usable or not; `usable` is the one judge of what can be trained on, so that skipping is counted the same way
whatever the text comes from.
"""

import json
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from unbraid.randomness import derive_seed

BLOCK = 1024
"""Documents that streams and line-based files put in random order at a time."""
TOO_LONG = "longer than text.max_document_characters"

Messages = list[dict[str, Any]]
Content = str | Messages | np.ndarray
"""A usable document: text, a chat, or token ids [tokens] int64."""


class Document(NamedTuple):
    """Document number `index` and what the source holds there, usable or not."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    text: Any


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


def usable(value: Any, max_characters: int) -> tuple[Content, str]:
    """`(content, "")`, or `("", reason)` with reason "not text", "not UTF-8", "empty" or TOO_LONG.

    Args:
        value: what a source holds.
        max_characters: length above which a text, or all messages of a chat, count as too long; a list of token ids
            may have as many tokens.
    """
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError:
            return "", "not UTF-8"
    if isinstance(value, str):
        return value, _problem_of_text(value, max_characters)
    if hasattr(value, "tolist"):  # arrays and tensors
        value = value.tolist()
    if not isinstance(value, list | tuple):
        return "", "not text"
    if not value:
        return "", "empty"
    if len(value) > max_characters:
        return "", TOO_LONG
    if all(isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**31 for item in value):
        return np.array(value, dtype=np.int64), ""
    return _usable_chat(value, max_characters)


def key_of(content: Content) -> bytes:
    """What a document's side, training or held-out, is decided by."""
    if isinstance(content, str):
        return content.encode("utf-8")
    return content.tobytes() if isinstance(content, np.ndarray) else json.dumps(content, sort_keys=True).encode()


def _problem_of_text(text: str, max_characters: int) -> str:
    if len(text) > max_characters:
        return TOO_LONG
    if not text or text.isspace():
        return "empty"
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return "not UTF-8"
    return ""


def _usable_chat(value: list[Any] | tuple[Any, ...], max_characters: int) -> tuple[Content, str]:
    if not all(isinstance(item, Mapping) and isinstance(item.get("role"), str) for item in value):
        return "", "not text"
    messages = [{key: part for key, part in item.items() if part is not None} for item in value]
    text = "".join(text for message in messages for text in _texts(message.get("content")))
    return messages, _problem_of_text(text, max_characters)


def _texts(content: Any) -> Iterator[str]:
    """What a message says: a string, or parts of which some are text."""
    if isinstance(content, str):
        yield content
    elif isinstance(content, list | tuple):
        yield from (part["text"] for part in content if isinstance(part, Mapping) and isinstance(part.get("text"), str))
