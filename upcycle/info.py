"""What a model is, read off descriptions and headers alone: `upcycle info`."""

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upcycle import provenance
from upcycle.evaluation.flops import PAPER_STEPS, dit_flops, student_flops_by_tail_drop
from upcycle.graft.patches import adapter_folder, load
from upcycle.graft.plan import full_config
from upcycle.sources import SHAPES, DCDiTConfig, DiTConfig, StudentConfig, hub, open_source
from upcycle.sources.diffusers_folder import licence_of
from upcycle.sources.safetensors_file import DTYPE_NAMES
from upcycle.sources.student import is_student, open_student
from upcycle.sources.tensors import LazyTensor

_BYTES = {name: dtype.itemsize for dtype, name in DTYPE_NAMES.items()}


def describe(spec: str, *, revision: str | None = None) -> dict[str, Any]:
    """All that is known of an export, a teacher or a Hub id without reading weights.

    Returns:
        ``kind`` ("student", "teacher" or "dc-dit"), ``shape`` (a dict), ``parameters``, ``dtypes`` (parameters by
        dtype), ``bytes`` of the weights (these three None where only a pickle knows), for students ``scaffold``,
        ``router``, ``ratio``, ``dydit`` (None without its gates), ``tail_drop`` and ``calibration``;
        ``flops_per_image``, ``licence``, ``revision`` and ``provenance`` (`upcycle.json`, None where there is none).

    Raises:
        UpcycleError: nothing there, another kind of model, damaged files; see `open_source`.
    """
    path = Path(spec).expanduser()
    adapter = adapter_folder(path) if path.is_dir() else None
    if adapter == path:
        return _adapter(spec, path) | {"provenance": provenance.read(path)}
    if path.is_file() and is_student(path):
        student = open_student(path)
        origin = provenance.from_header(student.metadata)
        licence = (origin or {"base": {}})["base"].get("licence")
        return _facts(spec, StudentConfig(student.config), _headers(student.tensors), None, licence, origin)
    if path.exists() or not hub.is_hub_id(spec):
        if adapter:
            return _adapter(spec, path) | {"provenance": provenance.read(path)}
        source = open_source(spec, revision=revision)
        return _facts(spec, source.config, _headers(source.tensors), source.revision, source.licence, source.origin)
    seen = hub.peek(spec, revision=revision)
    origin = provenance.read(seen.folder)
    if origin is None and isinstance(seen.layout.config, StudentConfig):
        origin = provenance.from_header(seen.metadata or {})
    licence = (origin or {"base": {}})["base"].get("licence") or licence_of(seen.folder / "README.md")
    return _facts(spec, seen.layout.config, seen.tensors, seen.commit, licence, origin)


def _adapter(spec: str, folder: Path) -> dict[str, Any]:
    """Facts of the DDiT adapters in a folder, alone or beside their base."""
    found = load(folder, spec)
    config = found[0][0]
    origin = provenance.read(folder) or provenance.read(folder.parent) or {"base": {}}
    dtypes: Counter[str] = Counter()
    every = [tensor for _, tensors in found for tensor in tensors.values()]
    for tensor in every:
        dtypes[DTYPE_NAMES[tensor.dtype]] += tensor.numel()
    return {
        "model": spec,
        "kind": "ddit",
        "revision": None,
        "licence": origin["base"].get("licence"),
        "base": config.base,
        "base_class": config.base_class,
        "components": [config.component for config, _ in found],
        "patches": config.patches,
        "rank": config.rank,
        "threshold": config.threshold,
        "calibration": config.calibration,
        "parameters": dtypes.total(),
        "dtypes": dict(dtypes),
        "bytes": sum(tensor.nbytes for tensor in every),
    }


def _headers(tensors: Mapping[str, LazyTensor]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (tensor.shape, DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))) for name, tensor in tensors.items()}


def _facts(
    spec: str,
    config: DiTConfig | DCDiTConfig | StudentConfig,
    tensors: Mapping[str, tuple[tuple[int, ...], str]] | None,
    revision: str | None,
    licence: str | None,
    origin: dict[str, Any] | None,
) -> dict[str, Any]:
    dtypes: Counter[str] = Counter()
    for shape, dtype in (tensors or {}).values():
        dtypes[dtype] += math.prod(shape)
    facts = {
        "model": spec,
        "kind": _kind(config),
        "revision": revision,
        "licence": licence,
        "shape": _shape(config),
        "parameters": dtypes.total() if tensors is not None else None,
        "dtypes": dict(dtypes) if tensors is not None else None,
        "bytes": sum(n * _BYTES.get(dtype, 4) for dtype, n in dtypes.items()) if tensors is not None else None,
        "flops_per_image": None,
    }
    if isinstance(config, DiTConfig):
        facts["flops_per_image"] = {"0": PAPER_STEPS * dit_flops(vars(config))}
    if isinstance(config, StudentConfig):
        values = full_config(config.values)
        facts |= {
            "scaffold": values["scaffold"],
            "router": values["router"],
            "ratio": values["ratio"],
            "dydit": {"target": values["dydit"], "measured": _measured_share(origin)} if values["dydit"] else None,
            "tail_drop": {"default": values.get("tail_drop", 0.0), "trained_with": trained_tail_drops(origin)},
            "calibration": {key: values["calibration"].get(key) for key in ("sampler", "steps", "guidance_scale")}
            if values["calibration"]
            else None,
            "flops_per_image": student_flops_by_tail_drop(values),
        }
    return facts | {"provenance": origin}


def _kind(config: DiTConfig | DCDiTConfig | StudentConfig) -> str:
    return {DiTConfig: "teacher", DCDiTConfig: "dc-dit", StudentConfig: "student"}[type(config)]


def _shape(config: DiTConfig | DCDiTConfig | StudentConfig) -> dict[str, Any]:
    values = config.values if isinstance(config, StudentConfig) else vars(config)
    if isinstance(config, DCDiTConfig):
        heads, width, layers, patch = config.heads, config.d_model, config.layers, None
    else:
        heads, layers, patch = values["num_attention_heads"], values["num_layers"], values["patch_size"]
        width = heads * values["attention_head_dim"]
    size = {(h, h * each, n): name for name, (h, each, n) in SHAPES.items()}.get((heads, width, layers))
    return {
        "name": f"{size}/{patch}" if size and patch else size,
        "layers": layers,
        "heads": heads,
        "width": width,
        "patch_size": patch,
        **{key: values[key] for key in ("sample_size", "in_channels", "out_channels", "num_classes")},
    }


def _measured_share(origin: Mapping[str, Any] | None) -> float | None:
    """What DyDiT's gates left of the blocks' FLOPs in the last validation, None where there was none."""
    shares = [found.get("settings", {}).get("block_flops") for found in (origin or {}).get("evidence", [])]
    return next((share for share in reversed(shares) if share is not None), None)


def trained_tail_drops(origin: Mapping[str, Any] | None) -> list[float] | None:
    """The tail drops of a student's post-training, sorted; None where it had none, or it is not known."""
    values: set[float] = set()
    for event in (origin or {}).get("history", []):
        for stage in (event.get("recipe") or {}).get("stages", []):
            values |= set(stage["tail_drop"]["values"])
    return sorted(values) or None
