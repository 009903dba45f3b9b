"""The published start: the DC-DiT scaffold with its own initial weights around the teacher's blocks (arXiv 2603.06351).

Only the embedders and the blocks of the teacher are reused; a LayerNorm adaptor stands between the conditioning and the
encoder and decoder, as in the paper's upcycling recipe.
"""

import torch
from torch import nn

from upcycle.models.chunked_dit import ChunkedDiT

ROUTER_BIAS = -1.1  # the published start: about a quarter of the positions


@torch.no_grad()
def initialise(model: ChunkedDiT) -> None:
    """Set the fresh parameters of a paper scaffold in place."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.conv_in.weight.view(model.conv_in.weight.shape[0], -1))
    nn.init.zeros_(model.conv_in.bias)
    for module in (model.residual, model.proj_out_1, model.proj_out_2):
        for parameter in module.parameters():
            nn.init.zeros_(parameter)
    if model.routing_module is None:
        return
    if model.config.router == "predictability":
        nn.init.constant_(model.routing_module.scorer.residual_scorer[-1].bias, ROUTER_BIAS)
    if model.config.router == "cosine":
        for projection in (model.routing_module.scorer.query, model.routing_module.scorer.key):
            nn.init.dirac_(projection.weight)
