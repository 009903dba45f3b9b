"""What a student does, timestep by timestep: tokens kept, where, how that follows the detail, and how long it takes.

Shapes: K timesteps, n samples, B batches, S of the samples and k of the timesteps whose maps are kept, C x H x W
latents.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from diffusers import DiTPipeline

from upcycle.models.chunked_dit import local_detail
from upcycle.sampling.sampler import Sampling, Step, steps

SHOWN, MAPS = 3, 7
TAIL_DROPS = (0.0, 0.2, 0.4, 0.6)
WARM_UP = 2


@dataclass
class Seen:
    """What was seen of a student. Under guidance everything is of the conditional half of the batch.

    ``kept``: tokens of every sample, [K, n]. ``correlation``: Spearman's, over positions, of the boundary probability
    with the local standard deviation of the clean latents, fp64 [K, n]; NaN where one of the two is the same
    everywhere. ``seconds``: of a step an image, for every batch, [K, B].

    ``shown``: the samples with maps, S of n; ``shown_at``: their timesteps, k of K. Of these ``x_t`` and ``x_0`` (the
    estimate of the clean latents) [S, k, C, H, W], ``probability`` and ``mask`` [S, k, H, W].
    """

    timesteps: list[int]
    labels: list[int]
    seeds: list[int]
    kept: torch.Tensor
    correlation: torch.Tensor
    seconds: torch.Tensor
    shown: list[int]
    shown_at: list[int]
    x_t: torch.Tensor
    x_0: torch.Tensor
    probability: torch.Tensor
    mask: torch.Tensor


@dataclass
class TailDrops:
    """The same noisy latents at several tail drops, each a call without guidance: R tail drops, k timesteps.

    ``x_0`` [k, R, C, H, W], ``mask`` [k, R, H, W], ``change`` [k, R]: root mean square difference of the predicted
    noise from that at the first tail drop, as a share of its root mean square.
    """

    tail_drops: tuple[float, ...]
    timesteps: list[int]
    label: int
    seed: int
    x_0: torch.Tensor
    mask: torch.Tensor
    change: torch.Tensor


def look_at_sampling(
    pipe: DiTPipeline,
    labels: list[int],
    seeds: list[int],
    sampling: Sampling,
    batch_size: int,
    step: Callable[[], None] = lambda: None,
) -> Seen:
    """Draw a sample for each label and seed. ``step`` is called after every step of every batch."""

    def run(rows: range) -> Iterator[Step]:
        return steps(pipe, [labels[i] for i in rows], [seeds[i] for i in rows], sampling)

    at = _spread(sampling.steps, MAPS)
    return _look(pipe, run, None, labels, seeds, batch_size, at, step)


def look_at_latents(
    pipe: DiTPipeline,
    clean: torch.Tensor,
    labels: list[int],
    seeds: list[int],
    timesteps: list[int],
    batch_size: int,
    step: Callable[[], None] = lambda: None,
) -> Seen:
    """Noise clean latents, fp32 [n, C, H, W] in the model's scale, to each timestep, each with its seed's noise, and
    ask the model once, without guidance."""
    device, channels = pipe.device, clean.shape[1]
    noise = torch.stack([torch.randn(clean.shape[1:], generator=torch.Generator().manual_seed(s)) for s in seeds])

    @torch.inference_mode()
    def run(rows: range) -> Iterator[Step]:
        x, e = (y[rows.start : rows.stop].to(device) for y in (clean, noise))
        label = torch.tensor(labels[rows.start : rows.stop], device=device)
        for index, t in enumerate(timesteps):
            alpha_bar = pipe.scheduler.alphas_cumprod[t].to(device)
            x_t = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * e
            answer = pipe.transformer(x_t.to(pipe.transformer.dtype), timestep=label.new_full((len(x),), t),
                                      class_labels=label)  # fmt: skip
            x_0 = (x_t - (1 - alpha_bar).sqrt() * answer.sample[:, :channels].float()) / alpha_bar.sqrt()
            yield Step(index, t, x_t, x_0, x_0, list(range(len(x))), False, answer.routing)

    return _look(pipe, run, clean, labels, seeds, batch_size, list(range(len(timesteps))), step)


def _spread(n: int, most: int) -> list[int]:
    """At most so many of n indices, evenly spread, both ends among them."""
    return sorted({round(i * (n - 1) / (most - 1)) for i in range(most)})


def batches(n: int, batch_size: int) -> list[range]:
    """n samples in batches of at most that size, which differ by one sample at most: they are timed against each
    other."""
    count = -(-n // batch_size)
    return [range(i * n // count, (i + 1) * n // count) for i in range(count)]


def _look(
    pipe: DiTPipeline,
    run: Callable[[range], Iterator[Step]],
    clean: torch.Tensor | None,
    labels: list[int],
    seeds: list[int],
    batch_size: int,
    shown_at: list[int],
    step: Callable[[], None],
) -> Seen:
    """``clean``: the latents whose detail counts; None for those that a run ends with."""
    shown = _spread(len(labels), SHOWN)
    timesteps: list[int] = []
    kept, correlation, seconds = [], [], []
    maps: dict[str, list[torch.Tensor]] = {"x_t": [], "x_0": [], "probability": [], "mask": []}
    deque(islice(run(batches(len(labels), batch_size)[0]), WARM_UP), maxlen=0)
    for rows in batches(len(labels), batch_size):
        mine = [i - rows.start for i in shown if i in rows]
        tokens, probability, spent = [], [], []
        pictures: dict[str, list[torch.Tensor]] = {name: [] for name in maps}
        timesteps.clear()
        start = _now(pipe.device)
        for seen in run(rows):
            spent.append((_now(pipe.device) - start) / len(rows))
            assert seen.routing is not None  # of a ChunkedDiT that is asked in every step
            timesteps.append(seen.t)
            side = seen.x_t.shape[-2:]
            mask = seen.routing.mask[: len(rows)].cpu()
            probability.append(seen.routing.probability[: len(rows)].float().cpu())
            tokens.append(mask.sum(1))
            if seen.index in shown_at:
                now = {"x_t": seen.x_t, "x_0": seen.x_0}
                now |= {"probability": probability[-1].unflatten(1, side), "mask": mask.unflatten(1, side)}
                for name, tensor in now.items():
                    pictures[name].append(tensor[mine].cpu())
            step()
            start = _now(pipe.device)
        truth = seen.previous.cpu() if clean is None else clean[rows.start : rows.stop]
        # Up to a monotonic function the local standard deviation: without noise nothing is taken off.
        detail = local_detail(truth, torch.ones(len(rows)))
        kept.append(torch.stack(tokens))
        correlation.append(spearman(torch.stack(probability), detail.expand(len(probability), -1, -1)))
        seconds.append(torch.tensor(spent, dtype=torch.float64))
        for name, parts in maps.items():
            parts.append(torch.stack(pictures[name], 1))
    return Seen(
        list(timesteps), labels, seeds, torch.cat(kept, 1), torch.cat(correlation, 1), torch.stack(seconds, 1),
        shown, shown_at, **{name: torch.cat(parts) for name, parts in maps.items()},
    )  # fmt: skip


def _now(device: torch.device) -> float:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


@torch.inference_mode()
def look_at_tail_drops(pipe: DiTPipeline, seen: Seen, count: int = 4) -> TailDrops:
    """Ask the model about the first of the samples with maps again, at a few of its timesteps, with `TAIL_DROPS`
    whatever its budget is."""
    model, sample = pipe.transformer, seen.shown[0]
    at = _spread(len(seen.shown_at), count)
    label = torch.tensor([seen.labels[sample]], device=pipe.device)
    times = [seen.timesteps[seen.shown_at[k]] for k in at]
    x_0, masks, change = [], [], []
    model.tokens, tokens = None, model.tokens
    for k, t in zip(at, times, strict=True):
        x = seen.x_t[:1, k].to(pipe.device)
        alpha_bar = pipe.scheduler.alphas_cumprod[t].to(pipe.device)
        first: torch.Tensor | None = None
        for tail_drop in TAIL_DROPS:
            answer = model(x.to(model.dtype), label.new_tensor([t]), label, tail_drop=tail_drop)
            epsilon = answer.sample[:, : x.shape[1]].float()
            first = epsilon if first is None else first
            x_0.append(((x - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt())[0].cpu())
            masks.append(answer.routing.mask[0].unflatten(0, x.shape[-2:]).cpu())
            change.append(((epsilon - first).square().mean() / first.square().mean()).sqrt().cpu())
    model.tokens = tokens
    shape = (len(at), len(TAIL_DROPS))
    x_0, masks, change = (torch.stack(tensors).unflatten(0, shape) for tensors in (x_0, masks, change))
    return TailDrops(TAIL_DROPS, times, seen.labels[sample], seen.seeds[sample], x_0, masks, change)


def spearman(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Spearman's rank correlation along the last axis, fp64, ties at their mean rank; NaN where all of a row tie."""
    a, b = (_ranks(x) for x in (a, b))
    a, b = (x - x.mean(-1, keepdim=True) for x in (a, b))
    scale = (a.square().sum(-1) * b.square().sum(-1)).sqrt()
    return torch.where(scale > 0, (a * b).sum(-1) / scale, torch.nan)


def _ranks(x: torch.Tensor) -> torch.Tensor:
    """Ranks along the last axis, fp64: how many are less, and half of those that are equal."""
    ordered, x = x.sort(-1).values, x.contiguous()
    low, high = (torch.searchsorted(ordered, x, side=side) for side in ("left", "right"))
    return (low + high).double() / 2
