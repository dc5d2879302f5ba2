"""Crosscoders of dictionary_learning's fork for model diffing: `model_final.pt`, or `model.safetensors` from the hub.

`encoder.weight[L,D,N] encoder.bias[N] decoder.weight[L,N,D] decoder.bias[L,D]`: f = relu(sum_l x_l W_enc_l + b_enc),
y_l = f W_dec_l + b_l (Minder et al., arXiv 2504.02922). A BatchTopK one has `k` and `threshold`, and keeps f where f
times the size of its decoder rows is above it; `code_normalization_id` says which size. `activation_mean` and
`activation_global_scale` are of each site. Here it is a dictionary of the sites side by side, as unbraid trains them.

What unbraid writes is `model_final.pt` of `BatchTopKCrossCoder`, or of `CrossCoder` where codes have no threshold,
without normalisation of activations. A `config.json`, which that library does not read, says where it belongs.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unbraid.errors import FormatError
from unbraid.files import write_json
from unbraid.formats.dictionary_learning import NORMALISER
from unbraid.formats.folder import SAEFolder, written_whole
from unbraid.formats.imported import ImportedSAE
from unbraid.formats.metadata import checked_metadata
from unbraid.formats.published import NOTHING, Known
from unbraid.formats.reading import read_json, read_pickle, read_tensors, tensor_names
from unbraid.formats.weights import (
    Step,
    Weights,
    add_input_bias,
    clamp_threshold,
    metadata_to_restore,
    require,
    restored_metadata,
    subtract_input_bias,
)
from unbraid.sae import SAE

PICKLE, HUB, CONFIG = "model_final.pt", "model.safetensors", "config.json"
LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
SUMMED, TOGETHER, PLAIN = 1, 2, 4
"""Ids of `code_normalization_id`: norms summed over sites, the norm over all of them, none."""
UNUSED_K = 100
"""That library's default; only its training reads it."""
TINY = 1e-8
"""What the library adds to divisors."""


def recognises(folder: Path) -> bool:
    """Whether `folder` looks like this layout."""
    return (folder / PICKLE).is_file() or (
        (folder / HUB).is_file() and tensor_names(folder / HUB).issuperset((*LINEAR, "code_normalization_id"))
    )


def load(folder: Path, known: Known = NOTHING) -> SAEFolder:
    """Read one crosscoder.

    Raises:
        FormatError: a tensor is missing, damaged, or of another shape than the others; or codes are computed in a way
            that its file does not say.
    """
    path = folder / PICKLE if (folder / PICKLE).is_file() else folder / HUB
    found = read_pickle(path) if path.name == PICKLE else read_tensors(path)
    state, where = {name.removeprefix("_orig_mod."): value for name, value in found.items()}, str(path)
    normaliser = {name: state.pop(name) for name in NORMALISER if name in state}
    threshold, how = state.pop("threshold", None), state.pop("code_normalization_id", torch.tensor(SUMMED))
    state.pop("k", None)
    require(state, LINEAR, where)
    W_enc, b_enc, W_dec, b_dec = (state[name] for name in LINEAR)
    sites, d_in, n_features = _shape(W_enc, b_enc, W_dec, b_dec, where)
    tensors = {
        "W_enc": W_enc.reshape(sites * d_in, n_features),
        "b_enc": b_enc,
        "W_dec": W_dec.transpose(0, 1).reshape(n_features, sites * d_in),
        "b_dec": b_dec.reshape(-1),
    }
    steps, scales = _normalisation(normaliser, sites, d_in, where)
    if threshold is not None:
        tensors["threshold"] = _threshold(threshold, how, W_dec, where)
        steps = [clamp_threshold, *steps]
    weights = Weights("relu" if threshold is None else "jumprelu", tensors).folded(where, *steps, subtract_input_bias)
    said = read_json(folder / CONFIG).get("unbraid") if (folder / CONFIG).is_file() else None
    metadata = {"scales_out": scales} | restored_metadata(said) | {"widths_out": [d_in] * sites} | known.metadata
    return SAEFolder(weights.to_sae(where), "crosscoder", checked_metadata(metadata, where))


def cannot_hold(sae: SAE) -> str | None:
    """Why this layout cannot hold `sae`."""
    widths = sae.metadata.get("widths_out", [])
    if sae.is_transcoder or len(widths) < 2 or len(set(widths)) > 1:
        return "it is no crosscoder of sites of one width, A + B; expected one; export to sae_lens"
    tensors = Weights.of(sae).tensors
    if isinstance(sae, ImportedSAE) or not tensors.keys() <= {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}:
        return f"codes are those of {sae.architecture!r}; dictionary_learning's crosscoders have none like them"
    if sae.written_as["dictionary_learning"] == "AutoEncoderTopK":
        return "architecture is 'topk'; expected one with thresholds, such as 'batch_topk'; export to sae_lens"
    if "threshold" in tensors and not bool((tensors["threshold"] > 0).all()):
        return "some thresholds are 0, and its file has one for all features; expected positive ones"
    return None


