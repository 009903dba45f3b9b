"""What the study found, as docs/results.json, and docs/results.md with its pictures, which follow from that alone."""

import json
import platform
import subprocess
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from arms import ABLATIONS, ARMS, LEFT_OUT, STARTS
from matplotlib.figure import Figure
from summary import NEAR, aims, summary
from tables import curve_of, first_step, last_rows, spread, table, worst_level

from upcycle.output import write_text

DOCS = Path(__file__).parents[2] / "docs"
COMMANDS = {
    "quick": "python examples/study/study.py --quick",
    "tiny": "python examples/study/study.py",
    "S": "python examples/study/study.py --scale S --device cuda",
    "B": "python examples/study/study.py --scale B --device cuda",
}
SettingsOf = Callable[[str, str, str, int], dict[str, Any]]


def collect(out: Path, plan: str) -> dict[str, Any]:
    """What lies in the folder of a study, rounded to five digits, without the places where models lay."""
    sets: dict[str, Any] = {}
    machines, seconds = set(), 0.0
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        found: dict[str, Any] = {"arms": {}}
        for path in sorted(folder.glob("*/result.json")):
            result = json.loads(path.read_text())
            job = result["job"]
            machines.add(result["machine"])
            seconds += result["seconds"]
            if job["kind"] == "teacher":
                found["teacher"] = {**result["teacher"], "settings": result["settings"], "inputs": result["inputs"]}
            elif job["kind"] != "arm":
                found[job["kind"]] = {**result["report"], "settings": result["settings"]}
            if job["kind"] != "arm":
                continue
            kept = ("settings", "inputs", "first_losses", "rows", "seconds")
            run = {key: result[key] for key in kept if key in result}
            found["arms"].setdefault(job["arm"], {})[str(job["seed"])] = run
        found["arms"] = {arm: found["arms"][arm] for arm in ARMS if arm in found["arms"]}
        if found["arms"] and "teacher" in found:
            sets[folder.name] = found
    packages = {name: version(name) for name in ("torch", "diffusers", "torch-fidelity")}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=DOCS, capture_output=True, text=True)
    return _plain(
        {
            "plan": plan,
            "date": date.today().isoformat(),
            "machine": sorted(machines),
            "versions": {"python": platform.python_version(), **packages, "upcycle": commit.stdout.strip()},
            "hours": seconds / 3600,
            "sets": sets,
        }
    )


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items() if key != "folder"}
    return [_plain(inner) for inner in value] if isinstance(value, list) else value


def write(out: Path, plan: str, *, docs: bool, settings_of: SettingsOf) -> str:
    """Write results.json, results.md and the pictures into ``out``, and into docs/ if told to; returns the text.

    docs/results.json keeps one study of every scale, and what an earlier session has run with the settings that
    ``settings_of`` a kind, set, arm and seed has now.
    """
    study = collect(out, plan)
    text = _write(out, {plan: study}, study)
    if docs:
        known = json.loads((DOCS / "results.json").read_text()) if (DOCS / "results.json").exists() else {}
        study = _with_earlier(study, known.get(plan), settings_of)
        known[plan] = study
        text = _write(DOCS, {name: known[name] for name in COMMANDS if name in known}, study)
    return text


def _write(folder: Path, studies: dict[str, Any], study: dict[str, Any]) -> str:
    write_text(folder / "results.json", json.dumps(studies, separators=(",", ":")) + "\n")
    text = render(studies)
    write_text(folder / "results.md", text)
    (folder / "images").mkdir(exist_ok=True)
    pictures(study, folder / "images")
    return text


