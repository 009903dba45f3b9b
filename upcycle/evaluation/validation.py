"""Validation loss: epsilon-MSE on held-out samples with fixed noise."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

TIMESTEPS = tuple(range(50, 1000, 100))
BATCH = 256


@dataclass(frozen=True)
class Validation:
    """Epsilon-MSE and tokens kept (nan for a model without a router), by timestep."""

    loss: dict[int, float]
    tokens: dict[int, float]

    @property
    def mean_loss(self) -> float:
        return sum(self.loss.values()) / len(self.loss)

    @property
    def mean_tokens(self) -> float:
        return sum(self.tokens.values()) / len(self.tokens)


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
    loss, tokens = {}, {}
    for t in TIMESTEPS:
        noise = torch.randn(x0.shape, generator=generator)
        error, kept = torch.zeros((), device=device), torch.zeros((), device=device)
        for some, weight in zip(rows.split(BATCH), share.to(device).split(BATCH), strict=True):
            x_t = alpha_bar[t].sqrt() * x0[some] + (1 - alpha_bar[t]).sqrt() * noise[some]
            timestep = torch.full((len(some),), t, device=device)
            out = model(x_t.to(device, dtype), timestep, labels[some].to(device))
            epsilon = out.sample[:, : x0.shape[1]].float()
            error += weight @ F.mse_loss(epsilon, noise[some].to(device), reduction="none").flatten(1).mean(1)
            routing = getattr(out, "routing", None)
            kept += torch.nan if routing is None else weight @ routing.mask.sum(1).float()
        loss[t], tokens[t] = error.item(), kept.item()
    return Validation(loss, tokens)
