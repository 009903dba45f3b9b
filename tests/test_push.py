"""`upcycle push-to-hub` against a fake Hub: what is sent, where to, what is refused before anything is sent.

The commands run in one worker. Whether an export loads in a fresh process is looked at where that is the point; the
other tests leave it out (`quick`), because it takes seconds.
"""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import yaml
from fake_hub import FakeHub, Token
from fake_hub_repo import Repo
from fresh import BLOCK
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id
from runs import content
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from worker import Worker

from upcycle import provenance
from upcycle.hub.push import default_name, find_export
from upcycle.models.chunked_dit import MODULE_NAME
from upcycle.output import to_json
from upcycle.training.digits import TEACHER

BASE = "facebook/DiT-XL-2-256"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
YES = ("--yes", "--accept-license")


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with FakeHub() as server:
        server.part_size = 2**17
        yield server


@pytest.fixture(scope="module")
def worker(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with Worker(hub, tmp_path_factory.mktemp("home")) as process:
        yield process


@pytest.fixture
def quick(worker: Worker) -> Iterator[Worker]:
    worker.do("from upcycle.hub import check\nload, check._load = check._load, lambda *_: None")
    yield worker
    worker.do("check._load = load")


@pytest.fixture(autouse=True)
def clean(hub: FakeHub) -> None:
    hub.repos.clear()
    hub.requests.clear()
    hub.log.clear()
    hub.faults.all.clear()


@pytest.fixture(scope="module")
def exports(worker: Worker, pipeline_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Exports by name: two of the tiny DiT that differ in their fresh weights, the second in shards; one of digits."""
    folder = tmp_path_factory.mktemp("exports")
    for name, source, *options in (
        ("one", pipeline_dir),
        ("two", pipeline_dir, "--seed", 1, "--max-shard-size", "500KB"),
        ("digits", TEACHER),
    ):
        assert worker.run("convert", source, *options, "--no-verify", "-o", folder / name).code == 0
    return {path.name: path for path in folder.iterdir()}


def read(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def writes(hub: FakeHub) -> list[str]:
    return [line for line in hub.requests if not line.startswith(("GET", "HEAD"))]


def edit(repo: Repo, name: str, content: bytes | None, revision: str = "main") -> None:
    """What a person does on the Hub's pages."""
    value: dict = {"path": name}
    if content is not None:
        value["content"] = base64.b64encode(content).decode()
    kind = "deletedFile" if content is None else "file"
    repo.push([{"key": "header", "value": {"summary": "Edit"}}, {"key": kind, "value": value}], revision, "me")


def refresh(folder: Path) -> None:
    """Make the hashes of a folder right again, as who changes an export on purpose would."""
    now = provenance.read(folder)
    assert now
    provenance.write(folder, now["base"], now["history"], evidence=now["evidence"])


# -- round trip -------------------------------------------------------------------------------------------------------

DRAW = (
    BLOCK
    + """
from pathlib import Path
found = {}
for name in where.split(","):
    pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True)
    found[name] = draw(pipe), pipe
first, images = next(iter(found)), [drawn for drawn, _ in found.values()]
assert type(found[first][1]) is DiTPipeline
assert torch.equal(images[0], images[1]), "the Hub's and the folder's"
assert not torch.equal(images[0], images[2]), "other code"
for name, (drawn, pipe) in found.items():
    assert torch.equal(draw(pipe), drawn), f"{name} is another after others were loaded"
again = DiffusionPipeline.from_pretrained(first, trust_remote_code=True)
assert torch.equal(draw(again), images[0])
print(sorted(name for name in sys.modules if name.partition(".")[0] == "upcycle"))
"""
)


def test_round_trip(hub, worker, dit, world, tmp_path):
    """Convert from the Hub, push, load elsewhere bit for bit; the id is taken wherever a model is.

    A second export with code of its own is pushed too, and loaded beside the first.
    """
    base = hub.add(BASE, tiny.save_pipeline(tmp_path / "repo", dit, legacy_config=True))
    worker.run("convert", BASE, "--no-verify", "-o", tmp_path / "mine")
    done = worker.run("push-to-hub", tmp_path / "mine", *YES)
    assert done.code == 0, done.err
    assert done.out.strip() == f"{hub.url}/me/mine/commit/{hub.repos['me/mine'].commit().oid}"
    there = hub.repos["me/mine"].files()
    assert there.keys() == {*read(tmp_path / "mine"), "README.md", ".gitattributes"}
    assert read(tmp_path / "mine").items() <= there.items()
    card = ModelCard(there["README.md"].decode()).data
    assert card.base_model == BASE
    assert card.base_model_relation == "finetune"
    assert card.license == "cc-by-nc-4.0"
    assert card.library_name == "diffusers"
    said = json.loads(there["upcycle.json"])
    assert said["base"] == {
        "id": BASE,
        "kind": "diffusers",
        "revision": base.commit().oid,
        "licence": "cc-by-nc-4.0",
    }

    other = change_code(tmp_path / "mine", tmp_path / "other")
    refused = worker.run("push-to-hub", other, *YES).error
    assert "is not the code of this version" in refused
    assert "me/other" not in hub.repos
    assert worker.run("push-to-hub", other, *YES, "--trust-remote-code").code == 0

    names = f"me/mine,{tmp_path / 'mine'},me/other"
    env = hub.env(tmp_path / "elsewhere", HF_MODULES_CACHE=str(tmp_path / "modules"), OMP_NUM_THREADS="1")
    fresh = subprocess.run(
        [sys.executable, "-I", "-c", DRAW, names, str(tmp_path)],
        env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert fresh.returncode == 0, fresh.stderr[-3000:]
    assert fresh.stdout.strip().endswith("[]")

    drawn = worker.run("sample", "me/mine", "--classes", 1, "--steps", 2, "-o", tmp_path / "drawn", "--json")
    assert drawn.json["images"] == 1
    worker.run("sample", tmp_path / "mine", "--classes", 1, "--steps", 2, "-o", tmp_path / "local")
    assert (tmp_path / "drawn/samples.png").read_bytes() == (tmp_path / "local/samples.png").read_bytes()

    assert worker.run("convert", "me/mine", "-o", tmp_path / "again").code == 0
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("mine", "again"))
    assert ours.keys() == theirs.keys()
    assert all((ours[name] == theirs[name]).all() for name in ours)
    again = provenance.read(tmp_path / "again")
    assert again["base"] == said["base"]
    assert [event["what"] for event in again["history"]] == ["convert", "convert"]
    assert again["history"][1]["source"] == "me/mine"

    worker.run("convert", world / "teacher", "--no-verify", "-o", tmp_path / "small")
    assert worker.run("push-to-hub", tmp_path / "small", *YES).code == 0
    recipe = {**content(world, tmp_path / "run", {"steps": 2}), "student": "me/small"}
    del recipe["convert"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = worker.run("finetune", tmp_path / "recipe.yaml")
    assert done.code == 0, done.err
    assert [e["what"] for e in provenance.read(tmp_path / "run/export")["history"]] == ["convert", "finetune"]


def change_code(export: Path, out: Path) -> Path:
    """The export with code of its own that computes something else."""
    shutil.copytree(export, out)
    code = (out / "transformer" / f"{MODULE_NAME}.py").read_text()
    changed = code.replace("return (base + correction).to(x.dtype), routing", "return 0 * base, routing")
    assert changed != code
    (out / "transformer" / f"{MODULE_NAME}.py").unlink()
    name = "chunked_dit_" + hashlib.sha256(changed.encode()).hexdigest()[:12]
    (out / "transformer" / f"{name}.py").write_text(changed)
    for file in (out / "model_index.json", out / "transformer" / "config.json"):
        file.write_text(file.read_text().replace(MODULE_NAME, name))
    refresh(out)
    return out


# -- where to ---------------------------------------------------------------------------------------------------------


def test_the_newest_export_goes_to_its_name(hub, quick, exports, tmp_path):
    for age, name in enumerate(("runs/xl4/export", "older", ".hidden")):
        shutil.copytree(exports["digits"], tmp_path / name)
        stamp = 2_000_000_000 + (age if name != "older" else -100)
        os.utime(tmp_path / name / provenance.FILE, (stamp, stamp))
    silent = quick.run("push-to-hub", cwd=tmp_path)
    assert "pass --yes" in silent.error
    said = silent.err.splitlines()
    assert said[0] == f"{tmp_path}/runs/xl4/export -> me/xl4"
    assert "10 files" in said[-2]
    assert "to me/xl4 (a new public repository)" in said[-2]
    assert writes(hub) == []
    assert quick.run("push-to-hub", "--yes", cwd=tmp_path).code == 0
    assert list(hub.repos) == ["me/xl4"]
    assert "no export in" in quick.run("push-to-hub", cwd=(tmp_path / ".hidden" / "vae")).error


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("xl4", "xl4"),
        ("runs/xl4/export", "xl4"),
        ("demo/pipeline", "demo"),
        ("a  b", "a-b"),
        ("my..model", "my.model"),
        ("x" * 200, "x" * 90),
        ("-größe-", "gr-e"),
        ("模型", "upcycled"),
        ("dit.git", "dit"),
        ("a---b", "a-b"),
    ],
)
def test_default_names_are_valid(folder, name, tmp_path):
    assert default_name(tmp_path / folder) == name
    validate_repo_id(f"me/{name}")


def test_find_export_passes_over_what_is_no_export(tmp_path, exports):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / provenance.FILE).write_text("{}")
    shutil.copytree(exports["digits"], tmp_path / "b/c/d/e")
    shutil.copytree(exports["digits"], tmp_path / "b/c/d/f/g")
    assert find_export(tmp_path) == tmp_path / "b/c/d/e"