def _with_earlier(study: dict[str, Any], earlier: dict[str, Any] | None, settings_of: SettingsOf) -> dict[str, Any]:
    if earlier is None:
        return study
    sets = json.loads(json.dumps(study["sets"]))
    hours = study["hours"]
    for name, old in earlier["sets"].items():
        new = sets.setdefault(name, {"arms": {}})
        for kind in ("teacher", "baselines", "masks"):
            if kind in old and kind not in new and old[kind]["settings"] == settings_of(kind, name, "", 0):
                new[kind] = old[kind]
        for arm, runs in old["arms"].items():
            for seed, run in runs.items():
                mine = new["arms"].setdefault(arm, {}) if arm in ARMS else {seed: None}
                if seed not in mine and run["settings"] == settings_of("arm", name, arm, int(seed)):
                    mine[seed] = run
                    hours += run["seconds"] / 3600
        new["arms"] = {arm: dict(sorted(new["arms"][arm].items())) for arm in ARMS if new["arms"].get(arm)}
    sets = {name: sets[name] for name in sorted(sets) if sets[name]["arms"] and "teacher" in sets[name]}
    machines = sorted({*study["machine"], *earlier["machine"]})
    return {**study, "machine": machines, "hours": float(f"{hours:.5g}"), "sets": sets}


# ---------------------------------------------------------------------------------------------------------------------
# Text


def render(studies: dict[str, Any]) -> str:
    """docs/results.md of docs/results.json."""
    parts = [INTRODUCTION.strip()]
    for plan, study in studies.items():
        versions = ", ".join(f"{name} {value}" for name, value in study["versions"].items())
        parts.append(
            f"## {TITLES[plan]}\n\n`{COMMANDS[plan]}`; {'; '.join(study['machine'])}; "
            f"{study['hours']:.1f} hours of processes, which have one thread each on a CPU. "
            f"Written {study['date']} with {versions}."
        )
        parts += [summary(study["sets"])]
        parts += [_set_text(plan, name, found) for name, found in study["sets"].items()]
    return "\n\n".join(parts) + "\n"


TITLES = {"quick": "A quick look", "tiny": "Tiny models", "S": "DiT-S/2 on shapes of 64 x 64 pixels",
          "B": "DiT-B/2 on shapes of 64 x 64 pixels"}  # fmt: skip
INTRODUCTION = """
# Results

What upcycling gives, measured by one command that anyone can run again. This page is written by that command
(`--report --docs`) from [results.json](results.json); no figure in it is typed. What it cannot show:
[limits.md](limits.md). Equality with the teacher, speed, memory and FLOPs: [performance.md](performance.md).

How to read it. A row is an arm: a recipe of `upcycle finetune`, described in `examples/study/arms.py`. All of a set
have the same number of steps and the same batch size, unless the name says otherwise; students see the same batches.
Figures are means over the seeds, with the lowest and highest where there are several; how many there are, the table
says. `exact` keeps every fourth position (N = 4), as many tokens as the teacher has patches. At this width encoder,
router and decoder cost a third of what the teacher does (what `grid boundaries` takes beyond 1); at XL/2 they are 5.8 %
([performance.md](performance.md)).

- **Noise MSE**: on held-out images at ten timesteps, divided by the teacher's; *worst level* is the largest such ratio
  of the ten, most often at the noisiest, where a teacher's error is a thousandth of the mean. Losses of the published
  arms and of those from scratch do not weigh noise levels. A student keeps more tokens where an image is clean, where
  most of the error is, and fewer in noise: what it costs there is in "Where the error and the tokens are".
- **Paired MSE**: mean squared distance of samples to the teacher's from the same seeds, pixels in [-1, 1]; DDIM, 20
  steps, guidance 2. It is distance, not quality; students are further from their teacher than it is from itself in
  half the steps. `guided distillation` has learned the guided output: it samples without guidance, at half of the
  evaluations, and has no noise MSE that would mean something.
- **Class**: share of samples that a classifier reads as what they should be. **Fréchet** distance and **KID** are in
  the 64 features of that classifier: the one that ships with the digits, or the shapes' own (`examples/study/sets.py`),
  against the digits to train on and against shapes that nothing was trained on; with so few samples both mean something
  for large gaps only.
- **Tokens** and **FLOPs** (of the teacher's) are those of sampling. **ρ** (tail drop): the share of the kept tokens
  that is dropped.
- Parts of the exact graft ([how-it-works.md](how-it-works.md)): the *scaffold* is encoder, router and decoder; the
  *lattice* a prior for every second position, from which the router departs; the *guide* holds it to the teacher's grid
  at first; the *controller* is a bias that holds the ratio; *supervision* tells it where detail is, above a *floor* of
  contrast; *balance* weighs noisy levels up in the loss; the *cell mean* and the *size bias* tell a token of the
  positions that it speaks for.
"""


