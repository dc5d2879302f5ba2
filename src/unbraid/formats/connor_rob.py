"""Attention autoencoders of GPT-2 by Kissane, Krzyzanowski and others: `NAME.pt` beside `NAME_cfg.json`.

`W_enc[D,N] b_enc W_dec[N,D] b_dec`, ReLU, b_dec subtracted from the input, which is hook_z with its heads concatenated.
"""

from pathlib import Path

from unbraid.formats.folder import SAEFolder
from unbraid.formats.metadata import checked_metadata
from unbraid.formats.published import NOTHING, Known
from unbraid.formats.reading import read_json, read_pickle, require_widths, text
from unbraid.formats.weights import PLAIN, Weights, require


def recognises(file: Path) -> bool:
    """Whether `file` looks like this layout."""
    return file.suffix == ".pt" and _config(file).is_file()


def load(file: Path, known: Known = NOTHING) -> SAEFolder:
    """Read one autoencoder.

    Raises:
        FormatError: a file is damaged, or the two contradict each other.
    """
    where = str(_config(file))
    config, state = read_json(_config(file)), read_pickle(file)
    require(state, PLAIN, str(file))
    weights = Weights("relu", state).folded(where)
    d_in, n_features = weights.tensors["W_enc"].shape
    require_widths(config, {"act_size": d_in, "dict_size": n_features}, where)
    metadata = {"model_name": "gpt2-small", "hook_name": text(config, "act_name", where), "prepend_bos": True}
    metadata |= {"context_size": 128} | known.metadata
    return SAEFolder(weights.to_sae(where), "connor_rob", checked_metadata(metadata, where))


def _config(file: Path) -> Path:
    return file.with_name(f"{file.stem}_cfg.json")
