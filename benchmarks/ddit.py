"""What coarser patches gain: steps and whole runs at m = 1, 2, 4, what scheduler and switches cost, a cache on top.

    python benchmarks/ddit.py [--models flux,wan,z-image,dit-xl] [--depth 1] [--device cuda] [--dtype bf16] [--json]
    python benchmarks/ddit.py --small --json             # everything tiny: whether it runs, no figures

Random weights, true width, heads and numbers of tokens, but few blocks: a unit of ``--depth`` is one double and two
single blocks of FLUX.1 (its 19 and 38 are 19 units), two of Wan 2.1 1.3B (of 30), two of Z-Image (of 30; and one
instead of two of each of its refiners), four of DiT-XL/2 (of 28). A short model has more embedding and head beside its
blocks than a deep one, so that these figures are those of the depth stated and of no other. FLUX.1 and Z-Image draw
1024 px, Wan 81 frames of 480 x 832 (``--frames``), DiT-XL/2 512 px. One image, no guidance, no VAE, rank 32.

- a step: ms of a forward, interleaved, medians; FLOPs of torch's counter; ``realised`` = measured speed-up / speed-up
  in FLOPs. ``stock`` is the model before the adapter, with the same weights.
- a run: whole deterministic runs of ``--steps`` steps under fixed schedules, which the latents do not see.
- the scheduler: `look`, `decide` and `observe` of a step that looks at the deviations (threshold 0), each waited for,
  and what a run with threshold 0 takes longer than one without. The switch: what a run that alternates 1 and 2 takes
  longer than the same steps of two runs that stay.
- a cache on top: the last output is used again while the latents have changed by less than a limit (`OutputCache`), one
  and a half times the median change, so that about every second step is left out.
"""

import argparse
import copy
import gc
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from torch.utils.flop_counter import FlopCounterMode

from upcycle.evaluation.speed import machine
from upcycle.models import ddit

PATCHES = [2, 4]
SCHEDULES = {
    "76 % at 2": [(1, 0.12), (2, 0.76), (1, 0.12)],  # the paper's 2.18 x on FLUX takes that many; its start is fine
    "4:0.3,2:0.5,1:0.2": [(4, 0.3), (2, 0.5), (1, 0.2)],
}


@dataclass
class Case:
    """A model to measure: how to make it, the latents that it steps through, how to call it at a time (a number from 1
    to 0; 999 to 0 for epsilon), and what its size is in words."""

    stock: type
    config: dict[str, Any]
    latents: tuple[int, ...]
    tokens: int
    call: Callable[[torch.nn.Module, torch.Tensor, float], torch.Tensor]
    depth: str
    prediction: str = "flow"
    words: dict[str, torch.Tensor] = field(default_factory=dict)


def flux(options: argparse.Namespace) -> Case:
    side, text, depth = (16, 8, 1) if options.small else (64, 512, options.depth)
    heads, dim, axes = (2, 16, (4, 6, 6)) if options.small else (24, 128, (16, 56, 56))
    joint, pooled = (16, 16) if options.small else (4096, 768)
    config = {"in_channels": 64, "num_layers": depth, "num_single_layers": 2 * depth, "num_attention_heads": heads,
              "attention_head_dim": dim, "joint_attention_dim": joint, "pooled_projection_dim": pooled,
              "guidance_embeds": True, "axes_dims_rope": axes}  # fmt: skip
    lines = (torch.arange(count, dtype=torch.float32) for count in (1, side, side))
    ids = torch.stack(torch.meshgrid(*lines, indexing="ij"), dim=-1).flatten(0, 2)
    words = {"encoder_hidden_states": torch.randn(1, text, joint), "pooled_projections": torch.randn(1, pooled),
             "guidance": torch.tensor([3.5]), "img_ids": ids, "txt_ids": torch.zeros(text, 3)}  # fmt: skip

    def call(model: Any, z: torch.Tensor, t: float) -> torch.Tensor:
        given = {**case.words, "img_ids": case.words["img_ids"].float()}
        return model(hidden_states=z, timestep=torch.tensor([t], device=z.device), **given, return_dict=False)[0]

    blocks = f"{depth} double and {2 * depth} single blocks"
    case = Case(FluxTransformer2DModel, config, (1, side**2, 64), side**2, call, blocks, words=words)
    return case


