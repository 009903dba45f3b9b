"""Tensors that stay on disk until they are wanted.

Files are read with plain `readinto` at known offsets, never through mmap: pages of a mapped file count as resident
memory, and converting a 2.7 GB checkpoint must stay below 1 GB.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from upcycle.errors import UpcycleError

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class FilePlace:
    """Where a tensor lies in a file: its first byte and, unless it is contiguous, its strides in elements."""

    path: Path
    offset: int
    stride: tuple[int, ...] | None = None


@dataclass(frozen=True)
class LazyTensor:
    """A tensor of known name, shape and dtype whose values are read by `load()` only.

    `place` is a span of a file, or the tensor itself where a format cannot be read piece by piece.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    place: FilePlace | torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes that `load()` returns."""
        return math.prod(self.shape) * self.dtype.itemsize

    def load(self) -> torch.Tensor:
        """Read the values now, into memory of their own: contiguous, on the CPU, in the file's dtype.

        Raises `UpcycleError` if the file has become shorter or unreadable since it was opened.
        """
        if isinstance(self.place, torch.Tensor):
            return self.place.detach().clone(memory_format=torch.contiguous_format)
        stride = self.place.stride
        numel = math.prod(self.shape) if stride is None else span_of(self.shape, stride)
        data = torch.empty(numel * self.dtype.itemsize, dtype=torch.uint8)
        for _ in _read(self.place, numel * self.dtype.itemsize, data):
            pass
        if stride is None:
            return data.view(self.dtype).reshape(self.shape)
        return data.view(self.dtype).as_strided(self.shape, stride).clone(memory_format=torch.contiguous_format)

    def chunks(self, buffer: torch.Tensor) -> Iterator[torch.Tensor]:
        """The values as `load()` returns them, flat and in order, but at most ``len(buffer)`` bytes at a time.

        ``buffer``: uint8, its length a multiple of 8. A chunk is read into it and holds until the next one is asked
        for; a tensor that lies strided or in memory comes as one chunk of its own. Raises as `load()` does.
        """
        if isinstance(self.place, torch.Tensor) or self.place.stride is not None:
            yield self.load().flatten()
        else:
            for count in _read(self.place, self.nbytes, buffer):
                yield buffer[:count].view(self.dtype)

    def renamed(self, name: str) -> "LazyTensor":
        """The same tensor under another name."""
        return replace(self, name=name)

    def rows(self, name: str, start: int, stop: int) -> "LazyTensor":
        """Rows start..stop−1 of the first dimension under a new name; reading them reads nothing else."""
        shape = (stop - start, *self.shape[1:])
        if isinstance(self.place, torch.Tensor):
            return LazyTensor(name, shape, self.dtype, self.place[start:stop])
        step = math.prod(self.shape[1:]) if self.place.stride is None else self.place.stride[0]
        place = replace(self.place, offset=self.place.offset + start * step * self.dtype.itemsize)
        return LazyTensor(name, shape, self.dtype, place)


def span_of(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Elements of storage from the first to the last one that a strided tensor touches; 0 for an empty tensor."""
    if math.prod(shape) == 0:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _read(place: FilePlace, size: int, buffer: torch.Tensor) -> Iterator[int]:
    """Fill ``buffer`` with the next of the ``size`` bytes from ``place`` on, again and again; yields how many."""
    try:
        with place.path.open("rb", buffering=0) as file:
            file.seek(place.offset)
            while size:
                want = min(size, len(buffer))
                view = memoryview(buffer.numpy())[:want]
                while view:  # the kernel hands out at most 2 GiB a call
                    count = file.readinto(view)
                    if not count:
                        raise UpcycleError(f"{place.path}: ends early; the file is truncated, fetch it again")
                    view = view[count:]
                size -= want
                yield want
    except OSError as error:
        raise UpcycleError(f"{place.path}: cannot be read ({error.strerror}); check the file") from error


def check_finite(name: str, tensor: torch.Tensor, *, source: str = "") -> None:
    """Raise `UpcycleError` naming the tensor if any of its values is NaN or infinite.

    One pass in the common case: a finite sum has finite terms. The exact count is made only when the sum is not
    finite, which large finite values can cause as well.
    """
    if not tensor.is_floating_point() or torch.isfinite(tensor.sum(dtype=torch.float32)):
        return
    nans = int(torch.isnan(tensor).sum())
    infinite = int(torch.isinf(tensor).sum())
    if nans or infinite:
        where = f"{source}: " if source else ""
        raise UpcycleError(
            f"{where}tensor {name} holds {nans} NaN and {infinite} infinite values of {tensor.numel()}; "
            "the checkpoint is damaged, fetch it again or take an earlier one"
        )


def check_tensors(spec: str, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, LazyTensor]) -> None:
    """Compare names, shapes and dtypes with what a config promises, without reading data.

    Raises `UpcycleError` with one line that names the first three tensors of each kind of fault, and their number.
    """
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    both = [(name, shape, found[name]) for name, shape in expected.items() if name in found]
    misshaped = [
        f"{name} is {list(tensor.shape)} instead of {list(shape)}"
        for name, shape, tensor in both
        if tensor.shape != shape
    ]
    mistyped = [
        f"{name} is {str(tensor.dtype).removeprefix('torch.')}"
        for name, _, tensor in both
        if tensor.dtype not in FLOATS
    ]
    faults = [
        f"{len(items)} {what} ({', '.join(items[:3])}{', …' if len(items) > 3 else ''})"
        for what, items in (
            ("missing", missing),
            ("unexpected", extra),
            ("of another shape", misshaped),
            ("not floating point", mistyped),
        )
        if items
    ]
    if faults:
        raise UpcycleError(
            f"{spec}: the tensors are not those of the DiT described: {'; '.join(faults)}; "
            "the file is incomplete or of another model"
        )
