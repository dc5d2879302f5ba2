"""Gemma Scope 2: JumpReLU autoencoders and transcoders of Gemma 3, one folder each.

`params.safetensors` holds `w_enc[D,N] b_enc threshold w_dec[N,M] b_dec` and, for affine transcoders,
`affine_skip_connection[D,M]`: f = J(x w_enc + b_enc, threshold), y = f w_dec + b_dec (+ x A). `config.json` says which
modules are read and predicted; where it is absent the path says it. b_dec is not subtracted from the input.
"""

import re
from pathlib import Path
from typing import Any

from unbraid.errors import FormatError
from unbraid.formats.folder import SAEFolder
from unbraid.formats.imported import Form
from unbraid.formats.metadata import checked_metadata
from unbraid.formats.published import NOTHING, Known, path_words
from unbraid.formats.reading import flag, read_json, read_tensors, require_settings, require_widths, text
from unbraid.formats.weights import Weights, clamp_threshold, require, subtract_input_bias

CONFIG, WEIGHTS = "config.json", "params.safetensors"
NAMES = {"W_enc": "w_enc", "b_enc": "b_enc", "W_dec": "w_dec", "b_dec": "b_dec", "threshold": "threshold"}
SKIP = "affine_skip_connection"
HOOKS = {
    "output": "hook_resid_post",
    "post_feedforward_layernorm.output": "hook_mlp_out",
    "self_attn.o_proj.input": "attn.hook_z",
    "pre_feedforward_layernorm.output": "mlp.hook_in",
}
"""What the file calls a module of a layer -> SAELens' hook."""
STREAMS = {"resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out", "attn_out": "attn.hook_z"}
"""The same for the folder that dictionaries of a kind lie in."""


def recognises(folder: Path) -> bool:
    """Whether `folder` looks like this layout."""
    return (folder / WEIGHTS).is_file()


def load(folder: Path, known: Known = NOTHING) -> SAEFolder:
    """Read one layer's folder.

    Raises:
        FormatError: the file is damaged, or holds several layers.
    """
    where, words = str(folder / WEIGHTS), path_words(folder)
    config = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    kind = text(config, "type", where) or ("transcoder" if "transcoder" in words else "sae")
    require_settings(config, {"architecture": ("jump_relu", None)}, where)
    if kind not in ("sae", "transcoder"):
        raise FormatError(f"{where}: type is {kind!r}, which several layers share; expected sae or transcoder")
    state = read_tensors(folder / WEIGHTS)
    names = NAMES | ({"W_skip": SKIP} if SKIP in state else {})
    require(state, tuple(names.values()), where)
    tensors = {ours: state[theirs] for ours, theirs in names.items()}
    if flag(config, "affine_connection", SKIP in state, where) != (SKIP in state):
        raise FormatError(f"{where}: affine_connection is {config['affine_connection']}, but the weights say otherwise")
    if kind == "transcoder" or SKIP in state:
        form = Form("jumprelu", subtracts_b_dec=False, transcoder=True)
        name = "jumprelu_skip_transcoder" if SKIP in state else "jumprelu_transcoder"
        weights = Weights(name, tensors, form=form).folded(where, clamp_threshold)
    else:
        weights = Weights("jumprelu", tensors).folded(where, clamp_threshold, subtract_input_bias)
    require_widths(config, {"width": weights.tensors["W_enc"].shape[1]}, where)
    metadata = _where_from(config, words, kind, where) | known.metadata
    return SAEFolder(weights.to_sae(where), "gemma_scope_2", checked_metadata(metadata, where))


def _where_from(config: dict[str, Any], words: str, kind: str, where: str) -> dict[str, Any]:
    """Model and hooks, from the configuration or else from the path."""
    metadata: dict[str, Any] = {"prepend_bos": True, "model_name": model_name(config, words, where)}
    hooks = [_hook(text(config, f"hf_hook_point_{end}", where)) for end in ("in", "out")]
    layer = re.search(r"(resid_post|mlp_out|attn_out|transcoder)(?:_all)?/layer_(\d{1,4})_", words)
    if hooks[0] is None and layer is not None:
        block, stream = f"blocks.{layer[2]}", STREAMS.get(layer[1])
        hooks = [f"{block}.{stream}"] * 2 if stream else [f"{block}.mlp.hook_in", f"{block}.hook_mlp_out"]
    metadata["hook_name"] = hooks[0]
    if kind == "transcoder" or hooks[1] != hooks[0]:
        metadata["hook_name_out"] = hooks[1]
    return {name: value for name, value in metadata.items() if value is not None}


def model_name(config: dict[str, Any], words: str, where: str) -> str | None:
    """The model's id on the hub, from the configuration or else from the path."""
    model = text(config, "model_name", where)
    size = re.search(r"gemma-scope-2-(\d+[mb])-(pt|it)", words)
    if model is None and size is not None:
        model = f"gemma-3-{size[1]}-{size[2]}"
    if model is None:
        return None
    name = model.removeprefix("google/").replace("-v3", "-3")
    return "google/" + ("gemma-3-270m" if name == "gemma-3-270m-pt" else name)


def _hook(point: str | None) -> str | None:
    """`model.layers.17.output` -> `blocks.17.hook_resid_post`."""
    match = re.fullmatch(r".*\blayers\.(\d{1,4})\.(.+)", point or "")
    return f"blocks.{match[1]}.{HOOKS[match[2]]}" if match and match[2] in HOOKS else None
