"""A dictionary that exists already as the first weights of a new one: `sae.start_from`.

It acts on raw activations, and training has units of its own, so its weights are brought there by exact algebra: before
its first step the new dictionary gives the same codes, up to one scale, and the same reconstruction. So one goes on
from the layer next door, from another library's dictionary, or on another text.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from unbraid import formats
from unbraid.config import RunConfig, SAEConfig
from unbraid.distributed.shard import Shard
from unbraid.errors import ConfigError, FormatError
from unbraid.formats.imported import ImportedSAE
from unbraid.formats.weights import Weights, add_input_bias, fold_decoder_norms, shift_encoder, subtract_input_bias
from unbraid.sae.cross_layer import CrossLayer
from unbraid.sae.site_norms import scale_rows
from unbraid.sites import has_layers
from unbraid.training.normalisation import Normalisation
from unbraid.training.sae_trainer import SAETrainer


@dataclass(frozen=True)
class _Start:
    path: str
    weights: Weights
    subtracts_b_dec: bool


def check_starts(config: RunConfig, widths: list[int]) -> None:
    """Look at what `sae.start_from` names before anything is written.

    Raises:
        ConfigError: it cannot be read, or does not fit what a variant is to be; or there are fewer features than layers
            to have some of them.
    """
    for route in config.routes:
        reads, writes = (tuple(widths[config.sites.index(site)] for site in end) for end in route)
        for variant in config.variants:
            sae = config.variant(variant).sae
            in_blocks = sae.cross_layer and has_layers(str(route))
            layers = CrossLayer(reads, writes, Shard(sae.n_features)) if in_blocks else None
            if sae.start_from is not None:
                start = _read(sae.start_from)
                _require_fit(start, sae, sum(reads), sum(writes), route.is_transcoder)
                _require_layers(start, layers)


@torch.no_grad()
def start_from(trainer: SAETrainer) -> None:
    """Give a trainer before its first step the weights that its settings name, if they name any.

    Raises:
        ConfigError: see `check_starts`.
    """
    settings, sae = trainer.config.sae, trainer.sae
    if settings.start_from is None:
        return
    start = _read(settings.start_from)
    _require_fit(start, settings, sae.d_in, sae.d_out, sae.is_transcoder)
    _require_layers(start, sae.cross_layer)
    out = trainer.normalise if trainer.target is None else trainer.target.normalise
    found = _in_training_units(start, trainer.normalise, out, not sae.is_transcoder)
    own = slice(sae.shard.start, sae.shard.end)
    for name, tensor in sae.state_dict().items():
        stored = found.get(name)
        if stored is None:
            continue
        if name not in sae.shared and stored.ndim > 0:
            stored = stored[own]
        if stored.numel() != tensor.numel():  # One threshold for all, from one for each.
            stored = stored.mean()
        tensor.copy_(stored.reshape(tensor.shape))
    if trainer.optimiser.summed_sites:
        scale_rows(sae, trainer.optimiser.summed_sites)
    if settings.frozen == "near":
        trainer.optimiser.adam.state[sae.W_dec]["start"].copy_(sae.W_dec)


def _read(path: str) -> _Start:
    try:
        sae = formats.load(path)
    except FormatError as problem:
        raise ConfigError(f"sae.start_from: {problem}") from None
    if isinstance(sae, ImportedSAE):
        form = sae.form
        if form.token_norm != "none" or sae.glu_ND is not None or sae.selection is not None:
            raise ConfigError(f"sae.start_from = {path!r} is {sae!r}, whose codes no architecture here computes")
        return _Start(path, Weights.of(sae), form.subtracts_b_dec)
    if not isinstance(getattr(sae, "config", None), SAEConfig):
        raise ConfigError(
            f"sae.start_from = {path!r} is {sae!r}, whose sites have features of their own; expected a dictionary of "
            "one encoder, as unbraid trains and saves them"
        )
    return _Start(path, Weights.of(sae), not sae.is_transcoder)


def _require_fit(start: _Start, settings: SAEConfig, d_in: int, d_out: int, is_transcoder: bool) -> None:
    (reads, n_features), writes = start.weights.tensors["W_enc"].shape, start.weights.tensors["W_dec"].shape[1]
    if (reads, n_features, writes) != (d_in, settings.n_features, d_out):
        raise ConfigError(
            f"sae.start_from = {start.path!r} reads {reads} numbers, has {n_features} features and gives {writes}; "
            f"expected {d_in}, {settings.n_features} and {d_out}; set sae.n_features to {n_features}, or start from a "
            "dictionary of this site's width"
        )
    is_gated = "b_gate" in start.weights.tensors
    if is_gated != (settings.architecture == "gated"):
        raise ConfigError(
            f"sae.start_from = {start.path!r} is {'' if is_gated else 'not '}gated and sae.architecture is "
            f"{settings.architecture!r}; expected a gated one from a gated one, which has biases of its own"
        )
    if "W_skip" in start.weights.tensors and not (is_transcoder and settings.skip):
        raise ConfigError(
            f"sae.start_from = {start.path!r} has a skip connection, and this dictionary would have none; set "
            "sae.skip to true"
        )


def _require_layers(start: _Start, layers: CrossLayer | None) -> None:
    """What a cross-layer transcoder starts from has no weights where it has none."""
    whole = None if layers is None else replace(layers, shard=Shard(layers.shard.n_features))
    tensors = start.weights.tensors
    if whole is not None and not whole.holds(tensors["W_enc"].T, tensors["W_dec"], tensors.get("W_skip")):
        raise ConfigError(
            f"sae.start_from = {start.path!r} reads or writes sites that features of their layer do not; expected a "
            "dictionary trained with sae.cross_layer; set it to false"
        )


def _in_training_units(start: _Start, read: Normalisation, out: Normalisation, subtracts: bool) -> dict[str, Tensor]:
    """From f = J(x E + b), y = f W + c on raw x to the same on (x - mean) * scale, with unit rows, in float64.

    With x = x' / s + m: E' = u E / s and b' = u (b + m E), and with y' = (y - m_out) s_out: W' = W s_out / u and
    c' = (c - m_out) s_out, for any u > 0; thresholds are multiplied with u as well.
    """
    device = read.mean_D.device
    tensors = {name: tensor.to(device, torch.float64) for name, tensor in start.weights.tensors.items()}
    if start.subtracts_b_dec:
        tensors = add_input_bias(tensors)
    mean_D, mean_out_M = read.mean_D.double(), out.mean_D.double()
    scale_out = out.scale
    scale_in = read.scale[:, None] if isinstance(read.scale, Tensor) else read.scale
    unit = float(scale_out.mean()) if isinstance(scale_out, Tensor) else scale_out
    tensors = shift_encoder(tensors, mean_D @ tensors["W_enc"])
    tensors["W_enc"] = tensors["W_enc"] * unit / scale_in
    for name in ("b_enc", "threshold", "b_gate", "b_mag"):
        if name in tensors:
            tensors[name] = tensors[name] * unit
    tensors["W_dec"] = tensors["W_dec"] * scale_out / unit
    constant = tensors["b_dec"] - mean_out_M
    if "W_skip" in tensors:
        constant = constant + mean_D @ tensors["W_skip"]
        tensors["W_skip"] = tensors["W_skip"] / scale_in * scale_out
    tensors["b_dec"] = constant * scale_out
    tensors = fold_decoder_norms(tensors)
    if subtracts:
        tensors = subtract_input_bias(tensors)
    return tensors | {"encoder_ND": tensors["W_enc"].T}
