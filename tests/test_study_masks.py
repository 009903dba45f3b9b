"""The study's look at masks: AUCs against their definition, and a whole report of a tiny student."""

import json
import math
import shutil
import sys

import pytest
import tiny
import torch
from conftest import ROOT, inside
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from upcycle.errors import UpcycleError
from upcycle.output import to_json
from upcycle.sampling.pipeline import load_pipeline
from upcycle.training.losses import local_deviation

sys.path.insert(0, str(ROOT / "examples" / "study"))
import masks
import masks_report
from shapes import make_shapes

TIMES = (0, 300, 900)


def by_pairs(scores, target):
    """The definition of the AUC: pairs of a position of the target and another one, one row."""
    inside, outside = scores[target].double()[:, None], scores[~target].double()
    return ((inside > outside).double() + (inside == outside).double() / 2).mean()


def test_auc_of_known_rows():
    scores = torch.tensor([[1.0, 2, 3, 4], [1, 2, 3, 4], [7, 7, 7, 7], [1, 2, 2, 3], [-torch.inf, 0, 0, torch.inf]])
    target = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [0, 1, 0, 1], [0, 1, 0, 1], [0, 1, 1, 0]]).bool()
    assert masks.auc(scores, target).tolist() == [1.0, 0.0, 0.5, 0.875, 0.5]
    assert masks.auc(scores[:2], torch.tensor([[True] * 4, [False] * 4])).isnan().all()
    random = torch.rand(50, 1024, generator=torch.Generator().manual_seed(0))
    assert masks.auc(random, random.roll(1, 1) > 0.7).mean() == pytest.approx(0.5, abs=0.01)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
def test_auc_is_its_definition(pairs):
    scores, target = torch.tensor([float(s) for s, _ in pairs]), torch.tensor([inside for _, inside in pairs])
    found, wanted = masks.auc(scores[None], target[None]).item(), by_pairs(scores, target).item()
    assert found == pytest.approx(wanted, nan_ok=True)


def test_targets_of_a_square():
    mask = torch.zeros(1, 16, 16, dtype=torch.bool)
    mask[0, 4:11, 4:12] = True
    targets = masks.targets_of(mask)
    band = torch.zeros(16, 16, dtype=torch.bool)
    band[3:12, 3:13] = True
    band[5:10, 5:11] = False
    assert torch.equal(targets["positions"]["outline"].view(16, 16), band)
    whole, part = (targets["windows"][what].view(4, 4) for what in masks.TARGETS)
    assert whole.nonzero().tolist() == [[1, 1], [1, 2], [2, 1], [2, 2]]
    assert part.nonzero().tolist() == [[2, 1], [2, 2]]
    assert not masks.targets_of(torch.ones_like(mask))["positions"]["outline"].any(), "an image's border is no outline"


