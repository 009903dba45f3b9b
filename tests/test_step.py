"""One update: what is frozen, what the teacher is asked, how the losses of a stage are weighed, what a NaN does."""

import random

import pytest
import torch
from accelerate import Accelerator
from runs import names_in, rows_of, run_here, same, small, write_recipe
from safetensors.torch import load_file, save_file

from upcycle.errors import UpcycleError
from upcycle.training import schedule
from upcycle.training.chunking import make_optimizer, prepare_student
from upcycle.training.data import Batch, Draws, open_data
from upcycle.training.loop import place_teacher
from upcycle.training.run import prepare
from upcycle.training.state import RunState
from upcycle.training.step import Updater

BLOCKS = {"diffusion": 0, "variational": 0, "distill": 0, "blocks": 1, "ratio": 0, "router": 0}


def make_updater(recipe):
    """An updater as the loop makes it, and the batch of its first step."""
    recipe = recipe.model_copy(update={"out": f"{recipe.out}-updater"})
    prepared, accelerator = prepare(recipe), Accelerator(cpu=True)
    student = prepared.student
    prepare_student(student, recipe)
    optimizer = make_optimizer(student, recipe, fused=False)
    teacher = place_teacher(prepared.teacher, recipe, accelerator.device)
    model, optimizer = accelerator.prepare(student, optimizer)
    draws = Draws(prepared.data, recipe, 1000, student.config.num_classes)
    items = [draws[i] for i in range(recipe.batch_size)]
    batch = Batch(**{name: torch.stack([getattr(item, name) for item in items]) for name in vars(items[0])})
    return Updater(recipe, accelerator, model, teacher, optimizer, RunState(student, recipe.ema)), batch


def checkpoint(out, step, name="model.safetensors"):
    path = out / "checkpoints" / f"step-{step:07d}" / name
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def moved(before, after):
    return {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}


def test_parts_move_in_the_stages_that_do_not_freeze_them(world, tmp_path):
    """Also with weight decay and momentum from the stage before; what every stage freezes has no gradient at all."""
    recipe = small(
        world,
        tmp_path / "run",
        {"name": "one", "steps": 2, "freeze": ["embedders", "blocks"]},
        {"name": "two", "steps": 2, "freeze": ["embedders", "head"], "lr": 2e-3},
        {"name": "three", "steps": 2, "freeze": ["embedders", "blocks", "head"]},
        optimizer={"weight_decay": 0.1},
        keep_checkpoints=9,
    )
    run_here(recipe)
    start = load_file(tmp_path / "run/start/transformer/diffusion_pytorch_model.safetensors")
    states = [start, *(checkpoint(tmp_path / "run", step) for step in (2, 4, 6))]
    head, new = {"proj_out_1", "proj_out_2"}, {"encoder", "decoder", "routing_module"}
    for i, (may, may_not) in enumerate(
        [
            (head | new, {"transformer_blocks"}),
            ({"transformer_blocks"} | new, head),
            (new, head | {"transformer_blocks"}),
        ]
    ):
        parts = moved(states[i], states[i + 1])
        assert may <= parts, i
        assert not parts & (may_not | {"embedders"}), i
    lrs = [float(row["lr"]) for row in rows_of(tmp_path / "run" / "log.csv")]
    assert lrs == [1e-3, 1e-3, 2e-3, 2e-3, 1e-3, 1e-3]
    updater, batch = make_updater(recipe)
    assert not any(p.requires_grad for p in updater.student.embedders.parameters())
    updater.update(batch)
    assert all(p.grad is None for p in updater.student.embedders.parameters())
    known = {id(p) for group in updater.optimizer.param_groups for p in group["params"]}
    assert not known & {id(p) for p in updater.student.embedders.parameters()}


def test_align_then_post_train(world, tmp_path):
    """The published order from the published start: block distillation alone, then the other losses."""
    recipe = small(
        world,
        tmp_path / "run",
        {
            "name": "align",
            "steps": 12,
            "lr": 3e-3,
            "losses": BLOCKS,
            "anneal": {"until": None},
            "freeze": ["embedders"],
        },
        {"name": "post-train", "steps": 4, "schedule": "cosine"},
        convert={"ratio": 4, "init": "paper"},
    )
    run_here(recipe)
    rows = rows_of(tmp_path / "run" / "log.csv")
    assert [row["stage"] for row in rows] == ["align"] * 12 + ["post-train"] * 4
    blocks = [float(row["blocks"]) for row in rows]
    assert sum(blocks[9:12]) < 0.8 * sum(blocks[:3]), "the loss that trains falls"
    for row in rows[:12]:
        assert row["diffusion"] == row["distill"] == row["ratio_loss"] == row["variational"] == "0"
        assert float(row["loss"]) == pytest.approx(float(row["blocks"]))
    for row in rows[12:]:
        assert float(row["blocks"]) == 0
        assert min(float(row[name]) for name in ("diffusion", "distill", "ratio_loss")) > 0


