"""How far coarse patches are from the base model, by noise level."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler

from upcycle.graft.patches import Plan
from upcycle.models import ddit
from upcycle.sources.backbone import Backbone

LEVELS = (50, 200, 400, 600, 800, 950)


@torch.inference_mode()
def relative_errors(
    model: Any, x0: torch.Tensor, labels: torch.Tensor, *, levels: Sequence[int] = LEVELS, seed: int = 0
) -> dict[int, dict[int, float]]:
    """Relative root mean square error of each coarse size against m = 1, by timestep, for a class-conditional DiT.

    Args:
        model: a `DiTTransformer2DModel` with an adapter (`upcycle.models.ddit.attach`).
        x0: clean latents [n, C, H, W]; labels int64 [n].

    Returns:
        m -> timestep -> error of the noise predicted, relative to the root mean square of the base's.
    """
    generator = torch.Generator().manual_seed(seed)
    device, channels = x0.device, x0.shape[1]
    errors: dict[int, dict[int, float]] = {m: {} for m in model.ddit.patches}
    for t in levels:
        timestep = torch.full((len(x0),), t, device=device)
        alpha, sigma = (level[0] for level in model.noise.levels(timestep))
        x_t = alpha * x0 + sigma * torch.randn(x0.shape, generator=generator).to(x0)
        with model.at(1):
            expected = model(x_t, timestep, labels).sample[:, :channels]
        for m in model.ddit.patches:
            with model.at(m):
                error = model(x_t, timestep, labels).sample[:, :channels] - expected
            errors[m][t] = (error.square().mean() / expected.square().mean()).sqrt().item()
    return errors


@torch.inference_mode()
def before_training(backbone: Backbone, plan: Plan) -> dict[str, Any]:
    """``exact``: whether m = 1 has the base's bits, and `relative_errors` ``by_level``, on samples of the base."""
    model = load_base(backbone)
    c = model.config
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, c.num_embeds_ada_norm // 2])
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(8)
    x = torch.randn(len(labels), c.in_channels, c.sample_size, c.sample_size, generator=generator)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t.expand(len(x)), labels).sample[:, : c.in_channels], t, x).prev_sample
    x = x / x.std().clamp(min=1)  # random weights make wild samples
    time = torch.full((len(x),), 500)
    before = model(x, time, labels).sample
    ddit.attach(model, plan.config, plan.tensors)
    with model.at(1):
        exact = torch.equal(before, model(x, time, labels).sample)
    return {"exact": exact, "by_level": relative_errors(model, x, labels)}


def load_base(backbone: Backbone) -> Any:
    """The stock class-conditional DiT of a base, fp32, in eval mode."""
    from upcycle.graft.verify import load_teacher
    from upcycle.sources import open_source

    return load_teacher(open_source(str(backbone.folder)))
