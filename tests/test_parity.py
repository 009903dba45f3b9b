"""The whole forward as it runs, packed, in place, in windows, against one that does everything the slow, plain way."""

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from test_chunking import dense_nearest
from test_packed_attention import plain_varlen

from upcycle.models import chunked_dit as cd

KINDS = ("random", "all", "two", "empty rows", "one column", "ragged")


def make_masks(kind, height, width, seed, batch=3):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, height, width, generator=generator) < 0.4
    if kind == "all":
        mask[:] = True
    elif kind == "two":
        mask[:] = False
        mask[:, height - 1, width - 1] = True
    elif kind == "empty rows":
        mask[:, 1:-1] = False
    elif kind == "one column":
        mask[:, :, 1:] = False
    elif kind == "ragged":
        mask[0], mask[1] = False, True
    mask[:, 0, 0] = True
    return mask.flatten(1)


def plain_smooth(h_BMD, p_BM, index, valid, grid, sigma):
    row, column = (index // grid[1]).float(), (index % grid[1]).float()
    squared = (row[:, :, None] - row[:, None]) ** 2 + (column[:, :, None] - column[:, None]) ** 2
    q = p_BM.float().clamp(1e-4, 1 - 1e-4)
    weight = torch.exp(-squared / (2 * sigma**2)) * (q * valid)[:, None]
    mixed = weight @ h_BMD.float() / (weight.sum(-1, keepdim=True) + 1e-8)
    return q[..., None] * h_BMD.float() + (1 - q[..., None]) * mixed


def plain_attend(q, k, v, layout):
    assert layout.place is None, "the slow way takes one sample at a time"
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / q.shape[-1] ** 0.5
    logits = logits if layout.key_bias is None else logits + layout.key_bias
    return torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v)


def plain_nearest(mask, height, width, shift, reach=None):
    return dense_nearest(mask, width, shift), torch.ones((), dtype=torch.bool)


@pytest.fixture(scope="module", params=["lean", "paper"])
def student(request):
    torch.manual_seed(0)
    lean = request.param == "lean"
    model = cd.ChunkedDiT(
        2, 16, num_layers=2, num_classes=10, patch_size=2 if lean else 1, scaffold=request.param, guide=0
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


def keep(model, masks):
    """Let the router keep these; what it computes stays."""
    from dataclasses import replace

    def route(*arguments):
        routing = cd.ChunkedDiT.route(model, *arguments)
        return replace(routing, mask=masks.pop(0), tokens=None)

    model.route = route


def forward(model, x, t, y, mask):
    keep(model, [mask])
    return model(x, t, y).sample


def slowly(model, x, t, y, mask):
    """One sample after the other, every fast function replaced, with gradients (nothing in place)."""
    with pytest.MonkeyPatch.context() as patch, torch.enable_grad():
        patch.setattr(cd, "attend", plain_attend)
        patch.setattr(cd, "smooth", plain_smooth)
        patch.setattr(cd, "nearest_kept", plain_nearest)
        out = [forward(model, x[i : i + 1], t[i : i + 1], y[i : i + 1], mask[i : i + 1]) for i in range(len(x))]
    return torch.cat(out)


@pytest.fixture(params=["by sample", "padded", "packed"], autouse=True)
def fast_way(request, monkeypatch):
    """How ragged batches go on a CPU, on any other device, and on CUDA in half precision."""
    if request.param != "by sample":
        monkeypatch.setattr(cd.Layout, "known_lengths", lambda self, x: None)
    if request.param == "packed":
        monkeypatch.setattr(cd, "varlen_attn", plain_varlen)
        monkeypatch.setattr(cd, "_has_packed_kernel", lambda q: True)


def distance(got, expected):
    return float((got.float() - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def gradients(model, out):
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    parameters = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad((out * weight).sum(), parameters, allow_unused=True)
    return torch.cat(
        [torch.zeros(p.numel()) if g is None else g.flatten() for p, g in zip(parameters, found, strict=True)]
    )


# Grids of a few positions are left out: group norm over so few magnifies rounding a hundredfold.
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(KINDS), st.integers(4, 12), st.integers(3, 11), st.integers(0, 2**16))
@example("two", 24, 5, 0)  # farther apart than the window of rows
@example("empty rows", 22, 3, 0)
@example("random", 16, 1, 0)
@example("all", 6, 10, 0)
def test_the_fast_forward_is_the_slow_one(student, kind, height, width, seed):
    mask = make_masks(kind, height, width, seed)
    generator = torch.Generator().manual_seed(seed)
    x, t, y = (
        torch.randn(3, 4, height, width, generator=generator),
        torch.tensor([900, 20, 500]),
        torch.tensor([1, 10, 3]),
    )
    slow = slowly(student, x, t, y, mask)
    with torch.no_grad():
        assert distance(forward(student, x, t, y, mask), slow) <= 1e-5
    fast = forward(student, x, t, y, mask)
    assert distance(fast, slow) <= 1e-5
    assert distance(gradients(student, fast), gradients(student, slow)) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_bf16_is_the_slow_forward_within_four_percent(student, kind):
    """2^-8 is what one rounding costs; a forward of two blocks and the scaffold makes some forty of them."""
    import copy

    low = copy.deepcopy(student).bfloat16()
    mask = make_masks(kind, 9, 12, 0)
    x, t, y = (
        torch.randn(3, 4, 9, 12, generator=torch.Generator().manual_seed(0)),
        torch.tensor([900, 20, 500]),
        torch.tensor([1, 10, 3]),
    )
    expected = slowly(student, x, t, y, mask).detach()
    got = forward(low, x.bfloat16(), t, y, mask)
    assert ((got.float() - expected).square().mean() / expected.square().mean()).sqrt() <= 0.04
