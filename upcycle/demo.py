"""The demo: the spine of the toolkit walked once, on the shipped digits teacher."""

import importlib.resources
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.progress import Progress

from upcycle import provenance
from upcycle.errors import UpcycleError
from upcycle.evaluation import plots
from upcycle.evaluation.flops import chunked_dit_flops, dit_flops
from upcycle.evaluation.speed import SPEED, machine
from upcycle.evaluation.validation import validate
from upcycle.graft.export import PICTURES, export_student
from upcycle.graft.verify import MEASURE_STEPS, load_student, measure_difference
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.output import new_folder, to_json
from upcycle.recipe import parse_recipe
from upcycle.sampling import draw
from upcycle.training.digits import TEACHER, load_digits
from upcycle.training.loop import train
from upcycle.training.run import prepare

RECIPE = "assets/digits/recipe.yaml"
SAMPLING = {"steps": 50, "guidance_scale": 2.0}
MAP_TIMESTEPS = [900, 700, 500, 300, 150, 50, 0]


def run_demo(
    out: Path, bar: Progress, *, steps: int | None, ratio: float | None, seed: int, force: bool
) -> dict[str, Any]:
    """Do everything into ``out`` (which appears when all of it is there) and return the report.

    Raises:
        UpcycleError: ``out`` exists, or an option is out of range.
    """
    content = yaml.safe_load((importlib.resources.files("upcycle") / RECIPE).read_text())
    content["seed"] = seed
    if steps is not None:
        content["stages"][0]["steps"] = steps
    if ratio is not None:
        content["convert"] = {**content.get("convert", {}), "ratio": ratio}
    with new_folder(out, force) as folder, tempfile.TemporaryDirectory(prefix="upcycle-demo-") as work:
        recipe = parse_recipe({**content, "out": f"{work}/run"}, "of the demo")
        clock = time.perf_counter()
        seconds: dict[str, float] = {}

        task = bar.add_task("convert and compare with the teacher", total=MEASURE_STEPS)
        prepared = prepare(recipe)
        difference = measure_difference(
            prepared.teacher, prepared.student.eval(), seed=seed, step=lambda: bar.advance(task)
        )
        bar.console.print(f"the converted model is at most {difference.max_abs:.1e} from its teacher")
        images, labels = load_digits("val")
        alpha_bar = prepared.student.alpha_bar(torch.arange(1000))
        teacher_loss = validate(prepared.teacher, images, labels, alpha_bar).mean_loss
        start_loss = validate(prepared.student, images, labels, alpha_bar).mean_loss
        seconds["conversion"] = time.perf_counter() - clock

        clock = time.perf_counter()
        task = bar.add_task("post-train", total=recipe.steps)

        def on_step(row: dict[str, float]) -> None:
            text = f"post-train  loss {row['loss']:.4f}  ratio {row['ratio']:.2f}"
            bar.update(task, completed=row["step"], description=text)

        trained = train(recipe, prepared.student, prepared.teacher, prepared.data, prepared.out, on_step=on_step)
        seconds["training"] = time.perf_counter() - clock
        done = provenance.event("demo", steps=recipe.steps, recipe=recipe.model_dump(mode="json"))
        export_student(trained.student, prepared.start, folder / "pipeline", event=done)

        student = load_student(folder / "pipeline")
        student_loss = validate(student, images, labels, alpha_bar).mean_loss
        _draw_router(student, images, labels, alpha_bar, folder / "router.png")

        clock = time.perf_counter()
        task = bar.add_task("sample both in a fresh process, stock diffusers only", total=None)
        drawn = _sample_in_fresh_process(folder / "pipeline", Path(work), seed)
        bar.update(task, total=1, completed=1)
        seconds["sampling"] = time.perf_counter() - clock
        kept = torch.tensor(drawn["student"]["kept"])
        c, positions = student.config, student.config.sample_size**2
        assert not isinstance(prepared.source, list)
        teacher_tokens = positions // vars(prepared.source.config)["patch_size"] ** 2
        captions = (f"teacher, {teacher_tokens} tokens", f"student, {kept.float().mean():.0f} tokens")
        plots.side_by_side(drawn["images"]["teacher"], drawn["images"]["student"], folder / "samples.png", captions)
        plots.compression(drawn["student"]["timesteps"], kept, positions, teacher_tokens, folder / "compression.png")
        forwards = SAMPLING["steps"] * 2  # both halves of the guided batch
        student_flops = [sum(chunked_dit_flops(c, n).values()) for n in kept.flatten().tolist()]
        report = {
            "teacher": {
                "val_loss": teacher_loss,
                "tokens": teacher_tokens,
                "flops_per_image": forwards * dit_flops(vars(prepared.source.config)),
                "seconds_per_image": drawn["teacher"]["seconds_per_image"],
            },
            "student": {
                "val_loss": student_loss,
                "val_loss_at_start": start_loss,
                "flops_per_image": forwards * sum(student_flops) / len(student_flops),
                "seconds_per_image": drawn["student"]["seconds_per_image"],
                "transformer": drawn["student"]["transformer"],
                "pipeline": drawn["student"]["pipeline"],
            },
            "ratio": c.ratio,
            "tokens_kept": kept.float().mean().item(),
            "positions": positions,
            "max_abs_diff_at_start": difference.max_abs,
            "steps": recipe.steps,
            "seed": seed,
            "sampling": {**SAMPLING, "images": len(drawn["images"]["student"])},
            "seconds": seconds,
            "machine": machine(torch.device("cpu")),
        }
        (folder / "report.json").write_text(to_json(report) + "\n")
        _keep_evidence(folder, report)
    return report


