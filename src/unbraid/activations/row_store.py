"""Where the buffer's rows lie: on the device that SAEs are trained on if they fit there, else on the host.

On the device a batch is one gather, and no row travels after it has been computed. On the host a batch is gathered into
pinned memory and copied from there while the device goes on with what it has; torch keeps pinned memory and does not
hand it out again before such a copy is done. In both cases nobody waits. On a CPU there is one place, and no copy.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from unbraid.kernels import host

PART = 8192
"""Rows copied to the host at a time, for a checkpoint."""


def fits(n_bytes: int, free: int, reserved: int) -> bool:
    """Whether so many bytes of rows may lie on a device.

    They may take half of what is free and not `reserved`: model passes and evaluations need room as well.

        >>> fits(n_bytes=20, free=100, reserved=50), fits(n_bytes=30, free=100, reserved=50)
        (True, False)
    """
    return 2 * n_bytes <= free - reserved


def free_bytes(device: torch.device) -> int | None:
    """Memory of an accelerator that nobody uses; none where it is not known."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def place_of_rows(n_bytes: int, device: torch.device, reserved: int) -> torch.device:
    """The device itself when so many bytes fit there beside the `reserved` ones, else the host."""
    free = free_bytes(device) if device.type != "cpu" else None
    return device if free is not None and fits(n_bytes, free, reserved) else torch.device("cpu")


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device, without waiting for the copy where pinned memory allows it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class RowStore:
    """Rows in numbered slots, one matrix per site.

    Args:
        capacity: slots.
        widths: of each site's rows.
        dtype: rows are stored in.
        device: where batches are wanted.
        reserved: bytes of the device that are wanted for other things.

    Attributes:
        place: where rows lie.
    """

    def __init__(
        self, capacity: int, widths: Sequence[int], dtype: torch.dtype, device: torch.device, reserved: int = 0
    ):
        self.device = device
        self.place = place_of_rows(capacity * sum(widths) * dtype.itemsize, device, reserved)
        self._rows = [torch.empty(capacity, width, dtype=dtype, device=self.place) for width in widths]

    def write(self, slots: Tensor, rows: Sequence[Tensor]) -> None:
        """Put rows [R, D], one matrix per site, into slots [R], given on the host."""
        here = sent(slots, self.place)
        for stored, rows_RD in zip(self._rows, rows, strict=True):
            stored.index_copy_(0, here, rows_RD.to(self.place, stored.dtype))

    def batch(self, slots: Tensor) -> list[Tensor]:
        """The rows in slots [B], given on the host, in float32 on the device that wants them; nobody waits."""
        if self.place == self.device or self.device.type != "cuda":
            here = sent(slots, self.place)
            return [rows.index_select(0, here).to(self.device, torch.float32) for rows in self._rows]
        return [self._pinned(rows, slots).to(self.device, non_blocking=True).float() for rows in self._rows]

    def stored(self, site: int, slots: Tensor) -> Tensor:
        """The rows of a site in slots [R], as they are stored, on the host."""
        rows = self._rows[site]
        if not host.reading_waits(rows):
            return rows[slots]
        parts = [rows.index_select(0, part.to(self.place)).cpu() for part in slots.split(PART)]
        return torch.cat(parts) if parts else rows[:0].cpu()

    def float32(self, site: int, slots: Tensor) -> Tensor:
        """The rows of a site in slots [R], in float32 where they lie."""
        return self._rows[site].index_select(0, slots.to(self.place)).float()

    @staticmethod
    def _pinned(rows: Tensor, slots: Tensor) -> Tensor:
        staged = torch.empty(len(slots), rows.shape[1], dtype=rows.dtype, pin_memory=True)
        return torch.index_select(rows, 0, slots, out=staged)
