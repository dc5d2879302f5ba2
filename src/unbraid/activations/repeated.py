"""The training text read several times, for runs longer than the text there is.

Each reading gives the same chunks in the same order; the buffer goes on drawing from its own generator, so rows meet in
other batches each time. Which reading a chunk belongs to is part of its position, and so of every checkpoint. Held-out
text is read once.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from unbraid.activations.rows import Chunk, ChunkSource
from unbraid.errors import CheckpointError
from unbraid.json_files import is_count

EPOCH = "epoch"
"""In a position: readings finished before this one."""


class Repeated:
    """A `ChunkSource` that begins again at the end of the training text.

    Args:
        source: what is repeated.
        epochs: readings in all.
    """

    def __init__(self, source: ChunkSource, epochs: int):
        self.source, self.epochs = source, epochs
        self.sites, self.widths = source.sites, source.widths
        self.context_length, self.batch_contexts = source.context_length, source.batch_contexts
        self.special_ids, self.identity = source.special_ids, source.identity

    def chunks(self, position: dict[str, Any] | None, held_out: bool = False) -> Iterator[Chunk]:
        """Chunks from `position` to the end of the last reading; those of the first are the source's own.

        Raises:
            CheckpointError: the position is of no reading there could be.
        """
        if held_out:
            yield from self.source.chunks(position, held_out)
            return
        first = position.get(EPOCH, 0) if position else 0
        if not is_count(first):
            raise CheckpointError(
                f"a place in the text has {EPOCH} {first!r}; expected a number; what holds it is damaged"
            )
        here = {name: value for name, value in position.items() if name != EPOCH} if position else None
        for epoch in range(first, self.epochs):
            for chunk in self.source.chunks(here):
                yield replace(chunk, position=chunk.position | {EPOCH: epoch}) if epoch else chunk
            here = None
