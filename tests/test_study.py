"""The study: its set, arms and parts, that it runs and goes on, and that docs/results.md is of this code."""

import csv
import json
import os
import platform
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ROOT

from upcycle.graft.convert import convert
from upcycle.graft.plan import Options, make_plan
from upcycle.graft.verify import load_student
from upcycle.models import chunked_dit
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.recipe import parse_recipe
from upcycle.sources import open_source
from upcycle.training import losses
from upcycle.training.digits import TEACHER
from upcycle.training.loop import train
from upcycle.training.run import prepare

sys.path.insert(0, str(ROOT / "examples" / "study"))
import results
import study
import summary
from arms import ARMS, arms_of
from judging import Judge
from parts import PARTS, leave_out
from sets import digits
from shapes import CLASSES, make_shapes
from teachers import new_teacher
from teachers import train as train_teacher

RESULTS = ROOT / "docs" / "results.json"


def test_shapes_follow_from_the_seed_and_their_masks_are_true():
    shapes, again, other = make_shapes(300, 5), make_shapes(300, 5), make_shapes(300, 6)
    assert torch.equal(shapes.images, again.images)
    assert not torch.equal(shapes.images, other.images)
    assert shapes.images.shape == (300, 3, 32, 32)
    assert shapes.images.abs().max() <= 1
    assert set(shapes.labels.tolist()) == set(range(len(CLASSES)))
    share = shapes.masks.float().mean((1, 2))
    assert 0.01 < share.min() < share.max() < 0.5
    # Objects are textured and the ground is flat or graded: second differences tell them apart.
    bend = shapes.images.diff(n=2, dim=-1).abs().mean(1)
    inside = shapes.masks[:, :, :-2] & shapes.masks[:, :, 2:]
    outside = ~shapes.masks[:, :, :-2] & ~shapes.masks[:, :, 2:] & ~shapes.masks[:, :, 1:-1]
    assert bend[inside].mean() > 20 * bend[outside].mean()
    large = make_shapes(20, 5, 64)
    smaller = torch.nn.functional.max_pool2d(large.masks.float()[:, None], 2)[:, 0] > 0
    assert (smaller != shapes.masks[:20]).float().mean() < 0.05  # the same objects


def test_every_arm_is_a_recipe(tmp_path):
    found = set()
    for name in {*arms_of("digits", False), *arms_of("shapes", False)}:
        job = study.Job("arm", "tiny", "digits", str(tmp_path), "cpu", name, 1)
        recipe = parse_recipe(job.recipe(), name)
        assert recipe.steps == 240 * ARMS[name].times
        assert recipe.save_every * 4 == recipe.steps
        found.add(recipe.model_dump_json(exclude={"out", "data", "student"}) + str(ARMS[name].without))
    # All differ, but for the teacher trained on, teacher-made data and from scratch, of which data or start differ.
    assert len(found) >= len(ARMS) - 3


@pytest.fixture(scope="module")
def graft(tmp_path_factory):
    """The digits teacher's exact graft, with a correction that does something."""
    out = tmp_path_factory.mktemp("graft") / "student"
    convert(make_plan(open_source(str(TEACHER)), Options()), out)
    student = load_student(out)
    torch.manual_seed(0)
    torch.nn.init.normal_(student.conv_out.weight, std=0.05)
    return student


@pytest.mark.parametrize("part", PARTS)
def test_a_part_left_out_changes_what_it_should(part, graft, monkeypatch):
    for owner, names in ((ChunkedDiT, ("_move", "_cells", "dechunk", "decode")), (chunked_dit, ("LATTICE", "smooth")),
                         (losses, ("visible_detail", "TARGET_FLOOR"))):  # fmt: skip
        for name in names:
            monkeypatch.setattr(owner, name, getattr(owner, name))  # restored afterwards
    images, labels = digits().held_out()
    x, y = images[:8], labels[:8]
    t = torch.full((8,), 400)

    @torch.inference_mode()
    def outputs() -> dict[str, torch.Tensor]:
        graft._constants.clear()
        router = graft(x, t, y, guide=0.0).routing.logit
        return {
            "grid": graft(x, t, y, guide=16.0).sample,
            "dropped": graft(x, t, y, guide=16.0, tail_drop=0.5).sample,
            "router": router,
            "target": losses.visible_detail(x, graft.alpha_bar(t), torch.zeros(256)),
        }

    before = outputs()
    leave_out(part)
    after = outputs()
    graft._constants.clear()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {
        "lattice": {"router", "dropped"},
        "cell-mean": {"dropped"},
        "size-bias": {"dropped"},
        "fill": {"dropped"},
        "correction": {"grid", "dropped"},
        "smoothing": {"grid", "dropped"},
        "visibility": {"target"},
        "target-floor": {"target"},
    }
    assert changed == expected[part]


