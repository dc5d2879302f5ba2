"""What a person sees while something long goes on: one live display on a terminal or in a notebook, lines elsewhere.

Rate and time left are those of the last minute, so a slow start or a pause is soon forgotten. Everything in unbraid
that takes longer than a moment shows itself through `Progress`.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, SpinnerColumn, TextColumn
from rich.progress import Progress as Bar

LINE_EVERY_SECONDS = 30.0
WINDOW_SECONDS = 60.0
SAMPLE_SECONDS = 0.5


def quiet_console() -> Console:
    """One that shows nothing."""
    return Console(quiet=True)


def default_console() -> Console:
    """Where progress is shown when nobody says: on a terminal or in a notebook, nowhere else."""
    console = Console(soft_wrap=True, emoji=False)
    return console if console.is_terminal or console.is_jupyter else quiet_console()


class Progress:
    """Counts towards a total. Use as a context manager.

    Args:
        console: where to write.
        what: what is being done.
        total: units in all; none where nobody knows.
        unit: what is counted, in the plural.
        start: units done by an earlier part, which count as done but not for the rate.
        below: what a live display shows below the bar.
    """

    def __init__(
        self,
        console: Console,
        what: str,
        total: int | None,
        unit: str,
        *,
        start: int = 0,
        below: Callable[[], RenderableType] | None = None,
    ):
        self.console, self.what, self.total, self.unit, self.below = console, what, total, unit, below
        self.done, self._over = start, False
        self._seen: deque[tuple[float, int]] = deque()
        self._spoke = time.monotonic()
        self._bar = Bar(
            SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[rate]}")
        )
        self._task = self._bar.add_task(what, total=total, completed=start, rate="")
        live = console.is_terminal or console.is_jupyter
        self._live = Live(console=console, refresh_per_second=4, get_renderable=self._render) if live else None

    def __enter__(self) -> "Progress":
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def say(self, what: str) -> None:
        """Show what is being done before there is anything to count."""
        self._bar.update(self._task, description=what)
        self._speak(what)

    def update(self, done: int, detail: str = "", *, shown: str = "") -> None:
        """So many units are done by now.

        Args:
            done: units, those of earlier parts included; more than the total counts as the total.
            detail: added to a plain line.
            shown: takes the place of the count on a live display.
        """
        was_over, self.done = self._over, done if self.total is None else min(done, self.total)
        self._over = self.done == self.total
        self._note()
        count = f"{self.done:,} of {self.total:,} {self.unit}" if self.total else f"{self.done:,} {self.unit}"
        pace = self._pace()
        self._bar.update(
            self._task, total=self.total, completed=self.done, description=shown or f"{self.what}: {count}", rate=pace
        )
        if not (self._over and was_over):
            line = "  ".join(filter(None, (f"{self.what}: {count}", pace, detail)))
            self._speak(line, always=self._over)

    @property
    def rate(self) -> float | None:
        """Units a second in the last minute; none before two moments were seen."""
        if len(self._seen) < 2:
            return None
        (first, before), (last, after) = self._seen[0], self._seen[-1]
        return (after - before) / (last - first) if last > first and after >= before else None

    @property
    def seconds_left(self) -> float | None:
        """At that rate."""
        return None if self.total is None or not self.rate else (self.total - self.done) / self.rate

    def _note(self) -> None:
        now = time.monotonic()
        if len(self._seen) > 1 and 0 <= now - self._seen[-2][0] < SAMPLE_SECONDS:
            self._seen.pop()
        self._seen.append((now, self.done))
        while len(self._seen) > 2 and now - self._seen[0][0] > WINDOW_SECONDS:
            self._seen.popleft()

    def _pace(self) -> str:
        if self.rate is None:
            return ""
        left = self.seconds_left
        rate = f"{self.rate:,.0f}" if self.rate >= 10 else f"{self.rate:.2g}"
        return f"{rate} {self.unit}/s" + (f", {clock(left)} left" if left is not None else "")

    def _speak(self, text: str, always: bool = False) -> None:
        if self._live is None and (always or time.monotonic() - self._spoke >= LINE_EVERY_SECONDS):
            self._spoke = time.monotonic()
            self.console.print(text, highlight=False, markup=False, soft_wrap=True, emoji=False)

    def _render(self) -> RenderableType:
        return Group(self._bar, self.below()) if self.below is not None else self._bar


def clock(seconds: float) -> str:
    """`3:07` or `2:03:07`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def number(value: Any) -> str:
    """Three digits, or - for nothing."""
    if not isinstance(value, int | float):
        return "-"
    return f"{value:.1f}" if value >= 100 else f"{value:.3g}"


class Stages:
    """Several counts, one after the other. Use as a context manager.

    Args:
        console: where to write.
    """

    def __init__(self, console: Console):
        self.console = console
        self._now: Progress | None = None

    def __enter__(self) -> "Stages":
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def add_task(self, what: str, total: int | None, unit: str = "steps") -> Progress:
        """Begin to count something; what was counted before is over."""
        self.end()
        self._now = Progress(self.console, what, total, unit)
        return self._now.__enter__()

    def advance(self, stage: Progress, units: int = 1) -> None:
        """So many more are done."""
        stage.update(stage.done + units)

    def advance_now(self) -> None:
        """One more is done of what is being counted."""
        if self._now is not None:
            self.advance(self._now)

    def update(self, stage: Progress, completed: int | None = None, total: int | None = None) -> None:
        """So many are done, or there are so many in all."""
        stage.total = stage.total if total is None else total
        stage.update(stage.done if completed is None else completed)

    def end(self) -> None:
        """What is being counted is over, complete or not."""
        if self._now is not None:
            self._now.__exit__()
        self._now = None
