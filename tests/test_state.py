"""Runs that are interrupted: killed at any moment, told to stop, out of disk. Each goes on bit for bit."""

import json
import os
import random
import re
import resource
import shutil
import signal
import time

import pytest
import torch
import yaml
from conftest import run
from runs import WEIGHTS, names_in, rows_of, run_here, same, small, start, steps_in, until, write_recipe
from safetensors.torch import load_file

from upcycle import provenance
from upcycle.errors import UpcycleError
from upcycle.recipe import load_recipe
from upcycle.training.run import finetune, prepare
from upcycle.training.state import checkpoints


def assert_same_run(ours, theirs):
    """Weights, averages, optimizer, random states, log and validation, to the last bit, but for wall times."""
    assert same(load_file(ours / WEIGHTS), load_file(theirs / WEIGHTS))
    assert names_in(ours / "checkpoints") == names_in(theirs / "checkpoints")
    for name in names_in(theirs / "checkpoints"):
        a, b = ours / "checkpoints" / name, theirs / "checkpoints" / name
        assert names_in(a) == names_in(b) == [
            "model.safetensors", "optimizer.bin", "random_states_0.pkl", "recipe.json", "run.pt",
        ]  # fmt: skip
        assert same(load_file(a / "model.safetensors"), load_file(b / "model.safetensors"))
        for file in ("optimizer.bin", "run.pt", "random_states_0.pkl"):
            assert same(*(torch.load(folder / file, weights_only=False) for folder in (a, b))), file
    assert rows_of(ours / "log.csv") == rows_of(theirs / "log.csv")
    if (theirs / "validation.csv").exists():
        assert (ours / "validation.csv").read_bytes() == (theirs / "validation.csv").read_bytes()
        assert names_in(ours / "previews") == names_in(theirs / "previews")


