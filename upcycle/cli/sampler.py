"""The options of the sampling loop, as words."""

from typing import Any, Literal

from upcycle.errors import UpcycleError

Sampler = Literal["ddim", "ddpm", "dpm-solver++", "unipc"]


def check_guidance(scale: float | None, **options: Any) -> None:
    """Raise `UpcycleError` where options of guidance (``guidance_channels``) are given without any; ``scale`` None is
    the default, which guides."""
    given = next((name for name, value in options.items() if value is not None), None)
    if given and scale is not None and scale <= 1:
        option = given.replace("_", "-")
        raise UpcycleError(f"--guidance-scale {scale:g} is no guidance, and --{option} changes it; leave one out")


def check_scale(scale: float | None) -> None:
    """Raise `UpcycleError` for a scale below 1, which sampling by class would take for 1; None is the default."""
    if scale is not None and scale < 1:
        raise UpcycleError(f"--guidance-scale {scale:g} is less than none; 1 is none, 1.5 to 4 are usual")


def parse_interval(text: str | None) -> tuple[int, int] | None:
    """``200:700`` of ``--guidance-interval``; raises `UpcycleError`."""
    if text is None:
        return None
    low, colon, high = text.partition(":")
    if (
        not colon
        or not low.strip().isdecimal()
        or not high.strip().isdecimal()
        or int(low) > int(high)
        or int(high) > 999
    ):
        raise UpcycleError(f"--guidance-interval {text} is no range of timesteps from 0 to 999, such as 200:700")
    return int(low), int(high)


def parse_hold(text: str | None) -> int | float | None:
    """``2``, every second step, or a limit such as ``0.05``, of ``--hold``; raises `UpcycleError`."""
    if text is None:
        return None
    try:
        held = float(text)
    except ValueError:
        held = 0
    if not (0 < held < 1 or (held >= 2 and held.is_integer())):
        raise UpcycleError(
            f"--hold {text} is neither a whole number of steps from 2 up, such as 2, nor a limit below 1, such as 0.05"
        )
    return held if held < 1 else int(held)


def made_hold(held: int | float | None) -> Any:
    """The `Hold` of what `parse_hold` read."""
    from upcycle.sampling.sampler import Hold

    if held is None:
        return None
    return Hold(every=held) if isinstance(held, int) else Hold(limit=held)