def test_private_branch_and_pull_request(hub, quick, exports):
    assert quick.run("push-to-hub", exports["digits"], "lab/private", "--private", "--yes").code == 0
    assert hub.repos["lab/private"].private
    # An option for new repositories does not change one that is there.
    assert quick.run("push-to-hub", exports["digits"], "lab/public", "--yes").code == 0
    assert (
        "make it private in its settings"
        in quick.run("push-to-hub", exports["digits"], "lab/public", "--private", "--yes").error
    )

    repo = hub.repos["lab/public"]
    main = repo.commit()
    for branch in ("v2", "v2"):
        done = quick.run("push-to-hub", exports["two"], "lab/public", "--branch", branch, *YES)
        assert done.code == 0, done.err
    assert repo.commit() == main
    assert repo.files("v2")[provenance.FILE] == (exports["two"] / provenance.FILE).read_bytes()
    assert repo.commit("v2").parent == main.oid
    assert done.out.strip().endswith(repo.commit("v2").oid)
    assert quick.run("push-to-hub", exports["one"], "me/new", "--revision", "v2", *YES).code == 0
    assert list(hub.repos["me/new"].files("main")) == [".gitattributes"]

    done = quick.run("push-to-hub", exports["one"], "lab/public", "--create-pr", *YES)
    assert done.out.strip() == f"{hub.url}/lab/public/discussions/1"
    assert repo.commit() == main
    assert repo.files("refs/pr/1")[provenance.FILE] == (exports["one"] / provenance.FILE).read_bytes()
    # Who may not write may still propose.
    hub.add("someone/model", exports["digits"])
    assert "no right to write there" in quick.run("push-to-hub", exports["one"], "someone/model", *YES).error
    assert quick.run("push-to-hub", exports["one"], "someone/model", "--create-pr", *YES).code == 0
    assert "takes no pull request" in quick.run("push-to-hub", exports["one"], "me/none", "--create-pr", *YES).error
    assert "exclude each other" in quick.run("push-to-hub", exports["one"], "--create-pr", "--branch", "v", *YES).error


