"""A run's logs: one JSON object per line, appended as the run goes on and cut back to where a checkpoint stood."""

import json
import os
from pathlib import Path
from typing import Any

from unbraid.distributed.ranks import ALONE, Ranks
from unbraid.errors import TrainingError
from unbraid.json_files import parse_json


class JsonLines:
    """An append-only log that can be cut back to where a checkpoint stood. Use as a context manager.

    Args:
        path: the file.
        offset: bytes to keep of what is there; none keeps all.
        ranks: who logs the same; only the first writes.

    Raises:
        TrainingError: lines that a checkpoint counts on are gone.
    """

    def __init__(self, path: Path, offset: int | None = None, ranks: Ranks = ALONE):
        self._file = None
        if not ranks.first:
            return
        if offset is not None:
            size = path.stat().st_size if path.exists() else 0
            if size < offset:
                raise TrainingError(
                    f"{str(path)!r} has {size:,} bytes; expected the {offset:,} logged before the checkpoint; "
                    "restore the file, or train again into a new run folder"
                )
            if size > offset:
                os.truncate(path, offset)
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """Append one line and hand it to the operating system at once."""
        if self._file is not None:
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()

    def sync(self) -> int:
        """Force the log to disk; its length in bytes, 0 where another rank writes it."""
        if self._file is None:
            return 0
        os.fsync(self._file.fileno())
        return self._file.tell()

    def __enter__(self) -> "JsonLines":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Every complete line of a log; a last line cut off by a crash is left out.

    Raises:
        TrainingError: the file cannot be read or a complete line is not JSON.
    """
    expected = "the log of a run that has started, one JSON object per line"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise TrainingError(f"cannot read {str(path)!r}: {error}; expected {expected}") from error
    lines = []
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        lines.append(parse_json(line, lambda why, at=number: _damaged_line(path, at, why, expected)))
        if not isinstance(lines[-1], dict):
            raise _damaged_line(path, number, f"holds {type(lines[-1]).__name__}", expected)
    return lines


def _damaged_line(path: Path, number: int, why: str, expected: str) -> TrainingError:
    return TrainingError(f"{str(path)!r} is damaged: line {number} {why}; expected {expected}")
