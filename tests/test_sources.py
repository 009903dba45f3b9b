"""Local sources: what each kind of file becomes, and how bad ones are refused."""

import argparse
import json
import math
import os
import pathlib
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from upcycle.errors import UpcycleError
from upcycle.sources import DCDiTConfig, DiTConfig, Source, check_finite, open_source
from upcycle.sources.safetensors_file import read_safetensors
from upcycle.sources.torch_file import read_torch_file


def refused(spec: Path | str, *parts: str, **options) -> None:
    """`spec` is refused with one line that contains all `parts`."""
    with pytest.raises(UpcycleError) as caught:
        open_source(str(spec), **options)
    assert_one_line(caught.value)
    for part in parts:
        assert part in str(caught.value)


def assert_one_line(error: UpcycleError) -> None:
    """The form of every error that a user sees."""
    assert "\n" not in str(error)
    assert len(str(error)) < 600


def assert_same(source: Source, state: dict[str, torch.Tensor]) -> None:
    """`source` has exactly the tensors of `state`, bit for bit, as its headers say."""
    assert set(source.tensors) == set(state)
    for name, lazy in source.tensors.items():
        tensor = lazy.load()
        assert lazy.name == name
        assert (lazy.shape, lazy.dtype) == (tuple(tensor.shape), tensor.dtype)
        assert lazy.nbytes == tensor.nbytes
        assert tensor.is_contiguous()
        assert torch.equal(tensor, state[name]), name


@pytest.fixture(scope="module")
def dit():
    return tiny.make_dit(0)


# --- diffusers folders ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("bin", [False, True])
@pytest.mark.parametrize("shard", [None, "200KB"])
def test_pipeline_folder(dit, tmp_path: Path, legacy: bool, bin: bool, shard: str | None) -> None:
    folder = tiny.save_pipeline(tmp_path / "my-dit", dit, legacy_config=legacy, bin=bin, max_shard_size=shard)
    assert (len(list(folder.glob("transformer/*-of-*"))) > 1) == (shard is not None)
    source = open_source(str(folder))
    assert source.kind == "diffusers"
    assert source.name == "my-dit"
    assert source.config == DiTConfig(2, 2, 32, 4, 8, 16, 2, 10, "diffusers", 1e-5)
    assert source.config.hidden_size == 64
    assert source.components == {"vae": folder / "vae", "scheduler": folder / "scheduler"}
    assert source.model_index is not None
    assert source.model_index["id2label"]["7"] == "label 7"
    assert source.licence == "cc-by-nc-4.0"
    assert source.revision is None
    assert source.notes == []
    assert_same(source, dit.state_dict())


def test_transformer_folder_and_its_config(tmp_path: Path) -> None:
    model = tiny.make_dit(
        1, width=96, heads=3, layers=1, patch=4, size=32, in_channels=3, classes=5, learned_sigma=False
    )
    model.register_to_config(norm_eps=1e-4, out_channels=None)
    source = open_source(str(tiny.save_transformer(tmp_path / "bare", model)))
    assert source.config == DiTConfig(1, 3, 32, 3, 3, 32, 4, 5, "diffusers", 1e-4)
    assert (source.components, source.model_index, source.licence) == ({}, None, None)
    assert_same(source, model.state_dict())
    assert open_source(str(tmp_path / "bare"), heads=3).config == source.config
    refused(tmp_path / "bare", "says 3 attention heads, not 4", heads=4)
    refused(tmp_path / "bare", "has no revisions", revision="main")


