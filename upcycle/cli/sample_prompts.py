"""`upcycle sample` of pipelines that take text."""

from pathlib import Path
from typing import Any

from upcycle.cli.device import Dtype, enough_memory, to_device, torch_dtype
from upcycle.cli.show import print_json, progress, stderr, stdout, working
from upcycle.errors import UpcycleError


def sample_prompts(
    found: Any,
    prompts: list[str],
    *,
    num: int,
    seed: int,
    steps: int | None,
    guidance_scale: float | None,
    height: int | None,
    width: int | None,
    num_frames: int | None,
    dtype: Dtype | None,
    coarser: dict[str, Any],
    batch_size: int,
    device: str | None,
    out: Path,
    as_json: bool,
    force: bool,
    keep: tuple[Path, ...],
) -> None:
    """Draw ``num`` samples of each prompt; as with classes seeds count up from ``seed`` over all of them.

    ``found``: `upcycle.sampling.prompts.Found`; ``coarser``: options of `upcycle.sampling.patches.set_schedule`.
    """
    with working(f"loading {found.spec}"):
        import torch

        from upcycle.models import ddit
        from upcycle.output import new_folder
        from upcycle.sampling import patches
        from upcycle.sampling import prompts as text
        from upcycle.sampling.grid import save_grid

        if not prompts:
            raise UpcycleError(f"{found.spec} draws from text; give it with --prompt TEXT")
        wish = text.settings(found, steps, guidance_scale, height, width, num_frames)
        chosen = coarser["threshold"] is not None or coarser["schedule"] is not None
        given = {"threshold": coarser["threshold"]} if chosen else {}  # adapters may differ in what is not used
        pipe = text.load_text_pipeline(found, torch_dtype(dtype) if dtype else text.default_dtype(device), **given)
        text.check_sides(pipe, wish)
        with_adapter = ddit.switching(pipe)
        model = with_adapter[0] if with_adapter else pipe.transformer  # two share a schedule
        patches.set_schedule(model, found.spec, **coarser)
        to_device(pipe, device)
    switching = bool(with_adapter)
    for note in patches.notes(model, wish.steps):
        stderr.print(f"note: {note}")
    pairs = [(number, words) for number, words in enumerate(prompts) for _ in range(num)]
    jobs = [(number, words, seed + i) for i, (number, words) in enumerate(pairs)]
    batches = [jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)]
    drawn, runs = [], []
    with progress() as bar, enough_memory(batch_size):
        task = bar.add_task("sampling", total=len(batches) * wish.steps)
        for batch in batches:
            words, seeds = [job[1] for job in batch], [job[2] for job in batch]
            drawn.append(text.draw_pixels(pipe, words, seeds, wish, lambda: bar.advance(task)))
            if switching:
                runs.append(model.schedule.log)
    pixels = torch.cat(drawn)
    shown = text.some_frames(pixels) if found.kind.video else pixels
    columns = len(shown) // len(pixels) if found.kind.video else num if num > 1 else min(len(jobs), 10)
    with new_folder(out, force, keep=keep) as folder:
        save_grid(shown, folder / "samples.png", columns=columns)
        for sample, (number, _, its_seed) in zip(pixels, jobs, strict=True):
            name = f"prompt{number:03d}-seed{its_seed}"
            if found.kind.video:
                text.save_gif(sample, folder / f"{name}.gif")
            else:
                save_grid(sample[None], folder / f"{name}.png", columns=1)
        if switching:
            patches.explain(model, runs, folder)
    sizes = patches.steps_by_size([entry for log in runs for entry in log]) if switching else None
    if as_json:
        report = {"out": str(out), "images": len(jobs), "prompts": len(prompts)}
        print_json(report | ({"steps_by_size": sizes} if sizes is not None else {}))
        return
    if sizes is not None:
        stdout.print(patches.told(sizes, out))
    stdout.print(f"{len(jobs)} {'videos' if found.kind.video else 'images'}")
    stdout.print(str(out / "samples.png"), style="bold")
