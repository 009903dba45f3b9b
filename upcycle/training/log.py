"""log.csv: what happened at every step, averaged over a few."""

import csv
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from upcycle.training.state import RunState


class Log:
    """A row every ``every`` steps, averaged over them, and one of the rest when the run ends.

    Rows that wait for their average are part of the `RunState`. A continued run cuts off the rows after its checkpoint,
    so that the file holds every step once. Averages leave out what is not finite (a noise level that no sample had).
    """

    def __init__(self, path: Path, columns: Sequence[str], run: RunState, every: int):
        self._columns, self._run, self._every = columns, run, every
        self._file = open_rows(path, columns, run.step)
        self._writer = csv.DictWriter(self._file, columns)

    def write(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """Take the row of a step; returns the average where one is due and written."""
        self._run.pending.append({name: row[name] for name in self._columns})
        return self._flush() if row["step"] % self._every == 0 else None

    def close(self, *, last: bool) -> None:
        """Close the file; at the end of a run the rows that wait are written as well."""
        if last and self._run.pending:
            self._flush()
        self._file.close()

    def _flush(self) -> dict[str, Any]:
        rows = self._run.pending
        mean = {name: _mean([row[name] for row in rows]) for name in self._columns}
        mean |= {name: rows[-1][name] for name in ("step", "stage", "skipped") if name in mean}
        self._run.pending = []
        self._writer.writerow({name: f"{v:.6g}" if isinstance(v, float) else v for name, v in mean.items()})
        self._file.flush()
        return mean


def open_rows(path: Path, columns: Sequence[str], step: int) -> TextIO:
    """A CSV file with a ``step`` column to append to: new at step 0, else with the rows up to ``step`` only."""
    kept: list[dict[str, str]] = []
    if step and path.exists():
        with path.open(newline="") as file:
            kept = [row for row in csv.DictReader(file) if _done(row, step)]
    new = path.with_name(f".{path.name}.partial")
    with new.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(kept)
    os.replace(new, path)  # a kill while writing must not cost the rows
    return path.open("a", newline="")


def _mean(values: list[Any]) -> Any:
    if isinstance(values[0], str):
        return values[-1]
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _done(row: dict[str, str], step: int) -> bool:
    """Whether a row is whole and of a step that the checkpoint knows; a kill may leave half a line at the end."""
    return None not in row.values() and row["step"].isdigit() and int(row["step"]) <= step
