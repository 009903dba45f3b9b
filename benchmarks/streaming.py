"""Convert an XL checkpoint of random numbers: peak memory of the command, and its time beside that of copying the file.

    python benchmarks/streaming.py [--kind diffusers|meta] [--layers 28] [--repeats 3] [--json]

Both are measured in one run, interleaved, on the same disk; the file is read once before, so that both find it in the
page cache. The command runs in a process of its own with --no-verify; its peak is that of the whole process, Python
and libraries included, whose share is printed beside it. Conversion time is what the command spends beyond importing
what it imports: a process that only imports is timed and taken off.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel

WIDTH, HEADS = 1152, 16


def make(folder: Path, kind: str, layers: int) -> tuple[Path, Path]:
    """A random checkpoint in the shape of DiT-XL/2; returns the source to convert and its weights file."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=4, out_channels=8, num_layers=layers,
        sample_size=32, patch_size=2, num_embeds_ada_norm=1000,
    )  # fmt: skip
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks:
        block.norm1.emb.load_state_dict(first)
    if kind == "diffusers":
        model.save_pretrained(folder / "dit")
        return folder / "dit", folder / "dit" / "diffusion_pytorch_model.safetensors"
    sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
    import tiny

    tiny.save_meta_pt(folder / "dit.pt", model)
    return folder / "dit.pt", folder / "dit.pt"


def command(*arguments: str) -> tuple[float, int]:
    """Seconds and peak resident bytes of one Python process."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"python {' '.join(arguments)} failed")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def copy(source: Path, target: Path) -> float:
    """Seconds to copy the weights file, to the disk."""
    target.unlink(missing_ok=True)
    start = time.perf_counter()
    shutil.copyfile(source, target)
    os.sync()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", choices=["diffusers", "meta"], default="diffusers")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = subprocess.run(
            [sys.executable, __file__, "--kind", options.kind, "--layers", str(options.layers), name],
            env={**os.environ, "UPCYCLE_MAKE": "1"}, check=True, capture_output=True, text=True,
        )  # fmt: skip
        source, weights = map(Path, made.stdout.split())
        out = str(folder / "out")
        copies, converts, starts, peaks, idle = [], [], [], [], []
        copy(weights, folder / "copy")
        for _ in range(options.repeats):
            shutil.rmtree(out, ignore_errors=True)
            copies.append(copy(weights, folder / "copy"))
            (folder / "copy").unlink()
            seconds, peak = command("-c", "import upcycle.graft.convert, upcycle.graft.plan")
            starts.append(seconds)
            idle.append(peak)
            begin = time.perf_counter()
            _, peak = command("-m", "upcycle", "convert", str(source), "-o", out, "--no-verify")
            os.sync()
            converts.append(time.perf_counter() - begin)
            peaks.append(peak)
        median = lambda values: sorted(values)[len(values) // 2]  # noqa: E731
        report = {
            "kind": options.kind,
            "weights_gb": weights.stat().st_size / 1e9,
            "copy_seconds": median(copies),
            "start_up_seconds": median(starts),
            "convert_seconds": median(converts) - median(starts),
            "times_the_copy": (median(converts) - median(starts)) / median(copies),
            "peak_gb": max(peaks) / 1e9,
            "peak_gb_of_imports": max(idle) / 1e9,
        }
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        for key, value in report.items():
            print(f"{key:>20}  {value if isinstance(value, str) else round(value, 2)}")


if __name__ == "__main__":
    if "UPCYCLE_MAKE" in os.environ:
        # In a process of its own: the checkpoint is as large as the machine's free memory may allow once.
        kind, layers, where = sys.argv[2], int(sys.argv[4]), Path(sys.argv[5])
        print(*make(where, kind, layers))
    else:
        main()
