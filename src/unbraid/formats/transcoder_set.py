"""Transcoder sets of circuit-tracer: one file `layer_L.safetensors` per layer of a model.

`W_enc[N,D] b_enc W_dec[N,D] b_dec`, both matrices with one row per feature, and where there are such
`activation_function.threshold[N]` (else ReLU) and `W_skip[D,D]`, applied as x W_skip^T. The MLP's input is read and its
output predicted; `config.yaml` in the folder may name both hooks and the model.
"""

import re
from pathlib import Path
from typing import Any

from unbraid.formats.folder import SAEFolder
from unbraid.formats.imported import Form
from unbraid.formats.metadata import checked_metadata
from unbraid.formats.published import NOTHING, Known, path_words
from unbraid.formats.reading import read_tensors, read_yaml, text
from unbraid.formats.weights import PLAIN, Weights, clamp_threshold, require, transposed

NAME = re.compile(r"layer_(\d{1,4})\.safetensors")
THRESHOLD = "activation_function.threshold"


def recognises(file: Path) -> bool:
    """Whether `file` looks like this layout."""
    return NAME.fullmatch(file.name) is not None and file.is_file()


def load(file: Path, known: Known = NOTHING) -> SAEFolder:
    """Read the transcoder of one layer.

    Raises:
        FormatError: the file is damaged.
    """
    where, layer = str(file), int(NAME.fullmatch(file.name)[1])  # pyright: ignore[reportOptionalSubscript]
    state = read_tensors(file)
    if THRESHOLD in state:
        state["threshold"] = state.pop(THRESHOLD)
    jumps, skips = "threshold" in state, "W_skip" in state
    require(state, (*PLAIN, *(["threshold"] if jumps else []), *(["W_skip"] if skips else [])), where)
    form = Form("jumprelu" if jumps else "relu", subtracts_b_dec=False, transcoder=True)
    name = f"{'jumprelu_' if jumps else ''}{'skip_' if skips else ''}transcoder"
    weights = Weights(name, transposed(state, "W_enc", "W_skip"), form=form)
    weights = weights.folded(where, *([clamp_threshold] if jumps else []))
    metadata = _where_from(file, layer) | known.metadata
    return SAEFolder(weights.to_sae(where), "transcoder_set", checked_metadata(metadata, where))


def _where_from(file: Path, layer: int) -> dict[str, Any]:
    path = file.parent / "config.yaml"
    config = read_yaml(path) if path.is_file() else {}
    hooks = [text(config, f"feature_{end}_hook", str(path)) for end in ("input", "output")]
    block = f"blocks.{layer}"
    size = re.search(r"qwen3-(\d+(?:\.\d+)?)b", path_words(file), re.IGNORECASE)
    return {
        "model_name": text(config, "model_name", str(path)) or (f"Qwen/Qwen3-{size[1]}B" if size else None),
        "hook_name": f"{block}.{hooks[0] or 'mlp.hook_in'}",
        "hook_name_out": f"{block}.{hooks[1] or 'hook_mlp_out'}".replace("mlp.hook_out", "hook_mlp_out"),
        "hook_layer": layer,
    }
