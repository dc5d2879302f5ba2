"""What a person says of a dictionary whose folder does not: its model, its site, and a text to read."""

from collections.abc import Sequence
from typing import Any

from unbraid.errors import ConfigError

HUB = "hub:"


def said_by_hand(model: str | None, site: str | None, text: str | Sequence[str] | None) -> dict[str, Any]:
    """Settings of an `EvaluationConfig` from flags, without those that were left out.

    Raises:
        ConfigError: see `text_settings`.
    """
    said: dict[str, Any] = {name: value for name, value in (("model", model), ("site", site)) if value is not None}
    if text is not None:
        said |= {f"text.{name}": value for name, value in text_settings(text).items()}
    return said


def text_settings(text: str | Sequence[str]) -> dict[str, Any]:
    """Settings of a text from how it is named: "packaged", files or folders, or "hub:NAME".

    Example:
        >>> text_settings("hub:roneneldan/TinyStories")["dataset"]
        'roneneldan/TinyStories'

    Raises:
        ConfigError: nothing is named, or several that are not all files.
    """
    names = [text] if isinstance(text, str) else list(text)
    special = [name for name in names if name == "packaged" or name.startswith(HUB)]
    if not names or "" in names or (special and len(names) > 1):
        raise ConfigError(
            f"text is {names}; expected packaged, hub:NAME, or files and folders; give one of these kinds"
        )
    if names == ["packaged"]:
        return {"source": "packaged"}
    if special:
        return {"source": "hub", "dataset": names[0].removeprefix(HUB)}
    # Nothing here was trained on, so half of a small text may be read, where 2 % might be no document.
    return {"source": "files", "paths": names, "held_out_fraction": 0.5}