def test_detectors_of_a_ramp():
    x = torch.arange(8.0).expand(2, 3, 8, 8)
    found = masks.detectors(x)
    assert torch.equal(found["gradient"][..., 1:-1], torch.full((2, 8, 6), 8.0))
    assert torch.equal(found["gradient"], masks.detectors(x.mT)["gradient"].mT)
    assert found["deviation"][:, 1:-1, 1:-1].allclose(torch.tensor((2 / 3) ** 0.5))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A teacher of 3 x 16 x 16 pixels; its graft as ``run/start``, and as ``run/export`` the same without guide."""
    root = tmp_path_factory.mktemp("masks")
    tiny.save_pipeline(root / "teacher", tiny.make_dit(0, width=32, layers=1, in_channels=3))
    inside("convert", root / "teacher", "--ratio", "4", "--no-verify", "-o", root / "run" / "start")
    shutil.copytree(root / "run" / "start", root / "run" / "export")
    config = root / "run" / "export" / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "guide": 0.0}))
    return root


@pytest.fixture(scope="module")
def report(folders):
    students = {"tiny": str(folders / "run" / "export"), "alike": str(folders / "run" / "export")}
    return masks.measure_masks(students, count=12, timesteps=TIMES, pixels=16, teacher=str(folders / "teacher"))


def test_report_against_the_model_asked_directly(report, folders):
    shapes, pipe = make_shapes(12, 3, 16), load_pipeline(str(folders / "run" / "export"))
    noise = torch.randn(shapes.images.shape, generator=torch.Generator().manual_seed(3))
    for k, t in enumerate(TIMES):
        row, time = report["rows"]["tiny"]["by_t"][k], torch.full((12,), t)
        alpha = pipe.transformer.alpha_bar(time)[:, None, None, None]
        x = alpha.sqrt() * shapes.images + (1 - alpha).sqrt() * noise
        routing = pipe.transformer(x, time, shapes.labels).routing
        tokens = routing.mask.sum(1).double()
        assert row["t"] == t
        assert row["kept"] == tokens.mean().item()
        assert row["kept_deviation"] == pytest.approx(tokens.std().item())
        on_object = routing.mask & shapes.masks.flatten(1)
        assert row["inside"] == pytest.approx(on_object.sum().item() / tokens.sum().item())
        each = torch.stack([by_pairs(*pair) for pair in zip(routing.logit, shapes.masks.flatten(1), strict=True)])
        found = row["auc"]["positions"]["mask"]
        assert found["mean"] == pytest.approx(each.mean().item())
        assert found["standard_error"] == pytest.approx(each.std().item() / 12**0.5)
        windows = routing.logit.double().view(12, 4, 4, 4, 4).mean((2, 4)).flatten(1)
        covered = shapes.masks.float().view(12, 4, 4, 4, 4).mean((2, 4)).flatten(1) > 0.5
        each = torch.stack([by_pairs(*pair) for pair in zip(windows, covered, strict=True) if pair[1].any()])
        assert len(each) == report["judged"]["windows"]["mask"]
        assert row["auc"]["windows"]["mask"]["mean"] == pytest.approx(each.mean().item())
        found = report["rows"]["deviation"]["by_t"][k]["auc"]["positions"]["mask"]["mean"]
        assert found == pytest.approx(masks.auc(local_deviation(x), shapes.masks.flatten(1)).mean().item(), abs=1e-3)


def test_rows_of_a_report(report):
    rows = report["rows"]
    assert {name: row["kind"] for name, row in rows.items()} == {
        "tiny": "student", "alike": "student", "tiny, untrained": "untrained",
        "gradient": "detector", "gradient, blurred": "detector", "deviation": "detector",
        "deviation, blurred": "detector", "mean mask": "prior", "mean mask of the class": "prior",
        "deviation of the teacher's x0": "supervision",
    }  # fmt: skip
    assert rows["tiny"] == rows["alike"]
    assert rows["tiny"]["by_t"] != rows["tiny, untrained"]["by_t"]
    for step in rows["tiny, untrained"]["by_t"]:
        assert (step["kept"], step["kept_deviation"]) == (64, 0), "the teacher's grid"
    for name, row in rows.items():
        assert [step["t"] for step in row["by_t"]] == list(TIMES)
        for step in row["by_t"]:
            numbers = [n for of_unit in step["auc"].values() for n in of_unit.values()]
            assert all(0 <= n["mean"] <= 1 for n in numbers)
            assert all((n.get("sigma") in masks.SIGMAS) == name.endswith("blurred") for n in numbers)
    mean, of_class = (rows[name]["by_t"] for name in ("mean mask", "mean mask of the class"))
    assert mean[0]["auc"] == mean[2]["auc"], "it looks at no image"
    assert of_class[0]["auc"]["positions"]["mask"]["mean"] > mean[0]["auc"]["positions"]["mask"]["mean"] > 0.9
    clear, noise = (rows["gradient"]["by_t"][k]["auc"]["positions"]["outline"]["mean"] for k in (0, 2))
    assert clear > 0.75 > 0.6 > noise


def test_table_and_picture_of_what_was_stored(report, tmp_path):
    stored = json.loads(to_json(report))
    text = masks.table(stored)
    assert text == masks.table(report)
    assert text.count("| t = 900 |") == 6
    assert "| tiny, untrained | 64 ± 0 | 64 ± 0 | 64 ± 0 |" in text
    masks.plot(stored, tmp_path / "masks.png")
    with Image.open(tmp_path / "masks.png") as picture:
        assert picture.width == 1800


def test_numbers_that_do_not_exist_are_dashes(report):
    lacking = json.loads(to_json(report))
    lacking["rows"]["tiny"]["by_t"][0]["auc"]["windows"]["mask"] = {"mean": None, "standard_error": None}
    assert masks.table(lacking).count("| tiny | - |") == 1
    assert not masks_report._known(math.nan)


def test_what_is_no_student_is_refused(folders):
    with pytest.raises(UpcycleError, match="no student"):
        masks.measure_masks({"teacher": str(folders / "teacher")}, count=2, timesteps=(0,), pixels=16)
    with pytest.raises(ValueError, match="windows of 4"):
        masks.measure_masks({"tiny": str(folders / "run" / "export")}, count=2, timesteps=(0,), pixels=18)
