"""Checkpoints that appear whole or not at all, and are never trusted blindly.

A checkpoint is a folder `step_N` of safetensors files, a `state.json`, and a `manifest.json` with the format version
and a checksum of every other file. It is written beside its final place, synced to disk, then renamed; a crash at any
instant leaves either the old set of checkpoints or the old set plus a complete new one. Nothing is ever unpickled, and
no folder is deleted that holds anything but the files of a checkpoint.
Among many ranks each writes its own files, and the first one, when all are on disk, the manifest that makes them one
checkpoint.
"""

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from unbraid.distributed.ranks import ALONE, Ranks
from unbraid.errors import CheckpointError
from unbraid.files import TEMPORARY, checksum, follow_umask, free_bytes, is_system_file, sync
from unbraid.json_files import is_count, is_number, read_json_object

FORMAT_VERSION = 2
"""2: SAEs train on centred activations, and a checkpoint knows its mean."""
SPARE_BYTES = 1 << 20
"""Space left on the disk beyond the checkpoint's tensors, for JSON and the log."""
A_FILE = re.compile(r"[^/\\\0]+\.(safetensors|json)")
"""The names of a checkpoint's files."""

CheckpointTensors = dict[str, dict[str, Tensor]]
"""File stem -> tensor name -> tensor."""


def write_checkpoint(
    folder: Path, step: int, tensors: CheckpointTensors, state: dict[str, Any], keep: int, ranks: Ranks = ALONE
) -> Path:
    """Write `folder/step_{step}` atomically, then delete all but the newest `keep` checkpoints.

    A checkpoint of that step that is there already is left alone: the same step of the same run holds the same state.

    Args:
        folder: where checkpoints go; the same for every rank.
        step: steps done.
        tensors: the files this rank writes; no two ranks share a stem.
        state: JSON data, taken from the first rank.
        keep: checkpoints kept.
        ranks: who writes together.

    Raises:
        CheckpointError: the disk has too little space, or the write failed; earlier checkpoints are untouched.
    """
    final, partial = folder / f"step_{step}", _aside(folder, step)
    if ranks.any(final.exists()):
        return final
    (together,) = ranks.total(sum(tensor.nbytes for group in tensors.values() for tensor in group.values()))
    needed = together + SPARE_BYTES
    try:
        if ranks.first:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".step_*.partial"):
                _delete_partial(leftover)
            free = free_bytes(folder)
            if free < needed:
                raise CheckpointError(
                    f"checkpoint of step {step} needs {needed / 2**20:,.1f} MiB but {str(folder)!r} has "
                    f"{free / 2**20:,.1f} MiB free; free some space (earlier checkpoints are intact) and run `unbraid "
                    "resume` on this run"
                )
            if os.path.lexists(partial):
                raise CheckpointError(
                    f"{str(partial)!r} holds {', '.join(foreign_in(partial)[:5])}, which unbraid did not write, in the "
                    f"place of the checkpoint of step {step}; move it away, then run `unbraid resume` on this run "
                    "(earlier checkpoints are intact)"
                )
            partial.mkdir()
        ranks.wait()
        own_files = [partial / f"{stem}.safetensors" for stem in tensors]
        for path, group in zip(own_files, tensors.values(), strict=True):
            safetensors.torch.save_file({k: v.detach().cpu().contiguous() for k, v in group.items()}, path)
        if ranks.first:
            own_files.append(partial / "state.json")
            own_files[-1].write_text(json.dumps(state), encoding="utf-8")
        follow_umask(*own_files)
        for path in own_files:
            sync(path)
        checksums = ranks.united({path.name: checksum(path) for path in sorted(own_files)})
        if ranks.first:
            manifest = {"format_version": FORMAT_VERSION, "step": step, "checksums": checksums}
            (partial / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
            sync(partial / "manifest.json")
            sync(partial)
            partial.rename(final)
            sync(folder)
    except (OSError, safetensors.SafetensorError) as error:
        with contextlib.suppress(OSError):  # the next checkpoint sweeps it away
            _delete_partial(partial)
        raise CheckpointError(
            f"could not write the checkpoint of step {step} into {str(folder)!r}: {error}; earlier checkpoints are "
            "intact; make the folder writable or free some space, then run `unbraid resume` on this run"
        ) from error
    if ranks.first:
        for old in list_checkpoints(folder)[:-keep]:
            _discard(old)
    ranks.wait()
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = (
        [path for path in folder.glob("step_*") if re.fullmatch(r"step_[0-9]+", path.name)] if folder.is_dir() else []
    )
    return sorted(found, key=lambda path: int(path.name.removeprefix("step_")))


def steps_done(folder: Path) -> int:
    """Steps behind the newest checkpoint in `folder`; 0 without one."""
    saved = list_checkpoints(folder)
    return int(saved[-1].name.removeprefix("step_")) if saved else 0


def every_file(stem: str) -> bool:
    """The default answer to "is this file wanted?"."""
    return True


def read_checkpoint(path: Path, wanted: Callable[[str], bool] = every_file) -> tuple[CheckpointTensors, dict[str, Any]]:
    """Tensors and state of one checkpoint, after the checksums of what is read have been checked.

    Args:
        path: the checkpoint.
        wanted: says by their stems which files of tensors are read.

    Raises:
        CheckpointError: a file is missing, altered or truncated, or the format is newer than this version reads.
    """
    try:
        manifest = read_json_object(path / "manifest.json", ValueError, "the manifest of a checkpoint")
        version, checksums = manifest["format_version"], manifest["checksums"]
        if not is_count(version, 1) or not isinstance(checksums, dict):
            raise ValueError(f"manifest.json has format_version {version!r} and checksums {checksums!r}")
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"checkpoint {str(path)!r} has format version {version}; this unbraid reads up to {FORMAT_VERSION}; "
                "upgrade unbraid"
            )
        if version < FORMAT_VERSION:
            raise CheckpointError(
                f"checkpoint {str(path)!r} was written by unbraid 0.1, which trained in other units; expected one of "
                "this version; finish this run with `pip install 'unbraid<0.2'`, or train again into a new run folder"
            )
        for name in checksums:
            if not A_FILE.fullmatch(name):
                raise ValueError(f"manifest.json names {name!r}, which is no file of a checkpoint")
        stems = [name.removesuffix(".safetensors") for name in checksums if name.endswith(".safetensors")]
        stems = [stem for stem in stems if wanted(stem)]
        for name in ("state.json", *(f"{stem}.safetensors" for stem in stems)):
            if checksum(path / name) != checksums[name]:
                raise CheckpointError(damaged(path, f"{name} does not match its checksum"))
        state = read_json_object(path / "state.json", ValueError, "the state of a run")
        return {stem: safetensors.torch.load_file(path / f"{stem}.safetensors") for stem in stems}, state
    except (OSError, ValueError, KeyError, TypeError, AttributeError, safetensors.SafetensorError) as error:
        raise CheckpointError(damaged(path, f"{type(error).__name__}: {error}")) from error


