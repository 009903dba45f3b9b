"""Load a teacher or a student as a stock `DiTPipeline`, without running code from the folder."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiTPipeline, DiTTransformer2DModel
from diffusers.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler

from upcycle.errors import UpcycleError
from upcycle.graft.patches import adapter_folder, load
from upcycle.models import ddit
from upcycle.models.identity_vae import IdentityVAE
from upcycle.sampling.draw import clamp_null_class
from upcycle.sampling.patches import put_on
from upcycle.sources import hub
from upcycle.sources.student import is_student, load_student
from upcycle.sources.weight_files import pick_file, read_json, variants
from upcycle.training.digits import TEACHER

TRANSFORMERS = {"DiTTransformer2DModel": DiTTransformer2DModel}
VAES = {"IdentityVAE": IdentityVAE, "AutoencoderKL": AutoencoderKL}
SCHEDULERS = {
    cls.__name__: cls for cls in (DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler)
}


def load_pipeline(spec: str, revision: str | None = None, base: str | None = None) -> DiTPipeline:
    """A pipeline folder, an export, a Hub id, or ``digits``, the shipped teacher -> `DiTPipeline` in fp32, eval mode.

    A DDiT adapter beside a pipeline is put on it; an adapter alone on the pipeline ``base``, by default the one that it
    was made from. Code that lies beside the weights is not run: the classes of this package are used for what it
    exports.

    Raises:
        UpcycleError: nothing there, no pipeline, or a component that is not known.
    """
    folder = TEACHER if spec == "digits" else Path(spec)
    adapter = adapter_folder(folder) if folder.is_dir() else None
    if not folder.exists() and hub.is_hub_id(spec):
        adapter = hub.fetch_adapter(spec, revision)
    if adapter is not None and adapter.name not in ddit.PLACES:
        config, _ = load(adapter, spec)[0]
        theirs = base or config.base
        if theirs is None:
            raise UpcycleError(f"{spec} is an adapter that does not say of which model; give that with --base")
        if not base and theirs != "digits" and not Path(theirs).exists() and not hub.is_hub_id(theirs):
            raise UpcycleError(f"{spec} is an adapter for {theirs}, which is not there; give its base with --base")
        commit = None if base or theirs == "digits" or Path(theirs).exists() else config.base_revision
        pipe = load_pipeline(theirs, commit)
        put_on(pipe, adapter, spec)
        return pipe
    if base is not None:
        raise UpcycleError(f"--base {base} is for an adapter alone, and {spec} is none; leave it out")
    if not folder.exists():
        if not hub.is_hub_id(spec):
            raise UpcycleError(f"{spec}: no such folder, and no Hub id (owner/name) either; check it")
        folder, _ = hub.fetch(spec, revision=revision, variant=None)
    if folder.is_file() and is_student(folder):
        raise UpcycleError(
            f"{spec} is a transformer in one file, without the VAE and scheduler that sampling needs; give the export "
            "folder that it was made from"
        )
    if not (folder / "transformer" / "config.json").is_file():
        raise UpcycleError(
            f"{spec} is no pipeline: it has no transformer/config.json; give an export or a DiT pipeline"
        )
    if not (folder / "model_index.json").is_file():
        raise UpcycleError(
            f"{spec} has no VAE and scheduler to sample with; convert its source again with --vae ID|DIR"
        )
    index = read_json(spec, folder / "model_index.json")
    if read_json(spec, folder / "transformer" / "config.json").get("_class_name") == "ChunkedDiT":
        transformer = load_student(folder)
    else:
        transformer = load_component(spec, folder / "transformer", TRANSFORMERS, "config.json")
    vae, scheduler = load_vae_and_scheduler(spec, folder)
    if isinstance(transformer, DiTTransformer2DModel):
        clamp_null_class(transformer)
    names = index.get("id2label")
    id2label = {int(k): str(v) for k, v in names.items() if k.isdigit()} if isinstance(names, dict) else None
    pipe = DiTPipeline(transformer, vae, scheduler, id2label=id2label or None)
    if adapter:
        put_on(pipe, adapter, spec)
    return pipe


def load_vae_and_scheduler(spec: str, folder: Path) -> tuple[Any, Any]:
    """The components of a pipeline folder that are no transformer; raises `UpcycleError` where one does not load."""
    vae = load_component(spec, folder / "vae", VAES, "config.json")
    return vae, load_component(spec, folder / "scheduler", SCHEDULERS, "scheduler_config.json")


def class_count(pipe: DiTPipeline) -> int:
    """Classes of a pipeline's transformer, without the null class."""
    c = pipe.transformer.config
    return c.num_classes if "num_classes" in c else c.num_embeds_ada_norm


def load_component(spec: str, folder: Path, known: dict[str, Any], file: str) -> Any:
    """The model (fp32, eval mode) or scheduler in ``folder``, of one of the ``known`` classes; ``file`` is its config.

    Raises `UpcycleError` where there is none, it is of another class, or it does not load.
    """
    if not (folder / file).is_file():
        raise UpcycleError(f"{spec} lacks {folder.name}/{file}, which sampling needs")
    name = read_json(spec, folder / file).get("_class_name")
    name = "DiTTransformer2DModel" if name == "Transformer2DModel" else name
    if name not in known:
        raise UpcycleError(f"{spec}: {folder.name} is a {name}; known are {', '.join(known)}")
    try:
        if folder.name == "scheduler":
            return known[name].from_pretrained(folder)
        files = [path.name for path in folder.iterdir()]
        variant = next((w for w in (None, *variants(files)) if pick_file(files, w)), None)
        return (
            known[name].from_pretrained(folder, torch_dtype=torch.float32, variant=variant).eval().requires_grad_(False)
        )
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise UpcycleError(f"{spec}: {folder.name} does not load: {' '.join(str(error).split())[:300]}") from error
