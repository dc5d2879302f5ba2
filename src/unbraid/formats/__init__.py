"""SAEs in and out of the layouts researchers already have; `load` recognises which one a path holds.

A layout is a module with `recognises(place)`, `load(place, known)` and, where others read it, `save(sae, folder, ...)`.
Most keep one dictionary per folder; some keep one per file, several in a folder. Round trips are exact in what matters,
codes and reconstructions; what a layout cannot hold is refused by name.
"""

import difflib
import re
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from unbraid.bundled import bundled_folder, is_bundled
from unbraid.errors import FormatError
from unbraid.formats import (
    circuit_tracer_clt,
    connor_rob,
    crosscoder,
    dictionary_learning,
    gemma_scope,
    gemma_scope_2,
    gemma_scope_2_layers,
    linear_layers,
    llama_scope,
    llama_scope_r1,
    llamascopium,
    openai_gpt2,
    qwen_scope,
    registry,
    sae_lens,
    several_layers,
    sparsify,
    transcoder_set,
)
from unbraid.formats.folder import SAEFolder, refuse_links_out
from unbraid.formats.published import Known
from unbraid.formats.weights import inference_form
from unbraid.json_files import is_number
from unbraid.owned_folders import recover
from unbraid.sae import SAE

__all__ = ["LAYOUTS", "SAEFolder", "folder_name", "load", "open_folder", "path_or_name", "save"]

FOLDERS: dict[str, ModuleType] = {
    "sae_lens": sae_lens,
    "dictionary_learning": dictionary_learning,
    "sparsify": sparsify,
    "gemma_scope": gemma_scope,
    "gemma_scope_2": gemma_scope_2,
    "gemma_scope_2_layers": gemma_scope_2_layers,
    "circuit_tracer_clt": circuit_tracer_clt,
    "llama_scope": llama_scope,
    "llama_scope_r1": llama_scope_r1,
    "llamascopium": llamascopium,
    "crosscoder": crosscoder,
    "several_layers": several_layers,
}
"""Layouts with one dictionary per folder; name -> module, in the order in which `load` tries them."""
FILES: dict[str, ModuleType] = {
    "qwen_scope": qwen_scope,
    "transcoder_set": transcoder_set,
    "connor_rob": connor_rob,
    "openai_gpt2": openai_gpt2,
    "linear_layers": linear_layers,
}
"""Layouts with one dictionary per file."""
LAYOUTS = FOLDERS | FILES
WRITABLE = {name: module for name, module in LAYOUTS.items() if hasattr(module, "save")}
OF_A_FOLDER = (
    *("cfg.json", "config.json", "hyperparams.json", "ae.pt", "model_final.pt", "params.npz", "params.safetensors"),
    *("sae_weights.safetensors", "sparsity.safetensors", "sae.safetensors"),
)
"""Files that stand for the folder they lie in."""
WEIGHTS = (".pt", ".pth", ".safetensors")
SPELLINGS = {"sae": "sae_lens", "sparse": "sparsify", "eaisparsify": "sparsify", "dl": "dictionary_learning"}
"""Other names people have for layouts, as `_bare` leaves them."""
MOST_FILES = 200
"""A folder with more files of weights is not looked through."""


def load(path: Path | str, **options: Any) -> SAE:
    """The dictionary at `path`, in any known layout, ready for inference on raw activations.

    Crosscoders of Gemma Scope 2 and cross-layer transcoders from elsewhere take activations `[..., sites, D]`;
    `metadata["hook_names"]` has the sites. Others take those of all sites side by side; `by_site` takes apart what they
    give.

    Args:
        path: the folder, one of the files in it, or a file that is a dictionary of its own; or `smollm2-demo`, which
            comes with unbraid; or a name of SAELens' registry, `release/id`; or a path on the hub,
            `hf://owner/name/folder`.
        options: as for `open_folder`.

    Raises:
        FormatError: no known layout is recognised, or the one that is cannot be held exactly.

    Example:
        >>> sae = load("runs/tiny/saes/resid_post.1_decorrelated")
        >>> f = sae.encode(torch.randn(5, sae.d_in))
        >>> f.shape, sae.decode(f).shape
        (torch.Size([5, 128]), torch.Size([5, 64]))
    """
    return open_folder(path, several_sites=True, **options).sae


