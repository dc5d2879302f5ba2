"""Packs documents into contexts: rows of exactly T tokens, never padded, from a position that can be saved.

A context is the tokenizer's BOS token, if it has one, then the next tokens of an endless row: one document, EOS,
another document, EOS, and so on. Each document belongs to training or to held-out by a hash of its text, so equal
texts never fall on both sides, whatever source or order they come in.
"""

import hashlib
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from unbraid.config import TextConfig
from unbraid.errors import TextError
from unbraid.text.documents import TextSource, usable_text

BATCH_CHARACTERS = 1 << 17
"""Documents are tokenised together up to this many characters: fast, yet little is lost when a run starts anew."""
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
        """The inverse of `to_json`."""
        return cls(data["document"], data["token"], Counts(**data["counts"]), data["bookmark"])


class _Piece(NamedTuple):
    """A tokenised document, EOS included, and the counts before and after it."""

    index: int
    tokens: np.ndarray
    before: Counts
    after: Counts


class Contexts:
    """Iterates over contexts, `LongTensor [T]` each, until the text ends.

    Args:
        source: where documents come from.
        tokenizer: a transformers tokenizer.
        config: context_length, held_out_fraction and the limits on unusable documents.
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
        self._bos: list[int] = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        self._eos: list[int] = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self._pieces = self._read()
        self._piece: _Piece | None = None
        self._token = self._position.token

    def __iter__(self) -> Iterator[Int[Tensor, " T"]]:
        return self

    def __next__(self) -> Int[Tensor, " T"]:
        context_T = np.empty(self.config.context_length, dtype=np.int64)
        context_T[: len(self._bos)] = self._bos
        filled = len(self._bos)
        while filled < len(context_T):
            if self._piece is None:
                self._piece = self._next_piece()
            taken = self._piece.tokens[self._token : self._token + len(context_T) - filled]
            context_T[filled : filled + len(taken)] = taken
            filled += len(taken)
            self._token += len(taken)
            if self._token >= len(self._piece.tokens):
                self._position = Position(self._piece.index + 1, 0, self._piece.after)
                self._piece, self._token = None, 0
        if self._piece is not None:
            self._position = Position(self._piece.index, self._token, self._piece.before)
        return torch.from_numpy(context_T)

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
        waiting: deque[tuple[int, str | np.ndarray, Counts, Counts]] = deque()
        characters = 0
        for document in self.source.documents(self._position.document, self._position.bookmark):
            before = counts
            end = document.index + 1
            text, problem = usable_text(document.text, self.config.max_document_characters)
            counts = self._counted(counts, text, problem)
            if counts.used > before.used:
                waiting.append((document.index, text, before, counts))
                characters += len(text)
            if characters >= BATCH_CHARACTERS:
                yield from self._tokenised(waiting)
                characters = 0
            if problem and counts.seen >= ENOUGH_TO_JUDGE:
                self._check_skipped(counts)
        yield from self._tokenised(waiting)
        if counts.seen == 0:
            raise TextError(
                f"the text source holds no documents: {self.source.identity}; expected some; change the text settings"
            )
        self._check_skipped(counts)
        self._end = Position(end, 0, counts)

    def _counted(self, counts: Counts, text: str | np.ndarray, problem: str) -> Counts:
        if problem:
            skipped = counts.skipped | {problem: counts.skipped.get(problem, 0) + 1}
            return Counts(counts.seen + 1, counts.used, skipped)
        ours = is_held_out(text, self.config.held_out_fraction) == self.held_out
        return Counts(counts.seen + 1, counts.used + ours, counts.skipped)

    def _tokenised(self, waiting: "deque[tuple[int, str | np.ndarray, Counts, Counts]]") -> Iterator[_Piece]:
        ids = iter(tokenise(self.tokenizer, [text for _, text, _, _ in waiting if isinstance(text, str)]))
        while waiting:
            index, text, before, after = waiting.popleft()
            tokens = next(ids) if isinstance(text, str) else text.tolist()
            ends = [] if tokens and [tokens[-1]] == self._eos else self._eos
            yield _Piece(index, np.asarray(tokens + ends, dtype=np.int64), before, after)

    def _check_skipped(self, counts: Counts) -> None:
        if counts.skipped_fraction > self.config.max_skipped_fraction:
            reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(counts.skipped.items()))
            raise TextError(
                f"{sum(counts.skipped.values())} of the first {counts.seen} documents cannot be used ({reasons}); "
                f"expected at most {self.config.max_skipped_fraction:.0%}; check text.column and the files, or raise "
                "text.max_skipped_fraction"
            )


def is_held_out(text: str | np.ndarray, fraction: float) -> bool:
    """Whether a document belongs to the held-out side: a hash of its text, or token ids, below `fraction`."""
    content = text.encode("utf-8") if isinstance(text, str) else text.tobytes()
    digest = hashlib.blake2b(content, digest_size=8, person=b"held-out").digest()
    return int.from_bytes(digest, "big") < fraction * 2.0**64


def tokenise(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text, without BOS or EOS; a special token's name inside a text is read as plain text.

    The Rust tokenizer is called directly where there is one: transformers would also collect offsets and masks, which
    costs a fifth of the time. It sets these three switches anew on every call of its own.
    """
    if not texts:
        return []
    if getattr(tokenizer, "is_fast", False):
        backend = tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
    return tokenizer(
        texts,
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]


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
