"""What a run will cost, before it runs: parameters, memory, FLOPs, disk and time. Writes nothing.

What is counted: weights, gradients, AdamW's moments, the average, the teacher, FLOPs in the papers' counting. What is
estimated: activations, from what autograd keeps of one sample. What is measured: a step on this device with made-up
data, and where blocks are many in models of the recipe's width with one and two of them.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import parse_flag_from_env

from upcycle.errors import UpcycleError
from upcycle.evaluation.flops import chunked_dit_flops, dit_flops, tokens_at_ratio
from upcycle.evaluation.speed import keep_tokens
from upcycle.graft.plan import Options, full_config, make_plan
from upcycle.graft.verify import stock_dit
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.recipe import Recipe, Stage
from upcycle.sources import DiTConfig, Source
from upcycle.sources.weight_files import read_json
from upcycle.training.chunking import make_optimizer, prepare_student
from upcycle.training.data import Batch
from upcycle.training.fsdp import make_accelerator
from upcycle.training.loop import place_teacher, teacher_dtype
from upcycle.training.run import check, open_fitting_data, ranks, student_folder
from upcycle.training.state import RunState
from upcycle.training.step import Updater

GROUPS = ("router", "scaffold", "embedders", "blocks", "head")
MEASURED_WHOLE = 4
"""Models of more blocks than this are measured with one and two of them."""

MEASURED_FLOPS = {"cpu": 2e11, "cuda": 2e13}
"""A measured step is as large as this, and no larger than the recipe's."""


def estimate(recipe: Recipe, *, measure: bool = True) -> dict[str, Any]:
    """What `upcycle finetune --dry-run --json` prints. Call on every rank: the measured step is one of all ranks.

    Raises:
        UpcycleError: a part of the recipe does not fit, or the teacher cannot be read. Data may be missing.
    """
    source = check(recipe)
    assert isinstance(source, Source)  # the command refuses method ddit
    teacher = source.config
    assert isinstance(teacher, DiTConfig)
    config, start_bytes = _student(recipe, source)
    number, sharded = ranks().num_processes, ranks().num_processes > 1 and parse_flag_from_env("ACCELERATE_USE_FSDP")
    with torch.device("meta"):
        student = ChunkedDiT(**config)
        teacher_parameters = sum(p.numel() for p in stock_dit(teacher).parameters())
    groups = parameter_groups(student)
    stages = [_stage(recipe, stage, config, teacher) for stage in recipe.stages]
    report: dict[str, Any] = {
        "out": recipe.out,
        "device": _device_name(),
        "ranks": number,
        "sharded": sharded,
        "batch": {
            "size": recipe.batch_size,
            "rank": recipe.batch_size // number,
            "at_once": recipe.batch_size // number // recipe.gradient_accumulation,
        },
        "parameters": {
            **{name: sum(p.numel() for p in parameters) for name, parameters in groups.items()},
            "total": sum(p.numel() for p in student.parameters()),
            "trained": {s.name: sum(p.numel() for p in trained(student, s.freeze)) for s in recipe.stages},
            "teacher": teacher_parameters,
        },
        "memory_per_rank": memory(recipe, student, teacher_parameters, number, sharded=sharded),
        "disk": _disk(recipe, student, source, start_bytes),
        "data": _data(recipe.data, source),
        "validation_data": _data(recipe.validation.data, source) if recipe.validation else None,
        "stages": stages,
        "measured": None,
        "hours": None,
    }
    if measure:
        report["measured"] = _measure(recipe, config, teacher, stages)
        report["hours"] = sum(stage["hours"] for stage in stages)
    return report


def parameter_groups(student: ChunkedDiT) -> dict[str, list[torch.nn.Parameter]]:
    """The parameters by what they are; ``embedders``, ``blocks`` and ``head`` are what a recipe calls so."""
    prefixes = {"routing_module": "router", "dydit_routers": "router", "embedders": "embedders",
                "transformer_blocks": "blocks", "proj_out_1": "head", "proj_out_2": "head"}  # fmt: skip
    groups: dict[str, list[torch.nn.Parameter]] = {name: [] for name in GROUPS}
    for name, parameter in student.named_parameters():
        groups[prefixes.get(name.partition(".")[0], "scaffold")].append(parameter)
    return groups


def trained(student: ChunkedDiT, freeze: Iterable[str]) -> list[torch.nn.Parameter]:
    """The parameters that train where a stage freezes some parts."""
    return [p for name, parameters in parameter_groups(student).items() if name not in freeze for p in parameters]


