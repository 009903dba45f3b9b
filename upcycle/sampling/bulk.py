"""Many samples, for metrics: one PNG an image in a folder that remembers how they were drawn and what that took, or all
of them in one ``.npz`` file as ADM's evaluator reads it."""

import hashlib
import json
import os
import re
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from upcycle.errors import UpcycleError
from upcycle.evaluation.flops import step_flops
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.output import new_file, to_json, write_text
from upcycle.sampling.budget import told
from upcycle.sampling.grid import to_uint8
from upcycle.sampling.pipeline import class_count
from upcycle.sampling.sampler import Hold, Sampling, decode, steps

RECORD = "samples.json"
BUDGET = ("tail_drop", "uncond_tail_drop", "tokens")
HOW = (
    "sampler", "steps", "guidance_scale", "guidance_channels", "guidance_interval", "hold", *BUDGET, "patches",
    "classes", "seed", "dtype",
)  # fmt: skip
"""What a record says about how samples were drawn, None where nothing was asked for; ``model`` and ``model_sha256`` say
of what, and ``num`` how many there are to be."""
SUMS = ("drawn", "seconds", "flops", "kept", "calls")


def label_and_seed(index: int, classes: Sequence[int], seed: int) -> tuple[int, int]:
    """Class and seed of sample ``index``: classes in turn, and seeds that count up from a place that ``seed`` chooses.

    Seeds are 32 bits long, all that torch's generator takes. Data sets of different ``seed`` share noise by accident
    only.
    """
    start = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=4).digest(), "little")
    return classes[index % len(classes)], (start + index) % 2**32


def read_record(folder: Path) -> dict[str, Any] | None:
    """What `draw_samples` wrote into a folder, with the sums of what all processes took; None where it did not.

    Raises `UpcycleError` if that is damaged.
    """
    if not (folder / RECORD).is_file():
        return None
    try:
        record = json.loads((folder / RECORD).read_bytes())
        record = {**dict.fromkeys(HOW), **record, "model": record["model"], "model_sha256": record["model_sha256"]}
        lines = [line for file in sorted(folder.glob("costs-*.jsonl")) for line in file.read_text().splitlines()]
        sums = [
            json.loads(line) for line in lines if re.fullmatch(r"\{.*\}", line.strip())
        ]  # one may have been cut off
        return {**record, **{name: sum(line[name] for line in sums) for name in SUMS}}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UpcycleError(f"{folder / RECORD} is damaged ({error!r}); delete {folder} and draw again") from error


def budget_of(model: Any) -> dict[str, float | str | None]:
    """The budgets (`BUDGET`) that a model follows, as numbers or as the words of `upcycle.sampling.budget`."""
    if not isinstance(model, ChunkedDiT):
        return {**dict.fromkeys(BUDGET), "tail_drop": 0.0}
    values = {name: getattr(model, name) for name in BUDGET}
    return {name: x if x is None or isinstance(x, int | float) else told(x) for name, x in values.items()}


def check_finished(folder: Path) -> None:
    """Raise `UpcycleError` where samples were begun in a folder and are not all there."""
    record = read_record(folder)
    num = (record or {}).get("num") or 0
    missing = sum(not (folder / name).exists() for name in names_of(num))
    if record and missing:
        command = "the evaluation that began it"
        if record["classes"] is not None:  # an evaluation draws all of them
            command = f"upcycle sample {record['model']} --balanced -n {num} -o {folder} and its options as before"
        raise UpcycleError(f"{folder} holds {num - missing} of {num} samples; go on with {command}")


def names_of(num: int) -> list[str]:
    """The files of the first ``num`` samples."""
    return [f"{index:06d}.png" for index in range(num)]


