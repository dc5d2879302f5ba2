"""Which rank does what: the axes of a run over many processes.

Every rank takes its share of the model passes (data axis). The SAEs of a run, sites x variants, are dealt out to cells
of ranks (grid axis), and the ranks of a cell split each of its SAEs by features (shard axis). `torchrun` starts the
processes and restarts them; this module only reads what it says.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from unbraid.distributed.ranks import ALONE, Ranks
from unbraid.distributed.shard import Shard
from unbraid.errors import UnbraidError


@dataclass(frozen=True)
class Mesh:
    """A rank's place in the run: among `everyone`, and in cell `cell` of `cells`, among the `shards` of its SAEs."""

    everyone: Ranks = ALONE
    shards: Ranks = ALONE
    cell: int = 0
    cells: int = 1

    def trains(self, index: int) -> bool:
        """Whether the run's SAE number `index` lives in this rank's cell."""
        return index % self.cells == self.cell

    def shard(self, n_features: int) -> Shard:
        """The features this rank holds of an SAE in its cell."""
        return Shard(n_features, self.shards)


SINGLE = Mesh()
"""One process that does everything."""


def shards_per_sae(size: int, n_saes: int, most: int | None) -> int:
    """Over how many of `size` ranks each of `n_saes` SAEs is split: a divisor of `size`, the largest up to `most`.

    Without `most`, as many as leave no rank without an SAE.
    """
    if most is None:
        return next(shards for shards in range(1, size + 1) if size % shards == 0 and size // shards <= n_saes)
    return max(shards for shards in range(1, min(size, most) + 1) if size % shards == 0)


def lay_out(everyone: Ranks, n_saes: int, most: int | None) -> Mesh:
    """The mesh of a run of `n_saes` SAEs; every rank of the run must call this. Neighbours share an SAE."""
    shards = shards_per_sae(everyone.size, n_saes, most)
    cell, cells = everyone.rank // shards, everyone.size // shards
    if shards == 1:
        return Mesh(everyone, ALONE, cell, cells)
    own, _ = dist.new_subgroups(shards)
    assert isinstance(own, dist.ProcessGroup)
    return Mesh(everyone, Ranks(own), cell, cells)


def launched() -> bool:
    """Whether `torchrun` (or another launcher that sets the same variables) started this process beside others."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def restarts() -> int:
    """How often `torchrun` started this process again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


@contextmanager
def joined() -> Iterator[Ranks]:
    """All processes of the run, for as long as the block lasts; alone without a launcher.

    An error leaves with `silent` set on every rank but the one that met it first, so that a user reads it once.
    """
    if not launched():
        yield ALONE
        return
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    store, rank, size = next(rendezvous("env://"))
    # The store outlives a restart (torch 2.13), and under the names it knows it has the addresses of the dead.
    store = PrefixStore(f"attempt {restarts()}", store)
    dist.init_process_group(store=store, rank=rank, world_size=size)
    try:
        yield Ranks(dist.group.WORLD)
    except UnbraidError as error:
        error.silent = store.add("unbraid: ranks that raised", 1) > 1
        raise
    dist.destroy_process_group()