def _set_text(plan: str, name: str, found: dict[str, Any]) -> str:
    arms, teacher = found["arms"], found["teacher"]
    first = next(iter(arms))
    about = next(iter(arms[first].values()))["settings"]
    recipe = about["recipe"]
    steps = sum(stage["steps"] for stage in recipe["stages"]) // ARMS[first].times
    title = {"digits": "Digits (16 x 16 pixels, 64 patches)", "shapes": "Shapes (32 x 32 pixels, 256 patches)"}
    if plan in ("S", "B"):
        title["shapes"] = "Shapes (64 x 64 pixels, 1,024 patches)"
    text = [f"### {title[name]}"]
    text.append(
        f"{steps} steps of batch {recipe['batch_size']}; {about['samples']} trajectories, {about['held_out']} held-out "
        f"images.\n\n![Loss and samples against steps](images/study-{plan}-{name}.png)"
    )
    text.append(
        f"The teacher: noise MSE {teacher['val_loss']:.4f}, class {teacher['accuracy']:.0%}, Fréchet "
        f"{teacher['frechet']:.1f}, KID {teacher['kid']:.0f}; with half the steps its samples move by a paired MSE of "
        f"{teacher['half_the_steps_mse']:.2g}. The classifier reads {teacher['classifier']:.1%} of held-out images "
        "right."
    )
    text += [aims(arms, teacher)]
    for heading, group in (
        ("Starts", STARTS),
        ("What each part is worth", LEFT_OUT),
        ("The papers' choices", ABLATIONS),
    ):
        names = [arm for arm in group if arm in arms]
        if names:
            first = [arm for arm in ("exact",) if arm in arms and group is not STARTS]
            text.append(f"#### {heading}\n\n{_arms_table([*first, *names], arms, teacher)}")
    text.append("#### Where the error and the tokens are\n\n" + _levels_table(arms, teacher))
    note = (
        "The first checkpoint at which the mean over the seeds is there. A run's checkpoints are at its quarters, and "
        "its learning rate falls over its whole length. The exact start does not count: at step 0 it is its teacher, "
        "on the teacher's grid; what is asked is when it is back, with a router of its own."
    )
    text.append(f"#### Steps to a quality\n\n{note}\n\n{_steps_table(arms, teacher)}")
    budgets = [arm for arm in ("exact", "one budget") if arm in arms]
    text.append("#### Quality against ρ\n\n" + _budget_table(budgets, arms, teacher))
    if fixed := _fixed_table(arms):
        text.append("#### Learned, random and grid boundaries at equal tokens\n\n" + fixed)
    if "baselines" in found:
        from equal_cost import tables

        picture = f"![Paired MSE against cost](images/baselines-{plan}-{name}.png)"
        text.append(f"#### Against the teacher at equal cost (one seed)\n\n{tables(found['baselines'])}\n{picture}")
    if "masks" in found:
        from masks_report import table as masks_table

        picture = f"![Tokens, AUC and maps](images/masks-{plan}.png)"
        text.append(f"#### Does the router find the objects? (one seed)\n\n{masks_table(found['masks'])}\n{picture}")
    return "\n\n".join(text)


