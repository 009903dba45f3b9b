"""What `baselines.py` measured, as tables and a picture: who is nearest to the teacher's samples at equal cost."""

from pathlib import Path
from typing import Any, Literal

from matplotlib import colormaps
from matplotlib.figure import Figure

BUDGETS = (1.5, 1.25, 1.0, 0.75, 0.5, 0.35, 0.25)
TOLERANCE = 0.03  # holding asks in the first and the last step too
MARKERS = "oXsPD^v<>ph*"
Cost = Literal["flops", "time"]
Row = dict[str, Any]


def best(rows: list[Row], cost: Cost, budget: float) -> Row | None:
    """The setting within a budget, a share of the full run's cost, whose samples are nearest to the converged run's."""
    within = [row for row in rows if row[cost] <= budget + TOLERANCE]
    return min(within, key=lambda row: row["mse_converged"], default=None)


def equal_cost_table(report: dict[str, Any], cost: Cost) -> str:
    """Markdown: by family and budget the `best` setting: paired MSE to the converged run, class accuracy, its name.
    The nearest of a budget is bold; the last row says how many times farther the nearest student is than the nearest
    teacher."""
    by_family: dict[str, list[Row]] = report["families"]
    head = [{"flops": "FLOPs", "time": "measured time"}[cost], *(f"{budget:.2f}" for budget in BUDGETS)]
    found = {family: [best(rows, cost, budget) for budget in BUDGETS] for family, rows in by_family.items()}
    columns = list(zip(*found.values(), strict=True))
    nearest = [min((row["mse_converged"] for row in column if row), default=None) for column in columns]
    lines = [head, ["---"] * len(head)]
    for family, row in found.items():
        cells = []
        for one, least in zip(row, nearest, strict=True):
            mse = f"{one['mse_converged']:.1e}" if one else ""
            mse = f"**{mse}**" if one and one["mse_converged"] == least else mse
            cells.append(f"{mse}, {one['accuracy']:.0%}: {one['name']}" if one else "-")
        lines.append([family, *cells])
    times = []
    for column in columns:
        mse = {family: row["mse_converged"] for family, row in zip(found, column, strict=True) if row}
        theirs = min((mse[family] for family in mse if is_teacher(family)), default=None)
        ours = min((mse[family] for family in mse if not is_teacher(family)), default=None)
        times.append(f"{ours / theirs:.2g}" if ours and theirs else "-")
    lines.append(["students' distance over the teacher's", *times])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def is_teacher(family: str) -> bool:
    return family.startswith("teacher")


def verdict(report: dict[str, Any]) -> str:
    """Whether any student is nearer than the teacher at any budget, in a sentence."""
    won = []
    for cost in ("flops", "time"):
        for budget in BUDGETS:
            rows = {family: best(rows, cost, budget) for family, rows in report["families"].items()}
            known = {family: row["mse_converged"] for family, row in rows.items() if row}
            first = min(known, key=known.__getitem__, default="teacher")
            if not is_teacher(first):
                won.append(f"{first} at {budget:g} of its {'FLOPs' if cost == 'flops' else 'time'}")
    if won:
        return f"Nearer to the teacher's converged run than the teacher itself for less: {'; '.join(won)}."
    return "**No student wins**: at every budget the teacher itself is nearer to its converged run, for less."


def tables(report: dict[str, Any]) -> str:
    """Markdown: `verdict` and `equal_cost_table` by both costs, under what they are of."""
    full = report["full"]
    text = (
        f"{report['set']}, {report['samples']} samples, guidance {report['guidance']:g}. Cost is of the teacher's full "
        f"run: DDIM in {report['steps']} steps, accuracy {full['accuracy']:.0%}, {full['seconds']:.3g} s an image, "
        f"{full['mse_converged']:.1e} from its converged run, {report['converged']['name']}. Cells: paired MSE to "
        f"that, accuracy, setting. {report['machine']}\n\n{verdict(report)}\n"
    )
    for cost in ("flops", "time"):
        text += "\n" + equal_cost_table(report, cost)
    return text


def plot(report: dict[str, Any], path: Path) -> None:
    """Paired MSE to the converged run against FLOPs and against time."""
    figure = Figure(figsize=(11, 6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, cost, what in zip(axes, ("flops", "time"), ("FLOPs", "measured time"), strict=True):
        for index, (family, rows) in enumerate(report["families"].items()):
            shown = sorted(rows, key=lambda row: row[cost])
            axis.plot(
                [row[cost] for row in shown],
                [row["mse_converged"] for row in shown],
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
