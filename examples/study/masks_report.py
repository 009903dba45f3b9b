"""What `masks.py` measured, as tables and a picture."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tables import table as markdown

UNITS, TARGETS = ("windows", "positions"), ("mask", "outline")
NOTE = """
By window: of means over 4 x 4 positions, in which the lattice cancels. Of blurred detectors, σ in parentheses is the
better one of 1 and 2 pixels, chosen with the true masks for every number: that favours them. *Mean mask* and *mean mask
of the class* look at no image: objects are near the middle, and the router is told the class. The logit says where
tokens go first, not how many go there: the lattice spreads them. Students that started from the same graft have one
untrained row.

""".lstrip()


def table(report: dict[str, Any]) -> str:
    """Markdown: tokens kept and their share on the object, then the AUCs, a row a map and a column a timestep."""
    rows, area = report["rows"], report["area"]
    head = ["", *(f"t = {t}" for t in report["timesteps"])]
    students = {name: row["by_t"] for name, row in rows.items() if row["kind"] in ("student", "untrained")}
    text = _section(
        f"Tokens kept of {report['pixels'] ** 2}: mean ± standard deviation over {report['images']} images",
        head, {n: [f"{r['kept']:.0f} ± {r['kept_deviation']:.0f}" for r in by_t] for n, by_t in students.items()},
    )  # fmt: skip
    text += _section(
        f"Share of the kept tokens on the object, which has {area['positions']['mask']:.0%} of the area",
        head, {name: [f"{r['inside']:.0%}" for r in by_t] for name, by_t in students.items()},
    )  # fmt: skip
    of = {
        "windows": {"mask": "windows that the object covers by more than half",
                    "outline": "windows with both object and ground"},
        "positions": {"mask": "positions on the object", "outline": "positions within a pixel of its outline"},
    }  # fmt: skip
    sections = {}
    for unit in UNITS:
        for what in TARGETS:
            numbers = {name: [r["auc"][unit][what] for r in row["by_t"]] for name, row in rows.items()}
            errors = [n["standard_error"] for found in numbers.values() for n in found if _known(n["standard_error"])]
            sections[unit, what] = _section(
                f"AUC, {of[unit][what]} ({area[unit][what]:.0%}; {report['judged'][unit][what]} images; "
                f"standard errors up to {max(errors, default=float('nan')):.3f})",
                head, {name: [_auc_text(n) for n in found] for name, found in numbers.items()},
            )  # fmt: skip
    text += sections.pop(("windows", "mask")) + NOTE
    folded = "".join(sections.values())
    return f"{text}<details><summary>AUCs of outlines, and position by position</summary>\n\n{folded}</details>\n"


def _section(title: str, head: list[str], rows: dict[str, list[str]]) -> str:
    return f"**{title}**\n\n{markdown(head, [[name, *cells] for name, cells in rows.items()])}\n\n"


def _auc_text(number: dict[str, Any]) -> str:
    if not _known(number["mean"]):
        return "-"
    return f"{number['mean']:.3f}" + (f" ({number['sigma']})" if "sigma" in number else "")


def _known(number: float | None) -> bool:
    """Neither NaN nor what JSON makes of it."""
    return number is not None and number == number


def plot(report: dict[str, Any], path: Path) -> None:
    """Against t the tokens kept and their share on the object, and the AUCs by window; beside them what the first
    student sees and its boundary probability, with the outline of the true mask. Legible 900 pixels wide."""
    figure = Figure(figsize=(9, 5.8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.02, wspace=0.02, hspace=0.02)
    left, right = figure.subfigures(1, 2, width_ratios=(21, 11))
    axes = left.subplots(2, 2, sharex=True)
    t, rows = report["timesteps"], report["rows"]
    drawn, styles = {}, _styles(rows)
    for name, row in rows.items():
        if row["kind"] in ("student", "untrained"):
            for axis, key in zip(axes[:, 0], ("kept", "inside"), strict=True):
                axis.plot(t, [r[key] for r in row["by_t"]], **styles[name])
        for axis, what in zip(axes[:, 1], TARGETS, strict=True):
            means = np.array([r["auc"]["windows"][what]["mean"] for r in row["by_t"]], float)
            drawn[name] = axis.plot(t, means, **styles[name])[0]
    area = report["area"]["positions"]["mask"]
    axes[1, 0].axhline(area, color="#8d99ae", linewidth=1, linestyle=":")
    axes[1, 0].text(min(t), area - 0.01, "the object's area ", fontsize=8, color="#5b6478", ha="right", va="top")
    titles = (
        (f"tokens kept of {report['pixels'] ** 2}", "AUC by window: the object"),
        ("share of them on the object", "AUC by window: its outline"),
    )
    for axis, title in zip(axes.flat, (title for line in titles for title in line), strict=True):
        axis.set_title(title, fontsize=9, loc="left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 1]:
        axis.axhline(0.5, color="#8d99ae", linewidth=1, linestyle=":")
        axis.set_ylim(top=1)
    axes[0, 0].set_ylim(bottom=0)
    axes[1, 0].set_ylim(bottom=0)
    if max(t) > min(t):
        axes[0, 0].set_xlim(max(t), min(t))
    for axis in axes[1]:
        axis.set_xlabel("timestep t (noise to image)", fontsize=8)
    left.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    _draw_maps(right, report["maps"], report["pixels"])
    figure.savefig(path, dpi=200)


def _styles(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Line styles by name: students in colour, their starts dashed, detectors thin, those of a blurred x_t dashed."""
    styles: dict[str, dict[str, Any]] = {}
    students = [name for name, row in rows.items() if row["kind"] == "student"]
    for i, name in enumerate(students):
        styles[name] = {"color": f"C{i}", "linewidth": 2, "marker": "o", "markersize": 3, "zorder": 3}
        styles[f"{name}, untrained"] = {"color": f"C{i}", "linewidth": 1.3, "linestyle": "--"}
    for name, color in (("gradient", "#8d99ae"), ("deviation", "#1a1a2e")):
        styles[name] = {"color": color, "linewidth": 1}
        styles[f"{name}, blurred"] = {"color": color, "linewidth": 1, "linestyle": (0, (4, 2))}
    for name, row in rows.items():
        if row["kind"] == "prior":
            styles[name] = {"color": "#5b6478", "linewidth": 1, "linestyle": "-." if "class" in name else ":"}
        if row["kind"] == "supervision":
            styles[name] = {"color": "#1a1a2e", "linewidth": 1.6, "linestyle": ":"}
    return styles


