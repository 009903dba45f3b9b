"""Block distillation, the published way to start an upcycled student (DC-DiT, arXiv 2603.06351, §upcycling).

The loss is the MSE between the outputs of the student's and the frozen teacher's transformer blocks, in the style of
grafting (arXiv 2506.05340). The papers do not say how tokens at different places are compared. Here a teacher's output
is a picture on its patch grid, and each token of the student is held against it at the token's centre, bilinearly: on
the teacher's grid that is the teacher's token itself.

Shapes as in `upcycle.models.chunked_dit`; N tokens of the teacher, T tokens of the student in all samples together.
"""

import math
from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from torch import nn
from torch.utils.checkpoint import checkpoint

from upcycle.models.chunked_dit import ChunkedDiT, Layout, Routing, compact


class BlockRecorder:
    """A context that records what the transformer blocks of student and teacher put out, in one forward pass of each.

    Both models are the unwrapped ones; a pass may go through a wrapper (DDP), and the teacher's may run in inference
    mode. Autograd holds a student's outputs anyway; the teacher's cost N * D numbers a sample and block for as long as
    the recorder and the loss live (XL/2 at 256 px in bf16: 16 MB a sample).

    Attributes:
        student: by number of the block, [B, M, D] or packed [T, D] as ``layout`` says.
        teacher: by number of the block, [B, N, D].
    """

    def __init__(self, student: ChunkedDiT, teacher: DiTTransformer2DModel, blocks: Collection[int] | None = None):
        """``blocks``: which ones to compare; default all."""
        self.student: dict[int, torch.Tensor] = {}
        self.teacher: dict[int, torch.Tensor] = {}
        self.layout: Layout | None = None
        assert len(student.transformer_blocks) == len(teacher.transformer_blocks)
        self._models, self._blocks = (student, teacher), blocks

    def __enter__(self) -> "BlockRecorder":
        def keep(outputs: dict[int, torch.Tensor], number: int) -> Callable[..., None]:
            def hook(block: nn.Module, arguments: tuple, output: torch.Tensor) -> None:
                if output.is_inference():  # autograd refuses to hold such tensors
                    with torch.inference_mode(False):
                        output = output.clone()
                outputs.setdefault(number, output)  # the first: gradient checkpointing runs a block, and hooks, again

            return hook

        def keep_layout(block: nn.Module, arguments: tuple) -> None:
            self.layout = arguments[2]

        self._hooks = [self._models[0].transformer_blocks[0].register_forward_pre_hook(keep_layout)]
        for model, outputs in zip(self._models, (self.student, self.teacher), strict=True):
            for number, block in enumerate(model.transformer_blocks):
                if self._blocks is None or number in self._blocks:
                    self._hooks.append(block.register_forward_hook(keep(outputs, number)))
        return self

    def __exit__(self, *_) -> None:
        for hook in self._hooks:
            hook.remove()


def block_loss(recorder: BlockRecorder, routing: Routing, student: ChunkedDiT) -> torch.Tensor:
    """MSE of the student's block outputs to the teacher's, averaged over blocks and samples; an fp32 scalar.

    Within a sample every token counts alike, and every sample counts alike however many tokens it has: so the mean over
    ranks or over micro-batches is the mean over the batch. Latents are square, as the teacher wants them. What comes
    after the blocks gets no gradient: where DDP is used, other terms of the loss must reach it.
    """
    layout, mask = recorder.layout, routing.mask
    assert layout is not None
    assert recorder.student.keys() == recorder.teacher.keys()
    batch, count = next(iter(recorder.teacher.values())).shape[:2]
    side, teacher_side = math.isqrt(mask.shape[1]), math.isqrt(count)
    index = compact(mask, layout.longest)[0]
    sample = torch.arange(batch, device=mask.device)[:, None].expand_as(index)
    index, sample = (layout.pack(x[..., None]).flatten() for x in (index, sample))  # [T]
    corner, share = bilinear_corners(index, side, teacher_side, student.config.patch_size)
    corner = corner + (sample * count)[:, None]
    weight = 1 / (batch * mask.sum(1)[sample])

    def mse(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        # A weighted sum of four rows for each token.
        target = F.embedding_bag(corner, theirs.flatten(0, 1).float(), per_sample_weights=share, mode="sum")
        return (weight * (ours.reshape(target.shape).float() - target).square().mean(-1)).sum()

    # Checkpointed: autograd would keep fp32 tensors of the size of every output, which are cheap to make again.
    options = {"use_reentrant": False, "preserve_rng_state": False}
    terms = [checkpoint(mse, recorder.student[i], recorder.teacher[i], **options) for i in recorder.student]
    return torch.stack(terms).mean()


def bilinear_corners(
    index: torch.Tensor, side: int, teacher_side: int, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The four teacher's tokens around each of the student's, and their shares in a bilinear interpolation.

    A token at row r covers r .. r + window - 1. Counted in the teacher's tokens, of p rows each, from the centre of the
    first one, its own centre is (r + window / 2) / p - 1 / 2 (lean scaffold, whose window is p: r / p). The same for
    columns. Beyond the outermost centres the edge goes on.

    Args:
        index: positions of the student's tokens on a grid of ``side`` x ``side`` latents, raster order, int64 [T].
        teacher_side: the teacher's tokens in a row.
        window: the student's ``patch_size``; 1 for the paper scaffold.

    Returns:
        Numbers of teacher's tokens in raster order, int64 [T, 4], and shares, fp32 [T, 4], which add up to 1.
    """
    place = torch.stack([index // side, index % side])  # rows and columns, [2, T]
    patch = side // teacher_side
    centre = ((place + window / 2) / patch - 0.5).clamp(min=0)
    first = centre.long()
    part = centre - first
    rows, columns = torch.stack([first, (first + 1).clamp(max=teacher_side - 1)], dim=-1)  # [T, 2]
    row_shares, column_shares = torch.stack([1 - part, part], dim=-1)
    corner = rows[:, :, None] * teacher_side + columns[:, None]
    share = row_shares[:, :, None] * column_shares[:, None]
    return corner.flatten(1), share.flatten(1)
