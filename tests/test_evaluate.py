"""`upcycle evaluate`: its numbers are torch-fidelity's, mistakes move them, and rows of other settings stay apart."""

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
import torch_fidelity
from conftest import ROOT, inside
from PIL import Image
from safetensors.numpy import load_file
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from upcycle.errors import UpcycleError
from upcycle.evaluation import evaluate as rows
from upcycle.evaluation import features as extractors
from upcycle.evaluation.features import DigitsNet, load_extractor
from upcycle.evaluation.images import open_set
from upcycle.evaluation.sweep import matched_steps, parse_sweep
from upcycle.sampling.bulk import draw_samples, read_record
from upcycle.sampling.grid import to_uint8
from upcycle.sampling.pipeline import load_pipeline
from upcycle.sampling.sampler import set_sampler
from upcycle.training.digits import TEACHER, load_digits

DDIM = ("--features", "digits", "--sampler", "ddim", "--batch-size", 100)
HOW = {
    "model": "digits", "model_sha256": "-", "sampler": "ddim", "steps": 3, "guidance_scale": 1.0,
    "guidance_channels": None, "guidance_interval": None, "hold": None, "tail_drop": 0.0, "uncond_tail_drop": None,
    "tokens": None, "seed": 0, "dtype": "fp32",
}  # fmt: skip


def save_images(folder, images):
    """Images uint8 [n, 3, H, W] as PNG files."""
    folder.mkdir(parents=True)
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:04d}.png")
    return folder


def example(name):
    """A script of `examples/digits/`."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / "digits" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Folders ``train`` (400 digits) and ``val`` (150 others)."""
    folder = tmp_path_factory.mktemp("sets")
    for name, count in (("train", 400), ("val", 150)):
        save_images(folder / name, to_uint8(load_digits(name)[0][:count] / 2 + 0.5))
    return folder


def evaluated(*arguments, out):
    """The one row that the command adds, and its notes."""
    told = json.loads(inside("evaluate", *arguments, "-o", out, "--json").stdout)
    (row,) = told["rows"]
    return row, told["notes"]


@pytest.fixture(scope="module")
def val_row(sets):
    return evaluated(sets / "val", "--reference", sets / "train", "--features", "digits", out=sets / "e.json")


def test_numbers_are_torch_fidelitys(sets, val_row):
    row, notes = val_row
    theirs = torch_fidelity.calculate_metrics(
        input1=str(sets / "val"), input2=str(sets / "train"), feature_extractor="digits", cuda=False, cache=False,
        save_cpu_ram=True, verbose=False, fid=True, isc=True, kid=True, prc=True, kid_subset_size=150,
    )  # fmt: skip
    for ours, name in {
        "fid": "frechet_inception_distance", "inception_score": "inception_score_mean",
        "inception_score_std": "inception_score_std", "kid": "kernel_inception_distance_mean",
        "precision": "precision", "recall": "recall",
    }.items():  # fmt: skip
        assert abs(row[ours] - theirs[name]) < 1e-6 * max(1, abs(theirs[name])), ours
    assert row["sfid"] > 0
    assert (row["num"], row["reference_num"], row["size"], row["kid_subset"]) == (150, 400, [16, 16], 150)
    assert row["sampler"] is row["steps"] is row["guidance_scale"] is None  # nobody said
    assert notes == []


def test_a_set_is_at_no_distance_from_itself(sets):
    row, _ = evaluated(sets / "val", "--reference", sets / "val", "--features", "digits", out=sets / "self.json")
    assert abs(row["fid"]) < 1e-3
    assert (row["precision"], row["recall"]) == (1, 1)


def test_mistakes_in_a_reference_are_seen():
    found = example("planted_mistakes").measure()
    right, right_spatial = found["none"]
    assert right < 1.1
    grown = [found[f"JPEG, quality {quality}"][0] / right for quality in (75, 50, 30, 10)]
    assert grown == sorted(grown)
    assert grown[0] > 1.05
    assert grown[2] > 1.5
    for mode in ("nearest", "bilinear"):
        fid, sfid = found[f"enlarged, {mode}"]
        assert fid > 8 * right
        assert sfid > 2 * right_spatial


