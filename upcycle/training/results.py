"""What a finished run says of its export, read off the files in its folder."""

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from upcycle.evaluation.validation import TIMESTEPS
from upcycle.recipe import Recipe


@dataclass(frozen=True)
class Results:
    """What was measured of the exported weights (`upcycle.provenance`), and pictures of them by name."""

    evidence: list[dict[str, Any]] = field(default_factory=list)
    pictures: dict[str, Path] = field(default_factory=dict)


def read(out: Path, recipe: Recipe, step: int) -> Results:
    """Results of the run in ``out``, which exports the weights of ``step``; none that are of another step."""
    row = next((row for row in _rows(out / "validation.csv") if int(row["step"]) == step), None)
    pictures = {}
    for name in ("samples", "router"):
        path = out / "previews" / f"{name}-{step:07d}.png"
        if path.is_file():
            pictures[f"{name}.png"] = path
    if row is None or recipe.validation is None:
        return Results(pictures=pictures)
    budget: dict[str, Any] = {"tail_drop": 0, "tokens_kept": round(float(row["tokens_kept"]), 1)}
    if recipe.convert.dydit or float(row.get("block_flops") or 1) != 1:
        budget["block_flops"] = round(float(row["block_flops"]), 3)
    metric = "ε-MSE on held-out data"
    if recipe.method == "ddit":
        budget = {"patches": f"mean over x{', x'.join(map(str, recipe.ddit.patches))}"}
        if float(row["teacher"]) == 0:  # of models that read text the distance to the base is what is measured
            metric = "relative error to the base on held-out data"
    found = {
        "metric": metric,
        "better": "lower",
        "student": float(row["student"]),
        "teacher": float(row["teacher"]),
        "settings": {
            "data": recipe.validation.data,
            "samples": recipe.validation.samples or "all",
            "timesteps": f"{len(TIMESTEPS)} from {TIMESTEPS[0]} to {TIMESTEPS[-1]}",
            **budget,
            "step": step,
        },
    }
    return Results([found], pictures)


def _rows(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
