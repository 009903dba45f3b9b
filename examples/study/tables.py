"""What the parts of docs/results.md share: tables, means over seeds, and figures of an arm's runs."""

from statistics import mean
from typing import Any

Values = list[float]
Found = dict[str, Any]


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows))


def spread(values: Values, digits: str = ".3g") -> str:
    """The mean, and lowest to highest where they differ; large ones without an exponent."""
    low, high, middle = (f"{float(f'{f(values):{digits}}'):g}" for f in (min, max, mean))
    return middle if low == high else f"{middle} ({low} to {high})"


def last_rows(arms: Found, arm: str) -> list[Found]:
    """What an arm ends with, a row a seed."""
    return [run["rows"][-1] for run in arms[arm].values()]


def worst_level(row: Found, teacher: Found) -> float:
    """The largest of the ten levels' noise MSEs, each over the teacher's."""
    return max(row["val_loss_by_t"][t] / teacher["val_loss_by_t"][t] for t in teacher["val_loss_by_t"])


def curve_of(arms: Found, arm: str) -> dict[int, float]:
    """Noise MSE by checkpoint after the start, the mean over the seeds."""
    runs = [run["rows"] for run in arms[arm].values()]
    return {
        rows[0]["step"]: mean(row["val_loss"] for row in rows) for rows in zip(*runs, strict=True) if rows[0]["step"]
    }


def first_step(curve: dict[int, float], loss: float) -> int | None:
    """The first checkpoint with a noise MSE of at most ``loss``."""
    return next((step for step, value in curve.items() if value <= loss), None)
