"""Would DDiT decide otherwise if it looked at guided increments instead of those of the conditional half?

A model does not know the guidance of its pipeline, so its schedule takes the increments that the conditional output
would make. In fp32 under DDIM the latents' own differences are the guided ones. Here both decide on the digits:

    python examples/study/guided_increments.py runs/ddit-digits/export

first on one fine trajectory, each with the threshold at which the same share of steps and samples is coarse, then in
whole runs, whose distance to the fine run is compared at like numbers of coarse steps.
"""

import argparse
import math
from typing import Any

import torch

from upcycle.models import ddit
from upcycle.sampling.draw import draw
from upcycle.sampling.pipeline import load_pipeline


class Guided(ddit.PatchSchedule):
    """Increments are what the latents moved by."""

    def decide(self, sight: ddit.Sight) -> list[int]:
        half = sight.latents.detach()[: len(sight.latents) // 2].float()
        if self._latents is not None:
            self.moved = half - self._latents[: len(half)].float()
        return super().decide(sight)


class Moved(ddit.Noise):
    """Noise levels of a model, and increments of its schedule."""

    schedule: Any

    def increment(self, z, out, then, now):
        return self.schedule.moved[: len(z)]


def run(
    pipe: Any, guided: bool, samples: int, steps: int, guidance: float, look: bool = False, **how: Any
) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """Log and images of a run."""
    model = pipe.transformer
    model.schedule = (Guided if guided else ddit.PatchSchedule)(Moved(model.ddit) if guided else model.noise, [2, 4])
    model.schedule.noise.schedule = model.schedule
    ddit.follow(model, pipe)
    model.set_schedule(**{"policy": "grouped", **how}).always_look = look
    images = draw(pipe, [i % 10 for i in range(samples)], list(range(samples)), steps, guidance)
    return model.schedule.log, images


def compare_decisions(pipe: Any, samples: int, steps: int, guidance: float) -> None:
    """Print how far the deviations differ on a fine trajectory, and how often decisions are the same."""
    logs = [run(pipe, guided, samples, steps, guidance, look=True)[0] for guided in (False, True)]
    plain, moved = (torch.tensor([entry["deviation"]["2"] for entry in log[3:]]) for log in logs)
    ratio = moved / plain
    alike = [
        ((plain < plain.quantile(share)) == (moved < moved.quantile(share))).float().mean().item()
        for share in (0.3, 0.5, 0.7)
    ]
    print(
        f"guidance {guidance:g}, {steps} steps: guided deviations are {ratio.median():.2f} times as large (10 to 90 %: "
        f"{ratio.quantile(0.1):.2f} to {ratio.quantile(0.9):.2f}); with 30, 50, 70 % coarse "
        f"{', '.join(f'{same:.0%}' for same in alike)} of the decisions are the same"
    )


def compare_runs(pipe: Any, samples: int, steps: int, guidance: float, wanted: int) -> None:
    """Print the distance to the fine run of both, at about ``wanted`` coarse steps."""
    _, fine = run(pipe, False, samples, steps, guidance)
    for guided in (False, True):
        low, high, tried = 1e-6, 10.0, []
        for _ in range(7):
            middle = math.sqrt(low * high)
            log, images = run(pipe, guided, samples, steps, guidance, threshold=middle, policy="min")
            coarse = sum(entry["m"] > 1 for entry in log)
            tried.append((abs(coarse - wanted), coarse, (images - fine).square().mean().item()))
            low, high = (middle, high) if coarse < wanted else (low, middle)
        _, coarse, error = min(tried)
        print(f"{'guided' if guided else 'conditional'}: {coarse} of {steps} steps coarse, paired MSE {error:.5f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="an export of method ddit with the digits beside it")
    options = parser.parse_args()
    pipe = load_pipeline(options.model)
    pipe.set_progress_bar_config(disable=True)
    for guidance in (1.5, 2.0, 4.0, 8.0):
        compare_decisions(pipe, 20, 20, guidance)
    for wanted in (10, 20):
        compare_runs(pipe, 10, 50, 2.0, wanted)


if __name__ == "__main__":
    main()
