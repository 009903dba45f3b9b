"""`upcycle sample --balanced`: many images, by one process or several, killed and gone on with."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import inside
from PIL import Image
from processes import Process

from upcycle.sampling.bulk import SUMS, begin, draw_samples, label_and_seed, read_record
from upcycle.sampling.pipeline import load_pipeline
from upcycle.sampling.sampler import Sampling, decode, sample
from upcycle.training.digits import TEACHER

GIVEN = ["--balanced", "-n", 12, "--steps", 3, "--guidance-scale", 2, "--seed", 4]


def pictures(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bulk") / "whole"
    inside("sample", "digits", *GIVEN, "--batch-size", 5, "-o", folder)
    return folder


def test_images_are_what_the_loop_draws(whole):
    assert len(pictures(whole)) == 12
    pipe = load_pipeline(str(TEACHER))
    label, seed = label_and_seed(10, range(10), 4)
    assert label == 0
    image = decode(pipe, sample(pipe, [label], [seed], Sampling(3, 2.0)))[0, 0]
    stored = torch.from_numpy(np.array(Image.open(whole / "000010.png").convert("L")))
    assert (stored.float() - 255 * image).abs().max() <= 1  # rounding, in another batch


def test_an_npz_as_adm_reads_it(whole, tmp_path):
    done = inside("sample", "digits", *GIVEN[1:], "--batch-size", 7, "-o", tmp_path / "samples.npz", "--json")
    assert json.loads(done.stdout)["images"] == 12
    assert os.listdir(tmp_path) == ["samples.npz"]
    with np.load(tmp_path / "samples.npz", allow_pickle=False) as file:
        images, labels = file["arr_0"], file["arr_1"]
    assert images.shape == (12, 16, 16, 3)
    assert images.dtype == np.uint8
    assert labels.tolist() == [*range(10), 0, 1]
    for i, image in enumerate(images):
        stored = np.array(Image.open(whole / f"{i:06d}.png").convert("RGB"))
        assert abs(stored.astype(int) - image).max() <= 1


def test_killed_and_gone_on_with(whole, tmp_path):
    out = tmp_path / "killed"
    process = Process("sample", "digits", *GIVEN, "--batch-size", 1, "-o", out)
    while process.poll() is None and len(pictures(out)) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    early = pictures(out)
    assert 3 <= len(early) < 12
    times = {name: (out / name).stat().st_mtime_ns for name in early}
    inside("sample", "digits", *GIVEN, "--batch-size", 5, "-o", out)
    assert len(pictures(out)) == 12
    assert {name: (out / name).stat().st_mtime_ns for name in early} == times, "drawn once"
    for name, content in pictures(out).items():
        one, other = (np.array(Image.open(folder / name)).astype(int) for folder in (out, whole))
        assert abs(one - other).max() <= 1, (name, len(content))


def test_other_settings_are_refused(whole, failing, tmp_path):
    changed = [*GIVEN, "--hold", 2]
    assert "another hold (None, and now 2)" in failing("sample", "digits", *changed, "-o", whole)
    fewer = ["--balanced", "-n", 5, *GIVEN[3:], "-o"]
    assert f"{whole} is of -n 12, and now 5; give 12 or more" in failing("sample", "digits", *fewer, whole)
    (tmp_path / "mine.txt").write_text("keep me")
    assert "is not empty" in failing("sample", "digits", *GIVEN, "-o", tmp_path)
    assert len(pictures(whole)) == 12


def test_a_late_rank_draws_its_share_and_no_other(tmp_path):
    """What another has written meanwhile does not change who draws what."""
    pipe, drawn = load_pipeline(str(TEACHER)), []
    how = {"steps": 1, "guidance_scale": 1.0, "guidance_channels": None, "seed": 0, "dtype": "fp32", "sampler": "",
           "tail_drop": 0, "uncond_tail_drop": None, "tokens": None, "guidance_interval": None, "hold": None,
           "model": "digits", "model_sha256": ""}  # fmt: skip
    begin(tmp_path / "a", how, 7)
    for rank in (0, 2, 1):
        before = pictures(tmp_path / "a").keys()
        draw_samples(pipe, tmp_path / "a", how, 7, 2, process=(rank, 3))
        drawn.append([int(name[:6]) for name in pictures(tmp_path / "a").keys() - before])
    assert [sorted(some) for some in drawn] == [[0, 3, 6], [2, 5], [1, 4]]


def test_force_deletes_samples_and_nothing_else(tmp_path, failing):
    out = ("--balanced", "-n", 2, "--steps", 1, "-o", tmp_path / "x")
    inside("sample", "digits", *out)
    assert "another steps" in failing("sample", "digits", *out, "--steps", 2)
    (tmp_path / "x/thesis.txt").write_text("mine")
    assert "thesis.txt" in failing("sample", "digits", *out, "--steps", 2, "--force")
    (tmp_path / "x/thesis.txt").unlink()
    inside("sample", "digits", *out, "--steps", 2, "--force")
    assert len(pictures(tmp_path / "x")) == 2


def test_samples_that_are_not_all_there_are_not_evaluated(whole, tmp_path, failing):
    folder, drawn = tmp_path / "begun", tmp_path / "e.json"
    shutil.copytree(whole, folder)
    given = ("--features", "digits", "-o", drawn)
    inside("evaluate", folder, "--reference", "digits-val", *given)
    for name in ("000003.png", "000011.png"):
        (folder / name).unlink()
    for judged, reference in ((folder, "digits-val"), (whole, folder)):
        line = failing("evaluate", judged, "--reference", reference, *given)
        assert f"{folder} holds 10 of 12 samples" in line
        assert f"upcycle sample digits --balanced -n 12 -o {folder}" in line
    inside("sample", "digits", *GIVEN, "-o", folder)
    inside("evaluate", folder, "--reference", "digits-val", *given)
    # More of the same: there are to be as many from now on.
    begin(folder, {name: value for name, value in read_record(folder).items() if name not in ("num", *SUMS)}, 14)
    assert "12 of 14" in failing("evaluate", folder, "--reference", "digits-val", *given)


def test_several_processes_for_one_grid_are_refused(failing, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "--balanced" in failing("sample", "digits", "-o", tmp_path / "x")


def test_two_ranks_share_the_images(whole, tmp_path):
    out = tmp_path / "two"
    given = ["sample", str(TEACHER), *GIVEN, "--batch-size", 2, "--device", "cpu", "-o", out]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "upcycle"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *map(str, given)], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("12 images") == 1, "one process reports"
    assert pictures(out).keys() == pictures(whole).keys()
    assert {path.name for path in out.glob("costs-*")} == {"costs-0.jsonl", "costs-1.jsonl"}
    for name in pictures(out):
        one, other = (np.array(Image.open(folder / name)).astype(int) for folder in (out, whole))
        assert abs(one - other).max() <= 1


def test_a_cut_off_line_of_costs_is_passed_over(whole, tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(whole, folder)
    costs = folder / "costs-0.jsonl"
    costs.write_bytes(costs.read_bytes()[:-20])
    (folder / "000003.png").unlink()
    inside("sample", "digits", *GIVEN, "--batch-size", 5, "-o", folder)
    assert read_record(folder)["drawn"] == read_record(whole)["drawn"] - 2 + 1  # batches of 5, 5 and 2
