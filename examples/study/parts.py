"""The exact graft's parts that no recipe switches off, taken out of this process for an ablation."""

from typing import Any

import torch

from upcycle.models import chunked_dit
from upcycle.models.chunked_dit import ChunkedDiT, gather_tokens
from upcycle.training import losses

PARTS = {
    "lattice": "the router's prior for every second position of the grid",
    "cell-mean": "the input's move from a token's window towards the mean of its cell",
    "size-bias": "the logarithm of a cell's size on attention logits",
    "fill": "the fill of uncovered positions in x0 space: they copy the nearest entry instead",
    "correction": "the decoder's correction",
    "smoothing": "the smoothing of the decoder's features",
    "visibility": "the factor √ᾱ in the router's target",
    "target-floor": "what the floor of detail in the router's target has above the model's own",
}


def leave_out(part: str) -> None:
    """Take one of `PARTS` out of every `ChunkedDiT`, and of training, until the process ends."""
    if part == "lattice":
        chunked_dit.LATTICE = (0.0, 0.0, 0.0)
    elif part == "cell-mean":
        ChunkedDiT._move = _no_move  # type: ignore[method-assign]
    elif part == "size-bias":
        cells = ChunkedDiT._cells

        def unbiased(self: ChunkedDiT, *arguments: Any) -> tuple[torch.Tensor, ...]:
            owner, cell_size, log_cell, exact = cells(self, *arguments)
            return owner, cell_size, torch.zeros_like(log_cell), exact

        ChunkedDiT._cells = unbiased  # type: ignore[method-assign]
    elif part == "fill":
        dechunk = ChunkedDiT.dechunk

        def copied(self: ChunkedDiT, entries: torch.Tensor, tokens: Any, x: torch.Tensor, chunks: Any, timestep: Any):
            base, geometry = dechunk(self, entries, tokens, x, chunks, timestep)
            patch = self.config.patch_size
            row, column = ((geometry[:, i] * patch).round().long().clamp(0, patch - 1).flatten(1) for i in (1, 2))
            nearest = gather_tokens(entries.flatten(1, 2), chunks.owner_slot * patch**2 + row * patch + column)
            copies = nearest.transpose(1, 2).unflatten(2, x.shape[-2:])
            return torch.where(geometry[:, :1] > 0, base, copies), geometry

        ChunkedDiT.dechunk = copied  # type: ignore[method-assign]
    elif part == "correction":
        ChunkedDiT.decode = lambda self, tokens, x, base, *rest: torch.zeros_like(base)  # type: ignore[method-assign]
    elif part == "smoothing":
        chunked_dit.smooth = lambda h, *rest: h.float()  # type: ignore[assignment]
    elif part == "visibility":
        visible = losses.visible_detail
        losses.visible_detail = lambda x0, alpha_bar, prior: visible(x0, torch.ones_like(alpha_bar), prior)
    elif part == "target-floor":
        losses.TARGET_FLOOR = chunked_dit.DETAIL_FLOOR
    else:
        raise ValueError(f"{part} is none of {', '.join(PARTS)}")


def _no_move(self, x, owner, owner_slot, cell_size, index, timestep) -> torch.Tensor:
    return torch.zeros(*index.shape, x.shape[1], device=x.device)
