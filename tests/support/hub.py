"""A hub on this machine: as much of one as uploading and downloading small files takes."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Requests)
        self.files: dict[str, bytes] = {}
        self.downloaded: list[str] = []
        self.branches: list[str] = []
        self.commits: list[dict[str, str]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def environment(self, home: Path) -> dict[str, str]:
        """A process's that asks this hub, and keeps what it fetches in `home`."""
        return os.environ | {
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_XET": "1",
        }

    @property
    def commit(self) -> str:
        content = b"".join(name.encode() + self.files[name] for name in sorted(self.files))
        return hashlib.sha1(content).hexdigest()


class _Requests(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _send(self, content: bytes | Any, code: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = urlsplit(self.path).path
        if "/branch/" in path:
            self.server.branches.append(path.rpartition("/branch/")[2])
            self._send({})
        elif path.endswith("/repos/create"):
            self._send({"url": f"{self.server.url}/someone/adapter"})
        elif "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self._send({"files": files})
        elif "/commit/" in path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "header":
                    self.server.commits.append({**entry["value"], "path": self.path})
                if entry["key"] == "file":
                    value = entry["value"]
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
            url = f"{self.server.url}/someone/adapter/commit/{self.server.commit}"
            done = {"commitUrl": url, "commitOid": self.server.commit, "hookOutput": ""}
            self._send(
                {**done, "pullRequestUrl": f"{self.server.url}/someone/adapter/discussions/1"}
            )
        else:
            self._send({"errors": [], "warnings": []})

    def do_GET(self) -> None:
        path, hub = unquote(urlsplit(self.path).path), self.server
        if "/revision/" in path or path == "/api/models/someone/adapter":
            siblings = [{"rfilename": name} for name in hub.files]
            self._send({"id": "someone/adapter", "sha": hub.commit, "siblings": siblings})
        elif "/tree/" in path:
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": _blob_id(content)}
                for name, content in hub.files.items()
            ]
            self._send(tree)
        elif "/resolve/" in path and path.split("/resolve/")[1].split("/", 1)[1] in hub.files:
            name = path.split("/resolve/")[1].split("/", 1)[1]
            if self.command == "GET":
                hub.downloaded.append(name)
            content = hub.files[name]
            self._send(content, X_Repo_Commit=hub.commit, ETag=f'"{_blob_id(content)}"')
        else:
            self._send(b"", 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET  # noqa: N815


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
