"""Other ways out of an export, one file a way: a single file, another precision, Meta's and the authors' layouts."""

import os
from pathlib import Path
from typing import Literal

from upcycle.errors import UpcycleError
from upcycle.sources import Source, hub, open_source
from upcycle.sources.student import Student, is_student, open_student


def open_model(
    spec: str, *, revision: str | None = None, weights: Literal["ema", "model"] = "ema", heads: int | None = None
) -> Student | Source:
    """Open what is to be exported: a student (folder, single file, Hub id), else whatever `open_source` takes.

    Raises `UpcycleError` if there is nothing, or it is damaged.
    """
    path = Path(spec).expanduser()
    local = spec != "" and os.path.exists(path)
    if not local and hub.is_hub_id(spec) and path.suffix not in (".safetensors", ".pt"):
        folder, _ = hub.fetch(spec, revision=revision, variant=None)
        if is_student(folder):
            return open_student(folder)
    if not (local and is_student(path)):
        return open_source(spec, revision=revision, weights=weights, heads=heads)
    if revision is not None:
        raise UpcycleError(f"{spec}: a local path has no revisions; leave --revision out")
    return open_student(path)


def only_student(model: Student | Source, way: str) -> Student:
    """The model, if it is a converted one, which the way out ``--to way`` needs; raises `UpcycleError`."""
    if isinstance(model, Student):
        return model
    what = "a DC-DiT of the authors' code" if model.kind == "dc-dit" else "a fixed-patch DiT"
    raise UpcycleError(
        f"{model.spec} is {what} and no converted model, which --to {way} takes; make one with upcycle convert"
    )
