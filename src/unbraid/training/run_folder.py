"""A run is a folder; this is its layout and the rules for who may write into it.

config.json                the settings, complete
metrics.jsonl              one line a logged step; the same bytes for the same settings on the same device
timing.jsonl               wall-clock figures of the same steps, kept apart because they never repeat
checkpoints/step_N/        see checkpoint.py
saes/<site>[_<variant>]/   finished SAEs in the SAELens layout
figures/, report/          drawn from the files above
summary.json               held-out metrics of every SAE; present once the run is complete
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from unbraid.config import RunConfig, load_config, require_trust
from unbraid.errors import ConfigError, TrainingError
from unbraid.files import (
    LEFT_BY_A_KILLED_WRITE,
    LOCK,
    first_link,
    held,
    holds_nothing,
    is_folder_name,
    is_system_file,
    write_json,
)
from unbraid.json_files import is_count, is_number, read_json_object
from unbraid.owned_folders import MARKER, mark, read_marker, recover
from unbraid.training.changes import FILE as CHANGES
from unbraid.training.changes import with_changes

KIND = "run"
OF_A_START = (
    LOCK,
    MARKER,
    "config.json",
    "metrics.jsonl",
    "timing.jsonl",
    CHANGES,
    "tracking_id",
    "tensorboard",
    "wandb",
)
"""What a run writes before its first checkpoint."""
ENTRIES = (
    *OF_A_START,
    "checkpoints",
    "saes",
    "figures",
    "report",
    "summary.json",
    "evaluation.json",
    "evaluation_features.safetensors",
    "held_out.safetensors",
    "labels.json",
)
WITH_LINKS_OF_THEIR_OWN = ("wandb",)


class RunFolder:
    """Paths and files of one run.

    Args:
        path: an existing run folder; use `create` for a new one.
        trust_remote_code: allow what the folder's own settings may ask for: running code that comes with the model.
            The folder may come from anywhere, so its word alone is not enough.

    Raises:
        TrainingError: the folder is not there, holds no run, or holds symbolic links.
    """

    def __init__(self, path: Path | str, trust_remote_code: bool = False):
        self.path, self._trust_remote_code = Path(path), trust_remote_code
        try:
            there = (self.path / "config.json").is_file()
        except (OSError, ValueError):
            there = False
        if not there:
            raise TrainingError(
                f"{str(path)!r} holds no run (no config.json); expected a folder made by `unbraid train`"
            )
        refuse_links(self.path)

    @classmethod
    def require_free(cls, path: Path) -> None:
        """Refuse a path that a new run cannot have; nothing is written.

        Raises:
            TrainingError: the folder exists and holds more than a start that failed before its first checkpoint, or
                cannot be written.
        """
        refuse_links(path)
        if not holds_nothing(path) and not _is_failed_start(path):
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
        """Make a new run folder; one whose start failed before the first checkpoint is begun anew.

        Raises:
            TrainingError: the folder exists and holds something else, is in use, or cannot be written.
        """
        path = Path(path)
        try:
            cls.require_free(path)
            path.mkdir(parents=True, exist_ok=True)
            with _locked(path):
                _clear(path)
                mark(path, KIND)
                write_json(path / "config.json", config.model_dump(mode="json"))
        except (OSError, ValueError) as error:  # a ValueError for a name no file can have
            raise TrainingError(
                f"cannot write the run folder {str(path)!r}: {getattr(error, 'strerror', None) or error}; expected a "
                "writable place; choose another --run"
            ) from error
        return cls(path, config.model.trust_remote_code)

    @property
    def config(self) -> RunConfig:
        """The run's settings, changes made while resuming included, for whoever loads its model.

        Raises:
            ConfigError: they ask for the model's own code to be run, and nobody allowed it by hand.
        """
        return require_trust(self.recorded_config, self._trust_remote_code, str(self.path / "config.json"))

    @property
    def recorded_config(self) -> RunConfig:
        """The same settings, for whoever reads results and loads no model."""
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

    def finished_saes(self) -> dict[str, Path]:
        """Folders of the SAEs by name.

        Raises:
            TrainingError: the run has not come to its end; it may have been stopped while it wrote them.
        """
        if not self.summary.exists() or not self.saes.is_dir():
            raise self._not_complete("no summary.json" if self.saes.is_dir() else "no saes/")
        for old in self.saes.glob(".*.old"):
            recover(self.saes / old.name.removeprefix(".").removesuffix(".old"))
        found = sorted(path for path in self.saes.iterdir() if path.is_dir() and not path.name.startswith("."))
        return {path.name: path for path in found}

    def read_summary(self) -> dict[str, Any]:
        """Contents of `summary.json`.

        Raises:
            TrainingError: the run is not complete, or the file is damaged.
        """
        if not self.summary.exists():
            raise self._not_complete("no summary.json")
        expected = "the summary of a finished run"
        summary = read_json_object(self.summary, TrainingError, expected)
        problem = _problem_in_summary(summary, self.recorded_config.sae_names)
        if problem is not None:
            raise TrainingError(f"{str(self.summary)!r}: {problem}; expected {expected}")
        return summary

    def _not_complete(self, why: str) -> TrainingError:
        return TrainingError(
            f"run {str(self.path)!r} is not complete ({why}); expected one that has ended; finish it with "
            f"`unbraid resume {self.path}`"
        )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process.

        Raises:
            TrainingError: another process trains in it.
        """
        with _locked(self.path):
            yield


