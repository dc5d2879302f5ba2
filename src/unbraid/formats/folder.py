"""How an SAE folder is read and written, whatever its layout: whole or not at all, never by running what is in it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from unbraid.errors import FormatError
from unbraid.files import sync
from unbraid.sae import SAE

REPLACEABLE = {"cfg.json", "config.json", "sae_weights.safetensors", "sparsity.safetensors", "sae.safetensors", "ae.pt"}
"""A folder with anything else in it is never replaced."""


@dataclass(frozen=True)
class SAEFolder:
    """What an SAE folder holds.

    Attributes:
        sae: ready for inference on raw activations.
        layout: the layout it was read from, such as "sae_lens".
        metadata: what the folder says about where the SAE belongs; `model_name` and `hook_name` among it if known.
        log10_frequency_N: `[N]` log10 of the share of tokens each feature fired on, if stored.
    """

    sae: SAE
    layout: str
    metadata: dict[str, Any] = field(default_factory=dict)
    log10_frequency_N: Tensor | None = None


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Write into the folder this yields; on leaving it becomes `folder`, replacing an SAE folder that was there.

    Raises:
        FormatError: the place cannot be written, or holds something other than an SAE.
    """
    partial, old = (folder.with_name(f".{folder.name}.{suffix}") for suffix in ("partial", "old"))
    try:
        if folder.exists() and not folder.is_dir():
            raise FormatError(f"{str(folder)!r} is a file; expected a folder to write; choose another place")
        foreign = sorted(path.name for path in folder.glob("*") if path.name not in REPLACEABLE or path.is_dir())
        if foreign:
            raise FormatError(
                f"{str(folder)!r} holds {', '.join(foreign[:5])}, which no SAE folder has; expected a new folder or "
                "one that holds an SAE; choose another folder"
            )
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            for path in (*partial.rglob("*"), partial):
                sync(path)
            if folder.exists():
                folder.replace(old)
            partial.replace(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
        sync(folder.parent)
    except OSError as error:
        raise FormatError(
            f"cannot write the SAE folder {str(folder)!r}: {error.strerror or error}; expected a writable place with "
            "room; choose another folder"
        ) from error


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
