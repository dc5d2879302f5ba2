"""An SAE between two layouts: its architecture, its settings and its tensors under one set of names.

Every layout module translates its files to and from `Weights` and knows nothing of the others; this module knows the
SAE classes. What a layout means differently is brought into our inference form by exact algebra in float64 (an encoder
that does not subtract b_dec, a decoder whose row norms rescale the codes), so that outputs are equal, not just names.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from unbraid import sae as architectures
from unbraid.config import SAEConfig, validated
from unbraid.config.overrides import merged
from unbraid.errors import ConfigError, FormatError
from unbraid.formats.imported import Form, ImportedSAE
from unbraid.formats.reading import section, shown
from unbraid.sae import SAE

PER_FEATURE = {"b_enc", "threshold", "b_gate", "b_mag", "r_mag", "b_glu", "selection"}
GATED = ("W_enc", "b_gate", "b_mag", "r_mag", "W_dec", "b_dec")
PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")
THRESHOLDED = (*PLAIN, "threshold")

Step = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""One piece of algebra on the tensors of an SAE."""


@dataclass(frozen=True)
class Weights:
    """What travels between layouts.

    Attributes:
        architecture: a name of `SAEConfig.architecture`.
        tensors: W_enc `[D, N]`, W_dec `[N, D]`, b_dec `[D]` and, by architecture, b_enc, threshold, b_gate, b_mag and
            r_mag, each `[N]` (a threshold shared by all features is `[]`).
        settings: further fields of `SAEConfig`, such as k; what is not given keeps its default.
        form: how codes are computed where no architecture of `SAEConfig` computes them; `architecture` is then the name
            the layout has for it, and W_dec may be `[N, M]` with b_dec `[M]`.
    """

    architecture: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)
    form: Form | None = None

    @classmethod
    def of(cls, sae: SAE) -> "Weights":
        """The weights of an SAE, as contiguous copies on the CPU."""
        state = {name: tensor.detach().cpu().clone() for name, tensor in sae.state_dict().items()}
        tensors = {"W_enc": state.pop("encoder_ND").T.contiguous(), **state}
        if isinstance(sae, ImportedSAE):
            return cls(sae.architecture, tensors, form=sae.form)
        if sae.architecture == "gated":
            tensors.pop("b_enc", None)
        return cls(sae.architecture, tensors, sae.config.model_dump(mode="json", exclude={"architecture"}))

    def folded(self, where: str, *steps: Step) -> "Weights":
        """The same after `steps` of exact algebra in float64, rounded once at the end.

        Args:
            where: the file they came from, for messages.
            steps: from tensors to tensors, in the order given.

        Raises:
            FormatError: a tensor is missing, of the wrong shape or not finite.
        """
        tensors = {name: _at_least_float32(name, tensor, where) for name, tensor in self.tensors.items()}
        _checked_widths(tensors, where, self.form)
        exact = {name: tensor.double() for name, tensor in tensors.items()}
        for step in steps:
            exact = step(exact)
        return replace(self, tensors={name: tensor.to(tensors[name].dtype) for name, tensor in exact.items()})

    def to_sae(self, where: str) -> SAE:
        """An SAE with these weights, in float32 (float64 weights stay float64), ready for inference.

        Args:
            where: the file they came from, for messages.

        Raises:
            FormatError: a tensor is missing, surplus, of the wrong shape or not finite, or a setting is unacceptable.
        """
        tensors = {name: _at_least_float32(name, tensor, where) for name, tensor in self.tensors.items()}
        d_in, n_features = _checked_widths(tensors, where, self.form)
        if self.form is not None:
            return ImportedSAE(self.architecture, self.form, tensors).eval().requires_grad_(False)
        settings = self.settings | {"architecture": self.architecture, "n_features": n_features}
        try:
            config = validated(SAEConfig, _with_k(settings), where)
            sae = architectures.build(config, d_in, torch.Generator().manual_seed(0))
        except ConfigError as error:
            raise FormatError(f"{where} describes no SAE unbraid can hold: {error}") from None
        state = {"encoder_ND": tensors.pop("W_enc").T.contiguous(), **tensors}
        expected = sae.state_dict()
        missing, surplus = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
        if missing or surplus:
            raise FormatError(
                f"{where} lacks {missing or 'nothing'} and holds {surplus or 'nothing'} beyond what an SAE of "
                f"architecture {self.architecture!r} has: {sorted(expected)}; check the architecture it names"
            )
        for name, tensor in state.items():
            state[name] = tensor.reshape(expected[name].shape) if tensor.numel() == expected[name].numel() else tensor
            if state[name].shape != expected[name].shape:
                raise FormatError(
                    f"{where}: tensor {name} has shape {list(tensor.shape)}; expected {list(expected[name].shape)}"
                )
        dtype = state["W_dec"].dtype
        sae = sae.to(dtype)
        sae.load_state_dict(state)
        return sae.eval().requires_grad_(False)


