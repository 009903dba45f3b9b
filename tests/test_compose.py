"""The student with what diffusers, peft and torchao bring: caches, LoRA adapters, quantisation, casting, offloading."""

import contextlib
import copy

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DiTPipeline, hooks
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from diffusers.loaders.peft import PeftAdapterMixin
from torch.utils.flop_counter import FlopCounterMode

from upcycle.graft.verify import load_student
from upcycle.models import ddit
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.models.identity_vae import IdentityVAE
from upcycle.sampling.output_cache import cache_outputs
from upcycle.sampling.pipeline import load_pipeline
from upcycle.sampling.sampler import Hold, Sampling
from upcycle.sampling.sampler import sample as run_loop
from upcycle.training.digits import TEACHER

LABELS = [1, 7, 3]
NEVER = {  # settings under which a cache looks, keeps, and computes all the same
    "first block": FirstBlockCacheConfig(threshold=0.0),
    "mag": MagCacheConfig(mag_ratios=[1.0] * 8, threshold=-1.0, num_inference_steps=8),
    "taylor": TaylorSeerCacheConfig(cache_interval=1, disable_cache_before_step=100, max_order=1),
}
OFTEN = {
    "first block": FirstBlockCacheConfig(threshold=0.5),
    "mag": MagCacheConfig(mag_ratios=[1.0] * 8, threshold=1.0, num_inference_steps=8),
    "taylor": TaylorSeerCacheConfig(cache_interval=2, taylor_factors_dtype=torch.float32),
    "taylor, every block": TaylorSeerCacheConfig(
        cache_interval=2, taylor_factors_dtype=torch.float32, cache_identifiers=[r"transformer_blocks\.\d+"]
    ),
}


def make_student(**changes):
    """A small student with random weights that keeps other tokens in every step, and of every sample another number."""
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 3}
    config = {**sizes, "sample_size": 16, "in_channels": 1, "out_channels": 2, "num_classes": 10, "guide": 0.0}
    student = ChunkedDiT(**{**config, **changes})
    with torch.no_grad():
        if student.config.scaffold == "lean":
            student.routing_module.bias.fill_(1.0)
    return student.eval().requires_grad_(False)


def pipeline(transformer):
    pipe = DiTPipeline(transformer, IdentityVAE(in_channels=1), DDIMScheduler(clip_sample=False))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(transformer, seed=0, steps=8, labels=LABELS):
    generator = torch.Generator().manual_seed(seed)
    options = {"num_inference_steps": steps, "guidance_scale": 2.0, "output_type": "pt"}
    return pipeline(transformer)(class_labels=labels, generator=generator, **options).images


def flops(call):
    with FlopCounterMode(display=False) as counter:
        out = call()
    return counter.get_total_flops(), out


class Masks:
    """What is kept in each call."""

    def __init__(self, student):
        self.seen = []
        student.register_forward_hook(lambda m, a, out: self.seen.append(out.routing.mask))


@pytest.mark.parametrize("scaffold", ["lean", "paper"])
@pytest.mark.parametrize("cache", NEVER)
def test_what_passes_between_blocks_at_full_resolution_computes_the_same(scaffold, cache):
    """A cache that never leaves a block out: the bits of no cache, also at other budgets; without it again as well."""
    student = make_student(**({} if scaffold == "lean" else {"scaffold": "paper", "patch_size": 1}))
    masks = Masks(student)

    def all_budgets():
        out = [draw(student)]
        student.set_tail_drop(0.4)
        out.append(draw(student))
        student.set_lite_cfg(0.8)
        out.append(draw(student))
        student.set_tokens(30)
        out.append(draw(student))
        student.set_tokens(None), student.set_lite_cfg(None), student.set_tail_drop(0.0)
        return torch.stack(out)

    before = all_budgets()
    ragged = torch.stack([mask.sum(1) for mask in masks.seen[:8]])
    assert (ragged != ragged[:, :1]).any()
    assert not torch.equal(masks.seen[0], masks.seen[7])
    student.enable_cache(NEVER[cache])
    assert torch.equal(all_budgets(), before)
    student.disable_cache()
    assert torch.equal(all_budgets(), before)


