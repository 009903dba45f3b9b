"""A recipe from end to end: open the teacher, start the student, train, export."""

import dataclasses
import fcntl
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from accelerate.tracking import get_available_trackers
from accelerate.utils import parse_flag_from_env
from diffusers import DiTTransformer2DModel

from upcycle import provenance
from upcycle.errors import UpcycleError
from upcycle.graft import patches as adapters
from upcycle.graft.components import with_vae
from upcycle.graft.convert import convert
from upcycle.graft.export import export_student
from upcycle.graft.plan import Options, make_plan
from upcycle.graft.verify import load_student, load_teacher
from upcycle.latents.prompts import PromptFolder
from upcycle.latents.reader import LatentFolder
from upcycle.latents.vae import describe, load_vae
from upcycle.models import ddit
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.output import check_output, disk_full, write_text
from upcycle.recipe import Recipe
from upcycle.sources import DiTConfig, Source, hub, open_source
from upcycle.sources.backbone import Backbone, open_backbone
from upcycle.sources.weight_files import read_json
from upcycle.training import flow, results
from upcycle.training.data import TensorData, open_data
from upcycle.training.digits import TEACHER
from upcycle.training.loop import train
from upcycle.training.patches import VARIANCE_SAMPLES, PatchStudent, check_launch, measured_variance
from upcycle.training.state import checkpoints, clean, newest


@dataclass
class Prepared:
    """All that a run needs, checked before its first step."""

    recipe: Recipe
    out: Path
    start: Path
    source: Source | list[Backbone]
    """A list: the bases of adapters for a pipeline that reads text."""
    student: ChunkedDiT | PatchStudent
    teacher: DiTTransformer2DModel
    data: TensorData | LatentFolder
    validation: TensorData | LatentFolder | None
    lock: "Lock | None" = None
    """Held until the run ends."""


def ranks() -> PartialState:
    """The processes of this run. accelerate joins them over the CPU only where it is told to."""
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=cpu)


def open_teacher(recipe: Recipe) -> Source:
    """The teacher of a recipe; ``digits`` is the shipped one."""
    spec = str(TEACHER) if recipe.teacher == "digits" else recipe.teacher
    source = open_source(spec, revision=recipe.revision, weights=recipe.weights, heads=recipe.heads)
    if not isinstance(source.config, DiTConfig):
        raise UpcycleError(
            f"teacher {recipe.teacher} is a converted model or a DC-DiT; give the fixed-patch DiT that it was made from"
        )
    if recipe.teacher == "digits":
        source = dataclasses.replace(source, spec="digits")
    return with_vae(source, recipe.vae) if recipe.vae else source


def student_folder(recipe: Recipe) -> Path | None:
    """The export that a recipe starts from, fetched where it is a Hub id; None where the teacher is converted."""
    if recipe.student is None:
        return None
    if not Path(recipe.student).exists() and hub.is_hub_id(recipe.student):
        return hub.fetch(recipe.student, revision=recipe.student_revision, variant=None)[0]
    if recipe.student_revision is not None:
        raise UpcycleError(f"student_revision is for Hub ids, and student {recipe.student} is none; leave it out")
    return Path(recipe.student)


def check(recipe: Recipe) -> Source | list[Backbone]:
    """The teacher, after all that can be checked without data; raises `UpcycleError` for what does not fit.

    A list is of a pipeline that reads text (method ddit).
    """
    _check_batch(recipe, ranks().num_processes)
    if backbones := flow.text_backbones(recipe):
        for backbone in backbones:
            flow.stored_dtype(recipe, backbone)
        if wrong := check_launch():
            raise UpcycleError(wrong)
        _check_trackers(recipe)
        return backbones
    if recipe.component is not None:
        raise UpcycleError(f"component: teacher {recipe.teacher} has one transformer; leave it out")
    source = open_teacher(recipe)
    assert isinstance(source.config, DiTConfig)
    if recipe.preview:
        _check_preview(recipe, source)
    if recipe.method == "dc-dit":
        _check_sigma(recipe, source.config)
    elif wrong := check_launch():
        raise UpcycleError(wrong)
    _check_trackers(recipe)
    return source


