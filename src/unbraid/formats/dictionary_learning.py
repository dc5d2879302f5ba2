"""The dictionary_learning folder (`trainer_i/`): `ae.pt`, a pickled state dict, beside `config.json`.

The pickle is read with `weights_only=True`, which refuses anything but tensors and plain containers. Each class there
names its tensors its own way; the table below is the whole translation. Two of them, JumpReLU and the April-2024
AutoEncoderNew, do not subtract b_dec from their input, so their encoder bias is shifted by b_dec W_enc on the way.
"""

import re
import warnings
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unbraid.errors import FormatError
from unbraid.files import write_json
from unbraid.formats.folder import SAEFolder, written_whole
from unbraid.formats.imported import ImportedSAE
from unbraid.formats.metadata import checked_metadata
from unbraid.formats.published import NOTHING, Known, path_words
from unbraid.formats.reading import read_json, read_pickle, require_widths, section, shown, text, wanted
from unbraid.formats.weights import (
    Step,
    Weights,
    add_input_bias,
    clamp_threshold,
    metadata_to_restore,
    require,
    restored,
    restored_metadata,
    scale_input,
    settings_to_restore,
    subtract_input_bias,
)
from unbraid.json_files import is_count
from unbraid.sae import SAE
from unbraid.sae.matryoshka import MatryoshkaSAE
from unbraid.sites import Site

CONFIG, WEIGHTS = "config.json", "ae.pt"
UNSET = -1.0
"""What the library stores as threshold until training has set one."""


class Layout(NamedTuple):
    """How one class of the library stores what we call `tensors` by our name -> (its name, whether transposed)."""

    architecture: str
    tensors: dict[str, tuple[str, bool]]
    reads_x_minus_b_dec: bool = True


