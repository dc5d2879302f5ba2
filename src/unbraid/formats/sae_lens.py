"""The SAELens folder (version 6): `cfg.json`, `sae_weights.safetensors`, and firing frequencies if they are known.

This is the layout unbraid itself saves in, so every SAE must fit: an architecture SAELens has no inference class for is
written as the one that gives the same codes (batch_topk and matryoshka as jumprelu with the threshold training arrived
at, denoising as standard), and `metadata.unbraid` keeps what it was, so that unbraid restores it. Transcoders are read
back in inference form, and topk and gated ones by unbraid alone. Folders of SAELens 3 to 5, which keep everything in
one flat `cfg.json`, are read too.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from unbraid.errors import FormatError
from unbraid.files import write_json
from unbraid.formats.folder import SAEFolder, write_tensors, written_whole
from unbraid.formats.imported import Form, ImportedSAE
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
    shown,
    text,
    wanted,
)
from unbraid.formats.weights import (
    GATED,
    PLAIN,
    THRESHOLDED,
    Step,
    Weights,
    clamp_threshold,
    fold_decoder_norms,
    require,
    restored,
    scale_input,
    settings_to_restore,
    subtract_input_bias,
    transcoder_name,
)
from unbraid.sae import SAE
from unbraid.sites import Site

CONFIG, WEIGHTS, FREQUENCIES = "cfg.json", "sae_weights.safetensors", "sparsity.safetensors"
LAYOUT_VERSION = "6.0.0"
"""What `metadata.sae_lens_version` says; below 6, SAELens would migrate the settings and lose some."""

READ_AS = {
    "standard": "relu",
    "topk": "topk",
    "jumprelu": "jumprelu",
    "gated": "gated",
    "abstopk": "abstopk",
    "matching_pursuit": "matching_pursuit",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
    "topk_transcoder": "topk",
    "topk_skip_transcoder": "topk",
    "gated_transcoder": "gated",
    "gated_skip_transcoder": "gated",
}
"""The last four are unbraid's own: SAELens has no class for them, and says so of a folder that names one."""
TENSORS = {
    "standard": PLAIN,
    "topk": PLAIN,
    "jumprelu": THRESHOLDED,
    "gated": GATED,
    "abstopk": PLAIN,
    "matching_pursuit": ("W_dec", "b_dec"),
    "transcoder": PLAIN,
    "skip_transcoder": (*PLAIN, "W_skip"),
    "jumprelu_transcoder": THRESHOLDED,
    "jumprelu_skip_transcoder": (*THRESHOLDED, "W_skip"),
    "topk_transcoder": PLAIN,
    "topk_skip_transcoder": (*PLAIN, "W_skip"),
    "gated_transcoder": GATED,
    "gated_skip_transcoder": (*GATED, "W_skip"),
}
PURSUIT = ("residual_threshold", "max_iterations", "stop_on_duplicate_support")
IMPORTED = ("abstopk", "matching_pursuit")
"""Activations that no architecture unbraid trains has."""
TOKEN_NORMS = ("constant_norm_rescale", "layer_norm")
"""Values of normalize_activations that are a norm per token, which no weights can hold."""
NOT_A_FREQUENCY = 1e-10
"""Added before the logarithm, as SAELens does, so that a feature that never fired has one."""


def recognises(folder: Path) -> bool:
    """Whether `folder` looks like this layout."""
    return (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file()


def cannot_hold(sae: SAE) -> str | None:
    """Why this layout cannot hold `sae`, naming what; every architecture unbraid trains has a class there."""
    if not isinstance(sae, ImportedSAE):
        return None
    if _imported_as(sae) in READ_AS and sae.selection is None and sae.glu_ND is None:
        return None
    return f"architecture is {sae.architecture!r}, for which SAELens has no class; expected one of {', '.join(READ_AS)}"


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
    refusal = cannot_hold(sae)
    if refusal is not None:
        raise FormatError(refusal)
    architecture, tensors, settings = _imported(sae) if isinstance(sae, ImportedSAE) else _trained(sae)
    require(tensors, TENSORS[architecture], f"an SAE of architecture {sae.architecture!r}")
    known = sae.metadata if metadata is None else metadata
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
        | {name: value for name, value in known.items() if name != "unbraid"},
    }
    config |= settings
    if not isinstance(sae, ImportedSAE):
        config["metadata"] |= {"unbraid": settings_to_restore(sae)}
    with written_whole(folder) as partial:
        write_json(partial / CONFIG, config)
        write_tensors(partial / WEIGHTS, tensors)
        if frequency_N is not None:
            log10_frequency_N = (frequency_N.detach().cpu().float() + NOT_A_FREQUENCY).log10()
            write_tensors(partial / FREQUENCIES, {"sparsity": log10_frequency_N})
    return folder


