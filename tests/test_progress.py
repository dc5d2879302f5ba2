"""Rate and time left come from the last minute; lines where there is no terminal; never more than everything."""

import io
import time

import pytest
from rich.console import Console

from unbraid.progress import Progress, Stages, clock, default_console


@pytest.fixture
def now(monkeypatch):
    """A clock that the test sets."""
    moment = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: moment[0])
    return moment


def lines_of(text: io.StringIO) -> list[str]:
    return text.getvalue().splitlines()


def test_the_rate_forgets_a_slow_start(now):
    progress = Progress(Console(quiet=True), "training", 10_000, "tokens")
    for second in range(300):
        now[0] = 1000.0 + second
        progress.update(second if second < 200 else 200 + 10 * (second - 200))
    assert progress.rate == pytest.approx(10)
    assert progress.seconds_left == pytest.approx((10_000 - 1190) / 10)


def test_a_resumed_run_counts_what_was_done_but_not_in_the_rate(now):
    progress = Progress(Console(quiet=True), "training", 1000, "tokens", start=500)
    progress.update(500)
    assert progress.rate is None and progress.seconds_left is None
    now[0] += 10
    progress.update(600)
    assert progress.rate == pytest.approx(10)


def test_lines_come_every_thirty_seconds_where_there_is_no_terminal_and_at_the_end(now):
    text = io.StringIO()
    with Progress(Console(file=text, width=200), "harvesting", 100, "rows") as progress:
        for second in range(100):
            now[0] = 1000.0 + second
            progress.update(second, "training rows")
        progress.update(250)
    lines = lines_of(text)
    assert [line.split("  ")[0] for line in lines] == [
        "harvesting: 30 of 100 rows",
        "harvesting: 60 of 100 rows",
        "harvesting: 90 of 100 rows",
        "harvesting: 100 of 100 rows",
    ]
    assert "1 rows/s, 1:10 left" in lines[0] and "training rows" in lines[0]


def test_a_slow_rate_keeps_two_digits_and_the_end_is_said_once(now):
    text = io.StringIO()
    with Progress(Console(file=text, width=200), "correlation", 3, "SAEs") as progress:
        for _ in range(3):
            progress.update(progress.done + 1)
            now[0] += 40
        progress.update(3)
        progress.update(4)
    lines = lines_of(text)
    assert lines == [
        "correlation: 2 of 3 SAEs  0.025 SAEs/s, 0:40 left",
        "correlation: 3 of 3 SAEs  0.025 SAEs/s, 0:00 left",
    ]


def test_more_than_the_total_is_shown_as_the_total(now):
    progress = Progress(Console(quiet=True), "harvesting", 10, "rows")
    progress.update(15)
    assert progress.done == 10


def test_a_terminal_gets_a_live_display(now):
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100)
    with Progress(console, "training", 10, "tokens") as progress:
        progress.update(5)
    assert "training: 5 of 10 tokens" in text.getvalue()


def test_a_clock_that_jumps_back_gives_no_rate(now):
    progress = Progress(Console(quiet=True), "training", 10, "tokens")
    progress.update(1)
    now[0] -= 1e6
    progress.update(2)
    assert progress.rate is None


def test_nothing_is_shown_by_default_where_nobody_looks():
    assert default_console().quiet


def test_clock():
    assert [clock(7.9), clock(3_600.0), clock(7_387.2)] == ["0:07", "1:00:00", "2:03:07"]


def test_stages_follow_one_another_and_each_says_when_it_is_over(now):
    text = io.StringIO()
    with Stages(Console(file=text, width=200)) as stages:
        first = stages.add_task("held-out activations", total=4)
        for _ in range(4):
            stages.advance(first)
        second = stages.add_task("first letters", total=None)
        stages.update(second, completed=2, total=2)
    assert lines_of(text) == ["held-out activations: 4 of 4 steps", "first letters: 2 of 2 steps"]
