"""Sampling with a DDiT adapter: put it on a pipeline, a fixed schedule from the command line, what a run did and why,
and a threshold for a wanted speed-up."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from upcycle.errors import UpcycleError
from upcycle.evaluation.plots import ACCENT, INK, MUTED
from upcycle.graft.patches import load
from upcycle.models import ddit
from upcycle.output import to_json

MOST_RUNS = 10
CLOSE = 0.02
"""A calibration ends within this share of the wanted speed-up."""


def put_on(pipeline: Any, folder: Path, name: str, **schedule: Any) -> Any:
    """`ddit.put_on` the adapters in ``folder``; raises `UpcycleError` where one does not fit."""
    try:
        return ddit.put_on(pipeline, load(folder, name), **schedule)
    except ValueError as error:
        raise UpcycleError(f"{name}: {error}") from error


def parse_schedule(text: str, patches: list[int]) -> list[tuple[int, float]]:
    """``4:0.3,2:0.5,1:0.2``: factor and share of the steps, in order; raises `UpcycleError`."""
    try:
        schedule = [(int(m), float(share)) for m, share in (part.split(":") for part in text.split(","))]
    except ValueError:
        schedule = []
    shares = [share for _, share in schedule]
    if not schedule or not all(0 < share <= 1 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise UpcycleError(
            f"--schedule {text} is no list of factor:share whose shares add up to 1, such as 4:0.3,2:0.5,1:0.2"
        )
    if unknown := [m for m, _ in schedule if m != 1 and m not in patches]:
        raise UpcycleError(f"--schedule {text}: this model has 1, {', '.join(map(str, patches))}, not {unknown[0]}")
    return schedule


def set_schedule(
    model: Any,
    name: str,
    *,
    threshold: float | None = None,
    schedule: str | None = None,
    order: int | None = None,
    policy: str = "min",
) -> None:
    """What the command line wishes of the schedule; raises `UpcycleError` where ``model`` (``name``) has none."""
    patches = getattr(model, "ddit", None)
    asked = {"--threshold": threshold, "--schedule": schedule, "--order": order,
             "--policy": None if policy == "min" else policy}  # fmt: skip
    if patches is None:
        if wrong := next((option for option, value in asked.items() if value is not None), None):
            raise UpcycleError(f"{name} has no adapter for coarser patches; leave out {wrong}")
        return
    if schedule is not None and (wrong := next((o for o in ("--order", "--policy") if asked[o] is not None), None)):
        raise UpcycleError(f"{wrong} is for decisions by a threshold, and --schedule makes none; leave one of them out")
    changes: dict[str, Any] = {"policy": policy}
    if threshold is not None:
        changes["threshold"] = threshold
    if order is not None:
        changes["order"] = order
    if schedule is not None:
        changes["fixed"] = parse_schedule(schedule, patches.patches)
    model.set_schedule(**changes)


def check_batch(model: Any, *, balanced: bool, limit: bool) -> None:
    """Raise `UpcycleError` where sizes would go by who else is in a batch: of a threshold with ``balanced``, where
    batches change when a run goes on; of any schedule where a ``limit`` holds each sample by itself."""
    decides = model.schedule.threshold is not None and not model.schedule.fixed
    if limit and (decides or model.schedule.fixed):
        raise UpcycleError(
            "--hold with a limit asks about some samples of a batch, and a schedule of patches goes by whole ones; "
            "take --batch-size 1 or --hold K"
        )
    if balanced and decides and model.schedule.policy == "min":
        raise UpcycleError(
            "the adapter's threshold takes one size for a batch, so that images would depend on the others; take "
            "--policy grouped, --batch-size 1, or a fixed --schedule"
        )


def notes(model: Any, steps: int) -> list[str]:
    """What a person should know before a run of so many steps: a sampler that never calms down, a threshold that was
    chosen for another number of steps."""
    schedule = getattr(model, "schedule", None)
    if schedule is None or schedule.fixed or schedule.threshold is None:
        return []
    found = [model.sampler_note] if model.sampler_note else []
    chosen = model.ddit.calibration or {}
    if schedule.threshold == model.ddit.threshold and chosen.get("steps") not in (None, steps):
        found.append(f"the threshold was chosen for {chosen['steps']} steps and this run has {steps}; calibrate again")
    return found


def explain(model: Any, runs: list[list[dict[str, Any]]], folder: Path) -> None:
    """Write what the runs (logs of the schedule, one a batch) did and why: ``patches.json`` and ``patches.png``."""
    if not runs or not runs[0]:
        return
    used = model.schedule
    explanation = {"threshold": used.threshold, "fixed": used.fixed, "order": used.order,
                   "percentile": used.percentile, "policy": used.policy, "batches": runs}  # fmt: skip
    (folder / "patches.json").write_text(to_json(explanation) + "\n")
    plot(runs[0], used.threshold, folder / "patches.png")


def told(sizes: dict[int, int], out: Path) -> str:
    """A line for a person, of `steps_by_size`."""
    if not sizes:
        return "steps by patch size: all x1; give --threshold or --schedule, or calibrate the adapter"
    shown = ", ".join(f"x{m}: {count}" for m, count in sizes.items())
    return f"steps by patch size: {shown}; why: {out / 'patches.json'} and patches.png"


def steps_by_size(log: list[dict[str, Any]]) -> dict[int, int]:
    """Factor -> steps that ran at it (of a grouped step at its finest)."""
    sizes = [entry["m"] if isinstance(entry["m"], int) else min(entry["m"]) for entry in log]
    return {m: sizes.count(m) for m in sorted(set(sizes), reverse=True)}


def plot(log: list[dict[str, Any]], threshold: float | None, path: Path) -> None:
    """The factor of every step, and below it the deviations that it was chosen by, with the threshold."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    steps = [entry["step"] for entry in log]
    sizes = [entry["m"] if isinstance(entry["m"], int) else min(entry["m"]) for entry in log]
    top.step(steps, sizes, where="mid", color=ACCENT)
    top.set_yticks(sorted({1, *sizes}))
    top.set_ylabel("patch x m", color=INK)
    looked = [entry for entry in log if "deviation" in entry]
    for style, m in zip(("-", "--", ":"), looked[0]["deviation"] if looked else (), strict=False):
        values = [max(entry["deviation"][m]) for entry in looked]
        bottom.plot([entry["step"] for entry in looked], values, style, color=INK, label=f"x{m}, largest of the batch")
    if threshold:
        bottom.axhline(threshold, color=ACCENT, linewidth=1, label=f"threshold {threshold:.3g}")
    if looked:
        bottom.set_yscale("log")
        bottom.legend(fontsize=8)
    else:
        bottom.text(0.5, 0.5, log[0]["why"] if log else "no step", transform=bottom.transAxes, ha="center", color=MUTED)
    bottom.set_xlabel("step", color=INK)
    bottom.set_ylabel("deviation", color=INK)
    figure.savefig(path, dpi=130)


