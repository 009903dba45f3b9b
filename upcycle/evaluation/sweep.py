"""The curve of quality against cost of one student, beside its teacher with fewer steps."""

from decimal import Decimal, InvalidOperation
from typing import Any

from upcycle.errors import UpcycleError

MOST_POINTS = 50


def parse_sweep(text: str) -> list[float]:
    """``tail-drop=0:.6:.1`` -> 0, 0.1 ... 0.6, the last included; raises `UpcycleError`."""
    name, _, span = text.partition("=")
    wrong = UpcycleError(f"--sweep {text} is not tail-drop=FIRST:LAST:STEP with 0 <= FIRST <= LAST < 1 and STEP > 0")
    try:
        first, last, step = (Decimal(part) for part in span.split(":"))  # a float's 0.1 adds up to 0.30000000000000004
    except (InvalidOperation, ValueError):
        raise wrong from None
    if name != "tail-drop" or not all(value.is_finite() for value in (first, last, step)):
        raise wrong
    if not (0 <= first <= last < 1 and step > 0):
        raise wrong
    count = int((last - first) / step) + 1
    if count > MOST_POINTS:
        raise UpcycleError(f"--sweep {text} has {count} points, and each is drawn anew; take at most {MOST_POINTS}")
    return [float(first + i * step) for i in range(count)]


def matched_steps(steps: int, teacher_flops: float, students: list[dict[str, Any]]) -> list[int]:
    """Steps at which a teacher takes the FLOPs that the rows of a student take; no more than ``steps``, descending.

    ``teacher_flops``: of one image in ``steps`` steps.
    """
    matched = {round(steps * row["flops_per_image"] / teacher_flops) for row in students}
    return sorted({min(max(count, 1), steps) for count in matched} - {steps}, reverse=True)
