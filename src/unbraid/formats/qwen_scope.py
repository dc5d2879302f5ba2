"""Qwen-Scope: TopK autoencoders of the residual stream, one file `layerL.sae.pt` per layer.

`W_enc[N,D] W_dec[D,N] b_enc b_dec`, both matrices transposed against SAELens'. f keeps the k largest of
relu(x W_enc^T + b_enc); b_dec is not subtracted from the input. k stands in `config.json` or in the name of the
repository, `SAE-Res-MODEL-W32K-L0_50`.
"""

import re
from pathlib import Path
from typing import Any

from unbraid.errors import FormatError
from unbraid.formats.folder import SAEFolder
from unbraid.formats.metadata import checked_metadata
from unbraid.formats.published import NOTHING, Known, path_words
from unbraid.formats.reading import (
    read_json,
    read_pickle,
    require_dtype,
    require_settings,
    require_widths,
    text,
    wanted,
)
from unbraid.formats.weights import PLAIN, Weights, require, subtract_input_bias, transposed

NAME = re.compile(r"layer(\d{1,4})\.sae\.pt")


def recognises(file: Path) -> bool:
    """Whether `file` looks like this layout."""
    return NAME.fullmatch(file.name) is not None and file.is_file()


def load(file: Path, known: Known = NOTHING) -> SAEFolder:
    """Read the SAE of one layer.

    Raises:
        FormatError: the file is damaged, or nothing says k.
    """
    where, layer = str(file), int(NAME.fullmatch(file.name)[1])  # pyright: ignore[reportOptionalSubscript]
    config = read_json(file.parent / "config.json") if (file.parent / "config.json").is_file() else {}
    require_settings(config, {"model_type": ("topk_sae", None), "hook_point": ("resid_post", None)}, where)
    require_dtype(config, where)
    name = re.search(r"SAE-Res-(.+)-W\d+K-L0_(\d+)", path_words(file))
    if config.get("k") is None and name is None:
        raise FormatError(
            f"{where}: nothing says how many codes are active; expected k in config.json beside it, or a folder named "
            "as the repository, such as SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
        )
    k = wanted(config, "k", int, where) if name is None or config.get("k") is not None else int(name[2])
    state = read_pickle(file)
    require(state, PLAIN, where)
    weights = Weights("topk", transposed(state, "W_enc", "W_dec"), {"k": k}).folded(where, subtract_input_bias)
    d_in, n_features = weights.tensors["W_enc"].shape
    require_widths(config, {"d_model": d_in, "d_sae": n_features}, where)
    model = text(config, "base_model", where) or (f"Qwen/{name[1]}" if name else None)
    metadata: dict[str, Any] = {
        "model_name": model,
        "hook_name": f"blocks.{layer}.hook_resid_post",
        "hook_layer": layer,
    }
    return SAEFolder(weights.to_sae(where), "qwen_scope", checked_metadata(metadata | known.metadata, where))
