"""Repositories of the fake Hub: commits that never change, and large files kept beside them by their SHA-256.

Nothing here knows of HTTP, except that a `Refused` names the status and the error code of the answer.
"""

import base64
import fnmatch
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from fake_hub_card import check_card

# What the Hub puts into a new model repository, as far as this project's files go.
LFS_PATTERNS = (
    *("*.7z", "*.arrow", "*.bin", "*.bz2", "*.ckpt", "*.gz", "*.h5", "*.msgpack", "*.npy", "*.npz", "*.onnx"),
    *("*.parquet", "*.pickle", "*.pkl", "*.pt", "*.pth", "*.safetensors", "*.tar", "*.tgz", "*.zip", "*.zst"),
)
GIT_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS).encode()
REGULAR_LIMIT = 10 * 2**20


class Refused(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.headers = status, code, message, headers or {}


def git_oid(content: bytes) -> str:
    """The name that git gives to a file of this content."""
    return hashlib.sha1(b"blob %d\0%b" % (len(content), content)).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def is_large(name: str, size: int, sample: bytes, attributes: bytes) -> bool:
    """Whether the Hub wants this file as LFS: by .gitattributes, by size, or because it is binary."""
    lines = [line.split() for line in attributes.decode().splitlines()]
    patterns = [line[0] for line in lines if "filter=lfs" in line]
    named = any(fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(Path(name).name, pattern) for pattern in patterns)
    return size > 0 and (named or size > REGULAR_LIMIT or b"\0" in sample)


class FolderFiles(Mapping[str, bytes]):
    """The files of a folder as they are when asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, name: str) -> bytes:
        path = self.folder / name
        if ".." in Path(name).parts or not path.is_file():
            raise KeyError(name)
        return path.read_bytes()

    def __iter__(self) -> Iterator[str]:
        return iter(
            sorted(path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file())
        )

    def __len__(self) -> int:
        return len(list(iter(self)))


class Entry(NamedTuple):
    """A file as the Hub describes it."""

    name: str
    size: int
    oid: str
    """What git calls it; for a large file, the pointer to it."""
    lfs: dict[str, object] | None
    """SHA-256, size and size of the pointer of a large file."""

    @property
    def etag(self) -> str:
        return str(self.lfs["oid"]) if self.lfs else self.oid


class Commit(NamedTuple):
    """A state of the files. Only that of a served folder (`FakeHub.add`) follows what happens to the folder."""

    oid: str
    files: Mapping[str, bytes]
    lfs: frozenset[str] | None = None
    """Names of the large files; None: by the rules."""
    parent: str | None = None
    title: str = "initial commit"
    description: str = ""
    author: str = "system"
    date: str = "2025-01-01T00:00:00.000Z"

    def is_lfs(self, name: str, content: bytes) -> bool:
        if self.lfs is not None:
            return name in self.lfs
        return is_large(name, len(content), content[:512], GIT_ATTRIBUTES)

    def entry(self, name: str) -> Entry:
        content = self.files[name]
        if not self.is_lfs(name, content):
            return Entry(name, len(content), git_oid(content), None)
        oid = sha256(content)
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{oid}\nsize {len(content)}\n".encode()
        lfs = {"oid": oid, "size": len(content), "pointerSize": len(pointer)}
        return Entry(name, len(content), git_oid(pointer), lfs)


@dataclass
class Repo:
    """A repository: revisions (branch, tag or refs/pr/N → commit), and who may read it."""

    revisions: dict[str, Commit] = field(default_factory=dict)
    gated: bool = False
    private: bool = False
    missing: set[str] = field(default_factory=set)
    """Files that are listed but not served."""
    fail_with: int | None = None
    """The status with which every request fails."""
    history: list[Commit] = field(default_factory=list)
    """What was committed to any branch, oldest first."""
    lfs: dict[str, bytes] = field(default_factory=dict)
    """Large files that arrived whole, by SHA-256; those of a push that failed stay, as on the real Hub."""

    def commit(self, revision: str = "main") -> Commit | None:
        """The commit of a branch, tag or commit; None if there is none."""
        if revision in self.revisions:
            return self.revisions[revision]
        for commit in (*self.revisions.values(), *self.history):
            if commit.oid == revision:
                return commit
        return None

    def find(self, revision: str) -> Commit:
        found = self.commit(revision)
        if found is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return found

    def files(self, revision: str = "main") -> dict[str, bytes]:
        """What a reader of this revision gets."""
        return dict(self.find(revision).files)

    def large(self, oid: str) -> bytes | None:
        """A stored large file, if only in a folder that is served."""
        if oid in self.lfs:
            return self.lfs[oid]
        for commit in self.revisions.values():
            if commit.lfs is None:
                for name, content in commit.files.items():
                    if commit.is_lfs(name, content) and sha256(content) == oid:
                        return content
        return None

    def start(self, author: str) -> None:
        """The commit that the Hub makes in a new repository."""
        first = _commit(None, {".gitattributes": GIT_ATTRIBUTES}, frozenset(), "initial commit", "", author, 0)
        self.revisions["main"] = first
        self.history.append(first)

    def push(self, lines: list[dict], revision: str, author: str, pull_request: bool = False) -> tuple[str, Commit]:
        """Commit what the lines of a commit request say; name of the revision and commit.

        The revision moves at the very end, so no reader sees a part of it.
        """
        if not lines or lines[0].get("key") != "header" or not lines[0]["value"].get("summary"):
            raise Refused(400, None, "the first line must be a header with a summary")
        header = lines[0]["value"]
        base, parent = self.find(revision), header.get("parentCommit")
        if pull_request:
            base = self.find(parent or revision)
            number = 1 + sum(name.startswith("refs/pr/") for name in self.revisions)
            revision = f"refs/pr/{number}"
        elif revision not in self.revisions:
            raise Refused(400, None, f"{revision} is not a branch")
        elif parent not in (None, base.oid):
            raise Refused(412, None, "A commit has happened since. Please refresh and try again.")
        files = dict(base.files)
        large = {name for name, content in files.items() if base.is_lfs(name, content)}
        for line in lines[1:]:
            self._apply(files, large, line.get("key"), line["value"])
        title, description = header["summary"], header.get("description", "")
        made = _commit(base.oid, files, frozenset(large), title, description, author, len(self.history))
        self.history.append(made)
        self.revisions[revision] = made
        return revision, made

    def _apply(self, files: dict[str, bytes], large: set[str], key: str | None, value: dict) -> None:
        name = value["path"]
        parts = PurePosixPath(name).parts
        if not parts or parts[0] == "/" or {"..", ".git"} & set(parts):
            raise Refused(400, None, f"Invalid path: {name}")
        if key == "file":
            content = base64.b64decode(value["content"], validate=True)
            if len(content) > REGULAR_LIMIT:
                raise Refused(413, None, f"{name} is too large for a regular file")
            if name == "README.md" and (errors := check_card(content.decode())[0]):
                raise Refused(400, None, "Invalid metadata in README.md: " + "; ".join(errors))
            files[name] = content
            large.discard(name)
        elif key == "lfsFile":
            stored = self.large(value["oid"])
            if stored is None or value.get("size", len(stored)) != len(stored):
                message = "Your push was rejected because an LFS pointer pointed to a file that does not exist."
                raise Refused(400, None, f"{message} ({name})")
            files[name] = stored
            large.add(name)
        elif key in ("deletedFile", "deletedFolder"):
            inside = name.rstrip("/") + "/"
            gone = [name] if key == "deletedFile" else [other for other in files if other.startswith(inside)]
            if not gone or gone[0] not in files:
                raise Refused(404, "EntryNotFound", f"A file with this name doesn't exist: {name}")
            for other in gone:
                del files[other]
                large.discard(other)
        else:
            raise Refused(400, None, f"unknown operation {key!r}")


def _commit(
    parent: str | None,
    files: dict[str, bytes],
    large: frozenset[str],
    title: str,
    description: str,
    author: str,
    number: int,
) -> Commit:
    # The number tells a commit from one that says the same, as its time would.
    contents = sorted((name, git_oid(content)) for name, content in files.items())
    oid = hashlib.sha1(repr((parent, contents, title, number)).encode()).hexdigest()
    date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    return Commit(oid, files, large, parent, title, description, author, date)
