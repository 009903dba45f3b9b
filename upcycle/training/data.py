"""Training data: shards of clean samples with labels, and the order in which a run meets them."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from upcycle.errors import UpcycleError
from upcycle.training.digits import load_digits


class TensorData:
    """Clean samples ``x0`` [N, C, H, W] with ``labels`` [N], held in memory."""

    def __init__(self, x0: torch.Tensor, labels: torch.Tensor):
        self.x0, self.labels = x0, labels
        self.sample_shape = tuple(x0.shape[1:])

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples fp32 [n, C, H, W] and labels int64 [n]."""
        return self.x0[indices].float(), self.labels[indices]


class ShardedData:
    """Safetensors shards with ``z0`` [n, C, H, W] and ``label`` [n]; rows are read when they are asked for."""

    def __init__(self, folder: Path):
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise UpcycleError(f"data {folder} holds no *.safetensors shards with z0 and label")
        self._files, lengths, shapes, labels = [], [], set(), []
        for path in paths:
            try:
                file = safe_open(path, "pt")
                missing = {"z0", "label"} - set(file.keys())
                if missing:
                    raise UpcycleError(f"data {path} lacks the tensor {' and '.join(sorted(missing))}")
                shape = file.get_slice("z0").get_shape()
                label = file.get_tensor("label")
            except (SafetensorError, OSError) as error:
                raise UpcycleError(f"data {path} is not a readable safetensors file: {error}") from error
            _check_shard(path, shape, label)
            labels.append(label.long())
            self._files.append(file)
            lengths.append(shape[0])
            shapes.add(tuple(shape[1:]))
        if len(shapes) > 1:
            raise UpcycleError(f"data {folder} mixes sample shapes {sorted(shapes)}; one run needs one shape")
        self.sample_shape = shapes.pop()
        self.labels = torch.cat(labels)
        self._ends = list(accumulate(lengths))

    def __len__(self) -> int:
        return self._ends[-1]

    def rows(self, indices: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples fp32 [n, C, H, W] and labels int64 [n]."""
        out = []
        for index in indices:
            shard = bisect_right(self._ends, index)
            start = self._ends[shard - 1] if shard else 0
            out.append(self._files[shard].get_slice("z0")[index - start].float())
        return torch.stack(out), self.labels[indices]


def _check_shard(path: Path, shape: list[int], label: torch.Tensor) -> None:
    if len(shape) != 4 or 0 in shape:
        raise UpcycleError(
            f"data {path} has z0 of shape {list(shape)}; it must be [N, C, H, W] with at least one sample"
        )
    if label.dim() != 1 or label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
        kind = str(label.dtype).removeprefix("torch.")
        raise UpcycleError(f"data {path} has label of {kind} {list(label.shape)}; it must be whole numbers, [N]")
    if len(label) != shape[0]:
        raise UpcycleError(f"data {path} has {shape[0]} samples and {len(label)} labels; write one label a sample")


def open_data(spec: str) -> TensorData | ShardedData:
    """The data of a recipe: ``digits`` (the shipped training split) or a folder of shards."""
    if spec == "digits":
        return TensorData(*load_digits("train"))
    folder = Path(spec)
    if not folder.is_dir():
        raise UpcycleError(f"data {spec} is neither 'digits' nor a folder of *.safetensors shards with z0 and label")
    return ShardedData(folder)


@lru_cache(2)
def _epoch_order(count: int, epoch: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def batch_rows(count: int, batch: int, step: int, seed: int) -> list[int]:
    """Row numbers of the batch of one step: every row once an epoch, shuffled by (seed, epoch), without any state.

    Batches run across the ends of epochs, so that no row is left out.
    """
    rows: list[int] = []
    position = step * batch
    while len(rows) < batch:
        epoch, offset = divmod(position + len(rows), count)
        rows += _epoch_order(count, epoch, seed)[offset : offset + batch - len(rows)].tolist()
    return rows
