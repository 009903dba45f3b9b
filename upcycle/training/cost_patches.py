"""What a run of method ddit will cost, before it runs; see `upcycle.training.cost`, whose report this has too.

FLOPs are what torch counts of a whole step (forwards and backward) on the meta device. Where blocks are many, a step is
timed in a model of one of each kind, and what the whole one takes follows from their FLOPs.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch.utils.flop_counter import FlopCounterMode

from upcycle.errors import UpcycleError
from upcycle.graft import patches as adapters
from upcycle.latents.prompts import PromptFolder
from upcycle.models import ddit
from upcycle.recipe import Recipe
from upcycle.sources import DiTConfig, Source
from upcycle.sources.backbone import Backbone, open_backbone
from upcycle.training import flow
from upcycle.training.cost import MEASURED_FLOPS, MEASURED_WHOLE, _data, _device_name
from upcycle.training.digits import TEACHER
from upcycle.training.run import adapter_plans, check, ranks, student_folder

DEPTHS = ("num_layers", "num_single_layers", "n_layers", "n_refiner_layers")
PATIENCE = 20.0
"""A measured step that takes longer (seconds) is not repeated."""

Arguments = Callable[[int, Any], dict[str, Any]]
"""(samples, model) -> what the model is called with, on the CPU."""


def estimate(recipe: Recipe, *, measure: bool = True) -> dict[str, Any]:
    """What `upcycle finetune --dry-run --json` prints of method ddit.

    Raises:
        UpcycleError: a part of the recipe does not fit, the teacher cannot be read, or the data of a base that reads
            text, which say how large a sample is, are missing.
    """
    found = check(recipe)
    text = isinstance(found, list)
    if isinstance(found, list):
        backbones, arguments = found, _of_text(recipe, found[0])
    else:
        spec = str(TEACHER) if recipe.teacher == "digits" else recipe.teacher
        backbones, arguments = [open_backbone(spec, revision=recipe.revision)], _of_classes(found)
    made, start_bytes, base_files = _adapters(recipe, backbones, beside=not text)
    number = ranks().num_processes
    at_once = recipe.batch_size // number // recipe.gradient_accumulation
    data = [recipe.data, *([recipe.validation.data] if recipe.validation else [])]
    parameters = sum(t.numel() for _, tensors in made for t in tensors.values())
    base_parameters = sum(torch.Size(shape).numel() for each in backbones for shape in each.shapes.values())
    stored = flow.stored_dtype(recipe, backbones[0]) if text else torch.float32
    low = torch.bfloat16 if recipe.mixed_precision == "bf16" else torch.float32
    whole = _Shape(backbones[0], made[0][0], arguments, low, recipe.gradient_checkpointing)
    flops = whole.flops()
    sizes = made[0][0].patches
    tokens = statistics.fmean(whole.tokens() / m**2 for m in sizes)
    memory = {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "optimizer": 8 * parameters,
        "average": 4 * parameters,
        "buckets": 4 * parameters if number > 1 else 0,
        "bf16_weights": 2 * base_parameters if low != stored else 0,
        "base": stored.itemsize * base_parameters,
        "activations": at_once * whole.activations(),
    }
    stages: list[dict[str, Any]] = [
        {
            "name": stage.name, "steps": stage.steps, "tokens_per_sample": tokens,
            "tokens_per_step": recipe.batch_size * tokens, "teacher_forwards": 1,
            "flops_per_step": {name: recipe.batch_size * value for name, value in flops.items()},
            "seconds_per_step": None, "hours": None,
        }
        for stage in recipe.stages
    ]  # fmt: skip
    checkpoint = 16 * parameters
    kept = min(recipe.keep_checkpoints + bool(recipe.validation), -(-recipe.steps // recipe.save_every) + 1)
    export = 4 * parameters + base_files
    report: dict[str, Any] = {
        "out": recipe.out, "device": _device_name(), "ranks": number, "sharded": False,
        "batch": {"size": recipe.batch_size, "rank": recipe.batch_size // number, "at_once": at_once},
        "parameters": {
            "adapter": parameters,
            "base": base_parameters,
            "trained": {stage.name: parameters for stage in recipe.stages},
        },
        "memory_per_rank": {**memory, "total": sum(memory.values())},
        "disk": {"start": start_bytes, "checkpoint": checkpoint, "checkpoints_kept": kept, "export": export,
                 "total": start_bytes + (kept + 1) * checkpoint + export},
        "data": None, "validation_data": None, "stages": stages, "measured": None, "hours": None,
    }  # fmt: skip
    for key, where in zip(("data", "validation_data"), data, strict=False):
        report[key] = _data_of_text(where) if isinstance(found, list) else _data(where, found)
    if measure:
        depth = max(whole.depths.values())
        blocks = depth if depth <= MEASURED_WHOLE else 1
        part = _Shape(backbones[0], made[0][0], arguments, stored, recipe.gradient_checkpointing, blocks=blocks)
        of_part = sum(part.flops().values())
        batch = max(1, min(at_once, int(MEASURED_FLOPS["cuda" if ranks().device.type == "cuda" else "cpu"] / of_part)))
        seconds = part.seconds(recipe, batch)
        step = seconds / batch * sum(flops.values()) / of_part * at_once * recipe.gradient_accumulation
        for stage in stages:
            stage["seconds_per_step"] = step
            stage["hours"] = stage["steps"] * step / 3600
        report["measured"] = {"batch": batch, "layers": [blocks], "seconds": {str(blocks): [seconds] * len(stages)}}
        report["hours"] = sum(stage["hours"] for stage in stages)
    return report


def _adapters(recipe: Recipe, backbones: list[Backbone], *, beside: bool) -> tuple[list[adapters.Adapter], int, int]:
    """Those that train, and bytes of the start that the run will write and of the base's files in an export."""
    components = [each.subfolder or ddit.COMPONENTS[0] for each in backbones]
    folder = student_folder(recipe)
    if folder is not None:
        there = adapters.load(folder, f"student {recipe.student}")
        made = [found for found in there if found[0].component in components]
        if not made:
            raise UpcycleError(f"student {recipe.student} has no adapter for {' or '.join(components)}")
        files = (path for path in folder.rglob("*") if path.is_file() and path.name != ddit.WEIGHTS)
        return made, 0, sum(path.stat().st_size for path in files) if beside else 0
    plans = adapter_plans(recipe, backbones, alone=not beside)
    start = adapters.bytes_of(plans)
    return [(plan.config, plan.tensors) for plan in plans], start, start - sum(plan.fresh_bytes for plan in plans)


