"""Images as pixels, and grids of them."""

from pathlib import Path

import torch
from PIL import Image

LEAST_SIDE = 48  # small images are enlarged, pixel by pixel, so that a person can see them


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in [0, 1], [n, 1 or 3, H, W] -> uint8 [n, 3, H, W], rounded as PNG files are."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)


def save_grid(images: torch.Tensor, path: Path, columns: int) -> None:
    """Write images fp32 in [0, 1], [n, 1 or 3, H, W], as one PNG with ``columns`` columns."""
    scale = max(1, -(-LEAST_SIDE // images.shape[-1]))
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    gap = 2
    canvas = torch.ones(channels, rows * (height * scale + gap) - gap, columns * (width * scale + gap) - gap)
    for i, image in enumerate(images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)):
        top, left = i // columns * (height * scale + gap), i % columns * (width * scale + gap)
        canvas[:, top : top + height * scale, left : left + width * scale] = image
    array = (canvas.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(array.squeeze(-1) if channels == 1 else array).save(path)
