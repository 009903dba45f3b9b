"""Training data: shards of clean samples with labels, and the order in which a run meets them."""

import hashlib
import itertools
import signal
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch.utils.data import DataLoader, Dataset, Sampler

from upcycle.errors import UpcycleError
from upcycle.recipe import Recipe
from upcycle.training.digits import load_digits


class TensorData:
    """Clean samples ``x0`` [N, C, H, W] with ``labels`` [N], held in memory."""

    flips = has_posterior = False

    def __init__(self, x0: torch.Tensor, labels: torch.Tensor):
        self.x0, self.labels = x0, labels
        self.sample_shape = tuple(x0.shape[1:])

    def __len__(self) -> int:
        return len(self.labels)

    def row(self, index: int, *, flip: bool, noise: torch.Tensor | None) -> torch.Tensor:
        """A sample, fp32 [C, H, W]; these have neither flips nor a posterior."""
        return self.x0[index].float()


class LatentFolder:
    """Safetensors shards with ``z0`` [n, C, H, W] and ``label`` [n]; rows are read when they are asked for."""

    flips = has_posterior = False

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

    def row(self, index: int, *, flip: bool, noise: torch.Tensor | None) -> torch.Tensor:
        """A sample, fp32 [C, H, W]; these have neither flips nor a posterior."""
        shard = bisect_right(self._ends, index)
        start = self._ends[shard - 1] if shard else 0
        return self._files[shard].get_slice("z0")[index - start].float()


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


def open_data(spec: str) -> TensorData | LatentFolder:
    """The data of a recipe: ``digits`` or ``digits-val`` (the shipped splits), or a folder of shards."""
    if spec in ("digits", "digits-val"):
        return TensorData(*load_digits("val" if spec == "digits-val" else "train"))
    folder = Path(spec)
    if not folder.is_dir():
        raise UpcycleError(f"data {spec} is neither 'digits' nor a folder of *.safetensors shards with z0 and label")
    return LatentFolder(folder)


@dataclass(frozen=True)
class Batch:
    """What a step draws for some samples: x0 and noise [b, C, H, W], timestep and label int64 [b]."""

    x0: torch.Tensor
    noise: torch.Tensor
    timestep: torch.Tensor
    label: torch.Tensor

    def pin_memory(self) -> "Batch":
        """In pinned memory, from which it travels to a GPU while that computes (the DataLoader calls this)."""
        return Batch(**{name: tensor.pin_memory() for name, tensor in vars(self).items()})

    def to(self, device: torch.device) -> "Batch":
        """On ``device``."""
        return Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in vars(self).items()})

    def parts(self, number: int) -> list["Batch"]:
        """``number`` batches of consecutive samples, all of one size."""
        chunks = zip(*(tensor.chunk(number) for tensor in vars(self).values()), strict=True)
        return [Batch(*chunk) for chunk in chunks]


class Draws(Dataset[Batch]):
    """The samples of a run in the order in which it meets them: item ``i`` is sample ``i % batch_size`` of step
    ``i // batch_size``.

    Every row comes once an epoch, shuffled by (seed, epoch); steps run across the ends of epochs, so that none is left
    out. All that is random about an item depends on (seed, i) alone: neither ranks, nor workers, nor an interruption
    change a run.
    """

    def __init__(self, data: TensorData | LatentFolder, recipe: Recipe, timesteps: int, null_class: int):
        self._data, self._timesteps, self._null_class = data, timesteps, null_class
        self._seed, self._label_dropout = recipe.seed, recipe.label_dropout

    def row(self, item: int) -> int:
        """The row of the data that item ``item`` holds."""
        epoch, offset = divmod(item, len(self._data))
        return int(_epoch_order(len(self._data), epoch, self._seed)[offset])

    def __getitem__(self, item: int) -> Batch:
        # torch's CPU generator takes 32 bits of a seed: mixed, so that neighbours share nothing.
        digest = hashlib.blake2b(f"{self._seed} {item}".encode(), digest_size=4).digest()
        random = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
        timestep = torch.randint(0, self._timesteps, (), generator=random)
        # Labels are dropped here and not in the model: diffusers would draw anew in every block.
        dropped, flipped = torch.rand(2, generator=random) < torch.tensor([self._label_dropout, 0.5])
        row, shape = self.row(item), self._data.sample_shape
        posterior = torch.randn(shape, generator=random) if self._data.has_posterior else None
        x0 = self._data.row(row, flip=bool(flipped) and self._data.flips, noise=posterior)
        label = torch.tensor(self._null_class) if dropped else self._data.labels[row]
        return Batch(x0, torch.randn(shape, generator=random), timestep, label)


class _Share(Sampler[list[int]]):
    """The items of one rank, a list a step: consecutive samples of the whole batch."""

    def __init__(self, batch_size: int, first_step: int, rank: int, ranks: int):
        self._size, self._first, self._share, self._rank = batch_size, first_step, batch_size // ranks, rank

    def __iter__(self) -> Iterator[list[int]]:
        for step in itertools.count(self._first):
            start = step * self._size + self._rank * self._share
            yield list(range(start, start + self._share))


def batches(draws: Draws, recipe: Recipe, first_step: int, rank: int, ranks: int, *, pin: bool = False) -> DataLoader:
    """One rank's `Batch` of every step from ``first_step`` on, without end; ``data_workers`` processes read ahead."""
    return DataLoader(
        draws,
        batch_sampler=_Share(recipe.batch_size, first_step, rank, ranks),
        num_workers=recipe.data_workers,
        collate_fn=_stack,
        pin_memory=pin,
        worker_init_fn=_outlive_signals,
        generator=torch.Generator(),  # by default every start of a run would draw from the generator that is saved
    )


def _stack(items: list[Batch]) -> Batch:
    return Batch(**{name: torch.stack([getattr(item, name) for item in items]) for name in vars(items[0])})


def _outlive_signals(worker: int) -> None:
    """Ctrl-C and a scheduler's SIGTERM reach every process; the run decides when its workers end (by a SIGTERM too)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL) and None)


@lru_cache(2)
def _epoch_order(count: int, epoch: int, seed: int) -> torch.Tensor:
    digest = hashlib.blake2b(f"epoch {seed} {epoch}".encode(), digest_size=4).digest()
    return torch.randperm(count, generator=torch.Generator().manual_seed(int.from_bytes(digest, "little")))