def _of_classes(source: Any) -> Arguments:
    assert isinstance(source, Source)
    c = source.config
    assert isinstance(c, DiTConfig)
    shape = (c.in_channels, c.sample_size, c.sample_size)

    def arguments(batch: int, model: Any) -> dict[str, Any]:
        label = torch.zeros(batch, dtype=torch.long)
        return {"hidden_states": torch.randn(batch, *shape), "timestep": label + 500, "class_labels": label}

    return arguments


def _of_text(recipe: Recipe, backbone: Backbone) -> Arguments:
    if not Path(recipe.data).exists():
        raise UpcycleError(f"data {recipe.data} is not there, which says how large a sample is; synthesize some first")
    data = flow.open_prompts(recipe.data, backbone)
    text = data.embeddings(0)

    def arguments(batch: int, model: Any) -> dict[str, Any]:
        texts = [{name: value.to(model.dtype) for name, value in text.items()}] * batch
        x = torch.randn(batch, *data.sample_shape).to(model.dtype)
        return flow.inputs(model, x, torch.full((batch,), 0.7), texts, data.guidance_scale)

    return arguments


def _data_of_text(spec: str) -> dict[str, Any]:
    if not Path(spec).exists():
        return {"data": spec, "there": False, "samples": None, "bytes": None}
    size = sum(file.stat().st_size for file in Path(spec).rglob("*") if file.is_file())
    return {"data": spec, "there": True, "samples": len(PromptFolder(spec)), "bytes": size}


