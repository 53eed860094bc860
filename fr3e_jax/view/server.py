"""Serves a page and its parts to browsers on this machine; the runs are read again whenever it is opened."""

import http.server
import threading
from collections.abc import Callable
from http import HTTPStatus
from urllib.parse import urlsplit

from fr3e_jax.config import ConfigError
from fr3e_jax.view.document import SERVED, make_document, parts_script
from fr3e_jax.view.parts import RUNS_PART, PageParts
from fr3e_jax.view.rollouts import DamagedRolloutsError

LOOPBACK = "127.0.0.1"
PARTS_PATH = "parts"


class PageServer(http.server.ThreadingHTTPServer):
    """Listens on this machine alone.

    Args:
      port: to listen at; 0 for a free one.
      read: reads the runs as they are now.
      title: of the page.

    Raises:
      ConfigError: the port is taken.
    """

    daemon_threads = True

    def __init__(self, port: int, read: Callable[[], PageParts], title: str) -> None:
        try:
            super().__init__((LOOPBACK, port), PageRequest)
        except OSError as error:
            raise ConfigError(f"port {port} cannot be listened at ({error}); choose another --port") from None
        self.read, self.title = read, title
        self.reading = threading.Lock()  # one request at a time reads: pyarrow's tables are large
        self.parts = read()

    @property
    def address(self) -> str:
        """Where browsers find the page."""
        return f"http://{LOOPBACK}:{self.server_port}/"

    def page(self) -> bytes:
        """Make the page of the runs as they are now."""
        with self.reading:
            self.parts = self.read()
            runs = [(RUNS_PART, self.parts.pack_runs())]
            return "".join(make_document(self.title, SERVED, PARTS_PATH, runs)).encode()

    def script_of(self, name: str) -> bytes | None:
        """Make the script that hands over a part; None where there is no such part."""
        with self.reading:
            try:
                script = self.parts.script(name)
            except DamagedRolloutsError:  # thinned, or being damaged, since the page was opened
                return None
        return parts_script(script).encode() if script else None


class PageRequest(http.server.BaseHTTPRequestHandler):
    """Answers GET for the page and its parts."""

    server: PageServer

    def do_GET(self) -> None:
        """Answer with the page, a part, or 404."""
        # A page of another site, whose name leads here, is not to read what models wrote.
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in (LOOPBACK, "localhost"):
            self.answer(HTTPStatus.FORBIDDEN, b"this server answers to 127.0.0.1 and localhost", "text/plain")
            return
        path = urlsplit(self.path).path
        if path == "/":
            self.answer(HTTPStatus.OK, self.server.page(), "text/html; charset=utf-8")
            return
        name = path.removeprefix(f"/{PARTS_PATH}/").removesuffix(".js")
        body = self.server.script_of(name)
        if body is None:
            self.answer(HTTPStatus.NOT_FOUND, b"there is no such part", "text/plain")
        else:
            self.answer(HTTPStatus.OK, body, "text/javascript; charset=utf-8")

    def answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        """Send a whole answer."""
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing of requests."""