def wan(options: argparse.Namespace) -> Case:
    heads, dim, ffn, text, channels = (2, 16, 64, 16, 4) if options.small else (12, 128, 8960, 4096, 16)
    frames, height, width = (2, 16, 16) if options.small else ((options.frames - 1) // 4 + 1, 60, 104)
    layers = 2 * (1 if options.small else options.depth)
    config = {"num_attention_heads": heads, "attention_head_dim": dim, "in_channels": channels,
              "out_channels": channels, "text_dim": text, "ffn_dim": ffn, "num_layers": layers}  # fmt: skip
    words = {"encoder_hidden_states": torch.randn(1, 8 if options.small else 512, text)}

    def call(model: Any, z: torch.Tensor, t: float) -> torch.Tensor:
        time = torch.tensor([1000 * t], device=z.device)
        return model(hidden_states=z, timestep=time, **case.words, return_dict=False)[0]

    latents = (1, channels, frames, height, width)
    tokens = frames * height * width // 4
    case = Case(WanTransformer3DModel, config, latents, tokens, call, f"{layers} blocks", words=words)
    return case


def z_image(options: argparse.Namespace) -> Case:
    side, text = (32, 8) if options.small else (128, 128)
    layers = 2 * (1 if options.small else options.depth)
    config: dict[str, Any] = {"n_layers": layers, "n_refiner_layers": 1}
    if options.small:
        config |= {"dim": 64, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 16, "axes_dims": [8, 12, 12]}
    words = {"caption": torch.randn(text, config.get("cap_feat_dim", 2560))}

    def call(model: Any, z: torch.Tensor, t: float) -> torch.Tensor:
        time = torch.tensor([1 - t], device=z.device)
        return torch.stack(model([*z], time, [case.words["caption"]], return_dict=False)[0])

    blocks = f"{layers} blocks, 1 refiner of image and of text"
    case = Case(ZImageTransformer2DModel, config, (1, 16, 1, side, side), side**2 // 4, call, blocks,
                "negative flow", words)  # fmt: skip
    return case


def dit_xl(options: argparse.Namespace) -> Case:
    heads, dim, side = (2, 16, 16) if options.small else (16, 72, 64)
    layers = 1 if options.small else 4 * options.depth
    config = {"num_attention_heads": heads, "attention_head_dim": dim, "in_channels": 4, "out_channels": 8,
              "num_layers": layers, "sample_size": side, "patch_size": 2, "num_embeds_ada_norm": 1000}  # fmt: skip

    def call(model: Any, z: torch.Tensor, t: float) -> torch.Tensor:
        time, label = torch.tensor([t], device=z.device), torch.tensor([207], device=z.device)
        return model(z, time, label, return_dict=False)[0]

    latents = (1, 4, side, side)
    return Case(DiTTransformer2DModel, config, latents, side**2 // 4, call, f"{layers} blocks", "epsilon")


CASES = {"flux": flux, "wan": wan, "z-image": z_image, "dit-xl": dit_xl}


class OutputCache:
    """The last output again while the latents have not changed much since it was made, as TeaCache does it: relative L1
    changes from step to step are added up, and the model runs where they reach ``limit``."""

    def __init__(self, call: Callable[[torch.Tensor, int], torch.Tensor], limit: float):
        self.call, self.limit, self.forwards = call, limit, 0
        self.changes: list[float] = []
        self._z: torch.Tensor | None = None
        self._out: torch.Tensor | None = None
        self._since = 0.0

    def __call__(self, z: torch.Tensor, step: int) -> torch.Tensor:
        if self._z is not None:
            self.changes.append(((z - self._z).abs().mean() / self._z.abs().mean()).item())
            self._since += self.changes[-1]
        if self._out is None or self._since >= self.limit:
            self._out, self._since, self.forwards = self.call(z, step), 0.0, self.forwards + 1
        self._z = z
        return self._out


class Bench:
    """One model: the stock one and the one with an adapter, which share their weights."""

    def __init__(self, case: Case, options: argparse.Namespace):
        self.case, self.options, self.device = case, options, torch.device(options.device)
        self.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.dtype]
        torch.manual_seed(0)
        with self.device:
            model = case.stock(**case.config).eval().requires_grad_(False)
            for parameter in model.parameters():
                if parameter.ndim > 1:  # some start at zero
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
        kept = set(case.stock._keep_in_fp32_modules or [])
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point() and not kept & set(name.split(".")):  # as from_pretrained does
                tensor.data = tensor.data.to(self.dtype)
        # The same parameters in other modules.
        self.stock = copy.deepcopy(model, {id(p): p for p in model.parameters()})
        config = ddit.DDiTConfig(case.stock.__name__, PATCHES, prediction=case.prediction)
        self.model = ddit.attach(model, config)
        floats = {n: v.to(self.device, self.dtype) for n, v in case.words.items() if not n.endswith("_ids")}
        case.words = {n: floats.get(n, v.to(self.device)) for n, v in case.words.items()}
        self.z = torch.randn(case.latents, device=self.device)
        levels = torch.linspace(1, 0, options.steps + 1).tolist()
        self.times = [int(999 * level) for level in levels] if case.prediction == "epsilon" else levels

    def wait(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.process_time() if self.options.clock == "cpu" else time.perf_counter()

    def call(self, model: torch.nn.Module, z: torch.Tensor, step: int) -> torch.Tensor:
        return self.case.call(model, z.to(self.dtype), self.times[step]).float()

    def run(self, call: Callable[[torch.Tensor, int], torch.Tensor]) -> float:
        """Seconds of deterministic steps from noise to time 0."""
        start, z = self.wait(), self.z
        for step in range(self.options.steps):
            then, now = (torch.tensor(t, device=self.device) for t in self.times[step : step + 2])
            z = z + self.model.noise.increment(z, call(z, step), then, now)
        return self.wait() - start

    def scheduled(self, **schedule: Any) -> Callable[[], float]:
        """A run under a schedule; `self.model.schedule.log` is that of the last one."""

        def run() -> float:
            self.model.set_schedule(steps=self.options.steps, **schedule)
            return self.run(lambda z, step: self.call(self.model, z, step))

        return run

    def in_turn(self, ways: dict[str, Callable[[], float]], warm: bool = False) -> dict[str, list[float]]:
        """Seconds of each way by rounds, after one that warms up where the model is not ``warm`` yet."""
        if not warm:
            for way in ways.values():
                way()
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(self.options.repeats):
            for name, way in ways.items():
                seconds[name].append(way())
        return seconds

    def steps(self) -> dict[str, Any]:
        """A forward, stock and at every m."""

        def at(m: int) -> Callable[[], Any]:
            def forward() -> Any:
                with self.model.at(m):
                    return self.call(self.model, self.z, 0)

            return forward

        ways = {"stock": lambda: self.call(self.stock, self.z, 0), **{f"m = {m}": at(m) for m in (1, *PATCHES)}}

        def timed(way: Callable[[], Any]) -> Callable[[], float]:
            def run() -> float:
                start = self.wait()
                way()
                return self.wait() - start

            return run

        seconds = self.in_turn({name: timed(way) for name, way in ways.items()})
        rows: dict[str, Any] = {}
        for (name, way), m in zip(ways.items(), (1, 1, *PATCHES), strict=True):
            rows[name] = {
                "tokens": tokens_at(self.case, m),
                "flops": flops(way),
                "ms": 1000 * statistics.median(seconds[name]),
                "speed_up": ratio(seconds["stock"], seconds[name]),
            }
        for row in rows.values():
            row["flops_speed_up"] = rows["stock"]["flops"] / row["flops"]
            row["realised"] = row["speed_up"] / row["flops_speed_up"]
        return rows

    def runs(self, rows: dict[str, Any]) -> dict[str, Any]:
        """Whole runs under fixed schedules, with and without a cache; ``rows`` are those of `steps`."""
        n = self.options.steps
        cost = {m: rows[f"m = {m}"]["flops"] for m in (1, *PATCHES)}
        schedules = {"m = 1": [(1, 1.0)], **SCHEDULES}
        sizes: dict[str, list[int]] = {}
        changes: list[float] = []

        def logged(name: str) -> Callable[[], float]:
            run = self.scheduled(fixed=schedules[name])

            def timed() -> float:
                taken = run()
                sizes[name] = [entry["m"] for entry in self.model.schedule.log]
                return taken

            return timed

        def watched() -> float:
            """The run of the stock size; how much its latents change is the cache's measure."""
            cache = OutputCache(lambda z, step: self.call(self.model, z, step), 0.0)
            self.model.set_schedule(steps=n, fixed=schedules["m = 1"])
            taken = self.run(cache)
            sizes["m = 1"], changes[:] = [1] * n, cache.changes
            return taken

        fixed = {name: watched if name == "m = 1" else logged(name) for name in schedules}
        seconds = self.in_turn(fixed, warm=True)  # `steps` has run every size
        limit = 1.5 * statistics.median(changes)
        ran: dict[str, list[int]] = {f"{name}, cache": [] for name in schedules}
        cached = {f"{name}, cache": self.cached(sizes[name], limit, ran[f"{name}, cache"]) for name in schedules}
        seconds |= self.in_turn(cached, warm=True)
        ways = [way for name in schedules for way in (name, f"{name}, cache")]
        found: dict[str, Any] = {}
        for name in ways:
            forwards = ran[name] if name in ran else sizes[name]
            spent = sum(cost[m] for m in forwards)
            row = {
                "steps_by_size": {str(m): forwards.count(m) for m in sorted(set(forwards), reverse=True)},
                "ms": 1000 * statistics.median(seconds[name]),
                "speed_up": ratio(seconds["m = 1"], seconds[name]),
                "flops_speed_up": n * cost[1] / spent,
            }
            found[name] = {**row, "realised": row["speed_up"] / row["flops_speed_up"]}
        for name in schedules:
            if name != "m = 1":
                product = found[name]["speed_up"] * found["m = 1, cache"]["speed_up"]
                found[f"{name}, cache"]["product_of_both"] = product
        return found

    def cached(self, sizes: list[int], limit: float, ran: list[int]) -> Callable[[], float]:
        """A run with a cache around a model that takes each step at its size of ``sizes``; a schedule of its own would
        count calls, not steps. ``ran``: the sizes of the steps that were not left out."""

        def call(z: torch.Tensor, step: int) -> torch.Tensor:
            ran.append(sizes[step])
            with self.model.at(sizes[step]):
                return self.call(self.model, z, step)

        def run() -> float:
            ran.clear()
            return self.run(OutputCache(call, limit))

        return run

    def overheads(self) -> dict[str, Any]:
        """The scheduler's and the switch's ms a step."""
        n = self.options.steps
        alternating = [(1 + step % 2, 1 / n) for step in range(n)]
        ways = {
            "plain": self.scheduled(),
            "looking": self.scheduled(threshold=0.0),
            "stays at 1": self.scheduled(fixed=[(1, 1.0)]),
            "stays at 2": self.scheduled(fixed=[(2, 1.0)]),
            "alternates": self.scheduled(fixed=alternating),
        }
        seconds = self.in_turn(ways, warm=True)
        assert [entry["m"] for entry in self.model.schedule.log] == [1 + step % 2 for step in range(n)]
        step = 1000 * statistics.median(seconds["plain"]) / n
        extra = [b - a for a, b in zip(seconds["plain"], seconds["looking"], strict=True)]
        coarse = n // 2
        switch = [
            both - ((n - coarse) * fine + coarse * large) / n
            for fine, large, both in zip(*(seconds[w] for w in list(ways)[2:]), strict=True)
        ]
        parts = self.scheduler_parts()
        return {
            "ms_of_a_step": step,
            "scheduler_ms": parts,
            "scheduler_share": sum(parts.values()) / step,
            "looking_ms_a_step": 1000 * statistics.median(extra) / n,
            "switch_ms_a_step": 1000 * statistics.median(switch) / n,
        }

    def scheduler_parts(self) -> dict[str, float]:
        """Median ms of what a step asks of the schedule, where it looks at the deviations."""
        schedule = self.model.set_schedule(threshold=0.0, steps=self.options.steps)
        parts = {"look": (self.model, "look"), "decide": (schedule, "decide"), "observe": (schedule, "observe")}
        seconds: dict[str, list[float]] = {name: [] for name in parts}

        def timer(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
            def timed(*arguments: Any) -> Any:
                start = self.wait()
                out = method(*arguments)
                seconds[name].append(self.wait() - start)
                return out

            return timed

        for name, (owner, method) in parts.items():
            setattr(owner, method, timer(name, getattr(owner, method)))
        try:
            self.run(lambda z, step: self.call(self.model, z, step))
        finally:
            del self.model.look
        looked = [entry["step"] for entry in schedule.log if "deviation" in entry]
        return {name: 1000 * statistics.median(values[i] for i in looked) for name, values in seconds.items()}


def tokens_at(case: Case, m: int) -> int:
    """Image tokens at a factor, padded to whole patches."""
    if len(case.latents) == 3:
        return case.tokens // m**2
    frames = case.latents[2] if len(case.latents) == 5 else 1
    height, width = (-(-side // (2 * m)) for side in case.latents[-2:])
    return frames * height * width


def ratio(base: list[float], other: list[float]) -> float:
    """How many times as fast, by rounds, because a machine's speed changes from one to the next."""
    return statistics.median(a / b for a, b in zip(base, other, strict=True))


def _attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def flops(way: Callable[[], Any]) -> int:
    """Of the matrix products; attention on a CPU is not counted by every torch, so that it is told how."""
    cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping={cpu: _attention}) as counter:
        way()
    return counter.get_total_flops()


def show(name: str, report: dict[str, Any]) -> None:
    print(f"\n## {name}, {report['depth']}\n")
    print("| step | tokens | GFLOPs | ms | speed-up | in FLOPs | realised |\n|---|---|---|---|---|---|---|")
    for row_name, row in report["step"].items():
        print(f"| {row_name} | {row['tokens']} | {row['flops'] / 1e9:.4g} | {row['ms']:.4g} | {row['speed_up']:.2f} x "
              f"| {row['flops_speed_up']:.2f} x | {row['realised']:.0%} |")  # fmt: skip
    if "run" in report:
        print("\n| run | steps by size | ms | speed-up | in FLOPs | realised | product of both |\n" + "|---" * 7 + "|")
    for row_name, row in report.get("run", {}).items():
        by_size = ", ".join(f"{count} at {m}" for m, count in row["steps_by_size"].items())
        both = f"{row['product_of_both']:.2f} x" if "product_of_both" in row else ""
        print(f"| {row_name} | {by_size} | {row['ms']:.4g} | {row['speed_up']:.2f} x | {row['flops_speed_up']:.2f} x "
              f"| {row['realised']:.0%} | {both} |")  # fmt: skip
    if "overhead" not in report:
        return
    cost = report["overhead"]
    parts = ", ".join(f"{part} {value:.3g}" for part, value in cost["scheduler_ms"].items())
    print(f"\nScheduler: {parts} ms, {cost['scheduler_share']:.1%} of a step of {cost['ms_of_a_step']:.4g} ms; a run "
          f"that looks: {cost['looking_ms_a_step']:+.3g} ms a step; switching in every step: "
          f"{cost['switch_ms_a_step']:+.3g} ms a step.")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(CASES), help="some of them, separated by commas")
    parser.add_argument("--depth", type=int, default=1, help="units of blocks")
    parser.add_argument("--frames", type=int, default=81, help="of Wan's videos: one more than a multiple of 4")
    parser.add_argument("--steps", type=int, default=25, help="of a run; 25 has exactly 76 %% at 2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--parts", default="run,overhead", help="beside the steps: some of run, overhead, or none")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall",
                        help="cpu: of this process alone, where others work on the machine too")  # fmt: skip
    parser.add_argument("--small", action="store_true", help="everything tiny")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    names, parts = options.models.split(","), options.parts.split(",")
    if unknown := set(names) - set(CASES):
        parser.error(f"--models: {min(unknown)} is none of {', '.join(CASES)}")
    if unknown := set(parts) - {"run", "overhead", "none"}:
        parser.error(f"--parts: {min(unknown)} is none of run, overhead, none")
    if options.clock == "cpu" and options.device != "cpu":
        parser.error("--clock cpu is for --device cpu")
    if min(options.depth, options.repeats) < 1 or options.steps < 5 or options.frames % 4 != 1:
        parser.error("--depth and --repeats must be at least 1, --steps 5, --frames one more than a multiple of 4")
    settings = {key: value for key, value in vars(options).items() if key != "json"}
    report: dict[str, Any] = {"machine": machine(torch.device(options.device)), "settings": settings, "models": {}}
    if not options.json:
        clock = ", CPU seconds" if options.clock == "cpu" else ""
        print(f"{report['machine']}, {options.dtype}, {options.steps} steps, medians of {options.repeats}{clock}")
    for name in names:
        with torch.inference_mode():
            bench = Bench(CASES[name](options), options)
            step = bench.steps()
            found = {"depth": bench.case.depth, "step": step}
            if "run" in parts:
                found["run"] = bench.runs(step)
            if "overhead" in parts:
                found["overhead"] = bench.overheads()
        report["models"][name] = found
        if not options.json:
            show(name, found)
        del bench
        gc.collect()
        if options.device != "cpu":
            torch.accelerator.empty_cache()
    if options.json:
        print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
