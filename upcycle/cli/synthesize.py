"""`upcycle synthesize`: a teacher's own samples as training data."""

import math
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from upcycle.cli.device import Dtype
from upcycle.cli.sampler import check_scale
from upcycle.errors import UpcycleError

EPILOG = """
[bold]Examples[/bold]\n
  upcycle synthesize facebook/DiT-XL-2-256 -o latents --count 50000\n
  upcycle synthesize facebook/DiT-XL-2-256 -o latents --count 10000 --classes 207,360 --steps 100 --dtype bf16\n
  upcycle synthesize FLUX.1-dev --prompts prompts.txt --height 512 --width 512 -o latents --count 4000\n
  upcycle synthesize digits -o digit-latents --count 1000 --guidance-scale 2\n
The same command again goes on where it was interrupted.\n
"""


def synthesize(
    teacher: Annotated[str, typer.Argument(help="Pipeline folder or Hub id; digits is the shipped one.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of latents, new or to go on with.")],
    count: Annotated[int, typer.Option(min=1, help="Samples to draw, classes in turn.")],
    classes: Annotated[str | None, typer.Option(help="Class ids or names, separated by commas. Default: all.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For FLUX.1, Wan and Z-Image: texts, one a line, in turn.")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1, max=1000, help="DDIM steps; with prompts of the pipeline's own sampler. Default: 50; its own."
        ),
    ] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Classifier-free guidance; 1 is none. Default: 1.5, with prompts the pipeline's own."),
    ] = None,
    height: Annotated[int | None, typer.Option(help="With prompts: pixels. Default: the pipeline's own.")] = None,
    width: Annotated[int | None, typer.Option(help="With prompts: pixels. Default: the pipeline's own.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Of a video. Default: the pipeline's own.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Chooses the samples' seeds.")] = 0,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            "--batch",
            min=1,
            help="Samples at a time; does not change them. Default: 16, with prompts 1.",
        ),
    ] = None,
    shard_size: Annotated[int, typer.Option(min=1, help="Samples a file; an interruption loses those of one.")] = 1_000,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ... Default: cuda where there is one.")] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Of the teacher's arithmetic; latents are stored in fp16. Default: fp32, with prompts bf16 on CUDA."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Draw training data from the teacher itself, for `upcycle finetune` where there is no data set."""
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise UpcycleError(f"--guidance-scale {guidance_scale} is not a number to guide with; 1.5 is usual, 1 is none")
    local = teacher == "digits" or os.path.exists(teacher)
    if local and revision is not None:
        raise UpcycleError(f"{teacher}: a local path has no revisions; leave --revision out")

    from upcycle.cli.device import to_device, torch_dtype
    from upcycle.cli.latents import fill
    from upcycle.cli.sample import parse_classes
    from upcycle.cli.show import quiet_libraries, working

    quiet_libraries()
    with working(f"loading {teacher}"):
        from upcycle.latents import synthesize as synthesis
        from upcycle.latents.folder import LatentWriter, check_latents_folder
        from upcycle.sampling.pipeline import class_count, load_pipeline
        from upcycle.sampling.prompts import find
        from upcycle.sources import hub

        check_latents_folder(out)
        text = None if teacher == "digits" else find(teacher, revision, wanted=prompts is not None)
    if text is not None:
        from upcycle.cli.synthesize_prompts import synthesize_prompts

        if classes is not None:
            raise UpcycleError(f"{teacher} draws from text, with --prompts; leave out --classes")
        if prompts is None:
            raise UpcycleError(f"{teacher} draws from text; give a file with --prompts FILE")
        synthesize_prompts(
            text, prompts, out, count=count, steps=steps, guidance_scale=guidance_scale, height=height, width=width,
            num_frames=num_frames, seed=seed, batch_size=batch_size or 1, shard_size=shard_size, device=device,
            dtype=dtype, as_json=as_json,
        )  # fmt: skip
        return
    only = {"--prompts": prompts, "--height": height, "--width": width, "--num-frames": num_frames}
    if wrong := next((name for name, value in only.items() if value is not None), None):
        raise UpcycleError(f"{teacher} draws classes; {wrong} is for pipelines with text, leave it out")
    batch_size = batch_size or 16
    check_scale(guidance_scale)
    with working(f"loading {teacher}"):
        if not local and hub.is_hub_id(teacher):
            _, revision = hub.fetch(teacher, revision=revision, variant=None)  # the commit, for the index
        pipe = synthesis.with_ddim(load_pipeline(teacher, revision))
        number = class_count(pipe)
        labels = list(range(number)) if classes is None else parse_classes(classes, pipe.labels, number)
        settings: dict[str, Any] = {
            "classes": labels,
            "steps": steps or 50,
            "guidance_scale": 1.5 if guidance_scale is None else guidance_scale,
            "seed": seed,
            "dtype": torch_dtype(dtype or "fp32"),
        }
        header = synthesis.synthesis_header(pipe, teacher, revision, count=count, **settings)
        to_device(pipe, device)
        command = shlex.join(["upcycle", *sys.argv[1:]])
        writer = LatentWriter(out, {**header, "command": command}, count, shard_size)

    def work(on_images: Callable[[float], None]) -> None:
        synthesis.synthesize(pipe, writer, **settings, batch_size=batch_size, on_images=on_images)

    fill(writer, work, unit="samples", command=command, batch_size=batch_size, json=as_json)
