"""Where numbers live that Python decides by: on the host, so that nobody waits for them.

On an accelerator work is only queued. Reading one number of a tensor there, or asking for a result whose shape depends
on the data, waits until everything queued has been done, and until then nothing new is queued. So a training step takes
another way to the same result on such a device: shapes are known beforehand, what depends on a number is decided on the
device, and counters stay on the CPU. On a CPU a number is read for nothing, and the shorter way is taken.
"""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn


def reading_waits(tensor: Tensor) -> bool:
    """Whether reading a number of this tensor makes the host wait."""
    return tensor.device.type != "cpu"


class WithHostBuffers(nn.Module):
    """A module of which some buffers stay on the CPU, and keep their dtype, wherever the module goes."""

    on_host: ClassVar[tuple[str, ...]] = ()
    """Names of these buffers."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kept = {name: self._buffers[name] for name in self.on_host if name in self._buffers}
        module = super()._apply(fn, recurse)
        self._buffers.update(kept)
        return module
