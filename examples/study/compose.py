"""What the student works together with: caches, LoRA, quantised or cast weights, offloading, coarser patches.

    upcycle finetune recipes/digits.yaml
    upcycle finetune recipes/digits-dydit.yaml
    upcycle finetune recipes/ddit-digits.yaml
    python examples/study/compose.py [--student runs/digits/export] [--gated runs/digits-dydit/export]
                                     [--adapter runs/ddit-digits/export] [--out compose]

Every way is judged on whole guided trajectories from the same noise: the mean squared difference of its samples (pixels
in [-1, 1]) to those of the student alone and of the teacher, and how often an SVM that was trained on the real digits
reads the wanted class. FLOPs are those of torch's counter; times are compared round by round, all ways in turn. A way
that does not work is listed with its reason. Writes compose.md and compose.json. Needs scikit-learn (the extra
``digits``) and peft; torchao where quantised weights are to be measured.
"""

import argparse
import ast
import contextlib
import copy
import importlib.metadata
import io
import json
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiTPipeline
from diffusers.hooks import FirstBlockCacheConfig, MagCacheConfig, TaylorSeerCacheConfig
from diffusers.loaders.peft import PeftAdapterMixin
from sklearn.svm import SVC
from torch.utils.flop_counter import FlopCounterMode

from upcycle.evaluation.speed import machine
from upcycle.graft.patches import adapter_folder
from upcycle.sampling.draw import draw
from upcycle.sampling.output_cache import cache_outputs
from upcycle.sampling.patches import put_on
from upcycle.sampling.pipeline import load_pipeline
from upcycle.training.digits import TEACHER, load_digits


@dataclass(frozen=True)
class Way:
    """``change`` puts something on a fresh pipeline of ``of``: "student", "teacher" or "gated", a student with DyDiT's
    gates; what it raises is why it fails.
    ``like``: the way whose samples those of this one are compared with as the teacher's."""

    name: str
    change: Callable[[DiTPipeline, "Study"], Any]
    of: str = "student"
    like: str = "teacher"


def first_block(threshold: float) -> Callable[[DiTPipeline, "Study"], None]:
    return lambda pipe, study: pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))


def mag(threshold: float) -> Callable[[DiTPipeline, "Study"], None]:
    """MagCache, after a run that measures its ratios, which diffusers prints."""

    def change(pipe: DiTPipeline, study: "Study") -> None:
        pipe.transformer.enable_cache(MagCacheConfig(calibrate=True, num_inference_steps=study.steps))
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            study.draw(pipe, study.timed)
        pipe.transformer.disable_cache()
        ratios = ast.literal_eval(re.findall(r"^\[[\d., ]+\]$", printed.getvalue(), re.M)[-1])
        config = MagCacheConfig(mag_ratios=ratios, threshold=threshold, num_inference_steps=study.steps)
        pipe.transformer.enable_cache(config)

    return change


def taylor(interval: int, order: int) -> Callable[[DiTPipeline, "Study"], None]:
    config = TaylorSeerCacheConfig(cache_interval=interval, max_order=order, taylor_factors_dtype=torch.float32)
    return lambda pipe, study: pipe.transformer.enable_cache(config)


def output_cache(limit: float) -> Callable[[DiTPipeline, "Study"], Any]:
    return lambda pipe, study: cache_outputs(pipe, limit)


def tail_drop(share: float) -> Callable[[DiTPipeline, "Study"], None]:
    return lambda pipe, study: pipe.transformer.set_tail_drop(share)


def lora(pipe: DiTPipeline, study: "Study") -> None:
    """A LoRA of the teacher for bold digits, trained once for the study."""
    if not isinstance(pipe.transformer, PeftAdapterMixin):
        add_loras(pipe.transformer)
    pipe.transformer.load_lora_adapter(study.lora(), prefix=None, use_safetensors=True)


