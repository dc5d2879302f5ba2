"""Llama Scope of the R1 distillation of Llama 3.1 8B: `config.json` and `sae_weights.safetensors`.

Tensors as in `llama_scope`, all in the units of training, on x * s, with a threshold per feature in
`log_jumprelu_threshold[N]`. The files do not say s; SAELens' registry does.
"""

import re
from pathlib import Path

from unbraid.errors import FormatError
from unbraid.formats.folder import SAEFolder
from unbraid.formats.llama_scope import MODEL, NAMES, our_names
from unbraid.formats.metadata import checked_metadata
from unbraid.formats.published import NOTHING, Known
from unbraid.formats.reading import read_json, read_tensors, require_widths, tensor_names, text
from unbraid.formats.weights import Weights, require, scale_input, subtract_input_bias

CONFIG, WEIGHTS, LOG_THRESHOLD = "config.json", "sae_weights.safetensors", "log_jumprelu_threshold"


def recognises(folder: Path) -> bool:
    """Whether `folder` looks like this layout."""
    return (folder / CONFIG).is_file() and LOG_THRESHOLD in tensor_names(folder / WEIGHTS)


def load(folder: Path, known: Known = NOTHING) -> SAEFolder:
    """Read a folder, as SAELens does.

    Raises:
        FormatError: naming what is missing; s among it.
    """
    where = str(folder / CONFIG)
    config = read_json(folder / CONFIG)
    state = read_tensors(folder / WEIGHTS)
    require(state, (*NAMES, LOG_THRESHOLD), str(folder / WEIGHTS))
    if known.norm_scaling_factor is None:
        raise FormatError(
            f"{where}: activations were scaled in training and the files do not say by what; load it by its registry "
            "name, or give unbraid.load(path, norm_scaling_factor=...)"
        )
    tensors = our_names(state) | {"threshold": state[LOG_THRESHOLD].double().exp().float()}
    weights = Weights("jumprelu", tensors).folded(where, scale_input(known.norm_scaling_factor), subtract_input_bias)
    require_widths(config, {"d_model": weights.tensors["W_enc"].shape[0]}, where)
    hook = text(config, "hook_point_in", where)
    layer = re.match(r"blocks\.(\d{1,4})\.", hook or "")
    metadata = {"model_name": MODEL, "hook_name": hook, "hook_layer": int(layer[1]) if layer else None}
    return SAEFolder(weights.to_sae(where), "llama_scope_r1", checked_metadata(metadata | known.metadata, where))
