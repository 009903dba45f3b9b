"""A small local server that speaks the download side of the Hub's protocol.

`HF_ENDPOINT` is read when `huggingface_hub` is imported, so code that talks to this server runs in a process of its
own, with the environment of `FakeHub.env()`.
"""

import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

# Variables that would let the tests reach the real Hub, or change what is tested.
_HF_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")


@dataclass
class Repo:
    """A repository: revisions (branch or tag → folder), and who may read it."""

    revisions: dict[str, Path]
    gated: bool = False
    private: bool = False
    missing: set[str] = field(default_factory=set)
    """Files that are listed but not served."""
    fail_with: int | None = None
    """The status with which every request fails."""

    def commit(self, revision: str) -> tuple[str, Path] | None:
        """Commit and folder of a branch, tag or commit; None if there is none."""
        for name, folder in self.revisions.items():
            commit = hashlib.sha1(f"{name}{folder}".encode()).hexdigest()
            if revision in (name, commit):
                return commit, folder
        return None


class FakeHub:
    """A Hub on localhost; use it as a context manager.

    `token` is the one access token that opens gated and private repositories; `requests` lists what was asked, as
    "METHOD path".
    """

    token = "hf_secretsecretsecret"

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(
        self, repo_id: str, folder: Path, *, revision: str = "main", gated: bool = False, private: bool = False
    ) -> Repo:
        """Serve the files of `folder` as `repo_id`; call again with another `revision` to add one."""
        repo = self.repos.setdefault(repo_id, Repo({}, gated, private))
        repo.revisions[revision] = Path(folder)
        return repo

    def env(self, home: Path, **extra: str) -> dict[str, str]:
        """The environment of a process that uses this Hub, with the cache under `home` and nobody logged in."""
        clean = {name: value for name, value in os.environ.items() if name not in _HF_VARIABLES}
        return clean | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            **extra,
        }

    def downloads(self) -> list[str]:
        """Files whose content was sent, by their paths in the repository, in the order of the requests."""
        return [line.split("/", 5)[5] for line in self.requests if re.match(r"GET /[^/]+/[^/]+/resolve/", line)]

    def __enter__(self) -> "FakeHub":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop; later connections are refused, as without a network."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Keep the test output clean."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub: FakeHub = self.server.hub  # type: ignore[attr-defined]
        path = unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if api:
            return self._describe(hub, api[1], api[2], api[3] or "main")
        if file:
            return self._file(hub, file[1], file[2], file[3])
        return self._error(404, None, "no such page")

    def _find(self, hub: FakeHub, repo_id: str, revision: str, content: bool) -> tuple[Repo, str, Path] | None:
        """The repository's commit and folder; answers the request with an error and returns None if there is none."""
        repo = hub.repos.get(repo_id)
        known = self.headers.get("Authorization") == f"Bearer {hub.token}"
        if repo is None or (repo.private and not known):
            # The real Hub does not say whether a private repository exists.
            self._error(401, "RepoNotFound", "Repository not found")
            return None
        if repo.fail_with is not None:
            self._error(repo.fail_with, None, "out of order")
            return None
        if repo.gated and content and not known:
            self._error(401, "GatedRepo", f"Access to model {repo_id} is restricted.")
            return None
        found = repo.commit(revision)
        if found is None:
            self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return None
        return repo, *found

    def _describe(self, hub: FakeHub, repo_id: str, what: str | None, revision: str) -> None:
        found = self._find(hub, repo_id, revision, content=False)
        if found is None:
            return
        repo, commit, folder = found
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in paths] + sorted(repo.missing)
        if what == "tree":
            sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
            entries = [{"type": "file", "path": name, "size": sizes.get(name, 1), "oid": "0" * 40} for name in names]
            return self._json(entries)
        return self._json(
            {
                "id": repo_id,
                "modelId": repo_id,
                "sha": commit,
                "private": repo.private,
                "gated": "auto" if repo.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": [{"rfilename": name} for name in names],
            }
        )

    def _file(self, hub: FakeHub, repo_id: str, revision: str, name: str) -> None:
        found = self._find(hub, repo_id, revision, content=True)
        if found is None:
            return
        _, commit, folder = found
        path = folder / name
        if ".." in Path(name).parts or not path.is_file():
            return self._error(404, "EntryNotFound", f"Entry not found: {name}", {"X-Repo-Commit": commit})
        content = path.read_bytes()
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": commit,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        status = 200
        if asked:
            start = int(asked[1])
            stop = min(int(asked[2]) + 1, len(content)) if asked[2] else len(content)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            content, status = content[start:stop], 206
        self._send(status, content, headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str | None, message: str, more: dict[str, str] | None = None) -> None:
        headers = {"X-Error-Message": message, **(more or {})}
        if code:
            headers["X-Error-Code"] = code
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