def test_json_is_one_object(hub, quick, exports):
    done = quick.run("push-to-hub", exports["one"], "me/one", "--json", *YES)
    said = done.json
    sent = {name: len(text) for name, text in hub.repos["me/one"].files().items() if name != ".gitattributes"}
    assert said["files"] == sent
    assert said["bytes"] == sum(sent.values())
    assert said["url"].endswith(hub.repos["me/one"].commit().oid)
    assert (said["repo"], said["new"], said["branch"], said["create_pr"]) == ("me/one", True, None, False)
    assert said["licence"] == "cc-by-nc-4.0"
    assert said["delete"] == said["kept_edits"] == said["notes"] == []


def test_dry_run_says_all_and_sends_nothing(hub, quick, exports):
    plan = quick.run("push-to-hub", exports["one"], "--dry-run", "--json").json
    assert (plan["repo"], plan["new"], plan["logged_in"]) == ("me/one", True, True)
    assert "--accept-license" in plan["refused"]
    assert plan["card"].startswith("---\nlicense: cc-by-nc-4.0\n")
    assert sum(plan["files"].values()) == plan["bytes"]
    shown = quick.run("push-to-hub", exports["one"], "--dry-run").out
    assert WEIGHTS in shown
    assert "without --accept-license it would stop here" in shown
    assert "# one" in shown
    # Nobody, or who may not write, sees what would be sent too.
    for token, why in ((None, "not logged in"), (hub.read_token, "may only read")):
        plan = quick.run("push-to-hub", exports["one"], "--dry-run", "--json", token=token).json
        assert (plan["repo"], plan["logged_in"]) == ("you/one", False)
        assert any(why in note for note in plan["notes"]), plan["notes"]
    hub.add("me/there", exports["digits"])
    plan = quick.run("push-to-hub", exports["one"], "me/there", "--dry-run", "--json", token=None).json
    assert not plan["new"]
    assert writes(hub) == []
    assert "is no name on the Hub" in quick.run("push-to-hub", exports["one"], "a/b/c", "--dry-run", token=None).error


