"""The sampling loop of class-conditional DiTs, for what the stock pipeline has no argument for: Meta's sampler with its
learned sigma, guidance of some channels or of an interval, step holding, and a look at every step.

With the defaults it computes what `DiTPipeline` computes, bit for bit in fp32. A sample depends on its label, its seed
and the settings alone, not on the batch that it is drawn in: noise comes from a generator of its own, on the CPU.
Shapes: n samples, C latent channels, H x W latent grid.
"""

import inspect
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTPipeline, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor

from upcycle.errors import UpcycleError
from upcycle.models.chunked_dit import Gates, Routing
from upcycle.models.ddit import follow

# What differs from a class's own defaults. ddpm: as Meta samples DiT (facebookresearch/DiT `sample.py`): timesteps from
# 0 to 999, the variance between the posterior's and beta as the model says.
SAMPLERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "ddim": (DDIMScheduler, {}),
    "ddpm": (DDPMScheduler, {"timestep_spacing": "linspace"}),
    "dpm-solver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "timestep_spacing": "linspace"}),
    "unipc": (UniPCMultistepScheduler, {"timestep_spacing": "linspace"}),
}


@dataclass(frozen=True)
class Hold:
    """Step holding: steps that reuse the x0 estimate of an earlier one instead of asking the model. The first and the
    last step always ask it.

    ``every``: ask in every so-many-th step. ``limit``: or ask where the relative L1 changes of x_t since the last
    question add up to this (as TeaCache does), for each sample by itself. ``slope``: a held estimate goes on by this
    share of what it changed by, a step, between the last two questions (with ``every`` 2 and 1 by half of the change).
    """

    every: int | None = None
    limit: float | None = None
    slope: float = 1.0

    def __post_init__(self):
        if (self.every is None) == (self.limit is None):
            raise UpcycleError("hold: give a number of steps or a limit, and not both")
        if self.every is not None and self.every < 2:
            raise UpcycleError(f"hold: every {self.every} is no holding; it must be 2 or more")
        if self.limit is not None and not self.limit > 0:
            raise UpcycleError(f"hold: the limit {self.limit:g} must be above 0")


@dataclass(frozen=True)
class Sampling:
    """How to sample; the sampler itself is the pipeline's scheduler (`set_sampler`).

    ``guidance_channels``: how many channels of epsilon are guided, all of them by default; Meta guides 3 of the 4, and
    the others are the conditional ones. ``guidance_interval``: guide where low <= t <= high only (arXiv 2404.07724);
    elsewhere the unconditional half is not computed.
    """

    steps: int = 50
    guidance_scale: float = 4.0
    guidance_channels: int | None = None
    guidance_interval: tuple[int, int] = (0, 999)
    hold: Hold | None = None


@dataclass
class Step:
    """One step. ``x_t`` [n, C, H, W] before it, ``x_0`` the (guided) estimate of the clean latents, ``previous`` the
    latents after it; all fp32. ``asked``: the samples that the model was asked about, none in a held step. ``routing``:
    of a `ChunkedDiT`, of the asked samples, and where ``guided`` of their unconditional twins after them; else None.
    ``gates``: of one with DyDiT's gates, of the same rows.
    """

    index: int
    t: int
    x_t: torch.Tensor
    x_0: torch.Tensor
    previous: torch.Tensor
    asked: list[int]
    guided: bool
    routing: Routing | None
    gates: Gates | None = None


def set_sampler(pipe: DiTPipeline, name: str) -> None:
    """Give the pipeline one of `SAMPLERS` on its own noise schedule; an adapter's schedule of patches goes by it."""
    pipe.scheduler = _scheduler(pipe, name)
    if hasattr(pipe.transformer, "ddit"):
        follow(pipe.transformer, pipe)


def sampler_name(pipe: DiTPipeline) -> str:
    """The name in `SAMPLERS` of the scheduler that the pipeline has, or its class where its settings are others."""
    own = pipe.scheduler
    for name, (cls, _) in SAMPLERS.items():
        if type(own) is cls and _settings(_scheduler(pipe, name)) == _settings(own):
            return name
    return type(own).__name__


def _settings(scheduler: Any) -> dict[str, Any]:
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


