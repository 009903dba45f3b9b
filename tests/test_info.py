"""`upcycle info`: what is said of every kind of model, and that of weights on the Hub only headers are read."""

import copy
import json
import shutil
from collections.abc import Iterator

import pytest
import tiny
import torch
from fake_hub import FakeHub
from safetensors import safe_open
from safetensors.torch import load_file
from worker import Worker

from upcycle import provenance
from upcycle.graft.convert import convert
from upcycle.graft.plan import Options, make_plan
from upcycle.info import _shape, describe
from upcycle.output import to_json
from upcycle.sources import open_source
from upcycle.sources.dit_config import read_dit_config

BASE = "facebook/DiT-XL-2-256"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
HEADER = 100_001
"""What `huggingface_hub` asks for at first, as most headers are shorter."""


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with FakeHub() as server:
        yield server


@pytest.fixture(scope="module")
def worker(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with Worker(hub, tmp_path_factory.mktemp("home")) as process:
        yield process


@pytest.fixture(autouse=True)
def clean(hub: FakeHub) -> None:
    hub.requests.clear()
    hub.log.clear()


def weights_sent(hub: FakeHub) -> list[tuple[str | None, int]]:
    """Range and bytes of every answer with weights in it."""
    return [
        (e.range, e.sent) for e in hub.log if e.line.startswith("GET") and e.line.endswith((".safetensors", ".bin"))
    ]


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# -- students ---------------------------------------------------------------------------------------------------------


def test_export(export_dir, export_json, pipeline_dir):
    facts = describe(str(export_dir))
    assert facts["kind"] == "student"
    assert (facts["scaffold"], facts["router"], facts["ratio"]) == ("lean", "predictability", 4.0)
    assert facts["tail_drop"] == {"default": 0.0, "trained_with": None}
    assert facts["parameters"] == sum(export_json["parameters"].values())
    assert facts["dtypes"] == {"F32": facts["parameters"]}
    assert facts["flops_per_image"] == export_json["flops_per_image"]["student"]
    assert facts["licence"] == "cc-by-nc-4.0"
    assert facts["revision"] is None
    assert facts["shape"] == {
        "name": None, "layers": 2, "heads": 2, "width": 64, "patch_size": 2,
        "sample_size": 16, "in_channels": 4, "out_channels": 8, "num_classes": 10,
    }  # fmt: skip
    with safe_open(export_dir / WEIGHTS, "pt") as file:
        assert sum(file.get_tensor(name).numel() for name in file.keys()) == facts["parameters"]  # noqa: SIM118
    assert 0 <= (export_dir / WEIGHTS).stat().st_size - facts["bytes"] < 20_000
    assert facts["provenance"] == provenance.read(export_dir)
    assert facts["provenance"]["base"]["id"] == str(pipeline_dir)


def test_trained_export_and_table(worker, export_dir, tmp_path):
    shutil.copytree(export_dir, tmp_path / "trained")
    now = provenance.read(tmp_path / "trained")
    stages = [{"tail_drop": {"values": [0.0, 0.6]}}, {"tail_drop": {"values": [0.3, 0.0]}}]
    recipe = {"data": "latents", "batch_size": 8, "seed": 0, "stages": stages}
    done = {"what": "finetune", "command": "upcycle finetune x.yaml", "steps": 5, "recipe": recipe}
    provenance.write(tmp_path / "trained", {**now["base"], "licence": None}, [*now["history"], done])
    loss = {"metric": "ε-MSE", "better": "lower", "student": 0.25, "teacher": None, "settings": {}}
    provenance.add_evidence(tmp_path / "trained", loss, {**loss, "metric": "FID", "student": float("nan")})
    facts = worker.run("info", tmp_path / "trained", "--json").json
    assert facts["tail_drop"]["trained_with"] == [0.0, 0.3, 0.6]
    shown = worker.run("info", tmp_path / "trained")
    assert shown.code == 0, shown.err
    words = " ".join(shown.out.replace("│", " ").split())
    for part in (
        "kind student",
        "2 of width 64, 2 heads, patch 2",
        "4 x 16 x 16, 10 classes",
        "lean, predictability router",
        "4: about 64 of 256 tokens",
        "0 by default; trained with 0, 0.3, 0.6",
        "FLOPs per image, ρ=0.6",
        "licence not known",
        "finetune upcycle finetune x.yaml",
        "ε-MSE 0.25, teacher not measured",
        "FID not measured",
        "each with its SHA-256",
    ):
        assert part in words, part
    (tmp_path / "trained" / provenance.FILE).unlink()
    bare = worker.run("info", tmp_path / "trained")
    assert "this is from the weights' header" in bare.out
    assert "upcycle convert" in bare.out


def test_a_student_that_was_saved_as_bin(worker, export_dir, tmp_path):
    shutil.copytree(export_dir, tmp_path / "bin")
    weights = tmp_path / "bin/transformer/diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()
    facts = worker.run("info", tmp_path / "bin", "--json").json
    assert facts["licence"] == "cc-by-nc-4.0"
    (tmp_path / "bin" / provenance.FILE).unlink()
    assert worker.run("info", tmp_path / "bin", "--json").json["provenance"] is None


def test_a_single_file(worker, export_dir, tmp_path):
    file = tmp_path / "one.safetensors"
    assert worker.run("export", export_dir, "--to", "single", "-o", file).code == 0
    facts, whole = (worker.run("info", model, "--json").json for model in (file, export_dir))
    for key in ("kind", "shape", "parameters", "ratio", "flops_per_image", "licence"):
        assert facts[key] == whole[key], key
    assert [event["what"] for event in facts["provenance"]["history"]] == ["convert", "export"]


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_layers", 10**9), ("num_layers", True), ("ratio", "nan"), ("ratio", -1), ("sample_size", None),
     ("sample_size", 16.5), ("tail_drop", 1.0), ("beta_end", 0), ("num_attention_heads", 10**7)],
)  # fmt: skip
def test_hostile_configs_end_with_a_line(worker, export_dir, tmp_path, key, value):
    shutil.copytree(export_dir, tmp_path / "bad")
    path = tmp_path / "bad/transformer/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    assert f"transformer/config.json describes no ChunkedDiT ({key} " in worker.run("info", tmp_path / "bad").error


def test_control_characters_do_not_reach_the_terminal(worker, export_dir, tmp_path):
    shutil.copytree(export_dir, tmp_path / "odd")
    now = provenance.read(tmp_path / "odd")
    now["history"][0]["command"] = "upcycle\x1b[31m convert\nrm -rf"
    (tmp_path / "odd" / provenance.FILE).write_text(json.dumps(now))
    assert "\x1b" not in worker.run("info", tmp_path / "odd", "--json").out + worker.run("info", tmp_path / "odd").out


# -- teachers ---------------------------------------------------------------------------------------------------------


def test_teachers(worker, dit, tmp_path):
    """Folders in every layout, Meta's file, the authors' file."""
    layouts = {
        "plain": tiny.save_pipeline(tmp_path / "plain", dit),
        "legacy": tiny.save_pipeline(tmp_path / "legacy", dit, legacy_config=True),
        "sharded": tiny.save_pipeline(tmp_path / "sharded", dit, max_shard_size="200KB"),
        "bin": tiny.save_pipeline(tmp_path / "bin", dit, bin=True),
        "bare": tiny.save_transformer(tmp_path / "bare", dit),
    }
    found = {name: describe(str(folder)) for name, folder in layouts.items()}
    expected = found["plain"]
    assert (expected["kind"], expected["parameters"], expected["licence"]) == ("teacher", count(dit), "cc-by-nc-4.0")
    assert expected["flops_per_image"].keys() == {"0"}
    assert expected["provenance"] is None
    assert "scaffold" not in expected
    for name, facts in found.items():
        licence = None if name == "bare" else "cc-by-nc-4.0"
        assert facts == {**expected, "model": str(layouts[name]), "licence": licence}, name
    half = describe(str(tiny.save_pipeline(tmp_path / "half", copy.deepcopy(dit).half(), variant="fp16")))
    assert half["dtypes"] == {"F16": count(dit)}
    assert half["bytes"] * 2 == expected["bytes"]

    meta = worker.run("info", tiny.GOLDEN / "meta_dit_tiny.pt", "--json").json
    assert meta["kind"] == "teacher"
    assert meta["shape"]["patch_size"] == 2
    authors = worker.run("info", tiny.save_dcdit_pt(tmp_path / "authors.pt"), "--json").json
    size = tiny.dcdit_description()
    assert authors["kind"] == "dc-dit"
    assert (authors["shape"]["layers"], authors["shape"]["width"]) == (size["layers"], size["d_model"])
    assert authors["flops_per_image"] is None
    for path in (tmp_path / "authors.pt", tiny.GOLDEN / "meta_dit_tiny.pt", tmp_path / "bin"):
        assert worker.run("info", path).code == 0


def test_sizes_are_named(tmp_path):
    config = {"_class_name": "DiTTransformer2DModel", "num_attention_heads": 16, "attention_head_dim": 72,
              "in_channels": 4, "out_channels": 8, "num_layers": 28, "sample_size": 32, "patch_size": 2,
              "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_zero"}  # fmt: skip
    assert _shape(read_dit_config("of a test", config))["name"] == "XL/2"


# -- the Hub ----------------------------------------------------------------------------------------------------------


def test_of_a_teacher_on_the_hub_only_headers_are_read(hub, worker, dit, tmp_path):
    big = tiny.make_dit(0, layers=8)
    layouts = {
        "org/plain": tiny.save_pipeline(tmp_path / "plain", big, legacy_config=True),
        "org/sharded": tiny.save_pipeline(tmp_path / "sharded", big, max_shard_size="2MB"),
    }
    for name, folder in layouts.items():
        repo = hub.add(name, folder)
        sizes = [path.stat().st_size for path in (folder / "transformer").glob("*.safetensors")]
        hub.log.clear()
        facts = worker.run("info", name, "--json").json
        sent = weights_sent(hub)
        assert sent == [("bytes=0-100000", HEADER)] * len(sizes)
        assert sum(n for _, n in sent) < sum(sizes) / 5
        local = describe(str(folder))
        assert facts == json.loads(to_json({**local, "model": name, "revision": repo.commit().oid}))
        assert not any(line.startswith(f"GET /{name}/resolve/") and "/vae/diff" in line for line in hub.requests)
    assert len(sizes) > 1


def test_a_header_that_is_longer_than_the_first_range(hub, worker, tmp_path):
    folder = tiny.save_transformer(tmp_path / "deep", tiny.make_dit(0, layers=60, width=8, heads=2))
    path = folder / "diffusion_pytorch_model.safetensors"
    length = int.from_bytes(path.read_bytes()[:8], "little")
    assert length > HEADER
    hub.add("org/deep", folder)
    facts = worker.run("info", "org/deep", "--json").json
    assert facts["parameters"] == describe(str(folder))["parameters"]
    assert weights_sent(hub) == [("bytes=0-100000", HEADER), (f"bytes=8-{length + 7}", length)]


def test_a_pickle_on_the_hub_is_not_fetched(hub, worker, dit, tmp_path):
    hub.add("org/bin", tiny.save_pipeline(tmp_path / "bin", dit, bin=True))
    facts = worker.run("info", "org/bin", "--json").json
    assert (facts["kind"], facts["parameters"], facts["bytes"]) == ("teacher", None, None)
    assert weights_sent(hub) == []
    assert "weights are a pickle" in worker.run("info", "org/bin").out


def test_student_on_the_hub(hub, worker, export_dir, tmp_path):
    """What the folder says, but for the id; the licence is the base's, whatever a card says."""
    folder = tmp_path / "student"
    shutil.copytree(export_dir, folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    repo = hub.add("me/student", folder)
    hub.add("me/student", folder, revision="v2")
    for revision, options in (("main", ()), ("v2", ("--revision", "v2"))):
        facts = worker.run("info", "me/student", "--json", *options).json
        assert facts == json.loads(
            to_json({**describe(str(folder)), "model": "me/student", "revision": repo.commit(revision).oid})
        )
    assert all(asked and n <= HEADER for asked, n in weights_sent(hub))
    assert "at " + repo.commit().oid[:12] in worker.run("info", "me/student").out


def test_what_is_cached_is_enough_without_a_network(hub, worker, dit, tmp_path):
    hub.add("org/cached", tiny.save_pipeline(tmp_path / "repo", dit))
    assert worker.run("convert", "org/cached", "--dry-run").code == 0
    online = worker.run("info", "org/cached", "--json")
    worker.do("from huggingface_hub import constants\nconstants.HF_HUB_OFFLINE = True")
    hub.requests.clear()
    try:
        offline = worker.run("info", "org/cached", "--json")
    finally:
        worker.do("constants.HF_HUB_OFFLINE = False")
    assert offline.code == 0, offline.err
    assert offline.json == online.json
    assert hub.requests == []


# -- errors -----------------------------------------------------------------------------------------------------------


def test_errors(hub, worker, export_dir, dit, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(export_dir, broken)
    (broken / WEIGHTS).write_bytes((export_dir / WEIGHTS).read_bytes()[:2000])
    assert str(broken) in worker.run("info", broken).error
    shutil.copyfile(export_dir / WEIGHTS, broken / WEIGHTS)
    for text in ("{", "[]", '{"base": {}, "history": [1], "evidence": [], "files": {}}',
                 '{"base": {}, "history": [], "evidence": [{"metric": "FID"}], "files": {}}',
                 '{"base": {}, "history": [], "evidence": [], "files": {"a": 1}}'):  # fmt: skip
        (broken / provenance.FILE).write_text(text)
        assert "upcycle.json is damaged" in worker.run("info", broken).error, text
    (broken / provenance.FILE).unlink()
    config = broken / "transformer/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_attention_heads": "two"}))
    assert "describes no ChunkedDiT" in worker.run("info", broken).error

    flux = tmp_path / "flux"
    flux.mkdir()
    (flux / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    hub.add("org/flux", flux)
    hub.add("org/gated", tiny.save_pipeline(tmp_path / "repo", dit), gated=True)
    hub.add("org/private", tmp_path / "repo", private=True)
    damaged = tiny.save_pipeline(tmp_path / "damaged", dit)
    (damaged / WEIGHTS).write_bytes(b"\xff" * 200_000)
    hub.add("org/damaged", damaged)
    for spec, why in {
        str(tmp_path / "none"): "no such file or folder",
        "no/such": "no such model on the Hub",
        "org/flux": "is a FluxPipeline",
        "org/gated": "access is restricted",
        "org/private": "a private one",
        "org/damaged": f"{WEIGHTS} is no safetensors file",
    }.items():
        error = worker.run("info", spec, token=None).error
        assert spec in error
        assert why in error
    assert "has no revision 'v9'" in worker.run("info", "org/flux", "--revision", "v9").error
    assert "has no revisions" in worker.run("info", export_dir, "--revision", "v9").error
    assert worker.run("info", "org/gated").code == 0


def test_info_of_an_export_in_shards(pipeline_dir, tmp_path):
    convert(make_plan(open_source(str(pipeline_dir)), Options()), tmp_path / "out", max_shard_bytes=300_000)
    shards = list((tmp_path / "out/transformer").glob("*.safetensors"))
    assert len(shards) > 1
    assert describe(str(tmp_path / "out"))["parameters"] == sum(
        sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118
        for file in (safe_open(shard, "pt") for shard in shards)
    )