# -- refused before anything is sent ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("token", "repo", "why"),
    [
        (None, None, "not logged in to the Hub: run `hf auth login`"),
        ("hf_wrongwrong", None, "does not know your token"),
        (FakeHub.read_token, None, "your token may only read"),
        (FakeHub.token, "stranger/model", "stranger is neither you (me) nor an organisation of yours"),
        (FakeHub.token, "readers/model", "you may only read in readers"),
        (FakeHub.token, "someone/there", "you have no right to write there"),
        (FakeHub.token, "readers/there", "you have no right to write there"),
        ("hf_finefine", "me/there", "you have no right to write there"),
        ("hf_finefine", "me/new", "the Hub denies it (403)"),
        (FakeHub.token, "a--b/c", "is no name on the Hub"),
        (FakeHub.token, "alone", "write it as owner/name"),
    ],
)
def test_rights(hub, quick, exports, token, repo, why):
    hub.tokens["hf_finefine"] = Token("fineGrained", {"lab"})
    before = {name: hub.add(name, exports["digits"]).files() for name in ("someone/there", "readers/there", "me/there")}
    done = quick.run("push-to-hub", exports["one"], *([repo] if repo else []), *YES, token=token)
    assert why in done.error
    if repo:
        assert repo in done.error or repo.split("/")[0] in done.error
    assert {name: repo.files() for name, repo in hub.repos.items()} == before
    assert [line for line in writes(hub) if "create" not in line] == []


def with_licence(export: Path, out: Path, licence: str | None) -> Path:
    shutil.copytree(export, out)
    now = provenance.read(out)
    provenance.write(out, {**now["base"], "licence": licence}, now["history"])
    return out


@pytest.mark.parametrize(
    ("licence", "accepted", "why"),
    [
        ("mit", False, None),
        ("cc-by-nc-4.0", False, "allows non-commercial use only, and the model inherits it; pass --accept-license"),
        ("cc-by-nc-4.0", True, None),
        ("stability-community", False, "has terms of its own"),
        ("stability-community", True, None),
        (None, False, "is not known; look it up"),
        (None, True, None),
        ("cc-by-nd-4.0", True, "forbids sharing changed versions"),
        ("CC-BY-NC-ND-4.0", True, "forbids sharing changed versions"),
    ],
)
def test_licences(hub, quick, exports, tmp_path, licence, accepted, why):
    folder = with_licence(exports["digits"], tmp_path / "model", licence)
    done = quick.run("push-to-hub", folder, "--yes", *(["--accept-license"] if accepted else []))
    if why:
        assert why in done.error
        assert writes(hub) == []
        return
    assert done.code == 0, done.err
    card = hub.repos["me/model"].files()["README.md"].decode()
    stated = yaml.safe_load(card.split("---")[1])
    if licence in ("mit", "cc-by-nc-4.0"):
        assert stated["license"] == licence
        assert "license_name" not in stated
    else:
        assert stated["license"] == "other"
        assert stated["license_name"] == (licence or "unknown")
    assert (licence or "do not state") in card.split("## Licence")[1]


