"""Write a trained student as the same kind of folder that `convert` writes; `upcycle.export` has other ways out."""

import json
import shutil
from pathlib import Path
from typing import Any

from upcycle import provenance
from upcycle.graft.convert import CLASS_REFERENCE, DEFAULT_SHARD_BYTES, copy_component
from upcycle.graft.pieces import FreshTensor
from upcycle.graft.writer import Piece, write_weights
from upcycle.models import chunked_dit
from upcycle.output import new_folder
from upcycle.sources.student import open_student

PICTURES = "images"


def export_student(
    student: chunked_dit.ChunkedDiT,
    start: Path,
    out: Path,
    *,
    event: dict[str, Any],
    evidence: list[dict[str, Any]] | None = None,
    pictures: dict[str, Path] | None = None,
) -> None:
    """Save ``student`` to ``out``, with the other components of the export ``start`` that it grew from.

    ``event`` joins the history of ``start``, ``evidence`` is what was measured (`upcycle.provenance`), ``pictures`` are
    copied into ``images/``. An earlier export in ``out`` is replaced once the new one is complete.
    """
    before = provenance.read_or_header(start, open_student(start).metadata)
    before = before or {"base": {"id": None, "kind": None, "revision": None, "licence": None}}
    base, history = before["base"], [*before.get("history", []), event]
    with new_folder(out, force=True, keep=(start,)) as folder:
        transformer = folder / "transformer"
        transformer.mkdir()
        student.save_config(transformer)
        pieces: dict[str, Piece] = {name: FreshTensor(tensor) for name, tensor in student.state_dict().items()}
        sha256 = write_weights(transformer, pieces, provenance.metadata(base, history), DEFAULT_SHARD_BYTES)
        for name in ("vae", "scheduler"):
            if (start / name).is_dir():
                copy_component(str(start), start / name, folder / name)
        if (start / "model_index.json").is_file():
            index = json.loads((start / "model_index.json").read_text())
            index["auto_map"] = {"AutoModel": CLASS_REFERENCE}
            index["transformer"] = CLASS_REFERENCE.split(".")
            (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
        for name, path in (pictures or {}).items():
            (folder / PICTURES).mkdir(exist_ok=True)
            shutil.copyfile(path, folder / PICTURES / name)
        if (out / "README.md").is_file():
            shutil.copyfile(out / "README.md", folder / "README.md")  # somebody's
        known = {f"transformer/{name}": value for name, value in sha256.items()}
        provenance.write(folder, base, history, evidence=evidence, sha256=known)
