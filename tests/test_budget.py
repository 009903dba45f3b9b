"""A fixed number of tokens: the same as tail dropping where the numbers agree, static shapes, schedules over t."""

import json

import pytest
import torch
from conftest import run
from torch._dynamo.testing import CompileCounter

from upcycle.errors import UpcycleError
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.sampling.budget import follow, parse_tokens

X = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
T, Y = torch.tensor([900, 20, 500]), torch.tensor([1, 10, 3])


@pytest.fixture(params=["lean", "paper"])
def student(request):
    """Random weights, so that the router keeps what it likes."""
    torch.manual_seed(0)
    lean = request.param == "lean"
    model = ChunkedDiT(
        2,
        16,
        num_layers=2,
        sample_size=16,
        num_classes=10,
        patch_size=2 if lean else 1,
        scaffold=request.param,
        guide=0,
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


@torch.no_grad()
def test_the_tokens_that_tail_dropping_keeps(student):
    for i in range(3):
        arguments = X[i : i + 1], T[i : i + 1], Y[i : i + 1]
        student.set_tokens(None)
        dropped = student(*arguments, tail_drop=0.37)
        student.set_tokens(int(dropped.routing.mask.sum()))
        fixed = student(*arguments)
        assert torch.equal(fixed.routing.mask, dropped.routing.mask)
        torch.testing.assert_close(fixed.sample, dropped.sample, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 40, 256])
def test_every_sample_keeps_that_many_in_a_batch_of_mixed_t_and_classes(student, tokens):
    student.set_tokens(tokens)
    out = student(X, T, Y)
    assert out.routing.mask.sum(1).tolist() == [tokens] * 3
    for i in range(3):
        alone = student(X[i : i + 1], T[i : i + 1], Y[i : i + 1]).sample
        assert (out.sample[i] - alone[0]).abs().max() <= 1e-5 * alone.abs().max()


@torch.no_grad()
def test_one_graph_serves_batches_of_any_size(student):
    student.set_tokens(40)
    student(X, T, Y)  # makes the constants, whose absence a graph would depend on
    counter = CompileCounter()
    compiled = torch.compile(student, fullgraph=True, dynamic=True, backend=counter)
    for size in (3, 2, 7, 12, 5, 11):
        rows = torch.arange(size) % 3
        assert torch.equal(compiled(X[rows], T[rows], Y[rows]).sample, student(X[rows], T[rows], Y[rows]).sample)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@torch.no_grad()
def test_the_whole_forward_is_one_graph(student):
    """A look at a tensor's value on the host would break it."""
    student.set_tokens(40)
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X, T, Y).sample, student(X, T, Y).sample)
    torch._dynamo.reset()
    student.set_tokens(None)
    with pytest.raises((torch._dynamo.exc.TorchDynamoException, RuntimeError)):
        torch.compile(student, fullgraph=True, backend="aot_eager")(X, T, Y)


def test_gradients_flow(student):
    student.set_tokens(40)
    student(X, T, Y).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.transformer_blocks.parameters())


def test_schedules(student):
    assert parse_tokens("64", 256) == [(0, 64)]
    assert parse_tokens("500:32,0:96", 256) == [(0, 96), (500, 32)]
    for text in ("", "many", "0", "257", "10:5", "0:5,0:6", "0:5,1000:6", "0:5,6", "-3", "0:5:6"):
        with pytest.raises(UpcycleError, match="--tokens"):
            parse_tokens(text, 256)
    kept = []
    handle = follow(student, parse_tokens("500:32,0:96", 256))
    with torch.no_grad():
        for t in (999, 500, 499, 0):
            out = student(X, timestep=torch.full((3,), t), class_labels=Y)
            kept.append(out.routing.mask.sum(1).unique().item())
    assert kept == [32, 32, 96, 96]
    handle.remove()


def test_sample(export_dir, pipeline_dir, tmp_path, failing):
    common = ["--classes", "1,9", "--steps", "4", "--json", "-o"]
    fixed = json.loads(run("sample", export_dir, "--tokens", "20", *common, tmp_path / "fixed").stdout)
    assert fixed["tokens_kept"] == 20
    # DDIM, 4 steps of 1000: t = 751, 501, 251, 1 or near
    scheduled = json.loads(run("sample", export_dir, "--tokens", "0:96,400:32", *common, tmp_path / "two").stdout)
    assert scheduled["tokens_kept"] == 64
    assert "two budgets" in failing("sample", export_dir, "--tokens", "20", "--tail-drop", "0.3")
    assert "--tokens 300" in failing("sample", export_dir, "--tokens", "300", "-o", tmp_path / "no")
    assert "leave out --tokens" in failing("sample", pipeline_dir, "--tokens", "20", "-o", tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA tells when the host waits")
@torch.no_grad()
def test_nothing_waits_for_the_device(student):
    student.cuda().set_tokens(40)
    arguments = X.cuda(), T.cuda(), Y.cuda()
    expected = student(*arguments).sample  # makes the constants
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = student(*arguments).sample
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (again - expected).abs().max() <= 1e-4 * expected.abs().max()  # atomics add up in any order
