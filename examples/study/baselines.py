"""Students beside what else makes their teacher cheaper, at equal FLOPs and at equal measured time.

    upcycle finetune recipes/digits.yaml
    python examples/study/baselines.py --set digits --student exact=runs/digits/export [--out baselines]

The teacher with fewer steps (DDIM and DPM-Solver++), with less guidance, with step holding and with token merging
(`token_merging.py`), and every student over its tail drops, alone, with fewer steps, with less guidance, with step
holding and with Lite-CFG; one that has learned the guided output is sampled without guidance, and so without less and
without Lite-CFG. All are judged against what the same teacher's DDIM runs converge to, guided, from the same seeds.
Writes report.json, tables.md and baselines.png. Twenty minutes on a CPU core.
"""

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTPipeline
from equal_cost import plot, tables
from sets import GUIDANCE, Set, digits, shapes
from token_merging import merged_flops, merging

from upcycle.evaluation.compare import Drawn, Variant, draw, time_in_turn
from upcycle.evaluation.flops import dit_flops
from upcycle.evaluation.metrics import frechet
from upcycle.evaluation.metrics import statistics as feature_statistics
from upcycle.evaluation.speed import machine
from upcycle.output import to_json
from upcycle.sampling.pipeline import load_pipeline
from upcycle.sampling.sampler import Hold, Sampling, set_sampler

BATCH = 50
CONVERGED = 4  # times the steps of the full run: what a solver of high order goes to with fewer
# Of the full run's steps; students may cost more than it, too.
STEPS = (1.5, 1.25, 1.0, 0.8, 0.7, 0.6, 0.5, 0.4, 0.35, 0.3, 0.25, 0.2)
MERGED = (0.25, 0.5, 0.75)
TAIL_DROPS, HELD_TAIL_DROPS, FEW_TAIL_DROPS = (0.0, 0.2, 0.4, 0.6), (0.0, 0.3, 0.6), (0.0, 0.4)
FEW_STEPS = (0.5, 0.2)  # students', and under less guidance
LESS_GUIDANCE = (1.5, 1.25, 1.0)
LITE_CFG = ((0.0, 0.4), (0.0, 0.8), (0.2, 0.8))  # in the conditional and in the unconditional half


@dataclass
class Setting:
    """One way to be cheaper. ``name``: in a few words, within its family. ``share``: its FLOPs as a share of those that
    are counted for its model, which know nothing of merged tokens."""

    name: str
    variant: Variant
    share: float = 1.0


@dataclass
class LiteVariant(Variant):
    """A student with another tail drop in the unconditional half."""

    uncond_tail_drop: float = 0.0

    def begin(self) -> None:
        super().begin()
        self.pipe.transformer.set_lite_cfg(self.uncond_tail_drop)


