"""`convert --method ddit`: an adapter with which a pretrained model takes coarser patches, and the base beside it."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from upcycle import provenance
from upcycle.errors import UpcycleError
from upcycle.models import ddit
from upcycle.output import new_folder, write_text
from upcycle.sources.backbone import Backbone, copied_files
from upcycle.sources.tensors import check_finite

ADAPTER = "ddit"
"""Folder of the adapter inside a converted pipeline."""

_PREDICTIONS = {"DiTTransformer2DModel": "epsilon", "ZImageTransformer2DModel": "negative flow"}


@dataclass(frozen=True)
class Options:
    """Choices of a conversion, named as on the command line."""

    patches: tuple[int, ...] = (2, 4)
    rank: int = 32
    residual: bool = True
    component: str = "transformer"
    seed: int = 0


@dataclass
class Plan:
    """A conversion, ready to be carried out by `convert`."""

    backbone: Backbone
    options: Options
    config: ddit.DDiTConfig
    tensors: dict[str, torch.Tensor]
    adapter_only: bool
    notes: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> dict[str, int]:
        base = sum(torch.Size(shape).numel() for shape in self.backbone.shapes.values())
        return {"reused": base, "fresh": sum(tensor.numel() for tensor in self.tensors.values())}

    @property
    def files(self) -> list[str]:
        """Files of the base that are copied."""
        return [] if self.adapter_only else copied_files(self.backbone)

    @property
    def bytes(self) -> int:
        fresh = sum(tensor.nbytes for tensor in self.tensors.values())
        return fresh + sum((self.backbone.folder / name).stat().st_size for name in self.files)


def make_plan(backbone: Backbone, options: Options, *, adapter_only: bool = False) -> Plan:
    """Decide everything and make the adapter's tensors; of the base only embedding and head are read.

    Raises `UpcycleError` for a choice that cannot be made, and NaN weights.
    """
    if not backbone.subfolder and not adapter_only:
        raise UpcycleError(
            f"{backbone.spec} is a transformer without its pipeline; add --adapter-only, or give the pipeline's folder"
        )
    local = Path(backbone.spec).expanduser()
    try:
        config = ddit.DDiTConfig(
            base_class=backbone.base_class,
            patches=list(options.patches),
            rank=options.rank,
            residual=options.residual,
            prediction=_PREDICTIONS.get(backbone.base_class, "flow"),
            component=options.component,
            base=str(local.resolve()) if local.is_dir() else backbone.spec,
            base_revision=backbone.revision,
            **_noise_schedule(backbone),
        )
    except ValueError as error:
        raise UpcycleError(f"--method ddit: {error}") from error

    def read(name: str) -> torch.Tensor:
        tensor = backbone.tensors[name].load()
        check_finite(name, tensor, source=backbone.spec)
        return tensor

    tensors = ddit.initial_tensors(config, backbone.config, backbone.shapes, read, options.seed)
    notes = [*backbone.notes, "the coarse steps are untrained; upcycle finetune teaches them from the base itself"]
    return Plan(backbone, options, config, tensors, adapter_only, notes)


def _noise_schedule(backbone: Backbone) -> dict[str, Any]:
    theirs = backbone.scheduler
    if backbone.base_class != "DiTTransformer2DModel":
        return {"num_train_timesteps": theirs["num_train_timesteps"]} if "num_train_timesteps" in theirs else {}
    if theirs.get("prediction_type", "epsilon") != "epsilon":
        raise UpcycleError(f"{backbone.spec} predicts {theirs['prediction_type']}; only epsilon can be converted")
    if theirs.get("beta_schedule", "linear") not in ("linear", "scaled_linear") or theirs.get("trained_betas"):
        raise UpcycleError(f"{backbone.spec} has a noise schedule that is neither linear nor scaled_linear")
    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    return {key: theirs[key] for key in keys if key in theirs}


def convert(plan: Plan, out: Path, *, force: bool = False, written: Callable[[int], None] = lambda n: None) -> None:
    """Write the adapter, and unless it is wanted alone the base's files as they are, to ``out``.

    ``written`` is told the bytes of each file as it is done. Nothing is left half-written.
    """
    backbone = plan.backbone
    keep = (backbone.folder,) if Path(backbone.spec).expanduser().exists() else ()
    base = {
        "id": backbone.spec,
        "kind": "diffusers",
        "revision": backbone.revision,
        "licence": backbone.licence,
    }
    done = provenance.event(
        "convert", method="ddit", source=backbone.spec, revision=backbone.revision, options=asdict(plan.options)
    )
    with new_folder(out, force, bytes_needed=plan.bytes, keep=keep) as folder:
        for name in plan.files:
            target = folder / (name if backbone.subfolder else f"transformer/{name}")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(backbone.folder / name, target)
            written(target.stat().st_size)
        adapter = folder if plan.adapter_only else folder / ADAPTER
        write_adapter(adapter, plan.config, plan.tensors, provenance.metadata(base, [done]))
        written(sum(tensor.nbytes for tensor in plan.tensors.values()))
        provenance.write(folder, base, [done])


def load(folder: Path, name: str) -> tuple[ddit.DDiTConfig, dict[str, torch.Tensor]]:
    """Config and tensors of an adapter; raises `UpcycleError`, which calls it ``name``, where it is none or damaged."""
    try:
        return ddit.load_adapter(folder)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UpcycleError(f"{name}: {' '.join(str(error).split())}") from error


def export(
    tensors: dict[str, torch.Tensor],
    config: ddit.DDiTConfig,
    start: Path,
    out: Path,
    *,
    event: dict[str, Any],
    evidence: list[dict[str, Any]] | None = None,
) -> None:
    """Save a trained adapter to ``out``, with the base's files where ``start`` has them; provenance goes on."""
    before = provenance.read(start)
    before = before or {"base": {"id": config.base, "kind": "diffusers", "revision": config.base_revision,
                                 "licence": None}, "history": []}  # fmt: skip
    base, history = before["base"], [*before["history"], event]
    beside = (start / ADAPTER / ddit.CONFIG).is_file()
    with new_folder(out, force=True, keep=(start,)) as folder:
        if beside:
            left_out = shutil.ignore_patterns(".*", "__pycache__", provenance.FILE, "README.md", "images")
            for path in start.iterdir():
                if path.is_dir() and path.name not in (ADAPTER, "images") and not path.name.startswith("."):
                    shutil.copytree(path, folder / path.name, ignore=left_out)
                elif path.is_file() and (path.name == "model_index.json" or path.name.startswith("LICENSE")):
                    shutil.copyfile(path, folder / path.name)
        where = folder / ADAPTER if beside else folder
        write_adapter(where, config, tensors, provenance.metadata(base, history))
        if (out / "README.md").is_file():
            shutil.copyfile(out / "README.md", folder / "README.md")  # somebody's
        provenance.write(folder, base, history, evidence=evidence)


def write_adapter(
    folder: Path, config: ddit.DDiTConfig, tensors: dict[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    """Write the files of an adapter, with provenance in the header of its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    ddit.write_adapter(folder, config, tensors, metadata)


def update(folder: Path, adapter: Path, **changes: Any) -> None:
    """Change the config of the adapter that lies in ``folder``, and its digest there."""
    config, _ = load(adapter, str(folder))
    config = replace(config, **changes)
    write_text(adapter / ddit.CONFIG, json.dumps(asdict(config), indent=2) + "\n")
    if (folder / provenance.FILE).is_file():
        provenance.add_evidence(folder, drawn=[(adapter / ddit.CONFIG).relative_to(folder).as_posix()])


def adapter_folder(folder: Path) -> Path | None:
    """Where a folder holds an adapter: at its top or beside the pipeline; None where it holds none."""
    for path in (folder, folder / ADAPTER):
        if (path / ddit.CONFIG).is_file():
            return path
    return None
