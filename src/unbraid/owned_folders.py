"""Folders that unbraid writes as a whole, and replaces only if it wrote them.

Every folder unbraid makes holds a marker file that says what it is and which files were put into it. `written_folder`
is the one function that replaces a folder: never one without that marker, never one with a file the marker does not
name. A replacement is two renames, old aside and new in; the old copy is deleted only after both, and a process that
dies between them leaves the whole old copy, which `recover` puts back when the folder is next used.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from unbraid.errors import UnbraidError
from unbraid.files import (
    LOCK,
    follow_umask,
    holds_nothing,
    is_lock,
    is_system_file,
    locked,
    sync,
    write_json,
)
from unbraid.json_files import read_json_object

MARKER = ".unbraid.json"
FORMAT_VERSION = 1
OLD, PARTIAL, TRASH = "old", "partial", "trash"


def _nothing(_folder: Path) -> bool:
    return False


@contextmanager
def written_folder(
    folder: Path,
    kind: str,
    *,
    error: type[UnbraidError] = UnbraidError,
    overwrite: bool = True,
    recognise: Callable[[Path], bool] = _nothing,
) -> Iterator[Path]:
    """Write into the folder this yields; on leaving without an error it becomes `folder`.

    Args:
        folder: a new place, an empty folder, or a folder of the same kind that unbraid wrote.
        kind: what the folder is, in a word or two for messages: "SAE", "dashboard".
        error: class of the errors raised.
        overwrite: whether a folder of that kind may be replaced.
        recognise: says of a folder without a marker whether unbraid 0.1, which wrote none, made it.

    Raises:
        UnbraidError: of class `error`: the place holds something else, cannot be written, or is being written by
            another process.
    """
    folder = Path(folder)
    try:
        recover(folder)
        check_replaceable(folder, kind, error=error, overwrite=overwrite, recognise=recognise)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder, error):
            if not holds_nothing(folder) and read_marker(folder) is None:
                mark(folder, kind, _files(folder))  # recognised; from here on it can be recovered and deleted
            _require_ours(_aside(folder, OLD))
            for leftover in (_aside(folder, PARTIAL), _aside(folder, TRASH)):
                _delete(leftover)
            partial = _aside(folder, PARTIAL)
            partial.mkdir()
            try:
                mark(partial, kind)
                yield partial
                _finish(partial, kind)
                _swap(partial, folder)
            finally:
                with contextlib.suppress(OSError):  # the next write sweeps it away
                    _delete(partial)
    except OSError as problem:
        raise error(
            f"cannot write the {kind} folder {str(folder)!r}: {problem.strerror or problem}; expected a writable place "
            "with free space; choose another folder"
        ) from problem


def mark(folder: Path, kind: str, files: list[str] | None = None) -> None:
    """Write the marker of a folder unbraid makes; `files` are what it put there, None for a folder that grows."""
    write_json(
        folder / MARKER, {"format_version": FORMAT_VERSION, "written_by": "unbraid", "kind": kind, "files": files}
    )


def read_marker(folder: Path) -> dict[str, Any] | None:
    """The marker of a folder unbraid made; None without one that can be read."""
    path = folder / MARKER
    try:
        marker = None if path.is_symlink() else read_json_object(path, ValueError)
    except ValueError:
        return None
    return marker if marker is not None and marker.get("written_by") == "unbraid" else None


def recover(folder: Path) -> None:
    """Put back the whole old copy of a folder whose replacement was cut off between its two renames."""
    old = _aside(folder, OLD)
    if folder.exists() or not old.is_dir() or read_marker(old) is None:
        return
    with contextlib.suppress(OSError, UnbraidError), _alone(folder, UnbraidError, wait=10.0):
        if not folder.exists():
            old.rename(folder)


def foreign_files(folder: Path, marker: dict[str, Any]) -> list[str]:
    """Files in a marked folder that its marker does not name, without system files and its lock."""
    files = marker.get("files")
    known = {MARKER, *(files if isinstance(files, list) else [])}
    return [
        name
        for name in _files(folder)
        if name not in known and not (name == LOCK and is_lock(folder / LOCK)) and not is_system_file(Path(name).name)
    ]


def check_replaceable(
    folder: Path,
    kind: str,
    *,
    error: type[UnbraidError] = UnbraidError,
    overwrite: bool = True,
    recognise: Callable[[Path], bool] = _nothing,
) -> None:
    """Refuse a place that `written_folder` would refuse, before any work is done.

    Raises:
        UnbraidError: of class `error`, saying what is there.
    """
    article = "an" if kind[0] in "aeiouAEIOUS" else "a"
    expected = f"expected a new folder, or {article} {kind} folder that unbraid wrote; choose another place"
    if folder.is_symlink():
        raise error(f"{str(folder)!r} is a symbolic link; {expected}, or name the folder it points to")
    if folder.exists() and not folder.is_dir():
        raise error(f"{str(folder)!r} is a file; {expected}")
    if holds_nothing(folder):
        return
    marker = read_marker(folder)
    if marker is None:
        foreign = [] if recognise(folder) else [name for name in _files(folder) if not is_system_file(Path(name).name)]
    elif marker.get("kind") != kind:
        raise error(f"{str(folder)!r} is a folder of another kind ({marker.get('kind')}); {expected}")
    else:
        foreign = foreign_files(folder, marker)
    if foreign:
        shown = ", ".join(foreign[:5]) + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else "")
        raise error(f"{str(folder)!r} holds {shown}, which unbraid did not write; {expected}, or move them away")
    if not overwrite:
        raise error(f"{str(folder)!r} holds {article} {kind} already; choose another place, or add --overwrite")


def _files(folder: Path) -> list[str]:
    """Names of everything in a folder that is not a folder with something in it."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_symlink() or not path.is_dir() or not any(path.iterdir())
    )