def is_run(path: Path) -> bool:
    """Whether a folder is a run's, ended or not; other folders have a config.json too, such as a language model's."""
    begun = ("saes", "checkpoints", "metrics.jsonl")
    return (path / "config.json").is_file() and (_is_marked(path) or any((path / name).exists() for name in begun))


def default_run_folder(config: RunConfig) -> Path:
    """`runs/<name of the recipe>`.

    Raises:
        ConfigError: that name is not the name of one folder.
    """
    if not is_folder_name(config.name):
        raise ConfigError(
            f"name = {config.name!r} cannot be the name of a folder in runs/; expected letters, digits and the like, "
            "without a slash; give --run DIR, or change the name"
        )
    return Path("runs") / config.name


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            stack.enter_context(held(path))
        except BlockingIOError:
            raise TrainingError(
                f"another process is training in {str(path)!r}; wait for it or choose another run folder"
            ) from None
        except OSError as error:
            raise TrainingError(
                f"cannot hold {str(path / LOCK)!r}: {error.strerror or error}; expected a folder that can be written, "
                "with no other file of that name; make it writable, or choose another run folder"
            ) from error
        yield


def refuse_links(path: Path) -> None:
    """A run folder may come from anywhere, so nothing is read or written through a link in it.

    Raises:
        TrainingError: naming the first symbolic link among what a run writes.
    """
    link = first_link(path, tuple(name for name in ENTRIES if name not in WITH_LINKS_OF_THEIR_OWN))
    for name in WITH_LINKS_OF_THEIR_OWN:
        link = path / name if (path / name).is_symlink() else link
    if link is not None:
        raise TrainingError(
            f"{str(link)!r} is a symbolic link; expected a run folder without any, because what is read and written "
            "through one lies elsewhere; put the file or folder itself there"
        )


def _is_failed_start(path: Path) -> bool:
    """Whether unbraid began a run here that left nothing to go on from: only files of a start, and no checkpoint."""
    if not path.is_dir() or not (_is_marked(path) or _is_start_of_version_0_1(path)):
        return False
    checkpoints = path / "checkpoints"
    begun = all(
        entry.name in OF_A_START or is_system_file(entry.name) or LEFT_BY_A_KILLED_WRITE.fullmatch(entry.name)
        for entry in path.iterdir()
        if entry != checkpoints
    )
    return begun and holds_nothing(checkpoints)


def _is_marked(path: Path) -> bool:
    marker = read_marker(path)
    return marker is not None and marker.get("kind") == KIND


def _is_start_of_version_0_1(path: Path) -> bool:
    """Whether the settings lie there as unbraid writes them, complete; it left no marker then."""
    try:
        settings = read_json_object(path / "config.json", ConfigError)
        return load_config(path / "config.json").model_dump(mode="json") == settings
    except ConfigError:
        return False


def _clear(path: Path) -> None:
    """Delete what an earlier start logged."""
    for name in OF_A_START:
        entry = path / name
        if entry.is_dir():
            shutil.rmtree(entry)
        elif name != LOCK:
            entry.unlink(missing_ok=True)


def _problem_in_summary(summary: dict[str, Any], names: list[str]) -> str | None:
    """What about a summary nobody could have written; None for a good one."""
    saes, steps = summary.get("saes"), summary.get("steps", {})
    if not isinstance(steps, dict) or not all(map(is_count, steps.values())):
        return f"steps is {steps!r}"
    if not isinstance(saes, dict):
        return f"saes is {saes!r}"
    source = summary.get("source", {})
    if not isinstance(source, dict) or not all(isinstance(checksum, str) for checksum in source.values()):
        return f"source is {source!r}"
    for name, metrics in saes.items():
        if name not in names:
            return f"saes names {name!r}, which the run's settings do not have"
        if not isinstance(metrics, dict):
            return f"saes.{name} is {metrics!r}"
        for metric, value in metrics.items():
            if not (value is None or is_number(value) or isinstance(value, bool | dict)):
                return f"saes.{name}.{metric} is {value!r}"
    return None
