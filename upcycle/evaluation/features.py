"""What metrics look at: the features of torch-fidelity's Inception, with ADM's spatial ones, or of a small network for
the shipped digits, which needs no download.

Both take images uint8 [n, 3, H, W] and give ``features`` (FID, KID, precision and recall), ``spatial`` (sFID) and
``logits`` (Inception score), all fp32 [n, d].
"""

import hashlib
import os
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torch.nn.functional as F
from safetensors.torch import load
from torch import nn
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
from torch_fidelity.registry import register_feature_extractor

from upcycle.errors import UpcycleError
from upcycle.provenance import digest
from upcycle.training.digits import IMAGE_SIZE, NUM_CLASSES

NAMES = ("inception", "digits")
LAYERS = ("features", "spatial", "logits")

# Of the file that torch-fidelity names, which is a pickle: no other is loaded.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
_SPATIAL_CHANNELS = 7  # of mixed_6/conv, as ADM's evaluator takes them (openai/guided-diffusion)
_DIGITS = "assets/digits/features.safetensors"


class Inception(FeatureExtractorInceptionV3):
    """torch-fidelity's ``inception-v3-compat`` (TensorFlow's weights and resizing) with one more feature, ``spatial``:
    the first 7 channels of ADM's ``mixed_6/conv``, 7 x 17 x 17 = 2023.

    The others bear torch-fidelity's names ``2048`` and ``logits_unbiased``.
    """

    def __init__(self, name: str, features_list: list[str], **options: Any):
        # The base class refuses names that are not its own, and stops at the last that it is asked for.
        super().__init__(name, ["2048", "logits_unbiased"], **options)
        self._spatial = torch.empty(0)
        self.Mixed_6d.branch1x1.register_forward_hook(self._look)

    def _look(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self._spatial = output[:, :_SPATIAL_CHANNELS].flatten(1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features, logits = super().forward(x)
        return features, self._spatial.float(), logits


class DigitsNet(nn.Module):
    """A classifier of digits [n, 1, 16, 16] in [-1, 1] with 64 features; `examples/digits/train_features.py` trains it.

    Returns the mean of the last map [n, 64], four of its channels [n, 4 * 4 * 4], and the logits [n, 10].
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(1, 16, 3, padding=1)
        self.conv_2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.conv_3 = nn.Conv2d(32, 64, 3, stride=2, padding=1)
        self.head = nn.Linear(64, NUM_CLASSES)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        for conv in (self.conv_1, self.conv_2, self.conv_3):
            x = F.relu(conv(x))
        features = x.mean((2, 3))
        return features, x[:, :4].flatten(1), self.head(features)


class Digits(FeatureExtractorBase):
    """`DigitsNet` with the shipped weights; colours are averaged. Registered with torch-fidelity as ``digits``."""

    def __init__(self, name: str, features_list: list[str], **options: Any):
        super().__init__(name, features_list)
        self.net = DigitsNet()
        self.net.load_state_dict(load((files("upcycle") / _DIGITS).read_bytes()))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = dict(zip(LAYERS, self.net(x.float().mean(1, keepdim=True) / 127.5 - 1), strict=True))
        return tuple(found[name] for name in self.features_list)

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return LAYERS

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "features"

    @staticmethod
    def can_be_compiled() -> bool:
        return False


register_feature_extractor("digits", Digits)


def load_extractor(name: str, inception_weights: Path | None = None) -> FeatureExtractorBase:
    """One of `NAMES`, in eval mode, on the CPU.

    Args:
        inception_weights: torch-fidelity's file; by default the one in torch's hub cache, downloaded if need be.

    Raises:
        UpcycleError: weights for the digits' extractor, which has its own, or `inception_file` does not have them.
    """
    if name == "digits":
        if inception_weights is not None:
            raise UpcycleError("--features digits has its own weights; leave out --inception-weights")
        return Digits(name, list(LAYERS)).eval().requires_grad_(False)
    path = inception_file(inception_weights)
    return Inception("inception-v3-compat", [], feature_extractor_weights_path=str(path)).eval()


def weights_sha256(name: str) -> str:
    """Which weights an extractor has: the SHA-256 of their file."""
    if name == "inception":
        return INCEPTION_SHA256
    return hashlib.sha256((files("upcycle") / _DIGITS).read_bytes()).hexdigest()


def check_size(name: str, size: tuple[int, int], spec: str) -> None:
    """Raise `UpcycleError` where an extractor does not take images of ``size`` (height, width)."""
    if name == "digits" and size != (IMAGE_SIZE, IMAGE_SIZE):
        raise UpcycleError(
            f"{spec} has images of {size[1]}x{size[0]} and --features digits is for digits of "
            f"{IMAGE_SIZE}x{IMAGE_SIZE}; take --features inception"
        )


def inception_file(path: Path | None) -> Path:
    """The checked file of Inception's weights: ``path``, or the one in torch's hub cache, where it is downloaded to.

    torch-fidelity unpickles it, so the hash comes first.

    Raises:
        UpcycleError: no such file, another file, or no network.
    """
    if path is None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rpartition("/")[2]
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), INCEPTION_SHA256, progress=False)
            except (URLError, OSError, RuntimeError) as error:
                raise UpcycleError(
                    f"Inception's weights cannot be downloaded from {URL_INCEPTION_V3} ({error}); fetch that file "
                    "elsewhere and give it with --inception-weights"
                ) from error
    if not os.path.isfile(path):
        raise UpcycleError(f"--inception-weights {path}: no such file; it is {URL_INCEPTION_V3}")
    if digest(path) != INCEPTION_SHA256:
        raise UpcycleError(
            f"{path} is not torch-fidelity's file of Inception's weights: its SHA-256 differs, and it is not loaded; "
            f"fetch {URL_INCEPTION_V3}"
        )
    return path


@torch.inference_mode()
def extract(extractor: FeatureExtractorBase, images: torch.Tensor) -> Mapping[str, torch.Tensor]:
    """Features by name (`LAYERS`), fp32 on the CPU, of images uint8 [n, 3, H, W] on the extractor's device."""
    return {name: value.cpu() for name, value in zip(LAYERS, extractor(images), strict=True)}
