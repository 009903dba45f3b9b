"""DDiT's models: at m = 1 the stock model bit for bit, at m > 1 the stock model on enlarged images."""

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from diffusers import DDIMScheduler, DiTPipeline, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_ddit import (
    KINDS,
    arguments,
    as_latents,
    attach,
    draw,
    enlarge,
    flux_ids,
    latents,
    make,
    output,
    unpack,
)

from upcycle.models import ddit

every_kind = pytest.mark.parametrize("kind", KINDS)
four_classes = pytest.mark.parametrize("kind", ["dit", "flux", "wan", "z-image"])


# At m = 1


@every_kind
@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_at_the_finest_size_nothing_has_changed(kind, size):
    size = (16, 16) if kind == "dit" else size  # square only
    given = arguments(kind, latents(kind, *size))
    model = make(kind)
    stock = output(model, given)
    attach(kind, model)
    assert torch.equal(output(model, given), stock)
    model.set_patches(1)
    assert torch.equal(output(model, given), stock)
    model.set_patches(2)
    assert not torch.equal(output(model, given), stock)
    model.set_patches(None)
    assert torch.equal(output(model, given), stock)
    for schedule in ({"threshold": 0.0}, {"fixed": [(1, 1.0)], "steps": 9}):
        model.set_schedule(**schedule)
        for level in (0.9, 0.7, 0.5, 0.3, 0.2):
            out = output(model, arguments(kind, latents(kind, *size), level))
            if level == 0.7:
                assert torch.equal(out, stock)
    with model.at(4):
        assert not torch.equal(output(model, given), stock)
    assert torch.equal(output(model, given), stock)


@four_classes
def test_the_output_class_and_positional_arguments_are_the_stock_ones(kind):
    given = arguments(kind, latents(kind))
    stock, model = make(kind), attach(kind)
    assert type(model).__name__ == type(stock).__name__
    assert type(model).__module__ == type(stock).__module__
    for m in (1, 2):
        model.set_patches(m)
        with torch.no_grad():
            named, placed = model(**given), model(*given.values())
        assert type(named) is type(stock(**given))
        for a, b in zip(named.sample, placed.sample, strict=True):
            assert torch.equal(a, b)


def dit_pipeline(model):
    pipe = DiTPipeline(model, tiny.make_vae(), DDIMScheduler(clip_sample=False))
    return lambda: torch.from_numpy(
        pipe(class_labels=[1, 2], num_inference_steps=6, generator=torch.Generator().manual_seed(0), output_type="np")
        .images
    ), pipe  # fmt: skip


def flux_pipeline(model, guidance=1.0, dtype=torch.float32, steps=6):
    from diffusers import FluxPipeline

    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), None, None, None, None, None, model)
    embeds = {
        f"{sign}{name}": draw(*shape, seed=seed).to(dtype)
        for seed, sign in enumerate(("", "negative_"))
        for name, shape in {"prompt_embeds": (2, 5, 8), "pooled_prompt_embeds": (2, 8)}.items()
    }
    return (
        lambda: (
            pipe(
                **embeds,
                height=96,
                width=128,
                true_cfg_scale=guidance,
                num_inference_steps=steps,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
            ).images
        ),
        pipe,
    )


def wan_pipeline(model, expand_timesteps=False):
    from diffusers import UniPCMultistepScheduler, WanPipeline

    sampler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipe = WanPipeline(None, None, None, sampler, model, expand_timesteps=expand_timesteps)
    return (
        lambda: (
            pipe(
                prompt_embeds=draw(1, 5, 8),
                negative_prompt_embeds=draw(1, 5, 8, seed=1),
                height=96,
                width=128,
                num_frames=9,
                num_inference_steps=6,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
            ).frames
        ),
        pipe,
    )


def z_image_pipeline(model):
    from diffusers import ZImagePipeline

    pipe = ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), None, None, None, model)
    return (
        lambda: (
            pipe(
                prompt_embeds=[draw(5, 8), draw(7, 8)],
                negative_prompt_embeds=[draw(3, 8), draw(3, 8)],
                height=96,
                width=128,
                num_inference_steps=6,
                generator=torch.Generator().manual_seed(0),
                output_type="latent",
            ).images
        ),
        pipe,
    )


