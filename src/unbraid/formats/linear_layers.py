"""ReLU autoencoders published as the state of two linear layers: Goodfire's, and DeepSeek R1's.

`encoder_linear.weight[N,D] encoder_linear.bias decoder_linear.weight[D,N] decoder_linear.bias`, or the same without
`_linear`. b_dec is not subtracted from the input. The file's name says the layer; it, or the folder, the model.
"""

import re
from pathlib import Path
from typing import Any

from unbraid.formats.folder import SAEFolder
from unbraid.formats.metadata import checked_metadata
from unbraid.formats.published import NOTHING, Known, path_words
from unbraid.formats.reading import read_pickle, state_names
from unbraid.formats.weights import Weights, require, subtract_input_bias, transposed

LAYERS = (("encoder_linear", "decoder_linear"), ("encoder", "decoder"))


def recognises(file: Path) -> bool:
    """Whether `file` looks like this layout."""
    return file.suffix in (".pt", ".pth") and _layers(state_names(file)) is not None


def load(file: Path, known: Known = NOTHING) -> SAEFolder:
    """Read one autoencoder.

    Raises:
        FormatError: the file is damaged.
    """
    where, state = str(file), read_pickle(file)
    encoder, decoder = _layers(set(state)) or LAYERS[0]
    names = {"W_enc": f"{encoder}.weight", "b_enc": f"{encoder}.bias"}
    names |= {"W_dec": f"{decoder}.weight", "b_dec": f"{decoder}.bias"}
    require(state, tuple(names.values()), where)
    tensors = transposed({ours: state[theirs] for ours, theirs in names.items()}, "W_enc", "W_dec")
    weights = Weights("relu", tensors).folded(where, subtract_input_bias)
    layout = "goodfire" if encoder == "encoder_linear" else "deepseek_r1"
    metadata = _where_from(file) | known.metadata
    return SAEFolder(weights.to_sae(where), layout, checked_metadata(metadata, where))


def _layers(names: set[str]) -> tuple[str, str] | None:
    ends = ("weight", "bias")
    return next((pair for pair in LAYERS if names == {f"{part}.{end}" for part in pair for end in ends}), None)


def _where_from(file: Path) -> dict[str, Any]:
    words = path_words(file)
    layer = re.search(r"(?:\b|-)l(\d{1,3})\b", file.stem)
    model = re.search(r"(Llama-3\.\d-\d+B-Instruct)", words)
    name = f"meta-llama/{model[1]}" if model else None
    if name is None and "deepseek" in words.lower():
        name = "deepseek-ai/DeepSeek-R1-Distill-Llama-8B"
    hook = {"hook_name": f"blocks.{layer[1]}.hook_resid_post", "hook_layer": int(layer[1])} if layer else {}
    return hook | {"model_name": name}
