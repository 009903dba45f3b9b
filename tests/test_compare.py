"""`upcycle compare`: figures are of what was drawn, rows of one model and setting agree; no speed is asserted."""

import json

import pytest
import tiny
import torch
from conftest import inside
from PIL import Image

from upcycle.cli.sampler import parse_hold
from upcycle.evaluation import compare as measuring
from upcycle.evaluation.flops import chunked_dit_flops, dit_flops
from upcycle.models import ddit
from upcycle.sampling.pipeline import load_pipeline
from upcycle.sampling.sampler import Hold, Sampling, set_sampler

LABELS, SEEDS = [3, 0, 7], [5, 6, 7]


@pytest.fixture(scope="module")
def teacher(pipeline_dir):
    pipe = load_pipeline(str(pipeline_dir))
    set_sampler(pipe, "ddim")
    return pipe


@pytest.fixture(scope="module")
def student(export_dir):
    pipe = load_pipeline(str(export_dir))
    set_sampler(pipe, "ddim")
    return pipe


def test_flops_and_tokens_are_those_of_the_calls(teacher, student):
    one = measuring.draw(measuring.Variant("t", teacher, Sampling(5, 3.0)), LABELS, SEEDS, batch_size=2)
    assert (one.flops, one.tokens, one.asked) == (10 * dit_flops(teacher.transformer.config), 64, 5)
    held = measuring.draw(measuring.Variant("t", teacher, Sampling(5, 1.0, hold=Hold(3))), LABELS, SEEDS)
    assert (held.flops, held.tokens, held.asked) == (3 * dit_flops(teacher.transformer.config), 64, 3)
    variant = measuring.Variant("s", student, Sampling(5, 3.0), 0.5)
    dropped = measuring.draw(variant, LABELS, SEEDS, batch_size=2)
    cost = sum(chunked_dit_flops(student.transformer.config, 32).values())
    assert (dropped.flops, dropped.tokens) == (pytest.approx(10 * cost), 32)


def test_the_flops_of_an_adapter_are_those_of_its_sizes(dit, pipeline_dir):
    pipe = load_pipeline(str(pipeline_dir))
    model = ddit.attach(pipe.transformer, ddit.DDiTConfig("DiTTransformer2DModel", [2]))
    set_sampler(pipe, "ddim")
    ddit.follow(model, pipe)
    variant = measuring.Variant("a", pipe, Sampling(4, 3.0))
    plain = measuring.draw(variant, LABELS, SEEDS)
    model.set_schedule(fixed=[(2, 0.5), (1, 0.5)])
    coarse = measuring.draw(variant, LABELS, SEEDS)
    assert plain.flops == 8 * dit_flops(dit.config)
    assert (plain.tokens, coarse.tokens) == (64, 40)
    assert plain.flops / 2 < coarse.flops < plain.flops


def test_feature_distances(teacher):
    """0 of the same images, 1 of the first one's among each other, and more where more has changed."""
    x = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    little, more = (x + by * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) for by in (0.05, 0.5))
    same, near, far = measuring.feature_distances(teacher, [x, little, more])
    assert same == 0
    assert 0 < near < far
    assert measuring.feature_distances(teacher, [x, x.roll(1, 0)])[1] == pytest.approx(1, rel=1e-5)
    assert measuring.feature_distances(teacher, [x[:1], little[:1]]) == [None, None]


def test_the_command(pipeline_dir, export_dir, tmp_path):
    settings = ("--steps", "4", "--tail-drop", "0,0.5", "--hold", "2", "--repeats", "1", "--json")
    asked = ("--classes", "1,label 9", "--num", "2", "-o", tmp_path / "out")
    done = inside("compare", pipeline_dir, export_dir, *asked, *settings)
    report = json.loads(done.stdout)
    assert {key: value for key, value in report.items() if key != "out"} == json.loads(
        (tmp_path / "out" / "compare.json").read_text()
    )
    rows = report["rows"]
    assert [row["settings"] for row in rows] == [
        "4 steps", "4 steps, asked every 2", "ρ = 0, 4 steps", "ρ = 0, 4 steps, asked every 2",
        "ρ = 0.5, 4 steps", "ρ = 0.5, 4 steps, asked every 2",
    ]  # fmt: skip
    assert [row["asked_steps"] for row in rows] == [4, 3] * 3
    assert [row["tokens_kept"] for row in rows] == [64, 64, 64, 64, 32, 32]
    first = rows[0]
    assert (first["mse"], first["psnr"], first["times_first"], first["flops_times_first"]) == (0, None, 1, 1)
    assert rows[2]["latents_mse"] < 1e-8, "an export is its teacher at step 0, from the same noise"
    assert rows[1]["mse"] > 0 < rows[4]["mse"]
    assert rows[1]["flops_per_image"] == pytest.approx(0.75 * first["flops_per_image"])
    assert all(row["seconds_per_image"] > 0 for row in rows)
    wide, high = Image.open(tmp_path / "out" / "compare.png").size
    assert wide > 400
    assert high > 1000, "a row for each, and one of differences for all but the first"
    again = ("compare", pipeline_dir, pipeline_dir, "--classes", "1", "--steps", "2", "--repeats", "0")
    inside(*again, "-o", tmp_path / "out", "--force")
    rows = json.loads((tmp_path / "out" / "compare.json").read_text())["rows"]
    assert [row["mse"] for row in rows] == [0, 0]
    assert rows[0]["seconds_per_image"] is None


def test_what_cannot_be_compared(pipeline_dir, export_dir, tmp_path, failing):
    for name, changes in (("small", {"size": 8}), ("few", {"classes": 4})):
        tiny.save_pipeline(tmp_path / name, tiny.make_dit(0, **changes))
    line = failing("compare", pipeline_dir, tmp_path / "small", "-o", tmp_path / "no")
    assert "latents are 4 x 16 x 16 and 4 x 8 x 8" in line
    assert "classes are 10 and 4" in failing("compare", export_dir, tmp_path / "few", "-o", tmp_path / "no")
    assert "nothing to compare" in failing("compare", pipeline_dir, "-o", tmp_path / "no")
    assert "leave it out" in failing(
        "compare", pipeline_dir, pipeline_dir, "--tail-drop", "0.3", "-o", tmp_path / "no"
    )  # fmt: skip
    for hold in ("two", "1", "2.5", "1.5", "0", "-2", "nan", "inf"):
        line = failing("compare", pipeline_dir, f"--hold={hold}", "-o", tmp_path / "no")
        assert f"--hold {hold} is neither a whole number of steps from 2 up, such as 2, nor a limit below 1" in line
    assert [parse_hold(text) for text in ("2", "3.0", "0.05", ".9")] == [2, 3, 0.05, 0.9]
    assert isinstance(parse_hold("3.0"), int)
    assert "--tail-drop 1" in failing("compare", export_dir, "--tail-drop", "1", "-o", tmp_path / "no")
    assert not (tmp_path / "no").exists()
