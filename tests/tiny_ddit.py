"""Tiny random backbones for DDiT, arguments for a call of each, and what the tests of DDiT compare."""

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)

from upcycle.models import ddit

# Wan also with a time for every token (2.2, 5B) and with more channels in than out (image to video).
KINDS = ["dit", "flux", "wan", "wan-tokens", "wan-image", "z-image"]
PREDICTION = {"dit": "epsilon", "z-image": "negative flow"}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(kind: str, seed: int = 1, size: int = 16) -> torch.nn.Module:
    """A stock model in eval mode whose weights are all random, also those that training starts at zero."""
    if kind == "dit":
        model = DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=size,
            patch_size=2,
            num_embeds_ada_norm=1000,
        )
    elif kind == "flux":
        model = FluxTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=8,
            pooled_projection_dim=8,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )
    elif kind.startswith("wan"):
        model = WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=10 if kind == "wan-image" else 4,
            out_channels=4,
            text_dim=8,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=64,
        )
    else:
        model = ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=8,
            axes_dims=[4, 6, 6],
            axes_lens=[64, 64, 64],
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model.eval()


def attach(kind: str, model: torch.nn.Module | None = None, trained: bool = True, **options):
    """The model with an adapter for 2 and 4; a trained one has random values in all its tensors."""
    model = make(kind) if model is None else model
    settings = {"patches": [2, 4], "rank": 3, "prediction": PREDICTION.get(kind, "flow")} | options
    ddit.attach(model, ddit.DDiTConfig(base_class=type(model).__name__, **settings))
    if trained:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.adapter_parameters().values():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def latents(kind: str, height: int = 16, width: int = 16, batch: int = 2, seed: int = 0) -> torch.Tensor:
    """[B, C, F, H, W]"""
    frames = 3 if kind.startswith("wan") else 1
    return draw(batch, 10 if kind == "wan-image" else 4, frames, height, width, seed=seed)


def pack(z: torch.Tensor) -> torch.Tensor:
    """[B, C, 1, H, W] -> tokens of Flux, as its pipeline packs them."""
    batch, channels, _, height, width = z.shape
    z = z.view(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return z.reshape(batch, height * width // 4, channels * 4)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    z = tokens.view(len(tokens), height // 2, width // 2, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return z.reshape(len(tokens), -1, 1, height, width)


def flux_ids(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return torch.stack(torch.meshgrid(torch.zeros(1), rows.float(), columns.float(), indexing="ij"), dim=-1).view(-1, 3)


def arguments(kind: str, z: torch.Tensor, level: float = 0.7) -> dict:
    """Those of a call with these latents, at this noise level (epsilon: this share of 1000 steps)."""
    batch, _, frames, height, width = z.shape
    if kind == "dit":
        labels = torch.arange(batch) * 3 % 11
        return {
            "hidden_states": z[:, :, 0],
            "timestep": torch.full((batch,), int(1000 * level)),
            "class_labels": labels,
        }
    if kind == "flux":
        return {
            "hidden_states": pack(z),
            "encoder_hidden_states": draw(batch, 5, 8),
            "pooled_projections": draw(batch, 8),
            "timestep": torch.full((batch,), level),
            "img_ids": flux_ids(torch.arange(height // 2), torch.arange(width // 2)),
            "txt_ids": torch.zeros(5, 3),
            "guidance": torch.full((batch,), 3.5),
        }
    if kind == "z-image":
        captions = [draw(5 + i, 8, seed=i) for i in range(batch)]
        return {"x": list(z), "t": torch.full((batch,), 1 - level), "cap_feats": captions}
    timestep = torch.full((batch,), 1000 * level)
    if kind == "wan-tokens":  # the first frame is given, as in image to video with the 5B
        clean = (torch.arange(frames) > 0).float().view(-1, 1, 1).expand(-1, height // 2, width // 2)
        timestep = timestep[:, None] * clean.reshape(1, -1)
    return {"hidden_states": z, "timestep": timestep, "encoder_hidden_states": draw(batch, 5, 8)}


@torch.no_grad()
def output(model: torch.nn.Module, given: dict) -> torch.Tensor:
    """What the model returns, as one tensor."""
    out = model(**given, return_dict=False)[0]
    return torch.stack(list(out)) if isinstance(out, list) else out


def as_latents(kind: str, out: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """An output as [B, C, F, H, W], without learned sigma."""
    if kind == "flux":
        return unpack(out, *z.shape[-2:])
    return (out[:, :, None] if out.ndim == 4 else out)[:, :4]


def enlarge(z: torch.Tensor, side: int, m: int) -> torch.Tensor:
    """Every patch of this side enlarged bilinearly, by torch's own interpolation."""
    height, width = z.shape[-2:]
    blocks = z.reshape(-1, height // side, side, width // side, side).transpose(2, 3)
    size = (m * side, m * side)
    blocks = torch.nn.functional.interpolate(blocks.flatten(1, 2), size=size, mode="bilinear", align_corners=False)
    blocks = blocks.unflatten(1, (height // side, width // side)).transpose(2, 3)
    return blocks.reshape(*z.shape[:-2], m * height, m * width)
