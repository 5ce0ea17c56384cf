"""A stand-in for the Hugging Face hub on the loopback device, for ``snapshot_download`` and ``datasets``.

It speaks what ``huggingface_hub`` asks for: repository and revision information, the file tree, ``HEAD`` and ``GET`` of
files with ranges, the hub's error codes. It can refuse (gated), and cut a connection in the middle of a file. The library
reads its settings when it is imported, so the client runs in its own process, with its own cache: ``Hub.run``.
"""

import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

_API = re.compile(r"/api/(models|datasets)/([\w.-]+/[\w.-]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.*))?)?")
_FILE = re.compile(r"/(datasets/)?([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)")


@dataclass
class Repository:
    """Commits of one repository, oldest first; branch ``main`` is the last."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> str | None:
        commit = list(self.commits)[-1] if revision == "main" else self.tags.get(revision, revision)
        return commit if commit in self.commits else None


class Hub:
    """The server; used as a context manager."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.gated: set[str] = set()
        self.cuts: dict[str, list[int]] = {}
        """Per file name: after how many bytes the next answers are cut."""
        self.failing: set[str] = set()
        """Files that are answered with an error (418, which no client tries again)."""
        self.resets: set[str] = set()
        """Files in the middle of which the connection is reset, which no client takes for an end."""
        self.requests: list[str] = []
        """``METHOD path range`` of every request."""
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.server.shutdown()
        self.server.server_close()

    def publish(self, name: str, folder: Path, kind: str = "models", tag: str | None = None) -> str:
        """Adds the files of ``folder`` as a new commit of ``owner/name``; returns the commit."""
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        repository = self.repositories.setdefault((kind, name), Repository())
        digest = hashlib.sha1(repr((name, len(repository.commits), sorted(files))).encode())
        commit = digest.hexdigest()
        repository.commits[commit] = files
        if tag is not None:
            repository.tags[tag] = commit
        return commit

    def run(self, code: str, home: Path, online: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """Runs Python code as a client of this hub, with its cache under ``home``."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        settings = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_OFFLINE": str(int(not online))}
        settings |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-c", code],
            env=inherited | settings | {"NO_PROXY": "127.0.0.1"} | environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Keeps the test's output clean."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def _answer(self, body: bytes = b"") -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        api, file = _API.fullmatch(path), _FILE.fullmatch(path)
        if api is not None:
            kind, name, what, revision, inside = api.groups()
            self._repository(kind, name, revision or "main", what or "revision", inside or "", body)
        elif file is not None:
            dataset, name, revision, inside = file.groups()
            self._repository("datasets" if dataset else "models", name, revision, "file", inside, body)
        else:
            self._send(404, b"")

    def _repository(self, kind: str, name: str, revision: str, what: str, path: str, body: bytes) -> None:
        repository = self.hub.repositories.get((kind, name))
        if repository is None:
            return self._send(404 if self.headers.get("Authorization") else 401, b"", {"X-Error-Code": "RepoNotFound"})
        commit = repository.resolve(revision)
        if commit is None:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        files = repository.commits[commit]
        if what == "file":
            return self._file(name, commit, files, path)
        if what == "paths-info":
            wanted = parse_qs(body.decode()).get("paths", [])
            return self._json([_entry(path, files[path]) for path in wanted if path in files])
        if what == "tree":
            entries = _tree(files, f"{path}/" if path else "", "recursive=true" in self.path.lower())
            return self._json(entries) if entries else self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        siblings = [{"rfilename": path} for path in files]
        return self._json({"id": name, "sha": commit, "siblings": siblings, "private": False, "tags": []})

    def _file(self, name: str, commit: str, files: dict[str, bytes], path: str) -> None:
        if name in self.hub.gated:
            code = 403 if self.headers.get("Authorization") else 401
            return self._send(code, b"", {"X-Error-Code": "GatedRepo"})
        if path not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        if path in self.hub.failing and self.command == "GET":
            return self._send(418, b"")
        data = files[path]
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted is None:
            return self._send(200, data, headers, path)
        first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return self._send(206, data[first : last + 1], headers, path)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, code: int, body: bytes, headers: dict[str, str] | None = None, path: str = "") -> None:
        self.send_response(code)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts = self.hub.cuts.get(path)
        if cuts:
            body = body[: cuts.pop(0)]
            self.close_connection = True
        if path in self.hub.resets:
            self.wfile.write(body[:1])
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
            return
        self.wfile.write(body)


def _tree(files: dict[str, bytes], prefix: str, recursive: bool) -> list[dict[str, Any]]:
    """What lies under ``prefix``: all files, or the files and folders directly in it."""
    inside = {path: data for path, data in files.items() if path.startswith(prefix)}
    flat = {path: data for path, data in inside.items() if recursive or "/" not in path[len(prefix) :]}
    folders = sorted({prefix + path[len(prefix) :].split("/")[0] for path in inside.keys() - flat.keys()})
    return [{"type": "directory", "path": path, "oid": _etag(path.encode()), "size": 0} for path in folders] + [
        _entry(path, data) for path, data in flat.items()
    ]


def _entry(path: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(data), "oid": _etag(data)}


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
