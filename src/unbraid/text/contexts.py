"""Packs documents into contexts: rows of exactly T tokens, from a position that can be saved.

A context is the tokenizer's BOS token, if it has one, then the next tokens of an endless row: one document, EOS,
another document, EOS, and so on. With `text.separate_documents` positions start anew with each of them, which is how a
model is told to keep them apart. With `text.pack` off each context holds tokens of one document and what is left is
filled up, never to be learnt from. Each document belongs to training or to held-out by a hash of what it holds, so
equal texts never fall on both sides, whatever source or order they come in.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from unbraid.config import TextConfig
from unbraid.errors import TextError
from unbraid.json_files import is_count
from unbraid.text.documents import TOO_LONG, Content, TextSource, key_of, usable
from unbraid.text.tokens import DocumentTokenizer

BATCH_CHARACTERS = 1 << 17
"""Documents are tokenised together up to this many characters: fast, yet little is lost when a run starts anew."""
FIRST_CHARACTERS = 1 << 12
"""The same at the beginning, doubled from then on: a few held-out contexts are found without reading fifty times their
number of others for a whole batch."""
ENOUGH_TO_JUDGE = 100
"""Documents seen before too many skipped ones stop a run."""


@dataclass(frozen=True)
class Counts:
    """Documents of the source up to some place: how many were `seen`, `used` on this side, and `skipped` by reason."""

    seen: int = 0
    used: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def skipped_fraction(self) -> float:
        """Share of the documents seen that could not be used."""
        return sum(self.skipped.values()) / self.seen if self.seen else 0.0


@dataclass(frozen=True)
class Position:
    """Where the next context begins: token `token` (EOS included) of document `document`, and what came before it."""

    document: int = 0
    token: int = 0
    counts: Counts = Counts()
    bookmark: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values for a checkpoint or manifest."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Position":
        """The inverse of `to_json`.

        Raises:
            TextError: the data is nothing that `to_json` gave.
        """
        counts: Any = data.get("counts")
        bookmark = data.get("bookmark")
        numbers = [data.get("document"), data.get("token")]
        if isinstance(counts, dict) and isinstance(counts.get("skipped"), dict):
            numbers += [counts.get("seen"), counts.get("used"), *counts["skipped"].values()]
        if len(numbers) < 4 or not all(map(is_count, numbers)) or not isinstance(bookmark, dict | None):
            raise TextError(
                f"a place in the text is {str(data)[:200]}; expected what an earlier part of the run wrote; what holds "
                "it is damaged"
            )
        return cls(data["document"], data["token"], Counts(**counts), bookmark)


class Context(NamedTuple):
    """A context.

    Attributes:
        tokens: token ids [T], int64.
        trains: which of them may be learnt from [T].
        present: where there is a token and no filling [T].
        positions: the position of each token [T], from 0 in the context, or in its part of each document.
    """

    tokens: Int[Tensor, " T"]
    trains: Bool[Tensor, " T"]
    present: Bool[Tensor, " T"]
    positions: Int[Tensor, " T"]


class _Piece(NamedTuple):
    """A tokenised document, BOS and EOS included as the settings say, and the counts before and after it."""

    index: int  # pyright: ignore[reportIncompatibleMethodOverride]
    tokens: np.ndarray
    trains: np.ndarray
    before: Counts
    after: Counts


class Contexts:
    """Iterates over contexts, `LongTensor [T]` each, until the text ends.

    Args:
        source: where documents come from.
        tokenizer: a transformers tokenizer.
        config: how contexts are made, held_out_fraction and the limits on unusable documents.
        held_out: whether to take the held-out documents or the training documents.
        position: where to go on; a `Position` taken from another `Contexts` with the same arguments.

    Raises:
        TextError: the source has no documents, or too many are unusable (while iterating).
    """

    def __init__(
        self,
        source: TextSource,
        tokenizer: Any,
        config: TextConfig,
        held_out: bool = False,
        position: Position | None = None,
    ) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.config = config
        self.held_out = held_out
        self._position = self._end = position or Position()
        self._tokenise = DocumentTokenizer(tokenizer, config)
        bos, eos, pad = self._tokenise.bos, self._tokenise.eos, tokenizer.pad_token_id
        self._context_start = [bos] if config.bos == "context" and bos is not None else []
        self._document_start = [bos] if config.bos == "document" and bos is not None else []
        self._document_end = [eos] if config.pack and eos is not None else []
        self._filling = next((token for token in (pad, eos, bos) if token is not None), 0)
        self._pieces = self._read()
        self._piece: _Piece | None = None
        self._token = self._position.token

    def __iter__(self) -> Iterator[Int[Tensor, " T"]]:
        return self

    def __next__(self) -> Int[Tensor, " T"]:
        return self.next_context().tokens

    def with_masks(self) -> Iterator[Context]:
        """The contexts that are left, with what may be learnt from each."""
        while True:
            try:
                yield self.next_context()
            except StopIteration:
                return

    def next_context(self) -> Context:
        """The next context, with what may be learnt from it.

        Raises:
            StopIteration: the text has ended.
        """
        start, length = len(self._context_start), self.config.context_length
        tokens_T = np.full(length, self._filling, dtype=np.int64)
        trains_T, present_T = np.zeros(length, dtype=bool), np.zeros(length, dtype=bool)
        positions_T = np.arange(length)
        tokens_T[:start], trains_T[:start] = self._context_start, True
        filled = start
        while filled < length:
            if self._piece is None:
                self._piece = self._next_piece()
            rest = slice(self._token, self._token + length - filled)
            taken = self._piece.tokens[rest]
            here = slice(filled, filled + len(taken))
            tokens_T[here], trains_T[here] = taken, self._piece.trains[rest]
            if self.config.separate_documents:
                positions_T[here] = np.arange(len(taken))
            filled += len(taken)
            self._token += len(taken)
            if self._token >= len(self._piece.tokens):
                self._position = Position(self._piece.index + 1, 0, self._piece.after)
                self._piece, self._token = None, 0
                if filled > start and not self.config.pack:
                    break
        present_T[:filled] = True
        if self._piece is not None:
            self._position = Position(self._piece.index, self._token, self._piece.before)
        return Context(*map(torch.from_numpy, (tokens_T, trains_T, present_T, positions_T)))

    def _next_piece(self) -> _Piece:
        try:
            return next(self._pieces)
        except StopIteration:
            self._position = self._end
            raise

    @property
    def position(self) -> Position:
        """Where the next context begins."""
        here = self._position
        return Position(here.document, here.token, here.counts, self.source.bookmark(here.document) or here.bookmark)

    @property
    def counts(self) -> Counts:
        """Documents seen, used and skipped before the current position."""
        return self._position.counts

    def _read(self) -> Iterator[_Piece]:
        """Usable documents of this side, tokenised, from the position on."""
        counts, end = self._position.counts, self._position.document
        waiting: list[tuple[int, Content, Counts, Counts]] = []
        characters, enough = 0, FIRST_CHARACTERS
        for document in self.source.documents(self._position.document, self._position.bookmark):
            before = counts
            end = document.index + 1
            content, problem = usable(document.text, self.config.max_document_characters)
            counts = self._counted(counts, content, problem)
            if counts.used > before.used:
                waiting.append((document.index, content, before, counts))
                characters += len(content)
            if characters >= enough:
                yield from self._tokenised(waiting)
                waiting, characters, enough = [], 0, min(2 * enough, BATCH_CHARACTERS)
            if problem and counts.seen >= ENOUGH_TO_JUDGE:
                self._check_skipped(counts)
        yield from self._tokenised(waiting)
        if counts.seen == 0:
            raise TextError(
                f"the text source holds no documents: {self.source.identity}; expected some; change the text settings"
            )
        self._check_skipped(counts)
        self._end = Position(end, 0, counts)

    def _counted(self, counts: Counts, content: Content, problem: str) -> Counts:
        if problem:
            skipped = counts.skipped | {problem: counts.skipped.get(problem, 0) + 1}
            return Counts(counts.seen + 1, counts.used, skipped)
        ours = is_held_out(content, self.config.held_out_fraction) == self.held_out
        return Counts(counts.seen + 1, counts.used + ours, counts.skipped)

    def _tokenised(self, waiting: list[tuple[int, Content, Counts, Counts]]) -> Iterator[_Piece]:
        found = self._tokenise([content for _, content, _, _ in waiting])
        start, end = len(self._document_start), len(self._document_end)
        for (index, _, before, after), (ids, trains) in zip(waiting, found, strict=True):
            tokens = np.concatenate([self._document_start, ids, self._document_end]).astype(np.int64)
            yield _Piece(index, tokens, np.pad(trains, (start, end), constant_values=True), before, after)

    def _check_skipped(self, counts: Counts) -> None:
        if counts.skipped_fraction > self.config.max_skipped_fraction:
            reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(counts.skipped.items()))
            longest = f" (now {self.config.max_document_characters:,})"
            reasons = reasons.replace(TOO_LONG, TOO_LONG + longest)
            raise TextError(
                f"{sum(counts.skipped.values())} of the first {counts.seen} documents cannot be used ({reasons}); "
                f"expected at most {self.config.max_skipped_fraction:.0%}; check text.column and the files, or raise "
                "text.max_skipped_fraction"
            )


def is_held_out(content: Content, fraction: float) -> bool:
    """Whether a document belongs to the held-out side: a hash of what it holds below `fraction`."""
    digest = hashlib.blake2b(key_of(content), digest_size=8, person=b"held-out").digest()
    return int.from_bytes(digest, "big") < fraction * 2.0**64


def count_contexts(contexts: Contexts, limit: int) -> int:
    """How many contexts are left, counted no further than `limit`. Uses `contexts` up: pass one made for this."""
    return sum(1 for _ in zip(range(limit), contexts, strict=False))


def explain_shortage(
    contexts: int, rows_per_context: int, batch_tokens: int, steps: int, held_out: bool = False
) -> str:
    """The arithmetic of a text that is too small: what it gives and what the run needs."""
    rows = contexts * rows_per_context
    side = "held-out" if held_out else "training"
    return (
        f"the {side} text gives {contexts} contexts = {rows} token rows = {rows // batch_tokens} steps of "
        f"{batch_tokens}; expected at least {steps} steps = {steps * batch_tokens} token rows; give more text or lower "
        "training.tokens"
    )
