"""What each part of the start of DDiT's coarse patches brings: errors against the base, before and after training.

    python examples/study/ddit_parts.py [--out runs/ddit-parts] [--steps 300] [--seeds 0 1 2] [--quick]

Two small base models of the digits: the shipped DiT, which predicts epsilon, and a tiny Flux transformer, which this
script trains first (flow matching; its weights are kept in --out). Every arm leaves one part of the start out, and then
learns from the base at m = 1 what it predicts: the same batches, noise and order of sizes in all arms of a seed. The
error is ||coarse - base|| / ||base|| on held-out digits. Run it again to go on where it was interrupted.

Writes ddit_parts.json, ddit_parts.md and ddit_parts.png into --out, and prints the tables.
"""

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel, FluxTransformer2DModel
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from safetensors.torch import load_file, save_file
from torch import nn

from upcycle.models import ddit
from upcycle.output import write_text
from upcycle.training.digits import IMAGE_SIZE, NUM_CLASSES, TEACHER, load_digits

PATCHES = (2, 4)
SIDE = 2  # of a base patch, in pixels
RANK = 32
LR, WARMUP, CLIP = 2e-3, 20, 1.0  # as in recipes/ddit-digits.yaml
BASE_LR, BASE_EMA = 2e-3, 0.99
NOISE_SEED, TABLE_SEED, TEXT_WIDTH = 1234, 99, 32


@dataclass(frozen=True)
class Arm:
    """A start of the coarse patches, and the words for it."""

    words: str
    rank: int = RANK
    residual: bool = True
    measured: bool = True
    random: bool = False
    text: bool = True
    centred: bool = True


FULL = "full"
ARMS = {
    FULL: Arm("full start"),
    "no-lora": Arm("without LoRA", rank=0),
    "no-residual": Arm("without the residual", residual=False),
    "default-variance": Arm(f"residual with s² = {ddit.VARIANCE} instead of measured", measured=False),
    "random-start": Arm("random embedding and head", random=True),
    "no-text-vector": Arm("without the patch-size vector on text", text=False),
    "corner": Arm("positions at the top left", centred=False),
}


@dataclass(frozen=True)
class Settings:
    """What decides the numbers; results of other settings are not gone on with."""

    steps: int = 300
    batch: int = 64
    held_out: int = 297
    base_steps: int = 700
    base_batch: int = 64
    heads: int = 4
    blocks: tuple[int, int] = (1, 3)
    samples: int = 100

    @classmethod
    def quick(cls) -> "Settings":
        return cls(3, 16, 16, 150, 32, heads=2, blocks=(1, 1), samples=10)


# ---------------------------------------------------------------------------------------------------------------------
# The two base models


