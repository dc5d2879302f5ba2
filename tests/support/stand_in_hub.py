"""A stand-in for the Hugging Face hub on loopback: the few requests that uploading and downloading a model makes."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class Hub:
    """What the stand-in holds and was asked."""

    endpoint: str = ""
    repositories: dict[str, dict[str, bytes]] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    tokens: set[str] = field(default_factory=set)
    denied: bool = False

    def sha(self, repository: str) -> str:
        files = self.repositories[repository]
        return hashlib.sha1(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()


@contextmanager
def stand_in_hub() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, status: int, body: bytes = b"", **headers: str):
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def json(self, data, status: int = 200):
            self.answer(status, json.dumps(data).encode(), Content_Type="application/json")

        def body(self) -> bytes:
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def begin(self) -> str:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            hub.tokens.add(self.headers.get("Authorization", ""))
            return path

        def do_POST(self):
            path, body = self.begin(), self.body()
            if hub.denied:
                return self.answer(403, b"{}", X_Error_Message="you may not write here")
            if path == "/api/repos/create":
                data = json.loads(body)
                name = f"{data['organization']}/{data['name']}"
                if name in hub.repositories:
                    return self.json({"error": "exists", "url": f"{hub.endpoint}/{name}"}, 409)
                hub.repositories[name] = {}
                return self.json({"url": f"{hub.endpoint}/{name}"})
            if path == "/api/validate-yaml":
                return self.json({"errors": [], "warnings": []})
            match = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main", path)
            if match is None:
                return self.answer(404, b"{}")
            repository, what = match.groups()
            if what == "preupload":
                files = json.loads(body)["files"]
                plain = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]
                return self.json({"files": plain})
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    value = item["value"]
                    hub.repositories[repository][value["path"]] = base64.b64decode(value["content"])
            sha = hub.sha(repository)
            return self.json(
                {"commitUrl": f"{hub.endpoint}/{repository}/commit/{sha}", "commitOid": sha, "success": True}
            )

        def do_GET(self):
            path = self.begin()
            match = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/[^/]+|/tree/[^/]+/?)?", path)
            if match is not None and match[1] in hub.repositories:
                files = hub.repositories[match[1]]
                if "/tree/" in path:
                    entries = [
                        {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                        for name, data in sorted(files.items())
                    ]
                    return self.json(entries)
                siblings = [{"rfilename": name} for name in sorted(files)]
                sha = hub.sha(match[1])
                return self.json(
                    {"id": match[1], "modelId": match[1], "sha": sha, "siblings": siblings, "private": False}
                )
            match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
            if match is not None and match[2] in hub.repositories.get(match[1], {}):
                data = hub.repositories[match[1]][match[2]]
                etag = f'"{hashlib.sha1(data).hexdigest()}"'
                return self.answer(200, data, ETag=etag, X_Repo_Commit=hub.sha(match[1]))
            return self.answer(404, b"{}", X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
