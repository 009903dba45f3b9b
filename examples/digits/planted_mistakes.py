"""What mistakes in a reference do to a Fréchet distance: held-out digits against the training digits, as they are,
compressed by JPEG, and enlarged by another filter than the one that made the digits.

python examples/digits/planted_mistakes.py
"""

import io

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from upcycle.evaluation.features import extract, load_extractor
from upcycle.evaluation.images import open_set
from upcycle.evaluation.metrics import frechet, statistics


def jpeg(images: torch.Tensor, quality: int) -> torch.Tensor:
    """Images uint8 [n, 3, h, w], compressed and read again."""
    found = []
    for image in images.permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, format="JPEG", quality=quality)
        found.append(np.array(Image.open(file)))
    return torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2)


def enlarged(images: torch.Tensor, mode: str) -> torch.Tensor:
    """Images uint8 [n, 3, 16, 16] made small and enlarged with another filter than the digits', which is bicubic."""
    small = F.interpolate(images.float(), size=8, mode="area")
    return F.interpolate(small, size=16, mode=mode).round().to(torch.uint8)


def mistakes(images: torch.Tensor) -> dict[str, torch.Tensor]:
    """References by what was done to them."""
    return {
        "none": images,
        **{f"JPEG, quality {quality}": jpeg(images, quality) for quality in (95, 75, 50, 30, 10)},
        **{f"enlarged, {mode}": enlarged(images, mode) for mode in ("nearest", "bilinear")},
    }


def measure() -> dict[str, tuple[float, float]]:
    """FID and sFID in the digits' features, by mistake."""
    extractor = load_extractor("digits")
    train, held_out = open_set("digits"), open_set("digits-val")

    def numbers(images: torch.Tensor) -> tuple[dict[str, np.ndarray], ...]:
        features = extract(extractor, images)
        return statistics(features["features"]), statistics(features["spatial"])

    ours = numbers(held_out.read(range(held_out.count)))
    references = mistakes(train.read(range(train.count)))
    return {
        name: tuple(frechet(*pair) for pair in zip(ours, numbers(images), strict=True))
        for name, images in references.items()
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(f"{'mistake':20} {'FID':>8} {'sFID':>8}")
    for name, (fid, sfid) in measure().items():
        print(f"{name:20} {fid:8.2f} {sfid:8.2f}")
