"""Carry out a plan: stream the weights into a new folder, with the model's code, its config and other components."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import upcycle
from upcycle.graft.plan import Plan
from upcycle.graft.writer import write_weights
from upcycle.models import chunked_dit
from upcycle.output import new_folder

CLASS_REFERENCE = f"{chunked_dit.MODULE_NAME}.ChunkedDiT"
DEFAULT_SHARD_BYTES = 10 * 2**30
DIT_PIPELINE = {"_class_name": "DiTPipeline"}


def convert(
    plan: Plan,
    out: Path,
    *,
    force: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    written: Callable[[int], None] = lambda n: None,
) -> None:
    """Write the export that ``plan`` describes to ``out``; ``written`` is told the bytes of each tensor as it is done.

    Raises `UpcycleError` where ``out`` exists (without ``force``), where space runs out, and for NaN weights; nothing
    is left half-written.
    """
    source_path = Path(plan.source.spec)
    keep = (source_path, *plan.source.components.values()) if source_path.exists() else ()
    with new_folder(out, force, bytes_needed=plan.bytes, keep=keep) as folder:
        transformer = folder / "transformer"
        transformer.mkdir()
        with torch.device("meta"):
            chunked_dit.ChunkedDiT(**{**plan.config, "num_layers": 0}).save_config(transformer)
        _patch_json(transformer / "config.json", num_layers=plan.config["num_layers"])
        write_weights(transformer, plan.pieces, {"format": "pt", **_provenance(plan)}, max_shard_bytes, written)
        for name, path in plan.source.components.items():
            shutil.copytree(path, folder / name, ignore=shutil.ignore_patterns("__pycache__", ".*"))
        if {"vae", "scheduler"} <= plan.source.components.keys():
            index = pipeline_index(folder, plan.source.model_index or {})
            (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def pipeline_index(folder: Path, theirs: dict[str, Any]) -> dict[str, Any]:
    """model_index.json of a stock `DiTPipeline` whose transformer is the student."""
    index: dict[str, Any] = {
        **DIT_PIPELINE,
        "_diffusers_version": theirs.get("_diffusers_version", "0.42.1"),
        "auto_map": {"AutoModel": CLASS_REFERENCE},
        "transformer": CLASS_REFERENCE.split("."),
    }
    for name, file in (("vae", "config.json"), ("scheduler", "scheduler_config.json")):
        class_name = json.loads((folder / name / file).read_text())["_class_name"]
        index[name] = theirs.get(name, ["diffusers", class_name])
    if "id2label" in theirs:
        index["id2label"] = theirs["id2label"]
    return index


def _provenance(plan: Plan) -> dict[str, str]:
    return {
        "upcycle_version": upcycle.__version__,
        "base": plan.source.spec,
        "base_revision": plan.source.revision or "",
        "licence": plan.source.licence or "",
        "config": json.dumps(plan.config),
    }


def _patch_json(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
