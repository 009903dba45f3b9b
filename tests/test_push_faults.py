"""Every request of a push and of a download, with every fault: each ends well after a retry, or with one clear line.

After each fault a reader sees the old state or the complete new one, and the same command without the fault succeeds:
it sends no large file again that had arrived, and uses the cache that the failure left.
"""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fake_hub import FakeHub
from fake_hub_faults import Fault
from fake_hub_repo import Repo
from worker import Done, Worker

from upcycle import provenance

NOTE = "Written by a person."
EVER = None


class Kind(NamedTuple):
    """A kind of request of a push: its pattern (ID stands for the repository), and how to come to it."""

    pattern: str
    options: tuple[str, ...] = ()
    new: bool = False
    """To a repository that does not exist."""
    retried: bool = False
    """Whether `huggingface_hub` asks again by itself."""


PUSH = {
    "whoami": Kind("GET /api/whoami-v2"),
    "model info": Kind("GET /api/models/ID$"),
    "branch info": Kind("GET /api/models/ID/revision/v2$", ("--branch", "v2")),
    "auth-check": Kind("GET /api/models/ID/auth-check/write"),
    "HEAD card": Kind("HEAD /ID/resolve/.*/README.md"),
    "GET card": Kind("GET /ID/resolve/.*/README.md"),
    "HEAD upcycle.json": Kind("HEAD /ID/resolve/.*/upcycle.json"),
    "GET upcycle.json": Kind("GET /ID/resolve/.*/upcycle.json"),
    "create": Kind("POST /api/repos/create", new=True),
    "branch": Kind("POST /api/models/ID/branch/v2", ("--branch", "v2")),
    "validate-yaml": Kind("POST /api/validate-yaml"),
    "preupload": Kind("POST /api/models/ID/preupload/", retried=True),
    "preupload, new": Kind("POST /api/models/ID/preupload/", new=True, retried=True),
    "lfs batch": Kind("POST /ID.git/info/lfs/objects/batch", retried=True),
    "lfs file": Kind(r"PUT /lfs/ID/\w+$", new=True, retried=True),
    "lfs part": Kind(r"PUT /lfs/ID/\w+/2$", retried=True),
    "lfs complete": Kind(r"POST /lfs/ID/\w+/complete", retried=True),
    "lfs verify": Kind("POST /ID.git/info/lfs/objects/verify", retried=True),
    "commit": Kind("POST /api/models/ID/commit/main"),
    "commit, new": Kind("POST /api/models/ID/commit/main", new=True),
    "commit to branch": Kind("POST /api/models/ID/commit/v2", ("--branch", "v2")),
    "commit for PR": Kind("POST /api/models/ID/commit/main", ("--create-pr",)),
}
# Fields of a `Fault`. Times: once, and for ever, which is more often than anybody retries.
FAULTS = {
    "401": {"status": 401, "times": EVER},
    "403": {"status": 403, "times": EVER},
    "429 once": {"status": 429, "headers": {"Retry-After": "0"}},
    "429": {"status": 429, "times": EVER},
    "500 once": {"status": 500},
    "500": {"status": 500, "times": EVER},
    "503 once": {"status": 503},
    "503": {"status": 503, "times": EVER},
    "cut once": {"cut": 1},
    "cut": {"cut": 1, "times": EVER},
    "reset once": {"cut": 1, "reset": True},
    "lost once": {"lose": True},
    "lost": {"lose": True, "times": EVER},
}
# Tried in every run of the suite; the others are for `-m slow`.
QUICK = {"503"}
# What a push does without: it looks whether the commit was made.
WELL_ANYWAY = {(kind, "lost") for kind in ("commit", "commit, new", "commit to branch")}
PUSHES = [
    (kind, fault)
    for kind in PUSH
    for fault in FAULTS
    if not (kind.startswith("HEAD") and ("cut" in fault or "reset" in fault))  # no body that could be cut
]

