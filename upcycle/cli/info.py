"""`upcycle info`: what a model is and where it comes from, without reading its weights."""

from typing import Annotated, Any

import typer

EPILOG = """
[bold]Examples[/bold]\n
  upcycle info runs/xl4/export\n
  upcycle info facebook/DiT-XL-2-256\n
  upcycle info you/xl4 --json\n
"""


def info(
    model: Annotated[str, typer.Argument(help="An export, a teacher (folder or .pt), or a Hub id of either.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Show kind, shape, cost, licence and provenance; reads headers only, also of Hub ids."""
    from upcycle.cli.show import print_json, quiet_libraries, working

    quiet_libraries()
    with working(f"looking at {model}"):
        from upcycle.info import describe

        facts = describe(model, revision=revision)
    if as_json:
        print_json(facts)
        return
    _show(facts)


def _show(facts: dict[str, Any]) -> None:
    from rich.table import Table

    from upcycle.cli.show import stdout

    table = Table(show_header=False)
    table.add_row("model", facts["model"] + (f" at {facts['revision'][:12]}" if facts["revision"] else ""))
    if facts["kind"] == "ddit":
        _add_adapter(table, facts)
    else:
        _add_shape(table, facts)
    table.add_row("licence", facts["licence"] or "not known")
    if origin := facts["provenance"]:
        base = origin["base"]
        table.add_section()
        at = f" at {base['revision'][:12]}" if base.get("revision") else ""
        table.add_row("base", f"{base.get('id') or 'not known'}{at}")
        for event in origin["history"]:
            version = event.get("versions", {}).get("upcycle", "?")
            table.add_row(event["what"], f"{event.get('command') or 'from Python'} (upcycle {version})")
        for found in origin["evidence"]:
            student, teacher = (
                "not measured" if found.get(who) is None else f"{found[who]:.4g}" for who in ("student", "teacher")
            )
            table.add_row(found["metric"], f"{student}, teacher {teacher}")
        hashed = f"{len(origin['files'])}, each with its SHA-256 in upcycle.json"
        table.add_row("files", hashed if origin["files"] else "no upcycle.json: this is from the weights' header")
    elif facts["kind"] == "student":
        table.add_row("provenance", "not recorded")
    stdout.print(table, soft_wrap=False)
    if facts.get("flops_per_image"):
        stdout.print("FLOPs: the papers' counting, 250 steps, unguided")


def _add_shape(table: Any, facts: dict[str, Any]) -> None:
    from upcycle.cli.show import count, size
    from upcycle.sampling.budget import told

    shape = facts["shape"]
    table.add_row("kind", facts["kind"] + (f", {shape['name']}" if shape["name"] else ""))
    patch = f", patch {shape['patch_size']}" if shape["patch_size"] else ""
    table.add_row("blocks", f"{shape['layers']} of width {shape['width']}, {shape['heads']} heads{patch}")
    grid = shape["sample_size"]
    table.add_row("input", f"{shape['in_channels']} x {grid} x {grid}, {shape['num_classes']} classes")
    if facts["parameters"] is None:
        table.add_row("parameters", "not known without downloading: the weights are a pickle")
    else:
        kinds = ", ".join(facts["dtypes"])
        table.add_row("parameters", f"{count(facts['parameters']).strip()} ({kinds}), {size(facts['bytes'])}")
    if facts["kind"] == "student":
        table.add_row("scaffold", f"{facts['scaffold']}, {facts['router']} router")
        table.add_row("ratio", f"{facts['ratio']:g}: about {grid**2 / facts['ratio']:.0f} of {grid**2} tokens")
        if gates := facts["dydit"]:
            found = "not measured" if gates["measured"] is None else f"{gates['measured']:.0%} measured"
            table.add_row("DyDiT", f"gates in the blocks: {gates['target']:.0%} of their FLOPs wanted, {found}")
        drops = facts["tail_drop"]
        trained = ", ".join(f"{rho:g}" for rho in drops["trained_with"] or []) or "none"
        table.add_row("tail drop", f"{told(drops['default'])} by default; trained with {trained}")
        if found := facts["calibration"]:
            measured = f"{found['steps']} steps of {found['sampler']}, guidance {found['guidance_scale']:g}"
            table.add_row("set_budget", f"calibrated with {measured}")
    for rho, value in (facts["flops_per_image"] or {}).items():
        at = f", ρ={rho}" if facts["kind"] == "student" else ""
        table.add_row(f"FLOPs per image{at}", count(value).strip())


def _add_adapter(table: Any, facts: dict[str, Any]) -> None:
    from upcycle.cli.show import count, size

    table.add_row("kind", "an adapter for coarser patches (DDiT)")
    table.add_row("for", f"{facts['base'] or 'not known'}, a {facts['base_class']}")
    if len(facts["components"]) > 1:
        table.add_row("on", " and ".join(facts["components"]))
    table.add_row("patches", f"x {', x '.join(map(str, facts['patches']))}; rank {facts['rank']}")
    found = facts["calibration"]
    at = f": {found['speed_up']} x in {found['steps']} steps" if found else ""
    table.add_row("threshold", "none yet; upcycle calibrate" if facts["threshold"] is None else
                  f"{facts['threshold']:.4g}{at}")  # fmt: skip
    kinds = ", ".join(facts["dtypes"])
    table.add_row("parameters", f"{count(facts['parameters']).strip()} ({kinds}), {size(facts['bytes'])}")
