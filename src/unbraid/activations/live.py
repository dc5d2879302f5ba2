"""Activations computed as they are needed: contexts through the language model, one model batch at a time."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from unbraid.activations.language_model import load_language_model
from unbraid.activations.rows import Chunk
from unbraid.config import RunConfig
from unbraid.text import Contexts, Position, count_contexts, open_source


class LiveActivations:
    """A `ChunkSource` that runs the model.

    Args:
        config: text, model and sites.
        device: where the model runs.

    Raises:
        ModelError: the model or a site is not there.
        TextError: the text is not there.
    """

    def __init__(self, config: RunConfig, device: torch.device):
        self.text = config.text
        self.documents = open_source(config.text)
        self.model = load_language_model(config.model, device)
        self.sites = config.sites
        self.d_model = self.model.d_model
        self.context_length = config.text.context_length
        self.batch_contexts = config.model.batch_contexts
        self.special_ids = frozenset(self.model.special_ids)
        self.prepends_bos = self.model.tokenizer.bos_token_id is not None

    def chunks(self, position: dict[str, Any] | None, held_out: bool = False) -> Iterator[Chunk]:
        """Chunks from `position` to the end of the training (or held-out) text."""
        contexts = self._contexts(position, held_out)
        while batch := list(islice(contexts, self.batch_contexts)):
            tokens_BT = torch.stack(batch)
            yield Chunk(tokens_BT, self.model.activations(tokens_BT), contexts.position.to_json())

    def count_contexts(self, limit: int) -> int | None:
        """Training contexts there are, counted no further than `limit`; None for a stream, which cannot tell."""
        return None if self.text.source == "hub" else count_contexts(self._contexts(None, False), limit)

    def _contexts(self, position: dict[str, Any] | None, held_out: bool) -> Contexts:
        start = Position.from_json(position) if position else None
        return Contexts(self.documents, self.model.tokenizer, self.text, held_out, start)
