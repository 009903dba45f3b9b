"""The study's token merging: nothing merged is the stock model, means, copies, FLOPs, and what is left afterwards."""

import sys

import pytest
import tiny
import torch
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

from upcycle.evaluation.flops import dit_flops

sys.path.insert(0, str(ROOT / "examples" / "study"))
from token_merging import match, merged_flops, merging

RATIOS = (0.25, 0.5, 0.75)
X, T, Y = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 500, 999]), [3, 7, 10]


@pytest.fixture(scope="module")
def model():
    return tiny.make_dit(0, layers=4)


@torch.inference_mode()
def run(model, rows=slice(None)):
    return model(X[rows], timestep=T[rows], class_labels=torch.tensor(Y)[rows]).sample


def hooks(model):
    return [list(held) for module in model.modules() for held in (module._forward_hooks, module._forward_pre_hooks)]


@pytest.mark.parametrize("matched_once", [False, True])
@pytest.mark.parametrize("feed_forward", [False, True])
def test_nothing_merged_is_the_stock_model(model, feed_forward, matched_once):
    options, c, stock = {"feed_forward": feed_forward, "matched_once": matched_once}, model.config, run(model)
    with merging(model, 0.0, **options):
        assert torch.equal(run(model), stock)
    compared = 2 * 64 * 16 * 48
    assert merged_flops(c, 0.0, **options) == dit_flops(c) + (1 if matched_once else 4) * compared
    assert merged_flops(c, 0.0, first=4, **options) == dit_flops(c)


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_model_is_as_before(model, ratio):
    before, stock = hooks(model), run(model)
    with merging(model, ratio):
        assert not torch.equal(run(model), stock)
    assert hooks(model) == before
    with pytest.raises(IndexError), merging(model, ratio):
        model(X, timestep=T, class_labels=torch.tensor([99] * 3))
    assert hooks(model) == before
    assert torch.equal(run(model), stock)


def test_earlier_blocks_are_left_alone(model):
    seen = []
    handles = [block.register_forward_hook(lambda m, a, out: seen.append(out)) for block in model.transformer_blocks]
    run(model)
    with merging(model, 0.5, first=2):
        run(model)
    for handle in handles:
        handle.remove()
    same = [torch.equal(a, b) for a, b in zip(seen[:4], seen[4:], strict=True)]
    assert same == [True, True, False, False]


@pytest.mark.parametrize("scattered", [False, True])
def test_a_sample_does_not_depend_on_its_batch(model, scattered):
    with merging(model, 0.5, scattered=scattered):
        together = run(model)
        alone = torch.cat([run(model, slice(i, i + 1)) for i in range(3)])
    assert (together - alone).abs().max() < 1e-5


def test_the_nearest_are_merged():
    # Two windows of four; the destinations are tokens 1 and 6. In the order of similarity: 2 -> 1, 5 -> 6, 0 -> 6.
    angles = torch.tensor([0.0, 1.0, 1.01, 2.0, 2.5, -0.5, -0.4, 3.5])
    x = torch.stack([angles.cos(), angles.sin()], 1)[None] * torch.arange(1.0, 9.0)[:, None]
    destinations, sources = torch.tensor([[1, 6]]), torch.tensor([[0, 2, 3, 4, 5, 7]])
    slots = match(x, destinations, sources, 3)
    assert slots.rows.tolist() == [3, 0, 0, 1, 2, 3, 3, 4]
    assert slots.size.tolist() == [[2, 1, 1, 3, 1]]
    means = torch.stack([(x[0, 1] + x[0, 2]) / 2, x[0, 3], x[0, 4], (x[0, 0] + x[0, 5] + x[0, 6]) / 3, x[0, 7]])
    torch.testing.assert_close(slots.merge(x)[0], means)
    back = slots.copy_back(slots.merge(x))
    assert back.shape == x.shape
    torch.testing.assert_close(back[0, [0, 5, 6]], means[3].expand(3, -1))
    assert torch.equal(back[0, [3, 4, 7]], x[0, [3, 4, 7]])


@pytest.mark.parametrize("count", [0, 1, 20, 48])
def test_merging_and_copying_back_keep_shapes_and_means(count):
    random = torch.Generator().manual_seed(count)
    x = torch.randn(3, 64, 12, generator=random)
    order = torch.stack([torch.randperm(64, generator=random) for _ in range(3)])
    slots = match(x, order[:, :16], order[:, 16:], count)
    merged = slots.merge(x)
    assert merged.shape == (3, 64 - count, 12)
    assert slots.size.sum(1).tolist() == [64.0] * 3
    assert slots.size.min() == 1
    weighted = (merged * slots.size[..., None]).sum(1) / 64
    torch.testing.assert_close(weighted, x.mean(1))
    back = slots.copy_back(merged)
    assert back.shape == x.shape
    torch.testing.assert_close(back.mean(1), x.mean(1))
    torch.testing.assert_close(slots.merge(back), merged)
    if count == 0:
        assert torch.equal(back, x)


def test_proportional_attention_counts_every_token():
    """Attention over merged tokens that were alike is attention over all of them."""
    random = torch.Generator().manual_seed(0)
    model = tiny.make_dit(0, layers=1)
    with torch.no_grad():
        model.pos_embed.pos_embed.zero_()
    one, other = torch.randn(2, 1, 4, 2, 2, generator=random)
    x = torch.cat([one.repeat(1, 1, 8, 6), other.repeat(1, 1, 8, 2)], 3)
    given = {"timestep": torch.tensor([5]), "class_labels": torch.tensor([1])}
    with torch.inference_mode():
        stock = model(x, **given).sample
        errors = {}
        for proportional in (False, True):
            with merging(model, 0.5, proportional=proportional):
                errors[proportional] = (model(x, **given).sample - stock).abs().max().item()
    assert errors[True] < 1e-5 < errors[False]


@pytest.mark.parametrize("feed_forward", [False, True])
@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("matched_once", [False, True])
def test_flops_against_torchs_counter(model, matched_once, ratio, first, feed_forward):
    c = model.config
    options = {"first": first, "feed_forward": feed_forward, "matched_once": matched_once}
    with merging(model, ratio, **options), FlopCounterMode(display=False) as counter:
        run(model, slice(0, 1))
    counts = counter.get_flop_counts()["Global"]
    counted = sum(n for op, n in counts.items() if "attention" not in str(op))  # that of SDPA only on some devices
    left = 64 - int(ratio * 64)
    attention = c.num_attention_heads * (4 * c.attention_head_dim + 3) * (first * 64**2 + (4 - first) * left**2)
    again = c.num_layers * 2 * (256 * 64 + 64 * 64)  # diffusers computes the embedder in every block
    assert counted == merged_flops(c, ratio, **options) - attention + again
    assert merged_flops(c, ratio, **options) < merged_flops(c, ratio - 0.25, **options)


def test_what_cannot_be_merged(model):
    for ratio in (-0.1, 0.76):
        with pytest.raises(ValueError, match="8 x 8 tokens"), merging(model, ratio):
            pass
    with pytest.raises(ValueError, match="5 x 5 tokens"), merging(tiny.make_dit(0, size=10), 0.5):
        pass