def _arms_table(names: list[str], arms: dict[str, Any], teacher: dict[str, Any]) -> str:
    """How arms end, and folded what they are with tails dropped."""
    head = ["arm", "what", "seeds", "noise MSE", "worst level", "paired MSE", "class", "Fréchet", "KID", "tokens",
            "FLOPs"]  # fmt: skip
    rows, dropped = [], []
    for name in names:
        last, guided = last_rows(arms, name), ARMS[name].guided
        noise = [row["val_loss"] / teacher["val_loss"] for row in last]
        worst = [worst_level(row, teacher) for row in last]
        rows.append([
            name, ARMS[name].what, str(len(last)), "" if guided else spread(noise), "" if guided else spread(worst),
            spread([row["paired_mse"] for row in last], ".2g"),
            spread([100 * row["accuracy"] for row in last], ".0f") + " %", spread([row["frechet"] for row in last]),
            spread([row["kid"] for row in last], ".2g"), f"{mean(row['tokens'] for row in last):.0f}",
            f"{mean(row['flops'] for row in last) / teacher['flops']:.2f}",
        ])  # fmt: skip
        at = [row["by_tail_drop"]["0.4"] for row in last if "by_tail_drop" in row]
        if at:
            noise = [row["val_loss"] / teacher["val_loss"] for row in at]
            dropped.append([
                name, "" if guided else spread(noise), spread([row["paired_mse"] for row in at], ".2g"),
                spread([100 * row["accuracy"] for row in at], ".0f") + " %", spread([row["frechet"] for row in at]),
                f"{mean(row['flops'] for row in at) / teacher['flops']:.2f}",
            ])  # fmt: skip
    folded = table(["arm", "noise MSE", "paired MSE", "class", "Fréchet", "FLOPs"], dropped)
    return f"{table(head, rows)}\n\n<details><summary>The same at ρ = 0.4</summary>\n\n{folded}\n\n</details>"


def _steps_table(arms: dict[str, Any], teacher: dict[str, Any]) -> str:
    """Checkpoints at which arms come to the teacher's quality, and to what others end with."""
    goals = {f"the teacher's noise MSE within {NEAR - 1:.0%}": NEAR * teacher["val_loss"]}
    for arm in ("exact", "published", "published, distilled"):
        if arm in arms:
            goals[f"what {arm} ends with"] = list(curve_of(arms, arm).values())[-1]
    names = [n for n in ("exact", "exact, 4 x", "published", "published, distilled", "from scratch",
                         "from scratch, 8 x", "teacher trained on") if n in arms]  # fmt: skip
    rows = []
    for name in names:
        curve = curve_of(arms, name)
        steps = [first_step(curve, goal) for goal in goals.values()]
        rows.append([name, str(len(arms[name])), *(str(step or f"not in {max(curve)}") for step in steps)])
    return table(["checkpoint with", "seeds", *goals], rows)


def _budget_table(names: list[str], arms: dict[str, Any], teacher: dict[str, Any]) -> str:
    rows = []
    for name in names:
        for row in ("noise MSE", "paired MSE", "FLOPs"):
            line = [name, row]
            last = last_rows(arms, name)
            for rho in ("0", "0.2", "0.4", "0.6"):
                at = [r if rho == "0" else r["by_tail_drop"].get(rho) for r in last]
                if any(r is None for r in at):
                    line.append("")
                elif row == "noise MSE":
                    line.append(spread([r["val_loss"] / teacher["val_loss"] for r in at]))
                elif row == "paired MSE":
                    line.append(spread([r["paired_mse"] for r in at], ".2g"))
                else:
                    line.append(f"{mean(r['flops'] for r in at) / teacher['flops']:.2f}")
            rows.append(line)
    return table(["arm", "", "ρ = 0", "0.2", "0.4", "0.6"], rows)


