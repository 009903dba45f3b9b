"""The pictures that show what a router does."""

from pathlib import Path

import torch
from matplotlib.figure import Figure

INK, MUTED, ACCENT = "#1a1a2e", "#8d99ae", "#d1495b"


def _panel(axis, image: torch.Tensor, **kwargs) -> None:
    array = image.permute(1, 2, 0).squeeze(-1) if image.dim() == 3 else image
    axis.imshow(array.numpy(), cmap=None if array.dim() == 3 else "gray", interpolation="nearest", **kwargs)
    axis.set_xticks([])
    axis.set_yticks([])


def side_by_side(teacher: torch.Tensor, student: torch.Tensor, path: Path, captions: tuple[str, str]) -> None:
    """Samples from the same seeds, teacher above student; images fp32 in [0, 1], [n, channels, H, W]."""
    n = len(teacher)
    columns = min(n, 10)
    rows = -(-n // columns)
    figure = Figure(figsize=(max(columns * 0.9, 4.5), rows * 2.1 + 0.5), layout="constrained")  # the title is long
    axes = figure.subplots(2 * rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for i in range(n):
        for offset, images in enumerate((teacher, student)):
            axis = axes[2 * (i // columns) + offset, i % columns]
            axis.axis("on")
            _panel(axis, images[i].cpu(), vmin=0, vmax=1)
            for spine in axis.spines.values():
                spine.set_edgecolor(MUTED if offset == 0 else ACCENT)
    figure.suptitle(f"same seeds: above {captions[0]}, below {captions[1]}", fontsize=10, color=INK)
    figure.savefig(path, dpi=130)


def router_maps(
    noisy: torch.Tensor,
    probability: torch.Tensor,
    mask: torch.Tensor,
    timesteps: list[int],
    path: Path,
    subject: str = "real held-out samples",
) -> None:
    """For each sample a row of x_t and a row of what is kept, over the timesteps.

    noisy: [samples, timesteps, channels, H, W] in the data's range; of latents the first three channels are shown.
    probability and mask: [samples, timesteps, H, W].
    """
    samples, steps, channels = noisy.shape[:3]
    name, limit = ("x_t", 1) if channels in (1, 3) else ("latent x_t", 2.5)
    noisy = noisy[:, :, : 1 if channels < 3 else 3].float() / limit
    figure = Figure(figsize=(steps * 1.15 + 0.6, samples * 2.3 + 0.6), layout="constrained")
    axes = figure.subplots(2 * samples, steps, squeeze=False)
    for s in range(samples):
        for k in range(steps):
            top, bottom = axes[2 * s, k], axes[2 * s + 1, k]
            _panel(top, ((noisy[s, k] + 1) / 2).clamp(0, 1), vmin=0, vmax=1)
            _panel(bottom, probability[s, k] * 0.6, vmin=0, vmax=1)
            rows, columns = mask[s, k].nonzero(as_tuple=True)
            bottom.scatter(columns, rows, s=900 / mask.shape[-1] ** 1.5 + 1, c=ACCENT, marker="s", linewidths=0)
            bottom.set_xlabel(f"{int(mask[s, k].sum())} kept", fontsize=8, color=INK)
            if s == 0:
                top.set_title(f"t = {timesteps[k]}", fontsize=9, color=INK)
        axes[2 * s, 0].set_ylabel(name, fontsize=9)
        axes[2 * s + 1, 0].set_ylabel("kept", fontsize=9)
    total = mask.shape[-1] * mask.shape[-2]
    figure.suptitle(f"what the router keeps of {total} positions, {subject}", fontsize=10, color=INK)
    figure.savefig(path, dpi=130)


def compression(timesteps: list[int], kept: torch.Tensor, positions: int, teacher_tokens: int, path: Path) -> None:
    """Tokens kept against t while sampling; kept: [steps, samples]."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.subplots()
    mean, low, high = kept.float().mean(1), kept.float().amin(1), kept.float().amax(1)
    axis.fill_between(timesteps, low, high, color=ACCENT, alpha=0.2, linewidth=0, label="student, least to most")
    axis.plot(timesteps, mean, color=ACCENT, linewidth=2, label="student, mean")
    axis.axhline(teacher_tokens, color=MUTED, linestyle="--", label=f"teacher's grid, {teacher_tokens}")
    axis.set_xlim(max(timesteps), min(timesteps))
    axis.set_ylim(bottom=0)
    axis.set_xlabel("timestep t (noise to image)")
    axis.set_ylabel(f"tokens kept of {positions}")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
