"""Reading JSON that somebody else may have written: any damage ends in one error that names the file.

Python's reader alone recurses until the interpreter gives up on deep nesting, opens pipes and devices, and lets
through text that no terminal prints and no path may hold.
"""

import json
import math
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LARGEST_BYTES = 256 << 20
LARGEST = sys.float_info.max


def read_json_object(path: Path, error: type[Exception], expected: str = "a JSON object") -> dict[str, Any]:
    """The JSON object in `path`.

    Args:
        path: a regular file.
        error: raised for whatever is wrong with it.
        expected: what the file should hold, for the message.

    Raises:
        error: the file cannot be read, is no JSON, or holds something other than an object.
    """
    data = parse_json(read_text(path, error, expected), lambda why: error(f"{str(path)!r} {why}; expected {expected}"))
    if not isinstance(data, dict):
        raise error(f"{str(path)!r} holds {type(data).__name__}; expected {expected}")
    return data


def read_text(path: Path, error: type[Exception], expected: str) -> str:
    """The text of a regular file of acceptable size.

    Raises:
        error: it cannot be read.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise error(f"{str(path)!r} is no regular file; expected {expected}")
        if status.st_size > LARGEST_BYTES:
            raise error(
                f"{str(path)!r} has {status.st_size:,} bytes; expected at most {LARGEST_BYTES:,}, which {expected} "
                "never needs"
            )
        return path.read_text(encoding="utf-8")
    except OSError as problem:
        raise error(f"cannot read {str(path)!r}: {problem.strerror or problem}; expected {expected}") from None
    except ValueError as problem:  # not UTF-8, or a NUL byte in the path
        raise error(f"cannot read {str(path)!r} ({problem}); expected {expected}") from None


def parse_json(text: str, error: Callable[[str], Exception]) -> Any:
    """What `text` holds.

    Args:
        text: JSON.
        error: makes the exception from what is wrong, as in "is not JSON (...)".
    """
    try:
        data = json.loads(text)
        # Lone surrogates cannot be printed, NUL can stand in no path; neither is written by anything we read.
        if "\\u" in text and not all(map(_printable, _strings(data))):
            raise error("holds a NUL character or half of a surrogate pair")
    except RecursionError:
        raise error("is nested too deeply") from None
    except ValueError as problem:
        raise error(f"is not JSON ({str(problem).splitlines()[0][:200]})") from None
    return data


def _strings(data: Any) -> Iterator[str]:
    waiting = [data]
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, list):
            waiting += value
        elif isinstance(value, dict):
            waiting += [*value, *value.values()]


def _printable(text: str) -> bool:
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)


def finite(data: Any) -> Any:
    """JSON data with null for every number that is none (NaN, infinities)."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number that a float can hold; true and NaN are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST


def is_count(value: Any, least: int = 0) -> bool:
    """Whether a JSON value is a whole number from `least` to what 64 bits hold."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 1 << 63
