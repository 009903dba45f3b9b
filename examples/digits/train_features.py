"""Train the small classifier whose features `upcycle evaluate --features digits` compares, and state its accuracy.

python examples/digits/train_features.py --out upcycle/assets/digits/features.safetensors
"""

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from upcycle.evaluation.features import DigitsNet
from upcycle.training.digits import load_digits


def shift(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image [n, 1, h, w] moved sideways by at most one pixel; digits fill the full height."""
    padded = F.pad(images, (1, 1), value=-1.0)
    width = images.shape[-1]
    moved = torch.stack([padded[..., by : by + width] for by in range(3)])
    return moved[torch.randint(3, (len(images),), generator=generator), torch.arange(len(images))]


def train(steps: int, seed: int) -> DigitsNet:
    """AdamW with a cosine schedule, batches of 100, on the training split only."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = load_digits("train")
    net = DigitsNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 + 0.5 * math.cos(math.pi * i / steps))
    for _ in range(steps):
        rows = torch.randint(len(images), (100,), generator=generator)
        loss = F.cross_entropy(net(shift(images[rows], generator))[2], labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return net.eval()


@torch.inference_mode()
def accuracy(net: DigitsNet, split: str) -> float:
    """Share of a split's digits that are read right."""
    images, labels = load_digits(split)
    return (net(images)[2].argmax(1) == labels).float().mean().item()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("upcycle/assets/digits/features.safetensors"))
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    net = train(args.steps, args.seed)
    save_file(net.state_dict(), args.out)
    for split in ("train", "val"):
        print(f"accuracy, {split}: {accuracy(net, split):.4f}")
    print(f"{args.out}: {args.out.stat().st_size} bytes")
