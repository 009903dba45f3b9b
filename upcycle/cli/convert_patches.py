"""`upcycle convert --method ddit`."""

import os
from dataclasses import replace
from pathlib import Path

from upcycle.errors import UpcycleError


def parse_patches(text: str | None) -> tuple[int, ...]:
    """Factors of ``--patches``, 2 and 4 by default; raises `UpcycleError`."""
    try:
        patches = tuple(int(part) for part in text.split(",")) if text is not None else (2, 4)
    except ValueError:
        patches = ()
    if not patches or list(patches) != sorted(set(patches)) or patches[0] < 2 or patches[-1] > 16:
        raise UpcycleError(f"--patches {text} is not a list of ascending factors from 2 to 16, such as 2,4")
    return patches


def convert_patches(
    source: str,
    out: Path | None,
    patches: tuple[int, ...],
    rank: int,
    component: str | None,
    *,
    adapter_only: bool,
    revision: str | None,
    variant: str | None,
    seed: int,
    verify: bool,
    dry_run: bool,
    as_json: bool,
    force: bool,
) -> None:
    """Make an adapter for coarser patches, with the base beside it unless ``adapter_only``; print what was made.

    Of a pipeline with two transformers both get one, unless ``component`` names one of them.
    """
    from upcycle.cli.show import count, print_json, progress, quiet_libraries, size, stdout, working

    quiet_libraries()
    with working(f"reading {source}"):
        from upcycle.graft import patches as surgery
        from upcycle.output import check_output
        from upcycle.sources.backbone import open_backbones

        if out is not None and not dry_run:
            check_output(out, force)
        whole = not adapter_only and not dry_run
        found = open_backbones(source, component=component, revision=revision, variant=variant, whole=whole)
        options = surgery.Options(patches, rank, seed=seed)
        plans = [
            surgery.make_plan(each, replace(options, component=each.subfolder or component or options.component),
                              adapter_only=adapter_only)
            for each in found
        ]  # fmt: skip
    opened, made = found[0], plans[0]
    out = out or Path(f"{opened.name}-ddit")
    parameters = {name: sum(plan.parameters[name] for plan in plans) for name in made.parameters}
    share = parameters["fresh"] / parameters["reused"]
    facts = {
        "out": str(out), "method": "ddit", "base_class": opened.base_class, "patches": list(patches), "rank": rank,
        "components": [plan.options.component for plan in plans],
        "parameters": parameters, "adapter_share": share, "adapter_only": adapter_only,
        "licence": opened.licence, "notes": made.notes,
    }  # fmt: skip
    errors = None
    if not dry_run:
        check_output(out, force, keep=(opened.folder,) if os.path.exists(source) else ())
        with progress() as bar:
            task = bar.add_task("converting", total=len(made.files) + 1)
            surgery.convert(plans, out, force=force, written=lambda n: bar.advance(task))
        if verify and opened.base_class == "DiTTransformer2DModel":
            with working("comparing with the base"):
                from upcycle.evaluation.coarse import before_training

                errors = before_training(opened, made)
        facts |= {"exact_at_1": errors["exact"] if errors else None,
                  "relative_error": errors["by_level"] if errors else None}  # fmt: skip
    if as_json:
        print_json(
            facts if not dry_run else facts | {"writes": {"files": made.files, "bytes": surgery.bytes_of(plans)}}
        )
        return
    stdout.print(
        f"{source} -> {out}" if dry_run else f"{opened.base_class}, patches x {', x '.join(map(str, patches))}"
    )
    writes = size(surgery.bytes_of(plans))
    stdout.print(f"adapter: {count(parameters['fresh'])} parameters, {share:.1%} of the base; writes {writes}")
    if len(plans) > 1:
        stdout.print(f"for transformer, and for transformer_2, which takes over below noise {opened.boundary}")
    if errors:
        stdout.print(f"at m = 1: {'the bits of the base' if errors['exact'] else 'not the bits of the base'}")
        for m, levels in errors["by_level"].items():
            shown = ", ".join(f"t={t}: {value:.0%}" for t, value in levels.items())
            stdout.print(f"relative error at m = {m}, untrained: {shown}")
    for note in made.notes:
        stdout.print(f"note: {note}")
    if opened.licence:
        stdout.print(f"licence, inherited from the base: {opened.licence}")
    if not dry_run:
        stdout.print(str(out), style="bold")
