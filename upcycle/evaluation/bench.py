"""How fast a student is beside its teacher: whole sampling runs, interleaved in one process.

A student is a `ChunkedDiT`, or a DiT with an adapter for coarser patches (`upcycle.models.ddit`).
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch.utils.flop_counter import FlopCounterMode

from upcycle.evaluation.flops import (
    chunked_dit_flops,
    ddit_flops,
    dit_flops,
    embedder_flops,
    gate_share,
    grid_tokens,
)
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.models.ddit import PatchSwitching

PARTS = ("encode", "route", "chunk", "embed_tokens", "run_blocks", "head", "dechunk", "decode")
"""Methods of a lean `ChunkedDiT` that are timed one by one; what is left is the embedders."""


@dataclass(frozen=True)
class Settings:
    """How to measure.

    ``batch`` images at a time, ``steps`` DDIM steps a run, ``repeats`` rounds of runs after one that warms up.
    ``tail_drops``: the student's ρ; ``uncond_tail_drop`` that of the unconditional half under Lite-CFG; ``tokens``:
    fixed budgets. ``schedule``: factors of a DiT with an adapter for shares of the steps, in order.
    """

    batch: int = 1
    steps: int = 4
    repeats: int = 3
    tail_drops: tuple[float, ...] = (0.0, 0.3, 0.6)
    uncond_tail_drop: float = 0.9
    tokens: tuple[int, ...] = ()
    schedule: tuple[tuple[int, float], ...] = ()


@dataclass
class Variant:
    """A model and how it is called; ``guided`` ones get each image twice, with its class and with the null class.

    A DiT with an adapter runs at the factor ``patches``, or takes turns as its ``schedule`` says.
    """

    name: str
    model: torch.nn.Module
    guided: bool = False
    tail_drop: float = 0.0
    uncond_tail_drop: float | None = None
    tokens: int | None = None
    compiled: bool = False
    patches: int = 1
    schedule: tuple[tuple[int, float], ...] = ()
    seconds: list[float] = field(default_factory=list)
    kept: list[torch.Tensor] = field(default_factory=list)
    shares: list[torch.Tensor] = field(default_factory=list)
    """Of the blocks' FLOPs, what DyDiT's gates left in each call."""
    on_heads: float = 1.0
    """Share of the attention heads that they left on in the last call."""

    @property
    def student(self) -> bool:
        return self.switches or isinstance(self.model, ChunkedDiT)

    @property
    def switches(self) -> bool:
        """Whether it has an adapter."""
        return isinstance(self.model, PatchSwitching)

    def begin(self, steps: int) -> None:
        """Before a run of ``steps`` calls."""
        self.kept.clear()
        self.shares.clear()
        if self.switches:
            self.model.set_patches(None if self.schedule else self.patches)
            self.model.set_schedule(fixed=[*self.schedule] or None, steps=steps)

    def call(self, x: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The model's whole output; remembers the tokens that were kept."""
        if self.switches:
            out = self.model(x, timestep=timestep, class_labels=labels).sample
            self.kept.append(torch.full((len(x),), grid_tokens(self.model.config, self.model.switch.m)))
            return out
        if not isinstance(self.model, ChunkedDiT):
            return self.model(x, timestep, labels).sample
        self.model.set_tail_drop(self.tail_drop)
        self.model.set_lite_cfg(self.uncond_tail_drop)
        self.model.set_tokens(self.tokens)
        out = self._forward(x, timestep, labels)
        self.kept.append(out.routing.mask.sum(1))
        self.shares.append(gate_share(self.model.config, out.gates, self.kept[-1]))
        self.on_heads = 1.0 if out.gates is None else out.gates.heads.mean().item()
        return out.sample

    @functools.cached_property
    def _forward(self) -> Callable[..., Any]:
        """Shapes are static with a fixed budget, so that the whole forward is one graph."""
        return torch.compile(self.model, fullgraph=True) if self.compiled and self.tokens else self.model


