"""The VAE that makes latents, and what it makes of pixels."""

import hashlib
from typing import Any, TypeAlias

import torch
from diffusers import AutoencoderKL

from upcycle.errors import UpcycleError
from upcycle.models.identity_vae import IdentityVAE
from upcycle.sampling.pipeline import VAES, load_component
from upcycle.sources.vae import describe_vae, vae_folder
from upcycle.sources.weight_files import read_json

VAE: TypeAlias = AutoencoderKL | IdentityVAE


def load_vae(spec: str) -> VAE:
    """The VAE of a folder or a Hub id, fp32, in eval mode.

    Raises:
        UpcycleError: no VAE there, or one of a class that is not known.
    """
    folder = vae_folder(spec)
    name = read_json(f"--vae {spec}", folder / "config.json").get("_class_name")
    if name not in VAES:
        raise UpcycleError(f"--vae {spec} is an {name}; latents are made with {' or '.join(VAES)}")
    return load_component(f"--vae {spec}", folder, VAES, "config.json")


def describe(vae: VAE, spec: str) -> dict[str, Any]:
    """What the index of a folder says about its VAE: `describe_vae`, and which weights encode."""
    config = {**vae.config, "_class_name": type(vae).__name__}
    # Decoders come in several finetunes of one encoder, which all make the same latents.
    encoder = {
        name: value for name, value in vae.state_dict().items() if not name.startswith(("decoder", "post_quant"))
    }
    return {"id": spec, **describe_vae(config), "encoder_sha256": weights_hash(encoder)}


def weights_hash(state: dict[str, torch.Tensor]) -> str:
    """SHA-256 of the names, shapes, dtypes and values of some weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def latent_shape(vae: VAE, size: int) -> tuple[int, int, int]:
    """Shape [C, H, W] of the latent of an image of ``size`` × ``size`` pixels.

    Raises `UpcycleError` if the VAE cannot encode that size.
    """
    if isinstance(vae, IdentityVAE):
        return vae.config.in_channels, size, size
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    if size % factor:
        raise UpcycleError(f"--size {size} is not a multiple of {factor}, by which the VAE makes images smaller")
    return vae.config.latent_channels, size // factor, size // factor


@torch.inference_mode()
def encode_pixels(vae: VAE, pixels: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Pixels uint8 [n, c, size, size] -> ``mean`` and ``std`` (or ``z0``), fp16 [n, C, H, W], in the model's scale.

    ``dtype`` is that of the arithmetic; the weights stay in fp32.

    Raises:
        UpcycleError: the result is not finite, which fp16 arithmetic may cause.
    """
    x = pixels.to(vae.device).float() / 127.5 - 1
    with torch.autocast(vae.device.type, dtype, enabled=dtype != torch.float32):
        (posterior,) = vae.encode(x, return_dict=False)
    scaling = describe_vae({**vae.config, "_class_name": type(vae).__name__})
    mean = (posterior.mean.float() - scaling["shift_factor"]) * scaling["scaling_factor"]
    if isinstance(vae, IdentityVAE):
        made = {"z0": mean}
    else:
        made = {"mean": mean, "std": posterior.std.float() * scaling["scaling_factor"]}
    made = {name: value.half() for name, value in made.items()}
    if not all(value.isfinite().all() for value in made.values()):
        raise UpcycleError("the VAE gives values that are not finite; take --dtype fp32, or check its weights")
    return {name: value.cpu() for name, value in made.items()}
