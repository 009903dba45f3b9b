"""Post-training: the student learns where tokens are needed while it stays close to its teacher.

One step: noise a batch, ask the teacher (no gradient), let the student predict with the step's guide and tail drop,
add up the losses, update. What a step draws comes from (seed, step) alone, so that a resumed run continues as if it
had never stopped, on any number of ranks.
"""

import csv
import math
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DiTTransformer2DModel

from upcycle.errors import UpcycleError
from upcycle.models.chunked_dit import ChunkedDiT, lattice_prior
from upcycle.recipe import Recipe
from upcycle.training import losses, schedule, state
from upcycle.training.data import ShardedData, TensorData, batch_rows

COLUMNS = (
    "step", "loss", "diffusion", "distill", "ratio_loss", "router", "ratio", "tokens_kept", "tail_drop", "guide",
    "bias", "lr", "grad_norm",
)  # fmt: skip


@dataclass(frozen=True)
class Batch:
    """One rank's share of a step: x0 and noise [b, C, H, W], timestep and label int64 [b]."""

    x0: torch.Tensor
    noise: torch.Tensor
    timestep: torch.Tensor
    label: torch.Tensor


class Interrupted(Exception):
    """The run was interrupted after a checkpoint was saved."""


def draw_batch(
    data: TensorData | ShardedData, recipe: Recipe, step: int, rank: int, ranks: int, timesteps: int, null_class: int
) -> Batch:
    """The global batch of ``step``, drawn alike on every rank; this rank's share is consecutive rows.

    Labels are dropped here and not in the model: diffusers would draw anew in every block.
    """
    rows = batch_rows(len(data), recipe.batch_size, step, recipe.seed)
    generator = torch.Generator().manual_seed((recipe.seed << 32) + step)
    timestep = torch.randint(0, timesteps, (len(rows),), generator=generator)
    dropped = torch.rand(len(rows), generator=generator) < recipe.label_dropout
    noise = torch.randn(len(rows), *data.sample_shape, generator=generator)
    share = len(rows) // ranks
    mine = slice(rank * share, (rank + 1) * share)
    x0, label = data.rows(rows[mine])
    return Batch(x0, noise[mine], timestep[mine], torch.where(dropped[mine], null_class, label))


def freeze(student: ChunkedDiT, parts: Sequence[str]) -> None:
    """Exclude parts of the teacher from training: its embedders, blocks or head."""
    modules = {
        "embedders": [student.embedders],
        "blocks": [student.transformer_blocks],
        "head": [student.proj_out_1, student.proj_out_2],
    }
    for part in parts:
        for module in modules[part]:
            module.requires_grad_(False)