@dataclass(frozen=True)
class Calibration:
    """A threshold, the speed-up of the denoising steps that it gives, and the steps at each size."""

    threshold: float
    speed_up: float
    steps: dict[int, int]
    step_cost: dict[int, float]
    variance: dict[str, float]


def calibrate(
    models: Sequence[Any],
    draw: Callable[[], torch.Tensor | None],
    speed_up: float,
    *,
    by_tokens: bool = False,
    say: Callable[[str], None] = lambda text: None,
) -> Calibration:
    """Find the threshold at which ``draw``, a whole sampling run of a pipeline, is ``speed_up`` times faster.

    ``models``: its transformers with an adapter, which share a schedule. The cost of a step at each size is its time,
    measured once in runs that stay at it, or with ``by_tokens`` its share of the tokens, 1 / m^2. Thresholds between
    the deviations of a run at m = 1 are tried by bisection, each in a run of its own, because what is coarse changes
    what comes after. Where ``draw`` returns the clean latents, s^2 is measured on them (`ddit.outside_variance`).

    Raises:
        UpcycleError: no threshold is as fast as that.
    """
    model = models[0]
    price: dict[int, float] = {}
    variance: dict[str, float] = {}
    for m in (1, *model.ddit.patches):
        with model.at(m), _Timer(models) as timer:
            latents = draw()
        price[m] = 1 / m**2 if by_tokens else statistics.median(timer.seconds)
        say(
            f"a step at m = {m}: {price[m]:.4g} of the tokens"
            if by_tokens
            else f"a step at m = {m}: {1000 * price[m]:.4g} ms"
        )
        if m == 1 and latents is not None:
            side = model.switching_layers(model.config).embed.sizes["h"]
            variance = {str(size): ddit.outside_variance(latents, side, size) for size in model.ddit.patches}
    if variance:
        for each in models:
            each.ddit.variance = variance
    schedule = model.set_schedule(threshold=None)
    schedule.always_look = True
    draw()
    values = sorted({max(v) for entry in schedule.log for v in entry.get("deviation", {}).values()})
    if not values:
        raise UpcycleError(f"the run has no more than {schedule.order} steps, all of them the finest; take more steps")
    tried: list[Calibration] = []

    def attempt(threshold: float) -> Calibration:
        run = model.set_schedule(threshold=threshold)
        draw()
        steps = steps_by_size(run.log)
        cost = sum(price[m] * count for m, count in steps.items())
        tried.append(Calibration(threshold, price[1] * sum(steps.values()) / cost, steps, price, variance))
        say(f"threshold {threshold:.4g}: {tried[-1].speed_up:.2f} x, steps {steps}")
        return tried[-1]

    low, high = max(values[0], values[-1] * 1e-6), values[-1] * 1.001
    # Coarse steps move the latents in another way than fine ones: more than the largest value may be needed.
    while (most := attempt(high)).speed_up < speed_up * (1 - CLOSE) and len(tried) < 3:
        high *= 10
    if most.speed_up < speed_up * (1 - CLOSE):
        raise UpcycleError(f"no threshold is {speed_up:g} times as fast: all coarse steps that there can be give "
                           f"{most.speed_up:.2f}; ask for less, or take more steps")  # fmt: skip
    while len(tried) < MOST_RUNS and not any(abs(found.speed_up / speed_up - 1) <= CLOSE for found in tried):
        middle = math.sqrt(low * high)
        if attempt(middle).speed_up < speed_up:
            low = middle
        else:
            high = middle
    fast = [found for found in tried if found.speed_up >= speed_up * (1 - CLOSE)]
    return min(fast, key=lambda found: (found.speed_up, found.threshold))


class _Timer:
    """Seconds of every call of some models, the first left out where there are more."""

    def __init__(self, models: Sequence[torch.nn.Module]):
        self._models = models
        self._all: list[float] = []

    @property
    def seconds(self) -> list[float]:
        return self._all[1:] or self._all

    def __enter__(self) -> "_Timer":
        def wait() -> float:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter()

        def before(*_: Any) -> None:
            self._start = wait()

        def after(*_: Any) -> None:
            self._all.append(wait() - self._start)

        self._hooks = [
            hook
            for model in self._models
            for hook in (model.register_forward_pre_hook(before), model.register_forward_hook(after))
        ]
        return self

    def __exit__(self, *_: Any) -> None:
        for hook in self._hooks:
            hook.remove()
