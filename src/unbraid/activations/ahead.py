"""Compute the next chunks while the SAEs train.

A thread walks the source and puts chunks into a short queue; it blocks when the queue is full and nothing is ever
dropped. Every chunk carries the position of the text after it, so what has been computed ahead but not used is simply
computed again after a resume: state and bytes do not depend on overlapping. On CUDA the thread has a stream of its
own, so the model pass and the training step share the device; on a CPU both would fight for the same cores, which is
why `buffer.overlap` is off there unless asked for.
"""

import queue
import threading
from collections.abc import Iterator
from typing import Any

import torch

from unbraid.activations.rows import Chunk, ChunkSource

POLL_SECONDS = 0.1
"""How often a blocked producer looks whether its consumer has gone."""

LONGEST_WAIT_SECONDS = 2.0


class Ahead:
    """A `ChunkSource` that keeps up to `depth` chunks ready.

    Args:
        source: where chunks come from; used by one thread at a time.
        depth: chunks computed ahead, which they hold in memory; the buffer's next refill is worth having.
    """

    def __init__(self, source: ChunkSource, depth: int):
        self.source, self.depth = source, depth
        self.sites, self.widths = source.sites, source.widths
        self.context_length, self.batch_contexts = source.context_length, source.batch_contexts
        self.special_ids, self.identity = source.special_ids, source.identity

    def chunks(self, position: dict[str, Any] | None, held_out: bool = False) -> Iterator[Chunk]:
        """Chunks from `position` on; an error in the source is raised here, at the chunk it belongs to."""
        ready: queue.Queue[Chunk | BaseException | None] = queue.Queue(self.depth)
        gone = threading.Event()

        def put(item: Chunk | BaseException | None) -> None:
            while not gone.is_set():
                try:
                    return ready.put(item, timeout=POLL_SECONDS)
                except queue.Full:
                    continue

        def produce() -> None:
            stream = torch.cuda.Stream() if torch.cuda.is_available() else None
            try:
                with torch.cuda.stream(stream):
                    for chunk in self.source.chunks(position, held_out):
                        if stream is not None:
                            stream.synchronize()
                        put(chunk)
                        if gone.is_set():
                            return
                put(None)
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=produce, name="unbraid-ahead", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            gone.set()
            thread.join(LONGEST_WAIT_SECONDS)  # A source that has stalled ends with the process.
