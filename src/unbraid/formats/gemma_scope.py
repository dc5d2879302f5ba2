"""Gemma Scope's `params.npz`: JumpReLU autoencoders of Gemma 2, read only.

The file is opened without pickles. These SAEs do not subtract b_dec from their input, so b_enc is shifted by b_dec
W_enc: the codes are the same. The archive says nothing about the model; the folder it lies in does, such as
`layer_20/width_16k/average_l0_71`.
"""

import zipfile
from pathlib import Path

import numpy as np
import torch

from unbraid.errors import FormatError
from unbraid.formats.folder import SAEFolder
from unbraid.formats.weights import THRESHOLDED, Weights, require, subtract_input_bias

WEIGHTS = "params.npz"


def recognises(folder: Path) -> bool:
    """Whether `folder` looks like this layout."""
    return (folder / WEIGHTS).is_file()


def load(folder: Path) -> SAEFolder:
    """Read a folder with a `params.npz`.

    Raises:
        FormatError: the file is damaged, needs pickles, or lacks a tensor.
    """
    path = folder / WEIGHTS
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            tensors = {_our_name(name): torch.from_numpy(np.array(archive[name])) for name in archive.files}
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise FormatError(f"cannot read {str(path)!r}: {error}; expected an intact npz archive of numbers") from None
    require(tensors, THRESHOLDED, str(path))
    tensors["threshold"] = tensors["threshold"].clamp(min=0)
    sae = Weights("jumprelu", subtract_input_bias(tensors)).to_sae(str(path))
    return SAEFolder(sae, "gemma_scope", {"folder": "/".join(folder.resolve().parts[-3:])})


def _our_name(name: str) -> str:
    return f"W_{name[2:]}" if name.startswith("w_") else name