def break_export(folder: Path, how: str) -> None:
    origin = json.loads((folder / provenance.FILE).read_text())
    weights = folder / WEIGHTS
    if how == "changed":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif how == "missing":
        (folder / "vae/config.json").unlink()
    elif how == "outside":
        origin["files"]["../secret"] = {"bytes": 1, "sha256": "0"}
        (folder / provenance.FILE).write_text(to_json(origin))
    elif how == "link outside":
        (folder / "vae/config.json").rename(folder.parent / "config.json")
        (folder / "vae/config.json").symlink_to(folder.parent / "config.json")
    elif how == "damaged":
        (folder / provenance.FILE).write_text("{")
    elif how == "odd":
        (folder / provenance.FILE).write_text(to_json({**origin, "history": ["converted"]}))
    elif how == "code":
        (folder / "vae/extra.py").write_text("import os")
        refresh(folder)
    elif how == "shape":
        config = json.loads((folder / "transformer/config.json").read_text())
        (folder / "transformer/config.json").write_text(json.dumps({**config, "num_layers": 3}))
        refresh(folder)
    elif how == "card":
        (folder / "README.md").write_bytes(b"---\nlicense: mit\n---\n\xff\xfe")
    elif how == "yaml":
        (folder / "README.md").write_text("---\nlicense: [mit\n---\n")


BROKEN = {
    "changed": "is not what was exported",
    "missing": "vae/config.json, which upcycle.json lists, is not there",
    "outside": "lies outside of the folder",
    "link outside": "lies outside of the folder",
    "damaged": "upcycle.json is damaged",
    "odd": "upcycle.json is damaged",
    "code": "vae/extra.py is not the code of this version",
    "shape": "",
    "card": "is no UTF-8 text",
    "yaml": "is not valid YAML",
}


@pytest.mark.parametrize("how", BROKEN)
def test_damaged_exports_are_not_sent(hub, quick, exports, tmp_path, how):
    folder = tmp_path / "model"
    shutil.copytree(exports["digits"], folder)
    break_export(folder, how)
    error = quick.run("push-to-hub", folder, "--yes").error
    assert BROKEN[how] in error
    assert str(folder) in error
    assert writes(hub) == []


def test_what_is_no_export(hub, quick, pipeline_dir, tmp_path):
    assert "is a fixed-patch DiT and no converted model" in quick.run("push-to-hub", pipeline_dir, "--yes").error
    assert "is no export" in quick.run("push-to-hub", tmp_path, "--yes").error
    assert "is no export" in quick.run("push-to-hub", tmp_path / "none", "--yes").error
    assert writes(hub) == []


def test_exports_that_do_not_load_or_compute_nan(hub, worker, exports, tmp_path):
    """Their hashes are right; a fresh process with stock diffusers finds out."""
    nan, lacking = tmp_path / "nan", tmp_path / "lacking"
    shutil.copytree(exports["digits"], nan)
    shutil.copytree(exports["digits"], lacking)
    weights = load_file(nan / WEIGHTS)
    with safe_open(nan / WEIGHTS, "pt") as file:
        header = file.metadata()
    next(iter(weights.values())).fill_(float("nan"))
    save_file(weights, nan / WEIGHTS, header)
    refresh(nan)
    assert "NaN" in worker.run("push-to-hub", nan, "--yes").error
    # The code is in the folder, but not in what would be sent.
    origin = json.loads((lacking / provenance.FILE).read_text())
    code = next(name for name in origin["files"] if name.startswith("transformer/") and name.endswith(".py"))
    del origin["files"][code]
    (lacking / provenance.FILE).write_text(to_json(origin))
    assert "does not load in stock diffusers" in worker.run("push-to-hub", lacking, "--yes").error
    assert writes(hub) == []


# -- again ------------------------------------------------------------------------------------------------------------


