"""What a training step of the student costs beside a fine-tuning step of its teacher: time and peak memory.

    python benchmarks/training.py [--shape S/2] [--size 32] [--ratio 4] [--batch 8] [--precision no|bf16] [--json]

The teacher's step is that of stock diffusers: noise MSE, clipping, AdamW on every weight. The student's is the step of
`upcycle finetune`, without what its losses ask of the teacher (``student``), and as shipped recipes have it, with
distillation and router supervision (``distilled``). No averaging, and no part is frozen. The student keeps exactly
1 / ratio of the positions, half as many to half as many more from sample to sample, as a learned router does.
``even`` is the student with the teacher's grid kept, as at its start. ``ddit`` is an adapter for patches 2 and 4 times
as large that learns from its own base, a size a step.

Each model lives in a process of its own; the processes take turns, step by step, and medians are compared. On a GPU
that is wall time and the device's peak memory. On a CPU it is the processor time of one thread, which other work on the
machine disturbs less, and the peak of the process beyond what it was before the model was made.
"""

import argparse
import json
import multiprocessing
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

KINDS = ("teacher", "student", "even", "distilled", "ddit")


def teacher_config(options: argparse.Namespace) -> dict[str, Any]:
    """The stock model's options for a shape such as S/2."""
    from upcycle.sources import SHAPES

    name, patch = options.shape.split("/")
    heads, head_dim, layers = SHAPES[name]
    return {
        "num_attention_heads": heads, "attention_head_dim": head_dim, "num_layers": layers, "patch_size": int(patch),
        "sample_size": options.size, "in_channels": 4, "out_channels": 8, "num_classes": 1000, "norm_eps": 1e-5,
    }  # fmt: skip


