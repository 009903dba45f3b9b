"""Reading folders of latents: rows at random, without loading a shard."""

import hashlib
import os
import re
from bisect import bisect_right
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from upcycle.errors import UpcycleError
from upcycle.latents.folder import INDEX, read_index
from upcycle.sources.description import DiTConfig
from upcycle.sources.vae import describe_vae


class LatentFolder:
    """What `upcycle encode` or `upcycle synthesize` wrote, or a bare folder of shards with ``z0`` and ``label``.

    Shards are mapped into memory when a row of theirs is first read, in every process anew: the object may be pickled
    or forked to the workers of a DataLoader.

    Attributes:
        sample_shape: (C, H, W) of a row.
        labels: int64 [N].
        num_classes: as the index says; for a bare folder, the largest label + 1.
        flips: whether rows can be had flipped.
        has_posterior: whether rows are distributions, which ``noise`` draws from.
        index: what ``index.json`` holds; None for a bare folder.

    Raises:
        UpcycleError: nothing to read, an unfinished folder, or shards that are damaged or do not fit together.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        if not os.path.isdir(self.path):
            raise UpcycleError(f"data {path}: no such folder; make one with upcycle encode or upcycle synthesize")
        self.index = read_index(self.path) if os.path.isfile(self.path / INDEX) else None
        paths = sorted(self.path.glob("*.safetensors")) if self.index is None else _listed(self.path, self.index)
        if not paths:
            raise UpcycleError(
                f"data {path} holds no *.safetensors shards; make some with upcycle encode or upcycle synthesize"
            )
        videos = bool((self.index or {}).get("prompts"))  # of models that read text, samples may be [C, F, H, W]
        shards = [_open_shard(shard, may_be_empty=self.index is not None, videos=videos) for shard in paths]
        shapes = {shape for shape, _, _ in shards}
        if len(shapes) > 1:
            raise UpcycleError(f"data {path} mixes sample shapes {sorted(shapes)}; one run needs one shape")
        kinds = {names for _, names, _ in shards}
        if len(kinds) > 1:
            raise UpcycleError(f"data {path} mixes shards with different tensors; make them all in one way")
        names = kinds.pop()
        self.sample_shape = shapes.pop()
        self.labels = torch.cat([label for _, _, label in shards])
        self.has_posterior = "mean" in names
        self.flips = ("mean_flip" if self.has_posterior else "z0_flip") in names
        top = int(self.labels.max())
        self.num_classes = top + 1 if self.index is None else int(self.index["num_classes"])
        if self.labels.min() < 0 or (self.index is not None and top >= self.num_classes):
            raise UpcycleError(f"data {path} has labels outside 0..{self.num_classes - 1}; make the shards again")
        self._paths = paths
        self._ends = list(accumulate(len(label) for _, _, label in shards))
        self._files: dict[int | str, Any] = {}

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    @property
    def fingerprint(self) -> str:
        """What a continued run must find again: the number of samples, and a digest of the shards (by their hashes, or
        in a bare folder by names and sizes)."""
        known = [entry["sha256"] for entry in (self.index or {}).get("shards", [])]
        told = known or [f"{path.name} {path.stat().st_size}" for path in self._paths]
        return f"{len(self)} samples in shards {hashlib.sha256(' '.join(told).encode()).hexdigest()[:12]}"

    @property
    def vae(self) -> dict[str, Any] | None:
        """What the index says about the VAE; see `describe_vae`."""
        return None if self.index is None else self.index.get("vae")

    def row(self, index: int, *, flip: bool = False, noise: torch.Tensor | None = None) -> torch.Tensor:
        """A sample in the model's scale, fp32 [C, H, W].

        Args:
            index: 0 to N − 1.
            flip: that of the image flipped left to right; only where the folder has flips.
            noise: standard normal [C, H, W], with which the posterior is drawn from; None gives its mean. Unused
                without a posterior.
        """
        assert not flip or self.flips, "check .flips first"
        shard = bisect_right(self._ends, index)
        place = index - (self._ends[shard - 1] if shard else 0)
        if shard not in self._files:
            self._files[shard] = safe_open(self._paths[shard], "pt")
        file, suffix = self._files[shard], "_flip" if flip else ""
        if not self.has_posterior:
            return file.get_slice(f"z0{suffix}")[place].float()
        mean = file.get_slice(f"mean{suffix}")[place].float()
        return mean if noise is None else mean + file.get_slice(f"std{suffix}")[place].float() * noise

    def check_fits(self, config: DiTConfig, vae_config: Mapping[str, Any] | None = None) -> None:
        """Raise `UpcycleError` unless a teacher can be trained on these samples.

        Args:
            config: the teacher's.
            vae_config: ``config.json`` of the teacher's VAE, where it has one; compared with the VAE of the index.
        """
        theirs = describe_vae(vae_config) if vae_config and self.vae else {}
        differ = [
            f"{name} {self.vae[name]}, the teacher's has {value}"
            for name, value in theirs.items()
            if self.vae and name in self.vae and self.vae[name] != value
        ]
        if differ:
            raise UpcycleError(
                f"data {self.path} was made with a VAE of {'; '.join(differ)}; make it again with the teacher's VAE"
            )
        expected = (config.in_channels, config.sample_size, config.sample_size)
        if self.sample_shape != expected:
            size = (self.index or {}).get("size")
            again = f"--size {size * config.sample_size // self.sample_shape[1]}" if size else "data of the right size"
            wrong_channels = self.sample_shape[0] != config.in_channels
            advice = "the VAE of the teacher" if wrong_channels else again
            raise UpcycleError(
                f"data {self.path} has samples of {list(self.sample_shape)} and the teacher takes {list(expected)}; "
                f"make it again with {advice}"
            )
        if int(self.labels.max()) >= config.num_classes:
            raise UpcycleError(
                f"data {self.path} has labels outside 0..{config.num_classes - 1}, the teacher's classes; "
                "leave the other classes out"
            )
        # Without names the number is a guess from the labels that occur.
        if self.index and self.index.get("classes") and self.num_classes != config.num_classes:
            raise UpcycleError(
                f"data {self.path} has {self.num_classes} classes and the teacher {config.num_classes}: their labels "
                "do not mean the same; encode with a sub-folder for each of the teacher's classes, empty ones included"
            )

    def verify(self) -> None:
        """Compare every shard with the hash in the index; raises `UpcycleError` naming the first that differs."""
        for entry in (self.index or {}).get("shards", []):
            with (self.path / entry["file"]).open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                    raise UpcycleError(f"data {self.path / entry['file']} is damaged; delete it and make it again")


def _listed(folder: Path, index: dict[str, Any]) -> list[Path]:
    """The shards of an index, all there and of the right length."""
    again = f"finish it with: {index['command']}" if index.get("command") else "run the command that made it again"
    try:
        entries = [(str(entry["file"]), int(entry["bytes"])) for entry in index["shards"]]
        complete, _ = index["complete"], int(index["num_classes"])
    except (KeyError, TypeError, ValueError) as error:
        raise UpcycleError(f"data {folder / INDEX} is damaged; make the latents again") from error
    if complete is not True:
        raise UpcycleError(f"data {folder} is not complete, it has {index.get('count')} samples; {again}")
    for name, size in entries:
        # An index may come from a stranger: it must not make us read files elsewhere.
        if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", name):
            raise UpcycleError(f"data {folder / INDEX} names {name!r}, which is no shard beside it; refused")
        path = folder / name
        if not os.path.isfile(path) or path.stat().st_size != size:
            what = "cut off" if os.path.isfile(path) else "missing"
            raise UpcycleError(f"data {path} is {what}; {again}")
    return [folder / name for name, _ in entries]


def _open_shard(
    path: Path, may_be_empty: bool, videos: bool = False
) -> tuple[tuple[int, ...], frozenset[str], torch.Tensor]:
    """Sample shape, names of the sample tensors, and labels int64 [n] of a shard, checked."""
    try:
        with safe_open(path, "pt") as file:
            names = frozenset(file.keys()) - {"label", "seed"}
            if "label" not in file.keys() or not ({"z0"} <= names or {"mean", "std"} <= names):  # noqa: SIM118
                found = ", ".join(sorted(file.keys())) or "nothing"
                raise UpcycleError(f"data {path} holds {found}; it must hold label, and z0 or mean and std")
            names &= {f"{name}{flip}" for name in ("z0", "mean", "std") for flip in ("", "_flip")}
            slices = {name: file.get_slice(name) for name in names}
            shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
            kinds = {name: part.get_dtype() for name, part in slices.items()}
            label = file.get_tensor("label")
    except (SafetensorError, OSError) as error:
        raise UpcycleError(f"data {path} is not a readable safetensors file ({error}); make it again") from error
    main = "z0" if "z0" in names else "mean"
    shape = shapes[main]
    if len(shape) not in ((4, 5) if videos else (4,)) or 0 in shape[1:] or (0 in shape and not may_be_empty):
        raise UpcycleError(f"data {path} has {main} of {list(shape)}; it must be [N, C, H, W] with at least one sample")
    for name in sorted(names):
        if shapes[name] != shape:
            raise UpcycleError(
                f"data {path} has {name} of {list(shapes[name])} and {main} of {list(shape)}; they must agree"
            )
        if not kinds[name].startswith(("F", "BF")):
            raise UpcycleError(f"data {path} has {name} of {kinds[name]}; it must be floating point")
    if label.dim() != 1 or label.is_floating_point() or label.is_complex() or label.dtype == torch.bool:
        kind = str(label.dtype).removeprefix("torch.")
        raise UpcycleError(f"data {path} has label of {kind} {list(label.shape)}; it must be whole numbers, [N]")
    if len(label) != shape[0]:
        raise UpcycleError(f"data {path} has {shape[0]} samples and {len(label)} labels; write one label a sample")
    return shape[1:], names, label.long()
