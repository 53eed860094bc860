"""A stand-in for the Hugging Face hub's server on this machine."""

import contextlib
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

FIRST, SECOND = "a" * 40, "b" * 40  # commits
REVISIONS = {"main": FIRST, "v2": SECOND, FIRST: FIRST, SECOND: SECOND}
ASKED = re.compile(
    r"(?:/api/models|/api/(datasets)|/(datasets))?/([\w-]+/[\w-]+)/(revision|tree|resolve)/(\w+)/?(.*)"
)


class Hub(BaseHTTPRequestHandler):
    """What huggingface_hub asks a server for: a revision, the list of its files, the files."""

    def do_GET(self):
        asked = ASKED.fullmatch(unquote(urlsplit(self.path).path))
        api, plain, repository, kind, revision, file = asked.groups() if asked else [""] * 6
        if api or plain:
            repository = f"datasets/{repository}"
        if repository not in self.server.files:
            return self.answer(404, error="RepoNotFound")
        if repository.endswith("/expired"):
            return self.answer(401, message="Invalid credentials in Authorization header")
        if revision not in REVISIONS:
            return self.answer(404, error="RevisionNotFound")
        commit = REVISIONS[revision]
        files = self.server.files[repository](commit)
        if kind == "revision":
            siblings = [{"rfilename": file} for file in files]
            return self.answer(200, json.dumps({"id": repository, "sha": commit, "siblings": siblings}))
        if kind == "tree":
            entries = [
                {"type": "file", "path": file, "size": len(content), "oid": etag(content)}
                for file, content in files.items()
            ]
            return self.answer(200, json.dumps(entries))
        # The real hub, too, lists a gated repository for everyone.
        if repository.endswith("/gated"):
            return self.answer(403, error="GatedRepo")
        self.server.fetched.add(file)
        return self.answer(200, files[file], commit=commit)

    do_HEAD = do_GET

    def answer(self, status, body="", commit=None, error=None, message=None):
        """Send `body` (unless only its headers are asked for) with the hub's headers."""
        body = body.encode() if isinstance(body, str) else body
        headers = {"X-Repo-Commit": commit, "X-Error-Code": error, "X-Error-Message": message}
        headers |= {"ETag": f'"{etag(body)}"', "Content-Length": len(body)}
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *arguments):
        """Nothing on the terminal."""


def etag(content):
    return hashlib.sha1(content).hexdigest()


@contextlib.contextmanager
def serving(files, fetched):
    """A server's address.

    files: repository (data sets: `datasets/Org/Name`) -> commit -> name of a file -> its bytes. fetched: the
    names of files that were asked for are added to it.
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.fetched = files, fetched
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def answers_of(code, arguments, home, endpoint, **settings):
    """What `code`, given `arguments` as JSON, prints as JSON in a process that has its hub's cache in `home`.

    huggingface_hub reads its environment when it is imported: every environment is a process.
    """
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TRANSFORMERS_"))}
    hub = {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, env=ours | hub | settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
