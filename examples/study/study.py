"""The study: what upcycling gives, on the digits and on procedural shapes, against honest baselines.

    pip install -e '.[digits]'
    python examples/study/study.py --quick                   # a look, six minutes on two CPU cores
    python examples/study/study.py                           # all of it, about three hours; go on with the same command
    python examples/study/study.py --report --docs           # write docs/results.md of what has been run
    python examples/study/study.py --scale S --device cuda   # shapes of 64 x 64 pixels, DiT-S; --scale B for DiT-B

Every arm (`arms.py`) is a recipe of `upcycle finetune`; each is judged on held-out noise MSE and on whole trajectories
beside the teacher's (`judging.py`), the exact graft also against the teacher with fewer steps, step holding and token
merging at equal FLOPs and time (`baselines.py`), and its router against the objects' true masks (`masks.py`). Results
are kept as they come; what is there with the same settings is not run again.
"""

import argparse
import ast
import fcntl
import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from arms import ARMS, arms_of, recipe_of, slug
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from sets import GUIDANCE, HERE, SHAPES_CLASSIFIER, SHAPES_TEACHER, TRAIN_SEED, Set, digits, shapes, train_classifier
from shapes import write_shards

from upcycle.output import to_json, write_text
from upcycle.provenance import digest
from upcycle.training.digits import TEACHER

WEIGHTS = "diffusion_pytorch_model.safetensors"


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
    "quick": Plan(("digits", "shapes"), {"digits": 32, "shapes": 12}, {"digits": 32, "shapes": 8},
                  {"digits": 12, "shapes": 8}, held_out=20, full_steps=20, timed=2, repeats=1, images=2048),
    "tiny": Plan(("digits", "shapes"), {"digits": 240, "shapes": 240}, {"digits": 32, "shapes": 16},
                 {"digits": 100, "shapes": 50}, held_out=60, full_steps=50, timed=6, repeats=3),
    "S": Plan(("shapes",), {"shapes": 400}, {"shapes": 64}, {"shapes": 100}, held_out=100, full_steps=50, timed=32,
              repeats=3, pixels=64, teacher={"size": "S", "steps": 2000, "batch_size": 64, "lr": 4e-4}),
    "B": Plan(("shapes",), {"shapes": 120}, {"shapes": 64}, {"shapes": 50}, held_out=100, full_steps=50, timed=16,
              repeats=3, pixels=64, teacher={"size": "B", "steps": 1000, "batch_size": 64, "lr": 3e-4}),
}  # fmt: skip
SCALE_ARMS = ["exact", "published, distilled", "from scratch", "N = 16", "grid boundaries", "random boundaries"]
JUDGED_BY = {  # the code that results of a kind are of, beside recipes
    "teacher": ("judging", "sets", "shapes"),
    "arm": ("judging", "parts", "sets", "shapes", "teachers"),
    "baselines": ("baselines", "token_merging", "sets", "shapes"),
    "masks": ("masks", "shapes"),
}
LOOKED_AT = {
    "baselines": ("exact", "N = 16", "guided distillation"),
    "masks": ("exact", "N = 16", "without supervision"),
}


