"""A recipe from end to end: open the teacher, start the student, train, export."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from diffusers import DiTTransformer2DModel

from upcycle.errors import UpcycleError
from upcycle.graft.components import with_vae
from upcycle.graft.convert import convert
from upcycle.graft.export import export_student
from upcycle.graft.plan import Options, make_plan
from upcycle.graft.verify import load_student, load_teacher
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.output import check_output, write_text
from upcycle.recipe import Recipe
from upcycle.sources import DiTConfig, Source, open_source
from upcycle.sources.weight_files import read_json
from upcycle.training.data import ShardedData, TensorData, open_data
from upcycle.training.digits import TEACHER
from upcycle.training.loop import train
from upcycle.training.state import checkpoints, newest


@dataclass
class Prepared:
    """All that a run needs, checked before its first step."""

    recipe: Recipe
    out: Path
    start: Path
    source: Source
    student: ChunkedDiT
    teacher: DiTTransformer2DModel
    data: TensorData | ShardedData


def ranks() -> PartialState:
    """The processes of this run. accelerate joins them over the CPU only where it is told to."""
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu)


def open_teacher(recipe: Recipe) -> Source:
    """The teacher of a recipe; ``digits`` is the shipped one."""
    spec = str(TEACHER) if recipe.teacher == "digits" else recipe.teacher
    source = open_source(spec, revision=recipe.revision, weights=recipe.weights, heads=recipe.heads)
    if not isinstance(source.config, DiTConfig):
        raise UpcycleError(f"teacher {recipe.teacher} is a DC-DiT; a fixed-patch DiT is needed")
    return with_vae(source, recipe.vae) if recipe.vae else source


def prepare(recipe: Recipe, *, resume: bool = False) -> Prepared:
    """Open and check everything; converts the teacher into ``out/start`` where the recipe names no student.

    Call on every rank; one of them converts, while the others wait.

    Raises:
        UpcycleError: ``out`` holds a run already (without ``resume``), or a part of the recipe does not fit.
    """
    out = Path(recipe.out)
    start = out / "start" if recipe.student is None else Path(recipe.student)
    _check_batch(recipe, ranks().num_processes)
    if out.exists() and not out.is_dir():
        raise UpcycleError(f"out {out} is a file; choose another 'out'")
    check_output(out / "export", force=True, keep=(start,))
    if resume:
        newest(out / "checkpoints", recipe)
    elif checkpoints(out / "checkpoints"):
        raise UpcycleError(f"{out} holds a run already; continue it with --resume, or choose another 'out'")
    source = open_teacher(recipe)
    data = open_data(recipe.data)
    c = source.config
    assert isinstance(c, DiTConfig)
    expected = (c.in_channels, c.sample_size, c.sample_size)
    if data.sample_shape != expected:
        raise UpcycleError(
            f"data {recipe.data} has samples of {list(data.sample_shape)} and the teacher takes {list(expected)}"
        )
    if data.labels.min() < 0 or data.labels.max() >= c.num_classes:
        raise UpcycleError(f"data {recipe.data} has labels outside 0..{c.num_classes - 1}, the teacher's classes")
    if recipe.losses.distill == 0 and c.out_channels == 2 * c.in_channels:
        raise UpcycleError(
            f"losses.distill is 0 and teacher {recipe.teacher} predicts a sigma, which no other loss trains; "
            "give losses.distill a weight"
        )
    if recipe.student is None and not resume:
        if ranks().is_main_process:
            options = Options(**recipe.convert.model_dump(), seed=recipe.seed)
            convert(make_plan(source, options), start, force=True)
        ranks().wait_for_everyone()
    student = _open_student(start, c)
    student.requires_grad_(True)
    return Prepared(recipe, out, start, source, student, load_teacher(source), data)


def _check_batch(recipe: Recipe, number: int) -> None:
    share, group = recipe.batch_size // number, recipe.losses.ratio_group
    if recipe.batch_size % number:
        raise UpcycleError(f"batch_size {recipe.batch_size} does not divide by the {number} ranks; choose a multiple")
    if share > group and share % group:
        raise UpcycleError(
            f"losses.ratio_group {group} does not divide the {share} samples of a rank (batch_size "
            f"{recipe.batch_size} on {number}); choose a divisor of {share}"
        )


def _open_student(start: Path, teacher: DiTConfig) -> ChunkedDiT:
    config = start / "transformer" / "config.json"
    if not config.is_file():
        raise UpcycleError(f"student {start} is no export: it has no transformer/config.json; convert the teacher anew")
    theirs = read_json(f"student {start}", config)
    if theirs.get("_class_name") != "ChunkedDiT":
        raise UpcycleError(f"student {start} is a {theirs.get('_class_name')}; convert it first")
    student = load_student(start)
    differ = [
        f"{name} {student.config[name]} where the teacher has {getattr(teacher, name)}"
        for name in ("in_channels", "out_channels", "sample_size", "num_classes")
        if student.config[name] != getattr(teacher, name)
    ]
    if differ:
        raise UpcycleError(f"student {start} has {', '.join(differ)}; choose the teacher that it was converted from")
    return student


def finetune(
    prepared: Prepared, *, resume: bool = False, on_step: Callable[[dict[str, float]], None] = lambda row: None
) -> Path:
    """Train and export; returns the folder of the export, ``out/export``. Call on every rank."""
    recipe, out = prepared.recipe, prepared.out
    out.mkdir(parents=True, exist_ok=True)
    if ranks().is_main_process:
        write_text(out / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    student = train(recipe, prepared.student, prepared.teacher, prepared.data, out, resume=resume, on_step=on_step)
    export = out / "export"
    if ranks().is_main_process:
        export_student(student, prepared.start, export)
    ranks().wait_for_everyone()
    return export
