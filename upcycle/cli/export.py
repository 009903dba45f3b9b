"""`upcycle export`: other ways out of an export."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from upcycle.cli.device import Dtype, torch_dtype
from upcycle.errors import UpcycleError

EPILOG = """
[bold]Examples[/bold]\n
  upcycle export runs/xl4/export --to single -o xl4.safetensors\n
  upcycle export runs/xl4/export --to diffusers --dtype bf16 -o xl4-bf16\n
  upcycle export runs/xl4/export --to diffusers --dtype fp16 --variant -o xl4-fp16\n
  upcycle export facebook/DiT-XL-2-256 --to meta -o DiT-XL-2-256x256.pt\n
  upcycle export 0400000-dc --to authors -o tuned.pt\n
"""

# The ending that each way out gives its file, by which it is read back; none where a folder is written.
ENDINGS = {"single": ".safetensors", "diffusers": "", "meta": ".pt", "authors": ".pt"}


def export(
    model: Annotated[
        str,
        typer.Argument(help="An export folder or a single file of one; for --to meta also what convert takes."),
    ],
    to: Annotated[
        Literal["single", "diffusers", "meta", "authors"],
        typer.Option(
            help="single (one safetensors file), diffusers (the folder), meta (a .pt of Meta's DiT, for fixed grids), "
            "authors (a .pt of the DC-DiT authors' code, for what was made from one)."
        ),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Output: a folder for diffusers, else a file.")],
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Precision of the weights; the router stays fp32. Default: as they are."),
    ] = None,
    variant: Annotated[
        bool, typer.Option("--variant", help="diffusers: name the files after --dtype, for variant= of diffusers.")
    ] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    weights: Annotated[Literal["ema", "model"], typer.Option(help="Which weights of a training checkpoint.")] = "ema",
    heads: Annotated[int | None, typer.Option(help="Attention heads, where a .pt does not tell.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output once the new one is complete.")] = False,
) -> None:
    """Write a model as one file, in another precision, or in the layout of Meta's or the DC-DiT authors' code."""
    check_name(out, to)
    if variant and (to != "diffusers" or dtype is None):
        raise UpcycleError("--variant names the files of --to diffusers after --dtype; give both, or leave it out")

    from upcycle.cli.show import print_json, progress, quiet_libraries, size, stdout, working

    quiet_libraries()
    with working(f"reading {model}"):
        from upcycle.export import only_student, open_model

        opened = open_model(model, revision=revision, weights=weights, heads=heads)
    precision = torch_dtype(dtype) if dtype else None
    with progress() as bar:
        task = bar.add_task("writing", total=None)

        def written(_: int) -> None:
            bar.advance(task)

        if to == "single":
            from upcycle.export.single import export_single

            notes = export_single(only_student(opened, to), out, precision, force=force, written=written)
        elif to == "diffusers":
            from upcycle.export.diffusers_folder import export_folder

            suffix = dtype if variant else None
            student = only_student(opened, to)
            notes = export_folder(student, out, precision, variant=suffix, force=force, written=written)
        elif to == "meta":
            from upcycle.export.meta import export_meta

            notes = export_meta(opened, out, precision, force=force, written=written)
        else:
            from upcycle.export.authors import export_authors

            notes = export_authors(only_student(opened, to), out, precision, force=force, written=written)
    files = [out] if out.is_file() else [path for path in out.rglob("*") if path.is_file()]
    total = sum(path.stat().st_size for path in files)
    if as_json:
        print_json({"out": str(out), "to": to, "dtype": dtype, "bytes": total, "notes": notes})
        return
    for note in notes:
        stdout.print(f"note: {note}")
    stdout.print(f"{size(total)} written")
    stdout.print(str(out), style="bold")


def check_name(out: Path, to: str) -> None:
    """Raise `UpcycleError` unless ``out`` ends as the readers of what ``--to`` writes expect."""
    ending = ENDINGS[to]
    if ending and out.suffix != ending:
        raise UpcycleError(f"-o {out}: --to {to} writes one file; let its name end in {ending}")
    if not ending and out.suffix in ENDINGS.values() and out.suffix:
        raise UpcycleError(f"-o {out}: --to {to} writes a folder; give a name that does not end in {out.suffix}")
