"""The real commands in a subprocess, on real tiny checkpoints."""

import json
import re

import tiny
import torch
from conftest import run
from fake_hub import FakeHub
from PIL import Image

from upcycle.graft.verify import load_student

ID = "facebook/DiT-XL-2-256"


def test_convert_from_the_hub_as_the_readme_says(dit, tmp_path):
    """`upcycle convert facebook/DiT-XL-2-256 --ratio 4`, the repository in the layout of the real one."""
    tiny.save_pipeline(tmp_path / "repo", dit, legacy_config=True)
    with FakeHub() as hub:
        hub.add(ID, tmp_path / "repo")
        env = hub.env(tmp_path / "home")
        done = run("convert", ID, "--ratio", "4", "--json", env=env, cwd=tmp_path)
        fetched = len(hub.downloads())
        assert fetched
        again = run("convert", ID, "--ratio", "4", "--force", "--json", env=env, cwd=tmp_path)
        assert len(hub.downloads()) == fetched, "what is cached is not fetched again"
    report = json.loads(done.stdout)
    out = tmp_path / "DiT-XL-2-256-dc4"
    assert report["out"] == "DiT-XL-2-256-dc4"
    assert report["max_abs_diff"] <= 1e-5
    assert {"model_index.json", "transformer", "vae", "scheduler"} <= {path.name for path in out.iterdir()}
    assert json.loads((out / "model_index.json").read_text())["id2label"]["3"] == "label 3"
    assert report == json.loads(again.stdout)
    # offline, once cached
    offline = run("convert", ID, "-o", tmp_path / "offline", "--no-verify", env={**env, "HF_HUB_OFFLINE": "1"})
    assert offline.returncode == 0
    unreachable = run("convert", ID, "-o", tmp_path / "unreachable", "--no-verify", env=env)
    assert unreachable.returncode == 0


def test_vae_from_a_folder_and_from_the_hub_makes_a_pt_samplable(pipeline_dir, tmp_path):
    pt = tiny.GOLDEN / "meta_dit_tiny.pt"
    alone = run("convert", pt, "-o", tmp_path / "alone", "--no-verify")
    assert "transformer alone" in alone.stdout
    assert not (tmp_path / "alone" / "model_index.json").exists()
    run("convert", pt, "-o", tmp_path / "local", "--no-verify", "--vae", pipeline_dir)
    with FakeHub() as hub:
        hub.add("someone/vae", pipeline_dir / "vae")
        run("convert", pt, "-o", tmp_path / "hub", "--no-verify", "--vae", "someone/vae", env=hub.env(tmp_path / "h"))
    for name in ("local", "hub"):
        assert (tmp_path / name / "vae" / "diffusion_pytorch_model.safetensors").is_file()
        index = json.loads((tmp_path / name / "model_index.json").read_text())
        assert index["scheduler"] == ["diffusers", "DDIMScheduler"]
    done = run("sample", tmp_path / "hub", "--classes", "1", "--steps", "2", "-o", tmp_path / "drawn", "--json")
    assert json.loads(done.stdout)["images"] == 1


def test_dry_run_tells_the_plan_and_writes_nothing(pipeline_dir, export_dir, tmp_path):
    done = run("convert", pipeline_dir, "--ratio", "16", "--dry-run", "--json", cwd=tmp_path)
    plan = json.loads(done.stdout)
    assert list(tmp_path.iterdir()) == []
    assert plan["parameters"]["reused"] > plan["parameters"]["fresh"] > 0
    assert plan["tokens_kept"] == 16
    student = plan["flops_per_image"]["student"]
    assert student["0"] > student["0.3"] > student["0.6"]
    assert plan["peak_memory_bytes"] > 0
    assert run("convert", pipeline_dir, "--dry-run", cwd=tmp_path).stdout.count("FLOPs per image") == 4
    # The bytes promised are the bytes written, up to headers and JSON.
    same = json.loads(run("convert", pipeline_dir, "--dry-run", "--json", cwd=tmp_path).stdout)
    weights = (export_dir / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    vae = sum(f.stat().st_size for name in ("vae", "scheduler") for f in (export_dir / name).iterdir())
    assert 0 <= weights + vae - same["writes"]["bytes"] < 50_000


def test_sample_draws_alike_from_teacher_and_student(pipeline_dir, export_dir, tmp_path):
    """The exact graft: same seeds, same pictures, whatever the batch size; with guidance and ten classes."""
    common = ["--classes", "1,label 9", "--num", "2", "--seed", "7", "--steps", "3"]
    run("sample", pipeline_dir, *common, "-o", tmp_path / "teacher")
    done = run("sample", export_dir, *common, "-o", tmp_path / "student", "--batch-size", "1", "--json")
    assert json.loads(done.stdout)["tokens_kept"] == 64
    names = sorted(path.name for path in (tmp_path / "teacher").iterdir())
    assert names == ["class0001-seed7.png", "class0001-seed8.png", "class0009-seed10.png", "class0009-seed9.png",
                     "samples.png"]  # fmt: skip
    for name in names:
        teacher, student = (pixels(tmp_path / side / name) for side in ("teacher", "student"))
        assert (teacher - student).abs().max() <= 1, name
    run("sample", export_dir, *common, "-o", tmp_path / "dropped", "--tail-drop", "0.5")
    assert (pixels(tmp_path / "dropped" / names[0]) - pixels(tmp_path / "student" / names[0])).abs().max() > 1


def pixels(path):
    image = Image.open(path).convert("RGB")
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int()


def test_force_replaces_and_nothing_hidden_stays(pipeline_dir, tmp_path):
    for _ in range(2):
        run("convert", pipeline_dir, "-o", tmp_path / "out", "--no-verify", "--force")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    load_student(tmp_path / "out")


def test_conversion_is_reproducible(pipeline_dir, export_dir, tmp_path):
    run("convert", pipeline_dir, "--ratio", "4", "-o", tmp_path / "again", "--no-verify")
    name = "transformer/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (export_dir / name).read_bytes()


def test_help_has_examples_for_every_command():
    commands = re.findall(r"^│ (\w[\w-]*) ", run("--help").stdout.split("Commands")[1], flags=re.M)
    assert {"demo", "convert", "finetune", "sample"} <= set(commands)
    for command in commands:
        assert f"upcycle {command}" in run(command, "--help").stdout.split("Examples")[1]


def test_importing_the_package_is_light():
    """Nothing heavy comes with `import upcycle` or the command line's parsing."""
    import subprocess
    import sys

    heavy = "('torch', 'diffusers', 'numpy', 'pydantic')"
    code = f"import sys, upcycle, upcycle.cli; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