@pytest.mark.parametrize("cache", OFTEN)
def test_a_cache_leaves_blocks_out_although_the_kept_tokens_change(cache):
    """Fewer FLOPs, near the samples without, the same again in the next run, and nothing of another run or setting."""
    student = make_student()
    masks = Masks(student)
    spent, plain = flops(lambda: draw(student))
    changes = sum(not torch.equal(a, b) for a, b in zip(masks.seen, masks.seen[1:], strict=False))
    assert changes == 7
    student.enable_cache(OFTEN[cache])
    less, cached = flops(lambda: draw(student))
    assert less < 0.95 * spent
    assert torch.isfinite(cached).all()
    assert (cached - plain).abs().mean() < 0.1
    assert not torch.equal(cached, plain)
    assert torch.equal(draw(student), cached)
    # A run that is given up, another batch, another number of steps, fewer tokens in mid-run: nothing of it stays.
    call = student.forward
    student.forward = lambda *a, **k: stop() if len(masks.seen) == stop_at else call(*a, **k)

    def stop():
        raise KeyboardInterrupt

    stop_at = len(masks.seen) + 3
    with pytest.raises(KeyboardInterrupt):
        draw(student)
    student.forward = call
    assert torch.equal(draw(student), cached)
    draw(student, labels=[2], steps=5)
    assert torch.equal(draw(student), cached)


def test_budgets_may_change_within_a_cached_run():
    """Every step at another budget: whole, near the same run without a cache."""
    student = make_student()
    budgets: list[dict] = [{}, {"tail_drop": 0.5}, {"tokens": 16}, {"uncond": 0.9}]
    calls = []

    def change(module, args):
        budget = budgets[len(calls) % 4]
        calls.append(budget)
        module.set_tail_drop(budget.get("tail_drop", 0.0))
        module.set_tokens(budget.get("tokens"))
        module.set_lite_cfg(budget.get("uncond"))

    student.register_forward_pre_hook(change)
    plain = draw(student)
    for cache in OFTEN.values():
        student.enable_cache(cache)
        calls.clear()
        cached = draw(student)
        assert (cached - plain).abs().mean() < 0.1
        student.disable_cache()


def test_a_call_that_does_not_go_on_begins_anew():
    """Nobody resets outside of a pipeline: other classes, a timestep that is not below, another size, a failed call."""
    student = make_student()
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(1))
    small, one, other = x[..., :8, :8].contiguous(), torch.tensor([1, 2]), torch.tensor([1, 3])
    t = torch.tensor([500, 500])
    want = [student(x, t, one).sample, student(x, t, other).sample, student(small, t, one).sample]
    student.enable_cache(FirstBlockCacheConfig(threshold=1e6))  # leaves out whatever it may
    assert torch.equal(student(x, t, one).sample, want[0])
    assert not torch.equal(student(x, t - 1, one).sample, student(x, t, one).sample)
    for call, wanted in zip([(x, t, one), (x, t - 1, other), (small, t - 2, one)], want, strict=True):
        begun = student(*call).sample
        if call[1] is t:
            assert torch.equal(begun, wanted)
    tail = student.transformer_blocks[-1].ff
    whole, tail.forward = tail.forward, None
    with pytest.raises(TypeError):
        student(x, t, one)
    tail.forward = whole
    assert torch.equal(student(x, t - 5, one).sample, fresh(x, t - 5, one))


def fresh(*call):
    return make_student()(*call).sample


def test_caches_that_do_not_fit_are_refused():
    """Those that look inside of blocks, where kept tokens lie packed, and other kinds: one line, nothing on."""
    student = make_student()
    refused = [
        hooks.PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 1
        ),
        TaylorSeerCacheConfig(cache_identifiers=[r"transformer_blocks\.\d+\.attn1"]),
        TaylorSeerCacheConfig(cache_identifiers=["nothing"]),
        TaylorSeerCacheConfig(use_lite_mode=True),
    ]
    for config in refused:
        with pytest.raises(ValueError, match="ChunkedDiT") as error:
            student.enable_cache(config)
        assert "\n" not in str(error.value)
        assert not student.is_cache_enabled
    with pytest.raises(ValueError, match="two blocks"):
        make_student(num_layers=1).enable_cache(FirstBlockCacheConfig())


# -- LoRA --------------------------------------------------------------------------------------------------------------


def arguments(channels=4):
    x = torch.randn(3, channels, 16, 16, generator=torch.Generator().manual_seed(0))
    return x, torch.tensor([20, 500, 900]), torch.tensor([1, 7, 10])


@pytest.fixture
def lora(dit, tmp_path):
    """A LoRA of the teacher with another alpha than rank, as diffusers saves it, and the teacher with it."""
    from peft import LoraConfig

    class Teacher(type(dit), PeftAdapterMixin):  # the stock class lacks it
        pass

    teacher = copy.deepcopy(dit)
    teacher.__class__ = Teacher
    layers = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear",
              "proj_out_1", "proj_out_2", "pos_embed.proj"]  # fmt: skip
    teacher.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=layers, init_lora_weights=False))
    teacher.save_lora_adapter(tmp_path)
    return tmp_path, teacher