def quantised(kind: str) -> Callable[[DiTPipeline, "Study"], None]:
    def change(pipe: DiTPipeline, study: "Study") -> None:
        from torchao import quantization

        quantization.quantize_(pipe.transformer, getattr(quantization, kind)())

    return change


def cast(pipe: DiTPipeline, study: "Study") -> None:
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def offload(level: str) -> Callable[[DiTPipeline, "Study"], None]:
    """Weights away between calls: in the memory of the CPU where there is an accelerator, else on disk."""

    def change(pipe: DiTPipeline, study: "Study") -> None:
        options: dict[str, Any] = {"num_blocks_per_group": 1} if level == "block_level" else {}
        if study.device.type == "cpu":
            options["offload_to_disk_path"] = tempfile.mkdtemp(dir=study.scratch)
        pipe.transformer.enable_group_offload(study.device, offload_type=level, **options)

    return change


def coarse(schedule: list[tuple[int, float]] | None) -> Callable[[DiTPipeline, "Study"], None]:
    """The DDiT adapter of ``--adapter``, with a fixed schedule."""

    def change(pipe: DiTPipeline, study: "Study") -> None:
        folder = adapter_folder(study.adapter) if study.adapter.is_dir() else None
        if folder is None:
            raise FileNotFoundError(f"no adapter in {study.adapter}: upcycle finetune recipes/ddit-digits.yaml")
        put_on(pipe, folder, "the adapter")
        if schedule:
            pipe.transformer.set_schedule(fixed=schedule)

    return change


def all_of(*changes: Callable[[DiTPipeline, "Study"], Any]) -> Callable[[DiTPipeline, "Study"], None]:
    def change(pipe: DiTPipeline, study: "Study") -> None:
        for one in changes:
            one(pipe, study)

    return change


COARSE = [(2, 0.5), (1, 0.5)]
WAYS = [
    Way("teacher", all_of(), "teacher"),
    Way("student", all_of()),
    Way("+ tail drop 0.4", tail_drop(0.4)),
    Way("+ FirstBlockCache 0.05", first_block(0.05)),
    Way("+ FirstBlockCache 0.1", first_block(0.1)),
    Way("+ MagCache 0.06", mag(0.06)),
    Way("+ TaylorSeer, every 2nd, order 0", taylor(2, 0)),
    Way("+ TaylorSeer, every 2nd, order 1", taylor(2, 1)),
    Way("+ TaylorSeer, every 4th, order 1", taylor(4, 1)),
    Way("+ output cache 0.05", output_cache(0.05)),
    Way("+ output cache 0.1", output_cache(0.1)),
    Way("+ tail drop 0.4 + FirstBlockCache 0.05", all_of(tail_drop(0.4), first_block(0.05))),
    Way("+ tail drop 0.4 + output cache 0.05", all_of(tail_drop(0.4), output_cache(0.05))),
    Way("+ FirstBlockCache 0.05 + output cache 0.05", all_of(first_block(0.05), output_cache(0.05))),
    Way("+ LoRA", lora, like="teacher + LoRA"),
    Way("+ LoRA + FirstBlockCache 0.05", all_of(lora, first_block(0.05)), like="teacher + LoRA"),
    Way("+ int8 weights", quantised("Int8WeightOnlyConfig")),
    Way("+ fp8 weights", quantised("Float8WeightOnlyConfig")),
    Way("+ int8 weights + FirstBlockCache 0.05", all_of(quantised("Int8WeightOnlyConfig"), first_block(0.05))),
    Way("+ LoRA + int8 weights", all_of(lora, quantised("Int8WeightOnlyConfig")), like="teacher + LoRA"),
    Way("+ layerwise casting, fp8", cast),
    Way("+ group offload, blocks", offload("block_level")),
    Way("+ group offload, leaves", offload("leaf_level")),
    Way("+ DDiT adapter", coarse(None)),
    Way("DyDiT 0.7", all_of(), "gated"),
    Way("DyDiT 0.7 + tail drop 0.4", tail_drop(0.4), "gated"),
    Way("DyDiT 0.7 + FirstBlockCache 0.05", first_block(0.05), "gated"),
    Way("DyDiT 0.7 + output cache 0.05", output_cache(0.05), "gated"),
    Way("DyDiT 0.7 + LoRA", lora, "gated", like="teacher + LoRA"),
    Way("DyDiT 0.7 + int8 weights", quantised("Int8WeightOnlyConfig"), "gated"),
    Way("DyDiT 0.7 + layerwise casting, fp8", cast, "gated"),
    Way("DyDiT 0.7 + group offload, blocks", offload("block_level"), "gated"),
    Way("teacher + output cache 0.05", output_cache(0.05), "teacher"),
    Way("teacher + LoRA", lora, "teacher"),
    Way("teacher + DDiT x2 in the first half", coarse(COARSE), "teacher"),
    Way("teacher + DDiT + output cache 0.05", all_of(coarse(COARSE), output_cache(0.05)), "teacher"),
]


