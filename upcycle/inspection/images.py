"""Real images as a student's clean latents."""

from collections.abc import Sequence

import torch
from diffusers import DiTPipeline

from upcycle.errors import UpcycleError
from upcycle.latents.encode import read_pixels
from upcycle.latents.images import Images, open_images
from upcycle.latents.vae import encode_pixels
from upcycle.models.identity_vae import IdentityVAE
from upcycle.sampling.pipeline import class_count


def choose(pipe: DiTPipeline, spec: str, classes: list[int] | None, num: int) -> tuple[Images, list[int], list[int]]:
    """The images of a folder, which of them to look at, and their classes: the first ``num`` of each of ``classes``, by
    default of the first ten that are there.

    Raises:
        UpcycleError: no images, or sub-folders that are no classes of the model.
    """
    images = open_images(spec)
    of = _classes(pipe, spec, images)
    there = sorted({of[label] for label in images.labels})
    wanted = there[:10] if classes is None else [label for label in dict.fromkeys(classes) if label in there]
    if not wanted:
        raise UpcycleError(f"{spec} holds no image of the classes that --classes names; it has {_some(there)}")
    items = []
    for label in wanted:
        items += [item for item, place in enumerate(images.labels) if of[place] == label][:num]
    return images, items, [of[images.labels[item]] for item in items]


def _classes(pipe: DiTPipeline, spec: str, images: Images) -> list[int]:
    """The model's class of every label: by the sub-folder's name, which is the class's or its id, else the label."""
    names, count = images.classes or [], class_count(pipe)
    known = [int(name) if name.isdigit() and int(name) < count else pipe.labels.get(name) for name in names]
    found = [label for label in known if label is not None]
    if names and len(found) == len(names):
        return found
    if images.num_classes == count or (not names and images.num_classes < count):
        return list(range(images.num_classes))
    wrong = next((name for name, label in zip(names, known, strict=True) if label is None), images.num_classes - 1)
    raise UpcycleError(
        f"{spec}: {wrong} is no class of this model; give the sub-folders the ids or names of its {count} classes"
    )


def _some(labels: Sequence[int]) -> str:
    return ", ".join(map(str, labels[:10])) + (" ..." if len(labels) > 10 else "")


def read(pipe: DiTPipeline, images: Images, items: list[int]) -> torch.Tensor:
    """Latents in the model's scale, fp32 [n, C, H, W], the means of the VAE's posteriors, an image at a time.

    Raises `UpcycleError` for an image that cannot be read.
    """
    vae, side = pipe.vae, pipe.transformer.config.sample_size
    factor = 1 if isinstance(vae, IdentityVAE) else 2 ** (len(vae.config.block_out_channels) - 1)
    latents = []
    for item in items:
        pixels = read_pixels(images, item, side * factor, vae.config.in_channels)
        if isinstance(pixels, str):
            raise UpcycleError(
                f"{images.source['path']}: {images.names[item]} cannot be read ({pixels}); "
                "put a readable image in its place"
            )
        latents.append(next(iter(encode_pixels(vae, pixels[None], torch.float32).values())).float())
    return torch.cat(latents)
