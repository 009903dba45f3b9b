"""The picture of a comparison."""

from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from upcycle.evaluation.plots import ACCENT, INK

MOST_COLUMNS = 12
LABEL_INCHES = 2.9


def picture(rows: list[dict[str, Any]], images: list[torch.Tensor], titles: list[str], path: Path) -> None:
    """One row of images for each variant, below it the difference to the first one's, in one scale for all.

    rows and images as `upcycle.evaluation.compare.compare` returns them; titles: of the columns, of which the first
    `MOST_COLUMNS` are shown.
    """
    n = min(len(titles), MOST_COLUMNS)
    cell = 1.0 if images[0].shape[-1] <= 64 else 1.5
    differences = [(image[:n] - images[0][:n]).abs().mean(1) for image in images]
    most = max(max(difference.max().item() for difference in differences), 1e-6)
    lines = 2 * len(rows) - 1
    figure = Figure(figsize=(LABEL_INCHES + n * cell, lines * cell + 0.75), layout="constrained")
    axes = figure.subplots(lines, n + 1, squeeze=False, width_ratios=[LABEL_INCHES, *([cell] * n)])
    for axis in axes.flat:
        axis.axis("off")
    for k, (row, image, difference) in enumerate(zip(rows, images, differences, strict=True)):
        above = max(0, 2 * k - 1)
        color = ACCENT if k else INK
        for text, down, style in (
            (_short(row["model"]), 0, {"fontsize": 9, "weight": "bold", "color": color}),
            (_label(row), -13, {"fontsize": 8, "color": INK, "linespacing": 1.3}),
        ):
            label = axes[above, 0].annotate(
                text, (0, 1), (0, down), xycoords="axes fraction", textcoords="offset points", va="top", **style
            )
            label.set_in_layout(False)  # it may reach into the row of differences, where there is room
        for i in range(n):
            shown = image[i].permute(1, 2, 0).squeeze(-1).numpy()
            axes[above, 1 + i].imshow(shown, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
            if k:
                axes[above + 1, 1 + i].imshow(difference[i].numpy(), cmap="inferno", vmin=0, vmax=most)
    for i in range(n):
        axes[0, 1 + i].set_title(titles[i], fontsize=8, color=INK)
    more = f"; {n} of {len(titles)} images" if n < len(titles) else ""
    figure.suptitle(
        f"the same classes, seeds and noise{more}\nbelow: difference to the first row, bright = {most:.2g}",
        fontsize=9, color=INK,
    )  # fmt: skip
    figure.savefig(path, dpi=130)


def _short(name: str, most: int = 34) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _label(row: dict[str, Any]) -> str:
    lines = [row["settings"]]
    cost = f"{row['flops_per_image'] / 1e9:.3g} GFLOPs ({row['flops_times_first']:.2f} ×)"
    if row["seconds_per_image"] is not None:
        cost += f"\n{row['seconds_per_image']:.3g} s/image ({row['times_first']:.2f} ×)"
    lines += [cost, f"{row['tokens_kept']:.1f} tokens"]
    if row["psnr"] is not None:
        lines.append(f"MSE to the first {row['mse']:.2g} ({row['psnr']:.1f} dB)")
    if row["feature_distance"]:
        lines.append(f"feature distance {row['feature_distance']:.2g}")
    return "\n".join(lines)
