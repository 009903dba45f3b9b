"""Watching a run: validation loss beside the teacher's, sample grids, router maps, trackers."""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiTPipeline, DiTTransformer2DModel

from upcycle.errors import UpcycleError
from upcycle.evaluation import plots
from upcycle.evaluation.validation import TIMESTEPS, Validation, validate
from upcycle.latents.prompts import PromptFolder
from upcycle.latents.reader import LatentFolder
from upcycle.output import disk_full
from upcycle.recipe import Recipe
from upcycle.sampling.draw import clamp_null_class, draw
from upcycle.sampling.pipeline import load_vae_and_scheduler
from upcycle.sampling.trajectory import Trajectory
from upcycle.training import schedule
from upcycle.training.data import TensorData
from upcycle.training.flow import FlowStudent, distance
from upcycle.training.log import Rows
from upcycle.training.patches import PatchStudent
from upcycle.training.state import RunState

VALIDATION_COLUMNS = (
    "step", "student", "teacher", "tokens_kept", "block_flops",
    *(f"{what}_t{t}" for what in ("student", "teacher", "tokens") for t in TIMESTEPS),
)  # fmt: skip


class Watch:
    """Looks at the averaged student every so many steps; the same calls on every rank.

    Writes ``out/validation.csv`` and ``out/previews``. ``is_best``: the validation of this step was the best so far.
    """

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        model: torch.nn.Module,
        teacher: DiTTransformer2DModel,
        run: RunState,
        validation: TensorData | LatentFolder | None,
        start: Path | None,
        out: Path,
    ):
        self._recipe, self._accelerator, self._teacher, self._run = recipe, accelerator, teacher, run
        self._model, self._student = model, accelerator.unwrap_model(model)
        self._start, self._out, self._validation = start, out, validation
        self._guide = schedule.guide(recipe, recipe.steps, self._student.guide)  # of the export
        self.is_best = False
        self._teacher_loss: Validation | None = None
        self._teacher_images: torch.Tensor | None = None
        steps = torch.arange(self._student.config.num_train_timesteps, device=accelerator.device)
        self._alpha_bar = self._student.alpha_bar(steps).cpu()
        self._x0: torch.Tensor | None = None
        if validation is not None and recipe.validation is not None:
            count = min(len(validation), recipe.validation.samples or len(validation))
            rows = [i * len(validation) // count for i in range(count)]  # folders are sorted by class
            self._x0 = torch.stack([validation.row(i, flip=False, noise=None) for i in rows])
            self._labels = validation.labels[rows]
            if accelerator.is_main_process:
                self._rows = Rows(out / "validation.csv", VALIDATION_COLUMNS, run.step)
        if recipe.trackers:
            try:
                accelerator.init_trackers("upcycle", config=_flat(recipe.model_dump(mode="json")))
            except Exception as error:  # each has its own: not logged in, no network
                raise UpcycleError(f"trackers {', '.join(recipe.trackers)} cannot start: {error}") from error

    def track(self, row: dict[str, Any]) -> None:
        """Hand a row of the log to the trackers of the recipe."""
        if self._recipe.trackers:
            numbers = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
            self._accelerator.log(numbers, step=row["step"])

    def look(self, note: Callable[[str], None]) -> bool:
        """Validate and draw where it is due; returns whether the run should end (early stopping)."""
        step, preview = self._run.step, self._recipe.preview
        validation = self._recipe.validation if self._x0 is not None else None
        self.is_best = False
        last = step == self._recipe.steps
        if validation and (step % validation.every == 0 or last):
            self._validate(note)
        if preview and self._start is not None and (step % preview.every == 0 or last):
            try:
                self._preview()
            except Exception as error:
                if not disk_full(error):
                    raise
                note(f"warning: no space left for the preview of step {step}")
        return self.ended

    @property
    def ended(self) -> bool:
        """Whether the run should end before its last step: validation is patient no longer."""
        validation = self._recipe.validation if self._x0 is not None else None
        patience = validation.patience if validation else None
        return patience is not None and self._run.since_best >= patience

    # -- validation ---------------------------------------------------------------------------------------------------

    def _validate(self, note: Callable[[str], None]) -> None:
        run = self._run
        if self._teacher_loss is None:
            self._teacher_loss = self._measure(self._teacher)
        with run.averaged(self._student, self._guide):
            ours = self._measure(self._model)  # what accelerate prepared: under FSDP that is the one to call
        theirs = self._teacher_loss
        # A loss of nan is no best: nothing would be less.
        self.is_best = ours.mean_loss < (run.best["loss"] if run.best else math.inf)
        if self.is_best:
            run.best = {"step": run.step, "loss": ours.mean_loss}
        run.since_best = 0 if self.is_best else run.since_best + 1
        row = {
            "step": run.step,
            "student": ours.mean_loss,
            "teacher": theirs.mean_loss,
            "tokens_kept": ours.mean_tokens,
            "block_flops": ours.mean_share,
        }
        row |= {f"student_t{t}": ours.loss[t] for t in TIMESTEPS}
        row |= {f"teacher_t{t}": theirs.loss[t] for t in TIMESTEPS}
        row |= {f"tokens_t{t}": ours.tokens[t] for t in TIMESTEPS}
        if self._accelerator.is_main_process:
            self._rows.write(row)
        if self._recipe.trackers:
            numbers = {f"validation/{key}": value for key, value in row.items() if key != "step"}
            self._accelerator.log(numbers, step=run.step)
        best = ", the best so far" if self.is_best else ""
        note(f"step {run.step}: validation loss {ours.mean_loss:.4f}{best} (teacher {theirs.mean_loss:.4f})")

    def _measure(self, model: torch.nn.Module) -> Validation:
        a = self._accelerator
        with nullcontext() if model is self._teacher else a.autocast():  # the teacher has a precision of its own
            mine = self._at_every_size(model)
        values = torch.tensor([[*x.values()] for x in (mine.loss, mine.tokens, mine.share)], dtype=torch.float64)
        everyone = a.reduce(values.to(a.device), reduction="mean").tolist()
        return Validation(*(dict(zip(TIMESTEPS, row, strict=True)) for row in everyone))

    def _at_every_size(self, model: torch.nn.Module) -> Validation:
        """One validation; of a student with several patch sizes the mean over them."""
        a, sizes = self._accelerator, (None,)
        if model is not self._teacher and isinstance(self._student, PatchStudent):
            sizes = self._student.config.patches
        found = []
        for m in sizes:
            if m is not None:
                self._student.m = m
            ranks = {"rank": a.process_index, "ranks": a.num_processes}
            if not isinstance(self._student, FlowStudent):
                found.append(validate(model, self._x0, self._labels, self._alpha_bar, **ranks))
            elif model is self._teacher:  # which the student is measured against
                found.append(Validation(dict.fromkeys(TIMESTEPS, 0.0), dict.fromkeys(TIMESTEPS, math.nan)))
            else:
                assert isinstance(self._validation, PromptFolder)
                assert self._x0 is not None
                batch = self._recipe.batch_size // (a.num_processes * self._recipe.gradient_accumulation)
                with self._student.reading(self._validation):
                    found.append(distance(model, self._student, self._x0, self._labels, batch=batch, **ranks))
        loss = {t: sum(one.loss[t] for one in found) / len(found) for t in TIMESTEPS}
        return Validation(loss, found[0].tokens, found[0].share)

    # -- pictures -----------------------------------------------------------------------------------------------------

    def _preview(self) -> None:
        preview, run = self._recipe.preview, self._run
        assert preview is not None
        assert self._start is not None
        vae, scheduler = load_vae_and_scheduler(str(self._start), self._start)
        vae.to(self._accelerator.device)
        if self._teacher_images is None:
            clamp = clamp_null_class(self._teacher)
            self._teacher_images = self._draw(self._teacher, vae, scheduler)
            clamp.remove()  # it takes labels by name only
        trajectory = Trajectory(self._student, len(preview.labels), preview.steps)
        with run.averaged(self._student, self._guide), trajectory as seen:
            images = self._draw(self._student, vae, scheduler)
        if not self._accelerator.is_main_process:
            return
        folder = self._out / "previews"
        folder.mkdir(exist_ok=True)
        plots.side_by_side(
            self._teacher_images,
            images,
            folder / f"samples-{run.step:07d}.png",
            ("teacher", f"student, step {run.step}"),
        )
        x_t, probability, mask = (torch.stack(tensors, 1) for tensors in (seen.x_t, seen.probability, seen.mask))
        path = folder / f"router-{run.step:07d}.png"
        plots.router_maps(x_t, probability, mask, seen.timesteps, path, f"while sampling at step {run.step}")

    def _draw(self, transformer: torch.nn.Module, vae: torch.nn.Module, scheduler: Any) -> torch.Tensor:
        preview = self._recipe.preview
        assert preview is not None
        pipe = DiTPipeline(transformer, copy.deepcopy(vae).to(transformer.dtype), scheduler)
        pipe.set_progress_bar_config(disable=True)
        seeds = [preview.seed + i for i in range(len(preview.labels))]
        return draw(pipe, preview.labels, seeds, preview.steps, preview.guidance_scale).cpu()


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    """What trackers store as the configuration of a run: numbers, words, and the rest as text."""
    return {key: value if isinstance(value, int | float | str) else str(value) for key, value in options.items()}