def test_a_lora_of_the_teacher_does_the_same_to_the_student(dit, export_dir, lora):
    folder, teacher = lora
    student = load_student(export_dir)
    with torch.no_grad():
        before = student(*arguments()).sample
        wanted = teacher(*arguments()).sample
        assert (before - dit(*arguments()).sample).abs().max() < 1e-5
        student.load_lora_adapter(folder, prefix=None, use_safetensors=True)
        assert (before - wanted).abs().max() > 0.01
        assert (student(*arguments()).sample - wanted).abs().max() < 1e-5
        student.delete_adapters(student.active_adapters())
        assert torch.equal(student(*arguments()).sample, before)


def test_caches_and_loras_together(export_dir, lora):
    """A cache over blocks with adapters, enabled before or after they are loaded: the same."""
    student = load_student(export_dir)
    student.enable_cache(OFTEN["first block"])
    x, t, labels = arguments()
    student(x, t, labels)
    student.load_lora_adapter(lora[0], prefix=None, use_safetensors=True)
    with torch.no_grad():
        ours = [student(x, step, labels).sample for step in (t, t - 1, t - 2)]
        other = load_student(export_dir)
        other.load_lora_adapter(lora[0], prefix=None, use_safetensors=True)
        other.enable_cache(OFTEN["first block"])
        assert all(
            torch.equal(a, other(x, step, labels).sample) for a, step in zip(ours, (t, t - 1, t - 2), strict=True)
        )


# -- quantisation, casting, offloading ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "error"), [("Int8WeightOnlyConfig", 0.01), ("Float8WeightOnlyConfig", 0.05)])
def test_weights_quantised_by_torchao_leave_the_router_in_fp32(kind, error):
    """Whole-model `quantize_` without a filter: the blocks change, the router's weights do not, the output is near."""
    quantization = pytest.importorskip("torchao.quantization")
    student = make_student(attention_head_dim=32)
    before = draw(student)
    router = {name: value.clone() for name, value in student.routing_module.state_dict().items()}
    quantization.quantize_(student, getattr(quantization, kind)())
    assert type(student.transformer_blocks[0].attn1.to_q.weight.data) is not torch.Tensor
    for name, value in student.routing_module.state_dict().items():
        assert type(value) is torch.Tensor
        assert value.dtype == torch.float32
        assert torch.equal(value, router[name])
    after = draw(student)
    assert not torch.equal(after, before)
    assert (after - before).abs().mean() < error
    student.enable_cache(NEVER["first block"])
    assert torch.equal(draw(student), after)


@pytest.mark.parametrize("scaffold", ["lean", "paper"])
def test_layerwise_casting_computes_with_the_rounded_weights(scaffold):
    """Weights kept in fp8, computed with in fp32: the bits of rounded weights; the router is untouched."""
    changes = {} if scaffold == "lean" else {"scaffold": "paper", "patch_size": 1}
    student, rounded = make_student(**changes), make_student(**changes)
    plain = draw(student)
    router = {name: value.clone() for name, value in student.routing_module.state_dict().items()}
    student.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    stored = {name for name, p in student.named_parameters() if p.dtype == torch.float8_e4m3fn}
    assert "transformer_blocks.0.attn1.to_q.weight" in stored
    assert all(torch.equal(value, router[name]) for name, value in student.routing_module.state_dict().items())
    for name, parameter in rounded.named_parameters():
        if name in stored:
            parameter.data = parameter.data.to(torch.float8_e4m3fn).float()
    cast = draw(student)
    assert torch.equal(cast, draw(rounded))
    assert not torch.equal(cast, plain)


@pytest.mark.parametrize("level", ["leaf_level", "block_level"])
@pytest.mark.parametrize("scaffold", ["lean", "paper"])
def test_group_offload_reads_no_weight_of_a_layer_that_is_away(scaffold, level, tmp_path):
    """Weights lie on disk between calls of their layers; one that is read at any other time would be garbage."""
    student = make_student(**({} if scaffold == "lean" else {"scaffold": "paper", "patch_size": 1}))
    before = draw(student)
    options = {"num_blocks_per_group": 1} if level == "block_level" else {}
    student.enable_group_offload(torch.device("cpu"), offload_type=level, offload_to_disk_path=str(tmp_path), **options)
    assert list(tmp_path.iterdir())
    assert torch.equal(draw(student), before)


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offload_and_gates(level, tmp_path):
    student = make_student(dydit=0.7)
    with torch.no_grad():
        student.dydit_routers.width.weight.normal_(generator=torch.Generator().manual_seed(0))
    before = draw(student)
    options = {"num_blocks_per_group": 1} if level == "block_level" else {}
    student.enable_group_offload(torch.device("cpu"), offload_type=level, offload_to_disk_path=str(tmp_path), **options)
    # Layers with hooks are masked instead of cut: up to rounding.
    assert (draw(student) - before).abs().max() <= 1e-5 * before.abs().max()


