"""Read a converted model back: an export's transformer, checked before it is used."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from upcycle.errors import UpcycleError
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.sources.safetensors_file import read_safetensors
from upcycle.sources.tensors import LazyTensor, check_finite, check_tensors
from upcycle.sources.weight_files import choose_file, read_json, shards_of


def blank_student(spec: str, config: Mapping[str, Any]) -> ChunkedDiT:
    """The model of an export's ``transformer/config.json``, on the meta device; raises `UpcycleError` for a bad one."""
    try:
        with torch.device("meta"):
            return ChunkedDiT.from_config(dict(config))
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UpcycleError(f"{spec}: transformer/config.json describes no ChunkedDiT ({error})") from error


def student_shapes(spec: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of an export; raises `UpcycleError` for a bad config."""
    return {name: tuple(tensor.shape) for name, tensor in blank_student(spec, config).state_dict().items()}


def load_student(folder: Path) -> ChunkedDiT:
    """The transformer of the export ``folder``, fp32, in eval mode, without gradients.

    This package's class is used; code that lies beside the weights is not run.

    Raises:
        UpcycleError: no converted model there, a damaged config, missing, extra or mis-shaped tensors (named), NaN.
    """
    transformer, spec = folder / "transformer", str(folder)
    if not (transformer / "config.json").is_file():
        raise UpcycleError(f"{spec} is no export: it lacks transformer/config.json")
    config = read_json(spec, transformer / "config.json")
    name = config.get("_class_name")
    if name != "ChunkedDiT":
        raise UpcycleError(f"{spec} holds a {name} and no converted model; make one with upcycle convert")
    model = blank_student(spec, config)
    names = [path.name for path in transformer.iterdir()]
    chosen = choose_file(spec, names, None, [])
    if ".safetensors" not in chosen:
        raise UpcycleError(f"{spec}: the weights of a converted model are safetensors, not {chosen}")
    found: dict[str, LazyTensor] = {}
    for shard in shards_of(spec, transformer, chosen):
        found |= read_safetensors(transformer / shard)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_tensors(spec, expected, found)
    state = {}
    for name, tensor in found.items():
        state[name] = tensor.load().float()
        check_finite(name, state[name], source=spec)
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)
