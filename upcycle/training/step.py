"""One update: noise a batch, ask the teacher, let the student predict, add up the losses, move the weights.

The batch of an update is one batch however it is split over ranks and accumulated parts: the teacher is asked about all
of it first, because the router's target shares its budget over the whole batch.
"""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DiTTransformer2DModel

from upcycle.evaluation.flops import gate_share
from upcycle.models.chunked_dit import ChunkedDiT, Routing, lattice_prior
from upcycle.recipe import Recipe, Stage
from upcycle.training import losses, schedule
from upcycle.training.block_distillation import BlockRecorder, block_loss
from upcycle.training.data import Batch
from upcycle.training.state import RunState, router_bias
from upcycle.training.variational import VariationalBound, noise_schedule

TERMS = ("diffusion", "variational", "distill", "blocks", "ratio_loss", "router", "flops")
NOISE_LEVELS = 4
"""Tokens kept are reported by quarter of the timesteps, the cleanest first."""


@dataclass
class Question:
    """A noisy part of the batch, and what the teacher says to it (with gradient off).

    ``x_t`` [b, C, H, W], ``alpha_bar`` [b], ``answer`` [b, O, H, W] or None where no loss asks for it, and the router's
    ``target`` bool [b, L] or None. ``gate_seed`` int64 [b]: of the noise of DyDiT's gates, None without them.
    """

    batch: Batch
    x_t: torch.Tensor
    alpha_bar: torch.Tensor
    answer: torch.Tensor | None = None
    target: torch.Tensor | None = None
    gate_seed: torch.Tensor | None = None