def prepare(recipe: Recipe, *, resume: bool = False) -> Prepared:
    """Open and check everything; converts the teacher into ``out/start`` where the recipe names no student.

    Call on every rank; one of them converts, while the others wait.

    Raises:
        UpcycleError: ``out`` holds a run already (without ``resume``), or a part of the recipe does not fit.
    """
    out = Path(recipe.out)
    start = student_folder(recipe) or out / "start"
    if out.exists() and not out.is_dir():
        raise UpcycleError(f"out {out} is a file; choose another 'out'")
    check_output(out / "export", force=True, keep=(start,))
    begun = newest(out / "checkpoints", recipe) if resume else None
    if resume and not out.exists():
        raise UpcycleError(f"{out} does not exist, so there is no checkpoint to resume from; run without --resume")
    if not resume and checkpoints(out / "checkpoints"):
        raise UpcycleError(f"{out} holds a run already; continue it with --resume, or choose another 'out'")
    source = check(recipe)
    data: TensorData | LatentFolder
    validation: TensorData | LatentFolder | None
    if isinstance(source, list):
        data = flow.open_prompts(recipe.data, source[0])
        validation = flow.open_prompts(recipe.validation.data, source[0]) if recipe.validation else None
    else:
        data = open_fitting_data(recipe.data, source)
        validation = open_fitting_data(recipe.validation.data, source) if recipe.validation else None
    lock = Lock(out) if ranks().is_main_process else None
    try:
        first = recipe.student is None and not begun
        student: ChunkedDiT | PatchStudent
        if isinstance(source, list):
            assert isinstance(data, PromptFolder)
            student = _start_text(recipe, source, start, data, convert_first=first)
            teacher = torch.nn.ModuleList(student.bases)
        elif recipe.method == "ddit":
            student = _start_adapter(recipe, source, start, data, convert_first=first)
            teacher = student.base
        else:
            student = _start_student(recipe, source, start, convert_first=first)
            teacher = load_teacher(source)
    except BaseException:
        if lock:
            lock.release()
        raise
    return Prepared(recipe, out, start, source, student, teacher, data, validation, lock)


def _start_student(recipe: Recipe, source: Source, start: Path, *, convert_first: bool) -> ChunkedDiT:
    assert isinstance(source.config, DiTConfig)
    if convert_first:
        if ranks().is_main_process:
            options = Options(**recipe.convert.model_dump(), seed=recipe.seed)
            convert(make_plan(source, options), start, force=True)
        ranks().wait_for_everyone()
    student = _open_student(start, source.config)
    if student.config.scaffold == "paper" and any("head" in stage.freeze for stage in recipe.stages):
        raise UpcycleError("freeze: the paper scaffold's head is fresh and predicts 0; leave 'head' out")
    return student


