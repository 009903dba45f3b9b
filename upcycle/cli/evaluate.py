"""`upcycle evaluate`: FID, sFID, KID, Inception score, precision and recall of a model or of samples."""

import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from upcycle.cli.device import Dtype
from upcycle.cli.sampler import check_guidance, check_scale
from upcycle.errors import UpcycleError

EPILOG = """
[bold]Examples[/bold]\n
  upcycle evaluate runs/xl4/export --reference VIRTUAL_imagenet256_labeled.npz --device cuda --dtype bf16\n
  upcycle evaluate runs/xl4/export --reference VIRTUAL_imagenet256_labeled.npz --sweep tail-drop=0:.6:.1\n
  upcycle evaluate samples --reference imagenet256/val --inception-weights weights-inception-2015-12-05-6726825d.pth\n
  upcycle evaluate digits --reference digits --features digits --num 1000 --steps 50 --guidance-scale 2\n
The same command again goes on where it was interrupted; samples and the reference's features lie in --cache.\n
"""

# How the DiT paper samples for its FID.
SAMPLER, STEPS, GUIDANCE, NUM = "ddpm", 250, 1.5, 50_000


def evaluate(
    judged: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|FOLDER",
            help="An export, pipeline or Hub id, to draw samples of; or samples: a folder of images or latents, or an "
            ".npz file with arr_0. digits is the shipped teacher.",
        ),
    ],
    reference: Annotated[
        str,
        typer.Option(
            metavar="STATS|FOLDER",
            help="What to compare with: .npz in ADM's format, a folder of images or of latents, or digits, digits-val.",
        ),
    ],
    num: Annotated[
        int | None, typer.Option("-n", "--num", help=f"Samples. Default: {NUM} of a model, all of a folder.")
    ] = None,
    features: Annotated[
        Literal["inception", "digits"], typer.Option(help="What looks at the images: Inception, or for 16x16 digits.")
    ] = "inception",
    inception_weights: Annotated[
        Path | None, typer.Option(metavar="FILE", help="torch-fidelity's weights. Default: cached or downloaded.")
    ] = None,
    vae: Annotated[str | None, typer.Option(metavar="ID|DIR", help="Decodes latents. Default: what made them.")] = None,
    sampler: Annotated[
        Literal["ddim", "ddpm", "dpm-solver++", "unipc"] | None, typer.Option(help=f"Default: {SAMPLER}.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=1000, help=f"Default: {STEPS}.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help=f"1 is none. Default: {GUIDANCE:g}.")] = None,
    guidance_channels: Annotated[
        int | None, typer.Option(min=1, help="Channels that are guided; Meta's code guides 3. Default: all.")
    ] = None,
    tail_drop: Annotated[
        float | None, typer.Option(metavar="ρ", help="Share of the kept tokens to drop. Default: the export's own.")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**63 - 1, help="Default: 0.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the model's arithmetic. Default: fp32.")] = None,
    sweep: Annotated[
        str | None,
        typer.Option(metavar="tail-drop=A:B:STEP", help="Each tail drop in turn, and the teacher at equal FLOPs."),
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(metavar="ID|DIR", help="With --sweep. Default: what the student was made from.")
    ] = None,
    compare_with: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Rows to stand beside. Default: those of --out.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 32,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ... Default: cuda where there is one.")] = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Results file, to which rows are added; a sweep's picture beside it.")
    ] = Path("evaluations.json"),
    cache: Annotated[
        Path | None, typer.Option(help="Samples and the reference's features. Default: beside --out, as NAME.cache.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Measure how near samples are to a reference, and say with which settings; rows of others are not compared."""
    given = {
        "sampler": sampler, "steps": steps, "guidance_scale": guidance_scale, "guidance_channels": guidance_channels,
        "tail_drop": tail_drop, "seed": seed, "dtype": dtype,
    }  # fmt: skip
    if num is not None and num < 2:
        raise UpcycleError(f"--num {num} must be at least 2; statistics need more than one image")
    if tail_drop is not None and not 0 <= tail_drop < 1:
        raise UpcycleError(f"--tail-drop {tail_drop:g} must be at least 0 and less than 1")
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise UpcycleError(f"--guidance-scale {guidance_scale} is not a number to guide with; 1 is none")
    check_scale(guidance_scale)
    check_guidance(guidance_scale, guidance_channels=guidance_channels)
    if teacher is not None and sweep is None:
        raise UpcycleError("--teacher is what a --sweep is drawn beside; give that too, or evaluate the teacher itself")
    if sweep is not None and (tail_drop is not None or compare_with is not None):
        option = "--tail-drop" if tail_drop is not None else "--compare-with"
        raise UpcycleError(f"--sweep evaluates several tail drops beside the teacher; leave out {option}")
    if compare_with is not None and not compare_with.is_file():
        raise UpcycleError(f"--compare-with {compare_with}: no such file; it is what an evaluation wrote with -o")
    cache = out.with_suffix(".cache") if cache is None else cache

    from upcycle.cli.device import enough_memory, to_device
    from upcycle.cli.show import print_json, progress, quiet_libraries, stderr, stdout, working

    quiet_libraries()
    with working("starting"):
        from upcycle.evaluation import evaluate as rows
        from upcycle.evaluation.features import load_extractor
        from upcycle.evaluation.images import open_set
        from upcycle.evaluation.sweep import matched_steps, parse_sweep
        from upcycle.output import check_output_file
        from upcycle.sampling.bulk import check_finished

        drops = parse_sweep(sweep) if sweep is not None else []
        check_output_file(out, force=True)
        others = rows.read_rows(compare_with or out)
        extractor = to_device(load_extractor(features, inception_weights), device)
    for folder in (judged, reference):
        check_finished(Path(folder))
    is_model = _is_model(judged)
    if not is_model and (sweep is not None or revision is not None):
        option = "--sweep" if sweep is not None else "--revision"
        raise UpcycleError(f"{judged} holds samples, and {option} is for models; leave it out")
    with working(f"reading {reference}"):
        compared = open_set(reference, vae, next(extractor.parameters()).device)
    notes: list[str] = []
    with working(f"loading {judged}"):
        if is_model:
            how: dict[str, Any] = {
                "model": judged, "sampler": sampler or SAMPLER, "steps": steps or STEPS,
                "guidance_scale": GUIDANCE if guidance_scale is None else guidance_scale,
                "guidance_channels": guidance_channels, "tail_drop": tail_drop, "seed": seed or 0,
                "dtype": dtype or "fp32",
            }  # fmt: skip
            pipe = to_device(_load(judged, revision, how), device)
            size: Any = rows.image_size(pipe)
            chosen = list(range(num or NUM))
            if num is None:
                notes.append(f"{NUM:,} samples, as published figures have; --num 5000 is enough for a first look")
        else:
            samples = open_set(judged, vae, next(extractor.parameters()).device)
            record = rows.recorded(judged)
            how, size = _how_drawn(judged, given, record), samples.size
            if record is None and how:
                notes.append(f"{judged} does not say how it was drawn; {', '.join(how).replace('_', ' ')} as you said")
            chosen = rows.chosen_rows(samples, num)
    rows.check_sizes(judged, size, features, compared)
    planned = {**how, "num": len(chosen), "size": list(size), **rows.judged_by(features, compared)}
    if compare_with is not None:
        fit, refused = rows.comparable(planned, others)
        if not fit:
            why = refused[0] if refused else "it has no rows"
            raise UpcycleError(f"{compare_with} has no row to compare with: {why}; evaluate with the same settings")
    pipes = [(judged, pipe)] if is_model else []
    if drops:
        with working("loading the teacher"):
            spec = teacher or _teacher_of(judged, pipe)
            pipes.append((spec, to_device(_load(spec, None, {**how, "tail_drop": None}), device)))
            rows.check_sizes(f"--teacher {spec}", rows.image_size(pipes[1][1]), features, compared)
    for note in notes:  # now that nothing is refused any more
        stderr.print(f"note: {note}")

    def tell(note: str) -> None:
        notes.append(note)
        stderr.print(f"note: {note}")

    with progress("images") as bar, enough_memory(batch_size):
        task = bar.add_task(f"features of {reference}", total=compared.count)
        by = rows.judge(features, extractor, compared, cache, batch_size, lambda count: bar.advance(task, count))
        if len(chosen) <= by.width:
            tell(
                f"{len(chosen)} samples are no more than the {by.width} features: FID is biased upwards, "
                "and compares with the same number only"
            )

        def drawn(which: int, **changes: Any) -> dict[str, Any]:
            spec, model = pipes[which]
            told = {**how, "model": spec, **changes}
            text = f"sampling {'/'.join(Path(spec).parts[-2:])}, " + ", ".join(f"{k} {v}" for k, v in changes.items())
            drawing = bar.add_task(text.rstrip(", "), total=len(chosen))
            looking = bar.add_task("features", total=len(chosen))
            row = rows.evaluate_model(
                model, by, told, len(chosen), cache, batch_size,
                lambda count: bar.advance(drawing, count), lambda count: bar.advance(looking, count),
            )  # fmt: skip
            bar.update(drawing, completed=len(chosen))
            rows.add_row(out, row)
            return row

        try:
            if drops:
                made = [drawn(0, tail_drop=rho) for rho in drops]
                theirs = [drawn(1, tail_drop=None)]
                fewer = matched_steps(how["steps"], theirs[0]["flops_per_image"], made)
                theirs += [drawn(1, steps=count, tail_drop=None) for count in fewer]
            elif is_model:
                made, theirs = [drawn(0)], []
            else:
                task = bar.add_task(f"features of {judged}", total=len(chosen))
                made = [rows.evaluate_set(samples, by, how, chosen, lambda count: bar.advance(task, count))]
                theirs = []
                rows.add_row(out, made[0])
        except KeyboardInterrupt:
            bar.stop()
            stderr.print("interrupted; the same command goes on")
            raise SystemExit(130) from None
    picture = None
    if drops:
        from upcycle.evaluation.plots import quality_curves

        picture = out.with_suffix(".png")
        told = {name: made[0][name] for name in ("sampler", "guidance_scale", "num", "features")}
        quality_curves(theirs, made, picture, f"{judged}: " + ", ".join(f"{k} {v}" for k, v in told.items()))
        shown = [*made, *theirs]
    else:
        fit, refused = rows.comparable(made[0], [row for row in others if not rows.is_same(row, made[0])])
        shown = [*fit, made[0]]
        for why in dict.fromkeys(refused):
            tell(why)
    if as_json:
        print_json({"out": str(out), "rows": made + theirs, "picture": picture and str(picture), "notes": notes})
        return
    stdout.print(_table(shown), soft_wrap=False)
    stdout.print(_settings(made[0]))
    for path in (out, picture):
        if path:
            stdout.print(str(path), style="bold")


def _is_model(spec: str) -> bool:
    """Whether it is drawn from: a Hub id, or a folder with a pipeline, transformer or adapter."""
    from upcycle.sources import hub

    folder = Path(spec)
    if spec == "digits" or (not folder.exists() and hub.is_hub_id(spec)):
        return True
    return any((folder / name).exists() for name in ("model_index.json", "transformer", "ddit.json"))


def _load(spec: str, revision: str | None, how: dict[str, Any]) -> Any:
    from upcycle.models.chunked_dit import ChunkedDiT
    from upcycle.sampling.pipeline import load_pipeline
    from upcycle.training.digits import TEACHER

    if revision is not None and (spec == "digits" or os.path.exists(spec)):
        raise UpcycleError(f"{spec}: a local path has no revisions; leave --revision out")
    pipe = load_pipeline(str(TEACHER) if spec == "digits" else spec, revision)
    if getattr(pipe.transformer, "ddit", None) is not None:
        raise UpcycleError(f"{spec} takes coarser patches by a schedule; draw with upcycle sample and give the folder")
    if not isinstance(pipe.transformer, ChunkedDiT) and how["tail_drop"]:
        raise UpcycleError(f"{spec} is a fixed-patch DiT, which keeps all of its tokens; leave out --tail-drop")
    channels = pipe.transformer.config.in_channels
    if how["guidance_channels"] is not None and how["guidance_channels"] > channels:
        raise UpcycleError(f"--guidance-channels {how['guidance_channels']}: {spec} has {channels} channels")
    return pipe


def _how_drawn(spec: str, given: dict[str, Any], record: dict[str, Any] | None) -> dict[str, Any]:
    """How a folder of samples says that it was drawn; where it does not, what the user says."""
    said = {name: value for name, value in given.items() if value is not None}
    if record is None:
        return said
    for name, value in said.items():
        if record[name] != value:
            option = name.replace("_", "-")
            raise UpcycleError(f"{spec} was drawn with {option} {record[name]}, not {value}; leave out --{option}")
    return record


def _teacher_of(spec: str, pipe: Any) -> str:
    """The teacher that a student's provenance names."""
    from upcycle import provenance
    from upcycle.models.chunked_dit import ChunkedDiT
    from upcycle.sources import hub

    if not isinstance(pipe.transformer, ChunkedDiT):
        raise UpcycleError(f"{spec} is a fixed-patch DiT, which has no tail to drop; --sweep is for students")
    origin = provenance.read(Path(spec)) if os.path.isdir(spec) else None
    named = (origin or {"base": {}})["base"].get("id")
    if named is None or not (named == "digits" or Path(named).exists() or hub.is_hub_id(named)):
        raise UpcycleError(f"{spec} names no teacher that is there ({named}); give it with --teacher")
    return named


def _table(shown: list[dict[str, Any]]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from upcycle.cli.show import count

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    columns = ["model", "ρ", "steps", "FID", "sFID", "KID", "IS", "prec.", "recall", "FLOPs", "s"]

    def number(value: float | None, form: str) -> str:
        return "–" if value is None else f"{value:{form}}"

    lines = []
    for row in shown:
        model, flops, tail = "/".join(Path(row["model"]).parts[-2:]), row["flops_per_image"], row["tail_drop"]
        tail = tail if isinstance(tail, str) else number(tail, "g")  # a schedule is words
        lines.append([
            model, tail, number(row["steps"], "d"), number(row["fid"], ".2f"), number(row["sfid"], ".2f"),
            number(row["kid"], ".2g"), number(row["inception_score"], ".2f"), number(row["precision"], ".3f"),
            number(row["recall"], ".3f"), "–" if flops is None else count(flops).replace(" ", ""),
            number(row["seconds_per_image"], ".3g"),
        ])  # fmt: skip
    known = [i for i in range(len(columns)) if any(line[i] != "–" for line in lines)]  # 80 columns are few
    for name in (columns[i] for i in known):
        table.add_column(name, justify="left" if name == "model" else "right", no_wrap=name != "model", overflow="fold")
    for line in lines:
        table.add_row(*(line[i] for i in known))
    return table


def _settings(row: dict[str, Any]) -> str:
    """The line under every table."""
    told = [f"{name.replace('_', ' ')} {row[name]}" for name in ("sampler", "steps", "guidance_scale") if row[name]]
    channels = f" of {row['guidance_channels']} channels" if row["guidance_channels"] else ""
    told[-1:] = [told[-1] + channels] if told else ["how they were drawn is not said"]
    rest = [name for name in ("hold", "uncond_tail_drop", "tokens", "seed") if row[name] is not None]
    told += [f"{name.replace('_', ' ')} {row[name]}" for name in rest]
    of = f"{row['reference']} ({row['reference_num'] or 'statistics'}, sha256 {row['reference_sha256'][:12]})"
    return f"{', '.join(told)}, n = {row['num']}; features {row['features']}\nreference {of}"
