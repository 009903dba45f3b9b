"""What changes from step to step, as functions of the step alone: a resumed run needs no state for it."""

import math
import random

from upcycle.recipe import Recipe, Stage


def stage_at(recipe: Recipe, step: int) -> tuple[Stage, float]:
    """The stage that ``step`` belongs to, and the share of it that is done, in [0, 1); past the end: the last, 1."""
    for stage in recipe.stages:
        if step < stage.steps:
            return stage, step / stage.steps
        step -= stage.steps
    return recipe.stages[-1], 1.0


def guide(recipe: Recipe, step: int, start: float) -> float:
    """Weight k of the untrained start: ``start``, until a stage anneals it linearly to 0 (for good)."""
    current, done = stage_at(recipe, step)
    for stage in recipe.stages:
        until = stage.anneal.until
        if stage is not current:
            start = start if until is None else 0.0
        elif until is not None:
            start = start * max(0.0, 1 - done / until) if until else 0.0
        if stage is current:
            break
    return start


def tail_drop(recipe: Recipe, step: int) -> float:
    """The fraction that this step drops for the whole batch, the same on every rank (multi-budget training)."""
    stage, done = stage_at(recipe, step)
    if not stage.tail_drop.values or done < stage.tail_drop.start:
        return 0.0
    return random.Random(f"{recipe.seed}-{step}").choice(stage.tail_drop.values)


def gate_seeds(recipe: Recipe, step: int, samples: range) -> list[int]:
    """Seeds of the noise of DyDiT's gates for these samples of a step's batch, whichever rank has them."""
    first = step * recipe.batch_size
    return [random.Random(f"{recipe.seed}-gates-{first + i}").getrandbits(31) for i in samples]


def learning_rate(recipe: Recipe, step: int) -> float:
    """Learning rate at ``step``; groups of parameters multiply it (`Optimizer`)."""
    stage, done = stage_at(recipe, step)
    lr = stage.lr
    if stage.warmup:
        lr *= min(1.0, (done * stage.steps + 1) / stage.warmup)
    if stage.schedule == "cosine":
        lr *= 0.5 * (1 + math.cos(math.pi * done))
    return lr


def router_weight(recipe: Recipe, step: int) -> float:
    """Weight of the router's supervision: decays linearly to a third over a stage, never to zero."""
    stage, done = stage_at(recipe, step)
    return stage.losses.router * (1 - 2 / 3 * done)
