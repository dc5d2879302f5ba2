"""The SAELens folder (version 6): `cfg.json`, `sae_weights.safetensors`, and firing frequencies if they are known.

This is the layout unbraid itself saves in, so every SAE must fit: an architecture SAELens has no inference class for is
written as the one that gives the same codes (batch_topk and matryoshka as jumprelu with the threshold training arrived
at, denoising as standard), and `metadata.unbraid` keeps what it was, so that unbraid restores it. Folders of SAELens 3
to 5, which keep everything in one flat `cfg.json`, are read too.
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
    GATED,
    ONE_THRESHOLD,
    PLAIN,
    THRESHOLDED,
    Weights,
    fold_decoder_norms,
    require,
    restored,
    settings_to_restore,
    subtract_input_bias,
)
from unbraid.sae import SAE
from unbraid.sites import Site

CONFIG, WEIGHTS, FREQUENCIES = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
LAYOUT_VERSION = "6.0.0"
"""What `metadata.sae_lens_version` says; below 6, SAELens would migrate the settings and lose some."""

WRITTEN_AS = {
    "relu": "standard",
    "denoising": "standard",
    "sparse_filtering": "standard",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "batch_topk": "jumprelu",
    "matryoshka": "jumprelu",
    "gated": "gated",
}
READ_AS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
TENSORS = {"standard": PLAIN, "topk": PLAIN, "jumprelu": THRESHOLDED, "gated": GATED}
NOT_A_FREQUENCY = 1e-10
"""Added before the logarithm, as SAELens does, so that a feature that never fired has one."""


def recognises(folder: Path) -> bool:
    """Whether `folder` looks like this layout."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def cannot_hold(_sae: SAE) -> str | None:
    """Why this layout cannot hold `sae`: never, every architecture has a class with its inference form."""
    return None


def save(sae: SAE, folder: Path, metadata: dict[str, Any] | None = None, frequency_N: Tensor | None = None) -> Path:
    """Write `sae`, which acts on raw activations, into `folder`.

    Args:
        sae: any architecture.
        folder: made, or replaced as a whole.
        metadata: what is known about where the SAE belongs: model_name, hook_name, context_size, ...
        frequency_N: `[N]` share of tokens each feature fired on.

    Raises:
        FormatError: the folder cannot be written, or the layout cannot hold this SAE.
    """
    weights = Weights.of(sae)
    architecture = WRITTEN_AS[weights.architecture]
    tensors = dict(weights.tensors)
    if weights.architecture in ONE_THRESHOLD:
        tensors["threshold"] = tensors["threshold"].reshape(1).expand(sae.n_features).contiguous()
    require(tensors, TENSORS[architecture], f"an SAE of architecture {weights.architecture!r}")
    config: dict[str, Any] = {
        "architecture": architecture,
        "d_in": sae.d_in,
        "d_sae": sae.n_features,
        "dtype": str(tensors["W_dec"].dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": LAYOUT_VERSION, "sae_lens_training_version": None}
        | (metadata or {})
        | {"unbraid": settings_to_restore(sae)},
    }
    if architecture == "topk":
        config |= {"k": sae.config.k, "rescale_acts_by_decoder_norm": False}
    with written_whole(folder) as partial:
        write_json(partial / CONFIG, config)
        write_tensors(partial / WEIGHTS, tensors)
        if frequency_N is not None:
            log10_frequency_N = (frequency_N.detach().cpu().float() + NOT_A_FREQUENCY).log10()
            write_tensors(partial / FREQUENCIES, {"sparsity": log10_frequency_N})
    return folder


def load(folder: Path) -> SAEFolder:
    """Read a folder written by SAELens 3 to 6 or by `save`.

    Raises:
        FormatError: naming the setting or tensor that is missing, damaged, or cannot be held.
    """
    where = str(folder / CONFIG)
    config = read_json(folder / CONFIG)
    metadata = config.get("metadata") or _flat_metadata(config)
    _refuse_what_changes_activations(config, where)
    architecture, k = _architecture(config, where)
    tensors = read_tensors(folder / WEIGHTS)
    tensors.pop("scaling_factor", None)
    require(tensors, TENSORS[architecture], str(folder / WEIGHTS))
    if architecture == "jumprelu":
        # relu(pre) * (pre > threshold): below zero the threshold changes nothing.
        tensors["threshold"] = tensors["threshold"].clamp(min=0)
    if not config.get("apply_b_dec_to_input", True):
        tensors = subtract_input_bias(tensors)
    if config.get("rescale_acts_by_decoder_norm", False):
        tensors = fold_decoder_norms(tensors)
    weights = Weights(READ_AS[architecture], tensors, {} if k is None else {"k": k})
    weights = restored(weights, metadata.get("unbraid"), WRITTEN_AS, architecture, where)
    frequencies = folder / FREQUENCIES
    log10_frequency_N = read_tensors(frequencies).get("sparsity") if frequencies.is_file() else None
    return SAEFolder(weights.to_sae(where), "sae_lens", metadata, log10_frequency_N)


def _architecture(config: dict[str, Any], where: str) -> tuple[str, int | None]:
    """SAELens' name of the architecture, and k where there is one."""
    name = config.get("architecture", "standard")
    activation = config.get("activation_fn_str", config.get("activation_fn", "relu"))
    if activation == "topk" or name == "topk":
        arguments = config.get("activation_fn_kwargs") or {}
        return "topk", wanted({"k": config.get("k", arguments.get("k"))}, "k", int, where)
    require_settings({"activation_fn": activation}, {"activation_fn": "relu"}, where)
    if name not in READ_AS:
        raise FormatError(
            f"{where}: architecture is {name!r}; expected one of {', '.join(READ_AS)}; a training checkpoint of "
            "SAELens becomes readable with its save_inference_model"
        )
    return name, None


def _refuse_what_changes_activations(config: dict[str, Any], where: str) -> None:
    if config.get("normalize_activations") in ("expected_average_only_in", True):
        raise FormatError(
            f"{where}: normalize_activations is {config['normalize_activations']!r} and the factor is not stored; "
            "expected 'none'; fold the factor in SAELens (fold_activation_norm_scaling_factor) and save again"
        )
    require_settings(
        config,
        {
            "normalize_activations": ("none", None, False),
            "reshape_activations": ("none", None),
            "finetuning_scaling_factor": (False, None),
        },
        where,
    )


def _flat_metadata(config: dict[str, Any]) -> dict[str, Any]:
    """Where an SAE belongs, from the flat settings of SAELens 3 to 5."""
    renamed = {"hook_point": "hook_name", "hook_point_layer": "hook_layer", "hook_point_head_index": "hook_head_index"}
    known = ("model_name", "hook_name", "hook_layer", "hook_head_index", "context_size", "prepend_bos", "dataset_path")
    flat = {renamed.get(name, name): value for name, value in config.items()}
    return {name: flat[name] for name in known if flat.get(name) is not None}


def hook_name(site: str) -> str:
    """`"resid_post.6"` -> `"blocks.6.hook_resid_post"`."""
    return Site.parse(site).hook


def site_of(hook: str) -> str | None:
    """`"blocks.6.hook_resid_post"` -> `"resid_post.6"`; None for a hook that is no site of unbraid's."""
    site = Site.of_hook(hook)
    return None if site is None else str(site)