def save(sae: SAE, folder: Path, metadata: dict[str, Any] | None = None, frequency_N: Tensor | None = None) -> Path:
    """Write a crosscoder, which acts on raw activations, into `folder`; the layout has no place for `frequency_N`.

    Features with thresholds of their own get rows by which each threshold is 1: reconstructions are the same, and codes
    are multiples of what they were.

    Raises:
        FormatError: the folder cannot be written, or the layout cannot hold it.
    """
    refusal = cannot_hold(sae)
    if refusal is not None:
        raise FormatError(refusal)
    sites = len(sae.metadata["widths_out"])
    tensors = add_input_bias({name: tensor.double() for name, tensor in Weights.of(sae).tensors.items()})
    shared, threshold = torch.ones(()), tensors.get("threshold")
    if threshold is not None and threshold.numel() == 1:
        shared = threshold.reshape(())
    elif threshold is not None:
        tensors |= {name: tensors[name] / threshold for name in ("W_enc", "b_enc")}
        tensors["W_dec"] = tensors["W_dec"] * threshold[:, None]
    W_enc, W_dec, b_dec = (tensors[name] for name in ("W_enc", "W_dec", "b_dec"))
    state = {
        "encoder.weight": W_enc.reshape(sites, -1, sae.n_features),
        "encoder.bias": tensors["b_enc"],
        "decoder.weight": W_dec.reshape(sae.n_features, sites, -1).transpose(0, 1),
        "decoder.bias": b_dec.reshape(sites, -1),
    }
    state = {name: tensor.float().contiguous() for name, tensor in state.items()}
    off = torch.full_like(state["decoder.bias"], torch.nan)
    normaliser = (torch.tensor(1.0), off, off.clone(), torch.ones(sites))
    state |= dict(zip(NORMALISER, normaliser, strict=True)) | {"code_normalization_id": torch.tensor(PLAIN)}
    if threshold is not None:
        state |= {"k": torch.tensor(sae.k or UNUSED_K, dtype=torch.int), "threshold": shared.float()}
    kept = metadata_to_restore(sae.metadata | (metadata or {}))
    name = "CrossCoder" if threshold is None else "BatchTopKCrossCoder"
    with written_whole(folder) as partial:
        torch.save(state, partial / PICKLE)
        write_json(partial / CONFIG, {"dict_class": name, "unbraid": kept})
    return folder


def _shape(W_enc: Any, b_enc: Any, W_dec: Any, b_dec: Any, where: str) -> tuple[int, int, int]:
    """Sites L, width D and features N.

    Raises:
        FormatError: the shapes do not fit each other.
    """
    found = [tuple(one.shape) if isinstance(one, Tensor) else () for one in (W_enc, b_enc, W_dec, b_dec)]
    if len(found[0]) == 3:
        sites, d_in, n_features = found[0]
        if found == [(sites, d_in, n_features), (n_features,), (sites, n_features, d_in), (sites, d_in)] and sites > 1:
            return sites, d_in, n_features
    raise FormatError(
        f"{where}: {', '.join(LINEAR)} are {', '.join(map(str, found))}; expected [L, D, N], [N], [L, N, D] and "
        "[L, D], of L sites, two at least, that are read and predicted"
    )


def _threshold(threshold: Any, how: Any, W_dec: Tensor, where: str) -> Tensor:
    """What each feature's code must exceed."""
    kind = int(how) if isinstance(how, Tensor) and how.numel() == 1 else None
    sizes = {
        SUMMED: lambda: W_dec.double().norm(dim=2).sum(0),
        TOGETHER: lambda: W_dec.double().norm(dim=(0, 2)),
        PLAIN: lambda: torch.ones(W_dec.shape[1], dtype=torch.float64),
    }
    if kind not in sizes or not isinstance(threshold, Tensor) or threshold.numel() != 1:
        raise FormatError(
            f"{where}: code_normalization_id is {kind}; expected {SUMMED} (norms summed over sites), {TOGETHER} (over "
            f"all sites together) or {PLAIN} (none), and one threshold; the weights of another kind are not in the file"
        )
    return (float(threshold) / sizes[kind]().clamp(min=1e-30)).to(W_dec.dtype)


def _normalisation(buffers: dict[str, Any], sites: int, d_in: int, where: str) -> tuple[list[Step], list[float]]:
    """What folds (x - mean) * scale of each site, and the scales: ones where it is off, which NaN says."""
    mean, std, scale = (buffers.get(name) for name in NORMALISER[1:])
    if not buffers or (isinstance(mean, Tensor) and bool(mean.isnan().any())):
        return [], [1.0] * sites
    shapes = {"activation_mean": (mean, (sites, d_in)), "activation_std": (std, (sites, d_in))}
    shapes |= {"activation_global_scale": (scale, (sites,))}
    for name, (tensor, wanted) in shapes.items():
        if not isinstance(tensor, Tensor) or tuple(tensor.shape) != wanted or not bool(tensor.isfinite().all()):
            raise FormatError(f"{where}: expected {name} of shape {wanted}, of finite numbers; download it again")
    assert isinstance(mean, Tensor) and isinstance(std, Tensor) and isinstance(scale, Tensor)
    by_site = scale.double()[:, None].expand(sites, d_in)
    if bool((scale == 1).all()):  # Then each column is divided by its own spread.
        read_LD, written_LD = 1 / (std.double() + TINY), 1 / (std.double() + TINY)
    else:
        read_LD, written_LD = by_site, by_site + TINY
    if not bool((read_LD > 0).all()):
        raise FormatError(f"{where}: activation_global_scale is {scale.tolist()}; expected positive numbers")
    read_M, written_M, mean_M = read_LD.reshape(-1), written_LD.reshape(-1), mean.double().reshape(-1)

    def fold(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        W_enc = tensors["W_enc"] * read_M[:, None]
        return tensors | {
            "W_enc": W_enc,
            "b_enc": tensors["b_enc"] - mean_M @ W_enc,
            "W_dec": tensors["W_dec"] / written_M,
            "b_dec": tensors["b_dec"] / written_M + mean_M,
        }

    return [fold], [float(one.mean()) for one in read_LD]
