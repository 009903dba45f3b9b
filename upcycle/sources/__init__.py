"""Where weights come from: the Hub, diffusers folders, Meta's and the DC-DiT authors' checkpoints.

`open_source` recognises the kind and returns a `Source`: a description, and tensors that are read one by one.
"""

import os
from pathlib import Path
from typing import Literal

from upcycle.errors import UpcycleError
from upcycle.sources import hub
from upcycle.sources.checkpoint import open_checkpoint
from upcycle.sources.description import SHAPES, DCDiTConfig, DiTConfig, Source, StudentConfig, dit_shapes
from upcycle.sources.diffusers_folder import open_folder
from upcycle.sources.tensors import LazyTensor, check_finite

__all__ = [
    "SHAPES", "DCDiTConfig", "DiTConfig", "LazyTensor", "Source", "StudentConfig", "check_finite", "dit_shapes",
    "open_source",
]  # fmt: skip


# Endings of files: a mistyped path must not be looked up on the Hub.
_FILES = {".pt", ".pth", ".ckpt", ".bin", ".safetensors"}


def open_source(
    spec: str,
    *,
    revision: str | None = None,
    weights: Literal["ema", "model"] = "ema",
    variant: str | None = None,
    heads: int | None = None,
) -> Source:
    """Open a Hub id ("owner/name"), a diffusers folder or a checkpoint file; a local path comes before a Hub id.

    `revision` is for Hub ids, `variant` ("fp16") for diffusers weights, `weights` chooses among those of a training
    checkpoint, `heads` tells the attention heads where no config does. Only headers are read, and what the cache
    lacks is downloaded.

    Raises `UpcycleError` if the source cannot be found or read, is another kind of model, or is damaged.
    """
    path = Path(spec).expanduser()
    local = spec != "" and os.path.exists(path)
    if local and revision is not None:
        raise UpcycleError(f"{spec}: a local path has no revisions; leave --revision out")
    if local and path.is_file():
        return open_checkpoint(spec, path, weights=weights, heads=heads)
    if local and path.is_dir():
        return open_folder(spec, path, variant=variant, heads=heads, name=path.resolve().name or "model")
    if not hub.is_hub_id(spec) or path.suffix in _FILES:
        raise UpcycleError(f"{spec or '(empty)'}: no such file or folder, and no Hub id (owner/name) either; check it")
    folder, commit = hub.fetch(spec, revision=revision, variant=variant)
    return open_folder(spec, folder, variant=variant, heads=heads, name=spec.split("/")[1], revision=commit)
