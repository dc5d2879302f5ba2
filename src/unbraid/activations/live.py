"""Activations computed as they are needed: contexts through the language model, one model batch at a time.

Among many ranks the text is read by the first one, each rank passes its share of the contexts through the model, and
everybody gets every chunk, in the order of the text: the same chunks whatever the number of ranks.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import nn

from unbraid.activations.language_model import LanguageModel, load_language_model
from unbraid.activations.rows import Chunk
from unbraid.activations.suitability import check_keeps_documents_apart
from unbraid.config import ModelConfig, RunConfig
from unbraid.distributed.ranks import ALONE, Ranks
from unbraid.errors import ModelError
from unbraid.text import Contexts, Position, TextSource, open_source
from unbraid.text.documents import FirstDocuments
from unbraid.text.handed_in import HandedInText
from unbraid.text.hub import HubSource
from unbraid.text.tokens import bos_token

DOCUMENTS_SEARCHED = 200_000
"""For one held-out context, before the run is refused; a text may be endless."""


class _Pass(NamedTuple):
    """One model batch: token ids, which may be learnt from, where there is a token and no filling, and positions."""

    tokens_BT: torch.Tensor
    trains_BT: torch.Tensor
    present_BT: torch.Tensor
    positions_BT: torch.Tensor


class LiveActivations:
    """A `ChunkSource` that runs the model.

    Args:
        config: text, model and sites.
        device: where the model runs.
        ranks: who shares the model passes.
        model, tokenizer: taken instead of those the settings name; the model stays on its device.
        text: an iterable taken instead of the text the settings name; see `text.handed_in`.

    Raises:
        ModelError: the model or a site is not there.
        TextError: the text is not there.
    """

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        ranks: Ranks = ALONE,
        *,
        model: nn.Module | None = None,
        tokenizer: Any = None,
        text: Any = None,
    ):
        self.ranks = ranks
        self.text = config.text
        documents = open_source(config.text) if text is None else None
        self.model = handed_in_model(config.model, model, tokenizer) or load_language_model(config.model, device)
        if tokenizer is not None:
            self.model.tokenizer = tokenizer
        if config.text.bos == "none":
            # Whatever makes contexts or prompts asks the tokenizer, and this one is the model's own.
            self.model.tokenizer.bos_token = None
        if config.text.separate_documents:
            check_keeps_documents_apart(self.model.name, self.model.last_output, self.model.vocabulary)
        vocabulary = self.model.model.get_input_embeddings().weight.shape[0]  # pyright: ignore
        self.documents = documents or HandedInText(text, vocabulary)
        self.model_name = self.model.name
        self.drop_first_position = config.buffer.drop_first_position
        self.sites = config.sites
        self.widths = self.model.widths
        self.context_length = config.text.context_length
        self.batch_contexts = config.model.batch_contexts
        self.special_ids = frozenset(self.model.special_ids)
        self.prepends_bos = config.text.bos == "context" and bos_token(self.model.tokenizer) is not None

    @property
    def identity(self) -> dict[str, Any]:
        """Of the model and of the text."""
        return {"model": self.model.identity, "text": self.documents.identity}

    def chunks(self, position: dict[str, Any] | None, held_out: bool = False) -> Iterator[Chunk]:
        """Chunks from `position` to the end of the training (or held-out) text."""
        batches = self._batches(position, held_out)
        while True:
            turns = self.ranks.broadcast_json(list(islice(batches, self.ranks.size)) if self.ranks.first else None)
            passes = [_Pass(*map(torch.tensor, rows)) for rows, _ in turns]
            own = self._activations(passes[self.ranks.rank]) if self.ranks.rank < len(turns) else []
            for turn, (batch, (_, after)) in enumerate(zip(passes, turns, strict=True)):
                tables = {"trains_BT": batch.trains_BT} if self.text.masked else {}
                tables |= {"positions_BT": batch.positions_BT} if self.text.separate_documents else {}
                yield Chunk(batch.tokens_BT, self._from_rank(turn, own, batch.tokens_BT), after, **tables)
            if len(turns) < self.ranks.size:
                return

    def _batches(self, position: dict[str, Any] | None, held_out: bool) -> Iterator[tuple[list[Any], dict[str, Any]]]:
        """Model batches as plain lists, and where the text continues after each."""
        contexts = self._contexts(self.documents, position, held_out)
        while batch := list(islice(contexts.with_masks(), self.batch_contexts)):
            yield [torch.stack(rows).tolist() for rows in zip(*batch, strict=True)], contexts.position.to_json()

    def _activations(self, batch: _Pass) -> list[torch.Tensor]:
        if self.text.separate_documents:  # every context is full
            return self.model.activations(batch.tokens_BT, positions=batch.positions_BT)
        return self.model.activations(batch.tokens_BT, batch.present_BT.long() if self.text.masked else None)

    def _from_rank(self, rank: int, own: list[torch.Tensor], tokens_BT: torch.Tensor) -> list[torch.Tensor]:
        """Activations of the chunk that `rank` computed."""
        if rank == self.ranks.rank:
            found = own
        else:
            found = [
                torch.empty(*tokens_BT.shape, width, dtype=self.model.dtype, device=self.model.device)
                for width in self.widths
            ]
        return [self.ranks.broadcast(x_BTD.contiguous(), rank) for x_BTD in found]

    @property
    def description(self) -> str:
        """The model, where it is, and what is read of it."""
        widths = "/".join(map(str, dict.fromkeys(self.widths)))
        model = f"{self.model_name} on {self.model.device}, {widths} wide, read at {', '.join(map(str, self.sites))}"
        return f"{model}; {self.documents.replay.resumes}" if isinstance(self.documents, HandedInText) else model

    def count_rows(self, limit: int) -> int | None:
        """Training rows that are no special tokens, counted no further than `limit`; None for a stream."""
        if isinstance(self.documents, HubSource | HandedInText):
            return None
        special, found = torch.tensor(sorted(self.special_ids), dtype=torch.long), 0
        for context in self._contexts(self.documents, None, False).with_masks():
            kept_T = context.trains & ~torch.isin(context.tokens, special)
            found += int((kept_T & (context.positions > 0)).sum() if self.drop_first_position else kept_T.sum())
            if found >= limit:
                return found
        return found

    def has_held_out_rows(self) -> bool:
        """Whether the first documents, a great many of them, give one held-out context."""
        few = FirstDocuments(self.documents, DOCUMENTS_SEARCHED)
        return next(self._contexts(few, None, True), None) is not None

    def _contexts(self, documents: TextSource, position: dict[str, Any] | None, held_out: bool) -> Contexts:
        start = Position.from_json(position) if position else None
        return Contexts(documents, self.model.tokenizer, self.text, held_out, start)


def handed_in_model(config: ModelConfig, model: nn.Module | None, tokenizer: Any) -> LanguageModel | None:
    """A model that the caller gave, ready to be read; None without one.

    Raises:
        ModelError: its tokenizer is missing, or a site is not there.
    """
    if model is None:
        return None
    if tokenizer is None:
        raise ModelError(f"model is a {type(model).__name__} without a tokenizer; expected tokenizer= beside model=")
    return LanguageModel(
        model,
        tokenizer,
        config.ends,
        name=name_of(model) or type(model).__name__,
        pass_contexts=config.batch_contexts,
        bidirectional=config.bidirectional,
    )


def name_of(model: nn.Module) -> str:
    """The hub id or folder a transformers model was loaded from; empty where it was not.

    Raises:
        ModelError: it is no transformers model.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_input_embeddings"):
        raise ModelError(f"model is a {type(model).__name__}; expected a transformers language model")
    return getattr(config, "name_or_path", "")
