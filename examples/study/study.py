"""The study: what upcycling gives, on the digits and on procedural shapes, against honest baselines.

    pip install -e '.[digits]'
    python examples/study/study.py --quick                   # a look, minutes on two CPU cores
    python examples/study/study.py                           # all of it, hours; go on with the same command
    python examples/study/study.py --report --docs           # write docs/results.md of what has been run
    python examples/study/study.py --scale S --device cuda   # shapes of 64 x 64 pixels, DiT-S; --scale B for DiT-B

Every arm (`arms.py`) is a recipe of `upcycle finetune`; each is judged on held-out noise MSE and on whole trajectories
beside the teacher's (`judging.py`), the exact graft also against the teacher with fewer steps, step holding and token
merging at equal FLOPs and time (`baselines.py`), and its router against the objects' true masks (`masks.py`). Results
are kept as they come; what is there with the same settings is not run again.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from arms import ARMS, arms_of, recipe_of, slug
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from sets import SHAPES_CLASSIFIER, SHAPES_TEACHER, Set, digits, shapes, train_classifier

from upcycle.output import write_text


@dataclass(frozen=True)
class Plan:
    """How large a study is. ``steps`` and ``batch`` of an arm, ``samples`` drawn, by set; ``held_out``: images of the
    held-out noise MSE; ``timed``: samples of the timed rounds of the baselines, whose full run takes ``full_steps``."""

    sets: tuple[str, ...]
    steps: dict[str, int]
    batch: dict[str, int]
    samples: dict[str, int]
    held_out: int
    full_steps: int
    timed: int
    repeats: int
    images: int = 16384
    pixels: int = 32
    teacher: dict[str, Any] | None = None
    """How the shapes' teacher is trained; None for the one that is here."""


PLANS = {
    "quick": Plan(("digits", "shapes"), {"digits": 30, "shapes": 12}, {"digits": 32, "shapes": 8},
                  {"digits": 12, "shapes": 8}, held_out=20, full_steps=20, timed=2, repeats=1, images=2048),
    "tiny": Plan(("digits", "shapes"), {"digits": 240, "shapes": 240}, {"digits": 32, "shapes": 16},
                 {"digits": 60, "shapes": 30}, held_out=60, full_steps=50, timed=6, repeats=3),
    "S": Plan(("shapes",), {"shapes": 1500}, {"shapes": 128}, {"shapes": 200}, held_out=200, full_steps=50, timed=32,
              repeats=3, pixels=64,
              teacher={"size": "S", "steps": 8000, "batch_size": 128, "lr": 4e-4}),
    "B": Plan(("shapes",), {"shapes": 500}, {"shapes": 128}, {"shapes": 200}, held_out=200, full_steps=50, timed=32,
              repeats=3, pixels=64,
              teacher={"size": "B", "steps": 3000, "batch_size": 128, "lr": 3e-4}),
}  # fmt: skip
SCALE_ARMS = ["exact", "published, distilled", "from scratch", "N = 16", "grid boundaries", "random boundaries"]


@dataclass(frozen=True)
class Job:
    """A piece of work for a process of its own. ``kind``: arm, baselines or masks."""

    kind: str
    plan: str
    set: str
    out: str
    device: str
    arm: str = ""
    seed: int = 0

    @property
    def folder(self) -> Path:
        return Path(self.out, self.set, f"{slug(self.arm)}-{self.seed}" if self.kind == "arm" else self.kind)

    @property
    def settings(self) -> dict[str, Any]:
        """What a result must have been made with to be taken as it is; paths aside."""
        plan = PLANS[self.plan]
        common = {"samples": plan.samples[self.set], "held_out": plan.held_out, "pixels": plan.pixels}
        if self.kind != "arm":
            return {**common, "full_steps": plan.full_steps, "repeats": plan.repeats}
        return {**common, "recipe": portable(self.recipe())}

    def recipe(self) -> dict[str, Any]:
        plan, arm = PLANS[self.plan], ARMS[self.arm]
        study_set = open_set(self.set, self.plan, self.out)
        data = str(Path(self.out, self.set, "teacher-made")) if arm.teacher_made else study_set.data
        content = recipe_of(arm, study_set, self.seed, plan.steps[self.set], plan.batch[self.set], self.folder, data)
        if self.device != "cpu":
            content |= {"mixed_precision": "bf16", "data_workers": 8}
        return content


