"""`upcycle encode`: images to latents, once, so that training need not."""

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from upcycle.cli.device import Dtype
from upcycle.errors import UpcycleError

EPILOG = """
[bold]Examples[/bold]\n
  upcycle encode imagenet/train -o latents\n
  upcycle encode imagenet/train -o latents512 --size 512 --batch-size 64 --dtype bf16\n
  upcycle encode hf:uoft-cs/cifar10:train -o latents --size 32 --vae ./my-dit\n
  upcycle encode scans -o latents --no-flip --strict\n
The same command again goes on where it was interrupted.\n
"""


def encode(
    images: Annotated[
        str,
        typer.Argument(help="Folder with one sub-folder a class, or hf:NAME[:SPLIT], a Hugging Face dataset."),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder of latents, new or to go on with.")],
    vae: Annotated[
        str, typer.Option(metavar="ID|DIR", help="VAE of the teacher: its own or a pipeline's folder or Hub id.")
    ] = "stabilityai/sd-vae-ft-ema",
    size: Annotated[int, typer.Option(min=1, help="Pixels a side; images are resized and cut at the centre.")] = 256,
    flip: Annotated[
        bool, typer.Option("--flip/--no-flip", help="Whether to encode mirror images, too; not for digits or text.")
    ] = True,
    batch_size: Annotated[int, typer.Option("--batch-size", "--batch", min=1, help="Images at a time.")] = 32,
    shard_size: Annotated[int, typer.Option(min=1, help="Images a file; an interruption loses those of one.")] = 10_000,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads that read images. Default: one a core, at most 16.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at an image that cannot be read.")] = False,
    image_column: Annotated[str | None, typer.Option(help="Of a dataset; guessed by default.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Of a dataset; guessed by default.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda ... Default: cuda where there is one.")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of the arithmetic; latents are stored in fp16.")] = "fp32",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Encode images with a VAE, as the mean and width of their posteriors, for `upcycle finetune` to draw from."""
    from upcycle.cli.device import to_device, torch_dtype
    from upcycle.cli.latents import fill
    from upcycle.cli.show import quiet_libraries, stderr, working

    quiet_libraries()
    if out.resolve().is_relative_to(Path(images).resolve()):
        raise UpcycleError(f"{out} lies in {images}, whose sub-folders are classes; choose another folder with -o")
    with working(f"listing {images}"):
        from upcycle.latents.folder import LatentWriter, check_latents_folder
        from upcycle.latents.images import open_images

        check_latents_folder(out)
        listed = open_images(images, image_column, label_column)
    with working(f"loading {vae}"):
        from upcycle.latents import encode as encoding
        from upcycle.latents.vae import load_vae

        empty = sorted(set(range(listed.num_classes)) - set(listed.labels))
        if listed.classes and empty:
            shown = ", ".join(listed.classes[label] for label in empty[:5])
            stderr.print(f"note: {len(empty)} class folders hold no images, and keep their labels: {shown}")
        encoder = load_vae(vae)
        settings = {"size": size, "flips": flip, "dtype": torch_dtype(dtype)}
        header = encoding.encoding_header(listed, encoder, vae, **settings)
        to_device(encoder, device)
        command = shlex.join(["upcycle", *sys.argv[1:]])
        writer = LatentWriter(out, {**header, "command": command}, len(listed.names), shard_size)
    if strict and (left_out := writer.index["skipped"]):
        raise UpcycleError(
            f"{out} was made without {len(left_out)} images, such as {left_out[0][0]} ({left_out[0][1]}); "
            "mend them and encode into another folder, or leave out --strict"
        )

    def work(on_images: Callable[[float], None]) -> None:
        threads = workers or min(16, os.cpu_count() or 1)
        encoding.encode(
            listed, encoder, writer, **settings,
            batch_size=batch_size, workers=threads, strict=strict, on_images=on_images,
        )  # fmt: skip

    fill(writer, work, unit="images", command=command, batch_size=batch_size, json=as_json)
