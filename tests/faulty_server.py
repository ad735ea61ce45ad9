"""An http server for tests that misbehaves as it is told to."""

import contextlib
import http.server
import socketserver
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple


class Request(NamedTuple):
    path: str
    start: int
    """First byte that was asked for."""
    number: int
    """How many requests there have been for this path, from 1."""
    login: str | None = None
    """What it says of who asks."""


class Answer(NamedTuple):
    """How to answer; by default as a good server does."""

    status: int | None = None
    drop_after: int | None = None
    """Close the connection after so many bytes of the body."""
    stall_after: int | None = None
    """Send nothing more after so many bytes, and keep the connection."""
    ranges: bool = True
    headers: dict[str, str] = {}  # noqa: RUF012


class FaultyServer:
    """Serves a folder; `behave` decides on each request."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.behave: Callable[[Request], Answer] = lambda request: Answer()
        self.requests: list[Request] = []
        self.over = threading.Event()
        self.reason: str | None = None
        """What it says beside a status; by default what is usual."""
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer.answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # clients that go away are what is tested

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, handler: http.server.BaseHTTPRequestHandler) -> None:
        wanted = handler.headers.get("Range", "bytes=0-")
        start = int(wanted.removeprefix("bytes=").split("-")[0])
        before = sum(request.path == handler.path for request in self.requests)
        request = Request(handler.path, start, before + 1, handler.headers.get("Authorization"))
        self.requests.append(request)
        answer = self.behave(request)
        file = self.folder / handler.path.partition("?")[0].lstrip("/")
        status = answer.status or (200 if file.is_file() else 404)
        body, part = b"", ""
        if status == 200:
            body = file.read_bytes()
            if start and answer.ranges:
                status, part = 206, f"bytes {start}-{len(body) - 1}/{len(body)}"
                body = body[start:]
        handler.send_response(status, self.reason)
        handler.send_header("Content-Length", str(len(body)))
        if part:
            handler.send_header("Content-Range", part)
        for name, value in answer.headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        if answer.stall_after is not None:
            handler.wfile.write(body[: answer.stall_after])
            handler.wfile.flush()
            self.over.wait(60)
            handler.close_connection = True
        elif answer.drop_after is not None and answer.drop_after < len(body):
            handler.wfile.write(body[: answer.drop_after])
            handler.close_connection = True
        else:
            handler.wfile.write(body)


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[FaultyServer]:
    """Serve a folder on this machine until the end of the block."""
    faulty = FaultyServer(folder)
    thread = threading.Thread(target=faulty.server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield faulty
    finally:
        faulty.over.set()
        faulty.server.shutdown()
        faulty.server.server_close()
        thread.join()
