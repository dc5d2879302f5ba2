"""What a person sees while a run goes on: one live display on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table

from unbraid.config import RunConfig

LINE_EVERY_SECONDS = 10.0
COLUMNS = {
    "loss": "loss",
    "l0": "L0",
    "r2": "R²",
    "tau": "tau",
    "correlation_mean": "mean corr.",
    "correlation_top": "top corr.",
    "dead_fraction": "dead",
}


class RunProgress:
    """Shows tokens, tokens/s, time left and the latest metrics of every SAE. Use as a context manager.

    Args:
        config: the run's settings.
        console: where to write; on a terminal a live display, otherwise a line every few seconds.
        start: steps already done by an earlier part of the run.
        on_record: what else wants each line of metrics.
    """

    def __init__(self, config: RunConfig, console: Console, start: int, on_record: Callable[[dict[str, Any]], None]):
        self._config, self._console, self._start, self._on_record = config, console, start, on_record
        self._bar = Bar(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
        )
        self._task = self._bar.add_task("filling the buffer", total=config.steps, completed=start, rate="")
        self._record: dict[str, Any] = {}
        self._began: float | None = None
        self._spoke = time.monotonic()
        self._live = (
            Live(console=console, refresh_per_second=4, get_renderable=self._render) if console.is_terminal else None
        )

    def __enter__(self) -> "RunProgress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def filling(self, rows: int, capacity: int) -> None:
        """A refill of the buffer goes on."""
        if self._began is None:
            self._bar.update(self._task, description=f"filling the buffer {rows:,} of {capacity:,} rows")
            self._speak(f"filling the buffer: {rows:,} of {capacity:,} rows")

    def step(self, step: int, record: dict[str, Any] | None) -> None:
        """A step is done."""
        now = time.monotonic()
        self._began = self._began or now
        if record is not None:
            self._record = record["saes"]
            self._on_record(record)
        batch = self._config.training.batch_tokens
        rate = (step - self._start - 1) * batch / (now - self._began) if now > self._began else 0.0
        total = self._config.steps
        self._bar.update(
            self._task,
            completed=step,
            rate=f"{rate:,.0f} tokens/s",
            description=f"{step * batch:,} tokens, step {step}/{total}",
        )
        left = (total - step) * batch / rate if rate else 0.0
        self._speak(
            f"step {step}/{total}  {step * batch:,} tokens  {rate:,.0f} tokens/s  {_clock(left)} left  {self._brief()}",
            step == total,
        )

    def _brief(self) -> str:
        name = next(iter(self._record), None)
        if name is None:
            return ""
        values = [f"{label} {_number(self._record[name].get(key))}" for key, label in COLUMNS.items()]
        return f"[{name}] " + "  ".join(values)

    def _speak(self, text: str, always: bool = False) -> None:
        if self._live is None and (always or time.monotonic() - self._spoke >= LINE_EVERY_SECONDS):
            self._spoke = time.monotonic()
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _render(self) -> Group:
        table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
        table.add_column("SAE")
        for label in COLUMNS.values():
            table.add_column(label, justify="right")
        for name, record in self._record.items():
            table.add_row(name, *[_number(record.get(key)) for key in COLUMNS])
        return Group(self._bar, table)


def _number(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes}:{rest:02d}"
