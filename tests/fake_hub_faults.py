"""Faults on order: what goes wrong with which request of the fake Hub, and how often."""

import re
import threading
from dataclasses import dataclass, field


@dataclass
class Fault:
    """One thing that goes wrong with requests whose "METHOD path" matches `pattern`."""

    pattern: str
    times: int | None = 1
    """How many requests it hits; None: all."""
    skip: int = 0
    """How many matching requests it lets pass first."""
    status: int | None = None
    """Answer this instead of doing what is asked."""
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "out of order"
    cut: int | None = None
    """Close the connection after so many bytes of a request's body, or of the answer to a GET."""
    reset: bool = False
    """Close it with a reset instead of an end."""
    lose: bool = False
    """Do what is asked, then close the connection instead of answering."""
    seconds: float = 0
    """Wait so long first."""
    hits: int = 0
    """How many requests it has hit."""

    @property
    def spent(self) -> bool:
        return self.times is not None and self.hits >= self.times


class Faults:
    """Faults in the order in which they were ordered; a request meets the first one that is for it."""

    def __init__(self) -> None:
        self.all: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> Fault:
        self.all.append(fault)
        return fault

    def meet(self, line: str) -> Fault | None:
        """The fault that hits this request, if one does; it counts."""
        with self._lock:
            for fault in self.all:
                if fault.spent or not re.search(fault.pattern, line):
                    continue
                if fault.skip:
                    fault.skip -= 1
                    continue
                fault.hits += 1
                return fault
        return None
