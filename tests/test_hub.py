"""Fetching from the Hub: every scenario talks HTTP to a local server, from a process of its own."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
from fake_hub import FakeHub

NAME = "facebook/DiT-XL-2-256"

# Opens each source of a JSON list of `open_source` arguments; prints what came of each as one JSON list.
DRIVER = """
import json, sys
from upcycle.errors import UpcycleError
from upcycle.sources import open_source

answers = []
for call in json.loads(sys.argv[1]):
    try:
        source = open_source(**call)
    except UpcycleError as error:
        answers.append({"error": str(error)})
        continue
    total = sum(tensor.load().double().sum().item() for tensor in source.tensors.values())
    answers.append({
        "name": source.name, "revision": source.revision, "licence": source.licence, "total": total,
        "components": {name: sorted(p.name for p in folder.iterdir()) for name, folder in source.components.items()},
        "labels": (source.model_index or {}).get("id2label"), "notes": source.notes,
        "files": sorted({tensor.place.path.name for tensor in source.tensors.values()}),
    })
print(json.dumps(answers))
"""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as server:
        yield server


def open_all(env: dict[str, str], *calls: dict) -> list[dict]:
    """Results of `open_source(**call)` for each call, in a fresh process; no token may be printed."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(calls)], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert FakeHub.token not in done.stdout + done.stderr
    answers = json.loads(done.stdout)
    for answer in answers:
        assert "\n" not in answer.get("error", "")
    return answers


def total(model) -> float:
    """Sum of all weights, which tells one model from another."""
    return sum(tensor.double().sum().item() for tensor in model.state_dict().values())


def test_legacy_pipeline_is_fetched_cached_and_used_offline(hub: FakeHub, tmp_path: Path) -> None:
    model = tiny.make_dit(0)
    folder = tiny.save_pipeline(tmp_path / "repo", model, legacy_config=True)
    # Other formats of the same weights, which must not be downloaded.
    for name in ("transformer/diffusion_pytorch_model.bin", "transformer/diffusion_pytorch_model.fp16.safetensors"):
        (folder / name).write_bytes(b"not wanted")
    (folder / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"not wanted")
    (folder / "sample.png").write_bytes(b"not wanted")
    repo = hub.add(NAME, folder)
    env = hub.env(tmp_path / "home")

    (first,) = open_all(env, {"spec": NAME})
    assert first["name"] == "DiT-XL-2-256"
    assert first["revision"] == repo.commit("main")[0]
    assert first["licence"] == "cc-by-nc-4.0"
    assert first["total"] == pytest.approx(total(model))
    assert first["labels"]["3"] == "label 3"
    assert first["components"] == {
        "vae": ["config.json", "diffusion_pytorch_model.safetensors"],
        "scheduler": ["scheduler_config.json"],
    }
    assert sorted(hub.downloads()) == [
        "README.md",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ]

    hub.requests.clear()
    offline, by_commit = open_all(
        {**env, "HF_HUB_OFFLINE": "1"}, {"spec": NAME}, {"spec": NAME, "revision": first["revision"]}
    )
    assert offline == by_commit == first
    assert hub.requests == []

    repo.fail_with = 503  # a Hub in trouble is no reason not to use the cache
    assert open_all(env, {"spec": NAME}) == [first]
    hub.__exit__()  # no network at all
    assert open_all(env, {"spec": NAME}) == [first]


def test_revisions_shards_and_bin(hub: FakeHub, tmp_path: Path) -> None:
    models = [tiny.make_dit(seed) for seed in range(4)]
    hub.add(NAME, tiny.save_pipeline(tmp_path / "a", models[0], bin=True))
    hub.add(NAME, tiny.save_pipeline(tmp_path / "b", models[1], max_shard_size="200KB"), revision="v2")
    # A transformer at top level, with only fp16 weights.
    hub.add("org/bare", tiny.save_transformer(tmp_path / "c", models[2].half(), variant="fp16"))
    plain, tagged, bare, wrong = open_all(
        hub.env(tmp_path / "home"),
        {"spec": NAME},
        {"spec": NAME, "revision": "v2"},
        {"spec": "org/bare"},
        {"spec": NAME, "variant": "fp16"},
    )
    assert plain["files"] == ["diffusion_pytorch_model.bin"]
    assert plain["total"] == pytest.approx(total(models[0]))
    assert plain["components"]["vae"] == ["config.json", "diffusion_pytorch_model.bin"]
    assert len(tagged["files"]) > 1
    assert tagged["total"] == pytest.approx(total(models[1]))
    assert tagged["revision"] != plain["revision"]
    assert bare["total"] == pytest.approx(total(models[2]))
    assert bare["notes"] == ["only fp16 weights are there; they are used"]
    assert bare["components"] == {}
    assert "'fp16'" in wrong["error"]


