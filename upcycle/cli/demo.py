"""`upcycle demo`: the whole way once, offline, on the shipped digits."""

from pathlib import Path
from typing import Annotated, Any

import typer

EPILOG = """
[bold]Examples[/bold]\n
  upcycle demo\n
  upcycle demo --steps 100 -o quick-look --json\n
"""


def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="Output folder.")] = Path("upcycle-demo"),
    steps: Annotated[int | None, typer.Option(help="Training steps. Default: the recipe's.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Positions per token kept. Default: the recipe's.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of training and of the first sample.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="The report on stdout.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder.")] = False,
) -> None:
    """Convert the shipped teacher, post-train it, export it, load it with stock diffusers, and show the result."""
    from upcycle.cli.show import print_json, progress, quiet_libraries, stderr, stdout, working

    quiet_libraries()
    with working("starting"):
        from upcycle import demo as story
        from upcycle.training.loop import Interrupted

    with progress() as bar:
        try:
            report = story.run_demo(out, bar, steps=steps, ratio=ratio, seed=seed, force=force)
        except Interrupted as interrupted:
            bar.stop()
            stderr.print(f"interrupted at step {interrupted}; a demo cannot be resumed, so nothing of it was kept")
            raise SystemExit(130) from None
    if as_json:
        print_json(report)
    else:
        stdout.print(_table(report), soft_wrap=False)
        for name in ("pipeline", "samples.png", "router.png", "compression.png", "report.json"):
            stdout.print(str(out / name))


def _table(report: dict[str, Any]) -> Any:
    from rich.table import Table

    from upcycle.cli.show import count

    teacher, student = report["teacher"], report["student"]
    table = Table(title=f"upcycle demo: {report['steps']} steps in {report['seconds']['training']:.0f} s")
    for column in ("", "teacher", "student"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("largest difference at the start", "", f"{report['max_abs_diff_at_start']:.1e}")
    table.add_row("validation loss", f"{teacher['val_loss']:.4f}", f"{student['val_loss']:.4f}")
    tokens = report["tokens_kept"]
    table.add_row("tokens kept, sampling", str(teacher["tokens"]), f"{tokens:.1f} of {report['positions']}")
    table.add_row("FLOPs per image", count(teacher["flops_per_image"]), count(student["flops_per_image"]))
    table.add_row("seconds per image", f"{teacher['seconds_per_image']:.3f}", f"{student['seconds_per_image']:.3f}")
    return table