@dataclass(frozen=True)
class Job:
    """A piece of work for a process of its own. ``kind``: one of `JUDGED_BY`."""

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
    def samples(self) -> int:
        """Baselines are some hundred runs: half of the samples."""
        samples = PLANS[self.plan].samples[self.set]
        return samples // 2 if self.kind == "baselines" else samples

    @property
    def places(self) -> "Places":
        return Places.of(self.plan, self.set, self.out)

    def settings(self) -> dict[str, Any]:
        """What a result must have been made with to be taken as it is. What it is not told: `inputs`."""
        plan = PLANS[self.plan]
        found: dict[str, Any] = {"samples": self.samples, "code": code_of(*JUDGED_BY[self.kind])}
        if self.kind in ("teacher", "arm"):
            found |= {"held_out": plan.held_out}
        if self.kind == "arm":
            arm = ARMS[self.arm]
            found |= {"recipe": portable(self.recipe()), "without": arm.without, "images": plan.images}
            found |= {"start": arm.start, "tail_drops": list(arm.tail_drops), "equal_tokens": arm.equal_tokens}
            found |= {"guidance": 1.0 if arm.guided else GUIDANCE}
        if self.kind == "baselines":
            found |= {"full_steps": plan.full_steps, "timed": plan.timed, "repeats": plan.repeats}
        if self.kind in LOOKED_AT:
            found["students"] = {arm: replace(self, kind="arm", arm=arm).settings() for arm in LOOKED_AT[self.kind]}
        return found

    def inputs(self) -> dict[str, str]:
        """Hashes of the weights that it starts from."""
        files = {"teacher": self.places.teacher_weights}
        if self.set == "shapes":
            files["classifier"] = self.places.classifier
        if self.kind in ("baselines", "masks"):
            files |= {arm: Path(folder, "transformer", WEIGHTS) for arm, folder in exports(self).items()}
        return {name: digest(path)[:16] for name, path in files.items()}

    def recipe(self) -> dict[str, Any]:
        plan, arm, places = PLANS[self.plan], ARMS[self.arm], self.places
        content = recipe_of(
            arm,
            study_set=self.set,
            teacher=places.teacher,
            data=places.teacher_made if arm.teacher_made else places.data,
            seed=self.seed,
            steps=plan.steps[self.set],
            batch_size=plan.batch[self.set],
            out=self.folder,
        )
        if self.device != "cpu":
            content |= {"mixed_precision": "bf16", "data_workers": 8}
        return content


@dataclass(frozen=True)
class Places:
    """Where a set's teacher, data and classifier are; ``teacher`` and ``data`` as recipes name them."""

    teacher: str
    data: str
    teacher_made: str
    classifier: Path

    @property
    def teacher_weights(self) -> Path:
        folder = TEACHER if self.teacher == "digits" else Path(self.teacher)
        return folder / "transformer" / WEIGHTS

    @classmethod
    def of(cls, plan_name: str, name: str, out: str) -> "Places":
        plan, folder = PLANS[plan_name], Path(out, name)
        made = str(folder / "teacher-made")
        if name == "digits":
            return cls("digits", "digits", made, Path())
        data = str(folder / f"data-{plan.images}-{code_of('shapes')[:8]}")  # other shapes.py, other data
        if plan.teacher:
            return cls(str(folder / "teacher"), data, made, folder / "classifier.safetensors")
        return cls(str(SHAPES_TEACHER), data, made, SHAPES_CLASSIFIER)


def portable(recipe: dict[str, Any]) -> dict[str, Any]:
    """A recipe without the places that depend on where the study is kept."""
    return {key: value for key, value in recipe.items() if key not in ("out", "data", "teacher", "student")}


