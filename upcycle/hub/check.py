"""Is an export whole, unchanged, and does it load for others? Asked before anything is sent."""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upcycle import provenance
from upcycle.errors import UpcycleError
from upcycle.hub import load, load_adapter
from upcycle.hub.adapter import AdapterSource, open_adapter
from upcycle.models import chunked_dit, ddit, identity_vae
from upcycle.sources import Source, StudentConfig, open_source
from upcycle.sources.weight_files import pick_file, variants

_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
_OURS = (chunked_dit, ddit, identity_vae)
_CODE = {hashlib.sha256(Path(str(module.__file__)).read_bytes()).hexdigest() for module in _OURS}


@dataclass(frozen=True)
class Export:
    """A checked export: ``files`` to send (relative to ``folder``, with their bytes), what it is, what to know."""

    folder: Path
    source: Source | AdapterSource
    files: dict[str, int]
    notes: list[str] = field(default_factory=list)

    @property
    def origin(self) -> dict[str, Any] | None:
        """The content of its `upcycle.json`."""
        return self.source.origin


def open_export(folder: Path) -> Source | AdapterSource:
    """The export in ``folder``, of which headers are read; raises `UpcycleError` where it is none, or damaged."""
    if folder.is_file():
        raise UpcycleError(f"{folder} is a file; make a folder of it with upcycle export --to diffusers, and push that")
    if adapter := open_adapter(folder):
        return adapter
    if not (folder / "transformer" / "config.json").is_file():
        raise UpcycleError(
            f"{folder} is no export: it lacks transformer/config.json; give what convert or finetune made"
        )
    source = open_source(str(folder))
    if not isinstance(source.config, StudentConfig):
        raise UpcycleError(f"{folder} is a fixed-patch DiT and no converted model; convert it first")
    return source


def check_export(folder: Path, *, trust_remote_code: bool = False) -> Export:
    """Check shapes, hashes and that stock diffusers loads it in a fresh process, where one forward pass is finite.

    ``trust_remote_code``: run the code in ``folder`` although it is not this version's.

    Raises:
        UpcycleError: no export, or one that is damaged, changed or does not load.
    """
    source = open_export(folder)
    notes = []
    present = provenance.content(folder)
    if not (folder / provenance.FILE).exists():
        files = present
        _check_inside(folder, files)
        notes.append(
            f"{provenance.FILE} is missing: all files were taken for parts of the export, hashes were not checked, and "
            "the card knows what the weights' header says"
        )
    else:
        assert source.origin is not None
        files = [provenance.FILE, *_check_hashes(folder, source.origin["files"])]
    if more := sorted(_others(folder) - set(files)):
        notes.append(f"left out, because no part of the export: {', '.join(more[:5])}{' ...' if len(more) > 5 else ''}")
    _check_code(folder, [name for name in files if name.endswith(".py")], trust_remote_code)
    if isinstance(source, AdapterSource):
        _load_adapter(folder, files)
    else:
        assert isinstance(source.config, StudentConfig)
        _load(folder, files, source.config)
    return Export(folder, source, {name: (folder / name).stat().st_size for name in sorted(files)}, notes)


def _others(folder: Path) -> set[str]:
    """All files but those that git and caches keep, and the card."""
    names = {path.relative_to(folder) for path in folder.rglob("*") if path.is_file() or path.is_symlink()}
    skipped = {".cache", ".git", "__pycache__"}
    kept = {name.as_posix() for name in names if not skipped & set(name.parts)}
    return kept - {"README.md", ".gitattributes"}


def _check_inside(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise UpcycleError(f"{folder}: {name} lies outside of the folder; export the model again")


def _check_hashes(folder: Path, files: dict[str, Any]) -> list[str]:
    _check_inside(folder, files)
    for name, stated in files.items():
        path = folder / name
        if not path.is_file():
            raise UpcycleError(f"{folder}: {name}, which {provenance.FILE} lists, is not there; export the model again")
        if path.stat().st_size != stated["bytes"] or provenance.digest(path) != stated["sha256"]:
            raise UpcycleError(
                f"{folder}: {name} is not what was exported (its SHA-256 differs from {provenance.FILE}); "
                "export the model again"
            )
    return list(files)


def _check_code(folder: Path, names: list[str], trust: bool) -> None:
    strange = [name for name in names if provenance.digest(folder / name) not in _CODE]
    if strange and not trust:
        raise UpcycleError(
            f"{folder}: {strange[0]} is not the code of this version of upcycle; export the model again, or read it "
            "and pass --trust-remote-code"
        )


def variant_of(files: Iterable[str]) -> str | None:
    """The ``variant`` that diffusers must be asked for to find the weights; None for plain names."""
    weights = [name.removeprefix("transformer/") for name in files if name.startswith("transformer/")]
    return None if pick_file(weights, None) else next(iter(variants(weights)), None)


def _load(folder: Path, files: list[str], config: StudentConfig) -> None:
    """Raise `UpcycleError` unless stock diffusers loads ``files`` in a process that knows nothing of ours.

    Nothing else of the folder is there for it, as nothing else will be for those who download.
    """
    variant = variant_of(files)
    found = _alone(load, folder, files, *([variant] if variant else []))
    size = config.values["sample_size"]
    if found["shape"] != [2, config.values["out_channels"], size, size] or not found["finite"]:
        raise UpcycleError(f"{folder}: its forward pass gives NaN, infinities or another shape; export the model again")


def _load_adapter(folder: Path, files: list[str]) -> None:
    """Raise `UpcycleError` unless the adapter loads, and fits the base where that lies beside it."""
    if not _alone(load_adapter, folder, files)["finite"]:
        raise UpcycleError(f"{folder}: the adapter has NaN or infinities, or gives some; make it again")


def _alone(script: Any, folder: Path, files: list[str], *arguments: str) -> dict[str, Any]:
    """What a script prints in a process that knows nothing of ours, of the ``files`` alone."""
    with tempfile.TemporaryDirectory(prefix="upcycle-check-") as modules:
        copy = Path(modules) / "export"
        for name in files:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).symlink_to((folder / name).resolve())
        environment = {name: value for name, value in os.environ.items() if name not in _TOKENS}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": modules, "DIFFUSERS_VERBOSITY": "error"}
        done = subprocess.run(
            [sys.executable, "-I", script.__file__, str(copy), *arguments],
            env=environment, cwd=modules, capture_output=True, text=True,
        )  # fmt: skip
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it was killed, perhaps for want of memory"])[-1]
        raise UpcycleError(f"{folder} does not load in stock diffusers: {why.replace(str(copy), str(folder))[:300]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
