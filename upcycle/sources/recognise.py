"""What checkpoints without a config leave to be read off their tensors."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from upcycle.errors import UpcycleError
from upcycle.sources.tensors import LazyTensor

# Attention heads of the published sizes (S, B, L, XL) by their width.
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}


def shape_of(spec: str, tensors: Mapping[str, LazyTensor], name: str, rank: int) -> tuple[int, ...]:
    """Shape of a tensor that must be there with `rank` dimensions, none of them empty; raises `UpcycleError`."""
    if name not in tensors:
        raise UpcycleError(f"{spec}: tensor {name} is missing; the file is incomplete or of another model")
    shape = tensors[name].shape
    if len(shape) != rank or 0 in shape:
        raise UpcycleError(f"{spec}: tensor {name} is {list(shape)}, which no DiT has; the file is of another model")
    return shape


def count_layers(names: Iterable[str], prefix: str) -> int:
    """How many different numbers follow `prefix`. A gap in them shows up as missing tensors later."""
    pattern = re.compile(re.escape(prefix) + r"(\d+)\.")
    return len({match[1] for name in names if (match := pattern.match(name))})


def square_root(spec: str, name: str, positions: int) -> int:
    """Side of the square grid that `positions` make up."""
    side = math.isqrt(positions)
    if side * side != positions:
        raise UpcycleError(f"{spec}: {name} has {positions} positions, which make no square; only square grids work")
    return side


def choose_heads(spec: str, width: int, given: int | None, stated: Any, notes: list[str]) -> int:
    """Attention heads, which no tensor tells: as given by the user, stated in the file, or known for that width.

    Anything else is a guess and goes into `notes`. Raises `UpcycleError` if the heads do not divide the width.
    """
    if given is not None:
        if given < 1 or width % given:
            raise UpcycleError(f"{spec}: --heads {given} does not divide the width {width}; give a divisor")
        return given
    if type(stated) is int and stated > 0 and width % stated == 0:
        return stated
    if width in HEADS:
        return HEADS[width]
    head_dim = 64 if width >= 256 and width % 64 == 0 else 32
    if width % head_dim:
        raise UpcycleError(f"{spec}: the number of attention heads is not known for width {width}; pass --heads")
    notes.append(f"assumed {width // head_dim} attention heads for width {width}; pass --heads if that is wrong")
    return width // head_dim


def setting(settings: Any, *path: str) -> Any:
    """A field of nested settings, which are inert objects or dicts; None where it is absent."""
    for key in path:
        settings = settings.get(key) if isinstance(settings, Mapping) else getattr(settings, key, None)
    return settings
