"""Files written by `torch.save`, read without executing anything and without reading the data.

The pickle is read by torch's restricted reader (`weights_only=True`). Settings objects that training scripts store
beside the weights are replaced by `Inert`, a class of ours that only holds fields, so nothing is imported for them.
Loading to the meta device gives shapes, strides and, for zip files, each storage's offset in the file.
"""

import contextlib
import io
import pickle
import pickletools
import re
import struct
import sys
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from upcycle.errors import UpcycleError
from upcycle.sources.tensors import FilePlace, LazyTensor, span_of

# The settings classes that are known to lie beside weights: `config.py` of the DC-DiT code (old checkpoints may
# name classes that it has dropped since), Meta's `argparse.Namespace`, and paths among their fields.
_INERT_NAMES = re.compile(
    r"((\w+\.)*config|__main__)\.(Config|\w+Config)"
    r"|argparse\.Namespace"
    r"|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path"
)
# Not worth naming when something else in the pickle is refused.
_HARMLESS_NAMES = re.compile(r"torch\.|collections\.|builtins\.(set|bytearray|complex)$|_codecs\.encode$")


class Inert:
    """Stands in for a pickled settings object: holds its fields, runs nothing."""

    def __init__(self, *args: Any) -> None:
        self.args = args


class TorchFile:
    """The unpickled content of a checkpoint, with tensors that `lazy()` turns into readable ones."""

    def __init__(self, path: Path, content: Any, records: dict[int, int] | None) -> None:
        self.path = path
        self.content = content
        self._records = records  # offset → bytes of each storage; None: the tensors are in memory

    def lazy(self, name: str, tensor: torch.Tensor) -> LazyTensor:
        """`tensor`, which is part of `content`, as a `LazyTensor`.

        Raises `UpcycleError` if it is sparse or quantised, or reaches beyond its storage in the file.
        """
        if tensor.layout is not torch.strided or tensor.is_quantized:
            raise UpcycleError(f"{self.path}: tensor {name} is sparse or quantised; only dense ones can be used")
        shape = tuple(tensor.shape)
        if self._records is None:
            return LazyTensor(name, shape, tensor.dtype, tensor.detach())
        if tensor.numel() == 0:
            return LazyTensor(name, shape, tensor.dtype, FilePlace(self.path, 0))
        start = _offset(tensor)
        begin = tensor.storage_offset() * tensor.dtype.itemsize
        if begin + span_of(shape, tensor.stride()) * tensor.dtype.itemsize > self._records[start]:
            raise UpcycleError(f"{self.path}: tensor {name} reaches beyond its data; fetch the file again")
        stride = None if tensor.is_contiguous() else tensor.stride()
        return LazyTensor(name, shape, tensor.dtype, FilePlace(self.path, start + begin, stride))


def read_torch_file(path: Path) -> TorchFile:
    """Read what `torch.save` wrote; tensors stay on disk where the format allows it.

    The zip format (torch ≥ 1.6) is read lazily. The legacy format, compressed archives and archives of the other
    byte order are loaded into memory.

    Raises `UpcycleError` if the file is truncated or of another kind, or if its pickle names anything but tensors,
    plain containers and the known settings classes.
    """
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        records = _stored_records(path) if zipped else None
        imports = _imports(path, zipped)
    except OSError as error:
        raise UpcycleError(f"{path}: cannot be read ({error.strerror}); check the file") from error
    except Exception as error:  # a corrupt archive fails in many ways inside zipfile
        raise _damaged(path, error) from error
    if records is not None:
        try:
            content = _load(path, "meta", imports)
        except pickle.UnpicklingError as error:
            raise _refused(path, error, imports) from error
        except Exception:  # sparse tensors, or an order of records that torch does not expect
            content = None
        if content is not None and all(_offset(tensor) in records for tensor in _tensors(content) if tensor.numel()):
            return TorchFile(path, content, records)
    try:
        return TorchFile(path, _load(path, "cpu", imports), None)
    except pickle.UnpicklingError as error:
        raise _refused(path, error, imports) from error
    except Exception as error:  # malformed pickles raise whatever their contents lead to
        raise _damaged(path, error) from error


def _stored_records(path: Path) -> dict[int, int] | None:
    """Offset → size of each storage in the archive; None if they cannot be read in place."""
    records = {}
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        for info in archive.infolist():
            if info.filename.endswith("/byteorder") and archive.read(info).decode() != sys.byteorder:
                return None
            if "/data/" not in info.filename:
                continue
            if info.compress_type != zipfile.ZIP_STORED:
                return None
            # The local header repeats the name and has padding of its own, so the directory alone is not enough.
            file.seek(info.header_offset)
            name_length, extra_length = struct.unpack("<26xHH", file.read(30))
            records[info.header_offset + 30 + name_length + extra_length] = info.file_size
    return records


def _imports(path: Path, zipped: bool) -> list[str]:
    """Names that the pickle would import, found by disassembling it; those before the fault if it is malformed."""
    if zipped:
        with zipfile.ZipFile(path) as archive:
            stream = io.BytesIO(next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl")))
    else:
        with path.open("rb") as file:
            stream = io.BytesIO(file.read(1 << 24))  # a legacy file begins with its pickles, one after the other
    names: dict[str, None] = {}
    strings: list[str] = []
    with contextlib.suppress(Exception):  # not a pickle, or the end of the last one
        while True:
            for opcode, argument, _ in pickletools.genops(stream):
                if opcode.name in ("GLOBAL", "INST"):
                    names[str(argument).replace(" ", ".")] = None
                elif opcode.name == "STACK_GLOBAL":
                    names[".".join(strings[-2:])] = None
                elif isinstance(argument, str):
                    strings.append(argument)
    return list(names)


def _load(path: Path, device: str, imports: list[str]) -> Any:
    known = [(Inert, name) for name in imports if _INERT_NAMES.fullmatch(name)]
    with warnings.catch_warnings(), torch.serialization.safe_globals(known):
        warnings.simplefilter("ignore")  # the reader warns of pickle protocols it then reads or refuses
        return torch.load(path, map_location=device, weights_only=True)


def _offset(tensor: torch.Tensor) -> int:
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", -1)


def _tensors(content: Any) -> Iterator[torch.Tensor]:
    """Every dense tensor inside nested containers."""
    stack, seen = [content], set()
    while stack:
        item = stack.pop()
        if isinstance(item, torch.Tensor):
            if item.layout is torch.strided:
                yield item
        elif isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))  # a pickle can hold a list that contains itself
            stack.extend(item.values() if isinstance(item, dict) else item)


def _refused(path: Path, error: pickle.UnpicklingError, imports: list[str]) -> UpcycleError:
    """torch's reader met something that it does not trust. If nothing foreign is named, the pickle is just damaged."""
    foreign = [name for name in imports if not _HARMLESS_NAMES.match(name) and not _INERT_NAMES.fullmatch(name)]
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    if not named and not foreign:
        return _damaged(path, "its pickle is damaged, or of another protocol than 2")
    return UpcycleError(
        f"{path}: the pickle wants to run code: {named[1] if named else foreign[0]}; refused. Use a file that holds "
        "tensors only, or have it saved as safetensors where it was made"
    )


def _damaged(path: Path, reason: Exception | str) -> UpcycleError:
    first = (str(reason).strip().splitlines() or [type(reason).__name__])[0][:120]
    return UpcycleError(f"{path}: truncated, corrupt or not a checkpoint of torch.save ({first}); fetch the file again")
