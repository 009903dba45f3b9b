"""The fake Hub, seen by plain `huggingface_hub`: what other tests may rely on, and what the client does on its own."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from fake_hub import FakeHub, Token

# What the tests of ours rely on is seen there; this is for changes of the fake, or of huggingface_hub.
pytestmark = pytest.mark.slow

ID = "me/dit"

# Runs before each piece of client code, which leaves what it found in `out`.
PRELUDE = """
import json, os, sys, time
time.sleep = lambda seconds: None  # between attempts; even "Retry-After: 0" means a second
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, hf_hub_download
from huggingface_hub import snapshot_download
api, out = HfApi(), {}
ID, FOLDER = "me/dit", sys.argv[1]
def attempt(name, function, *args, **kwargs):
    try:
        function(*args, **kwargs)
        out[name] = "done"
    except Exception as error:
        response = getattr(error, "response", None)
        out[name] = [type(error).__name__, getattr(response, "status_code", None), str(error)]
"""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as server:
        server.part_size = 2**16
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Regular files, large ones in one piece and in parts, a picture, and an empty file of a large file's name."""
    files = {
        "README.md": b"---\nlicense: cc-by-nc-4.0\nbase_model: facebook/DiT-XL-2-256\n---\n# A model\n",
        "model_index.json": b'{"_class_name": "DiTPipeline"}',
        "transformer/config.json": b"{}",
        "transformer/model.safetensors": os.urandom(150_000),
        "vae/model.safetensors": os.urandom(5_000),
        "images/sample.png": b"\x89PNG\0" + os.urandom(500),
        "empty.bin": b"",
    }
    for name, content in files.items():
        path = tmp_path / "model" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "model"


