"""Budgets of a student as words of the command line, and what a run really spent."""

import math
from collections.abc import Mapping
from typing import Any

from upcycle.errors import UpcycleError

TAIL_DROP, UNCOND_TAIL_DROP, TOKENS, BUDGET = "--tail-drop", "--uncond-tail-drop", "--tokens", "--budget"
_FORMS = {
    TAIL_DROP: "a share from 0 to less than 1",
    UNCOND_TAIL_DROP: "a share from 0 to less than 1",
    TOKENS: "a number of tokens",
}
_EXAMPLES = {TAIL_DROP: "0:0.2,500:0.5", UNCOND_TAIL_DROP: "0:0.5,500:0.9", TOKENS: "0:96,500:32"}


def parse(words: Mapping[str, str | None]) -> dict[str, Any]:
    """The budgets that are given, as `ChunkedDiT` takes them; raises `UpcycleError`.

    ``words``: by option. A tail drop or a number of tokens is a number, or a schedule such as 0:96,500:32, 96 at
    t < 500 and 32 from there up; a budget a share of the teacher's cost, or TFLOPs an image with a T behind.
    """
    given = {option: _parse(option, text) for option, text in words.items() if text is not None}
    rival = [option for option in (TAIL_DROP, TOKENS, BUDGET) if option in given]
    if TOKENS in given and UNCOND_TAIL_DROP in given:
        rival = [UNCOND_TAIL_DROP, TOKENS]
    if len(rival) > 1:
        raise UpcycleError(f"{rival[0]} and {rival[1]} are two budgets; give one of them")
    return given


def _parse(option: str, text: str) -> Any:
    if option == BUDGET:
        tflops = text[-1:] in ("T", "t")
        try:
            number = float(text[:-1] if tflops else text)
        except ValueError:
            number = math.nan
        if not 0 < number < math.inf:
            raise UpcycleError(f"{BUDGET} {text} is neither a share of the teacher's cost (0.6) nor TFLOPs (40T)")
        return {"tflops" if tflops else "share": number}
    kind = int if option == TOKENS else float
    try:
        parts = [part.split(":") if ":" in text else ["0", part] for part in text.split(",")]
        schedule = sorted((int(t), kind(number)) for t, number in parts)
    except ValueError:
        schedule = []
    starts = [t for t, _ in schedule]
    if not schedule or starts[0] != 0 or starts[-1] > 999 or len(set(starts)) < len(starts):
        raise UpcycleError(
            f"{option} {text} is neither {_FORMS[option]} nor a schedule that begins at t = 0, such as "
            f"{_EXAMPLES[option]}"
        )
    if option != TOKENS and not all(0 <= number < 1 for _, number in schedule):
        raise UpcycleError(f"{option} {text} must be at least 0 and less than 1")
    return schedule if len(schedule) > 1 else schedule[0][1]


def put_on(transformer: Any, given: Mapping[str, Any], steps: int, guided: bool) -> None:
    """Let a `ChunkedDiT` follow what `parse` made; where nothing is given it keeps its own defaults.

    Raises `UpcycleError` for more tokens than there are positions, and for a budget that is not to be had.
    """
    positions = transformer.config.sample_size**2
    if TOKENS in given:
        asked = given[TOKENS]
        numbers = [number for _, number in asked] if isinstance(asked, list) else [asked]
        if not all(1 <= number <= positions for number in numbers):
            raise UpcycleError(f"{TOKENS} {told(asked)}: this model keeps 1 to {positions} tokens")
        transformer.set_tokens(asked)
    elif given:
        transformer.set_tokens(None)
    if TAIL_DROP in given:
        transformer.set_tail_drop(given[TAIL_DROP])
    wish = given.get(BUDGET) or (transformer.budget if transformer.tokens is None else None)
    if TOKENS in given or wish:
        transformer.set_tail_drop(0.0)
    if UNCOND_TAIL_DROP in given:
        transformer.set_lite_cfg(given[UNCOND_TAIL_DROP])
    try:
        if wish:
            transformer.set_budget(**{**wish, "steps": steps, "guided": guided})
    except ValueError as error:
        raise UpcycleError(f"{BUDGET}: {error}") from error


def told(value: Any) -> str:
    """A tail drop, tokens or a schedule of them, as `parse` reads it."""
    pairs = getattr(value, "pairs", [*value.items()] if isinstance(value, Mapping) else value)
    if not isinstance(pairs, list | tuple):
        return f"{value:g}"
    if not all(isinstance(pair, list | tuple) for pair in pairs):
        return f"{len(pairs)} values"
    return ",".join(f"{t}:{number:g}" for t, number in pairs)