def begin(folder: Path, how: dict[str, Any], num: int) -> None:
    """Make the folder of ``num`` samples and its record, or check that what it holds was drawn in the same way; where
    there were to be fewer, there are to be ``num`` now.

    Raises:
        UpcycleError: it was not, or it holds something else.
    """
    record = read_record(folder)
    if record is None:
        if folder.is_dir() and any(folder.iterdir()):
            raise UpcycleError(f"{folder} is not empty and holds no samples to go on with; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / RECORD, to_json({**how, "num": num}))
        return
    plain = json.loads(to_json(how))
    if differ := [name for name in plain if record.get(name) != plain[name] and name != "model"]:
        raise UpcycleError(
            f"{folder} holds samples with another {differ[0]} ({record.get(differ[0])}, and now {plain[differ[0]]}); "
            "delete it, or choose another folder"
        )
    if num > (record.get("num") or 0):
        write_text(folder / RECORD, to_json({**how, "model": record["model"], "num": num}))


def settings_of(how: dict[str, Any]) -> Sampling:
    """The settings of the sampling loop among `HOW`."""
    hold = how.get("hold")
    if hold is not None:
        hold = Hold(every=hold) if isinstance(hold, int) else Hold(limit=hold)
    low, high = how.get("guidance_interval") or (0, 999)
    return Sampling(how["steps"], how["guidance_scale"], how["guidance_channels"], (low, high), hold)


def draw_samples(
    pipe: Any,
    folder: Path,
    how: dict[str, Any],
    num: int,
    batch_size: int,
    on_images: Callable[[float], None] = lambda count: None,
    *,
    classes: Sequence[int] | None = None,
    process: tuple[int, int] = (0, 1),
) -> list[Path]:
    """Draw those of the first ``num`` samples that the folder lacks; returns the files of all of them.

    Sample i has class i modulo the classes and a seed of its own (`label_and_seed`), whatever the batch and however
    many processes draw. Classes are balanced to one. An interruption loses one batch of each process.

    Args:
        pipe: with its sampler (`upcycle.sampling.sampler.set_sampler`) and its budgets set.
        how: `HOW`, ``model`` and ``model_sha256``, and what else is to be the same when it goes on.
        on_images: called with the samples that are there already, and after every step with the share of samples that
            it was, in all processes as far as this one knows.
        classes: all by default.
        process: rank, and how many there are. The first must have called `begin` before the others come here. Each
            draws every so-many-th index, so that none looks at what another is writing.

    Raises:
        UpcycleError: the folder holds samples drawn otherwise, or samples are not finite.
    """
    rank, ranks = process
    if rank == 0:
        begin(folder, how, num)
    settings = settings_of(how)
    classes = range(class_count(pipe)) if classes is None else classes
    there = set(os.listdir(folder))
    names = names_of(num)
    on_images(sum(name in there for name in names))
    todo = [index for index in range(rank, num, ranks) if names[index] not in there]
    amp = torch.bfloat16 if how["dtype"] == "bf16" else torch.float16
    for first in range(0, len(todo), batch_size):
        some = todo[first : first + batch_size]
        labels, seeds = zip(*(label_and_seed(index, classes, how["seed"]) for index in some), strict=True)
        took: dict[str, float] = dict.fromkeys(SUMS, 0)
        before, step = time.perf_counter(), None
        with torch.autocast(pipe.device.type, amp, enabled=how["dtype"] != "fp32"):
            for step in steps(pipe, [*labels], [*seeds], settings):
                took["flops"] += step_flops(pipe.transformer, step)
                if step.routing is not None:
                    took["kept"] += int(step.routing.mask.sum())
                    took["calls"] += len(step.routing.mask)
                on_images(ranks * len(some) / settings.steps)
            assert step is not None
            images = decode(pipe, step.previous).cpu()
        if not images.isfinite().all():
            raise UpcycleError(f"{how['model']} gives samples that are not finite; take --dtype fp32, or less guidance")
        took["seconds"], took["drawn"] = time.perf_counter() - before, len(some)
        for index, pixels in zip(some, to_uint8(images), strict=True):
            partial = folder / f".{names[index]}.partial"
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(partial, format="PNG")
            partial.replace(folder / names[index])
        with (folder / f"costs-{rank}.jsonl").open("a") as file:
            file.write("\n" + to_json(took).replace("\n", " ") + "\n")  # after what may have been cut off
    return [folder / name for name in names]


def cost(record: dict[str, Any]) -> dict[str, float | None]:
    """What one of a record's samples took: ``flops_per_image`` in the papers' counting, ``seconds_per_image`` with
    decoding, and ``tokens_kept`` a call of a student, over both halves of guided batches."""
    drawn = max(1, record["drawn"])
    return {
        "flops_per_image": record["flops"] / drawn,
        "seconds_per_image": record["seconds"] / drawn,
        "tokens_kept": record["kept"] / record["calls"] if record["calls"] else None,
    }


def write_npz(files: Sequence[Path], labels: Sequence[int], out: Path, force: bool = False) -> None:
    """Pack images into ``arr_0`` uint8 [n, H, W, 3] and ``arr_1`` int64 [n], their labels; one image in memory.

    Raises:
        UpcycleError: no space left.
    """
    height, width = np.asarray(Image.open(files[0])).shape[:2]
    shape = (len(files), height, width, 3)
    needed = len(files) * height * width * 3
    with new_file(out, force, bytes_needed=needed) as partial, zipfile.ZipFile(partial, "w") as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for path in files:
                file.write(np.asarray(Image.open(path).convert("RGB")).tobytes())
        with archive.open("arr_1.npy", "w") as file:
            np.lib.format.write_array(file, np.asarray(labels, dtype=np.int64))