@pytest.mark.parametrize("shard", [None, "100KB"])
def test_variants(tmp_path: Path, shard: str | None) -> None:
    plain, half, brain = tiny.make_dit(0), tiny.make_dit(1).half(), tiny.make_dit(2).bfloat16()
    folder = tiny.save_transformer(tmp_path / "t", half, variant="fp16", max_shard_size=shard)
    only = open_source(str(folder))
    assert only.notes == ["only fp16 weights are there; they are used"]
    assert_same(only, half.state_dict())
    refused(folder, "'bf16'", "there are: fp16", variant="bf16")
    # `save_pretrained` removes what it takes for old shards, so other variants are written elsewhere.
    shutil.copytree(tiny.save_transformer(tmp_path / "b", brain, variant="bf16"), folder, dirs_exist_ok=True)
    refused(folder, "only as variants bf16, fp16")
    shutil.copytree(tiny.save_transformer(tmp_path / "p", plain), folder, dirs_exist_ok=True)
    for variant, model in ((None, plain), ("fp16", half), ("bf16", brain)):
        assert_same(open_source(str(folder), variant=variant), model.state_dict())
    refused(folder, "there are: the plain weights, bf16, fp16", variant="fp8")


def test_copies_of_the_embedder_stay_apart(tmp_path: Path) -> None:
    model = tiny.make_dit(0)
    with torch.no_grad():
        model.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.bias += 1
    assert_same(open_source(str(tiny.save_transformer(tmp_path / "split", model))), model.state_dict())


def test_stored_position_buffer_is_ignored(dit, tmp_path: Path) -> None:
    folder = tiny.save_transformer(tmp_path / "old", dit)
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "pos_embed.pos_embed": torch.zeros(1, 64, 64)}, file)
    assert_same(open_source(str(folder)), dit.state_dict())


FOREIGN = {
    "FluxTransformer2DModel": {"_class_name": "FluxTransformer2DModel", "num_layers": 19},
    "UNet2DConditionModel": {"_class_name": "UNet2DConditionModel", "in_channels": 4},
    "llama model of transformers (LlamaForCausalLM)": {"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
    "model of unknown class": {"hello": 1},
    "Transformer2DModel without patches": {"_class_name": "Transformer2DModel", "num_layers": 1},
    "norm_type is 'ada_norm_single'": {
        "_class_name": "Transformer2DModel", "patch_size": 2, "norm_type": "ada_norm_single", "attention_bias": True,
        "activation_fn": "gelu-approximate", "norm_elementwise_affine": False,
    },
    "activation_fn is 'geglu'": {"_class_name": "Transformer2DModel", "patch_size": 2},
}  # fmt: skip


@pytest.mark.parametrize("expected", FOREIGN)
def test_other_models_are_named(tmp_path: Path, expected: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(FOREIGN[expected]))
    refused(tmp_path, expected)


def test_other_pipelines_are_named(tmp_path: Path) -> None:
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    refused(tmp_path, "is a StableDiffusionPipeline with a UNet2DConditionModel, not a class-conditional DiT")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("activation_fn", "gelu"),
        ("norm_elementwise_affine", True),
        ("attention_bias", False),
        ("norm_type", "layer_norm"),
        ("cross_attention_dim", 768),
        ("quantization_config", {"bits": 4}),
        ("num_layers", 0),
        ("num_layers", "28"),
        ("sample_size", [16, 32]),
        ("num_embeds_ada_norm", None),
        ("patch_size", 3),
        ("norm_eps", "small"),
    ],
)
def test_unsupported_options_are_named(dit, tmp_path: Path, option: str, value: object) -> None:
    folder = tiny.save_transformer(tmp_path / "t", dit)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {option: value}))
    refused(folder, option)


def test_wrong_tensors_are_named(dit, tmp_path: Path) -> None:
    folder = tiny.save_transformer(tmp_path / "t", dit)
    file = folder / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    for index in (0, 1):
        for part in ("weight", "bias"):
            del state[f"transformer_blocks.{index}.attn1.to_k.{part}"]
    state["lora.up"] = torch.zeros(3)
    state["proj_out_2.bias"] = torch.zeros(16)
    state["proj_out_1.bias"] = state["proj_out_1.bias"].to(torch.int8)
    save_file(state, file)
    refused(
        folder,
        "4 missing (transformer_blocks.0.attn1.to_k.",
        ", …)",
        "1 unexpected (lora.up)",
        "1 of another shape (proj_out_2.bias is [16] instead of [32])",
        "1 not floating point (proj_out_1.bias is int8)",
    )