def portable(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without the places that depend on where the study is kept."""
    return {key: value for key, value in recipe.items() if key not in ("out", "data", "teacher", "student")}


def open_set(name: str, plan_name: str, out: str) -> Set:
    plan = PLANS[plan_name]
    if name == "digits":
        return digits()
    folder = Path(out, name)
    own = plan.teacher is not None
    return shapes(
        folder,
        teacher=folder / "teacher" if own else SHAPES_TEACHER,
        classifier=folder / "classifier.safetensors" if own else SHAPES_CLASSIFIER,
        pixels=plan.pixels,
        images=plan.images,
    )


# ---------------------------------------------------------------------------------------------------------------------
# In a process of its own


def work(job: Job) -> None:
    """Do a job and write ``result.json`` into its folder."""
    if job.device == "cpu":
        torch.set_num_threads(1)
    begun = time.perf_counter()
    plan, study_set = PLANS[job.plan], open_set(job.set, job.plan, job.out)
    found: dict[str, Any] = {"job": asdict(job), "settings": job.settings, "machine": machine(job.device)}
    if job.kind == "arm":
        found |= train_and_judge(job, study_set)
    elif job.kind == "baselines":
        from baselines import measure_baselines

        found["report"] = measure_baselines(
            study_set,
            exports(job, ("exact", "N = 16")),
            samples=plan.samples[job.set],
            timed_samples=plan.timed,
            repeats=plan.repeats,
            steps=plan.full_steps,
            device=job.device,
        )
    else:
        from masks import measure_masks

        students = exports(job, ("exact", "without supervision", "N = 16"))
        found["report"] = measure_masks(
            students, count=4 * plan.samples[job.set], pixels=plan.pixels, teacher=study_set.teacher
        )
    found["seconds"] = time.perf_counter() - begun
    write_text(job.folder / "result.json", json.dumps(found, indent=1))


def exports(job: Job, arms: tuple[str, ...]) -> dict[str, str]:
    """The exports of arms that have been run, of the first seed that has one."""
    found = {}
    for arm in arms:
        folders = sorted(Path(job.out, job.set).glob(f"{slug(arm)}-[0-9]*/run/export"))
        if folders:
            found[arm] = str(folders[0])
    return found


def train_and_judge(job: Job, study_set: Set) -> dict[str, Any]:
    from judging import Judge, judge_run, judge_trained_on, scratch_start
    from parts import leave_out

    from upcycle.training.run import finetune, prepare

    arm, folder, recipe_file = ARMS[job.arm], job.folder, job.folder / "recipe.yaml"
    write_text(recipe_file, yaml.safe_dump(job.recipe(), sort_keys=False))
    plan = PLANS[job.plan]
    judge = Judge(study_set, plan.samples[job.set], plan.held_out, Path(job.out, job.set), job.device)
    if arm.start == "teacher":
        return {"rows": judge_trained_on(judge, recipe_file), "teacher": judge.judge_teacher()}
    if arm.without:
        leave_out(arm.without)
    if arm.start == "scratch":
        scratch_start(folder / "start", study_set.teacher, job.seed)
    from upcycle.recipe import load_recipe

    if not (folder / "run" / "export").exists():
        resume = (folder / "run").exists()
        finetune(prepare(load_recipe(recipe_file), resume=resume), resume=resume)
    log = (folder / "run" / "log.csv").read_text().splitlines()
    names, first = (line.split(",") for line in log[:2])
    return {"rows": judge_run(judge, recipe_file, arm.tail_drops), "first_losses": dict(zip(names, first, strict=True))}


def machine(device: str) -> str:
    from upcycle.evaluation.speed import machine

    return machine(torch.device(device))


# ---------------------------------------------------------------------------------------------------------------------
# The command


def prepare_sets(options: argparse.Namespace, names: list[str]) -> None:
    """What all arms of a set share, made once: shapes, at a larger scale their teacher, the teacher's own samples."""
    plan = PLANS[options.plan]
    for name in names:
        folder = options.out / name
        if plan.teacher and not (folder / "teacher").exists():
            from teachers import make_teacher

            make_teacher(
                folder / "teacher",
                **plan.teacher,
                pixels=plan.pixels,
                images=plan.images,
                seed=0,
                device=options.device,
            )
        if plan.teacher and not (folder / "classifier.safetensors").exists():
            train_classifier(folder / "classifier.safetensors", pixels=plan.pixels, device=options.device)
        study_set = open_set(name, options.plan, str(options.out))
        made = folder / "teacher-made"
        if any(ARMS[arm].teacher_made for arm in options.arms or arms_of(name, options.quick)):
            count = 100 if options.quick else 1500
            command = ["synthesize", study_set.teacher, "-o", str(made), "--count", str(count), "--steps", "20"]
            run([*command, "--guidance-scale", "1.5", "--batch-size", "50"], options.out / f"{name}-synthesize.txt")


def run(arguments: list[str], log: Path) -> None:
    """An `upcycle` command whose words go to ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        done = subprocess.run([sys.executable, "-m", "upcycle", *arguments], stdout=file, stderr=file)
    if done.returncode:
        raise SystemExit(f"upcycle {' '.join(arguments)} failed:\n{log.read_text()[-2000:]}")


def is_done(job: Job) -> bool:
    """Whether its result is there, of the same settings; what was begun with others is removed."""
    settings = job.folder / "settings.json"
    if job.folder.exists() and (not settings.is_file() or json.loads(settings.read_text()) != as_json(job.settings)):
        shutil.rmtree(job.folder)
    return (job.folder / "result.json").is_file()


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def start(job: Job) -> float:
    """Do a job in a process of its own; seconds."""
    job.folder.mkdir(parents=True, exist_ok=True)
    write_text(job.folder / "settings.json", json.dumps(job.settings))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if job.device == "cpu" else dict(os.environ)
    begun = time.perf_counter()
    with (job.folder / "log.txt").open("a") as log:
        command = [sys.executable, __file__, "--work", json.dumps(asdict(job))]
        done = subprocess.run(command, env=environment, stdout=log, stderr=log)
    if done.returncode:
        text = (job.folder / "log.txt").read_text()[-2000:]
        raise RuntimeError(f"{job.folder} failed, the rest goes on:\n{text}")
    return time.perf_counter() - begun


def do(jobs: list[Job], at_once: int, bar: Progress) -> bool:
    """Do the jobs that are not done; whether all of them succeeded."""
    waiting = [job for job in jobs if not is_done(job)]
    if not waiting:
        return True
    task, fine = bar.add_task(waiting[0].kind, total=len(waiting)), True
    with ThreadPoolExecutor(at_once) as pool:
        futures = {pool.submit(start, job): job for job in waiting}
        for future in as_completed(futures):
            job = futures[future]
            try:
                seconds = future.result()
            except RuntimeError as error:
                fine = False
                print(error, file=sys.stderr, flush=True)
            else:
                print(
                    f"{job.set}, {job.arm or job.kind}, seed {job.seed}: {seconds:.0f} s", file=sys.stderr, flush=True
                )
            bar.advance(task)
    return fine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, samples and arms: whether it runs, no figures")
    parser.add_argument("--scale", choices=["S", "B"], help="DiT-S or DiT-B on shapes of 64 x 64 pixels")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    parser.add_argument("--sets", nargs="+", choices=["digits", "shapes"], help="default: both")
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help=f"some of: {'; '.join(ARMS)}")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 1 2; of --quick and --scale 0")
    parser.add_argument("--jobs", type=int, help="at a time, one thread each; default 2, on a GPU 1")
    parser.add_argument("--out", type=Path, help="default: runs/study, runs/study-quick, runs/study-S ...")
    parser.add_argument("--report", action="store_true", help="run nothing: tables and pictures of what has been run")
    parser.add_argument("--docs", action="store_true", help="write them into docs/ too")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        work(Job(**json.loads(options.work)))
        return
    if options.quick and options.scale:
        parser.error("--quick is of the study on a CPU: leave out --scale, or --quick")
    options.plan = "quick" if options.quick else options.scale or "tiny"
    suffix = "" if options.plan == "tiny" else f"-{options.plan}"
    options.out = options.out or Path(f"runs/study{suffix}")
    plan = PLANS[options.plan]
    names = [name for name in options.sets or plan.sets if name in plan.sets]
    seeds = options.seeds or ([0] if options.plan != "tiny" else [0, 1, 2])
    at_once = options.jobs or (2 if options.device == "cpu" else 1)
    fine = True
    if not options.report:
        options.arms = options.arms or (SCALE_ARMS if options.scale else None)
        prepare_sets(options, names)

        def job(kind: str, name: str, arm: str = "", seed: int = 0) -> Job:
            return Job(kind, options.plan, name, str(options.out), options.device, arm, seed)

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, TimeRemainingColumn(), disable=not sys.stderr.isatty()) as bar:
            by_set = [
                [
                    job("arm", name, arm, seed)
                    for seed in seeds
                    for arm in options.arms or arms_of(name, options.quick)
                    if seed == seeds[0] or not ARMS[arm].once
                ]
                for name in names
            ]
            in_turn = [one for pair in itertools.zip_longest(*by_set) for one in pair if one]
            fine = do(in_turn, at_once, bar)
            fine &= do([job("masks", name) for name in names if name == "shapes"], 1, bar)
            # Timed: nothing beside it.
            fine &= do([job("baselines", name) for name in names], 1, bar)
    from results import write

    text = write(options.out, options.plan, docs=options.docs)
    print(text)
    if not fine:
        raise SystemExit("some jobs failed; the same command tries them again")


if __name__ == "__main__":
    main()
