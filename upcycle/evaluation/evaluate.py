"""One row of an evaluation, rows in a file, and which of them may be compared."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch_fidelity

from upcycle.errors import UpcycleError
from upcycle.evaluation.features import check_size, weights_sha256
from upcycle.evaluation.images import ImageSet, open_set
from upcycle.evaluation.metrics import Reference, features_of, measure, reference_of
from upcycle.evaluation.speed import machine
from upcycle.latents.vae import weights_hash
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.output import to_json, write_text
from upcycle.sampling.budget import put_on
from upcycle.sampling.bulk import HOW, budget_of, cost, draw_samples, read_record
from upcycle.sampling.sampler import decode, set_sampler

PROTOCOL = (
    "sampler", "steps", "guidance_scale", "guidance_channels", "guidance_interval", "hold", "num", "features",
    "features_sha256", "reference_sha256", "size",
)  # fmt: skip
"""Rows are compared only where they agree in all of these. The model, its tail drop, the seed and the arithmetic may
differ."""
WORDS = {"num": "n", "reference_sha256": "the reference's hash", "features_sha256": "the extractor's hash"}
COST = ("flops_per_image", "seconds_per_image", "tokens_kept")
FORMAT, VERSION = "upcycle-evaluations", 1


@dataclass(frozen=True)
class Judge:
    """A feature extractor and what samples are compared with."""

    features: str
    extractor: Any
    reference: ImageSet
    numbers: Reference
    batch_size: int

    @property
    def width(self) -> int:
        """How many features there are."""
        return len(self.numbers["mu"])


def judge(
    features: str,
    extractor: Any,
    reference: ImageSet,
    cache: Path,
    batch_size: int,
    on_images: Callable[[int], None] = lambda count: None,
) -> Judge:
    """The extractor ``features`` and the reference's numbers in it, which are kept in the folder ``cache``.

    Raises:
        UpcycleError: the reference's images are of a size that the extractor does not take.
    """
    if reference.size:
        check_size(features, reference.size, reference.spec)
    key = hashlib.sha256(f"{reference.sha256} {weights_sha256(features)}".encode()).hexdigest()[:16]
    numbers = reference_of(extractor, reference, batch_size, on_images, cache / f"reference-{key}.safetensors")
    return Judge(features, extractor, reference, numbers, batch_size)


def judged_by(features: str, reference: ImageSet) -> dict[str, Any]:
    """What a row says about its judge."""
    return {
        "features": features,
        "features_sha256": weights_sha256(features),
        "reference": reference.spec,
        "reference_sha256": reference.sha256,
        "reference_num": reference.count or None,
    }


def check_sizes(spec: str, size: tuple[int, int] | None, features: str, reference: ImageSet) -> None:
    """Raise `UpcycleError` unless images of ``size`` (height, width) can be measured, and are as large as the
    reference's."""
    if size is None:
        raise UpcycleError(f"{spec} holds statistics without images; it can be a --reference, and not what is judged")
    check_size(features, size, spec)
    if reference.size and size != reference.size:
        ours, theirs = (f"{width}x{height}" for height, width in (size, reference.size))
        raise UpcycleError(
            f"{spec} has images of {ours} and the reference {reference.spec} of {theirs}; "
            "bring the reference to the samples' size, as the training data was"
        )


def image_size(pipe: Any) -> tuple[int, int]:
    """Height and width of what a pipeline draws."""
    c = pipe.transformer.config
    z = torch.zeros(1, c.in_channels, c.sample_size, c.sample_size, device=pipe.device)
    height, width = decode(pipe, z).shape[2:]
    return height, width


def chosen_rows(images: ImageSet, num: int | None) -> list[int]:
    """All images, or ``num`` of them: drawn by lot, the same every time, because folders are sorted by class."""
    if num is None or num == images.count:
        return list(range(images.count))
    if num > images.count:
        raise UpcycleError(f"{images.spec} holds {images.count} images and --num {num} asks for more; lower it")
    order = torch.randperm(images.count, generator=torch.Generator().manual_seed(0))
    return sorted(order[:num].tolist())


