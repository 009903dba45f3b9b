"""A base model for DDiT: the transformer of a pipeline, of any class that `upcycle.models.ddit` can coarsen."""

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import snapshot_download

from upcycle.errors import UpcycleError
from upcycle.models.ddit import BACKBONES, COMPONENTS, Layers
from upcycle.sources import hub
from upcycle.sources.description import DiTConfig
from upcycle.sources.diffusers_folder import IGNORED, inside, licence_of, list_files, read_weights
from upcycle.sources.dit_config import model_kind, read_dit_config
from upcycle.sources.tensors import LazyTensor, check_tensors
from upcycle.sources.weight_files import choose_file, read_json, shards_of

_DESCRIPTIONS = ["*.json", "*/*.json", "README.md", "LICENSE*"]
# Copies of weights that diffusers does not read where safetensors lie beside them.
_OTHER_FORMATS = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.msgpack", "*.h5", "*.onnx", "*.onnx_data", "*.gguf"]


@dataclass(frozen=True)
class Backbone:
    """A base model; nothing but JSON files and headers has been read.

    ``folder`` holds the pipeline, or the transformer alone where ``subfolder`` is "". ``config`` is that of the stock
    class with its defaults, ``shapes`` are all of its tensors', ``tensors`` those whose files are there (of the Hub
    perhaps only embedding and head). ``boundary``: where the pipeline has two transformers, the noise level below which
    the second one takes over.
    """

    spec: str
    name: str
    folder: Path
    subfolder: str
    base_class: str
    config: Mapping[str, Any]
    shapes: dict[str, tuple[int, ...]]
    tensors: Mapping[str, LazyTensor]
    revision: str | None
    licence: str | None
    scheduler: dict[str, Any]
    boundary: float | None
    notes: list[str]

    @property
    def layers(self) -> Layers:
        """The layers that switch."""
        return BACKBONES[self.base_class].switching_layers(self.config)


def open_backbone(
    spec: str,
    *,
    component: str = "transformer",
    revision: str | None = None,
    variant: str | None = None,
    whole: bool = True,
) -> Backbone:
    """Open a Hub id or a diffusers folder; ``whole``: of the Hub fetch all that the pipeline needs, otherwise only the
    files that hold embedding and head.

    Raises `UpcycleError` if it cannot be found or read, is another kind of model, or is damaged.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        raise UpcycleError(f"{spec} is a file; --method ddit takes a diffusers folder or a Hub id")
    if path.is_dir():
        if revision is not None:
            raise UpcycleError(f"{spec}: a local path has no revisions; leave --revision out")
        return _open(spec, path, component, variant, path.resolve().name or "model", None, None)
    if not hub.is_hub_id(spec):
        raise UpcycleError(f"{spec or '(empty)'}: no such folder, and no Hub id (owner/name) either; check it")
    folder = _fetch(spec, revision, _DESCRIPTIONS, None)
    commit = folder.name

    def bring(names: list[str], needed: list[str]) -> None:
        _fetch(spec, commit, _of_a_pipeline(names) if whole else needed, None)

    return _open(spec, folder, component, variant, spec.split("/")[1], commit, bring)


def open_backbones(
    spec: str,
    *,
    component: str | None = None,
    revision: str | None = None,
    variant: str | None = None,
    whole: bool = True,
) -> list[Backbone]:
    """`open_backbone` of ``component``, or of every transformer of the pipeline, the one of high noise first."""
    first = open_backbone(spec, component=component or COMPONENTS[0], revision=revision, variant=variant, whole=whole)
    if component is not None or first.boundary is None:
        return [first]
    second = open_backbone(spec, component=COMPONENTS[1], revision=first.revision, variant=variant, whole=whole)
    if second.base_class != first.base_class:
        raise UpcycleError(f"{spec}: {COMPONENTS[1]} is a {second.base_class}; choose one transformer with --component")
    return [first, second]


def _boundary(spec: str, folder: Path) -> float | None:
    """Where a pipeline turns to its second transformer; None where it has none."""
    index = read_json(spec, folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    level, second = index.get("boundary_ratio"), index.get(COMPONENTS[1])
    if level is None or not isinstance(second, list) or None in second:
        return None
    if type(level) not in (int, float) or not 0 <= level <= 1:
        raise UpcycleError(f"{spec}: boundary_ratio in model_index.json is {level!r}, no noise level from 0 to 1")
    return float(level)


def backbone_class(spec: str, revision: str | None = None, component: str = "transformer") -> str | None:
    """The class of a base's transformer, by its config alone; None where it is no diffusers folder, or not known."""
    path: Path | None = Path(spec).expanduser()
    if path is not None and not path.exists():
        names = [f"{component}/config.json", "config.json"]
        path = _fetch(spec, revision, names, None) if hub.is_hub_id(spec) else None
    for folder in (path / component, path) if path is not None else ():
        if (folder / "config.json").is_file():
            kind = model_kind(read_json(spec, folder / "config.json"))
            return kind if kind in BACKBONES else None
    return None


