"""bf16 autocast leaves the router and the de-chunking in fp32; compiled blocks compute the same on ragged batches."""

import functools

import pytest
import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from upcycle.models import chunked_dit
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.recipe import Recipe
from upcycle.training.chunking import prepare_student
from upcycle.training.run import finetune, prepare


@pytest.fixture
def student():
    """A small student with random weights, whose batches are ragged."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3}
    model = ChunkedDiT(**sizes, sample_size=16, in_channels=1, out_channels=2, num_classes=10, guide=0.0)
    with torch.no_grad():
        model.routing_module.bias.fill_(1.0)
    return model.train()


def arguments():
    x = torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([10, 400, 700, 900]), torch.tensor([1, 2, 3, 10])


class Dtypes(TorchDispatchMode):
    """Records the floating-point types that operations put out."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.seen |= {x.dtype for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.is_floating_point()}
        return out


@pytest.mark.parametrize("scaffold", ["lean", "paper"])
def test_bf16_autocast_leaves_decisions_in_fp32(student, scaffold, monkeypatch):
    """No operation of the router, the smoothing or the fill rounds to bf16; the blocks do."""
    if scaffold == "paper":
        config = {key: value for key, value in student.config.items() if key[0] != "_"}
        student = ChunkedDiT(**{**config, "scaffold": "paper", "patch_size": 1})
    seen = {}

    def watch(owner, name):
        whole = getattr(owner, name)

        @functools.wraps(whole)
        def wrapped(*args, **kwargs):
            with Dtypes() as dtypes:
                out = whole(*args, **kwargs)
            seen.setdefault(name, set()).update(dtypes.seen)
            return out

        monkeypatch.setattr(owner, name, wrapped)

    watch(ChunkedDiT, "route")
    watch(chunked_dit, "smooth")
    if scaffold == "lean":
        watch(ChunkedDiT, "_move")
        # The one layer inside is a product of bf16 autocast; its output is brought to fp32.
        student.fill_log_variance.forward = lambda x: x.float().mean(-1, keepdim=True)
        watch(ChunkedDiT, "dechunk")
    outputs = []
    student.transformer_blocks[1].ff.net[2].register_forward_hook(lambda m, a, out: outputs.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        out = student(*arguments())
    out.sample.float().square().mean().backward()
    assert seen
    assert all(dtypes <= {torch.float32, torch.float64} for dtypes in seen.values()), seen
    assert out.routing.logit.dtype == out.routing.score.dtype == torch.float32
    assert outputs == [torch.bfloat16]
    assert {p.grad.dtype for p in student.parameters() if p.grad is not None} == {torch.float32}


def test_bf16_trains_near_fp32(tmp_path):
    """The same run in both precisions: the losses differ by no more than bf16 rounds."""
    stage = {"name": "train", "steps": 4, "lr": 1e-3, "anneal": {"until": 0.5}}
    last = {}
    for precision in ("no", "bf16"):
        recipe = Recipe(
            teacher="digits", data="digits", data_workers=0, batch_size=8, out=str(tmp_path / precision),
            stages=[stage], mixed_precision=precision, gradient_checkpointing=precision == "bf16",
        )  # fmt: skip
        rows = []
        finetune(prepare(recipe), on_step=rows.append)
        last[precision] = [row["loss"] for row in rows]
    assert last["bf16"] != last["no"]
    assert last["bf16"][:2] == pytest.approx(last["no"][:2], rel=0.02)
    assert last["bf16"] == pytest.approx(last["no"], rel=0.2)


def test_compiled_blocks_compute_the_same(student, monkeypatch):
    """One graph for even batches and one for ragged ones, whatever their lengths, without graph breaks."""
    # What is compiled is at stake here, not inductor's code, which takes a minute to make.
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", functools.partialmethod(plain, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    results = []
    for compiled in (False, True):
        stages = [{"name": "train", "steps": 1, "freeze": []}]
        prepare_student(student, Recipe(teacher="digits", data="digits", out="x", stages=stages, compile=compiled))
        for guide, tail_drop in ((8.0, 0.0), (0.0, 0.0), (0.0, 0.3), (0.0, 0.6)):
            student.zero_grad()
            out = student(*arguments(), guide=guide, tail_drop=tail_drop)
            out.sample.square().mean().backward()
            gradient = student.transformer_blocks[0].attn1.to_q.weight.grad.clone()
            results.append((out.sample.detach(), gradient, out.routing.mask.sum().item()))
    eager, compiled = results[:4], results[4:]
    assert len({total for *_, total in eager}) == 4, "batches of different lengths"
    for (sample, gradient, _), (other, other_gradient, _) in zip(eager, compiled, strict=True):
        torch.testing.assert_close(other, sample, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(other_gradient, gradient, atol=1e-5, rtol=1e-4)
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    torch._dynamo.reset()


@pytest.mark.parametrize("scaffold", ["lean", "paper"])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("tokens", [None, 50])
def test_work_in_place_computes_the_same_and_leaves_inputs_alone(student, scaffold, autocast, tokens):
    """Where no gradient is asked for, ragged and even; under autocast the wider type wins in both."""
    if scaffold == "paper":
        config = {key: value for key, value in student.config.items() if key[0] != "_"}
        student = ChunkedDiT(**{**config, "scaffold": "paper", "patch_size": 1})
    torch.manual_seed(0)
    for parameter in student.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    student.set_tokens(tokens)
    given, before = arguments(), [x.clone() for x in arguments()]
    weights = {name: p.clone() for name, p in student.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected = student(*given)
        with torch.no_grad():
            got = student(*given)
    assert (got.routing.mask.sum(1).unique().numel() == 1) == (tokens is not None)
    torch.testing.assert_close(got.sample, expected.sample.detach(), atol=2e-6, rtol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    assert all(torch.equal(p, weights[name]) for name, p in student.named_parameters())
