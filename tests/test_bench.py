"""`upcycle bench`: its figures are of what it says; no speed is asserted."""

import json

import pytest
import torch
from conftest import run

from upcycle.evaluation.bench import PARTS, Settings, bench
from upcycle.evaluation.flops import chunked_dit_flops, dit_flops
from upcycle.evaluation.speed import keep_tokens
from upcycle.graft.verify import stock_dit
from upcycle.models.chunked_dit import ChunkedDiT
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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [([], "--shape"), (["--shape", "M/2"], "M/2"), (["--shape", "S/3"], "divides"), (["--shape", "S"], "XL/2"),
     (["x", "--shape", "S/2"], "either"), (["x", "--ratio", "4"], "--shape"), (["nowhere"], "nowhere"),
     (["--shape", "S/2", "--tail-drop", "1"], "--tail-drop"), (["--shape", "S/2", "--batch", "0"], "--batch"),
     (["--shape", "S/2", "--tokens", "x"], "--tokens x")],
)  # fmt: skip
def test_bad_input(failing, arguments, says):
    assert says in failing("bench", *arguments)
