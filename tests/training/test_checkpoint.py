import json
import os
import stat

import pytest
import torch

from unbraid.errors import CheckpointError
from unbraid.training import checkpoint
from unbraid.training.checkpoint import list_checkpoints, read_checkpoint, write_checkpoint


def tensors(value: float = 1.0) -> checkpoint.CheckpointTensors:
    return {"sae": {"W": torch.full((3, 2), value), "generator": torch.Generator().get_state()}}


def test_what_was_written_is_read_back(tmp_path):
    path = write_checkpoint(tmp_path, 7, tensors(), {"step": 7, "name": "é"}, keep=2)
    read, state = read_checkpoint(path)
    assert state == {"step": 7, "name": "é"}
    assert all(torch.equal(read["sae"][name], tensor) for name, tensor in tensors()["sae"].items())


def test_only_the_newest_checkpoints_are_kept_in_order_of_steps(tmp_path):
    for step in (9, 10, 100):
        write_checkpoint(tmp_path, step, tensors(), {}, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_10", "step_100"]


def test_a_checkpoint_has_the_permissions_any_new_file_gets(tmp_path):
    before = os.umask(0o027)
    try:
        path = write_checkpoint(tmp_path / "checkpoints", 1, tensors(), {}, keep=2)
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o640}


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "empty manifest"])
def test_a_damaged_checkpoint_is_named_and_refused(tmp_path, damage):
    path = write_checkpoint(tmp_path, 1, tensors(), {}, keep=2)
    target = path / "sae.safetensors"
    content = bytearray(target.read_bytes())
    if damage == "flip":
        content[-3] ^= 1
        target.write_bytes(content)
    elif damage == "truncate":
        target.write_bytes(content[:-8])
    elif damage == "remove":
        target.unlink()
    else:
        (path / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"step_1' is damaged .*delete that folder"):
        read_checkpoint(path)


def test_an_old_checkpoint_is_never_half_deleted(tmp_path, monkeypatch):
    for step in (1, 2):
        write_checkpoint(tmp_path, step, tensors(), {}, keep=2)
    with monkeypatch.context() as killed:
        killed.setattr(checkpoint.shutil, "rmtree", lambda *_, **__: None)
        write_checkpoint(tmp_path, 3, tensors(), {}, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_2", "step_3"]
    write_checkpoint(tmp_path, 4, tensors(), {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_3", "step_4"]


def test_a_checkpoint_of_the_same_step_is_left_alone(tmp_path):
    path = write_checkpoint(tmp_path, 1, tensors(), {}, keep=1)
    before = path.stat().st_ino, (path / "manifest.json").stat().st_mtime_ns
    assert write_checkpoint(tmp_path, 1, tensors(), {}, keep=1) == path
    assert before == (path.stat().st_ino, (path / "manifest.json").stat().st_mtime_ns)


def test_a_newer_format_is_refused_with_advice(tmp_path):
    path = write_checkpoint(tmp_path, 1, tensors(), {}, keep=2)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"format_version": 99}))
    with pytest.raises(CheckpointError, match=r"format version 99.*upgrade unbraid"):
        read_checkpoint(path)


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    write_checkpoint(tmp_path, 1, tensors(), {}, keep=2)
    monkeypatch.setattr(checkpoint, "free_bytes", lambda _: 0)
    with pytest.raises(CheckpointError, match=r"needs [\d.]+ MiB but .* has 0.0 MiB free"):
        write_checkpoint(tmp_path, 2, tensors(), {}, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]


@pytest.mark.parametrize("instant", ["save_file", "sync"])
def test_a_write_that_fails_leaves_the_earlier_checkpoint_and_no_rubbish(tmp_path, monkeypatch, instant):
    write_checkpoint(tmp_path, 1, tensors(), {}, keep=1)

    def fail(*_):
        raise OSError("No space left on device")

    if instant == "sync":
        monkeypatch.setattr(checkpoint, "sync", fail)
    else:
        monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", fail)
    with pytest.raises(CheckpointError, match=r"No space left.*earlier checkpoints are intact"):
        write_checkpoint(tmp_path, 2, tensors(2.0), {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_1"]
    read_checkpoint(tmp_path / "step_1")


def test_a_half_written_checkpoint_of_a_killed_process_is_ignored_and_cleared(tmp_path):
    write_checkpoint(tmp_path, 1, tensors(), {}, keep=2)
    (tmp_path / ".step_2.partial").mkdir()
    for name in ("sae.safetensors", ".tmpE5ya0z"):  # safetensors writes into the second and renames it
        (tmp_path / ".step_2.partial" / name).write_bytes(b"half")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_1"]
    write_checkpoint(tmp_path, 2, tensors(), {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_1", "step_2"]


def test_files_of_others_in_the_place_of_a_checkpoint_are_named_and_stay(tmp_path):
    write_checkpoint(tmp_path, 1, tensors(), {}, keep=2)
    (tmp_path / ".step_2.partial").mkdir()
    (tmp_path / ".step_2.partial" / "thesis.tex").write_text("precious")
    with pytest.raises(CheckpointError, match=r"holds thesis\.tex, which unbraid did not write.*move it away"):
        write_checkpoint(tmp_path, 2, tensors(), {}, keep=2)
    assert (tmp_path / ".step_2.partial" / "thesis.tex").read_text() == "precious"
    read_checkpoint(tmp_path / "step_1")