def _trained(sae: SAE) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """SAELens' architecture, its tensors, and the settings that only it has."""
    weights = Weights.of(sae)
    architecture = sae.written_as["sae_lens"]
    tensors = dict(weights.tensors)
    if sae.threshold_kind == "shared":
        tensors["threshold"] = tensors["threshold"].reshape(1).expand(sae.n_features).contiguous()
    settings = {"k": sae.k, "rescale_acts_by_decoder_norm": False} if architecture == "topk" else {}
    return architecture, tensors, settings


def _imported(sae: ImportedSAE) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """The same of a dictionary that unbraid does not train."""
    architecture, form, tensors = _imported_as(sae), sae.form, Weights.of(sae).tensors
    settings: dict[str, Any] = {
        "apply_b_dec_to_input": form.subtracts_b_dec,
        "normalize_activations": form.token_norm,
    }
    if form.transcoder:
        settings["d_out"] = sae.d_out
    if "W_skip" in tensors:
        tensors["W_skip"] = tensors["W_skip"].T
    if form.activation in ("topk", "abstopk"):
        settings |= {"k": form.k, "rescale_acts_by_decoder_norm": False}
    if form.activation == "matching_pursuit":
        tensors.pop("W_enc")
        settings |= {name: getattr(form, name) for name in PURSUIT}
    return architecture, tensors, settings


def _imported_as(sae: ImportedSAE) -> str:
    """SAELens' name for it, which is in READ_AS if it has one."""
    if sae.form.transcoder:
        return transcoder_name(sae.form.activation, sae.W_skip is not None)
    return {"relu": "standard"}.get(sae.form.activation, sae.form.activation)


def load(folder: Path, known: Known = NOTHING) -> SAEFolder:
    """Read a folder written by SAELens 3 to 6 or by `save`.

    Args:
        folder: the folder.
        known: `norm_scaling_factor` is for SAEs whose normalize_activations is "expected_average_only_in"; their
            folders do not say it.

    Raises:
        FormatError: naming the setting or tensor that is missing, damaged, or cannot be held.
    """
    where = str(folder / CONFIG)
    config = read_json(folder / CONFIG) | known.settings
    metadata = section(config, "metadata", where) or _flat_metadata(config)
    metadata = checked_metadata(metadata | _flat_metadata(known.settings) | known.metadata, where)
    tensors = read_tensors(folder / WEIGHTS)
    weights, steps = _inference_form(config, tensors, known.norm_scaling_factor, where)
    weights = weights.folded(where, *steps)
    d_in, d_out = weights.tensors["W_enc"].shape[0], weights.tensors["W_dec"].shape[1]
    require_widths(config, {"d_in": d_in, "d_sae": weights.tensors["W_enc"].shape[1], "d_out": d_out}, where)
    if (widths := metadata.get("widths_out")) is not None and sum(widths) != d_out:
        raise FormatError(f"{where}: widths_out is {shown(widths)}; expected widths of sites that make up {d_out}")
    require_dtype(config, where)
    text(config, "device", where)
    checked_metadata(_flat_metadata(config), where)
    section(metadata, "unbraid", where)
    if weights.form is None:
        weights = restored(weights, metadata.get("unbraid"), "sae_lens", _architecture(config, where)[0], where)
    frequencies = folder / FREQUENCIES
    log10_frequency_N = _frequencies(frequencies, d_sae=weights.tensors["W_enc"].shape[1])
    return SAEFolder(weights.to_sae(where), "sae_lens", metadata, log10_frequency_N)


def _inference_form(
    config: dict[str, Any], tensors: dict[str, Tensor], norm_scaling_factor: float | None, where: str
) -> tuple[Weights, list[Step]]:
    """The weights as they are, and what must be folded into them."""
    architecture, k = _architecture(config, where)
    steps = [*_finetuned(config, tensors, where), *_input_scale(config, norm_scaling_factor, where)]
    require(tensors, TENSORS[architecture], where)
    transcoder = architecture.endswith("transcoder")
    activation = READ_AS[architecture]
    token_norm = config.get("normalize_activations")
    form = Form(
        activation,
        k=k,
        token_norm=token_norm if token_norm in TOKEN_NORMS else "none",
        subtracts_b_dec=flag(config, "apply_b_dec_to_input", not transcoder, where),
        transcoder=transcoder,
    )
    if transcoder and form.subtracts_b_dec:
        raise FormatError(f"{where}: apply_b_dec_to_input is true; a transcoder's b_dec is no input; expected false")
    if flag(config, "rescale_acts_by_decoder_norm", False, where):
        steps.append(fold_decoder_norms)
    if activation == "jumprelu":
        steps.append(clamp_threshold)
    if activation == "matching_pursuit":
        tensors = tensors | {"W_enc": tensors["W_dec"].T}
        form = replace(form, **_pursuit(config, where))
    if "W_skip" in tensors:
        tensors = tensors | {"W_skip": tensors["W_skip"].T}
    if activation in IMPORTED or form.token_norm != "none" or transcoder:
        return Weights(architecture if transcoder else activation, tensors, form=form), steps
    if not form.subtracts_b_dec:
        steps.insert(0, subtract_input_bias)
    return Weights(activation, tensors, {} if k is None else {"k": k}), steps