@cache
def code_of(*names: str) -> str:
    """SHA-256 of modules that lie here, without comments, docstrings and layout."""
    trees = [ast.parse((HERE / f"{name}.py").read_text()) for name in names]
    for node in (inner for tree in trees for inner in ast.walk(tree)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return hashlib.sha256("".join(ast.dump(tree) for tree in trees).encode()).hexdigest()[:16]


def open_set(name: str, places: Places, pixels: int) -> Set:
    if name == "digits":
        return digits()
    return shapes(Path(places.data), teacher=Path(places.teacher), classifier=places.classifier, pixels=pixels)


# ---------------------------------------------------------------------------------------------------------------------
# In a process of its own


def work(job: Job) -> None:
    """Do a job and write ``result.json`` into its folder."""
    if job.device == "cpu":
        torch.set_num_threads(1)
    begun = time.perf_counter()
    plan = PLANS[job.plan]
    study_set = open_set(job.set, job.places, plan.pixels)
    found: dict[str, Any] = {"job": asdict(job), "settings": job.settings(), "inputs": job.inputs()}
    found["machine"] = machine(job.device)
    if job.kind in ("teacher", "arm"):
        from judging import Judge

        guidance = job.settings().get("guidance", GUIDANCE)
        judge = Judge(study_set, job.samples, plan.held_out, Path(job.out, job.set), job.device, guidance)
        found |= train_and_judge(job, judge) if job.kind == "arm" else {"teacher": judge.judge_teacher()}
    elif job.kind == "baselines":
        from baselines import measure_baselines

        found["report"] = measure_baselines(
            study_set,
            exports(job),
            guided={arm for arm in exports(job) if ARMS[arm].guided},
            samples=job.samples,
            timed_samples=plan.timed,
            repeats=plan.repeats,
            steps=plan.full_steps,
            device=job.device,
        )
    else:
        from masks import measure_masks

        found["report"] = measure_masks(
            exports(job), count=2 * job.samples, pixels=plan.pixels, teacher=study_set.teacher, device=job.device
        )
    found["seconds"] = time.perf_counter() - begun
    write_text(job.folder / "result.json", to_json(found))


def exports(job: Job) -> dict[str, str]:
    """The students, of the job's seed, that baselines or masks look at and that have been run."""
    folders = {arm: replace(job, kind="arm", arm=arm).folder / "run" / "export" for arm in LOOKED_AT[job.kind]}
    return {arm: str(folder) for arm, folder in folders.items() if folder.exists()}


def train_and_judge(job: Job, judge: Any) -> dict[str, Any]:
    from judging import judge_run, judge_trained_on, scratch_start
    from parts import leave_out

    from upcycle.recipe import load_recipe
    from upcycle.training.run import finetune, prepare

    arm, folder, recipe_file = ARMS[job.arm], job.folder, job.folder / "recipe.yaml"
    write_text(recipe_file, yaml.safe_dump(job.recipe(), sort_keys=False))
    if arm.start == "teacher":
        return {"rows": judge_trained_on(judge, recipe_file)}
    if arm.without:
        leave_out(arm.without)
    if arm.start == "scratch":
        scratch_start(folder / "start", job.places.teacher, job.seed)
    if not (folder / "run" / "export").exists():
        resume = (folder / "run").exists()
        finetune(prepare(load_recipe(recipe_file), resume=resume), resume=resume)
    log = (folder / "run" / "log.csv").read_text().splitlines()
    names, first = (line.split(",") for line in log[:2])
    rows = judge_run(judge, recipe_file, arm.tail_drops, arm.equal_tokens)
    return {"rows": rows, "first_losses": dict(zip(names, first, strict=True))}


def machine(device: str) -> str:
    from upcycle.evaluation.speed import machine

    return machine(torch.device(device))


# ---------------------------------------------------------------------------------------------------------------------
# The command


def prepare_sets(options: argparse.Namespace, names: list[str]) -> None:
    """What all arms of a set share, made once: shapes, at a larger scale their teacher, the teacher's own samples."""
    plan = PLANS[options.plan]
    for name in names:
        places = Places.of(options.plan, name, str(options.out))
        if plan.teacher and not Path(places.teacher).exists():
            from teachers import make_teacher

            size = {"pixels": plan.pixels, "images": plan.images}
            make_teacher(Path(places.teacher), **plan.teacher, **size, seed=0, device=options.device)
        if plan.teacher and not places.classifier.exists():
            train_classifier(places.classifier, pixels=plan.pixels, device=options.device)
        if name == "shapes" and not Path(places.data, "shapes.safetensors").exists():
            write_shards(Path(places.data), plan.images, TRAIN_SEED, plan.pixels)
        if any(ARMS[arm].teacher_made for arm in options.arms or arms_of(name, options.quick)):
            count = 100 if options.quick else 1500
            command = ["synthesize", places.teacher, "-o", places.teacher_made, "--count", str(count), "--steps", "20"]
            command += ["--guidance-scale", "1.5", "--batch-size", "50", "--device", options.device]
            run(command, options.out / f"{name}-synthesize.txt")


def run(arguments: list[str], log: Path) -> None:
    """An `upcycle` command whose words go to ``log``."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        done = subprocess.run([sys.executable, "-m", "upcycle", *arguments], stdout=file, stderr=file)
    if done.returncode:
        raise SystemExit(f"upcycle {' '.join(arguments)} failed:\n{log.read_text()[-2000:]}")


def is_done(job: Job) -> bool:
    """Whether its result is there; baselines and masks of other students do not count.

    Exits where its folder is of other settings or inputs: nothing that took hours is removed unasked.
    """
    told = job.folder / "settings.json"
    if not told.is_file():
        return False
    known, now = json.loads(told.read_text()), as_json({"settings": job.settings(), "inputs": job.inputs()})
    if known != now and job.kind in ("teacher", "arm"):
        refuse(f"{job.folder} was made with other settings or code; remove it, or choose another --out")
    return known == now and (job.folder / "result.json").is_file()


def refuse(what: str) -> NoReturn:
    """End with a line, as bad input does everywhere here."""
    print(what, file=sys.stderr)
    raise SystemExit(2)


def as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


class Jobs:
    """Jobs, ``at_once`` of them at a time, each in a process of its own."""

    def __init__(self, at_once: int):
        self._pool = ThreadPoolExecutor(at_once)
        self._running: dict[Job, subprocess.Popen[bytes]] = {}
        self._stopped = False

    def _do(self, job: Job) -> float:
        """Seconds; raises RuntimeError."""
        if self._stopped:
            raise RuntimeError("stopped")
        job.folder.mkdir(parents=True, exist_ok=True)
        content = {"settings": job.settings(), "inputs": job.inputs()}
        write_text(job.folder / "settings.json", json.dumps(content))
        (job.folder / "result.json").unlink(missing_ok=True)
        environment = dict(os.environ)
        if job.device == "cpu":
            environment |= {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"}
        begun = time.perf_counter()
        with (job.folder / "log.txt").open("a") as log:
            command = [sys.executable, __file__, "--work", json.dumps(asdict(job))]
            self._running[job] = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
            code = self._running[job].wait()
        if code:
            raise RuntimeError(f"{job.folder} failed:\n{(job.folder / 'log.txt').read_text()[-2000:]}")
        return time.perf_counter() - begun

    def do(self, jobs: list[Job], bar: Progress) -> bool:
        """Do those that are not done; whether all succeeded. Interrupted, it stops those that run, which may go on."""
        waiting = [job for job in jobs if not is_done(job)]
        if not waiting:
            return True
        task, fine = bar.add_task(waiting[0].kind, total=len(waiting)), True
        futures = {self._pool.submit(self._do, job): job for job in waiting}
        try:
            for future in as_completed(futures):
                job, text = futures[future], ""
                try:
                    text = f"{future.result():.0f} s"
                except RuntimeError as error:
                    fine, text = False, f"{error}\nThe rest goes on."
                print(f"{job.set}, {job.arm or job.kind}, seed {job.seed}: {text}", file=sys.stderr, flush=True)
                bar.advance(task)
        except KeyboardInterrupt:
            self._stopped = True
            for process in self._running.values():
                process.terminate()
            self._pool.shutdown(cancel_futures=True)
            print("interrupted; the same command goes on", file=sys.stderr)
            raise SystemExit(130) from None
        return fine


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps, samples and arms: whether it runs, no figures")
    parser.add_argument("--scale", choices=["S", "B"], help="DiT-S or DiT-B on shapes of 64 x 64 pixels")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument("--sets", nargs="+", choices=["digits", "shapes"], help="default: both; of --scale shapes")
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help=f"some of: {'; '.join(ARMS)}")
    parser.add_argument("--seeds", nargs="+", type=int, help="default: 0 1 2; of --quick and --scale 0")
    parser.add_argument("--jobs", type=int, help="at a time, one thread each; default 2, on a GPU 1")
    parser.add_argument("--out", type=Path, help="default: runs/study, runs/study-quick, runs/study-S-cuda ...")
    parser.add_argument("--report", action="store_true", help="run nothing: tables and pictures of what has been run")
    parser.add_argument("--docs", action="store_true", help="write them into docs/ too")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.plan = "quick" if options.quick else options.scale or "tiny"
    plan = PLANS[options.plan]
    if options.quick and (options.scale or options.docs):
        parser.error("--quick shows that it runs, on a CPU: leave out --scale and --docs, or --quick")
    if options.scale and options.device == "cpu" and not (options.report or options.work):
        parser.error("--scale takes days on a CPU: add --device cuda, on a machine with a GPU")
    if options.device == "cuda" and not torch.cuda.is_available() and not (options.report or options.work):
        parser.error("--device cuda: torch sees no GPU here")
    if wrong := set(options.sets or ()) - set(plan.sets):
        parser.error(f"--sets {min(wrong)} has no place in --scale {options.scale}; leave --sets out")
    if options.jobs is not None and options.jobs < 1:
        parser.error(f"--jobs {options.jobs} must be at least 1")
    if any(seed < 0 for seed in options.seeds or ()):
        parser.error(f"--seeds {min(options.seeds)}: seeds count from 0")
    suffix = "" if options.plan == "tiny" else f"-{options.plan}"
    suffix += "" if options.device == "cpu" else f"-{options.device}"
    options.out = options.out or Path(f"runs/study{suffix}")
    if options.out.exists() and not options.out.is_dir():
        parser.error(f"--out {options.out} is a file; give a folder")
    if options.report and not any(options.out.glob("*/teacher/result.json")):
        parser.error(f"--report: there is no study in {options.out}; run it first, or give its --out")
    options.seeds = list(dict.fromkeys(options.seeds or ([0, 1, 2] if options.plan == "tiny" else [0])))
    options.arms = list(dict.fromkeys(options.arms or ())) or (SCALE_ARMS if options.scale else None)
    return options


def main() -> None:
    options = parse()
    if options.work:
        work(Job(**json.loads(options.work)))
        return
    fine = True
    if not options.report:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            options.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            refuse(f"--out {options.out} cannot be made ({error.strerror}); give another folder")
        lock = (options.out / ".lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(f"another study is at work in {options.out}") from None
        fine = run_all(options)
    from results import write

    def settings_of(kind: str, name: str, arm: str, seed: int) -> dict[str, Any]:
        return as_json(Job(kind, options.plan, name, str(options.out), options.device, arm, seed).settings())

    print(write(options.out, options.plan, docs=options.docs, settings_of=settings_of))
    if not fine:
        raise SystemExit("some jobs failed; the same command tries them again")


def run_all(options: argparse.Namespace) -> bool:
    """Whether all jobs succeeded."""
    names = options.sets or list(PLANS[options.plan].sets)
    prepare_sets(options, names)

    def job(kind: str, name: str, arm: str = "", seed: int = 0) -> Job:
        return Job(kind, options.plan, name, str(options.out), options.device, arm, seed)

    # One seed of everything first, and the longest runs last: an interrupted study tells something, too.
    by_set = [
        sorted(
            (
                job("arm", name, arm, seed)
                for seed in options.seeds
                for arm in options.arms or arms_of(name, options.quick)
                if seed == options.seeds[0] or not ARMS[arm].once
            ),
            key=lambda one: ARMS[one.arm].times,
        )
        for name in names
    ]
    in_turn = [one for pair in itertools.zip_longest(*by_set) for one in pair if one]
    jobs, alone = Jobs(options.jobs or (2 if options.device == "cpu" else 1)), Jobs(1)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), disable=not sys.stderr.isatty()) as bar:
        fine = jobs.do([job("teacher", name) for name in names], bar)
        fine &= jobs.do(in_turn, bar)
        seed = options.seeds[0]
        looked_at = [job("masks", "shapes", seed=seed)] if "shapes" in names else []
        fine &= alone.do([one for one in looked_at if exports(one)], bar)
        # Timed: nothing beside it.
        fine &= alone.do([job("baselines", name, seed=seed) for name in names], bar)
    return fine


if __name__ == "__main__":
    main()
