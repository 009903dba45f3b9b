"""Post-training on the digits, several ways from one teacher: loss and trajectories against steps.

    pip install -e '.[digits]'
    python examples/study/study.py [--out runs/study] [--arms exact paper ...] [--seeds 0 1 2] [--steps 400] [--jobs 2]
    python examples/study/study.py --report      # table and picture again, of what has been run

Every arm is a recipe for `upcycle finetune`, with the same batches and number of steps. At every quarter of a run its
averaged weights are judged on held-out digits (epsilon-MSE at ten timesteps) and on 100 whole trajectories (50 DDIM
steps, guidance 2): their mean squared distance to the teacher's from the same seeds, and how often an SVM trained on
the real digits reads the wanted class. Run it again to go on where it was interrupted.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml
from diffusers import DiffusionPipeline
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from sklearn.svm import SVC

from upcycle.evaluation.validation import validate
from upcycle.graft.verify import load_student
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.output import write_text
from upcycle.recipe import Recipe, load_recipe
from upcycle.sampling.draw import TokenCounter, clamp_null_class, draw
from upcycle.training import schedule
from upcycle.training.digits import TEACHER, load_digits
from upcycle.training.state import RunState

SHIPPED = Path(__file__).parents[2] / "recipes" / "digits.yaml"
LABELS = list(range(10)) * 10
ALIGN_SHARE = 0.2
PUBLISHED = {"diffusion": 1.0, "variational": 1.0, "distill": 0.0, "ratio": 0.03, "router": 0.0}
ARMS = {
    "exact": "exact graft, our losses (recipes/digits.yaml)",
    "exact-published-losses": "exact graft, the paper's losses (noise MSE, variational bound, ratio)",
    "paper-our-losses": "published start, our losses",
    "paper": "published start, block distillation, then the paper's losses",
    "scratch": "published scaffold, nothing from the teacher, the paper's losses",
}


def recipe_of(arm: str, seed: int, steps: int, out: Path) -> dict[str, Any]:
    """The shipped recipe, changed where the arm differs."""
    content = yaml.safe_load(SHIPPED.read_text())
    stage = content["stages"][0]
    stage["steps"] = steps
    content |= {"seed": seed, "out": str(out / "run"), "save_every": max(1, steps // 4), "keep_checkpoints": 4}
    del content["validation"]
    if not arm.startswith("exact"):
        content["convert"] = {"ratio": 4, "init": "paper"}
    if arm != "exact" and arm != "paper-our-losses":
        stage["losses"] = PUBLISHED
        content["optimizer"] = {"router_lr_scale": 10.0 if arm.startswith("exact") else 1.0}
    if arm == "paper":
        align = {**stage, "name": "align", "steps": round(ALIGN_SHARE * steps), "tail_drop": {"values": []}}
        align["losses"] = {**PUBLISHED, "diffusion": 0.0, "variational": 0.0, "blocks": 1.0}
        content["stages"] = [{**align, "schedule": "constant"}, {**stage, "steps": steps - align["steps"]}]
    if arm == "scratch":
        del content["convert"]
        stage["freeze"] = []
        content["student"] = str(out / "start")
    return content


def scratch_start(recipe: dict[str, Any], seed: int) -> None:
    """An export whose blocks and embedders are as fresh as its scaffold, as DiT starts (adaLN at zero)."""
    start = Path(recipe["student"])
    if start.exists():
        return
    fresh = start.with_name("start.partial")
    command = [sys.executable, "-m", "upcycle", "convert", str(TEACHER), "--init", "paper", "-o", str(fresh), "--force"]
    subprocess.run([*command, "--seed", str(seed), "--no-verify"], check=True, capture_output=True)
    path = fresh / "transformer" / "diffusion_pytorch_model.safetensors"
    weights = load_file(path)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in weights.items():
        if name.startswith(("embedders.", "transformer_blocks.")):
            tensor.zero_()
            if "embedding_table" in name or "timestep_embedder" in name:
                tensor.normal_(0, 0.02 if name.endswith("weight") else 0.0, generator=generator)
            elif tensor.ndim == 2 and ".norm1.linear." not in name:
                torch.nn.init.xavier_uniform_(tensor, generator=generator)
    save_file(weights, path, metadata={"format": "pt"})
    fresh.rename(start)


def run_arm(arm: str, seed: int, steps: int, out: Path) -> None:
    """Train one arm with the real command, then judge its checkpoints in a process of its own."""
    folder = out / f"{arm}-{seed}"
    if (folder / "result.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    recipe = recipe_of(arm, seed, steps, folder)
    if arm == "scratch":
        scratch_start(recipe, seed)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    resume = ["--resume"] if (folder / "run").exists() else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    train = [sys.executable, "-m", "upcycle", "finetune", str(folder / "recipe.yaml"), *resume]
    judge = [sys.executable, __file__, "--judge", str(folder)]
    for command in (train, judge):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    print(f"{arm}, seed {seed}: done", file=sys.stderr, flush=True)


def trajectories(folder: Path, transformer: ChunkedDiT | None = None) -> tuple[torch.Tensor, float | None]:
    """Samples [100, 1, 16, 16] in [0, 1] and the mean number of tokens that the student keeps."""
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    if transformer is None:
        clamp_null_class(pipe.transformer)
        counter = None
    else:
        pipe.transformer = transformer
        counter = TokenCounter(transformer, len(LABELS))
    images = draw(pipe, LABELS, list(range(len(LABELS))), 50, 2.0)
    if counter is None:
        return images, None
    counter.remove()
    return images, torch.tensor(counter.kept).float().mean().item()


@torch.inference_mode()
def judge(folder: Path) -> None:
    """Write result.json: a row for each checkpoint of the run in ``folder``."""
    recipe = load_recipe(folder / "recipe.yaml")
    start = Path(recipe.student or f"{recipe.out}/start")
    images, labels = load_digits("val")
    train_images, train_labels = load_digits("train")
    svm = SVC().fit(train_images.flatten(1).numpy(), train_labels.numpy())
    teachers, _ = trajectories(TEACHER)
    rows = []
    for step, student in averaged_students(recipe, start):
        student.eval()
        loss = validate(student, images, labels, student.alpha_bar(torch.arange(1000)))
        samples, tokens = trajectories(start, student)
        rows.append(
            {
                "step": step,
                "val_loss": loss.mean_loss,
                "val_loss_by_t": loss.loss,
                "paired_mse": (2 * (samples - teachers)).square().mean().item(),  # of pixels in [-1, 1]
                "class_accuracy": svm.score((2 * samples - 1).flatten(1).numpy(), LABELS),
                "tokens": tokens,
            }
        )
    write_text(folder / "result.json", json.dumps(rows, indent=1))


def averaged_students(recipe: Recipe, start: Path):
    """(step, student with its averaged weights) at step 0 and at every checkpoint."""
    yield 0, load_student(start)
    for checkpoint in sorted(Path(recipe.out, "checkpoints").glob("step-*")):
        student = load_student(start)
        begin = student.guide
        run = RunState(student, recipe.ema)
        run.load_state_dict(torch.load(checkpoint / "run.pt", weights_only=True))
        with run.averaged(student, schedule.guide(recipe, run.step, begin)):
            yield run.step, student


def runs_of(out: Path, arm: str, seeds: list[int]) -> list[list[dict[str, Any]]]:
    """The rows of every seed of an arm that has been run."""
    paths = [out / f"{arm}-{seed}" / "result.json" for seed in seeds]
    return [json.loads(path.read_text()) for path in paths if path.is_file()]


def table(out: Path, arms: list[str], seeds: list[int]) -> str:
    """Mean over the seeds, with the lowest and highest of them."""
    lines = ["| arm | seeds | step | val ε-MSE | trajectories, paired MSE | class accuracy | tokens |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for arm in arms:
        runs = runs_of(out, arm, seeds)
        for rows in zip(*runs, strict=True):
            cells = [_spread([row[key] for row in rows]) for key in ("val_loss", "paired_mse", "class_accuracy")]
            tokens = mean(row["tokens"] for row in rows)
            lines.append(f"| {arm} | {len(runs)} | {rows[0]['step']} | {' | '.join(cells)} | {tokens:.0f} |")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    if max(values) - min(values) < 5e-5:
        return f"{mean(values):.4f}"
    return f"{mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def plot(out: Path, arms: list[str], seeds: list[int], path: Path) -> None:
    """Loss and paired MSE against steps: means as lines, the seeds as bands."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    teacher = json.loads((out / "teacher.json").read_text())["val_loss"]
    columns = {"val_loss": "held-out ε-MSE", "paired_mse": "paired MSE of samples"}
    for axis, (key, title) in zip(axes, columns.items(), strict=True):
        for arm in arms:
            if not (runs := runs_of(out, arm, seeds)):
                continue
            values = [[row[key] for row in rows] for rows in zip(*runs, strict=True)]
            steps = [row["step"] for row in runs[0]]
            (line,) = axis.plot(steps, [mean(v) for v in values], label=arm)
            low, high = [min(v) for v in values], [max(v) for v in values]
            axis.fill_between(steps, low, high, alpha=0.2, color=line.get_color())
        axis.set(yscale="log", xlabel="steps", title=title)
    axes[0].axhline(teacher, color="black", linestyle=":", label="teacher")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--jobs", type=int, default=2, help="arms at a time, one thread each")
    parser.add_argument("--report", action="store_true", help="run nothing: table and picture of what has been run")
    parser.add_argument("--judge", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.judge:
        judge(options.judge)
        return
    jobs = [] if options.report else [(arm, seed) for seed in options.seeds for arm in options.arms]
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda job: run_arm(*job, options.steps, options.out), jobs))
    teacher = validate_teacher()
    (options.out / "teacher.json").write_text(json.dumps({"val_loss": teacher}))
    text = f"{table(options.out, options.arms, options.seeds)}\n\nteacher: {teacher:.4f}, seeds {options.seeds}\n"
    (options.out / "table.md").write_text(text)
    plot(options.out, options.arms, options.seeds, options.out / "study.png")
    print(text)


def validate_teacher() -> float:
    """The teacher's validation loss."""
    pipe = DiffusionPipeline.from_pretrained(TEACHER, trust_remote_code=True)
    alpha_bar = pipe.scheduler.alphas_cumprod
    return validate(pipe.transformer, *load_digits("val"), alpha_bar).mean_loss


if __name__ == "__main__":
    main()
