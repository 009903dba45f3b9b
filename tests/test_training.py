"""Post-training: the losses against their definitions, and the real loop on the digits."""

import csv
import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
import yaml
from conftest import ROOT, run
from safetensors.torch import load_file, save_file

from upcycle.errors import UpcycleError
from upcycle.graft.convert import convert
from upcycle.graft.plan import Options, make_plan
from upcycle.models.chunked_dit import ChunkedDiT, Routing, lattice_prior
from upcycle.recipe import Recipe
from upcycle.sources import open_source
from upcycle.training import losses
from upcycle.training.data import batch_rows, open_data
from upcycle.training.digits import TEACHER, load_digits
from upcycle.training.loop import draw_batch
from upcycle.training.run import finetune, prepare

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


def router_target(x0, alpha_bar, prior):
    return losses.router_target(losses.visible_detail(x0, alpha_bar, prior), 4)


def test_router_target_shares_the_budget_over_the_batch():
    """Detail decides over the whole batch; every sample gets at least two thirds of its even share."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.zeros(4, 1, 16, 16)
    x0[0] = torch.randn(1, 16, 16, generator=generator)
    target = router_target(x0, torch.full((4,), 0.9), torch.zeros(256))
    counts = target.sum(1).tolist()
    assert counts[0] > 128
    assert min(counts) >= int(256 / 6)
    assert sum(counts) <= 256 + 3 * int(256 / 6)
    alike = torch.randn(4, 1, 16, 16, generator=generator)
    noisy = router_target(alike, torch.tensor([1e-4, 0.9, 0.9, 0.9]), torch.zeros(256)).sum(1)
    assert noisy[0] == int(256 / 6), "detail that the noise hides attracts no tokens"
    assert noisy[1:].sum() == 256


def test_router_target_on_flat_images_is_the_lattice():
    prior = lattice_prior(16, 16, 2, torch.device("cpu"))
    target = router_target(torch.zeros(2, 1, 16, 16), torch.full((2,), 0.5), prior)
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
        assert torch.equal(torch.cat([getattr(half, name) for half in halves]), getattr(whole, name))


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


@pytest.mark.parametrize(
    ("z0", "label", "says"),
    [
        (torch.zeros(0, 1, 4, 4), torch.zeros(0, dtype=torch.long), "at least one sample"),
        (torch.tensor(0.0), torch.tensor([1]), "z0 of shape []"),
        (torch.zeros(2, 1, 4, 4), torch.tensor([[1], [2]]), "int64 [2, 1]"),
        (torch.zeros(2, 1, 4, 4), torch.tensor(1), "int64 []"),
        (torch.zeros(2, 1, 4, 4), torch.tensor([0.5, 1]), "float32 [2]"),
        (torch.zeros(2, 1, 4, 4), torch.tensor([True, False]), "bool [2]"),
        (torch.zeros(2, 1, 4, 4), torch.tensor([1]), "1 labels"),
    ],
)
def test_shards_that_cannot_be_trained_on(tmp_path, z0, label, says):
    save_file({"z0": z0, "label": label}, tmp_path / "00007.safetensors")
    with pytest.raises(UpcycleError, match=r"00007\.safetensors") as error:
        open_data(str(tmp_path))
    assert says in str(error.value)


@pytest.fixture
def recipe_file(tmp_path):
    def write(name, **changes):
        content = yaml.safe_load((ROOT / "recipes" / "digits.yaml").read_text())
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**content, "out": str(tmp_path / name), **SHORT, **changes}))
        return path

    return write


def small(out, **changes):
    """A recipe for runs in this process."""
    shipped = yaml.safe_load((ROOT / "recipes" / "digits.yaml").read_text())
    return Recipe(**{**shipped, "out": str(out), **SHORT, **changes})


def run_here(recipe, resume=False):
    return finetune(prepare(recipe, resume=resume), resume=resume)


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


def test_frozen_parts_do_not_move_and_the_rest_does(tmp_path):
    run_here(small(tmp_path / "run", freeze=["embedders", "blocks", "head"], ema=0.0))
    start = load_file(tmp_path / "run" / "start/transformer/diffusion_pytorch_model.safetensors")
    end = load_file(tmp_path / "run" / WEIGHTS)
    moved = {name.split(".")[0] for name in start if not torch.equal(start[name], end[name])}
    assert moved.isdisjoint({"embedders", "transformer_blocks", "proj_out_1", "proj_out_2"})
    assert {"encoder", "decoder", "widen", "routing_module", "conv_out"} <= moved


def test_a_student_can_be_given_and_the_published_start_trains(tmp_path):
    convert(make_plan(open_source(str(TEACHER)), Options(init="paper", ratio=4)), tmp_path / "paper")
    run_here(small(tmp_path / "run", student=str(tmp_path / "paper"), convert={}))
    assert json.loads((tmp_path / "run/export/transformer/config.json").read_text())["scaffold"] == "paper"


def two_ranks(path, *arguments):
    """The real command on two processes, which talk over the CPU."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "upcycle", "finetune"]
    return subprocess.Popen(
        [sys.executable, *launch, str(path), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )


def test_two_ranks_train_as_one_does(recipe_file, tmp_path):
    """The loss of two ranks is that of one with the same global batch; one of them writes and prints."""
    changes = {"losses": {"ratio_group": 4}}
    run_here(small(tmp_path / "one", **changes))
    process = two_ranks(recipe_file("two", **changes), "--json")
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 0, stderr[-3000:]
    assert json.loads(stdout)["step"] == 6, "one object, from one rank"
    assert {path.name for path in (tmp_path / "two").iterdir()} == {
        "checkpoints", "export", "log.csv", "recipe.yaml", "start"
    }  # fmt: skip
    newest = tmp_path / "two" / "checkpoints" / "step-0000006"
    assert len(list(newest.glob("random_states_*"))) == 2, "accelerate saves one a rank"
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two"), strict=True):
        for name in ("loss", "diffusion", "ratio_loss", "router", "grad_norm"):
            assert float(a[name]) == pytest.approx(float(b[name]), abs=1e-5, rel=1e-5), name


def test_two_ranks_stop_together_and_one_goes_on(recipe_file, tmp_path):
    """A signal that reaches one rank alone stops both; the checkpoint resumes on another number of ranks."""
    changes = {"steps": 60, "save_every": 100}
    process = two_ranks(recipe_file("run", **changes))
    log = tmp_path / "run" / "log.csv"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (log.exists() and len(log.read_text().splitlines()) > 4):
        time.sleep(0.05)
    psutil.Process(process.pid).children()[1].send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert stderr.count("go on with: upcycle finetune") <= 1
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert len(list(saved.glob("random_states_*"))) == 2
    step = int(saved.name.removeprefix("step-"))
    assert 0 < step < 60
    run_here(small(tmp_path / "run", **changes), resume=True)
    assert [int(row["step"]) for row in log_of(tmp_path / "run")] == list(range(1, 61))


def test_batches_that_do_not_divide_over_ranks(tmp_path, monkeypatch):
    monkeypatch.setattr("upcycle.training.run.ranks", lambda: SimpleNamespace(num_processes=3))
    with pytest.raises(UpcycleError, match="batch_size 8 does not divide by the 3 ranks"):
        prepare(small(tmp_path / "run"))
    with pytest.raises(UpcycleError, match="ratio_group 16 does not divide the 20 samples"):
        prepare(small(tmp_path / "run", batch_size=60))
    assert not (tmp_path / "run").exists()


def test_a_start_left_behind_is_not_reused(tmp_path):
    """The start is made anew for a new run, and must be there for a continued one."""
    out = tmp_path / "run"
    assert prepare(small(out)).student.config.ratio == 4
    assert prepare(small(out, convert={"ratio": 16})).student.config.ratio == 16
    recipe = small(out, steps=1)
    run_here(recipe)
    shutil.rmtree(out / "start")
    with pytest.raises(UpcycleError, match="start is no export"):
        prepare(recipe, resume=True)


def test_nan_stops_the_run(tmp_path):
    """One bad row ends the run at its step; what is saved stays, nothing is exported."""
    x0, label = load_digits("train")
    recipe = small(tmp_path / "run", data=str(tmp_path / "data"))
    x0[batch_rows(len(x0), 8, 3, recipe.seed)[0]] = float("nan")
    (tmp_path / "data").mkdir()
    save_file({"z0": x0, "label": label}, tmp_path / "data" / "0.safetensors")
    with pytest.raises(UpcycleError, match="loss is nan at step 4"):
        run_here(recipe)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000002"]
    assert not (tmp_path / "run" / "export").exists()
    assert len(log_of(tmp_path / "run")) == 3


def test_a_short_run_still_has_a_log(tmp_path):
    run_here(small(tmp_path / "run", steps=3, log_every=2))
    rows = log_of(tmp_path / "run")
    assert [row["step"] for row in rows] == ["2", "3"]


def test_damaged_checkpoints_are_named(tmp_path):
    recipe = small(tmp_path / "run", steps=4)
    run_here(recipe)
    newest = tmp_path / "run" / "checkpoints" / "step-0000004"
    for name in ("recipe.json", "model.safetensors", "optimizer.bin", "run.pt"):
        whole = (newest / name).read_bytes()
        (newest / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(UpcycleError, match=r"step-0000004 is damaged .* goes on from step-0000002"):
            run_here(recipe, resume=True)
        (newest / name).write_bytes(whole)
    shutil.rmtree(newest.parent / "step-0000002")
    (newest / "recipe.json").unlink()
    with pytest.raises(UpcycleError, match="run without --resume"):
        run_here(recipe, resume=True)


def test_a_full_disk_leaves_no_half_checkpoint(tmp_path):
    """The limit on the size of files makes the optimizer's state fail to be written, as a full disk does."""
    prepared = prepare(small(tmp_path / "run", save_every=1))
    weights = prepared.start / "transformer" / "diffusion_pytorch_model.safetensors"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(weights.stat().st_size * 1.2), before[1]))
    try:
        with pytest.raises(UpcycleError, match="no space left to write the checkpoint"):
            finetune(prepared)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


