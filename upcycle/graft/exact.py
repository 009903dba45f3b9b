"""The exact start: the lean scaffold around a teacher's own embedding, blocks and head (docs/how-it-works.md).

At ratio = patch^2 the router keeps the teacher's grid and the student computes the teacher's function. Everything that
is new either starts at zero or is only reached by positions that no window covers.
"""

import torch
from torch import nn

from upcycle.models.chunked_dit import ChunkedDiT, ResBlock

# Centres the untrained logits around 0 for any local detail: between grid (0 + 8 - 4.4) and the rest (-2 - 8 + 1).
START_BIAS = 2.7


@torch.no_grad()
def initialise(model: ChunkedDiT) -> None:
    """Set the fresh parameters of a lean scaffold in place; every other module keeps torch's default start."""
    zero: list[nn.Module] = [model.widen, model.residual, model.conv_out, model.fill_log_variance]
    zero += [module.conv2 for module in model.modules() if isinstance(module, ResBlock)]
    if model.routing_module is not None:
        zero.append(model.routing_module.condition)
        if model.config.router == "predictability":
            zero.append(model.routing_module.scorer.residual_scorer[-1])
        model.routing_module.bias.fill_(START_BIAS)
    for module in zero:
        for parameter in module.parameters():
            parameter.zero_()
