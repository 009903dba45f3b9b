"""What is particular to DDiT while it trains: an adapter learns, size by size, what its own base predicts."""

import math
import os
import random
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator

from upcycle.graft.patches import Adapter
from upcycle.models import ddit
from upcycle.recipe import Recipe
from upcycle.training import schedule
from upcycle.training.data import Batch
from upcycle.training.log import TIMES
from upcycle.training.state import RunState
from upcycle.training.step import move, set_lr, total_norm

COLUMNS = ("step", "stage", "loss", "distill", "m", "lr", "grad_norm", "skipped", *TIMES)
TERMS = ("distill",)
VARIANCE_SAMPLES = 512


class PatchStudent(torch.nn.Module):
    """The adapter of a base model as a model of its own: its parameters are what trains, averages and is saved.

    The base lies outside of the module tree, frozen, and is its own teacher at m = 1: there is one copy in memory.
    """

    guide = 0.0
    routing_module = None
    base: Any
    bases: list[Any]

    def __init__(self, base: Any):
        super().__init__()
        object.__setattr__(self, "base", base)
        object.__setattr__(self, "bases", [base])
        self.adapter = torch.nn.ParameterDict(
            {name.replace(".", "/"): parameter for name, parameter in base.adapter_parameters().items()}
        )
        self.config = self.describe(base)
        self.m = base.ddit.patches[0]

    @staticmethod
    def describe(base: Any) -> SimpleNamespace:
        """What training asks a model for."""
        c, noise = base.config, base.ddit
        return SimpleNamespace(
            num_train_timesteps=noise.num_train_timesteps,
            num_classes=c.num_embeds_ada_norm,
            in_channels=c.in_channels,
            sample_size=c.sample_size,
            patches=tuple(noise.patches),
        )

    def alpha_bar(self, timestep: torch.Tensor) -> torch.Tensor:
        """Cumulative signal power at integer timesteps [B] -> fp32 [B]."""
        return self.base.noise.levels(timestep)[0] ** 2

    def mix(self, x0: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Noisy samples at integer timesteps [B], like ``x0``."""
        alpha = self.alpha_bar(timestep)[:, None, None, None]
        return alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise

    def level_weight(self, timestep: torch.Tensor) -> torch.Tensor:
        """sqrt(1 + 2 / snr) at integer timesteps [B], fp32.

        An epsilon's error moves x0 by sigma / alpha times as much, and coarse steps come where that is large: without
        the weight training makes the start worse there (docs/ddit.md).
        """
        alpha_bar = self.alpha_bar(timestep)
        return (1 + 2 * (1 - alpha_bar) / alpha_bar).sqrt()

    @torch.no_grad()
    def target(self, x: torch.Tensor, timestep: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """What the base itself predicts, at m = 1 whatever its schedule says."""
        return self.predict(x, timestep, label, 1).sample

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, label: torch.Tensor, m: int | None = None) -> Any:
        """The base at factor ``m`` (default: ``self.m``)."""
        return self.predict(x, timestep, label, self.m if m is None else m)

    def predict(self, x: torch.Tensor, timestep: torch.Tensor, label: torch.Tensor, m: int) -> Any:
        """`forward` without what accelerate puts around that."""
        with self.base.at(m):
            return self.base(x, timestep=timestep, class_labels=label)

    def tensors(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A state dict of this module under the adapter's names."""
        return {name.removeprefix("adapter.").replace("/", "."): value for name, value in weights.items()}

    def adapters(self, tensors: dict[str, torch.Tensor]) -> list[Adapter]:
        """What `tensors` returns, as adapters to be exported."""
        return [(self.base.ddit, tensors)]


def measured_variance(base: Any, rows: Sequence[torch.Tensor]) -> dict[str, float]:
    """s^2 of every size (`ddit.DDiTConfig`), of clean latents [C, H, W] or [C, F, H, W]."""
    x0 = torch.stack(list(rows))
    side = base.switching_layers(base.config).embed.sizes["h"]
    return {str(m): ddit.outside_variance(x0, side, m) for m in base.ddit.patches}


def prepare_student(student: PatchStudent, recipe: Recipe) -> None:
    """Set what trains, and checkpointing."""
    for base in student.bases:
        base.requires_grad_(False).eval()
        if recipe.gradient_checkpointing:
            base.enable_gradient_checkpointing()
    student.train().requires_grad_(True)


def make_optimizer(student: PatchStudent, recipe: Recipe, *, fused: bool) -> torch.optim.AdamW:
    """AdamW over the adapter."""
    o = recipe.optimizer
    groups: list[dict[str, Any]] = [{"params": list(student.parameters()), "lr_scale": 1.0}]
    return torch.optim.AdamW(groups, lr=recipe.stages[0].lr, betas=o.betas, weight_decay=o.weight_decay, fused=fused)


def size_at(recipe: Recipe, step: int, patches: Sequence[int]) -> int:
    """The factor that a step trains, the same on every rank and when a run is continued."""
    return random.Random(f"{recipe.seed}-{step}-m").choice(list(patches))


class Updater:
    """Makes the updates of a run; ``model`` is the student as accelerate prepared it."""

    start_guide = 0.0

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        model: torch.nn.Module,
        teacher: torch.nn.Module,
        optimizer: Any,
        run: RunState,
    ):
        self.recipe, self.accelerator, self.model, self.optimizer, self.run = recipe, accelerator, model, optimizer, run
        self.student: PatchStudent = accelerator.unwrap_model(model)
        self.teacher = teacher

    def update(self, batch: Batch, *, stop: bool = False) -> dict[str, Any]:
        """One step with this rank's share of the batch; returns its row of the log, the same on every rank."""
        recipe, run, student = self.recipe, self.run, self.student
        stage, _ = schedule.stage_at(recipe, run.step)
        lr = schedule.learning_rate(recipe, run.step)
        set_lr(self.optimizer, lr)
        m = size_at(recipe, run.step, student.config.patches)
        parts = batch.parts(recipe.gradient_accumulation)
        total = torch.zeros((), device=self.accelerator.device)
        for i, part in enumerate(parts):
            x_t = student.mix(part.x0, part.noise, part.timestep)
            last = i == len(parts) - 1
            with self.accelerator.autocast(), nullcontext() if last else self.accelerator.no_sync(self.model):
                expected = student.target(x_t, part.timestep, part.label)
                total += self._learn(x_t, part, expected, m, stage.losses.distill, len(parts))
        parameters = [p for p in student.parameters() if p.grad is not None]
        norm = total_norm(parameters)
        local = torch.stack([total, norm.to(total), total.new_tensor(float(stop))])
        loss, norm_value, stopped = self.accelerator.reduce(local, reduction="mean").tolist()
        finite = math.isfinite(loss) and math.isfinite(norm_value)
        if finite:
            move(self.optimizer, parameters, norm, recipe.optimizer.clip)
            run.update(student)
        self.optimizer.zero_grad()
        run.count(finite)
        weight = stage.losses.distill
        return {
            "step": run.step, "stage": stage.name, "loss": loss, "distill": loss / weight, "m": m, "lr": lr,
            "grad_norm": norm_value, "skipped": run.skipped, "stop": stopped > 0,
        }  # fmt: skip

    def _learn(
        self, x_t: torch.Tensor, part: Batch, expected: torch.Tensor, m: int, weight: float, parts: int
    ) -> torch.Tensor:
        out = self.model(x_t, part.timestep, part.label, m).sample
        error = (out.float() - expected.float()).square().flatten(1).mean(1)
        loss = weight * (self.student.level_weight(part.timestep) * error).mean()
        self.accelerator.backward(loss / parts)
        return loss.detach() / parts


def finished(student: PatchStudent, run: RunState, recipe: Recipe, updater: Updater) -> dict[str, torch.Tensor]:
    """The adapter's averaged tensors, on the CPU in fp32, to be exported."""
    return student.tensors(run.averaged_weights(student))


def check_launch() -> str | None:
    """What of the launcher does not fit, in words; None where all does."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes"):
        return "FSDP shards what trains, and of method ddit that is an adapter; launch without it"
    return None
