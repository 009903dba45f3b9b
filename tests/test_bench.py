"""`upcycle bench`: its figures are of what it says; no speed is asserted."""

import json

import pytest
import torch
from conftest import inside, run

from upcycle.evaluation.bench import PARTS, Settings, bench, ddit_flops
from upcycle.evaluation.flops import chunked_dit_flops, dit_flops
from upcycle.evaluation.speed import keep_tokens
from upcycle.graft.verify import stock_dit
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.models.ddit import DDiTConfig, attach
from upcycle.sources import DiTConfig

COMMON = {
    "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "in_channels": 4, "out_channels": 8,
    "sample_size": 8, "patch_size": 2, "num_classes": 10, "norm_eps": 1e-5,
}  # fmt: skip


@pytest.fixture(scope="module")
def report():
    torch.manual_seed(0)
    teacher = stock_dit(DiTConfig(**COMMON, time_embedding="diffusers")).eval()
    student = ChunkedDiT(**COMMON, ratio=4.0, guide=0.0).eval()
    keep_tokens(student, 16)
    before = student.route
    done = bench(teacher, student, Settings(batch=2, steps=2, repeats=1, tail_drops=(0.0, 0.5), tokens=(5,)))
    assert student.route is before
    assert not set(PARTS[2:]) & set(student.__dict__), "the timers are gone"
    return done


def test_tokens_and_flops_are_those_of_the_calls(report):
    rows = report["variants"]
    assert {name: row["tokens"] for name, row in rows.items()} == {
        "teacher": 16, "student, ρ=0": 16, "student, ρ=0.5": 8, "teacher, guided": 16, "student, guided": 16,
        "student, guided, Lite-CFG 0.9": 9, "student, 5 tokens": 5,
    }  # fmt: skip
    config = ChunkedDiT(**COMMON, ratio=4.0).config
    assert rows["teacher"]["flops_per_image"] == 2 * dit_flops(COMMON)
    assert rows["teacher, guided"]["flops_per_image"] == 4 * dit_flops(COMMON)
    assert rows["student, ρ=0.5"]["flops_per_image"] == 2 * sum(chunked_dit_flops(config, 8).values())


def test_ratios_follow_from_the_figures(report):
    for name, row in report["variants"].items():
        base = report["variants"]["teacher, guided" if "guided" in name else "teacher"]
        assert row["times_teacher"] == pytest.approx(row["ms_per_forward"] / base["ms_per_forward"])  # of one round
        assert row["realised_share"] == pytest.approx(row["flops_times_teacher"] / row["times_teacher"])
        assert row["peak_bytes"] > 4 * 2 * 8 * 8 * 8


def test_parts_make_up_the_whole(report):
    assert set(report["parts"]) == {"0", "0.5"}
    for shares in report["parts"].values():
        assert set(shares) == {*PARTS, "rest"}
        assert sum(shares.values()) == pytest.approx(1)
        assert all(share > 0 for share in shares.values())


def test_our_flops_are_those_that_torch_counts(report):
    check = report["flops_cross_check"]
    assert check["ours"] == pytest.approx(check["torch"], rel=0.01)


SIZES = {"teacher": 1, "student, x1": 1, "student, x2": 2, "student, x4": 4}


@pytest.fixture(scope="module")
def coarse():
    """Of a DiT with an adapter: four steps of which one runs at 4 and two at 2."""
    torch.manual_seed(0)
    config = DiTConfig(**{**COMMON, "num_attention_heads": 4}, time_embedding="diffusers")
    teacher, student = stock_dit(config).eval(), stock_dit(config).eval()
    attach(student, DDiTConfig("DiTTransformer2DModel", [2, 4], rank=8))
    schedule = ((4, 0.25), (2, 0.5), (1, 0.25))
    return student, bench(teacher, student, Settings(batch=2, steps=4, repeats=1, schedule=schedule))


