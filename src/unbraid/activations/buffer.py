"""The token-level shuffle buffer between the language model and the SAEs.

Rows of a context are highly correlated, so SAEs learn from a random mix of many contexts: the buffer holds up to
`contexts` contexts' worth of rows, hands out exactly B of them at a time in random order, and refills the used slots
when half are used. A refill is a transaction: until its last chunk is in, everything a checkpoint would save is as it
was before, so a run can be stopped in the middle of one and loses nothing.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from unbraid.activations.row_store import RowStore
from unbraid.activations.rows import (
    Chunk,
    ChunkSource,
    RefillInterrupted,
    RowFilter,
    StopSignal,
    interruptible,
    never,
)
from unbraid.config import BufferConfig
from unbraid.errors import ConfigError, RowsUsedUp
from unbraid.json_files import is_count
from unbraid.randomness import generator


class ActivationBuffer:
    """Yields batches of exactly B rows per site.

    Args:
        source: where chunks come from.
        config: capacity, precision and row filter.
        batch_tokens: B.
        seed: the run's seed.
        planned_rows: rows the run will take in all; nothing is read that it cannot use.
        device: where batches are delivered; rows are kept there as well if they fit (see `row_store`).
        reserved: bytes of the device that training needs for other things.
        should_stop: asked between chunks of a refill.
        on_fill: called with (rows present, capacity) as a refill goes on.

    Raises:
        ConfigError: the capacity is too small for the batch or the model batch.
    """

    def __init__(
        self,
        source: ChunkSource,
        config: BufferConfig,
        batch_tokens: int,
        seed: int,
        *,
        planned_rows: int | None = None,
        device: torch.device | str = "cpu",
        reserved: int = 0,
        should_stop: StopSignal = never,
        on_fill: Callable[[int, int], None] | None = None,
    ):
        if config.contexts < 2 * source.batch_contexts:
            raise ConfigError(
                f"buffer.contexts = {config.contexts} cannot be refilled at half by model batches of "
                f"model.batch_contexts = {source.batch_contexts}; expected at least {2 * source.batch_contexts}"
            )
        self.capacity = config.contexts * source.context_length
        if 2 * batch_tokens > self.capacity:
            raise ConfigError(
                f"training.batch_tokens = {batch_tokens} is more than half of the buffer's {self.capacity} rows "
                f"(buffer.contexts = {config.contexts} x {source.context_length}); raise buffer.contexts or lower "
                "training.batch_tokens"
            )
        self.source, self.config, self.batch_tokens, self.device = source, config, batch_tokens, torch.device(device)
        self.dtype = getattr(torch, config.dtype)
        self.filter = RowFilter(config, source.sites, source.special_ids)
        self.planned_rows = planned_rows
        self.position: dict[str, Any] | None = None
        self.exhausted = False
        self.handed_out = 0
        self._should_stop, self._on_fill = should_stop, on_fill
        self._generator = generator(seed, "buffer")
        self._store = RowStore(self.capacity, source.widths, self.dtype, self.device, reserved)
        self._unread = torch.empty(0, dtype=torch.long)
        self._chunks: Iterator[Chunk] | None = None
        self._lent: Tensor | None = None
        self._returned = False

    def __len__(self) -> int:
        """Rows not yet handed out."""
        return len(self._unread)

    def next_batch(self) -> list[Tensor]:
        """B rows, one [B, D] float32 tensor a site; row b is the same token at every site.

        Raises:
            RowsUsedUp: the text is used up before B rows are left.
            RefillInterrupted: the stop signal came; call again to go on.
        """
        due = len(self._unread) - self.batch_tokens < self.capacity // 2 and not self._returned
        if due and not self.exhausted and not self._enough(0):
            self._refill()
        if len(self._unread) < self.batch_tokens:
            rows = self.handed_out + len(self._unread)
            raise RowsUsedUp(
                f"the text is used up: it gave {rows:,} rows, which is {rows // self.batch_tokens:,} steps of "
                f"training.batch_tokens = {self.batch_tokens:,} rows; give more text, or lower training.tokens to at "
                f"most {rows // self.batch_tokens * self.batch_tokens:,}"
            )
        batch, self._unread = self._unread[: self.batch_tokens], self._unread[self.batch_tokens :]
        self.handed_out += self.batch_tokens
        self._lent, self._returned = batch, False
        return self._store.batch(batch)

    def settle(self) -> None:
        """The last batch has been learnt from."""
        self._lent = None

    def take_back(self) -> None:
        """Undo a `next_batch` that was not settled: its rows will be the next ones again, without another refill."""
        if self._lent is not None:
            self._unread = torch.cat([self._lent, self._unread])
            self.handed_out -= self.batch_tokens
            self._lent, self._returned = None, True

    def fill(self) -> None:
        """Fill the buffer to the brim before the first batch."""
        if not self.exhausted:
            self._refill()

    @property
    def place(self) -> torch.device:
        """Where rows are kept: the device of the batches, or the host."""
        return self._store.place

    def rows(self) -> Iterator[Tensor]:
        """Every unread row, one [R, D] float32 tensor a site, one at a time: what first statistics are taken from."""
        return (self._store.float32(site, self._unread) for site in range(len(self.source.widths)))

    def _refill(self) -> None:
        filter_state = self.filter.state()
        try:
            slots, position, exhausted = self._read_into_free_slots()
        except BaseException:
            self.filter.load_state(filter_state)
            self._chunks = None
            raise
        present = torch.cat([self._unread, slots])
        self._unread = present[torch.randperm(len(present), generator=self._generator)]
        self.position, self.exhausted = position, exhausted

    def _read_into_free_slots(self) -> tuple[Tensor, dict[str, Any] | None, bool]:
        """Fill used slots with new rows; (slots filled, text position after them, whether the text ended)."""
        free = torch.ones(self.capacity, dtype=torch.bool)
        free[self._unread] = False
        slots = free.nonzero().squeeze(1)
        largest_chunk = self.source.batch_contexts * self.source.context_length
        position, used = self.position, 0
        while used + largest_chunk <= len(slots) and not self._enough(used):
            if self._should_stop():
                raise RefillInterrupted
            if self._chunks is None:
                self._chunks = self.source.chunks(self.position)
            with interruptible(self._should_stop):
                chunk = next(self._chunks, None)
            if chunk is None:
                return slots[:used], position, True
            rows = self.filter(chunk)
            here = slots[used : used + len(rows[0])]
            self._store.write(here, rows)
            used, position = used + len(here), chunk.position
            if self._on_fill is not None:
                self._on_fill(len(self._unread) + used, self.capacity)
        return slots[:used], position, False

    def _enough(self, used: int) -> bool:
        rows = self.handed_out + len(self._unread) + used
        return self.planned_rows is not None and rows >= self.planned_rows

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything needed to go on exactly: (tensors, JSON data). Only unread rows are saved."""
        tensors = {f"rows.{i}": self._store.stored(i, self._unread) for i in range(len(self.source.widths))}
        tensors |= {"unread": self._unread.clone(), "generator": self._generator.get_state()}
        return tensors, {
            "position": self.position,
            "filter": self.filter.state(),
            "exhausted": self.exhausted,
            "handed_out": self.handed_out,
            "returned": self._returned,
        }

    def load_state(self, tensors: dict[str, Tensor], data: dict[str, Any]) -> None:
        """Go on from `state()`.

        Raises:
            ValueError: the data is nothing that `state` gave.
        """
        flags = isinstance(data["exhausted"], bool) and isinstance(data["returned"], bool)
        if not flags or not is_count(data["handed_out"]):
            raise ValueError(f"the buffer's state is {str(data)[:80]}")
        if not isinstance(data["position"], dict | None):
            raise ValueError(f"the buffer's position is {str(data['position'])[:80]}")
        self._unread = tensors["unread"].clone()
        self._store.write(self._unread, [tensors[f"rows.{i}"] for i in range(len(self.source.widths))])
        self._generator.set_state(tensors["generator"])
        self.exhausted, self.handed_out, self._returned = data["exhausted"], data["handed_out"], data["returned"]
        self.position = data["position"]
        self.filter.load_state(data["filter"])
        self._chunks = None