def read_run_state(path: Path) -> dict[str, Any]:
    """State of a run's checkpoint: where it stood, what it was made with, and the buffer's place in the text.

    Raises:
        CheckpointError: a part is missing or is nothing that a run writes.
    """
    _, state = read_checkpoint(path, lambda stem: False)
    kinds = {"step": int, "metrics_offset": int, "run": dict, "buffer": dict, "seconds": dict}
    odd = {name: state.get(name) for name, kind in kinds.items() if not isinstance(state.get(name), kind)}
    seconds = {} if odd else state["seconds"]
    if not odd and (set(seconds) != {"buffer", "training"} or not all(map(is_number, seconds.values()))):
        odd["seconds"] = seconds
    if not odd and not all(isinstance(state["run"].get(name), dict) for name in ("settings", "source")):
        odd["run"] = state["run"]
    if not odd and (f"step_{state['step']}" != path.name or not is_count(state["metrics_offset"])):
        odd = {name: state[name] for name in ("step", "metrics_offset")}
    if odd:
        raise CheckpointError(damaged(path, f"state.json has {str(odd)[:200]}"))
    return state


def damaged(path: Path, what: str) -> str:
    """The message about a checkpoint that is not as it was written."""
    return (
        f"checkpoint {str(path)!r} is damaged ({what}); expected the files as written; delete that folder to resume "
        "from an earlier one"
    )


def _aside(folder: Path, step: int | str) -> Path:
    return folder / f".step_{step}.partial"


def _discard(checkpoint: Path) -> None:
    """Delete an old checkpoint: at any instant it is there whole or not at all. One with other files in it stays."""
    aside = _aside(checkpoint.parent, checkpoint.name.removeprefix("step_"))
    with contextlib.suppress(ValueError):
        named = read_json_object(checkpoint / "manifest.json", ValueError).get("checksums")
        if isinstance(named, dict) and _holds_only(checkpoint, {*named, "manifest.json"}) and not aside.exists():
            checkpoint.rename(aside)
            shutil.rmtree(aside)


def _delete_partial(folder: Path) -> None:
    """Delete what an unfinished write left; a folder with other files in it stays."""
    if folder.is_dir() and not foreign_in(folder):
        shutil.rmtree(folder)


def foreign_in(folder: Path) -> list[str]:
    """Names in a half-written checkpoint that no write leaves there."""
    left = {path.name for path in folder.iterdir()} if folder.is_dir() and not folder.is_symlink() else {folder.name}
    ours = {name for name in left if A_FILE.fullmatch(name) or TEMPORARY.fullmatch(name)}
    return [] if _holds_only(folder, ours) else sorted(left - ours) or sorted(left)


def _holds_only(folder: Path, names: set[str]) -> bool:
    return not folder.is_symlink() and all(
        path.is_file() and not path.is_symlink() and (path.name in names or is_system_file(path.name))
        for path in folder.iterdir()
    )