def peak(device: Any) -> int:
    """Peak bytes of this process so far."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with open("/proc/self/status") as file:  # ru_maxrss would hold the parent's
        return 1024 * next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))


def serve(kind: str, options: argparse.Namespace, pipe: Connection) -> None:
    """Make the model, then do a step whenever told to, and send its seconds; in the end send the peak."""
    import torch
    from accelerate import PartialState

    torch.manual_seed(0)
    torch.set_num_threads(1)
    device = PartialState(cpu=not torch.cuda.is_available()).device
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    steps = {"teacher": fine_tuning, "ddit": adapter_training}
    step, before = steps.get(kind, post_training)(kind, options, device)
    while pipe.recv():
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = clock()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        pipe.send(clock() - begin)
    pipe.send(peak(device) - before)


def fine_tuning(kind: str, options: argparse.Namespace, device: Any) -> tuple[Any, int]:
    """A step of the stock model, as a few lines of torch do it."""
    import torch
    from accelerate import Accelerator

    from upcycle.graft.verify import stock_dit
    from upcycle.sources import DiTConfig

    accelerator = Accelerator(mixed_precision=options.precision)
    torch.zeros(1, device=device)
    before = peak(device)
    model = stock_dit(DiTConfig(**teacher_config(options), time_embedding="diffusers")).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    model, optimizer = accelerator.prepare(model, optimizer)
    x_t, noise, timestep, label = batch(options, device)

    def step() -> None:
        with accelerator.autocast():
            epsilon = model(x_t, timestep, label).sample[:, :4]
        accelerator.backward(torch.nn.functional.mse_loss(epsilon.float(), noise))
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step, before


def post_training(kind: str, options: argparse.Namespace, device: Any) -> tuple[Any, int]:
    """`Updater.update`, without the average."""
    import torch

    from upcycle.evaluation.speed import keep_tokens
    from upcycle.graft.plan import full_config
    from upcycle.graft.verify import stock_dit
    from upcycle.models.chunked_dit import ChunkedDiT
    from upcycle.recipe import Recipe
    from upcycle.sources import DiTConfig
    from upcycle.training.chunking import make_optimizer, prepare_student
    from upcycle.training.data import Batch
    from upcycle.training.fsdp import make_accelerator
    from upcycle.training.loop import place_teacher
    from upcycle.training.state import RunState
    from upcycle.training.step import Updater

    asks = {} if kind == "distilled" else {"distill": 0.0, "router": 0.0, "variational": 0.0}
    stage = {"name": "step", "steps": 10**6, "freeze": [], "losses": asks, "anneal": {"until": None},
             "tail_drop": {"values": []}}  # fmt: skip
    recipe = Recipe(
        teacher="none", data="none", out="none", batch_size=options.batch, stages=[stage], compile=options.compile,
        mixed_precision=options.precision, gradient_checkpointing=options.checkpointing,
    )  # fmt: skip
    accelerator = make_accelerator(mixed_precision=recipe.mixed_precision)
    torch.zeros(1, device=device)
    before = peak(device)
    config = teacher_config(options)
    student = ChunkedDiT(**full_config({**config, "ratio": options.ratio}))
    prepare_student(student, recipe)
    optimizer = make_optimizer(student, recipe, fused=device.type == "cuda")
    model, optimizer = accelerator.prepare(student, optimizer)
    student = accelerator.unwrap_model(model)
    if kind != "even":
        keep_tokens(student, options.size**2 / options.ratio, ragged=True)
    teacher = torch.nn.Identity()
    if kind == "distilled":
        teacher = place_teacher(stock_dit(DiTConfig(**config, time_embedding="diffusers")), recipe, device)
    run = RunState(student, recipe.ema)
    run.ema.shadow_params = []
    run.update = lambda student: None  # type: ignore[method-assign]
    x_t, noise, timestep, label = batch(options, device)
    updater = Updater(recipe, accelerator, model, teacher, optimizer, run)
    data = Batch(x_t, noise, timestep, label)
    return (lambda: updater.update(data)), before


def adapter_training(kind: str, options: argparse.Namespace, device: Any) -> tuple[Any, int]:
    """`Updater.update` of method ddit, without the average."""
    import torch

    from upcycle.graft.verify import stock_dit
    from upcycle.models import ddit
    from upcycle.recipe import Recipe
    from upcycle.sources import DiTConfig
    from upcycle.training import patches
    from upcycle.training.data import Batch
    from upcycle.training.fsdp import make_accelerator
    from upcycle.training.loop import place_teacher
    from upcycle.training.state import RunState

    stage = {"name": "step", "steps": 10**6, "losses": {"distill": 1.0}}
    recipe = Recipe(
        method="ddit", teacher="none", data="none", out="none", batch_size=options.batch, stages=[stage],
        mixed_precision=options.precision, gradient_checkpointing=options.checkpointing,
    )  # fmt: skip
    accelerator = make_accelerator(mixed_precision=recipe.mixed_precision)
    torch.zeros(1, device=device)
    before = peak(device)
    base = stock_dit(DiTConfig(**teacher_config(options), time_embedding="diffusers"))
    student = patches.PatchStudent(ddit.attach(base, ddit.DDiTConfig("DiTTransformer2DModel", [2, 4])))
    patches.prepare_student(student, recipe)
    optimizer = patches.make_optimizer(student, recipe, fused=device.type == "cuda")
    base = place_teacher(base, recipe, device)
    model, optimizer = accelerator.prepare(student, optimizer)
    run = RunState(accelerator.unwrap_model(model), recipe.ema)
    run.ema.shadow_params = []
    run.update = lambda student: None  # type: ignore[method-assign]
    x_t, noise, timestep, label = batch(options, device)
    updater = patches.Updater(recipe, accelerator, model, base, optimizer, run)
    data = Batch(x_t, noise, timestep, label)
    return (lambda: updater.update(data)), before


def batch(options: argparse.Namespace, device: Any) -> tuple[Any, ...]:
    import torch

    shape = (options.batch, 4, options.size, options.size)
    timestep = torch.linspace(0, 999, options.batch).long()
    return tuple(x.to(device) for x in (torch.randn(shape), torch.randn(shape), timestep, timestep))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="S/2", help="S, B, L or XL, and the teacher's patch size")
    parser.add_argument("--size", type=int, default=32, help="side of the latents")
    parser.add_argument("--ratio", type=float, default=4.0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for kind in KINDS:
        pipes[kind], theirs = context.Pipe()
        process = context.Process(target=serve, args=(kind, options, theirs), daemon=True)
        process.start()
        processes.append(process)
        theirs.close()
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(options.repeats + 1):
        for kind, pipe in pipes.items():
            pipe.send(True)
            seconds[kind].append(pipe.recv())
    memory = {}
    for kind, pipe in pipes.items():
        pipe.send(False)
        memory[kind] = pipe.recv()
    median = {kind: statistics.median(values[1:]) for kind, values in seconds.items()}  # the first warms up
    report = {
        "options": vars(options),
        "seconds": median,
        "peak_bytes": memory,
        # By rounds, because the machine's speed changes from one to the next.
        "times_the_teachers_time": {
            kind: statistics.median(a / b for a, b in zip(seconds[kind][1:], seconds["teacher"][1:], strict=True))
            for kind in KINDS[1:]
        },
        "times_the_teachers_memory": {kind: memory[kind] / memory["teacher"] for kind in KINDS[1:]},
    }
    if options.json:
        print(json.dumps(report, indent=2))
        return
    print(f"{options.shape}, batch {options.batch}, {options.size}x{options.size}, ratio {options.ratio:g}")
    times = {"teacher": 1.0, **report["times_the_teachers_time"]}
    for kind in KINDS:
        print(
            f"{kind:>10}  {median[kind]:8.3f} s {times[kind]:5.2f}x"
            f"  {memory[kind] / 2**20:8.0f} MiB {memory[kind] / memory['teacher']:5.2f}x"
        )


if __name__ == "__main__":
    main()
