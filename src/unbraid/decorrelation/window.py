"""Select on a window, penalise on the batch: what a penalty remembers between calls, all of it tensors.

One batch holds a handful of firings of most features, so the top of its correlations is mostly noise; the codes of the
last few batches, kept without gradient (1 MiB a batch at 2048 x 64 entries), hold enough to tell pairs that belong
together. Both modules here grow and shrink, so loading a state takes over the shapes it finds.
"""

from typing import Any

import torch
from torch import Tensor, nn

from unbraid.decorrelation.entries import Entries
from unbraid.decorrelation.selection import Selection
from unbraid.errors import CodesError
from unbraid.kernels.pattern import Pattern

FADING = 0.99
"""What a firing counts for, a batch later: the memory of `FiringCounts` is about a hundred batches."""
LIMITS = ("fraction", "max_pairs_per_feature", "co-activation")
PATHS = ("coactive", "blocks", "tiled", "naive", "neighbours")


class ElasticState(nn.Module):
    """A module whose buffers take the shape and dtype of the state they are loaded from."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, buffer in self._buffers.items():
            loaded = state_dict.get(prefix + name)
            if buffer is not None and loaded is not None:
                self._buffers[name] = torch.empty_like(loaded, device=buffer.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def remember(self, **tensors: Tensor) -> None:
        """Replace buffers by name."""
        for name, tensor in tensors.items():
            self._buffers[name] = tensor.detach()


class CodesWindow(ElasticState):
    """The codes of the last `size` batches, without gradient."""

    row_counts: Tensor
    lengths: Tensor
    indices: Tensor
    values: Tensor

    def __init__(self, size: int):
        super().__init__()
        self.size = size
        self.register_buffer("row_counts", torch.empty(0, dtype=torch.int64))
        self.register_buffer("lengths", torch.empty(0, dtype=torch.int64))
        self.register_buffer("indices", torch.empty(0, dtype=torch.int32))
        self.register_buffer("values", torch.empty(0))

    @property
    def n_batches(self) -> int:
        """Batches held."""
        return self.row_counts.numel()

    @property
    def full(self) -> bool:
        """Whether `size` batches are held."""
        return self.n_batches == self.size

    def push(self, entries: Entries) -> None:
        """Add a batch; the oldest leaves when there are more than `size`."""
        values = entries.values.detach()
        device, dtype = values.device, torch.promote_types(values.dtype, torch.float32)
        dropped = max(0, self.n_batches + 1 - self.size)
        dropped_rows = int(self.row_counts[:dropped].sum())
        dropped_entries = int(self.lengths[:dropped_rows].sum())
        n_rows = torch.tensor([entries.n_rows], device=device)
        self.remember(
            row_counts=torch.cat([self.row_counts[dropped:].to(device), n_rows]),
            lengths=torch.cat([self.lengths[dropped_rows:].to(device), entries.pattern.offsets.diff()]),
            indices=torch.cat([self.indices[dropped_entries:].to(device), entries.indices.int()]),
            values=torch.cat([self.values[dropped_entries:].to(device, dtype), values.to(dtype)]),
        )

    def clear(self) -> None:
        """Forget every batch."""
        self.remember(**{name: buffer[:0] for name, buffer in self._buffers.items() if buffer is not None})

    def entries(self, n_features: int) -> Entries:
        """All batches as one."""
        offsets = torch.cat([self.lengths.new_zeros(1), self.lengths.cumsum(0)])
        return Entries(Pattern(offsets, self.indices.long(), n_features), self.values)


class FiringCounts(ElasticState):
    """How often each feature fired lately: on so many tokens, older batches fading."""

    counts: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("counts", torch.zeros(0, dtype=torch.float64))

    def add(self, support: Tensor) -> None:
        """Count a batch: its tokens [N] on which each feature fires.

        Raises:
            CodesError: it has another number of features than those before.
        """
        fired = support.double()
        if self.counts.numel() not in (0, fired.numel()):
            raise CodesError(
                f"these codes have {fired.numel()} features, those before had {self.counts.numel()}; expected the same "
                "SAE on every call; make one penalty for each SAE"
            )
        earlier = self.counts.to(fired.device) if self.counts.numel() else torch.zeros_like(fired)
        self.remember(counts=earlier * FADING + fired)

    def first_is_rarer(self, first: Tensor, second: Tensor) -> Tensor:
        """[P] of pairs of features: 1 where the first fired less than the second, 0 where more, else a half."""
        if self.counts.numel() == 0:
            return torch.full(first.shape, 0.5, dtype=torch.float64, device=first.device)
        return (1 + torch.sign(self.counts[second] - self.counts[first])) / 2


class RememberedSelection(ElasticState):
    """The S in force, what is logged about it, and how long ago it was chosen."""

    first: Tensor
    second: Tensor
    correlations: Tensor
    numbers: Tensor
    counts: Tensor

    def __init__(self):
        super().__init__()
        self.register_buffer("first", torch.empty(0, dtype=torch.int64))
        self.register_buffer("second", torch.empty(0, dtype=torch.int64))
        self.register_buffer("correlations", torch.empty(0, dtype=torch.float64))
        # mean, std, tau, low_support, overlap (-1: there was no selection before)
        self.register_buffer("numbers", torch.zeros(5, dtype=torch.float64))
        # 1 once there is a selection, calls since, nominal, n_live, limit, path, n_features
        self.register_buffer("counts", torch.zeros(7, dtype=torch.int64))

    @property
    def known(self) -> bool:
        """Whether there has been a selection."""
        return bool(self.counts[0])

    @property
    def calls_since(self) -> int:
        """Calls since the selection."""
        return int(self.counts[1])

    def age(self) -> None:
        """Count a call."""
        self.counts[1] += 1

    def require_width(self, n_features: int) -> None:
        """Raises `CodesError` when the state belongs to codes of another width."""
        if self.known and int(self.counts[6]) != n_features:
            raise CodesError(
                f"codes have {n_features} features, but the remembered selection is for {int(self.counts[6])}; "
                "expected the same width on every call; use one SelectiveDecorrelation per SAE"
            )

    def replace(self, selection: Selection, tau: float, path: str, n_features: int) -> None:
        """Take a new selection; its overlap with the one before is worked out here."""
        overlap = -1.0
        if self.known and selection.first.numel():
            ids = selection.first * n_features + selection.second
            earlier = self.first * n_features + self.second
            overlap = float(torch.isin(ids, earlier, assume_unique=True).double().mean())
        numbers = [selection.mean, selection.std, tau, selection.low_support, overlap]
        counts = [1, 0, selection.nominal, selection.n_live]
        counts += [LIMITS.index(selection.limit), PATHS.index(path), n_features]
        device = selection.first.device
        self.remember(
            first=selection.first,
            second=selection.second,
            correlations=selection.correlations,
            numbers=torch.tensor(numbers, dtype=torch.float64, device=device),
            counts=torch.tensor(counts, device=device),
        )

    def recall(self) -> tuple[Selection, float, str, float | None]:
        """The selection in force, its tau, the path it came by, and its overlap with the one before."""
        mean, std, tau, low_support, overlap = self.numbers.tolist()
        _, _, nominal, n_live, limit, path, _ = self.counts.tolist()
        selection = Selection(
            self.first, self.second, self.correlations, nominal, mean, std, n_live, LIMITS[limit], low_support
        )
        return selection, tau, PATHS[path], None if overlap < 0 else overlap
