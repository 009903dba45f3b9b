"""Models and settings side by side, from the same noise: how far their images are apart, what they cost, how long they
take."""

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DiTPipeline, DiTTransformer2DModel

from upcycle.errors import UpcycleError
from upcycle.evaluation.flops import grid_tokens, step_flops, step_sizes
from upcycle.sampling.pipeline import class_count
from upcycle.sampling.sampler import Sampling, decode, sample, steps

FEATURE_TIME = 100
"""t of the noise at which features are taken: enough that the model looks at shapes, not so much that they are gone."""


@dataclass
class Variant:
    """A model and how it samples. ``tail_drop`` is of a `ChunkedDiT`; other models have None."""

    model: str
    pipe: DiTPipeline
    sampling: Sampling
    tail_drop: float | None = None

    @property
    def settings(self) -> str:
        """In a few words."""
        hold, parts = self.sampling.hold, [f"{self.sampling.steps} steps"]
        if self.tail_drop is not None:
            parts.insert(0, f"ρ = {self.tail_drop:g}")
        if hold:
            parts.append(f"asked every {hold.every}" if hold.every else f"held to {hold.limit:g}")
        return ", ".join(parts)

    def begin(self) -> None:
        """Set the model up, because variants share models; an export's own default budget is not in force."""
        if self.tail_drop is not None:
            self.pipe.transformer.set_tokens(None)
            self.pipe.transformer.set_lite_cfg(None)
            self.pipe.transformer.set_tail_drop(self.tail_drop)


@dataclass
class Drawn:
    """Clean latents [n, C, H, W] in the model's scale on the CPU, and means over the images: ``flops`` of denoising,
    ``tokens`` of the conditional half over the steps that asked the model, ``asked`` steps."""

    latents: torch.Tensor
    flops: float
    tokens: float
    asked: float


def check_comparable(variants: list[Variant]) -> None:
    """Raise `UpcycleError` where the models do not start from the same noise, or do not draw the same classes."""
    first = variants[0]
    for other in variants[1:]:
        for what, of in (("latents", _latent_shape), ("classes", class_count)):
            mine, theirs = of(first.pipe), of(other.pipe)
            if mine != theirs:
                raise UpcycleError(
                    f"{first.model} and {other.model} cannot be compared: their {what} are {mine} and {theirs}; "
                    "give a model and what was made from it"
                )


def _latent_shape(pipe: DiTPipeline) -> str:
    c = pipe.transformer.config
    return f"{c.in_channels} x {c.sample_size} x {c.sample_size}"


def draw(
    variant: Variant,
    labels: list[int],
    seeds: list[int],
    *,
    batch_size: int = 16,
    step: Callable[[], None] = lambda: None,
) -> Drawn:
    """Sample, and count. ``step`` is called after every step of a batch."""
    variant.begin()
    model, flops, tokens, asked = variant.pipe.transformer, 0.0, 0.0, 0
    latents = []
    for batch in range(0, len(labels), batch_size):
        rows = slice(batch, batch + batch_size)
        for one in steps(variant.pipe, labels[rows], seeds[rows], variant.sampling):
            flops += step_flops(model, one)
            tokens += _tokens(model, one)
            asked += len(one.asked)
            step()
        latents.append(one.previous.cpu())
    return Drawn(torch.cat(latents), flops / len(labels), tokens / asked, asked / len(labels))


def _tokens(model: Any, step: Any) -> float:
    """Of a step's asked samples together, the conditional half."""
    if step.routing is not None:
        return step.routing.mask[: len(step.asked)].sum().item()
    if hasattr(model, "ddit") and step.asked:
        return sum(grid_tokens(model.config, m) for m in step_sizes(model, step))
    return len(step.asked) * grid_tokens(model.config)


def time_in_turn(
    variants: list[Variant],
    labels: list[int],
    seeds: list[int],
    repeats: int,
    *,
    batch_size: int = 16,
    step: Callable[[], None] = lambda: None,
) -> list[list[float]]:
    """Seconds per image of the denoising, without the VAE: by variant, one a round. Each has run once before (`draw`).

    All take their turn in every round, because a machine's speed changes. ``step`` is called after every turn.
    """
    seconds: list[list[float]] = [[] for _ in variants]
    for _ in range(repeats):
        for variant, mine in zip(variants, seconds, strict=True):
            variant.begin()
            _wait(variant.pipe.device)
            start = time.perf_counter()
            for batch in range(0, len(labels), batch_size):
                rows = slice(batch, batch + batch_size)
                sample(variant.pipe, labels[rows], seeds[rows], variant.sampling)
            _wait(variant.pipe.device)
            mine.append((time.perf_counter() - start) / len(labels))
            step()
    return seconds


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


