"""SAEs in and out of the layouts researchers already have; `load` recognises which one a path holds.

A layout is a module with `recognises(folder)`, `load(folder)` and, where others read it, `save(sae, folder, ...)`.
Round trips are exact in what matters, codes and reconstructions; what a layout cannot hold is refused by name.
"""

from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from unbraid.errors import FormatError
from unbraid.formats import dictionary_learning, gemma_scope, sae_lens, sparsify
from unbraid.formats.folder import SAEFolder
from unbraid.sae import SAE

__all__ = ["LAYOUTS", "SAEFolder", "load", "open_folder", "save"]

LAYOUTS: dict[str, ModuleType] = {
    "sae_lens": sae_lens,
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
    "gemma_scope": gemma_scope,
}
"""Name -> module; the order in which `load` tries them."""


def load(path: Path | str, **options: Any) -> SAE:
    """The SAE at `path`, in any known layout, ready for inference on raw activations.

    Args:
        path: the folder, or one of the files in it.
        options: as for `open_folder`.

    Raises:
        FormatError: no known layout is recognised, or the one that is cannot be held exactly.
    """
    return open_folder(path, **options).sae


def open_folder(path: Path | str, *, norm_scaling_factor: float | None = None) -> SAEFolder:
    """The SAE at `path` with what its folder says about it.

    Args:
        path: the folder, or one of the files in it.
        norm_scaling_factor: what activations were multiplied with before the SAE saw them, for layouts that do not
            store it: SAELens' "expected_average_only_in".

    Raises:
        FormatError: no known layout is recognised, or the one that is cannot be held exactly.
    """
    folder = Path(path)
    folder = folder.parent if folder.is_file() else folder
    for layout in LAYOUTS.values():
        if layout.recognises(folder):
            found = layout.load(folder, **({"norm_scaling_factor": norm_scaling_factor} if layout is sae_lens else {}))
            found.sae.metadata = {name: value for name, value in found.metadata.items() if name != "unbraid"}
            return found
    raise FormatError(f"{str(path)!r} is no SAE folder unbraid reads; {_what_is_there(folder)}")


def save(
    sae: SAE,
    folder: Path | str,
    *,
    layout: str = "sae_lens",
    metadata: dict[str, Any] | None = None,
    frequency_N: Tensor | None = None,
) -> Path:
    """Write `sae`, which acts on raw activations, into `folder`, whole or not at all; returns the folder.

    Args:
        sae: any architecture the layout can hold.
        folder: made, or replaced as a whole.
        layout: a layout others can read; sae_lens holds every architecture.
        metadata: what is known about where the SAE belongs: model_name, hook_name, context_size, ...
        frequency_N: `[N]` share of tokens each feature fired on, for layouts that store it.

    Raises:
        FormatError: the layout cannot hold this SAE, or the folder cannot be written.
    """
    return writable_layout(layout).save(sae, Path(folder), metadata, frequency_N)


def writable_layout(name: str) -> ModuleType:
    """The module that writes the layout `name`.

    Raises:
        FormatError: there is none.
    """
    writable = {key: module for key, module in LAYOUTS.items() if hasattr(module, "save")}
    key = name.replace("-", "_").lower()
    if key not in writable:
        raise FormatError(f"no layout {name!r} can be written; expected one of {', '.join(writable)}")
    return writable[key]


def _what_is_there(folder: Path) -> str:
    layouts = (
        "expected cfg.json with sae_weights.safetensors (SAELens) or sae.safetensors (sparsify), config.json with "
        "ae.pt (dictionary_learning), or params.npz (Gemma Scope)"
    )
    if not folder.is_dir():
        return f"there is no such folder; {layouts}"
    below = {file.parent for depth in ("*/*", "*/*/*") for file in folder.glob(depth) if file.is_file()}
    inside = sorted(path for path in below if any(layout.recognises(path) for layout in LAYOUTS.values()))
    if inside:
        names = ", ".join(str(path.relative_to(folder)) for path in inside[:8])
        return f"these folders inside it are: {names}{', ...' if len(inside) > 8 else ''}; name one of them"
    return layouts
