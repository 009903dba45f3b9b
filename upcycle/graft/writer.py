"""A safetensors writer that streams through one small buffer (the library's writers want all tensors in memory)."""

import hashlib
import json
import struct
from collections.abc import Callable, Iterable, Iterator
from io import RawIOBase
from pathlib import Path
from typing import Protocol

import torch

from upcycle.sources.safetensors_file import DTYPE_NAMES

# Small enough to stay in a core's cache from the read over the check to the write.
BUFFER_BYTES = 2**20


class Piece(Protocol):
    """A tensor that is known before it is read; `chunks` gives its values, flat and in order (`LazyTensor.chunks`)."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def chunks(self, buffer: torch.Tensor) -> Iterator[torch.Tensor]: ...


def nbytes(piece: Piece) -> int:
    return torch.Size(piece.shape).numel() * piece.dtype.itemsize


def write_safetensors(
    path: Path,
    pieces: Iterable[tuple[str, Piece]],
    metadata: dict[str, str],
    written: Callable[[int], None] = lambda n: None,
) -> str:
    """Write ``pieces`` to one file and return its SHA-256; ``written`` is told the bytes of each tensor as it is done.

    Tensors are ordered by element size, largest first, so that every one is aligned, as the format's own writer does.
    """
    ordered = sorted(pieces, key=lambda item: -item[1].dtype.itemsize)
    header: dict[str, object] = {"__metadata__": metadata}
    offset = 0
    for name, piece in ordered:
        size = nbytes(piece)
        header[name] = {
            "dtype": DTYPE_NAMES[piece.dtype],
            "shape": list(piece.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8)
    head = struct.pack("<Q", len(text)) + text
    digest = hashlib.sha256(head)
    with path.open("wb", buffering=0) as file:
        file.truncate(len(head) + offset)  # known to grow, a file grows slower (docs/log.md)
        file.write(head)
        for name, piece in ordered:
            size = 0
            for chunk in piece.chunks(buffer):
                assert chunk.dtype == piece.dtype, name
                size += chunk.numel() * chunk.itemsize
                if chunk.numel():
                    data = memoryview(chunk.view(torch.uint8).numpy())
                    digest.update(data)  # while it is in the cache; in a thread it took longer (docs/log.md)
                    _write(file, data)
            assert size == nbytes(piece), name
            written(size)
    return digest.hexdigest()


def _write(file: RawIOBase, data: memoryview) -> None:
    """Write all of ``data``: raw files may write less than they are given, and large writes are slow (docs/log.md)."""
    while data:
        data = data[file.write(data[:BUFFER_BYTES]) :]


def write_weights(
    folder: Path,
    pieces: dict[str, Piece],
    metadata: dict[str, str],
    max_shard_bytes: int,
    written: Callable[[int], None] = lambda n: None,
    variant: str | None = None,
) -> dict[str, str]:
    """Write a diffusers weights folder: one file, or shards with an index; returns file name -> SHA-256 of weights.

    ``variant`` goes into the names, where diffusers looks for what it calls so.
    """
    shards: list[dict[str, Piece]] = [{}]
    size = 0
    for name, piece in pieces.items():
        if shards[-1] and size + nbytes(piece) > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = piece
        size += nbytes(piece)
    stem = "diffusion_pytorch_model" + (f".{variant}" if variant else "")
    if len(shards) == 1:
        name = f"{stem}.safetensors"
        return {name: write_safetensors(folder / name, shards[0].items(), metadata, written)}
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    digests = {
        name: write_safetensors(folder / name, shard.items(), metadata, written)
        for name, shard in zip(names, shards, strict=True)
    }
    index = {
        "metadata": {"total_size": sum(map(nbytes, pieces.values()))},
        "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
    }
    listing = f"diffusion_pytorch_model.safetensors.index.{f'{variant}.' if variant else ''}json"
    (folder / listing).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return digests
