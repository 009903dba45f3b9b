"""DDiT: a pretrained DiT that takes coarser patches in the steps that allow it (arXiv 2602.16968).

This file is self-contained (torch, diffusers and safetensors only). It is copied beside every adapter, so that

    pipe = FluxPipeline.from_pretrained("black-forest-labs/FLUX.1-dev")
    import ddit                              # the file beside the adapter
    ddit.apply(pipe, "folder of the adapter")

is all that a user needs. The base model is changed in place: its class becomes a subclass of the stock one under the
same name, its weights stay as they are under the same names, and what is new lies below them
(``x_embedder.coarse.2.weight``). With m = 1 a forward is the stock forward, bit for bit.

Three parts: the layers that switch with the factor m (`Coarse`), the choice of m for every step (`PatchSchedule`), and
one subclass a backbone. Shape legend: B batch, C latent channels, F x H x W latent grid, N tokens, D block width, p the
base patch size, m the factor, P = m * p.
"""

import functools
import hashlib
import inspect
import itertools
import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    ModelMixin,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

_CODE = Path(__file__).read_bytes()
CODE_SHA256 = hashlib.sha256(_CODE).hexdigest()

CONFIG, WEIGHTS = "ddit.json", "ddit.safetensors"
COMPONENTS = ("transformer", "transformer_2")
"""Transformers of a pipeline; where there are two (Wan 2.2) the second one takes over at low noise."""
PLACES = ("ddit", "ddit_2")
"""Folders of their adapters beside a pipeline. Adapters alone: the first at the top, a second one in its folder."""
PERCENTILE, ORDER = 0.4, 3  # the paper's (section 3.3 and its ablation)
VARIANCE = 0.1  # of the data outside of what coarse patches hold, until `calibrate` measures it


@dataclass
class DDiTConfig:
    """What an adapter is; saved as ``ddit.json``.

    Args:
        base_class: class of the transformer that it belongs to.
        patches: factors m of the base patch size, ascending, without 1.
        rank: of the switch-LoRA in the feed-forward layers; 0 for none.
        prediction: "epsilon", "flow" (noise - data) or "negative flow" (data - noise, Z-Image).
        residual: whether the closed-form high-frequency residual is added.
        variance: m -> s^2, the variance of the data outside of what coarse patches hold.
        num_train_timesteps, beta_start, beta_end, beta_schedule: noise schedule of epsilon models.
        threshold, percentile, order: of the schedule (tau, epsilon and the order of the difference);
            threshold None: no coarse step unless `PatchSwitching.set_patches` asks for it.
        component: name of the transformer in its pipeline.
        base: id or path of the base model, for people; base_revision its commit.
        calibration: what `threshold` was chosen for (steps, sampler, speed-up).
    """

    base_class: str
    patches: list[int]
    rank: int = 32
    prediction: str = "epsilon"
    residual: bool = True
    variance: dict[str, float] = field(default_factory=dict)
    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    threshold: float | None = None
    percentile: float = PERCENTILE
    order: int = ORDER
    component: str = "transformer"
    base: str | None = None
    base_revision: str | None = None
    calibration: dict[str, Any] | None = None

    @property
    def schedule(self) -> dict[str, Any]:
        """The settings that a `PatchSchedule` starts with."""
        return {"threshold": self.threshold, "percentile": self.percentile, "order": self.order}

    def __post_init__(self):
        if self.base_class not in BACKBONES:
            raise ValueError(f"base_class must be one of {', '.join(BACKBONES)}, got {self.base_class!r}")
        if not isinstance(self.patches, list) or not isinstance(self.variance, dict):
            raise ValueError("patches must be a list, and variance a mapping")
        whole = all(isinstance(m, int) and not isinstance(m, bool) and 2 <= m <= 16 for m in self.patches)
        if not self.patches or not whole or sorted(set(self.patches)) != list(self.patches):
            raise ValueError(f"patches must be ascending whole numbers from 2 to 16, got {self.patches}")
        if not isinstance(self.rank, int) or not 0 <= self.rank <= 4096:
            raise ValueError(f"rank must be a whole number from 0 to 4096, got {self.rank}")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {', '.join(PREDICTIONS)}, got {self.prediction!r}")
        steps, betas = self.num_train_timesteps, (self.beta_start, self.beta_end)
        if type(steps) is not int or not 1 <= steps <= 1_000_000:
            raise ValueError(f"num_train_timesteps must be a whole number from 1 up, got {steps!r}")
        if not all(type(beta) is float and 0 < beta < 1 for beta in betas):
            raise ValueError(f"beta_start and beta_end must be between 0 and 1, got {betas}")
        if not all(type(v) in (int, float) and 0 <= v < math.inf for v in self.variance.values()):
            raise ValueError(f"variance must be numbers of at least 0, got {self.variance}")
        if not isinstance(self.component, str) or not isinstance(self.base, str | None):
            raise ValueError("component and base must be text")
        if self.beta_schedule not in ("linear", "scaled_linear"):
            raise ValueError(f"beta_schedule must be linear or scaled_linear, got {self.beta_schedule!r}")
        _check_schedule(self.threshold, self.percentile, self.order)

    def variance_of(self, m: int) -> float:
        return float(self.variance.get(str(m), VARIANCE))


def _check_schedule(threshold: float | None, percentile: float, order: int) -> None:
    if threshold is not None and not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    if not 0 < percentile <= 1:
        raise ValueError(f"percentile must be above 0 and at most 1, got {percentile}")
    if order not in (1, 2, 3):
        raise ValueError(f"order must be 1, 2 or 3, got {order}")


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic of patches


def upsampling(p: int, m: int) -> torch.Tensor:
    """b: bilinear enlarging of a line of p entries to P = m p, fp64 [P, p]."""
    lines = torch.eye(p, dtype=torch.float64)[:, None]
    return F.interpolate(lines, size=m * p, mode="linear", align_corners=False)[:, 0].T.contiguous()


def resize_features(weight: torch.Tensor, matrix: torch.Tensor, axes: str, sizes: dict[str, int]) -> torch.Tensor:
    """Apply ``matrix`` [P, p] along the axes h and w of a patch, which the first dimension of ``weight`` lists in the
    order ``axes`` (of c, f, h, w): [features of p, ...] -> [features of P, ...]."""
    rest = weight.shape[1:]
    patch = weight.reshape(*(sizes[a] for a in axes), -1)
    for axis in "hw":
        at = axes.index(axis)
        patch = torch.tensordot(matrix, patch, dims=([1], [at])).movedim(0, at)
    return patch.reshape(-1, *rest)


