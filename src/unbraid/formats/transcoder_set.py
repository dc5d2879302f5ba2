"""Transcoder sets of circuit-tracer: one file `layer_L.safetensors` per layer of a model.

`W_enc[N,D] b_enc W_dec[N,D] b_dec`, both matrices with one row per feature, and where there are such
`activation_function.threshold[N]` (else ReLU) and `W_skip[D,D]`, applied as x W_skip^T. The MLP's input is read and its
output predicted; `config.yaml` in the folder may name both hooks and the model.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from unbraid.errors import FormatError
from unbraid.formats.folder import SAEFolder, check_sae_folder, write_tensors, written_whole
from unbraid.formats.imported import Form, ImportedSAE
from unbraid.formats.metadata import checked_metadata
from unbraid.formats.published import NOTHING, Known, path_words
from unbraid.formats.reading import read_tensors, read_yaml, text
from unbraid.formats.weights import PLAIN, Weights, clamp_threshold, require, transposed
from unbraid.sae import SAE

NAME = re.compile(r"layer_(\d{1,4})\.safetensors")
THRESHOLD = "activation_function.threshold"
SPELLINGS = ("transcoderset", "circuittracer")


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


def save_set(found: Mapping[str, SAEFolder], folder: Path, *, overwrite: bool = False) -> Path:
    """Write transcoders, one for each layer from 0, as the one folder that circuit-tracer reads; returns it.

    Args:
        found: transcoders by name.
        folder: made, or replaced as a whole where it holds an SAE that unbraid wrote.
        overwrite: allow that.

    Raises:
        FormatError: one of them is no transcoder that a set can hold, they do not belong together, or the folder cannot
            be written; nothing is written then.
    """
    layers: dict[int, ImportedSAE] = {}
    ends: dict[str, str] = {}
    for name, one in found.items():
        sae, (layer, *hooks) = require_holdable(name, one.sae), _hooks(name, one.metadata)
        together = {"model_name": str(one.metadata.get("model_name")), "features": str(sae.n_features)}
        together |= {"feature_input_hook": hooks[0], "feature_output_hook": hooks[1], "width": str(sae.d_in)}
        odd = [key for key, value in together.items() if ends.setdefault(key, value) != value]
        if odd or layer in layers:
            what = f"{odd[0]} is {together[odd[0]]}, not {ends[odd[0]]}" if odd else f"layer {layer} is there already"
            raise FormatError(
                f"{name}: {what}; expected transcoders of one model, width and kind, one for each layer; export those "
                "that belong together"
            )
        layers[layer] = sae
    if sorted(layers) != list(range(len(layers))):
        raise FormatError(
            f"the transcoders are of layers {', '.join(map(str, sorted(layers)))}; expected one for each layer from 0, "
            "which circuit-tracer asks for; export all layers together, or to sae_lens"
        )
    check_sae_folder(folder, overwrite)
    config = {"model_name": ends["model_name"], "model_kind": "transcoder_set"}
    config |= {key: ends[key] for key in ("feature_input_hook", "feature_output_hook")}
    with written_whole(folder) as unfinished:
        for layer, sae in layers.items():
            write_tensors(unfinished / f"layer_{layer}.safetensors", _stored(sae))
        (unfinished / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return folder


def require_holdable(name: str, sae: SAE) -> ImportedSAE:
    """The transcoder, if circuit-tracer's classes compute what it does.

    Raises:
        FormatError: they do not.
    """
    plain = isinstance(sae, ImportedSAE) and sae.form == Form(sae.form.activation, None, "none", False, True)
    if not isinstance(sae, ImportedSAE) or not plain or sae.form.activation not in ("relu", "jumprelu"):
        raise FormatError(
            f"{name}: architecture is {sae.architecture!r}; expected a ReLU or JumpReLU transcoder without a norm per "
            "token, which is all a set holds; export to sae_lens"
        )
    if sae.glu_ND is not None or sae.d_in != sae.W_dec.shape[1]:
        raise FormatError(
            f"{name}: it reads {sae.d_in} numbers and writes {sae.W_dec.shape[1]}; expected one width and no gated "
            "linear unit; export to sae_lens"
        )
    return sae


def _hooks(name: str, metadata: dict[str, Any]) -> tuple[int, str, str]:
    """The layer, and what is read and written there."""
    ends = [re.fullmatch(r"blocks\.(\d{1,4})\.(.+)", str(metadata.get(key))) for key in ("hook_name", "hook_name_out")]
    if ends[0] is None or ends[1] is None or ends[0][1] != ends[1][1] or not metadata.get("model_name"):
        raise FormatError(
            f"{name}: its model is {metadata.get('model_name')!r}, it reads {metadata.get('hook_name')!r} and writes "
            f"{metadata.get('hook_name_out')!r}; expected a model and two hooks of one layer, such as "
            "blocks.3.mlp.hook_in and blocks.3.hook_mlp_out; put them into its metadata"
        )
    return int(ends[0][1]), ends[0][2], ends[1][2]


def _stored(sae: ImportedSAE) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {"W_enc": sae.encoder_ND, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if sae.form.activation == "jumprelu":
        tensors[THRESHOLD] = sae.threshold
    if sae.W_skip is not None:
        tensors["W_skip"] = sae.W_skip.T
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}
