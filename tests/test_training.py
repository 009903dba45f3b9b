"""Post-training: the losses against their definitions, and the real loop on the digits."""

import csv
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import yaml
from conftest import ROOT, run
from safetensors.torch import load_file, save_file

from upcycle.models.chunked_dit import ChunkedDiT, Routing, lattice_prior
from upcycle.recipe import Recipe
from upcycle.training import losses
from upcycle.training.data import batch_rows, open_data
from upcycle.training.digits import TEACHER, load_digits
from upcycle.training.loop import draw_batch

WEIGHTS = "export/transformer/diffusion_pytorch_model.safetensors"
SHORT = {"steps": 6, "batch_size": 8, "save_every": 2, "log_every": 1, "anneal": {"until": 0.5}}


def routing(probability, mask, score=None):
    return Routing(probability, probability, mask, mask, probability if score is None else score)


def test_ratio_loss_is_least_where_the_ratio_is_met():
    """Its value is 1 at mean probability = mean mask = 1/N; a group is averaged before the product."""
    p, mask = torch.full((4, 64), 0.25), torch.zeros(4, 64, dtype=torch.bool)
    mask[:, ::4] = True
    assert losses.ratio_loss(routing(p, mask), 4, group=2).item() == pytest.approx(1)
    ragged = mask.clone()
    ragged[0], ragged[1] = True, False
    whole = losses.ratio_loss(routing(p, ragged), 4, group=4)
    groups = losses.ratio_loss(routing(p, ragged), 4, group=1)
    r = ragged.float().mean()
    assert whole.item() == pytest.approx((4 / 3 * ((1 - r) * 0.75 + 3 * r * 0.25)).item())
    each = [4 / 3 * ((1 - q) * 0.75 + 3 * q * 0.25) for q in ragged.float().mean(1)]
    assert groups.item() == pytest.approx((sum(each) / 4).item())


