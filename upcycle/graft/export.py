"""Write a trained student as the same kind of folder that `convert` writes; `upcycle.export` has other ways out."""

import json
from pathlib import Path

from upcycle.graft.convert import copy_component
from upcycle.models import chunked_dit
from upcycle.output import new_folder


def export_student(student: chunked_dit.ChunkedDiT, start: Path, out: Path) -> None:
    """Save ``student`` to ``out``, with the other components of the export ``start`` that it grew from.

    An earlier export in ``out`` is replaced once the new one is complete.
    """
    with new_folder(out, force=True, keep=(start,)) as folder:
        student.save_pretrained(folder / "transformer", max_shard_size="10GB")
        for name in ("vae", "scheduler"):
            if (start / name).is_dir():
                copy_component(str(start), start / name, folder / name)
        if (start / "model_index.json").is_file():
            index = json.loads((start / "model_index.json").read_text())
            index["auto_map"] = {"AutoModel": f"{chunked_dit.MODULE_NAME}.ChunkedDiT"}
            index["transformer"] = [chunked_dit.MODULE_NAME, "ChunkedDiT"]
            (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