class Epsilon:
    """The shipped digits DiT."""

    name, title, axis = "epsilon", "DiT, ε-prediction", "timestep t"
    base_class, prediction, has_text = "DiTTransformer2DModel", "epsilon", False
    levels: tuple[float, ...] = (50, 200, 400, 600, 800, 950)

    def __init__(self) -> None:
        self.base = DiTTransformer2DModel.from_pretrained(TEACHER, subfolder="transformer").eval()
        self.notes: dict[str, Any] = {}

    def times(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(0, 1000, (count,), generator=generator)

    def call(self, model: Any, z: torch.Tensor, times: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The whole output [B, 2, H, W], learned variance included, as `upcycle finetune` trains it."""
        return model(z, timestep=times, class_labels=labels).sample


class Flow:
    """A tiny Flux transformer of the same digits; the class is one text token and the pooled text, from a fixed table
    of random numbers."""

    name, title, axis = "flow", "tiny Flux, flow matching", "noise level σ"
    base_class, prediction, has_text = "FluxTransformer2DModel", "flow", True
    levels: tuple[float, ...] = (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)

    def __init__(self, settings: Settings, out: Path):
        table = torch.randn(NUM_CLASSES, TEXT_WIDTH, generator=torch.Generator().manual_seed(TABLE_SEED))
        self.table = table
        torch.manual_seed(0)
        self.base = FluxTransformer2DModel(
            patch_size=1,
            in_channels=SIDE * SIDE,
            num_layers=settings.blocks[0],
            num_single_layers=settings.blocks[1],
            attention_head_dim=24,
            num_attention_heads=settings.heads,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=TEXT_WIDTH,
            guidance_embeds=False,
            axes_dims_rope=(4, 10, 10),
        ).eval()
        shape = f"{settings.heads}x24-{settings.blocks[0]}+{settings.blocks[1]}"
        kept = out / f"flow-base-{shape}-{settings.base_steps}x{settings.base_batch}.safetensors"
        if kept.exists():
            self.base.load_state_dict(load_file(kept))
            self.notes = json.loads(kept.with_suffix(".json").read_text())
        else:
            self.notes = self._train(settings)
            save_file(self.base.state_dict(), kept)
            write_text(kept.with_suffix(".json"), json.dumps(self.notes, indent=2) + "\n")
        self.base.requires_grad_(False)

    def times(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.rand(count, generator=generator)

    def call(self, model: Any, z: torch.Tensor, times: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        side = IMAGE_SIZE // SIDE
        tokens = z.unflatten(3, (side, SIDE)).unflatten(2, (side, SIDE)).permute(0, 2, 4, 1, 3, 5)
        places = torch.cartesian_prod(torch.zeros(1), torch.arange(side).float(), torch.arange(side).float())
        text = self.table[labels]
        out = model(
            hidden_states=tokens.flatten(3).flatten(1, 2),
            timestep=times,
            img_ids=places,
            txt_ids=torch.zeros(1, 3),
            encoder_hidden_states=text[:, None],
            pooled_projections=text,
            return_dict=False,
        )[0]
        image = out.reshape(len(z), side, side, 1, SIDE, SIDE).permute(0, 3, 1, 4, 2, 5)
        return image.reshape(z.shape)

    def _train(self, settings: Settings) -> dict[str, Any]:
        """Flow matching on the training digits, moved sideways by -1, 0 or 1 pixel; keeps averaged weights."""
        model, start = self.base, time.perf_counter()
        zero = [
            model.proj_out,
            model.norm_out.linear,
            *(block.norm.linear for block in model.single_transformer_blocks),
        ]
        for block in model.transformer_blocks:
            zero += [block.norm1.linear, block.norm1_context.linear]
        for layer in zero:  # blocks start as the identity, as in a DiT
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        images, labels = load_digits("train")
        images = F.pad(images, (1, 1, 0, 0), value=-1.0)
        generator = torch.Generator().manual_seed(0)
        average = copy.deepcopy(model).requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=BASE_LR, weight_decay=0.0)
        for step in range(settings.base_steps):
            set_lr(optimizer, BASE_LR, step, settings.base_steps)
            rows = torch.randint(0, len(images), (settings.base_batch,), generator=generator)
            first = int(torch.randint(0, 3, (1,), generator=generator))
            x0, y = images[rows, :, :, first : first + IMAGE_SIZE], labels[rows]
            sigma = self.times(len(x0), generator)
            noise = torch.randn(x0.shape, generator=generator)
            level = sigma[:, None, None, None]
            v = self.call(model, (1 - level) * x0 + level * noise, sigma, y)
            loss = F.mse_loss(v, noise - x0)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            decay = min(BASE_EMA, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
            if step % 100 == 99:
                print(f"flow base, step {step + 1}: loss {loss.item():.4f}", flush=True)
        model.load_state_dict(average.state_dict())
        seconds = time.perf_counter() - start
        return {
            "parameters": sum(p.numel() for p in model.parameters()),
            "steps": settings.base_steps,
            "seconds": round(seconds),
            **self._how_good(settings),
        }

    @torch.inference_mode()
    def _how_good(self, settings: Settings) -> dict[str, float]:
        """Held-out loss, that of a guess by one Gaussian for every pixel, and how often the nearest training digit of a
        sample (50 Euler steps) has the wanted class."""
        train, train_labels = load_digits("train")
        images, labels = (part[: settings.held_out] for part in load_digits("val"))
        generator = torch.Generator().manual_seed(NOISE_SEED)
        centre, spread = train.mean(0), train.var(0)
        losses, guesses = [], []
        for sigma in (i / 20 + 0.025 for i in range(20)):
            noise = torch.randn(images.shape, generator=generator)
            z = (1 - sigma) * images + sigma * noise
            v = self.call(self.base, z, torch.full((len(z),), sigma), labels)
            losses.append(F.mse_loss(v, noise - images).item())
            known = (sigma - (1 - sigma) * spread) / ((1 - sigma) ** 2 * spread + sigma**2)
            guess = known * (z - (1 - sigma) * centre) - centre
            guesses.append(F.mse_loss(guess, noise - images).item())
        wanted = torch.arange(settings.samples) % NUM_CLASSES
        x = torch.randn(settings.samples, 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
        for i in range(50, 0, -1):
            x = x - self.call(self.base, x, torch.full((len(x),), i / 50), wanted) / 50

        def read(samples: torch.Tensor) -> torch.Tensor:
            return train_labels[torch.cdist(samples.flatten(1), train.flatten(1)).argmin(1)]

        return {
            "held_out_loss": round(mean(losses), 4),
            "loss_of_a_guess_by_pixel": round(mean(guesses), 4),
            "samples_read_as_wanted": round((read(x) == wanted).float().mean().item(), 4),
            "real_digits_read_as_labelled": round((read(images) == labels).float().mean().item(), 4),
        }


# ---------------------------------------------------------------------------------------------------------------------
# Arms


def set_lr(optimizer: torch.optim.Optimizer, lr: float, step: int, steps: int) -> None:
    """A linear rise over the first steps, then a cosine to 0."""
    now = lr * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
    for group in optimizer.param_groups:
        group["lr"] = now


@contextmanager
def positions(arm: Arm) -> Iterator[None]:
    """Coarse tokens at the top left of what they cover, if the arm is not for centres."""
    original = ddit.centres
    if not arm.centred:
        ddit.centres = lambda count, m, device: torch.arange(count, device=device, dtype=torch.float32) * m
    try:
        yield
    finally:
        ddit.centres = original


def start(task: Epsilon | Flow, arm: Arm, variance: dict[str, float], seed: int) -> Any:
    """The base with an adapter as the arm has it."""
    model = copy.deepcopy(task.base)
    config = ddit.DDiTConfig(
        base_class=task.base_class,
        patches=list(PATCHES),
        rank=arm.rank,
        prediction=task.prediction,
        residual=arm.residual,
        variance=variance if arm.measured else {},
    )
    state = model.state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    tensors = ddit.initial_tensors(config, model.config, shapes, state.__getitem__, seed)
    if arm.random:
        layers = ddit.BACKBONES[config.base_class].switching_layers(model.config)
        generator = torch.Generator().manual_seed(seed)
        for layer in (layers.embed.name, layers.head.name):
            for m in PATCHES:
                weight, bias = f"{layer}.coarse.{m}.weight", f"{layer}.coarse.{m}.bias"
                scale = tensors[weight].square().mean().sqrt()
                tensors[weight] = torch.randn(tensors[weight].shape, generator=generator) * scale
                if bias in tensors:
                    tensors[bias] = torch.zeros_like(tensors[bias])
    return ddit.attach(model, config, tensors)


def measured_variance() -> dict[str, float]:
    """s² of the training digits, by m."""
    return {str(m): ddit.outside_variance(load_digits("train")[0], SIDE, m) for m in PATCHES}


@dataclass
class Lesson:
    """A batch, the factor it is for, and what the base says of it."""

    m: int
    z: torch.Tensor
    times: torch.Tensor
    labels: torch.Tensor
    expected: torch.Tensor


def noisy(task: Epsilon | Flow, x0: torch.Tensor, times: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    noise = ddit.Noise(ddit.DDiTConfig(task.base_class, list(PATCHES), prediction=task.prediction))
    alpha, sigma = (level[:, None, None, None] for level in noise.levels(times))
    return alpha * x0 + sigma * torch.randn(x0.shape, generator=generator)


@torch.no_grad()
def lessons(task: Epsilon | Flow, settings: Settings, seed: int) -> list[Lesson]:
    """The training of all arms of a seed."""
    images, labels = load_digits("train")
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(settings.steps):
        m = PATCHES[int(torch.randint(0, len(PATCHES), (1,), generator=generator))]
        rows = torch.randint(0, len(images), (settings.batch,), generator=generator)
        times = task.times(settings.batch, generator)
        z = noisy(task, images[rows], times, generator)
        made.append(Lesson(m, z, times, labels[rows], task.call(task.base, z, times, labels[rows])))
    return made


@torch.no_grad()
def exam(task: Epsilon | Flow, settings: Settings) -> dict[float, Lesson]:
    """Held-out digits at every noise level, and what the base says of them."""
    images, labels = (part[: settings.held_out] for part in load_digits("val"))
    generator = torch.Generator().manual_seed(NOISE_SEED)
    made = {}
    for level in task.levels:
        times = torch.full((len(images),), level)
        z = noisy(task, images, times, generator)
        made[level] = Lesson(1, z, times, labels, task.call(task.base, z, times, labels))
    return made


@torch.no_grad()
def errors(task: Epsilon | Flow, model: Any, questions: dict[float, Lesson]) -> dict[str, dict[str, float]]:
    """||coarse - base|| / ||base|| of what is predicted (without the learned variance), by m and noise level."""
    found: dict[str, dict[str, float]] = {str(m): {} for m in PATCHES}
    for level, q in questions.items():
        expected = q.expected[:, :1]
        for m in PATCHES:
            with model.at(m):
                error = task.call(model, q.z, q.times, q.labels)[:, :1] - expected
            found[str(m)][str(level)] = (error.square().sum() / expected.square().sum()).sqrt().item()
    return found


def relative_mse(by_level: dict[str, float]) -> float:
    """Mean over noise levels."""
    return mean(error**2 for error in by_level.values())


def distil(task: Epsilon | Flow, model: Any, arm: Arm, work: list[Lesson]) -> None:
    """Train the adapter in place."""
    trained = {name: p for name, p in model.adapter_parameters().items() if arm.text or not name.endswith(".vector")}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(list(trained.values()), lr=LR, weight_decay=0.0)
    for step, lesson in enumerate(work):
        set_lr(optimizer, LR, step, len(work))
        with model.at(lesson.m):
            out = task.call(model, lesson.z, lesson.times, lesson.labels)
        optimizer.zero_grad()  # the parameters of the other size are without a gradient, and stay
        F.mse_loss(out, lesson.expected).backward()
        nn.utils.clip_grad_norm_([p for p in trained.values() if p.grad is not None], CLIP)
        optimizer.step()


def run_arm(
    task: Epsilon | Flow, arm: Arm, seed: int, work: list[Lesson], questions: dict[float, Lesson], s2: dict[str, float]
) -> dict[str, Any]:
    """Errors of an arm before and after training."""
    begun = time.perf_counter()
    model = start(task, arm, s2, seed)
    with positions(arm):
        before = errors(task, model, questions)
        distil(task, model, arm, work)
        after = errors(task, model, questions)
    measured = {"before": before, "after": after}
    return {
        **measured,
        "relative_mse": {when: {m: relative_mse(e) for m, e in found.items()} for when, found in measured.items()},
        "parameters": sum(p.numel() for p in model.adapter_parameters().values()),
        "seconds": round(time.perf_counter() - begun, 1),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Tables and picture


def over_seeds(values: list[float]) -> str:
    """Mean, and the range where there are several seeds that differ."""
    low, high = min(values), max(values)
    text = f"{mean(values):.3f}"
    return text if f"{low:.3f}" == f"{high:.3f}" else f"{text} ({low:.3f} to {high:.3f})"


def at_level(runs: dict[str, Any], when: str, m: int, level: float) -> float:
    return mean(run[when][str(m)][str(level)] for run in runs.values())


def tables(results: dict[str, Any], task: type[Epsilon] | type[Flow]) -> str:
    """Relative MSE of every arm, and its errors by noise level, as Markdown."""
    runs = results["runs"][task.name]
    seeds = sorted(set.intersection(*(set(by_seed) for by_seed in runs.values())), key=int)
    heads = [f"m={m} {when}" for m in PATCHES for when in ("before", "after")]
    lines = [
        f"Relative MSE of {task.title}, mean over {len(task.levels)} noise levels; seeds {', '.join(seeds)}, as mean "
        "(lowest to highest); × full: after training, against the full start of the same seed.",
        "",
        f"| start | {' | '.join(heads)} | {' | '.join(f'm={m} × full' for m in PATCHES)} |",
        "|---" * (1 + len(heads) + len(PATCHES)) + "|",
    ]
    for arm, by_seed in runs.items():
        cells = [
            over_seeds([by_seed[seed]["relative_mse"][when][str(m)] for seed in seeds])
            for m in PATCHES
            for when in ("before", "after")
        ]
        for m in PATCHES:
            after = [[by[seed]["relative_mse"]["after"][str(m)] for seed in seeds] for by in (by_seed, runs[FULL])]
            ratios = [a / b for a, b in zip(*after, strict=True)]
            low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
            cells.append("1" if arm == FULL else low if low == high else f"{low} to {high}")
        lines.append(f"| {ARMS[arm].words} | {' | '.join(cells)} |")
    words = [f"{task.axis.split()[-1]} = {level}" for level in task.levels]
    lines += [
        "",
        "Relative error by noise level, m=2 / m=4, mean over the seeds:",
        "",
        f"| start | | {' | '.join(words)} |",
        "|---" * (2 + len(words)) + "|",
    ]
    for arm, by_seed in runs.items():
        for when in ("before", "after"):
            chosen = {seed: by_seed[seed] for seed in seeds}
            cells = [" / ".join(f"{at_level(chosen, when, m, level):.2f}" for m in PATCHES) for level in task.levels]
            lines.append(f"| {ARMS[arm].words if when == 'before' else ''} | {when} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Error against noise level, by model and size: before training dashed, after it solid."""
    figure = Figure(figsize=(11, 9), layout="constrained")
    grid = figure.subplots(2, len(PATCHES), sharey="row")
    colours = dict(zip(ARMS, ("black", *(f"C{i}" for i in range(len(ARMS) - 1))), strict=True))
    for row, task in zip(grid, (Epsilon, Flow), strict=True):
        runs = results["runs"][task.name]
        for axis, m in zip(row, PATCHES, strict=True):
            for arm, by_seed in reversed(runs.items()):
                for when, style in (("before", "--"), ("after", "-")):
                    values = [at_level(by_seed, when, m, level) for level in task.levels]
                    full = [at_level(runs[FULL], when, m, level) for level in task.levels]
                    if when == "before" and arm != FULL and values == full:
                        continue  # the same line
                    width = 2.2 if arm == FULL else 1.2
                    axis.plot(task.levels, values, style, color=colours[arm], linewidth=width, marker=".")
            axis.set(yscale="log", xlabel=task.axis, title=f"{task.title}, m = {m}")
            axis.grid(alpha=0.3, which="both", linewidth=0.5)
        row[0].set_ylabel("‖coarse − base‖ / ‖base‖")
    lines = [Line2D([], [], color=colours[arm], linewidth=2, label=ARMS[arm].words) for arm in ARMS]
    lines += [
        Line2D([], [], color="grey", linestyle="--", label="before training (where it is not the full start's)"),
        Line2D([], [], color="grey", linestyle="-", label=f"after {results['settings']['steps']} steps"),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=3, fontsize=9)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/ddit-parts"))
    parser.add_argument("--steps", type=int, help=f"of distillation (default {Settings.steps})")
    parser.add_argument(
        "--base-steps", type=int, help=f"of the flow model's own training (default {Settings.base_steps})"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 1 2, with --quick 0")
    parser.add_argument("--quick", action="store_true", help="a few steps of tiny models, to see that it runs")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    given = {key: value for key in ("steps", "base_steps") if (value := getattr(options, key)) is not None}
    settings = Settings(**{**vars(Settings.quick() if options.quick else Settings()), **given})
    seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
    options.out.mkdir(parents=True, exist_ok=True)
    path, begun = options.out / "ddit_parts.json", time.perf_counter()
    wanted = json.loads(json.dumps({**vars(settings), "code": ddit.CODE_SHA256}))
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    if results.get("settings") != wanted:
        results = {"settings": wanted, "seconds": 0.0, "variance": measured_variance(), "bases": {}, "runs": {}}
    earlier = results["seconds"]
    tasks = [Epsilon(), Flow(settings, options.out)]
    results["bases"] = {task.name: task.notes for task in tasks}
    questions = {task.name: exam(task, settings) for task in tasks}
    for seed in seeds:
        for task in tasks:
            runs = results["runs"].setdefault(task.name, {})
            arms = {name: arm for name, arm in ARMS.items() if arm.text or task.has_text}
            missing = [name for name in arms if str(seed) not in runs.setdefault(name, {})]
            work = lessons(task, settings, seed) if missing else []
            for name in missing:
                run = run_arm(task, arms[name], seed, work, questions[task.name], results["variance"])
                runs[name][str(seed)] = run
                results["seconds"] = round(earlier + time.perf_counter() - begun, 1)
                write_text(path, json.dumps(results, indent=1) + "\n")
                found = "  ".join(
                    f"m={m} {run['relative_mse']['before'][m]:.4f} -> {run['relative_mse']['after'][m]:.4f}"
                    for m in run["before"]
                )
                print(f"seed {seed} {task.name:8} {name:17} {found}  {run['seconds']} s", flush=True)
    text = "\n\n".join(tables(results, task) for task in (Epsilon, Flow))
    text += f"\n\ns² of the training digits by m: {results['variance']}\n\nflow base: {results['bases']['flow']}\n\n"
    text += f"{settings}, {results['seconds'] / 60:.1f} minutes\n"
    write_text(options.out / "ddit_parts.md", text)
    plot(results, options.out / "ddit_parts.png")
    print(text)


if __name__ == "__main__":
    main()
