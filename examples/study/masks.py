"""Does the router learn what is claimed? Tokens and boundary logits of students beside the true masks of the shapes.

    python examples/study/masks.py --student exact=runs/study/shapes/exact-0/run/export --out masks

Held-out shapes are noised to each timestep, the noise of an image being the same at every timestep and for every
student. Counted are the tokens kept and how many of them lie on the object. The boundary logit is read as a detector:
its area under the ROC curve (AUC) against two targets, the object's mask and the band of its outline, an image at a
time. Beside it stand the untrained graft that a student started from, plain detectors on the same x_t, and what the
router is supervised with.

On a grid the logit alternates between neighbours by construction, which lowers the AUC by position whatever the router
knows. So every AUC is given twice: by position, and by window, of means over 4 x 4 positions, in which the lattice of a
teacher of patch 2 cancels. Students and the teacher are told the class, which detectors are not.

A lean student's logit has the local detail of x_t in it from the start, as a fixed term: without much noise the
untrained graft finds the object too. What was learned is the difference between a student and its untrained row.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiTPipeline
from matplotlib.figure import Figure
from shapes import make_shapes
from torchvision.transforms.functional import gaussian_blur

from upcycle.errors import UpcycleError
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.output import to_json
from upcycle.sampling.pipeline import load_pipeline
from upcycle.training.losses import local_deviation, predicted_x0

WINDOW = 4
SIGMAS = (1, 2)
SHOWN = 4
BATCH = 50
SOBEL = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
UNITS, TARGETS = ("windows", "positions"), ("mask", "outline")
Targets = dict[str, dict[str, torch.Tensor]]


def auc(scores: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Area under the ROC curve of every row: scores [n, P] without NaN and bool [n, P] -> fp64 [n].

    The chance that a position of the target scores higher than another one, where equal scores count half; NaN where
    all of a row's positions are of the target, or none.
    """
    ordered, scores = scores.sort(-1).values, scores.contiguous()
    low, high = (torch.searchsorted(ordered, scores, side=side) for side in ("left", "right"))
    positives = target.sum(-1).double()
    # Half of the target's pairs with itself, which are no pairs of the target and another position, is taken off.
    higher = ((low + high) * target).sum(-1) / 2 - positives.square() / 2
    return higher / (positives * (target.shape[-1] - positives))


def targets_of(masks: torch.Tensor) -> Targets:
    """What logits should find, of masks bool [n, H, W]: bool [n, P], by unit and then by target.

    The outline by position is within one pixel of the mask's edge, on either side. A window is of the object where it
    covers more than half of it, and of the outline where it holds both object and ground.
    """
    cover = masks[:, None].float()
    outline = F.max_pool2d(cover, 3, 1, 1) > -F.max_pool2d(-cover, 3, 1, 1)
    share = F.avg_pool2d(cover, WINDOW).flatten(1)
    return {
        "windows": {"mask": share > 0.5, "outline": (share > 0) & (share < 1)},
        "positions": {"mask": masks.flatten(1), "outline": outline.flatten(1)},
    }


