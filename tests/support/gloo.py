"""Functions run on several processes that talk by gloo, for tests: one process is this one."""

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import get_context
from typing import Any

import torch
import torch.distributed as dist

from unbraid.distributed.ranks import ALONE, Ranks

PROCESSES = get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "unbraid.training.loop"])


def on_ranks(size: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`work(ranks, *arguments)` on each of `size` ranks; what they returned (plain data or NumPy arrays), by rank."""
    if size == 1:
        return [work(ALONE, *arguments)]
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(size, mp_context=PROCESSES) as pool:
        jobs = [pool.submit(_at_work, f"{folder}/meet", rank, size, work, arguments) for rank in range(size)]
        return [job.result() for job in jobs]


def _at_work(meeting_place: str, rank: int, size: int, work: Callable[..., Any], arguments: tuple) -> Any:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting_place}", rank=rank, world_size=size, timeout=timedelta(minutes=5)
    )
    result = work(Ranks(dist.group.WORLD), *arguments)
    dist.barrier()
    dist.destroy_process_group()
    return result