def _levels_table(arms: dict[str, Any], teacher: dict[str, Any]) -> str:
    """Noise MSE by timestep, of the teacher's, and tokens kept there of real images."""
    timesteps = list(teacher["val_loss_by_t"])
    rows = [["teacher", "noise MSE", *(f"{value:.2g}" for value in teacher["val_loss_by_t"].values())]]
    for name in ("exact", "exact, 4 x", "without balance", "lower floor", "without supervision", "without visibility",
                 "one budget", "grid boundaries", "random boundaries", "N = 16", "published, distilled",
                 "teacher trained on"):  # fmt: skip
        if name not in arms:
            continue
        last = last_rows(arms, name)
        rows.append([name, "of the teacher's"])
        for t, value in teacher["val_loss_by_t"].items():
            rows[-1].append(spread([row["val_loss_by_t"][t] / value for row in last]))
        if last[0]["tokens_by_t"][timesteps[0]] is not None:
            rows.append(["", "tokens", *(f"{mean(r['tokens_by_t'][t] for r in last):.0f}" for t in timesteps)])
    return table(["arm", "", *(f"t = {t}" for t in timesteps)], rows)


def _fixed_table(arms: dict[str, Any]) -> str:
    rows = []
    for name in ("exact", "random boundaries", "grid boundaries", "N = 16", "N = 16, random", "N = 16, grid"):
        fixed = [row["fixed"] for row in last_rows(arms, name) if "fixed" in row] if name in arms else []
        if fixed:
            rows.append([name, str(len(fixed)), f"{mean(row['tokens'] for row in fixed):.0f}",
                         spread([row["paired_mse"] for row in fixed], ".2g"),
                         spread([100 * row["accuracy"] for row in fixed], ".0f") + " %",
                         spread([row["frechet"] for row in fixed])])  # fmt: skip
    return table(["arm", "seeds", "tokens", "paired MSE", "class", "Fréchet"], rows) if rows else ""


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

CURVES = ("exact", "exact, 4 x", "published", "published, distilled", "from scratch", "from scratch, 8 x")


def pictures(study: dict[str, Any], folder: Path) -> None:
    """study-PLAN-SET.png, and those of baselines and masks, into ``folder``."""
    for name, found in study["sets"].items():
        _curves(found, folder / f"study-{study['plan']}-{name}.png")
        if "baselines" in found:
            from equal_cost import plot

            plot(found["baselines"], folder / f"baselines-{study['plan']}-{name}.png")
        if "masks" in found:
            from masks_report import plot as plot_masks

            plot_masks(found["masks"], folder / f"masks-{study['plan']}.png")


def _curves(found: dict[str, Any], path: Path) -> None:
    """Noise MSE against steps of the starts (bands: seeds), and of every arm where it ends."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    arms, teacher = found["arms"], found["teacher"]
    for name in CURVES:
        if name not in arms:
            continue
        runs = [run["rows"] for run in arms[name].values()]
        values = [[row["val_loss"] for row in rows] for rows in zip(*runs, strict=True)]
        steps = [row["step"] for row in runs[0]]
        (line,) = left.plot(steps, [mean(v) for v in values], label=name)
        left.fill_between(steps, [min(v) for v in values], [max(v) for v in values], alpha=0.2, color=line.get_color())
    left.set(yscale="log", xlabel="steps", ylabel="held-out noise MSE")
    left.set_xscale("symlog", linthresh=100)
    left.set_xlim(left=0)
    left.axhline(teacher["val_loss"], color="black", linestyle=":", label="teacher")
    left.legend(fontsize=7)
    names = [name for name in arms if "paired_mse" in last_rows(arms, name)[0]]
    for place, name in enumerate(names):
        values = [row["paired_mse"] for row in last_rows(arms, name)]
        right.plot([min(values), max(values)], [place, place], color="#8d99ae")
        right.plot(mean(values), place, "o", color="#d1495b" if name == "exact" else "#1a1a2e", markersize=4)
    right.axvline(teacher["half_the_steps_mse"], color="black", linestyle=":", label="teacher, half the steps")
    right.legend(fontsize=7)
    right.set(xscale="log", xlabel="paired MSE of samples to the teacher's")
    right.set_yticks(range(len(names)), names, fontsize=7)
    right.invert_yaxis()
    figure.savefig(path, dpi=110)