def test_what_cannot_work_is_refused_before_training(tmp_path):
    out = tmp_path / "run"
    out.write_text("")
    with pytest.raises(UpcycleError, match="is a file"):
        prepare(small(out))
    out.unlink()
    (out / "export").mkdir(parents=True)
    (out / "export" / "thesis.tex").write_text("")
    with pytest.raises(UpcycleError, match="export does not look like an output"):
        prepare(small(out))
    shutil.rmtree(out)
    with pytest.raises(UpcycleError, match="distill is 0"):
        prepare(small(out, losses={"distill": 0}))
    assert not out.exists()


@pytest.mark.parametrize("changes", [{"num_classes": 7}, {"out_channels": 1}])
def test_a_student_of_another_teacher_is_refused(tmp_path, changes):
    convert(make_plan(open_source(str(TEACHER)), Options()), tmp_path / "other")
    path = tmp_path / "other" / "transformer"
    student = ChunkedDiT.from_pretrained(path)
    ChunkedDiT(**{**{k: v for k, v in student.config.items() if k[0] != "_"}, **changes}).save_pretrained(path)
    name, value = next(iter(changes.items()))
    with pytest.raises(UpcycleError, match=f"has {name} {value} where the teacher has"):
        prepare(small(tmp_path / "run", student=str(tmp_path / "other"), convert={}))


def test_a_bare_checkpoint_can_be_the_teacher(tmp_path, monkeypatch):
    """`weights`, `heads` and `vae` reach the source, and the start can then be sampled."""
    seen = {}

    def opened(spec, **options):
        seen.update(options)
        return dataclasses.replace(open_source(str(TEACHER)), components={})

    vae = tmp_path / "vae"
    shutil.copytree(TEACHER / "vae", vae)
    config = json.loads((vae / "config.json").read_text())
    (vae / "config.json").write_text(json.dumps({**config, "_class_name": "AutoencoderKL", "latent_channels": 1}))
    monkeypatch.setattr("upcycle.training.run.open_source", opened)
    options = {"weights": "model", "heads": 2}
    start = prepare(small(tmp_path / "run", teacher="x.pt", vae=str(vae), **options)).start
    assert {key: seen[key] for key in options} == options
    assert (start / "model_index.json").is_file()
