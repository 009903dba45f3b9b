"""`upcycle finetune --dry-run`: what is counted is exact, what is estimated is near, and nothing is written."""

import json

import pytest
import torch
from conftest import inside, run
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from upcycle.graft.plan import Options, make_plan
from upcycle.graft.verify import load_teacher
from upcycle.models import ddit
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.recipe import Recipe
from upcycle.sources import open_source
from upcycle.training import cost, cost_patches
from upcycle.training.chunking import make_optimizer, prepare_student
from upcycle.training.digits import TEACHER
from upcycle.training.state import RunState
from upcycle.training.step import parts_of

STAGES = [
    {"name": "align", "steps": 10, "freeze": ["embedders", "blocks", "head"], "losses": {"blocks": 1.0}},
    {"name": "train", "steps": 30, "freeze": ["embedders", "head"], "teacher_guidance": 2.0,
     "tail_drop": {"values": [0.0, 0.5], "start": 0.2}},
]  # fmt: skip


def recipe(**changes):
    return Recipe(**{"teacher": "digits", "data": "digits", "out": "x", "batch_size": 8, "stages": STAGES, **changes})


@pytest.fixture(scope="module")
def student():
    return ChunkedDiT(**make_plan(open_source(str(TEACHER)), Options()).config)


def test_parameters_by_group(student):
    """Each parameter is in one group, and the groups are those that a recipe freezes."""
    groups = cost.parameter_groups(student)
    assert tuple(groups) == cost.GROUPS
    members = [id(p) for parameters in groups.values() for p in parameters]
    assert sorted(members) == sorted(id(p) for p in student.parameters())
    for name in ("embedders", "blocks", "head"):
        (first, *rest) = parts_of(student, [name])
        assert {id(p) for p in groups[name]} == {id(p) for module in (first, *rest) for p in module.parameters()}
    frozen = sum(p.numel() for module in parts_of(student, ["embedders", "blocks"]) for p in module.parameters())
    total = sum(p.numel() for p in student.parameters())
    assert sum(p.numel() for p in cost.trained(student, ["embedders", "blocks"])) == total - frozen


def test_what_lasts_is_counted_exactly(student):
    """Weights, gradients, AdamW's moments and the average are what a real update holds."""
    asked = recipe()
    prepare_student(student, asked)
    optimizer = make_optimizer(student, asked, fused=False)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    state = RunState(student, 0.9)
    told = cost.memory(asked, student, 100, 1, sharded=False)
    assert told["weights"] == sum(p.nbytes for p in student.parameters())
    assert told["gradients"] == sum(p.grad.nbytes for p in student.parameters() if p.grad is not None)
    moments = [tensor for kept in optimizer.state.values() for tensor in kept.values() if tensor.dim()]
    assert told["optimizer"] == sum(tensor.nbytes for tensor in moments)
    assert told["average"] == sum(shadow.nbytes for shadow in state.ema.shadow_params)
    assert told["teacher"] == 400
    assert told["total"] == sum(value for name, value in told.items() if name != "total")


def test_shares_of_ranks(student):
    """Sharded, rank 0 holds the first chunk of each parameter; DDP keeps a copy of the gradients instead."""
    whole = cost.memory(recipe(), student, 100, 1, sharded=False)
    ddp = cost.memory(recipe(), student, 100, 4, sharded=False)
    fsdp = cost.memory(recipe(), student, 100, 4, sharded=True)
    assert ddp["weights"] == whole["weights"]
    assert ddp["buckets"] == whole["gradients"]
    chunks = sum(p.chunk(4)[0].nbytes for p in student.parameters())
    assert fsdp["weights"] == fsdp["average"] == chunks
    assert whole["weights"] / 4 <= chunks < whole["weights"] / 3
    assert fsdp["teacher"] == whole["teacher"], "every rank has the whole teacher"
    assert fsdp["activations"] == ddp["activations"] == whole["activations"] / 4
    low = recipe(mixed_precision="bf16")
    assert cost.memory(low, student, 100, 1, sharded=False)["bf16_weights"] == whole["weights"] / 2
    assert cost.memory(low, student, 100, 1, sharded=False)["activations"] < whole["activations"]
    again = cost.memory(recipe(gradient_checkpointing=True), student, 100, 1, sharded=False)
    assert again["activations"] < 0.7 * whole["activations"]


def test_activations_are_near_what_autograd_keeps(student):
    """Against the whole model, with a batch of 8 whose even tokens fit the ratio (guide on)."""
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    student.train().requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = student(torch.randn(8, 1, 16, 16), torch.arange(8) * 100, torch.arange(8), guide=8.0)
    assert out.routing.mask.sum(1).tolist() == [64] * 8
    weights = {p.untyped_storage().data_ptr() for p in student.parameters()}
    held = sum(size for place, size in seen.items() if place not in weights)
    told = cost.memory(recipe(), student, 0, 1, sharded=False)["activations"]
    assert told == pytest.approx(held, rel=0.1)


