"""Where an export comes from: `upcycle.json`, the same in the weights' headers, and what runs add to both."""

import contextlib
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import tiny
from fake_hub import FakeHub
from runs import WEIGHTS, rows_of, run_here, small, write_recipe
from safetensors import safe_open
from worker import Worker

import upcycle
from upcycle import provenance
from upcycle.cli import main
from upcycle.errors import UpcycleError
from upcycle.evaluation.validation import TIMESTEPS
from upcycle.graft.convert import convert
from upcycle.graft.plan import Options, make_plan
from upcycle.sources import open_source
from upcycle.training import results


def header(path: Path) -> dict:
    """What an export's weights say of themselves, as anybody reads it."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata.keys() == {"format", "upcycle"}
    assert metadata["format"] == "pt"
    return json.loads(metadata["upcycle"])


def check_files(folder: Path, origin: dict) -> None:
    """Every file is listed with its bytes and its SHA-256, but the list itself."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert origin["files"].keys() == files.keys() - {provenance.FILE}
    for name, said in origin["files"].items():
        content = files[name].read_bytes()
        assert said == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}, name


def test_of_a_conversion(export_dir, pipeline_dir):
    origin = provenance.read(export_dir)
    assert origin["base"] == {
        "id": str(pipeline_dir),
        "kind": "diffusers",
        "revision": None,
        "licence": "cc-by-nc-4.0",
    }
    (event,) = origin["history"]
    assert event["command"] == f"upcycle convert {pipeline_dir} --ratio 4 -o {export_dir} --json"
    assert event["source"] == str(pipeline_dir)
    assert event["options"]["ratio"] == 4
    assert event["options"]["seed"] == 0
    assert event["versions"]["upcycle"] == upcycle.__version__
    assert event["versions"].keys() >= {"torch", "diffusers", "safetensors", "python"}
    (found,) = origin["evidence"]
    assert found["metric"] == "largest difference from its teacher's outputs"
    assert 0 <= found["student"] <= 1e-5
    check_files(export_dir, origin)
    said = header(export_dir / "transformer/diffusion_pytorch_model.safetensors")
    assert said["base"] == origin["base"]
    assert said["history"] == [{**event, "command": f"upcycle convert {pipeline_dir} --ratio 4"}]


def test_of_a_hub_id_and_in_shards(dit, tmp_path, tmp_path_factory):
    tiny.save_pipeline(tmp_path / "repo", dit)
    with FakeHub() as hub, Worker(hub, tmp_path_factory.mktemp("home")) as worker:
        repo = hub.add("facebook/DiT-XL-2-256", tmp_path / "repo")
        options = ("--no-verify", "--max-shard-size", "300KB", "-o", tmp_path / "out")
        assert worker.run("convert", "facebook/DiT-XL-2-256", *options).code == 0
    origin = provenance.read(tmp_path / "out")
    assert (origin["base"]["id"], origin["base"]["revision"]) == ("facebook/DiT-XL-2-256", repo.commit().oid)
    check_files(tmp_path / "out", origin)
    shards = sorted((tmp_path / "out/transformer").glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        assert header(shard)["base"] == origin["base"]
        assert header(shard)["history"][0]["command"].endswith("--max-shard-size 300KB")


@pytest.mark.parametrize(
    ("command", "placeless"),
    [
        ("upcycle convert a -o b --ratio 4", "upcycle convert a --ratio 4"),
        ("upcycle convert a --out b", "upcycle convert a"),
        ("upcycle convert a --out=b --force --json --no-verify", "upcycle convert a"),
        ("upcycle convert a -ob", "upcycle convert a"),
        ("upcycle finetune r.yaml --set out=b --set seed=3", "upcycle finetune r.yaml --set seed=3"),
        ("upcycle finetune r.yaml --set=out=b --set=seed=3", "upcycle finetune r.yaml --set=seed=3"),
        ("upcycle convert 'a b' --seed 1", "upcycle convert 'a b' --seed 1"),
        (None, None),
    ],
)
def test_places_are_left_out_of_headers(command, placeless):
    done = {"what": "convert", "command": command, "recipe": {"out": "b", "seed": 3}}
    said = json.loads(provenance.metadata({"id": "x"}, [done])["upcycle"])
    assert said == {"base": {"id": "x"}, "history": [{"what": "convert", "command": placeless, "recipe": {"seed": 3}}]}
    assert done["recipe"]["out"] == "b", "the history itself is not changed"


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/usr/bin/upcycle", "convert", "a b"], "upcycle convert 'a b'"),
        (["/lib/upcycle/__main__.py", "finetune", "x", "--resume", "--debug"], "upcycle finetune x"),
        (["/lib/pytest/__main__.py", "-n", "0"], None),
        (["script.py", "convert"], None),
        ([""], None),
    ],
)
def test_the_command_is_ours_or_none(monkeypatch, argv, command):
    monkeypatch.setattr(sys, "argv", argv)
    assert provenance.command() == command


