"""The header of a safetensors file, read and checked by hand.

`safetensors.safe_open` maps the whole file; the header gives every offset, so the tensors can be read one by one.
"""

import json
import math
from pathlib import Path
from typing import Any

import torch

from upcycle.errors import UpcycleError
from upcycle.sources.tensors import FilePlace, LazyTensor

# The format's own limit on the header.
_MAX_HEADER = 100_000_000

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Names, shapes, dtypes and places of the tensors in `path`; reads the header only.

    Raises `UpcycleError` if the file is truncated, or the header is not exactly what the format allows: every byte
    after the header belongs to one tensor, and no byte to two.
    """
    header, start, size = _header(path)
    header.pop("__metadata__", None)
    tensors = {}
    spans = []
    for name, entry in header.items():
        shape, dtype, begin, end = _entry(path, name, entry)
        spans.append((begin, end, name))
        tensors[name] = LazyTensor(name, shape, dtype, FilePlace(path, start + begin))
    reached = 0
    for begin, end, name in sorted(spans):
        if begin != reached:
            raise _damaged(path, f"tensor {name} {'overlaps another' if begin < reached else 'leaves a gap before it'}")
        reached = end
    if start + reached != size:
        raise _damaged(path, f"{size} bytes instead of {start + reached}")
    return tensors


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that the file `path` carries beside its tensors; raises `UpcycleError` as `read_safetensors` does."""
    metadata = _header(path)[0].get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "its metadata are not texts")
    return metadata


def _header(path: Path) -> tuple[dict[str, Any], int, int]:
    """The header as it stands, where the data begin, and the size of the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise _damaged(path, "the header is cut off")
            raw = file.read(length)
    except OSError as error:
        raise UpcycleError(f"{path}: cannot be read ({error.strerror}); check the file") from error
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "the header is not valid JSON") from error
    if not isinstance(header, dict):
        raise _damaged(path, "the header is not a table of tensors")
    return header, 8 + length, size


def _entry(path: Path, name: str, entry: Any) -> tuple[tuple[int, ...], torch.dtype, int, int]:
    """One checked line of the header: shape, dtype, first byte and end, counted from the end of the header."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _damaged(path, f"tensor {name} is not described properly")
    shape, offsets, dtype = entry["shape"], entry["data_offsets"], entry["dtype"]
    if not (_naturals(shape) and _naturals(offsets) and len(offsets) == 2):
        raise _damaged(path, f"tensor {name} has no proper shape or offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UpcycleError(f"{path}: tensor {name} is of type {dtype!r}; only fp64, fp32, fp16 and bf16 can be used")
    begin, end = offsets
    if end - begin != math.prod(shape) * DTYPES[dtype].itemsize:
        raise _damaged(path, f"tensor {name} has {end - begin} bytes, which does not fit its shape {shape}")
    return tuple(shape), DTYPES[dtype], begin, end


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name occurs twice")
    return table


def _damaged(path: Path, what: str) -> UpcycleError:
    return UpcycleError(f"{path}: truncated or corrupt safetensors ({what}); fetch the file again")
