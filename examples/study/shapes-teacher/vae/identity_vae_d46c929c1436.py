"""A VAE that does nothing, so that a pixel-space DiT fits into a latent-space pipeline.

This file needs only torch and diffusers, because it travels with the checkpoint: `save_pretrained` writes it beside
the weights as `identity_vae_<hash>.py`, where the hash is that of the file's own bytes. Stock diffusers then loads the
pipeline with `trust_remote_code=True`. diffusers puts all such files into one flat namespace, so two different files
under one name would overwrite each other; the hash in the name makes that impossible.
"""

import hashlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.models.modeling_utils import ModelMixin

# Read once: what is saved later is the code that runs, even if the file on disk has changed since.
_CODE = Path(__file__).read_bytes()
CODE_MODULE = f"identity_vae_{hashlib.sha256(_CODE).hexdigest()[:12]}"


class IdentityVAE(ModelMixin, ConfigMixin):
    """Latents are the pixels themselves: `encode` and `decode` return their input.

    Args:
        in_channels: channels of the images.
        scaling_factor: always 1.0 here; pipelines divide the latents by it.
    """

    _auto_class = "AutoModel"

    @register_to_config
    def __init__(self, in_channels: int = 1, scaling_factor: float = 1.0) -> None:
        super().__init__()
        # A checkpoint cannot be empty, and `.dtype` and `.device` are read from a model's tensors.
        self.register_buffer("identity", torch.ones(1))

    def encode(self, x: torch.Tensor, return_dict: bool = True) -> AutoencoderKLOutput | tuple[Any]:
        """Images [n, c, h, w] to a distribution of zero width around them: `.latent_dist.sample()` is `x` exactly."""
        latent_dist = DiagonalGaussianDistribution(torch.cat([x, torch.zeros_like(x)], dim=1), deterministic=True)
        return AutoencoderKLOutput(latent_dist=latent_dist) if return_dict else (latent_dist,)

    def decode(
        self, z: torch.Tensor, return_dict: bool = True, generator: torch.Generator | None = None
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """Latents [n, c, h, w] to the same images. `generator` is there because some pipelines pass one."""
        return DecoderOutput(sample=z) if return_dict else (z,)

    def forward(self, sample: torch.Tensor, return_dict: bool = True) -> DecoderOutput | tuple[torch.Tensor]:
        """Encode and decode [n, c, h, w]: the input again."""
        return self.decode(sample, return_dict=return_dict)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save the config and this code beside it; stock `save_pretrained` saves no code."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / f"{CODE_MODULE}.py").write_bytes(_CODE)
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)


# diffusers writes the class's module name into `auto_map` and model_index.json, and imports it by that name again.
sys.modules[CODE_MODULE] = sys.modules[__name__]
IdentityVAE.__module__ = CODE_MODULE