def inference_form(sae: SAE) -> SAE:
    """What layouts hold of an SAE: itself, or of a transcoder in training the one that gives the same codes."""
    if not sae.is_transcoder or not hasattr(sae, "config"):  # dictionaries from elsewhere have none
        return sae
    label = sae.written_as["sae_lens"]
    tensors = Weights.of(sae).tensors
    if sae.threshold_kind == "shared":
        tensors["threshold"] = tensors["threshold"].reshape(1).expand(sae.n_features).contiguous()
    form = Form(
        {"standard": "relu"}.get(label, label),
        k=sae.k if label == "topk" else None,
        subtracts_b_dec=False,
        transcoder=True,
    )
    held = ImportedSAE(transcoder_name(form.activation, sae.W_skip is not None), form, tensors)
    held.metadata = sae.metadata
    return held.eval().requires_grad_(False)


def transcoder_name(activation: str, skips: bool) -> str:
    """What SAELens calls a transcoder with this activation; it has classes for relu and jumprelu only.

    >>> transcoder_name("relu", False), transcoder_name("jumprelu", True), transcoder_name("topk", False)
    ('transcoder', 'jumprelu_skip_transcoder', 'topk_transcoder')
    """
    return ("" if activation == "relu" else f"{activation}_") + ("skip_transcoder" if skips else "transcoder")


