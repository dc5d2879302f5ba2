"""The live page's server: loopback only, one secret, no writes.

Every request is checked before it is routed: one Host header that names this server, an Origin, if there is one, that
is this server, and for `/api` the secret that only the printed address holds (in its fragment, which browsers do not
send). What a page may do is said by a content security policy: nothing but its own scripts, styles and requests.
"""

import json
import secrets
import socket
from collections.abc import AsyncIterator, Callable
from importlib import resources
from typing import Any

from unbraid.errors import FeatureError, UnbraidError
from unbraid.feature_model.live.session import Overtaken, Session
from unbraid.reporting.dashboard.live_page import announced

LOOPBACK = "127.0.0.1"
LARGEST_BODY = 64 * 1024
ASSETS = {
    "/": ("unbraid.feature_model.live", "live.html", "text/html"),
    "/live.js": ("unbraid.feature_model.live", "live.js", "text/javascript"),
    "/live.css": ("unbraid.feature_model.live", "live.css", "text/css"),
    "/core.js": ("unbraid.reporting.dashboard", "core.js", "text/javascript"),
    "/app.css": ("unbraid.reporting.dashboard", "app.css", "text/css"),
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; base-uri 'none'; "
        "form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guarded:
    """An ASGI app behind the checks.

    Args:
        app: what answers requests that pass.
        port: of this server.
        token: the secret.
    """

    def __init__(self, app: Any, port: int, token: str):
        self.app, self.token = app, token.encode()
        self.hosts = {f"{LOOPBACK}:{port}".encode(), f"localhost:{port}".encode()}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer 403 to what fails a check, and add the security headers to everything."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return

        async def sending(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        refused = self._refused(scope)
        if refused is not None:
            await _plain(sending, 403, refused)
            return
        await self.app(scope, receive, sending)

    def _refused(self, scope: Any) -> str | None:
        values: dict[bytes, list[bytes]] = {}
        for name, value in scope["headers"]:
            values.setdefault(name.lower(), []).append(value)
        hosts = values.get(b"host", [])
        if len(hosts) != 1 or hosts[0].lower() not in self.hosts:
            return "this server answers to its own address only"
        origins = values.get(b"origin", [])
        if origins and origins != [b"http://" + hosts[0].lower()]:
            return "requests of other origins are refused"
        if scope["path"].startswith("/api"):
            given = values.get(b"authorization", [])
            if len(given) != 1 or not secrets.compare_digest(given[0], b"Bearer " + self.token):
                return "the secret of the printed address is missing"
        return None


async def _plain(send: Any, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})


def build_app(session: Session, port: int, token: str) -> Guarded:
    """The page and its requests."""
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response, StreamingResponse
    from starlette.routing import Route

    async def body_of(request: Request) -> dict[str, Any]:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise _Refused(415, "expected application/json")
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > LARGEST_BODY:
                raise _Refused(413, f"expected at most {LARGEST_BODY} bytes")
        try:
            data = json.loads(body or b"{}")
        except (ValueError, RecursionError):
            raise _Refused(400, "the body is no JSON; expected an object") from None
        if not isinstance(data, dict):
            raise _Refused(400, "the body is no JSON object")
        return data

    def answering(ask: Callable[[dict[str, Any]], dict[str, Any]]) -> Any:
        async def endpoint(request: Request) -> Response:
            try:
                body = await body_of(request)
                overtaken = session.turns.take()

                def work() -> dict[str, Any]:
                    with session.turns.held(overtaken):
                        return ask(body)

                return JSONResponse(await run_in_threadpool(work))
            except _Refused as problem:
                return JSONResponse({"error": problem.said}, problem.status)
            except Overtaken:
                return JSONResponse({"error": "a newer request took its place"}, 409)
            except UnbraidError as problem:
                return JSONResponse({"error": str(problem)}, 400)
            except ClientDisconnect:
                return Response(status_code=400)

        return endpoint

    async def steer(request: Request) -> Response:
        try:
            body = await body_of(request)
        except _Refused as problem:
            return JSONResponse({"error": problem.said}, problem.status)
        left = [False]
        overtaken = session.turns.take()

        def stopped() -> bool:
            return left[0] or overtaken()

        def pieces() -> Any:
            try:
                with session.turns.held(overtaken):
                    yield from session.steer(body, stopped)
                yield {"kind": "cancelled" if stopped() else "done"}
            except Overtaken:
                yield {"kind": "cancelled"}
            except UnbraidError as problem:
                yield {"kind": "error", "text": str(problem)}

        async def lines() -> AsyncIterator[bytes]:
            iterator = pieces()
            try:
                while (piece := await run_in_threadpool(next, iterator, None)) is not None:
                    yield json.dumps(piece).encode() + b"\n"
            finally:  # the reader may have gone: stop before the next token and give the model back
                left[0] = True
                iterator.close()

        return StreamingResponse(lines(), media_type="application/x-ndjson")

    def asset(package: str, name: str, kind: str) -> Any:
        content = (resources.files(package) / "assets" / name).read_bytes()

        async def endpoint(request: Request) -> Response:
            return Response(content, media_type=kind)

        return endpoint

    async def no_icon(request: Request) -> Response:
        return Response(status_code=204)

    routes = [Route(path, asset(*what)) for path, what in ASSETS.items()]
    routes.append(Route("/favicon.ico", no_icon))
    for name in ("about", "read", "feature", "attribute"):
        routes.append(Route(f"/api/{name}", answering(getattr(session, name)), methods=["POST"]))
    routes.append(Route("/api/steer", steer, methods=["POST"]))
    return Guarded(Starlette(routes=routes), port, token)


class _Refused(Exception):
    """A request that is not answered, with its status."""

    def __init__(self, status: int, said: str):
        super().__init__(said)
        self.status, self.said = status, said


def serve(fm: Any, port: int, run: str, ready: Callable[[str], None]) -> None:
    """Serve the page until interrupted.

    Args:
        fm: the model.
        port: 0 takes a free one.
        run: how the run was named.
        ready: called with the address to open, which holds the secret.

    Raises:
        FeatureError: starlette or uvicorn is not installed, the port is taken, or the model has no tokenizer.
    """
    try:
        import starlette
        import uvicorn
    except ImportError:
        raise FeatureError("the live page needs starlette and uvicorn; run `pip install unbraid[live]`") from None
    del starlette
    if fm.tokenizer is None:
        raise FeatureError("the live page needs a tokenizer; expected a model with one")
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((LOOPBACK, port))
    except (OSError, OverflowError) as problem:
        listener.close()
        raise FeatureError(f"port {port} cannot be used ({problem}); expected a free one; choose another") from problem
    token, bound = secrets.token_urlsafe(32), listener.getsockname()[1]
    config = uvicorn.Config(
        build_app(Session(fm, run), bound, token),
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=2,
    )
    url = f"http://{LOOPBACK}:{bound}/#k={token}"
    ready(url)
    try:
        with announced(run, url):
            uvicorn.Server(config).run(sockets=[listener])
    except KeyboardInterrupt:
        pass
    finally:
        listener.close()