def variants_of(
    teacher: DiTTransformer2DModel, student: Any, settings: Settings, *, compiled: bool = False
) -> list[Variant]:
    """Teacher and student at every ρ and fixed budget, then both under guidance, the student with Lite-CFG too.

    A DiT with an adapter: at every factor and under its schedule, without guidance and with it.
    """
    if isinstance(student, PatchSwitching):
        both = []
        for guided in (False, True):
            ending = ", guided" if guided else ""
            both.append(Variant(f"teacher{ending}", teacher, guided))
            both += [Variant(f"student, x{m}{ending}", student, guided, patches=m) for m in (1, *student.ddit.patches)]
            if settings.schedule:
                both.append(Variant(f"student, schedule{ending}", student, guided, schedule=settings.schedule))
        return both
    plain = [Variant(f"student, ρ={rho:g}", student, tail_drop=rho) for rho in settings.tail_drops]
    fixed = [Variant(f"student, {n} tokens", student, tokens=n, compiled=compiled) for n in settings.tokens]
    lite = f"student, guided, Lite-CFG {settings.uncond_tail_drop:g}"
    return [
        Variant("teacher", teacher),
        *plain,
        *fixed,
        Variant("teacher, guided", teacher, guided=True),
        Variant("student, guided", student, guided=True),
        Variant(lite, student, guided=True, uncond_tail_drop=settings.uncond_tail_drop),
    ]


@torch.inference_mode()
def bench(
    teacher: DiTTransformer2DModel,
    student: Any,
    settings: Settings,
    *,
    compiled: bool = False,
    step: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Measure; both models lie on one device in one dtype. ``step`` is called after every run. ``student``: a
    `ChunkedDiT`, or a stock DiT with an adapter.

    ``compiled``: compile the whole forward of fixed budgets.

    Returns:
        ``variants``: name -> ``ms_per_forward`` (a call of the batch; median over the rounds of the mean over a run),
        ``images_per_second`` of such a run (without a VAE), ``flops_per_image``, ``tokens``, ``peak_bytes`` of a call
        beyond the weights, and beside its teacher (the guided one for guided ones) ``times_teacher``,
        ``flops_times_teacher`` and ``realised_share`` = measured speed-up / speed-up in FLOPs. ``parts``: by ρ, the
        seconds' share of each part of a lean student. ``flops_cross_check``: ours and torch's counter's, attention
        aside where that does not see it.
    """
    device, dtype = student.device, student.dtype
    variants = variants_of(teacher, student, settings, compiled=compiled)
    for round_ in range(settings.repeats + 1):
        for variant in variants:
            seconds = _run(variant, settings, device, dtype)
            if round_:
                variant.seconds.append(seconds)
            step()
    results = {variant.name: _result(variant, settings, device, dtype) for variant in variants}
    for variant in variants:
        own, base = results[variant.name], results["teacher, guided" if variant.guided else "teacher"]
        beside = next(v for v in variants if v.guided == variant.guided and not v.student)
        # By rounds, because a machine's speed changes from one to the next.
        own["times_teacher"] = statistics.median(a / b for a, b in zip(variant.seconds, beside.seconds, strict=True))
        own["flops_times_teacher"] = own["flops_per_image"] / base["flops_per_image"]
        own["realised_share"] = own["flops_times_teacher"] / own["times_teacher"]
    parts = {}
    if isinstance(student, ChunkedDiT) and student.config.scaffold == "lean":
        plain = [v for v in variants if v.student and not v.guided and v.tokens is None]
        for variant in plain:
            by_part = seconds_by_part(variant, settings, device, dtype)
            whole = sum(by_part.values())
            parts[f"{variant.tail_drop:g}"] = {name: value / whole for name, value in by_part.items()}
    checked = max((v for v in variants if not v.guided and not v.schedule), key=lambda v: (v.student, v.patches))
    check = _cross_check(checked, device, dtype)
    if isinstance(student, ChunkedDiT):
        student.set_tokens(None)
    else:
        student.set_patches(None)
        student.set_schedule()
    return {"variants": results, "parts": parts, "flops_cross_check": check}


def _inputs(
    variant: Variant, batch: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise [batch, C, H, W] from a fixed seed, and labels, twice with the null class where guided."""
    c = variant.model.config
    classes = c["num_classes"] if "num_classes" in c else c["num_embeds_ada_norm"]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, c.in_channels, c.sample_size, c.sample_size, generator=generator)
    labels = torch.arange(batch) * 7 % classes
    if variant.guided:
        labels = torch.cat([labels, torch.full((batch,), classes)])
    return x.to(device, dtype), labels.to(device)


def _flops(variant: Variant, tokens: float, share: float = 1.0) -> float:
    """One forward of one sample that kept so many, with this share of its blocks' FLOPs."""
    c = variant.model.config
    if isinstance(variant.model, ChunkedDiT):
        return sum(chunked_dit_flops(c, tokens, share).values())
    if variant.switches:
        sizes = [m for m, _ in variant.schedule] or [variant.patches]
        m = next(m for m in sizes if grid_tokens(c, m) == tokens)
        return ddit_flops(c, m, variant.model.ddit)
    return dit_flops(c)


