"""Dictionaries that come with unbraid and have a name of their own: `unbraid.load("smollm2-demo")`.

Each is a SAELens folder inside the package, with weights in bfloat16, a card (README.md), and where its features fire
on held-out text. That text is not ours to pass on, so the folder refers to it; see `feature_model.stored_held_out`.
"""

from pathlib import Path

BUNDLED = {"smollm2-demo": "packaged:smollm2 SmolLM2-135M resid_post.3 layer_3 matryoshka width_4608"}
"""Name -> the words it is found by."""


def is_bundled(text: Path | str) -> bool:
    """Whether this names a dictionary of the package; a file or folder of that name here goes before."""
    return isinstance(text, str) and text in BUNDLED and not Path(text).exists()


def bundled_folder(name: str) -> Path:
    """Where a dictionary of the package lies."""
    return Path(__file__).parent / "dictionaries" / name
