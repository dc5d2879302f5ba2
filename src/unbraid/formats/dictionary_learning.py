"""The dictionary_learning folder (`trainer_i/`): `ae.pt`, a pickled state dict, beside `config.json`.

The pickle is read with `weights_only=True`, which refuses anything but tensors and plain containers. Each class there
names its tensors its own way; the table below is the whole translation. Two of them, JumpReLU and the April-2024
AutoEncoderNew, do not subtract b_dec from their input, so their encoder bias is shifted by b_dec W_enc on the way.
"""

import pickle
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unbraid.errors import FormatError
from unbraid.files import write_json
from unbraid.formats.folder import SAEFolder, read_json, wanted, written_whole
from unbraid.formats.weights import (
    Weights,
    add_input_bias,
    metadata_to_restore,
    require,
    restored,
    restored_metadata,
    settings_to_restore,
    subtract_input_bias,
)
from unbraid.sae import SAE
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
WRITTEN_AS = {
    "relu": "AutoEncoder",
    "denoising": "AutoEncoder",
    "sparse_filtering": "AutoEncoder",
    "topk": "AutoEncoderTopK",
    "batch_topk": "BatchTopKSAE",
    "matryoshka": "MatryoshkaBatchTopKSAE",
    "jumprelu": "JumpReluAutoEncoder",
    "gated": "GatedAutoEncoder",
}
WITH_K = ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE")


def recognises(folder: Path) -> bool:
    """Whether `folder` looks like this layout."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def cannot_hold(_sae: SAE) -> str | None:
    """Why this layout cannot hold `sae`: never, every architecture has a class with its inference form."""
    return None


def save(sae: SAE, folder: Path, metadata: dict[str, Any] | None = None, frequency_N: Tensor | None = None) -> Path:
    """Write `sae`, which acts on raw activations, into `folder`; the layout has no place for `frequency_N`.

    Raises:
        FormatError: the folder cannot be written, or the layout cannot hold this SAE.
    """
    weights = Weights.of(sae)
    name = WRITTEN_AS[weights.architecture]
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
        state["k"] = torch.tensor(sae.config.k, dtype=torch.int)
        state.setdefault("threshold", torch.tensor(UNSET))
        state["threshold"] = state["threshold"].reshape(())
        settings["k"] = sae.config.k
    if name == "MatryoshkaBatchTopKSAE":
        widths = [0, *sae.prefix_widths()]
        sizes = [after - before for before, after in pairwise(widths)]
        state["group_sizes"] = torch.tensor(sizes)
        settings["group_sizes"] = sizes
    known = metadata or {}
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


def load(folder: Path) -> SAEFolder:
    """Read a `trainer_i` folder.

    Raises:
        FormatError: naming the setting or tensor that is missing, damaged, or cannot be held.
    """
    where = str(folder / CONFIG)
    config = read_json(folder / CONFIG)
    settings = wanted(config, "trainer", dict, where)
    name = wanted(settings, "dict_class", str, where)
    if name not in CLASSES:
        raise FormatError(f"{where}: dict_class is {name!r}; expected one of {', '.join(CLASSES)}")
    layout = CLASSES[name]
    state = _read_state(folder / WEIGHTS)
    fields: dict[str, Any] = {}
    if name in WITH_K:
        k = state.pop("k", None)
        fields["k"] = int(k) if k is not None else wanted(settings, "k", int, where)
    if name == "AutoEncoderTopK":
        state.pop("threshold", None)  # its encode takes the top k; the threshold is an alternative it does not use
    if name == "MatryoshkaBatchTopKSAE":
        sizes = state.pop("group_sizes", torch.tensor(settings.get("group_sizes", [])))
        fields["matryoshka_widths"] = sizes.cumsum(0).tolist()
    require(state, tuple(theirs for theirs, _ in layout.tensors.values()), str(folder / WEIGHTS))
    tensors = {ours: state[theirs].T if turned else state[theirs] for ours, (theirs, turned) in layout.tensors.items()}
    if "threshold" in tensors:
        if tensors["threshold"].numel() == 1 and float(tensors["threshold"]) == UNSET:
            warnings.warn(
                f"{where}: threshold is {UNSET:g}, which training never set; every positive pre-activation is a "
                "code, as in dictionary_learning itself",
                stacklevel=2,
            )
        # relu(pre) * (pre > threshold): below zero the threshold changes nothing.
        tensors["threshold"] = tensors["threshold"].clamp(min=0)
    if not layout.reads_x_minus_b_dec:
        tensors = subtract_input_bias(tensors)
    weights = restored(Weights(layout.architecture, tensors, fields), config.get("unbraid"), WRITTEN_AS, name, where)
    metadata = {"model_name": settings.get("lm_name"), "hook_layer": settings.get("layer")}
    metadata = {key: value for key, value in metadata.items() if value is not None}
    metadata |= restored_metadata(config.get("unbraid"))
    return SAEFolder(weights.to_sae(where), "dictionary_learning", metadata)


def _read_state(path: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FormatError(
            f"cannot read {str(path)!r}: {reason}; expected a state dict of tensors; a pickle that needs more than "
            "tensors could run code and is never opened"
        ) from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise FormatError(f"{str(path)!r} holds {type(state).__name__}; expected a state dict of tensors only")
    return dict(state)
