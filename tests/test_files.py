"""Files appear whole, never through a link; names and locks mean the same on every system."""

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch

from unbraid.files import (
    TEMPORARY,
    first_link,
    folder_name,
    held,
    holds_nothing,
    is_folder_name,
    write_json,
    write_whole_tensors,
)

SOURCES = sorted((Path(__file__).parents[1] / "src").rglob("*.py"))


def test_a_link_in_the_place_of_a_file_is_replaced_and_what_it_points_to_stays(tmp_path: Path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "a.json").symlink_to(victim)
    (tmp_path / ".a.json.partial").symlink_to(victim)
    write_json(tmp_path / "a.json", {"a": 1})
    assert victim.read_text() == "precious" and not (tmp_path / "a.json").is_symlink()
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}


WRITE = """
import sys, torch, safetensors.torch
safetensors.torch.save_file({"a": torch.zeros(50_000_000)}, sys.argv[1])
"""


def test_what_a_kill_inside_safetensors_leaves_is_known_and_swept_by_the_next_write(tmp_path: Path):
    aside = tmp_path / ".a.safetensors.partial"
    aside.mkdir()
    writer = subprocess.Popen([sys.executable, "-c", WRITE, str(aside / "a.safetensors")])
    while not any(aside.iterdir()):
        assert writer.poll() is None
    writer.kill()
    writer.wait()
    (left,) = (path.name for path in aside.iterdir())
    assert TEMPORARY.fullmatch(left), "a new safetensors names its temporary files in another way"
    write_whole_tensors(tmp_path / "a.safetensors", lambda partial: safetensors.torch.save_file({}, partial))
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_files_of_others_where_tensors_would_be_written_stay(tmp_path: Path):
    aside = tmp_path / ".a.safetensors.partial"
    aside.mkdir()
    (aside / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError):
        write_whole_tensors(tmp_path / "a.safetensors", lambda partial: safetensors.torch.save_file({}, partial))
    assert (aside / "thesis.tex").read_text() == "precious"


def test_a_lock_that_is_a_link_is_refused_and_two_cannot_hold_one_folder(tmp_path: Path):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / ".lock").symlink_to(victim)
    with pytest.raises(OSError, match="not written by unbraid"), held(tmp_path):
        pass
    assert victim.read_text() == "precious"
    (tmp_path / ".lock").unlink()
    with held(tmp_path), pytest.raises(BlockingIOError), held(tmp_path):
        pass


def test_files_follow_the_umask(tmp_path: Path):
    before = os.umask(0o022)
    try:
        write_json(tmp_path / "a.json", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.json").stat().st_mode) == 0o644


def test_a_folder_with_only_system_files_holds_nothing_and_a_download_is_something(tmp_path: Path):
    for name in (".DS_Store", "Thumbs.db", "._a", ".lock", ".config.json.partial"):
        (tmp_path / name).write_text("")
    assert holds_nothing(tmp_path)
    for name in ("film.partial", ".film.partial", ".a.json.partial"):
        (tmp_path / name).write_text("")
        assert not holds_nothing(tmp_path)
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("resid_pre.3 -> resid_post.3 + mlp_out.3", "resid_pre.3--to--resid_post.3--and--mlp_out.3"),
        ("module:encoder.layers.2:input", "module.encoder.layers.2.input"),
        ("module:a/b", "module.a.b"),
        ("resid_post.6", "resid_post.6"),
    ],
)
def test_folder_names_are_safe_on_every_system(text: str, name: str):
    assert folder_name(text) == name and is_folder_name(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", "../x", "a/b", "a\\b", "/etc", "nul", "CON.txt", "a\0", "a:b", "x" * 201, "a ", ".a", "\ud800"],
)
def test_what_cannot_be_the_name_of_one_folder_is_known(name: str):
    assert not is_folder_name(name)


def test_links_are_found_at_any_depth_and_only_under_the_names_asked_for(tmp_path: Path):
    (tmp_path / "saes" / "x").mkdir(parents=True)
    (tmp_path / "mine").symlink_to("/")
    assert first_link(tmp_path, ("saes", "config.json")) is None
    (tmp_path / "saes" / "x" / "cfg.json").symlink_to("/etc/passwd")
    assert first_link(tmp_path, ("saes",)) == tmp_path / "saes" / "x" / "cfg.json"


def test_no_module_of_one_system_is_imported(tmp_path: Path):
    only_posix = re.compile(r"^\s*(import|from) (fcntl|resource|pwd|grp|termios|pty)\b", re.MULTILINE)
    assert not [path for path in SOURCES if only_posix.search(path.read_text(encoding="utf-8"))]


def test_everything_imports_where_fcntl_is_missing():
    modules = [".".join(path.relative_to(SOURCES[0].parents[1]).with_suffix("").parts) for path in SOURCES]
    hidden = [f"sys.modules[{name!r}] = None" for name in ("fcntl", "resource", "termios", "pwd", "grp")]
    imports = [f"import {name}" for name in sorted(modules) if not name.endswith("__main__") and "triton" not in name]
    command = "\n".join(["import sys", "import torch, transformers", *hidden, *imports])
    subprocess.run([sys.executable, "-c", command], check=True, env=os.environ | {"PYTHONWARNINGS": "ignore"})
