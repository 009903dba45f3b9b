"""log.csv and validation.csv: what happened at every step, in files that a continued run goes on with."""

import csv
import io
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from upcycle.output import disk_full
from upcycle.training.state import RunState

TIMES = ("step_seconds", "data_seconds")
"""Wall time of a step, and what of it was waiting for data."""


class Rows:
    """A CSV file with a ``step`` column: new at step 0, else it goes on after the row of ``step``.

    What a full disk does not take waits in memory for the next row.
    """

    def __init__(self, path: Path, columns: Sequence[str], step: int):
        self._columns = columns
        self._waiting = b""
        kept: list[dict[str, str]] = []
        if step and path.exists():
            with path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if _done(row, step)]
        new = path.with_name(f".{path.name}.partial-{os.getpid()}")
        with new.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(kept)
        os.replace(new, path)  # a kill while writing must not cost the rows
        self._file = path.open("ab", buffering=0)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row; it is in the file when this returns."""
        text = io.StringIO(newline="")
        csv.DictWriter(text, self._columns).writerow(
            {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
        )
        self._waiting += text.getvalue().encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) or 0 :]
        except OSError as error:
            if not disk_full(error):
                raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Log:
    """A row every ``every`` steps, averaged over them, and one of the rest when the run ends.

    Rows that wait for their average are part of the `RunState`. Averages leave out what is not finite (a noise level
    that no sample had).
    """

    def __init__(self, path: Path, columns: Sequence[str], run: RunState, every: int):
        self._columns, self._run, self._every = columns, run, every
        self._rows = Rows(path, columns, run.step)

    def write(self, row: dict[str, Any]) -> dict[str, Any] | None:
        """Take the row of a step; returns the average where one is due and written."""
        self._run.pending.append({name: row[name] for name in self._columns})
        return self.flush() if row["step"] % self._every == 0 else None

    def flush(self) -> dict[str, Any] | None:
        """Write the average of the rows that wait; returns it."""
        rows = self._run.pending
        if not rows:
            return None
        mean = {name: _mean([row.get(name, math.nan) for row in rows]) for name in self._columns}
        mean |= {name: rows[-1][name] for name in ("step", "stage", "skipped") if name in mean}
        self._run.pending = []
        self._rows.write(mean)
        return mean

    def close(self) -> None:
        """Close the file; rows that wait are left to the `RunState`."""
        self._rows.close()


def _mean(values: list[Any]) -> Any:
    if isinstance(values[0], str):
        return values[-1]
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _done(row: dict[str, str], step: int) -> bool:
    """Whether a row is whole and of a step that the checkpoint knows; a kill may leave half a line at the end."""
    return None not in row.values() and row["step"].isdigit() and int(row["step"]) <= step