def test_equal_conversions_are_equal_files(pipeline_dir, monkeypatch, tmp_path):
    for out in ("one", "two"):
        monkeypatch.setattr(sys, "argv", ["upcycle", "convert", str(pipeline_dir), "-o", str(tmp_path / out)])
        convert(make_plan(open_source(str(pipeline_dir)), Options()), tmp_path / out)
    one, two = (
        {path.relative_to(tmp_path / out): path.read_bytes() for path in (tmp_path / out).rglob("*") if path.is_file()}
        for out in ("one", "two")
    )
    assert one.keys() == two.keys()
    assert [name.name for name in one if one[name] != two[name]] == [provenance.FILE], "which states the command"


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """A run with validation and previews."""
    out = tmp_path_factory.mktemp("runs") / "run"
    recipe = small(
        world, out, {"tail_drop": {"values": [0.0, 0.5]}},
        validation={"data": str(world / "held-out"), "every": 4, "samples": 8},
        preview={"every": 4, "labels": [0, 1], "steps": 2},
    )  # fmt: skip
    run_here(recipe)
    return recipe


def test_training_joins_the_history(trained, world):
    out = Path(trained.out)
    origin, start = provenance.read(out / "export"), provenance.read(out / "start")
    assert origin["base"] == start["base"]
    assert origin["base"]["id"] == str(world / "teacher")
    assert origin["history"][:-1] == start["history"]
    event = origin["history"][-1]
    assert (event["what"], event["steps"], event["exported_step"]) == ("finetune", 6, 6)
    assert event["data"] == {"data": str(world / "data"), "samples": 37}
    assert event["recipe"] == trained.model_dump(mode="json")
    said = header(out / WEIGHTS)
    assert said["base"] == origin["base"]
    recipe = {key: value for key, value in event["recipe"].items() if key != "out"}
    assert said["history"] == [
        *header(out / "start" / WEIGHTS.split("/", 1)[1])["history"],
        {**event, "recipe": recipe},
    ]
    check_files(out / "export", origin)


def test_training_leaves_evidence_and_pictures(trained):
    out = Path(trained.out)
    (found,) = provenance.read(out / "export")["evidence"]
    row = rows_of(out / "validation.csv")[-1]
    assert found["metric"] == "ε-MSE on held-out data"
    assert (found["student"], found["teacher"]) == (float(row["student"]), float(row["teacher"]))
    assert found["settings"] == {
        "data": trained.validation.data,
        "samples": 8,
        "timesteps": f"{len(TIMESTEPS)} from 50 to 950",
        "tail_drop": 0,
        "tokens_kept": round(float(row["tokens_kept"]), 1),
        "step": 6,
    }
    for name in ("samples", "router"):
        assert (out / "export/images" / f"{name}.png").read_bytes() == (
            out / "previews" / f"{name}-0000006.png"
        ).read_bytes()


def test_results_are_of_the_exported_step(trained, tmp_path):
    """The best step's, if that is what was exported; none where that step was not measured."""
    out = tmp_path / "run"
    shutil.copytree(trained.out, out, ignore=shutil.ignore_patterns("checkpoints", "export", "start"))
    lines = (out / "validation.csv").read_text().splitlines()
    columns = lines[0].split(",")
    first = dict(zip(columns, lines[1].split(","), strict=True))
    first["student"] = "0.001"
    (out / "validation.csv").write_text("\n".join([lines[0], ",".join(first[c] for c in columns), lines[2]]) + "\n")
    best = results.read(out, trained, 4)
    assert best.evidence[0]["student"] == 0.001
    assert best.evidence[0]["settings"]["step"] == 4
    assert best.pictures["samples.png"].name == "samples-0000004.png"
    last = results.read(out, trained, 6)
    assert last.evidence[0]["settings"]["step"] == 6
    (out / "validation.csv").write_text("\n".join(lines[:2]) + "\n")
    assert results.read(out, trained, 6).evidence == []
    (out / "validation.csv").unlink()
    shutil.rmtree(out / "previews")
    assert results.read(out, trained, 6) == results.Results()


def test_training_a_student_without_upcycle_json_keeps_its_base(world, tmp_path):
    """The header of its weights knows where it is from."""
    convert(make_plan(open_source(str(world / "teacher")), Options()), tmp_path / "student")
    base = provenance.read(tmp_path / "student")["base"]
    (tmp_path / "student" / provenance.FILE).unlink()
    run_here(small(world, tmp_path / "run", {"steps": 2}, student=str(tmp_path / "student"), convert={}))
    assert provenance.read(tmp_path / "run/export")["base"] == base
    assert base["licence"]


