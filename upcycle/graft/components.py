"""What a bare checkpoint lacks for sampling: a VAE, and the scheduler that DiT pipelines ship."""

import atexit
import dataclasses
import shutil
import tempfile
from pathlib import Path

from diffusers import DDIMScheduler

from upcycle.errors import UpcycleError
from upcycle.sources import DiTConfig, Source
from upcycle.sources.vae import vae_folder
from upcycle.sources.weight_files import read_json


def with_vae(source: Source, spec: str) -> Source:
    """The source with a VAE from a folder or a Hub id, and a DDIM scheduler if it has none.

    ``spec`` may be the VAE's own folder or repository, or a pipeline's with a ``vae`` folder.

    Raises:
        UpcycleError: no VAE there, or one whose latents have other channels than the model takes.
    """
    folder = vae_folder(spec)
    config = read_json(f"--vae {spec}", folder / "config.json")
    channels = config.get("latent_channels", config.get("in_channels"))
    assert isinstance(source.config, DiTConfig) or source.kind == "dc-dit"
    if channels != source.config.in_channels:
        raise UpcycleError(
            f"--vae {spec} makes latents of {channels} channels and {source.spec} takes {source.config.in_channels}; "
            "choose the VAE that the model was trained with"
        )
    components = {**source.components, "vae": folder}
    if "scheduler" not in components:
        # Meta's schedule; kept in a temporary folder from which the conversion copies it.
        made = Path(tempfile.mkdtemp(prefix="upcycle-scheduler-"))
        atexit.register(shutil.rmtree, made, ignore_errors=True)
        DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False).save_pretrained(made)
        components["scheduler"] = made
    return dataclasses.replace(source, components=components)
