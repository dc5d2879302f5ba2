"""The few collectives that unbraid needs.

Everything that runs on many ranks takes a `Ranks`. With one process every collective is a no-op, so there is one code
path; `ALONE` is the `Ranks` of a run without `torchrun`. Payloads are counted, because the cost of scaling is bytes,
and the counts are compared with the formulas in docs/distributed.md.
"""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unbraid.errors import RankLostError


class Ranks:
    """A group of processes.

    Args:
        group: a process group of torch.distributed; none for a process alone.

    Attributes:
        rank: this process's place among them.
        size: how many they are.
        payload: bytes handed over so far by kind of collective: what is summed or broadcast once, what is gathered
            once a rank.
    """

    def __init__(self, group: dist.ProcessGroup | None = None):
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.payload: Counter[str] = Counter()

    @property
    def first(self) -> bool:
        """Whether this rank prints and writes what belongs to all ranks."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place of `tensor`, which is returned; the same bits everywhere."""
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def min(self, tensor: Tensor) -> Tensor:
        """The minimum over all ranks, in place."""
        return self._reduce(tensor, dist.ReduceOp.MIN)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        return bool(self.sum(torch.tensor(int(flag)))) if self.size > 1 else flag

    def total(self, *numbers: int | float) -> list[float]:
        """Sums of numbers over all ranks, in float64."""
        return self.sum(torch.tensor(numbers, dtype=torch.float64)).tolist()

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, all of one shape."""
        if self.size == 1:
            return [tensor]
        gathered = [torch.empty_like(tensor) for _ in range(self.size)]
        with self._counted("gather", self.size * tensor.nbytes):
            dist.all_gather(gathered, tensor.contiguous(), group=self._group)
        return gathered

    def gather_ragged(self, vector: Tensor) -> list[Tensor]:
        """Every rank's vector, of any length; sent padded to the longest."""
        if self.size == 1:
            return [vector]
        lengths = [int(n) for n in self.gather(torch.tensor([vector.numel()]))]
        padded = vector.new_zeros(max(lengths))
        padded[: vector.numel()] = vector
        return [part[:n] for part, n in zip(self.gather(padded), lengths, strict=True)]

    def gather_json(self, data: Any) -> list[Any]:
        """Every rank's plain data."""
        if self.size == 1:
            return [data]
        return [_from_bytes(part) for part in self.gather_ragged(_as_bytes(data))]

    def united(self, data: dict[str, Any]) -> dict[str, Any]:
        """Every rank's entries in one dict."""
        return {key: value for rank in self.gather_json(data) for key, value in rank.items()}

    def broadcast(self, tensor: Tensor, source: int) -> Tensor:
        """The tensor of rank `source`, in place."""
        if self.size > 1:
            assert self._group is not None
            with self._counted("broadcast", tensor.nbytes):
                dist.broadcast(tensor, dist.get_global_rank(self._group, source), group=self._group)
        return tensor

    def broadcast_json(self, data: Any) -> Any:
        """The first rank's plain data."""
        if self.size == 1:
            return data
        text = _as_bytes(data) if self.first else torch.empty(0, dtype=torch.uint8)
        length = self.broadcast(torch.tensor([text.numel()]), 0)
        return _from_bytes(self.broadcast(text if self.first else text.new_empty(int(length)), 0))

    def wait(self) -> None:
        """Return when every rank has come here."""
        self.any(False)

    @contextmanager
    def first_ahead(self) -> Iterator[None]:
        """The first rank goes through the block before the others do: what it leaves on disk, they find done."""
        if not self.first:
            self.wait()
        yield
        if self.first:
            self.wait()

    def _reduce(self, tensor: Tensor, operation: Any) -> Tensor:
        if self.size > 1:
            with self._counted("sum", tensor.nbytes):
                dist.all_reduce(tensor, operation, group=self._group)
        return tensor

    @contextmanager
    def _counted(self, kind: str, n_bytes: int) -> Iterator[None]:
        self.payload[kind] += n_bytes
        try:
            yield
        except RuntimeError as error:
            raise RankLostError(
                f"rank {self.rank} lost contact with another rank ({str(error).splitlines()[0]}); expected all "
                f"{self.size} to go on together; see that rank's message, then run `unbraid resume` on this run"
            ) from error


ALONE = Ranks()
"""A process by itself."""


def _as_bytes(data: Any) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(data).encode()), dtype=torch.uint8)


def _from_bytes(text: Tensor) -> Any:
    return json.loads(text.numpy().tobytes())


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: Ranks) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ranks.sum(tensor.clone())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return g, None


def summed(tensor: Tensor, ranks: Ranks) -> Tensor:
    """The sum over all ranks; each rank's own tensor gets the gradient of the sum, which every rank computes itself."""
    return tensor if ranks.size == 1 else _Summed.apply(tensor, ranks)  # pyright: ignore
