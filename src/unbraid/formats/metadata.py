"""Where a published SAE belongs: the entries that unbraid acts on, under SAELens' names, checked as they are read."""

from typing import Any

from unbraid.errors import FormatError
from unbraid.formats.reading import flag, section, shown, text, wanted
from unbraid.json_files import is_count, is_number

TEXTS = ("model_name", "hook_name", "hook_name_out", "dataset_path", "model_class_name", "neuronpedia_id")
COUNTS = ("context_size", "training_tokens")


def checked_metadata(metadata: dict[str, Any], where: str) -> dict[str, Any]:
    """`metadata` without its nulls, but for `norm_limit`: there null says that every row counts.

    Raises:
        FormatError: an entry that unbraid acts on has the wrong type.
    """
    for name in TEXTS:
        text(metadata, name, where)
    for name in COUNTS:
        if metadata.get(name) is not None:
            wanted(metadata, name, int, where)
    layer = metadata.get("hook_layer")
    if layer is not None and (not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < 1_000_000):
        raise FormatError(f"{where}: hook_layer is {shown(layer)}; expected the number of a layer; correct it")
    limit = metadata.get("norm_limit")
    if limit is not None and not (is_number(limit) and limit > 1):
        raise FormatError(f"{where}: norm_limit is {shown(limit)}; expected a number above 1, or no such entry")
    widths = metadata.get("widths_out")
    if widths is not None and not (isinstance(widths, list) and widths and all(is_count(w) and w > 0 for w in widths)):
        raise FormatError(f"{where}: widths_out is {shown(widths)}; expected the width of each site; correct it")
    scales = metadata.get("scales_out")
    if scales is not None and not (
        isinstance(scales, list) and len(scales) == len(widths or []) and all(is_number(s) and s > 0 for s in scales)
    ):
        raise FormatError(f"{where}: scales_out is {shown(scales)}; expected a number for each site; correct it")
    flag(metadata, "prepend_bos", True, where)
    section(metadata, "model_from_pretrained_kwargs", where)
    return {name: value for name, value in metadata.items() if value is not None or name == "norm_limit"}