def _architecture(config: dict[str, Any], where: str) -> tuple[str, int | None]:
    """SAELens' name of the architecture, and k where there is one."""
    name = text(config, "architecture", where) or "standard"
    activation = text(config, "activation_fn_str", where) or text(config, "activation_fn", where) or "relu"
    if name == "standard" and activation == "topk":
        name = "topk"
    arguments = section(config, "activation_fn_kwargs", where)
    if name in ("topk", "abstopk", "topk_transcoder", "topk_skip_transcoder"):
        return name, wanted({"k": config.get("k", arguments.get("k"))}, "k", int, where)
    if config.get("k") is not None:
        wanted(config, "k", int, where)
    require_settings({"activation_fn": activation}, {"activation_fn": "relu"}, where)
    if name not in READ_AS:
        raise FormatError(
            f"{where}: architecture is {name!r}; expected one of {', '.join(READ_AS)}; a training checkpoint of "
            "SAELens becomes readable with its save_inference_model"
        )
    return name, None


def _input_scale(config: dict[str, Any], norm_scaling_factor: float | None, where: str) -> list[Step]:
    """What undoes a constant scale of the activations."""
    require_settings(config, {"reshape_activations": ("none", None, "hook_z")}, where)
    said = config.get("normalize_activations")
    if said not in ("expected_average_only_in", True):
        require_settings(config, {"normalize_activations": ("none", None, False, *TOKEN_NORMS)}, where)
        return []
    if norm_scaling_factor is None:
        raise FormatError(
            f"{where}: normalize_activations is {said!r} and the folder does not hold the factor; expected 'none', or "
            "the factor; give unbraid.load(path, norm_scaling_factor=...), or fold it in SAELens "
            "(fold_activation_norm_scaling_factor) and save again"
        )
    return [scale_input(norm_scaling_factor)]


def _finetuned(config: dict[str, Any], tensors: dict[str, Tensor], where: str) -> list[Step]:
    """What folds the factors that finetuning multiplies codes with before they are decoded."""
    finetuned = flag(config, "finetuning_scaling_factor", False, where)
    factor_N = tensors.pop("scaling_factor", None)
    if factor_N is None and finetuned:
        raise FormatError(f"{where}: finetuning_scaling_factor is true, but there is no tensor scaling_factor")
    if factor_N is None or bool((factor_N == 1).all()):
        return []
    W_dec = tensors.get("W_dec")
    if not finetuned or W_dec is None or factor_N.ndim != 1 or factor_N.shape[:1] != W_dec.shape[:1]:
        raise FormatError(
            f"{where}: the tensor scaling_factor has shape {list(factor_N.shape)} and is not all ones, and "
            f"finetuning_scaling_factor is {finetuned}; expected one factor per feature, and true"
        )
    return [lambda exact: exact | {"W_dec": exact["W_dec"] * factor_N.double()[:, None]}]


def _pursuit(config: dict[str, Any], where: str) -> dict[str, Any]:
    """When matching pursuit ends."""
    settings: dict[str, Any] = {"stop_on_duplicate_support": flag(config, "stop_on_duplicate_support", True, where)}
    if config.get("residual_threshold") is not None:
        settings["residual_threshold"] = float(wanted(config, "residual_threshold", (int, float), where))
    if config.get("max_iterations") is not None:
        settings["max_iterations"] = wanted(config, "max_iterations", int, where)
    return settings


def _frequencies(path: Path, d_sae: int) -> Tensor | None:
    if not path.is_file():
        return None
    found = read_tensors(path).get("sparsity")
    if found is not None and (list(found.shape) != [d_sae] or not found.is_floating_point()):
        raise FormatError(f"{str(path)!r} holds {list(found.shape)} {found.dtype}; expected [{d_sae}] of numbers")
    return found


def _flat_metadata(config: dict[str, Any]) -> dict[str, Any]:
    """Where an SAE belongs, from the flat settings of SAELens 3 to 5."""
    renamed = {"hook_point": "hook_name", "hook_point_layer": "hook_layer", "hook_point_head_index": "hook_head_index"}
    known = (
        *("model_name", "hook_name", "hook_layer", "hook_head_index", "context_size", "prepend_bos", "dataset_path"),
        *("model_from_pretrained_kwargs", "model_class_name", "neuronpedia_id", "training_tokens"),
    )
    flat = {renamed.get(name, name): value for name, value in config.items()}
    return {name: flat[name] for name in known if flat.get(name) is not None}


def hook_name(site: str) -> str:
    """`"resid_post.6"` -> `"blocks.6.hook_resid_post"`."""
    return Site.parse(site).hook


def site_of(hook: str) -> str | None:
    """`"blocks.6.hook_resid_post"` -> `"resid_post.6"`; None for a hook that is no site of unbraid's."""
    site = Site.of_hook(hook)
    return None if site is None else str(site)
