"""`unbraid dashboard RUN --serve`: the static site over HTTP, to this machine and no other."""

from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from unbraid.errors import UnbraidError

LOOPBACK = "127.0.0.1"


class _Quiet(SimpleHTTPRequestHandler):
    """Serves files, lists no folders, logs nothing; answers only who asks this machine for files of the dashboard."""

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def list_directory(self, path: Any) -> None:
        """Refuse."""
        self.send_error(404)

    def send_head(self) -> Any:
        """What GET and HEAD share. A page elsewhere that has its own name point here still sends that name as Host."""
        _, port = self.request.getsockname()
        if self.headers.get_all("Host") not in [[f"{name}:{port}"] for name in (LOOPBACK, "localhost")]:
            self.send_error(403, "ask for this server by its address")
            return None
        if not Path(self.translate_path(self.path)).resolve().is_relative_to(Path(self.directory).resolve()):
            self.send_error(404)
            return None
        return super().send_head()


def serve(index: Path | str, port: int = 0) -> ThreadingHTTPServer:
    """A server of the dashboard `index` on 127.0.0.1, not yet running: call its `serve_forever`.

    Args:
        index: what `write_dashboard` returned.
        port: 0 takes a free one; `server_address` tells which.

    Raises:
        UnbraidError: there is no dashboard, or the port is taken or out of range.
    """
    index = Path(index)
    if not index.is_file():
        raise UnbraidError(f"{str(index)!r} is not there; expected a dashboard; write one with `unbraid dashboard RUN`")
    if not 0 <= port <= 65_535:
        raise UnbraidError(f"port {port} is out of range; expected 0 to 65535; choose another, or 0 for a free one")
    try:
        return ThreadingHTTPServer((LOOPBACK, port), partial(_Quiet, directory=str(index.parent)))
    except OSError as error:
        raise UnbraidError(
            f"port {port} cannot be used ({error.strerror}); expected a free one; choose another"
        ) from error