DOWNLOAD = {
    "model info": r"GET /api/models/ID(/revision/main)?$",
    "tree": "GET /api/models/ID/tree/",
    "HEAD config": "HEAD /ID/resolve/.*/transformer/config.json",
    "GET config": "GET /ID/resolve/.*/transformer/config.json",
    "HEAD weights": "HEAD /ID/resolve/.*/transformer/.*safetensors",
    "GET weights": "GET /ID/resolve/.*/transformer/.*safetensors",
    "GET vae weights": "GET /ID/resolve/.*/vae/.*safetensors",
    "info: headers": "GET /ID/resolve/.*/transformer/.*safetensors",
}
DOWNLOADS = [
    (kind, fault)
    for kind in DOWNLOAD
    for fault in FAULTS
    if not (kind.startswith("HEAD") and ("cut" in fault or "reset" in fault))
]


def cases(pairs: list[tuple[str, str]]) -> list[Any]:
    slow = pytest.mark.slow
    return [pytest.param(*pair, id="-".join(pair), marks=[] if pair[1] in QUICK else slow) for pair in pairs]


def test_the_number_of_faults_that_the_docs_state():
    assert (len(PUSHES), len(DOWNLOADS)) == (280, 98)


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with FakeHub() as server:
        server.part_size = 2**17
        yield server


