"""Measure how far a converted model is from its teacher: the stock model, computed by diffusers itself."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel

from upcycle.graft.embedders import _COPY
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.sources import DiTConfig, Source
from upcycle.sources.student import load_student

__all__ = ["Difference", "load_student", "load_teacher", "measure_difference", "stock_dit"]

EXACT_TOLERANCE = 1e-5
DISTANCE = "largest difference from its teacher's outputs"
TIMESTEPS = (999, 960, 800, 600, 400, 200, 40, 0)


@dataclass(frozen=True)
class Difference:
    """Student against teacher, fp32.

    ``max_abs`` over all outputs; ``by_timestep`` the relative root mean square; ``scale`` the root mean square of the
    teacher's largest outputs over the timesteps.
    """

    max_abs: float
    by_timestep: dict[int, float]
    tokens_kept: float
    scale: float

    def evidence(self, exact: bool) -> dict[str, Any]:
        """As `provenance.add_evidence` takes it; how far off it is by timestep where the start is not ``exact``."""
        by_t = {} if exact else {f"relative at t={t}": f"{value:.0%}" for t, value in self.by_timestep.items()}
        return {
            "metric": DISTANCE,
            "better": "lower",
            "student": self.max_abs,
            "teacher": None,
            "settings": {"step": 0, "tokens_kept": round(self.tokens_kept, 1), **by_t},
        }

    @property
    def equal(self) -> bool:
        """Within 1e-5 for outputs of order 1, in proportion for larger ones; False where anything is NaN."""
        return self.max_abs <= EXACT_TOLERANCE * max(1.0, self.scale)


def stock_dit(c: DiTConfig) -> DiTTransformer2DModel:
    """The stock diffusers model of a config, with random weights; Meta's conventions are not set."""
    return DiTTransformer2DModel(
        num_attention_heads=c.num_attention_heads,
        attention_head_dim=c.attention_head_dim,
        in_channels=c.in_channels,
        out_channels=c.out_channels,
        num_layers=c.num_layers,
        sample_size=c.sample_size,
        patch_size=c.patch_size,
        num_embeds_ada_norm=c.num_classes,
        norm_eps=c.norm_eps,
    )


def load_teacher(source: Source) -> DiTTransformer2DModel:
    """The stock diffusers model of a source, fp32, in eval mode; Meta's conventions are set for a ``.pt``."""
    c = source.config
    assert isinstance(c, DiTConfig)
    with torch.device("meta"):
        model = stock_dit(c)
    expected = list(model.state_dict())
    state = {name: tensor.load().float() for name, tensor in source.tensors.items()}
    for name in expected:
        if name not in state and (match := _COPY.fullmatch(name)):
            state[name] = state[f"transformer_blocks.0.norm1.emb.{match[2]}"]
    model.load_state_dict(state, assign=True)
    # The position table is not in the weights: made on the meta device it must be made again.
    model.pos_embed = type(model.pos_embed)(
        height=c.sample_size, width=c.sample_size, patch_size=c.patch_size, in_channels=c.in_channels,
        embed_dim=c.hidden_size,
    )  # fmt: skip
    model.pos_embed.load_state_dict(
        {"proj.weight": state["pos_embed.proj.weight"], "proj.bias": state["pos_embed.proj.bias"]}
    )
    if c.time_embedding == "meta":
        for block in model.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
    return model.eval().requires_grad_(False)


@torch.inference_mode()
def measure_difference(
    teacher: DiTTransformer2DModel,
    student: ChunkedDiT,
    *,
    seed: int = 0,
    step: Callable[[], None] = lambda: None,
) -> Difference:
    """Compare both on noisy samples of the teacher itself, at eight timesteps, over classes and the null class.

    The clean samples are the teacher's own from a few DDIM steps, so that the router meets images and not only noise.
    """
    c = teacher.config
    generator = torch.Generator().manual_seed(seed)
    classes = torch.tensor([0, c.num_embeds_ada_norm // 2, c.num_embeds_ada_norm - 1, c.num_embeds_ada_norm])
    labels = classes[:2] if c.num_layers > 12 else classes
    shape = (len(labels), c.in_channels, c.sample_size, c.sample_size)
    scheduler = DDIMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02, clip_sample=False)
    scheduler.set_timesteps(8)
    x0 = torch.randn(shape, generator=generator)
    for t in scheduler.timesteps:
        x0 = scheduler.step(teacher(x0, t.expand(len(labels)), labels).sample[:, : c.in_channels], t, x0).prev_sample
        step()
    # Random weights make wild samples; real ones are within a few standard deviations already.
    x0 = x0 / x0.std().clamp(min=1)
    largest, kept, scale, by_timestep = torch.zeros(()), 0.0, 0.0, {}
    for i, t in enumerate(TIMESTEPS):
        timestep = torch.full((len(labels),), t)
        x_t = scheduler.add_noise(x0, torch.randn(shape, generator=generator), timestep)
        y = classes[torch.arange(len(labels)) + i & 3]
        expected = teacher(x_t, timestep, y).sample
        got = student(x_t, timestep, y)
        error = got.sample - expected
        largest = torch.maximum(largest, error.abs().max())  # keeps a NaN, which max() would lose
        scale = max(scale, expected.square().mean().sqrt().item())
        by_timestep[t] = (error.square().mean() / expected.square().mean()).sqrt().item()
        kept += got.routing.mask.sum(1).float().mean().item() / len(TIMESTEPS)
        step()
    return Difference(largest.item(), by_timestep, kept, scale)


MEASURE_STEPS = 8 + len(TIMESTEPS)
