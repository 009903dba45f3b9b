"""`--to diffusers`: the export folder again, with weights in another precision or under the names of a variant."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from upcycle import provenance
from upcycle.graft.convert import DEFAULT_SHARD_BYTES, write_config
from upcycle.graft.pieces import dtype_name, reused
from upcycle.graft.writer import Piece, nbytes, write_weights
from upcycle.output import new_folder
from upcycle.sources.diffusers_folder import read_weights
from upcycle.sources.safetensors_file import read_metadata
from upcycle.sources.student import Student
from upcycle.sources.tensors import LazyTensor
from upcycle.sources.weight_files import choose_file, is_weights, shards_of

# What tells about an export and holds for the copy too.
_ABOUT = ("model_index.json", "README.md", "images")


def export_folder(
    student: Student,
    out: Path,
    dtype: torch.dtype | None = None,
    *,
    variant: str | None = None,
    force: bool = False,
    written: Callable[[int], None] = lambda n: None,
) -> list[str]:
    """Write the folder ``out``: transformer and VAE in ``dtype``, all else as it is; returns notes.

    Raises `UpcycleError` where ``out`` exists (without ``force``), for NaN, and for what ``dtype`` cannot hold.
    """
    source = student.path
    components: dict[str, tuple[dict[str, Piece], dict[str, str]]] = {
        "transformer": (reused(student.tensors, dtype), student.metadata)
    }
    if (source / "vae").is_dir():
        tensors, metadata = _weights(source / "vae")
        components["vae"] = reused(tensors, dtype), metadata
    size = sum(nbytes(piece) for pieces, _ in components.values() for piece in pieces.values())
    origin = provenance.read_or_header(source, student.metadata)
    done = provenance.event("export", dtype=dtype_name(dtype), variant=variant)
    sha256: dict[str, str] = {}
    with new_folder(out, force, bytes_needed=size, keep=(source,)) as folder:
        for name, (pieces, metadata) in components.items():
            (folder / name).mkdir()
            if source.is_dir():
                _copy_beside(source / name, folder / name, variant)
            else:
                write_config(folder / name, student.config)
            header = provenance.extended(metadata, done)
            digests = write_weights(folder / name, pieces, header, DEFAULT_SHARD_BYTES, written, variant=variant)
            sha256 |= {f"{name}/{file}": digest for file, digest in digests.items()}
        if (source / "scheduler").is_dir():
            (folder / "scheduler").mkdir()
            _copy_beside(source / "scheduler", folder / "scheduler", variant)
        for name in _ABOUT:
            if (source / name).is_dir():
                shutil.copytree(source / name, folder / name)
            elif (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        if origin:
            measured, history = origin.get("evidence", []), [*origin["history"], done]
            if dtype:
                measured = [_before_export(found) for found in measured]
            provenance.write(folder, origin["base"], history, evidence=measured, sha256=sha256)
    return [] if source.is_dir() else ["a single file has no VAE and scheduler: the transformer alone was written"]


def _before_export(found: dict[str, Any]) -> dict[str, Any]:
    return {**found, "settings": {**found["settings"], "weights": "before the export to another precision"}}


def _weights(folder: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """The tensors of a component, and the metadata of its (first) file."""
    chosen = choose_file(str(folder), [path.name for path in folder.iterdir()], None, [])
    tensors: dict[str, LazyTensor] = {}
    shards = shards_of(str(folder), folder, chosen)
    for shard in shards:
        tensors |= read_weights(folder / shard)
    return tensors, read_metadata(folder / shards[0]) if ".safetensors" in chosen else {}


def _copy_beside(source: Path, target: Path, variant: str | None) -> None:
    """Copy what is no weights: configs, code, licences."""
    for path in source.iterdir():
        if path.is_file() and not path.name.startswith(".") and not is_weights(path.name):
            # With variant=, diffusers looks for a second part of every name in the folder, and fails where none is.
            name = f"{path.name}.txt" if variant and "." not in path.name else path.name
            shutil.copyfile(path, target / name)
