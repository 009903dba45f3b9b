"""`upcycle recipes`: the recipes that come with the package."""

from pathlib import Path
from typing import Annotated

import typer

from upcycle.errors import UpcycleError

EPILOG = """
[bold]Examples[/bold]\n
  upcycle recipes\n
  upcycle recipes show xl4\n
  upcycle recipes copy xl4\n
  upcycle recipes copy xl4 my-run.yaml\n
"""

app = typer.Typer(
    invoke_without_command=True,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
)
Name = Annotated[str, typer.Argument(help="Name of a recipe, as `upcycle recipes` lists it.")]


@app.callback()
def recipes(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """List the recipes that come with upcycle, show one, or copy one to edit."""
    if context.invoked_subcommand is not None:
        if as_json:
            raise UpcycleError(f"--json is for the list; leave it out of upcycle recipes {context.invoked_subcommand}")
        return
    from upcycle.recipe import load_recipe
    from upcycle.shipped import opening, shipped_recipes

    rows = []
    for name, path in shipped_recipes().items():
        recipe = load_recipe(path)
        what = opening(path.read_text())[0]
        rows.append({"name": name, "what": what, "base": recipe.teacher, "steps": recipe.steps})

    from upcycle.cli.show import print_json, stderr, stdout

    if as_json:
        print_json({"recipes": rows})
        return
    widths = {key: max(len(str(row[key])) for row in rows) for key in ("name", "base", "steps")}
    for row in rows:
        name, base = (str(row[key]).ljust(widths[key]) for key in ("name", "base"))
        stdout.print(f"{name}  {row['steps']:>{widths['steps']}} steps  {base}  {row['what']}")
    stderr.print("upcycle recipes show NAME, upcycle recipes copy NAME, upcycle finetune NAME")


@app.command("show")
def show(name: Name) -> None:
    """Print a recipe, with the commands that run it."""
    from upcycle.shipped import shipped_recipe

    print(shipped_recipe(name).read_text(), end="")


@app.command("copy")
def copy(
    name: Name,
    path: Annotated[Path | None, typer.Argument(help="File or folder. Default: recipes/NAME.yaml here.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file.")] = False,
) -> None:
    """Copy a recipe to edit it."""
    from upcycle.cli.show import stdout
    from upcycle.output import write_text
    from upcycle.shipped import shipped_recipe

    source = shipped_recipe(name)
    target = path or Path("recipes") / source.name
    if target.is_dir():
        target = target / source.name
    try:
        if target.exists():
            if target.samefile(source):
                raise UpcycleError(f"{target} is the shipped recipe itself; copy it to another PATH")
            if not force:
                raise UpcycleError(f"{target} exists already; choose another PATH, or replace it with --force")
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, source.read_text())
    except OSError as error:
        raise UpcycleError(f"{target} cannot be written: {error.strerror}; choose another PATH") from error
    stdout.print(f"run it with: upcycle finetune {target}")
    stdout.print(str(target), style="bold")