def scale_input(factor: float) -> Step:
    """From weights that read x * factor and give y * factor to ones that read x and give y; codes stay the same."""

    def step(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        scaled = dict(tensors)
        scaled["W_enc"] = tensors["W_enc"] * factor
        for name in ("W_dec", "b_dec"):
            scaled[name] = tensors[name] / factor
        return scaled

    return step


def _with_k(settings: dict[str, Any]) -> dict[str, Any]:
    """A k the SAE has features for, where an architecture has one and the file does not say it."""
    kind = SAEConfig.kinds().get(settings["architecture"])
    if kind is None or "k" not in kind.model_fields or "k" in settings:
        return settings
    return settings | {"k": min(kind.model_fields["k"].default, settings["n_features"])}


def subtract_input_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """From an encoder that reads x to one that reads x - b_dec: x W + b = (x - b_dec) W + (b + b_dec W)."""
    return shift_encoder(tensors, tensors["b_dec"].double() @ tensors["W_enc"].double())


def add_input_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """From an encoder that reads x - b_dec to one that reads x; the inverse of `subtract_input_bias`."""
    return shift_encoder(tensors, -(tensors["b_dec"].double() @ tensors["W_enc"].double()))


def shift_encoder(tensors: dict[str, Tensor], shift_N: Tensor) -> dict[str, Tensor]:
    """Pre-activations that are `shift_N` higher, whatever biases the architecture has."""
    shifted = dict(tensors)
    for name, scale in (("b_enc", None), ("b_gate", None), ("b_mag", "r_mag")):
        if name in tensors:
            factor = tensors[scale].double().exp() if scale is not None else 1.0
            shifted[name] = (tensors[name].double() + shift_N * factor).to(tensors[name].dtype)
    return shifted


def fold_decoder_norms(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Unit decoder rows, with codes that carry the norm: W_dec/n, W_enc*n, and biases and thresholds times n."""
    norm_N = tensors["W_dec"].double().norm(dim=1)
    if not bool((norm_N > 0).all()):
        raise FormatError(f"{int((norm_N == 0).sum())} decoder rows are zero and have no norm to fold; expected none")
    unit = dict(tensors)
    unit["W_dec"] = (tensors["W_dec"].double() / norm_N[:, None]).to(tensors["W_dec"].dtype)
    for name in ("W_enc", "b_enc", "threshold", "b_gate", "b_mag"):
        if name in tensors:
            unit[name] = (tensors[name].double() * norm_N).to(tensors[name].dtype)
    return unit


def transposed(tensors: dict[str, Any], *names: str) -> dict[str, Any]:
    """The same with the matrices `names` turned; what is no matrix stays, to be refused by its shape."""
    turned = {name: tensors[name] for name in names if name in tensors}
    matrices = {name: value.T for name, value in turned.items() if isinstance(value, Tensor) and value.ndim == 2}
    return tensors | matrices


def clamp_threshold(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A threshold below zero changes nothing in relu(pre) * (pre > threshold); ours are at least zero."""
    return tensors | {"threshold": tensors["threshold"].clamp(min=0)}


def require(tensors: dict[str, Tensor], names: tuple[str, ...], where: str) -> None:
    """Exactly these tensors must be there.

    Raises:
        FormatError: naming what is missing and what is surplus.
    """
    missing, surplus = [name for name in names if name not in tensors], sorted(set(tensors) - set(names))
    if missing or surplus:
        raise FormatError(
            f"{where} has tensors {sorted(tensors)}; expected exactly {sorted(names)}; "
            f"missing: {', '.join(missing) or 'none'}; surplus: {', '.join(surplus) or 'none'}"
        )


def settings_to_restore(sae: SAE) -> dict[str, Any]:
    """What unbraid keeps beside a layout's own settings, so that `restored` gives back the SAE it was."""
    return {"sae": sae.config.model_dump(mode="json")}


def metadata_to_restore(metadata: dict[str, Any]) -> dict[str, Any]:
    """Where an SAE belongs, kept beside `settings_to_restore` in layouts that have no place for it."""
    return {"metadata": {key: value for key, value in metadata.items() if key != "unbraid"}}


def restored_metadata(kept: Any) -> dict[str, Any]:
    """What `metadata_to_restore` kept; nothing from a file that is not unbraid's."""
    metadata = kept.get("metadata") if isinstance(kept, dict) else None
    return dict(metadata) if isinstance(metadata, dict) else {}


def restored(weights: Weights, kept: Any, layout: str, label: str, where: str) -> Weights:
    """The architecture and settings unbraid trained with, where a layout writes several architectures as one.

    Args:
        weights: as the layout describes them.
        kept: what `settings_to_restore` gave; anything else leaves `weights` as they are.
        layout: a key of `SAE.written_as`.
        label: the layout's architecture of this SAE.
        where: the file, for messages.

    Raises:
        FormatError: `kept` contradicts the file.
    """
    if not isinstance(kept, dict) or "sae" not in kept:
        return weights
    section(kept, "sae", f"{where}: unbraid")
    try:
        config, _ = merged(SAEConfig, kept["sae"] or {}, {}, f"{where}: unbraid.sae")
    except ConfigError as error:
        raise FormatError(f"{error}; written by another version? delete the entry unbraid to read it plainly") from None
    n_features = weights.tensors["W_enc"].shape[1]
    if config.n_features != n_features:
        raise FormatError(
            f"{where}: unbraid.sae.n_features is {config.n_features}, but the weights have {n_features} features; "
            "delete the entry unbraid to read it plainly"
        )
    architecture = architectures.ARCHITECTURES[config.kind]
    written_as = architecture.written_as.get(layout)
    if written_as != label:
        raise FormatError(
            f"{where}: the architecture is {label!r} but unbraid.sae.architecture {config.architecture!r}, which is "
            f"written as {written_as!r}; delete the entry unbraid to read it plainly"
        )
    tensors = dict(weights.tensors)
    if architecture.threshold_kind == "shared":
        tensors["threshold"] = _shared_threshold(tensors["threshold"], where)
    settings = config.model_dump(exclude={"architecture", "n_features"})
    # The file's own k holds, since that is what others read; a setting left to its default stays so.
    settings |= {name: value for name, value in weights.settings.items() if settings.get(name) is not None}
    return Weights(config.architecture, tensors, settings)


def _shared_threshold(threshold: Tensor, where: str) -> Tensor:
    flat = threshold.reshape(-1)
    if not bool((flat == flat[0]).all()):
        raise FormatError(
            f"{where}: threshold runs from {flat.min().item():g} to {flat.max().item():g}; expected one value for all "
            "features, as the architecture it was trained with has; read it as a jumprelu SAE instead"
        )
    return flat[0].clone()


def _checked_widths(tensors: dict[str, Tensor], where: str, form: Form | None) -> tuple[int, int]:
    for name in ("W_enc", "W_dec", "b_dec"):
        if name not in tensors:
            raise FormatError(f"{where} has no tensor {name}; found {sorted(tensors)}")
    W_enc, W_dec = tensors["W_enc"], tensors["W_dec"]
    if W_enc.ndim != 2 or W_dec.ndim != 2 or W_enc.shape[1] != W_dec.shape[0] or min(W_enc.shape + W_dec.shape) < 1:
        raise FormatError(
            f"{where}: the encoder has shape {list(W_enc.shape)} and the decoder {list(W_dec.shape)}; "
            "expected [D, N] and [N, D]"
        )
    (d_in, n_features), d_out = W_enc.shape, W_dec.shape[1]
    if d_in != d_out and not (form is not None and form.transcoder):
        raise FormatError(f"{where} reads {d_in} numbers and gives {d_out}; expected an SAE, which gives what it reads")
    shapes = {"b_dec": [d_out], "W_skip": [d_in, d_out], "W_glu": [d_in, n_features]}
    for name, tensor in tensors.items():
        expected = shapes.get(name, [n_features] if name in PER_FEATURE else list(tensor.shape))
        if list(tensor.shape) != expected and not (name == "threshold" and tensor.numel() == 1):
            raise FormatError(f"{where}: tensor {name} has shape {list(tensor.shape)}; expected {expected}")
        if not bool(tensor.isfinite().all()):
            raise FormatError(f"{where}: tensor {name} holds values that are not finite; expected finite numbers only")
    if form is not None and form.k is not None and not 1 <= form.k <= n_features:
        raise FormatError(f"{where}: k is {form.k}; expected 1 to the number of features, {n_features}")
    return d_in, n_features


def _at_least_float32(name: str, tensor: Any, where: str) -> Tensor:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, Tensor) else shown(tensor)
        raise FormatError(f"{where}: {name} is {kind}; expected a tensor of floating point numbers")
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