@torch.inference_mode()
def features(pipe: DiTPipeline, latents: torch.Tensor) -> torch.Tensor:
    """What the middle block of a stock DiT makes of latents [n, C, H, W]: a vector of length 1 for every patch
    [n, patches, width]. All get the same noise of t = `FEATURE_TIME`, and no class."""
    model, device = pipe.transformer, pipe.device
    noise = torch.randn(latents.shape[1:], generator=torch.Generator().manual_seed(0))
    alpha_bar = pipe.scheduler.alphas_cumprod[FEATURE_TIME]
    seen: list[torch.Tensor] = []
    middle = model.transformer_blocks[(len(model.transformer_blocks) - 1) // 2]
    handle = middle.register_forward_hook(lambda module, args, out: seen.append(out.float().cpu()))
    for x in latents.split(16):
        x_t = alpha_bar.sqrt() * x + (1 - alpha_bar).sqrt() * noise
        time = torch.full((len(x),), FEATURE_TIME, device=device)
        null = torch.full((len(x),), class_count(pipe), device=device)
        model(x_t.to(device, model.dtype), timestep=time, class_labels=null)
    handle.remove()
    return F.normalize(torch.cat(seen), dim=2)


def feature_distances(pipe: DiTPipeline, latents: list[torch.Tensor]) -> list[float | None]:
    """How far each variant's images are from the first one's, in `features`: mean squared distance of a patch's vector,
    as a share of that between the first one's images of different seeds (1: as far as another image). None for one
    image alone, which has no other."""
    seen = [features(pipe, x) for x in latents]
    first = seen[0]
    others = [(first - first.roll(by, 0)).square().sum(2).mean().item() for by in range(1, len(first))]
    if not others:
        return [None] * len(latents)
    return [(one - first).square().sum(2).mean().item() / statistics.mean(others) for one in seen]


def compare(
    variants: list[Variant],
    labels: list[int],
    seeds: list[int],
    *,
    batch_size: int = 16,
    repeats: int = 2,
    step: Callable[[], None] = lambda: None,
) -> tuple[list[dict[str, Any]], list[torch.Tensor]]:
    """Draw with every variant, count, compare with the first, and time.

    ``step`` is called after every step of a drawn batch, and after every turn of a timed round.

    Returns:
        A row for each variant: ``model``, ``settings``, ``tail_drop``, ``hold``, ``steps``, ``flops_per_image``,
        ``tokens_kept``, ``asked_steps``; beside the first ``flops_times_first``, ``times_first`` (median of the rounds'
        ratios), ``mse`` and ``psnr`` of images in [0, 1], ``latents_mse``, ``feature_distance`` (None where no model
        is a stock DiT); and ``seconds_per_image`` (median, None without rounds). And the images fp32 [n, channels,
        height, width].

    Raises:
        UpcycleError: the models cannot be compared.
    """
    check_comparable(variants)
    drawn = [draw(variant, labels, seeds, batch_size=batch_size, step=step) for variant in variants]
    images = [
        torch.cat([decode(v.pipe, x.to(v.pipe.device)).cpu() for x in d.latents.split(batch_size)])
        for v, d in zip(variants, drawn, strict=True)
    ]
    stock = [v.pipe for v in variants if type(v.pipe.transformer) is DiTTransformer2DModel]
    distances = feature_distances(stock[0], [d.latents for d in drawn]) if stock else [None] * len(variants)
    seconds = time_in_turn(variants, labels, seeds, repeats, batch_size=batch_size, step=step)
    rows = []
    for variant, one, image, distance, mine in zip(variants, drawn, images, distances, seconds, strict=True):
        mse = (image - images[0]).square().mean().item()
        rows.append(
            {
                "model": variant.model,
                "settings": variant.settings,
                "tail_drop": variant.tail_drop,
                "hold": vars(variant.sampling.hold) if variant.sampling.hold else None,
                "steps": variant.sampling.steps,
                "flops_per_image": one.flops,
                "flops_times_first": one.flops / drawn[0].flops,
                "tokens_kept": one.tokens,
                "asked_steps": one.asked,
                "seconds_per_image": statistics.median(mine) if mine else None,
                "times_first": statistics.median(a / b for a, b in zip(mine, seconds[0], strict=True))
                if mine
                else None,
                "mse": mse,
                "psnr": -10 * math.log10(mse) if mse else None,
                "latents_mse": (one.latents - drawn[0].latents).square().mean().item(),
                "feature_distance": distance,
            }
        )
    return rows, images
