"""Pictures and speed for a model card, from a few samples."""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DiTPipeline

from upcycle import provenance
from upcycle.errors import UpcycleError
from upcycle.evaluation import plots
from upcycle.evaluation.speed import SPEED, machine
from upcycle.graft.export import PICTURES
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.output import write_bytes
from upcycle.sampling.budget import told
from upcycle.sampling.draw import TokenCounter, draw
from upcycle.sampling.grid import save_grid
from upcycle.sampling.pipeline import class_count
from upcycle.sampling.trajectory import Trajectory

STEPS, GUIDANCE_SCALE, IMAGES, WARM_UP = 50, 4.0, 8, 2
FORWARDS = STEPS + WARM_UP


def measure(folder: Path, pipe: DiTPipeline, *, step: Callable[[], None] = lambda: None) -> None:
    """Draw eight samples of the export in ``folder``, and put pictures and seconds per image into it.

    ``pipe``: the export, loaded, on the device to measure. ``step`` is called `FORWARDS` times.

    Raises:
        UpcycleError: no export that can be sampled, or one without `upcycle.json`.
    """
    if provenance.read(folder) is None:
        raise UpcycleError(f"{folder} has no {provenance.FILE} to keep measurements in; export the model again")
    if not isinstance(pipe.transformer, ChunkedDiT):
        raise UpcycleError(f"{folder} is a fixed-patch DiT and no converted model; convert it first")
    pipe.set_progress_bar_config(disable=True)
    classes = class_count(pipe)
    labels = [i * classes // min(IMAGES, classes) for i in range(min(IMAGES, classes))]
    seeds = list(range(len(labels)))
    hook = pipe.transformer.register_forward_hook(lambda *_: step())
    draw(pipe, labels, seeds, WARM_UP, GUIDANCE_SCALE)
    counter = TokenCounter(pipe.transformer, len(labels))
    with Trajectory(pipe.transformer, len(labels), STEPS) as seen:
        start = time.perf_counter()
        images = draw(pipe, labels, seeds, STEPS, GUIDANCE_SCALE).cpu()
        seconds = (time.perf_counter() - start) / len(images)
    counter.remove()
    hook.remove()
    with tempfile.TemporaryDirectory(prefix="upcycle-measure-") as name:
        pictures = Path(name)
        save_grid(images, pictures / "samples.png", columns=4)
        x_t, probability, mask = (torch.stack(tensors, 1) for tensors in (seen.x_t, seen.probability, seen.mask))
        plots.router_maps(x_t, probability, mask, seen.timesteps, pictures / "router.png", "while sampling")
        config, kept = pipe.transformer.config, torch.tensor(counter.kept)
        patches = (config.sample_size // config.patch_size) ** 2
        plots.compression(counter.timesteps, kept, config.sample_size**2, patches, pictures / "compression.png")
        drawn = {path.name: path.read_bytes() for path in pictures.iterdir()}
    drop = pipe.transformer.tail_drop
    found = {
        "metric": SPEED,
        "better": "lower",
        "student": seconds,
        "teacher": None,
        "settings": {
            "steps": STEPS,
            "guidance_scale": GUIDANCE_SCALE,
            "images": len(labels),
            "tail_drop": drop if isinstance(drop, float) else told(drop),
            "tokens_kept": round(kept.float().mean().item(), 1),
            "machine": machine(pipe.device),
        },
    }
    # At the end and at once: a picture that differs from its digest would make the export look damaged.
    (folder / PICTURES).mkdir(exist_ok=True)
    for name, content in drawn.items():
        write_bytes(folder / PICTURES / name, content)
    provenance.add_evidence(folder, found, drawn=[f"{PICTURES}/{name}" for name in drawn])
