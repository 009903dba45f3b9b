"""Validation beside the teacher, early stopping, the best weights, previews and trackers."""

import math
import shutil

import pytest
import torch
from conftest import run
from PIL import Image
from runs import HELD_OUT, WEIGHTS, names_in, rows_of, run_here, same, small, write_recipe
from safetensors.torch import load_file

from upcycle.evaluation.validation import TIMESTEPS, validate
from upcycle.graft.verify import load_student
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.training.data import open_data
from upcycle.training.run import prepare


def held_out(world):
    data = open_data(str(world / "held-out"))
    return torch.stack([data.row(i, flip=False, noise=None) for i in range(len(data))]), data.labels


def test_the_rows_are_what_validate_says(world, tmp_path):
    """The teacher's to the last bit in every row; the last of the student is that of the export."""
    recipe = small(world, tmp_path / "run", validation={"data": str(world / "held-out"), "every": 4})
    run_here(recipe)
    rows = rows_of(tmp_path / "run" / "validation.csv")
    assert [row["step"] for row in rows] == ["4", "6"], "every 4 steps, and at the end"
    student = load_student(tmp_path / "run" / "export")
    alpha_bar = student.alpha_bar(torch.arange(1000))
    teacher = prepare(recipe.model_copy(update={"out": str(tmp_path / "other")})).teacher
    for model, name, some in ((teacher, "teacher", rows), (student, "student", rows[-1:])):
        measured = validate(model, *held_out(world), alpha_bar)
        for row in some:
            assert row[name] == f"{measured.mean_loss:.6g}"
            assert [row[f"{name}_t{t}"] for t in TIMESTEPS] == [f"{measured.loss[t]:.6g}" for t in TIMESTEPS]
    assert rows[-1]["tokens_kept"] == f"{measured.mean_tokens:.6g}"
    assert 0 < measured.mean_tokens < 64


