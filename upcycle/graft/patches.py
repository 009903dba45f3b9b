"""`convert --method ddit`: an adapter with which a pretrained model takes coarser patches, and the base beside it."""

import json
import shutil
from collections.abc import Callable, Sequence
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

Adapter = tuple[ddit.DDiTConfig, dict[str, torch.Tensor]]

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
    """The conversion of one transformer, ready to be carried out by `convert`."""

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
    def fresh_bytes(self) -> int:
        """Of the adapter's tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def bytes_of(plans: Sequence[Plan]) -> int:
    """What `convert` will write."""
    base = plans[0].backbone.folder
    return sum(plan.fresh_bytes for plan in plans) + sum((base / name).stat().st_size for name in plans[0].files)


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


def convert(
    plans: Sequence[Plan], out: Path, *, force: bool = False, written: Callable[[int], None] = lambda n: None
) -> None:
    """Write the adapters, and unless they are wanted alone the base's files as they are, to ``out``.

    ``plans``: of the transformers of one pipeline. ``written`` is told the bytes of each file as it is done. Nothing is
    left half-written.
    """
    plan = plans[0]
    backbone = plan.backbone
    keep = (backbone.folder,) if Path(backbone.spec).expanduser().exists() else ()
    base = {
        "id": backbone.spec,
        "kind": "diffusers",
        "revision": backbone.revision,
        "licence": backbone.licence,
    }
    options = asdict(plan.options)
    if len(plans) > 1:
        options["component"] = [each.options.component for each in plans]
    done = provenance.event("convert", method="ddit", source=backbone.spec, revision=backbone.revision, options=options)
    with new_folder(out, force, bytes_needed=bytes_of(plans), keep=keep) as folder:
        for name in plan.files:
            target = folder / (name if backbone.subfolder else f"transformer/{name}")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(backbone.folder / name, target)
            written(target.stat().st_size)
        made = [(each.config, each.tensors) for each in plans]
        write_adapters(folder, made, provenance.metadata(base, [done]), beside=not plan.adapter_only)
        written(sum(each.fresh_bytes for each in plans))
        provenance.write(folder, base, [done])


def load(folder: Path, name: str) -> list[Adapter]:
    """Config and tensors of every adapter in a folder; raises `UpcycleError`, which calls it ``name``, where there is
    none, or one is damaged."""
    try:
        return ddit.load_adapters(folder)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise UpcycleError(f"{name}: {' '.join(str(error).split())}") from error


def export(
    trained: list[Adapter],
    start: Path,
    out: Path,
    *,
    event: dict[str, Any],
    evidence: list[dict[str, Any]] | None = None,
) -> None:
    """Save trained adapters to ``out``, with the others of ``start`` and the base's files where it has them; provenance
    goes on."""
    config = trained[0][0]
    before = provenance.read(start)
    before = before or {"base": {"id": config.base, "kind": "diffusers", "revision": config.base_revision,
                                 "licence": None}, "history": []}  # fmt: skip
    base, history = before["base"], [*before["history"], event]
    beside = not (start / ddit.CONFIG).is_file()
    new = {config.component: (config, tensors) for config, tensors in trained}
    whole = [new.get(config.component, (config, tensors)) for config, tensors in load(start, str(start))]
    with new_folder(out, force=True, keep=(start,)) as folder:
        if beside:
            left_out = shutil.ignore_patterns(".*", "__pycache__", provenance.FILE, "README.md", "images")
            for path in start.iterdir():
                if path.is_dir() and path.name not in (*ddit.PLACES, "images") and not path.name.startswith("."):
                    shutil.copytree(path, folder / path.name, ignore=left_out)
                elif path.is_file() and (path.name == "model_index.json" or path.name.startswith("LICENSE")):
                    shutil.copyfile(path, folder / path.name)
        write_adapters(folder, whole, provenance.metadata(base, history), beside=beside)
        if (out / "README.md").is_file():
            shutil.copyfile(out / "README.md", folder / "README.md")  # somebody's
        provenance.write(folder, base, history, evidence=evidence)


def write_adapters(folder: Path, adapters: Sequence[Adapter], metadata: dict[str, str], *, beside: bool) -> None:
    """Write the files of adapters, each in its place (`ddit.PLACES`), with provenance in the header of its weights.

    ``beside``: the pipeline is in ``folder`` too; otherwise the first adapter lies at its top.
    """
    for number, (config, tensors) in enumerate(adapters):
        place = ddit.PLACES[config.component == ddit.COMPONENTS[1]]
        where = folder / place if beside or number else folder
        where.mkdir(parents=True, exist_ok=True)
        ddit.write_adapter(where, config, tensors, metadata)


def update(folder: Path, **changes: Any) -> list[Path]:
    """Change the configs of the adapters that lie in ``folder``, and their digests there; returns their files."""
    files = [path / ddit.CONFIG for path in ddit.adapter_folders(folder)]
    for file, (config, _) in zip(files, load(folder, str(folder)), strict=True):
        write_text(file, json.dumps(asdict(replace(config, **changes)), indent=2) + "\n")
    if (folder / provenance.FILE).is_file():
        provenance.add_evidence(folder, drawn=[file.relative_to(folder).as_posix() for file in files])
    return files


def adapter_folder(folder: Path) -> Path | None:
    """Where a folder holds its first adapter: at its top or beside the pipeline; None where it holds none."""
    return next(iter(ddit.adapter_folders(folder)), None)
