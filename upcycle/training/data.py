"""Training data, and the order in which a run meets it."""

import hashlib
import itertools
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from upcycle.errors import UpcycleError
from upcycle.latents.reader import LatentFolder
from upcycle.recipe import Recipe
from upcycle.sources import DiTConfig
from upcycle.training.digits import load_digits


class TensorData:
    """Clean samples ``x0`` [N, C, H, W] with ``labels`` [N], held in memory."""

    flips = has_posterior = False

    def __init__(self, x0: torch.Tensor, labels: torch.Tensor, name: str = "digits"):
        self.x0, self.labels, self.name = x0, labels, name
        self.sample_shape = tuple(x0.shape[1:])

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def fingerprint(self) -> str:
        """What a continued run must find again."""
        return f"{len(self)} samples of {self.name}"

    def row(self, index: int, *, flip: bool, noise: torch.Tensor | None) -> torch.Tensor:
        """A sample, fp32 [C, H, W]; these have neither flips nor a posterior."""
        return self.x0[index].float()

    def check_fits(self, config: DiTConfig, vae_config: Mapping[str, Any] | None = None) -> None:
        """Raise `UpcycleError` unless a teacher can be trained on these samples, as `LatentFolder.check_fits` does."""
        expected = (config.in_channels, config.sample_size, config.sample_size)
        if self.sample_shape != expected or int(self.labels.max()) >= config.num_classes:
            raise UpcycleError(
                f"data {self.name} has samples of {list(self.sample_shape)} in {int(self.labels.max()) + 1} classes "
                f"and the teacher takes {list(expected)} in {config.num_classes}; choose other data"
            )


def open_data(spec: str) -> TensorData | LatentFolder:
    """The data of a recipe: ``digits`` or ``digits-val`` (the shipped splits), or a folder of shards."""
    if spec in ("digits", "digits-val"):
        return TensorData(*load_digits("val" if spec == "digits-val" else "train"), spec)
    return LatentFolder(spec)


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

    def __init__(self, data: TensorData | LatentFolder, recipe: Recipe, timesteps: int, null_class: int | None):
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
        drop = bool(dropped) and self._null_class is not None  # not every text model has an empty prompt
        label = torch.tensor(self._null_class) if drop else self._data.labels[row]
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
