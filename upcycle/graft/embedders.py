"""diffusers' DiT keeps a copy of the timestep and label embedders in every block; a student stores them once."""

import re
from collections.abc import Mapping

import torch

from upcycle.sources.tensors import LazyTensor

_COPY = re.compile(r"transformer_blocks\.(\d+)\.norm1\.emb\.(.+)")


def merge_embedders(tensors: Mapping[str, LazyTensor]) -> tuple[dict[str, LazyTensor], int]:
    """Teacher's names -> student's names, and the number of embedders to store.

    The copies are compared first: where a fine-tune has split them, every block keeps its own (the student's
    ``num_embedders`` is then the number of blocks), since merging them would change the function.
    """
    copies: dict[str, dict[int, LazyTensor]] = {}
    out: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if match := _COPY.fullmatch(name):
            copies.setdefault(match[2], {})[int(match[1])] = tensor
        else:
            out[name] = tensor
    split = any(_differ(list(blocks.values())) for blocks in copies.values())
    number = len(next(iter(copies.values()))) if split else 1
    for name, blocks in copies.items():
        for block in range(number):
            out[f"embedders.{block}.{name}"] = blocks[block]
    return out, number


def _differ(copies: list[LazyTensor]) -> bool:
    first = copies[0].load()
    return any(not torch.equal(first, copy.load()) for copy in copies[1:])
