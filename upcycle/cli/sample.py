"""`upcycle sample`: draw a grid from a teacher or a student."""

import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from upcycle.cli.device import Dtype
from upcycle.cli.sampler import Sampler, check_guidance, check_scale, made_hold, parse_hold, parse_interval
from upcycle.errors import UpcycleError

EPILOG = """
[bold]Examples[/bold]\n
  upcycle sample upcycle-demo/pipeline --classes 0,1,2,3 --seed 7 -o samples\n
  upcycle sample DiT-XL-2-256-dc4 --classes 207,360 --num 8 --tail-drop 0.4 -o samples\n
  upcycle sample DiT-XL-2-256-dc4 --tokens 0:160,500:64 -o samples        # 64 at t >= 500, 160 below\n
  upcycle sample DiT-XL-2-256-dc4 --budget 0.6 --uncond-tail-drop 0.9 -o samples     # after upcycle calibrate\n
  upcycle sample DiT-XL-2-256-ddit --schedule 4:0.3,2:0.5,1:0.2 -o samples   # patches 4, 2, 1 times as large\n
  upcycle sample FLUX.1-dev-ddit --prompt 'a red fox' --height 512 --width 512 -o samples   # Wan, Z-Image too\n
  upcycle sample facebook/DiT-XL-2-256 --classes 'golden retriever' --sampler ddpm --steps 250 --guidance-channels 3\n
  upcycle sample DiT-XL-2-256-dc4 --hold 2 --guidance-interval 100:800 -o samples   # every other step reuses x0\n
  accelerate launch -m upcycle sample DiT-XL-2-256-dc4 -n 50000 --batch-size 128 -o samples.npz   # for FID\n
"""