def test_second_push(hub, quick, exports, tmp_path):
    """Edits stay, what is there is not sent again, files of the earlier export go, those of others stay."""
    assert quick.run("push-to-hub", exports["two"], "me/model", *YES).code == 0
    repo = hub.repos["me/model"]
    sent, first = hub.lfs_received(), repo.commit()
    assert "transformer/diffusion_pytorch_model.safetensors.index.json" in repo.files()

    done = quick.run("push-to-hub", exports["two"], "me/model", *YES)
    assert done.code == 0
    assert "nothing was committed" in done.err
    assert repo.commit() == first
    assert hub.lfs_received() == sent

    card = repo.files()["README.md"].decode()
    edited = card.replace("## Limits", "## Limits\n\nIt cannot draw hands.").replace(
        "pipeline_tag: unconditional-image-generation", "pipeline_tag: text-to-image\nlanguage: en"
    )
    edit(repo, "README.md", f"{edited}\n## Thanks\n\nTo all.\n".encode())
    edit(repo, "notes.txt", b"mine")
    edit(repo, "scheduler/scheduler_config.json", None)  # of ours, and removed by hand
    plan = quick.run("push-to-hub", exports["one"], "me/model", "--dry-run", "--json").json
    assert plan["kept_edits"] == ["limits", "pipeline_tag"]
    assert all(name.startswith("transformer/diffusion_pytorch_model") for name in plan["delete"])
    before = dict(repo.lfs)
    done = quick.run("push-to-hub", exports["one"], "me/model", *YES)
    assert done.code == 0, done.err
    assert "edited on the Hub and kept: limits, pipeline_tag" in done.err
    there = repo.files()
    assert there.keys() == {*read(exports["one"]), "README.md", ".gitattributes", "notes.txt"}
    new = [content for oid, content in repo.lfs.items() if oid not in before]
    assert hub.lfs_received() == sent + sum(map(len, new))
    assert len(new) == 1
    text = there["README.md"].decode()
    for kept in ("It cannot draw hands.", "To all.", "pipeline_tag: text-to-image", "language: en"):
        assert kept in text
    assert "--seed 1" not in text

    # A file that is gone there and was ours does not stop a push of an export without it.
    pictures = tmp_path / "pictures"
    shutil.copytree(exports["one"], pictures)
    (pictures / "images").mkdir()
    (pictures / "images/samples.png").write_bytes(b"\x89PNG\0")
    refresh(pictures)
    assert quick.run("push-to-hub", pictures, "me/model", *YES).code == 0
    edit(repo, "images/samples.png", None)
    assert quick.run("push-to-hub", exports["one"], "me/model", *YES).code == 0
    assert repo.files().keys() == there.keys()


def test_what_others_commit_meanwhile_is_not_overwritten(hub, quick, exports):
    assert quick.run("push-to-hub", exports["one"], "me/model", *YES).code == 0
    repo = hub.repos["me/model"]
    quick.do(
        """
from pathlib import Path
from upcycle.hub import check, push
planned = push.plan_push(check.check_export(Path(FOLDER)), "me/model", push.identify())
""",
        FOLDER=str(exports["two"]),
    )
    edit(repo, "README.md", b"# All my own\n")
    theirs = repo.commit()
    said = quick.do("try:\n    push.push(planned)\nexcept push.UpcycleError as error:\n    out['error'] = str(error)")
    assert "somebody else changed it meanwhile (412); nothing was committed to me/model" in said["error"]
    assert repo.commit() == theirs
    assert quick.run("push-to-hub", exports["two"], "me/model", *YES).code == 0
    assert "# All my own" in repo.files()["README.md"].decode()


