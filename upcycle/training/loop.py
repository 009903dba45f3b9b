"""Post-training: the student learns where tokens are needed while it stays close to its teacher.

What a step draws comes from (seed, step) alone and everything else is in the checkpoints, so that a continued run ends
where an uninterrupted one ends, on any number of ranks.
"""

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from diffusers import DiTTransformer2DModel

from upcycle.errors import UpcycleError
from upcycle.graft.pieces import DTYPES
from upcycle.latents.reader import LatentFolder
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.recipe import Recipe
from upcycle.training import chunking, patches, state
from upcycle.training.data import Batch, Draws, TensorData, batches
from upcycle.training.fsdp import fill_state, is_sharded, make_accelerator
from upcycle.training.guard import Guard
from upcycle.training.log import Log
from upcycle.training.patches import PatchStudent
from upcycle.training.watch import Watch


@dataclass(frozen=True)
class Trained:
    """What a run came to.

    ``student``: the one with averaged weights (on the CPU, fp32, with the guide of the end), of method ddit the
    adapter's tensors; the ``step`` that these are of, steps done and skipped, and what was changed in the recipe
    between a checkpoint and its continuation.
    """

    student: Any
    step: int
    steps: int
    skipped: int
    changes: list[dict[str, Any]]


class Interrupted(Exception):
    """The run was interrupted after a checkpoint was saved."""


def place_teacher(teacher: DiTTransformer2DModel, recipe: Recipe, device: torch.device) -> DiTTransformer2DModel:
    """The teacher on the device, in a precision of its own; bases with an adapter keep theirs."""
    if isinstance(teacher, torch.nn.ModuleList) or hasattr(teacher, "ddit"):
        return teacher.to(device).eval()
    return teacher.to(device, teacher_dtype(recipe)).eval().requires_grad_(False)


def teacher_dtype(recipe: Recipe) -> torch.dtype:
    """The teacher's precision: the recipe's ``teacher_precision``, else that of its autocast."""
    return {"no": torch.float32, **DTYPES}[recipe.teacher_precision or recipe.mixed_precision]


