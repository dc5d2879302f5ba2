"""Activations computed as they are needed: contexts through the language model, one model batch at a time.

Among many ranks the text is read by the first one, each rank passes its share of the contexts through the model, and
everybody gets every chunk, in the order of the text: the same chunks whatever the number of ranks.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import torch

from unbraid.activations.language_model import load_language_model
from unbraid.activations.rows import Chunk
from unbraid.config import RunConfig
from unbraid.distributed.ranks import ALONE, Ranks
from unbraid.text import Contexts, Position, count_contexts, open_source


class LiveActivations:
    """A `ChunkSource` that runs the model.

    Args:
        config: text, model and sites.
        device: where the model runs.
        ranks: who shares the model passes.

    Raises:
        ModelError: the model or a site is not there.
        TextError: the text is not there.
    """

    def __init__(self, config: RunConfig, device: torch.device, ranks: Ranks = ALONE):
        self.ranks = ranks
        self.text = config.text
        self.documents = open_source(config.text)
        self.model = load_language_model(config.model, device)
        if not config.text.prepend_bos:
            # Whatever makes contexts or prompts asks the tokenizer, and this one is the model's own.
            self.model.tokenizer.bos_token = None
        self.sites = config.sites
        self.widths = self.model.widths
        self.context_length = config.text.context_length
        self.batch_contexts = config.model.batch_contexts
        self.special_ids = frozenset(self.model.special_ids)
        self.prepends_bos = self.model.tokenizer.bos_token_id is not None

    def chunks(self, position: dict[str, Any] | None, held_out: bool = False) -> Iterator[Chunk]:
        """Chunks from `position` to the end of the training (or held-out) text."""
        batches = self._batches(position, held_out)
        while True:
            turns = self.ranks.broadcast_json(list(islice(batches, self.ranks.size)) if self.ranks.first else None)
            passes = [torch.tensor(tokens) for tokens, _ in turns]
            own = self.model.activations(passes[self.ranks.rank]) if self.ranks.rank < len(turns) else []
            for turn, (tokens_BT, (_, after)) in enumerate(zip(passes, turns, strict=True)):
                yield Chunk(tokens_BT, self._from_rank(turn, own, tokens_BT), after)
            if len(turns) < self.ranks.size:
                return

    def _batches(self, position: dict[str, Any] | None, held_out: bool) -> Iterator[tuple[list, dict[str, Any]]]:
        """Token ids of the model batches, and where the text continues after each."""
        contexts = self._contexts(position, held_out)
        while batch := list(islice(contexts, self.batch_contexts)):
            yield torch.stack(batch).tolist(), contexts.position.to_json()

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

    def count_contexts(self, limit: int) -> int | None:
        """Training contexts there are, counted no further than `limit`; None for a stream, which cannot tell."""
        return None if self.text.source == "hub" else count_contexts(self._contexts(None, False), limit)

    def _contexts(self, position: dict[str, Any] | None, held_out: bool) -> Contexts:
        start = Position.from_json(position) if position else None
        return Contexts(self.documents, self.model.tokenizer, self.text, held_out, start)