def test_router_target_shares_the_budget_over_the_batch():
    """Detail decides over the whole batch; every sample gets at least two thirds of its even share."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.zeros(4, 1, 16, 16)
    x0[0] = torch.randn(1, 16, 16, generator=generator)
    target = losses.router_target(x0, torch.full((4,), 0.9), torch.zeros(256), 4)
    counts = target.sum(1).tolist()
    assert counts[0] > 128
    assert min(counts) >= int(256 / 6)
    assert sum(counts) <= 256 + 3 * int(256 / 6)
    alike = torch.randn(4, 1, 16, 16, generator=generator)
    noisy = losses.router_target(alike, torch.tensor([1e-4, 0.9, 0.9, 0.9]), torch.zeros(256), 4).sum(1)
    assert noisy[0] == int(256 / 6), "detail that the noise hides attracts no tokens"
    assert noisy[1:].sum() == 256


def test_router_target_on_flat_images_is_the_lattice():
    prior = lattice_prior(16, 16, 2, torch.device("cpu"))
    target = losses.router_target(torch.zeros(2, 1, 16, 16), torch.full((2,), 0.5), prior, 4)
    assert torch.equal(target[0], prior >= 0)


def test_bias_controller_finds_the_ratio():
    logit = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    bias = torch.tensor(0.0)
    for _ in range(100):
        bias = bias.lerp(losses.bias_target(logit + bias, bias, 6.0), 0.1)
    assert ((logit + bias) > 0).float().mean().item() == pytest.approx(1 / 6, abs=0.002)


def test_every_row_once_an_epoch_and_nothing_depends_on_ranks():
    rows = [row for step in range(10) for row in batch_rows(100, 30, step, seed=1)]
    for epoch in range(3):
        assert sorted(rows[100 * epoch : 100 * (epoch + 1)]) == list(range(100))
    assert rows[:100] != rows[100:200]
    data = open_data("digits")
    recipe = Recipe(teacher="digits", data="digits", out="x", steps=10, batch_size=8)
    whole = draw_batch(data, recipe, 3, 0, 1, 1000, 10)
    halves = [draw_batch(data, recipe, 3, rank, 2, 1000, 10) for rank in range(2)]
    for name in ("x0", "noise", "timestep", "label"):
        mine = torch.stack([getattr(half, name) for half in halves], 1).flatten(0, 1)
        assert torch.equal(mine, getattr(whole, name))


def test_labels_are_dropped_at_the_rate_asked():
    recipe = Recipe(teacher="digits", data="digits", out="x", steps=10, batch_size=1000, label_dropout=0.2)
    label = draw_batch(open_data("digits"), recipe, 0, 0, 1, 1000, 10).label
    assert 0.15 < (label == 10).float().mean() < 0.25


def test_held_out_digits_are_not_in_the_training_split():
    train, val = load_digits("train")[0].flatten(1), load_digits("val")[0].flatten(1)
    assert len(train) == 1500
    assert len(val) == 297
    assert torch.cdist(val, train).amin() > 0


def test_shards_read_like_one_tensor(tmp_path):
    generator = torch.Generator().manual_seed(0)
    z0, label = torch.randn(7, 4, 8, 8, generator=generator), torch.arange(7)
    save_file({"z0": z0[:3].contiguous(), "label": label[:3].contiguous()}, tmp_path / "00000.safetensors")
    save_file({"z0": z0[3:].half(), "label": label[3:].contiguous()}, tmp_path / "00001.safetensors")
    x0, labels = open_data(str(tmp_path)).rows([6, 0, 3])
    assert labels.tolist() == [6, 0, 3]
    torch.testing.assert_close(x0, z0[[6, 0, 3]], atol=2e-3, rtol=1e-3)


@pytest.fixture
def recipe_file(tmp_path):
    def write(name, **changes):
        content = yaml.safe_load((ROOT / "recipes" / "digits.yaml").read_text())
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**content, "out": str(tmp_path / name), **SHORT, **changes}))
        return path

    return write


def log_of(folder):
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


def test_interrupted_and_resumed_is_bit_identical(recipe_file, tmp_path):
    """Ctrl-C saves and says how to go on; the continuation ends where an uninterrupted run ends."""
    longer = {"steps": 40, "save_every": 100}
    straight = recipe_file("straight", **longer)
    run("finetune", straight)
    broken = recipe_file("broken", **longer)
    process = subprocess.Popen(
        [sys.executable, "-m", "upcycle", "finetune", str(broken)], stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "broken" / "log.csv"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and len(log.read_text().splitlines()) > 4):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert "--resume" in stderr
    step = int(next((tmp_path / "broken" / "checkpoints").glob("step-*")).name.removeprefix("step-"))
    assert 0 < step < 40
    again = run("finetune", broken, check=False)
    assert again.returncode == 2
    assert "--resume" in again.stderr
    run("finetune", broken, "--resume")
    ours, theirs = (load_file(tmp_path / name / WEIGHTS) for name in ("broken", "straight"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    rows = log_of(tmp_path / "broken")
    assert [int(row["step"]) for row in rows] == list(range(1, 41))
    assert rows == log_of(tmp_path / "straight")


def test_result_is_an_export_and_keeps_the_last_checkpoints(recipe_file, tmp_path):
    path = recipe_file("run", keep_checkpoints=1)
    report = json.loads(run("finetune", path, "--json").stdout)
    assert report["out"] == str(tmp_path / "run" / "export")
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000006"]
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["steps"] == 6
    start, export = tmp_path / "run" / "start", tmp_path / "run" / "export"
    files = [{str(p.relative_to(folder)) for p in folder.rglob("*")} for folder in (start, export)]
    assert files[0] == files[1]
    trained = ChunkedDiT.from_pretrained(export / "transformer")
    assert trained.config.guide == 0, "the router is on its own"
    drawn = run("sample", export, "--classes", "3", "--steps", "2", "-o", tmp_path / "drawn", "--json")
    assert json.loads(drawn.stdout)["images"] == 1
    changed = run("finetune", path, "--resume", "--set", "losses.ratio=0.5", check=False)
    assert changed.returncode == 2
    assert "losses.ratio was 0.03 and is 0.5" in changed.stderr


def test_frozen_parts_do_not_move_and_the_rest_does(recipe_file, tmp_path):
    run("finetune", recipe_file("run", freeze=["embedders", "blocks", "head"], ema=0.0))
    start = load_file(tmp_path / "run" / "start/transformer/diffusion_pytorch_model.safetensors")
    end = load_file(tmp_path / "run" / WEIGHTS)
    moved = {name.split(".")[0] for name in start if not torch.equal(start[name], end[name])}
    assert moved.isdisjoint({"embedders", "transformer_blocks", "proj_out_1", "proj_out_2"})
    assert {"encoder", "decoder", "widen", "routing_module", "conv_out"} <= moved


def test_a_student_can_be_given_and_the_published_start_trains(recipe_file, tmp_path):
    run("convert", TEACHER, "--init", "paper", "--ratio", "4", "-o", tmp_path / "paper", "--no-verify")
    path = recipe_file("run", student=str(tmp_path / "paper"))
    content = yaml.safe_load(path.read_text())
    del content["convert"]
    path.write_text(yaml.safe_dump(content))
    run("finetune", path)
    assert json.loads((tmp_path / "run/export/transformer/config.json").read_text())["scaffold"] == "paper"


def test_launched_by_accelerate_on_two_processes(recipe_file, tmp_path):
    """The loss of two ranks is that of one with the same global batch."""
    one, two = recipe_file("one"), recipe_file("two")
    run("finetune", one)
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "upcycle", "finetune", str(two)]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *launch],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        assert float(a["diffusion"]) == pytest.approx(float(b["diffusion"]), abs=1e-4)
        assert float(a["tokens_kept"]) == pytest.approx(float(b["tokens_kept"]), abs=0.6)
