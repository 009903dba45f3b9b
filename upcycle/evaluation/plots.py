"""The pictures that show what a router does."""

from pathlib import Path
from typing import Any

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
    _against_t(axis, timesteps, kept, "student")
    axis.axhline(teacher_tokens, color=MUTED, linestyle="--", label=f"teacher's grid, {teacher_tokens}")
    axis.set_ylim(top=max(axis.get_ylim()[1], 1.05 * teacher_tokens))
    axis.set_xlabel("timestep t (noise to image)")
    axis.set_ylabel(f"tokens kept of {positions}")
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def _against_t(axis: Any, timesteps: list[int], values: torch.Tensor, name: str) -> None:
    """Mean and least to most of values [timesteps, samples], from noise to image. NaN is left out."""
    mean, values = values.double().nanmean(1), values.double()
    low, high = values.nan_to_num(nan=torch.inf).amin(1), values.nan_to_num(nan=-torch.inf).amax(1)
    there = ~mean.isnan()
    t = torch.tensor(timesteps)[there]
    axis.fill_between(t, low[there], high[there], color=ACCENT, alpha=0.2, linewidth=0, label=f"{name}, least to most")
    axis.plot(t, mean[there], color=ACCENT, linewidth=2, label=f"{name}, mean", marker="o" if len(t) < 15 else None)
    if max(timesteps) > min(timesteps):
        axis.set_xlim(max(timesteps), min(timesteps))
    axis.set_ylim(bottom=min(0.0, float(low[there].amin()) if there.any() else 0.0))
    axis.spines[["top", "right"]].set_visible(False)


# ---------------------------------------------------------------------------------------------------------------------
# Of `upcycle inspect`: narrow, so that a phone shows them at the size of its text.

WIDTH, DPI = 4.2, 200


def _columns(rows: int, columns: int, names: list[str], left: list[str]) -> tuple[Figure, Any]:
    """Square panels with names above the columns and beside the rows."""
    side = (WIDTH - 0.55) / columns
    figure = Figure(figsize=(WIDTH, rows * (side + 0.2) + 0.3), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        axis.set_title(name, fontsize=9, color=INK)
    for axis, name in zip(axes[:, 0], left, strict=True):
        axis.set_ylabel(name, fontsize=9, color=INK)
    return figure, axes


def _kept(axis: Any, image: torch.Tensor, mask: torch.Tensor) -> None:
    """The positions kept [H, W], red on a pale image [channels, height, width]."""
    height, width = mask.shape
    pale = 0.35 + 0.65 * image.mean(0, keepdim=True)
    _panel(axis, pale, vmin=0, vmax=1, extent=(0, width, height, 0))
    red = torch.tensor([0.82, 0.29, 0.36, 0.0]).repeat(height, width, 1)
    red[..., 3] = 0.75 * mask
    axis.imshow(red.numpy(), extent=(0, width, height, 0), interpolation="nearest")


def trajectory(
    x_t: torch.Tensor,
    x_0: torch.Tensor,
    probability: torch.Tensor,
    mask: torch.Tensor,
    timesteps: list[int],
    path: Path,
) -> None:
    """One sample, a row a timestep: images of x_t and of the predicted x_0 [k, channels, height, width] in [0, 1],
    boundary probability and positions kept [k, H, W]."""
    figure, axes = _columns(
        len(timesteps), 4, ["$x_t$", "predicted $x_0$", "probability", "kept"], [f"t = {t}" for t in timesteps]
    )
    for k in range(len(timesteps)):
        _panel(axes[k, 0], x_t[k], vmin=0, vmax=1)
        _panel(axes[k, 1], x_0[k], vmin=0, vmax=1)
        shown = axes[k, 2].imshow(probability[k].numpy(), cmap="magma", vmin=0, vmax=1, interpolation="nearest")
        axes[k, 2].set_xticks([])
        axes[k, 2].set_yticks([])
        _kept(axes[k, 3], x_0[k], mask[k])
        axes[k, 3].set_xlabel(f"{int(mask[k].sum())} tokens", fontsize=8, color=INK)
    bar = figure.colorbar(shown, ax=axes[-1, :], orientation="horizontal", fraction=0.08, aspect=40, pad=0.04)
    bar.ax.tick_params(labelsize=8)
    bar.set_label("boundary probability", fontsize=8)
    figure.savefig(path, dpi=DPI)


def tail_drops(
    x_0: torch.Tensor,
    mask: torch.Tensor,
    change: torch.Tensor,
    rhos: tuple[float, ...],
    timesteps: list[int],
    path: Path,
) -> None:
    """A row a timestep, a column a tail drop: positions kept [k, R, H, W] on images of the predicted x_0
    [k, R, channels, height, width], and the change of the predicted noise [k, R]."""
    figure, axes = _columns(
        len(timesteps), len(rhos), [f"ρ = {rho:g}" for rho in rhos], [f"t = {t}" for t in timesteps]
    )
    for k in range(len(timesteps)):
        for r, rho in enumerate(rhos):
            _kept(axes[k, r], x_0[k, r], mask[k, r])
            percent = 100 * float(change[k, r])
            text = f"{int(mask[k, r].sum())} kept" + (
                f"\nΔε {percent:.{0 if percent >= 10 else 1}f} %" if rho else "\n"
            )
            axes[k, r].set_xlabel(text, fontsize=8, color=INK)
    figure.savefig(path, dpi=DPI)


def tokens_and_speed(
    timesteps: list[int],
    kept: torch.Tensor,
    milliseconds: torch.Tensor,
    positions: int,
    reference: tuple[float, str],
    path: Path,
) -> None:
    """Tokens kept [K, n] and milliseconds of a step an image [K, B] against t; ``reference``: of tokens."""
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True)
    _against_t(top, timesteps, kept, "student")
    top.axhline(reference[0], color=MUTED, linestyle="--", label=f"{reference[1]}, {reference[0]:g}")
    top.set_ylim(top=max(top.get_ylim()[1], 1.05 * reference[0]))
    top.set_ylabel(f"tokens kept of {positions}")
    _against_t(bottom, timesteps, milliseconds, "student")
    bottom.set_ylabel("ms a step an image")
    bottom.set_xlabel("timestep t (noise to image)")
    _legend(top)
    figure.savefig(path, dpi=DPI)


