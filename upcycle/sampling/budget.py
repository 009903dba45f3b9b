"""A fixed number of tokens, or one for each range of timesteps, while a pipeline samples."""

from typing import Any

import torch

from upcycle.errors import UpcycleError

Schedule = list[tuple[int, int]]
"""(t, tokens): from this timestep up, keep so many; sorted, the first t is 0."""


def parse_tokens(text: str, positions: int) -> Schedule:
    """``64``, or ``0:96,500:32`` for 96 tokens at t < 500 and 32 from there up; raises `UpcycleError`."""
    try:
        parts = [part.split(":") if ":" in text else ["0", part] for part in text.split(",")]
        schedule = sorted((int(t), int(tokens)) for t, tokens in parts)
    except ValueError:
        schedule = []
    starts = [t for t, _ in schedule]
    if not schedule or starts[0] != 0 or starts[-1] > 999 or len(set(starts)) < len(starts):
        raise UpcycleError(
            f"--tokens {text} is neither a number of tokens nor a schedule that begins at t = 0, such as 0:96,500:32"
        )
    if not all(1 <= tokens <= positions for _, tokens in schedule):
        raise UpcycleError(f"--tokens {text}: this model keeps 1 to {positions} tokens")
    return schedule


def follow(transformer: torch.nn.Module, schedule: Schedule) -> torch.utils.hooks.RemovableHandle | None:
    """Keep the tokens of ``schedule`` in every call of a `ChunkedDiT`; returns the hook that looks at t, if one must.

    That reads one timestep of the batch on the host, which a single number of tokens does not need. Pipelines pass
    ``timestep`` by keyword, and so must other callers; ``set_tokens(None)`` ends the budget.
    """
    transformer.set_tokens(schedule[0][1])
    if len(schedule) == 1:
        return None

    def look(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        t = int(kwargs["timestep"].reshape(-1)[0])
        module.set_tokens(next(tokens for start, tokens in reversed(schedule) if t >= start))

    return transformer.register_forward_pre_hook(look, with_kwargs=True)