def detectors(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Plain detectors of detail, [n, C, H, W] -> [n, H, W]: Sobel's gradient of the channels' mean, and the standard
    deviation of 3 x 3 pixels."""
    grey = F.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
    slopes = F.conv2d(grey, torch.stack([SOBEL, SOBEL.T])[:, None].to(x))
    return {"gradient": slopes.norm(dim=1), "deviation": local_deviation(x).view_as(x[:, 0])}


@torch.inference_mode()
def measure_masks(
    students: dict[str, str],
    *,
    count: int,
    timesteps: Sequence[int] = (0, 50, 150, 300, 450, 600, 750, 900),
    pixels: int = 32,
    seed: int = 3,
    teacher: str | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """What ``students`` (export folders by name) keep of ``count`` shapes of ``pixels`` x ``pixels``, two at least.

    ``seed``: of shapes and noise; 0 to 2 are those of other sets of the study. ``teacher``: a pipeline whose x0
    estimate is looked at too.

    Returns what `table` and `plot` take, ready for JSON. ``rows``, by name: ``kind`` (student, untrained, detector or
    supervision) and ``by_t``, a list over the timesteps of ``auc`` by unit and target (``mean`` over the images and
    its ``standard_error``; ``sigma`` in pixels where a blur was chosen) and, of students, ``kept`` (tokens, mean and
    ``kept_deviation`` over the images) and ``inside`` (the share of all kept tokens that is on the object). A student
    has an untrained row where ``start`` lies beside its folder, as `finetune` leaves it. ``area``: the targets' share
    of units. ``judged``: images of which an AUC exists. ``maps``: pictures of the first student, bytes in hex.

    Raises:
        UpcycleError: a student is none, or has another noise schedule than the first; or as `load_pipeline`.
        ValueError: ``pixels`` is no multiple of 4.
    """
    if pixels % WINDOW:
        raise ValueError(f"{pixels} pixels are no whole number of windows of {WINDOW}")
    shapes = make_shapes(count, seed, pixels)
    targets, timesteps = targets_of(shapes.masks), list(timesteps)
    noise = torch.randn(shapes.images.shape, generator=torch.Generator().manual_seed(seed))
    name, folder = next(iter(students.items()))
    alpha_bar = load_pipeline(folder).scheduler.alphas_cumprod
    signal = alpha_bar[timesteps][:, None, None, None, None]
    x_t = signal.sqrt() * shapes.images + (1 - signal).sqrt() * noise

    def opened(folder: str) -> DiTPipeline:
        pipe = load_pipeline(folder).to(device)
        if not torch.allclose(pipe.scheduler.alphas_cumprod, alpha_bar):
            raise UpcycleError(f"{folder} has another noise schedule than the first student; measure it on its own")
        return pipe

    rows: dict[str, dict[str, Any]] = {}
    shown, shown_at = _spread(count, SHOWN), _spread(len(timesteps), SHOWN)
    probability = []
    for kind, label, path in _folders(students):
        pipe, by_t = opened(path), []
        if not isinstance(pipe.transformer, ChunkedDiT):
            raise UpcycleError(f"{path} is no student: its transformer does not route; give an export of finetune")
        for k, t in enumerate(timesteps):
            routing = [answer.routing for answer in _ask(pipe, x_t[k], t, shapes.labels)]
            logit, kept = (torch.cat([getattr(r, part) for r in routing]).cpu() for part in ("logit", "mask"))
            if label == name and k in shown_at:
                found = torch.cat([r.probability for r in routing])[shown]
                probability.append(found.float().cpu().view(-1, pixels, pixels))
            tokens = kept.sum(1).double()
            inside = (kept & shapes.masks.flatten(1)).sum() / kept.sum()
            counted = {"kept": tokens.mean().item(), "kept_deviation": tokens.std().item(), "inside": inside.item()}
            by_t.append({"t": t, **counted, "auc": _aucs(logit.view_as(shapes.masks), targets)})
        rows[label] = {"kind": kind, "folder": path, "by_t": by_t}
    for k, t in enumerate(timesteps):
        blurred = [detectors(gaussian_blur(x_t[k], 6 * sigma + 1, sigma)) for sigma in SIGMAS]
        for label, found in detectors(x_t[k]).items():
            best = _best([_aucs(maps[label], targets) for maps in blurred])
            for row, numbers in ((label, _aucs(found, targets)), (f"{label}, blurred", best)):
                rows.setdefault(row, {"kind": "detector", "by_t": []})["by_t"].append({"t": t, "auc": numbers})
    if teacher is not None:
        pipe, by_t = opened(teacher), []
        for k, t in enumerate(timesteps):
            epsilon = torch.cat([answer.sample[:, :3] for answer in _ask(pipe, x_t[k], t, shapes.labels)]).cpu()
            estimate = predicted_x0(x_t[k], epsilon, alpha_bar[t].expand(count), 1.0)  # images are in [-1, 1]
            by_t.append({"t": t, "auc": _aucs(local_deviation(estimate).view_as(shapes.masks), targets)})
        rows["deviation of the teacher's x0"] = {"kind": "supervision", "folder": teacher, "by_t": by_t}

    def over_targets(number: Any) -> dict[str, dict[str, float]]:
        return {u: {what: number(targets[u][what]) for what in TARGETS} for u in UNITS}

    return {
        "images": count,
        "pixels": pixels,
        "seed": seed,
        "timesteps": timesteps,
        "area": over_targets(lambda target: target.float().mean().item()),
        "judged": over_targets(lambda target: int((target.any(1) & ~target.all(1)).sum())),
        "rows": rows,
        "maps": {
            "student": name,
            "images": shown,
            "timesteps": [timesteps[k] for k in shown_at],
            "x_t": _hex(x_t[shown_at][:, shown] / 2 + 0.5),
            "probability": _hex(torch.stack(probability)),
            "mask": _hex(shapes.masks[shown].float()),
        },
    }


def _folders(students: dict[str, str]) -> list[tuple[str, str, str]]:
    """Kind, name and folder of the students, and then of the grafts that they started from."""
    starts = {name: Path(folder).parent / "start" for name, folder in students.items()}
    trained = [("student", name, folder) for name, folder in students.items()]
    return trained + [("untrained", f"{name}, untrained", str(s)) for name, s in starts.items() if s.exists()]


def _ask(pipe: DiTPipeline, x: torch.Tensor, t: int, labels: torch.Tensor) -> list[Any]:
    """The transformer's answers to x_t [n, C, H, W], in batches, on its device."""
    pairs = zip(x.to(pipe.device).split(BATCH), labels.to(pipe.device).split(BATCH), strict=True)
    return [pipe.transformer(part, timestep=torch.full_like(y, t), class_labels=y) for part, y in pairs]


def _aucs(found: torch.Tensor, targets: Targets) -> dict[str, dict[str, dict[str, float]]]:
    """AUCs of maps [n, H, W] by unit and target, over the images that have one."""
    # In fp64, so that windows of the same values in another order tie too.
    mean = F.avg_pool2d(found[:, None].double(), WINDOW).flatten(1)
    result: dict[str, dict[str, dict[str, float]]] = {}
    for unit, scores in (("windows", mean), ("positions", found.flatten(1))):
        result[unit] = {}
        for what, target in targets[unit].items():
            each = auc(scores, target)
            each = each[~each.isnan()]
            error = each.std() / len(each) ** 0.5 if len(each) > 1 else torch.tensor(torch.nan)
            result[unit][what] = {"mean": each.mean().item(), "standard_error": error.item()}
    return result


def _best(by_sigma: list[dict[str, dict[str, dict[str, float]]]]) -> dict[str, dict[str, dict[str, float]]]:
    """The sigma with the highest AUC, for every unit and target on its own: no real detector could choose so."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for unit in UNITS:
        result[unit] = {}
        for what in TARGETS:
            options = [{**maps[unit][what], "sigma": s} for maps, s in zip(by_sigma, SIGMAS, strict=True)]
            result[unit][what] = max(options, key=lambda option: option["mean"])
    return result


def _spread(n: int, most: int) -> list[int]:
    """At most so many of n indices, evenly spread, both ends among them."""
    return sorted({round(i * (n - 1) / (most - 1)) for i in range(most)})


def _hex(x: torch.Tensor) -> str:
    return (x.clamp(0, 1) * 255).round().byte().numpy().tobytes().hex()


def _array(text: str, *shape: int) -> np.ndarray:
    """What `_hex` was given, in 256 steps."""
    return np.frombuffer(bytes.fromhex(text), np.uint8).reshape(shape) / 255


# -- the report --------------------------------------------------------------------------------------------------------


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
    for unit in UNITS:
        for what in TARGETS:
            numbers = {name: [r["auc"][unit][what] for r in row["by_t"]] for name, row in rows.items()}
            errors = [n["standard_error"] for found in numbers.values() for n in found if _known(n["standard_error"])]
            text += _section(
                f"AUC, {of[unit][what]} ({area[unit][what]:.0%}; {report['judged'][unit][what]} images; "
                f"standard errors up to {max(errors, default=float('nan')):.3f})",
                head, {name: [_auc_text(n) for n in found] for name, found in numbers.items()},
            )  # fmt: skip
    return text + (
        f"By window: of means over {WINDOW} x {WINDOW} positions, in which the lattice cancels. Of blurred detectors, "
        f"σ in parentheses is the better one of {SIGMAS[0]} and {SIGMAS[1]} pixels, chosen with the true masks for "
        "every number: that favours them.\n"
    )


def _section(title: str, head: list[str], rows: dict[str, list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([name, *cells] for name, cells in rows.items())]
    return f"**{title}**\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n\n"


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
        if row["kind"] == "supervision":
            styles[name] = {"color": "#1a1a2e", "linewidth": 1.6, "linestyle": ":"}
    return styles


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", action="append", required=True, metavar="NAME=FOLDER", help="may be repeated")
    parser.add_argument("--teacher", help="also judge the map that the router is supervised with")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("masks"))
    options = parser.parse_args()
    for given in options.student:
        if "=" not in given:
            parser.error(f"--student {given}: give NAME=FOLDER")
    students = dict(given.rsplit("=", 1) for given in options.student)  # "N = 16" is a name
    report = measure_masks(
        students, count=options.count, pixels=options.pixels, seed=options.seed, teacher=options.teacher
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "report.json").write_text(to_json(report) + "\n")
    (options.out / "tables.md").write_text(table(report))
    plot(json.loads(to_json(report)), options.out / "masks.png")
    print(table(report))


if __name__ == "__main__":
    main()
