"""The study in short: its main figures, what was aimed at and reached, and what it says of the papers' claims."""

from statistics import mean
from typing import Any

from arms import ARMS
from equal_cost import best
from tables import curve_of, first_step, last_rows, spread, table, worst_level

NEAR = 1.02  # of the teacher's held-out noise MSE: its quality, as the study means it
PAPER_FASTER, OUR_TARGET = 8, 32
OUR_AIM = "the aim of"
EVEN = {"noise MSE": 0.02, "paired MSE": 0.1, "Fréchet": 0.1}  # smaller differences of means say nothing
UPCYCLED = ("published", "published, distilled")
SCRATCH = ("from scratch", "from scratch, 8 x")
Values = list[float]
Found = dict[str, Any]

# The claim, the papers' figures, the arm without and the arm with it, and the tail drop at which they are compared.
CLAIMS = (
    ("learned boundaries, not random ones", "FID 16.69 → 13.51 (B/2)", "random boundaries", "exact", "0"),
    ("predictability, not the cosine router", "FID 57.96 → 56.73 (S/2)", "cosine router", "exact", "0"),
    ("smoothing", "FID 59.79 → 56.73 (S/2)", "without smoothing", "exact", "0"),
    ("many budgets in training", "FID 57.77 → 56.73 (S/2)", "one budget", "exact", "0"),
    ("the same, at ρ = 0.4", "", "one budget", "exact", "0.4"),
    ("learned boundaries, not the teacher's grid", "FID 15.78 → 13.51 (B/2)", "grid boundaries", "exact", "0"),
    ("the same, at ρ = 0.4", "", "grid boundaries", "exact", "0.4"),
    ("N = 4, not 16", "FID 29.92 → 13.51 (B/2)", "N = 16", "exact", "0"),
    ("block distillation first", "FID 14.55 → 4.97 (XL/2)", "published", "published, distilled", "0"),
    ("the teacher's samples as data, not real ones", "", "distillation alone", "teacher-made data", "0"),
)


def summary(sets: dict[str, Found]) -> str:
    """Markdown of the sets of one study."""
    claims = f"### The papers' claims, at this size\n\n{CLAIMS_NOTE}\n\n{_claims(sets)}"
    return f"### In short\n\n{_headlines(sets)}\n\n{claims}"


# ---------------------------------------------------------------------------------------------------------------------
# Aims


def aims(arms: Found, teacher: Found) -> str:
    """What was aimed at, and whether it was reached."""
    lines = []

    def say_all(aim: str, measured: str, values: Values, most: float) -> None:
        """An aim of every seed."""
        done = sum(value <= most for value in values)
        word = {len(values): "Reached", 0: "Not reached"}.get(done, f"Reached by {done} of {len(values)} seeds")
        seeds = f"{len(values)} seed{'s' if len(values) > 1 else ''}"
        lines.append(f"- {aim}: {measured} × {spread(values)}, {seeds}. **{word}.**")

    for name in ("exact", "exact, 4 x"):
        if name not in arms:
            continue
        last = last_rows(arms, name)
        noise = [row["val_loss"] / teacher["val_loss"] for row in last]
        dropped = [row["by_tail_drop"]["0.4"]["val_loss"] / teacher["val_loss"] for row in last]
        say_all(f"`{name}`: the teacher's noise MSE within 2 % at ρ = 0", "it is", noise, NEAR)
        say_all(f"`{name}`: no worse at any noise level", "at worst", [worst_level(row, teacher) for row in last], 1.0)
        say_all(f"`{name}`: within 5 % at ρ = 0.4", "it is", dropped, 1.05)

    scratch = [curve_of(arms, name) for name in SCRATCH if name in arms]
    goals = []
    if "exact" in arms:
        exact = curve_of(arms, "exact")
        goals = [(OUR_AIM, "the teacher's noise MSE within 2 %", exact, NEAR * teacher["val_loss"], OUR_TARGET),
                 (OUR_AIM, "what `exact` ends with", exact, list(exact.values())[-1], OUR_TARGET)]  # fmt: skip
    ends = {arm: list(curve_of(arms, arm).values())[-1] for arm in UPCYCLED if arm in arms}
    if ends:
        better = min(ends, key=lambda arm: ends[arm])
        curve = curve_of(arms, better)
        goals.append(("the paper's", f"what `{better}` ends with", curve, ends[better], PAPER_FASTER))
    for whose, what, curve, goal, times in goals if scratch else []:
        text, reached = _against(curve, scratch, goal, times)
        word = {True: "Reached", False: "Not reached", None: "Not decided"}[reached]
        lines.append(f"- {whose} {times} times fewer steps than from scratch to {what}: {text}. **{word}.**")
    return "\n".join(lines)


