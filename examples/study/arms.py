"""The arms of the study: every one is a recipe of `upcycle finetune`, and what it changes of the exact graft's."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from sets import GUIDANCE

from upcycle.shipped import shipped_recipe

BASE = shipped_recipe("digits")
ALIGN_SHARE = 0.1  # the paper aligns 5,000 steps before 50,000
PUBLISHED = {"diffusion": 1.0, "variational": 1.0, "distill": 0.0, "ratio": 0.03, "router": 0.0}
Recipe = dict[str, Any]


@dataclass(frozen=True)
class Arm:
    """``what`` it is in a few words; ``change`` turns the exact graft's recipe into its own. ``without``: one of
    `parts.PARTS`. ``times``: how many times as many steps it takes. ``start``: ``"scratch"`` for fresh blocks,
    ``"teacher"`` for a teacher that is trained on and no student. ``teacher_made``: trained on the teacher's samples.
    ``tail_drops``: budgets that it is judged with beside the whole one; ``equal_tokens``: also with
    exactly one of N positions kept, for what differs in where tokens are. ``guided``: it has learned the guided output,
    so that it samples without guidance. ``once``: with the first seed only; ``quick``: whether `--quick` runs it."""

    what: str
    change: Callable[[Recipe], None] = lambda recipe: None
    without: str | None = None
    times: int = 1
    start: str | None = None
    teacher_made: bool = False
    tail_drops: tuple[float, ...] = (0.4,)
    equal_tokens: bool = False
    guided: bool = False
    once: bool = False
    quick: bool = False


def _published_losses(recipe: Recipe) -> None:
    """The paper's losses and one rate for what is the teacher's and what is not."""
    recipe["stages"][0]["losses"] = dict(PUBLISHED)
    recipe["optimizer"] = {"router_lr_scale": 10.0}


def _without_distillation(recipe: Recipe) -> None:
    recipe["stages"][0]["losses"] |= {"diffusion": 1.0, "variational": 1.0, "distill": 0.0}


def _follow_teacher(recipe: Recipe) -> None:
    """Distillation alone, for what the data would contradict."""
    recipe["stages"][0]["losses"] |= {"diffusion": 0.0, "variational": 0.0, "distill": 4.0}


def _guided_distillation(recipe: Recipe) -> None:
    _follow_teacher(recipe)
    recipe["stages"][0]["teacher_guidance"] = GUIDANCE


def _paper_start(recipe: Recipe) -> None:
    recipe["convert"] = {"ratio": recipe["convert"]["ratio"], "init": "paper"}


def _paper_start_our_losses(recipe: Recipe) -> None:
    """Without router supervision and rate, under which the router that this start has may close."""
    _paper_start(recipe)
    recipe["stages"][0]["losses"]["router"] = 0.0
    recipe["optimizer"]["router_lr_scale"] = 1.0


def _paper(recipe: Recipe) -> None:
    """The published start, its losses, one learning rate for all."""
    _paper_start(recipe)
    recipe["stages"][0]["losses"] = dict(PUBLISHED)
    recipe["optimizer"] = {"router_lr_scale": 1.0}


def _paper_distilled(recipe: Recipe) -> None:
    _paper(recipe)
    (stage,) = recipe["stages"]
    align = {**stage, "name": "align", "steps": round(ALIGN_SHARE * stage["steps"]), "tail_drop": {"values": []}}
    align |= {"losses": {**PUBLISHED, "diffusion": 0.0, "variational": 0.0, "blocks": 1.0}, "schedule": "constant"}
    recipe["stages"] = [align, {**stage, "steps": stage["steps"] - align["steps"]}]


def _scratch(recipe: Recipe) -> None:
    _paper(recipe)
    recipe["stages"][0]["freeze"] = []


def _set(path: str, value: Any) -> Callable[[Recipe], None]:
    """A change of one key, such as ``stages.0.losses.router``."""

    def change(recipe: Recipe) -> None:
        *groups, key = path.split(".")
        target: Any = recipe
        for group in groups:
            target = target[int(group)] if group.isdigit() else target.setdefault(group, {})
        target[key] = value

    return change


def _sixteenth(router: str) -> Callable[[Recipe], None]:
    def change(recipe: Recipe) -> None:
        recipe["convert"] |= {"ratio": 16, "router": router}

    return change


BUDGETS = (0.2, 0.4, 0.6)
STARTS = {
    "teacher trained on": Arm("the teacher itself, with as many steps (b)", start="teacher", quick=True),
    "from scratch": Arm("DC-DiT, nothing from the teacher (c)", _scratch, start="scratch", quick=True),
    "from scratch, 8 x": Arm("the same, with 8 times the steps", _scratch, start="scratch", times=8, once=True),
    "published": Arm("published upcycling without distillation (d)", _paper, quick=True),
    "published, distilled": Arm("with block distillation for a tenth of the steps (e)", _paper_distilled, quick=True),
    "published, our losses": Arm("the published start, losses of `exact` but the router's", _paper_start_our_losses),
    "exact": Arm("the exact graft (f)", tail_drops=BUDGETS, equal_tokens=True, quick=True),
    "exact, 4 x": Arm("the same, with 4 times the steps", times=4, once=True),
}
LEFT_OUT = {
    "without guide": Arm(
        "the router is on its own from the first step, not held to the grid at first",
        _set("stages.0.anneal.until", 0.0),
    ),
    "without supervision": Arm("no BCE of the router", _set("stages.0.losses.router", 0.0), quick=True),
    "without controller": Arm("the bias that holds the ratio stays", _set("stages.0.anneal.bias_rate", 0.0)),
    "without router's rate": Arm("one learning rate for router and scaffold", _set("optimizer.router_lr_scale", 1.0)),
    "without distillation": Arm("noise MSE and variational bound instead", _without_distillation),
    "without balance": Arm("all noise levels weigh the same", _set("stages.0.losses.balanced", False)),
    "published losses": Arm(
        "the paper's, without distillation, router supervision, balance and the teacher's lower rate", _published_losses
    ),
    "without correction": Arm("no decoder", without="correction"),
    "without lattice": Arm("no prior for every second position", without="lattice"),
    "without cell mean": Arm("tokens see their window alone", without="cell-mean"),
    "without size bias": Arm("attention does not know the cells' sizes", without="size-bias"),
    "without fill": Arm("uncovered positions copy the nearest entry's noise estimate, not its x0", without="fill"),
    "without visibility": Arm("the router's target without √ᾱ", without="visibility"),
    "lower floor": Arm("weaker contrasts are detail to the router's target", without="target-floor", once=True),
}
ABLATIONS = {
    "random boundaries": Arm(
        "as many tokens, at random", _set("convert.router", "random"), equal_tokens=True, quick=True
    ),
    "grid boundaries": Arm(
        "the teacher's grid for good", _set("convert.router", "grid"), equal_tokens=True, quick=True
    ),
    "cosine router": Arm("H-Net's router instead of predictability", _set("convert.router", "cosine")),
    "without smoothing": Arm("no smoothing in the decoder", without="smoothing"),
    "one budget": Arm("no tail dropping while training", _set("stages.0.tail_drop.values", []), tail_drops=BUDGETS),
    "N = 16": Arm("a sixteenth of the positions", _sixteenth("predictability"), equal_tokens=True, quick=True),
    "N = 16, random": Arm("the same, at random", _sixteenth("random"), equal_tokens=True),
    "N = 16, grid": Arm("the same, on a grid twice as coarse as the teacher's", _sixteenth("grid"), equal_tokens=True),
    "distillation alone": Arm("following the teacher on the data, whose noise it is not told", _follow_teacher),
    "teacher-made data": Arm("the same on the teacher's own samples: no data", _follow_teacher, teacher_made=True),
    "guided distillation": Arm(
        "following the teacher's guided output: one evaluation a step instead of two", _guided_distillation, guided=True
    ),
}
ARMS: dict[str, Arm] = {**STARTS, **LEFT_OUT, **ABLATIONS}
FIRST = (
    "exact", "published, distilled", "from scratch", "published", "teacher trained on", "N = 16", "grid boundaries",
    "random boundaries", "without supervision", "guided distillation", "one budget", "N = 16, random", "N = 16, grid",
)  # fmt: skip
# Digits are drawn on the teacher's own grid: what a token off the grid needs is asked of the shapes, whose steps cost
# more.
DIGITS_ONLY = {
    "without guide", "without controller", "without router's rate", "without distillation", "published losses",
    "without correction", "without smoothing", "cosine router", "published, our losses", "teacher-made data",
    "distillation alone",
}  # fmt: skip
SHAPES_ONLY = {"without lattice", "without cell mean", "without size bias", "without fill", "without visibility"}


def arms_of(study_set: str, quick: bool) -> list[str]:
    """The arms of a set, most telling first."""
    left_out = SHAPES_ONLY if study_set == "digits" else DIGITS_ONLY
    names = [*FIRST, *(name for name in ARMS if name not in FIRST and name not in left_out)]
    return [name for name in names if ARMS[name].quick or not quick]


def recipe_of(
    arm: Arm, *, study_set: str, teacher: str, data: str, seed: int, steps: int, batch_size: int, out: Path
) -> Recipe:
    """The recipe of an arm, whose run goes to ``out/run`` and leaves a checkpoint at every quarter."""
    content: Recipe = copy.deepcopy(yaml.safe_load(BASE.read_text()))
    del content["validation"]
    steps *= arm.times
    content["stages"][0]["steps"] = steps
    content |= {"seed": seed, "out": str(out / "run"), "save_every": max(1, steps // 4), "keep_checkpoints": 4}
    content |= {"teacher": teacher, "data": data, "batch_size": batch_size}
    if study_set == "shapes":  # of which there are enough to learn more from than from the teacher alone
        content["stages"][0]["losses"] |= {"diffusion": 1.0, "variational": 1.0, "distill": 1.0}
    arm.change(content)
    if arm.start == "scratch":
        content["student"] = str(out / "start")
        del content["convert"]
    return content


def slug(name: str) -> str:
    """A folder's name."""
    return "-".join("".join(c if c.isalnum() else " " for c in name).split()).lower()
