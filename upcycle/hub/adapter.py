"""A DDiT adapter on its way to the Hub: alone, or beside its base."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle import provenance
from upcycle.graft.patches import Adapter, adapter_folder, load
from upcycle.models import ddit

TAGS = {
    "DiTTransformer2DModel": ("unconditional-image-generation", ["dit", "class-conditional"]),
    "FluxTransformer2DModel": ("text-to-image", ["flux"]),
    "WanTransformer3DModel": ("text-to-video", ["wan"]),
    "ZImageTransformer2DModel": ("text-to-image", ["z-image"]),
}


@dataclass(frozen=True)
class AdapterSource:
    """Adapters of one pipeline that are to be shared; ``beside``: their base lies in the folder too."""

    adapters: list[Adapter]
    origin: dict[str, Any] | None
    beside: bool

    @property
    def config(self) -> ddit.DDiTConfig:
        """Of the first one."""
        return self.adapters[0][0]

    @property
    def licence(self) -> str | None:
        """That of the base."""
        return (self.origin or {"base": {}})["base"].get("licence")


def open_adapter(folder: Path) -> AdapterSource | None:
    """The adapters in ``folder``; None where there is none. Raises `UpcycleError` where one is damaged."""
    where = adapter_folder(folder)
    if where is None:
        return None
    return AdapterSource(load(folder, str(folder)), provenance.read(folder), where != folder)


def sections(repo_id: str, source: AdapterSource, files: Collection[str]) -> dict[str, str]:
    """The sections of its card that are particular to it; ``files``: those that are sent."""
    config, origin = source.config, source.origin or {"base": {}, "history": [], "evidence": [], "files": {}}
    base = origin["base"].get("id") or config.base or "its base"
    if not origin["base"].get("revision"):
        base = base.rstrip("/").rsplit("/", 1)[-1]  # where it lay on somebody's disk says nothing to others
    trained = any(event["what"] == "finetune" for event in origin["history"])
    sizes = " or ".join(f"{m}" for m in config.patches)
    what = "A pipeline with an adapter" if source.beside else "An adapter"
    name = f"[{base}](https://huggingface.co/{base})" if origin["base"].get("revision") else f"`{base}`"
    state = "trained by distillation from the base itself" if trained else "not trained: coarse steps are far off"
    trusted = (
        ", trust_remote_code=True" if any(name.startswith("vae/") and name.endswith(".py") for name in files) else ""
    )
    loading = f'"{repo_id}"{trusted}' if source.beside else f'"{base}"'
    if not source.beside and not origin["base"].get("revision"):
        loading += ")  # the base: where you have it"
    else:
        loading += ")"
    count = sum(tensor.numel() for _, tensors in source.adapters for tensor in tensors.values())
    at = next((f"/{place}" for place in ddit.PLACES if f"{place}/ddit.py" in files), "") if source.beside else ""
    both = len(source.adapters) > 1
    wanted = "*ddit.*" if both else f"{at[1:]}/ddit.*" if at else "ddit.*"
    return {
        "summary": (
            f"# {repo_id.split('/')[-1]}\n\n{what} for {name} that lets it take patches {sizes} times as large in the "
            "denoising steps that allow it (DDiT, [arXiv 2602.16968](https://arxiv.org/abs/2602.16968)); "
            f"{state}. The base's weights are not changed, and with the base's patches the output has its bits."
        ),
        "use": (
            "## Use\n\n`ddit.py` lies beside the adapter and needs diffusers alone:\n\n```python\n"
            "import importlib.util\nimport sys\n\nfrom diffusers import DiffusionPipeline\n"
            "from huggingface_hub import snapshot_download\n\n"
            f'folder = snapshot_download("{repo_id}", allow_patterns="{wanted}")\n'
            f'spec = importlib.util.spec_from_file_location("ddit", folder + "{at}/ddit.py")\n'
            'ddit = sys.modules["ddit"] = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(ddit)\n\n'
            f"pipe = DiffusionPipeline.from_pretrained({loading}\n"
            "ddit.apply(pipe, folder)  # threshold=..., or fixed=[(4, 0.3), (2, 0.5), (1, 0.2)]\n```\n\n"
            "`pipe.transformer.schedule.log` says which size each step took and why. With `upcycle`: "
            f"`from upcycle.models import ddit`."
            + (" Both transformers have an adapter, and share the schedule." if both else "")
        ),
        "cost": f"## Cost\n\n{count / 1e6:.4g} M parameters, rank {config.rank}. Speed: not measured.",
        "schedule": _schedule(config),
    }


def _schedule(config: ddit.DDiTConfig) -> str:
    said = "## Schedule\n\n"
    if config.threshold is None:
        return said + (
            "No threshold is set, so every step runs with the base's patches: choose one with `upcycle calibrate`, "
            "pass one to `apply`, or give a fixed schedule."
        )
    said += f"Threshold {config.threshold:.4g}, percentile {config.percentile}, differences of order {config.order}."
    if found := config.calibration:
        said += (
            f" Chosen for {found.get('steps')} steps of {found.get('sampler')} at guidance "
            f"{found.get('guidance_scale')}, where the denoising steps were {found.get('speed_up')} times as fast "
            f"(steps by size: {found.get('steps_by_size')}). Other samplers and numbers of steps need another."
        )
    return said


def limits(origin: Mapping[str, Any]) -> str:
    """The card's last words on an adapter."""
    return (
        "## Limits\n\n- What its base cannot do, or does in a biased way, this does too.\n"
        "- Coarse steps lose detail that the finer steps after them must bring back: end on the base's patches.\n"
        "- Samplers that add noise find few coarse steps, or none.\n- Figures above hold for the settings beside them."
    )
