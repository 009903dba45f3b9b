"""`upcycle calibrate`: choose the threshold of a DDiT adapter for a wanted speed-up."""

import math
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from upcycle.errors import UpcycleError

EPILOG = """
[bold]Examples[/bold]\n
  upcycle calibrate DiT-XL-2-256-ddit --speed-up 2\n
  upcycle calibrate runs/ddit-digits/export --speed-up 1.5 --steps 20 --classes 0,1,2,3\n
"""


def calibrate(
    model: Annotated[str, typer.Argument(help="Folder that convert --method ddit or finetune made.")],
    speed_up: Annotated[float, typer.Option(help="How many times as fast the denoising steps are to be, > 1.")] = 1.5,
    classes: Annotated[
        str | None, typer.Option(help="Class ids or names to sample, separated by commas. Default: the first four.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Sampling steps that it is for.")] = 50,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance; 1 is none.")] = 4.0,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the first image.")] = 0,
    base: Annotated[
        str | None, typer.Option(metavar="ID|DIR", help="Pipeline for an adapter alone. Default: its own.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ... Default: cuda where there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Measure steps and deviations on these classes, sampler and steps, and store the threshold with the adapter.

    A threshold holds for the sampler and the number of steps that it was chosen for: more steps move the latents less
    in each.
    """
    if not 1 < speed_up < math.inf:
        raise UpcycleError(f"--speed-up {speed_up:g} must be more than 1, such as 1.5")
    if not 1 <= steps <= 1000:
        raise UpcycleError(f"--steps {steps} must be from 1 to 1000, the training's timesteps")
    if not os.path.isdir(model):
        raise UpcycleError(f"{model}: no such folder; give one that convert --method ddit or finetune made")

    from upcycle.cli.device import to_device
    from upcycle.cli.show import print_json, quiet_libraries, stderr, stdout, working

    quiet_libraries()
    with working(f"loading {model}"):
        from upcycle.cli.sample import parse_classes
        from upcycle.graft.patches import adapter_folder, update
        from upcycle.sampling import patches
        from upcycle.sampling.draw import draw
        from upcycle.sampling.pipeline import class_count, load_pipeline

        folder = adapter_folder(Path(model))
        if folder is None:
            raise UpcycleError(f"{model} holds no adapter for coarser patches; make one with convert --method ddit")
        pipe = load_pipeline(model, base=base)
        count = class_count(pipe)
        labels = parse_classes(classes, pipe.labels, count) if classes is not None else list(range(min(4, count)))
        to_device(pipe, device)
    pipe.set_progress_bar_config(disable=True)
    transformer: Any = pipe.transformer
    seeds = [seed + i for i in range(len(labels))]
    latents: list[Any] = []
    decode = pipe.vae.decode

    def keep(z: Any, *arguments: Any, **options: Any) -> Any:
        latents[:] = [z * pipe.vae.config.scaling_factor]
        return decode(z, *arguments, **options)

    def run() -> Any:
        draw(pipe, labels, seeds, steps, guidance_scale)
        return latents[0].float()

    pipe.vae.decode = keep
    found = patches.calibrate(transformer, run, speed_up, say=lambda text: stderr.print(text))
    stated = {
        "speed_up": round(found.speed_up, 3), "asked": speed_up, "steps": steps, "guidance_scale": guidance_scale,
        "sampler": type(pipe.scheduler).__name__, "classes": labels, "seed": seed, "steps_by_size": found.steps,
    }  # fmt: skip
    update(Path(model), folder, threshold=found.threshold, variance=found.variance, calibration=stated)
    if as_json:
        print_json({"out": str(folder / "ddit.json"), "threshold": found.threshold,
                    "step_seconds": found.step_seconds, **stated})  # fmt: skip
        return
    shown = ", ".join(f"x{m}: {n}" for m, n in found.steps.items())
    stdout.print(f"threshold {found.threshold:.4g}: {found.speed_up:.2f} x in the denoising steps ({shown})")
    stdout.print(str(folder / "ddit.json"), style="bold")
