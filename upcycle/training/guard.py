"""When a run goes wrong: steps that are not finite, and a ratio that runs away."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from upcycle.errors import UpcycleError
from upcycle.recipe import Recipe
from upcycle.training.data import Batch
from upcycle.training.state import checkpoints
from upcycle.training.step import TERMS

RUNAWAY_STEPS = 20
MOST_KEPT, LEAST_KEPT = 0.9, 0.1
"""A ratio has run away when for so many steps more than 90 % of the positions are kept, or under a tenth of 1/N."""


class Guard:
    """Looks at the row of every step; says what a person should know, and ends a run that cannot recover."""

    def __init__(self, recipe: Recipe, updater: Any, checkpoints: Path):
        self._recipe, self._updater, self._folder = recipe, updater, checkpoints
        self._away = 0

    def look(self, row: dict[str, Any], batch: Batch) -> Iterator[str]:
        """Notes on this step. Raises `UpcycleError` after ``max_skipped`` steps in a row that were not finite."""
        in_row = self._updater.run.skipped_in_row
        if in_row >= self._recipe.max_skipped:
            kept = checkpoints(self._folder)
            good = f"go on from {kept[-1]} with --resume" if kept else "start anew (nothing is saved yet)"
            raise UpcycleError(
                f"{self._recipe.out}: {in_row} steps in a row were not finite, so the run stopped at step "
                f"{row['step']}: {self._explain(row, batch)}; look for NaN in the data or lower lr, then {good}"
            )
        if in_row == 1:
            yield f"warning: step {row['step']} is skipped: {self._explain(row, batch)}"
        yield from self._runaway(row)

    def _runaway(self, row: dict[str, Any]) -> Iterator[str]:
        if "ratio" not in row:
            return
        ratio = self._updater.student.config.ratio
        kept = 1 / row["ratio"]
        self._away = self._away + 1 if kept > MOST_KEPT or kept < LEAST_KEPT / ratio else 0
        if self._away == RUNAWAY_STEPS:
            what = "nearly all positions" if kept > MOST_KEPT else "almost none of the positions"
            yield (
                f"warning: for {RUNAWAY_STEPS} steps the router has kept {what} (ratio {row['ratio']:.3g}, wanted "
                f"{ratio:g}); lower optimizer.router_lr_scale, or raise losses.ratio or anneal.bias_rate"
            )

    @torch.no_grad()
    def _explain(self, row: dict[str, Any], batch: Batch) -> str:
        """Which losses, timesteps and layer are not finite: one more forward, only when it is needed.

        Call on every rank; all return what the first of them with a finding has found.
        """
        terms = [name for name in ("loss", *TERMS) if not math.isfinite(row.get(name, 0.0))]
        what = f"{', '.join(terms)} not finite" if terms else "the gradient is not finite"
        student, bad = self._updater.student, []

        def hook(name: str):
            def look(module, args, output) -> None:
                if isinstance(output, torch.Tensor) and not output.isfinite().all():
                    bad.append(name)

            return look

        handles = [module.register_forward_hook(hook(name)) for name, module in student.named_modules() if name]
        try:
            if hasattr(student, "mix"):  # of method ddit
                x_t = student.mix(batch.x0, batch.noise, batch.timestep)
            else:
                alpha = student.alpha_bar(batch.timestep)[:, None, None, None]
                x_t = alpha.sqrt() * batch.x0 + (1 - alpha).sqrt() * batch.noise
            how = {name: row[name] for name in ("guide", "tail_drop", "m") if name in row}
            with self._updater.accelerator.autocast():
                sample = student(x_t, batch.timestep, batch.label, **how).sample
        finally:
            for handle in handles:
                handle.remove()
        mine = [self._found(batch, sample, bad)]
        everyone = [finding for finding in gather_object(mine) if finding]
        return f"{what}; {everyone[0] if everyone else 'the outputs of the student are finite'}"

    @staticmethod
    def _found(batch: Batch, sample: torch.Tensor, bad: list[str]) -> str:
        inputs = (~batch.x0.flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        if inputs:
            return f"the data has NaN or infinite values in the samples at t={_some(batch.timestep, inputs)}"
        samples = (~sample.float().flatten(1).isfinite().all(1)).nonzero().flatten().tolist()
        where = f"first in layer {bad[0]}" if bad else ""
        return f"{where}, at t={_some(batch.timestep, samples)}" if samples else where


def _some(timestep: torch.Tensor, rows: list[int]) -> str:
    shown = timestep[rows[:5]].tolist()
    return ", ".join(map(str, shown)) + (", …" if len(rows) > 5 else "")
