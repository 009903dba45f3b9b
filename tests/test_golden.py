"""Golden data: the authors' DC-DiT code and Meta's DiT code are the judges (tests/golden/README.md)."""

import copy
import json

import pytest
import tiny
import torch
from conftest import run
from safetensors.torch import load_file

from upcycle.graft.verify import load_student, load_teacher
from upcycle.sources import open_source
from upcycle.training.losses import ratio_loss

AUTHORS = load_file(tiny.GOLDEN / "dcdit_official_tiny.safetensors")
META = load_file(tiny.GOLDEN / "meta_dit_tiny.io.safetensors")
TOLERANCE = {"atol": 1e-5, "rtol": 0}
CALLS = {"full": 0.0, "drop30": 0.3, "litecfg": torch.tensor([0.0, 0.0, 0.9, 0.9])}


@pytest.fixture(scope="module", params=[True, False], ids=["checkpoint", "state dict"])
def authors_student(request, tmp_path_factory):
    """The authors' checkpoint through the real command."""
    folder = tmp_path_factory.mktemp("authors")
    tiny.save_dcdit_pt(folder / "0400000.pt", with_config=request.param)
    heads = [] if request.param else ["--heads", "2"]
    run("convert", folder / "0400000.pt", "-o", folder / "out", *heads)
    return load_student(folder / "out")


@pytest.mark.parametrize("call", CALLS)
@torch.inference_mode()
def test_authors_checkpoint(authors_student, call):
    out = authors_student(AUTHORS["x"], AUTHORS["t"], AUTHORS["y"], tail_drop=CALLS[call])
    torch.testing.assert_close(out.sample, AUTHORS[f"{call}.out"], **TOLERANCE)
    torch.testing.assert_close(out.routing.probability, AUTHORS[f"{call}.boundary_prob"], **TOLERANCE)
    assert torch.equal(out.routing.mask.int(), AUTHORS[f"{call}.mask"])
    assert torch.equal(out.routing.mask_natural.int(), AUTHORS[f"{call}.mask_natural"])


@pytest.mark.parametrize("ratio", [4, 16])
@torch.inference_mode()
def test_authors_ratio_loss(authors_student, ratio):
    routing = authors_student(AUTHORS["x"], AUTHORS["t"], AUTHORS["y"], tail_drop=CALLS["litecfg"]).routing
    loss = ratio_loss(routing, ratio, group=len(routing.mask))
    torch.testing.assert_close(loss[None], AUTHORS[f"ratio_loss_n{ratio}"], **TOLERANCE)


@pytest.fixture(scope="module")
def meta_export(tmp_path_factory):
    out = tmp_path_factory.mktemp("meta") / "out"
    done = run("convert", tiny.GOLDEN / "meta_dit_tiny.pt", "--ratio", "4", "--heads", "2", "-o", out, "--json")
    return out, json.loads(done.stdout)


@torch.inference_mode()
def test_student_of_meta_checkpoint_equals_metas_code(meta_export):
    out, report = meta_export
    student = load_student(out)
    torch.testing.assert_close(student(META["x"], META["t"], META["y"]).sample, META["out"], **TOLERANCE)
    assert report["max_abs_diff"] <= 1e-5
    assert report["exact"]


@torch.inference_mode()
def test_teacher_that_verification_compares_with_is_metas_code():
    source = open_source(str(tiny.GOLDEN / "meta_dit_tiny.pt"), heads=2)
    out = load_teacher(source)(META["x"], META["t"], META["y"]).sample
    torch.testing.assert_close(out, META["out"], **TOLERANCE)


@torch.inference_mode()
def test_time_embedding_switch_turns_a_diffusers_source_into_metas_code(tmp_path, meta_export):
    """The same weights in diffusers' layout, read with Meta's convention, are Meta's model; without, they are not."""
    stock = tiny.make_dit(0)  # the same shape; loading copies, so that no two tensors share memory
    stock.load_state_dict(load_teacher(open_source(str(tiny.GOLDEN / "meta_dit_tiny.pt"), heads=2)).state_dict())
    tiny.save_transformer(tmp_path / "stock", stock)
    run("convert", tmp_path / "stock", "-o", tmp_path / "meta", "--time-embedding", "meta", "--no-verify")
    run("convert", tmp_path / "stock", "-o", tmp_path / "diffusers", "--no-verify")
    meta, diffusers = (load_student(tmp_path / name)(META["x"], META["t"], META["y"]) for name in ("meta", "diffusers"))
    torch.testing.assert_close(meta.sample, META["out"], **TOLERANCE)
    assert (diffusers.sample - META["out"]).abs().max() > 1e-3


@torch.inference_mode()
def test_meta_training_checkpoint_and_its_weights(tmp_path, dit):
    tiny.save_meta_pt(tmp_path / "train.pt", dit, training=True)
    run("convert", tmp_path / "train.pt", "--heads", "2", "-o", tmp_path / "ema")
    run("convert", tmp_path / "train.pt", "--heads", "2", "-o", tmp_path / "model", "--weights", "model")
    ema, model = (load_student(tmp_path / name)(META["x"], META["t"], META["y"]).sample for name in ("ema", "model"))
    expected = tiny.meta_as_stock(copy.deepcopy(dit))(META["x"], META["t"], META["y"]).sample
    torch.testing.assert_close(ema, expected, **TOLERANCE)
    assert not model.any(), "in this checkpoint the raw weights are zero"