def merge(tokens: torch.Tensor, grid: tuple[int, int, int], axes: str, sizes: dict[str, int], m: int) -> torch.Tensor:
    """Tokens of m x m patches as one: [B, F h w, features of p] -> [B, F h w / m^2, features of P]."""
    frames, height, width = grid
    batch = tokens.shape[0]
    x = tokens.reshape(batch, frames, height // m, m, width // m, m, *(sizes[a] for a in axes))
    order = [0, 1, 2, 4]
    for i, axis in enumerate(axes):
        order += ([3] if axis == "h" else [5] if axis == "w" else []) + [6 + i]
    return x.permute(order).reshape(batch, frames * (height // m) * (width // m), -1)


def split(tokens: torch.Tensor, grid: tuple[int, int, int], axes: str, sizes: dict[str, int], m: int) -> torch.Tensor:
    """Inverse of `merge`; ``grid`` is that of the fine tokens."""
    frames, height, width = grid
    batch = tokens.shape[0]
    shape: list[int] = []
    place: dict[str, int] = {}
    for axis in axes:
        if axis in "hw":
            place["m" + axis] = 4 + len(shape)
            shape.append(m)
        place[axis] = 4 + len(shape)
        shape.append(sizes[axis])
    x = tokens.reshape(batch, frames, height // m, width // m, *shape)
    order = [0, 1, 2, place["mh"], 3, place["mw"], *(place[a] for a in axes)]
    return x.permute(order).reshape(batch, frames * height * width, -1)


def centres(count: int, m: int, device: torch.device) -> torch.Tensor:
    """Where coarse tokens sit among fine ones, m r + (m - 1) / 2; fp32 [count] (bf16 cannot hold 128.5)."""
    return torch.arange(count, device=device, dtype=torch.float32) * m + (m - 1) / 2


def pad_to(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Repeat the last rows and columns of [..., H, W] up to ``height`` x ``width``."""
    if x.shape[-2:] == (height, width):
        return x
    rows = torch.arange(height, device=x.device).clamp(max=x.shape[-2] - 1)
    columns = torch.arange(width, device=x.device).clamp(max=x.shape[-1] - 1)
    return x[..., rows, :][..., columns]


def outside(z: torch.Tensor, projector: torch.Tensor) -> torch.Tensor:
    """What patches of side P cannot hold once they were made smaller: z - B B^+ z, fp32 [..., H, W]."""
    side = len(projector)
    z = z.float()
    blocks = z.unflatten(-1, (-1, side)).unflatten(-3, (-1, side))  # [..., H/P, P, W/P, P]
    inside = torch.einsum("...iajb,ca,db->...icjd", blocks, projector, projector)
    return z - inside.reshape(z.shape)


def outside_variance(x0: torch.Tensor, side: int, m: int) -> float:
    """s^2: the variance of clean latents [..., H, W] in the directions that patches of m x ``side`` cannot hold."""
    b = upsampling(side, m)
    x0 = pad_to(x0, *(-(-size // len(b)) * len(b) for size in x0.shape[-2:]))
    rest = outside(x0, (b @ torch.linalg.pinv(b)).float().to(x0.device))
    return (rest.square().mean() / (1 - 1 / m**2)).item()


# ---------------------------------------------------------------------------------------------------------------------
# What a model predicts


PREDICTIONS = ("epsilon", "flow", "negative flow")


class Noise:
    """Noise levels and predictions of a model: z = alpha x + sigma n."""

    def __init__(self, config: DDiTConfig):
        self.config = config
        self._tables: dict[torch.device, torch.Tensor] = {}
        power = 0.5 if config.beta_schedule == "scaled_linear" else 1.0
        ends = config.beta_start**power, config.beta_end**power
        beta = torch.linspace(*ends, config.num_train_timesteps, dtype=torch.float64) ** (1 / power)
        self._alpha_bar = (1 - beta).cumprod(0).float()

    def levels(self, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """alpha and sigma, fp32. ``time``: integer timesteps of epsilon models, the noise level 0..1 of flow models."""
        if self.config.prediction == "epsilon":
            if time.device not in self._tables:
                self._tables[time.device] = self._alpha_bar.to(time.device)
            alpha_bar = self._tables[time.device][time.long().clamp(0, len(self._alpha_bar) - 1)]
            return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        return 1 - time.float(), time.float()

    def gain(self, time: torch.Tensor, variance: float) -> torch.Tensor:
        """g: the best linear guess at the prediction from z, for data of this variance; fp32, like ``time``.

        There n is guessed as sigma z / (sigma^2 + alpha^2 s^2) and x as alpha s^2 z / (the same).
        """
        alpha, sigma = self.levels(time)
        below = (sigma**2 + alpha**2 * variance).clamp(min=1e-8)
        if self.config.prediction == "epsilon":
            return sigma / below
        flow = (sigma - alpha * variance) / below
        return flow if self.config.prediction == "flow" else -flow

    def increment(self, z: torch.Tensor, out: torch.Tensor, then: torch.Tensor, now: torch.Tensor) -> torch.Tensor:
        """How far a deterministic step from ``then`` to ``now`` moves z, by the model's output; fp32, like z."""
        (alpha, sigma), (alpha_now, sigma_now) = self.levels(then), self.levels(now)
        out = out[:, : z.shape[1]].float()
        if self.config.prediction == "epsilon":
            x = (z.float() - sigma * out) / alpha.clamp(min=1e-4)
            return (alpha_now - alpha) * x + (sigma_now - sigma) * out
        return (sigma_now - sigma) * (out if self.config.prediction == "flow" else -out)


# ---------------------------------------------------------------------------------------------------------------------
# Layers that switch


class Switch:
    """What the layers of a model share: the factor of the call that runs, the padded grid of fine tokens (frames, rows,
    columns), and rows and columns before padding."""

    def __init__(self) -> None:
        self.m = 1
        self.grid = (1, 1, 1)
        self.whole = (1, 1)


class Switching:
    """A stock layer that looks at the switch; the class of the stock layer comes after this one (`_switch`)."""

    switch: Switch

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made here and has no name that pickle could find."""
        kind, stock = type(self).__bases__
        state: Any = super().__reduce_ex__(protocol)
        return _blank_layer, (kind, stock), *state[2:]


def _blank_layer(kind: type, stock: type) -> Any:
    cls: Any = _switching_class(kind, stock)
    return cls.__new__(cls)


@functools.cache
def _switching_class(kind: type, stock: type) -> type:
    return type(stock.__name__, (kind, stock), {"__module__": stock.__module__})


class Coarse(Switching):
    """A stock layer with others for coarse patches below it.

    Every new parameter lies in a module that is called, which offloading needs.
    """

    coarse: nn.ModuleDict

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.switch.m == 1:
            return super().forward(x)  # type: ignore[misc]
        return self.forward_coarse(x, self.coarse[str(self.switch.m)])

    def forward_coarse(self, x: torch.Tensor, coarse: nn.Module) -> torch.Tensor:
        """In place of the stock layer's forward."""
        return coarse(x)


class Merging(Coarse):
    """Embedding of tokens that come as fine ones; ``axes`` and ``sizes`` say what lies in one."""

    axes: str
    sizes: dict[str, int]

    def forward_coarse(self, x: torch.Tensor, coarse: nn.Module) -> torch.Tensor:
        return coarse(merge(x, self.switch.grid, self.axes, self.sizes, self.switch.m))


class Splitting(Coarse):
    """Head whose tokens go on as fine ones."""

    axes: str
    sizes: dict[str, int]

    def forward_coarse(self, x: torch.Tensor, coarse: nn.Module) -> torch.Tensor:
        return split(coarse(x), self.switch.grid, self.axes, self.sizes, self.switch.m)


class SwitchLoRA(Coarse):
    """A layer of a feed-forward plus a low-rank one that belongs to m."""

    def forward_coarse(self, x: torch.Tensor, coarse: nn.Module) -> torch.Tensor:
        return super(Coarse, self).forward(x) + coarse(x)  # type: ignore[misc]


class SizedText(Coarse):
    """Embedding of text, whose tokens are told the patch size."""

    def forward_coarse(self, x: torch.Tensor, coarse: nn.Module) -> torch.Tensor:
        return coarse(super(Coarse, self).forward(x))  # type: ignore[misc]


class LowRank(nn.Module):
    """Two matrices; names that adapters of peft do not look for."""

    def __init__(self, inputs: int, outputs: int, rank: int):
        super().__init__()
        self.down = nn.Linear(inputs, rank, bias=False)
        self.up = nn.Linear(rank, outputs, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.up(self.down(x))


class PatchSizeVector(nn.Module):
    """Added to every token. (Tokens of the image have theirs in the bias of the coarse embedding.)"""

    def __init__(self, width: int):
        super().__init__()
        self.vector = nn.Parameter(torch.zeros(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.vector


# ---------------------------------------------------------------------------------------------------------------------
# The choice of a size for every step


@dataclass
class Sight:
    """What a schedule sees of a call: ``latents`` [B, C, F, H, W], the ``time`` of every sample [B] (see
    `Noise.levels`), and the patch sides (frames, p) in latent pixels."""

    latents: torch.Tensor
    time: torch.Tensor
    patch: tuple[int, int]


class PatchSchedule:
    """Chooses m for every step from how unsteadily the latents move (DDiT, section 3.3).

    The increments of the latents are those that a deterministic step would make of the model's outputs, in fp32: in
    bf16 latents their third difference drowns in rounding (docs/ddit.md). The largest size is taken whose
    ``percentile`` over patches of the deviation inside a patch lies below ``threshold``.

    Two transformers of one pipeline share a schedule: what it looks at are latents, whose run goes on when the pipeline
    turns to the other one.

    Args:
        noise: of the model.
        patches: factors, ascending, without 1.
        settings: of `set`.
    """

    def __init__(self, noise: Noise, patches: list[int], **settings: Any):
        self.noise, self.patches = noise, patches
        self.forced: int | None = None
        """Run at this factor, whatever is decided (`PatchSwitching.set_patches`)."""
        self.steps: int | None = None
        self.exact_times: Callable[[], torch.Tensor] | None = None
        self.set(**settings)

    def set(
        self,
        *,
        threshold: float | None = None,
        percentile: float = PERCENTILE,
        order: int = ORDER,
        fixed: list[tuple[int, float]] | None = None,
        steps: int | None = None,
        policy: str = "min",
    ) -> None:
        """Decide by these from the next call on, which is the first step of a run.

        Args:
            threshold: tau; None: never coarse.
            percentile: epsilon.
            order: of the difference, 1 to 3; as many first steps are the finest.
            fixed: [(m, share of the steps)] in order, in place of a decision. A schedule that follows a pipeline goes
                by the sampler's steps, held ones too; any other counts calls, and lags where a cache skips some.
            steps: how many a run has, for ``fixed``, kept until another number is given. Without it a schedule that
                follows a pipeline (`follow`) takes those of its scheduler from the run's first noise level on.
            policy: "min": one size for the batch, the smallest that any sample wants; "grouped": one call a size.

        Raises:
            ValueError: a value out of its range, or shares that do not add up to 1.
        """
        if policy not in ("min", "grouped"):
            raise ValueError(f"policy must be min or grouped, got {policy!r}")
        _check_schedule(threshold, percentile, order)
        for m, _ in fixed or []:
            if m != 1 and m not in self.patches:
                raise ValueError(f"the schedule has {m}, and there are 1, {', '.join(map(str, self.patches))}")
        if not all(0 < share <= 1 for _, share in fixed or []):
            raise ValueError("the shares of a schedule must be above 0 and at most 1")
        if fixed and abs(sum(share for _, share in fixed) - 1) > 1e-6:
            raise ValueError("the shares of a schedule must add up to 1")
        self.threshold, self.percentile, self.order, self.fixed, self.policy = (
            threshold, percentile, order, fixed, policy
        )  # fmt: skip
        self.steps = steps or self.steps
        self.log: list[dict[str, Any]] = []
        self.always_look = False
        """Compute the deviations even without a threshold, for `calibrate`."""
        self.reset()

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles know no pipeline: `follow` tells them."""
        return {**vars(self), "exact_times": None}

    def reset(self) -> None:
        """Forget the run: the next call is the first step of another one. (Its `log` stays until then.)"""
        self._increments: list[torch.Tensor] = []
        self._begun = 0.0
        self._time: float | None = None
        self._given_time: float | None = None
        self._latents: torch.Tensor | None = None
        self._count = 0
        self._out: torch.Tensor | None = None
        self._sizes: list[int] = []

    @torch.no_grad()
    def decide(self, sight: Sight) -> list[int]:
        """The factor of every sample. A call at the same noise level with the same latents is another branch of the
        guidance of one step, and gets the same answer. Reads from the device once, and again for deviations."""
        latents = sight.latents.detach()
        batch = len(latents)
        half = batch // 2 if batch % 2 == 0 else 0
        twins = _equal(latents[:half], latents[half:]) if half else torch.zeros((), device=latents.device)
        facts = torch.stack([sight.time.float().max(), _equal(latents, self._latents), twins])
        time, same_latents, halves = facts.tolist()
        count = half if halves else batch  # of both halves of the guidance one
        if self._time is not None and time == self._given_time and same_latents:
            return self._sizes * (batch // count)
        given, time = time, self._exact(time)
        if self._time is not None:
            before = self._latents
            # Guidance may begin or end in mid-run; samples that began as twins may part.
            goes_on = before is not None and latents.shape[1:] == before.shape[1:] and (
                count in (self._count, len(before))
            )  # fmt: skip
            if not goes_on or self._level(time) >= self._level(self._time):
                self.reset()
        if self._time is None:
            self.log, self._begun = [], time
        step = self._step(time)
        entry: dict[str, Any] = {"step": step, "time": time}
        moved = self._time is not None and self._out is not None and self._latents is not None
        if moved and not self.fixed:
            assert self._latents is not None
            assert self._out is not None
            device = latents.device  # two transformers may lie on two
            then, now = (torch.tensor(t, device=device) for t in (self._time, time))
            z, out = self._latents[:count].to(device), self._out[:count].to(device)
            earlier = [x.to(device) for x in self._increments if len(x) == count]
            self._increments = [*earlier, self.noise.increment(z, out, then, now)][-self.order :]
        self._time, self._given_time, self._latents, self._out = time, given, latents, None
        self._count = count
        sizes = [1] * count
        if self.fixed:
            sizes = [self._fixed_at(step)] * count
            entry["why"] = "fixed schedule"
        elif self.threshold is None and not self.always_look:
            entry["why"] = "no threshold"
        elif len(self._increments) < self.order:
            entry["why"] = f"among the first {self.order} steps"
        else:
            deviation = self._deviations(sight.patch)
            entry["deviation"] = {str(m): values for m, values in zip(self.patches, deviation, strict=True)}
            if self.threshold is not None:
                for m, values in zip(self.patches, deviation, strict=True):
                    sizes = [m if value < self.threshold else size for size, value in zip(sizes, values, strict=True)]
            entry["why"] = "deviation below the threshold" if max(sizes) > 1 else "deviation above the threshold"
            if self.policy == "min":
                sizes = [min(sizes)] * count
        entry["m"] = sizes[0] if len(set(sizes)) == 1 else sizes
        self.log.append(entry)
        self._sizes = sizes
        return sizes * (batch // count)

    @torch.no_grad()
    def observe(self, out: torch.Tensor) -> None:
        """Take note of the output [B, >= C, F, H, W] of the call that was decided on; the first of a step counts."""
        if self._out is None:
            self._out = out.detach()

    def _level(self, time: float) -> float:
        return float(self.noise.levels(torch.tensor(time))[1])

    def _exact(self, time: float) -> float:
        """The sampler's own time: bf16 pipelines round what they pass, and increments are differences.

        Rounding may take a time nearer to a neighbour, or make two equal: what is not exact is the next of the run.
        """
        if self.exact_times is None:
            return time
        times = self.exact_times()
        whole = 1.0 if self.noise.config.prediction == "epsilon" else 1 / self.noise.config.num_train_timesteps
        near = times[(times - time).abs() <= max(2**-7 * abs(time), whole)]  # some round to whole timesteps
        if not len(near):
            return time
        nearest = float(near[(near - time).abs().argmin()])
        if self._time is None or self._given_time is None or time > self._given_time:  # a run begins
            return nearest
        later = near[near < self._time]
        if not len(later) or (nearest < self._time and abs(nearest - time) <= 1e-6 * abs(time)):
            return nearest
        return float(later.max())

    def _step(self, time: float) -> int:
        """Number of this step: of those that the sampler has had since the run began, whether each made a call or not;
        without a sampler, or at a time that it does not have, of the calls."""
        times = None if self.exact_times is None else self.exact_times()
        if times is None or not (times == time).any():
            return len(self.log)
        return int(((times <= self._begun) & (times > time)).sum())

    def _fixed_at(self, step: int) -> int:
        assert self.fixed is not None
        total = self.steps
        if total is None and self.exact_times is not None:  # img2img begins below the scheduler's first noise level
            total = int((self.exact_times() <= self._begun).sum())
        if not total:
            raise ValueError("a fixed schedule needs the number of steps; set schedule.steps")
        reached = 0.0
        for m, share in self.fixed:
            reached += share
            if step < round(reached * total):
                return m
        return self.fixed[-1][0]

    def _deviations(self, patch: tuple[int, int]) -> list[list[float]]:
        """For every size the percentile over patches of the deviation inside a patch, by sample."""
        difference = self._increments
        while len(difference) > 1:
            difference = [b - a for a, b in itertools.pairwise(difference)]
        frames, side = patch
        rows = []
        for m in self.patches:
            P = m * side
            x = difference[0]
            height, width = -(-x.shape[-2] // P) * P, -(-x.shape[-1] // P) * P
            x = pad_to(x, height, width)
            blocks = x.unflatten(2, (-1, frames)).unflatten(-2, (-1, P)).unflatten(-1, (-1, P))
            deviation = blocks.float().std(dim=(1, 3, 5, 7), correction=0).flatten(1)  # B C F f H P W P
            rows.append(deviation.quantile(self.percentile, dim=1))
        return torch.stack(rows).tolist()


def _equal(a: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    """Whether they are, 0 or 1 on the device of ``a``."""
    if b is None or a.shape != b.shape or a.device != b.device:
        return torch.zeros((), device=a.device)
    return (a == b).all().float()


# ---------------------------------------------------------------------------------------------------------------------
# Backbones


class PatchSwitching:
    """What all backbones share; the stock class comes after this one. See `attach`."""

    switch: Switch
    noise: Noise
    ddit: DDiTConfig
    schedule: PatchSchedule
    _names: list[str]
    _projectors: dict[Any, torch.Tensor]
    _base_alone = False

    def set_patches(self, m: int | None) -> None:
        """Run at this factor from now on, whatever the schedule says; None: as the schedule says.

        A call whose arguments cannot be coarsened (`look`) raises ValueError then; a schedule stays at m = 1 and warns.
        """
        if m is not None and m != 1 and m not in self.ddit.patches:
            raise ValueError(f"patches must be 1, {', '.join(map(str, self.ddit.patches))} or None, got {m}")
        self.schedule.forced = m

    @contextmanager
    def at(self, m: int) -> Iterator[None]:
        """Run at this factor inside the block."""
        before = self.schedule.forced
        self.set_patches(m)
        try:
            yield
        finally:
            self.schedule.forced = before

    def set_schedule(self, **changes: Any) -> PatchSchedule:
        """Set the schedule to the config's settings, changed as told (`PatchSchedule.set`); its ``log`` explains a
        run."""
        self.schedule.set(**{**self.ddit.schedule, **changes})
        return self.schedule

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class goes by the name of the stock one, which pickle would take for it."""
        state: Any = super().__reduce_ex__(protocol)
        return _blank_model, (type(self).__name__,), *state[2:]

    def adapter_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are not the base's, by name."""
        return {name: p for name, p in self.named_parameters() if ".coarse." in f".{name}"}  # type: ignore[attr-defined]

    @functools.wraps(ModelMixin.save_pretrained)  # pipelines look at the signature for what they may pass
    def save_pretrained(self, save_directory, is_main_process=True, *arguments: Any, **options: Any) -> None:
        """Save the base as stock diffusers would, and the adapter beside it."""
        if is_main_process:
            save_adapter(self, Path(save_directory))  # first: the stock method may push the folder
        self._base_alone = True
        try:
            super().save_pretrained(save_directory, is_main_process, *arguments, **options)  # type: ignore[misc]
        finally:
            self._base_alone = False

    def state_dict(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        state = super().state_dict(*arguments, **options)  # type: ignore[misc]
        if not self._base_alone:
            return state
        return {name: value for name, value in state.items() if ".coarse." not in f".{name}"}

    def _reset_stateful_cache(self, *arguments: Any, **options: Any) -> None:
        self.schedule.reset()
        if hasattr(super(), "_reset_stateful_cache"):  # a DiT has no caches, and pipelines ask all the same
            super()._reset_stateful_cache(*arguments, **options)  # type: ignore[misc]

    def _switched(self, *arguments: Any, **options: Any) -> Any:
        given = dict(zip(self._names, arguments, strict=False)) | options
        schedule = self.schedule
        active = schedule.threshold is not None or schedule.fixed is not None or schedule.always_look
        forced = schedule.forced
        sight = self.look(given) if forced not in (None, 1) or (active and forced is None) else None
        if sight is None:
            if forced not in (None, 1):
                raise ValueError(f"set_patches({forced}): {_NO_RASTER}")
            if active and forced is None:
                warnings.warn(f"a step stays at m = 1: {_NO_RASTER}", stacklevel=3)
            self._turn_to(1)
            return super().forward(**given)  # type: ignore[misc]
        sizes = [forced] if forced is not None else schedule.decide(sight)
        if len(set(sizes)) == 1:
            out = self._at(sizes[0], given, sight)
        else:
            out = self._grouped(sizes, given, sight)
        if forced is None:
            schedule.observe(self.to_latents(out, sight))
        return Transformer2DModelOutput(sample=out) if given.get("return_dict", True) else (out,)

    def _at(self, m: int, given: dict[str, Any], sight: Sight) -> Any:
        self._turn_to(m)
        if m == 1:
            return super().forward(**{**given, "return_dict": False})[0]  # type: ignore[misc]
        layers = self.switching_layers(self.config)  # type: ignore[attr-defined]
        for name in (layers.embed.name, layers.head.name):
            layer: Any = self.get_submodule(name)  # type: ignore[attr-defined]
            if hasattr(layer, "base_layer") and not layer.disable_adapters and not layer.merged:
                raise ValueError(f"the LoRA on {name} is one of fine patches; disable it, or stay at m = 1")
        return self.coarse(m, given, sight)

    def _turn_to(self, m: int) -> None:
        """Caches of tokens do not survive another number of them. To reset them would also end the
        ``cache_context`` that this call runs in."""
        if m != self.switch.m and getattr(self, "is_cache_enabled", False):
            registries = [layer._diffusers_hook for layer in self.modules() if hasattr(layer, "_diffusers_hook")]  # type: ignore[attr-defined]
            hooks = [hook for registry in registries for hook in registry.hooks.values()]
            managers = [value for hook in hooks for value in vars(hook).values() if hasattr(value, "set_context")]
            contexts = [manager._context for manager in managers]
            super()._reset_stateful_cache()  # type: ignore[misc]
            for manager, context in zip(managers, contexts, strict=True):
                manager.set_context(context)
        self.switch.m = m

    def _grouped(self, sizes: list[int], given: dict[str, Any], sight: Sight) -> Any:
        """One call a size, with the samples that want it."""
        batch = len(sizes)
        parts: dict[int, Any] = {}
        where = {m: [i for i, size in enumerate(sizes) if size == m] for m in sorted(set(sizes))}
        for m, rows in where.items():
            chosen = {
                name: value if name in ("img_ids", "txt_ids") else _rows(value, rows, batch)  # those are of all samples
                for name, value in given.items()
            }
            parts[m] = self._at(m, chosen, Sight(sight.latents[rows], sight.time[rows], sight.patch))
        if isinstance(parts[min(parts)], list):
            out: list[Any] = [None] * batch
            for m, rows in where.items():
                for i, sample in zip(rows, parts[m], strict=True):
                    out[i] = sample
            return out
        joined = torch.cat(list(parts.values()))
        order = [i for rows in where.values() for i in rows]
        return joined[torch.tensor(order, device=joined.device).argsort()]

    def _padded(self, sight: Sight, m: int) -> tuple[int, int]:
        """Height and width in latent pixels after padding to whole coarse patches."""
        P = m * sight.patch[1]
        return tuple(-(-size // P) * P for size in sight.latents.shape[-2:])

    def residual(self, z: torch.Tensor, m: int, time: torch.Tensor, side: int) -> torch.Tensor:
        """g(t) (z - B B^+ z): what coarse patches cannot hold is mostly noise, of which a linear guess is known.

        z padded [B, C, ..., H, W]; ``time`` [B], or [B, 1, F, H / p, W / p] where tokens have times of their own.
        """
        key = (m, z.device)
        if key not in self._projectors:
            b = upsampling(side, m)
            self._projectors[key] = (b @ torch.linalg.pinv(b)).float().to(z.device)
        gain = self.noise.gain(time, self.ddit.variance_of(m))
        if gain.ndim > 1:
            gain = gain.repeat_interleave(side, -2).repeat_interleave(side, -1)
        else:
            gain = gain.view(-1, *[1] * (z.ndim - 1))
        return gain * outside(z, self._projectors[key])

    # What a backbone tells. Instances are made by a change of class, which abc does not look at: so these raise.

    @staticmethod
    def switching_layers(c: Any) -> "Layers":
        """The layers that switch, by the config of the stock model."""
        raise NotImplementedError

    def look(self, given: dict[str, Any]) -> Sight | None:
        """What a schedule may see of these arguments; None where they cannot be coarsened."""
        raise NotImplementedError

    def coarse(self, m: int, given: dict[str, Any], sight: Sight) -> Any:
        """The forward at m > 1, as the stock one returns it (without the output class)."""
        raise NotImplementedError

    def to_latents(self, out: Any, sight: Sight) -> torch.Tensor:
        """An output as [B, O, F, H, W]."""
        return out if out.ndim == 5 else out[:, :, None]


_NO_RASTER = (
    "these arguments cannot be coarsened: more than one raster of tokens (reference images, regions, images of several "
    "sizes), or a ControlNet's output for every fine token"
)


def _blank_model(name: str) -> Any:
    cls = BACKBONES[name]
    return cls.__new__(cls)


def _rows(value: Any, rows: list[int], batch: int) -> Any:
    """These samples of an argument that has one entry a sample; others as they are."""
    if isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == batch:
        return value[rows]
    if isinstance(value, list) and len(value) == batch:
        return [value[i] for i in rows]
    return value


class _DiT(PatchSwitching, DiTTransformer2DModel):
    """Class-conditional DiT: a grid [B, C, H, W]; learned sigma channels come after the C of epsilon."""

    @staticmethod
    def switching_layers(c):
        p, channels = c["patch_size"], c["in_channels"]
        out = c.get("out_channels") or channels
        return Layers(
            embed=Patched("pos_embed.proj", Coarse, "chw", {"c": channels, "h": p, "w": p}),
            head=Patched("proj_out_2", Splitting, "hwc", {"c": out, "h": p, "w": p}),
            feed_forward=r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)",
            positions=("pos_embed", _CoarsePositions),
        )

    def look(self, given):
        x = given["hidden_states"]
        timestep = given["timestep"]
        if timestep is None or x.ndim != 4:
            return None
        time = torch.as_tensor(timestep, device=x.device).reshape(-1).expand(len(x))
        return Sight(x[:, :, None], time, (1, self.config.patch_size))

    def coarse(self, m, given, sight):
        x, p = given["hidden_states"], self.config.patch_size
        height, width = self._padded(sight, m)
        padded = pad_to(x, height, width)
        self.switch.grid = (1, height // p, width // p)
        self.switch.whole = (x.shape[-2] // p, x.shape[-1] // p)
        out = super().forward(**{**given, "hidden_states": padded, "return_dict": False})[0]
        if self.ddit.residual:
            channels = x.shape[1]
            added = self.residual(padded, m, sight.time, p).to(out.dtype)
            out = torch.cat([out[:, :channels] + added, out[:, channels:]], dim=1)
        return out[..., : x.shape[-2], : x.shape[-1]]


class _CoarsePositions(Switching):
    """`PatchEmbed` of a DiT whose coarse tokens sit at the centres of the fine ones that they cover."""

    def forward(self, latent: torch.Tensor) -> torch.Tensor:
        m = self.switch.m
        if m == 1:
            return super().forward(latent)  # type: ignore[misc]
        x = self.proj(latent)  # type: ignore[attr-defined]
        height, width = x.shape[-2:]
        half = x.shape[1] // 2
        omega = 10000.0 ** -(torch.arange(half // 2, dtype=torch.float64, device=x.device) / (half / 2))
        scale = self.base_size / self.interpolation_scale  # type: ignore[attr-defined]

        def line(count: int, whole: int) -> torch.Tensor:
            position = centres(count, m, x.device).double() * (scale / whole)
            angle = position[:, None] * omega
            return torch.cat([angle.sin(), angle.cos()], dim=1).float()

        rows = line(height, self.switch.whole[0])[:, None].expand(-1, width, -1)
        columns = line(width, self.switch.whole[1])[None].expand(height, -1, -1)
        position = torch.cat([columns, rows], dim=-1).flatten(0, 1)  # columns first, as in MAE
        return (x.flatten(2).transpose(1, 2) + position).to(x.dtype)


class _Flux(PatchSwitching, FluxTransformer2DModel):
    """FLUX.1: packed tokens [B, N, (c, 2, 2)] with positions of their own; text beside them."""

    @staticmethod
    def switching_layers(c):
        channels = c["in_channels"]
        out = c.get("out_channels") or channels
        return Layers(
            embed=Patched("x_embedder", Merging, "chw", {"c": channels // 4, "h": 2, "w": 2}),
            head=Patched("proj_out", Splitting, "chw", {"c": out // 4, "h": 2, "w": 2}),
            feed_forward=r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)"
            r"|single_transformer_blocks\.\d+\.(proj_mlp|proj_out)",
            text="context_embedder",
        )

    def look(self, given):
        x, ids, timestep = given["hidden_states"], given.get("img_ids"), given.get("timestep")
        controlled = any(given.get(f"controlnet_{kind}_samples") is not None for kind in ("block", "single_block"))
        if ids is None or timestep is None or controlled:
            return None
        ids = (ids[0] if ids.ndim == 3 else ids).float()
        # Only a raster of one image can be coarsened: no reference images, no regions.
        last = ids[-1, 1:]
        raster = (ids[:, 0] == 0).all() & ((ids[:, 1] * (last[1] + 1) + ids[:, 2]).diff() == 1).all()
        height, width, plain = torch.stack([last[0] + 1, last[1] + 1, raster.float()]).tolist()
        height, width = int(height), int(width)
        if not plain or height * width != x.shape[1]:
            return None
        return Sight(self._unpack(x, height, width), timestep.float().reshape(-1).expand(len(x)), (1, 2))

    @staticmethod
    def _unpack(tokens, height, width):
        """[B, h w, (c, 2, 2)] -> [B, c, 1, 2 h, 2 w]."""
        x = tokens.reshape(len(tokens), height, width, -1, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return x.reshape(len(tokens), -1, 1, 2 * height, 2 * width)

    @staticmethod
    def _pack(x):
        batch, channels, _, height, width = x.shape
        x = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        return x.reshape(batch, (height // 2) * (width // 2), -1)

    def coarse(self, m, given, sight):
        z = sight.latents
        height, width = self._padded(sight, m)
        padded = pad_to(z, height, width)
        self.switch.grid = (1, height // 2, width // 2)
        rows, columns = (centres(size // (2 * m), m, z.device) for size in (height, width))
        ids = torch.stack(torch.meshgrid(torch.zeros(1, device=z.device), rows, columns, indexing="ij"), dim=-1)
        changed = {"hidden_states": self._pack(padded), "img_ids": ids.flatten(0, 2), "return_dict": False}
        if given["txt_ids"].ndim == 3:
            changed["txt_ids"] = given["txt_ids"][0]
        tokens = super().forward(**{**given, **changed})[0]
        out = self._unpack(tokens, height // 2, width // 2)
        if self.ddit.residual:
            out = out + self.residual(padded, m, sight.time, 2).to(out.dtype)
        return self._pack(out[..., : z.shape[-2], : z.shape[-1]])

    def to_latents(self, out, sight):
        return self._unpack(out, sight.latents.shape[-2] // 2, sight.latents.shape[-1] // 2)


class _Wan(PatchSwitching, WanTransformer3DModel):
    """Wan 2.1 and 2.2: frames [B, C, F, H, W], of which a model may take more channels than it predicts (image to
    video), and times of its own for every token (2.2, 5B)."""

    @staticmethod
    def switching_layers(c):
        pt, p, _ = c["patch_size"]
        channels = c["in_channels"]
        out = c.get("out_channels") or channels
        return Layers(
            embed=Patched("patch_embedding", Coarse, "cfhw", {"c": channels, "f": pt, "h": p, "w": p}),
            head=Patched("proj_out", Splitting, "fhwc", {"c": out, "f": pt, "h": p, "w": p}),
            feed_forward=r"blocks\.\d+\.ffn\.net\.(0\.proj|2)",
            text="condition_embedder.text_embedder.linear_2",
            positions=("rope", _CoarseRope),
        )

    def look(self, given):
        x, timestep = given["hidden_states"], given["timestep"]
        frames, side, _ = self.config.patch_size
        channels = self.config.out_channels or self.config.in_channels
        time = timestep.float().flatten(1).amax(1) if timestep.ndim == 2 else timestep.float().reshape(-1)
        return Sight(x[:, :channels], (time / self.ddit.num_train_timesteps).expand(len(x)), (frames, side))

    def coarse(self, m, given, sight):
        x, timestep = given["hidden_states"], given["timestep"]
        pt, p, _ = self.config.patch_size
        height, width = self._padded(sight, m)
        padded = pad_to(x, height, width)
        frames = x.shape[2] // pt
        self.switch.grid = (frames, height // p, width // p)
        time = sight.time
        changed = {"hidden_states": padded, "return_dict": False}
        if timestep.ndim == 2:  # a time for every token: those of one frame are alike
            grid = timestep.unflatten(1, (frames, x.shape[-2] // p, x.shape[-1] // p))
            grid = pad_to(grid, height // p, width // p)
            changed["timestep"] = grid[..., ::m, ::m].flatten(1)
            time = (grid / self.ddit.num_train_timesteps)[:, None].repeat_interleave(pt, 2)
        out = super().forward(**{**given, **changed})[0]
        if self.ddit.residual:
            out = out + self.residual(padded[:, : out.shape[1]], m, time, p).to(out.dtype)
        return out[..., : x.shape[-2], : x.shape[-1]]


class _CoarseRope(Switching):
    """`WanRotaryPosEmbed` at the centres of coarse patches."""

    def forward(self, hidden_states: torch.Tensor) -> Any:
        m = self.switch.m
        if m == 1:
            return super().forward(hidden_states)  # type: ignore[misc]
        frames, height, width = self.switch.grid
        device = hidden_states.device
        lines = [torch.arange(frames, device=device).float()]
        lines += [centres(count // m, m, device) for count in (height, width)]
        shape = frames, height // m, width // m
        parts = []
        for axis, (line, dim) in enumerate(zip(lines, (self.t_dim, self.h_dim, self.w_dim), strict=True)):  # type: ignore[attr-defined]
            exact = torch.float32 if device.type == "mps" else torch.float64
            both = get_1d_rotary_pos_embed(dim, line, 10000.0, use_real=True, freqs_dtype=exact)
            view = [1, 1, 1, dim]
            view[axis] = len(line)
            parts.append([values.view(view).expand(*shape, -1) for values in both])
        return tuple(torch.cat(values, dim=-1).reshape(1, -1, 1, sum(v.shape[-1] for v in values))
                     for values in zip(*parts, strict=True))  # fmt: skip


class _ZImage(PatchSwitching, ZImageTransformer2DModel):
    """Z-Image: a list of images [C, F, H, W]; its time is 1 - sigma and it predicts data - noise."""

    @staticmethod
    def switching_layers(c):
        p, pf = c["all_patch_size"][0], c["all_f_patch_size"][0]
        sizes = {"c": c["in_channels"], "f": pf, "h": p, "w": p}
        return Layers(
            embed=Patched(f"all_x_embedder.{p}-{pf}", Coarse, "fhwc", sizes),
            head=Patched(f"all_final_layer.{p}-{pf}.linear", Coarse, "fhwc", sizes),
            feed_forward=r"(layers|noise_refiner)\.\d+\.feed_forward\.w[123]",
            text="cap_embedder.1",
            positions=("rope_embedder", _FractionalRope),
        )

    def look(self, given):
        x = given["x"]
        if isinstance(x[0], list) or len({image.shape for image in x}) > 1:
            return None
        if given.get("controlnet_block_samples") is not None:
            return None
        p, pf = self.config.all_patch_size[0], self.config.all_f_patch_size[0]
        if given.get("patch_size", 2) != p or given.get("f_patch_size", 1) != pf:
            return None
        time = 1 - torch.as_tensor(given["t"], device=x[0].device).float().reshape(-1)
        return Sight(torch.stack(list(x)), time.expand(len(x)), (pf, p))

    def coarse(self, m, given, sight):
        padded = pad_to(sight.latents, *self._padded(sight, m))
        out = super().forward(**{**given, "x": list(padded.unbind()), "return_dict": False})[0]
        height, width = sight.latents.shape[-2:]
        if self.ddit.residual:
            added = self.residual(padded, m, sight.time, sight.patch[1])
            out = [image + part.to(image.dtype) for image, part in zip(out, added, strict=True)]
        return [image[..., :height, :width] for image in out]

    def to_latents(self, out, sight):
        return torch.stack(list(out))

    def patchify_and_embed(self, all_image, all_cap_feats, patch_size, f_patch_size):
        m = self.switch.m
        made = super().patchify_and_embed(all_image, all_cap_feats, patch_size * m, f_patch_size)
        if m == 1:
            return made
        ids = []
        for places, padding in zip(made[3], made[5], strict=True):
            centred = places.float()
            centred[:, 1:] = torch.where(padding[:, None], 0.0, centred[:, 1:] * m + (m - 1) / 2)
            ids.append(centred)
        return *made[:3], ids, *made[4:]

    def unpatchify(self, x, size, patch_size, f_patch_size, x_pos_offsets=None):
        return super().unpatchify(x, size, patch_size * self.switch.m, f_patch_size, x_pos_offsets)


class _FractionalRope(Switching):
    """`RopeEmbedder` of Z-Image that takes positions between its table's."""

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        if not ids.is_floating_point():
            return super().__call__(ids)  # type: ignore[misc]
        parts = []
        for axis, dim in enumerate(self.axes_dims):  # type: ignore[attr-defined]
            exponent = torch.arange(0, dim, 2, dtype=torch.float64, device=ids.device) / dim
            angle = torch.outer(ids[:, axis].double(), self.theta**-exponent).float()  # type: ignore[attr-defined]
            parts.append(torch.polar(torch.ones_like(angle), angle))
        return torch.cat(parts, dim=-1)


@dataclass(frozen=True)
class Patched:
    """A layer that sees patches: its ``name``, how it switches, and what lies in a token, c, f, h, w in this order."""

    name: str
    kind: type[Coarse]
    axes: str
    sizes: dict[str, int]

    def features(self, m: int) -> int:
        return math.prod(self.sizes.values()) * m * m


@dataclass(frozen=True)
class Layers:
    """The layers of a backbone that switch: embedding and head, the feed-forward layers that get a switch-LoRA (a
    pattern), the embedding of text, and what gives positions."""

    embed: Patched
    head: Patched
    feed_forward: str
    text: str | None = None
    positions: tuple[str, type] | None = None


BACKBONES: dict[str, type[PatchSwitching]] = {}
for _class in (_DiT, _Flux, _Wan, _ZImage):
    _stock = _class.__mro__[2]
    BACKBONES[_stock.__name__] = _class
    _class._names = list(inspect.signature(_stock.forward).parameters)[1:]

    def _forward(self: Any, *arguments: Any, **options: Any) -> Any:
        return self._switched(*arguments, **options)

    _class.forward = functools.wraps(_stock.forward)(_forward)
    # Under the stock class's name: what is saved says which class loads it.
    _class.__name__, _class.__qualname__, _class.__module__ = _stock.__name__, _stock.__qualname__, _stock.__module__


# ---------------------------------------------------------------------------------------------------------------------
# Making, saving and applying adapters


def initial_tensors(
    config: DDiTConfig,
    base: Any,
    shapes: dict[str, tuple[int, ...]],
    read: Callable[[str], torch.Tensor],
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """The tensors of a new adapter, fp32, by their names in the model.

    Embedding and head start from those of the base, so that a coarse token of an enlarged image is the fine token of
    the image (FlexiViT's PI-resize) and a head's answer is enlarged bilinearly; switch-LoRAs and vectors start at zero.

    Args:
        base: config of the base model.
        shapes: of its tensors; those of embedding and head alone are asked of ``read``.
    """
    layers = BACKBONES[config.base_class].switching_layers(base)
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, torch.Tensor] = {}
    p = layers.embed.sizes["h"]
    weights = {
        name: read(name).double()
        for layer in (layers.embed.name, layers.head.name)
        for name in (f"{layer}.weight", f"{layer}.bias")
        if name in shapes
    }
    for m in config.patches:
        enlarge = upsampling(p, m)
        shrink = torch.linalg.pinv(enlarge)
        name, axes, sizes = layers.embed.name, layers.embed.axes, layers.embed.sizes
        weight = weights[f"{name}.weight"]
        columns = resize_features(weight.flatten(1).T.contiguous(), shrink.T, axes, sizes)
        shape = (len(weight), -1) if weight.ndim == 2 else (*weight.shape[:-2], m * p, m * p)  # a convolution
        made[f"{name}.coarse.{m}.weight"] = columns.T.reshape(shape)
        if f"{name}.bias" in weights:
            made[f"{name}.coarse.{m}.bias"] = weights[f"{name}.bias"]
        name, axes, sizes = layers.head.name, layers.head.axes, layers.head.sizes
        for part in ("weight", "bias"):
            if f"{name}.{part}" in weights:
                made[f"{name}.coarse.{m}.{part}"] = resize_features(weights[f"{name}.{part}"], enlarge, axes, sizes)
        if layers.text:
            made[f"{layers.text}.coarse.{m}.vector"] = torch.zeros(shapes[f"{layers.text}.weight"][0])
        for layer in _feed_forward(layers, shapes) if config.rank else ():
            outputs, inputs = shapes[f"{layer}.weight"]
            bound = inputs**-0.5
            down = torch.rand(config.rank, inputs, generator=generator) * 2 * bound - bound
            made[f"{layer}.coarse.{m}.down.weight"] = down
            made[f"{layer}.coarse.{m}.up.weight"] = torch.zeros(outputs, config.rank)
    return {name: tensor.float().contiguous() for name, tensor in made.items()}


def _feed_forward(layers: Layers, names: Any) -> list[str]:
    """Names of the feed-forward layers that get a switch-LoRA, among names of tensors."""
    pattern = re.compile(rf"({layers.feed_forward})\.weight")
    return [name.removesuffix(".weight") for name in names if pattern.fullmatch(name)]


def _layer(model: nn.Module, name: str) -> nn.Module:
    """A layer by its name in the stock model, below what peft has put around it."""
    layer = model
    for part in name.split("."):
        layer = getattr(layer, "base_layer", layer)
        layer = layer[int(part)] if part.isdigit() and isinstance(layer, nn.ModuleList | nn.Sequential) else (
            layer[part] if isinstance(layer, nn.ModuleDict) else getattr(layer, part)
        )  # fmt: skip
    return getattr(layer, "base_layer", layer)


def _switch(layer: Any, kind: type, switch: Switch) -> None:
    stock: type = type(layer)
    layer.__class__ = _switching_class(kind, stock)
    layer.switch = switch


def attach(model: Any, config: DDiTConfig, tensors: dict[str, torch.Tensor] | None = None) -> Any:
    """Turn a stock transformer into one that can take coarse patches, in place; returns it.

    ``tensors``: of the adapter; without them it starts from the base (`initial_tensors`). What is new comes in the
    dtype and on the device of the layer that it belongs to, frozen.

    Raises:
        ValueError: another kind of model, tensors that do not fit, or an adapter that is there already.
    """
    _attaching(model, config, tensors)()
    return model


def _attaching(model: Any, config: DDiTConfig, tensors: dict[str, torch.Tensor] | None) -> Callable[[], None]:
    """What `attach` does, up to the first change of the model; what is returned makes the changes."""
    if isinstance(model, PatchSwitching):
        raise ValueError("the model has an adapter already; load the base model anew")
    cls = BACKBONES[config.base_class]
    stock: Any = cls.__mro__[2]
    if type(model) is not stock:
        raise ValueError(f"the adapter is for {config.base_class}, and the model is a {type(model).__name__}")
    layers = cls.switching_layers(model.config)
    state = {name.replace(".base_layer.", "."): value for name, value in model.state_dict().items()}
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    if tensors is None:
        tensors = initial_tensors(config, model.config, shapes, lambda name: state[name].detach().cpu())
    left = dict(tensors)
    switch = Switch()
    kinds = {layers.embed.name: layers.embed.kind, layers.head.name: layers.head.kind}
    if layers.text:
        kinds[layers.text] = SizedText
    if config.rank:
        kinds |= dict.fromkeys(_feed_forward(layers, shapes), SwitchLoRA)
    ready = []
    _check_unhooked(model)
    for name, kind in kinds.items():
        layer: Any = _layer(model, name)
        weight = layer.weight
        dtype = weight.dtype if weight.dtype.is_floating_point and weight.dtype.itemsize > 1 else torch.bfloat16
        coarse = nn.ModuleDict()
        for m in config.patches:
            made = _coarse_layer(layer, kind, layers, name, m, config.rank)
            own = {key: left.pop(f"{name}.coarse.{m}.{key}", None) for key in made.state_dict()}
            for key, value in made.state_dict().items():
                if own[key] is None or own[key].shape != value.shape:
                    found = "missing" if own[key] is None else f"of shape {tuple(own[key].shape)}"
                    raise ValueError(f"the adapter does not fit the model: {name}.coarse.{m}.{key} is {found}")
            made.load_state_dict({key: value.clone() for key, value in own.items()}, assign=True)
            coarse[str(m)] = made.to(weight.device, dtype).requires_grad_(False)
        _check_unhooked(layer)
        ready.append((layer, kind, coarse))
    if left:
        raise ValueError(f"the adapter does not fit the model: it has {min(left)}, which the model has no place for")

    def change() -> None:
        for layer, kind, coarse in ready:
            _switch(layer, kind, switch)
            layer.coarse = coarse
        for patched in (layers.embed, layers.head):
            layer = _layer(model, patched.name)
            layer.axes, layer.sizes = patched.axes, patched.sizes
        if layers.positions:
            _switch(_layer(model, layers.positions[0]), layers.positions[1], switch)
        model.__class__ = cls
        model.switch, model.ddit, model.noise, model._projectors = switch, config, Noise(config), {}
        model.schedule = PatchSchedule(model.noise, config.patches, **config.schedule)

    return change


def _check_unhooked(module: Any) -> None:
    """Hooks of accelerate and diffusers keep the forward of the class that they found."""
    if "forward" in vars(module):
        raise ValueError("the model has hooks already (offloading, a cache); put the adapter on first, then those")


def _coarse_layer(layer: Any, kind: type, layers: Layers, name: str, m: int, rank: int) -> nn.Module:
    """The layer for m below ``layer``, without values."""
    with torch.device("meta"):
        if kind is SizedText:
            return PatchSizeVector(layer.out_features)
        if kind is SwitchLoRA:
            return LowRank(layer.in_features, layer.out_features, rank)
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            kernel = (*layer.kernel_size[:-2], *(side * m for side in layer.kernel_size[-2:]))
            bias = layer.bias is not None
            return type(layer)(layer.in_channels, layer.out_channels, kernel, stride=kernel, bias=bias)
        if name == layers.embed.name:
            return nn.Linear(layers.embed.features(m), layer.out_features, bias=layer.bias is not None)
        return nn.Linear(layer.in_features, layers.head.features(m), bias=layer.bias is not None)


def save_adapter(model: Any, folder: Path) -> None:
    """Write ``ddit.json``, ``ddit.safetensors`` and this file into ``folder``."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name.replace(".base_layer.", "."): value.detach().cpu().contiguous()
        for name, value in model.adapter_parameters().items()
    }
    write_adapter(folder, model.ddit, tensors)


def write_adapter(
    folder: Path, config: DDiTConfig, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None
) -> None:
    """Write the files of an adapter; ``metadata`` goes into the header of its weights."""
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", **(metadata or {})})
    (folder / CONFIG).write_text(json.dumps(asdict(config), indent=2) + "\n")
    (folder / "ddit.py").write_bytes(_CODE)


def adapter_folders(folder: str | Path) -> list[Path]:
    """Where the adapters lie in a folder, that of the first transformer first (`PLACES`); empty where there is none."""
    top = Path(folder)
    first = [path for path in (top, top / PLACES[0]) if (path / CONFIG).is_file()]
    return first[:1] + [path for path in (top / PLACES[1],) if (path / CONFIG).is_file()]


def load_adapters(folder: str | Path) -> list[tuple[DDiTConfig, dict[str, torch.Tensor]]]:
    """Config and tensors of every adapter in a folder; raises ValueError where there is none, or its files are no
    such."""
    folders = adapter_folders(folder)
    if not folders:
        raise ValueError(f"{folder} is no folder of an adapter: it has no {CONFIG} and {WEIGHTS}")
    found = [_load_adapter(path) for path in folders]
    if len({config.component for config, _ in found}) < len(found):
        raise ValueError(f"{folder} holds two adapters for the same {found[0][0].component}")
    return found


def load_adapter(folder: str | Path) -> tuple[DDiTConfig, dict[str, torch.Tensor]]:
    """The first of `load_adapters`."""
    return load_adapters(folder)[0]


def _load_adapter(path: Path) -> tuple[DDiTConfig, dict[str, torch.Tensor]]:
    if not (path / WEIGHTS).is_file():
        raise ValueError(f"{path} is no folder of an adapter: it has no {CONFIG} and {WEIGHTS}")
    content = json.loads((path / CONFIG).read_text())
    known = inspect.signature(DDiTConfig).parameters
    if not isinstance(content, dict) or set(content) - set(known):
        raise ValueError(f"{path / CONFIG} holds what this version does not know; update it")
    try:
        return DDiTConfig(**content), load_file(path / WEIGHTS)
    except (TypeError, SafetensorError) as e:
        raise ValueError(f"{path} holds a damaged adapter: {e}") from e


def apply(pipeline: Any, folder: str | Path, *, revision: str | None = None, **schedule: Any) -> Any:
    """Put the adapters of a folder on a stock pipeline (or the only one on a transformer), in place; returns the
    transformer, of two the first (`switching` has both). Where one does not fit, the pipeline stays as it was.

    Two transformers share one schedule: its history goes on when the pipeline turns to the other, and a fixed schedule
    counts the steps of the whole run.

    Args:
        folder: the adapter's, or an id on the Hub.
        revision: branch, tag or commit of an id.
        schedule: ``threshold``, ``fixed``, ``percentile``, ``order`` or ``policy`` (`PatchSchedule.set`) other than the
            adapter's own; needed where the adapters of two transformers differ in it.

    Raises:
        ValueError: no adapter there, one of another model, or two that cannot share a schedule.
    """
    if not Path(folder).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", str(folder)):
        from huggingface_hub import snapshot_download

        places = ["", *(f"{place}/" for place in PLACES)]
        patterns = [f"{at}{name}" for at in places for name in (CONFIG, WEIGHTS)]
        folder = snapshot_download(str(folder), revision=revision, allow_patterns=patterns)
    elif revision is not None:
        raise ValueError(f"{folder} is no id of the Hub, so it has no revisions; leave out revision")
    return put_on(pipeline, load_adapters(folder), **schedule)


def put_on(pipeline: Any, adapters: list[tuple[DDiTConfig, dict[str, torch.Tensor]]], **schedule: Any) -> Any:
    """`apply` of adapters that were loaded (`load_adapters`)."""
    alone = isinstance(pipeline, nn.Module)
    if alone and len(adapters) > 1:
        raise ValueError(f"there are adapters for {' and '.join(COMPONENTS)}; give the pipeline, or the folder of one")
    models = []
    for config, _ in adapters:
        model = pipeline if alone else getattr(pipeline, config.component, None)
        if model is None:
            raise ValueError(f"the pipeline has no {config.component}, for which the adapter is")
        PatchSchedule(Noise(config), config.patches, **config.schedule | schedule)  # raises where one is wrong
        models.append(model)
    if len(set(models)) < len(models):
        raise ValueError(f"{' and '.join(COMPONENTS)} of the pipeline are one model, which takes one adapter")
    changes = [_attaching(model, *adapter) for model, adapter in zip(models, adapters, strict=True)]
    beside = [] if alone else switching(pipeline)
    _check_shared([model.ddit for model in beside] + [config for config, _ in adapters], schedule)
    for model, change in zip(models, changes, strict=True):  # nothing was changed before, and nothing fails from here
        change()
        if not alone:
            follow(model, pipeline)
    if schedule or not beside:
        models[0].set_schedule(**schedule)
    return models[0]


def _check_shared(configs: list[DDiTConfig], schedule: dict[str, Any]) -> None:
    """Raise ValueError where adapters cannot share a schedule with these changes."""
    first, *others = configs
    for other in others:
        if other.patches != first.patches:
            raise ValueError("the adapters of the two transformers have other patches; make them with the same")
        differ = [name for name, value in first.schedule.items() if other.schedule[name] != value]
        if not schedule.get("fixed") and (left := [name for name in differ if name not in schedule]):
            values = f"{first.schedule[left[0]]} and {other.schedule[left[0]]}"
            raise ValueError(f"the adapters of the two transformers share a schedule, and have {left[0]} {values}; "
                             f"give one {left[0]} for both")  # fmt: skip


def switching(pipeline: Any) -> list[Any]:
    """The transformers of a pipeline that have an adapter, the one of high noise first."""
    models = (getattr(pipeline, name, None) for name in COMPONENTS)
    return [model for model in models if isinstance(model, PatchSwitching)]


def follow(model: Any, pipeline: Any) -> None:
    """Let the schedule of ``model`` know the times and steps of the pipeline's scheduler, and be the same as that of
    its other transformer; warns of samplers whose latents never calm down.

    Raises:
        ValueError: the other transformer has an adapter with other patches.
    """
    scheduler = pipeline.scheduler
    name = type(scheduler).__name__
    noisy = any(word in name for word in ("Ancestral", "Heun", "DDPM", "SDE", "KDPM2")) or any(
        getattr(scheduler.config, key, None) for key in ("stochastic_sampling", "eta")
    )
    noisy = noisy or str(getattr(scheduler.config, "algorithm_type", "")).startswith("sde")
    others = [other for other in switching(pipeline) if other is not model]
    model.sampler_note = None
    if noisy:
        model.sampler_note = (
            f"{name} adds noise or evaluates twice, so that the schedule finds few coarse steps or none; take a "
            "deterministic sampler of one evaluation a step, or a fixed schedule"
        )
        if not others:
            warnings.warn(model.sampler_note, stacklevel=4)
    for other in others:
        if other.ddit.patches != model.ddit.patches:
            raise ValueError(f"the adapters of the two transformers have other patches: {other.ddit.patches} and "
                             f"{model.ddit.patches}")  # fmt: skip
        model.schedule = other.schedule

    def times() -> torch.Tensor:
        values = torch.as_tensor(pipeline.scheduler.timesteps, device="cpu").float()
        if model.ddit.prediction == "epsilon":
            return values
        sigmas = getattr(pipeline.scheduler, "sigmas", None)
        if sigmas is not None and len(sigmas) >= len(values):  # timesteps of UniPC are whole numbers
            return torch.as_tensor(sigmas, device="cpu").float()[: len(values)]
        return values / scheduler.config.num_train_timesteps

    model.schedule.exact_times = times