def test_damaged_folders(dit, tmp_path: Path) -> None:
    folder = tiny.save_pipeline(tmp_path / "p", dit, max_shard_size="200KB")
    index = folder / "transformer/diffusion_pytorch_model.safetensors.index.json"
    good = index.read_text()
    for shard in ("../vae/diffusion_pytorch_model.safetensors", "/etc/passwd", "..\\x.safetensors", "notes.txt"):
        content = json.loads(good)
        content["weight_map"]["proj_out_1.bias"] = shard
        index.write_text(json.dumps(content))
        refused(folder, "refused", repr(shard))
    index.write_text('{"weight_map": {"a": 1}}')
    refused(folder, "no proper weight_map")
    index.write_text(good)
    shards = sorted((folder / "transformer").glob("*-of-*"))
    (folder / "transformer" / "x").write_bytes(shards[0].read_bytes())
    shards[0].unlink()
    refused(folder, f"{shards[0].name}, which", "is not there")
    (folder / "transformer" / "x").rename(shards[0])
    open_source(str(folder))  # whole again
    shards[1].write_bytes(shards[0].read_bytes())
    refused(folder, "is in two shards")
    (folder / "transformer/config.json").write_text("{")
    refused(folder, "config.json is not valid JSON")
    for shard in [*shards, index]:
        shard.unlink()
    (folder / "transformer/config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    refused(folder, "no weights")


def test_places_that_are_no_source(tmp_path: Path) -> None:
    refused(tmp_path, "it holds nothing")
    (tmp_path / "DiT.pt").write_bytes(b"")
    refused(tmp_path, "it holds DiT.pt; give the path of that file")
    refused(tmp_path / "missing.pt", "no such file or folder")
    refused("checkpoints/missing.pt", "no such file or folder")  # has the form of a Hub id
    refused("x" * 300, "no such file or folder")


# --- Meta's checkpoints -----------------------------------------------------------------------------------------


def stock_from(source: Source):
    """A stock model with the tensors of a source, the embedder of block 0 in all blocks."""
    config = source.config
    assert isinstance(config, DiTConfig)
    model = tiny.make_dit(
        99,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        layers=config.num_layers,
        patch=config.patch_size,
        size=config.sample_size,
        in_channels=config.in_channels,
        classes=config.num_classes,
        learned_sigma=config.out_channels != config.in_channels,
    )
    state = {name: tensor.load() for name, tensor in source.tensors.items()}
    for name in [name for name in state if ".norm1.emb." in name]:
        assert name.startswith("transformer_blocks.0.")
        for index in range(1, config.num_layers):
            state[name.replace("blocks.0.", f"blocks.{index}.")] = state[name]
    model.load_state_dict(state, strict=True)
    return model


def test_meta_golden_output() -> None:
    source = open_source(str(tiny.GOLDEN / "meta_dit_tiny.pt"))
    assert source.kind == "meta"
    assert source.name == "meta_dit_tiny"
    assert source.licence == "cc-by-nc-4.0"
    assert source.config == DiTConfig(2, 2, 32, 4, 8, 16, 2, 10, "meta", 1e-6)
    model = tiny.meta_as_stock(stock_from(source))
    data = load_file(tiny.GOLDEN / "meta_dit_tiny.io.safetensors")
    with torch.no_grad():
        out = model(data["x"], data["t"], data["y"]).sample
    assert (out - data["out"]).abs().max() <= 1e-5


@given(
    layers=st.integers(1, 3),
    patch=st.sampled_from([1, 2, 4, 8]),
    grid=st.integers(1, 6),
    channels=st.integers(1, 5),
    classes=st.integers(1, 12),
    sigma=st.booleans(),
)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_meta_shapes_are_read_off(tmp_path, layers, patch, grid, channels, classes, sigma) -> None:
    model = tiny.make_dit(
        3, layers=layers, patch=patch, size=grid * patch, in_channels=channels, classes=classes, learned_sigma=sigma
    )
    source = open_source(str(tiny.save_meta_pt(tmp_path / "m.pt", model)))
    outputs = channels * (2 if sigma else 1)
    assert source.config == DiTConfig(layers, 2, 32, channels, outputs, grid * patch, patch, classes, "meta", 1e-6)
    assert_same(source, {
        name: tensor for name, tensor in model.state_dict().items() if "norm1.emb" not in name or "blocks.0." in name
    })  # fmt: skip


@pytest.mark.parametrize(("width", "heads"), [(384, 6), (768, 12), (1024, 16), (1152, 16), (512, 8), (96, 3)])
def test_heads_by_width(tmp_path: Path, width: int, heads: int) -> None:
    source = open_source(str(tiny.save_meta_pt(tmp_path / "m.pt", tiny.make_dit(0, width=width, layers=1, size=4))))
    assert isinstance(source.config, DiTConfig)
    assert source.config.num_attention_heads == heads
    assert source.config.hidden_size == width
    assert bool(source.notes) == (width in (512, 96))


def test_training_checkpoint(dit, tmp_path: Path) -> None:
    path = tiny.save_meta_pt(tmp_path / "0050000.pt", dit, training=True)
    averaged, raw = open_source(str(path)), open_source(str(path), weights="model")
    assert torch.equal(averaged.tensors["proj_out_2.weight"].load(), dit.proj_out_2.weight)
    assert raw.tensors["proj_out_2.weight"].load().count_nonzero() == 0
    wide = tiny.make_dit(0, width=192, layers=1, size=4)
    named = open_source(str(tiny.save_meta_pt(path, wide, training=True, name="DiT-B/2")))
    assert named.config.num_attention_heads == 12  # the arguments know better than the width
    assert named.notes == []
    assert open_source(str(path), heads=4).config.num_attention_heads == 4
    refused(path, "--heads 5 does not divide", heads=5)
    content = torch.load(path, weights_only=False)
    torch.save({**content, "step": torch.tensor(7)}, path)
    assert open_source(str(path)).config == named.config
    del content["ema"]
    torch.save(content, path)
    refused(path, "no 'ema' weights, it holds model, opt, args; pass --weights model")
    content["args"].num_classes = 11
    torch.save({**content, "ema": content["model"]}, path)
    refused(path, "no null class")


def test_wrappers_prefixes_go(dit, tmp_path: Path) -> None:
    state = tiny.meta_state(dit)
    wrapped = {"module._orig_mod." + name.replace("blocks.0.", "blocks.0._orig_mod."): t for name, t in state.items()}
    torch.save(wrapped, tmp_path / "w.pt")
    torch.save(state, tmp_path / "p.pt")
    plain = open_source(str(tmp_path / "p.pt"))
    assert_same(open_source(str(tmp_path / "w.pt")), {name: lazy.load() for name, lazy in plain.tensors.items()})
    torch.save({**state, "module.pos_embed": state["pos_embed"]}, tmp_path / "w.pt")
    refused(tmp_path / "w.pt", "two tensors are called pos_embed")


def change_meta(state: dict, change: str) -> None:
    """One way in which a state dict can be of another model."""
    if change == "pos_embed is not the sine-cosine embedding":
        state["pos_embed"] = torch.randn(1, 64, 64)
    elif change == "make no square":
        state["pos_embed"] = torch.zeros(1, 60, 64)
    elif change == "1 missing (blocks.1.mlp.fc1.bias)":
        del state["blocks.1.mlp.fc1.bias"]
    elif change == "2 unexpected (blocks.0.attn.q_norm.weight, blocks.1.attn.q_norm.weight)":
        state["blocks.0.attn.q_norm.weight"] = state["blocks.1.attn.q_norm.weight"] = torch.ones(32)
    elif change == "blocks.1.attn.qkv.weight is [64, 64] instead of [192, 64]":
        state["blocks.1.attn.qkv.weight"] = torch.zeros(64, 64)
    elif change == "tensor y_embedder.embedding_table.weight is missing":
        del state["y_embedder.embedding_table.weight"]
    elif change == "tensor x_embedder.proj.weight is [64, 16], which no DiT has":
        state["x_embedder.proj.weight"] = torch.zeros(64, 16)
    elif change == "is no tensor but a int":
        state["step"] = 3
    elif change == "sparse or quantised":
        state["pos_embed"] = state["pos_embed"].to_sparse()
    else:
        raise AssertionError(change)


@pytest.mark.parametrize(
    "change",
    [
        "pos_embed is not the sine-cosine embedding",
        "make no square",
        "1 missing (blocks.1.mlp.fc1.bias)",
        "2 unexpected (blocks.0.attn.q_norm.weight, blocks.1.attn.q_norm.weight)",
        "blocks.1.attn.qkv.weight is [64, 64] instead of [192, 64]",
        "tensor y_embedder.embedding_table.weight is missing",
        "tensor x_embedder.proj.weight is [64, 16], which no DiT has",
        "is no tensor but a int",
        "sparse or quantised",
    ],
)
def test_other_state_dicts_are_refused(dit, tmp_path: Path, change: str) -> None:
    state = tiny.meta_state(dit)
    change_meta(state, change)
    torch.save(state, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", change)


def test_files_that_are_no_dit(dit, tmp_path: Path) -> None:
    torch.save({"encoder.weight": torch.zeros(3)}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "no DiT: its tensors are encoder.weight")
    torch.save([torch.zeros(3)], tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "holds a list, not a state dict")
    torch.save(dit.state_dict(), tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "pass the folder instead")
    torch.save(tiny.meta_state(dit), tmp_path / "m.pt", pickle_protocol=4)
    refused(tmp_path / "m.pt", "of another protocol than 2")
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "not a checkpoint of torch.save")


def test_safetensors_in_metas_names(dit, tmp_path: Path) -> None:
    save_file(tiny.meta_state(dit), tmp_path / "m.safetensors")
    source = open_source(str(tmp_path / "m.safetensors"))
    assert source.kind == "meta"
    assert torch.equal(
        source.tensors["transformer_blocks.1.attn1.to_v.weight"].load(), dit.transformer_blocks[1].attn1.to_v.weight
    )


# --- the authors' checkpoints -----------------------------------------------------------------------------------


def test_dcdit_with_its_config(tmp_path: Path) -> None:
    path = tiny.save_dcdit_pt(tmp_path / "0400000.pt", sigma=2.5, heads=4)
    assert "config" not in sys.modules
    source = open_source(str(path))
    assert (source.kind, source.name, source.notes) == ("dc-dit", "0400000", [])
    assert source.config == DCDiTConfig(64, 4, 2, 32, 16, 4, 8, 10, 2.5, 2, 2)
    assert "config" not in sys.modules
    assert_same(source, tiny.dcdit_state())
    assert open_source(str(path), weights="model").tensors["hnet.residual_proj.weight"].load().count_nonzero() == 0
    assert open_source(str(path), heads=2).config.heads == 2


def test_dcdit_without_config(tmp_path: Path) -> None:
    source = open_source(str(tiny.save_dcdit_pt(tmp_path / "plain.pt", with_config=False)))
    assert source.config == DCDiTConfig(64, 2, 2, 32, 16, 4, 8, 10, 1.0, 2, 2)
    assert len(source.notes) == 2
    assert_same(source, tiny.dcdit_state())


def test_dcdit_on_a_large_grid_and_with_faults(tmp_path: Path) -> None:
    state = tiny.dcdit_state()
    torch.save({**state, "pos_embed": torch.zeros(1, 64 * 64, 64)}, tmp_path / "m.pt")
    config = open_source(str(tmp_path / "m.pt")).config
    assert isinstance(config, DCDiTConfig)
    assert (config.sample_size, config.sigma) == (64, 2.0)
    del state["hnet.routing_module.proj.bias"]
    state["hnet.main_network.routing_module.proj.bias"] = torch.zeros(16)
    torch.save(state, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "1 missing (hnet.routing_module.proj.bias)", "1 unexpected (hnet.main_network.routing")


def test_config_of_the_script_itself_and_paths(tmp_path: Path) -> None:
    """Classes of a training script are pickled as `__main__`; settings may hold paths."""
    torch.save(
        {"ema": tiny.dcdit_state(), "args": argparse.Namespace(out=pathlib.PurePosixPath("/tmp/x"))}, tmp_path / "a.pt"
    )
    assert open_source(str(tmp_path / "a.pt")).kind == "dc-dit"
    script = (
        "import sys, torch\nfrom dataclasses import dataclass\nfrom safetensors.torch import load_file\n"
        "@dataclass\nclass Config:\n    x: int = 1\n"
        "state = {k[6:]: v for k, v in load_file(sys.argv[1]).items() if k.startswith('model.')}\n"
        "torch.save({'ema': state, 'config': Config()}, sys.argv[2])\n"
    )
    golden = tiny.GOLDEN / "dcdit_official_tiny.safetensors"
    subprocess.run([sys.executable, "-c", script, golden, tmp_path / "b.pt"], check=True)
    assert open_source(str(tmp_path / "b.pt")).kind == "dc-dit"


# --- pickles that want to run code ------------------------------------------------------------------------------


class Evil:
    """Calls something when unpickled."""

    def __init__(self, function: Callable, *args: object) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("place", ["weight", "config", "name"])
def test_no_pickle_is_executed(dit, tmp_path: Path, legacy: bool, protocol: int, place: str) -> None:
    trace = tmp_path / "trace"
    evil = Evil(os.system, f"touch {trace}")
    state = tiny.meta_state(dit)
    content = {
        "weight": {**state, "evil": evil},
        "config": {"ema": state, "config": evil},
        "name": {"ema": state, "config": Evil(eval, f"open({str(trace)!r}, 'w')")},
    }[place]
    path = tmp_path / "m.pt"
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy)
    refused(path, "wants to run code", "eval" if place == "name" else "system", "refused")
    assert not trace.exists()
    torch.load(path, weights_only=False)  # the trap is real
    assert trace.exists()