def read(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def size_of(folder: Path, *names: str) -> int:
    return sum((folder / name).stat().st_size for name in names)


def client(hub: FakeHub, folder: Path, code: str, token: str | None = FakeHub.token, home: str = "home") -> dict:
    """What `code` leaves in `out`, run with this token and the cache in `home`."""
    env = hub.env(folder.parent / home, HF_HUB_DISABLE_PROGRESS_BARS="1", **({"HF_TOKEN": token} if token else {}))
    script = f"{PRELUDE}\n{code}\nprint(json.dumps(out))"
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


PUSH = """
api.create_repo(ID, exist_ok=True)
out["pushed"] = api.upload_folder(repo_id=ID, folder_path=FOLDER).oid
"""

# The same, if it fails too, and what a reader sees then.
TRY = """
api.create_repo(ID, exist_ok=True)
attempt("push", api.upload_folder, repo_id=ID, folder_path=FOLDER)
out["seen"] = sorted(api.list_repo_files(ID))
"""


def test_what_is_pushed_is_what_is_fetched(hub: FakeHub, folder: Path) -> None:
    out = client(
        hub,
        folder,
        """
url = api.create_repo(ID, private=True)
out["url"] = [url, url.repo_id]
attempt("again", api.create_repo, ID)
api.create_repo(ID, exist_ok=True)
info = api.upload_folder(repo_id=ID, folder_path=FOLDER, commit_message="First", commit_description="Why")
out["oid"], out["page"] = info.oid, info.commit_url
out["there"] = snapshot_download(ID)
said = api.model_info(ID, files_metadata=True)
out["siblings"] = {s.rfilename: [s.size, s.blob_id, s.lfs and s.lfs.sha256] for s in said.siblings}
out["private"], out["sha"] = said.private, said.sha
out["top"] = sorted(entry.path for entry in api.list_repo_tree(ID))
out["info"] = [entry.lfs.sha256 for entry in api.get_paths_info(ID, ["vae/model.safetensors"])]
out["log"] = [[commit.title, commit.message, commit.authors] for commit in api.list_repo_commits(ID)]
out["exists"] = [api.file_exists(ID, name) for name in ("README.md", "none")] + [api.repo_exists("me/none")]
""",
    )
    local, repo = read(folder), hub.repos[ID]
    assert out["url"] == [f"{hub.url}/{ID}", ID]
    assert out["again"][:2] == ["HfHubHTTPError", 409]
    assert out["oid"] == out["sha"] == repo.commit("main")[0]
    assert out["page"] == f"{hub.url}/{ID}/commit/{out['oid']}"
    assert out["private"]
    assert read(Path(out["there"])) == repo.files() == {**local, ".gitattributes": repo.files()[".gitattributes"]}
    large = {"transformer/model.safetensors", "vae/model.safetensors", "images/sample.png"}
    assert repo.commit().lfs == large
    assert set(repo.lfs.values()) == {local[name] for name in large}
    assert hub.lfs_received(ID) == size_of(folder, *large)
    assert sum("PUT /lfs/me/dit" in line for line in hub.requests) == 3 + 2
    for name, content in local.items():
        size, oid, sha = out["siblings"][name]
        etag = (Path(out["there"]) / name).resolve().name
        assert size == len(content)
        assert sha == (hashlib.sha256(content).hexdigest() if name in large else None)
        assert etag == (sha or oid)
    git = subprocess.run(["git", "hash-object", folder / "README.md"], capture_output=True, text=True)
    assert out["siblings"]["README.md"][1] == git.stdout.strip()
    assert out["top"] == [
        ".gitattributes",
        "README.md",
        "empty.bin",
        "images",
        "model_index.json",
        "transformer",
        "vae",
    ]
    assert out["info"] == [hashlib.sha256(local["vae/model.safetensors"]).hexdigest()]
    assert out["log"] == [["First", "Why", ["me"]], ["initial commit", "", ["me"]]]
    assert out["exists"] == [True, False, False]


def test_a_second_push_sends_only_what_changed(hub: FakeHub, folder: Path) -> None:
    first = client(hub, folder, PUSH)["pushed"]
    before, sent = hub.repos[ID].files(), hub.lfs_received()
    hub.requests.clear()
    assert client(hub, folder, PUSH)["pushed"] == first
    assert hub.lfs_received() == sent
    assert len(hub.repos[ID].history) == 2
    assert not any("/commit/" in line for line in hub.requests)

    (folder / "vae/model.safetensors").write_bytes(b"other weights")
    (folder / "images/sample.png").rename(folder / "images/renamed.png")
    code = f"""
out["pushed"] = api.upload_folder(repo_id=ID, folder_path=FOLDER, delete_patterns="*").oid
out["old"] = snapshot_download(ID, revision={first!r})
"""
    out = client(hub, folder, code)
    repo = hub.repos[ID]
    assert hub.lfs_received() == sent + len(b"other weights"), "a file of another name is not sent again"
    assert repo.files().keys() == read(folder).keys() | {".gitattributes"}
    assert repo.files()["vae/model.safetensors"] == b"other weights"
    assert repo.files(first) == read(Path(out["old"])) == before
    assert repo.commit().parent == first


def test_branches_and_pull_requests(hub: FakeHub, folder: Path) -> None:
    hub.add("someone/dit", folder)
    out = client(
        hub,
        folder,
        """
api.create_repo(ID)
api.create_branch(ID, branch="v2")
attempt("again", api.create_branch, ID, branch="v2")
attempt("nowhere", api.upload_folder, repo_id=ID, folder_path=FOLDER, revision="v3")
api.upload_folder(repo_id=ID, folder_path=FOLDER, revision="v2")
mine = api.upload_folder(repo_id=ID, folder_path=FOLDER, create_pr=True)
out["mine"] = [mine.pr_url, mine.pr_revision, mine.pr_num]
api.upload_file(repo_id=ID, path_or_fileobj=b"more", path_in_repo="more.txt", revision="refs/pr/1")
out["fetched"] = open(hf_hub_download(ID, "more.txt", revision="refs/pr/1")).read()
refs = api.list_repo_refs(ID, include_pull_requests=True)
out["branches"] = {ref.name: ref.target_commit for ref in refs.branches}
out["pulls"] = {ref.ref: ref.target_commit for ref in refs.pull_requests}
# Who may not write may still propose.
theirs = dict(repo_id="someone/dit", path_or_fileobj=os.urandom(9), path_in_repo="x.safetensors")
attempt("theirs", api.upload_file, **theirs)
out["proposed"] = api.upload_file(**theirs, create_pr=True).pr_url
""",
    )
    repo = hub.repos[ID]
    assert out["again"][1] == 409
    assert out["nowhere"][0] == "RevisionNotFoundError"
    assert out["mine"] == [f"{hub.url}/{ID}/discussions/1", "refs/pr/1", 1]
    assert out["branches"] == {name: repo.commit(name).oid for name in ("main", "v2")}
    assert out["pulls"] == {"refs/pr/1": repo.commit("refs/pr/1").oid}
    assert list(repo.files()) == [".gitattributes"]
    assert read(folder).items() <= repo.files("v2").items()
    assert repo.files("refs/pr/1") == {**repo.files("v2"), "more.txt": b"more"}
    assert out["fetched"] == "more"
    assert hub.downloads()[-1] == "more.txt"
    assert out["theirs"][1] == 403
    assert "create_pr=1" in out["theirs"][2]
    assert out["proposed"] == f"{hub.url}/someone/dit/discussions/1"
    assert hub.repos["someone/dit"].files() == read(folder)
    assert "x.safetensors" in hub.repos["someone/dit"].files("refs/pr/1")


ASK = """
attempt("whoami", lambda: out.update(me=api.whoami()))
attempt("own", api.create_repo, "me/new")
attempt("org", api.create_repo, "lab/new")
attempt("readers", api.create_repo, "readers/new")
attempt("stranger", api.create_repo, "stranger/new")
attempt("there", api.create_repo, "someone/dit", exist_ok=True)
attempt("see", api.model_info, "me/private")
attempt("read", api.auth_check, "me/private")
attempt("gated", api.auth_check, "someone/gated")
attempt("write", api.auth_check, "me/private", write=True)
attempt("write theirs", api.auth_check, "someone/dit", write=True)
attempt("branch", api.create_branch, "me/private", branch=f"b{os.getpid()}")
attempt("push", api.upload_file, repo_id="me/private", path_or_fileobj=b"x", path_in_repo="x")
attempt("public", api.model_info, "someone/dit")
"""
READING = {"see", "read", "gated", "public"}
# With exist_ok, huggingface_hub takes a 401, 402 or 403 for a yes if it can see the repository.
REFUSED_BUT_THERE = {"there"}


@pytest.mark.parametrize(
    ("token", "done"),
    [
        ("write", READING | REFUSED_BUT_THERE | {"whoami", "own", "org", "write", "branch", "push"}),
        ("read", READING | REFUSED_BUT_THERE | {"whoami"}),
        ("fineGrained", READING | REFUSED_BUT_THERE | {"whoami", "org"}),
        (None, {"public"} | REFUSED_BUT_THERE),
        ("wrong", set()),
    ],
)
def test_who_may_do_what(hub: FakeHub, folder: Path, token: str | None, done: set[str]) -> None:
    hub.tokens["hf_fine"] = Token("fineGrained", {"lab"})
    for name in ("me/private", "someone/dit", "someone/gated"):
        hub.add(name, folder, private="private" in name, gated="gated" in name)
    given = {"write": hub.token, "read": hub.read_token, "fineGrained": "hf_fine", "wrong": "hf_wrong", None: None}
    out = client(hub, folder, ASK, token=given[token])
    me = out.pop("me", None)
    assert {name for name, what in out.items() if what == "done"} == done
    if me:
        assert me["name"] == "me"
        assert me["auth"]["accessToken"]["role"] == token
        assert {org["name"]: org["roleInOrg"] for org in me["orgs"]} == hub.orgs
    expected = {"read": 403, "fineGrained": 403, "write": 403, None: 401, "wrong": 401}[token]
    statuses = {name: what[1] for name, what in out.items() if what != "done" and what[1] is not None}
    assert set(statuses.values()) == {expected}, "an error names who may not rather than what is not there"
    assert ("x" in hub.repos["me/private"].files()) == ("push" in done)


def test_commits_that_are_refused(hub: FakeHub, folder: Path) -> None:
    out = client(
        hub,
        folder,
        """
api.create_repo(ID)
first = api.model_info(ID).sha
def commit(*operations, **more):
    api.create_commit(ID, operations, commit_message="no", **more)
commit(CommitOperationAdd("kept.txt", b"1"), CommitOperationAdd("old.txt", b"2"), parent_commit=first)
commit(CommitOperationDelete("old.txt"))
attempt("parent", commit, CommitOperationAdd("b.txt", b"1"), parent_commit=first)
attempt("gone", commit, CommitOperationAdd("b.txt", b"1"), CommitOperationDelete("none.txt"))
for name, card in {
    "yaml": "license: [mit",
    "license": "license: cc-by-nc",
    "base": "base_model: ./teacher",
}.items():
    attempt(name, commit, CommitOperationAdd("README.md", f"---\\n{card}\\n---\\n".encode()))
lost = CommitOperationAdd("lost.safetensors", b"never sent")
lost._upload_mode, lost._is_uploaded = "lfs", True
attempt("lost", commit, CommitOperationAdd("b.txt", b"1"), lost)
""",
    )
    refused = {"parent": 412, "gone": 404, "yaml": None, "license": None, "base": None, "lost": 400}
    assert {name: what[1] for name, what in out.items()} == refused
    assert "LFS pointer" in out["lost"][2]
    for name, part in {"yaml": "Invalid YAML", "license": "cc-by-nc", "base": "./teacher"}.items():
        assert part in out[name][2]
    assert hub.repos[ID].files().keys() == {".gitattributes", "kept.txt"}
    assert len(hub.repos[ID].history) == 3


# What huggingface_hub 2.4 asks again by itself, up to five times, waiting 1, 2, 4, 8, 8 seconds or one more than
# Retry-After: what goes through `http_backoff`, on 408, 429, 500, 502, 503, 504 and on broken connections. In a push
# these are the preupload, the LFS batch, every PUT, the completion of parts and the verification.
RETRIED = {
    r"POST /api/models/me/dit/preupload/": 429,
    r"POST /me/dit.git/info/lfs/objects/batch": 500,
    r"PUT /lfs/me/dit/\w+$": 502,
    r"PUT /lfs/me/dit/\w+/2$": 503,
    r"POST /lfs/me/dit/\w+/complete": 504,
    r"POST /me/dit.git/info/lfs/objects/verify": 500,
}
# It gives up at once where it posts or gets plainly: who am I, creating a repository or a branch, the check of the
# card, what it looks up of a repository, and the commit itself.
NOT_RETRIED = {
    "whoami": r"GET /api/whoami-v2",
    "create": r"POST /api/repos/create",
    "branch": r"POST /api/models/me/dit/branch/",
    "info": r"GET /api/models/me/dit$",
    "refs": r"GET /api/models/me/dit/refs",
    "card": r"POST /api/validate-yaml",
    "commit": r"POST /api/models/me/dit/commit/",
}


def test_errors_that_the_client_retries(hub: FakeHub, folder: Path) -> None:
    faults = [hub.fail(line, status, headers={"Retry-After": "0"}) for line, status in RETRIED.items()]
    client(hub, folder, PUSH)
    assert [fault.hits for fault in faults] == [1] * len(faults)
    assert read(folder).items() <= hub.repos[ID].files().items()
    assert len(hub.repos[ID].history) == 2
    assert [exchange.status for exchange in hub.log if "/preupload/" in exchange.line] == [429, 200]

    # Forbidden is final, and so is what fails six times.
    hub.repos.clear()
    forbidden = hub.fail("/preupload/", 403, message="denied")
    for_ever = hub.fail("/preupload/", 503, times=None)
    out = client(hub, folder, TRY + "attempt('again', api.upload_folder, repo_id=ID, folder_path=FOLDER)")
    assert out["push"][:2] == ["HfHubHTTPError", 403]
    assert "denied" in out["push"][2]
    assert out["again"][:2] == ["HfHubHTTPError", 503]
    assert [forbidden.hits, for_ever.hits] == [1, 6]
    assert len(hub.repos[ID].history) == 1


def test_errors_that_the_client_hands_on(hub: FakeHub, folder: Path) -> None:
    for line in NOT_RETRIED.values():
        hub.fail(line, 503)
    calls = """
calls = {
    "whoami": api.whoami,
    "create": lambda: api.create_repo(ID),
    "branch": lambda: api.create_branch(ID, branch="b"),
    "info": lambda: api.model_info(ID),
    "refs": lambda: api.list_repo_refs(ID),
    "commit": lambda: api.upload_file(repo_id=ID, path_or_fileobj=b"1", path_in_repo="a.txt"),
    "card": lambda: api.upload_folder(repo_id=ID, folder_path=FOLDER),
}
for name, call in calls.items():
    attempt(name + " first", call)
    attempt(name + " second", call)
"""
    out = client(hub, folder, calls)
    for name in NOT_RETRIED:
        assert out[f"{name} first"][1] == 503, name
        assert out[f"{name} second"] == "done", name
    assert len(hub.repos[ID].history) == 3


def test_a_connection_that_breaks_in_a_large_file(hub: FakeHub, folder: Path) -> None:
    """The client sends that file or part again; nothing of it counts before it is whole."""
    whole = hub.cut(r"PUT /lfs/me/dit/\w+$", after_bytes=100, skip=1)
    part = hub.cut(r"PUT /lfs/me/dit/\w+/2", after_bytes=40_000, reset=True)
    client(hub, folder, PUSH)
    assert whole.hits == part.hits == 1
    large = ("transformer/model.safetensors", "vae/model.safetensors", "images/sample.png")
    assert hub.lfs_received() == size_of(folder, *large) + 100 + 40_000
    assert read(folder).items() <= hub.repos[ID].files().items()

    # For ever: the push fails, what arrived whole stays, and the next push sends the rest only.
    hub.repos.clear()
    broken = hub.cut(r"PUT /lfs/me/dit/\w+/3", times=None)
    out = client(hub, folder, TRY)
    repo = hub.repos[ID]
    assert out["push"][0] == "RuntimeError"
    assert broken.hits == 6
    assert out["seen"] == list(repo.files()) == [".gitattributes"]
    assert set(repo.lfs.values()) == {read(folder)[name] for name in large[1:]}
    hub.faults.all.clear()
    sent = hub.lfs_received()
    client(hub, folder, PUSH)
    assert hub.lfs_received() == sent + size_of(folder, large[0])
    assert read(folder).items() <= repo.files().items()


def test_a_connection_that_breaks_in_the_commit(hub: FakeHub, folder: Path) -> None:
    """The client does not send a commit again; readers see all of it or nothing."""
    hub.cut(r"/commit/main", after_bytes=200)
    hub.lose(r"/commit/main")
    out = client(hub, folder, TRY)
    assert out["push"][0] in ("RemoteProtocolError", "ReadError", "WriteError")
    assert out["seen"] == [".gitattributes"]
    sent = hub.lfs_received()

    # The commit is made this time, but its answer is lost; the push after it finds nothing to do.
    out = client(hub, folder, TRY)
    assert out["push"][0] == "RemoteProtocolError"
    assert out["seen"] == sorted(hub.repos[ID].files()) == sorted([".gitattributes", *read(folder)])
    assert client(hub, folder, TRY)["push"] == "done"
    assert len(hub.repos[ID].history) == 2
    assert hub.lfs_received() == sent


@pytest.mark.parametrize("chunked", [False, True])
def test_a_client_that_dies_in_the_middle(hub: FakeHub, folder: Path, chunked: bool) -> None:
    hub.add(ID, folder)
    lines = b'{"key": "header", "value": {"summary": "half"}}\n{"key": "file", "value": {"path": "x", "content": ""}}\n'
    length = f"Content-Length: {len(lines) + 1}\r\n\r\n".encode()
    if chunked:
        length = b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(lines)
    head = f"POST /api/models/{ID}/commit/main HTTP/1.1\r\nHost: hub\r\nAuthorization: Bearer {hub.token}\r\n"

    def send(end: bytes) -> None:
        with socket.create_connection(("127.0.0.1", urlsplit(hub.url).port), timeout=10) as connection:
            connection.sendall(head.encode() + length + lines + end)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(1000)  # until the server has answered or hung up

    send(b"")
    assert (hub.log[0].received, hub.log[0].status) == (len(lines), None)
    assert hub.repos[ID].history == []
    assert hub.repos[ID].files() == read(folder)
    send(b"\r\n0\r\n\r\n" if chunked else b"\n")
    assert hub.log[1].status == 200
    assert hub.repos[ID].files() == {**read(folder), "x": b""}


def test_a_download_that_breaks(hub: FakeHub, folder: Path) -> None:
    """It goes on where it stopped, as far as the client had read whole pieces (10 MB each, here 1000 bytes)."""
    hub.add(ID, folder)
    name = "transformer/model.safetensors"
    line = f"GET /{ID}/resolve/.*/{name}"
    hub.cut(line, after_bytes=70_500)
    hub.fail(line, 429)
    code = f"""
constants.DOWNLOAD_CHUNK_SIZE = 1000
attempt("file", lambda: out.update(path=hf_hub_download(ID, {name!r})))
"""
    out = client(hub, folder, code)
    assert Path(out["path"]).read_bytes() == (folder / name).read_bytes()
    asked = [(e.range, e.status, e.sent) for e in hub.log if e.line.startswith("GET") and name in e.line]
    busy = len(json.dumps({"error": "out of order"}))
    assert asked == [(None, 200, 70_500), ("bytes=70000-", 429, busy), ("bytes=70000-", 206, 80_000)]

    # It does not go on after a reset, nor after a 5xx, and leaves nothing half in the cache.
    for fault in (lambda: hub.cut(line, after_bytes=70_500, reset=True), lambda: hub.fail(line, 503)):
        fault()
        out = client(hub, folder, code, home="other")
        assert out["file"][0] in ("ReadError", "HfHubHTTPError")
        assert not any("blobs" in name for name in read(folder.parent / "other"))

    # An answer that takes too long is asked for again.
    slow = hub.slow(line, 1.5)
    out = client(hub, folder, f"constants.HF_HUB_DOWNLOAD_TIMEOUT = 0.5\n{code}", home="third")
    assert slow.hits == 1
    assert Path(out["path"]).read_bytes() == (folder / name).read_bytes()