def test_a_resumed_run_has_the_same_export(world, monkeypatch, tmp_path):
    """The second command makes the first one's export again, from its last checkpoint."""
    path, export = write_recipe(tmp_path / "run.yaml", world, {"steps": 3}), tmp_path / "run/export"
    for more in ((), ("--resume",)):
        monkeypatch.setattr(sys, "argv", ["upcycle", "finetune", str(path), *more])
        with pytest.raises(SystemExit) as exit_info:
            main()
        assert not exit_info.value.code
        if not more:
            before = {file.relative_to(export): file.read_bytes() for file in export.rglob("*") if file.is_file()}
            shutil.rmtree(export)
    assert {file.relative_to(export): file.read_bytes() for file in export.rglob("*") if file.is_file()} == before
    event = provenance.read(export)["history"][-1]
    assert event["command"] == f"upcycle finetune {path}"
    assert event["steps"] == 3
    assert provenance.read(export)["history"][0]["command"] == event["command"], "the conversion was a part of it"


# -- the file ---------------------------------------------------------------------------------------------------------


def test_evidence_is_replaced_and_files_join_the_list(export_dir, tmp_path):
    folder = tmp_path / "export"
    shutil.copytree(export_dir, folder)
    found = {"metric": "FID", "better": "lower", "student": 3.0, "teacher": None, "settings": {"samples": 10}}
    provenance.add_evidence(folder, found)
    (folder / "images").mkdir()
    (folder / "images/samples.png").write_bytes(b"picture")
    (folder / "README.md").write_text("edited by people")
    (folder / ".cache").mkdir()
    (folder / ".cache/x").write_text("")
    other = {**found, "settings": {"samples": 20}}
    (folder / "diary.txt").write_text("not a part of it")
    provenance.add_evidence(folder, {**found, "student": 2.0}, other, drawn=["images/samples.png"])
    now = provenance.read(folder)
    assert now["evidence"][1:] == [{**found, "student": 2.0}, other]
    assert now["files"]["images/samples.png"]["sha256"] == hashlib.sha256(b"picture").hexdigest()
    assert now["files"].keys() - provenance.read(export_dir)["files"].keys() == {"images/samples.png"}
    provenance.add_evidence(folder, {**found, "student": float("nan")})
    assert provenance.read(folder)["evidence"][-1]["student"] is None, "JSON knows no NaN"
    # A picture that is drawn again, as by --measure run twice.
    (folder / "images/samples.png").write_bytes(b"another picture")
    weights = folder / "transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(bytes(weights.stat().st_size))
    provenance.add_evidence(folder, found, drawn=["images/samples.png"])
    said = provenance.read(folder)["files"]
    assert said["images/samples.png"]["sha256"] == hashlib.sha256(b"another picture").hexdigest()
    assert said[str(weights.relative_to(folder))]["sha256"] != hashlib.sha256(weights.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"base": 1, "history": [], "evidence": [], "files": {}}', "\xff"]
)
def test_damaged(tmp_path, text):
    (tmp_path / provenance.FILE).write_text(text, encoding="latin-1")
    with pytest.raises(UpcycleError, match="is damaged"):
        provenance.read(tmp_path)


EVENT = {"what": "finetune", "steps": 3, "recipe": {"data": "x", "batch_size": 2, "seed": 0, "stages": []}}
FOUND = {"metric": "FID", "better": "lower", "student": 2.0, "teacher": None, "settings": {"samples": 10}}
GOOD = {
    "base": {"id": "a/b"}, "history": [EVENT], "evidence": [FOUND], "files": {"x": {"bytes": 1, "sha256": "0"}}
}  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"base": {"id": 3}}, "base.id"),
        ({"base": {"licence": ["mit"]}}, "base.licence"),
        ({"history": ["finetune"]}, "history.0"),
        ({"history": [{"what": "finetune", "steps": 3}]}, "history.0: value error, steps without a recipe"),
        ({"history": [EVENT | {"recipe": EVENT["recipe"] | {"stages": [{}]}}]}, "stages.0.tail_drop"),
        ({"history": [EVENT | {"versions": {"torch": 2}}]}, "versions.torch"),
        ({"history": [EVENT | {"command": ["rm"]}]}, "command"),
        ({"evidence": [FOUND | {"student": "good"}]}, "evidence.0.student"),
        ({"evidence": [FOUND | {"settings": {"data": [1]}}]}, "evidence.0.settings.data"),
        ({"files": {"x": {"bytes": "1", "sha256": "0"}}}, "files.x.bytes"),
    ],
)
def test_what_strangers_write_is_checked(wrong, where):
    assert provenance.parse(json.dumps(GOOD)) == GOOD
    with pytest.raises(ValueError, match=re.escape(where)) as error:
        provenance.parse(json.dumps(GOOD | wrong))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("deep", [500, 900, 2000, 100_000])
def test_nested_too_deeply(deep):
    text = json.dumps({**GOOD, "more": 0})
    with contextlib.suppress(ValueError):
        provenance.parse(text.replace('"more": 0', f'"more": {"[" * deep}{"]" * deep}'))


@pytest.mark.parametrize("said", ["", "{}", '{"base": {}, "history": 3}', "[" * 100_000])
def test_a_damaged_header(said):
    with pytest.raises(UpcycleError, match="header of its weights is damaged"):
        provenance.extended({"format": "pt", "upcycle": said}, {"what": "export"})


def test_none(tmp_path):
    assert provenance.read(tmp_path) is None
