"""`upcycle finetune`: post-train a converted model from a recipe."""

import shlex
import time
from pathlib import Path
from typing import Annotated, Any

import typer

EPILOG = """
[bold]Examples[/bold]\n
  upcycle finetune recipes/digits.yaml\n
  upcycle finetune recipes/xl4.yaml --set stages.post-train.steps=1000 --set out=runs/try\n
  upcycle finetune recipes/xl4.yaml --dry-run\n
  upcycle finetune recipes/xl4.yaml --resume\n
  accelerate launch --num_processes 8 -m upcycle finetune recipes/xl4.yaml\n
"""


LINE_SECONDS = 30
"""Where stderr is a file, a line so often instead of a bar."""


def finetune(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe, or the name of a shipped one (upcycle recipes).")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as stages.post-train.lr=0.001."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what the run will cost; write nothing. Data may be missing.")
    ] = False,
    no_measure: Annotated[bool, typer.Option("--no-measure", help="With --dry-run: time no step.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Teach a converted model where tokens are needed; the result is an export like that of `convert`."""
    from upcycle.recipe import load_recipe
    from upcycle.shipped import find_recipe

    checked = load_recipe(find_recipe(recipe), set_ or [])

    from upcycle.cli.show import print_json, progress, quiet_libraries, stderr, stdout, working

    quiet_libraries()
    if dry_run:
        _show_cost(checked, measure=not no_measure, as_json=as_json)
        return
    with working(f"preparing {checked.out}"):
        from upcycle.training import loop, run

        prepared = run.prepare(checked, resume=resume)
    main = run.ranks().is_main_process
    stderr.quiet = stdout.quiet = not main
    last: dict[str, float] = {}
    with progress() as bar:
        task = bar.add_task("finetune", total=checked.steps)

        said = begun = time.monotonic()
        first: int | None = None

        def on_step(row: dict[str, Any]) -> None:
            nonlocal said, first
            last.update(row)
            first = row["step"] - 1 if first is None else first
            bar.status = _describe(row)
            bar.update(task, completed=row["step"], description=row["stage"])
            now = time.monotonic()
            if not stderr.is_terminal and (now - said > LINE_SECONDS or row["step"] == first + 1):
                said = now
                left = (now - begun) / (row["step"] - first) * (checked.steps - row["step"])
                stderr.print(f"step {row['step']} of {checked.steps}, {left / 3600:.2f} h left, {_describe(row)}")

        try:
            export = run.finetune(prepared, resume=resume, on_step=on_step, on_note=bar.console.print)
            bar.update(task, visible=bool(last))
        except loop.Interrupted as interrupted:
            bar.stop()
            options = [word for item in set_ or [] for word in ("--set", item)]
            command = shlex.join(["upcycle", "finetune", str(recipe), *options, "--resume"])
            launched = " (with the launcher, as before)" if run.ranks().num_processes > 1 else ""
            stderr.print(f"saved at step {interrupted}; go on with{launched}: {command}")
            raise SystemExit(130) from None
    run.ranks().destroy_process_group()
    if as_json and main:
        print_json({"out": str(export), "log": str(prepared.out / "log.csv"), **last})
        return
    stdout.print(f"log: {prepared.out / 'log.csv'}")
    stdout.print(str(export), style="bold")


def _describe(row: dict[str, Any]) -> str:
    """What the line below the progress bar says of a step."""
    levels = "/".join("-" if (v := row[key]) != v else f"{v:.0f}" for key in row if key.startswith("tokens_t"))
    particular = f"ratio {row['ratio']:.2f}  tokens {levels}" if "ratio" in row else f"m {row['m']}"
    return f"loss {row['loss']:.4f}  {particular}  {row['step_seconds']:.2f} s/step, {row['data_seconds']:.2f} for data"


def _show_cost(recipe: Any, *, measure: bool, as_json: bool) -> None:
    from upcycle.cli.show import count, print_json, size, stdout, working

    with working(f"estimating {recipe.out}"):
        from upcycle.training import cost, cost_patches, run

        report = (cost_patches if recipe.method == "ddit" else cost).estimate(recipe, measure=measure)
    if not run.ranks().is_main_process:
        return
    if as_json:
        print_json(report)
        return
    from rich.table import Table

    def number(n: float, what: str) -> str:
        return f"{count(n).strip()} {what}"

    batch, parameters = report["batch"], report["parameters"]
    table = Table(show_header=False)
    how = f"{report['ranks']} x {report['device']}" + (", sharded (FSDP)" if report["sharded"] else "")
    table.add_row("runs on", how)
    table.add_row("batch", f"{batch['size']}: {batch['at_once']} at once on a rank")
    for name, number_of in parameters.items():
        if name != "trained":
            table.add_row(f"parameters, {name}", count(number_of))
    table.add_section()
    for name, value in report["memory_per_rank"].items():
        if value:
            table.add_row(f"memory a rank, {name.replace('_', ' ')}", size(value))
    table.add_section()
    for stage in report["stages"]:
        flops = stage["flops_per_step"]
        table.add_row(
            f"stage {stage['name']}",
            f"{stage['steps']} steps, trains {number(parameters['trained'][stage['name']], 'parameters')}",
        )
        table.add_row(
            "  a step",
            f"{number(stage['tokens_per_step'], 'tokens')}, student {number(flops['student'], 'FLOPs')}, "
            f"teacher {number(flops['teacher'], 'FLOPs')}",
        )
        if measure:
            table.add_row("  time", f"{stage['seconds_per_step']:.3g} s a step, {stage['hours']:.3g} h")
    table.add_section()
    disk = report["disk"]
    table.add_row("disk", f"{size(disk['total'])}, with {disk['checkpoints_kept']} checkpoints of "
                          f"{size(disk['checkpoint'])}")  # fmt: skip
    for key in ("data", "validation_data"):
        if data := report[key]:
            there = f"{data['samples']} samples" + (f", {size(data['bytes'])}" if data["bytes"] else "")
            table.add_row(key.replace("_", " "), f"{data['data']}: {there if data['there'] else 'not there yet'}")
    if measure:
        table.add_row("time in all", f"{report['hours']:.3g} h, without validation and previews")
    stdout.print(table, soft_wrap=False)
    if measure:
        measured = report["measured"]
        depths = " and ".join(map(str, measured["layers"]))
        stdout.print(
            f"time: from steps with {measured['batch']} made-up samples a rank in models of {depths} blocks, in "
            "proportion; compilation is left out"
        )
