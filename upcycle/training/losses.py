"""The losses of post-training. Shapes as in `upcycle.models.chunked_dit`: B batch, L positions."""

import torch
import torch.nn.functional as F

from upcycle.models.chunked_dit import DETAIL_SCALE, Routing

# Fewer tokens than this share of the target desaturate the noisiest steps (docs/how-it-works.md).
LEAST_SHARE = 2 / 3
# Deviations of the teacher's x0 estimate below this are no detail. With .03, as in the untrained start, samples are
# farther from the teacher's; with .12 hardly a token leaves the grid (docs/log.md, "noisy steps").
TARGET_FLOOR = 0.06


def ratio_loss(routing: Routing, ratio: float, group: int) -> torch.Tensor:
    """The published ratio loss (DC-DiT, "Losses"), a scalar.

    N / (N - 1) * ((1 - r)(1 - p) + (N - 1) r p) with r the mean mask before tail dropping and p the mean probability,
    each over ``group`` samples, then averaged over the groups. A last smaller group counts as one.
    """
    p = torch.stack([chunk.mean() for chunk in routing.probability.float().split(group)])
    r = torch.stack([chunk.mean() for chunk in routing.mask_natural.float().split(group)])
    return (ratio / (ratio - 1) * ((1 - r) * (1 - p) + (ratio - 1) * r * p)).mean()


def flops_loss(share: torch.Tensor, target: float, group: int) -> torch.Tensor:
    """DyDiT's FLOPs loss, a scalar: (mean of ``share`` [B] - target)^2, over groups as `ratio_loss`.

    ``share`` is what the gates leave of the blocks' FLOPs (`upcycle.evaluation.flops.gate_share`). The mean is over
    samples of many timesteps, so that some may cost more than others.
    """
    return torch.stack([(chunk.mean() - target).square() for chunk in share.split(group)]).mean()


def local_deviation(x0: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each 3x3 neighbourhood, channels pooled: [B, C, H, W] -> [B, L]."""
    mean = F.avg_pool2d(x0, 3, 1, 1, count_include_pad=False)
    variance = (F.avg_pool2d(x0 * x0, 3, 1, 1, count_include_pad=False) - mean * mean).mean(1)
    return variance.clamp(min=0).sqrt().flatten(1)


def visible_detail(x0: torch.Tensor, alpha_bar: torch.Tensor, prior: torch.Tensor) -> torch.Tensor:
    """log(sqrt(alpha_bar) * local deviation of the teacher's x0 estimate + .06) / .8 plus the lattice prior, [B, L].

    Without sqrt(alpha_bar) tokens pile up at high noise.

    Args:
        x0: the teacher's estimate, [B, C, H, W].
        alpha_bar: [B].
        prior: [L].
    """
    return torch.log(alpha_bar.sqrt()[:, None] * local_deviation(x0) + TARGET_FLOOR) / DETAIL_SCALE + prior


def router_target(detail: torch.Tensor, ratio: float) -> torch.Tensor:
    """Where tokens should go: the top 1/N **of the whole batch** in `visible_detail` [B, L]; bool [B, L].

    Every sample gets at least two thirds of its even share.
    """
    size = detail.shape[1]
    # An exact count: a threshold would take every one of the many equal, flat positions.
    top = detail.flatten().topk(round(detail.numel() / ratio)).indices
    target = torch.zeros(detail.numel(), dtype=torch.bool, device=detail.device)
    target = target.scatter(0, top, True).view_as(detail)
    least = detail.topk(max(1, int(LEAST_SHARE * size / ratio)), dim=1).indices
    return target.scatter(1, least, True)


def router_loss(routing: Routing, target: torch.Tensor) -> torch.Tensor:
    """BCE of the boundary score (without bias and guide) against `router_target`, a scalar."""
    return F.binary_cross_entropy_with_logits(routing.score.float(), target.float())


def predicted_x0(x_t: torch.Tensor, epsilon: torch.Tensor, alpha_bar: torch.Tensor, limit: float) -> torch.Tensor:
    """x0 estimate of an epsilon prediction, clamped to +-limit; [B, C, H, W]."""
    alpha = alpha_bar[:, None, None, None]
    return ((x_t - (1 - alpha).sqrt() * epsilon) / alpha.sqrt()).clamp(-limit, limit)


def bias_target(logit: torch.Tensor, bias: torch.Tensor, ratio: float) -> torch.Tensor:
    """The bias at which exactly 1/N of these positions would be kept: minus the 1 - 1/N quantile without the bias."""
    free = (logit.float() - bias).flatten().sort().values
    cut = round(free.numel() * (1 - 1 / ratio))
    return -(free[cut - 1] + free[cut]) / 2


def min_snr_weight(alpha_bar: torch.Tensor, gamma: float) -> torch.Tensor:
    """min(snr, gamma) / snr, the min-SNR weight for epsilon prediction (arXiv 2303.09556): alpha_bar [B] -> [B]."""
    return (gamma * (1 - alpha_bar) / alpha_bar).clamp(max=1)


def balanced_weight(alpha_bar: torch.Tensor) -> torch.Tensor:
    """sqrt(1 + 2 / snr): alpha_bar [B] -> [B].

    The noise MSE of a trained model falls with the noise by more than three orders of magnitude; this weight takes off
    about half of them. An alpha_bar below 1e-6 counts as 1e-6 (DiT's schedule ends at 4e-5).
    """
    return (1 + 2 * (1 - alpha_bar) / alpha_bar.clamp(min=1e-6)).sqrt()


def weighted_mse(
    prediction: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, channels: int | None = None
) -> torch.Tensor:
    """Mean over samples of weight [B] times each sample's MSE, a scalar; prediction and target [B, C, ...].

    Only the first ``channels`` of C are weighed; default: all.
    """
    error = (prediction - target).square().flatten(2).mean(2)
    channels = error.shape[1] if channels is None else channels
    return torch.cat([weight[:, None] * error[:, :channels], error[:, channels:]], dim=1).mean()


def guided_target(conditional: torch.Tensor, unconditional: torch.Tensor, scale: float, channels: int) -> torch.Tensor:
    """Classifier-free guidance of the teacher's outputs [B, O, H, W] for distillation, as `DiTPipeline` does it.

    All ``channels`` of epsilon are guided; the learned sigma is the conditional one. Where the label is the null class
    the two outputs are the same, and so is the target.
    """
    epsilon = unconditional[:, :channels] + scale * (conditional - unconditional)[:, :channels]
    return torch.cat([epsilon, conditional[:, channels:]], dim=1)
