"""The address of a running live page: found by the dashboard of the same run, private, gone when the page is."""

import socket
import stat
from pathlib import Path

import pytest

from unbraid.reporting.dashboard.live_page import address, announced


@pytest.fixture
def listening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The port of something that accepts connections; the cache is the test's own."""
    monkeypatch.setenv("UNBRAID_CACHE", str(tmp_path / "cache"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_an_address_is_found_while_its_page_runs(listening: int, tmp_path: Path, monkeypatch):
    url = f"http://127.0.0.1:{listening}/#k={'a' * 43}"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    with announced("run", url):
        assert address(tmp_path / "run") == address("run") == url, "one run, however it is named"
        assert address("other") is None
        (file,) = (tmp_path / "cache" / "live").iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert not any((tmp_path / "run").iterdir()), "the secret never lies in the run"
    assert address("run") is None and not file.exists()


@pytest.mark.parametrize("url", ["javascript:alert(1)", "http://example.com/#k=" + "a" * 43, "", "é"])
def test_a_file_that_holds_no_address_gives_none(listening: int, url: str):
    with announced("owner/name", url):
        assert address("owner/name") is None


def test_an_address_that_nobody_answers_at_is_not_given_out(listening: int):
    with socket.create_server(("127.0.0.1", 0)) as server:
        free = server.getsockname()[1]
    with announced("run", f"http://127.0.0.1:{free}/#k={'a' * 43}"):
        assert address("run") is None


def test_the_address_of_a_page_started_later_stays(listening: int):
    first, second = (f"http://127.0.0.1:{listening}/#k={letter * 43}" for letter in "ab")
    with announced("run", second):
        pass
    outer = announced("run", first)
    outer.__enter__()
    with announced("run", second):
        outer.__exit__(None, None, None)
        assert address("run") == second