def evaluate_set(
    judged: ImageSet,
    by: Judge,
    how: dict[str, Any],
    rows: list[int],
    on_images: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """The row of images that are there; ``how``: ``model`` and what is known of `HOW` and `COST`."""
    features = features_of(by.extractor, judged, by.batch_size, on_images, rows)
    return {
        "model": how.get("model", judged.spec),
        "model_sha256": how.get("model_sha256"),
        **{name: how.get(name) for name in HOW},
        "num": len(rows),
        "size": list(judged.size or ()),
        **judged_by(by.features, by.reference),
        **measure(features, by.numbers),
        **{name: how.get(name) for name in COST},
        "machine": how.get("machine"),
        "torch_fidelity": torch_fidelity.__version__,
    }


def recorded(folder: str) -> dict[str, Any] | None:
    """How the samples of a folder were drawn and what they took, where it says so."""
    record = read_record(Path(folder)) if os.path.isdir(folder) else None
    return None if record is None else {**record, **cost(record)}


def evaluate_model(
    pipe: Any,
    by: Judge,
    how: dict[str, Any],
    num: int,
    cache: Path,
    batch_size: int,
    on_samples: Callable[[float], None] = lambda count: None,
    on_images: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Draw ``num`` samples as ``how`` says (`HOW` and ``model``) into a folder in ``cache``, and measure them.

    A ``tail_drop`` of None leaves a student its own budgets.
    """
    if how["tail_drop"] is not None and isinstance(pipe.transformer, ChunkedDiT):
        pipe.transformer.set_tokens(None)
        pipe.transformer.set_tail_drop(how["tail_drop"])
    elif isinstance(pipe.transformer, ChunkedDiT):
        put_on(pipe.transformer, {}, how["steps"], how["guidance_scale"] > 1)  # a budget is one of a run
    how = {**dict.fromkeys(HOW), **how, **budget_of(pipe.transformer)}
    set_sampler(pipe, how["sampler"])
    how["model_sha256"] = weights_hash({**pipe.transformer.state_dict(), **pipe.vae.state_dict()})
    told = to_json({name: how[name] for name in (*HOW, "model_sha256")})
    name = f"{Path(how['model']).name}-{hashlib.sha256(told.encode()).hexdigest()[:10]}"
    folder = cache / name
    files = draw_samples(pipe, folder, how, num, batch_size, on_samples)
    drawn = open_set(str(folder))
    how |= cost(read_record(folder) or {}) | {"machine": machine(pipe.device)}
    return evaluate_set(drawn, by, how, list(range(len(files))), on_images) | {"samples": str(folder)}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a results file; none where it is not there. Raises `UpcycleError` for another file."""
    if not path.exists():
        return []
    try:
        content = json.loads(path.read_bytes())
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise ValueError("it is of another kind or version")
        rows = content["rows"]
        {name: row[name] for row in rows for name in (*PROTOCOL, "model", "tail_drop", "seed", "fid")}
        return rows
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UpcycleError(f"{path} is no file of evaluations ({error}); choose another") from error


def add_row(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a results file; the same evaluation done before gives way to it."""
    rows = [old for old in read_rows(path) if not is_same(old, row)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, to_json({"format": FORMAT, "version": VERSION, "rows": [*rows, row]}) + "\n")


def is_same(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two rows are of the same evaluation."""
    return all(row.get(name) == other.get(name) for name in (*PROTOCOL, *HOW, "model", "model_sha256"))


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """Why two rows must not be compared: what of `PROTOCOL` differs."""
    found = []
    for name in PROTOCOL:
        if ours.get(name) != theirs.get(name):
            told = [_told(row.get(name), name) for row in (theirs, ours)]
            found.append(f"{WORDS.get(name, name.replace('_', ' '))} is {told[0]} there and {told[1]} here")
    return found


def comparable(row: dict[str, Any], others: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[str]]:
    """Those of the other rows that may stand beside ``row``, and why each of the rest may not."""
    fit, notes = [], []
    for other in others:
        differ = differences(row, other)
        if differ:
            notes.append(f"{other['model']} is not compared: {'; '.join(differ)}")
        else:
            fit.append(other)
    return fit, notes


def _told(value: Any, name: str) -> str:
    if value is None:
        return {"guidance_channels": "all", "hold": "none"}.get(name, "not said")
    return value[:12] if name.endswith("sha256") else str(value)
