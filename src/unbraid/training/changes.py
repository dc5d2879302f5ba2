"""What may change in a run that goes on, and what may not.

A checkpoint knows the settings, the model and the text it was made with. A resumed run must have the same, whatever
became of config.json, the model's weights or the text's files meanwhile. The few settings that can change without
making another run of it are given to `resume` by hand and kept in `changes.jsonl`; config.json stays what the run
began with.
"""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from unbraid.config import RunConfig, overridden
from unbraid.config.overrides import merged
from unbraid.errors import CheckpointError, ConfigError, TrainingError
from unbraid.files import write_whole
from unbraid.json_files import parse_json, read_text

FILE = "changes.jsonl"
MAY_CHANGE = (
    "training.tokens",
    "training.epochs",
    "training.device",
    "training.threads",
    "training.tf32",
    "training.loggers",
    "training.log_project",
    "training.log_every",
    "training.checkpoint_every",
    "training.keep_checkpoints",
    "optimiser.lr",
)
"""More or fewer tokens (not fewer than were trained on), readings of the text, where and how to run and log, and the
learning rate from here on."""


def with_changes(config: RunConfig, folder: Path) -> RunConfig:
    """The settings a run goes on with: those it began with, and what was changed since."""
    for line in read_changes(folder):
        config = changed(config, line["changes"], f"{folder / FILE}")
    return config


def read_changes(folder: Path) -> list[dict[str, Any]]:
    """Lines of `changes.jsonl`: after which step, and which settings changed to what.

    Raises:
        TrainingError: the file is damaged, or holds what no resumed run wrote.
    """
    path, expected = folder / FILE, "what `unbraid resume` wrote, or no such file"
    if not path.exists():
        return []
    damaged = lambda why: TrainingError(f"{str(path)!r} {why}; expected {expected}")  # noqa: E731
    lines = [parse_json(line, damaged) for line in read_text(path, TrainingError, expected).splitlines()]
    for line in lines:
        if not isinstance(line, dict) or not isinstance(line.get("changes"), dict):
            raise damaged(f"holds {str(line)[:80]}")
    return lines


def record_changes(folder: Path, step: int, changes: Mapping[str, Any]) -> None:
    """Add a line to `changes.jsonl`, whole or not at all."""
    lines = [*read_changes(folder), {"after_step": step, "changes": dict(changes)}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_whole(folder / FILE, lambda partial: _write(partial, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def changed(config: RunConfig, changes: Mapping[str, Any], where: str = "resume") -> RunConfig:
    """`config` with settings replaced, as in `{"training.tokens": 2_000_000}`.

    Raises:
        ConfigError: a setting may not change in a run that goes on, does not exist, or cannot have that value.
    """
    for path in changes:
        if path not in MAY_CHANGE:
            close = difflib.get_close_matches(path, MAY_CHANGE, n=1, cutoff=0.8)
            if close:
                raise ConfigError(f"{where}: unknown setting {path!r}; did you mean {close[0]!r}?")
            raise ConfigError(
                f"{where}: {path} cannot change in a run that goes on; expected one of {', '.join(MAY_CHANGE)}; train "
                "again into a new run folder for anything else"
            )
    return overridden(config, changes, where)[0]


def words_of_resume(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Split a command line: words that are no setting, and settings, as in `--training.tokens 2000000`.

    Raises:
        ConfigError: a setting has no value.
    """
    rest: list[str] = []
    changes: dict[str, Any] = {}
    words = iter(arguments)
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or "." not in name:
            rest.append(word)
            continue
        path = name.replace("-", "_")
        found = value if equals else next(words, None)
        if found is None:
            raise ConfigError(f"resume: {word} has no value; expected one, such as {word} 2000000")
        changes[path] = _value(path, found)
    return rest, changes


def _value(path: str, text: str) -> Any:
    """A setting's value as JSON where it is that, else a string; lists are separated by commas."""
    if path == "training.loggers":
        return [name for name in text.split(",") if name]
    try:
        return json.loads({"None": "null", "True": "true", "False": "false"}.get(text, text))
    except ValueError:
        return text


def require_same_run(
    path: Path, recorded: Mapping[str, Any], settings: Mapping[str, Any], source: Mapping[str, Any]
) -> None:
    """Refuse to go on from a checkpoint of another run.

    Args:
        path: the checkpoint, for the message.
        recorded: what it knows of its run: "settings" and "source".
        settings: what config.json says now.
        source: identity of the model and text, or activations, that are here now.

    Raises:
        CheckpointError: naming everything that differs.
    """
    odd = differences(_as_read_now(recorded["settings"]), settings)
    if odd:
        raise CheckpointError(
            f"config.json differs from the run that wrote checkpoint {str(path)!r}: {_listed(odd)}; expected the "
            "settings the run began with; put them back, give what may change to `unbraid resume` "
            f"({', '.join(MAY_CHANGE)}), or train again into a new run folder"
        )
    odd = differences(recorded["source"], source)
    if odd:
        raise CheckpointError(
            f"the model or text is not the one that checkpoint {str(path)!r} was trained on: {_listed(odd)}; expected "
            "the same; put it back, or train again into a new run folder"
        )


def _as_read_now(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """Recorded settings with those that came later at their defaults, under which the run was made."""
    try:
        return merged(RunConfig, dict(settings), {}, "the checkpoint")[0].model_dump(mode="json")
    except ConfigError:  # they cannot be read any more: what differs is named
        return settings


def differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Every leaf that differs, as "name was x, is y"."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        found: list[str] = []
        for key in [*before, *(key for key in now if key not in before)]:
            found += differences(before.get(key), now.get(key), f"{name}.{key}" if name else str(key))
        return found
    return [] if before == now else [f"{name} was {_short(before)}, is {_short(now)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _listed(odd: list[str]) -> str:
    return "; ".join(odd[:6]) + (f"; and {len(odd) - 6} more" if len(odd) > 6 else "")