def _fetch(spec: str, revision: str | None, allow: list[str] | None, ignore: list[str] | None) -> Path:
    try:
        return Path(snapshot_download(spec, revision=revision, allow_patterns=allow, ignore_patterns=ignore))
    except Exception as error:
        mended = hub.explain(spec, revision, error)
        if mended is None:
            raise
        raise mended from error


def _open(
    spec: str, folder: Path, component: str, variant: str | None, name: str, commit: str | None, bring: Any
) -> Backbone:
    subfolder = component if (folder / component / "config.json").is_file() else ""
    if not (folder / subfolder / "config.json").is_file():
        shown = ", ".join(sorted({path.split("/")[0] for path in list_files(spec, folder)})[:4]) or "nothing"
        raise UpcycleError(f"{spec}: neither {component}/config.json nor config.json in it (it holds {shown})")
    config = read_json(spec, folder / subfolder / "config.json")
    base_class, full, shapes = _describe(spec, config)
    layers = BACKBONES[base_class].switching_layers(full)
    wanted = [f"{layer}.{part}" for layer in (layers.embed.name, layers.head.name) for part in ("weight", "bias")]
    notes: list[str] = []
    transformer = folder / subfolder
    prefix = f"{subfolder}/" if subfolder else ""
    names = list_files(spec, folder) if bring is None else hub._listing(spec, folder.name, folder)
    chosen = choose_file(spec, inside(names, subfolder), variant, notes)
    shards = shards_of(spec, transformer, chosen)
    if bring is not None:
        table = read_json(spec, transformer / chosen)["weight_map"] if chosen.endswith(".json") else {}
        needed = {table.get(tensor, chosen) for tensor in wanted} & {*shards}
        bring(names, [prefix + shard for shard in sorted(needed)])
    tensors: dict[str, LazyTensor] = {}
    for shard in shards:
        if (transformer / shard).is_file():
            tensors |= {n: tensor for n, tensor in read_weights(transformer / shard).items() if n not in IGNORED}
    complete = all((transformer / shard).is_file() for shard in shards)
    expected = shapes if complete else {n: shapes[n] for n in wanted if n in shapes}
    check_tensors(spec, expected, tensors if complete else {n: t for n, t in tensors.items() if n in expected})
    scheduler = folder / "scheduler" / "scheduler_config.json"
    return Backbone(
        spec, name, folder, subfolder, base_class, full, shapes, tensors, commit, licence_of(folder / "README.md"),
        read_json(spec, scheduler) if subfolder and scheduler.is_file() else {},
        _boundary(spec, folder) if subfolder else None, notes,
    )  # fmt: skip


def _describe(spec: str, config: dict[str, Any]) -> tuple[str, Mapping[str, Any], dict[str, tuple[int, ...]]]:
    """Class, whole config and shapes of a stock model, from its ``config.json``."""
    kind = model_kind(config)
    if kind in ("DiTTransformer2DModel", "Transformer2DModel"):
        from upcycle.graft.verify import stock_dit

        dit: DiTConfig = read_dit_config(spec, config)
        with torch.device("meta"):
            model = stock_dit(dit)
        kind = "DiTTransformer2DModel"
    elif kind in BACKBONES:
        options = {key: value for key, value in config.items() if not key.startswith("_")}
        try:
            with torch.device("meta"):
                model = getattr(diffusers, kind)(**options)
        except (TypeError, ValueError, AttributeError, AssertionError, RuntimeError, KeyError) as error:
            raise UpcycleError(f"{spec}: config.json is no {kind}'s: {' '.join(str(error).split())[:200]}") from error
    else:
        known = ", ".join(BACKBONES)
        raise UpcycleError(f"{spec}: is a {kind}, which --method ddit does not know; it knows {known}")
    return kind, model.config, {name: tuple(value.shape) for name, value in model.state_dict().items()}


def copied_files(backbone: Backbone) -> list[str]:
    """Files of the base that a converted pipeline keeps, relative to its folder."""
    names = [path.relative_to(backbone.folder).as_posix() for path in backbone.folder.rglob("*") if path.is_file()]
    return _of_a_pipeline(names)


def _of_a_pipeline(names: list[str]) -> list[str]:
    """Those of a folder's files that its pipeline loads: no hidden ones, no weights at the top (copies for other
    programs), and where there are safetensors no other format of them."""
    names = [name for name in names if not any(part.startswith((".", "__pycache__")) for part in name.split("/"))]
    names = [name for name in names if "/" in name or name == "model_index.json" or name.startswith("LICENSE")]
    safe = {name.rpartition("/")[0] for name in names if name.endswith(".safetensors")}
    return sorted(
        name
        for name in names
        if name.rpartition("/")[0] not in safe or not any(fnmatch.fnmatch(name, other) for other in _OTHER_FORMATS)
    )
