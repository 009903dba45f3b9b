"""What `upcycle encode` and `upcycle synthesize` share: fill a folder of latents before the user's eyes, and report."""

import time
from collections.abc import Callable
from typing import Any

from upcycle.cli.device import enough_memory
from upcycle.cli.show import print_json, progress, size, stderr, stdout


def fill(
    writer: Any,
    work: Callable[[Callable[[float], None]], None],
    *,
    unit: str,
    command: str,
    batch_size: int,
    json: bool,
) -> None:
    """Run ``work`` with a progress bar unless the folder is complete, then print what it holds.

    Args:
        writer: the `LatentWriter` that ``work`` fills.
        work: called with a function to tell how many more items are done.
        unit: "images" or "samples".
        command: goes on after an interruption.
        batch_size: named where the GPU's memory is too small.
        json: print one JSON object instead of text.
    """
    before = writer.items_done
    started = time.perf_counter()
    if writer.todo:
        with progress(unit) as bar, enough_memory(batch_size):
            task = bar.add_task("working", total=writer.total, completed=before)
            try:
                work(lambda count: bar.advance(task, count))
            except KeyboardInterrupt:
                bar.stop()
                stderr.print(f"{writer.items_done} of {writer.total} {unit} are done; go on with: {command}")
                raise SystemExit(130) from None
            bar.update(task, completed=writer.total)
    seconds = time.perf_counter() - started
    index = writer.index
    total_bytes = sum(shard["bytes"] for shard in index["shards"])
    skipped = index["skipped"]
    if json:
        print_json(
            {
                "out": str(writer.out),
                "count": index["count"],
                "skipped": skipped,
                "already_done": before,
                "shards": len(index["shards"]),
                "bytes": total_bytes,
                "sample_shape": index["sample_shape"],
                "num_classes": index["num_classes"],
                f"{unit}_per_second": (writer.total - before) / seconds if before < writer.total else None,
            }
        )
        return
    if before == writer.total:
        stdout.print("complete already: nothing to do")
    stdout.print(f"{index['count']} {unit}, {len(index['shards'])} shards, {size(total_bytes)}")
    if skipped:
        stdout.print(f"{len(skipped)} {unit} could not be read and were left out; {writer.out}/index.json lists them:")
    for name, why in skipped[:5]:
        stdout.print(f"  {name}: {why}")
    stdout.print(str(writer.out), style="bold")