def _array(text: str, *shape: int) -> np.ndarray:
    """What `masks._hex` was given, in 256 steps."""
    return np.frombuffer(bytes.fromhex(text), np.uint8).reshape(shape) / 255


def _draw_maps(figure: Any, maps: dict[str, Any], pixels: int) -> None:
    """An image's x_t above its boundary probability, a column a timestep, noise first."""
    times, count = maps["timesteps"], len(maps["images"])
    x_t = _array(maps["x_t"], len(times), count, 3, pixels, pixels).transpose(0, 1, 3, 4, 2)
    probability = _array(maps["probability"], len(times), count, pixels, pixels)
    mask = _array(maps["mask"], count, pixels, pixels)
    axes = figure.subplots(2 * count, len(times), squeeze=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    for column, k in enumerate(sorted(range(len(times)), key=lambda k: -times[k])):
        axes[0, column].set_title(f"t = {times[k]}", fontsize=8)
        for i in range(count):
            axes[2 * i, column].imshow(x_t[k, i], interpolation="nearest")
            below = axes[2 * i + 1, column]
            below.imshow(probability[k, i], cmap="magma", vmin=0, vmax=1, interpolation="nearest")
            below.contour(mask[i], levels=[0.5], colors="#00e5ff", linewidths=0.8)
    figure.suptitle(f"{maps['student']}: x_t, probability", fontsize=9)
