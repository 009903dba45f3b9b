"""Checkpoints of Meta's DiT code, mapped to the names of diffusers' `DiTTransformer2DModel`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from upcycle.errors import UpcycleError
from upcycle.sources.description import TIMESTEP_FEATURES, DiTConfig, Source, dit_shapes, linear
from upcycle.sources.recognise import choose_heads, count_layers, setting, shape_of, square_root
from upcycle.sources.tensors import LazyTensor, check_tensors

# Meta's code and weights are published under this licence.
LICENCE = "cc-by-nc-4.0"

_HEADS_BY_LETTER = {"S": 6, "B": 12, "L": 16, "XL": 16}

# Modules of a block and outside of blocks, theirs → diffusers'. The fused qkv is apart.
_BLOCK_MODULES = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
_OTHER_MODULES = {
    "x_embedder.proj": "pos_embed.proj",
    "t_embedder.mlp.0": "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_TABLE = "y_embedder.embedding_table.weight"


def open_meta(spec: str, path: Path, tensors: Mapping[str, LazyTensor], settings: Any, *, heads: int | None) -> Source:
    """Describe and rename a state dict in Meta's names; `settings` are the `args` of a training checkpoint, or None.

    Raises `UpcycleError` if tensors are missing, unexpected or mis-shaped, or if the position embedding is not the
    sine-cosine one that diffusers computes, because a model built from the other tensors would then differ.
    """
    notes: list[str] = []
    width, in_channels, patch, _ = shape_of(spec, tensors, "x_embedder.proj.weight", 4)
    _, positions, _ = shape_of(spec, tensors, "pos_embed", 3)
    rows, _ = shape_of(spec, tensors, _TABLE, 2)
    outputs, _ = shape_of(spec, tensors, "final_layer.linear.weight", 2)
    grid = square_root(spec, "pos_embed", positions)
    if setting(settings, "num_classes") == rows:
        raise UpcycleError(f"{spec}: was trained without label dropout and has no null class, which is not supported")
    heads = choose_heads(spec, width, heads, _stated_heads(settings), notes)
    config = DiTConfig(
        num_layers=count_layers(tensors, "blocks."),
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=in_channels,
        out_channels=max(1, outputs // patch**2),
        sample_size=grid * patch,
        patch_size=patch,
        num_classes=rows - 1,
        time_embedding="meta",
        norm_eps=1e-6,
    )
    check_tensors(spec, _meta_shapes(config), tensors)
    _check_positions(spec, tensors["pos_embed"], grid)
    mapped = _to_diffusers(config, tensors)
    check_tensors(spec, dit_shapes(config, embedders=1), mapped)
    return Source("meta", spec, path.stem, config, mapped, licence=LICENCE, notes=notes)


def _stated_heads(settings: Any) -> int | None:
    """Heads of a model called like "DiT-XL/2" in the training arguments."""
    model = setting(settings, "model")
    letter = model.removeprefix("DiT-").split("/")[0] if isinstance(model, str) else None
    return _HEADS_BY_LETTER.get(letter) if letter else None


def _meta_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    width, patch = config.hidden_size, config.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, (config.sample_size // patch) ** 2, width),
        "x_embedder.proj.weight": (width, config.in_channels, patch, patch),
        "x_embedder.proj.bias": (width,),
        _TABLE: (config.num_classes + 1, width),
    }
    shapes |= linear("t_embedder.mlp.0", TIMESTEP_FEATURES, width)
    shapes |= linear("t_embedder.mlp.2", width, width)
    for index in range(config.num_layers):
        block = f"blocks.{index}."
        shapes |= linear(block + "attn.qkv", width, 3 * width)
        shapes |= linear(block + "attn.proj", width, width)
        shapes |= linear(block + "mlp.fc1", width, 4 * width)
        shapes |= linear(block + "mlp.fc2", 4 * width, width)
        shapes |= linear(block + "adaLN_modulation.1", width, 6 * width)
    shapes |= linear("final_layer.adaLN_modulation.1", width, 2 * width)
    shapes |= linear("final_layer.linear", width, patch * patch * config.out_channels)
    return shapes


def diffusers_names(layers: int) -> dict[str, tuple[str, ...]]:
    """Meta's names → diffusers' names of the tensors whose rows, one below the other, they hold.

    The one table of both directions: reading takes Meta's tensors apart, `upcycle.export.meta` puts them together.
    Timestep and label embedders are those of diffusers' block 0. `pos_embed` is not among them: diffusers computes it.
    """
    modules: dict[str, tuple[str, ...]] = {theirs: (ours,) for theirs, ours in _OTHER_MODULES.items()}
    for index in range(layers):
        block = f"transformer_blocks.{index}."
        modules[f"blocks.{index}.attn.qkv"] = tuple(f"{block}attn1.to_{letter}" for letter in "qkv")
        modules |= {f"blocks.{index}.{theirs}": (block + ours,) for theirs, ours in _BLOCK_MODULES.items()}
    table: dict[str, tuple[str, ...]] = {
        _TABLE: ("transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight",)
    }
    for theirs, ours in modules.items():
        for part in ("weight", "bias"):
            table[f"{theirs}.{part}"] = tuple(f"{module}.{part}" for module in ours)
    return table


def _to_diffusers(config: DiTConfig, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    mapped: dict[str, LazyTensor] = {}
    for theirs, ours in diffusers_names(config.num_layers).items():
        rows = tensors[theirs].shape[0] // len(ours)
        for index, name in enumerate(ours):
            mapped[name] = tensors[theirs].rows(name, index * rows, (index + 1) * rows)
    return mapped


def position_table(width: int, grid: int) -> torch.Tensor:
    """The sine-cosine embedding of a grid's positions in raster order, as both codes store it; fp64 [1, grid², width].

    The column fills the first half of the channels, the row the second. ``width`` is a multiple of 4.
    """
    frequencies = 10000.0 ** (-torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(grid, dtype=torch.float64)[:, None] * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    table = torch.cat([waves[None].expand(grid, -1, -1), waves[:, None].expand(-1, grid, -1)], dim=2)
    return table.reshape(1, grid**2, width)


def _check_positions(spec: str, embedding: LazyTensor, grid: int) -> None:
    """The stored position embedding is dropped, which is right only if it is the usual one."""
    width = embedding.shape[-1]
    error = (
        f"{spec}: pos_embed is not the sine-cosine embedding of a {grid}×{grid} grid; a learned one is not supported"
    )
    if width % 4:
        raise UpcycleError(error)
    difference = (embedding.load().double() - position_table(width, grid)).abs().max()
    if not difference < 1e-2:  # bf16 checkpoints differ by up to 4e-3; NaN must not pass
        raise UpcycleError(error)