class _Shape:
    """A base with an adapter on the meta device: its shapes without values. ``blocks``: at most so many of a kind."""

    def __init__(
        self, backbone: Backbone, config: ddit.DDiTConfig, arguments: Arguments, dtype: torch.dtype, again: bool,
        blocks: int | None = None,
    ):  # fmt: skip
        self._class = getattr(diffusers, backbone.base_class)
        options = {key: value for key, value in backbone.config.items() if not key.startswith("_")}
        self.depths = {key: options[key] for key in DEPTHS if key in options}
        if blocks is not None:
            options |= {key: min(blocks, depth) for key, depth in self.depths.items()}
        self._options, self._config, self._arguments = options, replace(config, variance={}), arguments
        self._dtype, self._again = dtype, again
        with torch.device("meta"):
            self.model = self._make()

    def _make(self) -> Any:
        """A model with an adapter on the default device; only the adapter is trained."""
        model = torch.nn.Module.to(self._class(**self._options), self._dtype).requires_grad_(False)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        device = next(model.parameters()).device
        made = ddit.initial_tensors(self._config, model.config, shapes, lambda name: torch.ones(shapes[name]))
        ddit.attach(model, self._config, {name: tensor.to(device) for name, tensor in made.items()})
        for parameter in model.adapter_parameters().values():
            parameter.requires_grad_(True)
        if self._again:
            model.enable_gradient_checkpointing()
        return model.eval() if not self._again else model.train()

    def _called(self, batch: int, m: int) -> torch.Tensor:
        """The sum of the outputs at m. What is looked at is looked at on the CPU: the meta device knows no values."""
        given = self._arguments(batch, self.model)
        sight = self.model.look(given)
        there = ddit.Sight(sight.latents.to("meta"), sight.time.to("meta"), sight.patch)
        out = self.model._at(m, {name: _on(value, "meta") for name, value in given.items()}, there)
        return (torch.stack(out) if isinstance(out, list) else out).float().sum()

    def flops(self) -> dict[str, float]:
        """Of a sample in a step, on average over the sizes: of the base's answer, and of what learns from it."""
        with FlopCounterMode(display=False) as teacher, torch.no_grad():
            self._called(1, 1)
        student = []
        for m in self._config.patches:
            with FlopCounterMode(display=False) as counter:
                self._called(1, m).backward()
            student.append(counter.get_total_flops())
        return {"student": statistics.fmean(student), "teacher": float(teacher.get_total_flops())}

    def tokens(self) -> int:
        """Of a sample at m = 1."""
        sight = self.model.look(self._arguments(1, self.model))
        _, _, frames, height, width = sight.latents.shape
        return (frames // sight.patch[0]) * (height // sight.patch[1]) * (width // sight.patch[1])

    def activations(self) -> float:
        """Bytes that autograd keeps of a sample at the finest of the sizes; with checkpointing what every block is
        given, and what one of them keeps."""
        blocks = [each for part in self.model.children() if isinstance(part, torch.nn.ModuleList) for each in part]
        mine = {p.untyped_storage()._cdata for p in self.model.parameters()}
        kept: dict[int, Any] = {}
        passed: dict[int, Any] = {}

        def note(into: dict[int, Any], value: Any) -> Any:
            if isinstance(value, torch.Tensor) and value.untyped_storage()._cdata not in mine:
                into[value.untyped_storage()._cdata] = value.untyped_storage()  # held, so that no other gets its number
            return value

        def given(_: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            for value in (*args, *options.values()):
                note(passed, value)

        hooks = [block.register_forward_pre_hook(given, with_kwargs=True) for block in blocks]
        training, self.model.training = self.model.training, False
        if self._again:
            self.model.disable_gradient_checkpointing()
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: note(kept, tensor), lambda tensor: tensor):
            out = self._called(1, self._config.patches[0])
        del out
        if self._again:
            self.model.enable_gradient_checkpointing()
        self.model.training = training
        for hook in hooks:
            hook.remove()
        whole = float(sum(storage.nbytes() for storage in kept.values()))
        if not self._again:
            return whole
        return whole / len(blocks) + sum(storage.nbytes() for storage in passed.values())

    def seconds(self, recipe: Recipe, batch: int) -> float:
        """Of a step with ``batch`` samples on this device, with random weights, on average over the sizes."""
        device = ranks().device
        with device:
            model = self._make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.02)
        given = {name: _on(value, device) for name, value in self._arguments(batch, model).items()}
        low = recipe.mixed_precision == "bf16" and self._dtype == torch.float32
        took = []
        for m in self._config.patches:
            times: list[float] = []
            while len(times) < 3 and (not times or times[-1] < PATIENCE):
                begin = time.perf_counter()
                with torch.autocast(device.type, torch.bfloat16) if low else nullcontext():
                    with torch.no_grad(), model.at(1):
                        model(**given, return_dict=False)
                    with model.at(m):
                        out = model(**given, return_dict=False)[0]
                    (torch.stack(out) if isinstance(out, list) else out).float().square().mean().backward()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - begin)
            took.append(min(times))
        return statistics.fmean(took)


def _on(value: Any, device: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return [each.to(device) for each in value] if isinstance(value, list) else value