def test_coarse_patches_tokens_and_flops_are_those_of_the_calls(coarse):
    student, report = coarse
    rows = report["variants"]
    assert {name: row["tokens"] for name, row in rows.items()} == {
        name + ending: tokens
        for ending in ("", ", guided")
        for name, tokens in {**{n: 16 // m**2 for n, m in SIZES.items()}, "student, schedule": 6.25}.items()
    }
    at = {m: ddit_flops(student.config, m, student.ddit) for m in (1, 2, 4)}
    assert at[1] == dit_flops({**COMMON, "num_attention_heads": 4})
    for name, m in SIZES.items():
        assert rows[name]["flops_per_image"] == 4 * at[m]
        assert rows[f"{name}, guided"]["flops_per_image"] == 8 * at[m]
    assert rows["student, schedule"]["flops_per_image"] == at[4] + 2 * at[2] + at[1]
    assert student.schedule.fixed is None, "as it was"
    assert student.schedule.forced is None


def test_coarse_patches_ratios_follow_from_the_figures(coarse):
    _, report = coarse
    test_ratios_follow_from_the_figures(report)
    rows = report["variants"]
    assert rows["student, x2"]["peak_bytes"] < rows["student, x1"]["peak_bytes"]
    assert rows["student, schedule"]["peak_bytes"] == pytest.approx(rows["student, x1"]["peak_bytes"], rel=0.01)
    assert report["parts"] == {}


def test_coarse_patches_flops_are_those_that_torch_counts(coarse):
    check = coarse[1]["flops_cross_check"]
    assert check["ours"] == pytest.approx(check["torch"], rel=0.001)


def test_a_grid_that_is_not_whole_is_padded():
    config = {**COMMON, "sample_size": 12}
    bare = DDiTConfig("DiTTransformer2DModel", [4], rank=0, residual=False)
    assert ddit_flops(config, 4, bare) == dit_flops({**config, "sample_size": 16, "patch_size": 8})


def test_tokens_far_apart_are_timed_too():
    """Where an owner lies out of the reach that is searched at first."""
    config = {**COMMON, "sample_size": 32}
    teacher = stock_dit(DiTConfig(**config, time_embedding="diffusers")).eval()
    student = ChunkedDiT(**config, ratio=512.0, guide=0.0).eval()
    keep_tokens(student, 2)
    done = bench(teacher, student, Settings(steps=1, repeats=1, tail_drops=(0.0,)))
    assert done["variants"]["student, ρ=0"]["tokens"] == 2
    assert all(share >= 0 for share in done["parts"]["0"].values())


def test_command_on_a_real_export(export_dir):
    done = run("bench", export_dir, "--steps", "1", "--repeats", "1", "--tail-drop", "0,0.4", "--json")
    found = json.loads(done.stdout)
    assert found["variants"]["student, ρ=0"]["tokens"] == 64
    assert found["variants"]["student, ρ=0.4"]["tokens"] == 64 - int(64 * 0.4)
    assert found["settings"]["size"] == 16
    assert found["machine"]


def test_command_with_an_adapter(pipeline_dir, tmp_path):
    """Beside its base, and alone; the base is the teacher."""
    both, alone = tmp_path / "both", tmp_path / "alone"
    run("convert", pipeline_dir, "--method", "ddit", "--rank", "4", "-o", both)
    run("convert", pipeline_dir, "--method", "ddit", "--patches", "2", "--adapter-only", "-o", alone)
    short = ("--steps", "2", "--repeats", "1", "--json")
    found = json.loads(run("bench", both, "--schedule", "2:0.5,1:0.5", *short).stdout)
    tokens = {name: row["tokens"] for name, row in found["variants"].items() if "guided" not in name}
    assert tokens == {"teacher": 64, "student, x1": 64, "student, x2": 16, "student, x4": 4, "student, schedule": 40}
    assert found["settings"]["schedule"] == [[2, 0.5], [1, 0.5]]
    found = json.loads(run("bench", alone, "--teacher", pipeline_dir, *short).stdout)
    assert "student, x4" not in found["variants"]


def test_command_with_a_shape_and_patches():
    done = run("bench", "--shape", "S/2", "--layers", "1", "--size", "8", "--patches", "2", "--steps", "1", "--repeats",
               "1")  # fmt: skip
    assert "realised" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [("--patches", "2"), ("--schedule", "3:1"), ("--schedule", "2:0.5"), ("--tokens", "4"), ("--tail-drop", "0.5"),
     ("--ratio", "4")],
)  # fmt: skip
def test_bad_input_with_an_adapter(failing, pipeline_dir, tmp_path, arguments):
    inside("convert", pipeline_dir, "--method", "ddit", "-o", tmp_path / "both")
    assert arguments[0] in failing("bench", tmp_path / "both", *arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [([], "--shape"), (["--shape", "M/2"], "M/2"), (["--shape", "S/3"], "divides"), (["--shape", "S"], "XL/2"),
     (["x", "--shape", "S/2"], "either"), (["x", "--ratio", "4"], "--shape"), (["nowhere"], "nowhere"),
     (["--shape", "S/2", "--tail-drop", "1"], "--tail-drop"), (["--shape", "S/2", "--batch", "0"], "--batch"),
     (["--shape", "S/2", "--tokens", "x"], "--tokens x"), (["--shape", "S/2", "--patches", "1"], "--patches 1"),
     (["--shape", "S/2", "--patches", "2", "--ratio", "4"], "--ratio"),
     (["--shape", "S/2", "--schedule", "2:1"], "--patches"), (["x", "--patches", "2"], "--shape")],
)  # fmt: skip
def test_bad_input(failing, arguments, says):
    assert says in failing("bench", *arguments)