@pytest.mark.parametrize("ranks", [2, 25])
def test_ranks_measure_what_one_does(world, tmp_path, ranks):
    """Their mean is the loss over all samples, also where these do not divide, with as many calls on each."""
    student = prepare(small(world, tmp_path / "run")).student.eval()
    alpha_bar = student.alpha_bar(torch.arange(1000))
    whole = validate(student, *held_out(world), alpha_bar)
    calls = []
    student.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    shares = [validate(student, *held_out(world), alpha_bar, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert HELD_OUT % ranks
    assert len(set(calls)) == 1
    for t in TIMESTEPS:
        assert sum(share.loss[t] for share in shares) / ranks == pytest.approx(whole.loss[t], abs=1e-6)
        assert sum(share.tokens[t] for share in shares) / ranks == pytest.approx(whole.tokens[t], rel=1e-6)


def spoiling(world, out, **changes):
    """Two good steps, then a learning rate that ruins the student: the validation of step 2 is the best."""
    validation = {"data": str(world / "held-out"), "every": 2, "patience": 2, "samples": 8}
    stages = {"name": "good", "steps": 2}, {"name": "bad", "steps": 30, "lr": 0.5}
    return small(world, out, *stages, ema=0.0, validation=validation, save_every=50, **changes)


def test_patience_ends_the_run_and_the_best_is_exported(world, tmp_path):
    recipe = spoiling(world, tmp_path / "run", export="best")
    notes = run_here(recipe)
    assert "stopped early at step 6: 2 validations without a better one" in notes[-2]
    assert notes[-1] == "3 of 6 steps were skipped, because they were not finite"
    assert "step 2: validation loss" in notes[0]
    assert "the best so far" in notes[0]
    assert names_in(tmp_path / "run" / "checkpoints") == ["step-0000002", "step-0000006"]
    best = load_file(tmp_path / "run" / "checkpoints" / "step-0000002" / "model.safetensors")
    export = load_file(tmp_path / "run" / WEIGHTS)
    assert all(torch.equal(export[name], best[name]) for name in export)
    log = (tmp_path / "run" / "log.csv").read_bytes()
    assert run_here(recipe, resume=True) == [f"{tmp_path / 'run'} has done its 6 steps already; nothing is left to do"]
    shutil.rmtree(tmp_path / "run" / "export")
    assert run_here(recipe, resume=True) == notes[-1:], "a continued run stays stopped"
    assert (tmp_path / "run" / "log.csv").read_bytes() == log
    assert same(export, load_file(tmp_path / "run" / WEIGHTS))
    run_here(recipe.model_copy(update={"export": "last"}), resume=True)
    last = load_file(tmp_path / "run" / "checkpoints" / "step-0000006" / "model.safetensors")
    assert torch.equal(load_file(tmp_path / "run" / WEIGHTS)["conv_out.weight"], last["conv_out.weight"])


def test_a_validation_that_is_nan_is_no_best(world, tmp_path):
    from safetensors.torch import save_file

    x0, label = held_out(world)
    x0[3] = math.nan
    (tmp_path / "spoilt").mkdir()
    save_file({"z0": x0, "label": label}, tmp_path / "spoilt" / "0.safetensors")
    validation = {"data": str(tmp_path / "spoilt"), "every": 2, "patience": 2}
    notes = run_here(small(world, tmp_path / "run", validation=validation, export="best", save_every=99))
    assert not any("best" in note for note in notes)
    assert "stopped early at step 4" in notes[-1]
    assert names_in(tmp_path / "run" / "checkpoints") == ["step-0000004"]


def test_previews_are_pictures(world, tmp_path):
    """From fixed seeds, so that a continued run draws the same; one label makes a readable picture too."""
    preview = {"every": 2, "labels": [3], "steps": 8}
    run_here(small(world, tmp_path / "run", {"steps": 3}, preview=preview))
    names = ["router-0000002.png", "router-0000003.png", "samples-0000002.png", "samples-0000003.png"]
    assert names_in(tmp_path / "run" / "previews") == names
    for name in names:
        image = Image.open(tmp_path / "run" / "previews" / name).convert("L")
        assert min(image.size) > 200
        assert image.size[0] > 400, "wide enough for its title"
        assert len(image.getcolors(256)) > 20, "a picture, not a blank page"


def test_previews_and_validations_do_not_change_a_run(world, tmp_path):
    """Nor do they leave averaged weights, evaluation mode or another guide behind."""
    watched = {"preview": {"every": 1, "labels": [0], "steps": 3}}
    watched["validation"] = {"data": str(world / "held-out"), "every": 1, "samples": 5}
    run_here(small(world, tmp_path / "watched", {"steps": 4}, **watched))
    run_here(small(world, tmp_path / "plain", {"steps": 4}))
    assert same(*(rows_of(tmp_path / name / "log.csv") for name in ("watched", "plain")))
    last = [tmp_path / name / "checkpoints" / "step-0000004" for name in ("watched", "plain")]
    assert same(*(load_file(path / "model.safetensors") for path in last))
    assert same(*(torch.load(path / "random_states_0.pkl", weights_only=False) for path in last))
    assert same(*(load_file(tmp_path / name / WEIGHTS) for name in ("watched", "plain")))


def test_a_start_without_a_vae_cannot_be_previewed(world, tmp_path, failing):
    bare = ChunkedDiT.from_pretrained(prepare(small(world, tmp_path / "first")).start / "transformer")
    bare.save_pretrained(tmp_path / "bare" / "transformer")
    path = write_recipe(
        tmp_path / "run.yaml", world, student=str(tmp_path / "bare"), convert={}, preview={"every": 2, "labels": [0]}
    )
    assert "bare has none; convert it with one (--vae)" in failing("finetune", path)
    assert not (tmp_path / "run").exists()
    beyond = write_recipe(tmp_path / "run.yaml", world, preview={"labels": [0, 4]})
    assert "preview.labels [0, 4] go beyond the teacher's classes 0..3" in failing("finetune", beyond)


def test_a_tracker_that_is_not_installed_is_told_before_the_start(world, tmp_path, failing):
    path = write_recipe(tmp_path / "run.yaml", world, trackers=["trackio"])
    line = failing("finetune", path)
    assert "trackers: the package of trackio is not installed; pip install trackio, or leave it out" in line
    assert not (tmp_path / "run").exists()


def test_tensorboard_gets_losses_and_validations(world, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    validation = {"data": str(world / "held-out"), "every": 3}
    path = write_recipe(tmp_path / "run.yaml", world, trackers=["tensorboard"], log_every=2, validation=validation)
    run("finetune", path)
    events = EventAccumulator(str(tmp_path / "run" / "upcycle"))
    events.Reload()
    rows = rows_of(tmp_path / "run" / "log.csv")
    for name in ("loss", "distill", "ratio", "lr"):
        points = [(str(point.step), point.value) for point in events.Scalars(name)]
        assert [step for step, _ in points] == [row["step"] for row in rows]
        assert [value for _, value in points] == pytest.approx([float(row[name]) for row in rows], rel=1e-4)
    validations = [point.value for point in events.Scalars("validation/student")]
    assert validations == pytest.approx(
        [float(row["student"]) for row in rows_of(tmp_path / "run/validation.csv")], rel=1e-4
    )


def test_a_validation_may_follow_a_preview(world, tmp_path):
    """Where a continued run draws before it has measured the teacher."""
    options = {"preview": {"every": 3, "labels": [0], "steps": 2}}
    options["validation"] = {"data": str(world / "held-out"), "every": 2, "samples": 4}
    recipe = small(world, tmp_path / "run", {"steps": 4}, save_every=1, keep_checkpoints=9, **options)
    run_here(recipe)
    rows = rows_of(tmp_path / "run" / "validation.csv")
    for step in (3, 4):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:07d}")
    run_here(recipe, resume=True)
    assert rows_of(tmp_path / "run" / "validation.csv") == rows
