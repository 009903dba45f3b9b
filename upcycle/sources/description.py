"""What a source is: its architecture, its tensors, and what lies beside them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from upcycle.sources.tensors import LazyTensor

# Width of the sinusoidal timestep features in both codes; neither makes it an option.
TIMESTEP_FEATURES = 256


# The published sizes: attention heads, their width, blocks.
SHAPES = {"S": (6, 64, 12), "B": (12, 64, 12), "L": (16, 64, 24), "XL": (16, 72, 28)}


@dataclass(frozen=True)
class DiTConfig:
    """A patchified, class-conditional DiT. Sizes are in latent pixels; `num_classes` does not count the null class."""

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    in_channels: int
    out_channels: int
    sample_size: int
    patch_size: int
    num_classes: int
    time_embedding: Literal["diffusers", "meta"]
    """Which frequencies embed the timestep: diffusers divides by 127, Meta by 128."""
    norm_eps: float
    """Epsilon of the second norm of a block; the first and the final one have 1e-6 in both codes."""

    @property
    def hidden_size(self) -> int:
        return self.num_attention_heads * self.attention_head_dim


@dataclass(frozen=True)
class DCDiTConfig:
    """A DC-DiT of the authors' code. `sigma` is the width of the Gaussian that smooths de-chunked tokens."""

    d_model: int
    heads: int
    layers: int
    enc_dec_dim: int
    sample_size: int
    in_channels: int
    out_channels: int
    num_classes: int
    sigma: float
    encoder_layers: int
    decoder_layers: int
    ratio: float = 4.0
    """Target ratio of its training, from its config; 4 where there is none."""


@dataclass(frozen=True)
class StudentConfig:
    """A converted model; ``values`` are the options of its `ChunkedDiT`."""

    values: dict[str, Any]

    @property
    def in_channels(self) -> int:
        return self.values["in_channels"]


@dataclass(frozen=True)
class Source:
    """Weights to start from. `open_source` makes it; nothing but headers has been read by then."""

    kind: Literal["diffusers", "meta", "dc-dit", "student"]
    spec: str
    """What the user wrote."""
    name: str
    """Stem for default output names: the last part of a Hub id, a folder's name, a file's stem."""
    config: DiTConfig | DCDiTConfig | StudentConfig
    tensors: Mapping[str, LazyTensor]
    """For diffusers and meta: by the names of `DiTTransformer2DModel`, the embedder of every block for diffusers and
    that of block 0 alone for meta. For dc-dit: by the authors' names, without wrappers' prefixes. For students: by the
    names of `ChunkedDiT`."""
    revision: str | None = None
    """Resolved commit, for Hub ids."""
    components: dict[str, Path] = field(default_factory=dict)
    """Folders of `vae` and `scheduler`, where known."""
    model_index: dict[str, Any] | None = None
    licence: str | None = None
    origin: dict[str, Any] | None = None
    """Content of the `upcycle.json` of a student."""
    notes: list[str] = field(default_factory=list)
    """Choices made on the user's behalf, one sentence each."""


def dit_shapes(config: DiTConfig, embedders: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of a `DiTTransformer2DModel`, with embedders in the first `embedders` blocks."""
    width, patch = config.hidden_size, config.patch_size
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed.proj.weight": (width, config.in_channels, patch, patch),
        "pos_embed.proj.bias": (width,),
    }
    for index in range(config.num_layers):
        block = f"transformer_blocks.{index}."
        if index < embedders:
            emb = block + "norm1.emb."
            shapes |= linear(emb + "timestep_embedder.linear_1", TIMESTEP_FEATURES, width)
            shapes |= linear(emb + "timestep_embedder.linear_2", width, width)
            shapes[emb + "class_embedder.embedding_table.weight"] = (config.num_classes + 1, width)
        shapes |= linear(block + "norm1.linear", width, 6 * width)
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            shapes |= linear(f"{block}attn1.{name}", width, width)
        shapes |= linear(block + "ff.net.0.proj", width, 4 * width)
        shapes |= linear(block + "ff.net.2", 4 * width, width)
    shapes |= linear("proj_out_1", width, 2 * width)
    shapes |= linear("proj_out_2", width, patch * patch * config.out_channels)
    return shapes


def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a linear layer's weight [outputs, inputs] and bias [outputs]."""
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}