def make_optimizer(student: ChunkedDiT, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW with the router in a group of its own, so that it can learn faster."""
    router: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            (router if name.startswith("routing_module.") else rest).append(parameter)
    groups: list[dict[str, Any]] = [{"params": rest, "lr_scale": 1.0}]
    if router:
        groups.append({"params": router, "lr_scale": recipe.optimizer.router_lr_scale})
    o = recipe.optimizer
    return torch.optim.AdamW(groups, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay)


def train(
    recipe: Recipe,
    student: ChunkedDiT,
    teacher: DiTTransformer2DModel,
    data: TensorData | ShardedData,
    out: Path,
    *,
    resume: bool = False,
    on_step: Callable[[dict[str, float]], None] = lambda row: None,
) -> ChunkedDiT:
    """Run a recipe; returns the student with its averaged weights, on the CPU, in fp32, with the guide at 0.

    Writes ``out/log.csv`` and ``out/checkpoints``. ``on_step`` gets the row of every step.

    Raises:
        UpcycleError: nothing to resume from, a checkpoint that is damaged or of another recipe, a loss or gradient that
            is not finite, or no space for a checkpoint.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    accelerator = Accelerator(mixed_precision=recipe.mixed_precision)
    set_seed(recipe.seed)
    out.mkdir(parents=True, exist_ok=True)
    start_guide = student.guide
    student.train()
    freeze(student, recipe.freeze)
    if recipe.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    optimizer = make_optimizer(student, recipe)
    teacher = teacher.to(accelerator.device)
    model, optimizer = accelerator.prepare(student, optimizer)
    run = state.RunState(student, recipe.ema)
    state.register(accelerator)
    if resume:
        state.load(accelerator, out / "checkpoints", recipe, run)

    with _Log(out / "log.csv", run.step, recipe.log_every, accelerator.is_main_process) as log, _StopSignal() as stop:
        while run.step < recipe.steps:
            row, stopped = _step(
                recipe, accelerator, model, student, teacher, optimizer, data, run, start_guide, stop.caught
            )
            _check_finite(row, out)
            log.write(row)
            on_step(row)
            last = run.step == recipe.steps
            if stopped or last or run.step % recipe.save_every == 0:
                state.save(accelerator, out / "checkpoints", recipe, run)
            if stopped and not last:
                raise Interrupted(run.step)

    student = accelerator.unwrap_model(model).cpu().float()
    run.ema.to("cpu")
    with torch.no_grad():
        run.copy_to(student)
    student.guide = 0.0
    student.register_to_config(guide=0.0)
    return student.eval().requires_grad_(False)


def _check_finite(row: dict[str, float], out: Path) -> None:
    for name in ("loss", "grad_norm"):
        if not math.isfinite(row[name]):
            raise UpcycleError(
                f"{out}: {name} is {row[name]} at step {row['step']}, so the run stopped; look for NaN in the data, or "
                "lower optimizer.lr and start anew (checkpoints up to here are kept)"
            )


def _step(
    recipe, accelerator, model, student, teacher, optimizer, data, run, start_guide, stop
) -> tuple[dict[str, float], bool]:
    """One update; returns its row of the log, over all ranks, and whether any rank was told to ``stop``."""
    c, step, weight = student.config, run.step, recipe.losses
    rank, ranks, device = accelerator.process_index, accelerator.num_processes, accelerator.device
    batch = draw_batch(data, recipe, step, rank, ranks, c.num_train_timesteps, c.num_classes)
    x0, noise = batch.x0.to(device), batch.noise.to(device)
    timestep, label = batch.timestep.to(device), batch.label.to(device)
    alpha_bar = student.alpha_bar(timestep)
    alpha = alpha_bar[:, None, None, None]
    x_t = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
    guide, rho = schedule.guide(recipe, step, start_guide), schedule.tail_drop(recipe, step)
    lr = schedule.learning_rate(recipe, step)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]

    bias = state.router_bias(student)
    supervised = weight.router > 0 and bias is not None
    with torch.inference_mode(), accelerator.autocast():
        answer = teacher(x_t, timestep, label).sample.float() if weight.distill > 0 or supervised else x_t
    wanted = answer.clone()  # out of inference mode, so that losses can keep it
    with accelerator.autocast():
        out = model(x_t, timestep, label, tail_drop=rho, guide=guide)
    sample, routing, channels = out.sample.float(), out.routing, c.in_channels

    zero = sample.new_zeros(())
    terms = {"diffusion": zero, "distill": zero, "ratio_loss": zero, "router": zero}
    if weight.diffusion:
        terms["diffusion"] = F.mse_loss(sample[:, :channels], noise)
    if weight.distill:
        terms["distill"] = F.mse_loss(sample, wanted)
    if weight.ratio and student.routing_module is not None:
        terms["ratio_loss"] = losses.ratio_loss(routing, c.ratio, recipe.losses.ratio_group)
    if supervised:
        estimate = losses.predicted_x0(x_t, wanted[:, :channels], alpha_bar, c.sample_range)
        prior = lattice_prior(x_t.shape[-2], x_t.shape[-1], c.patch_size, device)
        detail = accelerator.gather(losses.visible_detail(estimate, alpha_bar, prior))
        mine = slice(rank * len(x0), (rank + 1) * len(x0))
        terms["router"] = losses.router_loss(routing, losses.router_target(detail, c.ratio)[mine])
    loss = (
        weight.diffusion * terms["diffusion"]
        + weight.distill * terms["distill"]
        + weight.ratio * terms["ratio_loss"]
        + schedule.router_weight(recipe, step) * terms["router"]
    )
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(student.parameters(), recipe.optimizer.clip)
    optimizer.step()
    optimizer.zero_grad()
    with torch.no_grad():
        if bias is not None:
            logit = accelerator.gather(routing.logit.detach())
            target = losses.bias_target(logit, bias, c.ratio)
            bias.lerp_(target, recipe.anneal.bias_rate)
        run.update(student)
    run.step += 1

    size = routing.mask.shape[1]
    natural, kept = routing.mask_natural.float().mean(), routing.mask.float().mean()
    shown = zero if bias is None else bias
    values = [loss, *terms.values(), natural, kept, shown, norm, zero + stop]
    values = torch.stack([value.detach().float().reshape(()) for value in values])
    *values, natural, kept, shown, norm, stop = accelerator.reduce(values, reduction="mean").tolist()
    row = {
        "step": run.step,
        **dict(zip(COLUMNS[1:6], values, strict=True)),
        "ratio": 1 / natural,
        "tokens_kept": size * kept,
        "tail_drop": rho,
        "guide": guide,
        "bias": shown,
        "lr": lr,
        "grad_norm": norm,
    }
    return row, stop > 0


class _Log:
    """log.csv: a row every ``every`` steps, averaged over them, and one of the rest at the end of the run.

    On resume, rows past the checkpoint are cut off.
    """

    def __init__(self, path: Path, step: int, every: int, active: bool):
        self._active, self._every = active, every
        self._pending: list[dict[str, float]] = []
        if not active:
            return
        kept: list[dict[str, str]] = []
        if step and path.exists():
            with path.open() as file:
                kept = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
        self._file = path.open("w", newline="")
        self._writer = csv.DictWriter(self._file, COLUMNS)
        self._writer.writeheader()
        self._writer.writerows(kept)

    def __enter__(self) -> "_Log":
        return self

    def __exit__(self, *_) -> None:
        if self._active:
            self._flush()
            self._file.close()

    def write(self, row: dict[str, float]) -> None:
        if not self._active:
            return
        self._pending.append(row)
        if row["step"] % self._every == 0:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        mean = {key: sum(row[key] for row in self._pending) / len(self._pending) for key in COLUMNS}
        mean["step"] = self._pending[-1]["step"]
        self._pending = []
        self._writer.writerow({key: value if key == "step" else f"{value:.6g}" for key, value in mean.items()})
        self._file.flush()


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
