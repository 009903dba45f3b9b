"""Sets of images to compare: folders of images, folders of latents, ADM's ``.npz`` files, the shipped digits."""

import hashlib
import os
import re
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from upcycle.errors import UpcycleError
from upcycle.latents.folder import INDEX
from upcycle.latents.images import ENDINGS
from upcycle.latents.reader import LatentFolder
from upcycle.latents.vae import VAE, load_vae, weights_hash
from upcycle.provenance import digest
from upcycle.sampling.grid import to_uint8
from upcycle.sources.vae import describe_vae
from upcycle.training.digits import load_digits

STATISTICS = {"mu", "sigma"}
THREADS = min(16, os.cpu_count() or 1)


@dataclass(frozen=True)
class ImageSet:
    """``count`` images of ``size`` (height, width); a file of statistics alone has neither images nor size.

    ``read``: rows -> uint8 [n, 3, H, W] on the CPU. ``sha256``: of the content, whatever it is called.
    ``statistics``: of all the images, where a file brings them: ``mu`` [d], ``sigma`` [d, d], and ``mu_s``,
    ``sigma_s`` of the spatial features.
    """

    spec: str
    count: int
    size: tuple[int, int] | None
    sha256: str
    read: Callable[[Sequence[int]], torch.Tensor]
    statistics: dict[str, np.ndarray] | None = None


def open_set(spec: str, vae: str | None = None, device: str | torch.device = "cpu") -> ImageSet:
    """The images of a folder or an ``.npz`` file, ``digits`` or ``digits-val``.

    Args:
        vae: decodes latents; by default the one that their index names.
        device: where it does that.

    Raises:
        UpcycleError: nothing there, no images, images of differing sizes, or damaged files.
    """
    if spec in ("digits", "digits-val"):
        images, _ = load_digits("val" if spec == "digits-val" else "train")
        return _of_tensor(spec, to_uint8(images / 2 + 0.5))
    path = Path(spec)
    if path.suffix == ".npz" and path.is_file():
        return _of_npz(path)
    if not path.is_dir():
        if path.is_file():
            raise UpcycleError(f"{spec} is a single file; give a folder of images or latents, or an .npz file")
        raise UpcycleError(f"{spec}: no such folder of images or latents, and no .npz file; check it")
    if (path / INDEX).is_file() or any(path.glob("*.safetensors")):
        return _of_latents(path, vae, device)
    return _of_files(path)


def _of_tensor(spec: str, images: torch.Tensor) -> ImageSet:
    sha256 = hashlib.sha256(images.contiguous().numpy()).hexdigest()
    return ImageSet(spec, len(images), (images.shape[2], images.shape[3]), sha256, lambda rows: images[list(rows)])


def image_files(folder: Path) -> list[Path]:
    """Images in a folder and below it, sorted; without the overview that `upcycle sample` draws of its samples."""
    found = [Path(at, name) for at, _, names in os.walk(folder, followlinks=True) for name in sorted(names)]
    found = sorted(path for path in found if path.suffix.lower() in ENDINGS and not path.name.startswith("."))
    samples = any(re.fullmatch(r"class\d+-seed-?\d+\.png", path.name) for path in found)
    return [path for path in found if not (samples and path == folder / "samples.png")]


def _of_files(folder: Path) -> ImageSet:
    files = image_files(folder)
    if not files:
        raise UpcycleError(f"{folder} holds no images ({' '.join(ENDINGS)}), latents or pipeline; check the folder")

    def look(path: Path) -> tuple[tuple[int, int], bytes]:
        try:
            with Image.open(path) as image:
                width, height = image.size
            return (height, width), bytes.fromhex(digest(path))
        except (OSError, UnidentifiedImageError) as error:
            raise UpcycleError(f"{path} is no readable image ({error}); remove it or make it again") from error

    with ThreadPoolExecutor(THREADS) as pool:
        seen = list(pool.map(look, files))
    size = seen[0][0]
    for path, (other, _) in zip(files, seen, strict=True):
        if other != size:
            raise UpcycleError(
                f"{folder} holds images of differing sizes: {files[0].name} is {size[1]}x{size[0]} and {path.name} "
                f"{other[1]}x{other[0]}; bring all to one size"
            )

    def read_one(row: int) -> torch.Tensor:
        try:
            array = np.array(Image.open(files[row]).convert("RGB"))
        except OSError as error:
            raise UpcycleError(f"{files[row]} is damaged ({error}); remove it or make it again") from error
        return torch.from_numpy(array).permute(2, 0, 1)

    def read(rows: Sequence[int]) -> torch.Tensor:
        with ThreadPoolExecutor(THREADS) as pool:
            return torch.stack(list(pool.map(read_one, rows)))

    content = hashlib.sha256(b"".join(found for _, found in seen)).hexdigest()
    return ImageSet(str(folder), len(files), size, content, read)


