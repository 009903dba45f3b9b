"""A recipe from end to end: open the teacher, start the student, train, export."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml
from diffusers import DiTTransformer2DModel

from upcycle.errors import UpcycleError
from upcycle.graft.convert import convert
from upcycle.graft.export import export_student
from upcycle.graft.plan import Options, make_plan
from upcycle.graft.verify import load_student, load_teacher
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.output import write_text
from upcycle.recipe import Recipe
from upcycle.sources import DiTConfig, Source, open_source
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


def open_teacher(recipe: Recipe) -> Source:
    """The teacher of a recipe; ``digits`` is the shipped one."""
    if recipe.teacher == "digits":
        return open_source(str(TEACHER))
    source = open_source(recipe.teacher, revision=recipe.convert.revision)
    if not isinstance(source.config, DiTConfig):
        raise UpcycleError(f"teacher {recipe.teacher} is a DC-DiT; a fixed-patch DiT is needed")
    return source


def prepare(recipe: Recipe, *, resume: bool = False) -> Prepared:
    """Open and check everything; converts the teacher into ``out/start`` where the recipe names no student.

    Raises:
        UpcycleError: ``out`` holds a run already (without ``resume``), or a part of the recipe does not fit.
    """
    out = Path(recipe.out)
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
    if recipe.student is None:
        start = out / "start"
        if not (start / "transformer").is_dir():
            options = Options(**recipe.convert.model_dump(exclude={"revision"}), seed=recipe.seed)
            convert(make_plan(source, options), start, force=True)
    else:
        start = Path(recipe.student)
        if not (start / "transformer" / "config.json").is_file():
            raise UpcycleError(f"student {start} is no export: it has no transformer/config.json")
        theirs = json.loads((start / "transformer" / "config.json").read_text())
        if theirs.get("_class_name") != "ChunkedDiT":
            raise UpcycleError(f"student {start} is a {theirs.get('_class_name')}; convert it first")
    student = load_student(start)
    if (student.config.in_channels, student.config.sample_size, student.config.sample_size) != expected:
        raise UpcycleError(f"student {start} takes other inputs than the teacher's {list(expected)}")
    student.requires_grad_(True)
    return Prepared(recipe, out, start, source, student, load_teacher(source), data)


def finetune(
    prepared: Prepared, *, resume: bool = False, on_step: Callable[[dict[str, float]], None] = lambda row: None
) -> Path:
    """Train and export; returns the folder of the export, ``out/export``."""
    recipe, out = prepared.recipe, prepared.out
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    student = train(recipe, prepared.student, prepared.teacher, prepared.data, out, resume=resume, on_step=on_step)
    export = out / "export"
    export_student(student, prepared.start, export)
    return export
