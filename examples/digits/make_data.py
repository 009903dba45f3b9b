"""Make the digits asset from scikit-learn's copy of the UCI digits; the same bytes every time.

python examples/digits/make_data.py --out upcycle/assets/digits/digits.safetensors
"""

import argparse
import hashlib
from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def make(out: Path, held_out: int = 297, seed: int = 0) -> None:
    """Write `images` uint8 0..16 [1797, 8, 8], `labels` uint8 [1797] and `split` uint8 (0 train, 1 validation)."""
    digits = load_digits()
    labels = torch.from_numpy(digits.target).to(torch.uint8)
    index = torch.arange(len(labels))
    _, val = train_test_split(index.numpy(), test_size=held_out, stratify=digits.target, random_state=seed)
    split = torch.zeros(len(labels), dtype=torch.uint8)
    split[torch.from_numpy(val)] = 1
    out.parent.mkdir(parents=True, exist_ok=True)
    images = torch.from_numpy(digits.images).to(torch.uint8).contiguous()
    save_file({"images": images, "labels": labels, "split": split}, out)
    print(f"{out}: {len(labels)} images, {int(split.sum())} held out")
    print(f"held out per class: {torch.bincount(labels[split == 1].long()).tolist()}")
    print(f"sha256 {hashlib.sha256(out.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("upcycle/assets/digits/digits.safetensors"))
    parser.add_argument("--held-out", type=int, default=297)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    make(args.out, args.held_out, args.seed)
