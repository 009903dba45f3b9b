"""`upcycle convert`: graft encoder, router and decoder around pretrained blocks."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from upcycle.errors import UpcycleError

EPILOG = """
[bold]Examples[/bold]\n
  upcycle convert facebook/DiT-XL-2-256 --ratio 4\n
  upcycle convert DiT-XL-2-256x256.pt --vae stabilityai/sd-vae-ft-ema -o xl-dc4\n
  upcycle convert ./my-dit --ratio 16 --dry-run\n
  upcycle convert facebook/DiT-XL-2-256 --init paper --scaffold paper --ratio 4\n
  upcycle convert facebook/DiT-XL-2-256 --dydit 0.7\n
  upcycle convert facebook/DiT-XL-2-256 --method ddit --patches 2,4\n
  upcycle convert black-forest-labs/FLUX.1-dev --method ddit --adapter-only\n
"""


def convert(
    source: Annotated[
        str,
        typer.Argument(help="Hub id, diffusers folder, Meta's .pt, or a .pt of the DC-DiT authors' code."),
    ],
    method: Annotated[
        Literal["dc-dit", "ddit"],
        typer.Option(help="dc-dit: dynamic chunking of a DiT. ddit: coarser patches in some steps; also FLUX, Wan ..."),
    ] = "dc-dit",
    ratio: Annotated[
        str | None,
        typer.Option(metavar="N", help="Positions per token kept, > 1. Default: the teacher's patch size squared."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Output folder. Default: <name>-dc<ratio> here.")
    ] = None,
    init: Annotated[str, typer.Option(help="exact (equals the teacher) or paper (the published start).")] = "exact",
    scaffold: Annotated[
        str | None, typer.Option(help="lean or paper. Default: lean for --init exact, paper for --init paper.")
    ] = None,
    router: Annotated[str, typer.Option(help="predictability, cosine, random or grid.")] = "predictability",
    time_embedding: Annotated[
        str | None,
        typer.Option(help="diffusers or meta: convention of the timestep embedding. Default: the source's own."),
    ] = None,
    dydit: Annotated[
        float,
        typer.Option(metavar="λ", help="Gates in the blocks (DyDiT), trained to this share of their FLOPs. 0: none."),
    ] = 0.0,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    variant: Annotated[str | None, typer.Option(help="Variant of the weights, such as fp16.")] = None,
    weights: Annotated[Literal["ema", "model"], typer.Option(help="Which weights of a training checkpoint.")] = "ema",
    heads: Annotated[int | None, typer.Option(help="Attention heads, where a .pt does not tell.")] = None,
    vae: Annotated[
        str | None, typer.Option(metavar="ID|DIR", help="VAE to add, for a source that has none (a .pt).")
    ] = None,
    patches: Annotated[
        str | None, typer.Option(metavar="m,m", help="ddit: factors of the base patch size. Default: 2,4.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=0, max=4096, help="ddit: of the switch-LoRA. Default: 32.")] = None,
    adapter_only: Annotated[
        bool, typer.Option("--adapter-only", help="ddit: write the adapter without the base's files.")
    ] = False,
    component: Annotated[
        str | None, typer.Option(help="ddit: which transformer of the pipeline. Default: all (Wan 2.2 has two).")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the fresh parameters.")] = 0,
    max_shard_size: Annotated[str, typer.Option(help="Largest weights file, such as 5GB.")] = "10GB",
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not measure the distance to the teacher.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan; write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output once the new one is complete.")] = False,
) -> None:
    """Turn a pretrained DiT into a ChunkedDiT that equals it, ready for `upcycle finetune`."""
    if method == "ddit":
        given = {"--ratio": ratio, "--scaffold": scaffold, "--time-embedding": time_embedding, "--heads": heads,
                 "--vae": vae, "--dydit": dydit or None, "--init": None if init == "exact" else init,
                 "--router": None if router == "predictability" else router}  # fmt: skip
        if wrong := next((name for name, value in given.items() if value is not None), None):
            raise UpcycleError(f"{wrong} is for --method dc-dit; leave it out")
        from upcycle.cli.convert_patches import convert_patches, parse_patches

        convert_patches(
            source, out, parse_patches(patches), 32 if rank is None else rank, component,
            adapter_only=adapter_only, revision=revision, variant=variant, seed=seed, verify=not no_verify,
            dry_run=dry_run, as_json=as_json, force=force,
        )  # fmt: skip
        return
    ours = {"--patches": patches, "--rank": rank, "--adapter-only": adapter_only or None, "--component": component}
    if wrong := next((name for name, value in ours.items() if value is not None), None):
        raise UpcycleError(f"{wrong} is for --method ddit; leave it out, or add that")
    shard_bytes = _parse_size(max_shard_size)
    number = _parse_ratio(ratio)

    from upcycle.cli.show import progress, quiet_libraries, stderr, working

    quiet_libraries()
    with working(f"reading {source}"):
        from upcycle.graft import convert as surgery
        from upcycle.graft import plan
        from upcycle.output import check_output
        from upcycle.sources import DiTConfig, open_source

        opened = open_source(source, revision=revision, weights=weights, variant=variant, heads=heads)
        if vae is not None:
            from upcycle.graft.components import with_vae

            opened = with_vae(opened, vae)
        options = plan.Options(number, init, scaffold, router, time_embedding, dydit, seed)
        made = plan.make_plan(opened, options)
    out = out or Path(default_name(opened.name, made.config["ratio"], opened.kind, dydit))
    if dry_run:
        _show_plan(made, out, as_json)
        return
    local = (Path(source),) if os.path.exists(source) else ()
    check_output(out, force, keep=(*local, *opened.components.values()))
    with progress() as bar:
        task = bar.add_task("converting", total=len(made.pieces))
        surgery.convert(made, out, force=force, max_shard_bytes=shard_bytes, written=lambda n: bar.advance(task))
    difference = None
    if not no_verify and isinstance(opened.config, DiTConfig):
        from upcycle import provenance
        from upcycle.graft import verify

        with progress() as bar:
            task = bar.add_task("comparing with the teacher", total=verify.MEASURE_STEPS)
            teacher, student = verify.load_teacher(opened), verify.load_student(out)
            difference = verify.measure_difference(teacher, student, step=lambda: bar.advance(task))
        provenance.add_evidence(out, difference.evidence(made.exact))
    _show_result(made, out, difference, as_json)
    if difference and made.exact and not difference.equal:
        stderr.print(
            f"error: {out} is written, but it differs from its teacher by {difference.max_abs:.1e}, where at most "
            f"{verify.EXACT_TOLERANCE:.0e} is right; this is a fault of upcycle, not yours"
        )
        raise typer.Exit(1)


def default_name(name: str, ratio: float, kind: str, dydit: float = 0.0) -> str:
    """<name>-dc<ratio>, <name>-dc for a checkpoint of the DC-DiT authors, <name> for a student; gates add -dydit<λ>."""
    gates = f"-dydit{dydit:g}" if dydit else ""
    return {"dc-dit": f"{name}-dc", "student": name}.get(kind, f"{name}-dc{ratio:g}") + gates


def _parse_ratio(text: str | None) -> float | None:
    try:
        return None if text is None else float(text)
    except ValueError:
        raise UpcycleError(f"--ratio {text} is not a number; 4 is usual for a patch-2 teacher") from None


def _parse_size(text: str) -> int:
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.upper().rstrip("KMGIB ")
    try:
        size = int(float(number) * units[text.upper()[len(number) :].strip()])
    except (KeyError, ValueError, OverflowError):
        size = 0
    if size <= 0:
        raise UpcycleError(f"--max-shard-size {text} is not a size; write it as 500MB or 5GB")
    return size


def _show_plan(made: Any, out: Path, as_json: bool) -> None:
    from upcycle.cli.show import count, print_json, size, stdout

    files = ["transformer/", *(f"{name}/" for name in made.source.components)]
    flops = made.flops_per_image
    facts = {
        "out": str(out),
        "kind": made.source.kind,
        "ratio": made.config["ratio"],
        "tokens_kept": made.config["sample_size"] ** 2 / made.config["ratio"],
        "parameters": made.parameters,
        "writes": {"folders": files, "bytes": made.bytes},
        "peak_memory_bytes": made.peak_memory,
        "flops_per_image": flops,
        "exact": made.exact,
        "notes": made.notes,
        "config": made.config,
    }
    if as_json:
        print_json(facts)
        return
    from rich.table import Table

    stdout.print(f"{made.source.spec} -> {out}")
    table = Table(show_header=False)
    grid, ratio = made.config["sample_size"], made.config["ratio"]
    table.add_row("student", f"{made.config['scaffold']} scaffold, {made.config['router']} router")
    if made.config["dydit"]:
        table.add_row("DyDiT", f"gates in the blocks, to be trained to {made.config['dydit']:.0%} of their FLOPs")
    table.add_row("grid", f"{grid}x{grid} positions, ratio {ratio:g}: about {grid**2 / ratio:.0f} tokens")
    table.add_row("parameters reused", count(made.parameters["reused"]))
    table.add_row("parameters fresh", count(made.parameters["fresh"]))
    table.add_row("writes", f"{', '.join(files)} {size(made.bytes)}")
    table.add_row("peak memory", f"about {size(made.peak_memory)}, without the comparison")
    if flops["teacher"]:
        table.add_row("FLOPs per image, teacher", count(flops["teacher"]))
    for rho, value in flops["student"].items():
        share = f" ({value / flops['teacher']:.0%})" if flops["teacher"] else ""
        table.add_row(f"FLOPs per image, ρ={rho}", count(value) + share)
    table.add_row("equals the teacher", "yes, at step 0" if made.exact else "no; convert measures how near it is")
    stdout.print(table, soft_wrap=False)
    for note in made.notes:
        stdout.print(f"note: {note}")
    stdout.print("FLOPs: the papers' counting, 250 steps, unguided")


def _show_result(made: Any, out: Path, difference: Any, as_json: bool) -> None:
    from upcycle.cli.show import print_json, stdout

    config = made.config
    if as_json:
        print_json(
            {
                "out": str(out),
                "ratio": config["ratio"],
                "tokens_kept": difference.tokens_kept if difference else config["sample_size"] ** 2 / config["ratio"],
                "max_abs_diff": difference.max_abs if difference else None,
                "relative_difference_by_timestep": difference.by_timestep if difference else None,
                "exact": made.exact,
                "parameters": made.parameters,
                "flops_per_image": made.flops_per_image,
                "licence": made.source.licence,
                "notes": made.notes,
            }
        )
        return
    if difference is None:
        stdout.print("distance to the teacher: not measured")
    else:
        stdout.print(
            f"largest difference to the teacher: {difference.max_abs:.1e} "
            f"({difference.tokens_kept:.0f} of {config['sample_size'] ** 2} positions kept)"
        )
        if not made.exact:
            near = ", ".join(f"t={t}: {value:.0%}" for t, value in difference.by_timestep.items())
            stdout.print(f"relative difference: {near}")
    for note in made.notes:
        stdout.print(f"note: {note}")
    if not {"vae", "scheduler"} <= made.source.components.keys():
        stdout.print("note: the transformer alone was exported; --vae ID|DIR adds a VAE, so that it can be sampled")
    if made.source.licence:
        stdout.print(f"licence, inherited from the base: {made.source.licence}")
    stdout.print(str(out), style="bold")
