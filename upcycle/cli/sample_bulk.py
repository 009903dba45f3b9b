"""`upcycle sample --balanced`: many images for metrics, by one process or several."""

import shutil
from datetime import timedelta
from pathlib import Path
from typing import Any

from upcycle.errors import UpcycleError


def sample_bulk(
    pipe: Any,
    how: dict[str, Any],
    labels: list[int],
    num: int,
    out: Path,
    batch_size: int,
    device: str | None,
    *,
    as_json: bool,
    force: bool,
    keep: tuple[Path, ...],
) -> None:
    """Draw ``num`` images of ``labels`` in turn into the folder ``out``, or an ``.npz`` file; goes on with what is
    there. ``how``: what is to be the same then (`upcycle.sampling.bulk.HOW` and more)."""
    import torch
    from accelerate import PartialState

    from upcycle.cli.device import enough_memory, to_device
    from upcycle.cli.show import count, print_json, progress, stdout
    from upcycle.latents.vae import weights_hash
    from upcycle.output import check_output, check_output_file
    from upcycle.sampling.bulk import begin, budget_of, cost, draw_samples, label_and_seed, read_record, write_npz

    # They wait for each other at the end alone, where they may be far apart.
    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available(), timeout=timedelta(days=7))
    to_device(pipe, device if state.num_processes == 1 else str(state.device))
    how = {
        **how,
        **budget_of(pipe.transformer),
        "model_sha256": weights_hash({**pipe.transformer.state_dict(), **pipe.vae.state_dict()}),
    }
    packed = out.suffix == ".npz"
    folder = out.with_name(f"{out.name}.samples") if packed else out
    if state.is_main_process:
        if packed:
            check_output_file(out, force, keep)
        elif force and folder.exists():
            check_output(folder, force, keep)  # nothing but samples
            shutil.rmtree(folder.resolve())
        elif folder.exists() and not folder.is_dir():
            raise UpcycleError(f"{folder} is a file; choose another folder with -o")
        asked = (read_record(folder) or {}).get("num") or 0
        if num < asked and not packed:  # a file holds as many as are asked for
            raise UpcycleError(f"{folder} is of -n {asked}, and now {num}; give {asked} or more, or another folder")
        begin(folder, how, num)
    state.wait_for_everyone()
    bar = progress("images")
    bar.disable = not state.is_main_process
    with bar, enough_memory(batch_size):
        task = bar.add_task("sampling", total=num)
        files = draw_samples(
            pipe, folder, how, num, batch_size, lambda done: bar.advance(task, done), classes=labels,
            process=(state.process_index, state.num_processes),
        )  # fmt: skip
    state.wait_for_everyone()
    if not state.is_main_process:
        return
    record = read_record(folder)
    assert record is not None
    took = cost(record)
    if packed:
        write_npz(files, [label_and_seed(i, labels, how["seed"])[0] for i in range(num)], out, force)
        if not {path.name for path in folder.glob("*.png")} - {path.name for path in files}:  # else of a larger -n
            shutil.rmtree(folder)
    if as_json:
        print_json({"out": str(out), "images": num, **how, **took})
        return
    if took["tokens_kept"] is not None:
        stdout.print(f"tokens kept: {took['tokens_kept']:.1f} (mean over calls, both halves of guided batches)")
    if record["drawn"]:
        stdout.print(f"FLOPs per image: {count(took['flops_per_image'] or 0)}")
        stdout.print(f"seconds per image and process: {took['seconds_per_image']:.3g}")
    stdout.print(f"{num} images, {-(-num // len(labels))} of a class at most")
    stdout.print(str(out), style="bold")
