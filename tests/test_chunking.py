"""The chunking arithmetic against plain dense references."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from upcycle.models import chunked_dit as cd


@st.composite
def masks(draw, batch=2):
    height, width = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    seed, density = draw(st.integers(0, 2**16)), draw(st.floats(0, 1))
    mask = torch.rand(batch, height * width, generator=torch.Generator().manual_seed(seed)) < density
    mask[:, 0] = True
    return mask, height, width


@settings(max_examples=60, deadline=None)
@given(masks(), st.sampled_from([0.0, 0.4, 1.4, 3.4]))
def test_nearest_kept_equals_dense_search_with_raster_ties(grid, shift):
    mask, height, width = grid
    got = cd.nearest_kept(mask, height, width, shift)
    for b in range(len(mask)):
        kept = mask[b].nonzero()[:, 0].tolist()
        for w in range(height * width):
            # integer tenths: floating point would break ties at random
            distance = {
                u: (10 * (w // width - u // width) - round(10 * shift)) ** 2
                + (10 * (w % width - u % width) - round(10 * shift)) ** 2
                for u in kept
            }
            least = min(distance.values())
            assert got[b, w] == min(u for u in kept if distance[u] == least)


@settings(max_examples=40, deadline=None)
@given(masks(), st.sampled_from([1.0, 2.0]))
def test_smoothing_equals_dense_matrix(grid, sigma):
    mask, height, width = grid
    generator = torch.Generator().manual_seed(0)
    index, valid, _ = cd.compact(mask, int(mask.sum(1).max()))
    h = torch.randn(*index.shape, 3, generator=generator)
    p = torch.rand(index.shape, generator=generator)
    got = cd.smooth(h, p, index, valid, (height, width), sigma)
    row, column = (index // width).double(), (index % width).double()
    squared = (row[:, :, None] - row[:, None]) ** 2 + (column[:, :, None] - column[:, None]) ** 2
    q = p.double().clamp(1e-4, 1 - 1e-4)
    weight = torch.exp(-squared / (2 * sigma**2)) * q[:, None] * valid[:, None]
    mixed = weight @ h.double() / (weight.sum(-1, keepdim=True) + 1e-8)
    expected = q[..., None] * h + (1 - q[..., None]) * mixed
    torch.testing.assert_close(got[valid], expected[valid].float(), atol=2e-6, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(masks())
def test_compact_lists_kept_positions_in_raster_order(grid):
    mask, _, _ = grid
    index, valid, slot = cd.compact(mask, int(mask.sum(1).max()))
    for b in range(len(mask)):
        assert index[b][valid[b]].tolist() == mask[b].nonzero()[:, 0].tolist()
        assert slot[b][mask[b]].tolist() == list(range(int(mask[b].sum())))


@settings(max_examples=60, deadline=None)
@given(masks(batch=3), st.lists(st.floats(0, 0.99), min_size=3, max_size=3))
def test_tail_drop_takes_the_lowest_of_each_sample(grid, fractions):
    mask, _, _ = grid
    logit = torch.randn(mask.shape, generator=torch.Generator().manual_seed(1))
    rho = torch.tensor(fractions, dtype=torch.float32)
    left = cd.drop_tail(mask, logit, rho)
    assert not (left & ~mask).any()
    for b in range(3):
        dropped = mask[b] & ~left[b]
        assert dropped.sum() == int(mask[b].sum().float() * rho[b])
        assert left[b].any()
        if dropped.any():
            assert logit[b][dropped].max() < logit[b][left[b]].min()


@pytest.mark.parametrize("ratio", [3, 4, 6, 8, 9, 16, 64])
def test_untrained_router_keeps_exactly_the_ratio(ratio):
    grid = cd.teacher_grid(16, 16, 2, torch.device("cpu"))
    detail = torch.randn(5, 256, generator=torch.Generator().manual_seed(0))
    keep = cd.base_mask(detail, grid, round(256 / ratio))
    assert keep.sum(1).tolist() == [round(256 / ratio)] * 5
    assert keep[:, 0].all()
    if ratio >= 4:
        assert not (keep & ~grid).any()
    else:
        assert (keep | ~grid).all()


def test_local_detail_sees_edges_and_not_noise():
    generator = torch.Generator().manual_seed(0)
    x0 = torch.zeros(1, 4, 16, 16)
    x0[:, :, 4:12, 4:12] = 1.0
    noise = torch.randn(x0.shape, generator=generator)
    for alpha, sees in ((0.99, True), (0.001, False)):
        x = alpha**0.5 * x0 + (1 - alpha) ** 0.5 * noise
        detail = cd.local_detail(x, torch.tensor([alpha])).view(16, 16)
        edge, flat = detail[4, 5:11].mean(), detail[0:2].mean()
        assert (edge > flat + 1) == sees


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.booleans(), st.integers(0, 2**16))
def test_attention_stays_within_samples(lengths, biased, seed):
    """Against a dense reference with a mask, gradients included, packed as the blocks pack a ragged batch."""
    generator = torch.Generator().manual_seed(seed)
    longest, total, heads, width = max(lengths), sum(lengths), 2, 4
    q, k, v = torch.randn(3, total, heads, width, generator=generator).unbind()
    valid = torch.arange(longest) < torch.tensor(lengths)[:, None]
    key_bias = torch.randn(len(lengths), longest, generator=generator) if biased else torch.zeros(valid.shape)
    key_bias = key_bias.masked_fill(~valid, -torch.inf)
    layout = cd.Layout(lengths)
    if total < valid.numel():
        layout.place = cd.compact(valid.view(1, -1), total)[0][0]
        layout.key_bias = key_bias[:, None, None]
        arguments = [y.clone().requires_grad_() for y in (q, k, v)]
    else:  # even batches are not packed
        layout.key_bias = key_bias[:, None, None] if biased else None
        arguments = [y.unflatten(0, (len(lengths), longest)).clone().requires_grad_() for y in (q, k, v)]
    got = cd.attend(*arguments, layout)
    weight = torch.randn(total, heads, width, generator=generator)
    (got.reshape(weight.shape) * weight).sum().backward()

    sample = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    dense = [y.clone().requires_grad_() for y in (q, k, v)]
    logits = torch.einsum("ihd,jhd->hij", dense[0], dense[1]) / width**0.5 + key_bias[valid]
    logits = logits.masked_fill(sample[:, None] != sample, -torch.inf)
    expected = torch.einsum("hij,jhd->ihd", logits.softmax(-1), dense[2])
    (expected * weight).sum().backward()
    torch.testing.assert_close(got.reshape(expected.shape), expected, atol=1e-5, rtol=1e-5)
    for ours, reference in zip(arguments, dense, strict=True):
        torch.testing.assert_close(ours.grad.reshape(reference.shape), reference.grad, atol=1e-5, rtol=1e-5)
