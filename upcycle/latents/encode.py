"""Encode images: read and cut them in threads, and put them through a VAE batch by batch."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby
from typing import Any

import torch
from PIL import UnidentifiedImageError

from upcycle.errors import UpcycleError
from upcycle.latents.crop import to_pixels
from upcycle.latents.folder import LatentWriter
from upcycle.latents.images import Images
from upcycle.latents.vae import VAE, describe, encode_pixels, latent_shape
from upcycle.models.identity_vae import IdentityVAE

# Batches that threads read while one is being encoded.
AHEAD = 4


def encoding_header(
    images: Images, vae: VAE, vae_spec: str, *, size: int, flips: bool, dtype: torch.dtype
) -> dict[str, Any]:
    """What the index says about an encoding, before the first image is read.

    Raises `UpcycleError` if the VAE cannot encode images of ``size`` × ``size`` pixels.
    """
    shape = list(latent_shape(vae, size))
    names = ["z0"] if isinstance(vae, IdentityVAE) else ["mean", "std"]
    names += [f"{name}_flip" for name in names] if flips else []
    tensors: dict[str, Any] = {name: {"dtype": "float16", "shape": shape} for name in names}
    return {
        "kind": "encoded",
        "sample_shape": shape,
        "num_classes": images.num_classes,
        "classes": images.classes,
        "tensors": tensors | {"label": {"dtype": "int64", "shape": []}},
        "source": images.source,
        "vae": describe(vae, vae_spec),
        "size": size,
        "flips": flips,
        "dtype": str(dtype).removeprefix("torch."),
    }


def encode(
    images: Images,
    vae: VAE,
    writer: LatentWriter,
    *,
    size: int,
    flips: bool,
    dtype: torch.dtype,
    batch_size: int,
    workers: int,
    strict: bool,
    on_images: Callable[[int], None] = lambda count: None,
) -> None:
    """Encode what ``writer`` lacks. Batches end with their shard, so that a shard does not depend on interruptions.

    Args:
        size: pixels a side.
        flips: encode every image flipped left to right, too.
        workers: threads that read images.
        strict: stop at an image that cannot be read, instead of leaving it out.
        on_images: called with a number of images whenever so many more are done.

    Raises:
        UpcycleError: an unreadable image, with ``strict``; no readable image at all; results that are not finite; no
            space left.
    """
    channels = vae.config.in_channels
    spans = [
        (number, items[first : first + batch_size])
        for number, items in writer.todo
        for first in range(0, len(items), batch_size)
    ]
    writer.save_index()
    pool = ThreadPoolExecutor(workers)
    try:
        read = _read_ahead(pool, spans, lambda item: read_pixels(images, item, size, channels))
        for number, batches in groupby(read, key=lambda batch: batch[0]):
            parts: list[dict[str, torch.Tensor]] = []
            skipped: list[tuple[str, str]] = []
            for _, span, results in batches:
                readable = [
                    (item, result) for item, result in zip(span, results, strict=True) if not isinstance(result, str)
                ]
                failed = [(images.names[i], why) for i, why in zip(span, results, strict=True) if isinstance(why, str)]
                if failed and strict:
                    raise UpcycleError(
                        f"{images.source['path']}: {failed[0][0]} cannot be read ({failed[0][1]}); put a readable "
                        "image in its place and run the same command again, which goes on, or leave out --strict"
                    )
                skipped += failed
                if readable:
                    labels = torch.tensor([images.labels[item] for item, _ in readable])
                    pixels = torch.stack([pixels for _, pixels in readable])
                    parts.append({**_encode_batch(vae, pixels, flips, dtype), "label": labels})
                on_images(len(span))
            if not parts and not writer.index["count"]:
                raise UpcycleError(
                    f"{images.source['path']}: none of the first {len(skipped)} images can be read "
                    f"({skipped[0][0]}: {skipped[0][1]}); check the folder"
                )
            writer.write(number, _joined(parts, writer.index["tensors"]), skipped)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _encode_batch(vae: VAE, pixels: torch.Tensor, flips: bool, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    made = encode_pixels(vae, pixels, dtype)
    if flips:
        made |= {f"{name}_flip": value for name, value in encode_pixels(vae, pixels.flip(-1), dtype).items()}
    return made


def _joined(parts: list[dict[str, torch.Tensor]], tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The batches of a shard end to end; a shard of unreadable images has no rows."""
    empty = {
        name: torch.empty(0, *what["shape"], dtype=getattr(torch, what["dtype"])) for name, what in tensors.items()
    }
    return {name: torch.cat([part[name] for part in (empty, *parts)]) for name in tensors}


def read_pixels(images: Images, item: int, size: int, channels: int) -> torch.Tensor | str:
    """Pixels uint8 [c, size, size] of an image, or why there are none."""
    try:
        with images.open(item) as image:
            return to_pixels(image, size, channels)
    except UnidentifiedImageError:  # its text holds addresses in memory
        return "not an image, or of an unknown format"
    except Exception as error:  # PIL raises nearly anything for a damaged file
        return " ".join(str(getattr(error, "strerror", None) or error).split())[:200] or type(error).__name__


def _read_ahead(
    pool: ThreadPoolExecutor, spans: Iterable[tuple[int, range]], read: Callable[[int], torch.Tensor | str]
) -> Iterator[tuple[int, range, list[torch.Tensor | str]]]:
    """Read the items of the spans in order, some spans before they are asked for."""
    waiting: deque[tuple[int, range, list[Future[torch.Tensor | str]]]] = deque()
    for number, span in spans:
        waiting.append((number, span, [pool.submit(read, item) for item in span]))
        if len(waiting) > AHEAD:
            first, done, futures = waiting.popleft()
            yield first, done, [future.result() for future in futures]
    for first, done, futures in waiting:
        yield first, done, [future.result() for future in futures]