def families(
    students: dict[str, str], guided: Collection[str], steps: int, teacher: DiTPipeline, context: ExitStack
) -> dict[str, list[Setting]]:
    """All settings by family; the teachers that merge tokens do so until ``context`` ends."""
    multistep = _twin(teacher)
    set_sampler(multistep, "dpm-solver++")
    counts = list(dict.fromkeys(round(steps * share) for share in STEPS))
    few = [round(steps * share) for share in FEW_STEPS]

    def of(
        name: str,
        pipe: DiTPipeline,
        count: int = steps,
        hold: Hold | None = None,
        rho: float | None = None,
        guidance: float = GUIDANCE,
    ) -> Setting:
        return Setting(name, Variant("", pipe, Sampling(count, guidance, hold=hold), rho))

    found = {
        "teacher, steps (DDIM)": [of(f"{n} steps", teacher, n) for n in counts],
        "teacher, steps (DPM-Solver++)": [of(f"{n} steps", multistep, n) for n in counts],
        "teacher, less guidance": [
            of(f"{g:g}, {n} steps", teacher, n, guidance=g) for g in LESS_GUIDANCE for n in (steps, *few)
        ],
        "teacher, holding": [of(f"asked every {n}", teacher, hold=Hold(n)) for n in (2, 3, 4)],
        "teacher, token merging": [
            _merged(teacher, ratio, first, steps, context)
            for first in (0, teacher.transformer.config.num_layers // 2)
            for ratio in MERGED
        ],
    }
    for name, folder in students.items():
        pipe = load_pipeline(folder).to(teacher.device)
        set_sampler(pipe, "ddim")
        guidance = 1.0 if name in guided else GUIDANCE
        found[f"{name} at ρ"] = [of(f"ρ = {rho:g}", pipe, rho=rho, guidance=guidance) for rho in TAIL_DROPS]
        found[f"{name}, fewer steps"] = [
            of(f"ρ = {rho:g}, {n} steps", pipe, n, rho=rho, guidance=guidance) for rho in FEW_TAIL_DROPS for n in few
        ]
        found[f"{name}, holding"] = [
            of(f"ρ = {rho:g}, asked every {n}", pipe, hold=Hold(n), rho=rho, guidance=guidance)
            for rho in HELD_TAIL_DROPS
            for n in (2, 3)
        ]
        if name not in guided:
            found[f"{name}, less guidance"] = [
                of(f"{g:g}, ρ = {rho:g}, {n} steps", pipe, n, rho=rho, guidance=g)
                for g in LESS_GUIDANCE
                for rho in FEW_TAIL_DROPS
                for n in (steps, few[-1])
            ]
            found[f"{name}, Lite-CFG"] = [
                Setting(f"ρ = {rho:g} and {lite:g}", LiteVariant("", pipe, Sampling(steps, GUIDANCE), rho, lite))
                for rho, lite in LITE_CFG
            ]
    return found


def _twin(pipe: DiTPipeline) -> DiTPipeline:
    """A pipeline of the same weights, whose scheduler and whose modules' hooks are its own."""
    model = pipe.transformer
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return DiTPipeline(copy.deepcopy(model, shared), pipe.vae, pipe.scheduler)


def _merged(teacher: DiTPipeline, ratio: float, first: int, steps: int, context: ExitStack) -> Setting:
    pipe = _twin(teacher)
    context.enter_context(merging(pipe.transformer, ratio, first=first))
    config = pipe.transformer.config
    share = merged_flops(config, ratio, first=first) / dit_flops(config)
    name = f"{ratio:.0%} in {'later' if first else 'all'} blocks"
    return Setting(name, Variant("", pipe, Sampling(steps, GUIDANCE)), share)


def measure_baselines(
    study_set: Set,
    students: dict[str, str],
    *,
    guided: Collection[str] = (),
    samples: int,
    timed_samples: int,
    repeats: int,
    steps: int = 50,
    device: str = "cpu",
) -> dict[str, Any]:
    """Draw with every setting of every family, compare with the teacher's full run, and time.

    Args:
        students: by name, the folder of an export.
        guided: those that have learned the guided output, and are sampled without guidance.
        samples: images of each setting, the classes in turn, seeds from 0 on.
        timed_samples: of them, those of the timed rounds.
        repeats: timed rounds, in each of which all settings take their turn, and the full run in front of each family.
        steps: of the full run.
        device: of the models.

    Returns:
        ``set``, ``steps``, ``guidance``, ``samples``, ``timed_samples``, ``repeats``, ``machine``, ``minutes``; rows:
        ``full``, ``converged`` (DDIM with `CONVERGED` times the steps; not timed) and by family ``families``. A row:
        ``name``; ``flops``, ``time``: shares of the full run's (the latter the median of the rounds' ratios);
        ``seconds`` an image (median); ``asked`` steps; ``mse``: paired MSE to the converged run (pixels in [-1, 1]);
        ``accuracy`` of the set's classifier; ``frechet``: distance of its features to the reference images'.

    Raises:
        UpcycleError: an export cannot be read.
        ValueError: the teacher's grid is odd, so that no tokens can be merged.
    """
    begun = time.perf_counter()
    labels, seeds = [i % study_set.classes for i in range(samples)], list(range(samples))
    reference = feature_statistics(study_set.look(study_set.reference())[0])
    teacher = load_pipeline(study_set.teacher).to(device)
    set_sampler(teacher, "ddim")
    full = Setting(f"{steps} steps", Variant("", teacher, Sampling(steps, GUIDANCE)))
    converged = Setting(f"{CONVERGED * steps} steps", Variant("", teacher, Sampling(CONVERGED * steps, GUIDANCE)))

    def drawn_by(setting: Setting) -> Drawn:
        drawn = draw(setting.variant, labels, seeds, batch_size=BATCH)
        drawn.latents = drawn.latents.clamp(-1, 1)
        return drawn

    whole, limit = drawn_by(full), drawn_by(converged)

    def row_of(setting: Setting, drawn: Drawn) -> dict[str, Any]:
        features, logits = study_set.look(drawn.latents)
        return {
            "name": setting.name,
            "flops": setting.share * drawn.flops / whole.flops,
            "asked": drawn.asked,
            "mse": (drawn.latents - limit.latents).square().mean().item(),
            "accuracy": (logits.argmax(1) == torch.tensor(labels)).float().mean().item(),
            "frechet": frechet(feature_statistics(features), reference),
        }

    report: dict[str, Any] = {
        "set": study_set.name,
        "steps": steps,
        "guidance": GUIDANCE,
        "samples": samples,
        "timed_samples": timed_samples,
        "repeats": repeats,
        "machine": machine(torch.device(device)),
        "full": row_of(full, whole),
        "converged": row_of(converged, limit),
        "families": {},
    }
    with ExitStack() as context:
        by_family = families(students, guided, steps, teacher, context)
        for family, settings in by_family.items():
            report["families"][family] = [row_of(setting, drawn_by(setting)) for setting in settings]
        # A machine's speed changes within a round too: each family is compared with the full run in front of it.
        turns = [v for settings in by_family.values() for v in (full.variant, *(one.variant for one in settings))]
        timed = slice(timed_samples)
        seconds = iter(time_in_turn(turns, labels[timed], seeds[timed], repeats, batch_size=BATCH))
    wholes = []
    for rows in report["families"].values():
        wholes.append(next(seconds))
        for row in rows:
            mine = next(seconds)
            row["seconds"] = statistics.median(mine)
            row["time"] = statistics.median(a / b for a, b in zip(mine, wholes[-1], strict=True))
    report["full"] |= {"seconds": statistics.median(itertools.chain(*wholes)), "time": 1.0}
    report["minutes"] = (time.perf_counter() - begun) / 60
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=("digits", "shapes"), default="digits")
    parser.add_argument("--student", action="append", default=[], metavar="NAME=FOLDER", help="may be given again")
    parser.add_argument("--guided", action="append", default=[], metavar="NAME", help="has learned the guided output")
    parser.add_argument("--samples", type=int, default=60)
    parser.add_argument("--timed-samples", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("baselines"))
    options = parser.parse_args()
    students = {name: folder for name, _, folder in (one.rpartition("=") for one in options.student)}
    if unknown := set(options.guided) - set(students):
        parser.error(f"--guided {min(unknown)}: there is no --student of this name")
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    study_set = digits() if options.set == "digits" else shapes(Path())  # nothing is trained
    report = measure_baselines(
        study_set,
        students,
        guided=options.guided,
        samples=options.samples,
        timed_samples=options.timed_samples,
        repeats=options.repeats,
        steps=options.steps,
    )
    (options.out / "report.json").write_text(to_json(report) + "\n")
    text = tables(report)
    (options.out / "tables.md").write_text(text)
    plot(report, options.out / "baselines.png")
    print(f"{text}\n{report['minutes']:.1f} minutes")


if __name__ == "__main__":
    main()
