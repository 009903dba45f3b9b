"""FLOPs in the papers' counting: 2 per multiply-add of every matrix product and convolution, attention at the actual
lengths, H * M^2 * (4 d_h + 3) per sample (DC-DiT, "FLOPs accounting"; their code counts exactly this).

Everything is per sample and per forward; an image costs the sum over its sampling steps (the papers: 250, unguided).
"""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch

from upcycle.models.chunked_dit import Gates

PAPER_STEPS = 250
TAIL_DROPS = (0.0, 0.3, 0.6)


def block_flops(
    width: int, heads: int, layers: int, tokens: Any, *, on_heads: Any = 1, on_channels: Any = 1, fed: Any = 1
) -> Any:
    """The transformer blocks on ``tokens`` tokens: qkv, output, MLP, attention and the modulation of each block.

    With DyDiT's gates: shares of the heads and the MLP's channels that are on, and of the tokens that the MLP is fed.
    Numbers, or tensors of one shape.
    """
    attention = 8 * width**2 * tokens + heads * tokens**2 * (4 * (width // heads) + 3)
    mlp = 16 * width**2 * tokens
    return layers * (on_heads * attention + on_channels * fed * mlp + 12 * width**2)


def gate_share(config: Mapping[str, Any], gates: Gates | None, tokens: torch.Tensor) -> torch.Tensor:
    """What DyDiT's gates leave of the blocks' FLOPs on ``tokens`` [B] tokens, with gradient; fp32 [B], 1 without gates.

    The routers are not counted among them (`gate_flops`).
    """
    count = tokens.float()
    if gates is None:
        return torch.ones_like(count)
    heads, layers = config["num_attention_heads"], config["num_layers"]
    width = heads * config["attention_head_dim"]
    shares = {"on_heads": gates.heads.mean(-1), "on_channels": gates.channels.mean(-1), "fed": gates.tokens}
    each = block_flops(width, heads, 1, count[:, None], **shares)
    return each.sum(1) / block_flops(width, heads, layers, count)


def least_gate_share(config: Mapping[str, Any], tokens: float) -> float:
    """`gate_share` with one head and one group of channels on and no token fed."""
    heads = config["num_attention_heads"]
    size = heads * config["attention_head_dim"], heads, 1, tokens
    return block_flops(*size, on_heads=1 / heads, on_channels=1 / heads, fed=0) / block_flops(*size)


def gate_flops(width: int, heads: int, layers: int, tokens: float) -> float:
    """DyDiT's routers, with the timestep's embedding once more."""
    narrow = max(1, width // 16)
    return embedder_flops(width) + layers * (4 * width * (heads - 1) + 2 * tokens * narrow * (width + 1))


def embedder_flops(width: int) -> float:
    """The timestep MLP."""
    return 2 * (256 * width + width**2)


def dit_flops(config: Mapping[str, Any]) -> float:
    """One forward of one sample of a stock DiT (keys as in `upcycle.sources.DiTConfig`)."""
    width = config["num_attention_heads"] * config["attention_head_dim"]
    patch, tokens = config["patch_size"], (config["sample_size"] // config["patch_size"]) ** 2
    ends = 2 * patch**2 * width * (config["in_channels"] + config["out_channels"]) * tokens
    head = 4 * width**2
    return (
        block_flops(width, config["num_attention_heads"], config["num_layers"], tokens)
        + embedder_flops(width)
        + ends
        + head
    )


def _res_block(width_in: int, width_out: int, condition: int, positions: int) -> float:
    inner = min(width_in, width_out)
    skip = width_in * width_out if width_in != width_out else 0
    return 2 * positions * (9 * inner * (width_in + width_out) + skip) + 2 * condition * inner


def _router(config: Mapping[str, Any], width: int, bottleneck: int, positions: int) -> float:
    if config["router"] == "predictability":
        return 2 * positions * (width * bottleneck + 18 * bottleneck**2 + bottleneck)
    if config["router"] == "cosine":
        return 4 * positions * width**2
    return 0.0


def _smoothing(width: int, side: int) -> float:
    return 4 * side**3 * (width + 1)


def chunked_dit_flops(config: Mapping[str, Any], tokens: float, share: float | None = None) -> dict[str, float]:
    """One forward of one sample of a `ChunkedDiT` with ``tokens`` kept tokens, by part; the sum is the total.

    ``share``: what DyDiT's gates leave of the blocks (`gate_share`); by default the target that they train to.
    """
    gated = config.get("dydit", 0)
    share = (gated or 1) if share is None else share
    heads, layers, side = config["num_attention_heads"], config["num_layers"], config["sample_size"]
    width = heads * config["attention_head_dim"]
    narrow = config["scaffold_width"] or width // 4
    positions, patch = side**2, config["patch_size"]
    c_in, c_out = config["in_channels"], config["out_channels"]
    parts = {
        "embed": embedder_flops(width) * config["num_embedders"] + 18 * c_in * narrow * positions,
        "blocks": share * block_flops(width, heads, layers, tokens),
    }
    if gated:
        parts["gates"] = gate_flops(width, heads, layers, tokens)
    if config["scaffold"] == "lean":
        bottleneck = -(-narrow // 16) * 8
        parts["encoder"] = config["encoder_layers"] * _res_block(narrow, narrow, width, positions)
        parts["router"] = _router(config, narrow, bottleneck, positions) + 4 * width * bool(
            config["router"] in ("predictability", "cosine")
        )
        parts["chunk"] = 2 * tokens * width * (patch**2 * c_in + narrow)
        parts["head"] = 4 * width**2 + 2 * tokens * width * (patch**2 * c_out + 1)
        parts["dechunk"] = 2 * tokens * width * narrow + _smoothing(narrow, side)
        base = 2 * positions * (narrow**2 + 9 * (c_in + c_out + 3) * narrow + 9 * narrow * c_out)
        parts["decoder"] = base + config["decoder_layers"] * _res_block(narrow, narrow, width, positions)
        return parts
    widths = [narrow] * config["encoder_layers"] + [width]
    parts["encoder"] = sum(_res_block(a, b, width, positions) for a, b in pairwise(widths))
    parts["router"] = _router(config, width, width // 4, positions)
    parts["dechunk"] = _smoothing(width, side) + 2 * positions * width**2
    decoder = [width] + [narrow] * config["decoder_layers"]
    parts["decoder"] = sum(_res_block(a, b, width, positions) for a, b in pairwise(decoder))
    parts["head"] = 4 * width * narrow + 2 * positions * narrow * c_out
    return parts


def polynomial(config: Mapping[str, Any]) -> tuple[float, float, float]:
    """a, b and c of `chunked_dit_flops`, all parts, as a + b M + c M^2 of the tokens M; exact."""
    at_0, at_1, at_2 = (sum(chunked_dit_flops(config, tokens).values()) for tokens in (0, 1, 2))
    square = (at_2 - 2 * at_1 + at_0) / 2
    return at_0, at_1 - at_0 - square, square


def teacher_patch(config: Mapping[str, Any]) -> int:
    """Patch size of the teacher of a `ChunkedDiT`; the paper scaffold does not hold it, but keeps as many tokens."""
    return config["patch_size"] if config["scaffold"] == "lean" else max(1, round(config["ratio"] ** 0.5))


def teacher_flops(config: Mapping[str, Any]) -> float:
    """`dit_flops` of the teacher of a `ChunkedDiT`."""
    return dit_flops({**config, "patch_size": teacher_patch(config)})


def tokens_at_ratio(config: Mapping[str, Any]) -> float:
    """Tokens that a router keeps when it meets its ratio (a fixed grid: its own count)."""
    side = config["sample_size"]
    if config["router"] == "grid":
        return (-(-side // round(config["ratio"] ** 0.5))) ** 2
    return side**2 / config["ratio"]


def student_flops_by_tail_drop(config: Mapping[str, Any], steps: int = PAPER_STEPS) -> dict[str, float]:
    """FLOPs per image at tail drop 0, 0.3 and 0.6 with the router at its target ratio (and DyDiT's gates at theirs),
    unguided, over ``steps``."""
    kept = tokens_at_ratio(config)
    return {f"{rho:g}": steps * sum(chunked_dit_flops(config, kept - int(kept * rho)).values()) for rho in TAIL_DROPS}


def grid_tokens(c: Mapping[str, Any], m: int = 1) -> int:
    """Tokens of a DiT at the factor ``m``; a last patch that is not whole is padded."""
    return (-(-c["sample_size"] // (m * c["patch_size"]))) ** 2


def ddit_flops(c: Mapping[str, Any], m: int, adapter: Any) -> float:
    """One forward of one sample of a DiT with an adapter (a `DDiTConfig`): a DiT of larger patches, and at m > 1 the
    switch-LoRA of both feed-forward layers and the residual."""
    P, tokens = m * c["patch_size"], grid_tokens(c, m)
    side = P * math.isqrt(tokens)
    base = dit_flops({**c, "patch_size": P, "sample_size": side})
    if m == 1:
        return base
    width = c["num_attention_heads"] * c["attention_head_dim"]
    lora = 2 * adapter.rank * 2 * (width + 4 * width) * tokens * c["num_layers"]
    return base + lora + (4 * P * c["in_channels"] * side**2 if adapter.residual else 0)


def step_sizes(model: Any, step: Any) -> list[int]:
    """The factor of every asked sample of a `Step` with a model that has an adapter for coarser patches, just made."""
    schedule = model.schedule
    decides = schedule.threshold is not None or schedule.fixed is not None
    size = schedule.log[-1]["m"] if decides else 1
    return size if isinstance(size, list) else [size] * len(step.asked)


def step_flops(model: Any, step: Any) -> float:
    """A `Step` of the sampling loop with ``model``, of all its samples and their unconditional twins; 0 where held.

    Of an adapter's schedule it reads what the last call took, so count before the next step is made.
    Blocks that a cache left out (`ChunkedDiT.enable_cache`) are counted all the same; of those with DyDiT's gates their
    attention.
    """
    copies = 2 if step.guided else 1
    if not step.asked:
        return 0.0
    if step.routing is not None:
        kept = step.routing.mask.sum(1)
        shares = gate_share(model.config, step.gates, kept)
        rows = zip(kept.tolist(), shares.tolist(), strict=True)
        return sum(sum(chunked_dit_flops(model.config, tokens, share).values()) for tokens, share in rows)
    if hasattr(model, "ddit"):
        return copies * sum(ddit_flops(model.config, m, model.ddit) for m in step_sizes(model, step))
    return copies * len(step.asked) * dit_flops(model.config)
