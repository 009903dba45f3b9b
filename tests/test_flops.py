"""FLOPs: our counting against torch's counter on real forwards, and against the papers' tables."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from upcycle.evaluation.flops import PAPER_STEPS, chunked_dit_flops, dit_flops, student_flops_by_tail_drop
from upcycle.graft.plan import full_config
from upcycle.models.chunked_dit import ChunkedDiT

SHAPES = {"S": (6, 64, 12), "B": (12, 64, 12), "L": (16, 64, 24), "XL": (16, 72, 28)}
# DC-DiT v2, main table: TFLOPs per image over 250 unguided steps, fixed-patch DiT with patch 2
PUBLISHED = {"S": 3.02, "B": 11.46, "L": 40.21, "XL": 59.00}


def config(size):
    heads, head_dim, layers = SHAPES[size]
    return {
        "num_attention_heads": heads, "attention_head_dim": head_dim, "num_layers": layers, "sample_size": 32,
        "patch_size": 2, "in_channels": 4, "out_channels": 8, "num_classes": 1000,
    }  # fmt: skip


@pytest.mark.parametrize("size", SHAPES)
def test_fixed_patch_costs_what_the_paper_says(size):
    assert PAPER_STEPS * dit_flops(config(size)) / 1e12 == pytest.approx(PUBLISHED[size], rel=0.01)


def test_the_lean_scaffold_costs_about_half_of_the_published_one():
    lean = full_config(config("XL"))
    paper = full_config({**config("XL"), "scaffold": "paper", "patch_size": 1})
    extra = [sum(chunked_dit_flops(c, 256).values()) - dit_flops(config("XL")) for c in (lean, paper)]
    assert 0.3 < extra[0] / extra[1] < 0.6


def counted(model, *inputs):
    """What torch's counter sees, without attention: it counts that of SDPA only on some devices."""
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(*inputs)
    per_op = counter.get_flop_counts()["Global"]
    return sum(n for op, n in per_op.items() if "attention" not in str(op))


def attention(c, tokens):
    heads, dim = c["num_attention_heads"], c["attention_head_dim"]
    return c["num_layers"] * heads * tokens**2 * (4 * dim + 3)


def test_teacher_against_torchs_counter(dit):
    c = {**dit.config, "num_classes": 10}
    inputs = torch.randn(1, 4, 16, 16), torch.tensor([5]), torch.tensor([3])
    # diffusers computes the embedder in every block and once for the head; a count stores it once
    again = dit.config.num_layers * 2 * (256 * 64 + 64 * 64)
    assert counted(dit, *inputs) == dit_flops(c) - attention(c, 64) + again


@pytest.mark.parametrize("router", ["predictability", "cosine"])
@pytest.mark.parametrize("scaffold", ["lean", "paper"])
def test_student_against_torchs_counter(scaffold, router):
    model = ChunkedDiT(
        num_attention_heads=2, attention_head_dim=64, num_layers=3, sample_size=16, num_classes=10, router=router,
        scaffold=scaffold, patch_size=2 if scaffold == "lean" else 1,
    ).eval()  # fmt: skip
    x, t, y = torch.randn(1, 4, 16, 16), torch.tensor([500]), torch.tensor([3])
    with torch.inference_mode():
        tokens = model(x, t, y).routing.mask.sum().item()
    ours = sum(chunked_dit_flops(model.config, tokens).values()) - attention(model.config, tokens)
    assert counted(model, x, t, y) == ours


def test_dropping_the_tail_pays():
    by_drop = student_flops_by_tail_drop(full_config(config("XL")))
    assert by_drop["0"] / 250 == sum(chunked_dit_flops(full_config(config("XL")), 256).values())
    assert by_drop["0.6"] < 0.5 * PAPER_STEPS * dit_flops(config("XL"))
