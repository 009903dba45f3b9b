"""Checkpoints of a run: complete folders or nothing, made by accelerate, with what it does not know about."""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers.training_utils import EMAModel
from pydantic import ValidationError
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor, distribute_tensor

from upcycle.errors import UpcycleError
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.output import disk_full
from upcycle.recipe import Recipe
from upcycle.training.fsdp import is_sharded, reshard

# These may change between a run and its continuation.
RESUMABLE_CHANGES = {
    "out", "export", "log_every", "save_every", "keep_checkpoints", "data_workers", "max_skipped", "preview",
    "trackers",
}  # fmt: skip

# So may these, the ways out of a full memory; results then differ by rounding.
MEMORY_CHANGES = {"gradient_accumulation", "gradient_checkpointing", "compile"}

# So may these: the way out of steps that are not finite. From there on it is another run.
REMEDIES = re.compile(r"teacher_precision|stages\..+\.lr")


class RunState:
    """Everything beyond model and optimizer, which a continued run needs to end where an uninterrupted one ends.

    Make it after `Accelerator.prepare`, which may replace the parameters (FSDP).

    Attributes:
        step: steps done.
        ema, ema_bias: averages of the parameters and of the router's bias.
        skipped, skipped_in_row: steps whose loss or gradient was not finite.
        pending: rows of the log that wait for their average to be written.
        best: ``{"step", "loss"}`` of the best validation, and how many there were ``since`` then.
        data: fingerprint of the data; changes: of the recipe, between a checkpoint and its continuation.
    """

    def __init__(self, student: ChunkedDiT, decay: float, data: str = ""):
        self.step = 0
        self.skipped = self.skipped_in_row = 0
        self.pending: list[dict[str, float]] = []
        self.best: dict[str, float] | None = None
        self.since_best = 0
        self.data = data
        self.changes: list[dict[str, Any]] = []
        self.ema = EMAModel(student.parameters(), decay=decay, foreach=not is_sharded(student))
        bias = router_bias(student)
        self.ema_bias = None if bias is None else bias.detach().clone()

    def update(self, student: ChunkedDiT) -> None:
        """Move the averages towards the student; call once a step."""
        self.ema.step(student.parameters())
        bias = router_bias(student)
        if bias is not None and self.ema_bias is not None:
            self.ema_bias.lerp_(bias, 1 - self.ema.cur_decay_value)

    def count(self, finite: bool) -> None:
        """A step is done; one that was not ``finite`` changed nothing and counts as skipped."""
        self.step += 1
        self.skipped += not finite
        self.skipped_in_row = 0 if finite else self.skipped_in_row + 1

    @contextmanager
    def averaged(self, student: ChunkedDiT, guide: float) -> Iterator[None]:
        """The student with its averaged weights, in eval mode with the given guide, while the block runs."""
        bias = router_bias(student)
        before = None if bias is None else bias.detach().clone()
        own_guide, training = student.guide, student.training
        self.ema.store(student.parameters())
        try:
            self.ema.copy_to(student.parameters())
            if bias is not None and self.ema_bias is not None:
                bias.copy_(self.ema_bias)
            student.guide = guide
            student.eval()
            yield
        finally:
            reshard(student)
            self.ema.restore(student.parameters())
            if bias is not None and before is not None:
                bias.copy_(before)
            student.guide = own_guide
            student.train(training)

    def averaged_weights(self, student: ChunkedDiT) -> dict[str, torch.Tensor]:
        """A state dict of the averaged student, fp32 on the CPU; under FSDP call it on every rank."""
        state = {name: tensor.detach().cpu() for name, tensor in student.named_buffers()}
        for (name, _), shadow in zip(student.named_parameters(), self.ema.shadow_params, strict=True):
            state[name] = _whole(shadow).float().cpu()
        if self.ema_bias is not None:
            state["routing_module.bias"] = self.ema_bias.cpu()
        return {name: state[name] for name in student.state_dict()}

    def state_dict(self) -> dict[str, Any]:
        """All of it, in whole tensors on the CPU; under FSDP call it on every rank."""
        plain = {name: value for name, value in vars(self).items() if name not in ("ema", "ema_bias")}
        ema = self.ema.state_dict()
        ema["shadow_params"] = [_whole(shadow).cpu() for shadow in self.ema.shadow_params]
        return {**plain, "ema": ema, "ema_bias": None if self.ema_bias is None else self.ema_bias.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave, onto the devices and shards of this run."""
        own = self.ema.shadow_params
        state = dict(state)
        ema, bias = dict(state.pop("ema")), state.pop("ema_bias")
        ema["shadow_params"] = [_like(value, mine) for value, mine in zip(ema["shadow_params"], own, strict=True)]
        self.ema.load_state_dict(ema)
        if self.ema_bias is not None:
            self.ema_bias.copy_(bias)
        vars(self).update(state)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _like(value: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    if isinstance(own, DTensor):
        return distribute_tensor(value.to(own.device), own.device_mesh, own.placements)
    return value.to(own.device)


def router_bias(student: Any) -> torch.Tensor | None:
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


def save(accelerator: Accelerator, folder: Path, recipe: Recipe, run: RunState) -> bool:
    """Write ``folder/step-NNNNNNN``, and drop the oldest beyond ``keep_checkpoints``, but for the best one.

    Call on every rank. Returns False where space runs out: nothing is left half-written, and the checkpoints that were
    there are whole.
    """
    partial, final = folder / f".partial-{run.step:07d}", folder / f"step-{run.step:07d}"
    main = accelerator.is_main_process
    if main:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    complete = _enough_space(lambda: accelerator.save_state(str(partial)))
    content = run.state_dict()
    if main and complete:
        # Not by accelerate's register_for_checkpointing, which would unpickle it without a check when it loads.
        complete = _enough_space(lambda: torch.save(content, partial / "run.pt"))
        complete = complete and _enough_space(
            lambda: (partial / "recipe.json").write_text(recipe.model_dump_json(indent=2))
        )
    complete = _everywhere(accelerator, complete)  # every rank's files are there by now
    if main and complete:
        complete = _enough_space(lambda: _to_disk(*partial.rglob("*"), partial))
    complete = _everywhere(accelerator, complete)
    if main and complete:
        _remove(final)
        partial.rename(final)
        _to_disk(folder)
        kept = {f"step-{run.best['step']:07.0f}"} if run.best else set()
        for old in checkpoints(folder)[: -recipe.keep_checkpoints]:
            if old.name not in kept:
                _remove(old)
    elif main:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    return complete


def _everywhere(accelerator: Accelerator, fact: bool) -> bool:
    shares = accelerator.reduce(torch.tensor(float(fact), device=accelerator.device), reduction="mean")
    return shares.item() == 1


def _enough_space(write: Callable[[], Any]) -> bool:
    try:
        write()
    except (OSError, RuntimeError, SafetensorError) as error:
        if disk_full(error):
            return False
        raise
    return True


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint so that a kill meanwhile leaves nothing that looks like one."""
    if checkpoint.exists():
        old = checkpoint.with_name(f".old-{checkpoint.name}")
        checkpoint.rename(old)
        shutil.rmtree(old)


def clean(out: Path) -> None:
    """Remove what a kill left half-written or half-deleted in the folder of a run."""
    for pattern in (".*.partial-*", ".*.replaced-*", "checkpoints/.partial-*", "checkpoints/.old-*"):
        for path in out.glob(pattern):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _to_disk(*paths: Path) -> None:
    """Flush files and folders, so that not even a power cut leaves a named checkpoint without its content."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def load(accelerator: Accelerator, path: Path, run: RunState) -> None:
    """Load one checkpoint; raises `UpcycleError` if it is damaged, or of a run with FSDP where this one is without."""
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if sharded != (path / "optimizer_0").is_dir():
        how = ("without", "with") if sharded else ("with", "without")
        raise UpcycleError(f"{path} was saved {how[0]} FSDP and this run is {how[1]} it; launch it as before")
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


def newest(folder: Path, recipe: Recipe) -> Path | None:
    """The newest checkpoint, None where there is none; raises `UpcycleError` if it is damaged or another recipe's."""
    found = checkpoints(folder)
    if not found:
        return None
    changed = [
        f"{key} was {was!r} and is {now!r}"
        for key, was, now in _differences(found[-1], recipe)
        if key not in MEMORY_CHANGES and not REMEDIES.fullmatch(key)
    ]
    if changed:
        raise UpcycleError(f"{found[-1]} belongs to another recipe: {'; '.join(changed)}")
    return found[-1]


def changes(checkpoint: Path, recipe: Recipe, step: int) -> list[dict[str, Any]]:
    """What the recipe changes from ``step`` on, for the record."""
    return [{"step": step, "key": key, "was": was, "is": now} for key, was, now in _differences(checkpoint, recipe)]


def _differences(checkpoint: Path, recipe: Recipe) -> Iterator[tuple[str, Any, Any]]:
    """Key, value in the checkpoint's recipe and in ``recipe``, of those that matter for the weights."""
    try:
        told = json.loads((checkpoint / "recipe.json").read_text())
        with suppress(ValidationError):  # options that came after it have their defaults
            told = json.loads(Recipe.model_validate(told).model_dump_json())
        theirs = _flat(told)
    except (OSError, ValueError, AttributeError) as error:
        raise _damaged(checkpoint, error) from error
    ours = _flat(json.loads(recipe.model_dump_json()))
    keys = dict.fromkeys((*ours, *theirs))
    if ours["stages"] != theirs.get("stages"):  # names enough
        keys = dict.fromkeys(key for key in keys if not key.startswith("stages."))
    for key in keys:
        if key.partition(".")[0] not in RESUMABLE_CHANGES and theirs.get(key) != ours.get(key):
            yield key, theirs.get(key), ours.get(key)


def check_data(checkpoint: Path, run: RunState, fingerprint: str) -> None:
    """Raise `UpcycleError` unless the data is that of the checkpoint."""
    if run.data != fingerprint:
        raise UpcycleError(
            f"{checkpoint} belongs to other data: it was {run.data} and is {fingerprint}; bring the old one back, or "
            "start anew in another 'out'"
        )


def _damaged(path: Path, error: Exception) -> UpcycleError:
    earlier = [other.name for other in checkpoints(path.parent) if other < path]
    remedy = (
        f"--resume again goes on from {earlier[-1]}" if earlier else "run without --resume, there is no earlier one"
    )
    what = " ".join(str(error).split())[:200]
    return UpcycleError(f"checkpoint {path} is damaged ({type(error).__name__}: {what}); delete it, then {remedy}")


def _flat(options: Any, prefix: str = "") -> dict[str, Any]:
    """Nested options -> {"stages": ["align"], "stages.align.lr": ...}; the stages under their names."""
    flat: dict[str, Any] = {}
    if isinstance(options, list) and options and isinstance(options[0], dict):
        options = {item["name"]: item for item in options}
        flat[prefix.removesuffix(".")] = list(options)
    if not isinstance(options, dict):
        return {prefix.removesuffix("."): options}
    for key, value in options.items():
        flat |= _flat(value, f"{prefix}{key}.")
    return flat
