"""What a finished run says of its export, read off the files in its folder."""

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upcycle.evaluation.validation import TIMESTEPS
from upcycle.recipe import Recipe


@dataclass(frozen=True)
class Results:
    """``step`` of the exported weights, what was measured (`upcycle.provenance`), pictures by name."""

    step: int
    evidence: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[str, Path] = field(default_factory=dict)


def read(out: Path, recipe: Recipe, steps: int) -> Results:
    """Results of the run in ``out``, which has ended after ``steps``."""
    rows = _rows(out / "validation.csv")
    best = recipe.export == "best" and rows
    row = min(rows, key=lambda row: float(row["student"])) if best else rows[-1] if rows else None
    step = int(row["step"]) if best and row else steps
    pictures = {}
    for name in ("samples", "router"):
        path = out / "previews" / f"{name}-{step:07d}.png"
        if path.is_file():
            pictures[f"{name}.png"] = path
    if row is None or int(row["step"]) != step or recipe.validation is None:
        return Results(step, pictures=pictures)
    found = {
        "metric": "ε-MSE on held-out data",
        "better": "lower",
        "student": float(row["student"]),
        "teacher": float(row["teacher"]),
        "settings": {
            "data": recipe.validation.data,
            "samples": recipe.validation.samples or "all",
            "timesteps": f"{len(TIMESTEPS)} from {TIMESTEPS[0]} to {TIMESTEPS[-1]}",
            "tail_drop": 0,
            "tokens_kept": round(float(row["tokens_kept"]), 1),
            "step": step,
        },
    }
    return Results(step, [found], pictures)


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
