"""JSON files that a user names: written whole, and replaced only where unbraid wrote them.

Such a file says itself who wrote it, as in `"written_by": "unbraid synth"`; folders have a marker (`owned_folders`).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unbraid.errors import UnbraidError
from unbraid.files import write_whole
from unbraid.json_files import finite, read_json_object


def write_owned_json(
    path: Path, data: Mapping[str, Any], kind: str, *, error: type[UnbraidError], overwrite: bool = True
) -> str:
    """Write `data` and who wrote it; returns the text of the file.

    Args:
        path: a new file, or one of the same kind that unbraid wrote.
        data: JSON.
        kind: what the file is, in a word or two: "synth report".
        error: class of the errors raised.
        overwrite: whether a file of that kind may be replaced.

    Raises:
        UnbraidError: of class `error`: the place holds something else, or cannot be written.
    """
    check_owned_json(path, kind, error=error, overwrite=overwrite)
    text = json_text({"written_by": f"unbraid {kind}", **data})
    try:
        write_whole(path, lambda partial: _write(partial, text))
    except (OSError, ValueError) as problem:
        raise error(
            f"cannot write {str(path)!r}: {getattr(problem, 'strerror', None) or problem}; expected a writable place"
        ) from problem
    return text


def json_text(data: Any) -> str:
    """JSON in one line; a number that is none (NaN, infinities) is null."""
    return json.dumps(finite(data), ensure_ascii=False, allow_nan=False)


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")


def check_owned_json(path: Path, kind: str, *, error: type[UnbraidError], overwrite: bool = True) -> None:
    """Refuse a place that `write_owned_json` would refuse, before any work is done.

    Raises:
        UnbraidError: of class `error`, saying what is there.
    """
    expected = f"expected a new file, or a {kind} that unbraid wrote; choose another place, or move it away"
    try:
        if path.is_symlink():
            raise error(f"{str(path)!r} is a symbolic link; {expected}")
        if not path.parent.is_dir():
            raise error(f"{str(path)!r} cannot be written: there is no folder {str(path.parent)!r}; make it first")
        if not path.exists():
            return
    except (OSError, ValueError) as problem:
        raise error(f"{str(path)!r} cannot be looked at ({problem}); expected the name of a file") from problem
    if not is_owned_json(path, kind):
        raise error(f"{str(path)!r} was not written by unbraid as a {kind}; {expected}")
    if not overwrite:
        raise error(f"{str(path)!r} holds a {kind} already; choose another place, or add --overwrite")


def is_owned_json(path: Path, kind: str) -> bool:
    """Whether unbraid wrote this file, as one of that kind."""
    try:
        data = read_json_object(path, ValueError)
    except ValueError:
        return False
    return data.get("written_by") == f"unbraid {kind}"
