"""`--to single`: the transformer of an export in one safetensors file that says itself what it is."""

import json
from collections.abc import Callable
from pathlib import Path

import torch

from upcycle import provenance
from upcycle.graft.pieces import dtype_name, reused
from upcycle.graft.writer import nbytes, write_safetensors
from upcycle.output import new_file
from upcycle.sources.student import CONFIG_KEY, Student


def export_single(
    student: Student,
    out: Path,
    dtype: torch.dtype | None = None,
    *,
    force: bool = False,
    written: Callable[[int], None] = lambda n: None,
) -> list[str]:
    """Write the file ``out``, which `load_student` reads back; returns notes.

    The metadata are those of the source's file with one more event, and under ``config`` the arguments of `ChunkedDiT`
    with the class name.

    Raises `UpcycleError` where ``out`` exists (without ``force``), for NaN, and for what ``dtype`` cannot hold.
    """
    pieces = reused(student.tensors, dtype)
    config = json.dumps({"_class_name": "ChunkedDiT", **student.config})
    done = provenance.event("export", to="single", dtype=dtype_name(dtype))
    metadata = {**provenance.extended(student.metadata, done), CONFIG_KEY: config}
    with new_file(out, force, bytes_needed=sum(map(nbytes, pieces.values())), keep=(student.path,)) as file:
        write_safetensors(file, pieces.items(), metadata, written)
    return []