PIPELINES = {
    "dit": ("dit", dit_pipeline),
    "flux": ("flux", flux_pipeline),
    "flux with guidance": ("flux", lambda model: flux_pipeline(model, 2.0)),
    "wan": ("wan", wan_pipeline),
    "wan with times of tokens": ("wan", lambda model: wan_pipeline(model, True)),
    "z-image": ("z-image", z_image_pipeline),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_stock_pipelines_give_the_same_and_run_coarse(name):
    kind, build = PIPELINES[name]
    if kind != "dit":
        pytest.importorskip("transformers")
    model = make(kind)
    sample, pipe = build(model)
    pipe.set_progress_bar_config(disable=True)
    stock = sample()
    attach(kind, model)
    ddit.follow(model, pipe)
    assert torch.equal(sample(), stock)
    schedule = model.set_schedule(threshold=0.0)
    assert torch.equal(sample(), stock)
    assert [entry["m"] for entry in schedule.log] == [1] * 6
    assert ["deviation" in entry for entry in schedule.log] == [False] * 3 + [True] * 3
    times = pipe.scheduler.timesteps.float() / (1 if kind == "dit" else 1000)
    assert torch.allclose(
        torch.tensor([entry["time"] for entry in schedule.log]), times, atol=1.1e-3
    )  # UniPC's are cut to whole ones
    schedule = model.set_schedule(threshold=1e9)
    coarse = sample()
    assert coarse.shape == stock.shape
    assert not torch.equal(coarse, stock)
    assert [entry["m"] for entry in schedule.log] == [1] * 3 + [4] * 3
    schedule = model.set_schedule(fixed=[(1, 0.5), (2, 0.5)])
    sample()
    assert [entry["m"] for entry in schedule.log] == [1, 1, 1, 2, 2, 2]
    model.set_schedule()
    assert torch.equal(sample(), stock)


# At m > 1


def between(table, count, m):
    """Rows of a table of rotations, asked for at the centres of coarse tokens: half a step after a whole one."""
    lower = table[m // 2 - 1 :: m][:count]
    return lower * torch.polar(torch.ones(lower.shape[1]), table[1].angle() / 2)


def centred(kind, model, rows, columns, m):
    """The stock model, whose tokens of this grid sit at the centres of coarse ones."""
    model = copy.deepcopy(model)
    if kind == "dit":
        fine = model.pos_embed.pos_embed[0].view(8, 8, -1)
        halves = fine[0, :, :16].chunk(2, dim=-1)  # columns' sines and cosines; rows' are the same on a square
        line = between(torch.complex(halves[1], halves[0]), rows, m)
        line = torch.cat([line.imag, line.real], dim=-1)
        grid = torch.cat([line[None].expand(rows, -1, -1), line[:, None].expand(-1, columns, -1)], dim=-1)
        small = make("dit", size=2 * rows)
        small.load_state_dict(model.state_dict())
        small.pos_embed.pos_embed = grid.reshape(1, rows * columns, -1).contiguous()
        return small
    if kind.startswith("wan"):
        at = 0
        for axis, dim in enumerate((model.rope.t_dim, model.rope.h_dim, model.rope.w_dim)):
            part = slice(at, at + dim)
            table = torch.complex(model.rope.freqs_cos[:, part], model.rope.freqs_sin[:, part])
            if axis:
                line = between(table, (rows, columns)[axis - 1], m)
                model.rope.freqs_cos[: len(line), part] = line.real
                model.rope.freqs_sin[: len(line), part] = line.imag
            at += dim
    if kind == "z-image":  # text and padding stay at 0
        model.rope_embedder(torch.zeros(1, 3, dtype=torch.int32))
        tables = model.rope_embedder.freqs_cis
        for axis, count in ((1, rows), (2, columns)):
            tables[axis] = torch.cat([tables[axis][:1], between(tables[axis], count, m)])
        patchify = model.patchify_and_embed

        def shifted(*arguments):
            made = patchify(*arguments)
            for ids, padding in zip(made[3], made[5], strict=True):
                ids[~padding, 1:] += 1
            return made

        model.patchify_and_embed = shifted
    return model


@every_kind
@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("size", [(16, 16), (8, 16)])
def test_a_coarse_run_on_an_enlarged_image_is_the_stock_run_enlarged(kind, m, size):
    """Embedding, head and positions of an untrained adapter at once; the residual of such an image is zero."""
    height, width = (16, 16) if kind == "dit" else size
    small = latents(kind, height // m, width // m)
    large = enlarge(small, 2, m)
    base = make(kind)
    stock = centred(kind, base, height // m // 2, width // m // 2, m)
    given = arguments(kind, small)
    if kind == "flux":
        given["img_ids"] = flux_ids(*(torch.arange(size // 2 // m) * m + (m - 1) / 2 for size in (height, width)))
    expected = output(stock, given)
    model = attach(kind, base, trained=False)
    model.set_patches(m)
    got = output(model, arguments(kind, large))
    expected = unpack(expected, *small.shape[-2:]) if kind == "flux" else expected
    got = unpack(got, *large.shape[-2:]) if kind == "flux" else got
    torch.testing.assert_close(got, enlarge(expected, 2, m), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(("kind", "embed"), [("dit", "pos_embed.proj"), ("wan-image", "patch_embedding")])
def test_the_coarse_embedding_of_an_enlarged_image_is_the_base_embedding(kind, embed):
    model = attach(kind, trained=False)
    layer = model.get_submodule(embed)
    z = latents(kind, 8, 12)
    small, large = (x[:, :, 0] if kind == "dit" else x for x in (z, enlarge(z, 2, 4)))
    expected = layer(small)
    torch.testing.assert_close(layer.coarse["4"](large), expected, atol=1e-5, rtol=1e-5)


def test_positions_do_not_move_when_a_dit_is_padded():
    """12 x 12 latents are 6 x 6 tokens, of a grid of 8: also where 2 x 2 coarse ones of 4 cover 8 x 8."""
    model = attach("dit")
    seen = []
    model.pos_embed.register_forward_hook(lambda layer, _, out: seen.append(out))
    model.pos_embed.proj.register_forward_hook(lambda layer, _, out: seen.append(out.flatten(2).transpose(1, 2)))
    model.set_patches(4)
    output(model, arguments("dit", latents("dit", 12, 12)))
    got = (seen[1] - seen[0])[0].view(2, 2, 32)
    place = torch.tensor([1.5, 5.5]).double() * 8 / 6
    angle = place[:, None] * 10000 ** -(torch.arange(8).double() / 8)
    line = torch.cat([angle.sin(), angle.cos()], dim=1).float()
    expected = torch.cat([line[None].expand(2, -1, -1), line[:, None].expand(-1, 2, -1)], dim=-1)
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=0)


def test_positions_stay_exact_in_bf16():
    """128.5 is no bf16 number: ids of coarse tokens are fp32 whatever the model is."""
    assert ddit.centres(40, 4, torch.device("cpu"))[32] == 129.5
    model = attach("flux").bfloat16()
    seen = []
    model.pos_embed.register_forward_pre_hook(lambda layer, given: seen.append(given[0]))
    model.set_patches(4)
    given = arguments("flux", latents("flux", 528, 16))
    given |= {name: value.bfloat16() for name, value in given.items() if not name.endswith("ids")}
    assert output(model, given).dtype == torch.bfloat16
    assert seen[0][5:, 1].unique().tolist() == [4 * r + 1.5 for r in range(66)]


@every_kind
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_goes_in_and_comes_out(kind, dtype):
    model = attach(kind).to(dtype)
    given = {
        name: [x.to(dtype) for x in value] if isinstance(value, list) else value.to(dtype)
        if name in ("hidden_states", "encoder_hidden_states", "pooled_projections") else value
        for name, value in arguments(kind, latents(kind)).items()
    }  # fmt: skip
    for m in (1, 2):
        model.set_patches(m)
        out = output(model, given)
        assert out.dtype == dtype
        assert out.isfinite().all()


@every_kind
@pytest.mark.parametrize("size", [(10, 10), (12, 20), (18, 34)])
@pytest.mark.parametrize("m", [2, 4])
def test_sizes_that_do_not_divide_are_padded_and_cropped(kind, size, m):
    height, width = size if kind != "dit" else size[:1] * 2
    model = attach(kind)
    model.set_patches(m)
    z = latents(kind, height, width)
    P = 2 * m
    rows = torch.arange(-(-height // P) * P).clamp(max=height - 1)
    columns = torch.arange(-(-width // P) * P).clamp(max=width - 1)
    out = output(model, arguments(kind, z))
    assert out.shape == output(make(kind), arguments(kind, z)).shape
    if kind == "dit":  # its positions depend on the size of the image: see above
        return
    padded = z[..., rows, :][..., columns]
    whole = output(model, arguments(kind, padded))
    if kind == "flux":
        whole, out = unpack(whole, len(rows), len(columns)), unpack(out, height, width)
    assert torch.equal(out, whole[..., :height, :width])


@settings(max_examples=60, deadline=None)
@given(
    st.permutations("cfhw"),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)),
    st.integers(1, 4),
)
def test_merging_and_splitting_are_inverses(axes, patch, coarse, m):
    axes, (channels, frames, side) = "".join(axes), patch
    sizes = {"c": channels, "f": frames, "h": side, "w": side}
    grid = (coarse[0], coarse[1] * m, coarse[2] * m)
    tokens = draw(2, grid[0] * grid[1] * grid[2], channels * frames * side * side)
    merged = ddit.merge(tokens, grid, axes, sizes, m)
    assert merged.shape == (2, coarse[0] * coarse[1] * coarse[2], tokens.shape[2] * m * m)
    assert torch.equal(ddit.split(merged, grid, axes, sizes, m), tokens)
    # Merged tokens are patches of side m p of the same image.
    assert torch.equal(image(merged, coarse, axes, sizes | {"h": side * m, "w": side * m}),
                       image(tokens, grid, axes, sizes))  # fmt: skip


def image(tokens, grid, axes, sizes):
    x = tokens.view(len(tokens), *grid, *(sizes[a] for a in axes))
    f, h, w = (4 + axes.index(a) for a in "fhw")
    x = x.permute(0, 4 + axes.index("c"), 1, f, 2, h, 3, w)
    return x.flatten(6, 7).flatten(4, 5).flatten(2, 3)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 3), st.integers(2, 4), st.integers(0, 2**16))
def test_outside_is_a_projection_that_enlarged_images_do_not_survive(side, m, seed):
    b = ddit.upsampling(side, m)
    projector = (b @ torch.linalg.pinv(b)).float()
    z = draw(2, 3, 2 * side * m, side * m, seed=seed)
    beyond = ddit.outside(z, projector)
    torch.testing.assert_close(ddit.outside(beyond, projector), beyond, atol=1e-5, rtol=1e-5)
    large = enlarge(draw(2, 3, 2 * side, side, seed=seed), side, m)
    assert ddit.outside(large, projector).abs().max() < 1e-5
    assert (beyond * (z - beyond)).sum().abs() < 1e-3 * z.square().sum()  # orthogonal


@every_kind
def test_the_residual_is_the_gain_times_what_lies_outside(kind):
    z = latents(kind, 12, 20) if kind != "dit" else latents(kind)
    with_it, without = attach(kind), attach(kind, residual=False)
    with_it.ddit.variance = {"2": 0.3}
    outs = []
    for model in (with_it, without):
        model.set_patches(2)
        outs.append(output(model, arguments(kind, z, 0.6)))
    difference = as_latents(kind, outs[0], z) - as_latents(kind, outs[1], z)
    b = ddit.upsampling(2, 2)
    seen = z[:, :4]
    expected = ddit.outside(seen, (b @ torch.linalg.pinv(b)).float())
    gain = with_it.noise.gain(torch.tensor(600 if kind == "dit" else 0.6), 0.3)
    gain = gain.expand(seen.shape[2]).clone()
    if kind == "wan-tokens":
        gain[0] = with_it.noise.gain(torch.tensor(0.0), 0.3)
    torch.testing.assert_close(difference, expected * gain.view(-1, 1, 1), atol=1e-5, rtol=1e-4)
    if kind == "dit":
        assert torch.equal(outs[0][:, 4:], outs[1][:, 4:])


def test_what_cannot_be_coarsened_runs_as_ever_and_says_so():
    """References, several regions, and the outputs of a ControlNet, one for every fine token."""
    model, stock = attach("flux"), make("flux")
    model.set_schedule(fixed=[(4, 1.0)], steps=10)
    given = arguments("flux", latents("flux"))
    control = [draw(2, 64, 32)]
    ids = given["img_ids"].clone()
    ids[32:, 0] = 1
    for change in (
        {"controlnet_block_samples": control},
        {"controlnet_single_block_samples": control},
        {"img_ids": ids},
        {"img_ids": given["img_ids"].roll(1, 0)},
    ):
        with pytest.warns(UserWarning, match="stays at m = 1: these arguments cannot be coarsened"):
            assert torch.equal(output(model, given | change), output(stock, given | change))
        with model.at(4), pytest.raises(ValueError, match=r"set_patches\(4\): these arguments cannot be coarsened"):
            output(model, given | change)
        with model.at(1), warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(output(model, given | change), output(stock, given | change))
    model, stock = attach("z-image"), make("z-image")
    model.set_schedule(fixed=[(4, 1.0)], steps=10)
    images = [latents("z-image", 16, 16)[0], latents("z-image", 16, 24)[0]]  # of two sizes
    given = arguments("z-image", latents("z-image")) | {"x": images}
    with torch.no_grad(), pytest.warns(UserWarning, match="cannot be coarsened"):
        outs = model(**given).sample, stock(**given).sample
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


# Caches of diffusers


@pytest.mark.parametrize("kind", ["flux", "wan"])
@pytest.mark.parametrize("by", ["schedule", "hand"])
def test_a_cache_of_tokens_is_forgotten_when_the_size_changes(kind, by):
    from diffusers import FirstBlockCacheConfig

    model = attach(kind)
    z = latents(kind)
    expected = {}
    for m in (1, 2):
        model.set_patches(m)
        expected[m] = output(model, arguments(kind, z))
    model.set_patches(None)
    model.enable_cache(FirstBlockCacheConfig(threshold=1e9))  # whatever can be skipped is skipped
    if by == "schedule":
        model.set_schedule(fixed=[(1, 0.25), (2, 0.5), (1, 0.25)], steps=4)
    for m, level in zip((1, 2, 2, 1), (0.7, 0.6, 0.5, 0.4), strict=True):
        if by == "hand":
            model.set_patches(m)
        with model.cache_context("cond"):
            given = arguments(kind, z, level)
            out = output(model, given)
        fresh = attach(kind)
        fresh.set_patches(m)
        assert torch.equal(out, output(fresh, given)) == (level != 0.5)  # the second at 2 is from the cache
    model._reset_stateful_cache()
    model.disable_cache()
    model.set_patches(1)
    assert torch.equal(output(model, arguments(kind, z)), expected[1])


# Adapters


@four_classes
def test_an_adapter_comes_back_the_same(kind, tmp_path):
    model = attach(kind, variance={"2": 0.2, "4": 0.4}, threshold=0.01)
    ddit.save_adapter(model, tmp_path / "adapter")
    other = make(kind)
    assert ddit.apply(other, tmp_path / "adapter") is other
    assert other.ddit == model.ddit
    assert other.schedule.threshold == 0.01
    for m in (1, 2, 4):
        model.set_patches(m), other.set_patches(m)
        given = arguments(kind, latents(kind))
        assert torch.equal(output(other, given), output(model, given))


@four_classes
def test_a_saved_model_loads_in_the_stock_class(kind, tmp_path):
    stock = make(kind)
    model = attach(kind)
    model.save_pretrained(tmp_path)
    loaded, report = type(stock).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    given = arguments(kind, latents(kind))
    assert torch.equal(output(loaded.eval(), given), output(stock, given))
    ddit.apply(loaded, tmp_path)
    model.set_patches(2), loaded.set_patches(2)
    assert torch.equal(output(loaded, given), output(model, given))


def test_a_pipeline_saves_as_a_stock_one(tmp_path):
    sample, pipe = dit_pipeline(attach("dit"))
    pipe.set_progress_bar_config(disable=True)
    expected = sample()
    pipe.save_pretrained(tmp_path, variant="fp32", max_shard_size="100KB")
    names = {path.name for path in (tmp_path / "transformer").iterdir()}
    assert names >= {"config.json", "ddit.json", "ddit.safetensors", "ddit.py"}
    assert sum("fp32-0000" in name for name in names) > 1
    loaded = DiTPipeline.from_pretrained(tmp_path, variant="fp32")
    assert type(loaded.transformer) is type(make("dit"))
    build = dit_pipeline(loaded.transformer)[0]
    assert torch.equal(build(), expected)
    ddit.apply(loaded, tmp_path / "transformer")
    assert torch.equal(build(), expected)


def test_ids_with_a_batch_dimension_are_taken_too():
    model = attach("flux")
    given = arguments("flux", latents("flux"))
    batched = given | {name: given[name].expand(2, -1, -1) for name in ("img_ids", "txt_ids")}
    for m in (1, 2):
        assert torch.equal(at(model, m, batched), at(model, m, given))


@four_classes
def test_the_base_stays_as_it_was(kind):
    model = make(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attach(kind, model)
    model.set_patches(4)
    output(model, arguments(kind, latents(kind)))
    after = model.state_dict()
    assert {name for name in after if ".coarse." not in name} == set(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert model.adapter_parameters().keys() == {name for name in after if ".coarse." in name}


def damage_missing(tensors, config):
    del tensors[min(tensors)]


def damage_shape(tensors, config):
    name = max(name for name in tensors if name.endswith("up.weight"))
    tensors[name] = tensors[name][:, :-1].contiguous()


def damage_surplus(tensors, config):
    tensors["x.coarse.2.weight"] = torch.zeros(1)


def damage_patches(tensors, config):
    config["patches"] = [2, 4, 8]


def damage_class(tensors, config):
    config["base_class"] = "UNet2DModel"


def damage_unknown(tensors, config):
    config["novelty"] = 1


def damage_absent(tensors, config):
    del config["patches"]


def damage_type(tensors, config):
    config["patches"] = 2


def damage_noise(tensors, config):
    config["beta_schedule"] = "squaredcos_cap_v2"


DAMAGES = [value for name, value in globals().items() if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_adapters_are_refused_and_the_model_is_left_alone(damage, tmp_path):
    ddit.save_adapter(attach("flux"), tmp_path)
    tensors, config = load_file(tmp_path / ddit.WEIGHTS), json.loads((tmp_path / ddit.CONFIG).read_text())
    damage(tensors, config)
    save_file(tensors, tmp_path / ddit.WEIGHTS)
    (tmp_path / ddit.CONFIG).write_text(json.dumps(config))
    refuse(make("flux"), tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00"])
@pytest.mark.parametrize("name", [ddit.CONFIG, ddit.WEIGHTS])
def test_broken_files_are_refused(name, content, tmp_path):
    ddit.save_adapter(attach("wan"), tmp_path)
    (tmp_path / name).write_bytes(content)
    refuse(make("wan"), tmp_path)


def refuse(model, folder, **schedule):
    before, cls = list(model.state_dict()), type(model)
    layers = [type(layer) for layer in model.modules()]
    with pytest.raises(ValueError):  # noqa: PT011
        ddit.apply(model, folder, **schedule)
    assert type(model) is cls
    assert list(model.state_dict()) == before
    assert [type(layer) for layer in model.modules()] == layers
    assert not hasattr(model, "switch")


def test_other_models_other_sizes_and_bad_wishes_are_refused(tmp_path):
    ddit.save_adapter(attach("wan"), tmp_path / "wan")
    refuse(make("dit"), tmp_path / "wan")
    refuse(make("wan-image"), tmp_path / "wan")  # more channels go in
    refuse(make("wan"), tmp_path)
    refuse(make("wan"), tmp_path / "nowhere")
    refuse(make("wan"), tmp_path / "wan", policy="some")
    refuse(make("wan"), tmp_path / "wan", fixed=[(3, 1.0)])
    refuse(make("wan"), tmp_path / "wan", fixed=[(2, 0.5)])
    refuse(make("wan"), tmp_path / "wan", order=4)
    refuse(make("wan"), tmp_path / "wan", threshold=-1.0)
    model = attach("wan")
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="already"):
        ddit.apply(model, tmp_path / "wan")
    with pytest.raises(ValueError, match="patches must be"):
        model.set_patches(3)
    assert model.state_dict().keys() == state.keys()


@four_classes
def test_gradients_reach_the_adapter_alone(kind):
    model = attach(kind)
    for checkpointing in (False, True) if model._supports_gradient_checkpointing else (False,):
        if checkpointing:
            model.train(), model.enable_gradient_checkpointing()
        model.requires_grad_(False).zero_grad()
        adapter = model.adapter_parameters()
        for parameter in adapter.values():
            parameter.requires_grad_()
        for m in (2, 4):
            model.set_patches(m)
            out = model(**arguments(kind, latents(kind)), return_dict=False)[0]
            sum(part.square().sum() for part in out).backward()
            for name, parameter in adapter.items():
                reached = parameter.grad is not None and bool(parameter.grad.abs().sum() > 0)
                assert reached == (int(name.split(".coarse.")[1][0]) <= m), name
        assert all(p.grad is None for name, p in model.named_parameters() if name not in adapter)


def test_an_adapter_has_tensors_of_its_own(tmp_path):
    """Training one model leaves the tensors that it was made from, and others made from them."""
    ddit.save_adapter(attach("wan"), tmp_path)
    config, tensors = ddit.load_adapter(tmp_path)
    a, b = make("wan"), make("wan")
    ddit.attach(a, config, tensors), ddit.attach(b, config, tensors)
    with torch.no_grad():
        for parameter in a.adapter_parameters().values():
            parameter.add_(1)
    kept = load_file(tmp_path / ddit.WEIGHTS)
    assert all(torch.equal(value, kept[name]) for name, value in tensors.items())
    assert all(torch.equal(value, kept[name]) for name, value in b.adapter_parameters().items())


@four_classes
def test_a_copy_has_a_switch_of_its_own(kind):
    model = attach(kind)
    given = arguments(kind, latents(kind))
    other = copy.deepcopy(model)
    other.set_patches(2)
    two = output(other, given)
    one = output(model, given)
    assert (model.switch.m, other.switch.m) == (1, 2)
    assert all(layer.switch is other.switch for layer in other.modules() if isinstance(layer, ddit.Coarse))
    assert other.schedule is not model.schedule
    assert torch.equal(output(other, given), two)
    model.set_patches(2)
    assert torch.equal(output(model, given), two)
    other.set_patches(None)
    assert torch.equal(output(other, given), one)


@four_classes
def test_a_model_with_an_adapter_is_pickled(kind, tmp_path):
    model = attach(kind)
    model.set_schedule(threshold=0.5)
    model.set_patches(2)
    given = arguments(kind, latents(kind))
    two = output(model, given)
    torch.save(model, tmp_path / "whole.pt")
    for other in (pickle.loads(pickle.dumps(model)), torch.load(tmp_path / "whole.pt", weights_only=False)):
        assert type(other) is type(model)
        assert (other.schedule.threshold, other.schedule.forced, other.ddit) == (0.5, 2, model.ddit)
        assert other.schedule is not model.schedule
        assert all(layer.switch is other.switch for layer in other.modules() if isinstance(layer, ddit.Switching))
        assert torch.equal(output(other, given), two)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    other = attach(kind, trained=False)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    other.set_patches(2)
    assert torch.equal(output(other, given), two)


def test_a_style_lora_goes_on_top():
    pytest.importorskip("peft")
    from peft import LoraConfig

    targets = {"dit": ["to_q", "ff.net.2"], "flux": ["to_q", "0.proj_out", "ff.net.2"], "wan": ["to_q", "ffn.net.2"]}
    targets["z-image"] = ["to_q", "w1", "w2"]
    for kind, names in targets.items():
        given = arguments(kind, latents(kind))
        plain, model = make(kind), attach(kind)
        if not hasattr(model, "add_adapter"):
            continue
        bare = {m: at(model, m, given) for m in (1, 2)}
        for each in (plain, model):
            each.add_adapter(LoraConfig(r=2, target_modules=names, init_lora_weights=True))
        for m in (1, 2):
            assert torch.equal(at(model, m, given), bare[m])  # nothing learned yet
        for each in (plain, model):
            for name, parameter in each.named_parameters():
                if "lora_" in name:
                    parameter.data.copy_(draw(*parameter.shape))
        assert torch.equal(at(model, 1, given), output(plain, given))
        two = at(model, 2, given)
        assert not torch.equal(two, bare[2])
        assert not any("lora" in name for name in model.adapter_parameters()), kind
        model.disable_adapters()
        assert torch.equal(at(model, 2, given), bare[2])


def test_a_style_lora_on_what_sees_patches_stays_at_the_finest_size():
    pytest.importorskip("peft")
    from peft import LoraConfig

    given = arguments("flux", latents("flux"))
    model = attach("flux")
    bare = at(model, 2, given)
    model.add_adapter(LoraConfig(r=2, target_modules=["x_embedder"], init_lora_weights=False))
    at(model, 1, given)
    with pytest.raises(ValueError, match="LoRA on x_embedder"):
        at(model, 2, given)
    model.disable_adapters()
    assert torch.equal(at(model, 2, given), bare)


def test_adapters_go_on_a_model_that_has_a_style_lora(tmp_path):
    pytest.importorskip("peft")
    from peft import LoraConfig

    given = arguments("flux", latents("flux"))
    ddit.save_adapter(attach("flux"), tmp_path / "before")
    expected = at(attach("flux"), 2, given)
    model = make("flux")
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "ff.net.2", "context_embedder"]))
    ddit.apply(model, tmp_path / "before")
    assert torch.equal(at(model, 2, given), expected)
    ddit.save_adapter(model, tmp_path / "after")
    before, after = (load_file(tmp_path / name / ddit.WEIGHTS) for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def at(model, m, given):
    with model.at(m):
        return output(model, given)


def test_the_file_beside_an_adapter_is_all_that_is_needed(tmp_path):
    ddit.save_adapter(attach("dit"), tmp_path / "adapter")
    dit_pipeline(make("dit"))[1].save_pretrained(tmp_path / "pipe")
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "adapter" / "ddit.py", tmp_path / "alone")
    code = """
import sys, torch
sys.modules["upcycle"] = None  # importing it raises
from diffusers import DiTPipeline
import ddit
pipe = DiTPipeline.from_pretrained(sys.argv[1])
pipe.set_progress_bar_config(disable=True)
model = ddit.apply(pipe, sys.argv[2], threshold=1e9)
pipe([1], num_inference_steps=5, generator=torch.Generator().manual_seed(0), output_type="np")
print([entry["m"] for entry in model.schedule.log], ddit.__file__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "pipe", tmp_path / "adapter"],
        capture_output=True,
        text=True,
        cwd=tmp_path / "alone",
        env={**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("]")[0] == "[1, 1, 1, 4, 4"
    assert str(tmp_path / "alone") in done.stdout
    assert Path(ddit.__file__).read_bytes() == (tmp_path / "adapter" / "ddit.py").read_bytes()


def test_models_with_hooks_are_refused_because_hooks_keep_the_old_forward():
    from accelerate.hooks import ModelHook, add_hook_to_module

    for part in (lambda model: model, lambda model: model.proj_out_2):
        model = make("dit")
        add_hook_to_module(part(model), ModelHook())
        with pytest.raises(ValueError, match="put the adapter on first"):
            ddit.attach(model, ddit.DDiTConfig("DiTTransformer2DModel", [2]))
        assert not isinstance(model, ddit.PatchSwitching)
