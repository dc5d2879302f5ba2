"""A folder is replaced only if unbraid wrote it, and a whole copy of it is there at every instant."""

import json
import os
import stat
from pathlib import Path

import pytest
import torch
from sae_samples import make_sae

import unbraid
from unbraid import formats
from unbraid.errors import FormatError, UnbraidError
from unbraid.files import locked
from unbraid.owned_folders import MARKER, recover, written_folder


def write(folder: Path, text: str = "first", **options) -> Path:
    with written_folder(folder, "thing", **options) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "a.txt").write_text(text)
    return folder


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_folder_appears_whole_and_is_replaced_whole(tmp_path: Path):
    folder = write(tmp_path / "deep" / "out")
    assert json.loads((folder / MARKER).read_text())["files"] == ["sub/a.txt"]
    write(folder, "second")
    assert (folder / "sub" / "a.txt").read_text() == "second"
    assert listing(tmp_path / "deep") == ["out"], "nothing is left beside it"


@pytest.mark.parametrize("file", ["thesis.tex", "sub/thesis.tex", ".hidden", "sub/deeper/thesis.tex"])
@pytest.mark.parametrize("marked", [True, False])
def test_a_folder_with_a_file_of_somebody_else_is_left_alone(tmp_path: Path, file: str, marked: bool):
    folder = write(tmp_path / "out") if marked else tmp_path / "out"
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text("ten years of work")
    with pytest.raises(UnbraidError, match=r"which unbraid did not write; expected a new folder"):
        write(folder, "second")
    assert (folder / file).read_text() == "ten years of work"
    assert not marked or (folder / "sub" / "a.txt").read_text() == "first"


def test_an_empty_folder_and_one_with_system_files_may_be_written(tmp_path: Path):
    (tmp_path / "out").mkdir()
    write(tmp_path / "out")
    (tmp_path / "mac").mkdir()
    (tmp_path / "mac" / ".DS_Store").write_bytes(b"x")
    write(tmp_path / "mac")
    (tmp_path / "mac" / ".DS_Store").write_bytes(b"x")
    write(tmp_path / "mac", "second")


def test_a_link_a_file_and_a_folder_of_another_kind_are_left_alone(tmp_path: Path):
    real = write(tmp_path / "real")
    (tmp_path / "link").symlink_to(real)
    (tmp_path / "file").write_text("precious")
    with written_folder(tmp_path / "other", "other kind"):
        pass
    for name, reason in (("link", "symbolic link"), ("file", "is a file"), ("other", "another kind")):
        with pytest.raises(UnbraidError, match=reason):
            write(tmp_path / name, "second")
    assert (real / "sub" / "a.txt").read_text() == "first" and (tmp_path / "file").read_text() == "precious"


def test_what_is_there_is_replaced_only_when_told_to(tmp_path: Path):
    folder = write(tmp_path / "out", overwrite=False)
    with pytest.raises(UnbraidError, match="add --overwrite"):
        write(folder, "second", overwrite=False)
    assert (folder / "sub" / "a.txt").read_text() == "first"


def test_a_failed_second_rename_puts_the_old_copy_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = make_sae("relu", seed=1)
    folder = formats.save(first, tmp_path / "sae")
    real = Path.rename

    def full_disk(path: Path, to: Path) -> Path:
        if path.name == ".sae.partial":
            raise OSError(28, "No space left on device")
        return real(path, to)

    monkeypatch.setattr(Path, "rename", full_disk)
    with pytest.raises(FormatError, match="No space left"):
        formats.save(make_sae("relu", seed=2), folder)
    assert torch.equal(unbraid.load(folder).W_dec, first.W_dec)
    assert listing(tmp_path) == ["sae"]


@pytest.mark.parametrize("step", range(1, 5))
def test_a_process_that_dies_at_any_rename_leaves_a_whole_copy(tmp_path: Path, step: int):
    """The renames are: old aside, new in, old to the trash; dying before the fourth never happens."""
    first, second = make_sae("relu", seed=1), make_sae("relu", seed=2)
    folder = formats.save(first, tmp_path / "sae")
    child = os.fork()
    if child == 0:
        real, calls = Path.rename, iter(range(1, 10))

        def die(path: Path, to: Path) -> Path:
            if next(calls) == step:
                os._exit(9)
            return real(path, to)

        Path.rename = die
        formats.save(second, folder)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (9 if step < 4 else 0)
    expected = first if step < 3 else second
    assert torch.equal(unbraid.load(folder).W_dec, expected.W_dec)
    formats.save(second, folder)
    assert torch.equal(unbraid.load(folder).W_dec, second.W_dec)
    assert listing(tmp_path) == ["sae"], "the next write sweeps away what was left"


def test_what_was_cut_off_is_put_back_only_where_nothing_is(tmp_path: Path):
    folder = write(tmp_path / "out")
    folder.rename(tmp_path / ".out.old")
    (tmp_path / ".mine.old").mkdir()
    (tmp_path / ".mine.old" / "a.txt").write_text("mine")
    recover(folder)
    recover(tmp_path / "mine")
    assert (folder / "sub" / "a.txt").read_text() == "first"
    assert listing(tmp_path) == [".mine.old", "out"]


@pytest.mark.parametrize("suffix", ["old", "partial", "trash"])
def test_a_folder_of_somebody_else_under_a_name_used_aside_is_not_deleted(tmp_path: Path, suffix: str):
    write(tmp_path / "out")
    mine = tmp_path / f".out.{suffix}"
    mine.mkdir()
    (mine / "a.txt").write_text("mine")
    with pytest.raises(UnbraidError, match="cannot write the thing folder"):
        write(tmp_path / "out", "second")
    assert (mine / "a.txt").read_text() == "mine"
    assert (tmp_path / "out" / "sub" / "a.txt").read_text() == "first"


def test_two_processes_do_not_write_one_folder_at_once(tmp_path: Path):
    with locked(tmp_path / ".out.lock"), pytest.raises(UnbraidError, match="another process is writing"):
        write(tmp_path / "out")


def test_files_have_the_permissions_any_new_file_gets(tmp_path: Path):
    before = os.umask(0o027)
    try:
        folder = formats.save(make_sae("topk"), tmp_path / "sae")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert set(modes.values()) == {0o640}, modes
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750


def test_an_sae_folder_of_version_0_1_is_replaced_and_one_of_others_is_not(tmp_path: Path):
    folder = formats.save(make_sae("topk", seed=1), tmp_path / "sae")
    (folder / MARKER).unlink()
    formats.save(make_sae("topk", seed=2), folder)
    (folder / MARKER).unlink()
    config = json.loads((folder / "cfg.json").read_text())
    del config["metadata"]["unbraid"]
    (folder / "cfg.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"holds cfg\.json, sae_weights"):
        formats.save(make_sae("topk", seed=3), folder)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "out", tmp_path / ("x" * 300)):
        with pytest.raises(UnbraidError, match="choose another"):
            write(place)
