"""A writer of `torch.save`'s zip format that streams (torch's own wants all tensors in memory)."""

import io
import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from upcycle.graft.writer import BUFFER_BYTES, Piece, nbytes

_ALIGNMENT = 64  # as torch's own, so that a file can be mapped into memory
_LOCAL_HEADER, _ZIP64_FIELD = 30, 20  # bytes before an entry's name, and of what `force_zip64` adds after it
_EXTRA = struct.Struct("<HH")


class _Storage:
    """Stands for the values of a piece; the pickle names it and the archive holds it apart."""

    def __init__(self, piece: Piece, key: int) -> None:
        self.piece, self.key = piece, key


class _Tensor:
    """Pickled as torch pickles a contiguous tensor: a call that its restricted reader allows."""

    def __init__(self, piece: Piece, key: int) -> None:
        self.storage = _Storage(piece, key)

    def __reduce__(self) -> tuple[Any, ...]:
        shape = tuple(self.storage.piece.shape)
        stride = torch.empty(shape, device="meta").stride()
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, shape, stride, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> tuple[Any, ...] | None:
        if not isinstance(obj, _Storage):
            return None
        name = torch.storage._dtype_to_storage_type_map()[obj.piece.dtype]
        return "storage", getattr(torch, name), str(obj.key), "cpu", torch.Size(obj.piece.shape).numel()


def write_torch_file(
    path: Path,
    pieces: Mapping[str, Piece],
    wrap: Callable[[dict[str, Any]], Any] = lambda state: state,
    written: Callable[[int], None] = lambda n: None,
) -> None:
    """Write what ``torch.save(wrap(state))`` would, where ``state`` has the tensors of ``pieces``, one at a time.

    ``wrap`` may put the state into other plain containers, also more than once: it is stored once.
    """
    tensors = {name: _Tensor(piece, key) for key, (name, piece) in enumerate(pieces.items())}
    text = io.BytesIO()
    _Pickler(text, protocol=2).dump(wrap(tensors))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in (("data.pkl", text.getvalue()), ("byteorder", b"little"), ("version", b"3\n")):
            archive.writestr(zipfile.ZipInfo(f"archive/{name}"), data)
        buffer = torch.empty(BUFFER_BYTES, dtype=torch.uint8)
        for tensor in tensors.values():
            piece = tensor.storage.piece
            info = zipfile.ZipInfo(f"archive/data/{tensor.storage.key}")
            info.file_size = nbytes(piece)
            info.extra = _padding(archive, info)
            size = 0
            with archive.open(info, "w", force_zip64=True) as file:
                for chunk in piece.chunks(buffer):
                    if chunk.numel():
                        size += file.write(memoryview(chunk.contiguous().view(torch.uint8).numpy()))
            assert size == nbytes(piece)
            written(size)


def _padding(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """An extra field that makes the data of the next entry begin at a multiple of `_ALIGNMENT`."""
    begin = archive.start_dir + _LOCAL_HEADER + len(info.filename) + _ZIP64_FIELD + _EXTRA.size
    size = -begin % _ALIGNMENT
    return _EXTRA.pack(0x4246, size) + b"Z" * size
