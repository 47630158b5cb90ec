"""A model hub of one repository, on this machine: enough of its interface for `fastvlm-mlx
download`.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """What the server holds and how it behaves; tests set the attributes and read `requests`.

    `files`: name -> content. `stall_after`: bytes of a large file after which the server falls
    silent, setting `stalled`. `status`: what every request is answered with. `gated`: files are
    refused. `pretend_size`: what each file is said to weigh.
    """

    def __init__(self, repo: str, files: dict[str, bytes]) -> None:
        self.repo = repo
        self.files = files
        self.stall_after: int | None = None
        self.stalled = threading.Event()
        self.status: int | None = None
        self.gated = False
        self.pretend_size: int | None = None
        self.requests: list[tuple[str, str, str | None]] = []
        self.url = ""

    def downloads(self, name: str) -> list[str | None]:
        """The Range header of every GET of a file, in order."""
        path = f"/resolve/{COMMIT}/{name}"
        return [
            found for verb, asked, found in self.requests if verb == "GET" and asked.endswith(path)
        ]


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps the tests' output clean."""

    def do_HEAD(self) -> None:
        self.serve()

    def do_GET(self) -> None:
        self.serve()

    def serve(self) -> None:
        path = self.path.partition("?")[0]
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        api = f"/api/models/{self.hub.repo}"
        if self.hub.status is not None:
            self.answer(self.hub.status, b"{}", {})
        elif path == f"{api}/tree/{COMMIT}":
            self.answer_json(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                    for name, data in self.hub.files.items()
                ]
            )
        elif path in (api, f"{api}/revision/main", f"{api}/revision/{COMMIT}"):
            size = self.hub.pretend_size
            self.answer_json(
                {
                    "id": self.hub.repo,
                    "sha": COMMIT,
                    "siblings": [
                        {"rfilename": name, "size": size or len(data)}
                        for name, data in self.hub.files.items()
                    ],
                }
            )
        elif path.startswith(api + "/revision/"):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith(f"/{self.hub.repo}/resolve/"):
            self.serve_file(path.split("/", 5)[5])
        else:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def serve_file(self, name: str) -> None:
        if self.hub.gated:
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
            return
        data = self.hub.files[name]
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        start = 0
        if asked := self.headers.get("Range"):
            start = int(asked.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.answer(206 if start else 200, data[start:], headers, stall=self.hub.stall_after)

    def answer_json(self, value: Any) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(
        self, status: int, body: bytes, headers: dict[str, str], stall: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if stall is not None and len(body) > stall:
            self.wfile.write(body[:stall])
            self.wfile.flush()
            self.hub.stalled.set()
            self.connection.settimeout(60)
            with suppress(OSError):
                self.connection.recv(1)  # returns when the other side has gone
            self.close_connection = True
            return
        self.wfile.write(body)


@contextmanager
def serving(hub: FakeHub) -> Iterator[FakeHub]:
    """Serves `hub` on a free port of the loopback interface while the block runs."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True
    )
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
