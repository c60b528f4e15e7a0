"""A Hugging Face Hub on loopback: the few answers that one file's look-up and download need.

Source: huggingface_hub 2.4, file_download.get_hf_file_metadata (headers) and utils/_http.py (error codes).
"""

from __future__ import annotations

import hashlib
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40


@dataclass
class StoredFile:
    """content is what the server sends; true_content, if given, what it states the hash of."""

    content: bytes
    true_content: bytes | None = None
    in_git: bool = False  # small files have git's hash as ETag, large ones their SHA-256

    @property
    def etag(self) -> str:
        data = self.content if self.true_content is None else self.true_content
        if self.in_git:
            return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        return hashlib.sha256(data).hexdigest()


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    authorization: str | None


@dataclass
class HubServer:
    """repos: {"owner/name": {"path": StoredFile}}. The other fields switch misbehaviour on."""

    repos: dict[str, dict[str, StoredFile]]
    gated: set[str] = field(default_factory=set)
    forbidden: set[str] = field(default_factory=set)
    cuts: list[int] = field(default_factory=list)  # the next downloads end after so many bytes each
    ignores_range: bool = False
    failing: int = 0  # answer so many downloads with 503 first
    silent: bool = False  # accept connections and never answer
    storage: str = ""  # redirect downloads to this address (a storage host), as the real Hub does
    requests: list[Request] = field(default_factory=list)
    url: str = ""

    @property
    def downloads(self) -> list[Request]:
        return [request for request in self.requests if request.method == "GET"]


@contextmanager
def serve(hub: HubServer) -> Iterator[HubServer]:
    """Run the server on a free loopback port; hub.url is its address inside the with block."""
    released = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            wanted = self.headers.get("Range")
            hub.requests.append(Request(self.command, self.path, wanted, self.headers.get("Authorization")))
            if hub.silent:
                released.wait(60)
                return
            address = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
            if address is None or address[1] not in hub.repos:
                return self.refuse(404, "RepoNotFound")
            if address[1] in hub.gated:
                return self.refuse(401, "GatedRepo")
            if address[1] in hub.forbidden:
                return self.refuse(403, "")
            if address[2] not in ("main", COMMIT):
                return self.refuse(404, "RevisionNotFound")
            if address[3] not in hub.repos[address[1]]:
                return self.refuse(404, "EntryNotFound")
            stored = hub.repos[address[1]][address[3]]
            if self.command == "GET" and hub.failing:
                hub.failing -= 1
                return self.refuse(503, "")
            if hub.storage:
                return self.redirect(stored)
            return self.send(stored, wanted)

        def refuse(self, status: int, code: str) -> None:
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def redirect(self, stored: StoredFile) -> None:
            self.send_response(302)
            self.send_header("Location", hub.storage + self.path)
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("X-Linked-Etag", f'"{stored.etag}"')
            self.send_header("X-Linked-Size", str(len(stored.content)))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send(self, stored: StoredFile, wanted: str | None) -> None:
            data, start = stored.content, 0
            if wanted and not hub.ignores_range:
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(data) - start))
            self.send_header("ETag", f'"{stored.etag}"')
            self.send_header("X-Repo-Commit", COMMIT)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            if self.command == "HEAD":
                return
            if hub.cuts:
                self.wfile.write(data[start : start + hub.cuts.pop(0)])
                self.wfile.flush()
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.wfile.write(data[start:])

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        released.set()
        server.shutdown()
        server.server_close()
        thread.join()
