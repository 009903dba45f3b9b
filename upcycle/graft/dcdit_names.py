"""Names of the authors' DC-DiT code (AMD-AGI/DynamicChunkingDiT) -> names of `ChunkedDiT` with the paper scaffold."""

import re
from collections.abc import Mapping

from upcycle.sources.tensors import LazyTensor

_RENAMES = [
    (r"x_embedder\.proj\.", "conv_in."),
    (r"t_embedder\.mlp\.0\.", "embedders.0.timestep_embedder.linear_1."),
    (r"t_embedder\.mlp\.2\.", "embedders.0.timestep_embedder.linear_2."),
    (r"y_embedder\.embedding_table\.", "embedders.0.class_embedder.embedding_table."),
    (r"hnet\.(encoder|decoder)\.layers\.(\d+)\.cond_proj\.1\.", r"\1.\2.condition."),
    (r"hnet\.(encoder|decoder)\.layers\.(\d+)\.skip_proj\.", r"\1.\2.skip."),
    (r"hnet\.(encoder|decoder)\.layers\.(\d+)\.", r"\1.\2."),
    (r"hnet\.(encoder|decoder)\.rmsnorm\.", r"\1_norm."),
    (r"hnet\.routing_module\.", "routing_module.scorer."),
    (r"hnet\.residual_proj\.", "residual."),
    (r"hnet\.main_network\.main_network\.rmsnorm\.", "blocks_norm."),
    (r"hnet\.main_network\.main_network\.layers\.(\d+)\.adaLN_modulation\.1\.", r"transformer_blocks.\1.norm1.linear."),
    (r"hnet\.main_network\.main_network\.layers\.(\d+)\.attn\.proj\.", r"transformer_blocks.\1.attn1.to_out.0."),
    (r"hnet\.main_network\.main_network\.layers\.(\d+)\.mlp\.fc1\.", r"transformer_blocks.\1.ff.net.0.proj."),
    (r"hnet\.main_network\.main_network\.layers\.(\d+)\.mlp\.fc2\.", r"transformer_blocks.\1.ff.net.2."),
    (r"final_layer\.adaLN_modulation\.1\.", "proj_out_1."),
    (r"final_layer\.linear\.", "proj_out_2."),
]
_QKV = re.compile(r"hnet\.main_network\.main_network\.layers\.(\d+)\.attn\.qkv\.(weight|bias)")


def from_authors(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """Lazily rename the authors' tensors; the fused qkv is split, the fixed position embedding dropped."""
    out: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if name == "pos_embed":
            continue
        if match := _QKV.fullmatch(name):
            third = tensor.shape[0] // 3
            for i, part in enumerate("qkv"):
                new = f"transformer_blocks.{match[1]}.attn1.to_{part}.{match[2]}"
                out[new] = tensor.rows(new, i * third, (i + 1) * third)
            continue
        new = next((re.sub(f"^{old}", to, name) for old, to in _RENAMES if re.match(old, name)), name)
        out[new] = tensor
    return out
