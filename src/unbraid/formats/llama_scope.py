"""Llama Scope: JumpReLU autoencoders and transcoders of Llama 3.1 8B.

`encoder.weight[N,D] encoder.bias decoder.weight[M,N] decoder.bias[M]`. The dictionary was trained on x * s_in and
predicts y * s_out, with s = sqrt(D) / mean norm; it stores weights for raw x, biases in the trained units, and one
threshold in raw units.

The library that trained it also multiplies pre-activations with the norm of their decoder row before it
applies the threshold (`sparsity_include_decoder_norm`); SAELens does not. Both give the same where rows have norm 1.
Where they do not, the file's wish is followed and a warning says so; `unbraid.load(path, decoder_norms="kept")` gives
SAELens' reading.
"""

import math
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unbraid.errors import FormatError
from unbraid.formats.folder import SAEFolder
from unbraid.formats.imported import Form
from unbraid.formats.metadata import checked_metadata
from unbraid.formats.published import NOTHING, Known
from unbraid.formats.reading import (
    flag,
    read_json,
    read_tensors,
    require_dtype,
    require_settings,
    require_widths,
    section,
    text,
    wanted,
)
from unbraid.formats.weights import Step, Weights, fold_decoder_norms, require, subtract_input_bias, transposed

CONFIG, WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
NAMES = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
MODEL = "meta-llama/Llama-3.1-8B"
UNIT = 1e-3
"""Norms of decoder rows closer to 1 than this change no code that matters."""


def recognises(folder: Path) -> bool:
    """Whether `folder` looks like this layout."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def load(folder: Path, known: Known = NOTHING) -> SAEFolder:
    """Read a folder of the first release.

    Raises:
        FormatError: naming the setting or tensor that is missing, damaged, or cannot be held.
    """
    where = str(folder / CONFIG)
    config = read_json(folder / CONFIG)
    require_settings(
        config,
        {
            "act_fn": ("jumprelu", None),
            "norm_activation": ("dataset-wise", None),
            "use_glu_encoder": (False, None),
            "use_decoder_bias": (True, None),
            "apply_decoder_bias_to_pre_encoder": (False, None),
        },
        where,
    )
    require_dtype(config, where)
    threshold = float(wanted(config, "jump_relu_threshold", (int, float), where))
    state = read_tensors(folder / WEIGHTS)
    require(state, NAMES, str(folder / WEIGHTS))
    norms = section(config, "dataset_average_activation_norm", where)
    tensors = our_names(state)
    d_in, d_out = _widths(tensors, where)
    s_in = math.sqrt(d_in) / _positive(norms, "in", where)
    s_out = math.sqrt(d_out) / _positive(norms, "out", where)
    tensors["threshold"] = torch.full_like(state["encoder.bias"], threshold)
    hooks = [text(config, f"hook_point_{end}", where) for end in ("in", "out")]
    transcoder = hooks[1] is not None and hooks[1] != hooks[0]
    steps: list[Step] = [_raw_units(s_in, s_out)]
    if _folds_norms(tensors, flag(config, "sparsity_include_decoder_norm", True, where), s_in / s_out, known, where):
        steps.append(_unit_rows)
    weights = _weights(tensors, transcoder, steps, where)
    require_widths(config, {"d_model": d_in, "d_sae": weights.tensors["W_enc"].shape[1]}, where)
    metadata = _where_from(hooks, transcoder) | known.metadata
    return SAEFolder(weights.to_sae(where), "llama_scope", checked_metadata(metadata, where))


def our_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our names, matrices turned."""
    encoder, b_enc, decoder, b_dec = (state[name] for name in NAMES)
    return transposed({"W_enc": encoder, "b_enc": b_enc, "W_dec": decoder, "b_dec": b_dec}, "W_enc", "W_dec")


def _widths(tensors: dict[str, Tensor], where: str) -> tuple[int, int]:
    W_enc, W_dec = tensors["W_enc"], tensors["W_dec"]
    if W_enc.ndim != 2 or W_dec.ndim != 2:
        raise FormatError(f"{where}: the encoder is {list(W_enc.shape)}, the decoder {list(W_dec.shape)}; expected 2-D")
    return W_enc.shape[0], W_dec.shape[1]


def _positive(norms: dict[str, Any], end: str, where: str) -> float:
    value = float(wanted(norms, end, (int, float), f"{where}: dataset_average_activation_norm"))
    if value <= 0:
        raise FormatError(f"{where}: dataset_average_activation_norm.{end} is {value:g}; expected a positive norm")
    return value


def _raw_units(s_in: float, s_out: float) -> Step:
    """f = J(x We + be/s_in, t), y = f Wd s_in/s_out + bd/s_out."""

    def step(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return tensors | {
            "b_enc": tensors["b_enc"] / s_in,
            "W_dec": tensors["W_dec"] * (s_in / s_out),
            "b_dec": tensors["b_dec"] / s_out,
        }

    return step


def _folds_norms(tensors: dict[str, Tensor], asked: bool, ratio: float, known: Known, where: str) -> bool:
    """Whether decoder norms come before the threshold; warns where that changes codes."""
    folds = asked if known.decoder_norms is None else known.decoder_norms == "folded"
    norms_N = tensors["W_dec"].double().norm(dim=1) * ratio
    differs = bool(((norms_N - 1).abs() > UNIT).any())
    if differs and known.decoder_norms is None and asked:
        warnings.warn(
            f"{where}: decoder rows have norms from {norms_N.min():.3g} to {norms_N.max():.3g} and "
            "sparsity_include_decoder_norm asks for them before the threshold, as the library that trained it does; "
            'SAELens leaves them out, and so does unbraid.load(path, decoder_norms="kept")',
            stacklevel=2,
        )
    return folds and differs


def _unit_rows(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Unit decoder rows with the threshold as it is: it applies to codes that carry the norm."""
    return fold_decoder_norms(tensors) | {"threshold": tensors["threshold"]}


def _weights(tensors: dict[str, Tensor], transcoder: bool, steps: list[Step], where: str) -> Weights:
    if transcoder:
        form = Form("jumprelu", subtracts_b_dec=False, transcoder=True)
        return Weights("jumprelu_transcoder", tensors, form=form).folded(where, *steps)
    return Weights("jumprelu", tensors).folded(where, *steps, subtract_input_bias)


def _where_from(hooks: list[str | None], transcoder: bool) -> dict[str, Any]:
    layer = re.match(r"blocks\.(\d{1,4})\.", hooks[0] or "")
    found = {"model_name": MODEL, "hook_name": hooks[0], "hook_layer": int(layer[1]) if layer else None}
    return found | {"prepend_bos": True} | ({"hook_name_out": hooks[1]} if transcoder else {})
