"""Where metrics go besides `metrics.jsonl`: TensorBoard, Weights & Biases, trackio, for those who asked.

A logger sees the very lines of `metrics.jsonl`, flattened to numbers. It never decides anything: the file stays the
record, and a run gives the same bytes with loggers and without. A resumed run goes on in the same place; the steps it
repeats repeat their values, because resuming is exact. The packages are extras, imported only here and only when asked.
"""

import errno
import importlib.util
import os
import uuid
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from unbraid.config import RunConfig
from unbraid.errors import ConfigError
from unbraid.training.checkpoint import steps_done
from unbraid.training.run_folder import RunFolder


@runtime_checkable
class Logger(Protocol):
    """One service that takes numbers."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take what was measured after `step` steps."""
        ...

    def close(self, failed: bool) -> None:
        """Write out what is left; `failed` when the run did not come to its end."""
        ...


class TensorBoard:
    """Event files in the run folder: `tensorboard --logdir RUN/tensorboard`."""

    expected = "a tensorboard that torch can use; run `pip install --upgrade tensorboard`"

    @staticmethod
    def check() -> None:
        """What this imports is there."""
        from torch.utils.tensorboard import SummaryWriter  # noqa: F401

    def __init__(self, folder: RunFolder, _config: RunConfig):
        from torch.utils.tensorboard import SummaryWriter

        # Events after the newest checkpoint belong to steps that will be repeated.
        done = steps_done(folder.checkpoints)
        self._writer = SummaryWriter(str(folder.path / "tensorboard"), purge_step=done + 1 if done else None)

    def log(self, step: int, values: dict[str, float]) -> None:
        """One scalar a name."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        """Flush the event file."""
        self._writer.close()


class WeightsAndBiases:
    """A Weights & Biases run; WANDB_MODE=offline keeps it in the run folder until `wandb sync`."""

    expected = "a login and a network; run `wandb login`, or set WANDB_MODE=offline"

    @staticmethod
    def check() -> None:
        """There is a key and the server takes it; offline none is needed."""
        import wandb

        if os.environ.get("WANDB_MODE") not in ("offline", "disabled", "dryrun"):
            wandb.login(verify=True)

    def __init__(self, folder: RunFolder, config: RunConfig):
        import wandb

        self._run = wandb.init(
            project=config.training.log_project,
            name=folder.path.name,
            id=_tracking_id(folder),
            resume="allow",
            dir=str(folder.path),
            config=config.model_dump(mode="json"),
            # The terminal belongs to the run's own display.
            settings=wandb.Settings(console="off", silent=True),
        )
        # Not wandb's own step, which only ever rises: a resumed run repeats some.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict[str, float]) -> None:
        """One line of history."""
        self._run.log({"step": step} | values)

    def close(self, failed: bool) -> None:
        """End the run, as finished or as failed."""
        self._run.finish(exit_code=int(failed))


class Trackio:
    """A trackio run on this machine: `trackio show` opens it."""

    expected = "a folder it can write; set TRACKIO_DIR to one"

    @staticmethod
    def check() -> None:
        """Its data base can be written."""
        import trackio.utils

        place = Path(trackio.utils.TRACKIO_DIR)
        place.mkdir(parents=True, exist_ok=True)
        if not os.access(place, os.W_OK):
            raise PermissionError(errno.EACCES, "not writable", str(place))

    def __init__(self, folder: RunFolder, config: RunConfig):
        import trackio

        self._run = trackio.init(
            project=config.training.log_project,
            name=f"{folder.path.name}-{_tracking_id(folder)}",
            config=config.model_dump(mode="json"),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        """One line of history."""
        self._run.log(values, step=step)

    def close(self, failed: bool) -> None:
        """Send what is queued."""
        self._run.finish()


LOGGERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "trackio": Trackio}


class Loggers:
    """All loggers of a run; does nothing when there are none."""

    def __init__(self, loggers: list[Logger]):
        self._loggers = loggers

    def step(self, step: int, record: dict[str, Any] | None) -> None:
        """Pass on a line of `metrics.jsonl`, where there is one."""
        if record is not None:
            self._log(step, record["saes"])

    def summary(self, summary: dict[str, Any]) -> None:
        """Pass on the held-out metrics of `summary.json`."""
        self._log(summary["steps"]["executed"], {"held_out": summary["saes"]})

    def _log(self, step: int, tree: dict[str, Any]) -> None:
        values = _numbers(tree)
        for logger in list(self._loggers):
            with _a_failure_is_a_warning(logger):
                logger.log(step, values)
                continue
            self._loggers.remove(logger)


def check_loggers(config: RunConfig) -> None:
    """Every logger asked for must be installed, and able to start: this is asked before a model is loaded.

    Raises:
        ConfigError: naming the package and the command that installs it, or why it cannot start.
    """
    for name in config.training.loggers:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"training.loggers asks for {name!r}, and the package {name} is not installed; expected loggers that "
                f"are; run `pip install 'unbraid[{name}]'`, or leave it out: metrics.jsonl is always written"
            )
        with _starting(name):
            LOGGERS[name].check()


@contextmanager
def _starting(name: str) -> Iterator[None]:
    """A logger's own errors, of whatever class, as one message."""
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ConfigError(
            f"training.loggers asks for {name}, which could not start ({reason}); expected {LOGGERS[name].expected}, "
            "or leave it out: metrics.jsonl is always written"
        ) from error


@contextmanager
def open_loggers(folder: RunFolder, config: RunConfig) -> Iterator[Loggers]:
    """Start the loggers a run asks for, or go on with those of its earlier part; they are closed whatever happens.

    Raises:
        ConfigError: one cannot start, although `check_loggers` found that it can.
    """
    with ExitStack() as stack:
        loggers: list[Logger] = []
        for name in config.training.loggers:
            with _starting(name):
                logger = LOGGERS[name](folder, config)
            stack.push(lambda kind, _error, _trace, logger=logger: _close(logger, kind is not None))
            loggers.append(logger)
        yield Loggers(loggers)


@contextmanager
def _a_failure_is_a_warning(logger: Logger) -> Iterator[None]:
    """A service that breaks down is left out from there on; metrics.jsonl has everything, and training goes on."""
    try:
        yield
    except Exception as error:
        warnings.warn(
            f"the logger {type(logger).__name__} failed ({type(error).__name__}: {str(error)[:200]}) and gets nothing "
            "more; training goes on, metrics.jsonl has every line",
            stacklevel=2,
        )


def _close(logger: Logger, failed: bool) -> None:
    with _a_failure_is_a_warning(logger):
        logger.close(failed)


def _numbers(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """`{"a": {"b": 1, "c": "text"}}` -> `{"a/b": 1.0}`."""
    values: dict[str, float] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            values |= _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float):
            values[f"{prefix}{name}"] = float(value)
    return values


def _tracking_id(folder: RunFolder) -> str:
    """What tells this run from another of the same name; kept in the folder, so that a resumed run finds itself."""
    path = folder.path / "tracking_id"
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    return path.read_text(encoding="utf-8")
