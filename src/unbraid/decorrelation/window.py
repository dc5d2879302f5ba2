"""What a penalty remembers between calls, all of it tensors: a window of codes, the S and tau in force, firing counts.

One batch holds a handful of firings of most features, so the top of its correlations is mostly noise; the codes of the
last few batches, kept without gradient (1 MiB a batch at 2048 x 64 entries), hold enough to tell pairs that belong
together: S is selected on the window, and penalised on the batch. These modules grow and shrink, so loading a state
takes over the shapes it finds.

tau = mu + sigma falls as pairs come apart, so a penalty that aims at it never stops: the adaptive threshold ratchets
down until it pushes apart what chance alone would put together. A floor stops it there.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from unbraid.config.decorrelation import chance_share
from unbraid.decorrelation.selection import Selection
from unbraid.errors import CodesError, ConfigError
from unbraid.kernels.codes import Codes
from unbraid.kernels.host import WithHostBuffers

ThresholdKind = Literal["batch", "running", "fixed"]

FADING = 0.99
"""What a firing counts for, a batch later: the memory of `FiringCounts` is about a hundred batches."""
LIMITS = ("fraction", "max_pairs_per_feature", "co-activation")


class ElasticState(WithHostBuffers):
    """A module whose buffers take the shape and dtype of the state they are loaded from."""

    def _load_from_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
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

    on_host = ("row_counts",)
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

    def push(self, codes: Codes) -> None:
        """Add a batch; the oldest leaves when there are more than `size`."""
        values = codes.values.detach()
        device, dtype = values.device, torch.promote_types(values.dtype, torch.float32)
        dropped = max(0, self.n_batches + 1 - self.size)
        dropped_rows = int(self.row_counts[:dropped].sum())
        dropped_entries = int(self.lengths[:dropped_rows].sum()) if dropped_rows else 0
        self.remember(
            row_counts=torch.cat([self.row_counts[dropped:], torch.tensor([codes.n_rows])]),
            lengths=torch.cat([self.lengths[dropped_rows:].to(device), codes.offsets.diff()]),
            indices=torch.cat([self.indices[dropped_entries:].to(device), codes.indices.int()]),
            values=torch.cat([self.values[dropped_entries:].to(device, dtype), values.to(dtype)]),
        )

    def clear(self) -> None:
        """Forget every batch."""
        self.remember(**{name: buffer[:0] for name, buffer in self._buffers.items() if buffer is not None})

    def codes(self, n_features: int) -> Codes:
        """All batches as one."""
        offsets = torch.cat([self.lengths.new_zeros(1), self.lengths.cumsum(0)])
        return Codes.unchecked(offsets, self.indices.long(), self.values, n_features)


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
    on_host = ("numbers", "counts")

    def __init__(self):
        super().__init__()
        self.register_buffer("first", torch.empty(0, dtype=torch.int64))
        self.register_buffer("second", torch.empty(0, dtype=torch.int64))
        self.register_buffer("correlations", torch.empty(0, dtype=torch.float64))
        # mean, std, tau, low_support, overlap (-1: there was no selection before)
        self.register_buffer("numbers", torch.zeros(5, dtype=torch.float64))
        # 1 once there is a selection, calls since, nominal, n_live, limit, nothing, n_features
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
        """Take the width of the first codes; raises `CodesError` when later ones have another."""
        width = int(self.counts[6])
        if width == 0 and self.training:
            self.counts[6] = n_features
        elif width not in (0, n_features):
            what = "selection is" if self.known else "batches are"
            raise CodesError(
                f"codes have {n_features} features, but the remembered {what} for {width}; "
                "expected the same width on every call; use one SelectiveDecorrelation per SAE"
            )

    def replace(self, selection: Selection, n_features: int) -> None:
        """Take a new selection; its overlap with the one before is worked out here."""
        overlap = -1.0
        if self.known and selection.first.numel():
            ids = selection.first * n_features + selection.second
            earlier = self.first * n_features + self.second
            overlap = float(torch.isin(ids, earlier, assume_unique=True).double().mean())
        numbers = [selection.mean, selection.std, selection.tau, selection.low_support, overlap]
        counts = [1, 0, selection.nominal, selection.n_live, LIMITS.index(selection.limit), 0, n_features]
        self.remember(
            first=selection.first,
            second=selection.second,
            correlations=selection.correlations,
            numbers=torch.tensor(numbers, dtype=torch.float64),
            counts=torch.tensor(counts),
        )

    def recall(self, refreshed: bool) -> Selection | None:
        """The selection in force, if there has been one; `refreshed` says whether it was made on this call."""
        if not self.known:
            return None
        mean, std, tau, low, overlap = self.numbers.tolist()
        _, _, nominal, n_live, limit, _, _ = self.counts.tolist()
        pairs = self.first, self.second, self.correlations
        earlier = None if overlap < 0 else overlap
        return Selection(*pairs, nominal, mean, std, n_live, LIMITS[limit], low, tau, refreshed, earlier)


def chance_level(n_features: int, n_dimensions: int | float) -> float:
    """sqrt(2 ln N / D): about the largest cosine a feature has with N random directions in D dimensions, at most 1."""
    return min(1.0, math.sqrt(2 * math.log(max(n_features, 1)) / max(n_dimensions, 1)))


class Threshold(WithHostBuffers):
    """tau from mu and sigma: of the latest selection, as a running mean over selections, or fixed; with a floor.

    Args:
        kind: batch (mu + sigma), running (its exponential mean), or fixed.
        tau: the fixed threshold.
        decay: of the running mean, which starts at the first value it sees.
        floor: tau never falls below it: a number, "chance" (`chance_level` of the vectors compared), a share of that
            such as "0.6 chance", or none.
    """

    running: torch.Tensor
    on_host = ("running",)

    def __init__(self, kind: ThresholdKind, tau: float, decay: float, floor: float | str | None):
        super().__init__()
        if kind not in ("batch", "running", "fixed"):
            raise ConfigError(f"threshold = {kind!r} is unknown; expected batch, running or fixed")
        share = chance_share(floor) if isinstance(floor, str) else 0.0
        if share is None:
            raise ConfigError(f"floor = {floor!r} is unknown; expected a number, a share such as '0.6 chance', or none")
        self.kind, self.tau, self.decay, self.floor, self.chance_share = kind, tau, decay, floor, share
        unset = torch.tensor(math.inf, dtype=torch.float64)
        self.register_buffer("running", unset, persistent=kind == "running")

    def forward(self, mean: float, std: float, n_features: int, n_dimensions: int | float) -> float:
        """tau after a selection with this mu and sigma among `n_features` vectors of `n_dimensions`."""
        tau = self.tau if self.kind == "fixed" else mean + std
        if self.kind == "running":
            before = float(self.running)
            if math.isfinite(before):
                tau = self.decay * before + (1 - self.decay) * tau
            if self.training:
                self.running.fill_(tau)
        return self.floored(tau, n_features, n_dimensions)

    def floored(self, tau: float, n_features: int, n_dimensions: int | float) -> float:
        """`tau`, or the floor where that is higher."""
        if self.floor is None:
            return tau
        if isinstance(self.floor, str):
            return max(tau, self.chance_share * chance_level(n_features, n_dimensions))
        return max(tau, self.floor)