def _scheduler(pipe: DiTPipeline, name: str) -> Any:
    cls, changes = SAMPLERS[name]
    # DDIM and DDPM clip unless they are told not to, and the configs of other solvers do not say.
    changes = {**changes, "clip_sample": pipe.scheduler.config.get("clip_sample", False)}
    learned = pipe.transformer.config.out_channels == 2 * pipe.transformer.config.in_channels
    if cls is DDPMScheduler:
        changes["variance_type"] = "learned_range" if learned else "fixed_small"
    elif "variance_type" in inspect.signature(cls).parameters:
        changes["variance_type"] = None
    scheduler = cls.from_config(pipe.scheduler.config, **changes)
    c = scheduler.config
    if cls is DDPMScheduler and c.beta_schedule == "linear" and c.trained_betas is None:
        # Meta's tables are fp64; of fp32 ones the steps near t = 0 are off by 1e-5.
        betas = torch.linspace(c.beta_start, c.beta_end, c.num_train_timesteps, dtype=torch.float64)
        scheduler.alphas_cumprod = (1 - betas).cumprod(0)
    return scheduler


def sample(pipe: DiTPipeline, labels: list[int], seeds: list[int], sampling: Sampling) -> torch.Tensor:
    """Clean latents in the model's scale, fp32 [n, C, H, W]: the last step of `steps`."""
    return deque(steps(pipe, labels, seeds, sampling), maxlen=1).pop().previous


@torch.inference_mode()
def decode(pipe: DiTPipeline, latents: torch.Tensor) -> torch.Tensor:
    """Images fp32 in [0, 1], [n, channels, height, width], of clean latents in the model's scale."""
    images = pipe.vae.decode((latents / pipe.vae.config.scaling_factor).to(pipe.vae.dtype)).sample
    return (images.float() / 2 + 0.5).clamp(0, 1)


@torch.inference_mode()
def steps(pipe: DiTPipeline, labels: list[int], seeds: list[int], sampling: Sampling) -> Iterator[Step]:
    """Sample one image for each label and seed, step by step, from noise to clean latents.

    The latents stay in fp32 between steps, whatever the model's dtype.
    """
    model, scheduler, device = pipe.transformer, pipe.scheduler, pipe.device
    c = model.config
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    shape = (len(labels), c.in_channels, c.sample_size, c.sample_size)
    x = randn_tensor(shape, generator=generators, device=device)
    label = torch.tensor(labels, device=device)
    asking = _Asking(model, label, sampling)
    scheduler.set_timesteps(sampling.steps)
    options = {"generator": generators} if "generator" in inspect.signature(scheduler.step).parameters else {}
    wants_sigma = getattr(scheduler.config, "variance_type", None) in ("learned", "learned_range")
    times = scheduler.timesteps.tolist()
    for index, t in enumerate(times):
        alpha_bar = scheduler.alphas_cumprod[int(t)]  # a scalar on the CPU, which goes with tensors of any device
        last = index in (0, len(times) - 1)
        asked = list(range(len(labels))) if last else asking.due(index, x)
        guided, routing, gates = asking.ask(index, t, scheduler.scale_model_input(x, t), asked, alpha_bar)
        out = asking.answer(index, x, asked, alpha_bar)
        previous = scheduler.step(out if wants_sigma else out[:, : c.in_channels], t, x, **options).prev_sample
        x_0 = (x - (1 - alpha_bar).sqrt() * out[:, : c.in_channels]) / alpha_bar.sqrt()
        yield Step(index, int(t), x, x_0, previous, asked, guided, routing, gates)
        x = previous


@contextmanager
def _budgets_of(model: Any, rows: Any, n: int) -> Iterator[None]:
    """Tail drops that a student has for each of ``n`` samples (or of both halves of a guided batch) are those of
    ``rows`` inside the block."""
    values = {name: getattr(model, name, None) for name in ("tail_drop", "uncond_tail_drop")}
    each = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    if isinstance(rows, slice) or not each:  # all of them
        yield
        return
    try:
        for name, value in each.items():
            setattr(model, name, value.unflatten(0, (-1, n))[:, rows.to(value.device)].flatten())
        yield
    finally:
        for name, value in each.items():
            setattr(model, name, value)


