"""The two sets of the study: their teachers, data, held-out images, and the classifier whose features judge samples."""

import argparse
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from shapes import CLASSES, make_shapes
from torch import nn

from upcycle.evaluation.features import load_extractor
from upcycle.training.digits import NUM_CLASSES, load_digits

HERE = Path(__file__).parent
SHAPES_TEACHER, SHAPES_CLASSIFIER = HERE / "shapes-teacher", HERE / "shapes-classifier.safetensors"
TRAIN_SEED, VAL_SEED, REFERENCE_SEED = 0, 1, 2
GUIDANCE = 2.0


@dataclass(frozen=True)
class Set:
    """``teacher`` and ``data`` as recipes name them. ``held_out`` gives images fp32 [n, C, H, W] in [-1, 1] and labels
    int64 [n] that nothing was trained on; ``reference`` images whose features those of samples are compared with;
    ``look`` makes features fp32 [n, d] and logits [n, classes] of images."""

    name: str
    teacher: str
    data: str
    classes: int
    held_out: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    reference: Callable[[], torch.Tensor]
    look: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class ShapesNet(nn.Module):
    """A classifier of shapes [n, 3, size, size] in [-1, 1] with 64 features: features [n, 64] and logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 64, 64)
        self.convs = nn.ModuleList(
            nn.Conv2d(i, o, 3, padding=1, stride=1 if i == 3 else 2) for i, o in itertools.pairwise(widths)
        )
        self.head = nn.Linear(64, len(CLASSES))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for conv in self.convs:
            x = F.relu(conv(x))
        features = x.mean((2, 3))
        return features, self.head(features)


def train_classifier(path: Path, *, steps: int = 3000, pixels: int = 32, device: str = "cpu") -> float:
    """Train a `ShapesNet`, store it, and return how many held-out shapes it reads right."""
    torch.manual_seed(0)
    shapes, random = make_shapes(16384, TRAIN_SEED, pixels), torch.Generator().manual_seed(0)
    net = ShapesNet().to(device)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 + 0.5 * math.cos(math.pi * i / steps))
    for _ in range(steps):
        rows = torch.randint(len(shapes.images), (128,), generator=random)
        x, y = shapes.images[rows], shapes.labels[rows]
        x = x + 0.05 * torch.randn(x.shape, generator=random)  # samples of a diffusion model are not noiseless
        loss = F.cross_entropy(net(x.to(device))[1], y.to(device), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net = net.cpu().eval()
    held_out = make_shapes(2000, VAL_SEED, pixels)
    with torch.inference_mode():
        accuracy = (net(held_out.images)[1].argmax(1) == held_out.labels).float().mean().item()
    partial = path.with_suffix(".partial")
    save_file(net.state_dict(), partial)
    partial.replace(path)
    return accuracy


def digits() -> Set:
    """The shipped digits: 16 x 16 pixels in grey, 1,500 images to train on."""
    extractor = load_extractor("digits")

    @torch.inference_mode()
    def look(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features, _, logits = extractor(((images.clamp(-1, 1) + 1) * 127.5).round().expand(-1, 3, -1, -1))
        return features, logits

    return Set(
        "digits", "digits", "digits", NUM_CLASSES, lambda: load_digits("val"), lambda: load_digits("train")[0], look
    )


def shapes(
    data: Path, *, teacher: Path = SHAPES_TEACHER, classifier: Path = SHAPES_CLASSIFIER, pixels: int = 32
) -> Set:
    """The shapes of `shapes.py`: colour; ``data`` is the folder of those to train on (`write_shards`)."""
    net = ShapesNet()
    net.load_state_dict(load_file(classifier))

    @torch.inference_mode()
    def look(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return net(x.clamp(-1, 1))

    @cache
    def held_out() -> tuple[torch.Tensor, torch.Tensor]:
        found = make_shapes(200, VAL_SEED, pixels)
        return found.images, found.labels

    return Set(
        "shapes",
        str(teacher),
        str(data),
        len(CLASSES),
        held_out,
        lambda: make_shapes(2000, REFERENCE_SEED, pixels).images,
        look,
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Train the shapes' classifier.")
    parser.add_argument("--out", type=Path, default=SHAPES_CLASSIFIER)
    parser.add_argument("--steps", type=int, default=3000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"accuracy, 2,000 held-out shapes: {train_classifier(options.out, steps=options.steps):.4f}")