def test_evil_bin_and_plain_pickle(dit, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    evil = Evil(os.system, f"touch {trace}")
    folder = tiny.save_transformer(tmp_path / "t", dit, bin=True)
    torch.save({**dit.state_dict(), "evil": evil}, folder / "diffusion_pytorch_model.bin")
    refused(folder, "wants to run code", "system")
    (tmp_path / "m.pt").write_bytes(pickle.dumps(evil))
    refused(tmp_path / "m.pt", "wants to run code", "system")
    assert not trace.exists()


def test_settings_are_inert(tmp_path: Path) -> None:
    """A class called like a known one is never imported, whatever its module would do."""
    path = tiny.save_dcdit_pt(tmp_path / "m.pt")
    trap = tmp_path / "config.py"
    trap.write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\n")
    sys.path.insert(0, str(tmp_path))
    try:
        open_source(str(path))
    finally:
        sys.path.remove(str(tmp_path))
    assert not (tmp_path / "trace").exists()
    torch.save({"ema": {}, "opt": torch.nn.Linear(1, 1)}, tmp_path / "m.pt")
    refused(tmp_path / "m.pt", "wants to run code: torch.nn.modules.linear.Linear")


# --- reading files piece by piece -------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["zip", "legacy", "deflated"])
def test_views_and_shared_storages(tmp_path: Path, way: str) -> None:
    base = torch.randn(7, 5, 3)
    state = {
        "whole": base,
        "rows": base[2:4],
        "transposed": base.permute(2, 0, 1),
        "steps": base[::2, 1:, ::2],
        "expanded": base[0, 0, :1].expand(4),
        "scalar": base[1, 1, 1],
        "empty": base[:0],
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "half": torch.randn(3, 3).half(),
        "bf16": torch.randn(3, 3).bfloat16(),
        "double": torch.randn(1).double(),
    }
    path = tmp_path / "x.pt"
    torch.save(state, path, _use_new_zipfile_serialization=way != "legacy")
    if way == "deflated":
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as new:
            for name in old.namelist():
                new.writestr(name, old.read(name))
        path = tmp_path / "y.pt"
    file = read_torch_file(path)
    for name, tensor in state.items():
        lazy = file.lazy(name, file.content[name])
        assert isinstance(lazy.place, torch.Tensor) == (way != "zip")
        loaded = lazy.load()
        assert torch.equal(loaded, tensor), name
        assert loaded.is_contiguous()
        assert not loaded.requires_grad
        assert loaded.untyped_storage().nbytes() == lazy.nbytes
        chunks = [chunk.clone() for chunk in lazy.chunks(torch.empty(8, dtype=torch.uint8))]
        assert torch.equal(torch.cat([*chunks, tensor.new_empty(0)]).reshape(tensor.shape), tensor), name
        if tensor.dim() and len(tensor) > 1:
            assert torch.equal(lazy.rows("part", 1, len(tensor)).load(), tensor[1:]), name


def test_repacked_zip_is_read_right(dit, tmp_path: Path) -> None:
    """Another tool stores the same records at places that torch does not expect."""
    path = tiny.save_meta_pt(tmp_path / "a.pt", dit)
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.pt", "w") as new:
        for name in sorted(old.namelist(), reverse=True):
            new.writestr(name, old.read(name))
    plain = open_source(str(path))
    assert_same(open_source(str(tmp_path / "b.pt")), {name: lazy.load() for name, lazy in plain.tensors.items()})


def test_loaded_tensors_are_independent(tmp_path: Path) -> None:
    for legacy in (False, True):
        torch.save({"a": torch.ones(3)}, tmp_path / "x.pt", _use_new_zipfile_serialization=not legacy)
        file = read_torch_file(tmp_path / "x.pt")
        lazy = file.lazy("a", file.content["a"])
        lazy.load().zero_()
        assert torch.equal(lazy.load(), torch.ones(3))


def test_a_file_that_shrinks_after_opening(dit, tmp_path: Path) -> None:
    source = open_source(str(tiny.save_transformer(tmp_path / "t", dit)))
    file = tmp_path / "t/diffusion_pytorch_model.safetensors"
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(UpcycleError, match="ends early"):
        _ = [tensor.load() for tensor in source.tensors.values()]
    buffer = torch.empty(64, dtype=torch.uint8)
    with pytest.raises(UpcycleError, match="ends early"):
        _ = [chunk for tensor in source.tensors.values() for chunk in tensor.chunks(buffer)]
    file.unlink()
    with pytest.raises(UpcycleError, match="cannot be read"):
        next(iter(source.tensors.values())).load()


MEASURE = """
import sys
from upcycle.sources import open_source
def status(key):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(key)) / 1024
before = status("VmRSS")
source = open_source(sys.argv[1])
for tensor in source.tensors.values():
    tensor.load()
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_reading_stays_small(tmp_path: Path, kind: str) -> None:
    """A file of 100 MB with tensors of up to 9 MB adds less than 40 MB of resident memory, mapped pages included."""
    model = tiny.make_dit(0, width=768, heads=12, layers=3)
    path = tmp_path / "m"
    if kind == "pt":
        path = tiny.save_meta_pt(tmp_path / "m.pt", model)
    else:
        tiny.save_transformer(path, model)
    done = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 40


# --- damaged files ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_file(tmp_path_factory) -> tuple[bytes, dict[str, torch.Tensor]]:
    path = tmp_path_factory.mktemp("small") / "x.safetensors"
    state = {"a": torch.randn(4, 3), "b.weight": torch.randn(2).half(), "c": torch.randn(1, 2, 3)}
    save_file(state, path, metadata={"format": "pt"})
    return path.read_bytes(), state


@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_headers(dit, tmp_path, data) -> None:
    """Whatever happens to the header: one line, or the very same tensors."""
    folder = tmp_path / "t"
    if not folder.exists():
        tiny.save_transformer(folder, dit)
        (folder / "good").write_bytes((folder / "diffusion_pytorch_model.safetensors").read_bytes())
    changed = bytearray((folder / "good").read_bytes())
    header = 8 + struct.unpack("<Q", changed[:8])[0]
    for _ in range(data.draw(st.integers(1, 3))):
        changed[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(changed)
    try:
        source = open_source(str(folder))
    except UpcycleError as error:
        assert_one_line(error)
    else:
        assert_same(source, dit.state_dict())


@given(cut=st.floats(0, 1, exclude_max=True), more=st.binary(max_size=9))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_truncated_and_lengthened(tmp_path, small_file, cut, more) -> None:
    content, state = small_file
    path = tmp_path / "x.safetensors"
    path.write_bytes(content[: int(cut * len(content))])
    with pytest.raises(UpcycleError, match="truncated or corrupt"):
        read_safetensors(path)
    path.write_bytes(content + more)
    if more:
        with pytest.raises(UpcycleError, match="truncated or corrupt"):
            read_safetensors(path)
    else:
        assert {name: lazy.load().tolist() for name, lazy in read_safetensors(path).items()} == {
            name: tensor.tolist() for name, tensor in state.items()
        }


HEADERS = {
    "header is not valid JSON": "{",
    "the header is not valid JSON": '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "a": 1}',
    "the header is not a table": "[]",
    "tensor a is not described properly": '{"a": 3}',
    "tensor a has no proper shape": '{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
    "tensor a has no proper shape or offsets": '{"a": {"dtype": "F32", "shape": [true], "data_offsets": [0, 4]}}',
    "of type 'Q4'": '{"a": {"dtype": "Q4", "shape": [1], "data_offsets": [0, 4]}}',
    "tensor a has 4 bytes": '{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
    "overlaps": '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},'
    ' "b": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]}}',
    "leaves a gap": '{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}',
    "is not valid JSON": "[" * 100_000,
}


@pytest.mark.parametrize("expected", HEADERS)
def test_malformed_headers(tmp_path: Path, expected: str) -> None:
    header = HEADERS[expected].encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(UpcycleError) as caught:
        read_safetensors(path)
    assert expected in str(caught.value)


@given(cut=st.floats(0, 1, exclude_max=True))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_truncated_checkpoints(tmp_path, cut) -> None:
    content = (tiny.GOLDEN / "meta_dit_tiny.pt").read_bytes()
    path = tmp_path / "m.pt"
    path.write_bytes(content[: int(cut * len(content))])
    refused(path, "truncated, corrupt or not a checkpoint of torch.save")


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_checkpoints(tmp_path, data) -> None:
    """Bytes flipped in the pickle or the directory end in one line, or in tensors of the expected shapes."""
    content = bytearray((tiny.GOLDEN / "meta_dit_tiny.pt").read_bytes())
    head, tail = 6000, 6000
    places = st.one_of(st.integers(0, head), st.integers(len(content) - tail, len(content) - 1))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(places)] = data.draw(st.integers(0, 255))
    path = tmp_path / "m.pt"
    path.write_bytes(content)
    try:
        source = open_source(str(path))
        for tensor in source.tensors.values():
            assert math.prod(tensor.shape) == tensor.load().numel()
    except UpcycleError as error:
        assert_one_line(error)


def test_check_finite() -> None:
    check_finite("a", torch.full((3,), 3e38))  # the sum overflows, the values do not
    check_finite("a", torch.full((9,), 60000.0).half())
    check_finite("a", torch.zeros(0))
    check_finite("a", torch.ones(3, dtype=torch.int64))
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        bad = torch.ones(7, dtype=dtype)
        bad[2], bad[3] = math.nan, -math.inf
        with pytest.raises(UpcycleError, match=r"x\.pt: tensor a holds 1 NaN and 1 infinite values of 7"):
            check_finite("a", bad, source="x.pt")
