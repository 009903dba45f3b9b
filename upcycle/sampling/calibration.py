"""What a student spends at each timestep, measured with its own sampler and stored, for `ChunkedDiT.set_budget`."""

import json
from pathlib import Path
from typing import Any

from diffusers import DiTPipeline

from upcycle import provenance
from upcycle.evaluation.flops import polynomial, teacher_flops
from upcycle.output import write_text
from upcycle.sampling.draw import TokenCounter, draw
from upcycle.sources.weight_files import read_json


def measure(
    pipe: DiTPipeline, labels: list[int], seeds: list[int], steps: int, guidance_scale: float, batch_size: int
) -> dict[str, Any]:
    """Draw an image of each label and seed without any budget; returns the calibration of the student.

    Tokens kept and their mean square by timestep, of the conditional and the unconditional samples (None without
    guidance), and the FLOPs of a forward: a, b and c of a + b M + c M^2, and the teacher's.
    """
    student = pipe.transformer
    student.set_tail_drop(0.0)
    student.set_lite_cfg(None)
    student.set_tokens(None)
    halves: list[list[list[int]]] = [[[] for _ in range(steps)] for _ in range(2)]
    timesteps: list[int] = []
    for i in range(0, len(labels), batch_size):
        some = labels[i : i + batch_size]
        counter = TokenCounter(student, 2 * len(some))
        draw(pipe, some, seeds[i : i + batch_size], steps, guidance_scale)
        counter.remove()
        timesteps = counter.timesteps
        for step, kept in enumerate(counter.kept):
            for half, counts in zip(halves, (kept[: len(some)], kept[len(some) :]), strict=True):
                half[step] += counts
    conditional, unconditional = (_moments(half) for half in halves)
    return {
        "sampler": type(pipe.scheduler).__name__,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "classes": labels,
        "seeds": seeds,
        "timesteps": timesteps,
        "conditional": conditional,
        "unconditional": unconditional,
        "flops": list(polynomial(student.config)),
        "teacher_flops": teacher_flops(student.config),
    }


def _moments(kept: list[list[int]]) -> dict[str, list[float]] | None:
    """Mean and mean square by step."""
    if not kept[0]:
        return None
    means = [[round(sum(n**power for n in step) / len(step), 3) for step in kept] for power in (1, 2)]
    return {"tokens": means[0], "squares": means[1]}


def store(folder: Path, calibration: dict[str, Any]) -> list[str]:
    """Write it into the config of the export in ``folder``, its digest into `upcycle.json`; returns notes."""
    path = folder / "transformer" / "config.json"
    config = read_json(str(folder), path) | {"calibration": calibration}
    write_text(path, json.dumps(config, indent=2, sort_keys=True) + "\n")
    if (folder / provenance.FILE).is_file():
        provenance.add_evidence(folder, drawn=["transformer/config.json"])
    if not any("def set_budget" in file.read_text(errors="replace") for file in path.parent.glob("chunked_dit_*.py")):
        return [
            "its own code beside the weights knows no budgets; with `upcycle convert` of it to another folder it gets "
            "today's, and stock diffusers can use them too"
        ]
    return []
