"""Names of the authors' DC-DiT code (AMD-AGI/DynamicChunkingDiT) <-> names of `ChunkedDiT` with the paper scaffold."""

import re
from collections.abc import Mapping

from upcycle.graft.pieces import JoinedTensor
from upcycle.graft.writer import Piece
from upcycle.sources.tensors import LazyTensor

_BLOCK = "hnet.main_network.main_network.layers.{}."
# Beginnings of names, theirs and ours, with {} for numbers; the first that fits counts, in either direction. What is
# in neither column has one name in both codes. Their fused qkv is the rows of our three, one below the other.
_NAMES = [
    ("x_embedder.proj.", "conv_in."),
    ("t_embedder.mlp.0.", "embedders.0.timestep_embedder.linear_1."),
    ("t_embedder.mlp.2.", "embedders.0.timestep_embedder.linear_2."),
    ("y_embedder.embedding_table.", "embedders.0.class_embedder.embedding_table."),
    *(
        (f"hnet.{side}.layers.{{}}.{theirs}", f"{side}.{{}}.{ours}")
        for side in ("encoder", "decoder")
        for theirs, ours in (("cond_proj.1.", "condition."), ("skip_proj.", "skip."), ("", ""))
    ),
    ("hnet.encoder.rmsnorm.", "encoder_norm."),
    ("hnet.decoder.rmsnorm.", "decoder_norm."),
    ("hnet.routing_module.", "routing_module.scorer."),
    ("hnet.residual_proj.", "residual."),
    ("hnet.main_network.main_network.rmsnorm.", "blocks_norm."),
    (_BLOCK + "adaLN_modulation.1.", "transformer_blocks.{}.norm1.linear."),
    *((f"{_BLOCK}attn.qkv.{third}.", f"transformer_blocks.{{}}.attn1.to_{third}.") for third in "qkv"),
    (_BLOCK + "attn.proj.", "transformer_blocks.{}.attn1.to_out.0."),
    (_BLOCK + "mlp.fc1.", "transformer_blocks.{}.ff.net.0.proj."),
    (_BLOCK + "mlp.fc2.", "transformer_blocks.{}.ff.net.2."),
    ("final_layer.adaLN_modulation.1.", "proj_out_1."),
    ("final_layer.linear.", "proj_out_2."),
]


def from_authors(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Lazily rename the authors' tensors; the fused qkv is split, the fixed position embedding dropped."""
    out: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if name == "pos_embed":
            continue
        if ".attn.qkv." in name:
            rows = tensor.shape[0] // 3
            for i, third in enumerate("qkv"):
                new = _renamed(name.replace(".qkv.", f".qkv.{third}."), 0, 1)
                out[new] = tensor.rows(new, i * rows, (i + 1) * rows)
        else:
            out[_renamed(name, 0, 1)] = tensor
    return out


def to_authors(pieces: Mapping[str, Piece]) -> dict[str, Piece]:
    """Inverse of `from_authors`, without the position embedding: the tensors under the authors' names."""
    out: dict[str, Piece] = {}
    thirds: dict[str, dict[str, Piece]] = {}
    for name, piece in pieces.items():
        new = _renamed(name, 1, 0)
        if match := re.fullmatch(r"(.+\.attn\.qkv)\.([qkv])(\.\w+)", new):
            thirds.setdefault(match[1] + match[3], {})[match[2]] = piece
        else:
            out[new] = piece
    return out | {name: JoinedTensor(tuple(parts[third] for third in "qkv")) for name, parts in thirds.items()}


def _renamed(name: str, old: int, new: int) -> str:
    """``name`` of the column ``old`` of the table in the column ``new``."""
    for row in _NAMES:
        if match := re.match(re.escape(row[old]).replace(r"\{\}", r"(\d+)"), name):
            return row[new].format(*match.groups()) + name[match.end() :]
    return name
