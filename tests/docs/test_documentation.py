"""Every code block of the README and the site does what it says; generated pages are up to date; the site builds.

Python blocks run, page by page, in one namespace. Lines of shell that start with `unbraid` run too when they stay on
the tiny recipe, here cut to 20 steps; those that need a large model or a hub must parse. Other commands must exist.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from functools import partial
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from stand_in_hub import stand_in_hub

import unbraid
from unbraid import cli, commands, run
from unbraid.bench import steps, whole
from unbraid.feature_model.live import server
from unbraid.formats import hub as hub_module
from unbraid.recipes import RECIPES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = r"^```(?P<language>\w+)\n(?P<code>.*?)^```$"
INDENTED = r"^(?P<indented>(?:    \S[^\n]*\n)+)"
BLOCK = re.compile(f"{FENCED}|{INDENTED}", re.MULTILINE | re.DOTALL)
ELSEWHERE = {".", "tensorboard", "hf", "pre-commit"}
"""Commands of a shell or of other packages."""
SMALL = {
    "dashboard": ["--tokens", "2048"],
    "eval": [
        *("--suite", "core,geometry", "--tokens", "512", "--splice-contexts", "2"),
        *("--meta-steps", "5", "--control-tokens", "1024"),
    ],
    "synth": ["--world", "unit", "--architectures", "topk", "--samples", "8192", "--eval-samples", "2048"],
}
"""What makes a command quick enough to run here."""


def blocks(page: Path) -> list[tuple[str, str]]:
    """(language, code) of each block, in order; an indented block of commands counts as shell."""
    found: list[tuple[str, str]] = []
    for match in BLOCK.finditer(page.read_text(encoding="utf-8")):
        if match["language"]:
            found.append((match["language"], match["code"]))
        elif re.match(r" {4}(make|unbraid|\.) ", match["indented"]):
            found.append(("sh", re.sub(r"^ {4}", "", match["indented"], flags=re.MULTILINE)))
    return found


def with_code(language: str) -> list[Path]:
    return [page for page in PAGES if any(found == language for found, _ in blocks(page))]


def shell(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run or check one line of a shell block."""
    command, *words = shlex.split(line.split("  #")[0])
    if command == "make":
        assert f"\n{words[0]}:" in (ROOT / "Makefile").read_text(encoding="utf-8"), line
    elif command == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        assert words[0] == "install" and re.fullmatch(r"unbraid\[(\w+)\]", words[1])[1] in extras, line
    elif command == "unbraid":
        small = SMALL.get(words[0], [])
        for flag, value in zip(small[::2], small[1::2], strict=True):
            words += [flag, value] if flag not in words else []
        large = words[0] in ("train", "harvest") and words[1] in RECIPES and words[1] != "tiny"
        with monkeypatch.context() as patch:
            patch.setattr(commands, "execute", lambda words: None)
            patch.setattr(server, "serve", lambda fm, port, run, ready: None)
            for module, name in ((steps, "measure_steps"), (whole, "measure_recipes"), (whole, "measure_world")):
                patch.setattr(module, name, lambda *_: [])
            if large:
                patch.setattr(run, "train", lambda config, path, console: None)
                patch.setattr(run, "fill_cache", lambda config, path, console: None)
            try:
                cli.main(words)
            except SystemExit as ended:
                assert not ended.code, line
    else:
        assert command in ELSEWHERE, line


@pytest.fixture(autouse=True)
def short_tiny(monkeypatch: pytest.MonkeyPatch):
    whole = RECIPES["tiny"]()
    training = whole.training.model_copy(update={"tokens": 5120, "held_out_tokens": 512})
    tiny = whole.model_copy(update={"training": training})
    monkeypatch.setitem(RECIPES, "tiny", lambda: tiny)
    monkeypatch.setattr(unbraid.recipes, "tiny", lambda: tiny)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    with stand_in_hub() as hub:
        push, pull = hub_module.push_to_hub, hub_module.from_hub
        monkeypatch.setattr(hub_module, "push_to_hub", partial(push, endpoint=hub.endpoint))
        monkeypatch.setattr(hub_module, "from_hub", partial(pull, endpoint=hub.endpoint, cache=tmp_path / "hub"))
        yield hub


@pytest.mark.parametrize("page", sorted({*with_code("python"), *with_code("sh")}), ids=lambda page: page.stem)
@pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard")
def test_the_code_of_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub):
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(64, 64, generator=generator) for _ in range(5)]
    names = {"torch": torch, "unbraid": unbraid, "batches": batches, "x": batches[0]}
    for language, code in blocks(page):
        if language == "python":
            exec(compile(code, str(page), "exec"), names)
        elif language == "sh":
            for line in code.replace("\\\n", " ").splitlines():
                if line.strip():
                    shell(line, monkeypatch)
        else:
            assert language == "json" and json.loads(code), f"{page.name}: what is a block of {language}?"


@pytest.mark.parametrize("script", ["reliability.py", "settings.py", "sites.py --rows-as-they-are"])
def test_generated_pages_are_up_to_date(script: str):
    name, *options = script.split()
    words = [sys.executable, ROOT / "docs" / name, "--check", *options]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_generated_page_that_is_out_of_date_is_named_and_can_be_rewritten(tmp_path: Path):
    shutil.copy(ROOT / "docs" / "generated.py", tmp_path)
    script = tmp_path / "script.py"
    script.write_text('from generated import write_or_check\nwrite_or_check("page.md", "true\\n")\n')
    checked, written, checked_again = (
        subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
        for words in (["--check"], [], ["--check"])
    )
    assert checked.returncode != 0 and "docs/page.md is out of date" in checked.stderr
    assert written.returncode == checked_again.returncode == 0
    assert (tmp_path / "page.md").read_text() == "true\n"


def test_the_site_builds_with_every_link_leading_somewhere(tmp_path: Path):
    zensical = pytest.importorskip("zensical", reason="the site's builder, from `make setup`")
    assert zensical is not None
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    settings = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    (tmp_path / "zensical.toml").write_text(settings.replace('paths = ["src"]', f'paths = ["{ROOT / "src"}"]'))
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=tmp_path,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path / "docs")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pages = tomllib.loads(settings)["project"]["nav"]
    built = {path.parent.name for path in (tmp_path / "site").glob("*/index.html")}
    assert {Path(name).stem for page in pages for name in page.values()} - {"index"} <= built
    method = (tmp_path / "site" / "method" / "index.html").read_text(encoding="utf-8")
    assert method.count('<math xmlns="http://www.w3.org/1998/Math/MathML" display="block">') == 4
    assert 'class="arithmatex"' not in method, "no formula is left to a script"
    api = (tmp_path / "site" / "api" / "index.html").read_text(encoding="utf-8")
    assert all(f'id="unbraid.{name}"' in api for name in unbraid.__all__ if not name.endswith("Config"))


def test_scripts_that_pages_name_exist():
    """A table on a page says which script made it; the script must come with it."""
    pages = [*PAGES, *(ROOT / "study").glob("*.md"), *(ROOT / "study").glob("*.py"), *(ROOT / "src").rglob("*.py")]
    named = re.compile(r"\b(?:study|benchmarks|docs|tests)/[\w/]+\.py\b")
    missing = {name for page in pages for name in named.findall(page.read_text("utf-8")) if not (ROOT / name).is_file()}
    assert not missing