def test_references_of_every_kind_agree(sets, val_row, tmp_path):
    images = open_set(str(sets / "train")).read(range(400))
    judged = (sets / "val", "--features", "digits")
    np.savez(tmp_path / "images.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    row, _ = evaluated(*judged, "--reference", tmp_path / "images.npz", out=tmp_path / "1.json")
    same = ("fid", "sfid", "kid", "precision", "recall")
    assert [row[name] for name in same] == [val_row[0][name] for name in same]

    latents = tmp_path / "latents"
    latents.mkdir()
    x0 = load_digits("train")[0][:400]
    save_file({"z0": x0, "label": torch.zeros(400, dtype=torch.int64)}, latents / "00000.safetensors")
    row, _ = evaluated(*judged, "--reference", latents, "--vae", TEACHER, out=tmp_path / "2.json")
    assert [row[name] for name in same] == [val_row[0][name] for name in same]

    (kept,) = (tmp_path / "2.cache").glob("reference-*")
    numbers = load_file(kept)
    statistics = {name: numbers[name] for name in ("mu", "sigma", "mu_s", "sigma_s")}
    np.savez(tmp_path / "statistics.npz", **{name: value.astype(np.float64) for name, value in statistics.items()})
    row, _ = evaluated(*judged, "--reference", tmp_path / "statistics.npz", out=tmp_path / "3.json")
    assert row["fid"] == pytest.approx(val_row[0]["fid"], abs=1e-4)
    assert row["sfid"] == pytest.approx(val_row[0]["sfid"], abs=1e-4)
    assert row["kid"] is row["precision"] is row["reference_num"] is None
    # ADM's files hold statistics of all images and some of these: the statistics go first.
    np.savez(tmp_path / "both.npz", arr_0=images[:50].permute(0, 2, 3, 1).numpy(), **statistics)
    row, _ = evaluated(*judged, "--reference", tmp_path / "both.npz", out=tmp_path / "4.json")
    assert row["fid"] == val_row[0]["fid"]
    assert row["kid_subset"] == 50


def test_the_references_features_are_kept(sets, val_row, monkeypatch, tmp_path):
    (kept,) = (sets / "e.cache").glob("reference-*")
    shutil.copytree(sets / "train", tmp_path / "elsewhere")
    looked = []
    monkeypatch.setattr(
        "upcycle.evaluation.metrics.extract", lambda *a: looked.append(len(a[1])) or extractors.extract(*a)
    )
    row, _ = evaluated(
        sets / "val", "--reference", tmp_path / "elsewhere", "--features", "digits", "--cache", sets / "e.cache",
        out=tmp_path / "e.json",
    )  # fmt: skip
    assert row["fid"] == val_row[0]["fid"]
    assert sum(looked) == 150  # the content counts, not the name
    assert [*(sets / "e.cache").glob("reference-*")] == [kept]


@pytest.fixture(scope="module")
def teacher():
    pipe = load_pipeline(str(TEACHER))
    set_sampler(pipe, "ddim")
    return pipe


def test_sampling_goes_on_where_it_was_interrupted(teacher, tmp_path):
    whole = draw_samples(teacher, tmp_path / "whole", HOW, 12, 5)
    calls = []

    def interrupt(share):
        calls.append(share)
        if len(calls) == 6:  # the first says what is there
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw_samples(teacher, tmp_path / "half", HOW, 7, 4, interrupt)
    assert read_record(tmp_path / "half")["drawn"] == 4
    draw_samples(teacher, tmp_path / "half", HOW, 7, 4)
    half = draw_samples(teacher, tmp_path / "half", HOW, 12, 3)  # more of the same, in other batches
    assert [file.read_bytes() for file in half] == [file.read_bytes() for file in whole]
    ours, theirs = read_record(tmp_path / "half"), read_record(tmp_path / "whole")
    assert ours["flops"] == pytest.approx(theirs["flops"])
    with pytest.raises(UpcycleError, match="another steps"):
        draw_samples(teacher, tmp_path / "half", {**HOW, "steps": 4}, 12, 3)
    half[3].unlink()
    again = draw_samples(teacher, tmp_path / "half", HOW, 12, 3)[3]
    assert again.read_bytes() == whole[3].read_bytes()


def test_wrong_guidance_is_seen_and_rows_say_how_they_were_drawn(tmp_path, failing):
    out = tmp_path / "e.json"
    model = ("digits", "--reference", "digits", *DDIM, "--steps", 5, "--num", 80)
    right, notes = evaluated(*model, "--guidance-scale", 1.5, out=out)
    assert not any("compared:" in note for note in notes)
    told = {"model": "digits", "sampler": "ddim", "steps": 5, "guidance_scale": 1.5, "guidance_channels": None,
            "tail_drop": 0, "seed": 0, "num": 80, "features": "digits", "reference": "digits"}  # fmt: skip
    assert told.items() <= right.items()
    assert right["flops_per_image"] > 1e8
    assert right["seconds_per_image"] > 0
    wrong, notes = evaluated(*model, "--guidance-scale", 9, out=out)
    assert wrong["fid"] > 1.5 * right["fid"]
    # Nothing is compared that was drawn otherwise, and nothing is drawn to be compared with it.
    note = notes[-1]
    assert "not compared: guidance scale is 1.5 there and 9.0 here" in note
    drawn = sorted(path.name for path in (tmp_path / "e.cache").iterdir())
    line = failing("evaluate", *model, "--guidance-scale", 3, "--compare-with", out, "-o", tmp_path / "f.json")
    assert "no row to compare with" in line
    assert "guidance scale is 1.5 there and 3.0 here" in line
    assert not (tmp_path / "f.json").exists()
    assert sorted(path.name for path in (tmp_path / "e.cache").iterdir()) == drawn
    # A folder that says how it was drawn is the same evaluation.
    again, _ = evaluated(wrong["samples"], "--reference", "digits", "--features", "digits", out=out)
    assert {**again, "machine": wrong["machine"], "samples": wrong["samples"]} == wrong
    assert [row["guidance_scale"] for row in rows.read_rows(out)] == [1.5, 9]


def test_held_samples_are_not_compared_with_others(tmp_path):
    for name, hold in (("plain", ()), ("held", ("--hold", 2))):
        given = ("--balanced", "-n", 20, "--steps", 3, "--sampler", "ddim", *hold)
        inside("sample", "digits", *given, "-o", tmp_path / name)
    out = ("--reference", "digits-val", "--features", "digits", "-o", tmp_path / "e.json")
    inside("evaluate", tmp_path / "plain", *out)
    done = inside("evaluate", tmp_path / "held", *out)
    assert "hold is none there and 2 here" in done.stderr
    assert "hold 2" in done.stdout


def test_a_sweep_beside_the_teacher(tmp_path):
    student = tmp_path / "dc4"
    inside("convert", TEACHER, "-o", student, "--no-verify")
    done = inside(
        "evaluate", student, "--reference", "digits-val", *DDIM, "--steps", 4, "--num", 20, "--guidance-scale", 1,
        "--sweep", "tail-drop=0:.5:.5", "-o", tmp_path / "sweep.json", "--json",
    )  # fmt: skip
    told = json.loads(done.stdout)
    ours = [row for row in told["rows"] if row["tokens_kept"] is not None]
    theirs = [row for row in told["rows"] if row["tokens_kept"] is None]
    assert [row["tail_drop"] for row in ours] == [0, 0.5]
    assert ours[0]["tokens_kept"] == 64
    assert ours[1]["tokens_kept"] == 32
    assert ours[0]["fid"] == pytest.approx(theirs[0]["fid"], abs=0.5)  # the student is its teacher at ρ = 0
    assert ours[1]["flops_per_image"] < ours[0]["flops_per_image"]
    assert [row["steps"] for row in theirs] == [4, *matched_steps(4, theirs[0]["flops_per_image"], ours)]
    assert {row["model"] for row in theirs} == {str(TEACHER)}  # which the student's provenance names
    assert "biased" in told["notes"][0]
    with Image.open(told["picture"]) as picture:
        assert picture.size[0] > 500
    assert rows.read_rows(tmp_path / "sweep.json") == told["rows"]


def test_sweeps():
    assert parse_sweep("tail-drop=0:.6:.1") == [0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert parse_sweep("tail-drop=.2:.2:.1") == [0.2]
    for wrong in (
        "tail-drop",
        "tail-drop=0:1:.1",
        "tail-drop=0:.6:0",
        "tail-drop=.6:0:.1",
        "steps=1:2:1",
        "tail-drop=0:nan:1",
    ):
        with pytest.raises(UpcycleError, match="--sweep"):
            parse_sweep(wrong)


def test_the_digits_features_read_held_out_digits():
    net = load_extractor("digits").net
    images, labels = load_digits("val")
    assert isinstance(net, DigitsNet)
    assert (net(images)[2].argmax(1) == labels).sum() == 293  # 98.7 % of 297, as docs/evaluation.md says


def test_inception_has_adms_spatial_features_too(tmp_path, monkeypatch, failing):
    torch.manual_seed(0)
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *a: None)
    file = tmp_path / "weights.pth"
    torch.save({}, file)
    theirs = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file))
    monkeypatch.undo()
    torch.save(theirs.state_dict(), file)
    line = failing("evaluate", tmp_path, "--reference", tmp_path, "--inception-weights", file)
    assert "SHA-256 differs" in line
    monkeypatch.setattr(extractors, "INCEPTION_SHA256", extractors.digest(file))
    ours = load_extractor("inception", file)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    found = extractors.extract(ours, images)
    for name, value in zip(("features", "logits"), theirs(images), strict=True):
        assert torch.equal(found[name], value)
    seen = []
    theirs.Mixed_6d.register_forward_hook(lambda module, args, output: seen.append(output[:, :7]))
    theirs(images)
    assert torch.equal(found["spatial"], seen[0].flatten(1))  # its first branch comes first
    assert found["spatial"].shape == (2, 7 * 17 * 17)


