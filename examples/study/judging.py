"""How an arm is judged: held-out noise MSE by timestep, and whole trajectories beside the teacher's."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from safetensors.torch import load_file, save_file
from sets import GUIDANCE, Set
from teachers import train

from upcycle.evaluation.compare import Drawn, Variant, draw
from upcycle.evaluation.metrics import Reference, measure, statistics
from upcycle.evaluation.validation import validate
from upcycle.graft.verify import load_student
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.recipe import Recipe, load_recipe
from upcycle.sampling.pipeline import load_pipeline
from upcycle.sampling.sampler import Sampling
from upcycle.training import schedule
from upcycle.training.data import open_data
from upcycle.training.digits import TEACHER
from upcycle.training.state import RunState

DDIM_STEPS, BATCH = 20, 50


@dataclass
class FixedVariant(Variant):
    """A student that keeps as many tokens in every sample and step, if it is told so."""

    tokens: int | None = None

    def begin(self) -> None:
        super().begin()
        if self.tokens:
            self.pipe.transformer.set_tokens(self.tokens)


class Judge:
    """Judges models of one set on ``samples`` trajectories (DDIM, ``guidance``, a class in turn, seeds from 0 on) and
    on ``held_out`` images. The teacher's trajectories have guidance 2 whatever ``guidance`` is.

    What the teacher draws is kept in ``folder``, because every arm is compared with it.
    """

    def __init__(
        self,
        study_set: Set,
        samples: int,
        held_out: int,
        folder: Path,
        device: str = "cpu",
        guidance: float = GUIDANCE,
    ):
        self.guidance = guidance
        self.set, self.samples, self.device = study_set, samples, torch.device(device)
        self.pipe = load_pipeline(study_set.teacher).to(self.device)
        self.alpha_bar = self.pipe.scheduler.alphas_cumprod
        self.teacher = _copy(self.pipe.transformer).to(self.device)  # without the hook that wants keywords
        images, labels = study_set.held_out()
        spread = torch.linspace(0, len(images) - 1, min(held_out, len(images))).long()
        self._held_out = images[spread], labels[spread]
        self._file = folder / f"teacher-{samples}.safetensors"

    @property
    def labels(self) -> list[int]:
        return [i % self.set.classes for i in range(self.samples)]

    def _draw(
        self,
        model: torch.nn.Module,
        guidance: float,
        tail_drop: float | None = None,
        tokens: int | None = None,
        steps: int = DDIM_STEPS,
    ) -> Drawn:
        self.pipe.transformer = model
        variant = FixedVariant("", self.pipe, Sampling(steps, guidance), tail_drop, tokens)
        return draw(variant, self.labels, list(range(self.samples)), batch_size=BATCH)

    @lru_cache(1)  # noqa: B019 - one judge a process
    def reference(self) -> Reference:
        features = self.set.look(self.set.reference())[0]
        return {**statistics(features), "features": features.numpy()}

    @lru_cache(1)  # noqa: B019
    def teachers(self) -> torch.Tensor:
        """The teacher's samples [n, C, H, W]."""
        if not self._file.exists():
            latents = self._draw(self.teacher, GUIDANCE).latents.clamp(-1, 1)
            self._file.parent.mkdir(parents=True, exist_ok=True)
            partial = self._file.with_suffix(f".{os.getpid()}")  # two jobs may draw them
            save_file({"latents": latents}, partial)
            partial.replace(self._file)
        return load_file(self._file)["latents"]

    def loss(self, model: torch.nn.Module) -> dict[str, Any]:
        """Held-out noise MSE: ``val_loss``, and by timestep."""
        found = validate(model, *self._held_out, self.alpha_bar.cpu())
        return {"val_loss": found.mean_loss, "val_loss_by_t": found.loss, "tokens_by_t": found.tokens}

    def trajectories(
        self, model: torch.nn.Module, tail_drop: float | None, tokens: int | None = None
    ) -> dict[str, Any]:
        """Paired MSE of samples (pixels in [-1, 1]), class accuracy, Fréchet distance and KID, FLOPs and tokens."""
        drawn = self._draw(model, self.guidance, tail_drop, tokens)
        pixels = drawn.latents.clamp(-1, 1)
        features, logits = self.set.look(pixels)
        found = measure({"features": features, "logits": logits}, self.reference())
        return {
            "paired_mse": (pixels - self.teachers()).square().mean().item(),
            "accuracy": (logits.argmax(1) == torch.tensor(self.labels)).float().mean().item(),
            "frechet": found["fid"],
            "kid": found["kid"],
            "flops": drawn.flops,
            "tokens": drawn.tokens,
        }

    def judge_teacher(self) -> dict[str, Any]:
        """The teacher's row, and what half of the steps costs it; ``classifier``: how many held-out images the set's
        classifier reads right."""
        row = {**self.loss(self.teacher), **self.trajectories(self.teacher, None)}
        half = self._draw(self.teacher, GUIDANCE, steps=DDIM_STEPS // 2).latents.clamp(-1, 1)
        row["half_the_steps_mse"] = (half - self.teachers()).square().mean().item()
        images, labels = self.set.held_out()
        row["classifier"] = (self.set.look(images)[1].argmax(1) == labels).float().mean().item()
        return row


def judge_run(
    judge: Judge, recipe_file: Path, tail_drops: tuple[float, ...], equal_tokens: bool
) -> list[dict[str, Any]]:
    """A row for the start and for every checkpoint of a run; trajectories at the end, also with tails dropped
    (``by_tail_drop``) and, if ``equal_tokens``, with exactly one of N positions kept (``fixed``)."""
    recipe = load_recipe(recipe_file)
    start = Path(recipe.student or f"{recipe.out}/start")
    rows = []
    for step, student in _averaged_students(recipe, start):
        student = student.eval().to(judge.device)
        row = {"step": step, **judge.loss(student)}
        if step == recipe.steps:
            row |= judge.trajectories(student, 0.0)
            row["by_tail_drop"] = {
                str(rho): {**judge.trajectories(student, rho), "val_loss": _at(judge, student, rho)}
                for rho in tail_drops
            }
            if equal_tokens:
                tokens = round(student.config.sample_size**2 / student.config.ratio)
                row["fixed"] = judge.trajectories(student, 0.0, tokens)
        rows.append(row)
    return rows


def _at(judge: Judge, student: ChunkedDiT, tail_drop: float) -> float:
    student.set_tokens(None)
    student.set_tail_drop(tail_drop)
    loss = judge.loss(student)["val_loss"]
    student.set_tail_drop(0.0)
    return loss


def judge_trained_on(judge: Judge, recipe_file: Path) -> list[dict[str, Any]]:
    """Train the teacher itself on the recipe's data, for as many steps at the rate that its blocks have in a student;
    its row."""
    recipe = load_recipe(recipe_file)
    data = open_data(recipe.data)
    images = torch.stack([data.row(i, flip=False, noise=None) for i in range(len(data))])
    stage = recipe.stages[0]
    trained = train(
        _copy(judge.teacher).to(judge.device),
        images,
        data.labels,
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        lr=stage.lr * recipe.optimizer.teacher_lr_scale,
        warmup=stage.warmup,
        seed=recipe.seed,
        ema=recipe.ema,
    ).to(judge.device)
    return [{"step": recipe.steps, **judge.loss(trained), **judge.trajectories(trained, None)}]


def _copy(model: DiTTransformer2DModel) -> DiTTransformer2DModel:
    copy = DiTTransformer2DModel.from_config(model.config)
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def _averaged_students(recipe: Recipe, start: Path) -> Iterator[tuple[int, ChunkedDiT]]:
    """(step, student with its averaged weights) at step 0 and at every checkpoint."""
    yield 0, load_student(start)
    for checkpoint in sorted(Path(recipe.out, "checkpoints").glob("step-*")):
        student = load_student(start)
        begin = student.guide
        run = RunState(student, recipe.ema)
        run.load_state_dict(torch.load(checkpoint / "run.pt", weights_only=True))
        with run.averaged(student, schedule.guide(recipe, run.step, begin)):
            yield run.step, student


def scratch_start(start: Path, teacher: str, seed: int) -> None:
    """An export whose blocks and embedders are as fresh as its scaffold, as DiT starts (adaLN at zero)."""
    if start.exists():
        return
    fresh = start.with_name("start.partial")
    source = str(TEACHER) if teacher == "digits" else teacher
    command = [sys.executable, "-m", "upcycle", "convert", source, "--init", "paper", "-o", str(fresh), "--force"]
    subprocess.run([*command, "--seed", str(seed), "--no-verify"], check=True)
    path = fresh / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in weights.items():
        if name.startswith(("embedders.", "transformer_blocks.")):
            tensor.zero_()
            if "embedding_table" in name or "timestep_embedder" in name:
                tensor.normal_(0, 0.02 if name.endswith("weight") else 0.0, generator=generator)
            elif tensor.ndim == 2 and ".norm1.linear." not in name:
                torch.nn.init.xavier_uniform_(tensor, generator=generator)
    save_file(weights, path, metadata={"format": "pt"})
    fresh.rename(start)
