"""llamascopium (OpenMOSS' later library): `config.json` beside `sae_weights.safetensors` or `checkpoints/final.*`.

`W_E[D,N] b_E W_D[N,D] b_D`, with `W_E_glu b_E_glu` for a gated linear unit,
`activation_function.log_jumprelu_threshold` and `dataset_average_activation_norm.HOOK`. z = (x s) W_E + b_E, times the
sigmoid of the gate; with `sparsity_include_decoder_norm` f = act(z n) / n for decoder norms n; y = (f W_D + b_D) / s.
Norms per token are not read: the factor s must be fixed ("dataset-wise"), or in the weights already ("inference").
"""

import math
from pathlib import Path
from typing import Any

from torch import Tensor

from unbraid.errors import FormatError
from unbraid.formats.folder import SAEFolder
from unbraid.formats.imported import Form
from unbraid.formats.metadata import checked_metadata
from unbraid.formats.published import NOTHING, Known
from unbraid.formats.reading import flag, read_json, read_tensors, require_settings, require_widths, text, wanted
from unbraid.formats.weights import Step, Weights, require, scale_input

CONFIG = "config.json"
FILES = ("sae_weights.safetensors", "checkpoints/pruned.safetensors", "checkpoints/final.safetensors")
NAMES = {"W_enc": "W_E", "b_enc": "b_E", "W_dec": "W_D", "b_dec": "b_D"}
GLU = {"W_glu": "W_E_glu", "b_glu": "b_E_glu"}
THRESHOLD, NORM = "activation_function.log_jumprelu_threshold", "dataset_average_activation_norm."


def recognises(folder: Path) -> bool:
    """Whether `folder` looks like this layout."""
    return (folder / CONFIG).is_file() and any((folder / file).is_file() for file in FILES)


def load(folder: Path, known: Known = NOTHING) -> SAEFolder:
    """Read an SAE.

    Raises:
        FormatError: naming the setting or tensor that is missing, damaged, or cannot be held.
    """
    where = str(folder / CONFIG)
    config = read_json(folder / CONFIG)
    require_settings(
        config,
        {
            "sae_type": ("sae", None),
            "norm_activation": ("dataset-wise", "inference", None),
            "use_decoder_bias": (True, None),
            "act_fn": ("relu", "jumprelu", "topk", None),
        },
        where,
    )
    hooks = [text(config, f"hook_point_{end}", where) for end in ("in", "out")]
    if hooks[1] is not None and hooks[1] != hooks[0]:
        raise FormatError(f"{where}: it reads {hooks[0]} and predicts {hooks[1]}; expected an SAE, where both are one")
    file = next(file for file in FILES if (folder / file).is_file())
    state = read_tensors(folder / file)
    norms = {name.removeprefix(NORM): state.pop(name) for name in list(state) if name.startswith(NORM)}
    activation = config.get("act_fn") or "relu"
    glu = GLU if flag(config, "use_glu_encoder", False, where) else {}
    names = NAMES | glu | ({"threshold": THRESHOLD} if activation == "jumprelu" else {})
    require(state, tuple(names.values()), str(folder / file))
    tensors: dict[str, Tensor] = {ours: state[theirs] for ours, theirs in names.items()}
    if activation == "jumprelu":
        tensors["threshold"] = tensors["threshold"].double().exp().float()
    if flag(config, "sparsity_include_decoder_norm", True, where):
        tensors |= _under_norms(tensors, activation, where)
    k = wanted(config, "top_k", int, where) if activation == "topk" else None
    form = Form(activation, k=k, subtracts_b_dec=False)
    steps = _scaled(config, norms, hooks[0], tensors["W_enc"].shape[0], where)
    weights = Weights(activation, tensors, form=form).folded(where, *steps)
    require_widths(config, {"d_model": weights.tensors["W_enc"].shape[0]}, where)
    metadata: dict[str, Any] = {"model_name": text(config, "model_name", where), "hook_name": hooks[0]} | known.metadata
    return SAEFolder(weights.to_sae(where), "llamascopium", checked_metadata(metadata, where))


def _under_norms(tensors: dict[str, Tensor], activation: str, where: str) -> dict[str, Tensor]:
    """act(z n) / n: a threshold becomes threshold / n, and top-k ranks z n."""
    if tensors["W_dec"].ndim != 2:
        raise FormatError(f"{where}: W_D has shape {list(tensors['W_dec'].shape)}; expected [N, D]: a single site")
    norms_N = tensors["W_dec"].double().norm(dim=1)
    if activation == "jumprelu":
        return {"threshold": (tensors["threshold"].double() / norms_N).float()}
    return {"selection": norms_N.float()} if activation == "topk" else {}


def _scaled(config: dict[str, Any], norms: dict[str, Any], hook: str | None, d_in: int, where: str) -> list[Step]:
    """What folds s = sqrt(D) / mean norm."""
    if config.get("norm_activation") != "dataset-wise":
        return []
    norm = norms.get(hook or "", next(iter(norms.values()), None))
    value = float(norm) if isinstance(norm, Tensor) and norm.numel() == 1 else math.nan
    if not 0 < value < math.inf:
        raise FormatError(f"{where}: {NORM}{hook} is {value}; expected the mean norm, a positive number")
    factor = math.sqrt(d_in) / value
    return [scale_input(factor), lambda exact: exact | ({"W_glu": exact["W_glu"] * factor} if "W_glu" in exact else {})]
