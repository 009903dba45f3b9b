"""`upcycle bench`: how fast a student is beside its teacher, on this machine."""

import os
from typing import Annotated, Any

import typer

from upcycle.cli.convert_patches import parse_patches
from upcycle.cli.device import Dtype
from upcycle.errors import UpcycleError

EPILOG = """
[bold]Examples[/bold]\n
  upcycle bench --shape XL/2\n
  upcycle bench runs/xl4/export --teacher facebook/DiT-XL-2-256 --device cuda --dtype bf16 --batch 32\n
  upcycle bench --shape S/2 --size 64 --tail-drop 0,0.4,0.6 --json\n
  upcycle bench --shape XL/2 --patches 2,4 --schedule 4:0.3,2:0.5,1:0.2 --steps 10\n
  upcycle bench DiT-XL-2-256-ddit --device cuda --dtype bf16\n
\n
Speed hardly depends on weights: --shape takes random ones, with a router that keeps 1/ratio of the positions.\n
With --patches they get an adapter for coarser patches. A model that has one is compared with its own base.\n
"""


TAIL_DROPS = "0,0.3,0.6"
MOST_BUDGETS = 6  # torch compiles a function for eight kinds of arguments at most


def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]", help="An export, or the Hub id of one; or a folder of a DiT with an adapter (ddit)."
        ),
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Instead of a model: random weights, S/2 to XL/8 (teacher's patch size).")
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="ID|DIR", help="Stock DiT to compare with. Default: random weights; an adapter's own base."
        ),
    ] = None,
    size: Annotated[int, typer.Option(help="--shape: side of the latents; 32 is 256 px.")] = 32,
    ratio: Annotated[float | None, typer.Option(help="--shape: positions per token. Default: patch squared.")] = None,
    layers: Annotated[int | None, typer.Option(help="--shape: fewer blocks than the shape has.")] = None,
    patches: Annotated[
        str | None, typer.Option(metavar="m,m", help="--shape: a DiT with an adapter for patches m times as large.")
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(metavar="m:share,...", help="ddit: runs with factors for shares of the steps too.")
    ] = None,
    tail_drop: Annotated[str, typer.Option(metavar="ρ,ρ", help="Tail drops of the student.")] = TAIL_DROPS,
    uncond_tail_drop: Annotated[float, typer.Option(metavar="ρ", help="Of the unconditional half, Lite-CFG.")] = 0.9,
    tokens: Annotated[
        str | None, typer.Option(metavar="M,M", help="Fixed budgets to measure too, tokens of every sample.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Images at a time.")] = 1,
    steps: Annotated[int, typer.Option(help="DDIM steps of a run.")] = 4,
    repeats: Annotated[int, typer.Option(help="Rounds, after one that warms up.")] = 3,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ... Default: cuda where there is one.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Precision of the weights.")] = "fp32",
    compile_: Annotated[
        bool, typer.Option("--compile", help="Compile the blocks of both, all of the student with --tokens.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Time teacher and student in turn: runs, FLOPs, the share of their speed-up that is real, memory, parts."""
    drops, budgets = parse_drops(tail_drop), _parse_tokens(tokens)
    factors = list(parse_patches(patches)) if patches is not None else []
    counts = {"--batch": batch, "--steps": steps, "--repeats": repeats, "--size": size, "--layers": layers}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise UpcycleError(f"{name} {value} must be at least 1")
    if steps > 1000:
        raise UpcycleError(f"--steps {steps} must be at most 1000, the training's timesteps")
    if not 0 <= uncond_tail_drop < 1:
        raise UpcycleError(f"--uncond-tail-drop {uncond_tail_drop:g} must be at least 0 and less than 1")
    if (model is None) == (shape is None):
        raise UpcycleError("give either a model or --shape, such as --shape XL/2")
    if model and (ratio is not None or layers is not None or size != 32):
        raise UpcycleError("--size, --ratio and --layers are for --shape; a model has its own")
    if model and patches is not None:
        raise UpcycleError("--patches is for --shape; an adapter has its own")
    if patches is not None and ratio is not None:
        raise UpcycleError("--ratio is of a student that chunks, --patches of one that does not; give one of them")

    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler talks on stderr

    from upcycle.cli.device import to_device, torch_dtype
    from upcycle.cli.show import print_json, progress, quiet_libraries, working

    quiet_libraries()
    with working("loading"):
        from upcycle.evaluation import bench as measuring
        from upcycle.evaluation.speed import machine
        from upcycle.models import ddit
        from upcycle.sampling.patches import parse_schedule

        if shape and factors:
            config = ddit.DDiTConfig("DiTTransformer2DModel", factors)
            student = ddit.attach(_stock(shape, size, layers), config)
            theirs = _base_of(student)
        else:
            theirs, student = _from_shape(shape, size, ratio, layers) if shape else _from_model(str(model), teacher)
        coarse: Any = getattr(student, "ddit", None)
        if coarse and (budgets or tail_drop != TAIL_DROPS):
            raise UpcycleError("--tokens and --tail-drop are of a student that chunks; this one takes coarser patches")
        if schedule is not None and not coarse:
            raise UpcycleError(
                "--schedule is of a DiT with an adapter for coarser patches; with --shape give --patches"
            )
        fixed = tuple(parse_schedule(schedule, coarse.patches)) if schedule is not None else ()
        settings = measuring.Settings(batch, steps, repeats, drops, uncond_tail_drop, budgets, fixed)
        if shape and teacher:
            theirs = _teacher(teacher)
        if teacher:
            for name in ("sample_size", "in_channels", "num_layers", "num_attention_heads", "attention_head_dim"):
                if theirs.config[name] != student.config[name]:
                    raise UpcycleError(
                        f"--teacher {teacher} has {name} {theirs.config[name]} where the student has "
                        f"{student.config[name]}; give the DiT that it was made from"
                    )
        if budgets and max(budgets) > student.config.sample_size**2:
            raise UpcycleError(f"--tokens {max(budgets)}: this model keeps at most {student.config.sample_size**2}")
        models = [to_device(m, device).to(torch_dtype(dtype)).eval().requires_grad_(False) for m in (theirs, student)]
        for module in (getattr(student, name) for name in student._keep_in_fp32_modules or []):
            if module is not None:
                module.float()  # as from_pretrained keeps it
        if compile_:
            for block in (block for m in models for block in m.transformer_blocks):
                block.compile(dynamic=True)
    runs = len(measuring.variants_of(models[0], models[1], settings)) * (repeats + 1)
    with progress() as bar:
        task = bar.add_task("sampling runs, in turn", total=runs)
        report = measuring.bench(*models, settings, compiled=compile_, step=lambda: bar.advance(task))
    report |= {
        "model": model or shape,
        "machine": machine(models[1].device),
        "settings": {**vars(settings), "dtype": dtype, "compile": compile_, "size": student.config.sample_size},
    }
    if as_json:
        print_json(report)
        return
    _show(report)


def parse_drops(text: str) -> tuple[float, ...]:
    try:
        drops = tuple(float(part) for part in text.split(","))
    except ValueError:
        drops = (-1.0,)
    if not all(0 <= drop < 1 for drop in drops):
        raise UpcycleError(f"--tail-drop {text} is not a list of numbers from 0 up to 1, such as 0,0.3,0.6")
    return tuple(dict.fromkeys(drops))


def _parse_tokens(text: str | None) -> tuple[int, ...]:
    try:
        tokens = tuple(int(part) for part in text.split(",")) if text is not None else ()
    except ValueError:
        tokens = (0,)
    if not all(n >= 1 for n in tokens) or len(tokens) > MOST_BUDGETS:
        raise UpcycleError(f"--tokens {text} is not a list of up to {MOST_BUDGETS} numbers of tokens, such as 64,128")
    return tuple(dict.fromkeys(tokens))


def _from_shape(shape: str, size: int, ratio: float | None, layers: int | None) -> tuple[Any, Any]:
    from upcycle.evaluation.speed import keep_tokens
    from upcycle.models.chunked_dit import ChunkedDiT

    teacher = _stock(shape, size, layers)
    c = teacher.config
    kept = c.patch_size**2 if ratio is None else ratio
    if not 1 <= kept <= size**2:
        raise UpcycleError(f"--ratio {kept:g} must be between 1 and the {size**2} positions")
    keys = ("num_attention_heads", "attention_head_dim", "num_layers", "in_channels", "out_channels", "sample_size",
            "patch_size", "norm_eps")  # fmt: skip
    common = {key: c[key] for key in keys}
    student = ChunkedDiT(**common, num_classes=c.num_embeds_ada_norm, ratio=kept, guide=0.0)
    keep_tokens(student, size**2 / kept)
    return teacher, student


def _stock(shape: str, size: int, layers: int | None) -> Any:
    """A stock DiT of this shape, random weights."""
    from upcycle.graft.verify import stock_dit
    from upcycle.sources import SHAPES, DiTConfig

    name, _, patch = shape.partition("/")
    if name not in SHAPES or not patch.isdecimal() or not int(patch) or size % int(patch):
        raise UpcycleError(
            f"--shape {shape} is unknown for --size {size}; write {', '.join(SHAPES)}, a slash and a patch size that "
            "divides the size, such as XL/2"
        )

    heads, head_dim, depth = SHAPES[name]
    common: dict[str, Any] = {
        "num_attention_heads": heads, "attention_head_dim": head_dim, "num_layers": layers or depth, "in_channels": 4,
        "out_channels": 8, "sample_size": size, "patch_size": int(patch), "num_classes": 1000, "norm_eps": 1e-5,
    }  # fmt: skip
    return stock_dit(DiTConfig(**common, time_embedding="diffusers"))


def _base_of(student: Any) -> Any:
    """The stock DiT below an adapter, with the same weights."""
    from diffusers import DiTTransformer2DModel

    base = DiTTransformer2DModel.from_config(dict(student.config))
    state = student.state_dict()
    base.load_state_dict({name: state[name] for name in base.state_dict()}, assign=True)
    return base


def _from_model(model: str, teacher: str | None) -> tuple[Any, Any]:
    from pathlib import Path

    from upcycle.evaluation.flops import teacher_patch
    from upcycle.graft.patches import adapter_folder
    from upcycle.graft.verify import stock_dit
    from upcycle.sampling.pipeline import load_pipeline
    from upcycle.sources import DiTConfig, hub
    from upcycle.sources.student import load_student

    path = Path(model)
    if not path.exists() and hub.is_hub_id(model):
        path, _ = hub.fetch(model, revision=None, variant=None)
    if adapter_folder(path):
        student = load_pipeline(model).transformer
        return _teacher(teacher) if teacher else _base_of(student), student
    student = load_student(path)
    if teacher:
        return _teacher(teacher), student
    c = student.config
    patch = teacher_patch(c)
    keys = ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "out_channels", "sample_size",
            "num_classes", "norm_eps")  # fmt: skip
    values = {key: c[key] for key in keys}
    return stock_dit(DiTConfig(**values, patch_size=patch, time_embedding="diffusers")), student


def _teacher(spec: str) -> Any:
    from upcycle.graft.verify import load_teacher
    from upcycle.sources import DiTConfig, open_source

    source = open_source(spec)
    if not isinstance(source.config, DiTConfig):
        raise UpcycleError(f"--teacher {spec} is no fixed-patch DiT; give the DiT that the model was made from")
    return load_teacher(source)


def _show(report: dict[str, Any]) -> None:
    from rich.table import Table

    from upcycle.cli.show import size, stdout

    settings = report["settings"]
    stdout.print(f"{report['model']}, batch {settings['batch']}, {settings['dtype']}, on {report['machine']}")
    table = Table("", "tokens", "ms", "time", "FLOPs", "realised", "images/s", "memory")
    for name, row in report["variants"].items():
        table.add_row(
            name,
            f"{row['tokens']:.0f}",
            f"{row['ms_per_forward']:.4g}",
            f"{row['times_teacher']:.2f} x",
            f"{row['flops_times_teacher']:.2f} x",
            f"{row['realised_share']:.0%}",
            f"{row['images_per_second']:.3g}",
            "-" if row["peak_bytes"] is None else size(row["peak_bytes"]),
        )
    stdout.print(table, soft_wrap=False)
    if report["parts"]:
        parts = Table("share of the time", *(f"ρ={rho}" for rho in report["parts"]))
        for name in next(iter(report["parts"].values())):
            parts.add_row(name.replace("_", " "), *(f"{shares[name]:.1%}" for shares in report["parts"].values()))
        stdout.print(parts, soft_wrap=False)
    stdout.print(
        f"ms: a call of the model, median of {settings['repeats']} interleaved runs of {settings['steps']} DDIM steps, "
        "no VAE; time and FLOPs: beside the (guided) teacher's; realised: measured speed-up / speed-up in FLOPs"
    )
