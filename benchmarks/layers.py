"""Ways to do the layers of an XL-wide student that might be faster than the plain ones, on this device.

    python benchmarks/layers.py [--repeats 7] [--json]

- q, k and v of 28 blocks as three products a block, or as one (weights put together beforehand);
- the conditioning of 28 blocks as 28 products, or as one over all of them;
- four residual blocks of the scaffold on a grid of 32 x 32, their tensors as they are or channels last.

Medians in ms, the ways in turn. docs/log.md says what was decided from it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.functional import linear

from upcycle.evaluation.speed import machine
from upcycle.models.chunked_dit import ResBlock

WIDTH, BLOCKS, NARROW = 1152, 28, 288


def qkv(tokens: int) -> dict[str, Callable[[], None]]:
    """Projections of ``tokens`` tokens."""
    x = torch.randn(1, tokens, WIDTH)
    together = [torch.randn(3 * WIDTH, WIDTH) for _ in range(BLOCKS)]
    apart = [[part.clone() for part in weight.chunk(3)] for weight in together]

    def three() -> None:
        for weights in apart:
            for weight in weights:
                linear(x, weight)

    def one() -> None:
        for weight in together:
            linear(x, weight)

    return {"apart": three, "together": one}


def conditioning(batch: int) -> dict[str, Callable[[], None]]:
    """Modulation vectors of all blocks."""
    c = torch.randn(batch, WIDTH)
    together = torch.randn(BLOCKS * 6 * WIDTH, WIDTH)
    apart = [part.clone() for part in together.chunk(BLOCKS)]

    def many() -> None:
        for weight in apart:
            linear(c, weight)

    return {"apart": many, "together": lambda: linear(c, together)}


def convolutions(batch: int) -> dict[str, Callable[[], None]]:
    """Residual blocks in both memory formats."""
    x, condition = torch.randn(batch, NARROW, 32, 32), torch.randn(batch, WIDTH)

    def run(format: torch.memory_format) -> Callable[[], None]:
        blocks = [ResBlock(NARROW, NARROW, WIDTH).eval().to(memory_format=format) for _ in range(4)]
        given = x.contiguous(memory_format=format)

        def all_blocks() -> None:
            h = given
            for block in blocks:
                h = block(h, condition)

        return all_blocks

    return {"as they are": run(torch.contiguous_format), "channels last": run(torch.channels_last)}


@torch.inference_mode()
def compare(ways: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median ms of each way."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            times[name].append(1000 * (time.perf_counter() - begin))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    found = {}
    for tokens in (102, 256, 1024):
        found[f"q, k, v of {tokens} tokens"] = compare(qkv(tokens), options.repeats)
    for batch in (1, 8):
        found[f"conditioning, batch {batch}"] = compare(conditioning(batch), options.repeats)
        found[f"residual blocks, batch {batch}"] = compare(convolutions(batch), options.repeats)
    if options.json:
        print(json.dumps({"machine": machine(torch.device("cpu")), "ms": found}))
        return
    print(machine(torch.device("cpu")))
    for name, row in found.items():
        print(name.ljust(26), *(f"{way} {value:8.1f}" for way, value in row.items()), sep="  ")


if __name__ == "__main__":
    main()