@pytest.fixture
def bad(tmp_path):
    """Folders and files that cannot be evaluated."""
    grey = torch.zeros(3, 3, 16, 16, dtype=torch.uint8)
    (tmp_path / "empty").mkdir()
    save_images(tmp_path / "good", grey)
    save_images(tmp_path / "large", torch.zeros(3, 3, 32, 32, dtype=torch.uint8))
    mixed = save_images(tmp_path / "mixed", grey)
    Image.new("RGB", (20, 16)).save(mixed / "9999.png")
    broken = save_images(tmp_path / "broken", grey)
    (broken / "0001.png").write_bytes(b"no image")
    np.savez(tmp_path / "statistics.npz", mu=np.zeros(5), sigma=np.zeros((5, 5)))
    np.savez(tmp_path / "other.npz", x=np.zeros(5))
    np.savez(tmp_path / "pickled.npz", arr_0=np.array([{"a": 1}], dtype=object))
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 4, 4, 3)))
    np.savez(tmp_path / "empty.npz", arr_0=np.zeros((0, 4, 4, 3), np.uint8))
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "text.csv").write_text("no folder")
    (tmp_path / "foreign.json").write_text('{"rows": 1}')
    return tmp_path


@pytest.mark.parametrize(
    ("judged", "reference", "options", "says"),
    [
        ("empty", "good", (), ["empty holds no images"]),
        ("good", "empty", (), ["empty holds no images"]),
        ("good", "missing", (), ["missing: no such folder"]),
        ("mixed", "good", (), ["differing sizes", "0000.png is 16x16", "9999.png 20x16"]),
        ("broken", "good", (), ["0001.png is no readable image"]),
        ("good", "large", (), ["good has images of 16x16", "the reference large of 32x32"]),
        ("large", "good", (), ["large has images of 32x32", "--features digits"]),
        ("good", "statistics.npz", (), ["statistics of 5 features and the samples 64"]),
        ("statistics.npz", "good", (), ["without images"]),
        ("good", "other.npz", (), ["holds x", "arr_0, or mu and sigma"]),
        ("good", "pickled.npz", (), ["no readable .npz"]),
        ("good", "empty.npz", (), ["holds no images"]),
        ("good", "text.npz", (), ["text.npz", "zip archive"]),
        ("good", "text.csv", (), ["is a single file"]),
        ("good", "floats.npz", (), ["float64 [2, 4, 4, 3]", "uint8"]),
        ("good", "good", ("--num", 4), ["holds 3 images", "--num 4"]),
        ("good", "good", ("--num", 1), ["at least 2"]),
        ("good", "good", ("--sweep", "tail-drop=0:.5:.5"), ["--sweep is for models"]),
        ("good", "good", ("--inception-weights", "x"), ["leave out --inception-weights"]),
        ("good", "good", ("--teacher", "digits"), ["--teacher", "--sweep"]),
        ("good", "good", ("-o", "foreign.json"), ["foreign.json is no file of evaluations"]),
        ("good", "good", ("--compare-with", "nothing.json"), ["nothing.json: no such file"]),
    ],
)  # fmt: skip
def test_bad_input(bad, failing, monkeypatch, judged, reference, options, says):
    monkeypatch.chdir(bad)
    line = failing("evaluate", judged, "--reference", reference, "--features", "digits", *options)
    for part in says:
        assert part in line, line
    assert not (bad / "evaluations.json").exists()


def test_models_that_do_not_fit(bad, failing, monkeypatch):
    monkeypatch.chdir(bad)
    line = failing("evaluate", "digits", "--reference", "large", "--inception-weights", "none.pth")
    assert "none.pth: no such file" in line
    line = failing("evaluate", "digits", "--reference", "good", "--features", "digits", "--tail-drop", "0.5")
    assert "leave out --tail-drop" in line
    line = failing("evaluate", "digits", "--reference", "good", "--features", "digits", "--sweep", "tail-drop=0:.5:.5")
    assert "no tail to drop" in line