LINEAR = {"W_enc": ("encoder.weight", True), "W_dec": ("decoder.weight", True)}
DIRECT = {name: (name, False) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
TOPK = LINEAR | {"b_enc": ("encoder.bias", False), "b_dec": ("b_dec", False)}
CLASSES = {
    "AutoEncoder": Layout("relu", LINEAR | {"b_enc": ("encoder.bias", False), "b_dec": ("bias", False)}),
    "AutoEncoderNew": Layout(
        "relu", LINEAR | {"b_enc": ("encoder.bias", False), "b_dec": ("decoder.bias", False)}, False
    ),
    "AutoEncoderTopK": Layout("topk", TOPK),
    "BatchTopKSAE": Layout("batch_topk", TOPK | {"threshold": ("threshold", False)}),
    "MatryoshkaBatchTopKSAE": Layout("matryoshka", DIRECT | {"threshold": ("threshold", False)}),
    "JumpReluAutoEncoder": Layout("jumprelu", DIRECT | {"threshold": ("threshold", False)}, reads_x_minus_b_dec=False),
    "GatedAutoEncoder": Layout(
        "gated",
        LINEAR
        | {
            "b_dec": ("decoder_bias", False),
            "b_gate": ("gate_bias", False),
            "b_mag": ("mag_bias", False),
            "r_mag": ("r_mag", False),
        },
    ),
}
NORMALISER = ("target_rms", "activation_mean", "activation_std", "activation_global_scale")
"""Buffers of a fork that trains on (activations - mean) * scale."""
WITH_K = ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")


def recognises(folder: Path) -> bool:
    """Whether `folder` looks like this layout."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def cannot_hold(sae: SAE) -> str | None:
    """Why this layout cannot hold `sae`; every architecture unbraid trains has a class with its inference form."""
    if not isinstance(sae, ImportedSAE):
        return None
    return f"architecture is {sae.architecture!r}, imported; dictionary_learning has no class that computes its codes"


def save(sae: SAE, folder: Path, metadata: dict[str, Any] | None = None, frequency_N: Tensor | None = None) -> Path:
    """Write `sae`, which acts on raw activations, into `folder`; the layout has no place for `frequency_N`.

    Raises:
        FormatError: the folder cannot be written, or the layout cannot hold this SAE.
    """
    refusal = cannot_hold(sae)
    if refusal is not None:
        raise FormatError(refusal)
    weights = Weights.of(sae)
    name = sae.written_as["dictionary_learning"]
    layout = CLASSES[name]
    require(weights.tensors, tuple(layout.tensors), f"an SAE of architecture {weights.architecture!r}")
    tensors = weights.tensors if layout.reads_x_minus_b_dec else add_input_bias(weights.tensors)
    state = {theirs: tensors[ours].T if turned else tensors[ours] for ours, (theirs, turned) in layout.tensors.items()}
    settings: dict[str, Any] = {
        "dict_class": name,
        "activation_dim": sae.d_in,
        "dict_size": sae.n_features,
        "device": "cpu",
    }
    if name in WITH_K:
        state["k"] = torch.tensor(sae.k, dtype=torch.int)
        state.setdefault("threshold", torch.tensor(UNSET))
        state["threshold"] = state["threshold"].reshape(())
        settings["k"] = sae.k
    if isinstance(sae, MatryoshkaSAE):
        # Levels of features ordered by frequency are no groups of rows: readers must not take them for such.
        widths = [0, *([sae.n_features] if sae.by_frequency else sae.prefix_widths())]
        sizes = [after - before for before, after in pairwise(widths)]
        state["group_sizes"] = torch.tensor(sizes)
        settings["group_sizes"] = sizes
    known = sae.metadata if metadata is None else metadata
    site = Site.of_hook(str(known.get("hook_name", "")))
    settings |= {
        "lm_name": known.get("model_name"),
        "layer": site.layer if site else known.get("hook_layer"),
        "submodule_name": str(site) if site else None,
    }
    config = {
        "trainer": settings,
        "buffer": {"d_submodule": sae.d_in, "io": "out", "ctx_len": known.get("context_size")},
        "unbraid": settings_to_restore(sae) | metadata_to_restore(known),
    }
    with written_whole(folder) as partial:
        torch.save({key: tensor.contiguous() for key, tensor in state.items()}, partial / WEIGHTS)
        write_json(partial / CONFIG, config)
    return folder


def load(folder: Path, known: Known = NOTHING) -> SAEFolder:
    """Read a `trainer_i` folder.

    Raises:
        FormatError: naming the setting or tensor that is missing, damaged, or cannot be held.
    """
    where = str(folder / CONFIG)
    config = read_json(folder / CONFIG)
    settings = wanted(config, "trainer", dict, where)
    name = wanted(settings, "dict_class", str, where)
    if name not in CLASSES:
        why = "; a crosscoder reads several sites at once" if "cross" in name.lower() else ""
        raise FormatError(f"{where}: dict_class is {name!r}; expected one of {', '.join(CLASSES)}{why}")
    layout = CLASSES[name]
    path = str(folder / WEIGHTS)
    state = {key.removeprefix("_orig_mod."): value for key, value in read_pickle(folder / WEIGHTS).items()}
    normaliser = {key: state.pop(key) for key in NORMALISER if key in state}
    fields: dict[str, Any] = {}
    if name in WITH_K:
        k = state.pop("k", None)
        fields["k"] = wanted(settings if k is None else {"k": _number(k, "k", path)}, "k", int, where)
    if name == "AutoEncoderTopK":
        state.pop("threshold", None)  # its encode takes the top k; the threshold is an alternative it does not use
    if name == "MatryoshkaBatchTopKSAE":
        widths = _widths(state.pop("group_sizes", settings.get("group_sizes")), where)
        if len(widths) > 1 or "unbraid" not in config:
            fields["matryoshka_widths"] = widths
    require(state, tuple(theirs for theirs, _ in layout.tensors.values()), path)
    tensors = {ours: _turned(state[theirs], turned) for ours, (theirs, turned) in layout.tensors.items()}
    if isinstance(shared := tensors.get("threshold"), Tensor) and shared.numel() == 1 and float(shared) == UNSET:
        warnings.warn(
            f"{where}: threshold is {UNSET:g}, which training never set; every positive pre-activation is a "
            "code, as in dictionary_learning itself",
            stacklevel=2,
        )
    steps: list[Step] = [clamp_threshold] if "threshold" in tensors else []
    if not layout.reads_x_minus_b_dec:
        steps.append(subtract_input_bias)
    steps += _normalisation(normaliser, tensors["b_dec"], path)
    weights = Weights(layout.architecture, tensors, fields).folded(where, *steps)
    d_in, n_features = weights.tensors["W_enc"].shape
    require_widths(settings, {"activation_dim": d_in, "dict_size": n_features}, where)
    weights = restored(weights, config.get("unbraid"), "dictionary_learning", name, where)
    metadata = _where_from(settings, config, path_words(folder.parent), where) | restored_metadata(
        config.get("unbraid")
    )
    return SAEFolder(weights.to_sae(where), "dictionary_learning", checked_metadata(metadata | known.metadata, where))


def _where_from(settings: dict[str, Any], config: dict[str, Any], words: str, where: str) -> dict[str, Any]:
    """Model and site, as far as the trainer's settings say them."""
    name, layer = text(settings, "submodule_name", where), settings.get("layer")
    metadata: dict[str, Any] = {"model_name": settings.get("lm_name"), "hook_layer": layer, "submodule_name": name}
    metadata["context_size"] = section(config, "buffer", where).get("ctx_len")
    match = re.search(r"\b(resid_post|resid_pre|mlp_out|attn_out)(?:_layer_|\.)(\d{1,6})$", name or words)
    if match is not None:
        metadata["hook_name"] = f"blocks.{match[2]}.hook_{match[1]}"
    return {key: value for key, value in metadata.items() if value is not None}


def _turned(tensor: Any, turned: bool) -> Any:
    return tensor.T if turned and isinstance(tensor, Tensor) and tensor.ndim == 2 else tensor


def _number(value: Any, name: str, where: str) -> int:
    """A whole number, stored as such or as a tensor of one."""
    number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if isinstance(number, float) and number.is_integer():
        number = int(number)
    if not is_count(number, 1):
        raise FormatError(f"{where}: {name} is {shown(value)}; expected one whole number of at least 1")
    return int(number)


def _widths(sizes: Any, where: str) -> list[int]:
    """Ends of the nested groups, from their sizes."""
    found = sizes.tolist() if isinstance(sizes, Tensor) else sizes
    if not isinstance(found, list) or not found or not all(is_count(size, 1) for size in found):
        raise FormatError(f"{where}: group_sizes is {shown(found)}; expected the sizes of the groups, each at least 1")
    return list(accumulate(found))


def _normalisation(buffers: dict[str, Any], b_dec: Any, where: str) -> list[Step]:
    """What folds the mean and scale of the activations that some forks keep beside the weights."""
    if not buffers:
        return []
    mean_D, scale = buffers.get("activation_mean"), buffers.get("activation_global_scale")
    d_in = b_dec.numel() if isinstance(b_dec, Tensor) else 0
    if not isinstance(mean_D, Tensor) or not isinstance(scale, Tensor) or scale.numel() != 1 or mean_D.numel() != d_in:
        raise FormatError(
            f"{where} has {', '.join(sorted(buffers))}; expected activation_mean [{d_in}] and activation_global_scale, "
            "one number"
        )
    if bool(mean_D.isnan().any()) or bool(scale.isnan().any()):
        return []  # NaN says that normalisation is off
    if not float(scale) > 0 or not bool(mean_D.isfinite().all()):
        raise FormatError(f"{where}: activation_global_scale is {float(scale):g}; expected a positive number")
    centre_D = mean_D.double().reshape(-1)
    return [scale_input(float(scale)), lambda tensors: tensors | {"b_dec": tensors["b_dec"] + centre_D}]
