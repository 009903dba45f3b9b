"""Carry out a plan: stream the weights into a new folder, with the model's code, its config and other components."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from upcycle import provenance
from upcycle.errors import UpcycleError
from upcycle.graft.plan import Plan
from upcycle.graft.writer import write_weights
from upcycle.models import chunked_dit
from upcycle.output import new_folder
from upcycle.sources.weight_files import is_weights, pick_file, read_json, shards_of, variants

CLASS_REFERENCE = f"{chunked_dit.MODULE_NAME}.ChunkedDiT"
DEFAULT_SHARD_BYTES = 10 * 2**30


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
    local = Path(plan.source.spec).expanduser()
    keep = (*((local,) if local.exists() else ()), *plan.source.components.values())
    with new_folder(out, force, bytes_needed=plan.bytes, keep=keep) as folder:
        transformer = folder / "transformer"
        transformer.mkdir()
        write_config(transformer, plan.config)
        base, history = _origin(plan)
        header = provenance.metadata(base, history)
        sha256 = write_weights(transformer, plan.pieces, header, max_shard_bytes, written)
        for name, path in plan.source.components.items():
            copy_component(plan.source.spec, path, folder / name)
        if {"vae", "scheduler"} <= plan.source.components.keys():
            index = pipeline_index(plan.source.spec, folder, plan.source.model_index or {})
            (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        known = {f"transformer/{name}": value for name, value in sha256.items()}
        provenance.write(folder, base, history, sha256=known)


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write ``config.json`` of a `ChunkedDiT` and the code of the class beside it."""
    with torch.device("meta"):
        chunked_dit.ChunkedDiT(**{**config, "num_layers": 0}).save_config(folder)
    _patch_json(folder / "config.json", num_layers=config["num_layers"])


def copy_component(spec: str, source: Path, target: Path) -> None:
    """Copy a component folder with one format of its weights; the only variant there is becomes the plain one."""
    target.mkdir()
    names = [path.name for path in source.iterdir() if path.is_file() and not path.name.startswith(".")]
    wishes = [None, *variants(names)]
    variant, chosen = next(((w, f) for w in wishes if (f := pick_file(names, w))), (None, None))
    shards = shards_of(spec, source, chosen) if chosen else []
    rename = variant is not None and shards == [chosen]
    for name in names:
        if not is_weights(name) or name in shards or name == chosen:
            new = name.replace(f".{variant}.", ".") if rename and name in shards else name
            shutil.copyfile(source / name, target / new)


def pipeline_index(spec: str, folder: Path, theirs: dict[str, Any]) -> dict[str, Any]:
    """model_index.json of a stock `DiTPipeline` whose transformer is the student.

    Classes are named after the components' own configs: what an index of a stranger says is not repeated.
    """
    index: dict[str, Any] = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": diffusers.__version__,
        "auto_map": {"AutoModel": CLASS_REFERENCE},
        "transformer": CLASS_REFERENCE.split("."),
    }
    for name, file in (("vae", "config.json"), ("scheduler", "scheduler_config.json")):
        config = read_json(spec, folder / name / file)
        module, _, class_name = config.get("auto_map", {}).get("AutoModel", "").partition(".")
        if not (class_name and (folder / name / f"{module}.py").is_file()):
            module, class_name = "diffusers", config.get("_class_name")
        if not isinstance(class_name, str):
            raise UpcycleError(f"{spec}: {name}/{file} names no class; fetch it again")
        index[name] = [module, class_name]
    if isinstance(theirs.get("id2label"), dict):
        index["id2label"] = theirs["id2label"]
    return index


def _origin(plan: Plan) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Base and history of what the plan makes; those of a student go on where they were."""
    source = plan.source
    before = source.origin
    done = provenance.event("convert", source=source.spec, revision=source.revision, options=vars(plan.options))
    if before:
        return before["base"], [*before["history"], done]
    done["exact"] = plan.exact
    base = {"id": source.spec, "kind": source.kind, "revision": source.revision, "licence": source.licence}
    return base, [done]


def _patch_json(path: Path, **values: Any) -> None:
    content = json.loads(path.read_text())
    content.update(values)
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
