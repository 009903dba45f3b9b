"""Samples for an evaluation: one PNG an image, in a folder that remembers how they were drawn and what that took."""

import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from upcycle.errors import UpcycleError
from upcycle.evaluation.flops import chunked_dit_flops, dit_flops
from upcycle.evaluation.images import to_uint8
from upcycle.latents.synthesize import label_and_seed
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.output import to_json, write_text
from upcycle.sampling.budget import told
from upcycle.sampling.pipeline import class_count
from upcycle.sampling.sampler import Sampling, decode, sample

RECORD = "drawn.json"
BUDGET = ("tail_drop", "uncond_tail_drop", "tokens")
HOW = ("sampler", "steps", "guidance_scale", "guidance_channels", *BUDGET, "seed", "dtype")
"""What a record says about how samples were drawn; ``model`` and ``model_sha256`` say of what."""


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `draw_samples` wrote into a folder; None where it did not. Raises `UpcycleError` if that is damaged."""
    if not (folder / RECORD).is_file():
        return None
    try:
        record = json.loads((folder / RECORD).read_bytes())
        {name: record[name] for name in (*HOW, "model", "model_sha256", "done", "seconds", "flops", "tokens")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UpcycleError(f"{folder / RECORD} is damaged ({error!r}); delete {folder} and draw again") from error
    return record


def budget_of(model: Any) -> dict[str, float | str | None]:
    """The budgets (`BUDGET`) that a model follows, as numbers or as the words of `upcycle.sampling.budget`."""
    if not isinstance(model, ChunkedDiT):
        return {**dict.fromkeys(BUDGET), "tail_drop": 0.0}
    values = {name: getattr(model, name) for name in BUDGET}
    return {name: x if x is None or isinstance(x, int | float) else told(x) for name, x in values.items()}


def draw_samples(
    pipe: Any,
    folder: Path,
    how: dict[str, Any],
    num: int,
    batch_size: int,
    on_images: Callable[[float], None] = lambda count: None,
) -> list[Path]:
    """Draw the first ``num`` samples into ``folder``, but for those that are there; returns their files.

    Sample i has class i modulo the classes and a seed of its own, whatever the batch. Classes are balanced to one. An
    interruption loses one batch.

    Args:
        pipe: with its sampler (`upcycle.sampling.sampler.set_sampler`) and its budgets set.
        how: `HOW`, ``model`` and ``model_sha256``.
        on_images: called after every call of the model with the share of samples that this was.

    Raises:
        UpcycleError: the folder holds samples drawn otherwise, or samples are not finite.
    """
    record = read_record(folder) or {**how, "done": 0, "seconds": 0.0, "flops": 0.0, "tokens": None, "calls": 0}
    if differ := [name for name in how if record[name] != how[name] and name != "model"]:
        raise UpcycleError(f"{folder} holds samples with another {differ[0]}; delete it, or choose another --cache")
    folder.mkdir(parents=True, exist_ok=True)
    settings = Sampling(how["steps"], how["guidance_scale"], how["guidance_channels"])
    classes = list(range(class_count(pipe)))
    amp = torch.bfloat16 if how["dtype"] == "bf16" else torch.float16
    on_images(min(record["done"], num))
    while record["done"] < num:
        some = range(record["done"], min(num, record["done"] + batch_size))
        labels, seeds = zip(*(label_and_seed(index, classes, how["seed"]) for index in some), strict=True)
        share = len(some) / how["steps"]
        before = time.perf_counter()
        with _counted(pipe.transformer, record, functools.partial(on_images, share)):
            with torch.autocast(pipe.device.type, amp, enabled=how["dtype"] != "fp32"):
                latents = sample(pipe, list(labels), list(seeds), settings)
            images = decode(pipe, latents).cpu()
        if not images.isfinite().all():
            raise UpcycleError(f"{how['model']} gives samples that are not finite; take --dtype fp32, or less guidance")
        record["seconds"] += time.perf_counter() - before
        for index, pixels in zip(some, to_uint8(images), strict=True):
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(_file(folder, index))
        record["done"] = some.stop
        write_text(folder / RECORD, to_json(record))  # after the images: what it counts is there
    files = [_file(folder, index) for index in range(num)]
    if missing := [file for file in files if not os.path.isfile(file)]:
        raise UpcycleError(f"{missing[0]} is gone, and {folder / RECORD} counts it; delete {folder} and draw again")
    return files


def cost(record: dict[str, Any]) -> dict[str, float | None]:
    """What one of a record's samples took: ``flops_per_image`` in the papers' counting, ``seconds_per_image`` with
    decoding, and ``tokens_kept`` a call of a student, over both halves of guided batches."""
    done = record["done"]
    return {
        "flops_per_image": record["flops"] / done,
        "seconds_per_image": record["seconds"] / done,
        "tokens_kept": record["tokens"] / record["calls"] if record["tokens"] is not None else None,
    }


def _file(folder: Path, index: int) -> Path:
    return folder / f"{index:06d}.png"


@contextlib.contextmanager
def _counted(model: Any, record: dict[str, Any], on_call: Callable[[], None]) -> Iterator[None]:
    """Add to ``record`` what the calls of ``model`` take."""
    student = isinstance(model, ChunkedDiT)
    each = functools.lru_cache(None)(lambda n: sum(chunked_dit_flops(model.config, n).values()))
    fixed = 0.0 if student else dit_flops(model.config)

    def look(module: Any, args: Any, output: Any) -> None:
        on_call()
        if not student:
            record["flops"] += fixed * len(output.sample)
            return
        kept = output.routing.mask.sum(1).tolist()
        record["flops"] += sum(map(each, kept))
        record["tokens"] = (record["tokens"] or 0) + sum(kept)
        record["calls"] += len(kept)

    hook = model.register_forward_hook(look)
    try:
        yield
    finally:
        hook.remove()
