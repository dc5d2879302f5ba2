"""One large CPU buffer that is handed round instead of being returned to the operating system.

A [2048, 8192] product written into fresh memory spends a quarter of its time on page faults. `take` gives the buffer of
the last `give` when it fits; whoever wants to keep the memory (codes on the dense path) simply does not give it back.
CUDA needs none of this: its allocator keeps freed memory.
"""

import torch
from torch import Tensor

_spare: list[Tensor] = []


def take(n_rows: int, n_columns: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised `[n_rows, n_columns]` CPU tensor, owned by the caller."""
    try:
        buffer = _spare.pop()
    except IndexError:
        buffer = None
    if buffer is None or buffer.shape != (n_rows, n_columns) or buffer.dtype != dtype:
        buffer = torch.empty(n_rows, n_columns, dtype=dtype)
    return buffer


def give(buffer: Tensor) -> None:
    """Hand a buffer from `take` to the next taker; the caller must not use it any more."""
    if buffer.device.type == "cpu":
        _spare[:] = [buffer]


def drop() -> None:
    """Let the spare buffer go."""
    _spare.clear()
