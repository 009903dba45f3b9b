"""Images a second of `upcycle encode` and `upcycle synthesize`, and rows a second of the reader, on made-up data.

    python benchmarks/latents.py [--images 64] [--side 400] [--size 256] [--samples 64] [--device cpu] [--real-vae]

Encoding: random JPEGs of SIDE × SIDE pixels, through an AutoencoderKL of random weights that is a quarter as wide as
Stable Diffusion's (with --real-vae as wide), with flips; and through no VAE at all, which is what reading and cutting
them takes. Synthesizing: the shipped digits teacher, 50 guided DDIM steps.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from upcycle.latents.reader import LatentFolder
from upcycle.models.identity_vae import IdentityVAE


def make_images(folder: Path, count: int, side: int) -> Path:
    """Random pictures of two classes: coarse noise, enlarged, so that files are as large as photographs'."""
    random = np.random.default_rng(0)
    for i in range(count):
        path = folder / str(i % 2) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((side, side)).save(path, quality=90)
    return folder


def make_vae(folder: Path, wide: bool) -> Path:
    """Stable Diffusion's autoencoder with random weights, or a narrower one."""
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(128, 256, 512, 512) if wide else (32, 64, 128, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    ).save_pretrained(folder)
    return folder


def upcycle(*arguments: object) -> dict:
    """What a command prints with --json."""
    command = [sys.executable, "-m", "upcycle", *map(str, arguments), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--side", type=int, default=400)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--real-vae", action="store_true")
    o = parser.parse_args()
    shared = ["--device", o.device, "--dtype", o.dtype, "--batch-size", o.batch_size]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = make_images(folder / "images", o.images, o.side)
        vae = make_vae(folder / "vae", o.real_vae)
        encoded = upcycle("encode", images, "-o", folder / "encoded", "--vae", vae, "--size", o.size, *shared)
        IdentityVAE(3).save_pretrained(folder / "pixels")
        cut = upcycle(
            "encode", images, "-o", folder / "cut", "--vae", folder / "pixels", "--size", o.size, "--no-flip", *shared
        )
        drawn = upcycle("synthesize", "digits", "-o", folder / "drawn", "--count", o.samples, *shared)
        data = LatentFolder(folder / "encoded")
        rows = torch.randint(len(data), (5000,)).tolist()
        noise = torch.randn(data.sample_shape)
        start = time.perf_counter()
        for row in rows:
            data.row(row, flip=True, noise=noise)
        seconds = time.perf_counter() - start
    print(f"encode      {encoded['images_per_second']:8.2f} images/s (each with its mirror image)")
    print(f"  no VAE    {cut['images_per_second']:8.2f} images/s (reading and cutting alone)")
    print(f"synthesize  {drawn['samples_per_second']:8.2f} samples/s (digits, 50 steps, guided)")
    print(f"read        {len(rows) / seconds:8.0f} rows/s (posterior samples {list(data.sample_shape)}, one thread)")


if __name__ == "__main__":
    main()
