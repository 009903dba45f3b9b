"""The sampling loop against the stock pipeline, and what it adds to it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTPipeline
from diffusers.configuration_utils import FrozenDict
from diffusers.schedulers import scheduling_ddpm
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_compose import make_student

from upcycle.errors import UpcycleError
from upcycle.models.identity_vae import IdentityVAE
from upcycle.sampling.draw import clamp_null_class, draw
from upcycle.sampling.sampler import SAMPLERS, Hold, Sampling, _Asking, decode, sample, sampler_name, set_sampler, steps

LABELS, SEEDS = [3, 0, 7], [11, 12, 13]


@pytest.fixture
def pipe(dit):
    pipe = DiTPipeline(dit, IdentityVAE(dit.config.in_channels), DDPMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    handle = clamp_null_class(dit)
    yield pipe
    handle.remove()


def close(one, other):
    """Up to rounding, of latents of any size: the weights are random."""
    assert (one - other).abs().max() <= 1e-5 * other.abs().max()


@pytest.mark.parametrize("name", ["ddim", "dpm-solver++", "unipc"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_it_is_the_stock_pipeline(pipe, name, guidance):
    set_sampler(pipe, name)
    ours = decode(pipe, sample(pipe, LABELS, SEEDS, Sampling(6, guidance)))
    assert torch.equal(ours, draw(pipe, LABELS, SEEDS, 6, guidance))


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sample_does_not_depend_on_its_batch(pipe, name):
    set_sampler(pipe, name)
    whole = sample(pipe, LABELS, SEEDS, Sampling(5, 3.0))
    for i in range(3):
        close(sample(pipe, LABELS[i : i + 1], SEEDS[i : i + 1], Sampling(5, 3.0)), whole[i : i + 1])


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_has_one_name(pipe, name):
    """Chosen or the pipeline's own, as long as its settings are the same."""
    set_sampler(pipe, name)
    assert sampler_name(pipe) == name
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, timestep_spacing="trailing")
    assert sampler_name(pipe) == ("ddim" if name == "ddim" else type(pipe.scheduler).__name__)


@pytest.fixture(scope="module")
def meta():
    return load_file(Path(__file__).parent / "golden" / "meta_ddpm.safetensors")


def test_metas_timesteps(pipe, meta):
    set_sampler(pipe, "ddpm")
    assert [step.t for step in steps(pipe, [1], [2], Sampling(250, 1.0))] == meta["timestep_map"].flip(0).tolist()


class Answer:
    """A model that gives this answer."""

    dtype = torch.float32
    config = FrozenDict(in_channels=4, out_channels=8, sample_size=4, num_embeds_ada_norm=10)

    def __init__(self, out):
        self.out = out

    def __call__(self, x, timestep, class_labels):
        assert class_labels.tolist() == [3, 7, 10, 10]
        return SimpleNamespace(sample=self.out)


@pytest.mark.parametrize("k", range(7))
def test_metas_steps(meta, k, monkeypatch):
    """Seven steps of 250, the first, the last and t = 0 among them: three guided channels, a learned sigma beyond its
    range, and the noise given."""
    index, x_t = int(meta["index"][k]), meta["x_t"][k]
    pipe = SimpleNamespace(transformer=Answer(meta["output"][k]), scheduler=DDPMScheduler(clip_sample=False))
    set_sampler(pipe, "ddpm")
    pipe.scheduler.set_timesteps(250)
    t = int(pipe.scheduler.timesteps[249 - index])
    assert t == meta["timestep_map"][index]
    asking = _Asking(pipe.transformer, torch.tensor([3, 7]), Sampling(250, 4.0, guidance_channels=3))
    guided, *_ = asking.ask(0, t, x_t, [0, 1], pipe.scheduler.alphas_cumprod[t])
    assert guided
    monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *_, **__: meta["noise"][k])
    step = pipe.scheduler.step(asking.out, t, x_t)
    torch.testing.assert_close(step.prev_sample, meta["sample"][k], atol=2e-6, rtol=0)  # fp32 tables: 2.4e-5
    torch.testing.assert_close(step.pred_original_sample, meta["pred_xstart"][k], atol=1e-5, rtol=1e-5)


def test_guided_channels_and_the_rest(pipe):
    """Meta guides three channels of four; the fourth is the conditional one."""
    set_sampler(pipe, "ddim")
    one = next(iter(steps(pipe, LABELS, SEEDS, Sampling(4, 3.0, guidance_channels=3))))
    plain = next(iter(steps(pipe, LABELS, SEEDS, Sampling(4, 1.0))))
    every = next(iter(steps(pipe, LABELS, SEEDS, Sampling(4, 3.0))))
    torch.testing.assert_close(one.x_0[:, 3], plain.x_0[:, 3], atol=1e-4, rtol=1e-5)
    assert torch.equal(one.x_0[:, :3], every.x_0[:, :3])
    assert (one.x_0[:, :3] - plain.x_0[:, :3]).abs().max() > 0.1


