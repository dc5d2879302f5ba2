"""Files that appear whole or not at all: written aside, synced to disk, renamed; and the checksums that prove it."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOCK = ".lock"


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Make `path` by `write(partial path)`; a crash or a failed write leaves whatever was there before."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write(partial)
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write JSON whole or not at all."""
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda partial: _write_text(partial, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def discard(folder: Path) -> None:
    """Delete a folder that others may look for: at any instant it is there whole or not at all."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    folder.rename(partial)
    shutil.rmtree(partial, ignore_errors=True)


def holds_nothing(folder: Path) -> bool:
    """Whether a folder is absent or empty, not counting its lock and what a killed write left behind."""
    return not folder.exists() or (
        folder.is_dir() and all(path.name == LOCK or path.suffix == ".partial" for path in folder.iterdir())
    )


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the operating system lets go of it however the process ends.

    Raises:
        BlockingIOError: another process holds it.
    """
    with (folder / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def checksum(path: Path) -> str:
    """BLAKE2b of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(path: Path) -> int:
    """Room left where `path` is."""
    return shutil.disk_usage(path).free
