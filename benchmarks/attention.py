"""Attention of a ragged batch on this device: sample by sample, or padded to the longest sample with a mask.

    python benchmarks/attention.py [--threads 2] [--repeats 9] [--json]

Each row is one block's attention on packed q, k, v with a key bias, forward and backward, for a batch of a width and a
number of heads; the tokens kept lie evenly between half and three halves of the mean, as a learned router's do. The
ways take turns; medians in ms. docs/log.md says what was decided from it.
"""

import argparse
import json
import statistics
import time

import torch

from upcycle.models.chunked_dit import Layout, attend_padded, attend_per_sample

SHAPES = {
    "digits, training": (64, 96, 4, 64),
    "digits, sampling": (32, 96, 4, 64),
    "S/2, a few": (4, 384, 6, 256),
    "S/2": (32, 384, 6, 64),
    "XL/2 at ratio 1": (4, 1152, 16, 256),
    "XL/2 at ratio 4": (8, 1152, 16, 64),
    "XL/2, 1024 px": (2, 1152, 16, 1024),
}  # batch, width, heads, mean tokens


def inputs(batch: int, width: int, heads: int, mean: int) -> tuple[list[torch.Tensor], Layout]:
    """q, k, v packed [T, heads, d], and their layout."""
    lengths = [int(n) for n in torch.linspace(mean / 2, 3 * mean / 2, batch)]
    longest = max(lengths)
    place = torch.cat([i * longest + torch.arange(n) for i, n in enumerate(lengths)])
    bias = torch.full((batch, longest), float("-inf"))
    bias.view(-1)[place] = torch.rand(len(place))
    qkv = [torch.randn(sum(lengths), heads, width // heads, requires_grad=True) for _ in range(3)]
    return qkv, Layout(lengths, bias[:, None, None], place)


def seconds(way, qkv: list[torch.Tensor], layout: Layout, *, backward: bool) -> float:
    begin = time.perf_counter()
    with torch.set_grad_enabled(backward):
        out = way(*qkv, layout)
        if backward:
            torch.autograd.grad(out.sum(), qkv)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    torch.set_num_threads(options.threads)
    rows = {}
    for name, shape in SHAPES.items():
        qkv, layout = inputs(*shape)
        times: dict[str, list[float]] = {}
        for _ in range(options.repeats + 1):
            for way in (attend_per_sample, attend_padded):
                for backward in (False, True):
                    key = way.__name__.removeprefix("attend_") + (" training" if backward else "")
                    times.setdefault(key, []).append(seconds(way, qkv, layout, backward=backward))
        rows[name] = {key: 1000 * statistics.median(values[1:]) for key, values in times.items()}
        if not options.json:
            print(name.ljust(20), *(f"{key} {value:8.2f}" for key, value in rows[name].items()), sep="  ")
    if options.json:
        print(json.dumps({"threads": options.threads, "rows": rows}))


if __name__ == "__main__":
    main()
