"""Contexts in, activation rows out: one model pass at a time, for every site at once.

A *chunk* is the kept rows of one model batch. Chunks are cut by the text alone (always `batch_contexts` contexts, save
for the last), never by the buffer's needs, so the same text gives the same chunks whether they come live from the
model or from a cache, and whether or not they are computed ahead of time.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from unbraid.activations.row_store import sent
from unbraid.config import BufferConfig
from unbraid.errors import ActivationError
from unbraid.json_files import is_count, is_number
from unbraid.sites import Site

TABLES = {"trains_BT": "trains", "positions_BT": "positions"}
"""What a chunk may say of each of its tokens: attribute -> name in a cache."""


@dataclass(frozen=True)
class Chunk:
    """Activations of a few contexts.

    Attributes:
        tokens_BT: token ids, [contexts, T].
        activations: one [contexts, T, D] tensor a site.
        position: where the text continues after this chunk; plain JSON data.
        trains_BT: which tokens may be learnt from, [contexts, T] bool; None for all.
        positions_BT: position of each token in its document, where a context holds several that are kept apart,
            [contexts, T]; None where they are positions in the context.
    """

    tokens_BT: Tensor
    activations: list[Tensor]
    position: dict[str, Any]
    trains_BT: Tensor | None = None
    positions_BT: Tensor | None = None

    def of_first(self, contexts: int) -> "Chunk":
        """The chunk with its first contexts only."""
        part = slice(contexts)
        tables = {name: None if (table := getattr(self, name)) is None else table[part] for name in TABLES}
        return Chunk(self.tokens_BT[part], [x_BTD[part] for x_BTD in self.activations], self.position, **tables)


def side_by_side(activations: Sequence[Tensor], sites: Sequence[int]) -> Tensor:
    """The activations `[..., D]` of some sites as one tensor `[..., D1 + D2 + ...]`; those of one as they are."""
    return activations[sites[0]] if len(sites) == 1 else torch.cat([activations[site] for site in sites], dim=-1)


@runtime_checkable
class ChunkSource(Protocol):
    """What a buffer reads from: a live model or a cache on disk."""

    sites: list[Site]
    widths: list[int]
    context_length: int
    batch_contexts: int
    special_ids: frozenset[int]

    @property
    def identity(self) -> dict[str, Any]:
        """JSON-able: which model and text, or which activations, these are."""
        ...

    def chunks(self, position: dict[str, Any] | None, held_out: bool = False) -> Iterator[Chunk]:
        """Chunks from `position` (None: the beginning) to the end of the text."""
        ...


class RowFilter:
    """Decides which rows of a chunk may be learnt from.

    Special tokens (BOS, EOS, padding) never are. Position 0 of a context (and of a document, where documents are kept
    apart) and rows beyond `norm_limit` times the site's median norm are massive activations: one such row outweighs
    ten thousand others in the loss, so they are dropped by default, at every site together (sites share the buffer),
    and counted.

    Attributes:
        dropped: rows left out so far, by reason.
        limits: largest norm kept, one per site; set by the first chunk seen, so it repeats with the text.
    """

    def __init__(self, config: BufferConfig, sites: list[Site], special_ids: frozenset[int]):
        self.config, self.sites = config, sites
        self.special_ids = torch.tensor(sorted(special_ids), dtype=torch.long)
        self.limits: list[float] | None = None
        self.dropped = {"special": 0, "first_position": 0, "massive": 0}
        self.kept = 0

    def __call__(self, chunk: Chunk) -> list[Tensor]:
        """The kept rows, one [R, D] tensor a site, in text order.

        Raises:
            ActivationError: a value is NaN or infinite.
        """
        kept = self.mask(chunk).flatten().nonzero().squeeze(1)
        flat = [x_BTD.flatten(0, 1) for x_BTD in chunk.activations]
        return [x_RD.index_select(0, sent(kept, x_RD.device)) for x_RD in flat]

    def mask(self, chunk: Chunk) -> Tensor:
        """Which rows of the chunk are kept, [contexts, T] bool on the CPU; counts them.

        Raises:
            ActivationError: a value is NaN or infinite.
        """
        first_BT = torch.zeros_like(chunk.tokens_BT, dtype=torch.bool)
        if self.config.drop_first_position:
            first_BT[:, 0] = True
            first_BT |= False if chunk.positions_BT is None else chunk.positions_BT == 0
        unwanted_BT = torch.zeros_like(first_BT) if chunk.trains_BT is None else ~chunk.trains_BT & ~first_BT
        special_BT = torch.isin(chunk.tokens_BT, self.special_ids) & ~first_BT & ~unwanted_BT
        keep_BT = ~(first_BT | unwanted_BT | special_BT)
        norms = [self._norms(site, x_BTD) for site, x_BTD in zip(self.sites, chunk.activations, strict=True)]
        massive_BT = torch.zeros_like(keep_BT)
        if self.config.norm_limit is not None:
            if self.limits is None:
                if not keep_BT.any():
                    raise ActivationError(
                        "the first model batch holds no token row to learn from, only special tokens or ones that "
                        "text.train_on leaves out; check text"
                    )
                self.limits = [self.config.norm_limit * float(norm_BT[keep_BT].median()) for norm_BT in norms]
            for norm_BT, limit in zip(norms, self.limits, strict=True):
                massive_BT |= (norm_BT > limit) & keep_BT
            keep_BT &= ~massive_BT
        self.dropped["first_position"] += int(first_BT.sum())
        self.dropped["special"] += int(special_BT.sum())
        if chunk.trains_BT is not None:
            self.dropped["not_trained"] = self.dropped.get("not_trained", 0) + int(unwanted_BT.sum())
        self.dropped["massive"] += int(massive_BT.sum())
        self.kept += int(keep_BT.sum())
        return keep_BT

    def _norms(self, site: Site, x_BTD: Tensor) -> Tensor:
        norm_BT = torch.linalg.vector_norm(x_BTD, dim=-1, dtype=torch.float32).cpu()
        finite_BT = norm_BT.isfinite()
        if not finite_BT.all():
            context, position = (~finite_BT).nonzero()[0].tolist()
            raise ActivationError(
                f"activations at {site} are not finite (first at context {context} of the batch, position {position}); "
                "expected finite numbers; try model.dtype float32, or check the model's weights"
            )
        return norm_BT

    def state(self) -> dict[str, Any]:
        """Limits and counts as JSON data."""
        return {"limits": self.limits, "dropped": dict(self.dropped), "kept": self.kept}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from `state()`.

        Raises:
            ValueError: the data is nothing that `state` gave.
        """
        limits, dropped = state.get("limits"), state.get("dropped")
        kept: Any = state.get("kept")
        if limits is not None and not (
            isinstance(limits, list) and len(limits) == len(self.sites) and all(map(is_number, limits))
        ):
            raise ValueError(f"limits of norms are {str(limits)[:80]}")
        if not isinstance(dropped, dict) or not {*self.dropped} <= {*dropped} or not is_count(kept):
            raise ValueError(f"counts of rows are {str(dropped)[:80]}, {str(kept)[:80]}")
        if not all(map(is_count, dropped.values())):
            raise ValueError(f"counts of rows are {str(dropped)[:80]}")
        self.limits, self.dropped, self.kept = limits, dict(dropped), kept


class RefillInterrupted(Exception):
    """The stop signal came while rows were waited for; whatever was being filled is as it was before."""


def never() -> bool:
    """The default answer to "should this stop early?"."""
    return False


StopSignal = Callable[[], bool]


def interruptible(stop: StopSignal) -> AbstractContextManager[None]:
    """A block that waits for text: where `stop` knows about signals, one ends the block by `RefillInterrupted`."""
    return getattr(stop, "waiting", nullcontext)()