def add_loras(model: torch.nn.Module) -> None:
    """Give the stock DiT the methods for LoRA that diffusers' other transformers have."""
    model.__class__ = type(type(model).__name__, (type(model), PeftAdapterMixin), {})


class Study:
    """The models, the noise, and what is made once: the teacher's LoRA and the classifier."""

    def __init__(self, options: argparse.Namespace, scratch: Path):
        self.device, self.steps, self.guidance = torch.device(options.device), options.steps, options.guidance_scale
        self.samples, self.timed, self.adapter = options.samples, options.timed, Path(options.adapter)
        self.lora_steps, self.scratch = options.lora_steps, scratch
        folders = {"student": options.student, "teacher": str(TEACHER), "gated": options.gated}
        self.pipes = {name: load_pipeline(folder) for name, folder in folders.items()}
        images, labels = load_digits("train")
        self.classifier = SVC().fit(images.flatten(1).numpy(), labels.numpy())

    def pipeline(self, way: Way) -> DiTPipeline:
        """A pipeline that shares nothing with those of other ways."""
        known = self.pipes[way.of]
        pipe = DiTPipeline(copy.deepcopy(known.transformer), known.vae, copy.deepcopy(known.scheduler)).to(self.device)
        pipe.set_progress_bar_config(disable=True)
        way.change(pipe, self)
        return pipe

    def draw(self, pipe: DiTPipeline, count: int) -> torch.Tensor:
        """Samples [count, 1, 16, 16] in [-1, 1]."""
        return 2 * draw(pipe, [i % 10 for i in range(count)], list(range(count)), self.steps, self.guidance).cpu() - 1

    def lora(self) -> Path:
        """The folder of a LoRA that makes the teacher's digits bold."""
        from peft import LoraConfig

        folder = self.scratch / "lora"
        if folder.exists():
            return folder
        model = copy.deepcopy(self.pipes["teacher"].transformer)
        add_loras(model)
        layers = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"]
        torch.manual_seed(0)
        model.add_adapter(LoraConfig(r=8, lora_alpha=16, target_modules=layers))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
        images, labels = load_digits("train")
        bold = F.max_pool2d(images, 3, 1, 1)
        alpha_bar = self.pipes["teacher"].scheduler.alphas_cumprod
        for _ in range(self.lora_steps):
            rows, t = torch.randint(len(bold), (64,)), torch.randint(len(alpha_bar), (64,))
            noise, alpha = torch.randn_like(bold[rows]), alpha_bar[t][:, None, None, None]
            noisy = alpha.sqrt() * bold[rows] + (1 - alpha).sqrt() * noise
            label = torch.where(torch.rand(64) < 0.1, 10, labels[rows])
            epsilon = model(noisy, timestep=t, class_labels=label).sample[:, :1]
            F.mse_loss(epsilon, noise).backward()
            optimizer.step()
            optimizer.zero_grad()
        model.save_lora_adapter(folder)
        return folder


