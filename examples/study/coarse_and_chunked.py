"""Dynamic chunking and coarser patches together, on the digits model, against each alone at equal FLOPs.

    upcycle finetune recipes/digits.yaml
    upcycle finetune recipes/ddit-digits.yaml
    python examples/study/coarse_and_chunked.py [--student runs/digits/export] [--adapter runs/ddit-digits/export]

A combined sampler takes the base with coarse patches in the first steps, where the image is noise, and the student that
drops tokens in the rest. Judged by whole trajectories: the mean squared difference of the final latents (pixels, here)
to those of the base in as many steps from the same noise and class. Two baselines spend the same FLOPs: the base with
fewer steps, and the base that holds its x0 estimate in every other step. Writes a table and a plot.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from matplotlib.figure import Figure

from upcycle.evaluation.flops import chunked_dit_flops, dit_flops
from upcycle.sampling.pipeline import load_pipeline


def adapter_flops(model, m: int) -> float:
    """One forward of the base at factor m, one sample: its own on fewer tokens, and the switch-LoRAs."""
    c = dict(model.config)
    tokens = (c["sample_size"] // (c["patch_size"] * m)) ** 2
    plain = dit_flops({**c, "patch_size": c["patch_size"] * m, "num_classes": c["num_embeds_ada_norm"]})
    if m == 1:
        return plain
    width = c["num_attention_heads"] * c["attention_head_dim"]
    return plain + c["num_layers"] * 2 * 2 * model.ddit.rank * 5 * width * tokens


class Run:
    """A way to sample: which model each step calls, and what that costs."""

    def __init__(self, name: str, family: str, steps: int, choose, hold: bool = False):
        self.name, self.family, self.steps, self.choose, self.hold = name, family, steps, choose, hold


@torch.inference_mode()
def sample(
    run: Run, base, student, noise: torch.Tensor, labels: torch.Tensor, guidance: float
) -> tuple[torch.Tensor, float]:
    """Final latents [n, C, H, W] and FLOPs per image of a guided DDIM run."""
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(run.steps)
    x, flops, channels = noise, 0.0, noise.shape[1]
    null = torch.full_like(labels, base.config.num_embeds_ada_norm)
    both = torch.cat([labels, null])
    x0 = x
    for i, t in enumerate(scheduler.timesteps.tolist()):
        alpha = scheduler.alphas_cumprod[t]
        if run.hold and i % 2 and 0 < i < run.steps - 1:
            epsilon = (x - alpha.sqrt() * x0) / (1 - alpha).sqrt()  # the estimate is held, the noise follows from x
        else:
            kind, value = run.choose(i, run.steps)
            time = torch.full((len(both),), t)
            if kind == "coarse":
                with base.at(value):
                    out = base(torch.cat([x, x]), time, both).sample[:, :channels]
                flops += 2 * adapter_flops(base, value)
            else:
                student.set_tail_drop(value)
                answer = student(torch.cat([x, x]), time, both)
                out = answer.sample[:, :channels]
                kept = answer.routing.mask.sum(1).tolist()
                flops += sum(sum(chunked_dit_flops(student.config, n).values()) for n in kept) / len(labels)
            conditional, unconditional = out.chunk(2)
            epsilon = unconditional + guidance * (conditional - unconditional)
            x0 = (x - (1 - alpha).sqrt() * epsilon) / alpha.sqrt()
        x = scheduler.step(epsilon, t, x).prev_sample
    return x, flops


def runs(steps: int) -> list[Run]:
    """The base with fewer steps and with holding, each method alone over its settings, and both."""

    def coarse_for(share: float, m: int, then: tuple[str, float]):
        return lambda i, n: ("coarse", m) if i < round(share * n) else then

    fine, found = ("coarse", 1), []
    for n in (steps, 40, 30, 25, 20, 15, 12, 10):
        found.append(Run(f"base, {n} steps", "base, fewer steps", n, lambda i, n: fine))
    for n in (steps, 40, 30, 20):
        found.append(
            Run(f"base, {n} steps, held", "base, x0 held in every other step", n, lambda i, n: fine, hold=True)
        )
    for rho in (0.0, 0.2, 0.4, 0.6, 0.8):
        found.append(Run(f"student, ρ={rho}", "chunked", steps, lambda i, n, rho=rho: ("chunked", rho)))
    for m in (2, 4):
        for share in (0.2, 0.4, 0.6, 0.8):
            found.append(Run(f"x{m} for {share:.0%}", f"coarse x{m} first", steps, coarse_for(share, m, fine)))
            for rho in (0.2, 0.4, 0.6):
                name = f"x{m} for {share:.0%}, then ρ={rho}"
                found.append(
                    Run(name, f"coarse x{m} first, then chunked", steps, coarse_for(share, m, ("chunked", rho)))
                )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="runs/digits/export")
    parser.add_argument("--adapter", default="runs/ddit-digits/export")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--out", type=Path, default=Path("coarse_and_chunked"))
    options = parser.parse_args()
    base, student = (load_pipeline(folder).transformer for folder in (options.adapter, options.student))
    c = base.config
    labels = torch.arange(options.samples) % c.num_embeds_ada_norm
    shape = (options.samples, c.in_channels, c.sample_size, c.sample_size)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    rows, reference, full = [], None, 1.0
    for run in runs(options.steps):
        latents, flops = sample(run, base, student, noise, labels, options.guidance_scale)
        if reference is None:
            reference, full = latents, flops
        error = (latents - reference).square().mean().item()
        rows.append({"name": run.name, "family": run.family, "flops": flops / full, "error": error})
        print(f"{run.name:28}  FLOPs {flops / full:5.2f}   paired MSE {error:.4f}", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "report.json").write_text(
        json.dumps({"settings": vars(options) | {"out": str(options.out)}, "rows": rows}, indent=2)
    )
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axis = figure.subplots()
    for family, marker in zip(dict.fromkeys(row["family"] for row in rows), "oXs^v<>d", strict=False):
        mine = sorted(
            (row for row in rows if row["family"] == family and row["error"] > 0), key=lambda row: row["flops"]
        )
        axis.plot([row["flops"] for row in mine], [row["error"] for row in mine],
                  marker if "then" in family else marker + "-", label=family, markersize=5, linewidth=1)  # fmt: skip
    axis.set(yscale="log", xlabel=f"FLOPs, of the base in {options.steps} steps", ylabel="paired MSE to the base")
    axis.legend(fontsize=8)
    figure.savefig(options.out / "coarse_and_chunked.png", dpi=130)


if __name__ == "__main__":
    main()
