"""The handwritten digits that ship with the package: the data of the example teacher and of the tests."""

from importlib.resources import files
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load

from upcycle.errors import UpcycleError

TEACHER = Path(str(files("upcycle"))) / "assets" / "digits" / "teacher"
"""The shipped teacher, a pipeline folder in diffusers' layout."""

NUM_CLASSES = 10
IMAGE_SIZE = 16
_SPLITS = {"train": 0, "val": 1}


def enlarge(images: torch.Tensor) -> torch.Tensor:
    """Raw digits, integers 0..16, [n, 8, 8] -> float32 in [-1, 1], [n, 1, 16, 16].

    The one enlargement of the whole project: bicubic, then clamped, because bicubic overshoots at strokes.
    """
    unit = images.unsqueeze(1).float() / 16
    large = F.interpolate(unit, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bicubic", align_corners=False)
    return large.clamp(0, 1) * 2 - 1


def load_digits(split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """One split of the digits, ink bright on a dark ground.

    Args:
        split: "train" (1,500 images) or "val" (297 held out, the same share of each class).

    Returns:
        images: float32 in [-1, 1], [n, 1, 16, 16].
        labels: int64 in 0..9, [n].
    """
    if split not in _SPLITS:
        raise UpcycleError(f"digits split {split!r} does not exist: use one of {', '.join(_SPLITS)}")
    data = load((files("upcycle") / "assets" / "digits" / "digits.safetensors").read_bytes())
    mask = data["split"] == _SPLITS[split]
    return enlarge(data["images"][mask]), data["labels"][mask].long()
