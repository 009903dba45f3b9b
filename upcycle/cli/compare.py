"""`upcycle compare`: models and settings side by side, from the same noise."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from upcycle.cli.sampler import check_scale, made_hold, parse_hold
from upcycle.errors import UpcycleError

EPILOG = """
[bold]Examples[/bold]\n
  upcycle compare digits runs/digits/export --guidance-scale 2 -o comparison\n
  upcycle compare facebook/DiT-XL-2-256 runs/xl4/export --classes 207,360 --tail-drop 0,0.4 -o comparison\n
  upcycle compare digits runs/digits/export --tail-drop 0.3 --hold 2,0.1 -o comparison      # and with held steps\n
  upcycle compare runs/a/export runs/b/export --num 4 --sampler dpm-solver++ --steps 20 --json\n
"""


def compare(
    models: Annotated[
        list[str],
        typer.Argument(metavar="A B...", help="Exports, pipeline folders, Hub ids, or digits; the first is the judge."),
    ],
    classes: Annotated[
        str | None, typer.Option(help="Class ids or names, separated by commas. Default: the first ten.")
    ] = None,
    num: Annotated[int, typer.Option(help="Images per class.")] = 1,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the first image; the next count up.")] = 0,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 50,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")] = 4.0,
    sampler: Annotated[Literal["ddim", "ddpm", "dpm-solver++", "unipc"], typer.Option(help="Of all models.")] = "ddim",
    tail_drop: Annotated[
        str | None, typer.Option(metavar="ρ,ρ", help="Of every student, a row each. Default: 0,0.3,0.6.")
    ] = None,
    hold: Annotated[
        str | None,
        typer.Option(
            metavar="K|LIMIT,...",
            help="More rows, with held steps: ask in every K-th only (2,3), or where x has moved by a limit (0.1).",
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 16,
    repeats: Annotated[int, typer.Option(help="Timed rounds, in turn, after one that warms up; 0: no times.")] = 2,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ... Default: cuda where there is one.")] = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Output folder: compare.png and compare.json.")] = Path(
        "comparison"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder.")] = False,
) -> None:
    """Draw the same images with several models and settings: a picture, their differences, FLOPs and times."""
    for name, number, least in (("--num", num, 1), ("--steps", steps, 1), ("--batch-size", batch_size, 1),
                                ("--repeats", repeats, 0)):  # fmt: skip
        if number < least:
            raise UpcycleError(f"{name} {number} must be at least {least}")
    if steps > 1000:
        raise UpcycleError(f"--steps {steps} must be at most 1000, the training's timesteps")
    if not math.isfinite(guidance_scale):
        raise UpcycleError(f"--guidance-scale {guidance_scale} is not a number to guide with; 4 is usual, 1 is none")
    check_scale(guidance_scale)
    from upcycle.cli.bench import TAIL_DROPS, parse_drops
    from upcycle.cli.device import enough_memory, to_device
    from upcycle.cli.show import print_json, progress, quiet_libraries, stderr, working

    drops = parse_drops(tail_drop or TAIL_DROPS)
    quiet_libraries()
    with working("loading"):
        from upcycle.cli.sample import parse_classes
        from upcycle.evaluation import compare as measuring
        from upcycle.evaluation.compare_plot import picture
        from upcycle.evaluation.speed import machine
        from upcycle.models.chunked_dit import ChunkedDiT
        from upcycle.output import check_output, new_folder, to_json
        from upcycle.sampling import patches
        from upcycle.sampling.pipeline import class_count, load_pipeline
        from upcycle.sampling.sampler import Sampling, set_sampler

        holds = [None, *(made_hold(parse_hold(part)) for part in hold.split(","))] if hold is not None else [None]
        keep = tuple(Path(model) for model in models if Path(model).exists())
        check_output(out, force, keep)
        variants, pipes = [], {}
        for model in models:
            if model not in pipes:
                pipe = pipes[model] = load_pipeline(model)
                set_sampler(pipe, sampler)
                if hasattr(pipe.transformer, "ddit") and batch_size > 1:
                    limit = any(held is not None and held.limit is not None for held in holds)
                    patches.check_batch(pipe.transformer, balanced=False, limit=limit)
            pipe = pipes[model]
            student = isinstance(pipe.transformer, ChunkedDiT)
            variants += [
                measuring.Variant(model, pipe, Sampling(steps, guidance_scale, hold=how), drop)
                for drop in (drops if student else [None])
                for how in holds
            ]
        if tail_drop is not None and all(variant.tail_drop is None for variant in variants):
            raise UpcycleError("--tail-drop: none of the models drops tokens; leave it out")
        if len(variants) < 2:
            raise UpcycleError(f"{models[0]} alone is nothing to compare; give another model, or --hold")
        measuring.check_comparable(variants)
        first = variants[0].pipe
        count = class_count(first)
        wanted = parse_classes(classes, first.labels, count) if classes is not None else list(range(min(10, count)))
        for pipe in pipes.values():
            to_device(pipe, device)
    for note in (note for pipe in pipes.values() for note in patches.notes(pipe.transformer, steps)):
        stderr.print(f"note: {note}")
    labels = [label for label in wanted for _ in range(num)]
    seeds = [seed + i for i in range(len(labels))]
    with progress() as bar, enough_memory(batch_size):
        turns = len(variants) * (-(-len(labels) // batch_size) * steps + repeats)
        task = bar.add_task("sampling, then in turn against the clock", total=turns)
        rows, images = measuring.compare(
            variants, labels, seeds, batch_size=batch_size, repeats=repeats, step=lambda: bar.advance(task)
        )
    report = {
        "machine": machine(first.device),
        "settings": {"classes": wanted, "num": num, "seed": seed, "steps": steps, "guidance_scale": guidance_scale,
                     "sampler": sampler, "batch_size": batch_size, "repeats": repeats},
        "rows": rows,
    }  # fmt: skip
    with new_folder(out, force, keep=keep) as folder:
        titles = [f"class {label}\nseed {s}" for label, s in zip(labels, seeds, strict=True)]
        picture(rows, images, titles, folder / "compare.png")
        (folder / "compare.json").write_text(to_json(report) + "\n")
    if as_json:
        print_json({"out": str(out), **report})
        return
    _show(report, out)


def _show(report: dict[str, Any], out: Path) -> None:
    from rich.table import Table

    from upcycle.cli.show import count, stdout

    table = Table("", "settings", "tokens", "FLOPs", "s/image", "MSE", "features")
    for row in report["rows"]:
        table.add_row(
            row["model"],
            row["settings"],
            f"{row['tokens_kept']:.1f}",
            f"{count(row['flops_per_image'])}, {row['flops_times_first']:.2f} x",
            "-" if row["times_first"] is None else f"{row['seconds_per_image']:.3g}, {row['times_first']:.2f} x",
            f"{row['mse']:.1e}",
            "-" if row["feature_distance"] is None else f"{row['feature_distance']:.2g}",
        )
    stdout.print(table, soft_wrap=False)
    stdout.print(
        f"on {report['machine']}; MSE: of images in [0, 1], to the first row's; features: distance to the first row's, "
        "in the middle block of the first stock DiT, 1: as far as another seed; s/image: without the VAE"
    )
    stdout.print(str(out / "compare.png"), style="bold")
