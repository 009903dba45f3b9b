"""`upcycle synthesize` of pipelines that take text."""

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from upcycle.cli.device import Dtype, to_device, torch_dtype
from upcycle.cli.latents import fill
from upcycle.cli.show import progress, working


def synthesize_prompts(
    found: Any,
    file: Path,
    out: Path,
    *,
    count: int,
    steps: int | None,
    guidance_scale: float | None,
    height: int | None,
    width: int | None,
    num_frames: int | None,
    seed: int,
    batch_size: int,
    shard_size: int,
    device: str | None,
    dtype: Dtype | None,
    as_json: bool,
) -> None:
    """Embed the prompts of ``file`` and draw ``count`` samples of the base itself (an adapter stays off)."""
    with working(f"loading {found.spec}"):
        from upcycle.latents import prompts as synthesis
        from upcycle.latents.folder import LatentWriter
        from upcycle.sampling import prompts as text

        texts = synthesis.read_prompts(file)
        wish = text.settings(found, steps, guidance_scale, height, width, num_frames)
        arithmetic = torch_dtype(dtype) if dtype else text.default_dtype(device)
        pipe = text.load_text_pipeline(found, arithmetic, adapter=False)
        text.check_sides(pipe, wish)
        to_device(pipe, device)
    with progress("prompts") as bar:
        task = bar.add_task("reading prompts", total=len(texts))
        written = synthesis.write_embeddings(pipe, out, texts, lambda: bar.advance(task))
        bar.update(task, completed=len(texts))
    command = shlex.join(["upcycle", *sys.argv[1:]])
    header = synthesis.synthesis_header(
        pipe, found, wish, count=count, seed=seed, dtype=arithmetic, prompts=written
    )  # fmt: skip
    writer = LatentWriter(out, {**header, "command": command}, count, shard_size)

    def work(on_images: Callable[[float], None]) -> None:
        synthesis.synthesize(pipe, writer, wish, seed=seed, batch_size=batch_size, on_images=on_images)

    fill(writer, work, unit="samples", command=command, batch_size=batch_size, json=as_json)
