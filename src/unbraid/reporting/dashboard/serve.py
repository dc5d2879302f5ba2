"""`unbraid dashboard RUN --serve`: the static site over HTTP, to this machine and no other."""

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from unbraid.errors import UnbraidError

LOOPBACK = "127.0.0.1"


class _Quiet(SimpleHTTPRequestHandler):
    """Serves files, lists no folders, logs nothing."""

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def list_directory(self, path: Any) -> None:
        """Refuse."""
        self.send_error(404)


def serve(index: Path | str, port: int = 0) -> ThreadingHTTPServer:
    """A server of the dashboard `index` on 127.0.0.1, not yet running: call its `serve_forever`.

    Args:
        index: what `write_dashboard` returned.
        port: 0 takes a free one; `server_address` tells which.

    Raises:
        UnbraidError: there is no dashboard, or the port is taken.
    """
    index = Path(index)
    if not index.is_file():
        raise UnbraidError(f"{str(index)!r} is not there; expected a dashboard; write one with `unbraid dashboard RUN`")
    try:
        return ThreadingHTTPServer((LOOPBACK, port), partial(_Quiet, directory=str(index.parent)))
    except OSError as error:
        raise UnbraidError(
            f"port {port} cannot be used ({error.strerror}); expected a free one; choose another"
        ) from error
