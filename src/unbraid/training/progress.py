"""The display of a training run: tokens, rate, time left and the latest metrics of every SAE."""

from collections.abc import Callable, Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from unbraid.config import RunConfig
from unbraid.progress import Progress, number

COLUMNS = {
    "loss": "loss",
    "l0": "L0",
    "r2": "R²",
    "tau": "tau",
    "correlation_mean": "mean corr.",
    "correlation_top": "top corr.",
    "dead_fraction": "dead",
}
Callback = Callable[[int, dict[str, Any] | None], Any]
"""Called after every step with the steps done, and the line of metrics when there is one."""


class RunProgress:
    """Shows a run and tells others of it. Use as a context manager.

    Args:
        config: the run's settings.
        console: where to write.
        start: steps already done by an earlier part of the run.
        callbacks: who else is told of every step.
    """

    def __init__(self, config: RunConfig, console: Console, start: int, callbacks: Iterable[Callback] = ()):
        self._batch, self._callbacks = config.training.batch_tokens, list(callbacks)
        self._steps, self._trains = config.steps, False
        self._record: dict[str, Any] = {}
        total = config.steps * self._batch
        self._progress = Progress(console, "training", total, "tokens", start=start * self._batch, below=self._table)

    def __enter__(self) -> "RunProgress":
        self._progress.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.__exit__(*error)

    def filling(self, rows: int, capacity: int) -> None:
        """A refill of the buffer goes on."""
        if not self._trains:
            self._progress.say(f"filling the buffer: {min(rows, capacity):,} of {capacity:,} rows")

    def step(self, step: int, record: dict[str, Any] | None) -> None:
        """A step is done."""
        self._trains = True
        self._record = self._record if record is None else record["saes"]
        tokens = step * self._batch
        self._progress.update(
            tokens, f"step {step}/{self._steps}  {self._brief()}", shown=f"{tokens:,} tokens, step {step}/{self._steps}"
        )
        for callback in self._callbacks:
            callback(step, record)

    def _brief(self) -> str:
        name = next(iter(self._record), None)
        if name is None:
            return ""
        values = [f"{label} {number((self._record[name] or {}).get(key))}" for key, label in COLUMNS.items()]
        return f"[{name}] " + "  ".join(values)

    def _table(self) -> Table:
        table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
        table.add_column("SAE")
        for label in COLUMNS.values():
            table.add_column(label, justify="right")
        for name, record in self._record.items():
            table.add_row(name, *[number((record or {}).get(key)) for key in COLUMNS])
        return table
