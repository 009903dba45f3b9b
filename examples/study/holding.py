"""Step holding on the digits model: which slope, how often to ask, and what it is worth beside the alternatives.

    upcycle finetune recipes/digits.yaml
    python examples/study/holding.py [--student runs/digits/export] [--out holding]

Everything is judged against the teacher's full run with the same sampler, from the same noise: paired MSE of the final
latents (pixels, here), and how many images a classifier of real digits reads as their class. Two parts, each with DDIM
in 50 steps and DPM-Solver++ in 20, guided: the settings of holding on the teacher alone; and at equal FLOPs and at
equal time, the teacher with fewer steps, the teacher with holding, the student at ρ, and the student with holding.
Writes report.json, tables.md and holding.png. Ten minutes on two CPU cores.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from sklearn.svm import SVC

from upcycle.evaluation.compare import Variant, draw, time_in_turn
from upcycle.evaluation.speed import machine
from upcycle.output import to_json
from upcycle.sampling.pipeline import load_pipeline
from upcycle.sampling.sampler import Hold, Sampling, set_sampler
from upcycle.training.digits import NUM_CLASSES, load_digits

GUIDANCE = 2.0
RUNS = (("ddim", 50), ("dpm-solver++", 20))
SLOPES = (0.0, 0.5, 1.0, 1.5)
EVERY, LIMITS = (2, 3, 4), (0.05, 0.1, 0.2)
BUDGETS = (1.0, 0.75, 0.5, 0.35, 0.25)


def families(teacher: Any, student: Any, steps: int) -> dict[str, list[Variant]]:
    """The four ways to be cheaper, over their settings. Holding with the default slope."""
    holds = [Hold(every) for every in EVERY] + [Hold(limit=limit) for limit in LIMITS]

    def of(name: str, pipe: Any, count: int = steps, hold: Hold | None = None, rho: float | None = None) -> Variant:
        return Variant(name, pipe, Sampling(count, GUIDANCE, hold=hold), rho)

    fewer = [round(steps * share) for share in (0.8, 0.7, 0.6, 0.5, 0.4, 0.35, 0.3, 0.25, 0.2)]
    return {
        "teacher, fewer steps": [of("teacher", teacher, n) for n in dict.fromkeys(fewer)],
        "teacher, holding": [of("teacher", teacher, hold=hold) for hold in holds],
        "student at ρ": [of("student", student, rho=rho) for rho in (0.0, 0.3, 0.6, 0.8)],
        "student, holding": [
            of("student", student, hold=hold, rho=rho) for rho in (0.0, 0.3, 0.6) for hold in (Hold(2), Hold(3))
        ],
    }


def cheapest(rows: list[dict[str, Any]], cost: str, budget: float) -> dict[str, Any] | None:
    """Of the rows that cost at most ``budget`` of the full run, the one nearest to it."""
    within = [row for row in rows if row[cost] <= budget + 0.03]  # holding asks in the first and the last step too
    return min(within, key=lambda row: row["mse"], default=None)


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown."""
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="runs/digits/export")
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--timed-samples", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("holding"))
    options = parser.parse_args()
    begun = time.perf_counter()
    images, labels = load_digits("train")
    classifier = SVC().fit(images.flatten(1).numpy(), labels.numpy())
    teacher, student = load_pipeline("digits"), load_pipeline(options.student)
    wanted = [i % NUM_CLASSES for i in range(options.samples)]
    seeds = list(range(options.samples))
    report: dict[str, Any] = {"machine": machine(torch.device("cpu")), "samples": options.samples}
    text = ""

    known: dict[str, dict[str, Any]] = {}

    def measured(variant: Variant, full: Any) -> dict[str, Any]:
        """``full``: what the teacher's full run drew, or None for that run itself."""
        key = f"{sampler} {variant.model} {variant.tail_drop} {variant.sampling}"
        if key in known:
            return dict(known[key])
        drawn = draw(variant, wanted, seeds, batch_size=50)
        against = full or drawn
        row = {
            "name": f"{variant.model}, {variant.settings}",
            "flops": drawn.flops / against.flops,
            "asked": drawn.asked,
            "mse": (drawn.latents - against.latents).square().mean().item(),
            "accuracy": classifier.score(drawn.latents.clamp(-1, 1).flatten(1).numpy(), wanted),
        }
        print(f"{sampler:12} {row['name']:40} FLOPs {row['flops']:.2f}  MSE {row['mse']:.2e}  {row['accuracy']:.0%}",
              flush=True)  # fmt: skip
        known[key] = row | {"drawn": drawn}
        return dict(known[key])

    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for axis, (sampler, steps) in zip(figure.subplots(1, 2), RUNS, strict=True):
        for pipe in (teacher, student):
            set_sampler(pipe, sampler)
        base = Variant("teacher", teacher, Sampling(steps, GUIDANCE))
        full = measured(base, None)
        title = f"{sampler}, {steps} steps"
        report[title] = {"full": {key: value for key, value in full.items() if key != "drawn"}}

        lines = []
        for how in [{"every": every} for every in EVERY] + [{"limit": limit} for limit in LIMITS]:
            rows = []
            for slope in SLOPES:
                variant = Variant("teacher", teacher, Sampling(steps, GUIDANCE, hold=Hold(**how, slope=slope)))
                row = measured(variant, full["drawn"])
                del row["drawn"]
                rows.append(row | {"slope": slope})
            report[title][" ".join(f"{key} {value}" for key, value in how.items())] = rows
            asked = " to ".join(
                f"{n:.3g}" for n in dict.fromkeys((min(r["asked"] for r in rows), max(r["asked"] for r in rows)))
            )
            lines.append([*(f"{key} {value}" for key, value in how.items()), asked,
                          *(f"{row['mse']:.1e}, {row['accuracy']:.0%}" for row in rows)])  # fmt: skip
        head = ["holding", f"steps asked, of {steps}", *(f"slope {slope:g}" for slope in SLOPES)]
        text += f"**{title}**, teacher alone: paired MSE, class accuracy (full run: {full['accuracy']:.0%})\n\n"
        text += table(head, lines) + "\n"

        ways = families(teacher, student, steps)
        variants = [base, *(variant for mine in ways.values() for variant in mine)]
        found = [measured(variant, full["drawn"]) for variant in variants[1:]]
        n = options.timed_samples
        seconds = time_in_turn(variants, wanted[:n], seeds[:n], options.repeats)
        for row, mine in zip(found, seconds[1:], strict=True):
            del row["drawn"]
            row["seconds"] = statistics.median(mine)
            row["time"] = statistics.median(a / b for a, b in zip(mine, seconds[0], strict=True))
        report[title]["full"]["seconds"] = statistics.median(seconds[0])
        rest = iter(found)
        by_way = {way: [next(rest) for _ in mine] for way, mine in ways.items()}
        report[title]["families"] = by_way
        for cost, what in (("flops", "FLOPs"), ("time", "time")):
            lines = []
            for budget in BUDGETS:
                line = [f"{budget:.2f}"]
                for rows in by_way.values():
                    row = cheapest(rows, cost, budget)
                    line.append(
                        f"{row['mse']:.1e}, {row['accuracy']:.0%}: {_settings(row['name'], steps)}" if row else "-"
                    )
                lines.append(line)
            text += f"**{title}**, at equal {what} (of the full run's; the nearest setting within the budget)\n\n"
            text += table([what, *by_way], lines) + "\n"
        for marker, (way, rows) in zip("oXsv", by_way.items(), strict=True):
            inner = sorted((row for row in rows if row["mse"] > 0), key=lambda row: row["flops"])
            axis.plot([r["flops"] for r in inner], [r["mse"] for r in inner], marker, label=way, markersize=5)
        axis.set(yscale="log", title=title, xlabel="FLOPs, of the teacher's full run", ylabel="paired MSE to it")
        axis.legend(fontsize=8)
    report["minutes"] = (time.perf_counter() - begun) / 60
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "report.json").write_text(to_json(report) + "\n")
    (options.out / "tables.md").write_text(text)
    figure.savefig(options.out / "holding.png", dpi=130)
    print(text + f"{report['minutes']:.1f} minutes, {report['machine']}")


def _settings(name: str, steps: int) -> str:
    """Without the model, which the column's head says, and without the full run's steps."""
    return ", ".join(part for part in name.split(", ")[1:] if part != f"{steps} steps")


if __name__ == "__main__":
    main()
