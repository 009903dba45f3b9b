"""A small local server that speaks the Hub's protocol for models, downloads and uploads, and fails on order.

`HF_ENDPOINT` is read when `huggingface_hub` is imported, so code that talks to this server runs in a process of its
own, with the environment of `FakeHub.env()`. Its parts: `fake_hub_repo` (what is stored), `fake_hub_http` (the
protocol), `fake_hub_faults`, `fake_hub_card`. `test_fake_hub` shows what it does with plain `huggingface_hub`.
"""

import hashlib
import os
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

from fake_hub_faults import Fault, Faults
from fake_hub_http import Exchange, Server, Upload
from fake_hub_repo import Commit, FolderFiles, Repo

# Variables that would let the tests reach the real Hub, or change what is tested.
_HF_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE")


@dataclass
class Token:
    """An access token of the one user. Any token opens gated and private repositories."""

    role: str
    """"write", "read" or "fineGrained"."""
    namespaces: set[str] = field(default_factory=set)
    """Where a fine-grained token may write."""


class FakeHub:
    """A Hub on localhost; use it as a context manager.

    Its one user is `user`, a member of `orgs` with those roles. `token` may write, `read_token` may not; add others
    to `tokens`. `requests` lists what was asked, as "METHOD path"; `log` says more of each.
    """

    token = "hf_secretsecretsecret"
    read_token = "hf_readreadread"

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[str] = []
        self.log: list[Exchange] = []
        self.user = "me"
        self.orgs = {"lab": "write", "readers": "read"}
        self.tokens = {self.token: Token("write"), self.read_token: Token("read")}
        self.part_size = 2**20
        """Large files above this size are uploaded in parts of it."""
        self.faults = Faults()
        self.uploads: dict[str, Upload] = {}
        self.lock = threading.RLock()
        self._server = Server(self)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def add(
        self, repo_id: str, folder: Path, *, revision: str = "main", gated: bool = False, private: bool = False
    ) -> Repo:
        """Serve the files of `folder` as `repo_id`; call again with another `revision` to add one."""
        repo = self.repos.setdefault(repo_id, Repo({}, gated, private))
        oid = hashlib.sha1(f"{revision}{folder}".encode()).hexdigest()
        repo.revisions[revision] = Commit(oid, FolderFiles(Path(folder)))
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
        found = (re.match(r"GET /[^/]+/[^/]+/resolve/(?:refs/pr/\d+|[^/]+)/(.+)", line) for line in self.requests)
        return [match[1] for match in found if match]

    def lfs_received(self, repo_id: str = "") -> int:
        """Bytes of large files that clients have sent so far, also in vain."""
        return sum(exchange.received for exchange in self.log if exchange.line.startswith(f"PUT /lfs/{repo_id}"))

    def may_write(self, token: Token, namespace: str) -> bool:
        if token.role == "fineGrained":
            return namespace in token.namespaces
        return token.role == "write" and (namespace == self.user or self.orgs.get(namespace) in ("write", "admin"))

    # Faults. `pattern` is searched in "METHOD path". A request meets the first fault that is for it; that one lets
    # `skip` requests pass, then hits `times` (None: all). Each comes back with its count of `hits`.

    def fail(
        self,
        pattern: str,
        status: int = 503,
        *,
        times: int | None = 1,
        skip: int = 0,
        headers: dict[str, str] | None = None,
        message: str = "out of order",
    ) -> Fault:
        """Answer with an error instead of doing what is asked."""
        return self.faults.add(Fault(pattern, times, skip, status=status, headers=headers or {}, message=message))

    def cut(
        self, pattern: str, after_bytes: int = 0, *, times: int | None = 1, skip: int = 0, reset: bool = False
    ) -> Fault:
        """Close the connection within the body of an upload, which then is not done, or of a download.

        With `reset`, by a TCP reset: `huggingface_hub` resumes a download that ends early, not one that is reset.
        """
        return self.faults.add(Fault(pattern, times, skip, cut=after_bytes, reset=reset))

    def lose(self, pattern: str, *, times: int | None = 1, skip: int = 0) -> Fault:
        """Do what is asked, then close the connection instead of answering."""
        return self.faults.add(Fault(pattern, times, skip, lose=True))

    def slow(self, pattern: str, seconds: float, *, times: int | None = 1, skip: int = 0) -> Fault:
        """Wait before anything of the request's body is read."""
        return self.faults.add(Fault(pattern, times, skip, seconds=seconds))

    def __enter__(self) -> "FakeHub":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop; later connections are refused, as without a network."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
