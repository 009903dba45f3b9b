"""Attention over packed samples on a GPU, against the padded way; on a CPU with a kernel written down plainly."""

import pytest
import torch
import torch.nn.functional as F

from upcycle.models import chunked_dit as cd

LENGTHS = [5, 1, 12, 8]


def plain_varlen(q, k, v, starts_q, starts_k, max_q, max_k, *, scale):
    """What `torch.nn.attention.varlen.varlen_attn` is documented to do, which runs on CUDA only."""
    assert starts_q.dtype == starts_k.dtype == torch.int32
    assert max_q == max_k == int(starts_q.diff().max())
    assert q.shape[-1] == k.shape[-1] == v.shape[-1]
    assert q.shape[-1] % 8 == 0
    assert q.dtype == k.dtype == v.dtype
    parts = []
    for begin, end in zip(starts_q[:-1].tolist(), starts_q[1:].tolist(), strict=True):
        sample = (y[begin:end].transpose(0, 1)[None] for y in (q, k, v))
        parts.append(F.scaled_dot_product_attention(*sample, scale=scale)[0].transpose(0, 1))
    return torch.cat(parts)


def inputs(device, dtype, biased):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(LENGTHS), 2, 24, generator=generator).to(device, dtype) for _ in range(3))
    valid = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    bias = torch.rand(valid.shape, generator=generator) * 5 if biased else torch.zeros(valid.shape)
    bias = bias.masked_fill(~valid, -torch.inf).to(device, dtype)
    place = cd.compact(valid.view(1, -1), sum(LENGTHS))[0][0].to(device)
    return [y.requires_grad_() for y in (q, k, v)], cd.Layout(LENGTHS, bias[:, None, None], place)


def results(way, qkv, layout):
    out = way(*qkv, layout)
    return out, *torch.autograd.grad(out.float().square().sum(), qkv)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_packing_and_bias_against_padding(monkeypatch, biased, dtype, tolerance):
    monkeypatch.setattr(cd, "varlen_attn", plain_varlen)
    qkv, layout = inputs("cpu", dtype, biased)
    for got, expected in zip(
        results(cd.attend_packed, qkv, layout), results(cd.attend_padded, qkv, layout), strict=True
    ):
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected, atol=tolerance * float(expected.abs().max()), rtol=0)


@pytest.mark.skipif(not torch.cuda.is_available() or cd.varlen_attn is None, reason="the kernel runs on CUDA only")
@pytest.mark.parametrize("biased", [False, True])
def test_the_kernel_against_padding(biased):
    qkv, layout = inputs("cuda", torch.bfloat16, biased)
    assert cd._has_packed_kernel(qkv[0])
    for got, expected in zip(
        results(cd.attend_packed, qkv, layout), results(cd.attend_padded, qkv, layout), strict=True
    ):
        torch.testing.assert_close(got, expected, atol=2e-2 * float(expected.abs().max()), rtol=0)
