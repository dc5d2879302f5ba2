"""`pip install unbraid` from the built wheel, in a bare environment: the first commands of a new user.

Nothing is downloaded: the wheel alone is installed, and the environment sees the dependencies of the one that runs the
tests through a .pth file. Such a folder's own .pth files are not read, so no editable install of unbraid is seen.
"""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "unbraid"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    builder = pytest.importorskip("hatchling.builders.wheel").WheelBuilder(str(ROOT))
    (built,) = builder.build(directory=str(tmp_path_factory.mktemp("dist")), versions=["standard"])
    return Path(built)


def test_the_wheel_is_typed_and_carries_the_licence(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    assert "unbraid/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith("tests/")]


def test_every_file_of_the_package_is_in_the_wheel(wheel: Path):
    there = {path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*") if path.is_file()}
    there = {name for name in there if "__pycache__" not in name}
    assert {Path(name).suffix for name in there} >= {".py", ".js", ".css", ".html"}, "the pages have assets"
    packed = {name.removeprefix("unbraid/") for name in zipfile.ZipFile(wheel).namelist()}
    assert there <= packed


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs a program of a bare environment that holds the wheel; returns what it printed."""
    place = tmp_path_factory.mktemp("bare")
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    venv.create(place / "venv", with_pip=False)
    bare = place / "venv" / "bin"
    (site,) = (place / "venv").glob("lib/python*/site-packages")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(bare / "python"), "install"]
    subprocess.run([*pip, "--quiet", "--no-index", "--no-deps", str(wheel)], check=True, env=environment)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    def run(program: str, *words: str) -> str:
        done = subprocess.run(
            [str(bare / program), *words], cwd=place, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.slow
def test_the_wheel_trains_in_a_bare_environment_and_plans_the_demo(installed):
    where, origin = installed("python", "-c", "import unbraid, sys; print(unbraid.__file__, sys.prefix)").split()
    assert Path(where).is_relative_to(origin), "unbraid comes from the wheel"
    assert "train RECIPE" in installed("unbraid", "--help")
    said = installed("unbraid", "train", "tiny", "--run", "runs/tiny")
    assert "done: results in runs/tiny" in said
    installed("unbraid", "dashboard", "runs/tiny", "--tokens", "1024")
    plan = installed("unbraid", "train", "demo", "--dry-run")
    assert "SmolLM2-135M" in plan or "packaged" in plan