@pytest.fixture(scope="module")
def worker(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    """Whether an export loads is not looked at here."""
    with Worker(hub, tmp_path_factory.mktemp("home")) as process:
        process.do(
            """
from pathlib import Path
from upcycle.hub import check
check._load = lambda *_: None
real, seen = check.check_export, {}
def once(folder, **options):
    if folder not in seen:
        seen[folder] = real(folder, **options)
    return seen[folder]
check.check_export = once
"""
        )
        yield process


class States(NamedTuple):
    """A repository as it is before each push, and the exports that it holds and that is pushed."""

    repo: Repo
    old: Path
    new: Path


@pytest.fixture(scope="module")
def states(hub: FakeHub, worker: Worker, export_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> States:
    """The repository's card has an edit; its export has a picture, which the new one lacks."""
    folder = tmp_path_factory.mktemp("exports")
    old, new = folder / "old", folder / "new"
    shutil.copytree(export_dir, old)
    (old / "images").mkdir()
    (old / "images/samples.png").write_bytes(b"\x89PNG\0")
    now = provenance.read(old)
    assert now
    provenance.write(old, now["base"], now["history"])
    source = now["base"]["id"]
    assert worker.run("convert", source, "--ratio", 4, "--seed", 1, "--no-verify", "-o", new).code == 0
    assert push(worker, old, "me/old").code == 0
    repo = hub.repos["me/old"]
    files = repo.files()
    files["README.md"] += NOTE.encode() + b"\n"
    head = repo.commit()
    assert head
    repo.revisions = {name: head._replace(files=files, oid="e" * 40) for name in ("main", "v2")}
    repo.history.append(repo.revisions["main"])
    return States(repo, old, new)


def push(worker: Worker, export: Path, repo_id: str, *options: str) -> Done:
    return worker.run("push-to-hub", export, repo_id, "--yes", "--accept-license", *options)


def check_failure(done: Done, named: str) -> None:
    """One clear line that names the repository; the worker looks for tokens in what is printed."""
    assert named in done.error
    assert "fault of upcycle" not in done.err


@pytest.mark.parametrize(("name", "fault"), cases(PUSHES))
def test_push(hub: FakeHub, worker: Worker, states: States, name: str, fault: str) -> None:
    kind = PUSH[name]
    repo_id = f"me/{len(hub.repos)}"
    hub.faults.all.clear()
    if not kind.new:
        hub.repos[repo_id] = replace(
            states.repo,
            revisions=dict(states.repo.revisions),
            history=list(states.repo.history),
            lfs=dict(states.repo.lfs),
        )
    revision = "v2" if "--branch" in kind.options else "refs/pr/1" if "--create-pr" in kind.options else "main"
    if name == "branch":
        del hub.repos[repo_id].revisions["v2"]
    old = states.repo.files()

    def seen() -> dict[str, bytes] | None:
        """What a reader gets; None: nothing, not even an older export."""
        repo = hub.repos.get(repo_id)
        commit = repo and repo.commit(revision)
        files = dict(commit.files) if commit else {}
        return None if files.keys() <= {".gitattributes"} else files

    def complete(files: dict[str, bytes] | None) -> bool:
        exported = {p.relative_to(states.new).as_posix(): p.read_bytes() for p in states.new.rglob("*") if p.is_file()}
        files = files or {}
        card = files.get("README.md", b"").decode()
        assert kind.new or not card or NOTE in card, "a person's words are lost"
        whole = exported.items() <= files.items() and files.keys() - exported.keys() == {".gitattributes", "README.md"}
        return whole and "--seed 1" in card

    before = None if kind.new or revision.startswith("refs/") or name == "branch" else old
    ordered = hub.faults.add(Fault(kind.pattern.replace("ID", repo_id), **FAULTS[fault]))
    done = push(worker, states.new, repo_id, *kind.options)
    assert ordered.hits >= 1, hub.requests[-20:]
    if done.code == 0:
        assert complete(seen())
    else:
        check_failure(done, {"whoami": "your token" if fault == "401" else "your account"}.get(name, repo_id))
        unsure = "it is not known whether" in done.error
        assert seen() in (before, old if name == "branch" else before) or (unsure and complete(seen()))
        assert "nothing was committed" not in done.error or not complete(seen())
    transient = fault.endswith("once")
    if kind.retried and transient:
        assert done.code == 0
    if name.startswith("commit") and fault == "lost once" and "PR" not in name:
        assert done.code == 0, "what was committed is seen, though the answer was lost"
    if not transient and done.code == 0:
        assert (name, fault) in WELL_ANYWAY

    hub.faults.all.clear()
    repo = hub.repos.get(repo_id)
    arrived = set(repo.lfs) if repo else set()
    sent = hub.lfs_received(f"{repo_id}/")
    again = push(worker, states.new, repo_id, *kind.options)
    assert again.code == 0, again.err
    assert complete(seen())
    repo = hub.repos[repo_id]
    missing = sum(len(content) for oid, content in repo.lfs.items() if oid not in arrived)
    assert hub.lfs_received(f"{repo_id}/") == sent + missing, "a large file that had arrived was sent again"
    first = 1 if kind.new else len(states.repo.history)
    if "PR" not in name:
        assert len(repo.history) == first + 1, "one commit, whatever happened"


@pytest.mark.parametrize(("name", "fault"), cases(DOWNLOADS))
def test_download(hub: FakeHub, worker: Worker, states: States, name: str, fault: str, tmp_path: Path) -> None:
    repo_id = f"lab/{len(hub.repos)}"
    hub.faults.all.clear()
    hub.add(repo_id, states.new)
    command = ["info", repo_id, "--json"] if name.startswith("info") else ["convert", repo_id, "--dry-run", "--json"]
    ordered = hub.faults.add(Fault(DOWNLOAD[name].replace("ID", repo_id), **FAULTS[fault]))
    done = worker.run(*command)
    assert ordered.hits >= 1, hub.requests[-20:]
    if done.code:
        check_failure(done, repo_id)
    else:
        assert fault.endswith("once"), "what is never answered cannot succeed"
        assert done.json
    hub.faults.all.clear()
    before = len(hub.requests)
    again = worker.run(*command)
    assert again.code == 0, again.err
    assert again.json == done.json if done.code == 0 else again.json
    # What came whole the first time is not fetched again.
    new = [line for line in hub.requests[before:] if line.startswith(f"GET /{repo_id}/resolve/")]
    assert len(new) == len(set(new))
    if not name.startswith("info"):
        hub.requests.clear()
        assert worker.run(*command).json == again.json
        assert not any("/resolve/" in line for line in hub.requests)