def _run(variant: Variant, settings: Settings, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of a sampling run."""
    x, labels = _inputs(variant, settings.batch, device, dtype)
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(settings.steps)
    variant.begin(settings.steps)
    _wait(device)
    start = time.perf_counter()
    for t in scheduler.timesteps.tolist():
        both = torch.cat([x, x]) if variant.guided else x
        out = variant.call(both, torch.full((len(both),), t, device=device), labels)[:, : x.shape[1]]
        if variant.guided:
            conditional, unconditional = out.chunk(2)
            out = unconditional + 4 * (conditional - unconditional)
        x = scheduler.step(out, t, x).prev_sample
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _result(variant: Variant, settings: Settings, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    seconds = statistics.median(variant.seconds)
    copies = 2 if variant.guided else 1
    c = variant.model.config
    if variant.student:
        kept = torch.stack(variant.kept).flatten().tolist()
        shares = torch.stack(variant.shares).flatten().tolist() if variant.shares else [1.0] * len(kept)
        forward = statistics.mean(_flops(variant, n, share) for n, share in zip(kept, shares, strict=True))
        tokens = statistics.mean(kept)
    else:
        forward = _flops(variant, 0)
        tokens = grid_tokens(c, 1)
    return {
        "ms_per_forward": 1000 * seconds / settings.steps,
        "images_per_second": settings.batch / seconds,
        "flops_per_image": copies * settings.steps * forward,
        "tokens": tokens,
        "peak_bytes": peak_bytes(variant, settings, device, dtype),
    }


def _once(variant: Variant, settings: Settings, device: torch.device, dtype: torch.dtype) -> None:
    x, labels = _inputs(variant, settings.batch, device, dtype)
    x = torch.cat([x, x]) if variant.guided else x
    variant.begin(1)
    if variant.schedule:  # the largest of its calls
        variant.model.set_patches(min(m for m, _ in variant.schedule))
    variant.call(x, torch.full((len(x),), 500, device=device), labels)


def peak_bytes(variant: Variant, settings: Settings, device: torch.device, dtype: torch.dtype) -> int | None:
    """Peak bytes of a call beyond the weights; None where the device does not tell."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        _once(variant, settings, device, dtype)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        _once(variant, settings, device, dtype)
    now = peak = 0
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def seconds_by_part(variant: Variant, settings: Settings, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Seconds of a run by part of a lean student, and of the rest; the parts wait for each other."""
    seconds = dict.fromkeys(PARTS, 0.0)
    with _timed(variant.model, seconds, device):
        whole = _run(variant, settings, device, dtype)
    return {**seconds, "rest": whole - sum(seconds.values())}


@contextmanager
def _timed(model: torch.nn.Module, seconds: dict[str, float], device: torch.device) -> Iterator[None]:
    before = {name: model.__dict__.get(name) for name in seconds}

    def timer(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:
            _wait(device)
            start = time.perf_counter()
            out = method(*arguments)
            _wait(device)
            seconds[name] += time.perf_counter() - start
            return out

        return timed

    for name in seconds:
        setattr(model, name, timer(name, getattr(model, name)))
    try:
        yield
    finally:
        for name, method in before.items():
            if method is None:
                delattr(model, name)
            else:
                setattr(model, name, method)


def _cross_check(variant: Variant, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """One forward of one sample, attention left out of both where torch's counter does not see it."""
    c = variant.model.config
    with FlopCounterMode(display=False) as counter:
        _once(variant, Settings(batch=1), device, dtype)
    tokens = int(variant.kept[-1][0])
    share = variant.shares[-1][0].item() if variant.shares else 1.0
    ours = _flops(variant, tokens, share)
    if variant.switches:  # stock blocks and the head embed the timestep each for itself; the papers count it once
        ours += c.num_layers * embedder_flops(c.num_attention_heads * c.attention_head_dim)
    seen = counter.get_flop_counts()["Global"]
    if not any("attention" in str(op) for op in seen):
        heads = c.num_attention_heads * variant.on_heads
        ours -= c.num_layers * heads * tokens**2 * (4 * c.attention_head_dim + 3)
    return {"ours": ours, "torch": float(counter.get_total_flops())}