def _start_adapter(
    recipe: Recipe, source: Source, start: Path, data: TensorData | LatentFolder, *, convert_first: bool
) -> PatchStudent:
    """The base with the adapter of ``start``, which is made first where the recipe names none."""
    if source.kind != "diffusers":
        raise UpcycleError(f"teacher {recipe.teacher}: method ddit takes a diffusers folder or a Hub id, no .pt")
    if convert_first:
        spec = str(TEACHER) if recipe.teacher == "digits" else recipe.teacher
        backbone = open_backbone(spec, revision=recipe.revision)
        if recipe.teacher == "digits":
            backbone = dataclasses.replace(backbone, spec="digits")
        _make_adapters(recipe, [backbone], start, alone=False)
    config, tensors = adapters.load(start, f"student {start}")[0]
    base = load_teacher(source)
    try:
        ddit.attach(base, config, tensors)
    except ValueError as error:
        raise UpcycleError(f"student {start}: {error}; choose the teacher that it was made from") from error
    if not config.variance and config.residual:
        rows = [i * len(data) // VARIANCE_SAMPLES for i in range(VARIANCE_SAMPLES)]
        config.variance = measured_variance(base, [data.row(i, flip=False, noise=None) for i in dict.fromkeys(rows)])
    return PatchStudent(base)


def adapter_plans(recipe: Recipe, backbones: list[Backbone], *, alone: bool) -> list[adapters.Plan]:
    """How the recipe's adapters start."""
    how = tuple(recipe.ddit.patches), recipe.ddit.rank, recipe.ddit.residual
    return [
        adapters.make_plan(
            backbone,
            adapters.Options(*how, component=backbone.subfolder or "transformer", seed=recipe.seed),
            adapter_only=alone,
        )
        for backbone in backbones
    ]


def _make_adapters(recipe: Recipe, backbones: list[Backbone], start: Path, *, alone: bool) -> None:
    """Convert on one rank, while the others wait."""
    if ranks().is_main_process:
        adapters.convert(adapter_plans(recipe, backbones, alone=alone), start, force=True)
    ranks().wait_for_everyone()


def _start_text(
    recipe: Recipe, backbones: list[Backbone], start: Path, data: PromptFolder, *, convert_first: bool
) -> PatchStudent:
    """As `_start_adapter`, of bases that read text: large, so that adapters are made and exported alone."""
    if convert_first:
        _make_adapters(recipe, backbones, start, alone=True)
    return flow.start_student(recipe, backbones, data, adapters.load(start, f"student {start}"), f"student {start}")


class Lock:
    """Keeps other processes from training in ``out`` until `release`, or the end of this process.

    Raises:
        UpcycleError: another process does.
    """

    def __init__(self, out: Path):
        out.mkdir(parents=True, exist_ok=True)
        self._path = out / ".lock"
        self._file = self._path.open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UpcycleError(f"another process trains in {out}; wait for it, or choose another 'out'") from None
        except OSError:
            return  # some network file systems cannot
        if not self._path.exists() or self._path.stat().st_ino != os.fstat(self._file.fileno()).st_ino:
            self._file.close()  # the one who let us in has removed it
            raise UpcycleError(f"another process trains in {out}; wait for it, or choose another 'out'")

    def release(self) -> None:
        """Let others in."""
        self._path.unlink(missing_ok=True)
        self._file.close()


def open_fitting_data(spec: str, source: Source) -> TensorData | LatentFolder:
    """Data that fits the teacher and its VAE; raises `UpcycleError` where it does not."""
    assert isinstance(source.config, DiTConfig)
    data, vae = open_data(spec), source.components.get("vae")
    data.check_fits(source.config, read_json(source.spec, vae / "config.json") if vae else None)
    theirs = data.vae if isinstance(data, LatentFolder) else None
    stated = theirs.get("encoder_sha256") if theirs else None
    if vae and theirs and stated and stated != _encoder_hash(vae):
        raise UpcycleError(
            f"data {spec} was made with the VAE {theirs.get('id')}, whose encoder has other weights than the teacher's "
            "VAE; make it again with the teacher's"
        )
    return data


@lru_cache(2)
def _encoder_hash(vae: Path) -> str:
    return describe(load_vae(str(vae)), str(vae))["encoder_sha256"]


def _check_sigma(recipe: Recipe, teacher: DiTConfig) -> None:
    """Some stage must train the learned sigma, or the head forgets it."""
    if teacher.out_channels == 2 * teacher.in_channels:
        for stage in recipe.stages:
            weight = stage.losses
            if weight.diffusion and not (weight.distill or weight.variational):
                raise UpcycleError(
                    f"teacher {recipe.teacher} predicts a sigma, which no loss of stage {stage.name} trains; give "
                    "losses.variational or losses.distill a weight"
                )


def _check_preview(recipe: Recipe, source: Source) -> None:
    assert recipe.preview is not None
    assert isinstance(source.config, DiTConfig)
    needed = {"vae", "scheduler"}
    if recipe.student is None and not needed <= source.components.keys():
        raise UpcycleError(f"preview needs a VAE and teacher {recipe.teacher} has none; add one with 'vae'")
    folder = student_folder(recipe)
    if folder is not None and not all((folder / name).is_dir() for name in needed):
        raise UpcycleError(f"preview needs a VAE and student {recipe.student} has none; convert it with one (--vae)")
    if max(recipe.preview.labels, default=0) >= source.config.num_classes:
        raise UpcycleError(
            f"preview.labels {recipe.preview.labels} go beyond the teacher's classes 0..{source.config.num_classes - 1}"
        )


def _describe_student(recipe: Recipe, start: Path) -> dict[str, Any]:
    """Which student the run began from, and its commit where that came from the Hub."""
    if recipe.student is None:
        return {}
    fetched = start != Path(recipe.student)  # into the cache, where a folder is called like its commit
    return {"student": recipe.student, "student_revision": start.name if fetched else None}


def _check_trackers(recipe: Recipe) -> None:
    installed = {str(kind) for kind in get_available_trackers()}
    for name in recipe.trackers:
        if name not in installed:
            raise UpcycleError(f"trackers: the package of {name} is not installed; pip install {name}, or leave it out")


def _check_batch(recipe: Recipe, number: int) -> None:
    parts = number * recipe.gradient_accumulation
    if recipe.batch_size % parts:
        raise UpcycleError(
            f"batch_size {recipe.batch_size} does not divide by {number} ranks x gradient_accumulation "
            f"{recipe.gradient_accumulation}; choose a multiple of {parts}"
        )
    share = recipe.batch_size // parts
    for stage in recipe.stages:
        group = stage.losses.ratio_group
        if share > group and share % group:
            raise UpcycleError(
                f"losses.ratio_group {group} of stage {stage.name} does not divide the {share} samples that a rank "
                f"sees at once (batch_size {recipe.batch_size} / {parts}); choose a divisor of {share}"
            )


def _describe_data(spec: str, data: TensorData | LatentFolder) -> dict[str, Any]:
    index = (data.index if isinstance(data, LatentFolder) else None) or {}
    return {"data": spec, "samples": len(data)} | {
        key: index[key] for key in ("command", "source", "teacher") if key in index
    }


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
    # Of the weights as they were, and no budget for training.
    student.register_to_config(calibration=None, budget=None, tokens=None)
    student.set_tail_drop(student.config.tail_drop)
    student.set_tokens(None)
    return student


def _finished(recipe: Recipe, out: Path) -> int | None:
    """Steps of the run in ``out``, if it has ended and has exported what this recipe asks for."""
    kept = checkpoints(out / "checkpoints")
    try:
        told = provenance.read(out / "export")
    except UpcycleError:
        return None
    last = told["history"][-1] if told and told["history"] else {}
    asked = (last.get("recipe") or {}).get("export") == recipe.export
    ended = bool(kept) and kept[-1].name == f"step-{last.get('steps') or 0:07d}"
    return last["steps"] if asked and ended else None


def finetune(
    prepared: Prepared,
    *,
    resume: bool = False,
    on_step: Callable[[dict[str, Any]], None] = lambda row: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Path:
    """Train and export; returns the folder of the export, ``out/export``. Call on every rank; see `train`."""
    try:
        return _finetune(prepared, resume, on_step, on_note)
    finally:
        if prepared.lock:
            prepared.lock.release()


def _finetune(
    prepared: Prepared,
    resume: bool,
    on_step: Callable[[dict[str, Any]], None],
    on_note: Callable[[str], None],
) -> Path:
    recipe, out = prepared.recipe, prepared.out
    export = out / "export"
    if resume and (steps := _finished(recipe, out)):
        on_note(f"{out} has done its {steps} steps already; nothing is left to do")
        return export
    if ranks().is_main_process:
        clean(out)
        write_text(out / "recipe.yaml", yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))
    text = isinstance(prepared.student, flow.FlowStudent) and recipe.label_dropout
    if text and not prepared.student.use_empty_prompt():
        on_note(flow.NO_EMPTY_PROMPT)
    try:
        trained = train(
            recipe,
            prepared.student,
            prepared.teacher,
            prepared.data,
            out,
            validation=prepared.validation,
            start=prepared.start,
            resume=resume,
            on_step=on_step,
            on_note=on_note,
        )
    except OSError as error:
        if disk_full(error):
            raise UpcycleError(f"{out}: no space left; make room, then go on with --resume") from error
        raise
    if ranks().is_main_process:
        result = results.read(out, recipe, trained.step)
        done = provenance.event(
            "finetune",
            steps=trained.steps,
            skipped=trained.skipped,
            exported_step=trained.step,
            changes=trained.changes,
            data=_describe_data(recipe.data, prepared.data),
            recipe=recipe.model_dump(mode="json"),
            **_describe_student(recipe, prepared.start),
        )
        if isinstance(prepared.student, PatchStudent):
            adapters.export(
                prepared.student.adapters(trained.student),
                prepared.start,
                export,
                event=done,
                evidence=result.evidence,
            )
        else:
            export_student(
                trained.student, prepared.start, export, event=done, evidence=result.evidence, pictures=result.pictures
            )
    ranks().wait_for_everyone()
    return export
