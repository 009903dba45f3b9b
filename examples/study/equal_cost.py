"""What `baselines.py` measured, as tables and a picture: who is best at equal cost."""

from pathlib import Path
from typing import Any, Literal

from matplotlib import colormaps
from matplotlib.figure import Figure

BUDGETS = (1.5, 1.25, 1.0, 0.75, 0.5, 0.35, 0.25)
TOLERANCE = 0.03  # holding asks in the first and the last step too
MARKERS = "oXsPD^v<>ph*"
Cost = Literal["flops", "time"]
Metric = Literal["mse", "frechet"]
COSTS: dict[Cost, str] = {"flops": "FLOPs", "time": "measured time"}
METRICS: dict[Metric, str] = {"mse": "paired MSE", "frechet": "Fréchet distance"}
Row = dict[str, Any]


def best(rows: list[Row], cost: Cost, budget: float, metric: Metric) -> Row | None:
    """The best setting within a budget, a share of the full run's cost; None where all cost more."""
    within = [row for row in rows if row[cost] <= budget + TOLERANCE]
    return min(within, key=lambda row: row[metric], default=None)


def sides(report: dict[str, Any], cost: Cost, budget: float, metric: Metric) -> tuple[Row | None, Row | None]:
    """The best of the teacher's settings and the best of the students' within a budget, with their ``family``."""
    found: list[Row | None] = []
    for is_teacher in (True, False):
        rows = [
            {**row, "family": family}
            for family, rows in report["families"].items()
            if family.startswith("teacher, ") == is_teacher
            for row in rows
        ]
        found.append(best(rows, cost, budget, metric))
    return found[0], found[1]


def equal_cost_table(report: dict[str, Any], cost: Cost, metric: Metric) -> str:
    """Markdown: by family and budget the `best` setting: the metric, class accuracy, its name; the best of a budget is
    bold. The last row: the best student's metric over the best teacher's."""
    lines = [[COSTS[cost], *(f"{budget:g}" for budget in BUDGETS)], ["---"] * (1 + len(BUDGETS))]
    pairs = [sides(report, cost, budget, metric) for budget in BUDGETS]
    least = [min((row[metric] for row in pair if row), default=None) for pair in pairs]
    for family, rows in report["families"].items():
        line = [family]
        for budget, first in zip(BUDGETS, least, strict=True):
            row = best(rows, cost, budget, metric)
            if row is None:
                line.append("-")
                continue
            value = f"{row[metric]:.1e}" if metric == "mse" else f"{row[metric]:.1f}"
            line.append(f"{f'**{value}**' if row[metric] == first else value}, {row['accuracy']:.0%}: {row['name']}")
        lines.append(line)
    ratios = [f"{ours[metric] / theirs[metric]:.2f}" if ours and theirs else "-" for theirs, ours in pairs]
    lines.append(["students over teacher", *ratios])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def verdict(report: dict[str, Any], metric: Metric) -> str:
    """Whether any student is ahead of the teacher at any budget, and where."""
    won = []
    for cost, what in COSTS.items():
        pairs = [(budget, *sides(report, cost, budget, metric)) for budget in BUDGETS]
        ahead = [(b, ours) for b, theirs, ours in pairs if theirs and ours and ours[metric] < theirs[metric]]
        if ahead:
            families = " and ".join(dict.fromkeys(f"`{ours['family']}`" for _, ours in ahead))
            won.append(f"at {', '.join(f'{budget:g}' for budget, _ in ahead)} of the full run's {what} ({families})")
    if won:
        of = f"; {report['samples']} samples tell large gaps only" if metric == "frechet" else ""
        return f"**By {METRICS[metric]} students are ahead** {'; '.join(won)}{of}."
    return f"**By {METRICS[metric]} no student is ahead** of its teacher at any budget."


def tables(report: dict[str, Any]) -> str:
    """Markdown: by both metrics the `verdict` and an `equal_cost_table` for both costs, under what they are of."""
    full = report["full"]
    text = (
        f"{report['set']}, {report['samples']} samples, guidance {report['guidance']:g}. Cost is of the teacher's full "
        f"run: DDIM in {report['steps']} steps, accuracy {full['accuracy']:.0%}, {full['seconds']:.3g} s an image, "
        f"paired MSE {full['mse']:.1e} to {report['converged']['name']}, and so are all paired MSEs here. Cells: the "
        f"metric, accuracy, setting. {report['machine']}\n"
    )
    for metric in METRICS:
        text += f"\n{verdict(report, metric)}\n"
        for cost in COSTS:
            text += "\n" + equal_cost_table(report, cost, metric)
    return text


def plot(report: dict[str, Any], path: Path) -> None:
    """Paired MSE to the converged run against FLOPs and against time."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (cost, what) in zip(axes, COSTS.items(), strict=True):
        for index, (family, rows) in enumerate(report["families"].items()):
            shown = sorted(rows, key=lambda row: row[cost])
            axis.plot(
                [row[cost] for row in shown],
                [row["mse"] for row in shown],
                MARKERS[index % len(MARKERS)],
                color=colormaps["tab20"](index % 20),
                label=family,
                markersize=5,
            )
        axis.set(yscale="log", xlabel=f"{what}, of the teacher's full run")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"paired MSE to {report['converged']['name']}")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    figure.suptitle(f"{report['set']}: {report['samples']} samples, DDIM in {report['steps']} steps", fontsize=10)
    figure.savefig(path, dpi=130)