def _against(
    ours: dict[int, float], theirs: list[dict[int, float]], goal: float, times: int
) -> tuple[str, bool | None]:
    """Steps of both to a noise MSE in words, and whether theirs are ``times`` as many; None: these runs cannot tell.

    Runs cross between two checkpoints, so that theirs count by the one before.
    """
    mine, end = first_step(ours, goal), max(step for curve in theirs for step in curve)
    found = [(step, curve) for curve in theirs if (step := first_step(curve, goal))]
    if found:
        other, curve = min(found, key=lambda one: one[0])
        before = max((step for step in curve if step < other), default=0)
    text = f"{mine or f'more than {max(ours)}'} steps against {other if found else f'more than {end}'}"
    if mine is None:
        return text, False if found else None
    if (before if found else end) >= times * mine:
        return text, True
    return text, False if found and other < times * mine else None


# ---------------------------------------------------------------------------------------------------------------------
# In short


def _rows(found: Found, arm: str, tail_drop: str) -> list[Found]:
    """What an arm ends with at a tail drop, a row a seed."""
    rows = last_rows(found["arms"], arm)
    return rows if tail_drop == "0" else [row["by_tail_drop"][tail_drop] for row in rows]


def _noise(found: Found, arm: str, tail_drop: str) -> Values:
    """Noise MSE of the teacher's, by seed."""
    return [row["val_loss"] / found["teacher"]["val_loss"] for row in _rows(found, arm, tail_drop)]


HEADLINES = (
    ("exact graft", "exact", "0"),
    ("exact graft, ρ = 0.4", "exact", "0.4"),
    ("exact graft, 4 times the steps", "exact, 4 x", "0"),
    ("exact graft, 4 times the steps, ρ = 0.4", "exact, 4 x", "0.4"),
    ("exact graft on the guided output", "guided distillation", "0"),
    ("exact graft on the guided output, ρ = 0.4", "guided distillation", "0.4"),
    ("exact graft, the teacher's grid for good", "grid boundaries", "0"),
    ("exact graft, the teacher's grid for good, ρ = 0.4", "grid boundaries", "0.4"),
    ("exact graft, tokens at random", "random boundaries", "0"),
    ("published upcycling", "published", "0"),
    ("published upcycling, distilled", "published, distilled", "0"),
    ("DC-DiT from scratch", "from scratch", "0"),
    ("DC-DiT from scratch, 8 times the steps", "from scratch, 8 x", "0"),
    ("teacher trained on for as long", "teacher trained on", "0"),
)


def _headlines(sets: dict[str, Found]) -> str:
    head = [""]
    for name in sets:
        head += [f"{name}: noise MSE", "paired MSE", "FLOPs"]
    lines = [[what, *(cell for found in sets.values() for cell in _cells(found, arm, tail_drop))]
             for what, arm, tail_drop in HEADLINES]  # fmt: skip
    return table(head, [line for line in lines if any(line[1:])])


