"""Files that appear whole or not at all: written aside, synced to disk, renamed; and the checksums that prove it.

Nothing here writes through a symbolic link: a link in the place of a file is replaced, not followed. Everything works
on POSIX systems and on Windows, where a folder cannot be synced and a file is synced only through a writable handle.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

LOCK = ".lock"
SYSTEM_FILES = {".DS_Store", ".localized", "Icon\r", "Thumbs.db", "ehthumbs.db", "desktop.ini", ".directory"}
"""Files that file managers leave in any folder they show."""
LEFT_BY_A_KILLED_WRITE = re.compile(
    r"\.(\.unbraid\.json|config\.json|manifest\.json|changes\.jsonl|step_[0-9]+)\.partial"
)
"""What a process that was killed before it had written anything whole leaves in a folder."""
TEMPORARY = re.compile(r"\.tmp[A-Za-z0-9]{6}")
"""The file that safetensors writes beside its target and then renames; a kill leaves it there."""
WINDOWS_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Make `path` by `write(partial path)`; a crash or a failed write leaves whatever was there before."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.unlink(missing_ok=True)
        write(partial)
        _put_in_place(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole_tensors(path: Path, write: Callable[[Path], None]) -> None:
    """`write_whole` for a writer that makes further files beside its target, as safetensors does.

    It works in a folder of its own, so what a kill leaves of it is swept away by the next write.

    Raises:
        OSError: the disk is full, writing is not permitted, or files that are not ours are in the way.
    """
    aside = path.with_name(f".{path.name}.partial")
    partial = aside / path.name
    _sweep(aside, path.name)
    aside.mkdir()
    try:
        write(partial)
        _put_in_place(partial, path)
    finally:
        _sweep(aside, path.name)


def _put_in_place(partial: Path, path: Path) -> None:
    """A file that is written becomes `path`, on the disk and readable as any new file is."""
    follow_umask(partial)
    sync(partial)
    partial.replace(path)
    sync(path.parent)


def _sweep(aside: Path, name: str) -> None:
    """Delete what a write left, if nothing else is in it."""
    if aside.is_symlink() or not aside.is_dir():
        aside.unlink(missing_ok=True)
        return
    for path in aside.iterdir():
        if path.name == name or TEMPORARY.fullmatch(path.name):
            path.unlink()
    if not any(aside.iterdir()):
        aside.rmdir()


def write_json(path: Path, data: Any) -> None:
    """Write JSON whole or not at all."""
    text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
    write_whole(path, lambda partial: _write_text(partial, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def follow_umask(*paths: Path) -> None:
    """Give files the permissions any new file gets here; some writers (safetensors) make theirs private."""
    mask = os.umask(0o077)
    os.umask(mask)
    for path in paths:
        path.chmod(0o666 & ~mask)


def is_system_file(name: str) -> bool:
    """Whether a file manager made a file of this name, so that it says nothing about who uses the folder."""
    return name in SYSTEM_FILES or name.startswith("._")


def is_lock(path: Path) -> bool:
    """Whether a file can be a lock of unbraid, which holds no byte."""
    return path.is_file() and not path.is_symlink() and path.stat().st_size == 0


def holds_nothing(folder: Path) -> bool:
    """Whether a folder is absent or empty, not counting its lock, system files and what a killed write left behind."""
    return not folder.exists() or (
        folder.is_dir()
        and all(
            (p.name == LOCK and is_lock(p)) or LEFT_BY_A_KILLED_WRITE.fullmatch(p.name) or is_system_file(p.name)
            for p in folder.iterdir()
        )
    )


@contextmanager
def held(folder: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold a folder for this process; the operating system lets go of it however the process ends.

    Args:
        folder: holds the lock file, which stays there.
        wait: seconds to wait for another process to let go.

    Raises:
        BlockingIOError: another process holds it.
        OSError: the lock file cannot be opened, or is no lock file.
    """
    with locked(folder / LOCK, wait):
        yield


@contextmanager
def locked(path: Path, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock file `path`, made if it is not there.

    Raises:
        BlockingIOError: another process holds it longer than `wait` seconds.
        OSError: something else has its name; locking would empty it.
    """
    if os.path.lexists(path) and not is_lock(path):
        raise OSError(0, "is in the way of a lock file and was not written by unbraid; move it away", str(path))
    lock = FileLock(path, timeout=wait)
    try:
        lock.acquire()
    except Timeout:
        raise BlockingIOError(0, "held by another process", str(path)) from None
    try:
        yield
    finally:
        lock.release()


def checksum(path: Path) -> str:
    """BLAKE2b of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def sync(path: Path) -> None:
    """Flush a file or folder to the disk; on Windows a folder cannot be, and is left to the system."""
    windows = os.name == "nt"
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def free_bytes(path: Path) -> int:
    """Free space on the disk that holds `path`."""
    return shutil.disk_usage(path).free


def first_link(root: Path, names: tuple[str, ...]) -> Path | None:
    """The first symbolic link among the entries `names` of `root`, or anywhere below one of them; None without any."""
    for name in names:
        entry = root / name
        if entry.is_symlink():
            return entry
        for folder, folders, files in os.walk(entry):
            for found in (*folders, *files):
                if Path(folder, found).is_symlink():
                    return Path(folder, found)
    return None


def folder_name(text: str) -> str:
    """A name any file system takes: `A -> B + C` becomes `A--to--B--and--C`, and `:` or a slash a dot."""
    name = re.sub(r"\s*->\s*", "--to--", text)
    name = re.sub(r"\s*\+\s*", "--and--", name)
    return re.sub(r"[:/\\]", ".", name)


def is_folder_name(text: str) -> bool:
    """Whether `text` names one folder on every system: no separator, no reserved name or character, not hidden."""
    return (
        0 < len(text) <= 200
        and re.search(r'[<>:"/\\|?*\x00-\x1f\ud800-\udfff]', text) is None
        and text[0] not in ". "
        and text[-1] not in ". "
        and WINDOWS_DEVICES.fullmatch(text) is None
    )
