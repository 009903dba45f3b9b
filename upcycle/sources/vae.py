"""VAEs by name: where one lies, and what its config says about the latents that it makes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upcycle.errors import UpcycleError
from upcycle.sources import hub
from upcycle.sources.weight_files import read_json

# What diffusers takes for a scaling_factor that the config leaves out, as older ones do.
_SCALING = {"AutoencoderKL": 0.18215, "IdentityVAE": 1.0}


def vae_folder(spec: str) -> Path:
    """The folder with the config of a VAE: a local folder or a Hub id, the VAE's own or a pipeline's with a ``vae``.

    Raises:
        UpcycleError: no VAE there, or as `hub.fetch_vae` does.
    """
    folder = Path(spec)
    if not folder.exists():
        if not hub.is_hub_id(spec):
            raise UpcycleError(f"--vae {spec}: no such folder, and no Hub id (owner/name) either; check it")
        folder = hub.fetch_vae(spec)
    for candidate in (folder, folder / "vae"):
        if not (candidate / "config.json").is_file():
            continue
        name = read_json(f"--vae {spec}", candidate / "config.json").get("_class_name")
        if isinstance(name, str) and (name.startswith("Autoencoder") or name == "IdentityVAE"):
            return candidate
    raise UpcycleError(f"--vae {spec} holds no VAE: neither config.json nor vae/config.json names an Autoencoder")


def describe_vae(config: Mapping[str, Any]) -> dict[str, Any]:
    """What a model must know of the VAE that made its latents, from the VAE's ``config.json``.

    Returns:
        ``class``, ``latent_channels``, and ``scaling_factor`` and ``shift_factor`` of z = (x − shift) · scaling.
    """
    name = config.get("_class_name")
    scaling = config.get("scaling_factor")
    return {
        "class": name,
        "latent_channels": config.get("latent_channels", config.get("in_channels")),
        "scaling_factor": _SCALING.get(str(name)) if scaling is None else scaling,
        "shift_factor": config.get("shift_factor") or 0.0,
    }