class Updater:
    """Makes the updates of a run; ``model`` is the student as accelerate prepared it."""

    def __init__(
        self,
        recipe: Recipe,
        accelerator: Accelerator,
        model: torch.nn.Module,
        teacher: DiTTransformer2DModel,
        optimizer: Any,
        run: RunState,
    ):
        self.recipe, self.accelerator, self.model, self.optimizer, self.run = recipe, accelerator, model, optimizer, run
        self.student: ChunkedDiT = accelerator.unwrap_model(model)
        self.teacher = teacher
        c = self.student.config
        self.prior = lattice_prior(c.sample_size, c.sample_size, c.patch_size, accelerator.device)
        self.bound = VariationalBound(noise_schedule(self.student).to(accelerator.device))
        self.start_guide = self.student.guide

    def update(self, batch: Batch, *, stop: bool = False) -> dict[str, Any]:
        """One step with this rank's share of the batch; returns its row of the log, the same on every rank.

        ``stop``: this rank was told to stop; the row's ``stop`` is true if any was. A step whose loss or gradient is
        not finite changes nothing but the counters of `RunState`.
        """
        recipe, run = self.recipe, self.run
        stage, _ = schedule.stage_at(recipe, run.step)
        lr = schedule.learning_rate(recipe, run.step)
        set_lr(self.optimizer, lr)
        guide = schedule.guide(recipe, run.step, self.start_guide)
        rho = schedule.tail_drop(recipe, run.step)

        questions = self._ask(stage, batch.parts(recipe.gradient_accumulation))
        sums = torch.zeros(len(TERMS) + 4 + 2 * NOISE_LEVELS, device=self.accelerator.device)
        logits = []
        for i, question in enumerate(questions):
            last = i == len(questions) - 1
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                loss, values, routing = self._learn(stage, question, guide, rho, len(questions))
                self.accelerator.backward(loss)
            sums += values
            logits.append(routing.logit.detach())

        parameters = self._trained(stage)
        norm = self._norm(parameters)
        local = torch.cat([sums / len(questions), norm.reshape(1), sums.new_tensor([float(stop)])])
        *values, norm_value, stopped = self.accelerator.reduce(local, reduction="mean").tolist()
        finite = math.isfinite(values[0]) and math.isfinite(norm_value)
        if finite:
            move(self.optimizer, parameters, norm, recipe.optimizer.clip)
            self._hold_ratio(stage, torch.cat(logits))
            run.update(self.student)
        self.optimizer.zero_grad()
        run.count(finite)
        return self._row(stage, values, norm_value, stopped > 0, guide, rho, lr)

    # -- the teacher --------------------------------------------------------------------------------------------------

    def _ask(self, stage: Stage, parts: Sequence[Batch]) -> list[Question]:
        """The parts of the batch with the teacher's answers and the router's target over all of it."""
        c, weight = self.student.config, stage.losses
        supervised = weight.router > 0 and router_bias(self.student) is not None
        questions, details = [], []
        for batch in parts:
            alpha_bar = self.student.alpha_bar(batch.timestep)
            alpha = alpha_bar[:, None, None, None]
            question = Question(batch, alpha.sqrt() * batch.x0 + (1 - alpha).sqrt() * batch.noise, alpha_bar)
            if weight.distill > 0 or supervised:
                self._answer(question, stage.teacher_guidance)
            if supervised:
                assert question.answer is not None
                estimate = losses.predicted_x0(
                    question.x_t, question.answer[:, : c.in_channels], alpha_bar, c.sample_range
                )
                details.append(losses.visible_detail(estimate, alpha_bar, self.prior))
            questions.append(question)
        if self.student.dydit_routers is not None:
            self._seed_gates(questions)
        if supervised:
            detail = torch.cat(details)
            everyone = self.accelerator.gather(detail)
            first = self.accelerator.process_index * len(detail)
            target = losses.router_target(everyone, c.ratio)[first : first + len(detail)]
            for question, part in zip(questions, target.chunk(len(questions)), strict=True):
                question.target = part
        return questions

    def _seed_gates(self, questions: list[Question]) -> None:
        share = sum(len(question.x_t) for question in questions)
        first = self.accelerator.process_index * share
        drawn = schedule.gate_seeds(self.recipe, self.run.step, range(first, first + share))
        seeds = torch.tensor(drawn, device=self.accelerator.device)
        for question, part in zip(questions, seeds.chunk(len(questions)), strict=True):
            question.gate_seed = part

    def _answer(self, question: Question, guidance: float) -> None:
        batch, channels = question.batch, self.student.config.in_channels
        null = torch.full_like(batch.label, self.student.config.num_classes)
        x_t = question.x_t.to(self.teacher.dtype)
        with torch.inference_mode():
            answer = self.teacher(x_t, timestep=batch.timestep, class_labels=batch.label).sample.float()
            if guidance > 1:
                unguided = self.teacher(x_t, timestep=batch.timestep, class_labels=null).sample.float()
                # Where the label was dropped both are the same, and so is their guided sum.
                answer = losses.guided_target(answer, unguided, guidance, channels)
        question.answer = answer.clone()  # out of inference mode, so that losses can keep it

    # -- the student --------------------------------------------------------------------------------------------------

    def _learn(
        self, stage: Stage, question: Question, guide: float, rho: float, parts: int
    ) -> tuple[torch.Tensor, torch.Tensor, Routing]:
        """The loss of a part of the batch, divided by their number, and its share of the row (undivided)."""
        c, weight, batch = self.student.config, stage.losses, question.batch
        recorder = BlockRecorder(self.student, self.teacher) if weight.blocks else None
        with recorder or nullcontext():
            if recorder:
                with torch.inference_mode():
                    x_t = question.x_t.to(self.teacher.dtype)
                    self.teacher(x_t, timestep=batch.timestep, class_labels=batch.label)
            with self.accelerator.autocast():
                options = {"tail_drop": rho, "guide": guide, "gate_seed": question.gate_seed}
                out = self.model(question.x_t, batch.timestep, batch.label, **options)
        sample, routing, channels = out.sample.float(), out.routing, c.in_channels
        per_sample = torch.ones_like(question.alpha_bar)
        if weight.min_snr is not None:
            per_sample = losses.min_snr_weight(question.alpha_bar, weight.min_snr)
        elif weight.balanced:
            per_sample = losses.balanced_weight(question.alpha_bar)

        zero = 0 * sample.mean()  # every parameter gets a gradient, as DDP wants, whatever the losses are
        terms = dict.fromkeys(TERMS, zero)
        if weight.diffusion:
            terms["diffusion"] = losses.weighted_mse(sample[:, :channels], batch.noise, per_sample)
        if weight.variational and sample.shape[1] == 2 * channels:
            terms["variational"] = self.bound(sample, batch.x0, question.x_t, batch.timestep).mean()
        if weight.distill:
            assert question.answer is not None
            # Of the learned sigma the error does not fall with the noise: it is not weighed.
            terms["distill"] = losses.weighted_mse(sample, question.answer, per_sample, channels)
        if recorder:
            terms["blocks"] = block_loss(recorder, routing, self.student)
        if weight.ratio and self.student.routing_module is not None:
            terms["ratio_loss"] = losses.ratio_loss(routing, c.ratio, weight.ratio_group)
        if question.target is not None:
            terms["router"] = losses.router_loss(routing, question.target)
        share = gate_share(c, out.gates, routing.mask.sum(1))
        if weight.flops and out.gates is not None:
            terms["flops"] = losses.flops_loss(share, c.dydit, weight.ratio_group)
        router_weight = schedule.router_weight(self.recipe, self.run.step)
        weights = (
            weight.diffusion, weight.variational, weight.distill, weight.blocks, weight.ratio, router_weight,
            weight.flops,
        )  # fmt: skip
        loss = zero + sum(w * term for w, term in zip(weights, terms.values(), strict=True))
        with torch.no_grad():
            kept = routing.mask.float().mean(1)
            level = batch.timestep * NOISE_LEVELS // c.num_train_timesteps
            sums = kept.new_zeros(NOISE_LEVELS).index_add(0, level, kept)
            counts = kept.new_zeros(NOISE_LEVELS).index_add(0, level, torch.ones_like(kept))
            natural = routing.mask_natural.float().mean()
            values = torch.stack([loss, *terms.values(), natural, kept.mean(), share.mean()])
        return loss / parts, torch.cat([values.detach(), sums, counts]), routing

    # -- the weights --------------------------------------------------------------------------------------------------

    def _trained(self, stage: Stage) -> list[torch.nn.Parameter]:
        """Parameters with a gradient; those that this stage freezes lose theirs, so that the optimizer passes them by.

        (What every stage freezes has none from the start.)
        """
        frozen = {id(p) for module in parts_of(self.student, stage.freeze) for p in module.parameters()}
        trained = []
        for parameter in self.student.parameters():
            if id(parameter) in frozen:
                parameter.grad = None
            elif parameter.grad is not None:
                trained.append(parameter)
        return trained

    def _norm(self, parameters: list[torch.nn.Parameter]) -> torch.Tensor:
        norm = total_norm(parameters)
        return norm.full_tensor() if hasattr(norm, "full_tensor") else norm

    @torch.no_grad()
    def _hold_ratio(self, stage: Stage, logit: torch.Tensor) -> None:
        """One step of the controller that keeps 1/N of the positions of the whole batch."""
        bias = router_bias(self.student)
        if bias is not None:
            target = losses.bias_target(self.accelerator.gather(logit), bias, self.student.config.ratio)
            bias.lerp_(target, stage.anneal.bias_rate)

    def _row(
        self, stage: Stage, values: list[float], norm: float, stop: bool, guide: float, rho: float, lr: float
    ) -> dict[str, Any]:
        size = self.student.config.sample_size**2
        loss, *terms, natural, kept, share = values[: len(TERMS) + 4]
        sums, counts = values[-2 * NOISE_LEVELS : -NOISE_LEVELS], values[-NOISE_LEVELS:]
        bias = router_bias(self.student)
        levels = {
            f"tokens_t{i * self.student.config.num_train_timesteps // NOISE_LEVELS}": size * s / n if n else math.nan
            for i, (s, n) in enumerate(zip(sums, counts, strict=True))
        }
        return {
            "step": self.run.step,
            "stage": stage.name,
            "loss": loss,
            **dict(zip(TERMS, terms, strict=True)),
            "ratio": 1 / natural if natural else math.inf,
            "tokens_kept": size * kept,
            **levels,
            "block_flops": share,
            "tail_drop": rho,
            "guide": guide,
            "bias": 0.0 if bias is None else bias.item(),
            "lr": lr,
            "grad_norm": norm,
            "skipped": self.run.skipped,
            "stop": stop,
        }


def set_lr(optimizer: Any, lr: float) -> None:
    """Learning rates of this step: each group has a share of ``lr``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def total_norm(parameters: list[torch.nn.Parameter]) -> torch.Tensor:
    """Norm of all gradients together."""
    return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])


def move(optimizer: Any, parameters: list[torch.nn.Parameter], norm: torch.Tensor, clip: float) -> None:
    """Clip the gradients, whose ``norm`` is known, and move the weights."""
    torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    optimizer.step()


def parts_of(student: ChunkedDiT, names: Sequence[str]) -> list[torch.nn.Module]:
    """The modules of the teacher inside the student that a recipe calls embedders, blocks and head."""
    modules: dict[str, list[torch.nn.Module]] = {
        "embedders": [student.embedders],
        "blocks": [student.transformer_blocks],
        "head": [student.proj_out_1, student.proj_out_2],
    }
    return [module for name in names for module in modules[name]]
