"""`upcycle calibrate`: measure what budgets need: the threshold of a DDiT adapter, or the tokens of a student."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from upcycle.cli.device import Dtype
from upcycle.errors import UpcycleError

EPILOG = """
[bold]Examples[/bold]\n
  upcycle calibrate DiT-XL-2-256-ddit --speed-up 2\n
  upcycle calibrate runs/ddit-digits/export --speed-up 1.5 --steps 20 --classes 0,1,2,3\n
  upcycle calibrate runs/xl4/export --steps 50       # a student: for sample --budget 0.6 and set_budget\n
  upcycle calibrate FLUX.1-dev-ddit --speed-up 2 --steps 28 --prompt 'a red fox' --prompt 'an old house'\n
"""


def calibrate(
    model: Annotated[str, typer.Argument(help="Folder that convert or finetune made.")],
    speed_up: Annotated[
        float | None, typer.Option(help="ddit: how many times as fast the steps are to be, > 1. Default: 1.5.")
    ] = None,
    classes: Annotated[
        str | None,
        typer.Option(help="Class ids or names, separated by commas. Default: the first four; of a student 16."),
    ] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="What to draw, of FLUX.1, Wan and Z-Image; again for more.")
    ] = None,
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps that it is for. Default: 50, with a prompt the pipeline's own.")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Classifier-free guidance; 1 is none. Default: 4, with a prompt the pipeline's own."),
    ] = None,
    height: Annotated[int | None, typer.Option(help="With a prompt: pixels. Default: the pipeline's own.")] = None,
    width: Annotated[int | None, typer.Option(help="With a prompt: pixels. Default: the pipeline's own.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Of a video. Default: the pipeline's own.")] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="With a prompt: of weights and arithmetic. Default: bf16 on CUDA, else fp32.")
    ] = None,
    cost: Annotated[
        Literal["time", "tokens"], typer.Option(help="ddit: of a step, its time here, or its share of the tokens.")
    ] = "time",
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the first image.")] = 0,
    base: Annotated[
        str | None, typer.Option(metavar="ID|DIR", help="Pipeline for an adapter alone. Default: its own.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ... Default: cuda where there is one.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Measure on these classes (or prompts), and store with the model what budgets need.

    Of an adapter for coarser patches (ddit) that is a threshold, which holds for the sampler and the number of steps
    that it was chosen for: more steps move the latents less in each. Of a student it is the tokens that it keeps at
    each timestep without any tail drop.
    """
    if speed_up is not None and not 1 < speed_up < math.inf:
        raise UpcycleError(f"--speed-up {speed_up:g} must be more than 1, such as 1.5")
    if steps is not None and not 1 <= steps <= 1000:
        raise UpcycleError(f"--steps {steps} must be from 1 to 1000, the training's timesteps")
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise UpcycleError(f"--guidance-scale {guidance_scale} is not a number to guide with; 4 is usual, 1 is none")
    if model == "digits":
        raise UpcycleError(
            "digits is the shipped teacher, which has nothing to calibrate; give the folder of a student or an adapter "
            "that convert or finetune made"
        )
    if not os.path.isdir(model):
        raise UpcycleError(f"{model}: no such folder; give one that convert or finetune made")

    from upcycle.cli.show import print_json, quiet_libraries, stderr, stdout, working

    quiet_libraries()
    with working(f"loading {model}"):
        from upcycle.graft.patches import adapter_folder, update
        from upcycle.models import ddit
        from upcycle.sampling import patches
        from upcycle.sampling.prompts import find
        from upcycle.sources.student import is_student

        folder = adapter_folder(Path(model))
        student = folder is None and is_student(Path(model))
    only = {"--height": height, "--width": width, "--num-frames": num_frames, "--dtype": dtype}
    if student:
        from upcycle.cli.calibrate_student import calibrate_student

        for name, value in {"--speed-up": speed_up, "--prompt": prompt, "--base": base, **only}.items():
            if value is not None:
                raise UpcycleError(f"{model} is a student of a DiT; leave out {name}")
        scale = 4.0 if guidance_scale is None else guidance_scale
        calibrate_student(model, classes, steps or 50, scale, seed, device, as_json)
        return
    with working(f"loading {model}"):
        if folder is None:
            raise UpcycleError(f"{model} is no student, and holds no adapter for coarser patches; use convert first")
        speed_up = 1.5 if speed_up is None else speed_up
        found = find(model, base=base, wanted=prompt is not None)
        if found is None and (wrong := next((name for name, value in only.items() if value is not None), None)):
            raise UpcycleError(f"{model} draws classes; {wrong} is for pipelines with text, leave it out")
        if found is not None and classes is not None:
            raise UpcycleError(f"{model} draws from text, with --prompt; leave out --classes")
        if found is None:
            pipe, run, what = _of_classes(model, base, classes, steps or 50, guidance_scale, seed, device)
        else:
            options = {"steps": steps, "guidance_scale": guidance_scale, "height": height, "width": width,
                       "frames": num_frames}  # fmt: skip
            pipe, run, what = _of_prompts(found, prompt or [], options, seed, dtype, device)
    models = ddit.switching(pipe)
    done = patches.calibrate(models, run, speed_up, by_tokens=cost == "tokens", say=stderr.print)
    if note := models[0].sampler_note:
        stderr.print(f"note: {note}")
    if abs(done.speed_up / speed_up - 1) > 0.1:
        stderr.print(f"note: no threshold that was tried comes nearer to {speed_up:g} than {done.speed_up:.2f}")
    stated = {
        "policy": "min", "batch": len(what.get("classes") or what.get("prompts") or ()),
        "speed_up": round(done.speed_up, 3), "asked": speed_up, "cost": cost,
        "sampler": type(pipe.scheduler).__name__, **what, "seed": seed, "steps_by_size": done.steps,
    }  # fmt: skip
    written = update(Path(model), threshold=done.threshold, variance=done.variance, calibration=stated)
    if as_json:
        print_json({"out": str(written[0]), "threshold": done.threshold,
                    "step_cost": done.step_cost, **stated})  # fmt: skip
        return
    shown = ", ".join(f"x{m}: {n}" for m, n in done.steps.items())
    stdout.print(f"threshold {done.threshold:.4g}: {done.speed_up:.2f} x in the denoising steps ({shown})")
    for file in written:
        stdout.print(str(file), style="bold")