@torch.inference_mode()
def judge(study: Study, ways: list[Way], rounds: int) -> list[dict[str, Any]]:
    """A row for each way; the ways that others are compared with are among them."""
    pipes: dict[str, DiTPipeline] = {}
    rows: dict[str, dict[str, Any]] = {}
    samples: dict[str, torch.Tensor] = {}
    for way in ways:
        say(way.name)
        try:
            with torch.inference_mode(False), contextlib.redirect_stdout(sys.stderr):
                pipe = study.pipeline(way)
            with FlopCounterMode(display=False) as counter:
                study.draw(pipe, study.timed)
            samples[way.name] = study.draw(pipe, study.samples)
        except Exception as error:  # a row of the table
            rows[way.name] = {"name": way.name, "works": False, "why": f"{' '.join(str(error).split())[:200]}"}
            continue
        pipes[way.name] = pipe
        rows[way.name] = {"name": way.name, "works": True, "flops": counter.get_total_flops() / study.timed}
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    for round_ in range(rounds):
        say(f"time, round {round_ + 1} of {rounds}")
        for name, pipe in pipes.items():
            start = time.perf_counter()
            study.draw(pipe, study.timed)
            seconds[name].append(time.perf_counter() - start)
    for way in ways:
        row = rows[way.name]
        if not row["works"]:
            continue
        made = samples[way.name]
        wanted = [i % 10 for i in range(study.samples)]
        row["relative_flops"] = row["flops"] / rows["student"]["flops"]
        pairs = zip(seconds[way.name], seconds["student"], strict=True)
        row["relative_time"] = statistics.median(mine / alone for mine, alone in pairs)
        row["seconds_per_image"] = statistics.median(seconds[way.name]) / study.timed
        row["like"] = way.like
        row["mse_student"] = (made - samples["student"]).square().mean().item()
        row["mse_teacher"] = (made - samples[way.like]).square().mean().item() if way.like in samples else None
        row["class_accuracy"] = study.classifier.score(made.flatten(1).numpy(), wanted)
    return list(rows.values())


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| | works | FLOPs | time | paired MSE to the student | to the teacher | class accuracy |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for row in rows:
        if not row["works"]:
            lines.append(f"| {row['name']} | no: {row['why']} | | | | | |")
            continue
        teacher = "" if row["mse_teacher"] is None else f"{row['mse_teacher']:.5f}"
        teacher += "" if row["like"] == "teacher" else " (with it)"
        numbers = [f"{row['relative_flops']:.2f}", f"{row['relative_time']:.2f}", f"{row['mse_student']:.5f}", teacher]
        lines.append(f"| {row['name']} | yes | {' | '.join(numbers)} | {row['class_accuracy']:.3f} |")
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="runs/digits/export")
    parser.add_argument("--gated", default="runs/digits-dydit/export")
    parser.add_argument("--adapter", default="runs/ddit-digits/export")
    parser.add_argument("--samples", type=int, default=100, help="trajectories that are judged")
    parser.add_argument("--timed", type=int, default=10, help="images of a batch whose time and FLOPs are measured")
    parser.add_argument("--rounds", type=int, default=3, help="of timing")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--lora-steps", type=int, default=300)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these ways, beside teacher and student")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("compose"))
    options = parser.parse_args()
    if unknown := set(options.only or ()) - {way.name for way in WAYS}:
        parser.error(f"--only: no way is called {', '.join(unknown)}; they are {', '.join(w.name for w in WAYS)}")
    wanted = {"teacher", "student", *(options.only or (way.name for way in WAYS))}
    ways = [way for way in WAYS if way.name in wanted]
    with tempfile.TemporaryDirectory() as scratch:
        study = Study(options, Path(scratch))
        rows = judge(study, ways, options.rounds)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "peft")}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        versions["torchao"] = importlib.metadata.version("torchao")
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    report = {"machine": machine(study.device), "versions": versions, "settings": settings, "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "compose.json").write_text(json.dumps(report, indent=2))
    text = table(rows)
    (options.out / "compose.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
