"""Folders in diffusers' layout: a pipeline with a DiT or a student as its transformer, or the transformer alone."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
import yaml

from upcycle import provenance
from upcycle.errors import UpcycleError
from upcycle.sources.description import DiTConfig, Source, StudentConfig, dit_shapes
from upcycle.sources.dit_config import model_kind, read_dit_config
from upcycle.sources.safetensors_file import read_metadata, read_safetensors
from upcycle.sources.student import blank_student, shapes_of, student_options
from upcycle.sources.tensors import LazyTensor, check_tensors
from upcycle.sources.torch_file import read_torch_file
from upcycle.sources.weight_files import choose_file, read_json, shards_of

# Stock diffusers computes the position embedding; some old conversions stored it all the same.
IGNORED = {"pos_embed.pos_embed"}


@dataclass(frozen=True)
class Layout:
    """What the JSON files of a folder say. `subfolder` is "transformer", or "" where the folder is the transformer."""

    config: DiTConfig | StudentConfig
    subfolder: str
    model_index: dict[str, Any] | None


def identify(spec: str, folder: Path, names: Iterable[str]) -> Layout:
    """Read the JSON files of `folder`, which holds (or will hold) the files `names`, given relative to it.

    Raises `UpcycleError` that says what the folder is, if it is neither a DiT nor a student.
    """
    names = set(names)
    index = read_json(spec, folder / "model_index.json") if "model_index.json" in names else None
    if "transformer/config.json" in names:
        config = read_json(spec, folder / "transformer" / "config.json")
        return Layout(_read_config(spec, config), "transformer", index)
    if index is not None:
        parts = [str(entry[1]) for entry in index.values() if isinstance(entry, list) and len(entry) == 2]
        model = next((part for part in parts if "UNet" in part or "Transformer" in part), None)
        inside = f"with a {model}" if model else "without a transformer"
        raise UpcycleError(f"{spec}: is a {model_kind(index)} {inside}, not a class-conditional DiT; give one of those")
    if "config.json" in names:
        return Layout(read_dit_config(spec, read_json(spec, folder / "config.json")), "", None)
    checkpoints = sorted(name for name in names if name.endswith((".pt", ".pth", ".ckpt")))
    if checkpoints:
        shown = ", ".join(checkpoints[:4])
        raise UpcycleError(f"{spec}: no folder of diffusers, but it holds {shown}; give the path of that file instead")
    shown = ", ".join(sorted({name.split("/")[0] for name in names})[:4]) or "nothing"
    raise UpcycleError(
        f"{spec}: neither model_index.json nor config.json in it (it holds {shown}); give a diffusers folder"
    )


def open_folder(
    spec: str, folder: Path, *, variant: str | None, heads: int | None, name: str, revision: str | None = None
) -> Source:
    """Open a pipeline folder or a transformer folder; reads JSON files and headers only.

    Raises `UpcycleError` if it is another model, or its tensors are not those that its config describes.
    """
    names = list_files(spec, folder)
    layout = identify(spec, folder, names)
    config = layout.config
    student = isinstance(config, StudentConfig)
    stated = config.values["num_attention_heads"] if isinstance(config, StudentConfig) else config.num_attention_heads
    if heads is not None and heads != stated:
        raise UpcycleError(f"{spec}: its config says {stated} attention heads, not {heads}; leave --heads out")
    notes: list[str] = []
    transformer = folder / layout.subfolder
    chosen = choose_file(spec, inside(names, layout.subfolder), variant, notes)
    tensors: dict[str, LazyTensor] = {}
    for shard in shards_of(spec, transformer, chosen):
        if not (transformer / shard).is_file():
            raise UpcycleError(f"{spec}: {shard}, which {chosen} names, is not there; fetch the folder again")
        for tensor in read_weights(transformer / shard).values():
            if tensor.name in tensors:
                raise UpcycleError(f"{spec}: tensor {tensor.name} is in two shards; fetch the folder again")
            if tensor.name not in IGNORED:
                tensors[tensor.name] = tensor
    if isinstance(config, StudentConfig):
        shapes = shapes_of(blank_student(f"{spec}: transformer/config.json", config.values))
    else:
        shapes = dit_shapes(config, embedders=config.num_layers)
    check_tensors(spec, shapes, tensors)
    components = _components(folder) if layout.subfolder else {}
    origin = None
    if student:
        first = shards_of(spec, transformer, chosen)[0]
        header = read_metadata(transformer / first) if first.endswith(".safetensors") else {}
        origin = provenance.read_or_header(folder, header)
    return Source(
        "student" if student else "diffusers",
        spec,
        name,
        config,
        tensors,
        revision=revision,
        components=components,
        model_index=layout.model_index,
        licence=origin["base"].get("licence") if origin else licence_of(folder / "README.md"),
        origin=origin,
        notes=notes,
    )


def _read_config(spec: str, config: dict[str, Any]) -> DiTConfig | StudentConfig:
    if config.get("_class_name") != "ChunkedDiT":
        return read_dit_config(spec, config)
    return StudentConfig(student_options(blank_student(f"{spec}: transformer/config.json", config)))


def list_files(spec: str, folder: Path) -> list[str]:
    """Files of the folder and of its direct subfolders, relative to it. Raises `UpcycleError` if it is unreadable."""
    try:
        return [
            path.relative_to(folder).as_posix()
            for pattern in ("*", "*/*")
            for path in folder.glob(pattern)
            if path.is_file()
        ]
    except OSError as error:
        raise UpcycleError(f"{spec}: cannot be read ({error.strerror}); check the folder") from error


def inside(names: Iterable[str], subfolder: str) -> list[str]:
    """Those of `names` that lie directly in the subfolder ("" for the top), without its name."""
    folder = PurePosixPath(subfolder)
    return [path.name for name in names if (path := PurePosixPath(name)).parent == folder]


def _components(folder: Path) -> dict[str, Path]:
    configs = {"vae": "config.json", "scheduler": "scheduler_config.json"}
    return {part: folder / part for part, config in configs.items() if (folder / part / config).is_file()}


def read_weights(path: Path) -> dict[str, LazyTensor]:
    """The tensors of one weight file, safetensors or `.bin`; raises `UpcycleError` if it holds anything else."""
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    file = read_torch_file(path)
    content = file.content
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise UpcycleError(f"{path}: holds something else than a state dict; save model.state_dict() instead")
    return {name: file.lazy(name, tensor) for name, tensor in content.items()}


def licence_of(card: Path) -> str | None:
    """The licence that a model card names in its YAML header; None if it names none, or is malformed."""
    try:
        start, header, _ = card.read_text(encoding="utf-8").split("---\n", 2)
        metadata = yaml.safe_load(header)
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if start or not isinstance(metadata, dict):
        return None
    licence = metadata.get("license")
    if licence == "other":  # the Hub's way to say that the name is elsewhere
        licence = metadata.get("license_name", licence)
    return licence if isinstance(licence, str) and licence != "unknown" else None