def _keep_evidence(folder: Path, report: dict[str, Any]) -> None:
    """What was measured and drawn goes with the export."""
    pipeline = folder / "pipeline"
    (pipeline / PICTURES).mkdir()
    for name in ("samples.png", "router.png", "compression.png"):
        shutil.copyfile(folder / name, pipeline / PICTURES / name)
    teacher, student = report["teacher"], report["student"]
    sampling = {key: report["sampling"][key] for key in ("steps", "guidance_scale", "images")}
    sampling |= {"tail_drop": 0, "tokens_kept": round(report["tokens_kept"], 1)}
    loss = {"data": "digits-val", "timesteps": "10 from 50 to 950", "tail_drop": 0, "step": report["steps"]}
    provenance.add_evidence(
        pipeline,
        {
            "metric": "ε-MSE on held-out data",
            "better": "lower",
            "student": student["val_loss"],
            "teacher": teacher["val_loss"],
            "settings": loss,
        },
        {
            "metric": SPEED,
            "better": "lower",
            "student": student["seconds_per_image"],
            "teacher": teacher["seconds_per_image"],
            "settings": {**sampling, "machine": report["machine"]},
        },
        drawn=[f"{PICTURES}/{name}" for name in ("samples.png", "router.png", "compression.png")],
    )


@torch.inference_mode()
def _draw_router(
    student: ChunkedDiT, images: torch.Tensor, labels: torch.Tensor, alpha_bar: torch.Tensor, path: Path
) -> None:
    """router.png on held-out digits, one of each of four classes, noised to given timesteps."""
    chosen = torch.stack([(labels == digit).nonzero()[0, 0] for digit in (0, 3, 4, 8)])
    x0, y = images[chosen], labels[chosen]
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(x0.shape, generator=generator)
    side = student.config.sample_size
    noisy, probability, mask = [], [], []
    for t in MAP_TIMESTEPS:
        x_t = alpha_bar[t].sqrt() * x0 + (1 - alpha_bar[t]).sqrt() * noise
        routing = student(x_t, torch.tensor(t), y).routing
        noisy.append(x_t)
        probability.append(routing.probability.view(-1, side, side))
        mask.append(routing.mask.view(-1, side, side))
    plots.router_maps(torch.stack(noisy, 1), torch.stack(probability, 1), torch.stack(mask, 1), MAP_TIMESTEPS, path)


def _sample_in_fresh_process(export: Path, work: Path, seed: int) -> dict[str, Any]:
    """Both models from the same seeds, in a process that cannot import this package."""
    digits = list(range(10)) * 2
    out = work / "samples"
    out.mkdir()
    job = {
        "models": {"teacher": str(TEACHER), "student": str(export.resolve())},
        "labels": digits,
        "seeds": [seed + i for i in range(len(digits))],
        "out": str(out),
        **SAMPLING,
    }
    (work / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, "-I", draw.__file__, str(work / "job.json")], cwd=work, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"the export did not sample with stock diffusers:\n{done.stderr[-2000:]}")
    report = json.loads((out / "report.json").read_text())
    if report["upcycle_imported"]:
        raise UpcycleError("the fresh process imported upcycle; the export is not self-contained")
    report["images"] = {name: torch.load(out / f"{name}.pt", weights_only=True) for name in ("teacher", "student")}
    return report
