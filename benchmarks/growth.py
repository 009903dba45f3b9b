"""How time and memory of each part of a student grow with the grid and the batch.

    python benchmarks/growth.py [--sides 16 32 ...] [--batches 1 4 ...] [--positions 65536] [--plot FILE] [--json]

A student of XL's width with one block and random weights, whose router keeps a quarter of the positions, fp32 on a CPU,
bf16 on a GPU. First one sample on grids of side x side positions, then batches on the grid of 32 x 32; no run of more
than --positions positions. The exponent of a part is the slope of log time against log positions over the three largest
runs of the series: 1 is linear. Medians of --repeats forwards; memory is the peak beyond the weights.
"""

import argparse
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from matplotlib.figure import Figure

from upcycle.evaluation.bench import PARTS, Settings, Variant, peak_bytes, seconds_by_part
from upcycle.evaluation.speed import keep_tokens, machine
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.sources import SHAPES

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler talks on stderr
NAMES = (*PARTS, "rest")


@torch.inference_mode()
def measure(side: int, batch: int, repeats: int, device: torch.device) -> dict[str, float]:
    """Milliseconds by part, and peak ``bytes``."""
    heads, head_dim, _ = SHAPES["XL"]
    model = ChunkedDiT(heads, head_dim, num_layers=1, sample_size=side, guide=0.0).eval().requires_grad_(False)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype != torch.float32:
        model.to(dtype).routing_module.float()  # as from_pretrained keeps it
    model.to(device)
    keep_tokens(model, side**2 / 4)
    variant, settings = Variant("student", model), Settings(batch=batch, steps=1)
    runs = [seconds_by_part(variant, settings, device, dtype) for _ in range(repeats + 1)][1:]
    row = {name: 1000 * statistics.median(run[name] for run in runs) for name in NAMES}
    return {**row, "bytes": peak_bytes(variant, settings, device, dtype) or 0}


def exponent(positions: list[int], values: list[float]) -> float:
    """Slope of log value against log positions over the last three; NaN where there is none."""
    if len(positions) < 2 or min(values) <= 0:
        return math.nan
    x, y = ([math.log(v) for v in series[-3:]] for series in (positions, values))
    return statistics.linear_regression(x, y).slope


def show(title: str, positions: list[int], rows: list[dict[str, float]]) -> None:
    print(f"\n{title}, ms\n\n| positions | {' | '.join(map(str, positions))} | exponent |")
    print("|---" * (len(positions) + 2) + "|")
    for name in (*NAMES, "bytes"):
        values = [row[name] for row in rows]
        cells = [f"{v / 2**20:.1f} MiB" if name == "bytes" else f"{v:.3g}" for v in values]
        label = "peak memory" if name == "bytes" else name
        print(f"| {label} | {' | '.join(cells)} | {exponent(positions, values):.2f} |")


def plot(series: dict[str, tuple[list[int], list[dict[str, float]]]], path: Path) -> None:
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    for axis, (title, (positions, rows)) in zip(figure.subplots(1, len(series)), series.items(), strict=True):
        for name in NAMES:
            axis.plot(positions, [row[name] for row in rows], marker="o", label=name.replace("_", " "))
        linear = [rows[0]["encode"] * n / positions[0] for n in positions]
        axis.plot(positions, linear, color="black", linestyle=":", label="linear")
        axis.set(xscale="log", yscale="log", xlabel="positions", ylabel="ms", title=title)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", nargs="+", type=int, default=[16, 32, 64, 128, 256])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--positions", type=int, default=2**16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    device = PartialState(cpu=not torch.cuda.is_available()).device
    runs = {
        "grids, one sample": [(side, 1) for side in sorted(options.sides)],
        "batches, 32 x 32": [(32, batch) for batch in sorted(options.batches)],
    }
    series: dict[str, Any] = {}
    for title, shapes in runs.items():
        shapes = [(side, batch) for side, batch in shapes if side**2 * batch <= options.positions]
        if not shapes:
            parser.error(f"{title}: every run has more than --positions {options.positions}")
        rows = [measure(side, batch, options.repeats, device) for side, batch in shapes]
        series[title] = [side**2 * batch for side, batch in shapes], rows
    if options.json:
        print(json.dumps({"machine": machine(device), "series": series}))
    else:
        print(machine(device))
        for title, (positions, rows) in series.items():
            show(title, positions, rows)
    if options.plot:
        plot(series, options.plot)


if __name__ == "__main__":
    main()
