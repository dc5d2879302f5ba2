"""Crosscoders of dictionary_learning's fork for model diffing: `model_final.pt`, or `model.safetensors` from the hub.

`encoder.weight[L,D,N] encoder.bias[N] decoder.weight[L,N,D] decoder.bias[L,D]`: f = relu(sum_l x_l W_enc_l + b_enc),
y_l = f W_dec_l + b_l (Minder et al., arXiv 2504.02922). A BatchTopK one has `k` and `threshold`, and keeps f where f
times the size of its decoder rows is above it; `code_normalization_id` says which size. `activation_mean` and
`activation_global_scale` are of each site. Here it is a dictionary of the sites side by side, as unbraid trains them.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unbraid.errors import FormatError
from unbraid.formats.dictionary_learning import NORMALISER
from unbraid.formats.folder import SAEFolder
from unbraid.formats.metadata import checked_metadata
from unbraid.formats.published import NOTHING, Known
from unbraid.formats.reading import read_pickle, read_tensors, tensor_names
from unbraid.formats.weights import Step, Weights, clamp_threshold, require, subtract_input_bias

PICKLE, HUB = "model_final.pt", "model.safetensors"
LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
SUMMED, TOGETHER, PLAIN = 1, 2, 4
"""Ids of `code_normalization_id`: norms summed over sites, the norm over all of them, none."""
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
    metadata = {"widths_out": [d_in] * sites, "scales_out": scales} | known.metadata
    return SAEFolder(weights.to_sae(where), "crosscoder", checked_metadata(metadata, where))


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
