"""Gemma Scope's `params.npz`: JumpReLU autoencoders and transcoders of Gemma 2, read only.

The file is opened without pickles. These SAEs do not subtract b_dec from their input, so b_enc is shifted by b_dec
W_enc: the codes are the same. The archive says nothing about the model or the site; the path it lies in does, such as
`google/gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71`, and only it tells a transcoder from an SAE. SAEs of the
embedding were trained on embeddings divided by sqrt(D); with that folded they read the scaled embeddings that the model
itself reads.
"""

import re
from pathlib import Path

from torch import Tensor

from unbraid.formats.folder import SAEFolder
from unbraid.formats.imported import Form
from unbraid.formats.published import NOTHING, Known, path_words
from unbraid.formats.reading import read_npz
from unbraid.formats.weights import THRESHOLDED, Weights, clamp_threshold, subtract_input_bias

WEIGHTS = "params.npz"
HOOKS = {"res": "hook_resid_post", "att": "attn.hook_z", "mlp": "hook_mlp_out", "transcoders": "ln2.hook_normalized"}


def recognises(folder: Path) -> bool:
    """Whether `folder` looks like this layout."""
    return (folder / WEIGHTS).is_file()


def load(folder: Path, known: Known = NOTHING) -> SAEFolder:
    """Read a folder with a `params.npz`.

    Raises:
        FormatError: the file is damaged, needs pickles, or lacks a tensor.
    """
    path = folder / WEIGHTS
    tensors = read_npz(path, THRESHOLDED)
    words = path_words(folder)
    metadata = {"folder": "/".join(folder.resolve().parts[-3:])} | _where_from(words)
    if "transcoders" in words:
        form = Form("jumprelu", subtracts_b_dec=False, transcoder=True)
        weights = Weights("jumprelu_transcoder", tensors, form=form).folded(str(path), clamp_threshold)
    else:
        steps = [_scaled_embedding] if "embedding" in words else []
        weights = Weights("jumprelu", tensors).folded(str(path), *steps, clamp_threshold, subtract_input_bias)
    return SAEFolder(weights.to_sae(str(path)), "gemma_scope", metadata | known.metadata)


def _scaled_embedding(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """SAELens' reading: W_enc / sqrt(D), W_dec * sqrt(D), b_dec as it is."""
    root = tensors["W_enc"].shape[0] ** 0.5
    return tensors | {"W_enc": tensors["W_enc"] / root, "W_dec": tensors["W_dec"] * root}


def _where_from(words: str) -> dict[str, object]:
    """Model and hook, from a path such as gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71."""
    model = re.search(r"gemma-scope-(\d+b)-(pt|it)-(res|att|mlp|transcoders)\b", words)
    layer = re.search(r"\blayer_(\d+)\b", words)
    if model is None:
        return {}
    size, kind, stream = model.groups()
    found: dict[str, object] = {"model_name": f"google/gemma-2-{size}" + ("-it" if kind == "it" else "")}
    if "embedding" in words:
        return found | {"hook_name": "hook_embed"}
    if layer is None:
        return found
    found |= {"hook_name": f"blocks.{layer[1]}.{HOOKS[stream]}", "hook_layer": int(layer[1])}
    return found | ({"hook_name_out": f"blocks.{layer[1]}.hook_mlp_out"} if stream == "transcoders" else {})
