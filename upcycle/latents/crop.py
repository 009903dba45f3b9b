"""From an image file to the square of pixels that a VAE takes."""

import numpy as np
import torch
from PIL import Image

LONGEST = 100  # times as long as wide; resizing such an image would take gigabytes


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """The centre of an image as ``size`` × ``size`` pixels, as ADM and DiT cut theirs.

    It is halved by boxes while its shorter side is at least twice ``size``, then resized by bicubic interpolation until
    that side is ``size``, and cut. Raises `ValueError` for an image more than 100 times as long as wide.
    """
    if max(image.size) > LONGEST * min(image.size):
        raise ValueError(f"{image.width}x{image.height} is more than {LONGEST} times as long as wide")
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def to_pixels(image: Image.Image, size: int, channels: int) -> torch.Tensor:
    """Decode and cut an image: uint8 [channels, size, size], grey or RGB."""
    cut = center_crop(image.convert("L" if channels == 1 else "RGB"), size)
    return torch.from_numpy(np.array(cut)).reshape(size, size, channels).permute(2, 0, 1).contiguous()
