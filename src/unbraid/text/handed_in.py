"""Text that a caller hands in: any iterable of strings, of token rows, or of chat messages.

Strings are documents like any other. A row of token ids is a document that is tokenised already. A list of messages
(`[{"role": "user", "content": "..."}, ...]`) goes through the tokenizer's chat template, special tokens and all.
"""

import copy
import hashlib
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import torch

from unbraid.errors import TextError
from unbraid.replay import Replay
from unbraid.text.documents import Document

SAMPLED = 16
"""Documents whose checksum says whether a resumed run is given the same text."""
STATES_KEPT, DOCUMENTS_BETWEEN_STATES = 512, 16
"""Documents are tokenised together, so a position to go on from is a good many documents behind what was read."""


class HandedInText:
    """A `TextSource` over an iterable.

    Args:
        text: an iterable that can be iterated again, or a function that starts it anew.
        vocabulary: token ids the model knows.
    """

    def __init__(self, text: Any, vocabulary: int):
        self.replay = Replay(text, "text", TextError)
        self.vocabulary = vocabulary
        self._states: deque[tuple[int, Any]] = deque(maxlen=STATES_KEPT)
        digest = hashlib.blake2b(digest_size=8)
        for number, item, _ in islice(self.replay.items(), SAMPLED):
            content = self._document(number, item)
            key = content.tobytes() if isinstance(content, np.ndarray) else repr(content).encode("utf-8", "replace")
            digest.update(key)
        self._sample = digest.hexdigest()

    @property
    def identity(self) -> dict[str, Any]:
        """Its type, and a checksum of its first documents."""
        return {"source": "handed in", "type": type(self.replay.source).__name__, "sample": self._sample}

    def bookmark(self, document: int) -> dict[str, Any] | None:
        """The iterable's own state a little before the document, if that was read lately."""
        known = [(number, state) for number, state in self._states if number <= document]
        return {"document": known[-1][0], "state": known[-1][1]} if known else None

    def documents(self, start: int = 0, bookmark: dict[str, Any] | None = None) -> Iterator[Document]:
        """Documents `start` to the last.

        Raises:
            TextError: an item is neither text, token ids nor messages, or holds a token the model does not know.
        """
        known = bookmark is not None and bookmark["document"] <= start
        items = (
            self.replay.items(bookmark["document"], bookmark["state"])
            if known and bookmark is not None
            else self.replay.items()
        )
        self._states.clear()
        for number, item, state in items:
            if state is not None and number % DOCUMENTS_BETWEEN_STATES == 0:
                self._states.append((number, copy.deepcopy(state)))
            if number >= start:
                yield Document(number, self._document(number, item))

    def _document(self, number: int, item: Any) -> Any:
        if isinstance(item, str | bytes) or _is_chat(item):
            return item
        try:
            ids = item.cpu().numpy() if isinstance(item, torch.Tensor) else np.asarray(item)
        except (ValueError, TypeError):
            ids = np.zeros(0)
        if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
            raise TextError(
                f"item {number} of text is a {type(item).__name__}; expected a string, a row of token ids, or a list "
                'of messages like {"role": "user", "content": "..."}'
            )
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocabulary:
            raise TextError(
                f"item {number} of text holds token ids from {ids.min()} to {ids.max()}; expected 0 to "
                f"{self.vocabulary - 1}, which the model knows; use the model's own tokenizer"
            )
        return ids.astype(np.int64)


def _is_chat(item: Any) -> bool:
    return isinstance(item, list) and len(item) > 0 and all(isinstance(message, Mapping) for message in item)
