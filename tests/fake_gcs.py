"""A stand-in for Google Cloud Storage: the calls of its JSON API that gcsfs, google-cloud-storage and
tensorstore make for a run, over HTTP on this machine."""

import base64
import hashlib
import itertools
import json
import re
import sys
import threading
from collections.abc import Callable
from email.parser import BytesParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

google_crc32c = pytest.importorskip("google_crc32c", reason="needs gcsfs")

PAGE = 50  # objects or folders in a page of a listing; small, so that listings have several


class Refused(Exception):
    """An answer that is an error: its status, and what the service says."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class FakeGCS(ThreadingHTTPServer):
    """Buckets in memory.

    buckets: name -> name of an object -> (generation, content). refuse: asked before each call, with its
    method, the path, and the name of the object to write or None; what it returns is the error to answer.
    token: what callers must bring, if it is not None. calls: (method, path) of all.
    """

    daemon_threads = True

    def __init__(self, *buckets: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.buckets: dict[str, dict[str, tuple[int, bytes]]] = {name: {} for name in buckets}
        self.refuse: Callable[[str, str, str | None], Refused | None] = lambda *_: None
        self.token: str | None = None
        self.calls: list[tuple[str, str]] = []
        self.uploads: dict[str, tuple[str, str, dict[str, str], bytearray]] = {}
        self.generations = itertools.count(1)
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop the server, and free its port."""
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """Nothing of callers that hang up: gcsfs asks two things at once where one answer is enough."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(*_)

    @property
    def address(self) -> str:
        """Where it is reached."""
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What tells a process to take it for the service, and to look for no credentials."""
        return {
            "STORAGE_EMULATOR_HOST": self.address,
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
            "NO_GCE_CHECK": "true",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # which asks of the service itself, over gRPC
        }

    def files(self, place: str) -> dict[str, bytes]:
        """The contents of what lies below `gs://BUCKET/PATH`, by the names from there on."""
        bucket, _, prefix = place.removeprefix("gs://").partition("/")
        prefix = f"{prefix}/" if prefix else ""
        with self.lock:
            found = dict(self.buckets[bucket])
        return {name.removeprefix(prefix): x for name, (_, x) in found.items() if name.startswith(prefix)}

    def get(self, bucket: str, name: str) -> tuple[int, bytes]:
        """An object's generation and content."""
        try:
            return self.buckets[bucket][name]
        except KeyError:
            raise Refused(404, f"No such object: {bucket}/{name}") from None

    def put(self, bucket: str, name: str, content: bytes, query: dict[str, str]) -> dict[str, str]:
        """Write an object, if it is of the generation that the query names."""
        with self.lock:
            if bucket not in self.buckets:
                raise Refused(404, "The specified bucket does not exist.")
            self.check_generation(bucket, name, query)
            self.buckets[bucket][name] = next(self.generations), content
            return self.describe(bucket, name)

    def delete(self, bucket: str, name: str, query: dict[str, str]) -> None:
        """Delete an object, if it is of the generation that the query names."""
        with self.lock:
            self.get(bucket, name)
            self.check_generation(bucket, name, query)
            del self.buckets[bucket][name]

    def check_generation(self, bucket: str, name: str, query: dict[str, str]) -> None:
        """Refuse if an object is not of the generation that the query names; 0: it must not be there."""
        held = self.buckets[bucket].get(name, (0, b""))[0]
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != held:
            raise Refused(412, "At least one of the pre-conditions you specified did not hold.")

    def describe(self, bucket: str, name: str) -> dict[str, str]:
        """What the service says of an object."""
        generation, content = self.get(bucket, name)
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{generation}",
            "name": name,
            "bucket": bucket,
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(content)),
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
            "crc32c": base64.b64encode(google_crc32c.value(content).to_bytes(4, "big")).decode(),
            "contentType": "application/octet-stream",
            "timeCreated": "2024-01-01T00:00:00.000Z",
            "updated": "2024-01-01T00:00:00.000Z",
        }

    def listing(self, bucket: str, query: dict[str, str]) -> dict[str, object]:
        """A page of the objects with a prefix, and of the folders where a delimiter ends their names."""
        if bucket not in self.buckets:
            raise Refused(404, "The specified bucket does not exist.")
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        with self.lock:
            names = sorted(name for name in self.buckets[bucket] if name.startswith(prefix))
            names = [x for x in names if query.get("startOffset", "") <= x < query.get("endOffset", "\x7f")]
            entries = []  # of which each is the name of an object or a folder
            for name in names:
                head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else ("", "", "")
                entry = prefix + head + found if found else name
                if not entries or entries[-1] != (entry, bool(found)):
                    entries.append((entry, bool(found)))
            start = int(query.get("pageToken", "0"))
            end = start + min(PAGE, int(query.get("maxResults", PAGE)))
            answer: dict[str, object] = {"kind": "storage#objects"}
            answer["items"] = [self.describe(bucket, x) for x, folder in entries[start:end] if not folder]
            answer["prefixes"] = [x for x, folder in entries[start:end] if folder]
        if end < len(entries):
            answer["nextPageToken"] = str(end)
        return answer


