"""Small training runs for tests: a tiny teacher, random latents, and a recipe that takes seconds."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import tiny
import torch
import yaml
from processes import Process
from safetensors.torch import save_file

from upcycle.recipe import Recipe, parse_recipe
from upcycle.training.run import finetune, prepare

ROWS, HELD_OUT, CLASSES = 37, 21, 4
TIMES = ("step_seconds", "data_seconds")
WEIGHTS = "export/transformer/diffusion_pytorch_model.safetensors"


def make_world(folder: Path) -> Path:
    """A teacher of 8x8 latents with a learned sigma, a VAE, and data: ``teacher``, ``data``, ``held-out``."""
    dit = tiny.make_dit(0, width=32, heads=2, layers=2, size=8, classes=CLASSES)
    tiny.save_pipeline(folder / "teacher", dit)
    generator = torch.Generator().manual_seed(0)
    for name, sizes in (("data", (20, ROWS - 20)), ("held-out", (HELD_OUT,))):
        (folder / name).mkdir()
        for i, n in enumerate(sizes):
            shard = {"z0": torch.randn(n, 4, 8, 8, generator=generator), "label": torch.arange(n) % CLASSES}
            save_file(shard, folder / name / f"{i:05d}.safetensors")
    return folder


def content(world: Path, out: Path, *stages: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """What a small recipe holds; every stage of ``stages`` changes the one that is there by default."""
    stage = {"name": "post-train", "steps": 6, "lr": 1e-3, "anneal": {"until": 0.5}}
    recipe = {
        "teacher": str(world / "teacher"),
        "data": str(world / "data"),
        "data_workers": 0,
        "out": str(out),
        "convert": {"ratio": 4},
        "batch_size": 8,
        "ema": 0.9,
        "log_every": 1,
        "save_every": 2,
        "stages": [{**stage, **changed} for changed in stages or ({},)],
    }
    return {**recipe, **changes}


def small(world: Path, out: Path, *stages: dict[str, Any], **changes: Any) -> Recipe:
    """A recipe for runs in this process."""
    return parse_recipe(content(world, out, *stages, **changes), "of a test")


def run_here(recipe: Recipe, *, resume: bool = False) -> list[str]:
    """Train and export in this process; returns the notes."""
    notes: list[str] = []
    finetune(prepare(recipe, resume=resume), resume=resume, on_note=notes.append)
    return notes


def write_recipe(path: Path, world: Path, *stages: dict[str, Any], **changes: Any) -> Path:
    """The same as a file whose run goes to the folder beside it."""
    path.write_text(yaml.safe_dump(content(world, path.with_suffix(""), *stages, **changes)))
    return path


def start(path: Path, *arguments: str, ranks: int = 1) -> subprocess.Popen | Process:
    """Start the real command, on several ranks over the CPU if asked, in a process group of its own."""
    if ranks == 1:
        return Process("finetune", path, *arguments)
    launch = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]
    return subprocess.Popen(
        [sys.executable, "-m", *launch, "upcycle", "finetune", str(path), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )


def until(process: subprocess.Popen | Process, condition, seconds: float = 300) -> bool:
    """Wait for a condition while the process lives; returns whether it came."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        if condition():
            return True
        time.sleep(0.002)
    return False


def rows_of(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, without wall times."""
    with path.open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def steps_in(out: Path) -> int:
    """Whole rows in log.csv."""
    log = out / "log.csv"
    return max(0, log.read_text().count("\n") - 1) if log.exists() else 0


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def same(ours: Any, theirs: Any) -> bool:
    """Whether two nested contents are equal to the last bit, but for wall times."""
    if isinstance(ours, torch.Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in ours if k not in TIMES)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    if hasattr(ours, "dtype"):  # numpy
        return bool((ours == theirs).all())
    return ours == theirs or (ours != ours and theirs != theirs)