def test_the_command_measures_and_writes_nothing(tmp_path):
    out = tmp_path / "run"
    tail = "stages.post-train.tail_drop={values: [0.0, 0.6], start: 0.4}"
    options = ["--set", f"out={out}", "--set", tail, "--set", "stages.post-train.freeze=[embedders]"]
    report = json.loads(run("finetune", "digits", *options, "--dry-run", "--json").stdout)
    assert not out.exists()
    parameters = report["parameters"]
    assert sum(parameters[name] for name in cost.GROUPS) == parameters["total"] == 788343
    assert parameters["trained"] == {"post-train": parameters["total"] - parameters["embedders"]}
    assert report["memory_per_rank"]["weights"] == 4 * parameters["total"]
    (stage,) = report["stages"]
    # A mean tail drop of 0.3 on 60 % of the steps; one question to the teacher.
    assert stage["tokens_per_sample"] == pytest.approx(64 * (1 - 0.6 * 0.3))
    assert stage["teacher_forwards"] == 1
    assert 2 < stage["flops_per_step"]["student"] / stage["flops_per_step"]["teacher"] < 5
    assert report["measured"]["layers"] == [4]
    assert report["hours"] == pytest.approx(stage["steps"] * stage["seconds_per_step"] / 3600)
    assert report["data"] == {"data": "digits", "there": True, "samples": 1500, "bytes": None}


def test_data_may_be_missing(tmp_path):
    options = ["--set", f"data={tmp_path / 'none'}", "--set", f"out={tmp_path / 'run'}", "--dry-run", "--no-measure"]
    table = run("finetune", "digits", *options, env={"COLUMNS": "200"}).stdout
    assert "not there yet" in table
    assert "time in all" not in table
    assert list(tmp_path.iterdir()) == []


def test_questions_to_the_teacher():
    """Distillation and the router ask once, guidance once more, block distillation once more."""
    source = open_source(str(TEACHER))
    config = make_plan(source, Options()).config
    asked = recipe()
    first, second = (cost._stage(asked, stage, config, source.config) for stage in asked.stages)
    assert (first["teacher_forwards"], second["teacher_forwards"]) == (2, 2)
    assert second["tokens_per_sample"] == pytest.approx(64 * (1 - 0.8 * 0.25))


def test_an_adapter_costs_what_it_takes(tmp_path):
    """Of the digits: what lasts exactly, activations against what autograd keeps in a real step."""
    stages = [{"name": "distill", "steps": 10, "losses": {"distill": 1.0}}]
    asked = recipe(method="ddit", stages=stages, batch_size=4, ddit={"rank": 3})
    report = cost_patches.estimate(asked, measure=False)
    base = load_teacher(open_source(str(TEACHER)))
    ddit.attach(base, ddit.DDiTConfig("DiTTransformer2DModel", [2, 4], rank=3))
    base.requires_grad_(False)
    adapter = base.adapter_parameters().values()
    own, theirs = (sum(p.numel() for p in parameters) for parameters in (adapter, base.parameters()))
    assert report["parameters"] == {"adapter": own, "base": theirs - own, "trained": {"distill": own}}
    memory = report["memory_per_rank"]
    assert memory["weights"] == memory["gradients"] == memory["average"] == memory["optimizer"] / 2 == 4 * own
    assert memory["base"] == 4 * (theirs - own)
    assert memory["total"] == sum(value for name, value in memory.items() if name != "total")
    for parameter in adapter:
        parameter.requires_grad_(True)
    seen, flops = {}, []
    weights = {p.untyped_storage().data_ptr() for p in base.parameters()}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    labels = torch.arange(4)
    for m in (1, 2, 4):
        # torch counts no FLOPs of the CPU's flash attention.
        with base.at(m), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            with torch.autograd.graph.saved_tensors_hooks(pack if m == 2 else lambda x: x, lambda x: x):
                out = base(torch.randn(4, 1, 16, 16), labels, labels).sample
            if m > 1:
                out.sum().backward()
        flops.append(counter.get_total_flops())
    held = sum(size for place, size in seen.items() if place not in weights)
    assert memory["activations"] == pytest.approx(held, rel=0.1)
    (stage,) = report["stages"]
    assert stage["flops_per_step"] == {
        "student": pytest.approx((flops[1] + flops[2]) / 2, rel=1e-4),
        "teacher": flops[0],
    }
    assert stage["tokens_per_sample"] == (16 + 4) / 2
    again = asked.model_copy(update={"gradient_checkpointing": True})
    less = cost_patches.estimate(again, measure=False)
    assert less["memory_per_rank"]["activations"] < memory["activations"] / 2
    assert less["stages"][0]["flops_per_step"]["student"] > 1.2 * stage["flops_per_step"]["student"]


def test_the_command_measures_a_step_of_an_adapter(tmp_path):
    options = ["--set", f"out={tmp_path / 'run'}", "--set", "batch_size=2"]
    report = json.loads(inside("finetune", "ddit-digits", *options, "--dry-run", "--json").stdout)
    assert list(tmp_path.iterdir()) == []
    assert report["measured"]["layers"] == [4]
    (stage,) = report["stages"]
    assert report["hours"] == pytest.approx(stage["steps"] * stage["seconds_per_step"] / 3600)
    assert report["data"]["samples"] == 1500
    assert "parameters, adapter" in inside("finetune", "ddit-digits", *options, "--dry-run", "--no-measure").stdout
