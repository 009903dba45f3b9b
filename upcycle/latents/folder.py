"""Writing a folder of latents, shard by shard: whatever interrupts it, what is finished stays and is not made again."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from upcycle.errors import UpcycleError
from upcycle.output import check_output, disk_full, to_json

FORMAT, VERSION = "upcycle-latents", 1
INDEX = "index.json"

# What is not compared when a folder is gone on with: names of places, whose content is compared by hash, and what
# follows from other settings.
_PLACES = ("command", "source.path", "vae.id", "teacher.id", "teacher.revision")
_DERIVED = ("sample_shape", "tensors.")


def check_latents_folder(out: Path) -> None:
    """Raise `UpcycleError` unless ``out`` can be made, is empty, or is a folder of latents to go on with."""
    if os.path.isfile(out / INDEX):
        read_index(out)
    elif os.path.isdir(out) and (names := os.listdir(out)):
        if any("prompts.safetensors" not in name for name in names):  # which is written before the index
            raise UpcycleError(f"{out} is not empty and holds no latents; choose another folder with -o")
    else:
        check_output(out, force=False)


def read_index(folder: Path) -> dict[str, Any]:
    """The ``index.json`` of a folder of latents. Raises `UpcycleError` if it is damaged, or of something else."""
    path = folder / INDEX
    try:
        index = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UpcycleError(f"{path} cannot be read as JSON ({error}); make the latents again") from error
    if not isinstance(index, dict) or index.get("format") != FORMAT:
        raise UpcycleError(f"{path} is not the index of a folder of latents; choose another folder")
    if index.get("version") != VERSION:
        raise UpcycleError(f"{path} is of version {index.get('version')}, and {VERSION} is read; update upcycle")
    return index


class LatentWriter:
    """Writes ``total`` items in shards of ``shard_size``; shard k is made of items k·size to (k+1)·size − 1 alone.

    Args:
        out: the folder; where it holds an index already, what that lists is kept.
        header: what goes into the index beside the shards. It is what tells whether a folder can be gone on with;
            ``tensors`` lists names, dtypes and shapes [C, H, W] or [].
        total: items, the unreadable ones included.
        shard_size: items a shard.

    Raises:
        UpcycleError: the folder was made with other settings, which are named.
    """

    def __init__(self, out: Path, header: Mapping[str, Any], total: int, shard_size: int):
        self.out, self.total, self._size = out, total, shard_size
        self._header = json.loads(to_json({"format": FORMAT, "version": VERSION, **header, "shard_size": shard_size}))
        self._made: dict[str, dict[str, Any]] = {}
        check_latents_folder(out)
        if os.path.isfile(out / INDEX):
            self._go_on(read_index(out))
        else:
            out.mkdir(parents=True, exist_ok=True)
        for rest in out.glob(".*.partial"):
            rest.unlink(missing_ok=True)
        self.resumed = len(self._made)

    @property
    def todo(self) -> list[tuple[int, range]]:
        """Shards to make: their numbers and items."""
        shards = enumerate(range(0, self.total, self._size))
        parts = ((number, range(first, min(first + self._size, self.total))) for number, first in shards)
        return [(number, part) for number, part in parts if _name(number) not in self._made]

    @property
    def items_done(self) -> int:
        """Items of the shards that are finished, skipped ones included."""
        return self.total - sum(len(part) for _, part in self.todo)

    @property
    def index(self) -> dict[str, Any]:
        """What ``index.json`` holds now."""
        made = [self._made[name] for name in sorted(self._made)]
        shards = [{key: value for key, value in entry.items() if key != "skipped"} for entry in made]
        return {
            **self._header,
            "complete": not self.todo,
            "count": sum(entry["count"] for entry in shards),
            "skipped": [item for entry in made for item in entry["skipped"]],
            "shards": shards,
        }

    def write(self, number: int, tensors: dict[str, torch.Tensor], skipped: list[tuple[str, str]]) -> None:
        """Write shard ``number`` and then the index that lists it; both appear whole or not at all.

        Args:
            tensors: those of the header, each [n, …].
            skipped: name and reason of each item that is missing from them.
        """
        for name, what in self._header["tensors"].items():
            assert list(tensors[name].shape[1:]) == what["shape"], (name, tensors[name].shape)
            assert str(tensors[name].dtype) == f"torch.{what['dtype']}", (name, tensors[name].dtype)
        path = self.out / _name(number)
        with _appearing(path) as partial:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
            partial.chmod((self.out / INDEX).stat().st_mode & 0o777)  # safetensors lets nobody else read
            with partial.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            entry = {"file": path.name, "count": len(tensors["label"]), "bytes": partial.stat().st_size}
        self._made[path.name] = {**entry, "sha256": digest, "skipped": [list(item) for item in skipped]}
        self.save_index()

    def save_index(self) -> None:
        """Write ``index.json`` as it stands; before the first shard, so that a folder can be told from any other."""
        with _appearing(self.out / INDEX) as partial:
            partial.write_text(to_json(self.index))

    def _go_on(self, index: dict[str, Any]) -> None:
        theirs, ours = _flat(index), _flat(self._header)
        compared = [key for key in ours if key not in _PLACES and not key.startswith(_DERIVED)]
        differ = [key for key in compared if theirs.get(key) != ours[key]]
        if differ:
            shown = "; ".join(f"{key} is {_short(theirs.get(key))} there and {_short(ours[key])} now" for key in differ)
            raise UpcycleError(
                f"{self.out} was made with other settings: {shown}; give the same, or choose another folder with -o"
            )
        try:
            left = list(index["skipped"])
            for entry in sorted(index["shards"], key=lambda entry: entry["file"]):
                number = int(entry["file"].partition(".")[0])
                planned = min(self._size, self.total - number * self._size)
                mine, left = left[: planned - entry["count"]], left[planned - entry["count"] :]
                path = self.out / _name(number)
                # One that was lost or cut off since is made again.
                if os.path.isfile(path) and path.stat().st_size == entry["bytes"]:
                    self._made[path.name] = {**entry, "skipped": mine}
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise UpcycleError(
                f"{self.out / INDEX} is damaged; delete {self.out} and make the latents again"
            ) from error


def _name(number: int) -> str:
    return f"{number:05d}.safetensors"


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else text[:37] + "..."


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """Yield a hidden path that becomes ``path`` once it is safely on the disk."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        _sync(partial)
        partial.replace(path)
        _sync(path.parent)
    except (OSError, SafetensorError) as error:
        why = "no space left to write it" if disk_full(error) else f"cannot be written ({error})"
        raise UpcycleError(f"{path}: {why}; make room and run the same command again, which goes on") from error
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
