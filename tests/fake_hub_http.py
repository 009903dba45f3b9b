"""The fake Hub's protocol: which request does what to `FakeHub.repos`, and what it answers."""

import base64
import hashlib
import json
import re
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, parse_qsl, quote, unquote, urlsplit

from fake_hub_card import check_card
from fake_hub_faults import Fault
from fake_hub_repo import Commit, Entry, Refused, Repo, is_large, sha256

if TYPE_CHECKING:
    from fake_hub import FakeHub, Token

NO_TOKEN = "Invalid username or password."
WRONG_TOKEN = "Invalid credentials in Authorization header"


@dataclass
class Exchange:
    """A request and what became of it."""

    line: str
    """"METHOD path"."""
    query: dict[str, str]
    range: str | None
    received: int = 0
    """Bytes of the request's body that were read."""
    status: int | None = None
    """None: not answered."""
    sent: int = 0
    """Bytes of the answer's body."""


@dataclass
class Upload:
    """A large file on its way."""

    repo_id: str
    oid: str
    size: int
    parts: dict[int, bytes] = field(default_factory=dict)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: "FakeHub") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.hub = hub

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that hang up."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body of an answer are written apart
    server: Server

    def log_message(self, *_: object) -> None:
        """Keep the test output clean."""

    def _answer(self) -> None:
        self.hub = self.server.hub
        url = urlsplit(self.path)
        line = f"{self.command} {unquote(url.path)}"
        self.exchange = Exchange(line, dict(parse_qsl(url.query)), self.headers.get("Range"))
        self.hub.requests.append(line)
        self.hub.log.append(self.exchange)
        self.fault = self.hub.faults.meet(line) or Fault("")
        time.sleep(self.fault.seconds)
        uploads = self.command in ("POST", "PUT")
        body = self._body(self.fault.cut if uploads else None)
        if body is None or (uploads and self.fault.cut is not None):
            return self._hang_up()
        self.body = body
        try:
            if self.fault.status is not None:
                raise Refused(self.fault.status, None, self.fault.message, self.fault.headers)
            self._dispatch(url.path)
        except Refused as refused:
            headers = {"X-Error-Message": refused.message, **refused.headers}
            if refused.code:
                headers["X-Error-Code"] = refused.code
            self._json({"error": refused.message}, refused.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    def _body(self, limit: int | None) -> bytes | None:
        """The request's body; None if the client hung up, or once `limit` bytes of it are read."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self._read(int(self.headers.get("Content-Length", 0)), limit)
        body = b""
        while size := int(self.rfile.readline().strip() or b"-1", 16):
            piece = self._read(size, limit) if size > 0 else None
            if piece is None:
                return None
            body += piece
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _read(self, size: int, limit: int | None) -> bytes | None:
        body = bytearray()
        while len(body) < size:
            wanted = min(size - len(body), 65536)
            if limit is not None:
                wanted = min(wanted, limit - self.exchange.received)
            piece = self.rfile.read(wanted)
            if not piece:
                return None
            self.exchange.received += len(piece)
            body += piece
        return bytes(body)

    def _hang_up(self) -> None:
        self.close_connection = True
        if self.fault.reset:
            # Without lingering, closing is a reset. The reader holds the socket open too.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.rfile.close()
            self.connection.close()

    def _dispatch(self, path: str) -> None:
        # Matched while quoted, so that a revision like refs%2Fpr%2F1 is one part.
        method = "GET" if self.command == "HEAD" else self.command
        for route_method, pattern, handle in _ROUTES:
            if route_method == method and (match := re.fullmatch(pattern, path)):
                return handle(self, *(group and unquote(group) for group in match.groups()))
        raise Refused(404, None, "no such page")

    # Who asks, and what for

    def _token(self) -> "Token | None":
        given = self.headers.get("Authorization")
        if given is None:
            return None
        token = self.hub.tokens.get(given.removeprefix("Bearer "))
        if token is None:
            raise Refused(401, None, WRONG_TOKEN)
        return token

    def _known(self) -> "Token":
        token = self._token()
        if token is None:
            raise Refused(401, None, NO_TOKEN)
        return token

    def _readable(self, repo_id: str, content: bool = False) -> Repo:
        """The repository, if who asks may see it, and with `content`, read its files."""
        token = self._token()
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and token is None):
            # The real Hub does not tell strangers whether a private repository exists.
            raise Refused(401 if token is None else 404, "RepoNotFound", "Repository not found")
        if repo.fail_with is not None:
            raise Refused(repo.fail_with, None, "out of order")
        if repo.gated and content and token is None:
            raise Refused(401, "GatedRepo", f"Access to model {repo_id} is restricted.")
        return repo

    def _writable(self, repo_id: str, pull_request: bool = False) -> Repo:
        """The repository, if who asks may commit to it or open a pull request."""
        token = self._known()
        repo = self._readable(repo_id)
        if token.role == "read":
            raise Refused(403, None, "Forbidden: your token has no write access")
        if not pull_request and not self.hub.may_write(token, repo_id.split("/")[0]):
            raise Refused(403, None, "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    def _asked(self) -> dict:
        try:
            return json.loads(self.body or b"{}")
        except ValueError:
            raise Refused(400, None, "the body is not JSON") from None

    # Reading

    def _whoami(self) -> None:
        token = self._known()
        access: dict[str, object] = {"displayName": "a token", "role": token.role, "createdAt": "2025-01-01T00:00:00Z"}
        if token.role == "fineGrained":
            allowed = ["repo.content.read", "repo.write"]
            scoped = [{"entity": {"name": name}, "permissions": allowed} for name in sorted(token.namespaces)]
            access["fineGrained"] = {"canReadGatedRepos": True, "global": [], "scoped": scoped}
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in self.hub.orgs.items()]
        auth = {"type": "access_token", "accessToken": access}
        self._json({"type": "user", "name": self.hub.user, "fullname": "Me", "orgs": orgs, "auth": auth})

    def _auth_check(self, repo_id: str, write: str | None) -> None:
        self._readable(repo_id, content=True)
        if write:
            self._writable(repo_id)
        self._json({})

    def _describe(self, repo_id: str, revision: str | None) -> None:
        repo = self._readable(repo_id)
        commit = repo.find(revision or "main")
        siblings: list[dict] = [{"rfilename": name} for name in commit.files]
        if "blobs" in self.exchange.query:
            for sibling, entry in zip(siblings, map(commit.entry, commit.files), strict=True):
                lfs = entry.lfs and {**entry.lfs, "sha256": entry.lfs["oid"]}
                sibling.update(size=entry.size, blobId=entry.oid, **({"lfs": lfs} if lfs else {}))
        self._json(
            {
                "id": repo_id,
                "modelId": repo_id,
                "sha": commit.oid,
                "private": repo.private,
                "gated": "auto" if repo.gated else False,
                "disabled": False,
                "downloads": 0,
                "likes": 0,
                "tags": [],
                "siblings": siblings + [{"rfilename": name} for name in sorted(repo.missing)],
            }
        )

    def _entries(self, repo: Repo, commit: Commit) -> list[dict]:
        """All files, and the folders they lie in."""
        entries = [commit.entry(name) for name in commit.files]
        entries += [Entry(name, 1, "0" * 40, None) for name in sorted(repo.missing)]
        files = [
            {"type": "file", "path": entry.name, "size": entry.size, "oid": entry.oid}
            | ({"lfs": entry.lfs} if entry.lfs else {})
            for entry in entries
        ]
        folders = {entry.name[: at.start()] for entry in entries for at in re.finditer("/", entry.name)}
        oids = {name: hashlib.sha1(name.encode()).hexdigest() for name in folders}
        return files + [{"type": "directory", "path": name, "size": 0, "oid": oids[name]} for name in sorted(folders)]

    def _tree(self, repo_id: str, revision: str, folder: str | None) -> None:
        repo = self._readable(repo_id)
        inside = f"{folder.strip('/')}/" if folder else ""
        found = [e for e in self._entries(repo, repo.find(revision)) if e["path"].startswith(inside)]
        if inside and not found:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        if self.exchange.query.get("recursive", "").lower() not in ("true", "1"):
            found = [entry for entry in found if "/" not in entry["path"][len(inside) :]]
        self._json(found)

    def _paths_info(self, repo_id: str, revision: str) -> None:
        repo = self._readable(repo_id)
        paths = parse_qs(self.body.decode()).get("paths", [])
        self._json([entry for entry in self._entries(repo, repo.find(revision)) if entry["path"] in paths])

    def _commits(self, repo_id: str, revision: str) -> None:
        repo = self._readable(repo_id)
        found, commit = [], repo.commit(repo.find(revision).oid)
        while commit is not None:
            said = {"id": commit.oid, "title": commit.title, "message": commit.description, "date": commit.date}
            found.append({**said, "authors": [{"user": commit.author}]})
            commit = repo.commit(commit.parent) if commit.parent else None
        self._json(found)

    def _refs(self, repo_id: str) -> None:
        refs: dict[str, list] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        for name, commit in self._readable(repo_id).revisions.items():
            pull_request = name.startswith("refs/pr/")
            ref = name if pull_request else f"refs/heads/{name}"
            short = name.removeprefix("refs/pr/")
            entry = {"name": short, "ref": ref, "targetCommit": commit.oid}
            refs["pullRequests" if pull_request else "branches"].append(entry)
        self._json(refs)

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        repo = self._readable(repo_id, content=True)
        commit = repo.find(revision)
        try:
            content = commit.files[name]
        except KeyError:
            raise Refused(404, "EntryNotFound", f"Entry not found: {name}", {"X-Repo-Commit": commit.oid}) from None
        entry = commit.entry(name)
        headers = {
            "ETag": f'"{entry.etag}"',
            "X-Repo-Commit": commit.oid,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if entry.lfs:
            # The real Hub sends the client on to a store of its own; these stand on that answer.
            headers |= {"X-Linked-ETag": f'"{entry.etag}"', "X-Linked-Size": str(entry.size)}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        status = 200
        if asked:
            start = int(asked[1])
            stop = min(int(asked[2]) + 1, len(content)) if asked[2] else len(content)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            content, status = content[start:stop], 206
        self._send(status, content, headers)

    # Writing

    def _create(self) -> None:
        token, asked = self._known(), self._asked()
        namespace = asked.get("organization") or self.hub.user
        repo_id = f"{namespace}/{asked['name']}"
        if asked.get("type", "model") != "model":
            raise Refused(400, None, "this Hub has models only")
        if not self.hub.may_write(token, namespace):
            raise Refused(403, None, f'You don\'t have the rights to create a model under the namespace "{namespace}"')
        said = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        with self.hub.lock:
            if repo_id in self.hub.repos:
                message = "You already created this model repo"
                return self._json({"error": message, **said}, 409, {"X-Error-Message": message})
            private = asked.get("private") or asked.get("visibility") == "private"
            repo = Repo(private=bool(private))
            repo.start(self.hub.user)
            self.hub.repos[repo_id] = repo
        self._json(said)

    def _delete(self) -> None:
        asked = self._asked()
        repo_id = f"{asked.get('organization') or self.hub.user}/{asked['name']}"
        self._writable(repo_id)
        del self.hub.repos[repo_id]
        self._json({})

    def _branch(self, repo_id: str, name: str) -> None:
        repo, asked = self._writable(repo_id), self._asked()
        if name.startswith("refs/"):
            raise Refused(400, None, f"Invalid reference for a branch: {name}")
        with self.hub.lock:
            if name in repo.revisions:
                raise Refused(409, None, f"Reference already exists: {name}")
            repo.revisions[name] = repo.find(asked.get("startingPoint") or "main")
        self._json({})

    def _validate_yaml(self) -> None:
        errors, warnings = check_card(self._asked()["content"])
        said = {"errors": errors, "warnings": warnings}
        self._json({key: [{"message": m} for m in messages] for key, messages in said.items()}, 400 if errors else 200)

    def _preupload(self, repo_id: str, revision: str) -> None:
        """How each file shall be sent, and which file of that name there is already."""
        commit = self._writable(repo_id, self._for_pull_request()).find(revision)
        attributes = commit.files.get(".gitattributes", b"")
        said = []
        for file in self._asked()["files"]:
            name = file["path"]
            large = is_large(name, file["size"], base64.b64decode(file.get("sample", "")), attributes)
            there = commit.entry(name).etag if name in commit.files else None
            mode = "lfs" if large else "regular"
            said.append({"path": name, "uploadMode": mode, "shouldIgnore": False, **({"oid": there} if there else {})})
        self._json({"files": said})

    def _for_pull_request(self) -> bool:
        return self.exchange.query.get("create_pr") == "1"

    def _lfs_batch(self, repo_id: str) -> None:
        """Where to send each large file that is not stored yet."""
        asked = self._asked()
        # Without a branch, the files are for a pull request.
        repo = self._writable(repo_id, pull_request="ref" not in asked)
        objects, parts = [], False
        for wanted in asked["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            said = {"oid": oid, "size": size}
            objects.append(said)
            if repo.large(oid) is not None:
                continue
            with self.hub.lock:
                number = str(len(self.hub.uploads) + 1)
                self.hub.uploads[number] = Upload(repo_id, oid, size)
            where = f"{self.hub.url}/lfs/{repo_id}/{oid}"
            upload: dict = {"href": f"{where}?upload={number}"}
            if size > self.hub.part_size and "multipart" in asked.get("transfers", []):
                count = -(-size // self.hub.part_size)
                urls = {str(i): f"{where}/{i}?upload={number}" for i in range(1, count + 1)}
                upload = {"href": f"{where}/complete?upload={number}"}
                upload["header"] = {"chunk_size": str(self.hub.part_size), **urls}
                parts = True
            verify = {"href": f"{self.hub.url}/{quote(repo_id)}.git/info/lfs/objects/verify"}
            said["actions"] = {"upload": upload, "verify": verify}
        self._json({"transfer": "multipart" if parts else "basic", "objects": objects})

    def _upload(self, repo_id: str, oid: str) -> Upload:
        # The address is the permission: clients send no token along.
        upload = self.hub.uploads.get(self.exchange.query.get("upload", ""))
        if upload is None or (upload.repo_id, upload.oid) != (repo_id, oid) or repo_id not in self.hub.repos:
            raise Refused(404, None, "no such upload")
        return upload

    def _store(self, upload: Upload, content: bytes) -> None:
        if len(content) != upload.size or sha256(content) != upload.oid:
            raise Refused(400, None, "the content is not what was announced")
        self.hub.repos[upload.repo_id].lfs[upload.oid] = content

    def _lfs_put(self, repo_id: str, oid: str, part: str | None) -> None:
        upload = self._upload(repo_id, oid)
        if part:
            upload.parts[int(part)] = self.body
        else:
            self._store(upload, self.body)
        self._send(200, b"", {"ETag": f'"{hashlib.md5(self.body).hexdigest()}"'})

    def _lfs_complete(self, repo_id: str, oid: str) -> None:
        upload = self._upload(repo_id, oid)
        for part in self._asked()["parts"]:
            content = upload.parts.get(part["partNumber"], b"")
            if part["etag"].strip('"') != hashlib.md5(content).hexdigest():
                raise Refused(400, None, f"part {part['partNumber']} has not arrived")
        self._store(upload, b"".join(upload.parts[number] for number in sorted(upload.parts)))
        self._json({})

    def _lfs_verify(self, repo_id: str) -> None:
        asked = self._asked()
        stored = self._writable(repo_id, pull_request=True).large(asked["oid"])
        if stored is None or len(stored) != asked["size"]:
            raise Refused(404, None, "the object has not arrived")
        self._json({})

    def _commit(self, repo_id: str, revision: str) -> None:
        pull_request = self._for_pull_request()
        repo = self._writable(repo_id, pull_request)
        try:
            lines = [json.loads(line) for line in self.body.split(b"\n") if line.strip()]
        except ValueError:
            raise Refused(400, None, "the body is not lines of JSON") from None
        with self.hub.lock:
            name, made = repo.push(lines, revision, self.hub.user, pull_request)
        page = f"{self.hub.url}/{repo_id}"
        said: dict = {
            "success": True,
            "commitOid": made.oid,
            "commitUrl": f"{page}/commit/{made.oid}",
            "hookOutput": "",
        }
        if pull_request:
            number = int(name.rsplit("/", 1)[1])
            said |= {"pullRequestUrl": f"{page}/discussions/{number}", "pullRequestNum": number}
            said["pullRequestRevision"] = name
        self._json(said)

    # Answering

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        if self.fault.lose:
            return self._hang_up()
        self.exchange.status = status
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.fault.cut
        self.exchange.sent = len(content[:cut])
        self.wfile.write(content[:cut])
        if cut is not None:
            self._hang_up()


_ID = "([^/]+/[^/]+)"
_MODEL = f"/api/models/{_ID}"
_ROUTES: list[tuple[str, str, Callable]] = [
    ("GET", "/api/whoami-v2", _Handler._whoami),
    ("GET", f"{_MODEL}(?:/revision/([^/]+))?", _Handler._describe),
    ("GET", f"{_MODEL}/auth-check(/write)?", _Handler._auth_check),
    ("GET", f"{_MODEL}/tree/([^/]+)(?:/(.+))?", _Handler._tree),
    ("POST", f"{_MODEL}/paths-info/([^/]+)", _Handler._paths_info),
    ("GET", f"{_MODEL}/commits/([^/]+)", _Handler._commits),
    ("GET", f"{_MODEL}/refs", _Handler._refs),
    ("GET", f"/{_ID}/resolve/([^/]+)/(.+)", _Handler._resolve),
    ("POST", "/api/repos/create", _Handler._create),
    ("DELETE", "/api/repos/delete", _Handler._delete),
    ("POST", f"{_MODEL}/branch/([^/]+)", _Handler._branch),
    ("POST", "/api/validate-yaml", _Handler._validate_yaml),
    ("POST", f"{_MODEL}/preupload/([^/]+)", _Handler._preupload),
    ("POST", f"/{_ID}\\.git/info/lfs/objects/batch", _Handler._lfs_batch),
    ("POST", f"/{_ID}\\.git/info/lfs/objects/verify", _Handler._lfs_verify),
    ("PUT", f"/lfs/{_ID}/([0-9a-f]{{64}})(?:/(\\d+))?", _Handler._lfs_put),
    ("POST", f"/lfs/{_ID}/([0-9a-f]{{64}})/complete", _Handler._lfs_complete),
    ("POST", f"{_MODEL}/commit/([^/]+)", _Handler._commit),
]
