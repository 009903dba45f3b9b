"""What commands print: progress and messages on stderr, so that stdout holds results only."""

import logging
import os
import sys
import warnings
from collections.abc import Iterable
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.status import Status
from rich.table import Column
from rich.text import Text

from upcycle.output import to_json

# Literal text on lines of any length: what users name may hold [brackets] and :colons:, and is to be copied whole.
# Tables are printed with soft_wrap=False.
stderr = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
stdout = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)


def working(text: str) -> Status:
    """A spinner on stderr while something is being done."""
    return stderr.status(Text(text))


class _Speed(ProgressColumn):
    def __init__(self, unit: str):
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.3g} {self._unit}/s")


class Bar(Progress):
    """A progress display; ``status`` is a second line, cut to the width of the terminal."""

    status = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.status:
            yield Text(f"  {self.status}", no_wrap=True, overflow="ellipsis")


def progress(unit: str | None = None) -> Bar:
    """A progress display with elapsed and remaining time, and with ``unit`` how many of them a second.

    In a narrow terminal the description is cut, not the figures.
    """
    return Bar(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        *([_Speed(unit)] if unit else []),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=stderr,
        expand=True,
    )


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(to_json(value))


def quiet_libraries() -> None:
    """Keep the libraries' warnings off the terminal; what a user must know is said by us."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.getLogger("torch").setLevel(logging.ERROR)
    logging.getLogger("diffusers").setLevel(logging.ERROR)


def count(n: float) -> str:
    """A large number for people: 674.8 M."""
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(n) >= size:
            return f"{n / size:.4g} {unit}"
    return f"{n:.4g} "


def size(n: float) -> str:
    """Bytes for people."""
    for unit, one in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if n >= one:
            return f"{n / one:.1f} {unit}"
    return f"{n:.0f} B"
