"""Tensors to write (`writer.Piece`): read from a source, made here, put together or in another precision.

All of them hand out their values in small chunks, so that no conversion or export holds a model in memory.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from upcycle.errors import UpcycleError
from upcycle.graft.writer import Piece
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.sources.tensors import LazyTensor, check_finite

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def dtype_name(dtype: torch.dtype | None) -> str | None:
    """The name that commands know a dtype by; None for None."""
    return next((name for name, known in DTYPES.items() if known == dtype), None)


@dataclass(frozen=True)
class FreshTensor:
    """A tensor that the source does not hold."""

    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def chunks(self, buffer: torch.Tensor) -> Iterator[torch.Tensor]:
        yield self.tensor.flatten()


@dataclass(frozen=True)
class ReusedTensor:
    """A tensor of the source, checked for NaN and infinity when it is read."""

    name: str
    source: LazyTensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.source.dtype

    def chunks(self, buffer: torch.Tensor) -> Iterator[torch.Tensor]:
        for chunk in self.source.chunks(buffer):
            check_finite(self.name, chunk)
            yield chunk


@dataclass(frozen=True)
class CastTensor:
    """A tensor in another precision; raises `UpcycleError` for values too large for it when it is read."""

    name: str
    source: Piece
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    def chunks(self, buffer: torch.Tensor) -> Iterator[torch.Tensor]:
        for chunk in self.source.chunks(buffer):
            cast = chunk.to(self.dtype)
            if cast.isinf().any():
                name = dtype_name(self.dtype)
                raise UpcycleError(
                    f"tensor {self.name} holds {chunk.abs().max().item():g}, and the largest number of {name} is "
                    f"{torch.finfo(self.dtype).max:g}; choose {'bf16 or fp32' if name == 'fp16' else 'fp32'}"
                )
            yield cast


@dataclass(frozen=True)
class JoinedTensor:
    """Tensors of one shape behind the first dimension, one below the other."""

    parts: tuple[Piece, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (sum(part.shape[0] for part in self.parts), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        assert len({part.dtype for part in self.parts}) == 1
        return self.parts[0].dtype

    def chunks(self, buffer: torch.Tensor) -> Iterator[torch.Tensor]:
        for part in self.parts:
            yield from part.chunks(buffer)


def reused(tensors: Mapping[str, LazyTensor], dtype: torch.dtype | None) -> dict[str, Piece]:
    """The tensors of a model in ``dtype`` (None: as they are), but what a `ChunkedDiT` keeps in fp32 in fp32."""
    out: dict[str, Piece] = {}
    for name, tensor in tensors.items():
        kept = not set(name.split(".")).isdisjoint(ChunkedDiT._keep_in_fp32_modules)
        wanted = torch.float32 if kept else dtype
        piece = ReusedTensor(name, tensor)
        same = dtype is None or not tensor.dtype.is_floating_point or wanted == tensor.dtype
        out[name] = piece if same or wanted is None else CastTensor(name, piece, wanted)
    return out
