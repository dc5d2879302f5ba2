"""Dictionaries that several layers share and that unbraid does not read: recognised, and refused by name."""

import re
from pathlib import Path
from typing import NoReturn

from unbraid.errors import FormatError
from unbraid.formats.published import NOTHING, Known

FILES = {
    r"latest_ckpt\.safetensors": "a temporal SAE, whose codes depend on the whole sequence,",
}


def recognises(folder: Path) -> bool:
    """Whether `folder` holds one."""
    return _what(folder) is not None


def load(folder: Path, known: Known = NOTHING) -> NoReturn:
    """Refuse it.

    Raises:
        FormatError: always.
    """
    raise FormatError(
        f"{str(folder)!r} holds {_what(folder)}; expected a dictionary that reads one site, token by token; "
        "choose an SAE or a transcoder of one layer"
    )


def _what(folder: Path) -> str | None:
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return next((what for pattern, what in FILES.items() if any(re.fullmatch(pattern, name) for name in names)), None)