def test_errors_are_one_line_each(hub: FakeHub, tmp_path: Path) -> None:
    folder = tiny.save_pipeline(tmp_path / "repo", tiny.make_dit(0))
    hub.add(NAME, folder)
    hub.add("org/gated", folder, gated=True)
    hub.add("org/private", folder, private=True)
    broken = hub.add("org/broken", tiny.save_pipeline(tmp_path / "broken", tiny.make_dit(0)))
    broken.missing.add("transformer/diffusion_pytorch_model.safetensors")
    (tmp_path / "broken/transformer/diffusion_pytorch_model.safetensors").unlink()
    flux = tmp_path / "flux"
    (flux / "transformer").mkdir(parents=True)
    (flux / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    (flux / "transformer/config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    (flux / "transformer/diffusion_pytorch_model.safetensors").write_bytes(b"24 GB")
    hub.add("org/flux", flux)
    single = tmp_path / "single"
    single.mkdir()
    (single / "DiT-XL-2-256x256.pt").write_bytes(b"2.7 GB")
    hub.add("org/single", single)
    calls = {
        "no/such": ["no/such: no such local path and no such model on the Hub", "hf auth login"],
        "org/gated": [f"accept its terms at {hub.url}/org/gated", "hf auth login"],
        "org/private": ["a private one"],
        "org/broken": ["a file listed in the repository is not there"],
        "org/flux": ["is a FluxTransformer2DModel, not a class-conditional DiT"],
        "org/single": ["it holds DiT-XL-2-256x256.pt", "give the path of that file"],
        "nameonly": ["no such file or folder, and no Hub id"],
        "": ["(empty)"],
        "org/a--b": ["nor a valid Hub id"],
    }
    env = hub.env(tmp_path / "home")
    *answers, revision = open_all(env, *({"spec": spec} for spec in calls), {"spec": NAME, "revision": "nope"})
    for (spec, parts), answer in zip(calls.items(), answers, strict=True):
        for part in parts:
            assert part in answer["error"], spec
    assert "has no revision 'nope'" in revision["error"]
    heavy = ("/org/flux/resolve/", "/org/single/resolve/")
    assert not any(part in line and line.endswith((".safetensors", ".pt")) for line in hub.requests for part in heavy)

    # With the right token, the doors open; a wrong one is named as such.
    gated, private = open_all({**env, "HF_TOKEN": hub.token}, {"spec": "org/gated"}, {"spec": "org/private"})
    assert gated["total"] == private["total"] == pytest.approx(total(tiny.make_dit(0)))


def test_server_faults_without_a_cache(hub: FakeHub, tmp_path: Path) -> None:
    faults = {429: "asks for a pause (429", 503: "an error (503); try again later", 403: "denies access (403)"}
    for status in faults:
        hub.add(f"org/fault-{status}", tmp_path).fail_with = status
    answers = open_all(hub.env(tmp_path / "home"), *({"spec": f"org/fault-{status}"} for status in faults))
    for part, answer in zip(faults.values(), answers, strict=True):
        assert part in answer["error"]


def test_without_network_and_cache(hub: FakeHub, tmp_path: Path) -> None:
    folder = tiny.save_pipeline(tmp_path / "repo", tiny.make_dit(0))
    hub.add(NAME, folder)
    env = hub.env(tmp_path / "home")
    offline = {**env, "HF_HUB_OFFLINE": "1"}
    (answer,) = open_all(offline, {"spec": NAME})
    assert "HF_HUB_OFFLINE is set" in answer["error"]

    # A cache that lacks the weights is as good as none.
    open_all(env, {"spec": NAME})
    for path in (tmp_path / "home").rglob("snapshots/*/transformer/*.safetensors"):
        path.unlink()
    (answer,) = open_all(offline, {"spec": NAME})
    assert "the model is not all in the cache" in answer["error"]

    hub.__exit__()
    (answer,) = open_all(hub.env(tmp_path / "other"), {"spec": NAME})
    assert "the Hub cannot be reached" in answer["error"]


def test_full_disk(hub: FakeHub, tmp_path: Path) -> None:
    """The cache lies on a file system of 256 KB; needs the right to mount one."""
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(small)]
    try:
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("no right to mount a small file system")
    except FileNotFoundError:
        pytest.skip("no mount command")
    try:
        hub.add(NAME, tiny.save_pipeline(tmp_path / "repo", tiny.make_dit(0)))
        (answer,) = open_all(hub.env(small), {"spec": NAME})
    finally:
        subprocess.run(["umount", str(small)], check=True)
    assert "no space left in" in answer["error"]
    assert "HF_HOME" in answer["error"]