def _aside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f".{folder.name}.{suffix}")


@contextmanager
def _alone(folder: Path, error: type[UnbraidError], wait: float = 0.0) -> Iterator[None]:
    """One process at a time; the lock file goes with the last one."""
    lock = _aside(folder, "lock")
    try:
        with locked(lock, wait):
            try:
                yield
            finally:
                with contextlib.suppress(OSError):  # Windows keeps an open file
                    lock.unlink()
    except BlockingIOError:
        raise error(f"another process is writing {str(folder)!r}; wait for it or choose another place") from None


def _finish(partial: Path, kind: str) -> None:
    """Name the files in the marker, open them to whoever may read new files, and flush all of it to the disk."""
    mark(partial, kind, [name for name in _files(partial) if name != MARKER])
    everything = list(partial.rglob("*"))
    follow_umask(*(path for path in everything if path.is_file()))
    for path in (*everything, partial):
        sync(path)


def _swap(partial: Path, folder: Path) -> None:
    """`partial` becomes `folder`; the old copy is put back if it cannot."""
    old = _aside(folder, OLD)
    if old.exists() and folder.exists():
        _delete(_renamed(old, _aside(folder, TRASH)))
    if holds_nothing(folder):
        _delete_empty(folder)
    else:
        folder.rename(old)
    try:
        partial.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    sync(folder.parent)
    if old.exists():
        with contextlib.suppress(OSError):  # what was asked for is done; the next write sweeps it away
            _delete(_renamed(old, _aside(folder, TRASH)))


def _renamed(path: Path, to: Path) -> Path:
    path.rename(to)
    return to


def _delete(folder: Path) -> None:
    """Delete a folder put aside, the marker last, so that what a killed deletion leaves is still known as ours."""
    if not folder.is_dir() or folder.is_symlink():
        return
    _require_ours(folder)
    for path in folder.iterdir():
        if path.name != MARKER:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (folder / MARKER).unlink(missing_ok=True)
    folder.rmdir()


def _require_ours(folder: Path) -> None:
    """A folder put aside bears a marker, or its write was killed before it had one."""
    if folder.is_dir() and not holds_nothing(folder) and read_marker(folder) is None:
        raise OSError(0, f"{folder.name} is in the way and was not written by unbraid", str(folder))


def _delete_empty(folder: Path) -> None:
    """Delete a folder of which `holds_nothing` is true, so that another can take its name."""
    if folder.exists():
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                raise OSError(0, f"{path.name} is in the way", str(folder))
            path.unlink()
        folder.rmdir()
