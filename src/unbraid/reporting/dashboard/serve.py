"""`unbraid dashboard RUN --serve`: the static site over HTTP, to this machine and no other, and its labels file.

Files of the dashboard go to whoever asks this machine for them by its address. Labels are read and written only for
requests that also carry the secret of the printed address (in its fragment, which browsers do not send) and, if they
name an origin, come from this server's own pages.
"""

import json
import secrets
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from unbraid.errors import UnbraidError
from unbraid.json_files import parse_json
from unbraid.reporting.dashboard.labels import Labels, change

LOOPBACK = "127.0.0.1"
LABELS, LIVE = "/api/labels", "/api/live"
LARGEST_BODY = 1 << 21
Live = Callable[[], str | None]
HEADERS = {
    "Content-Security-Policy": "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class DashboardServer(ThreadingHTTPServer):
    """Serves one dashboard.

    Args:
        index: its first page.
        port: 0 takes a free one.
        labels: the file of labels; None keeps none.
        live: gives the address of the live page, or None while there is none.

    Attributes:
        url: to open, with the secret.
    """

    daemon_threads = True

    def __init__(self, index: Path, port: int, labels: Path | None, live: Live):
        self.live = live
        self.folder, self.labels, self.secret = index.parent, labels, secrets.token_urlsafe(32)
        super().__init__((LOOPBACK, port), _Handler)
        self.url = f"http://{LOOPBACK}:{self.server_address[1]}/#k={self.secret}"


class _Handler(SimpleHTTPRequestHandler):
    """Serves files, lists no folders, logs nothing; answers only who asks this machine for files of the dashboard."""

    server: DashboardServer  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = 30

    def __init__(self, request: Any, address: Any, server: DashboardServer):
        super().__init__(request, address, server, directory=str(server.folder))

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""

    def list_directory(self, path: Any) -> None:
        """Refuse."""
        self.send_error(404)

    def end_headers(self) -> None:
        """Security headers with everything."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def do_GET(self) -> None:
        """Files, and labels."""
        if self.path == LABELS:
            self._answer(lambda: Labels.read(self._file()).to_dict())
        elif self.path == LIVE:
            self._answer(lambda: {"url": self.server.live()})
        else:
            super().do_GET()

    def do_POST(self) -> None:
        """Changes of labels."""
        if self.path != LABELS:
            self.send_error(404)
            return
        self._answer(lambda: change(self._file(), self._body()).to_dict())

    def send_head(self) -> Any:
        """What GET and HEAD share. A page elsewhere that has its own name point here still sends that name as Host."""
        if not self._asked_by_address():
            self.send_error(403, "ask for this server by its address")
            return None
        if not Path(self.translate_path(self.path)).resolve().is_relative_to(Path(self.directory).resolve()):
            self.send_error(404)
            return None
        return super().send_head()

    def _asked_by_address(self) -> bool:
        _, port = self.request.getsockname()
        return self.headers.get_all("Host") in [[f"{name}:{port}"] for name in (LOOPBACK, "localhost")]

    def _file(self) -> Path:
        if self.server.labels is None:
            raise UnbraidError("no labels are kept here")
        return self.server.labels

    def _answer(self, act: Callable[[], dict[str, Any]]) -> None:
        origins, given = self.headers.get_all("Origin", []), self.headers.get_all("Authorization", [])
        if not self._asked_by_address():
            self._send(403, {"error": "ask for this server by its address"})
        elif origins and origins != [f"http://{self.headers['Host']}"]:
            self._send(403, {"error": "requests of other origins are refused"})
        elif len(given) != 1 or not secrets.compare_digest(given[0].encode(), f"Bearer {self.server.secret}".encode()):
            self._send(403, {"error": "the secret of the printed address is missing"})
        else:
            try:
                self._send(200, act())
            except (UnbraidError, OSError) as problem:
                self._send(400, {"error": str(problem)})

    def _body(self) -> dict[str, Any]:
        length = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() != "application/json":
            raise UnbraidError("expected application/json")
        if not length.isascii() or not length.isdigit() or int(length) > LARGEST_BODY:
            raise UnbraidError(f"expected a body of at most {LARGEST_BODY:,} bytes")
        try:
            text = self.rfile.read(int(length)).decode()
        except UnicodeDecodeError:
            raise UnbraidError("the body is not UTF-8") from None
        data = parse_json(text, lambda why: UnbraidError(f"the body {why}"))
        if not isinstance(data, dict):
            raise UnbraidError("the body is no JSON object")
        return data

    def _send(self, status: int, data: dict[str, Any]) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def serve(
    index: Path | str, port: int = 0, *, labels: Path | None = None, live: Live = lambda: None
) -> DashboardServer:
    """A server of the dashboard `index` on 127.0.0.1, not yet running: call its `serve_forever`.

    Args:
        index: what `write_dashboard` returned.
        port: 0 takes a free one; `url` of the server tells which.
        labels: file that keeps readers' labels, notes and lists; without one, none are kept.
        live: gives the address of the live page of the same run, or None while there is none.

    Raises:
        UnbraidError: there is no dashboard, the labels file is damaged, or the port is taken or out of range.
    """
    index = Path(index)
    if not index.is_file():
        raise UnbraidError(f"{str(index)!r} is not there; expected a dashboard; write one with `unbraid dashboard RUN`")
    if not 0 <= port <= 65_535:
        raise UnbraidError(f"port {port} is out of range; expected 0 to 65535; choose another, or 0 for a free one")
    if labels is not None:
        Labels.read(labels)
    try:
        return DashboardServer(index, port, labels, live)
    except OSError as error:
        raise UnbraidError(
            f"port {port} cannot be used ({error.strerror}); expected a free one; choose another"
        ) from error
