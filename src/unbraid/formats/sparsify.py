"""The eai-sparsify folder, one a hookpoint: `cfg.json` and `sae.safetensors`.

It holds TopK autoencoders and nothing else: codes are the k largest entries of relu(W (x - b_dec) + b). The encoder is
stored one row a feature, and so, unlike elsewhere, is the decoder. sparsify ignores settings it does not know, so what
unbraid adds to `cfg.json` costs it nothing.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from unbraid.errors import FormatError
from unbraid.files import write_json
from unbraid.formats.folder import (
    SAEFolder,
    read_json,
    read_tensors,
    require_settings,
    wanted,
    write_tensors,
    written_whole,
)
from unbraid.formats.weights import (
    Weights,
    metadata_to_restore,
    require,
    restored,
    restored_metadata,
    settings_to_restore,
)
from unbraid.sae import SAE

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
WRITTEN_AS = {"topk": "topk"}
NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}


def recognises(folder: Path) -> bool:
    """Whether `folder` looks like this layout."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def cannot_hold(sae: SAE) -> str | None:
    """Why this layout cannot hold `sae`, naming the field; None if it can."""
    if sae.architecture in WRITTEN_AS:
        return None
    return (
        f"architecture is {sae.architecture!r}, which sparsify's activation cannot express; expected topk; export to "
        "sae_lens instead"
    )


def save(sae: SAE, folder: Path, metadata: dict[str, Any] | None = None, frequency_N: Tensor | None = None) -> Path:
    """Write `sae`, which acts on raw activations, into `folder`; the layout has no place for `frequency_N`.

    Raises:
        FormatError: the SAE is no TopK, or the folder cannot be written.
    """
    refusal = cannot_hold(sae)
    if refusal is not None:
        raise FormatError(refusal)
    tensors = Weights.of(sae).tensors
    tensors["W_enc"] = tensors["W_enc"].T
    config = {
        "activation": "topk",
        "expansion_factor": max(1, sae.n_features // sae.d_in),
        "normalize_decoder": True,
        "num_latents": sae.n_features,
        "k": sae.config.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_in,
        "unbraid": settings_to_restore(sae) | metadata_to_restore(metadata or {}),
    }
    with written_whole(folder) as partial:
        write_json(partial / CONFIG, config)
        write_tensors(partial / WEIGHTS, {theirs: tensors[ours] for ours, theirs in NAMES.items()})
    return folder


def load(folder: Path) -> SAEFolder:
    """Read a hookpoint folder.

    Raises:
        FormatError: naming the setting or tensor that is missing, damaged, or cannot be held.
    """
    where = str(folder / CONFIG)
    config = read_json(folder / CONFIG)
    plain = {"activation": "topk", "skip_connection": False, "transcode": False, "signed": False}
    require_settings(config, plain, where)
    state = read_tensors(folder / WEIGHTS)
    require(state, tuple(NAMES.values()), str(folder / WEIGHTS))
    tensors = {ours: state[theirs] for ours, theirs in NAMES.items()}
    tensors["W_enc"] = tensors["W_enc"].T
    weights = Weights("topk", tensors, {"k": wanted(config, "k", int, where)})
    sae = restored(weights, config.get("unbraid"), WRITTEN_AS, "topk", where).to_sae(where)
    return SAEFolder(sae, "sparsify", {"hookpoint": folder.name} | restored_metadata(config.get("unbraid")))