def test_a_card_of_the_folder_and_a_strange_one_on_the_hub(hub, quick, exports, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(exports["digits"], folder)
    (folder / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n\nWritten before the first push.\n")
    (folder / "diary.txt").write_text("private")
    done = quick.run("push-to-hub", folder, "--yes")
    assert "left out, because no part of the export: diary.txt" in done.err
    card = hub.repos["me/model"].files()["README.md"].decode()
    assert "Written before the first push." in card
    assert yaml.safe_load(card.split("---")[1])["license"] == "apache-2.0", "nobody but the base's owner can relicense"
    assert "diary.txt" not in hub.repos["me/model"].files()

    (folder / "README.md").write_bytes(b"---\nlicense: apache-2.0\n---\n\xff")
    hub.add("me/latin", folder)
    assert "the README.md of me/latin is no UTF-8 text" in quick.run("push-to-hub", folder, "me/latin", "--yes").error
    edit(hub.repos["me/model"], "README.md", b"---\r\nlicense: apache-2.0\r\n---\r\nMine.\r\n")
    assert quick.run("push-to-hub", folder, "--yes").code == 0
    assert "\nMine.\n" in hub.repos["me/model"].files()["README.md"].decode()


def test_metadata_that_the_hub_refuses(hub, quick, exports, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(exports["digits"], folder)
    (folder / "README.md").write_text("---\ntags: [1, 2]\n---\n")
    error = quick.run("push-to-hub", folder, "--yes").error
    assert "the Hub refuses the metadata of the model card" in error
    assert list(hub.repos["me/model"].files()) == [".gitattributes"]
    assert hub.lfs_received() == 0


@pytest.mark.parametrize("path", ["/api/whoami", "/api/models/me/one", "/api/validate-yaml"])
def test_a_proxy_that_answers_for_the_hub(hub, quick, exports, path):
    """With a page of its own."""
    for status, why in ((200, "does not answer as the Hub would"), (503, "")):
        quick.do(
            """
import httpx2
from huggingface_hub.utils import _http
real = httpx2.HTTPTransport()
def answer(request):
    if PATH not in str(request.url):
        return real.handle_request(request)
    return httpx2.Response(STATUS, html="<p>Log in to the guest network", request=request)
_http.set_client_factory(lambda: httpx2.Client(transport=httpx2.MockTransport(answer)))
""",
            PATH=path,
            STATUS=status,
        )
        try:
            done = quick.run("push-to-hub", exports["one"], *YES)
        finally:
            quick.do("_http.set_client_factory(_http.default_client_factory)")
        assert why in done.error
        assert "fault of upcycle" not in done.error
        assert "me/one" not in hub.repos or list(hub.repos["me/one"].files()) == [".gitattributes"]


def test_measure_puts_pictures_and_speed_into_the_card(hub, quick, exports, tmp_path):
    shutil.copytree(exports["digits"], tmp_path / "model")
    for _ in range(2):
        done = quick.run("push-to-hub", tmp_path / "model", "--measure", "--device", "cpu", "--yes", "--json")
        assert done.code == 0, done.err
        assert done.json["url"]
    there = hub.repos["me/model"].files()
    assert {name for name in there if name.startswith("images/")} == {
        f"images/{name}.png" for name in ("samples", "router", "compression")
    }
    card = there["README.md"].decode()
    assert card.count("| seconds per image |") == 1
    for name in ("samples", "router", "compression"):
        assert f"](images/{name}.png)" in card
    assert "| seconds per image | lower is better |" in card
    assert "machine " in card
    assert "torch " in card


# -- exports of other kinds -------------------------------------------------------------------------------------------


def test_a_variant_and_a_transformer_alone(hub, worker, exports, tmp_path):
    """What diffusers must be asked for stands in the card; the check asks for it too."""
    low = tmp_path / "low"
    assert (
        worker.run("export", exports["one"], "--to", "diffusers", "--dtype", "bf16", "--variant", "-o", low).code == 0
    )
    done = worker.run("push-to-hub", low, *YES)
    assert done.code == 0, done.err
    card = hub.repos["me/low"].files()["README.md"].decode()
    assert 'from_pretrained("me/low", variant="bf16", trust_remote_code=True)' in card

    single, alone = tmp_path / "one.safetensors", tmp_path / "alone"
    worker.run("export", exports["one"], "--to", "single", "-o", single)
    assert "is a file" in worker.run("push-to-hub", single, *YES).error
    worker.run("export", single, "--to", "diffusers", "-o", alone)
    done = worker.run("push-to-hub", alone, *YES)
    assert done.code == 0, done.err
    assert "The transformer alone" in hub.repos["me/alone"].files()["README.md"].decode()


def test_without_upcycle_json_the_header_tells(hub, worker, exports, tmp_path):
    folder = tmp_path / "headed"
    shutil.copytree(exports["one"], folder)
    (folder / "upcycle.json").unlink()
    assert "non-commercial" in worker.run("push-to-hub", folder, "me/headed", "--yes").error
    done = worker.run("push-to-hub", folder, *YES)
    assert "upcycle.json is missing" in done.err
    card = ModelCard(hub.repos["me/headed"].files()["README.md"].decode())
    assert card.data.license == "cc-by-nc-4.0"
    assert "upcycle convert" in card.text


def test_what_is_left_out_is_named_and_a_changed_licence_too(hub, worker, quick, exports, tmp_path):
    folder = tmp_path / "more"
    shutil.copytree(exports["one"], folder)
    for name in (".env", "notes.txt"):
        (folder / name).write_text("TOKEN=1")
    done = worker.run("push-to-hub", folder, *YES)
    assert "no part of the export: .env, notes.txt" in done.err
    repo = hub.repos["me/more"]
    assert not {".env", "notes.txt"} & repo.files().keys()
    edit(repo, "README.md", repo.files()["README.md"].replace(b"license: cc-by-nc-4.0", b"license: mit"))
    again = worker.run("push-to-hub", folder, *YES)
    assert "set back to that of the base" in again.err
    assert b"license: cc-by-nc-4.0" in repo.files()["README.md"]
    same = worker.run("push-to-hub", folder, *YES, "--json")
    assert same.json["committed"] is False