def open_folder(
    path: Path | str,
    *,
    norm_scaling_factor: float | None = None,
    decoder_norms: str | None = None,
    known: Known | None = None,
    several_sites: bool = False,
) -> SAEFolder:
    """The dictionary at `path` with what its folder says about it.

    The dictionary's own `metadata` says the same, and its architecture, `d_in`, `d_sae` and `k`.

    Args:
        path: as for `load`.
        norm_scaling_factor: what activations were multiplied with before the dictionary saw them, for layouts that do
            not store it: SAELens' "expected_average_only_in", Llama Scope of R1.
        decoder_norms: for Llama Scope, whether norms of decoder rows come before the threshold ("folded") or are left
            out ("kept"); what its files ask for by default.
        known: the same, and more, from a registry.
        several_sites: read crosscoders and cross-layer transcoders too, which take activations `[..., sites, D]`.

    Raises:
        FormatError: no known layout is recognised, or the one that is cannot be held exactly.
    """
    if decoder_norms not in (None, "folded", "kept"):
        raise FormatError(f"decoder_norms is {decoder_norms!r}; expected 'folded', 'kept' or None")
    known = known or Known(norm_scaling_factor, decoder_norms, several_sites=several_sites)
    factor = known.norm_scaling_factor
    if factor is not None and not (is_number(factor) and factor > 0):
        raise FormatError(f"norm_scaling_factor is {factor!r}; expected a positive number")
    path = path_or_name(path)
    if is_bundled(path):
        path = bundled_folder(str(path))
    if isinstance(path, str):
        return registry.open_named(path, known)
    try:
        recover(path)
        place, layout = _recognised(path)
        refuse_links_out(place)
    except (OSError, ValueError) as problem:  # no permission, a name too long, a NUL byte
        raise FormatError(f"cannot look into {str(path)!r}: {problem}; expected a folder that can be read") from None
    found = layout.load(place, known)
    sae = found.sae
    shape = {"architecture": sae.architecture, "d_in": sae.d_in, "d_sae": sae.n_features, "k": sae.k}
    said = {name: value for name, value in found.metadata.items() if name != "unbraid"}
    sae.metadata = said | {name: value for name, value in shape.items() if value is not None}
    return found


def path_or_name(text: Path | str) -> Path | str:
    """What a user typed: a string for a dictionary's name or a path on the hub, a `Path` for a place here.

    It is a name where nothing here could hold it: `hf://...`, `a/b` without a folder `a`, or `smollm2-demo` where
    nothing is called that. Commands that take either
    pass words through this, because a name made a `Path` is one no more.

    Example:
        >>> path_or_name("hf://google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82")
        'hf://google/gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82'
    """
    if isinstance(text, Path) or text.startswith("hf://") or is_bundled(text):
        return text
    first, slash, _ = text.partition("/")
    try:
        here = first in ("", ".", "..", "~") or Path(first).exists()
    except (OSError, ValueError):  # a name too long, a NUL byte
        here = True
    return text if slash and not here else Path(text)


def folder_name(place: Path | str) -> str:
    """What a folder for results about a dictionary is called: its own folder's name, or its name without slashes."""
    if isinstance(place, str):
        return re.sub(r"[^\w.-]+", "_", place.removeprefix("hf://").strip("/"))
    return (place.parent if place.is_file() else place).resolve().name