def detail_correlation(timesteps: list[int], correlation: torch.Tensor, path: Path) -> None:
    """Spearman's correlation of boundary probability and detail [K, n] against t."""
    figure = Figure(figsize=(WIDTH, 2.8), layout="constrained")
    axis = figure.subplots()
    _against_t(axis, timesteps, correlation, "samples")
    axis.axhline(0, color=MUTED, linewidth=1)
    axis.set_ylim(top=1)
    axis.set_ylabel("Spearman's correlation")
    axis.set_xlabel("timestep t (noise to image)")
    _legend(axis)
    figure.savefig(path, dpi=DPI)


def by_class(names: list[str], values: list[torch.Tensor], reference: tuple[float, str], path: Path) -> None:
    """A bar a class: mean of its samples' tokens, the samples as points."""
    figure = Figure(figsize=(WIDTH, 0.27 * len(names) + 1.1), layout="constrained")
    axis = figure.subplots()
    for row, tokens in enumerate(values):
        axis.barh(row, tokens.mean(), color=ACCENT, alpha=0.35, height=0.7)
        axis.scatter(tokens, [row] * len(tokens), s=9, color=ACCENT, linewidths=0, zorder=3)
    axis.axvline(reference[0], color=MUTED, linestyle="--", label=f"{reference[1]}, {reference[0]:g}")
    axis.set_yticks(range(len(names)), [name if len(name) < 19 else name[:17].rstrip() + " …" for name in names])
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlabel("tokens kept, mean over the steps")
    axis.spines[["top", "right"]].set_visible(False)
    _legend(axis)
    figure.savefig(path, dpi=DPI)


def _legend(axis: Any) -> None:
    """Above the axis, where no curve runs."""
    handles, _ = axis.get_legend_handles_labels()
    axis.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=min(len(handles), 2),
                borderaxespad=0.2, handlelength=1.5, columnspacing=1.2)  # fmt: skip


def quality_curves(teacher: list[dict[str, Any]], student: list[dict[str, Any]], path: Path, caption: str) -> None:
    """FID against FLOPs and against seconds an image: rows of a student at its tail drops, of its teacher at fewer
    steps."""
    figure = Figure(figsize=(9.2, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    curves = ((teacher, MUTED, "teacher, fewer steps", "steps"), (student, ACCENT, "student, tail drop", "tail_drop"))
    for axis, key, name in ((left, "flops_per_image", "FLOPs"), (right, "seconds_per_image", "seconds")):
        for rows, color, label, told in curves:
            points = sorted((row[key], row["fid"], row[told]) for row in rows)
            x, y, _ = zip(*points, strict=True)
            axis.plot(x, y, color=color, marker="o", markersize=4, label=label)
            for cost, fid, text in points:
                where = {"xytext": (3, 3), "textcoords": "offset points"}
                axis.annotate(f"{text:g}", (cost, fid), fontsize=7, color=INK, **where)
        axis.set_xlim(left=0)
        axis.set_ylim(bottom=0)
        axis.set_xlabel(f"{name} per image")
        axis.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("FID")
    left.legend(frameon=False, fontsize=8)
    figure.suptitle(caption, fontsize=9, color=INK)
    figure.savefig(path, dpi=130)