# -- the output cache --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    """The shipped teacher's pipeline, and a student's."""
    teacher = load_pipeline(str(TEACHER))
    teacher.set_progress_bar_config(disable=True)
    return {
        "teacher": teacher,
        "student": pipeline(make_student()),
        "paper": pipeline(make_student(scaffold="paper", patch_size=1)),
    }


def sample(pipe, steps=8, guidance=2.0, **options):
    options = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "pt", **options}
    return pipe(class_labels=LABELS, generator=torch.Generator().manual_seed(0), **options).images


@pytest.mark.parametrize("kind", ["teacher", "student", "paper"])
def test_output_cache(digits, kind):
    """No limit: no call left out, the same bits. A high one: only the first and the last step, each run alike."""
    pipe = digits[kind]
    before = sample(pipe)
    cache = cache_outputs(pipe, 0.0)
    assert torch.equal(sample(pipe), before)
    assert (cache.computed, cache.reused) == (8, 0)
    cache.remove()
    calls = []
    pipe.transformer.register_forward_hook(
        lambda m, a, k, out: calls.append((int(k["timestep"][0]), out.sample)), with_kwargs=True
    )
    cache = cache_outputs(pipe, 1e9)
    first = sample(pipe)
    assert (cache.computed, cache.reused) == (2, 6)
    assert all(out is calls[0][1] for _, out in calls[:7])
    assert calls[7][1] is not calls[0][1]
    assert torch.equal(sample(pipe), first)
    assert torch.equal(sample(pipe, steps=3, guidance=1.0), sample(pipe, steps=3, guidance=1.0))
    cache.limit = 0.2
    cache.computed = cache.reused = 0
    sample(pipe, steps=20)
    assert 0 < cache.reused < 18
    cache.remove()
    assert torch.equal(sample(pipe), before)
    with pytest.raises(ValueError, match="limit"):
        cache_outputs(pipe, -1.0)


def test_output_cache_on_a_ddit_adapter_is_refused():
    """Its schedule would take the calls that run for all there are, and be late without a word."""
    model = ddit.attach(tiny.make_dit(0), ddit.DDiTConfig("DiTTransformer2DModel", [2], prediction="epsilon"))
    with pytest.raises(ValueError, match="DDiT"):
        cache_outputs(pipeline(model), 0.1)


def test_output_cache_of_a_model_called_twice_a_step(digits):
    """Conditional and unconditional calls apart: in contexts each has its own output; without, nothing is left out."""
    pipe = digits["student"]
    model, scheduler = pipe.transformer, pipe.scheduler
    x = torch.randn(1, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    one, null = torch.tensor([1]), torch.tensor([10])

    def run(context):
        scheduler.set_timesteps(4)
        outputs = []
        for t in scheduler.timesteps:
            for name, label in (("cond", one), ("uncond", null)):
                with context(name):
                    outputs.append(model(x, timestep=t[None], class_labels=label).sample)
        return outputs

    plain = run(lambda name: contextlib.nullcontext())
    cache = cache_outputs(pipe, 1e9)
    assert all(map(torch.equal, run(lambda name: contextlib.nullcontext()), plain))
    cached = run(model.cache_context)
    assert all(torch.equal(cached[i], plain[i % 2 if i < 6 else i]) for i in range(8))
    cache.remove()


def test_output_cache_in_the_sampling_loop_of_this_package(digits):
    """Guidance that begins in mid-run: the last step is exact. Held steps ask less often: nothing else is left out."""
    pipe = digits["student"]
    part = Sampling(steps=8, guidance_scale=2.0, guidance_interval=(300, 700))
    held = Sampling(steps=8, guidance_scale=2.0, hold=Hold(every=2))
    plain = run_loop(pipe, LABELS, [0, 1, 2], held)
    calls = []
    handle = pipe.transformer.register_forward_hook(lambda m, a, out: calls.append(out.sample))
    cache = cache_outputs(pipe, 1e9)
    run_loop(pipe, LABELS, [0, 1, 2], part)
    assert len({id(out) for out in calls}) == cache.computed == 4
    assert all(calls[-1] is not out for out in calls[:-1])
    assert torch.equal(run_loop(pipe, LABELS, [0, 1, 2], held), plain)
    cache.remove()
    handle.remove()


def test_output_cache_and_block_cache_together(digits):
    """Both at once on a student: a run like the one before it, fewer computed calls than steps."""
    pipe = digits["student"]
    pipe.transformer.enable_cache(OFTEN["first block"])
    cache = cache_outputs(pipe, 0.1)
    first = sample(pipe, steps=12)
    assert cache.computed + cache.reused == 12
    assert cache.reused > 0
    assert torch.equal(sample(pipe, steps=12), first)
    cache.remove()
    pipe.transformer.disable_cache()
