"""What changes from step to step, as functions of the step alone: a resumed run needs no state for it."""

import math
import random

from upcycle.recipe import Recipe


def progress(recipe: Recipe, step: int) -> float:
    """Share of the run that is done at ``step``, in [0, 1)."""
    return step / recipe.steps


def guide(recipe: Recipe, step: int, start: float) -> float:
    """Weight k of the untrained start: from ``start`` linearly to 0 over the first ``anneal.until`` of the steps."""
    if recipe.anneal.until == 0:
        return 0.0
    return start * max(0.0, 1 - progress(recipe, step) / recipe.anneal.until)


def tail_drop(recipe: Recipe, step: int) -> float:
    """The fraction that this step drops for the whole batch, the same on every rank (multi-budget training)."""
    if not recipe.tail_drop.values or progress(recipe, step) < recipe.tail_drop.start:
        return 0.0
    return random.Random(f"{recipe.seed}-{step}").choice(recipe.tail_drop.values)


def learning_rate(recipe: Recipe, step: int) -> float:
    """Learning rate at ``step`` (the router's is ``router_lr_scale`` times this)."""
    o = recipe.optimizer
    warm = min(1.0, (step + 1) / o.warmup) if o.warmup else 1.0
    if o.schedule == "cosine":
        warm *= 0.5 * (1 + math.cos(math.pi * progress(recipe, step)))
    return o.lr * warm


def router_weight(recipe: Recipe, step: int) -> float:
    """Weight of the router's supervision: decays linearly to a third, never to zero."""
    return recipe.losses.router * (1 - 2 / 3 * progress(recipe, step))
