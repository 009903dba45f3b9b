"""A procedural set that is harder than the digits: textured objects on flat and graded backgrounds, with true masks.

    python examples/study/shapes.py --picture shapes.png

32 x 32 pixels in colour, ten classes of outline. Position, size and turn of the object vary a little, its texture
(stripes, a checkerboard, dots; any angle, two colours) says nothing about the class, and the ground is of one colour or
a gradient: detail is where the object is. Everything follows from a seed.

They vary a little because a model that trains for an hour on a CPU core has to learn them: with any turn, and moved by
up to five pixels, 5,500 steps gave textures without outlines (docs/log.md).
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

CLASSES = ("disc", "square", "triangle", "ring", "cross", "star", "crescent", "bar", "frame", "hourglass")
OVERSAMPLING = 3
AT_ONCE = 256


@dataclass
class Shapes:
    """``images`` fp32 in [-1, 1], [n, 3, size, size]; ``labels`` int64 [n]; ``masks`` bool [n, size, size]: where the
    object covers more than half of a pixel."""

    images: torch.Tensor
    labels: torch.Tensor
    masks: torch.Tensor


def make_shapes(count: int, seed: int, size: int = 32) -> Shapes:
    """``count`` images, the classes in turn; a larger ``size`` has the same objects with finer textures."""
    parts = [_draw(first, seed, size) for first in range(0, count, AT_ONCE)]
    return Shapes(*(torch.cat(tensors)[:count] for tensors in zip(*parts, strict=True)))


def write_shards(folder: Path, count: int, seed: int, size: int = 32) -> None:
    """A folder that `upcycle finetune` reads as data."""
    shapes = make_shapes(count, seed, size)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "shapes.partial"
    save_file({"z0": shapes.images.half(), "label": shapes.labels}, partial)
    partial.rename(folder / "shapes.safetensors")


def _draw(first: int, seed: int, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, labels and masks of the `AT_ONCE` shapes from ``first`` on."""
    random, count = torch.Generator().manual_seed(1_000_003 * seed + first), AT_ONCE

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return low + (high - low) * torch.rand(count, *(shape or (1, 1)), generator=random)

    labels = torch.arange(first, first + count) % len(CLASSES)
    # Pixels of a 32 x 32 image, whatever the size; the centre is 0.
    line = ((torch.arange(OVERSAMPLING * size) + 0.5) / (OVERSAMPLING * size) - 0.5) * 32
    row, column = torch.meshgrid(line, line, indexing="ij")
    y, x = row - uniform(-2.5, 2.5), column - uniform(-2.5, 2.5)
    turn, radius = uniform(-0.3, 0.3), uniform(9.0, 11.5)
    u, v = (turn.cos() * x + turn.sin() * y) / radius, (turn.cos() * y - turn.sin() * x) / radius
    inside = torch.empty(u.shape, dtype=torch.bool)
    for k, name in enumerate(CLASSES):
        rows = labels == k
        inside[rows] = _outline(name, u[rows], v[rows])
    cover = F.avg_pool2d(inside.float(), OVERSAMPLING)[:, None]

    angle, period = uniform(0, 2 * math.pi), uniform(6.0, 9.0) * 32 / size
    s = (angle.cos() * x + angle.sin() * y) * 2 * math.pi / period
    t = (angle.cos() * y - angle.sin() * x) * 2 * math.pi / period
    kinds = torch.stack([s.sin(), 1.4 * s.sin() * t.sin(), 0.8 * (s.cos() + t.cos()) - 0.3], 1)
    wave = kinds[torch.arange(count), torch.randint(3, (count,), generator=random)]
    blend = F.avg_pool2d((0.5 + 1.5 * wave).clamp(0, 1), OVERSAMPLING)[:, None]
    light, dark = uniform(0.0, 1.0, 3, 1, 1), uniform(-1.0, -0.4, 3, 1, 1)
    texture = dark + blend * (light - dark)

    one, other = uniform(-0.7, 0.7, 3, 1, 1), uniform(-0.7, 0.7, 3, 1, 1)
    direction, graded = uniform(0, 2 * math.pi), uniform(0, 1) < 0.5
    along = ((direction.cos() * column + direction.sin() * row) / 45 + 0.5).clamp(0, 1)
    along = F.avg_pool2d(torch.where(graded, along, 0.0), OVERSAMPLING)[:, None]
    ground = one + along * (other - one)
    return ground + cover * (texture - ground), labels, cover[:, 0] > 0.5


def _outline(name: str, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Where an object of radius 1 is; bool like u and v."""
    r, widest, narrowest = u.hypot(v), torch.maximum(u.abs(), v.abs()), torch.minimum(u.abs(), v.abs())
    if name == "disc":
        return r < 1
    if name == "square":
        return widest < 0.85
    if name == "triangle":
        return (v > -0.6) & (v < 1.1 - 1.75 * u.abs())
    if name == "ring":
        return (r < 1.05) & (r > 0.6)
    if name == "cross":
        return (widest < 1.05) & (narrowest < 0.33)
    if name == "star":
        return r < 0.75 + 0.35 * (5 * torch.atan2(v, u)).cos()
    if name == "crescent":
        return (r < 1.05) & ((u - 0.55).hypot(v) > 0.8)
    if name == "bar":
        return (u.abs() < 1.15) & (v.abs() < 0.38)
    if name == "frame":
        return (widest < 0.95) & (widest > 0.55)
    if name == "hourglass":
        return (v.abs() < 0.95) & (u.abs() < 0.15 + 0.8 * v.abs())
    raise ValueError(name)


def main() -> None:
    from torchvision.utils import save_image

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, default=Path("shapes.png"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shapes = make_shapes(80, options.seed)
    masks = shapes.masks[:20, None].expand(-1, 3, -1, -1) * 2.0 - 1
    save_image(F.interpolate(torch.cat([shapes.images, masks]) / 2 + 0.5, scale_factor=3), options.picture, nrow=20)


if __name__ == "__main__":
    main()
