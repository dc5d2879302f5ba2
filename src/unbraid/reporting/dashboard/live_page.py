"""How a served dashboard finds the live page of the same run, so that features link to it.

`unbraid live` leaves its address, which holds a secret, in a file that only this user can read, in unbraid's cache and
never in the run, which may be shared; it goes away with the page. An address that nobody answers at is not given out.
"""

import contextlib
import hashlib
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from unbraid.formats import path_or_name
from unbraid.text.cache_folder import cache_root

ADDRESS = re.compile(r"http://127\.0\.0\.1:\d{1,5}/#k=[\w-]{20,100}")
SECONDS = 0.5
"""How long a page may take to accept a connection."""


def _place(source: Path | str) -> Path:
    source = path_or_name(source)
    whole = str(source.resolve()) if isinstance(source, Path) else source
    return cache_root() / "live" / f"{hashlib.blake2b(whole.encode(), digest_size=16).hexdigest()}.txt"


@contextmanager
def announced(source: Path | str, url: str) -> Iterator[None]:
    """While inside, `address(source)` is `url`; nothing is announced where the cache cannot be written.

    Args:
        source: what the live page is of, as it was typed.
        url: its address with the secret.
    """
    place = _place(source)
    with contextlib.suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        place.unlink(missing_ok=True)
        with os.fdopen(os.open(place, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(url)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if place.read_text() == url:  # not that of a page started later
                place.unlink()


def address(source: Path | str) -> str | None:
    """The address of the live page of `source`, if one runs."""
    try:
        url = _place(source).read_text(encoding="ascii")
        if not ADDRESS.fullmatch(url):
            return None
        parts = urlsplit(url)
        with socket.create_connection((parts.hostname, parts.port), timeout=SECONDS):
            return url
    except (OSError, ValueError, OverflowError):
        return None
