"""OpenAI's GPT-2 autoencoders: `gpt2-small/{location}_v5_{32k,128k}/autoencoders/L.pt`, pickles of tensors.

`pre_bias latent_bias encoder.weight[N,D] decoder.weight[D,N] activation:"TopK" activation_state_dict:{k}` and three
statistics. The TopK ones (v5) take a layer norm of every token first; then u - pre_bias is encoded, and pre_bias and
the norm are put back after decoding. The ReLU ones (v1, v4) take no norm.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from unbraid.errors import FormatError
from unbraid.formats.folder import SAEFolder
from unbraid.formats.imported import Form
from unbraid.formats.metadata import checked_metadata
from unbraid.formats.published import NOTHING, Known, path_words
from unbraid.formats.reading import read_pickle, require_settings, section, shown, state_names, wanted
from unbraid.formats.weights import Weights, require, transposed

NAMES = {"W_enc": "encoder.weight", "b_enc": "latent_bias", "W_dec": "decoder.weight", "b_dec": "pre_bias"}
STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
HOOKS = {
    "resid_delta_attn": "hook_attn_out",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_post_mlp": "hook_resid_post",
    "mlp_post_act": "mlp.hook_post",
}


def recognises(file: Path) -> bool:
    """Whether `file` looks like this layout."""
    return file.suffix == ".pt" and set(NAMES.values()) <= state_names(file)


def load(file: Path, known: Known = NOTHING) -> SAEFolder:
    """Read one autoencoder.

    Raises:
        FormatError: the file is damaged, or its activation is another one.
    """
    where = str(file)
    state = read_pickle(file)
    activation = state.pop("activation", "ReLU")
    settings = section(state, "activation_state_dict", where)
    state.pop("activation_state_dict", None)
    state = {name: value for name, value in state.items() if name not in STATISTICS}
    require(state, tuple(NAMES.values()), where)
    tensors = transposed({ours: state[theirs] for ours, theirs in NAMES.items()}, "W_enc", "W_dec")
    if activation == "ReLU":
        weights = Weights("relu", tensors)
    elif activation == "TopK":
        require_settings(settings, {"postact_fn": ("ReLU", None)}, where)
        k = settings.get("k")
        k = wanted({"k": k.item() if isinstance(k, Tensor) and k.numel() == 1 else k}, "k", int, where)
        weights = Weights("topk", tensors, form=Form("topk", k=k, token_norm="layer_norm"))
    else:
        raise FormatError(f"{where}: activation is {shown(activation)}; expected TopK or ReLU")
    metadata: dict[str, Any] = {"model_name": "gpt2-small", "prepend_bos": False} | _where_from(file) | known.metadata
    return SAEFolder(weights.folded(where).to_sae(where), "openai_gpt2", checked_metadata(metadata, where))


def _where_from(file: Path) -> dict[str, Any]:
    location = re.search(rf"({'|'.join(HOOKS)})(?:_v\d\w*)?/autoencoders/(\d{{1,3}})\.pt", path_words(file))
    if location is None:
        return {}
    return {"hook_name": f"blocks.{location[2]}.{HOOKS[location[1]]}", "hook_layer": int(location[2])}
