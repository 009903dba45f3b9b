"""`upcycle calibrate` of a student: what it spends at each timestep, for `set_budget` and `sample --budget`."""

from pathlib import Path

BATCH = 16


def calibrate_student(
    model: str, classes: str | None, steps: int, guidance_scale: float, seed: int, device: str | None, as_json: bool
) -> None:
    """Draw, measure, store, print; without ``classes`` sixteen of them, spread out."""
    from upcycle.cli.device import to_device
    from upcycle.cli.sample import parse_classes
    from upcycle.cli.show import print_json, progress, stderr, stdout, working
    from upcycle.evaluation.flops import chunked_dit_flops
    from upcycle.sampling.calibration import measure, store
    from upcycle.sampling.pipeline import class_count, load_pipeline

    with working(f"loading {model}"):
        pipe = load_pipeline(model)
        count = class_count(pipe)
        spread = [i * count // min(16, count) for i in range(min(16, count))]
        labels = parse_classes(classes, pipe.labels, count) if classes is not None else spread
        to_device(pipe, device)
    pipe.set_progress_bar_config(disable=True)
    with progress() as bar:
        task = bar.add_task("sampling at ρ = 0", total=-(-len(labels) // BATCH) * steps)
        hook = pipe.transformer.register_forward_hook(lambda *_: bar.advance(task))
        seeds = [seed + i for i in range(len(labels))]
        found = measure(pipe, labels, seeds, steps, guidance_scale, BATCH)
        hook.remove()
    for note in store(Path(model), found):
        stderr.print(f"note: {note}")
    file = str(Path(model) / "transformer" / "config.json")
    if as_json:
        print_json({"out": file, **found})
        return
    for half in ("conditional", "unconditional"):
        if found[half]:
            mean = sum(found[half]["tokens"]) / steps
            share = sum(chunked_dit_flops(pipe.transformer.config, mean).values()) / found["teacher_flops"]
            stdout.print(f"{half} half: {mean:.1f} tokens on average, {share:.2f} of the teacher's FLOPs")
    stdout.print(file, style="bold")
