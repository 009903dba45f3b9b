"""The report of an inspection: figures as PNG, the numbers as JSON, and one HTML file that needs nothing else."""

import base64
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTPipeline

from upcycle.evaluation import plots
from upcycle.inspection.look import Seen, TailDrops
from upcycle.output import to_json
from upcycle.sampling.sampler import decode

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a2e; --muted: #5b6478; --page: #ffffff; --line: #d9dee8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8eaf0; --muted: #a3acbd; --page: #14161c; --line: #333947; } }
body { margin: 0 auto; max-width: 1120px; padding: 1rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 1.5rem;
  margin-bottom: 1.5rem; }
.curves { grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0; max-width: 560px; }
img { display: block; width: 100%; max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
figcaption { margin-top: .4rem; font-size: .95rem; }
small, .made { color: var(--muted); font-size: .85rem; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem .2rem 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, .words td { text-align: left; } .words th { white-space: nowrap; }
.wide { overflow-x: auto; } summary { cursor: pointer; } code { font-size: .85rem; }
"""


@dataclass
class Picture:
    """A figure of the report: its file, what it shows in words for who cannot see it, and its caption."""

    file: str
    alt: str
    caption: str


@dataclass
class Section:
    """What was looked at, and how: ``made`` is one line for people; ``stem`` begins the names of its files."""

    title: str
    stem: str
    made: str
    seen: Seen
    drops: TailDrops
    names: list[tuple[str, str]]
    """Of the samples with maps: for their files, and for people."""


def write(
    folder: Path,
    pipe: DiTPipeline,
    title: str,
    facts: dict[str, str],
    sections: list[Section],
    settings: dict[str, Any],
) -> dict[str, Any]:
    """Write every figure, ``report.json`` and ``report.html`` into ``folder``; returns what the JSON holds."""
    classes = _class_names(pipe)
    numbers = {section.stem: _numbers(pipe, section.seen, section.drops) for section in sections}
    report = {**settings, **numbers}
    body = [f"<h1>{escape(title)}</h1>", f"<p>{_summary(numbers[sections[0].stem])}</p>"]
    for section in sections:
        pictures = _draw(folder, pipe, section, numbers[section.stem], classes)
        figures = [_figure(folder, picture, section.made) for picture in pictures]
        maps = len(section.names)
        body.append(f'<h2>{escape(section.title)}</h2><div class="figures">{"".join(figures[:maps])}</div>')
        body.append(f'<div class="figures curves">{"".join(figures[maps:])}</div>')
        body.append(_table(numbers[section.stem]["steps"]))
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items())
    body.append(f'<h2>How it was made</h2><table class="words">{rows}</table>')
    html = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{STYLE}</style></head>'
        f"<body>{''.join(body)}</body></html>\n"
    )
    (folder / "report.html").write_text(html, encoding="utf-8")
    (folder / "report.json").write_text(to_json(report) + "\n")
    return report


def _reference(pipe: DiTPipeline) -> tuple[float, str]:
    """Tokens to compare with: of the teacher's grid, or what training aimed at where no grid is known."""
    c = pipe.transformer.config
    if c.scaffold == "paper":
        return c.sample_size**2 / c.ratio, "aim of the training"
    return float((c.sample_size // c.patch_size) ** 2), "teacher's grid"


def _class_names(pipe: DiTPipeline) -> dict[int, str]:
    """Labels with the first of their names, where there is one."""
    names: dict[int, str] = {}
    for name, label in pipe.labels.items():
        names.setdefault(label, name)
    return names


def _numbers(pipe: DiTPipeline, seen: Seen, drops: TailDrops) -> dict[str, Any]:
    """What ``report.json`` says of a section; deviations are those of a sample, NaN becomes null."""
    kept, labels = seen.kept.double(), torch.tensor(seen.labels)
    milliseconds = 1000 * seen.seconds
    steps = [
        {
            "t": t,
            "tokens": kept[k].mean().item(),
            "tokens_deviation": _deviation(kept[k]),
            "tokens_least": int(kept[k].min()),
            "tokens_most": int(kept[k].max()),
            "ms_per_image": milliseconds[k].mean().item(),
            "ms_per_image_least": milliseconds[k].min().item(),
            "ms_per_image_most": milliseconds[k].max().item(),
            "detail_correlation": seen.correlation[k].nanmean().item(),
            "detail_correlation_deviation": _deviation(seen.correlation[k][~seen.correlation[k].isnan()]),
        }
        for k, t in enumerate(seen.timesteps)
    ]
    of_class = {label: kept[:, labels == label].mean(0) for label in dict.fromkeys(seen.labels)}
    reference, what = _reference(pipe)
    return {
        "images": len(seen.labels),
        "tokens": kept.mean().item(),
        "tokens_deviation": _deviation(kept.mean(0)),
        "positions": seen.mask[0, 0].numel(),
        "compared_with": {"tokens": reference, "what": what},
        "ms_per_image": milliseconds.sum(0).mean().item(),
        "detail_correlation": seen.correlation.nanmean().item(),
        "steps": steps,
        "classes": [
            {"class": label, "images": len(tokens), "tokens": tokens.mean().item(),
             "tokens_deviation": _deviation(tokens)}
            for label, tokens in of_class.items()
        ],
        "tail_drops": [
            {"t": t, "tail_drop": rho, "tokens": int(drops.mask[k, r].sum()), "noise_change": drops.change[k, r].item()}
            for k, t in enumerate(drops.timesteps)
            for r, rho in enumerate(drops.tail_drops)
        ],
    }  # fmt: skip


def _deviation(values: torch.Tensor) -> float:
    return values.double().std().item() if len(values) > 1 else float("nan")


def _summary(n: dict[str, Any]) -> str:
    steps, correlation = n["steps"], n["detail_correlation"]
    least, most = (choose(steps, key=lambda step: step["tokens"]) for choose in (min, max))
    span = (
        "the same at every step"
        if least["tokens"] == most["tokens"]
        else f"from {least['tokens']:.1f} at t = {least['t']} to {most['tokens']:.1f} at t = {most['t']}"
    )
    with_detail = "" if correlation != correlation else (
        f" Where the clean image has detail, the boundary probability is higher: Spearman’s correlation is "
        f"{correlation:.2f} on average over the steps."
        if correlation > 0.05
        else f" The boundary probability does not follow the image’s detail: Spearman’s correlation is "
        f"{correlation:.2f}."
    )  # fmt: skip
    return (
        f"The router keeps <b>{n['tokens']:.1f} of {n['positions']}</b> positions on average over steps and images "
        f"({n['compared_with']['what']}: {n['compared_with']['tokens']:g}), {span}.{with_detail}"
    )


def _draw(
    folder: Path, pipe: DiTPipeline, section: Section, n: dict[str, Any], classes: dict[int, str]
) -> list[Picture]:
    seen, drops, stem = section.seen, section.drops, section.stem
    times = [seen.timesteps[k] for k in seen.shown_at]
    reference = _reference(pipe)
    sampling = stem == "samples"
    pictures = []

    def picture(file: str, alt: str, caption: str) -> Path:
        pictures.append(Picture(f"{stem}-{file}.png", alt, caption))
        return folder / pictures[-1].file

    def images(latents: torch.Tensor) -> torch.Tensor:
        return decode(pipe, latents.flatten(0, -4).to(pipe.device)).cpu().unflatten(0, latents.shape[:-3])

    def called(label: int) -> str:
        return f"class {label}" + (f" ({name})" if (name := classes.get(label)) not in (None, str(label)) else "")

    for s, (name, origin) in enumerate(section.names):
        i = seen.shown[s]
        first, last = (int(seen.mask[s, k].sum()) for k in (0, -1))
        who = f"{called(seen.labels[i])}, {origin}"
        path = picture(
            f"map-{name}",
            f"Grid of pictures of {who}: for {len(times)} timesteps from t = {times[0]} to {times[-1]} the noisy "
            f"image, the predicted clean one, the boundary probability and the positions kept; {first} tokens at "
            f"first, {last} at last.",
            f"{who[0].upper() + who[1:]}. Each row is a timestep: the noisy "
            "xₜ, the x₀ that the model predicts from it, the router’s boundary probability at each position, and in "
            "red the positions kept, on the predicted x₀.",
        )
        plots.trajectory(images(seen.x_t[s]), images(seen.x_0[s]), seen.probability[s], seen.mask[s], times, path)

    k = max(range(len(n["steps"])), key=lambda k: n["steps"][k]["tokens"])
    most, ms = n["steps"][k], [step["ms_per_image"] for step in n["steps"]]
    count = seen.seconds.shape[1]
    path = picture(
        "tokens",
        f"Two curves against t. Tokens kept: {n['tokens']:.1f} on average, most at t = {most['t']} with "
        f"{most['tokens']:.1f}. Time of a step: {min(ms):.3g} to {max(ms):.3g} milliseconds an image.",
        f"Above: tokens kept at each timestep, the mean of {n['images']} images and from the least to the most of "
        "them. Below: measured time of a step an image"
        + (", with the sampler’s arithmetic and, if guided, both halves of the batch" if sampling else ", unguided")
        + (f"; mean of {count} batches, and the fastest and slowest." if count > 1 else "; one batch."),
    )
    plots.tokens_and_speed(seen.timesteps, seen.kept, 1000 * seen.seconds, n["positions"], reference, path)

    values = [
        step["detail_correlation"] for step in n["steps"] if step["detail_correlation"] == step["detail_correlation"]
    ]
    span = f"between {min(values):.2f} and {max(values):.2f}" if values else "not defined, one of the two is constant"
    path = picture(
        "detail",
        f"Curve against t of Spearman's correlation of boundary probability and local detail: {span}.",
        "Does the router look at detail? Spearman’s rank correlation, over the positions of an image, of the boundary "
        "probability with the standard deviation of the clean latents in the 3×3 positions around; mean of the "
        f"{n['images']} images, and from the least to the most. The clean latents are "
        + ("those that the run ends with." if sampling else "those of the real image.")
        + ("" if values else " Here one of the two is the same everywhere, and there is no correlation."),
    )
    plots.detail_correlation(seen.timesteps, seen.correlation, path)

    path = picture(
        "tail-drop",
        f"Grid of pictures: positions kept at {len(drops.timesteps)} timesteps for tail drops "
        f"{', '.join(f'{rho:g}' for rho in drops.tail_drops)}; tokens at the last timestep: "
        f"{', '.join(str(int(mask.sum())) for mask in drops.mask[-1])}.",
        f"What tail dropping takes away, {called(drops.label)}, seed {drops.seed}: the same xₜ, without guidance, at "
        "growing ρ. In red the positions kept, on the x₀ predicted with them; below it the change of the predicted "
        "noise from that at ρ = 0, root mean square, as a share of it (at small t of a noise that is hardly there).",
    )
    plots.tail_drops(images(drops.x_0), drops.mask, drops.change, drops.tail_drops, drops.timesteps, path)

    labels = torch.tensor(seen.labels)
    each = [seen.kept[:, labels == row["class"]].double().mean(0) for row in n["classes"]]
    low, high = (choose(n["classes"], key=lambda row: row["tokens"]) for choose in (min, max))
    path = picture(
        "classes",
        f"Bar chart of tokens kept for {len(each)} classes, from {low['tokens']:.1f} ({called(low['class'])}) to "
        f"{high['tokens']:.1f} ({called(high['class'])}).",
        "The budget of each class: tokens kept on average over the steps; the bar is the mean of the class’s images, "
        "which are the points.",
    )
    plots.by_class([classes.get(row["class"], str(row["class"])) for row in n["classes"]], each, reference, path)
    return pictures


def _figure(folder: Path, picture: Picture, made: str) -> str:
    data = base64.b64encode((folder / picture.file).read_bytes()).decode()
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{escape(picture.alt)}">'
        f"<figcaption>{escape(picture.caption)} <small>{escape(made)}</small></figcaption></figure>"
    )


def _table(steps: list[dict[str, Any]]) -> str:
    def number(value: float, digits: int) -> str:
        return "–" if value != value else f"{value:.{digits}f}"

    rows = "".join(
        f"<tr><td>{step['t']}</td><td>{number(step['tokens'], 1)}</td><td>{number(step['tokens_deviation'], 1)}</td>"
        f"<td>{step['tokens_least']}–{step['tokens_most']}</td><td>{number(step['ms_per_image'], 2)}</td>"
        f"<td>{number(step['detail_correlation'], 2)}</td></tr>"
        for step in steps
    )
    head = "".join(f"<th>{name}</th>" for name in ("t", "tokens", "±", "range", "ms", "corr."))
    return (
        "<details><summary>The numbers, timestep by timestep</summary>"
        '<p class="made">Tokens kept: mean, standard deviation and range over the images; milliseconds of a step an '
        "image; Spearman’s correlation with detail.</p>"
        f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div></details>'
    )