def _cells(found: Found, arm: str, tail_drop: str) -> list[str]:
    """Noise MSE and FLOPs, of the teacher's, and between them the paired MSE of samples."""
    if arm not in found["arms"]:
        return [""] * 3
    rows = _rows(found, arm, tail_drop)
    flops = mean(row["flops"] for row in rows) / found["teacher"]["flops"]
    noise = "" if ARMS[arm].guided else spread(_noise(found, arm, tail_drop))
    return [noise, spread([row["paired_mse"] for row in rows], ".2g"), f"{flops:.2f}"]


# ---------------------------------------------------------------------------------------------------------------------
# The papers' claims

CLAIMS_NOTE = f"""
Noise MSE is of the teacher's. *Better* and *worse*: by more than {EVEN["noise MSE"]:.0%} (noise MSE) or
{EVEN["Fréchet"]:.0%} (of samples), and in every seed of one than in any of the other; *even* is anything else. All
seeds are judged on the same held-out images and the same seeds of samples, so that their range is not the whole error.
The papers' figures are of long runs at scale (most of 400,000 steps on ImageNet). How many steps upcycling saves is
told set by set, below.
""".strip()


def compared(metric: str, before: Values, after: Values) -> str:
    """What ``after`` is beside ``before``, of a metric of which less is better."""
    if abs(mean(after) / mean(before) - 1) <= EVEN[metric]:
        return "even"
    if max(after) < min(before):
        return "better"
    return "worse" if min(after) > max(before) else "even"


def _claims(sets: dict[str, Found]) -> str:
    rows = []
    for what, paper, without, arm, tail_drop in CLAIMS:
        cells = []
        for found in sets.values():
            if not {without, arm} <= set(found["arms"]):
                cells.append("")
                continue
            told = [("noise MSE", _noise(found, without, tail_drop), _noise(found, arm, tail_drop))]
            if tail_drop == "0":
                told.append(("Fréchet", *([row["frechet"] for row in _rows(found, a, "0")] for a in (without, arm))))
            cells.append(_told(told))
        rows.append([what, paper, *cells])
    rows.append(["Lite-CFG, both at 1.25 of the teacher's time", "FID 9.45 → 8.80 at 0.64 of the FLOPs (XL/2)",
                 *(_lite(found) for found in sets.values())])  # fmt: skip
    rows.append(["more tokens the cleaner the image", "22 % → 45 % of positions",
                 *(_tokens(found) for found in sets.values())])  # fmt: skip
    return table(["claim", "the papers", *sets], [row for row in rows if any(row[2:])])


def _told(metrics: list[tuple[str, Values, Values]]) -> str:
    return "; ".join(
        f"**{compared(name, before, after)}** in {name}, {mean(before):.3g} → {mean(after):.3g}"
        for name, before, after in metrics
    )


def _lite(found: Found) -> str:
    """The best of plain guidance and of Lite-CFG within 1.25 of the time of the teacher's full run; one seed."""
    families = found["baselines"]["families"] if "baselines" in found else {}
    if not {"exact at ρ", "exact, Lite-CFG"} <= set(families):
        return ""
    told = []
    for metric, name in (("mse", "paired MSE"), ("frechet", "Fréchet")):
        plain, lite = (best(families[family], "time", 1.25, metric) for family in ("exact at ρ", "exact, Lite-CFG"))
        if plain is None or lite is None:
            return ""
        word = compared(name, [plain[metric]], [lite[metric]])
        told.append(
            f"**{word}** in {name}, {plain[metric]:.3g} ({plain['name']}) → {lite[metric]:.3g} ({lite['name']})"
        )
    return "; ".join(told)


def _tokens(found: Found) -> str:
    if "exact" not in found["arms"]:
        return ""
    rows = [row["tokens_by_t"] for row in last_rows(found["arms"], "exact")]
    positions = 4 * found["teacher"]["tokens"]
    noisy, clean = max(rows[0], key=int), min(rows[0], key=int)
    first, last = (mean(row[t] for row in rows) / positions for t in (noisy, clean))
    return f"{first:.0%} at t = {noisy} → {last:.0%} at t = {clean}"
