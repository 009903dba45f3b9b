"""Draw samples with a stock pipeline. Imports diffusers only; run as a script it is a fresh process without `upcycle`.

    python draw.py JOB.json        # keys: see `main`

The script is how `upcycle demo` proves that an export needs nothing of ours, and how both models are timed alike.
"""

import importlib.abc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch


def clamp_null_class(transformer: torch.nn.Module) -> torch.utils.hooks.RemovableHandle:
    """Let a stock DiT with fewer than 1000 classes be guided: DiTPipeline always sends 1000 for the null class."""
    last = transformer.config.num_embeds_ada_norm

    def clamp(module, args, kwargs):
        kwargs["class_labels"] = kwargs["class_labels"].clamp(max=last)
        return args, kwargs

    return transformer.register_forward_pre_hook(clamp, with_kwargs=True)


def draw(pipe, labels: list[int], seeds: list[int], steps: int, guidance_scale: float) -> torch.Tensor:
    """One image per (label, seed), fp32 in [0, 1], [n, channels, H, W]; a seed gives the same noise in any batch."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipe(
        class_labels=labels,
        generator=generators,
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        output_type="pt",
    ).images.float()


class TokenCounter:
    """Counts the tokens that a `ChunkedDiT` keeps at each step, the conditional half of a guided batch."""

    def __init__(self, transformer: torch.nn.Module, count: int):
        self.kept: list[list[int]] = []
        self.timesteps: list[int] = []
        self._count = count
        self._handle = transformer.register_forward_hook(self._look, with_kwargs=True)

    def _look(self, module, args, kwargs, output) -> None:
        self.kept.append(output.routing.mask[: self._count].sum(1).tolist())
        self.timesteps.append(int(kwargs["timestep"][0]))

    def remove(self) -> None:
        self._handle.remove()


class _Block(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] == "upcycle":
            raise ImportError("upcycle is not importable in this process")


def main(job_path: str) -> None:
    """Draw from several pipelines and time them, after two steps to warm up.

    The job: ``models`` {name: folder}, ``labels``, ``seeds``, ``steps``, ``guidance_scale``, ``out`` (a folder for
    ``NAME.pt`` and ``report.json``).
    """
    sys.meta_path.insert(0, _Block())
    from diffusers import DiffusionPipeline

    job = json.loads(Path(job_path).read_text())
    out = Path(job["out"])
    report: dict[str, Any] = {}
    for name, folder in job["models"].items():
        pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
        pipe.set_progress_bar_config(desc=f"sampling {name}", file=sys.stderr, leave=False)
        if type(pipe.transformer).__name__ == "DiTTransformer2DModel":
            clamp_null_class(pipe.transformer)
        report[name] = {
            "pipeline": type(pipe).__module__ + "." + type(pipe).__name__,
            "transformer": type(pipe.transformer).__module__ + "." + type(pipe.transformer).__name__,
        }
        draw(pipe, job["labels"], job["seeds"], 2, job["guidance_scale"])
        counter = None
        if hasattr(pipe.transformer, "set_tail_drop"):
            counter = TokenCounter(pipe.transformer, len(job["labels"]))
        start = time.perf_counter()
        images = draw(pipe, job["labels"], job["seeds"], job["steps"], job["guidance_scale"])
        report[name]["seconds_per_image"] = (time.perf_counter() - start) / len(images)
        torch.save(images, out / f"{name}.pt")
        if counter:
            counter.remove()
            report[name].update(kept=counter.kept, timesteps=counter.timesteps)
    report["upcycle_imported"] = any(module.partition(".")[0] == "upcycle" for module in sys.modules)
    (out / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(sys.argv[1])