def sample(
    model: Annotated[str, typer.Argument(help="An export or pipeline folder, or the Hub id of a teacher.")],
    classes: Annotated[
        str | None,
        typer.Option(help="Class ids or names, separated by commas; names may hold no comma. Default: the first ten."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="What to draw, of FLUX.1, Wan and Z-Image; give it again for more."),
    ] = None,
    num: Annotated[
        int, typer.Option("-n", "--num", help="Images per class or prompt; with --balanced or an .npz file in all.")
    ] = 1,
    balanced: Annotated[
        bool, typer.Option("--balanced", help="--num images in all, classes in turn, all of them by default; resumes.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the first image; the next count up.")] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Sampling steps. Default: 50, with a prompt the pipeline's own.")
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Classifier-free guidance; 1 is none. Default: 4, with a prompt the pipeline's own."),
    ] = None,
    sampler: Annotated[
        Sampler | None, typer.Option(help="ddpm as Meta samples, with learned sigma. Default: the model's own.")
    ] = None,
    guidance_channels: Annotated[
        int | None, typer.Option(min=1, help="Channels of epsilon to guide, 3 as Meta does. Default: all.")
    ] = None,
    guidance_interval: Annotated[
        str | None, typer.Option(metavar="t:t", help="Guide at these timesteps only, such as 200:700.")
    ] = None,
    hold: Annotated[
        str | None,
        typer.Option(
            metavar="k|limit",
            help="Hold the x0 estimate: ask the model every k-th step (2), or where x_t has changed by a limit (0.05).",
        ),
    ] = None,
    height: Annotated[int | None, typer.Option(help="With a prompt: pixels. Default: the pipeline's own.")] = None,
    width: Annotated[int | None, typer.Option(help="With a prompt: pixels. Default: the pipeline's own.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Of a video. Default: the pipeline's own.")] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="With a prompt: of weights and arithmetic. Default: bf16 on CUDA, else fp32.")
    ] = None,
    tail_drop: Annotated[
        str | None,
        typer.Option(metavar="ρ|t:ρ,...", help="Share of the kept tokens to drop, 0 to 1. Default: the export's own."),
    ] = None,
    uncond_tail_drop: Annotated[
        str | None, typer.Option(metavar="ρ|t:ρ,...", help="Of the unconditional half, Lite-CFG. Default: as above.")
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(metavar="M|t:M,t:M", help="Keep M tokens of every sample instead, for each range of t if asked."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(metavar="SHARE|nT", help="Instead: 0.6 of the teacher's cost, or 40T, TFLOPs an image."),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(metavar="τ", help="ddit: coarser steps below this deviation. Default: the adapter's own."),
    ] = None,
    schedule: Annotated[
        str | None, typer.Option(metavar="m:share,...", help="ddit: factors for shares of the steps, in order.")
    ] = None,
    order: Annotated[int | None, typer.Option(min=1, max=3, help="ddit: of the difference. Default: 3.")] = None,
    policy: Annotated[
        Literal["min", "grouped"],
        typer.Option(help="ddit: one size for the batch, or one call a size."),
    ] = "min",
    base: Annotated[
        str | None, typer.Option(metavar="ID|DIR", help="ddit: pipeline for an adapter alone. Default: its own.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(help="Images at a time; only a ddit threshold sees it. Default: 16, with prompts 1.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ... Default: cuda where there is one.")] = None,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Folder for samples.png and one PNG an image; or an .npz file.")
    ] = Path("samples"),
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the output folder.")] = False,
) -> None:
    """Draw samples; the same seed starts from the same noise for teacher and student."""
    from upcycle.sampling import budget as budgets

    words = {"--tail-drop": tail_drop, "--uncond-tail-drop": uncond_tail_drop, "--tokens": tokens, "--budget": budget}
    asked = budgets.parse(words)
    counts: dict[str, int | None] = {"--num": num, "--steps": steps, "--batch-size": batch_size}
    for name, number in counts.items():
        if number is not None and number < 1:
            raise UpcycleError(f"{name} {number} must be at least 1")
    if steps is not None and steps > 1000:
        raise UpcycleError(f"--steps {steps} must be at most 1000, the training's timesteps")
    if threshold is not None and not 0 <= threshold < math.inf:
        raise UpcycleError(f"--threshold {threshold} must be a number of at least 0")
    if threshold is not None and schedule is not None:
        raise UpcycleError("--threshold and --schedule are two ways to choose sizes; give one of them")
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise UpcycleError(f"--guidance-scale {guidance_scale} is not a number to guide with; 4 is usual, 1 is none")
    check_guidance(guidance_scale, guidance_channels=guidance_channels, guidance_interval=guidance_interval)
    interval, held = parse_interval(guidance_interval), parse_hold(hold)
    balanced = balanced or out.suffix == ".npz"
    if not balanced and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UpcycleError("several processes share the images of --balanced and of -o FILE.npz; give one of them")
    local = os.path.exists(model)
    if local and revision is not None:
        raise UpcycleError(f"{model}: a local path has no revisions; leave --revision out")
    keep = (Path(model),) if local else ()

    from upcycle.cli.device import to_device
    from upcycle.cli.show import count as count_of
    from upcycle.cli.show import print_json, progress, quiet_libraries, stderr, stdout, working

    quiet_libraries()
    coarser: dict[str, Any] = {"threshold": threshold, "schedule": schedule, "order": order, "policy": policy}
    with working(f"loading {model}"):
        import torch

        from upcycle.evaluation.flops import step_flops, teacher_flops
        from upcycle.models.chunked_dit import ChunkedDiT
        from upcycle.output import check_output, new_folder
        from upcycle.sampling import patches as coarse
        from upcycle.sampling.grid import save_grid
        from upcycle.sampling.pipeline import class_count, load_pipeline
        from upcycle.sampling.prompts import find
        from upcycle.sampling.sampler import Sampling, decode, sampler_name, set_sampler
        from upcycle.sampling.sampler import steps as sampling_steps

        if not balanced:
            check_output(out, force, keep)
        text = find(model, revision, base, wanted=prompt is not None)
        if text is None:
            only = {"--prompt": prompt, "--height": height, "--width": width, "--num-frames": num_frames,
                    "--dtype": dtype}  # fmt: skip
            check_scale(guidance_scale)
            pipe = load_pipeline(model, revision, base)
            if wrong := next((name for name, value in only.items() if value is not None), None):
                raise UpcycleError(f"{model} draws classes; {wrong} is for pipelines with text, leave it out")
    if text is not None:
        from upcycle.cli.sample_prompts import sample_prompts

        of_classes = {"--classes": classes, "--sampler": sampler, "--guidance-channels": guidance_channels,
                      "--guidance-interval": interval, "--hold": held, "--balanced": balanced or None}  # fmt: skip
        for name, value in {**of_classes, **words}.items():
            if value is not None:
                raise UpcycleError(f"{model} draws from text, with --prompt; leave out {name}")
        sample_prompts(
            text, prompt or [], num=num, seed=seed, steps=steps, guidance_scale=guidance_scale, height=height,
            width=width, num_frames=num_frames, dtype=dtype, coarser=coarser, batch_size=batch_size or 1,
            device=device, out=out, as_json=as_json, force=force, keep=keep,
        )  # fmt: skip
        return
    steps, batch_size = steps or 50, batch_size or 16
    guidance_scale = 4.0 if guidance_scale is None else guidance_scale
    with working(f"loading {model}"):
        patches = getattr(pipe.transformer, "ddit", None)
        coarse.set_schedule(pipe.transformer, model, **coarser)
        if sampler:
            set_sampler(pipe, sampler)
        count, channels = class_count(pipe), pipe.transformer.config.in_channels
        if guidance_channels is not None and guidance_channels > channels:
            raise UpcycleError(f"--guidance-channels {guidance_channels} must be at most {channels}, which there are")
        everything = range(count if balanced else min(10, count))
        labels = parse_classes(classes, pipe.labels, count) if classes is not None else list(everything)
        student = isinstance(pipe.transformer, ChunkedDiT)
        if asked and not student:
            option = next(iter(asked))
            raise UpcycleError(f"{model} is a fixed-patch DiT, which keeps all of its tokens; leave out {option}")
        if student:
            budgets.put_on(pipe.transformer, asked, steps, guidance_scale > 1)
        if patches is not None and batch_size > 1:
            coarse.check_batch(pipe.transformer, balanced=balanced, limit=isinstance(held, float))
    if student and pipe.transformer.budget and (held or interval):
        stderr.print("note: the budget is that of a run that asks the model in every step and guides in all of them")
    for note in coarse.notes(pipe.transformer, steps):
        stderr.print(f"note: {note}")
    how = {
        "sampler": sampler_name(pipe), "steps": steps, "guidance_scale": guidance_scale,
        "guidance_channels": guidance_channels, "guidance_interval": interval, "hold": held,
    }  # fmt: skip
    if balanced:
        from upcycle.cli.sample_bulk import sample_bulk

        how |= {"seed": seed, "dtype": "fp32", "classes": labels, "model": model, "patches": coarser}
        sample_bulk(pipe, how, labels, num, out, batch_size, device, as_json=as_json, force=force, keep=keep)
        return
    to_device(pipe, device)
    settings = Sampling(steps, guidance_scale, guidance_channels, interval or (0, 999), made_hold(held))
    jobs = [(label, seed + i) for i, label in enumerate(label for label in labels for _ in range(num))]
    batches = [jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)]
    images, runs, flops, questions = [], [], 0.0, 0
    kept: list[int] = []
    calls = 0
    with progress() as bar:
        task = bar.add_task("sampling", total=len(batches) * steps)
        for batch in batches:
            batch_labels, batch_seeds = [label for label, _ in batch], [seed for _, seed in batch]
            for step in sampling_steps(pipe, batch_labels, batch_seeds, settings):
                flops += step_flops(pipe.transformer, step)
                questions += len(step.asked)
                if step.routing is not None:
                    counts_now = step.routing.mask.sum(1).tolist()
                    kept += counts_now[: len(step.asked)]  # then their unconditional twins
                    calls += len(counts_now)
                bar.advance(task)
            images.append(decode(pipe, step.previous).cpu())
            if patches is not None:
                runs.append(pipe.transformer.schedule.log)
    grid = torch.cat(images)
    with new_folder(out, force, keep=keep) as folder:
        save_grid(grid, folder / "samples.png", columns=num if num > 1 else min(len(jobs), 10))
        for image, (label, image_seed) in zip(grid, jobs, strict=True):
            save_grid(image[None], folder / f"class{label:04d}-seed{image_seed}.png", columns=1)
        if patches is not None:
            coarse.explain(pipe.transformer, runs, folder)
    size = pipe.transformer.config.sample_size**2
    mean_kept = sum(kept) / len(kept) if kept else None
    sizes = coarse.steps_by_size([entry for log in runs for entry in log]) if patches is not None else None
    share_asked = questions / (len(jobs) * steps)
    if as_json:
        report = {"out": str(out), "images": len(jobs), **how, "tokens_kept": mean_kept, "positions": size,
                  "steps_asked": share_asked * steps, "flops_per_image": flops / len(jobs)}  # fmt: skip
        if student:
            drop = pipe.transformer.tail_drop
            report["tail_drop"] = drop if isinstance(drop, float) else budgets.told(drop)
            report["share_of_teacher"] = flops / (calls * teacher_flops(pipe.transformer.config))
        print_json(report | ({"steps_by_size": sizes} if sizes is not None else {}))
        return
    if sizes is not None:
        stdout.print(coarse.told(sizes, out))
    if mean_kept is not None:
        stdout.print(f"tokens kept: {mean_kept:.1f} of {size} positions (conditional half, mean over steps)")
        spent = flops / (calls * teacher_flops(pipe.transformer.config))
        found = f", at ρ = {budgets.told(pipe.transformer.tail_drop)}" if pipe.transformer.budget else ""
        stdout.print(f"FLOPs: {spent:.3f} of what the teacher's {'calls' if held else 'run'} would cost{found}")
    if held:
        stdout.print(f"steps that asked the model: {share_asked * steps:.1f} of {steps}")
    stdout.print(f"FLOPs per image: {count_of(flops / len(jobs))}")
    stdout.print(f"{len(jobs)} images")
    stdout.print(str(out / "samples.png"), style="bold")


def parse_classes(text: str, names: dict[str, int], count: int) -> list[int]:
    """Class ids of ``--classes``, ids and names separated by commas; raises `UpcycleError` for one that is unknown."""
    labels = []
    for part in (part.strip() for part in text.split(",")):
        if part in names and not part.isdigit():
            labels.append(names[part])
            continue
        try:
            label = int(part)
        except ValueError:
            raise UpcycleError(f"--classes {part!r} is neither a class id nor a class name of this model") from None
        if not 0 <= label < count:
            raise UpcycleError(f"--classes {label} is out of range; this model has classes 0 to {count - 1}")
        labels.append(label)
    return labels
