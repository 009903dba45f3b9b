"""Read a converted model back: an export's transformer, or a single file of it, checked before it is used."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from upcycle.errors import UpcycleError
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.sources.safetensors_file import read_metadata, read_safetensors
from upcycle.sources.tensors import LazyTensor, check_finite, check_tensors
from upcycle.sources.weight_files import choose_file, read_json, shards_of

CONFIG_KEY = "config"
"""Under which a single file holds its model's config, in the metadata of safetensors."""


Count = Annotated[int, Field(ge=1, le=1_000_000)]
Number = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Half(BaseModel):
    tokens: list[Number]
    squares: list[Number]


class _Calibration(BaseModel):
    """What `ChunkedDiT.set_budget` looks at."""

    model_config = ConfigDict(extra="allow", strict=True)

    steps: Count
    teacher_flops: Number
    flops: Annotated[list[float], Field(min_length=3, max_length=3)]
    timesteps: Annotated[list[float], Field(min_length=1)]
    conditional: _Half
    unconditional: _Half | None


class _Options(BaseModel):
    """What a config may say, so that a corrupt one asks for nothing endless; `ChunkedDiT` has the defaults."""

    model_config = ConfigDict(extra="allow", strict=True)

    num_attention_heads: Count = 1
    attention_head_dim: Count = 1
    in_channels: Count = 1
    out_channels: Count = 1
    num_layers: Annotated[int, Field(ge=1, le=1000)] = 1
    sample_size: Annotated[int, Field(ge=1, le=10_000)] = 1
    num_classes: Annotated[int, Field(ge=1, le=100_000_000)] = 1
    patch_size: Annotated[int, Field(ge=1, le=1000)] = 1
    norm_eps: Number = 1
    num_embedders: Annotated[int, Field(ge=1, le=1000)] = 1
    ratio: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 1
    guide: Annotated[float, Field(allow_inf_nan=False)] = 0
    scaffold_width: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    encoder_layers: Annotated[int, Field(ge=0, le=1000)] = 1
    decoder_layers: Annotated[int, Field(ge=0, le=1000)] = 1
    smoothing_sigma: Annotated[float, Field(ge=1e-3, le=1e4)] = 1
    condition_adaptor: bool = False
    num_train_timesteps: Count = 1
    beta_start: Number = 1
    beta_end: Number = 1
    sample_range: Number = 1
    calibration: _Calibration | None = None
    dydit: Annotated[float, Field(ge=0, lt=1)] = 0


def blank_student(where: str, config: Mapping[str, Any]) -> ChunkedDiT:
    """The model of a student's config, on the meta device; raises `UpcycleError` where ``where`` describes none."""
    try:
        _Options.model_validate(config)
        with torch.device("meta"):
            return ChunkedDiT.from_config(dict(config))
    except ValidationError as error:
        first = error.errors()[0]
        raise UpcycleError(
            f"{where} describes no ChunkedDiT ({'.'.join(map(str, first['loc']))} is {first['input']!r:.60}: "
            f"{first['msg'][0].lower()}{first['msg'][1:]})"
        ) from error
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UpcycleError(f"{where} describes no ChunkedDiT ({error})") from error


def student_options(model: ChunkedDiT) -> dict[str, Any]:
    """The arguments of `ChunkedDiT` that a model was made with, all of them."""
    return {key: value for key, value in model.config.items() if not key.startswith("_") and key != "auto_map"}


def shapes_of(model: ChunkedDiT) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a student's tensors."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


@dataclass(frozen=True)
class Student:
    """A converted model on the disk, of which nothing but headers has been read."""

    path: Path
    """The export folder, or the single file."""
    model: ChunkedDiT
    """On the meta device: its config and its shapes."""
    tensors: dict[str, LazyTensor]
    metadata: dict[str, str]
    """Of the weights file, or of the first shard."""

    @property
    def config(self) -> dict[str, Any]:
        """The arguments of `ChunkedDiT`, all of them."""
        return student_options(self.model)


def is_student(path: Path) -> bool:
    """Whether ``path`` is an export folder or a single file of a converted model; False for anything damaged."""
    try:
        return _read_config(path).get("_class_name") == "ChunkedDiT"
    except UpcycleError:
        return False


def open_student(path: Path) -> Student:
    """Open the transformer of an export folder, or a single file of it; reads JSON and headers only.

    Raises:
        UpcycleError: no converted model there, a damaged config, missing, extra or mis-shaped tensors (named).
    """
    spec = str(path)
    config = _read_config(path)
    name = config.get("_class_name")
    if name != "ChunkedDiT":
        raise UpcycleError(f"{spec} holds a {name} and no converted model; make one with upcycle convert")
    model = blank_student(spec if path.is_file() else f"{spec}: transformer/config.json", config)
    files = [path] if path.is_file() else _weight_files(path)
    found: dict[str, LazyTensor] = {}
    for file in files:
        found |= read_safetensors(file)
    check_tensors(spec, shapes_of(model), found)
    return Student(path, model, found, read_metadata(files[0]))


def load_student(path: Path) -> ChunkedDiT:
    """The transformer of the export folder ``path``, or of a single file: fp32, in eval mode, without gradients.

    This package's class is used; code that lies beside the weights is not run.

    Raises:
        UpcycleError: as `open_student` does, and for NaN.
    """
    opened = open_student(path)
    state = {}
    for name, tensor in opened.tensors.items():
        state[name] = tensor.load().float()
        check_finite(name, state[name], source=str(path))
    opened.model.load_state_dict(state, assign=True)
    return opened.model.eval().requires_grad_(False)


def _read_config(path: Path) -> dict[str, Any]:
    if path.is_file():
        try:
            config = json.loads(read_metadata(path).get(CONFIG_KEY, "{}"))
        except (ValueError, RecursionError):
            config = None
        if not isinstance(config, dict) or "_class_name" not in config:
            raise UpcycleError(f"{path} does not say of which model it is; give the export folder that it is from")
        return config
    if not (path / "transformer" / "config.json").is_file():
        raise UpcycleError(f"{path} is no export: it lacks transformer/config.json")
    return read_json(str(path), path / "transformer" / "config.json")


def _weight_files(path: Path) -> list[Path]:
    spec, transformer = str(path), path / "transformer"
    chosen = choose_file(spec, [file.name for file in transformer.iterdir()], None, [])
    if ".safetensors" not in chosen:
        raise UpcycleError(f"{spec}: the weights of a converted model are safetensors, not {chosen}")
    return [transformer / shard for shard in shards_of(spec, transformer, chosen)]
