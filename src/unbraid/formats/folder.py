"""How an SAE folder is read and written, whatever its layout: whole or not at all, never by running what is in it."""

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from unbraid.errors import FormatError
from unbraid.json_files import read_json_object
from unbraid.owned_folders import check_replaceable, written_folder
from unbraid.sae import SAE

KIND = "SAE"
SETTINGS_FILES = ("cfg.json", "config.json")
FILES_OF_0_1 = {*SETTINGS_FILES, "sae_weights.safetensors", "sparsity.safetensors", "sae.safetensors", "ae.pt"}


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


def written_whole(folder: Path) -> AbstractContextManager[Path]:
    """Write into the folder this yields; on leaving it becomes `folder`, replacing an SAE folder unbraid wrote.

    Raises:
        FormatError: the place cannot be written, or holds something other than an SAE of unbraid's.
    """
    return written_folder(folder, KIND, error=FormatError, recognise=is_of_version_0_1)


def check_sae_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a place that `written_whole` would refuse, and without `overwrite` one that holds an SAE.

    Raises:
        FormatError: saying what is there.
    """
    check_replaceable(folder, KIND, error=FormatError, overwrite=overwrite, recognise=is_of_version_0_1)


def is_of_version_0_1(folder: Path) -> bool:
    """Whether unbraid 0.1, which left no marker, wrote this SAE folder: only its files, and its settings in one."""
    if not all(path.name in FILES_OF_0_1 and path.is_file() and not path.is_symlink() for path in folder.iterdir()):
        return False
    for name in SETTINGS_FILES:
        with contextlib.suppress(ValueError):
            config = read_json_object(folder / name, ValueError)
            metadata = config.get("metadata")
            if "unbraid" in config or (isinstance(metadata, dict) and "unbraid" in metadata):
                return True
    return False


def refuse_links_out(place: Path) -> None:
    """A dictionary may come from anywhere, so no file of it is read through a link that leaves its folder.

    In the cache of the Hugging Face hub every file is a link to the repository's `blobs`; these are allowed.

    Args:
        place: the dictionary's folder, or the file that is one.

    Raises:
        FormatError: naming the link.
    """
    folder = place if place.is_dir() else place.parent
    real = folder.resolve()
    snapshots = next((parent for parent in (real, *real.parents) if parent.name == "snapshots"), None)
    roots = [real] if snapshots is None else [real, snapshots.parent / "blobs"]
    for path in sorted(folder.iterdir()) if place.is_dir() else []:
        if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in roots):
            raise FormatError(
                f"{str(path)!r} is a symbolic link out of its folder; expected the file itself; put the file there"
            )


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write tensors as safetensors.

    Raises:
        OSError: the disk is full, or writing is not permitted.
    """
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