def _of_npz(path: Path) -> ImageSet:
    """``arr_0`` uint8 [n, H, W, 3], and ``mu``, ``sigma``, ``mu_s``, ``sigma_s``, as ADM's files have them."""
    try:
        with path.open("rb") as opened:
            if not zipfile.is_zipfile(opened):  # numpy would speak of pickles
                raise UpcycleError(f"{path} is no .npz file, which is a zip archive of arrays; make it again")
        with np.load(path, allow_pickle=False) as file:
            found = {name: file[name] for name in ("arr_0", "mu", "sigma", "mu_s", "sigma_s") if name in file.files}
            names = ", ".join(file.files) or "nothing"
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UpcycleError(f"{path} is no readable .npz file of arrays ({error}); make it again") from error
    images = found.pop("arr_0", None)
    if images is None and not found.keys() >= STATISTICS:
        raise UpcycleError(f"{path} holds {names}; it must hold arr_0, or mu and sigma, as ADM's files do")
    if images is not None and images.ndim == 4 and not len(images):
        raise UpcycleError(f"{path} holds no images: its arr_0 is empty; make it again")
    if images is not None and (images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3):
        raise UpcycleError(f"{path} has arr_0 of {images.dtype} {list(images.shape)}; it must be uint8 [n, H, W, 3]")
    for mu, sigma in (("mu", "sigma"), ("mu_s", "sigma_s")):
        shapes = [list(found[name].shape) if name in found else None for name in (mu, sigma)]
        if shapes != [None, None] and (not shapes[0] or shapes[1] != 2 * shapes[0]):
            raise UpcycleError(
                f"{path} has {mu} of {shapes[0]} and {sigma} of {shapes[1]}; they must be [d] and [d, d]"
            )
    if images is None:
        return ImageSet(str(path), 0, None, digest(path), lambda rows: torch.empty(0), found)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2)
    size = (pixels.shape[2], pixels.shape[3])
    return ImageSet(str(path), len(pixels), size, digest(path), lambda rows: pixels[list(rows)], found or None)


def _of_latents(path: Path, vae: str | None, device: str | torch.device) -> ImageSet:
    """Latents decoded when they are read; of posteriors the mean."""
    latents = LatentFolder(path)
    named = (latents.vae or {}).get("id")
    if vae is None and named is None:
        raise UpcycleError(f"{path} does not say which VAE made its latents; give that with --vae")
    try:
        decoder: VAE = load_vae(vae or str(named))
    except UpcycleError as error:
        raise UpcycleError(f"{path} cannot be decoded: {error}; give another with --vae") from error
    scaling = describe_vae({**decoder.config, "_class_name": type(decoder).__name__})
    if scaling["latent_channels"] != latents.sample_shape[0]:
        raise UpcycleError(
            f"{path} has latents of {latents.sample_shape[0]} channels and the VAE {vae or named} takes "
            f"{scaling['latent_channels']}; give the VAE that made them with --vae"
        )
    weights = hashlib.sha256(weights_hash(decoder.state_dict()).encode())
    for shard in sorted(path.glob("*.safetensors")):
        weights.update(digest(shard).encode())
    decoder.to(device)

    @torch.inference_mode()
    def read(rows: Sequence[int]) -> torch.Tensor:
        z = torch.stack([latents.row(row) for row in rows]).to(device)
        (images,) = decoder.decode(z / scaling["scaling_factor"] + scaling["shift_factor"], return_dict=False)
        return to_uint8(images.float() / 2 + 0.5).cpu()

    height, width = read([0]).shape[2:]
    return ImageSet(str(path), len(latents), (height, width), weights.hexdigest(), read)
