"""`unbraid doctor`: every path is printed whole, to be copied, whatever the width of the terminal."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from unbraid import doctor


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "piped"])
def test_a_path_longer_than_the_terminal_is_whole_and_on_one_line(tmp_path: Path, monkeypatch, terminal):
    cache = tmp_path / "a-folder-with-a-long-name" / ("deeper" * 20)
    monkeypatch.setattr(doctor, "cache_root", lambda: cache)
    said = io.StringIO()
    doctor.report(Console(file=said, width=30, force_terminal=terminal))
    (line,) = [line for line in said.getvalue().splitlines() if "cache folder" in line]
    assert f"  {cache} (" in line and "…" not in said.getvalue()


def test_what_is_missing_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "tyro" else "1.0")
    said = io.StringIO()
    assert not doctor.report(Console(file=said, width=200))
    (line,) = [line for line in said.getvalue().splitlines() if line.startswith("missing") and "tyro" in line]
    assert line.endswith("missing; pip install unbraid")
