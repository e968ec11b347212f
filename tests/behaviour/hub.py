# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the Hugging Face Hub: repositories in memory, over HTTP on this machine.

It knows the requests that huggingface_hub makes to create a repository, commit small files, list
them and download them, and nothing of users, branches or large files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0" * 40
Repositories = dict[str, dict[str, bytes]]


class _Handler(BaseHTTPRequestHandler):
    repositories: Repositories

    def log_message(self, *_args) -> None:
        pass

    def _answer(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, data, status: int = 200, **headers: str) -> None:
        body = json.dumps(data).encode()
        self._answer(body, status, Content_Type="application/json", **headers)

    def _missing(self, what: str) -> None:
        self._json({"error": what}, 404, X_Error_Code=what)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = unquote(self.path.partition("?")[0])
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, [asked.get("organization") or "someone", asked["name"]]))
            self.repositories.setdefault(name, {})
            self._json({"url": f"http://{self.headers['Host']}/{name}", "id": name, "name": name})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+)/preupload/.+", path):
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            self._json({"files": modes})
        elif match := re.fullmatch(r"/api/models/(.+)/commit/.+", path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.repositories[match[1]][line["value"]["path"]] = content
            url = f"http://{self.headers['Host']}/{match[1]}/commit/{COMMIT}"
            self._json({"commitUrl": url, "commitOid": COMMIT, "hookOutput": ""})
        else:
            self._missing(f"POST {path}")

    def do_GET(self) -> None:
        path = unquote(self.path.partition("?")[0])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/.+)?", path):
            if match[1] not in self.repositories:
                return self._missing("RepoNotFound")
            files = [{"rfilename": name} for name in self.repositories[match[1]]]
            return self._json({"id": match[1], "sha": COMMIT, "siblings": files})
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        if match is None or match[1] not in self.repositories:
            return self._missing("RepoNotFound")
        content = self.repositories[match[1]].get(match[2])
        if content is None:
            return self._missing("EntryNotFound")
        tag = hashlib.sha256(content).hexdigest()
        return self._answer(content, ETag=f'"{tag}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@contextmanager
def local_hub() -> Iterator[tuple[str, Repositories]]:
    """Serve an empty hub; yield its address (for HF_ENDPOINT) and what it holds."""
    repositories: Repositories = {}
    handler = type("Handler", (_Handler,), {"repositories": repositories})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", repositories
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