class _Asking:
    """The model's answers of one run, and what held steps need of them."""

    def __init__(self, model: Any, label: torch.Tensor, sampling: Sampling):
        self.model, self.label, self.sampling, self.hold = model, label, sampling, sampling.hold
        c = model.config
        self.null = torch.full_like(label, c.num_classes if "num_classes" in c else c.num_embeds_ada_norm)
        self.channels = c.in_channels
        self.out: torch.Tensor | None = None
        n = len(label)
        if self.hold:
            self.x_0 = self.x_0_before = torch.zeros(1, device=label.device)
            self.at, self.before = (torch.zeros(n, device=label.device) for _ in range(2))  # steps of the last two
            self.change = torch.zeros(n, device=label.device)
            self.x: torch.Tensor | None = None

    def due(self, index: int, x: torch.Tensor) -> list[int]:
        """The samples whose model is to be asked in this step. Reads from the device where a limit decides."""
        everyone = list(range(len(self.label)))
        if self.hold is None:
            return everyone
        if self.hold.every is not None:
            return everyone if index % self.hold.every == 0 else []
        assert self.x is not None
        moved = (x - self.x).abs().flatten(1).mean(1) / self.x.abs().flatten(1).mean(1)
        self.change, self.x = self.change + moved, x
        return [i for i, change in enumerate(self.change.tolist()) if change >= self.hold.limit]

    def ask(
        self, index: int, t: float, x: torch.Tensor, asked: list[int], alpha_bar: torch.Tensor
    ) -> tuple[bool, Routing | None, Gates | None]:
        """Ask the model about some of the samples and note its guided output."""
        if not asked:
            return False, None, None
        rows = slice(None) if len(asked) == len(x) else torch.tensor(asked, device=x.device)
        s, label, some = self.sampling, self.label[rows], x[rows]
        low, high = s.guidance_interval
        guided = s.guidance_scale > 1 and low <= t <= high
        if guided:
            label, given = torch.cat([label, self.null[rows]]), torch.cat([some, some])
        else:
            given = some
        time = torch.full((len(given),), t, device=x.device, dtype=torch.int64)
        with _budgets_of(self.model, rows, len(x)):
            answer = self.model(given.to(self.model.dtype), timestep=time, class_labels=label)
        out = answer.sample.float()
        if guided:
            conditional, unconditional = out.chunk(2)
            which = slice(0, s.guidance_channels or self.channels)
            epsilon = unconditional[:, which] + s.guidance_scale * (conditional[:, which] - unconditional[:, which])
            out = torch.cat([epsilon, conditional[:, which.stop :]], dim=1)
        if self.out is None or len(asked) == len(x):
            self.out = out
        else:
            self.out = self.out.index_copy(0, rows, out)
        if self.hold:
            self._note(index, x, rows, alpha_bar)
        return guided, getattr(answer, "routing", None), getattr(answer, "gates", None)

    def _note(self, index: int, x: torch.Tensor, rows: Any, alpha_bar: torch.Tensor) -> None:
        """What held steps after this one go by."""
        assert self.out is not None
        x_0 = (x - (1 - alpha_bar).sqrt() * self.out[:, : self.channels]) / alpha_bar.sqrt()
        mine = torch.zeros(len(x), dtype=torch.bool, device=x.device)
        mine[rows] = True
        wide = mine[:, None, None, None]
        self.x_0_before, self.x_0 = torch.where(wide, self.x_0, self.x_0_before), torch.where(wide, x_0, self.x_0)
        self.before, self.at = torch.where(mine, self.at, self.before), torch.where(mine, float(index), self.at)
        self.change = torch.where(mine, 0.0, self.change)
        self.x = x if self.x is None else self.x

    def answer(self, index: int, x: torch.Tensor, asked: list[int], alpha_bar: torch.Tensor) -> torch.Tensor:
        """The output of every sample in this step [n, O, H, W]; of those not asked, from the x0 estimate that is held:
        the noise follows from x_t. A learned sigma stays."""
        assert self.out is not None
        if len(asked) == len(x):
            return self.out
        assert self.hold is not None
        span = (self.at - self.before).clamp(min=1)
        # No slope after a single answer.
        ahead = torch.where(self.at > self.before, self.hold.slope * (index - self.at) / span, 0.0)
        x_0 = self.x_0 + ahead[:, None, None, None] * (self.x_0 - self.x_0_before)
        held = (x - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        out = torch.cat([held, self.out[:, self.channels :]], dim=1)
        if asked:
            rows = torch.tensor(asked, device=x.device)
            out = out.index_copy(0, rows, self.out[rows])
        return out
