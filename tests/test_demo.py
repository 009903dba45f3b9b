"""The demo through the real command, shortened: everything it promises is there and says the same."""

import json

import pytest
from conftest import run
from PIL import Image

from upcycle.training.digits import TEACHER


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    work = tmp_path_factory.mktemp("demo")
    done = run("demo", "--steps", "8", "--json", cwd=work, timeout=400)
    return work / "upcycle-demo", json.loads(done.stdout), done


def test_everything_is_written(demo):
    out, report, _ = demo
    assert {path.name for path in out.iterdir()} == {
        "pipeline", "samples.png", "router.png", "compression.png", "report.json",
    }  # fmt: skip
    assert json.loads((out / "report.json").read_text()) == report
    for name in ("samples.png", "router.png", "compression.png"):
        image = Image.open(out / name).convert("L")
        assert min(image.size) > 200
        assert len(image.getcolors(256)) > 20, "a picture, not a blank page"


def test_report(demo):
    _, report, _ = demo
    assert report["max_abs_diff_at_start"] <= 1e-5
    assert report["steps"] == 8
    for side in ("teacher", "student"):
        assert 0 < report[side]["val_loss"] < 1
        assert report[side]["flops_per_image"] > 0
        assert report[side]["seconds_per_image"] > 0
    assert 0 < report["tokens_kept"] < report["positions"]
    assert report["student"]["val_loss_at_start"] == pytest.approx(report["teacher"]["val_loss"], abs=1e-6)
    assert report["student"]["pipeline"].startswith("diffusers.")
    assert report["student"]["transformer"].startswith("chunked_dit_"), "loaded from the export's own code"


def test_stdout_is_one_json_object_and_a_second_run_asks_for_force(demo):
    out, _, done = demo
    assert done.stdout.lstrip().startswith("{")
    again = run("demo", "--steps", "8", "-o", out, check=False)
    assert again.returncode == 2
    assert "--force" in again.stderr


def test_shipped_teacher_is_small_and_a_stock_pipeline():
    weights = TEACHER / "transformer" / "diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size <= 4_000_000
    index = json.loads((TEACHER / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "DiTTransformer2DModel"]
    assert json.loads((TEACHER / "transformer" / "config.json").read_text())["patch_size"] == 2