def test_teachers_go_on_where_they_were_interrupted(tmp_path):
    shapes = make_shapes(32, 0, 8)
    settings = {"steps": 40, "batch_size": 2, "lr": 1e-3, "seed": 0, "every": 10}

    class Stop(Exception):
        pass

    def stop(step: int, loss: float) -> None:
        if step == 30:
            raise Stop

    def model() -> torch.nn.Module:
        torch.manual_seed(0)
        small = new_teacher("tiny", 8, 3, 10, 0).config
        return type(new_teacher("tiny", 8, 3, 10, 0)).from_config({**small, "num_layers": 1})

    whole = train_teacher(model(), shapes.images, shapes.labels, **settings)
    state = tmp_path / "state"
    with pytest.raises(Stop):
        train_teacher(model(), shapes.images, shapes.labels, **settings, state=state, clock=stop)
    assert state.exists()
    continued = train_teacher(model(), shapes.images, shapes.labels, **settings, state=state)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, continued.state_dict()[name]), name


def run_study(out, *arguments):
    return subprocess.run(
        [sys.executable, ROOT / "examples/study/study.py", "--quick", "--jobs", "1", "--out", out, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_quick_runs_and_does_nothing_twice(tmp_path):
    arguments = ("--sets", "digits", "--arms", "exact", "teacher trained on")
    done = run_study(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    assert "| exact |" in done.stdout
    found = json.loads((tmp_path / "results.json").read_text())["quick"]["sets"]["digits"]
    rows = found["arms"]["exact"]["0"]["rows"]
    assert [row["step"] for row in rows] == [0, 8, 16, 24, 32]
    assert rows[0]["val_loss"] == pytest.approx(found["teacher"]["val_loss"], rel=1e-4)
    assert found["baselines"]
    assert {path.name for path in (tmp_path / "images").iterdir()} == {
        "study-quick-digits.png", "baselines-quick-digits.png"
    }  # fmt: skip
    result = tmp_path / "digits" / "exact-0" / "result.json"
    made = result.stat().st_mtime_ns
    again = run_study(tmp_path, *arguments)
    assert again.returncode == 0, again.stderr
    assert result.stat().st_mtime_ns == made
    assert again.stdout == done.stdout


def without(settings, names):
    return {key: value for key, value in settings.items() if key not in names}


def test_results_are_of_this_code(tmp_path):
    """docs/results.md is what the code here writes of docs/results.json; that is of the recipes and of the judging code
    that are here (without comments and layout); and training begins as the run of the exact graft began."""
    studies = json.loads(RESULTS.read_text())
    assert '"/' not in RESULTS.read_text()  # no paths of the machine that it was run on
    assert (ROOT / "docs" / "results.md").read_text() == results.render(studies), "study.py --report --docs"
    for plan, found in studies.items():
        same = found["versions"]["python"].split(".")[:2] == list(platform.python_version_tuple()[:2])
        left = set() if same else {"code"}  # other Pythons dump a syntax tree in other words
        for name, of_set in found["sets"].items():
            jobs = {kind: study.Job(kind, plan, name, str(tmp_path), "cpu") for kind in study.JUDGED_BY}
            for kind, job in jobs.items():
                if kind in of_set:
                    was, now = of_set[kind]["settings"], study.as_json(job.settings())
                    assert without(was, left) == without(now, left), f"run the study again: {kind}"
            for arm, runs in of_set["arms"].items():
                for seed, run in runs.items():
                    job = study.Job("arm", plan, name, str(tmp_path), "cpu", arm, int(seed))
                    now, was = study.as_json(job.settings()), run["settings"]
                    for gpu in ("mixed_precision", "data_workers"):
                        now["recipe"].pop(gpu, None), was["recipe"].pop(gpu, None)
                    assert without(was, left) == without(now, left), f"run again: {arm} of {name}, seed {seed}"
    first = studies["tiny"]["sets"]["digits"]["arms"]["exact"]["0"]["first_losses"]
    job = study.Job("arm", "tiny", "digits", str(tmp_path), "cpu", "exact", 0)
    recipe = parse_recipe(yaml.safe_load(yaml.safe_dump(job.recipe())), "exact")

    class Done(Exception):
        pass

    def stop(row):
        if row["step"] == recipe.log_every:
            raise Done

    prepared = prepare(recipe)
    with pytest.raises(Done):
        train(recipe, prepared.student, prepared.teacher, prepared.data, prepared.out, on_step=stop)
    with (prepared.out / "log.csv").open() as file:
        now = next(csv.DictReader(file))
    for key in ("step", "loss", "distill", "router", "ratio", "tokens_kept"):
        assert float(now[key]) == pytest.approx(float(first[key]), rel=0.01), f"{key} of the first steps has changed"


def test_results_are_of_the_weights_here_and_judged_alike(tmp_path):
    """The teachers and the classifier are those that the results are of, and the digits teacher, judged anew, gets the
    figures that it has: validation, sampling, FLOPs and metrics are as they were."""
    for name, of_set in json.loads(RESULTS.read_text())["tiny"]["sets"].items():
        now = study.Job("teacher", "tiny", name, str(tmp_path), "cpu").inputs()
        for run in (of_set["teacher"], *(run for runs in of_set["arms"].values() for run in runs.values())):
            assert run["inputs"] == now
    known = json.loads(RESULTS.read_text())["tiny"]["sets"]["digits"]["teacher"]
    job = study.Job("teacher", "tiny", "digits", str(tmp_path), "cpu")
    found = study.as_json(Judge(digits(), job.samples, study.PLANS["tiny"].held_out, tmp_path).judge_teacher())
    assert found["val_loss_by_t"] == pytest.approx(known["val_loss_by_t"], rel=1e-3)
    for key in ("accuracy", "frechet", "kid", "flops", "tokens", "half_the_steps_mse", "classifier"):
        assert found[key] == pytest.approx(known[key], rel=0.01), key


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quick", "--docs"], "leave out --scale and --docs"),
        (["--scale", "S"], "add --device cuda"),
        (["--scale", "S", "--device", "cuda", "--sets", "digits", "--report"], "--sets digits has no place"),
        (["--report", "--out", "nowhere"], "there is no study in nowhere"),
        (["--report", "--out", "."], "there is no study in ."),
        (["--quick", "--seeds", "0", "-1"], "--seeds -1"),
        (["--quick", "--out", __file__], "is a file"),
        (["--quick", "--jobs", "0"], "--jobs 0"),
        (["--arms", "exakt"], "exakt"),
    ],
)
def test_wrong_options_are_refused_before_anything_runs(arguments, words, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["study.py", *arguments])
    with pytest.raises(SystemExit) as exit_:
        study.parse()
    assert exit_.value.code == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_what_was_begun_with_other_settings_is_neither_taken_nor_removed(tmp_path, capsys):
    job = study.Job("arm", "quick", "digits", str(tmp_path), "cpu", "exact", 0)
    assert not study.is_done(job)
    job.folder.mkdir(parents=True)
    (job.folder / "settings.json").write_text(json.dumps({"settings": job.settings(), "inputs": job.inputs()}))
    assert not study.is_done(job)
    (job.folder / "result.json").write_text("{}")
    assert study.is_done(job)
    other = study.Job("arm", "tiny", "digits", str(tmp_path), "cpu", "exact", 0)
    with pytest.raises(SystemExit) as exit_:
        study.is_done(other)
    assert exit_.value.code == 2
    assert "other settings" in capsys.readouterr().err
    assert (job.folder / "result.json").exists()


def test_docs_keep_what_an_earlier_session_ran_with_the_same_settings():
    def of_set(*runs: tuple[str, str, int], kinds: tuple[str, ...] = ()) -> dict:
        arms: dict = {}
        for arm, seed, settings in runs:
            arms.setdefault(arm, {})[seed] = {"settings": settings, "seconds": 3600}
        return {"digits": {"arms": arms, **{kind: {"settings": 1} for kind in kinds}}}

    def a_study(sets: dict) -> dict:
        return {"machine": ["this"], "hours": 1.0, "sets": sets}

    earlier = a_study(of_set(("exact", "0", 1), ("exact", "1", 1), ("N = 16", "0", 2), kinds=("teacher", "masks")))
    now = a_study(of_set(("exact", "0", 1), ("published", "0", 1)))
    merged = results._with_earlier(now, {**earlier, "machine": ["that"]}, lambda *of: 1)
    found = merged["sets"]["digits"]
    assert {arm: list(runs) for arm, runs in found["arms"].items()} == {"published": ["0"], "exact": ["0", "1"]}
    assert {"teacher", "masks"} <= set(found)
    assert merged["machine"] == ["that", "this"]
    assert merged["hours"] == 2.0
    assert results._with_earlier(now, None, lambda *of: 1) == now


@pytest.mark.parametrize(
    ("ours", "theirs", "words", "reached"),
    [
        ({60: 1.0}, [{240: 3.0}, {480: 2.0, 1920: 1.5}], "60 steps against more than 1920", True),
        ({60: 1.0}, [{480: 2.0, 1920: 1.0}], "60 steps against 1920", None),  # it may have been 481
        ({60: 1.0}, [{1919: 2.0, 1920: 1.0}], "60 steps against 1920", None),
        ({60: 1.0}, [{1920: 2.0, 1980: 1.0}], "60 steps against 1980", True),
        ({60: 1.0}, [{60: 2.0, 180: 1.0}, {480: 0.9}], "60 steps against 180", False),  # the earlier one
        ({60: 2.0, 240: 1.2}, [{1920: 2.0}], "more than 240 steps against more than 1920", None),
        ({60: 2.0, 240: 1.2}, [{1920: 1.0}], "more than 240 steps against 1920", False),
    ],
)
def test_times_fewer_steps_are_said_as_far_as_checkpoints_tell(ours, theirs, words, reached):
    assert summary._against(ours, theirs, 1.0, 32) == (words, reached)


def test_an_aim_is_reached_by_every_seed_or_said_of_some():
    teacher = {"val_loss": 1.0, "val_loss_by_t": {"50": 1.0}}

    def arm(*losses: float) -> dict:
        return {
            str(seed): {"rows": [{"step": 240, "val_loss": loss, "val_loss_by_t": {"50": loss},
                                  "by_tail_drop": {"0.4": {"val_loss": 2 * loss}}}]}
            for seed, loss in enumerate(losses)
        }  # fmt: skip

    within, worst, dropped = summary.aims({"exact": arm(0.9, 1.01, 1.03)}, teacher).splitlines()
    assert "0.98 (0.9 to 1.03), 3 seeds. **Reached by 2 of 3 seeds.**" in within
    assert "**Reached by 1 of 3 seeds.**" in worst
    assert "**Not reached.**" in dropped
    curve = summary.curve_of({"exact": arm(0.9, 1.01, 1.03)}, "exact")
    assert summary.first_step(curve, 0.98) == 240  # by the mean: no seed need be below its own mean


@pytest.mark.parametrize(
    ("before", "after", "word"),
    [
        ([1.0, 1.1], [0.8, 0.99], "better"),
        ([1.0, 1.1], [0.8, 1.01], "even"),  # a seed of one is beyond a seed of the other
        ([1.0, 1.0], [0.99, 0.985], "even"),  # less than 2 %
        ([1.0, 1.0], [1.2, 1.01], "worse"),
    ],
)
def test_claims_are_told_by_all_seeds_and_by_what_matters(before, after, word):
    assert summary.compared("noise MSE", before, after) == word
