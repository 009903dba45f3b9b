"""What goes with a measured speed: its name among the metrics, the machine, and tokens that do not depend on luck."""

import dataclasses
import platform
from pathlib import Path

import torch

from upcycle.models.chunked_dit import ChunkedDiT, Routing

SPEED = "seconds per image"


def machine(device: torch.device) -> str:
    """A name for where something was measured."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}, torch {torch.__version__}"


def keep_tokens(student: ChunkedDiT, tokens: float, *, ragged: bool = False) -> None:
    """Let the router keep ``tokens`` a sample, evenly spread, and drop the tail of that.

    A router that has not learned keeps what it likes, which is not what anything will cost; what it computes is still
    computed. ``ragged``: from half as many tokens to half as many more over a batch of three or more, as a learned one.
    """
    decide = student.route

    def route(
        features: torch.Tensor,
        x: torch.Tensor,
        timestep: torch.Tensor,
        condition: torch.Tensor,
        tail_drop: float | torch.Tensor,
        guide: float | torch.Tensor,
    ) -> Routing:
        routing = decide(features, x, timestep, condition, tail_drop, guide)
        batch, size = routing.mask.shape
        share = torch.ones(batch, device=x.device)
        if ragged and batch > 2:
            share = torch.linspace(0.5, 1.5, batch, device=x.device)
        share = share * (1 - tail_drop)
        count = (tokens * share).round().clamp(1, size).long()[:, None]
        if routing.tokens is not None:
            count = torch.full_like(count, routing.tokens)
        position = torch.arange(size, device=x.device)
        mask = (position * count) // size != ((position - 1) * count) // size  # evenly spread, from the first on
        return dataclasses.replace(routing, mask=mask, mask_natural=mask)

    student.route = route  # type: ignore[method-assign]