def memory(
    recipe: Recipe, student: ChunkedDiT, teacher_parameters: int, ranks: int, *, sharded: bool
) -> dict[str, float]:
    """Bytes on one rank; all but ``activations`` are counted and not estimated. ``student`` may be on the meta device.

    ``average`` is the EMA. ``buckets`` are DDP's copy of the gradients. ``gathered`` is what FSDP has whole at once:
    two blocks and what is no block, and with accumulation every gradient. ``bf16_weights`` are autocast's copies, which
    wait for the backward pass.
    """
    everything = list(student.parameters())
    ever = trained(student, _always_frozen(recipe))
    blocks = parameter_groups(student)["blocks"]

    def size(parameters: Iterable[torch.nn.Parameter]) -> int:  # of rank 0's share, in numbers
        share = ranks if sharded else 1
        return sum(-(-p.shape[0] // share) * math.prod(p.shape[1:]) for p in parameters)

    def whole(parameters: Iterable[torch.nn.Parameter]) -> int:
        return sum(p.numel() for p in parameters)

    layers = student.config.num_layers
    gathered = whole(everything) - whole(blocks) * (1 - 2 / layers) if sharded else 0
    if sharded and recipe.gradient_accumulation > 1:
        gathered += whole(ever)
    low = 0.0
    if recipe.mixed_precision == "bf16":
        low = whole(everything) - (whole(blocks) * (1 - 1 / layers) if recipe.gradient_checkpointing else 0)
    batch = recipe.batch_size // ranks // recipe.gradient_accumulation
    parts = {
        "weights": 4 * size(everything),
        "gradients": 4 * size(ever),
        "optimizer": 8 * size(ever),
        "average": 4 * size(everything),
        "buckets": 4 * whole(ever) if ranks > 1 and not sharded else 0,
        "gathered": 4 * gathered,
        "bf16_weights": 2 * low,
        "teacher": teacher_dtype(recipe).itemsize * teacher_parameters,
        "activations": batch * _activations(recipe, dict(student.config)),
    }
    return {**parts, "total": sum(parts.values())}


def _always_frozen(recipe: Recipe) -> set[str]:
    return {name for name in recipe.stages[0].freeze if all(name in stage.freeze for stage in recipe.stages)}


# -- the parts of the report ------------------------------------------------------------------------------------------


def _student(recipe: Recipe, source: Source) -> tuple[dict[str, Any], int]:
    """The student's full config, and the bytes of the start that the run will write."""
    folder = student_folder(recipe)
    if folder is None:
        plan = make_plan(source, Options(**recipe.convert.model_dump(), seed=recipe.seed))
        return plan.config, plan.bytes
    path = folder / "transformer" / "config.json"
    if not path.is_file():
        raise UpcycleError(f"student {recipe.student} is no export: it has no transformer/config.json")
    theirs = read_json(f"student {recipe.student}", path)
    return full_config({key: value for key, value in theirs.items() if key[0] != "_"}), 0


def _stage(recipe: Recipe, stage: Stage, config: Mapping[str, Any], teacher: DiTConfig) -> dict[str, Any]:
    """Tokens and FLOPs of a step, on average over the stage."""
    weight, drop = stage.losses, stage.tail_drop
    dropped = (1 - drop.start) * statistics.fmean(drop.values) if drop.values else 0.0
    kept = tokens_at_ratio(config) * (1 - dropped)
    learned = config["router"] in ("predictability", "cosine") and config["scaffold"] == "lean"
    asked = bool(weight.distill or (weight.router and learned))
    forwards = asked * (1 + (stage.teacher_guidance > 1)) + bool(weight.blocks)
    parts = chunked_dit_flops(config, kept, share=1.0)  # while they train, what DyDiT's gates drop is computed too
    student = 3 * sum(parts.values()) + (parts["blocks"] if recipe.gradient_checkpointing else 0)
    return {
        "name": stage.name,
        "steps": stage.steps,
        "tokens_per_sample": kept,
        "tokens_per_step": recipe.batch_size * kept,
        "teacher_forwards": forwards,
        "flops_per_step": {
            "student": recipe.batch_size * student,
            "teacher": recipe.batch_size * forwards * dit_flops(vars(teacher)),
        },
        "seconds_per_step": None,
        "hours": None,
    }


def _disk(recipe: Recipe, student: ChunkedDiT, source: Source, start: int) -> dict[str, int]:
    """Bytes that the run will take in ``out``."""
    weights = 4 * sum(p.numel() for p in student.parameters())
    ever = trained(student, _always_frozen(recipe))
    checkpoint = 2 * weights + 8 * sum(p.numel() for p in ever)  # weights and average, moments
    kept = min(recipe.keep_checkpoints + bool(recipe.validation), -(-recipe.steps // recipe.save_every) + 1)
    files = (file for folder in source.components.values() for file in folder.rglob("*") if file.is_file())
    export = weights + sum(file.stat().st_size for file in files)
    # One more while the newest is written.
    total = start + (kept + 1) * checkpoint + export
    return {"start": start, "checkpoint": checkpoint, "checkpoints_kept": kept, "export": export, "total": total}


def _data(spec: str, source: Source) -> dict[str, Any]:
    if spec not in ("digits", "digits-val") and not Path(spec).exists():
        return {"data": spec, "there": False, "samples": None, "bytes": None}
    data = open_fitting_data(spec, source)
    files = (file for file in Path(spec).rglob("*") if file.is_file())
    size = sum(file.stat().st_size for file in files) if Path(spec).is_dir() else None
    return {"data": spec, "there": True, "samples": len(data), "bytes": size}


def _device_name() -> str:
    device = ranks().device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


# -- activations ------------------------------------------------------------------------------------------------------


def _activations(recipe: Recipe, config: dict[str, Any]) -> float:
    """Bytes that autograd keeps for a sample from the forward to the backward pass."""
    config = {key: value for key, value in config.items() if key[0] != "_"}
    tokens = round(tokens_at_ratio(config))
    scaffold, one = (_kept_by_autograd(recipe, config, layers, tokens) for layers in (0, 1))
    block, layers = one - scaffold, config["num_layers"]
    if recipe.gradient_checkpointing:  # each block's input, and one block made anew
        width = config["num_attention_heads"] * config["attention_head_dim"]
        return scaffold + block + layers * tokens * width * 4
    return scaffold + layers * block


def _kept_by_autograd(recipe: Recipe, config: dict[str, Any], layers: int, tokens: int) -> float:
    """Bytes for a sample in a model of so many blocks: what two samples need beyond one, so that weights drop out."""
    model = ChunkedDiT(**{**config, "num_layers": layers, "num_embedders": 1, "budget": None, "tokens": None})
    keep_tokens(model, tokens, ragged=True)
    side, sizes = config["sample_size"], []
    for batch in (1, 2):
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor, seen: dict[int, int] = seen) -> torch.Tensor:
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        x, label = torch.zeros(batch, config["in_channels"], side, side), torch.zeros(batch, dtype=torch.long)
        autocast = torch.autocast("cpu", torch.bfloat16) if recipe.mixed_precision == "bf16" else nullcontext()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
            out = model(x, label, label).sample
        sizes.append(sum(seen.values()))
        del out
    return float(sizes[1] - sizes[0])


# -- time -------------------------------------------------------------------------------------------------------------


def _measure(
    recipe: Recipe, config: dict[str, Any], teacher: DiTConfig, stages: list[dict[str, Any]]
) -> dict[str, Any]:
    """Time steps of each stage, and fill in what a step of the recipe takes by them."""
    layers, number = config["num_layers"], ranks().num_processes
    depths = [layers] if layers <= MEASURED_WHOLE else [1, 2]
    at_once = recipe.batch_size // number // recipe.gradient_accumulation
    flops = max(sum(stage["flops_per_step"].values()) for stage in stages) / recipe.batch_size * depths[-1] / layers
    budget = MEASURED_FLOPS["cuda" if ranks().device.type == "cuda" else "cpu"]
    batch = max(1, min(at_once, int(budget / flops)))
    seconds = [_time(recipe, config, teacher, stages, count, batch) for count in depths]
    for i, stage in enumerate(stages):
        step = seconds[-1][i]
        if len(depths) > 1:
            step += (layers - 2) * max(0.0, step - seconds[0][i])
        stage["seconds_per_step"] = step * at_once / batch * recipe.gradient_accumulation
        stage["hours"] = stage["steps"] * stage["seconds_per_step"] / 3600
    return {"batch": batch, "layers": depths, "seconds": dict(zip(map(str, depths), seconds, strict=True))}


def _time(
    recipe: Recipe,
    config: dict[str, Any],
    teacher: DiTConfig,
    stages: list[dict[str, Any]],
    layers: int,
    batch: int,
) -> list[float]:
    """Seconds of a step of each stage with ``batch`` samples a rank, in models of ``layers`` blocks."""
    embedders = min(config["num_embedders"], layers)
    accelerator = make_accelerator(mixed_precision=recipe.mixed_precision)
    student = ChunkedDiT(**{**config, "num_layers": layers, "num_embedders": embedders})
    prepare_student(student, recipe.model_copy(update={"compile": False}))
    optimizer = make_optimizer(student, recipe, fused=accelerator.device.type == "cuda")
    model, optimizer = accelerator.prepare(student, optimizer)
    student = accelerator.unwrap_model(model)
    asked = place_teacher(stock_dit(dataclasses.replace(teacher, num_layers=layers)), recipe, accelerator.device)
    shape = (batch, config["in_channels"], config["sample_size"], config["sample_size"])
    timestep = torch.linspace(0, config["num_train_timesteps"] - 1, batch).long()
    label = torch.arange(batch) % config["num_classes"]
    data = Batch(torch.randn(shape), torch.randn(shape), timestep, label).to(accelerator.device)
    decide, times = student.route, []
    for stage, told in zip(recipe.stages, stages, strict=True):
        student.route = decide
        keep_tokens(student, told["tokens_per_sample"], ragged=True)
        tail = stage.tail_drop.model_copy(update={"values": []})  # the tokens kept have it in them
        changed = {"stages": [stage.model_copy(update={"tail_drop": tail})], "gradient_accumulation": 1}
        alone = recipe.model_copy(update=changed)
        updater = Updater(alone, accelerator, model, asked, optimizer, RunState(student, recipe.ema))
        measured = []
        for _ in range(3):
            begin = time.perf_counter()
            updater.update(data)  # ends with values that it reads from the device
            measured.append(time.perf_counter() - begin)
        times.append(min(measured[1:]))
    accelerator.free_memory()
    return times
