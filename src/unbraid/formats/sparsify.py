"""The eai-sparsify layout, one folder per hookpoint: `cfg.json` and `sae.safetensors`.

It holds TopK autoencoders: codes are the k largest entries of relu(W (x - b_dec) + b). Read as well are transcoders,
which do not subtract b_dec and may have a skip connection, groupmax, which keeps the largest of each of k runs of
consecutive features, and the signed codes of older versions. The encoder is stored one row per feature, and so, unlike
elsewhere, is the decoder. sparsify ignores settings it does not know, so what unbraid adds to `cfg.json` costs it
nothing.
"""

import re
from pathlib import Path
from typing import Any

from torch import Tensor

from unbraid.errors import FormatError
from unbraid.files import write_json
from unbraid.formats.folder import SAEFolder, write_tensors, written_whole
from unbraid.formats.imported import Form, ImportedSAE
from unbraid.formats.metadata import checked_metadata
from unbraid.formats.published import NOTHING, Known
from unbraid.formats.reading import flag, read_json, read_tensors, require_settings, require_widths, wanted
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
NAMES = {"W_enc": "encoder.weight", "b_enc": "encoder.bias", "W_dec": "W_dec", "b_dec": "b_dec"}


def recognises(folder: Path) -> bool:
    """Whether `folder` looks like this layout."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def cannot_hold(sae: SAE) -> str | None:
    """Why this layout cannot hold `sae`, naming the field; None if it can."""
    if "sparsify" in sae.written_as and not isinstance(sae, ImportedSAE):
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
        "k": sae.k,
        "multi_topk": False,
        "skip_connection": False,
        "transcode": False,
        "d_in": sae.d_in,
        "unbraid": settings_to_restore(sae) | metadata_to_restore(sae.metadata if metadata is None else metadata),
    }
    with written_whole(folder) as partial:
        write_json(partial / CONFIG, config)
        write_tensors(partial / WEIGHTS, {theirs: tensors[ours] for ours, theirs in NAMES.items()})
    return folder


def load(folder: Path, known: Known = NOTHING) -> SAEFolder:
    """Read a hookpoint folder.

    Raises:
        FormatError: naming the setting or tensor that is missing, damaged, or cannot be held.
    """
    where = str(folder / CONFIG)
    config = read_json(folder / CONFIG)
    require_settings(config, {"activation": ("topk", "groupmax", None)}, where)
    transcode, skip = flag(config, "transcode", False, where), flag(config, "skip_connection", False, where)
    signed = flag(config, "signed", False, where)
    for name in ("normalize_decoder", "multi_topk"):  # of training alone
        flag(config, name, False, where)
    state = read_tensors(folder / WEIGHTS)
    names = NAMES | ({"W_skip": "W_skip"} if skip else {})
    require(state, tuple(names.values()), str(folder / WEIGHTS))
    tensors = {ours: state[theirs] for ours, theirs in names.items()}
    for name in ("W_enc", "W_skip"):
        if name in tensors:
            tensors[name] = tensors[name].T
    activation = "abstopk" if signed else config.get("activation") or "topk"
    k = wanted(config, "k", int, where)
    if activation == "topk" and not (transcode or skip):
        weights = Weights("topk", tensors, {"k": k}).folded(where)
    else:
        form = Form(activation, k=k, subtracts_b_dec=not transcode, transcoder=transcode or skip)
        name = f"{activation}_transcoder" if form.transcoder else activation
        weights = Weights(name, tensors, form=form).folded(where)
    d_in, n_features = weights.tensors["W_enc"].shape
    # num_latents is 0 or missing where the expansion factor says it.
    require_widths(config, {"d_in": d_in} | ({"num_latents": n_features} if config.get("num_latents") else {}), where)
    if activation == "groupmax" and n_features % k:
        raise FormatError(f"{where}: k is {k}; expected a divisor of the {n_features} features, for equal groups")
    if weights.form is None:
        weights = restored(weights, config.get("unbraid"), "sparsify", "topk", where)
    metadata = {"hookpoint": folder.resolve().name} | _hooks(folder.resolve().name, transcode or skip)
    metadata |= restored_metadata(config.get("unbraid"))
    return SAEFolder(weights.to_sae(where), "sparsify", checked_metadata(metadata | known.metadata, where))


def _hooks(module: str, transcoder: bool) -> dict[str, Any]:
    """SAELens' names for what an SAE reads that lies in a folder named after its module."""
    match = re.fullmatch(r"(?:.*\.)?(?:layers|h)\.(\d{1,6})(?:\.(mlp|self_attn|attn|attention))?", module)
    if match is None:
        return {}
    block, sublayer = f"blocks.{match[1]}", match[2]
    if sublayer is None:
        return {"hook_name": f"{block}.hook_resid_post"}
    if sublayer == "mlp":
        hooks = {"hook_name": f"{block}.hook_mlp_out"}
        return {"hook_name": f"{block}.mlp.hook_in", "hook_name_out": hooks["hook_name"]} if transcoder else hooks
    return {} if transcoder else {"hook_name": f"{block}.hook_attn_out"}
