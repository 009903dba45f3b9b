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


def dense_nearest(mask, width, shift):
    """Every position with every kept one, in integer tenths: floating point would break ties at random."""
    w = torch.arange(mask.shape[1])
    row, column = w // width, w % width
    squared = (10 * (row[:, None] - row) - round(10 * shift)) ** 2
    squared = squared + (10 * (column[:, None] - column) - round(10 * shift)) ** 2
    return torch.stack([(squared + torch.where(kept, 0, 10**9)).min(1).indices for kept in mask])  # the first of equals


@settings(max_examples=150, deadline=None)
@given(masks(), st.sampled_from([0.0, 0.4, 0.9, 1.4, 3.4]), st.sampled_from([None, 1, 2, 4]))
def test_nearest_kept_equals_dense_search_with_raster_ties(grid, shift, reach):
    mask, height, width = grid
    got, exact = cd.nearest_kept(mask, height, width, shift, reach)
    assert exact or reach
    if exact:
        assert torch.equal(got, dense_nearest(mask, width, shift))
    assert ((got >= 0) & (got < height * width)).all()


def test_what_lies_out_of_reach_is_told_and_found_nevertheless():
    mask = torch.zeros(2, 32 * 8, dtype=torch.bool)
    mask[:, 0] = True
    mask[1, 25 * 8 + 3] = True
    assert not cd.nearest_kept(mask, 32, 8, 0.4, reach=4)[1]
    every_fourth_row = (torch.arange(32 * 8) // 8 % 4 == 0).expand(2, -1)
    assert cd.nearest_kept(every_fourth_row, 32, 8, 0.4, reach=4)[1]
    mask = torch.zeros(1, 32 * 32, dtype=torch.bool)
    mask[0, [0, 31 * 32]] = True
    logit = torch.zeros(1, 32 * 32)
    model = cd.ChunkedDiT(2, 8, num_layers=1, num_classes=2)
    chunks = model.chunk(torch.zeros(1, 4, 32, 32), cd.Routing(logit, logit, mask, mask, logit), torch.tensor([10]))
    assert torch.equal(chunks.owner, dense_nearest(mask, 32, 0.4))


def test_large_grids_do_not_overflow():
    mask = torch.zeros(1, 2400 * 2, dtype=torch.bool)
    mask[0, 0] = True
    owner, exact = cd.nearest_kept(mask, 2400, 2, 0.4)
    assert exact
    assert not owner.any()


@pytest.mark.parametrize("patch", [2, 4, 8, 16, 32])
def test_the_teachers_grid_is_within_reach(patch):
    grid = cd.teacher_grid(64, 64, patch, torch.device("cpu"))[None]
    assert cd.nearest_kept(grid, 64, 64, (patch - 1) / 2 - 0.1, max(cd.REACH, patch))[1]


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0, 1e4])
@pytest.mark.parametrize("length", [1, 7, 64, 65, 100, 257])
def test_blurring_in_bands_equals_one_product(length, sigma):
    x = torch.rand(2, 3, length, generator=torch.Generator().manual_seed(0))
    got, reference = x.clone().requires_grad_(), x.clone().double().requires_grad_()
    i = torch.arange(length)
    expected = reference @ torch.exp(-((i[:, None] - i) ** 2).double() / (2 * sigma**2))
    torch.testing.assert_close(cd._blur(got, sigma), expected.float(), atol=1e-6, rtol=1e-6)
    weight = torch.rand(x.shape, generator=torch.Generator().manual_seed(1))
    (cd._blur(got, sigma) * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(got.grad, reference.grad.float(), atol=1e-6, rtol=1e-6)


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


@settings(max_examples=60, deadline=None)
@given(masks(batch=1), st.floats(0, 0.99))
def test_a_fixed_budget_keeps_what_tail_dropping_keeps(grid, fraction):
    mask, _, _ = grid
    logit = torch.randint(-3, 3, mask.shape, generator=torch.Generator().manual_seed(1)).float()  # with ties
    logit = logit.where(mask, logit - 10)
    left = cd.drop_tail(mask, logit, torch.tensor([fraction]))
    assert torch.equal(cd.most_probable(logit, int(left.sum())), left)


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