def test_guidance_interval(pipe):
    set_sampler(pipe, "ddim")
    seen = list(steps(pipe, LABELS, SEEDS, Sampling(10, 3.0, guidance_interval=(300, 600))))
    assert [step.t for step in seen if step.guided] == [600, 500, 400, 300]
    outside = sample(pipe, LABELS, SEEDS, Sampling(10, 3.0, guidance_interval=(950, 999)))
    assert torch.equal(outside, sample(pipe, LABELS, SEEDS, Sampling(10, 1.0)))


@given(every=st.integers(2, 7), count=st.integers(2, 12))
@settings(max_examples=10, deadline=None)
def test_held_steps(dit, every, count):
    pipe = DiTPipeline(dit, IdentityVAE(dit.config.in_channels), DDPMScheduler(clip_sample=False))
    set_sampler(pipe, "ddim")
    calls = []
    handle = dit.register_forward_hook(lambda *_: calls.append(1))
    seen = list(steps(pipe, [1], [2], Sampling(count, 1.0, hold=Hold(every))))
    handle.remove()
    asked = [i for i, step in enumerate(seen) if step.asked]
    assert asked == [i for i in range(count) if i % every == 0 or i == count - 1]
    assert len(calls) == len(asked)


def test_a_held_estimate_goes_on_along_its_line(pipe):
    set_sampler(pipe, "ddim")
    seen = list(steps(pipe, LABELS, SEEDS, Sampling(9, 2.0, hold=Hold(3, slope=0.5))))
    assert torch.equal(seen[0].previous.isfinite(), torch.ones_like(seen[0].previous, dtype=torch.bool))
    torch.testing.assert_close(seen[1].x_0, seen[0].x_0, atol=1e-4, rtol=1e-4)  # no line through one point
    line = seen[3].x_0 + 0.5 * 2 / 3 * (seen[3].x_0 - seen[0].x_0)
    torch.testing.assert_close(seen[5].x_0, line, atol=1e-4, rtol=1e-4)


def test_a_limit_is_for_each_sample_by_itself(pipe):
    set_sampler(pipe, "ddim")
    how = Sampling(12, 2.0, hold=Hold(limit=0.35))
    whole = list(steps(pipe, LABELS, SEEDS, how))
    assert 2 < sum(len(step.asked) for step in whole) / 3 < 12
    for i in range(3):
        alone = list(steps(pipe, LABELS[i : i + 1], SEEDS[i : i + 1], how))
        assert [bool(step.asked) for step in alone] == [i in step.asked for step in whole]
        close(alone[-1].previous, whole[-1].previous[i : i + 1])
    assert sum(len(step.asked) for step in steps(pipe, LABELS, SEEDS, Sampling(12, 2.0, hold=Hold(limit=1e-9)))) == 36


@pytest.mark.parametrize("halves", [1, 2])
def test_a_limit_and_tail_drops_of_each_sample(halves):
    """The samples that are asked about keep their own tail drops."""
    student = make_student()
    pipe = DiTPipeline(student, IdentityVAE(1), DDIMScheduler(clip_sample=False))
    how, labels, seeds = Sampling(12, 2.0, hold=Hold(limit=0.35)), [3, 0, 7, 1], [11, 12, 13, 14]
    drops, uncond = [0.0, 0.3, 0.6, 0.8], [0.9, 0.0, 0.5, 0.2]
    student.set_tail_drop(drops * halves)
    student.set_lite_cfg(uncond * halves)
    whole = list(steps(pipe, labels, seeds, how))
    assert student.tail_drop.tolist() == pytest.approx(drops * halves)
    assert any(0 < len(step.asked) < 4 for step in whole)
    for i in range(4):
        student.set_tail_drop(drops[i])
        student.set_lite_cfg(uncond[i])
        alone = list(steps(pipe, labels[i : i + 1], seeds[i : i + 1], how))
        for one, all_of_them in zip(alone, whole, strict=True):
            assert bool(one.asked) == (i in all_of_them.asked)
            if one.asked:
                at, count = all_of_them.asked.index(i), len(all_of_them.asked)
                kept = all_of_them.routing.mask.sum(1)
                assert one.routing.mask.sum(1).tolist() == kept[[at, count + at]].tolist()
        close(alone[-1].previous, whole[-1].previous[i : i + 1])


@pytest.mark.parametrize("wrong", [{}, {"every": 1}, {"limit": 0.0}, {"every": 2, "limit": 0.1}])
def test_wrong_holding(wrong):
    with pytest.raises(UpcycleError, match="hold"):
        Hold(**wrong)
