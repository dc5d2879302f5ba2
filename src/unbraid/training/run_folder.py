"""A run is a folder; this is its layout and the rules for who may write into it.

config.json                the settings, complete
metrics.jsonl              one line a logged step; the same bytes for the same settings on the same device
timing.jsonl               wall-clock figures of the same steps, kept apart because they never repeat
checkpoints/step_N/        see checkpoint.py
saes/<site>[_<variant>]/   finished SAEs in the SAELens layout
figures/, report/          drawn from the files above
summary.json               held-out metrics of every SAE; present once the run is complete
"""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from unbraid.config import RunConfig, load_config
from unbraid.distributed.ranks import ALONE, Ranks
from unbraid.errors import TrainingError
from unbraid.files import LOCK, held, holds_nothing, write_json
from unbraid.json_files import is_count, is_number, parse_json, read_json_object
from unbraid.training.changes import with_changes
from unbraid.training.checkpoint import list_checkpoints


class RunFolder:
    """Paths and files of one run.

    Args:
        path: an existing run folder; use `create` for a new one.

    Raises:
        TrainingError: the folder is not there or holds no run.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if not (self.path / "config.json").is_file():
            raise TrainingError(
                f"{str(path)!r} holds no run (no config.json); expected a folder made by `unbraid train`"
            )

    @classmethod
    def require_free(cls, path: Path) -> None:
        """Refuse a path that a new run cannot have; nothing is written.

        Raises:
            TrainingError: the folder exists and is not empty, or cannot be written.
        """
        if not holds_nothing(path) and not is_failed_start(path):
            raise TrainingError(
                f"run folder {str(path)!r} exists already; expected a new or empty folder; choose another --run, "
                f"or go on with it by `unbraid resume {path}`"
            )
        parent = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
        if not os.access(parent, os.W_OK):
            raise TrainingError(
                f"cannot write the run folder {str(path)!r}: {str(parent)!r} is not writable; expected a writable "
                "place; choose another --run"
            )

    @classmethod
    def create(cls, path: Path | str, config: RunConfig) -> "RunFolder":
        """Make a new run folder.

        Raises:
            TrainingError: the folder exists and is not empty, or cannot be written.
        """
        path = Path(path)
        try:
            cls.require_free(path)
            path.mkdir(parents=True, exist_ok=True)
            clear_start(path)
            write_json(path / "config.json", config.model_dump(mode="json"))
        except OSError as error:
            raise TrainingError(
                f"cannot write the run folder {str(path)!r}: {error.strerror}; expected a writable place; choose "
                "another --run"
            ) from error
        return cls(path)

    @property
    def config(self) -> RunConfig:
        """The run's settings."""
        return with_changes(load_config(self.path / "config.json"), self.path)

    @property
    def first_settings(self) -> dict[str, Any]:
        """What config.json says, whatever changed since; what a checkpoint knows of its run."""
        return load_config(self.path / "config.json").model_dump(mode="json")

    @property
    def metrics(self) -> Path:
        """`metrics.jsonl`."""
        return self.path / "metrics.jsonl"

    @property
    def timing(self) -> Path:
        """`timing.jsonl`."""
        return self.path / "timing.jsonl"

    @property
    def checkpoints(self) -> Path:
        """`checkpoints/`."""
        return self.path / "checkpoints"

    @property
    def saes(self) -> Path:
        """`saes/`."""
        return self.path / "saes"

    @property
    def summary(self) -> Path:
        """`summary.json`."""
        return self.path / "summary.json"

    def read_summary(self) -> dict[str, Any]:
        """Contents of `summary.json`.

        Raises:
            TrainingError: the run is not complete, or the file is damaged.
        """
        if not self.summary.exists():
            raise TrainingError(
                f"run {str(self.path)!r} is not complete (no summary.json); finish it with `unbraid resume {self.path}`"
            )
        expected = "the summary of a finished run"
        summary = read_json_object(self.summary, TrainingError, expected)
        problem = _problem_in_summary(summary, self.config.sae_names)
        if problem is not None:
            raise TrainingError(f"{str(self.summary)!r}: {problem}; expected {expected}")
        return summary

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process.

        Raises:
            TrainingError: another process trains in it.
        """
        with ExitStack() as stack:
            try:
                stack.enter_context(held(self.path))
            except BlockingIOError:
                raise TrainingError(
                    f"another process is training in {str(self.path)!r}; wait for it or choose another run folder"
                ) from None
            yield


OF_A_START = ("config.json", "metrics.jsonl", "timing.jsonl", "changes.jsonl", "tracking_id")
"""Files that a run writes before its first checkpoint."""


def is_failed_start(path: Path) -> bool:
    """Whether a folder holds what a run writes before its first checkpoint, and nothing else."""
    if not (path / "config.json").is_file() or list_checkpoints(path / "checkpoints"):
        return False
    rest = [entry for entry in path.iterdir() if entry.name not in (LOCK, *OF_A_START) and entry.suffix != ".partial"]
    return all(entry.name == "checkpoints" and not entry.is_symlink() and _is_empty(entry) for entry in rest)


def clear_start(path: Path) -> None:
    """Remove what a failed start left, so that its log is not taken for the new run's."""
    for name in OF_A_START:
        (path / name).unlink(missing_ok=True)


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and all(entry.suffix == ".partial" for entry in folder.iterdir())


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


def _problem_in_summary(summary: dict[str, Any], names: list[str]) -> str | None:
    """What about a summary nobody could have written; None for a good one."""
    saes, steps = summary.get("saes"), summary.get("steps", {})
    if not isinstance(steps, dict) or not all(map(is_count, steps.values())):
        return f"steps is {steps!r}"
    if not isinstance(saes, dict):
        return f"saes is {saes!r}"
    for name, metrics in saes.items():
        if name not in names:
            return f"saes names {name!r}, which the run's settings do not have"
        if not isinstance(metrics, dict):
            return f"saes.{name} is {metrics!r}"
        for metric, value in metrics.items():
            if not (value is None or is_number(value) or isinstance(value, bool | dict)):
                return f"saes.{name}.{metric} is {value!r}"
    return None
