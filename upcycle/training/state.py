"""Checkpoints of a run: complete folders or nothing, made by accelerate, with what it does not know about."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError

from upcycle.errors import UpcycleError
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.output import disk_full
from upcycle.recipe import Recipe

# These may change between a run and its continuation.
RESUMABLE_CHANGES = {"out", "log_every", "save_every", "keep_checkpoints"}


class RunState:
    """Everything beyond model and optimizer: the step, the EMA of the parameters, the EMA of the router's bias."""

    def __init__(self, student: ChunkedDiT, decay: float):
        self.step = 0
        self.ema = EMAModel(student.parameters(), decay=decay)
        bias = router_bias(student)
        self.ema_bias = None if bias is None else bias.detach().clone()

    def update(self, student: ChunkedDiT) -> None:
        """Move the averages towards the student; call once a step."""
        self.ema.step(student.parameters())
        bias = router_bias(student)
        if bias is not None and self.ema_bias is not None:
            self.ema_bias.lerp_(bias, 1 - self.ema.cur_decay_value)

    def copy_to(self, student: ChunkedDiT) -> None:
        """Overwrite the student's weights by their averages."""
        self.ema.copy_to(student.parameters())
        bias = router_bias(student)
        if bias is not None and self.ema_bias is not None:
            bias.copy_(self.ema_bias)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "ema": self.ema.state_dict(), "ema_bias": self.ema_bias}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]
        device = self.ema.shadow_params[0].device
        self.ema.load_state_dict(state["ema"])
        self.ema.to(device)
        self.ema_bias = None if state["ema_bias"] is None else state["ema_bias"].to(device)


def router_bias(student: ChunkedDiT) -> torch.Tensor | None:
    """The controller's bias of a lean, learned router; None for the others."""
    return getattr(student.routing_module, "bias", None) if student.routing_module is not None else None


def register(accelerator: Accelerator) -> None:
    """Save and load the model under the same names on one rank and on many."""

    def strip(models: list[Any], weights: list[dict[str, Any]], folder: str) -> None:
        weights[:] = [{name.removeprefix("module."): value for name, value in w.items()} for w in weights]

    def unwrap(models: list[Any], folder: str) -> None:
        models[:] = [accelerator.unwrap_model(model) for model in models]

    accelerator.register_save_state_pre_hook(strip)
    accelerator.register_load_state_pre_hook(unwrap)


def save(accelerator: Accelerator, folder: Path, recipe: Recipe, run: RunState) -> None:
    """Write ``folder/step-NNNNNNN`` and drop the oldest beyond ``keep_checkpoints``. Call on every rank.

    Raises `UpcycleError` where space runs out; nothing is left half-written.
    """
    partial, final = folder / f".partial-{run.step:07d}", folder / f"step-{run.step:07d}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        accelerator.save_state(str(partial))
        accelerator.wait_for_everyone()  # every rank writes its random state
        if accelerator.is_main_process:
            # Not by accelerate's register_for_checkpointing, which would unpickle it without a check when it loads.
            torch.save(run.state_dict(), partial / "run.pt")
            (partial / "recipe.json").write_text(recipe.model_dump_json(indent=2))
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            for old in checkpoints(folder)[: -recipe.keep_checkpoints]:
                shutil.rmtree(old)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if disk_full(error):
            raise UpcycleError(
                f"{final}: no space left to write the checkpoint; make room, then go on with --resume"
            ) from error
        raise
    accelerator.wait_for_everyone()


def load(accelerator: Accelerator, folder: Path, recipe: Recipe, run: RunState) -> None:
    """Load the newest checkpoint of ``folder``; raises `UpcycleError` as `newest` does, and if it is damaged."""
    path = newest(folder, recipe)
    try:
        accelerator.load_state(str(path))
        run.load_state_dict(torch.load(path / "run.pt", map_location="cpu", weights_only=True))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # accelerate, torch, pickle and safetensors each have their own
        raise _damaged(path, error) from error


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def newest(folder: Path, recipe: Recipe) -> Path:
    """The newest checkpoint; raises `UpcycleError` where there is none, it is damaged or another recipe's."""
    found = checkpoints(folder)
    if not found:
        raise UpcycleError(f"{folder} holds no checkpoint to resume from; run without --resume")
    try:
        theirs = _flat(json.loads((found[-1] / "recipe.json").read_text()))
    except (OSError, ValueError, AttributeError) as error:
        raise _damaged(found[-1], error) from error
    ours = _flat(json.loads(recipe.model_dump_json()))
    changed = [
        f"{key} was {theirs.get(key)!r} and is {ours[key]!r}"
        for key in ours
        if key not in RESUMABLE_CHANGES and theirs.get(key) != ours[key]
    ]
    if changed:
        raise UpcycleError(f"{found[-1]} belongs to another recipe: {'; '.join(changed)}")
    return found[-1]


def _damaged(path: Path, error: Exception) -> UpcycleError:
    earlier = [other.name for other in checkpoints(path.parent) if other < path]
    remedy = (
        f"--resume again goes on from {earlier[-1]}" if earlier else "run without --resume, there is no earlier one"
    )
    what = " ".join(str(error).split())[:200]
    return UpcycleError(f"checkpoint {path} is damaged ({type(error).__name__}: {what}); delete it, then {remedy}")


def _flat(options: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in options.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
