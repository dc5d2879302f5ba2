"""Counts, on a CPU, what would make the host wait for an accelerator.

Counted are numbers that are read (`item`, `float`, `bool`, `tolist`), operations whose result has a shape that depends
on the data (`nonzero`, masks as indices, `unique`, repeats of unknown length) and copies of Python numbers to the
device. Tensors that would be on the host are not counted: buffers that their module keeps there, tensors made of
numbers without naming a device, and what is made of these alone.
"""

import traceback
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from unbraid.kernels.host import WithHostBuffers

aten = torch.ops.aten
SHAPED_BY_DATA = {
    aten.nonzero.default: "nonzero",
    aten.masked_select.default: "masked_select",
    aten.unique_consecutive.default: "unique",
    aten._unique2.default: "unique",
    aten.bincount.default: "bincount",
}


class Synchronisations(TorchDispatchMode):
    """While it is active: `kinds` counts by kind, `places` by kind and the line of unbraid that asked.

    Args:
        modules: whose buffers may be on the host.
    """

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.kinds: Counter[str] = Counter()
        self.places: Counter[str] = Counter()
        self._on_host: dict[int, Any] = {}
        self._numbers = _Numbers(self)
        for module in (inner for outer in modules for inner in outer.modules()):
            for name in getattr(module, "on_host", ()) if isinstance(module, WithHostBuffers) else ():
                self.keep(getattr(module, name))

    def __enter__(self) -> "Synchronisations":
        self._numbers.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._numbers.__exit__(*error)

    @property
    def total(self) -> int:
        """Of all kinds."""
        return sum(self.kinds.values())

    def keep(self, tensor: Tensor) -> None:
        """Take a tensor for one on the host; the storage is held, so that no other gets its address."""
        storage = tensor.untyped_storage()
        self._on_host[storage._cdata] = storage

    def on_host(self, tensor: Tensor) -> bool:
        """Whether a tensor is one on the host."""
        return tensor.layout == torch.strided and tensor.untyped_storage()._cdata in self._on_host

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        here = bool(inputs) and all(map(self.on_host, inputs))
        if (kind := kind_of(function, args, kwargs)) and not here:
            self.note(kind)
        result = function(*args, **kwargs)
        for leaf in tree_leaves(result) if here else ():
            if isinstance(leaf, Tensor):
                self.keep(leaf)
        return result

    def note(self, kind: str) -> None:
        """Count one."""
        ours = [frame for frame in traceback.extract_stack() if "/unbraid/" in frame.filename]
        where = f"{ours[-1].filename.rsplit('/unbraid/', 1)[1]}:{ours[-1].lineno}" if ours else "elsewhere"
        self.kinds[kind] += 1
        self.places[f"{kind} {where}"] += 1


class _Numbers(TorchFunctionMode):
    """What never reaches the dispatcher on a CPU: lists made of tensors, and tensors made of numbers."""

    def __init__(self, count: Synchronisations):
        super().__init__()
        self.count = count

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is Tensor.tolist and not self.count.on_host(args[0]):
            self.count.note("read")
        result = function(*args, **kwargs)
        if function in (torch.tensor, torch.as_tensor) and not isinstance(args[0], Tensor):
            if kwargs.get("device") is None:
                self.count.keep(result)
            else:
                self.count.note("upload")
        return result


def kind_of(function: Any, args: tuple, kwargs: dict) -> str | None:
    """What kind of wait an operation is, if any."""
    if function is aten._local_scalar_dense.default:
        return "read"
    if function is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        return "repeat_interleave"
    if function is aten.index.Tensor and any(map(is_mask, args[1])):
        return "mask"
    if function in (aten.index_put_.default, aten.index_put.default) and any(map(is_mask, args[1])):
        return None if args[2].numel() == 1 else "mask"  # One number goes by masked_fill.
    return SHAPED_BY_DATA.get(function)


def is_mask(index: Tensor | None) -> bool:
    """Whether an index is a mask."""
    return index is not None and index.dtype in (torch.bool, torch.uint8)
