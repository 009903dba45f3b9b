"""What `baselines.py` measured, as tables and a picture: who is best at equal cost."""

from pathlib import Path
from typing import Any, Literal

from matplotlib import colormaps
from matplotlib.figure import Figure
from tables import table

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


def _settings(report: dict[str, Any], whose: str) -> list[Row]:
    """All settings of the ``"teacher"`` or of the ``"students"``, with their ``family``."""
    return [
        {**row, "family": family}
        for family, rows in report["families"].items()
        if family.startswith("teacher, ") == (whose == "teacher")
        for row in rows
    ]


def sides(report: dict[str, Any], cost: Cost, budget: float, metric: Metric) -> tuple[Row | None, Row | None]:
    """The best of the teacher's settings and the best of the students' within a budget, with their ``family``."""
    teacher, students = (best(_settings(report, whose), cost, budget, metric) for whose in ("teacher", "students"))
    return teacher, students


def equal_cost_table(report: dict[str, Any], cost: Cost, metric: Metric) -> str:
    """Markdown: by family and budget the `best` setting: the metric, class accuracy, its name; the best of a budget is
    bold."""
    pairs = [sides(report, cost, budget, metric) for budget in BUDGETS]
    least = [min((row[metric] for row in pair if row), default=None) for pair in pairs]
    lines = []
    for family, rows in report["families"].items():
        line = [family]
        for budget, first in zip(BUDGETS, least, strict=True):
            row = best(rows, cost, budget, metric)
            value = _text(row, metric) if row else ""
            value = f"**{value}**" if row and row[metric] == first else value
            line.append(f"{value}, {row['accuracy']:.0%}: {row['name']}" if row else "-")
        lines.append(line)
    return table([COSTS[cost], *(f"{budget:g}" for budget in BUDGETS)], lines)


def short_table(report: dict[str, Any], metric: Metric) -> str:
    """Markdown: by budget and cost the best of the teacher's settings, the best of the students', and their ratio, with
    class accuracies."""
    head = ["budget"]
    for what in COSTS.values():
        head += [f"{what}: teacher", "student", "student over teacher"]
    lines = []
    for budget in BUDGETS:
        line = [f"{budget:g}"]
        for cost in COSTS:
            theirs, ours = sides(report, cost, budget, metric)
            line += [f"{_text(row, metric)}, {row['accuracy']:.0%}: {row['family'].removeprefix('teacher, ')}, "
                     f"{row['name']}" if row else "-" for row in (theirs, ours)]  # fmt: skip
            line.append(f"{ours[metric] / theirs[metric]:.3g}" if ours and theirs else "-")
        lines.append(line)
    return table(head, lines)


def _text(row: Row, metric: Metric) -> str:
    return f"{row[metric]:.1e}" if metric == "mse" else f"{row[metric]:.1f}"


def ahead(report: dict[str, Any], cost: Cost, budget: float, metric: Metric) -> Row | None:
    """The best student that beats the teacher's best within a budget; None if none does, or the teacher has nothing as
    cheap. A Fréchet distance that is bought with wrong classes does not count."""
    theirs = best(_settings(report, "teacher"), cost, budget, metric)
    if theirs is None:
        return None
    able = [row for row in _settings(report, "students") if row["accuracy"] >= theirs["accuracy"] or metric == "mse"]
    ours = best(able, cost, budget, metric)
    return ours if ours and ours[metric] < theirs[metric] else None


def verdict(report: dict[str, Any], metric: Metric) -> str:
    """Whether any student is ahead of the teacher at any budget, and where."""
    won = []
    for cost, what in COSTS.items():
        found = {budget: row for budget in BUDGETS if (row := ahead(report, cost, budget, metric))}
        if found:
            families = " and ".join(dict.fromkeys(f"`{row['family']}`" for row in found.values()))
            won.append(f"at {', '.join(f'{budget:g}' for budget in found)} of the full run's {what} ({families})")
    note = ""
    if metric == "frechet":
        note = (
            " Without losing class accuracy, that is. Both distances are the least of many settings' on the same "
            f"{report['samples']} samples (teacher {len(_settings(report, 'teacher'))}, students "
            f"{len(_settings(report, 'students'))}), which tell large gaps only, and "
            "less guidance lowers them by itself."
        )
    if won:
        return f"**By {METRICS[metric]} students are ahead** {'; '.join(won)}.{note}"
    return f"**By {METRICS[metric]} no student is ahead** of its teacher at any budget.{note}"


def tables(report: dict[str, Any]) -> str:
    """Markdown: by both metrics the `verdict` and the `short_table`, under what they are of; all settings folded."""
    full = report["full"]
    text = (
        f"{report['set']}, {report['samples']} samples, guidance {report['guidance']:g} where nothing else is said "
        "(`guided distillation` is asked once a step: its output is guided). "
        f"Cost is of the teacher's full run: DDIM in {report['steps']} steps, accuracy {full['accuracy']:.0%}, "
        f"{full['seconds']:.3g} s an image, paired MSE {full['mse']:.1e} to {report['converged']['name']}, as are all "
        f"paired MSEs here. Budgets are shares of that run, and may be exceeded by {TOLERANCE:g}. *Asked every 3*: "
        "step holding, the model runs in every third step; *ρ = 0 and 0.4* of Lite-CFG: in the conditional and the "
        f"other half. {report['machine']}\n"
    )
    for metric in METRICS:
        text += f"\n{verdict(report, metric)}\n\n{short_table(report, metric)}\n"
    text += "\n<details><summary>The best setting of every method within every budget</summary>\n\n"
    text += "Cells: the metric, class accuracy, setting.\n"
    for metric, name in METRICS.items():
        text += f"\n{name}:\n"
        for cost in COSTS:
            text += f"\n{equal_cost_table(report, cost, metric)}\n"
    return text + "\n</details>\n"


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