def test_what_the_router_starts_from_lasts_where_no_stage_anneals_it(world, tmp_path):
    """Then the export keeps the guide too: its router was never on its own."""
    run_here(small(world, tmp_path / "run", {"steps": 2, "anneal": {"until": None}}))
    guides = {row["guide"] for row in rows_of(tmp_path / "run" / "log.csv")}
    config = (tmp_path / "run/export/transformer/config.json").read_text()
    (guide,) = guides
    assert f'"guide": {float(guide)}' in config
    assert float(guide) > 0


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_the_teacher_is_guided(world, tmp_path, scale):
    """Epsilon is guided, sigma is not; with scale 1 the answer is the teacher's own to the last bit."""
    updater, batch = make_updater(small(world, tmp_path / "run", {"teacher_guidance": scale}, label_dropout=0.5))
    (question,) = updater._ask(updater.recipe.stages[0], [batch])
    null = torch.full_like(batch.label, 4)
    assert 0 < (batch.label == null).sum() < len(null)
    with torch.no_grad():
        own, unguided = (updater.teacher(question.x_t, batch.timestep, label).sample for label in (batch.label, null))
    if scale == 1:
        assert torch.equal(question.answer, own)
        return
    torch.testing.assert_close(question.answer[:, :4], unguided[:, :4] + scale * (own - unguided)[:, :4])
    assert torch.equal(question.answer[:, 4:], own[:, 4:])
    assert (question.answer - own).abs().max() > 0.1
    assert torch.equal(question.answer[batch.label == 4], own[batch.label == 4])
    row = updater.update(batch)
    output = make_updater(updater.recipe)[0].student(question.x_t, batch.timestep, batch.label).sample
    assert row["distill"] == pytest.approx(torch.nn.functional.mse_loss(output, question.answer).item(), rel=1e-4)


@pytest.mark.parametrize(
    ("option", "weigh"),
    [({"min_snr": 0.5}, lambda snr: snr.clamp(max=0.5) / snr), ({"balanced": True}, lambda snr: (1 + 2 / snr).sqrt())],
)
def test_noise_levels_weigh_as_told(world, tmp_path, option, weigh):
    weight = {**option, "variational": 0, "router": 0}
    paper = {"ratio": 4, "init": "paper"}  # where the student is not its teacher yet
    updater, batch = make_updater(small(world, tmp_path / "run", {"losses": weight}, convert=paper))
    (question,) = updater._ask(updater.recipe.stages[0], [batch])
    with torch.no_grad():
        output = updater.student(question.x_t, batch.timestep, batch.label).sample
    row = updater.update(batch)
    share = weigh(question.alpha_bar / (1 - question.alpha_bar))
    assert share.max() / share.min() > 1.1
    noise = (output[:, :4] - batch.noise).square().flatten(1).mean(1)
    error = (output - question.answer).square().flatten(2).mean(2)
    followed = torch.cat([share[:, None] * error[:, :4], error[:, 4:]], 1)  # the learned sigma is not weighed
    assert row["diffusion"] == pytest.approx((share * noise).mean().item(), rel=1e-4)
    assert row["diffusion"] != pytest.approx(noise.mean().item(), rel=1e-2)
    assert row["distill"] == pytest.approx(followed.mean().item(), rel=1e-4)
    assert row["distill"] != pytest.approx(error.mean().item(), rel=1e-2)


def test_the_loss_is_the_weighted_sum_of_its_terms(world, tmp_path):
    weight = {"diffusion": 0.3, "variational": 0.7, "distill": 2, "blocks": 0.5, "ratio": 0.1, "router": 0.9}
    updater, batch = make_updater(small(world, tmp_path / "run", {"losses": weight}))
    row = updater.update(batch)
    names = {"ratio": "ratio_loss"}
    total = sum(w * row[names.get(name, name)] for name, w in weight.items())
    assert row["loss"] == pytest.approx(total, rel=1e-5)
    assert min(row[names.get(name, name)] for name in weight) > 0


