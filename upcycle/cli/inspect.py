"""`upcycle inspect`: pictures and numbers of what a student does, in one page."""

import math
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from upcycle.errors import UpcycleError

EPILOG = """
[bold]Examples[/bold]\n
  upcycle inspect upcycle-demo/pipeline -o inspection        # then open inspection/report.html\n
  upcycle inspect DiT-XL-2-256-dc4 --classes 207,360 --num 8 --sampler ddpm --steps 250\n
  upcycle inspect DiT-XL-2-256-dc4 --images imagenet/val --timesteps 900,500,100\n
  upcycle inspect upcycle-demo/pipeline --tail-drop 0.3 --json\n
"""


def inspect(
    model: Annotated[str, typer.Argument(help="A student: an export folder or a Hub id.")],
    classes: Annotated[
        str | None,
        typer.Option(help="Class ids or names, separated by commas; names may hold no comma. Default: the first ten."),
    ] = None,
    num: Annotated[int, typer.Option(min=1, help="Images per class.")] = 4,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the first image; the next count up.")] = 0,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Sampling steps.")] = 50,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")] = 4.0,
    sampler: Annotated[
        Literal["ddim", "ddpm", "dpm-solver++", "unipc"] | None,
        typer.Option(help="ddpm is Meta's. Default: the pipeline's own."),
    ] = None,
    tail_drop: Annotated[
        str | None,
        typer.Option(metavar="ρ|t:ρ,...", help="Share of the kept tokens to drop, 0 to 1. Default: the export's own."),
    ] = None,
    uncond_tail_drop: Annotated[
        str | None, typer.Option(metavar="ρ|t:ρ,...", help="Of the unconditional half, Lite-CFG. Default: as above.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(metavar="M|t:M,...", help="Keep M tokens of every sample instead.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="SHARE|nT", help="Instead: 0.6 of the teacher's cost, or 40T, TFLOPs an image."),
    ] = None,
    images: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="Real images, too, noised to --timesteps: one sub-folder a class, as for encode."
        ),
    ] = None,
    timesteps: Annotated[str, typer.Option(metavar="t,t,...", help="Of --images.")] = "900,700,500,300,150,50,0",
    batch_size: Annotated[
        int, typer.Option(min=1, help="Images at a time; the measured speed is that of such batches.")
    ] = 10,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ... Default: cuda where there is one.")] = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Output folder: report.html, report.json and a PNG a figure.")
    ] = Path("inspection"),
    as_json: Annotated[bool, typer.Option("--json", help="The report on stdout.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder.")] = False,
) -> None:
    """See what a student does: which tokens it keeps at each step, whether that follows the detail, and its speed."""
    from upcycle.sampling import budget as budgets

    asked = budgets.parse(
        {"--tail-drop": tail_drop, "--uncond-tail-drop": uncond_tail_drop, "--tokens": tokens, "--budget": budget}
    )
    if not math.isfinite(guidance_scale):
        raise UpcycleError(f"--guidance-scale {guidance_scale} is not a number to guide with; 4 is usual, 1 is none")
    times = _timesteps(timesteps)
    local = os.path.exists(model)
    if local and revision is not None:
        raise UpcycleError(f"{model}: a local path has no revisions; leave --revision out")
    keep = tuple(Path(path) for path in (model, images) if path is not None and os.path.exists(path))

    from upcycle.cli.show import print_json, progress, quiet_libraries, stdout, working

    quiet_libraries()
    with working(f"loading {model}"):
        from upcycle.cli.device import to_device
        from upcycle.cli.sample import parse_classes
        from upcycle.evaluation.speed import machine
        from upcycle.inspection import images as real
        from upcycle.inspection import look, report
        from upcycle.models.chunked_dit import ChunkedDiT
        from upcycle.output import check_output, new_folder
        from upcycle.sampling.pipeline import class_count, load_pipeline
        from upcycle.sampling.sampler import Sampling, set_sampler

        check_output(out, force, keep)
        pipe = load_pipeline(model, revision)
        if not isinstance(pipe.transformer, ChunkedDiT):
            has_adapter = hasattr(pipe.transformer, "ddit")
            instead = (
                "its patch sizes are drawn by upcycle sample" if has_adapter else "convert it, and give the student"
            )
            raise UpcycleError(f"{model} is a DiT of fixed patches, which has no router to look at; {instead}")
        count = class_count(pipe)
        labels = parse_classes(classes, pipe.labels, count) if classes is not None else list(range(min(10, count)))
        chosen = real.choose(pipe, images, labels if classes is not None else None, num) if images else None
        if sampler is not None:
            set_sampler(pipe, sampler)
        budgets.put_on(pipe.transformer, asked, steps, guidance_scale > 1)
        to_device(pipe, device)
    labels = [label for label in labels for _ in range(num)]
    seeds = [seed + i for i in range(len(labels))]
    with progress() as bar:
        task = bar.add_task("sampling", total=len(look.batches(len(labels), batch_size)) * steps)
        sampling = Sampling(steps, guidance_scale)
        seen = look.look_at_sampling(pipe, labels, seeds, sampling, batch_size, lambda: bar.advance(task))
        by, spends = sampler or type(pipe.scheduler).__name__, _spends(pipe.transformer)
        made = f"{model}, {by}, {steps} steps, guidance {guidance_scale:g}, {spends}, seeds {_range(seeds)}."
        names = [(f"class{labels[i]:04d}-seed{seeds[i]}", f"seed {seeds[i]}") for i in seen.shown]
        drops = look.look_at_tail_drops(pipe, seen)
        sections = [report.Section("While sampling", "samples", made, seen, drops, names)]
        if chosen is not None:
            listed, items, classes_of = chosen
            task = bar.add_task("real images", total=len(look.batches(len(items), batch_size)) * len(times))
            clean = real.read(pipe, listed, items)
            noise = [seed + i for i in range(len(items))]
            seen = look.look_at_latents(pipe, clean, classes_of, noise, times, batch_size, lambda: bar.advance(task))
            made = f"{model}, images of {images}, {spends}, noise of seeds {_range(noise)}."
            drops = look.look_at_tail_drops(pipe, seen)
            names = [(str(i + 1), f"image {listed.names[items[i]]}, noise of seed {noise[i]}") for i in seen.shown]
            sections.append(report.Section("On real images, noised", "images", made, seen, drops, names))
    where = machine(pipe.device)
    facts = {
        "model": model,
        "sampler": f"{by}, {steps} steps, guidance {guidance_scale:g}",
        "budget": spends,
        "samples": f"{num} of each of {len(labels) // num} classes, seeds {_range(seeds)}",
        "batches": f"of at most {batch_size} images; times are of such batches",
        "machine": where,
        "command": shlex.join(["upcycle", *sys.argv[1:]]),
    }
    settings = {
        "model": model, "sampler": by, "sampling_steps": steps, "guidance_scale": guidance_scale,
        "budget": spends, "seed": seed, "batch_size": batch_size, "machine": where,
    }  # fmt: skip
    with working("drawing"), new_folder(out, force, keep=keep) as folder:
        numbers = report.write(folder, pipe, f"What {model} does", facts, sections, settings)
    if as_json:
        print_json(numbers)
        return
    n = numbers["samples"]
    stdout.print(
        f"tokens kept: {n['tokens']:.1f} of {n['positions']} positions ({n['compared_with']['what']}: "
        f"{n['compared_with']['tokens']:g})"
    )
    stdout.print(f"time: {n['ms_per_image'] / 1000:.3g} s per image on {where}")
    if n["detail_correlation"] == n["detail_correlation"]:
        stdout.print(f"boundary probability and detail: Spearman's correlation {n['detail_correlation']:.2f}")
    stdout.print(str(out / "report.html"), style="bold")


def _spends(student: Any) -> str:
    """The budget that a student has, for people."""
    from upcycle.sampling.budget import told

    if student.tokens is not None:
        return f"{told(student.tokens)} tokens"
    uncond = student.uncond_tail_drop
    return f"ρ = {told(student.tail_drop)}" + (f", {told(uncond)} unconditional" if uncond is not None else "")


def _timesteps(text: str) -> list[int]:
    """``900,700,...``, from noise to image; raises `UpcycleError`."""
    try:
        times = sorted({int(part) for part in text.split(",")}, reverse=True)
    except ValueError:
        times = []
    if not times or not 0 <= times[-1] <= times[0] <= 999:
        raise UpcycleError(f"--timesteps {text} is no list of timesteps from 0 to 999, such as 900,500,100")
    return times


def _range(seeds: list[int]) -> str:
    return str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
