"""Parts of the Hugging Face hub that answer on this machine."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
import threading
from collections.abc import Iterator
from typing import Any


class Answers(http.server.BaseHTTPRequestHandler):
    """What answers of the hub have in common; ``do_GET`` chooses them."""

    def do_HEAD(self) -> None:
        self.do_GET()  # type: ignore[attr-defined]

    def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        etag = hashlib.sha1(self.path.encode() + body).hexdigest()
        for name, value in (headers | {"ETag": f'"{etag}"', "Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Be quiet."""


@contextlib.contextmanager
def hub(answers: type[Answers]) -> Iterator[str]:
    """Its address, for as long as the block lasts."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