class Handler(BaseHTTPRequestHandler):
    """Reads a call, and answers it from the server's buckets."""

    protocol_version = "HTTP/1.1"
    server: FakeGCS

    def log_message(self, *_: object) -> None:
        """Nothing: pytest shows what fails."""

    def handle_one_call(self) -> None:
        """Answer a call, or with the error that it meets."""
        body = self.read_body()
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        self.server.calls.append((self.command, self.path))
        try:
            given = self.headers.get("Authorization", "").removeprefix("Bearer ")
            if self.server.token is not None and given != self.server.token:
                raise Refused(401, "Anonymous caller does not have storage.objects.get access.")
            self.call(url.path, body)
        except Refused as error:
            self.answer({"error": {"code": error.status, "message": str(error)}}, error.status)

    do_GET = do_POST = do_PUT = do_DELETE = handle_one_call

    def read_body(self) -> bytes:
        """The body, whole or in chunks."""
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def call(self, path: str, body: bytes) -> None:
        """One call of the JSON API."""
        server, query = self.server, self.query
        match = re.fullmatch(r"/(upload/|download/)?storage/v1/b/([^/]+)(?:/o(?:/(.+))?)?", path)
        if not match:
            raise Refused(404, f"Not Found: {path}")
        kind, bucket, name = match[1], unquote(match[2]), match[3] and unquote(match[3])
        if kind == "upload/":
            self.upload(bucket, body)
            return
        writes = self.command != "GET"
        if error := server.refuse(self.command, path, name if writes else None):
            raise error
        if name is None and path.rstrip("/").endswith("/o"):
            self.answer(server.listing(bucket, query))
        elif name is None:
            if bucket not in server.buckets:
                raise Refused(404, "The specified bucket does not exist.")
            self.answer({"kind": "storage#bucket", "id": bucket, "name": bucket, "location": "US"})
        elif self.command == "DELETE":
            server.delete(bucket, name, query)
            self.answer(None, 204)
        elif copied := re.fullmatch(r"(.+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/(.+)", match[3]):
            source, to_bucket, to = map(unquote, copied.groups())
            resource = server.put(to_bucket, to, server.get(bucket, source)[1], query)
            self.answer({"kind": "storage#rewriteResponse", "done": True, "resource": resource})
        elif query.get("alt") == "media":
            self.send_content(*server.get(bucket, name))
        else:
            self.answer(server.describe(bucket, name))

    def upload(self, bucket: str, body: bytes) -> None:
        """Write an object: from the body, from a part of it, or in several calls."""
        server, query = self.server, self.query
        if "upload_id" in query:
            self.continue_upload(query["upload_id"], body)
            return
        content, name = body, query.get("name", "")
        if query["uploadType"] == "multipart":
            parts = BytesParser().parsebytes(
                f"Content-Type: {self.headers['Content-Type']}\n\n".encode() + body
            )
            head = parts.get_payload()[0].get_payload(decode=True)
            name = json.loads(head)["name"]
            # By its boundary and not by the parser, which takes the ends of lines for its own.
            boundary = re.search(rb"boundary=\"?([^\";]+)", self.headers["Content-Type"].encode())[1]
            content = re.split(rb"\r?\n\r?\n", body.split(b"--" + boundary, 2)[2], maxsplit=1)[1]
            content = re.sub(rb"\r?\n--" + re.escape(boundary) + rb"--\s*\Z", b"", content)
        elif query["uploadType"] == "resumable":
            name = name or json.loads(body)["name"]
        if error := server.refuse(self.command, self.path, name):
            raise error
        if query["uploadType"] == "resumable":
            number = str(next(server.generations))
            server.uploads[number] = bucket, name, query, bytearray()
            place = f"{server.address}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={number}"
            self.answer(None, headers={"Location": place})
            return
        self.answer(server.put(bucket, name, content, query))

    def continue_upload(self, number: str, body: bytes) -> None:
        """Add a part to an upload; the last one, whose range names the whole size, writes the object."""
        bucket, name, query, content = self.server.uploads[number]
        if self.command == "DELETE":
            del self.server.uploads[number]
            self.answer(None, 499)
            return
        if error := self.server.refuse(self.command, self.path, name):
            raise error
        content += body
        total = self.headers["Content-Range"].rpartition("/")[2]
        if total == "*" or int(total) != len(content):
            self.answer(None, 308, {"Range": f"bytes=0-{len(content) - 1}"})
            return
        self.answer(self.server.put(bucket, name, bytes(content), query))

    def send_content(self, generation: int, content: bytes) -> None:
        """An object's content, or the range of it that is asked for."""
        headers = {"X-Goog-Generation": str(generation), "ETag": f'"{generation}"'}
        crc = base64.b64encode(google_crc32c.value(content).to_bytes(4, "big")).decode()
        headers["X-Goog-Hash"] = f"crc32c={crc}"
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not asked:
            self.send(content, 200, headers)
            return
        first, last = asked.groups()
        start = int(first) if first else max(0, len(content) - int(last))
        end = min(int(last) + 1, len(content)) if first and last else len(content)
        if start >= len(content):
            raise Refused(416, "The requested range cannot be satisfied.")
        headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
        self.send(content[start:end], 206, headers)

    def answer(self, said: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        """Answer with JSON, or with nothing."""
        content = b"" if said is None else json.dumps(said).encode()
        self.send(content, status, {"Content-Type": "application/json", **(headers or {})})

    def send(self, content: bytes, status: int, headers: dict[str, str]) -> None:
        """Answer with bytes."""
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
