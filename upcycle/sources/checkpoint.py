"""Single checkpoint files: which state dict in them is meant, and which code's names it has."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from upcycle.errors import UpcycleError
from upcycle.sources import dcdit, meta
from upcycle.sources.description import Source
from upcycle.sources.safetensors_file import read_safetensors
from upcycle.sources.tensors import LazyTensor
from upcycle.sources.torch_file import TorchFile, read_torch_file

# Segments that wrappers (DDP, torch.compile, FSDP) put into parameter names.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module"}


@dataclass(frozen=True)
class State:
    """One state dict of a checkpoint, and the settings stored beside it (an inert object, a dict or None)."""

    tensors: dict[str, LazyTensor]
    settings: Any


def open_checkpoint(spec: str, path: Path, *, weights: Literal["ema", "model"], heads: int | None) -> Source:
    """Open a file of Meta's DiT or of the authors' DC-DiT, as `torch.save` wrote it or as safetensors.

    Raises `UpcycleError` for any other content.
    """
    if path.suffix == ".safetensors":
        state = State(_unwrapped(path, read_safetensors(path)), None)
    else:
        state = _state(read_torch_file(path), weights)
    names = state.tensors
    if any(name.startswith("hnet.") for name in names):
        return dcdit.open_dcdit(spec, path, names, state.settings, heads=heads)
    if "x_embedder.proj.weight" in names and any(name.startswith("blocks.") for name in names):
        return meta.open_meta(spec, path, names, state.settings, heads=heads)
    if "embedders.0.class_embedder.embedding_table.weight" in names:
        raise UpcycleError(f"{spec}: is a converted model already; give the DiT that it was made from")
    if any(name.startswith("transformer_blocks.") for name in names):
        raise UpcycleError(
            f"{spec}: holds weights in diffusers' names, which need their config.json; pass the folder instead"
        )
    shown = ", ".join(list(names)[:3])
    raise UpcycleError(
        f"{spec}: no DiT: its tensors are {shown or 'none'}, …; a .pt of Meta's DiT or of DC-DiT is read"
    )


def _state(file: TorchFile, weights: str) -> State:
    content = file.content
    if not isinstance(content, Mapping):
        raise UpcycleError(
            f"{file.path}: holds a {type(content).__name__}, not a state dict; save model.state_dict() instead"
        )
    state: Any = content
    settings = None
    training = any(isinstance(content.get(name), Mapping) for name in ("ema", "model"))
    if training or not any(isinstance(value, torch.Tensor) for value in content.values()):
        state = content.get(weights)
        if not isinstance(state, Mapping):
            shown = ", ".join(str(key) for key in list(content)[:6]) or "nothing"
            other = next((name for name in ("ema", "model") if isinstance(content.get(name), Mapping)), None)
            advice = f"pass --weights {other}" if other else "pass a file with one of them"
            raise UpcycleError(f"{file.path}: has no {weights!r} weights, it holds {shown}; {advice}")
        settings = content.get("config", content.get("args"))
    tensors = {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise UpcycleError(
                f"{file.path}: {name!r} is no tensor but a {type(value).__name__}; this is no state dict"
            )
        tensors[name] = file.lazy(name, value)
    return State(_unwrapped(file.path, tensors), settings)


def _unwrapped(path: Path, tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The tensors without wrappers' segments in their names."""
    plain: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        short = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if short in plain:
            raise UpcycleError(f"{path}: two tensors are called {short}; it mixes two models, save one")
        plain[short] = tensor.renamed(short)
    return plain
