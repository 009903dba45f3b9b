"""Validation loss: epsilon-MSE on held-out samples with fixed noise."""

import torch
import torch.nn.functional as F

TIMESTEPS = tuple(range(50, 1000, 100))


@torch.inference_mode()
def validation_loss(
    model: torch.nn.Module, x0: torch.Tensor, labels: torch.Tensor, alpha_bar: torch.Tensor, seed: int = 0
) -> tuple[float, float]:
    """Mean epsilon-MSE over ten timesteps, and the mean tokens kept (nan for a model without a router).

    Args:
        x0: [n, C, H, W] on the CPU; labels: int64 [n].
        alpha_bar: cumulative signal power of the noise schedule, fp32 [T].

    The noise depends on ``seed`` and the sample's place only: every model meets the same noisy batch.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    total, kept = 0.0, []
    for t in TIMESTEPS:
        noise = torch.randn(x0.shape, generator=generator)
        x_t = alpha_bar[t].sqrt() * x0 + (1 - alpha_bar[t]).sqrt() * noise
        out = model(x_t.to(device), torch.full((len(x0),), t, device=device), labels.to(device))
        total += F.mse_loss(out.sample[:, : x0.shape[1]].float().cpu(), noise).item()
        if getattr(out, "routing", None) is not None:
            kept.append(out.routing.mask.sum(1).float().mean().item())
    return total / len(TIMESTEPS), sum(kept) / len(kept) if kept else float("nan")