def train(
    recipe: Recipe,
    student: ChunkedDiT | PatchStudent,
    teacher: DiTTransformer2DModel,
    data: TensorData | LatentFolder,
    out: Path,
    *,
    validation: TensorData | LatentFolder | None = None,
    start: Path | None = None,
    resume: bool = False,
    on_step: Callable[[dict[str, Any]], None] = lambda row: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Trained:
    """Run a recipe.

    Writes ``out/log.csv``, ``out/checkpoints`` and what `Watch` writes. ``start`` is the export that the student comes
    from (its VAE and scheduler draw previews). ``on_step`` gets the row of every step, ``on_note`` what a person should
    know, on the main rank.

    Raises:
        UpcycleError: a checkpoint that is damaged or of another recipe or data, too many steps in a row whose loss or
            gradient is not finite (or all of them), or no space for the checkpoint of an interrupted run.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    method: Any = patches if recipe.method == "ddit" else chunking
    options: dict[str, Any] = {"log_with": list(recipe.trackers) or None, "project_dir": out}
    if recipe.method == "ddit":  # a step trains one size
        options["kwargs_handlers"] = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    accelerator = make_accelerator(mixed_precision=recipe.mixed_precision, **options)
    set_seed(recipe.seed)
    out.mkdir(parents=True, exist_ok=True)
    config = student.config
    method.prepare_student(student, recipe)
    optimizer = method.make_optimizer(student, recipe, fused=accelerator.device.type == "cuda")
    teacher = place_teacher(teacher, recipe, accelerator.device)
    model, optimizer = accelerator.prepare(student, optimizer)
    student = accelerator.unwrap_model(model)
    if is_sharded(student):
        fill_state(optimizer)
    run = state.RunState(student, recipe.ema, data.fingerprint)
    state.register(accelerator)
    folder = out / "checkpoints"
    note = on_note if accelerator.is_main_process else lambda text: None
    if resume:
        checkpoint = state.newest(folder, recipe)
        if checkpoint:
            state.load(accelerator, checkpoint, run)
            state.check_data(checkpoint, run, data.fingerprint)
            run.changes += state.changes(checkpoint, recipe, run.step)
        else:
            note(f"no checkpoint in {folder} yet: the run starts anew")

    updater = method.Updater(recipe, accelerator, model, teacher, optimizer, run)
    guard = Guard(recipe, updater, folder)
    watch = Watch(recipe, accelerator, model, teacher, run, validation, start, out)
    draws = Draws(data, recipe, config.num_train_timesteps, config.num_classes)
    share = batches(
        draws,
        recipe,
        run.step,
        accelerator.process_index,
        accelerator.num_processes,
        pin=accelerator.device.type == "cuda",
    )
    log = Log(out / "log.csv", method.COLUMNS, run, recipe.log_every) if accelerator.is_main_process else None
    steps = 0 if watch.ended else recipe.steps - run.step
    try:
        with _StopSignal() as stop:
            clock = time.perf_counter()
            for batch, waited in _timed(iter(share), accelerator.device, steps):
                row = updater.update(batch, stop=stop.caught)
                row |= {"step_seconds": time.perf_counter() - clock, "data_seconds": waited}
                mean = log.write(row) if log else None
                for text in guard.look(row, batch):
                    note(text)
                on_step(row)
                best_before = run.best
                ended = watch.look(note)
                last = run.step == recipe.steps or ended
                stopped = row["stop"]
                if last and log:
                    mean = log.flush() or mean  # before the checkpoint, or a continued run would write it again
                if mean:
                    watch.track(mean)
                # Not among steps that are skipped: what the run is to go on from lies before them.
                due = run.step % recipe.save_every == 0 and not run.skipped_in_row
                if stopped or last or watch.is_best or due:
                    saved = _save(accelerator, folder, recipe, run, note, must=stopped and not last)
                    if watch.is_best and not saved:
                        run.best = best_before  # weights that no checkpoint holds cannot be exported
                if ended:
                    note(f"stopped early at step {run.step}: {run.since_best} validations without a better one")
                    break
                if stopped and not last:
                    raise Interrupted(run.step)
                clock = time.perf_counter()
    except UpcycleError:
        if log:
            log.flush()  # what led to it; these steps are in no checkpoint
        raise
    finally:
        if log:
            log.close()
        for tracker in accelerator.trackers:
            tracker.finish()

    if run.skipped == run.step:
        raise UpcycleError(f"{out}: no step of {run.step} was finite, so nothing was learned; look for NaN in the data")
    if run.skipped:
        note(f"{run.skipped} of {run.step} steps were skipped, because they were not finite")
    steps, skipped, changes = run.step, run.skipped, run.changes
    if recipe.export == "best" and run.best:
        best = folder / f"step-{run.best['step']:07.0f}"
        if best.exists():
            state.load(accelerator, best, run)
        else:
            note(f"warning: there was no space to save {best}, the best; the last weights are exported instead")
    return Trained(method.finished(student, run, recipe, updater), run.step, steps, skipped, changes)


def _timed(share: Iterator[Batch], device: torch.device, steps: int) -> Iterator[tuple[Batch, float]]:
    """``steps`` batches on the device, each with the seconds that waiting for it took."""
    for _ in range(steps):
        start = time.perf_counter()
        batch = next(share).to(device)
        yield batch, time.perf_counter() - start


def _save(
    accelerator: Accelerator,
    folder: Path,
    recipe: Recipe,
    run: state.RunState,
    note: Callable[[str], None],
    *,
    must: bool,
) -> bool:
    """Save, and say whether it could; where space runs out the run goes on with a warning, unless it ends here."""
    if state.save(accelerator, folder, recipe, run):
        return True
    kept = state.checkpoints(folder)
    newest = f"the newest is {kept[-1]}" if kept else "there is none yet"
    if must:
        raise UpcycleError(f"{folder}: no space left for the checkpoint of step {run.step}; {newest}; make room")
    note(f"warning: no space left for the checkpoint of step {run.step} in {folder}; {newest}; make room")
    return False


class _StopSignal:
    """Remembers SIGINT and SIGTERM while a step finishes; a second one stops at once."""

    def __enter__(self) -> "_StopSignal":
        self.caught = False
        self._before = {s: signal.signal(s, self._catch) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _catch(self, number: int, frame: FrameType | None) -> None:
        if self.caught:
            raise KeyboardInterrupt
        self.caught = True