def kill_and_go_on(world, folder, kills, steps, seed):
    """Kill a run with SIGKILL ``kills`` times, at random moments, and go on each time; returns where kills landed."""
    draw = random.Random(seed)
    options = {
        "data_workers": 1,
        "log_every": 3,
        "save_every": 1,
        "validation": {"data": str(world / "held-out"), "every": 4},
        "preview": {"every": 10, "labels": [0, 3], "steps": 4},
    }
    stages = ({"name": "align", "steps": steps // 2, "losses": {"blocks": 1}}, {"name": "rest", "steps": steps // 2})
    whole = start(write_recipe(folder / "whole.yaml", world, *stages, **options))
    path = write_recipe(folder / "killed.yaml", world, *stages, **options)
    out = folder / "killed"
    landed = []
    for kill in range(kills):
        before = checkpoints(out / "checkpoints")
        done = int(before[-1].name[5:]) if before else 0
        process = start(path, *(["--resume"] if kill else []))
        # Before the first save of all, while a checkpoint is being written, or anywhere.
        where = "early" if kill == 0 else draw.choice(["save", "save", "anywhere"])
        at = done + draw.randint(1, max(1, (steps - done) // (kills - kill) - 4))
        late = draw.uniform(0, 0.03)
        ready = {
            "early": lambda: (out / "start").exists(),
            "save": lambda at=at: (out / "checkpoints" / f".partial-{at:07d}").exists(),
            "anywhere": lambda at=at: (out / "checkpoints" / f"step-{at:07d}").exists(),
        }[where]
        assert until(process, ready), process.communicate()[1]
        time.sleep(late if where == "save" else 4 * late)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        names = names_in(out / "checkpoints")
        landed.append("in a save" if any(name.startswith(".partial") for name in names) else where)
        print(f"seed {seed}, kill {kill}: {landed[-1]}, {names}, {steps_in(out)} rows")
    done = run("finetune", path, "--resume", check=False)
    assert done.returncode == 0, done.stderr
    _, stderr = whole.communicate(timeout=300)
    assert whole.returncode == 0, stderr
    assert_same_run(out, folder / "whole")
    assert [int(row["step"]) for row in rows_of(out / "log.csv")] == [*range(3, steps, 3), steps]
    assert [int(row["step"]) for row in rows_of(out / "validation.csv")] == [*range(4, steps, 4), steps]
    hidden = [str(p) for p in out.rglob(".*")]
    assert not hidden, "what the kills left is gone"
    return landed


def test_killed_ten_times_is_bit_identical(world, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # two threads once added gradients up in changing order
    landed = kill_and_go_on(world, tmp_path, kills=10, steps=60, seed=random.SystemRandom().randrange(1000))
    assert "in a save" in landed


def test_ctrl_c_saves_and_says_how_to_go_on(world, tmp_path):
    """Like any terminal, the signal goes to the workers too. The run goes on, and begins anew only with another out."""
    path = write_recipe(tmp_path / "run.yaml", world, {"steps": 2000}, data_workers=2, save_every=5000, log_every=7)
    out = tmp_path / "run"
    process = start(path)
    assert until(process, lambda: steps_in(out) > 2), process.communicate()[1]
    os.killpg(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert f"go on with: upcycle finetune {path} --resume" in stderr
    (saved,) = names_in(out / "checkpoints")
    step = int(saved.removeprefix("step-"))
    assert f"saved at step {step};" in stderr
    assert steps_in(out) == step // 7
    assert not (out / "export").exists()
    with pytest.raises(UpcycleError, match="continue it with --resume"):
        prepare(small(world, out, {"steps": 2000}))
    again = start(path, "--resume")
    assert until(again, lambda: steps_in(out) > step // 7 + 1), again.communicate()[1]
    os.killpg(again.pid, signal.SIGINT)
    again.communicate(timeout=120)
    assert again.returncode == 130
    rows = [int(row["step"]) for row in rows_of(out / "log.csv")]
    assert rows == list(range(7, 7 * len(rows) + 1, 7))


def test_ctrl_c_twice_stops_at_once(world, tmp_path):
    """Also where the step takes long: nothing is saved, the second signal does not wait for it."""
    path = write_recipe(tmp_path / "run.yaml", world, {"steps": 5}, batch_size=20000)
    process = start(path)
    assert until(process, lambda: (tmp_path / "run" / "log.csv").exists()), process.communicate()[1]
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    for _ in range(6):  # two signals during one long operation are one to Python
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        until(process, lambda: False, seconds=5)
        if process.poll() is not None:
            break
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stderr.strip().splitlines()[-1] == "error: interrupted"
    assert names_in(tmp_path / "run" / "checkpoints") == []


def test_the_last_and_the_best_are_kept(world, tmp_path):
    """A learning rate that spoils the student makes the first validation the best; its checkpoint outlives the rest."""
    options = {"validation": {"data": str(world / "held-out"), "every": 2}, "save_every": 1, "ema": 0.0}
    run_here(small(world, tmp_path / "run", {"name": "good", "steps": 2}, {"steps": 6, "lr": 0.5}, **options))
    # From step 4 on nothing is finite, so that nothing is saved but the end.
    assert names_in(tmp_path / "run/checkpoints") == [f"step-000000{step}" for step in (2, 3, 8)]


def test_a_finished_run_goes_on_without_a_change(world, tmp_path):
    """It only exports anew; rows that were left over at the end are not written twice."""
    recipe = small(world, tmp_path / "run", {"steps": 5}, log_every=3, validation={"data": str(world / "held-out")})
    run_here(recipe)
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    shutil.rmtree(tmp_path / "run" / "export")
    run_here(recipe, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "copy")
    assert [row["step"] for row in rows_of(tmp_path / "run/log.csv")] == ["3", "5"]


def test_the_newest_complete_checkpoint_is_taken(world, tmp_path):
    """What a kill left half-written is ignored and removed; before the first save a run begins anew, with a note."""
    recipe = small(world, tmp_path / "run")
    out = tmp_path / "run"
    with pytest.raises(UpcycleError, match="no checkpoint to resume from; run without --resume"):
        prepare(recipe, resume=True)
    prepare(recipe)
    assert run_here(recipe, resume=True) == [f"no checkpoint in {out}/checkpoints yet: the run starts anew"]
    whole = load_file(out / WEIGHTS)
    shutil.rmtree(out / "checkpoints" / "step-0000006")
    for name in (".partial-0000006", ".old-step-0000002"):
        shutil.copytree(out / "checkpoints" / "step-0000004", out / "checkpoints" / name)
        (out / "checkpoints" / name / "run.pt").unlink()
    (out / ".start.partial-12").mkdir()
    (out / ".recipe.yaml.partial-12").write_text("")
    assert run_here(recipe, resume=True) == []
    assert names_in(out / "checkpoints") == ["step-0000004", "step-0000006"]
    assert not list(out.glob(".*"))
    assert same(whole, load_file(out / WEIGHTS))


def test_a_checkpoint_of_another_recipe_is_refused(world, tmp_path):
    """The line names each difference; what may change does."""
    out = tmp_path / "run"
    stages = {"name": "one", "steps": 2}, {"name": "two", "steps": 2}
    run_here(small(world, out, *stages))

    def refused(*stages, **changes):
        with pytest.raises(UpcycleError, match="belongs to another recipe") as error:
            prepare(small(world, out, *stages, **changes), resume=True)
        return str(error.value).partition("another recipe: ")[2]

    assert refused(stages[0], {**stages[1], "warmup": 5}) == "stages.two.warmup was 0 and is 5"
    assert refused(*stages, seed=3, batch_size=16) == "batch_size was 8 and is 16; seed was 0 and is 3"
    assert refused(*reversed(stages)) == "stages was ['one', 'two'] and is ['two', 'one']"
    assert refused(stages[0]) == "stages was ['one', 'two'] and is ['one']"
    assert "validation.data was None and is " in refused(*stages, validation={"data": str(world / "held-out")})
    run_here(small(world, out, *stages, log_every=2, save_every=1, data_workers=1, keep_checkpoints=5), resume=True)


def test_checkpoints_from_before_an_option_go_on(world, tmp_path):
    recipe = small(world, tmp_path / "run", {"steps": 4})
    run_here(recipe)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-0000004")
    told = tmp_path / "run" / "checkpoints" / "step-0000002" / "recipe.json"
    told.write_text(json.dumps({k: v for k, v in json.loads(told.read_text()).items() if k not in ("method", "ddit")}))
    run_here(recipe, resume=True)
    with pytest.raises(UpcycleError, match="seed was 0 and is 3"):
        prepare(small(world, tmp_path / "run", {"steps": 4}, seed=3), resume=True)


def test_damaged_checkpoints_are_named(world, tmp_path):
    recipe = small(world, tmp_path / "run", {"steps": 4})
    run_here(recipe)
    shutil.rmtree(tmp_path / "run" / "export")  # or nothing would be left to do
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


def test_a_full_disk_costs_no_checkpoint_and_no_run(world, tmp_path):
    """A limit on the size of files makes saving fail as a full disk does, midway: the run warns and goes on, the old
    checkpoint stays whole, and later saves work again."""
    recipe = small(world, tmp_path / "run", save_every=1, keep_checkpoints=1)
    prepared = prepare(recipe)
    weights = (prepared.start / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    notes, found = [], {}

    def on_step(row):
        """Steps 3 and 4 meet the full disk: the weights fit, the optimizer's state does not."""
        found[row["step"]] = names_in(tmp_path / "run" / "checkpoints")
        full = row["step"] in (3, 4)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(weights * 1.2) if full else before[0], before[1]))

    try:
        finetune(prepared, on_step=on_step, on_note=notes.append)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [re.search(r"no space left for the checkpoint of step (\d)", note)[1] for note in notes] == ["3", "4"]
    assert all("step-0000002; make room" in note for note in notes)
    assert found[4] == found[5] == ["step-0000002"]
    assert names_in(tmp_path / "run" / "checkpoints") == ["step-0000006"]
    assert [row["step"] for row in rows_of(tmp_path / "run" / "log.csv")] == list("123456")
    run_here(small(world, tmp_path / "whole", save_every=1, keep_checkpoints=1))
    assert same(*(load_file(tmp_path / name / WEIGHTS) for name in ("run", "whole")))


def test_a_full_disk_keeps_rows_of_the_log(world, tmp_path):
    """Rows that do not fit wait until there is room; not one is lost, doubled or torn."""
    prepared = prepare(small(world, tmp_path / "run", {"steps": 8}, save_every=99))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    sizes = []

    def on_step(row):
        sizes.append((tmp_path / "run" / "log.csv").stat().st_size)
        limit = sizes[-1] + 50 if row["step"] == 3 else before[0] if row["step"] == 6 else None
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))

    try:
        finetune(prepared, on_step=on_step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert sizes[3] == sizes[5] == sizes[2] + 50, "half a row"
    rows = rows_of(tmp_path / "run" / "log.csv")
    assert [row["step"] for row in rows] == list("12345678")
    assert all(None not in row.values() for row in rows)


def test_a_full_disk_at_the_interruption_is_an_error(world, tmp_path):
    """Nothing says that the run was saved where it was not."""
    prepared = prepare(small(world, tmp_path / "run", save_every=99))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def on_step(row):
        if row["step"] == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
            os.kill(os.getpid(), signal.SIGINT)

    try:
        with pytest.raises(UpcycleError, match="no space left for the checkpoint of step 4; there is none yet"):
            finetune(prepared, on_step=on_step)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert names_in(tmp_path / "run" / "checkpoints") == []


def test_result_is_an_export_and_the_recipe_is_beside_it(world, tmp_path):
    path = write_recipe(tmp_path / "run.yaml", world, keep_checkpoints=1)
    report = json.loads(run("finetune", path, "--json").stdout)
    out = tmp_path / "run"
    assert report["out"] == str(out / "export")
    assert report["step"] == 6
    assert names_in(out / "checkpoints") == ["step-0000006"]
    files = [{str(p.relative_to(folder)) for p in folder.rglob("*")} for folder in (out / "start", out / "export")]
    assert files[0] == files[1]
    assert json.loads((out / "export/transformer/config.json").read_text())["guide"] == 0, "the router is on its own"
    written = yaml.safe_load((out / "recipe.yaml").read_text())
    assert (written["stages"][0]["steps"], written["seed"]) == (6, 0), "with the defaults"
    assert load_recipe(out / "recipe.yaml") == load_recipe(path, ["keep_checkpoints=1"])


def told(out):
    return provenance.read(out / "export")["history"][-1]


def test_a_finished_run_is_left_alone(world, tmp_path):
    """What would be changed from here on has had no effect on what is there, and is not said of it."""
    out = tmp_path / "run"
    run_here(small(world, out, {"steps": 4}))
    before = (out / "export" / "upcycle.json").read_bytes()
    notes = run_here(small(world, out, {"steps": 4, "lr": 0.5}), resume=True)
    assert notes == [f"{out} has done its 4 steps already; nothing is left to do"]
    assert (out / "export" / "upcycle.json").read_bytes() == before
    assert told(out)["changes"] == []


def test_changes_between_a_checkpoint_and_its_continuation_are_on_record(world, tmp_path):
    out = tmp_path / "run"
    run_here(small(world, out, {"steps": 4}))
    shutil.rmtree(out / "checkpoints" / "step-0000004")
    shutil.rmtree(out / "export")
    changed = small(world, out, {"steps": 4, "lr": 1e-4}, gradient_checkpointing=True)
    run_here(changed, resume=True)
    assert told(out)["changes"] == [
        {"step": 2, "key": "stages.post-train.lr", "was": 1e-3, "is": 1e-4},
        {"step": 2, "key": "gradient_checkpointing", "was": False, "is": True},
    ]


def test_other_data_is_refused(world, tmp_path):
    shutil.copytree(world / "data", tmp_path / "data")
    recipe = small(world, tmp_path / "run", {"steps": 4}, data=str(tmp_path / "data"))
    run_here(recipe)
    shutil.rmtree(tmp_path / "run" / "export")
    shutil.copy(tmp_path / "data" / "00000.safetensors", tmp_path / "data" / "00002.safetensors")
    with pytest.raises(UpcycleError, match=r"step-0000004 belongs to other data: it was 37 samples .* is 57 samples"):
        run_here(recipe, resume=True)


def test_one_run_at_a_time_in_a_folder(world, tmp_path):
    recipe = small(world, tmp_path / "run", {"steps": 2})
    first = prepare(recipe)
    with pytest.raises(UpcycleError, match=r"another process trains in .*/run; wait for it, or choose another 'out'"):
        prepare(recipe)
    finetune(first)
    assert not list((tmp_path / "run").glob(".*"))
