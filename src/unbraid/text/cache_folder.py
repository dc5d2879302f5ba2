"""Where converted models and text live between runs, and how a file gets there whole or not at all.

Converting the packaged model or corpus takes seconds, so it happens once per machine. A result is written beside its
final place and renamed, so a reader never meets a half-written one and two processes may convert at the same time.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from unbraid.errors import UnbraidError

Read = TypeVar("Read")


def cache_root() -> Path:
    """`$UNBRAID_CACHE`, or `~/.cache/unbraid`."""
    chosen = os.environ.get("UNBRAID_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "unbraid"


def publish(target: Path, write: Callable[[Path], None], error: type[UnbraidError]) -> Path:
    """Return `target`, made by `write(path)` if it does not exist yet; `write` may make a file or a folder.

    Raises:
        UnbraidError: of class `error`, when the cache folder cannot be written.
    """
    if target.exists():
        return target
    aside = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        write(aside / "content")
        try:
            (aside / "content").rename(target)
        except OSError:
            if not target.exists():
                raise
    except OSError as problem:
        raise error(
            f"cannot write {str(target)!r} into unbraid's cache ({problem.strerror or problem}); expected a writable "
            "folder with a GB to spare; set the environment variable UNBRAID_CACHE to one"
        ) from problem
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)
    return target


def read_published(
    target: Path,
    write: Callable[[Path], None],
    read: Callable[[Path], Read],
    damaged: tuple[type[Exception], ...],
    error: type[UnbraidError],
) -> Read:
    """`read(target)`, made as by `publish`; a file that cannot be read is made once more.

    Args:
        target: the file.
        write: makes it.
        read: reads it.
        damaged: what `read` raises for a damaged one.
        error: raised when the cache folder cannot be written.
    """
    try:
        return read(publish(target, write, error))
    except damaged:
        target.unlink(missing_ok=True)
        return read(publish(target, write, error))
