"""Gemma Scope 2's crosscoders and cross-layer transcoders: a folder with `params_layer_I.safetensors` for each layer.

Each file has `w_enc[D,n] b_enc[n] threshold[n] w_dec[n,L,D] b_dec[D]` and perhaps `affine_skip_connection[D,D]`: the
features of one layer, what they write into all L layers, and the bias of that layer. The layers of a crosscoder stand
in its folder's name, `layer_5_9_12_15_width_...`; a cross-layer transcoder has all of a model's.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from unbraid.errors import FormatError
from unbraid.formats.folder import SAEFolder
from unbraid.formats.gemma_scope_2 import NAMES, SKIP, model_name
from unbraid.formats.metadata import checked_metadata
from unbraid.formats.published import NOTHING, Known, path_words
from unbraid.formats.reading import read_json, read_tensors, require_settings, text
from unbraid.formats.several_sites import SeveralSitesDictionary, numbered_files, require_several_sites, stacked
from unbraid.formats.weights import require

FILE = re.compile(r"params_layer_(\d{1,3})\.safetensors")
CONFIG = "config.json"
KINDS = {"crosscoder": ("hook_resid_post", "hook_resid_post"), "clt": ("mlp.hook_in", "hook_mlp_out")}
"""Kind -> what is read and written in each layer."""


def recognises(folder: Path) -> bool:
    """Whether `folder` looks like this layout."""
    return folder.is_dir() and any(FILE.fullmatch(path.name) for path in folder.iterdir())


def load(folder: Path, known: Known = NOTHING) -> SAEFolder:
    """Read all layers of a folder.

    Raises:
        FormatError: a dictionary of one site is wanted, or a file is missing, damaged or of another shape than others.
    """
    where, words = str(folder), path_words(folder)
    require_several_sites(known, where, "a crosscoder or cross-layer transcoder of Gemma Scope 2")
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    require_settings(config, {"architecture": ("jump_relu", None)}, where)
    kind = text(config, "type", where) or ("crosscoder" if "crosscoder" in words else "clt")
    if kind not in KINDS:
        raise FormatError(f"{where}: type is {kind!r}, but there is a file for each of several layers; expected clt")
    files = numbered_files(folder, FILE)
    tensors = stacked([_part(path, len(files)) for path in files], where)
    tensors["threshold"] = tensors["threshold"].clamp_min(0.0)
    total = tensors["b_enc"].numel()
    if config.get("width") not in (None, total, total // len(files)):
        raise FormatError(f"{where}: width is {config['width']}, but the weights are {total}; correct {CONFIG}")
    metadata = _where_from(config, words, kind, len(files), where) | known.metadata
    sae = SeveralSitesDictionary("crosscoder" if kind == "crosscoder" else "cross_layer_transcoder", tensors)
    return SAEFolder(sae.eval().requires_grad_(False), "gemma_scope_2_layers", checked_metadata(metadata, where))


def _part(path: Path, layers: int) -> dict[str, Tensor]:
    state, where = read_tensors(path), str(path)
    names = NAMES | ({"W_skip": SKIP} if SKIP in state else {})
    require(state, tuple(names.values()), where)
    part = {ours: state[theirs] for ours, theirs in names.items()}
    d_in, n = part["W_enc"].shape if part["W_enc"].ndim == 2 else (0, 0)
    shapes = {"b_enc": (n,), "threshold": (n,), "W_dec": (n, layers, d_in), "b_dec": (d_in,), "W_skip": (d_in, d_in)}
    for name, tensor in part.items():
        if tuple(tensor.shape) != shapes.get(name, (d_in, n)):
            raise FormatError(
                f"{where}: {names[name]} is {tuple(tensor.shape)} in a folder of {layers} layers; expected "
                f"{shapes.get(name, '[D, n]')}; download the files again"
            )
    return part


def _where_from(config: dict[str, Any], words: str, kind: str, count: int, where: str) -> dict[str, Any]:
    """Model and hooks, from the configuration or else from the path."""
    named = re.search(r"/layer_(\d+(?:_\d+)+)_width", words)
    layers = [int(layer) for layer in named[1].split("_")] if named else list(range(count))
    metadata: dict[str, Any] = {"prepend_bos": True, "model_name": model_name(config, words, where)}
    if len(layers) == count and (named or kind == "clt"):
        for key, hook in zip(("hook_names", "hook_names_out"), KINDS[kind], strict=True):
            metadata[key] = [f"blocks.{layer}.{hook}" for layer in layers]
    return metadata
