"""Training data without a data set: a teacher's own samples, kept as latents."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTPipeline

from upcycle.errors import UpcycleError
from upcycle.latents.folder import LatentWriter
from upcycle.latents.vae import weights_hash
from upcycle.sampling.bulk import label_and_seed
from upcycle.sampling.pipeline import class_count
from upcycle.sampling.sampler import Sampling, sample
from upcycle.sources.vae import describe_vae


def with_ddim(pipe: DiTPipeline) -> DiTPipeline:
    """The pipeline with a DDIM scheduler made from its own: a sample is then a function of its seed alone."""
    if not isinstance(pipe.scheduler, DDIMScheduler):
        # DDIM clips unless it is told not to, and the configs of other solvers do not say.
        clip = pipe.scheduler.config.get("clip_sample", False)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=clip)
    return pipe


def sample_latents(
    pipe: DiTPipeline,
    labels: list[int],
    seeds: list[int],
    steps: int,
    guidance_scale: float,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The latents that ``pipe`` would decode into images, in the model's scale: fp32 [n, C, H, W], on its device.

    A (label, seed) gives the same sample in any batch. ``dtype`` is that of the transformer's arithmetic; the latents
    stay in fp32 between steps.
    """
    with torch.autocast(pipe.device.type, dtype, enabled=dtype != torch.float32):
        return sample(pipe, labels, seeds, Sampling(steps, guidance_scale))


def synthesis_header(
    pipe: DiTPipeline,
    teacher: str,
    revision: str | None,
    *,
    count: int,
    classes: list[int],
    steps: int,
    guidance_scale: float,
    seed: int,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """What the index says about a synthesis, before the first sample is drawn."""
    c = pipe.transformer.config
    shape = [c.in_channels, c.sample_size, c.sample_size]
    number = class_count(pipe)
    names = {label: name for name, label in reversed(pipe.labels.items())}
    scheduler = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    return {
        "kind": "synthesized",
        "sample_shape": shape,
        "num_classes": number,
        "classes": [names[label] for label in range(number)] if set(names) >= set(range(number)) else None,
        "tensors": {
            "z0": {"dtype": "float16", "shape": shape},
            "label": {"dtype": "int64", "shape": []},
            "seed": {"dtype": "int64", "shape": []},
        },
        "source": {"kind": "teacher", "samples": count, "labels": classes},
        "vae": {"id": teacher, **describe_vae({**pipe.vae.config, "_class_name": type(pipe.vae).__name__})},
        "size": None,
        "flips": False,
        "dtype": str(dtype).removeprefix("torch."),
        "teacher": {"id": teacher, "revision": revision, "sha256": weights_hash(pipe.transformer.state_dict())},
        "scheduler": {"class": type(pipe.scheduler).__name__, **scheduler},
        "steps": steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
    }


def synthesize(
    pipe: DiTPipeline,
    writer: LatentWriter,
    *,
    classes: list[int],
    steps: int,
    guidance_scale: float,
    seed: int,
    dtype: torch.dtype,
    batch_size: int,
    on_images: Callable[[float], None] = lambda count: None,
) -> None:
    """Draw what ``writer`` lacks; neither the batch size nor an interruption changes a sample.

    ``on_images`` is called after every step, with the share of the batch's samples that this step was.

    Raises:
        UpcycleError: samples that are not finite; no space left.
    """

    def some(labels: list[int], seeds: list[int]) -> torch.Tensor:
        share = len(labels) / steps
        hook = pipe.transformer.register_forward_hook(lambda *_: on_images(share))
        try:
            return sample_latents(pipe, labels, seeds, steps, guidance_scale, dtype)
        finally:
            hook.remove()

    draw_shards(writer, classes, seed, batch_size, some)


def draw_shards(
    writer: LatentWriter,
    classes: list[int],
    seed: int,
    batch_size: int,
    sample: Callable[[list[int], list[int]], torch.Tensor],
) -> None:
    """Fill ``writer`` with what ``sample`` makes of labels and seeds, latents [n, C, H, W] or [n, C, F, H, W].

    Raises:
        UpcycleError: samples that are not finite; no space left.
    """
    writer.save_index()
    for number, items in writer.todo:
        z0 = []
        jobs = [label_and_seed(index, classes, seed) for index in items]
        for first in range(0, len(jobs), batch_size):
            labels, seeds = (list(column) for column in zip(*jobs[first : first + batch_size], strict=True))
            latents = sample(labels, seeds).half()
            if not latents.isfinite().all():
                raise UpcycleError(
                    "the teacher gives samples that are not finite; take --dtype fp32, a lower --guidance-scale, or "
                    "check its weights"
                )
            z0.append(latents.cpu())
        drawn_labels, drawn_seeds = torch.tensor(jobs).unbind(1)
        writer.write(number, {"z0": torch.cat(z0), "label": drawn_labels, "seed": drawn_seeds}, [])
