"""Validation loss: epsilon-MSE on held-out samples with fixed noise."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from upcycle.evaluation.flops import gate_share

TIMESTEPS = tuple(range(50, 1000, 100))
BATCH = 256


@dataclass(frozen=True)
class Validation:
    """Epsilon-MSE, tokens kept (nan for a model without a router), and what DyDiT's gates left of the FLOPs of the
    blocks (1 for a model without them), by timestep."""

    loss: dict[int, float]
    tokens: dict[int, float]
    share: dict[int, float] = field(default_factory=lambda: dict.fromkeys(TIMESTEPS, 1.0))

    @property
    def mean_loss(self) -> float:
        return sum(self.loss.values()) / len(self.loss)

    @property
    def mean_tokens(self) -> float:
        return sum(self.tokens.values()) / len(self.tokens)

    @property
    def mean_share(self) -> float:
        return sum(self.share.values()) / len(self.share)


@torch.inference_mode()
def validate(
    model: torch.nn.Module,
    x0: torch.Tensor,
    labels: torch.Tensor,
    alpha_bar: torch.Tensor,
    *,
    seed: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> Validation:
    """Measure ``model`` at ten timesteps.

    Args:
        x0: [n, C, H, W] on the CPU; labels: int64 [n].
        alpha_bar: cumulative signal power of the noise schedule, fp32 [T].
        rank, ranks: measure every ``ranks``-th sample only, from ``rank`` on, with as many calls of the model on every
            rank. The mean over the ranks is what one rank would measure.

    The noise depends on ``seed`` and the sample's place only: every model meets the same noisy batch.
    """
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(rank, -(-len(x0) // ranks) * ranks, ranks)
    share = (rows < len(x0)) * (ranks / len(x0))  # the last ranks may have one less, and measure another in its place
    rows = rows.clamp(max=len(x0) - 1)
    loss, tokens, left = {}, {}, {}
    for t in TIMESTEPS:
        noise = torch.randn(x0.shape, generator=generator)
        error, kept, gated = (torch.zeros((), device=device) for _ in range(3))
        for some, weight in zip(rows.split(BATCH), share.to(device).split(BATCH), strict=True):
            x_t = alpha_bar[t].sqrt() * x0[some] + (1 - alpha_bar[t]).sqrt() * noise[some]
            timestep = torch.full((len(some),), t, device=device)
            out = model(x_t.to(device, dtype), timestep, labels[some].to(device))
            epsilon = out.sample[:, : x0.shape[1]].float()
            error += weight @ F.mse_loss(epsilon, noise[some].to(device), reduction="none").flatten(1).mean(1)
            routing = getattr(out, "routing", None)
            if routing is None:
                kept += torch.nan
                gated += weight.sum()
            else:
                count = routing.mask.sum(1).float()
                kept += weight @ count
                config = getattr(model, "module", model).config  # of the model inside of DDP
                gated += weight @ gate_share(config, out.gates, count)
        loss[t], tokens[t], left[t] = error.item(), kept.item(), gated.item()
    return Validation(loss, tokens, left)
