"""How the compiled loops of `loops.py` are run: on which tensors, and on as many threads as torch has.

This stands apart from the loops so that Numba, which takes a second to import, is imported when the first of them runs:
callers import `loops` where they run one.
"""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from unbraid.kernels import host


def loops_take(tensor: Tensor) -> bool:
    """Whether the compiled loops work on this tensor: single or double precision, on a CPU."""
    return not host.reading_waits(tensor) and tensor.dtype in (torch.float32, torch.float64)


def in_parallel(loop: Callable[..., Any], edges: list[int], *arguments: Tensor | float | int) -> None:
    """Call `loop(part, start, end, *arguments)` for each range between neighbouring edges."""
    arrays = [value.detach().numpy() if isinstance(value, Tensor) else value for value in arguments]
    parts = [(part, start, end) for part, (start, end) in enumerate(itertools.pairwise(edges))]
    if torch.get_num_threads() == 1 or len(parts) == 1:
        for part in parts:
            loop(*part, *arrays)
        return
    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for done in [threads.submit(loop, *part, *arrays) for part in parts]:
            done.result()