def test_parts_of_a_batch_train_as_the_whole(world, tmp_path):
    """1, 2 and 4 accumulated parts: one loss curve, with all losses, two stages and tail drop."""
    stages = (
        {"name": "one", "steps": 3, "losses": {"ratio_group": 2, "blocks": 0.5}, "freeze": ["head"]},
        {"name": "two", "steps": 3, "losses": {"ratio_group": 2, "min_snr": 5}, "tail_drop": {"start": 0.0}},
    )
    logs = []
    for parts in (1, 2, 4):
        run_here(small(world, tmp_path / str(parts), *stages, gradient_accumulation=parts, save_every=9))
        logs.append(rows_of(tmp_path / str(parts) / "log.csv"))
    assert any(float(row["tail_drop"]) > 0 for row in logs[0])
    assert_same_curve(logs[0], logs[1])
    assert_same_curve(logs[0], logs[2])


def assert_same_curve(ours, theirs):
    assert [row["stage"] for row in ours] == [row["stage"] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        for name in a.keys() - {"stage", "ratio"}:
            assert float(a[name]) == pytest.approx(float(b[name]), abs=1e-5, rel=1e-5, nan_ok=True), (a["step"], name)


def test_the_guide_and_the_learning_rate_follow_the_stages(world, tmp_path):
    recipe = small(
        world,
        tmp_path,
        {"name": "kept", "steps": 4, "anneal": {"until": None}, "warmup": 2},
        {"name": "fades", "steps": 4, "anneal": {"until": 0.5}, "schedule": "cosine", "lr": 4e-3},
        {"name": "gone", "steps": 2, "anneal": {"until": None}},
    )
    assert [schedule.guide(recipe, step, 8.0) for step in range(11)] == [8, 8, 8, 8, 8, 4, 0, 0, 0, 0, 0]
    lrs = [schedule.learning_rate(recipe, step) for step in range(10)]
    assert lrs[:4] == [5e-4, 1e-3, 1e-3, 1e-3]
    assert lrs[4:8] == pytest.approx([4e-3, 4e-3 * (1 + 0.5**0.5) / 2, 2e-3, 4e-3 * (1 - 0.5**0.5) / 2])
    assert lrs[8:] == [1e-3, 1e-3]
    assert [schedule.stage_at(recipe, step)[0].name for step in (0, 3, 4, 7, 8, 9)] == [
        "kept", "kept", "fades", "fades", "gone", "gone",
    ]  # fmt: skip
    assert schedule.router_weight(recipe, 4) == recipe.stages[1].losses.router, "it decays within a stage"


def spoilt(world, folder, recipe, steps):
    """The training data with NaN in one sample of each of the steps (numbered from 1)."""
    data = open_data(str(world / "data"))
    draws = Draws(data, recipe, 1000, 4)
    z0 = torch.stack([data.row(i, flip=False, noise=None) for i in range(len(data))])
    clean = {draws.row(i) for step in range(1, 7) if step not in steps for i in range(8 * step - 8, 8 * step)}
    for step in steps:
        row = next(row for i in range(8) if (row := draws.row(8 * step - 8 + i)) not in clean)
        z0[row, 0, 3, 3] = float("nan")
    folder.mkdir()
    save_file({"z0": z0, "label": data.labels.clone()}, folder / "0.safetensors")
    return str(folder)


def test_a_step_that_is_not_finite_changes_nothing(world, tmp_path):
    """It is skipped and counted; weights, averages, bias and the optimizer are as before, and the run goes on."""
    recipe = small(world, tmp_path / "run", {"steps": 3}, save_every=1, keep_checkpoints=9)
    longer = small(world, tmp_path / "longer", {"steps": 4}, save_every=1)
    data = spoilt(world, tmp_path / "data", longer, [3])
    notes = run_here(recipe.model_copy(update={"data": data}))
    assert [note.startswith("warning: step 3 is skipped: loss, ") for note in notes] == [True, False]
    assert notes[1] == "1 of 3 steps were skipped, because they were not finite"
    run_here(longer.model_copy(update={"data": data}))
    assert names_in(tmp_path / "longer/checkpoints") == ["step-0000002", "step-0000004"]
    assert "the data has NaN or infinite values in the samples at t=" in notes[0]
    two, three = (checkpoint(tmp_path / "run", step) for step in (2, 3))
    four = checkpoint(tmp_path / "longer", 4)
    assert same(two, three)
    assert not same(three, four)
    assert "routing_module.bias" in two
    assert not torch.equal(three["routing_module.bias"], four["routing_module.bias"])
    before, after = (checkpoint(tmp_path / "run", step, "run.pt") for step in (2, 3))
    assert same(before["ema"], after["ema"])
    assert torch.equal(before["ema_bias"], after["ema_bias"])
    assert (before["skipped"], after["skipped"]) == (0, 1)
    optimizers = [checkpoint(tmp_path / "run", step, "optimizer.bin") for step in (2, 3)]
    assert same(optimizers[0]["state"], optimizers[1]["state"])
    assert [row["skipped"] for row in rows_of(tmp_path / "longer" / "log.csv")] == ["0", "0", "1", "1"]


def test_too_many_such_steps_end_the_run(world, tmp_path, failing):
    """One line with the cause and the last good checkpoint; the log tells the steps that led there."""
    recipe = small(world, tmp_path / "run", log_every=4)
    data = spoilt(world, tmp_path / "data", recipe, [3, 4])
    line = failing("finetune", write_recipe(tmp_path / "run.yaml", world, data=data, max_skipped=2, log_every=4))
    assert "2 steps in a row were not finite, so the run stopped at step 4: loss, diffusion" in line
    assert "the data has NaN or infinite values in the samples at t=" in line
    assert "step-0000002 with --resume" in line
    assert names_in(tmp_path / "run" / "checkpoints") == ["step-0000002"]
    assert not (tmp_path / "run" / "export").exists()
    assert [(row["step"], row["skipped"]) for row in rows_of(tmp_path / "run" / "log.csv")] == [("4", "2")]


def test_weights_that_explode_name_the_layer(world, tmp_path, failing):
    path = write_recipe(tmp_path / "run.yaml", world, {"lr": 1e30}, max_skipped=2)
    line = failing("finetune", path)
    assert "first in layer " in line
    assert ", at t=" in line
    assert "stopped at step 3" in line
    # Step 2, where a save is due, is skipped already: its weights are not what to go on from.
    assert "start anew (nothing is saved yet)" in line
    assert names_in(tmp_path / "run" / "checkpoints") == []


def test_a_run_without_a_finite_step_is_no_result(world, tmp_path):
    recipe = small(world, tmp_path / "run", {"steps": 3})
    data = spoilt(world, tmp_path / "data", recipe, [1, 2, 3])
    with pytest.raises(UpcycleError, match="no step of 3 was finite"):
        run_here(recipe.model_copy(update={"data": data}))
    assert not (tmp_path / "run" / "export").exists()


@pytest.mark.parametrize(("bias", "what"), [(50.0, "nearly all positions"), (-50.0, "almost none of the positions")])
def test_a_ratio_that_runs_away_is_told_once(world, tmp_path, bias, what):
    stage = {"steps": 23, "anneal": {"until": 0.0, "bias_rate": 0.0}}
    folder = prepare(small(world, tmp_path / "first")).start
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    weights["routing_module.bias"] = torch.tensor(bias)
    save_file(weights, path, metadata={"format": "pt"})
    notes = run_here(small(world, tmp_path / "run", stage, student=str(folder), convert={}, save_every=50))
    assert len(notes) == 1
    assert f"for 20 steps the router has kept {what}" in notes[0]
    assert "wanted 4" in notes[0]


def test_every_rank_drops_the_same_tail():
    """The draw is from the recipe's seed and the step alone, whatever state the generators of a rank are in."""
    from upcycle.recipe import Recipe

    recipe = Recipe(
        teacher="digits", data="digits", out="x", seed=3,
        stages=[{"name": "a", "steps": 100, "tail_drop": {"values": [0.0, 0.5], "start": 0.5}}],
    )  # fmt: skip
    drops = []
    for rank in range(2):
        random.seed(rank)
        torch.manual_seed(rank)
        drops.append([schedule.tail_drop(recipe, step) for step in range(100)])
    assert drops[0] == drops[1]
    assert set(drops[0][:50]) == {0.0}
    assert set(drops[0][50:]) == {0.0, 0.5}