def _recognised(path: Path) -> tuple[Path, ModuleType]:
    """What holds the dictionary, and the layout that reads it."""
    if path.is_file() and path.name not in OF_A_FOLDER:
        for layout in FILES.values():
            if layout.recognises(path):
                return path, layout
    folder = path.parent if path.is_file() else path
    for layout in FOLDERS.values():
        if layout.recognises(folder):
            return folder, layout
    files = _dictionaries_in(folder)
    if len(files) == 1:
        return files[0]
    if files:
        names = ", ".join(file.name for file, _ in files[:8]) + (", ..." if len(files) > 8 else "")
        raise FormatError(f"{str(folder)!r} holds {len(files)} dictionaries, one per file: {names}; name one of them")
    if not path.exists():
        raise FormatError(f"there is no {str(path)!r}; expected a run folder or an SAE folder")
    raise FormatError(f"{str(path)!r} is no SAE folder unbraid reads; {_what_is_there(path)}")


def _dictionaries_in(folder: Path) -> list[tuple[Path, ModuleType]]:
    """Files of a folder that are dictionaries of their own."""
    files = sorted(file for file in folder.iterdir() if file.suffix in WEIGHTS) if folder.is_dir() else []
    found = []
    for file in files[:MOST_FILES]:
        layout = next((layout for layout in FILES.values() if layout.recognises(file)), None)
        if layout is not None:
            found.append((file, layout))
    return found


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
        folder: made, or replaced as a whole where it holds an SAE that unbraid wrote.
        layout: a layout others can read; sae_lens holds every architecture.
        metadata: what is known about where the SAE belongs: model_name, hook_name, context_size, ...
        frequency_N: `[N]` share of tokens each feature fired on, for layouts that store it.

    Raises:
        FormatError: the layout cannot hold this SAE, or the folder cannot be written.
    """
    return writable_layout(layout).save(inference_form(sae), Path(folder), metadata, frequency_N)


def writable_layout(name: str) -> ModuleType:
    """The module that writes the layout `name`.

    Raises:
        FormatError: there is none.
    """
    spelled = {_bare(key): key for key in WRITABLE} | SPELLINGS
    key = spelled.get(_bare(name))
    if key is None:
        close = difflib.get_close_matches(_bare(name), spelled, n=1)
        hint = f"; did you mean {spelled[close[0]]!r}?" if close else ""
        raise FormatError(
            f"no layout {name!r} can be written; expected one of {', '.join(WRITABLE)}{hint}; `unbraid export` also "
            "writes circuit_tracer (transcoders of all layers) and neuronpedia (features, with the model)"
        )
    return WRITABLE[key]


def is_transcoder_set(layout: str) -> bool:
    """Whether `layout` names circuit-tracer's, in which transcoders of all layers make one folder."""
    return _bare(layout) in transcoder_set.SPELLINGS


def sae_folders_in(folder: Path) -> list[Path]:
    """The SAE folders directly in a folder that is none itself, by name; nothing where one entry is something else."""
    if not folder.is_dir() or any(layout.recognises(folder) for layout in FOLDERS.values()):
        return []
    inside = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    return inside if all(any(layout.recognises(path) for layout in FOLDERS.values()) for path in inside) else []


def _bare(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def _what_is_there(folder: Path) -> str:
    layouts = (
        "expected cfg.json with sae_weights.safetensors (SAELens) or sae.safetensors (sparsify), config.json with "
        "ae.pt (dictionary_learning), params.npz or params.safetensors (Gemma Scope), or another layout "
        "that docs/formats.md lists"
    )
    if folder.is_file():
        return f"it is a file in none of the known layouts; {layouts}"
    files = (file for depth in ("*/*", "*/*/*") for file in folder.glob(depth) if file.is_file())
    below = {file.parent for file in islice(files, 10 * MOST_FILES)}
    inside = sorted(path for path in below if any(layout.recognises(path) for layout in FOLDERS.values()))
    if inside:
        names = ", ".join(str(path.relative_to(folder)) for path in inside[:8])
        return f"these folders inside it are: {names}{', ...' if len(inside) > 8 else ''}; name one of them"
    return layouts
