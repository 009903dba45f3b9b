"""Other ways out of an export, one file a way: a single file, another precision, Meta's and the authors' layouts."""

import os
from pathlib import Path
from typing import Literal

from upcycle.errors import UpcycleError
from upcycle.sources import Source, open_source
from upcycle.sources.student import Student, is_student, open_student


def open_model(
    spec: str, *, revision: str | None = None, weights: Literal["ema", "model"] = "ema", heads: int | None = None
) -> Student | Source:
    """Open what is to be exported: an export folder or a single file of one, else whatever `open_source` takes.

    Raises `UpcycleError` if there is nothing, or it is damaged.
    """
    path = Path(spec).expanduser()
    if not (spec and os.path.exists(path) and is_student(path)):
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
