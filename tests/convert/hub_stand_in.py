"""The calls by which `huggingface_hub` sends a folder, answered on this machine.

Create the repository; have the card's head checked; ask how each file is to be sent (`preupload`);
for large files the LFS batch, a PUT each, and its verification; one commit. That is its protocol
without hf_xet, which a stand-in could not speak: the tests switch that off.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "fedcba9876543210fedcba9876543210fedcba98"
LARGE = 10_000  # bytes, from which a file goes by LFS


class StandIn:
    """What the hub holds, what it was asked, and how it misbehaves.

    `fail`: a step ("create", "preupload", "batch", "put", "verify", "commit") -> the status it is
    answered with, or "drop" to close the connection. `exists`: the repository is there already.
    """

    def __init__(self) -> None:
        self.url = ""
        self.exists = False
        self.fail: dict[str, int | str] = {}
        self.steps: list[str] = []
        self.tokens: set[str] = set()
        self.created: dict[str, Any] = {}
        self.blobs: dict[str, bytes] = {}  # by SHA-256
        self.files: dict[str, bytes] = {}  # as committed
        self.summary = ""


class _Handler(BaseHTTPRequestHandler):
    hub: StandIn
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps the tests' output clean."""

    def do_GET(self) -> None:
        self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})

    def do_PUT(self) -> None:
        data = self.body()
        if self.begin("put"):
            self.hub.blobs[hashlib.sha256(data).hexdigest()] = data
            self.answer(200, {})

    def do_POST(self) -> None:
        data = self.body()
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            if not self.begin("create"):
                return
            self.hub.created = json.loads(data)
            name = "{organization}/{name}".format(**self.hub.created)
            status = 409 if self.hub.exists else 200
            self.answer(status, {"url": f"{self.hub.url}/{name}", "error": "it is there already"})
        elif path == "/api/validate-yaml":  # the head of the model card
            self.answer(200, {"errors": [], "warnings": []})
        elif "/preupload/" in path:
            self.preupload(json.loads(data))
        elif path.endswith("/objects/batch"):
            self.batch(json.loads(data))
        elif path == "/verify":
            if self.begin("verify"):
                self.answer(200, {})
        elif "/commit/" in path:
            self.commit([json.loads(line) for line in data.splitlines()])
        else:
            self.answer(404, {})

    def preupload(self, asked: dict[str, Any]) -> None:
        if self.begin("preupload"):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["size"] >= LARGE else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in asked["files"]
            ]
            self.answer(200, {"files": modes})

    def batch(self, asked: dict[str, Any]) -> None:
        if not self.begin("batch"):
            return
        objects = []
        for one in asked["objects"]:
            if one["oid"] in self.hub.blobs:  # no action: it is here already
                objects.append(one)
                continue
            upload = {"href": f"{self.hub.url}/lfs/{one['oid']}"}
            verify = {"href": f"{self.hub.url}/verify"}
            objects.append({**one, "actions": {"upload": upload, "verify": verify}})
        self.answer(200, {"transfer": "basic", "objects": objects})

    def commit(self, lines: list[dict[str, Any]]) -> None:
        if not self.begin("commit"):
            return
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.hub.summary = value["summary"]
            elif line["key"] == "file":
                self.hub.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.files[value["path"]] = self.hub.blobs[value["oid"]]
        repo = self.path.split("/models/")[1].split("/commit/")[0]
        url = f"{self.hub.url}/{repo}/commit/{COMMIT}"
        self.answer(200, {"commitUrl": url, "commitOid": COMMIT})

    def begin(self, step: str) -> bool:
        """Note the call, and misbehave if this step is to; True if it is to be answered."""
        self.hub.steps.append(step)
        if token := self.headers.get("authorization"):
            self.hub.tokens.add(token)
        fault = self.hub.fail.get(step)
        if fault is None:
            return True
        if isinstance(fault, int):
            self.answer(fault, {"error": f"no {step} for you"})
        else:
            self.close_connection = True
            self.connection.close()
        return False

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(
        self, status: int, value: dict[str, Any], headers: dict[str, str] | None = None
    ) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        sent = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        for name, text in {**sent, **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def standing_in() -> Iterator[StandIn]:
    """Serve a stand-in on a free port of the loopback interface while the block runs."""
    hub = StandIn()
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