def _of_classes(
    model: str,
    base: str | None,
    classes: str | None,
    steps: int,
    guidance_scale: float | None,
    seed: int,
    device: str | None,
) -> tuple[Any, Callable[[], Any], dict[str, Any]]:
    """The pipeline of a class-conditional DiT, a run of it that returns the clean latents, and what is run."""
    from upcycle.cli.device import to_device
    from upcycle.cli.sample import parse_classes
    from upcycle.sampling.draw import draw
    from upcycle.sampling.pipeline import class_count, load_pipeline

    scale = 4.0 if guidance_scale is None else guidance_scale
    pipe = load_pipeline(model, base=base)
    count = class_count(pipe)
    labels = parse_classes(classes, pipe.labels, count) if classes is not None else list(range(min(4, count)))
    to_device(pipe, device)
    pipe.set_progress_bar_config(disable=True)
    seeds = [seed + i for i in range(len(labels))]
    latents: list[Any] = []
    decode = pipe.vae.decode

    def keep(z: Any, *arguments: Any, **options: Any) -> Any:
        latents[:] = [z * pipe.vae.config.scaling_factor]
        return decode(z, *arguments, **options)

    def run() -> Any:
        draw(pipe, labels, seeds, steps, scale)
        return latents[0].float()

    pipe.vae.decode = keep
    return pipe, run, {"steps": steps, "guidance_scale": scale, "classes": labels}


def _of_prompts(
    found: Any, prompts: list[str], options: dict[str, Any], seed: int, dtype: Dtype | None, device: str | None
) -> tuple[Any, Callable[[], Any], dict[str, Any]]:
    """As `_of_classes`, of a pipeline that reads text; ``options``: of `upcycle.sampling.prompts.settings`."""
    from upcycle.cli.device import to_device, torch_dtype
    from upcycle.sampling import prompts as text

    if not prompts:
        raise UpcycleError(f"{found.spec} draws from text; give it with --prompt TEXT")
    wish = text.settings(found, **options)
    arithmetic = torch_dtype(dtype) if dtype else text.default_dtype(device)
    pipe = text.load_text_pipeline(found, arithmetic, threshold=None)  # two adapters may have two until now
    text.check_sides(pipe, wish)
    to_device(pipe, device)
    seeds = [seed + i for i in range(len(prompts))]

    def run() -> Any:
        return text.draw_latents(pipe, prompts, seeds, wish)

    return pipe, run, {
        "steps": wish.steps, "guidance_scale": wish.guidance_scale, "prompts": prompts,
        "sample_shape": list(text.latent_shape(pipe, wish)),
    }  # fmt: skip
