"""Fully sharded data parallelism (FSDP2) through accelerate: what this model needs beyond a flag of the launcher."""

import os
from typing import Any

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import AutocastKwargs, DistributedType, parse_flag_from_env
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from upcycle.errors import UpcycleError
from upcycle.models.chunked_dit import ChunkedDiT


def make_accelerator(**options: Any) -> Accelerator:
    """An `Accelerator`; where the launcher asks for FSDP, one that shards block by block.

    Raises:
        UpcycleError: FSDP 1, or options of the launcher that do not fit.
    """
    # A weight is used once a forward pass: its bf16 copy need not outlive that use.
    handlers = [AutocastKwargs(cache_enabled=False), *options.pop("kwargs_handlers", ())]
    options = {"kwargs_handlers": handlers, **options}
    AcceleratorState._reset_state()  # a run before this one in the same process may have had another precision
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return Accelerator(**options)
    if os.environ.get("FSDP_VERSION") != "2":
        raise UpcycleError("FSDP 1 does not fit this model; add --fsdp_version 2 to accelerate launch")
    if parse_flag_from_env("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UpcycleError("FSDP is to checkpoint activations; leave it to gradient_checkpointing of the recipe")
    # The launcher's defaults would cast every parameter to bf16, the router's too, and make only rank 0 hold weights,
    # which fails at the router's bias (a buffer). Autocast does the mixed precision instead, as without FSDP.
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=list(ChunkedDiT._no_split_modules),
        mixed_precision_policy=MixedPrecisionPolicy(),
        cpu_ram_efficient_loading=False,
    )
    state = PartialState()
    if state.device.type == "cpu" and state.distributed_type != DistributedType.NO:
        # accelerate shards on accelerators only; on CPUs it would train with DDP and not say so.
        state.distributed_type = DistributedType.MULTI_GPU
    return Accelerator(fsdp_plugin=plugin, **options)


def is_sharded(model: torch.nn.Module) -> bool:
    """Whether FSDP holds a share of every parameter on each rank."""
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def reshard(model: torch.nn.Module) -> None:
    """Drop gathered weights: a forward without a backward leaves those outside the blocks behind, to be used again."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def fill_state(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter AdamW's state as it is before a first update.

    Checkpoints of shards can be read only where all of it was written, and a stage may leave parts out.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            step = torch.zeros((), device=parameter.device if group["fused"] else "cpu")
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            optimizer.state[parameter] = {"step": step, **moments}
