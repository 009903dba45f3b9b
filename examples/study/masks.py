"""Does the router learn what is claimed? Tokens and boundary logits of students beside the true masks of the shapes.

    python examples/study/masks.py --student exact=runs/study/shapes/exact-0/run/export --out masks

Held-out shapes are noised to each timestep, the noise of an image being the same at every timestep and for every
student. Counted are the tokens kept and how many of them lie on the object. The boundary logit is read as a detector:
its area under the ROC curve (AUC) against two targets, the object's mask and the band of its outline, an image at a
time. Beside it stand the untrained graft that a student started from, plain detectors on the same x_t, what the router
is supervised with, and two maps that look at no image: the mean mask of other shapes, and that of the image's class.

On a grid the logit alternates between neighbours by construction, which lowers the AUC by position whatever the router
knows. So every AUC is given twice: by position, and by window, of means over 4 x 4 positions, in which the lattice of a
teacher of patch 2 cancels. Students and the teacher are told the class, which detectors are not; what there is to know
of an image without seeing it is in the mean mask of its class.

A lean student's logit has the local detail of x_t in it from the start, as a fixed term: without much noise the
untrained graft finds the object too. What was learned is the difference between a student and its untrained row.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiTPipeline
from masks_report import TARGETS, UNITS, plot, table
from shapes import CLASSES, make_shapes
from torchvision.transforms.functional import gaussian_blur

from upcycle.errors import UpcycleError
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.output import to_json
from upcycle.provenance import digest
from upcycle.sampling.pipeline import load_pipeline
from upcycle.training.losses import local_deviation, predicted_x0

WINDOW = 4
SIGMAS = (1, 2)
SHOWN = 4
BATCH = 50
PRIOR_IMAGES = 2000
SOBEL = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
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

    ``seed``: of shapes and noise; 0 to 2 are those of other sets of the study, and the next one is that of the shapes
    whose mean masks are looked at too. ``teacher``: a pipeline whose x0 estimate is looked at too.

    Returns what `table` and `plot` take, ready for JSON. ``rows``, by name: ``kind`` (student, untrained, detector,
    prior or supervision) and ``by_t``, a list over the timesteps of ``auc`` by unit and target (``mean`` over the
    images and its ``standard_error``; ``sigma`` in pixels where a blur was chosen) and, of students, ``kept`` (tokens,
    mean and ``kept_deviation`` over the images) and ``inside`` (the share of all kept tokens that is on the object). A
    student has an untrained row where ``start`` lies beside its folder, as `finetune` leaves it; equal starts have one.
    ``area``: the targets' share of units. ``judged``: images of which an AUC exists. ``maps``: pictures of the first
    student, bytes in hex.

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
    for label, prior in _priors(shapes.labels, pixels, seed + 1).items():
        found = _aucs(prior, targets)  # of all timesteps: it looks at nothing
        rows[label] = {"kind": "prior", "by_t": [{"t": t, "auc": found} for t in timesteps]}
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
    found = [("student", name, folder) for name, folder in students.items()]
    seen = set()
    for name, folder in students.items():
        start = Path(folder).parent / "start"
        weights = start / "transformer" / "diffusion_pytorch_model.safetensors"
        if weights.is_file() and (bits := digest(weights)) not in seen:
            seen.add(bits)
            found.append(("untrained", f"{name}, untrained", str(start)))
    return found


def _priors(labels: torch.Tensor, pixels: int, seed: int) -> dict[str, torch.Tensor]:
    """Maps [n, H, W] of images with ``labels`` that look at no image: mean masks of other shapes."""
    others = make_shapes(PRIOR_IMAGES, seed, pixels)
    by_class = torch.stack([others.masks[others.labels == k].float().mean(0) for k in range(len(CLASSES))])
    return {
        "mean mask": others.masks.float().mean(0).expand(len(labels), -1, -1),
        "mean mask of the class": by_class[labels],
    }


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
