"""`upcycle finetune`: post-train a converted model from a recipe."""

import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

EPILOG = """
[bold]Examples[/bold]\n
  upcycle finetune recipes/digits.yaml\n
  upcycle finetune recipes/xl4.yaml --set stages.post-train.steps=1000 --set out=runs/try\n
  upcycle finetune recipes/xl4.yaml --resume\n
  accelerate launch --num_processes 8 -m upcycle finetune recipes/xl4.yaml\n
"""


def finetune(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe, or the name of a shipped one (upcycle recipes).")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as stages.post-train.lr=0.001."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Teach a converted model where tokens are needed; the result is an export like that of `convert`."""
    from upcycle.recipe import load_recipe
    from upcycle.shipped import find_recipe

    checked = load_recipe(find_recipe(recipe), set_ or [])

    from upcycle.cli.show import print_json, progress, quiet_libraries, stderr, stdout, working

    quiet_libraries()
    with working(f"preparing {checked.out}"):
        from upcycle.training import loop, run

        prepared = run.prepare(checked, resume=resume)
    main = run.ranks().is_main_process
    stderr.quiet = stdout.quiet = not main
    last: dict[str, float] = {}
    with progress() as bar:
        task = bar.add_task("finetune", total=checked.steps)

        def on_step(row: dict[str, Any]) -> None:
            last.update(row)
            bar.update(task, completed=row["step"], description=_describe(row))

        try:
            export = run.finetune(prepared, resume=resume, on_step=on_step, on_note=bar.console.print)
        except loop.Interrupted as interrupted:
            bar.stop()
            options = [word for item in set_ or [] for word in ("--set", item)]
            command = shlex.join(["upcycle", "finetune", str(recipe), *options, "--resume"])
            stderr.print(f"saved at step {interrupted}; go on with: {command}")
            raise SystemExit(130) from None
    if as_json and main:
        print_json({"out": str(export), "log": str(prepared.out / "log.csv"), **last})
        return
    stdout.print(f"log: {prepared.out / 'log.csv'}")
    stdout.print(str(export), style="bold")


def _describe(row: dict[str, Any]) -> str:
    """What the progress bar says of a step."""
    levels = "/".join("-" if (v := row[key]) != v else f"{v:.0f}" for key in row if key.startswith("tokens_t"))
    return (
        f"{row['stage']}  loss {row['loss']:.4f}  ratio {row['ratio']:.2f}  tokens {levels}  "
        f"{row['step_seconds']:.2f} s/step, {row['data_seconds']:.2f} for data"
    )
