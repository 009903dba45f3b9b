"""ChunkedDiT: a Diffusion Transformer that keeps few tokens where the image is smooth and many where there is detail.

This file is self-contained (torch and diffusers only). It is copied beside the weights of every export, under a name
that carries the hash of its content, so that stock diffusers loads the folder without the `upcycle` package.

Two scaffolds around the same transformer blocks:

- ``lean``  (upcycle's): the exact graft. With the teacher's grid kept it computes the teacher's function; it routes on
  narrow features, widens only the tokens that are kept, and adds a correction that starts at zero.
- ``paper`` (DC-DiT, arXiv 2603.06351): the published architecture, numerically equal to the authors' code.

Shape legend: B batch, H x W latent grid, L = H * W positions in raster order, M tokens kept (padded to the longest
sample of the batch), C latent channels, O output channels, D block width, E scaffold width, p the teacher's patch size.
"""

import contextlib
import dataclasses
import functools
import hashlib
import inspect
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn

try:
    from torch.nn.attention.varlen import varlen_attn

    if "scale" not in inspect.signature(varlen_attn).parameters:  # came after the function
        varlen_attn = None
except ImportError:
    varlen_attn = None

# Read once: what is saved later is the code that runs. diffusers keeps local code files in one flat namespace; the
# content hash in the name keeps two exports with different code apart.
_CODE = Path(__file__).read_bytes()
MODULE_NAME = "chunked_dit_" + hashlib.sha256(_CODE).hexdigest()[:12]

LATTICE = (1.5, 0.0, -2.0)  # router prior: on (0,0) mod 2p, on the rest of the teacher's grid, elsewhere
DETAIL_FLOOR, DETAIL_SCALE = 0.03, 0.8
WINDOW_VARIANCE_FLOOR = 3e-4
OFF_GRID_WEIGHT = 0.135  # of a window beside the teacher's grid, where windows overlap
REACH = 8  # rows on either side in which owners are looked for at first
BIAS_CHANNELS = 8  # of the packed attention kernel, whose heads are multiples of 8 wide
GAUSSIAN_CUT = 7.2  # standard deviations beyond which a weight is below 1e-11
GATE_TEMPERATURE = 5.0  # of DyDiT's Gumbel-sigmoid, as the authors have it
OPEN_GATE = 5.0  # logit at which the gates start: all open, and under noise one of 150 is not


@dataclass
class Routing:
    """What the router decided. All tensors [B, L]; ``mask`` is what the blocks saw.

    ``logit`` is the boundary logit, ``probability`` its sigmoid (1 for positions that are always kept),
    ``mask_natural`` the positions with p > 1/2, ``mask`` the same after tail dropping, and ``score`` the part of the
    logit that is learned (without bias and guide), which router supervision trains. ``tokens``: how many every sample
    keeps, known without a look at ``mask``; None where that is up to the router.
    """

    logit: torch.Tensor
    probability: torch.Tensor
    mask_natural: torch.Tensor
    mask: torch.Tensor
    score: torch.Tensor
    tokens: int | None = None

    @property
    def selected_probability(self) -> torch.Tensor:
        """Probability of the decision taken, [B, L] (DC-DiT, step 7)."""
        return torch.where(self.mask_natural, self.probability, 1 - self.probability)


@dataclass
class Gates:
    """What DyDiT's routers decided (arXiv 2410.03456): 1 for on and 0 for off, fp32 with a straight-through gradient.

    ``heads`` and ``channels`` [B, layers, heads]: attention heads, and as many groups of the MLP's channels.
    ``seed`` int64 [B]: of the noise, None without. ``tokens`` [B, layers]: the share of a sample's tokens that went
    through the MLP, known once the blocks have run.
    """

    heads: torch.Tensor
    channels: torch.Tensor
    seed: torch.Tensor | None = None
    tokens: torch.Tensor | None = None


@dataclass
class ChunkedDiTOutput(BaseOutput):
    """``sample`` [B, O, H, W] (epsilon, then the learned sigma where there is one), the ``routing`` behind it, and the
    ``gates`` of the blocks where they have some."""

    sample: torch.Tensor
    routing: Routing | None = None
    gates: Gates | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Pieces


class Conv2dFP32(nn.Conv2d):
    """A convolution that runs in fp32 whatever the model's precision: the router decides at a threshold.

    (Where the user allows TF32, a GPU takes it here too, which cuDNN does by default.)
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class LinearFP32(nn.Module):
    """A linear layer that runs in fp32 whatever the model's precision. No `nn.Linear`, so that what quantises or adapts
    those leaves it alone."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.weight, self.bias = nn.Linear(width_in, width_out).parameters()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.float(), self.weight.float(), self.bias.float())


class WindowConv2d(nn.Conv2d):
    """A convolution that only ever sees single windows [n, C, p, p], as a product: -> [n, D, 1, 1]. It is called as a
    layer, so that LoRA and offloading work on it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.flatten(1), self.weight.flatten(1), self.bias)[..., None, None]


class GroupNormFP32(nn.GroupNorm):
    """A group norm that runs in fp32 whatever the model's precision."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)


class TimestepLabelEmbedder(nn.Module):
    """Conditioning vector: MLP of the sinusoidal timestep embedding plus the class embedding.

    ``frequency_shift`` is the trap of the DiT family: diffusers divides the frequency index by (half - 1), Meta's code,
    with which the weights were trained, by half.
    """

    def __init__(self, width: int, num_classes: int, frequency_shift: int):
        super().__init__()
        self.num_classes = num_classes
        self.frequency_shift = frequency_shift
        self.timestep_embedder = nn.ModuleDict({"linear_1": nn.Linear(256, width), "linear_2": nn.Linear(width, width)})
        self.class_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, width)})

    def forward(self, timestep: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        """[B] and [B] -> [B, D]; without labels the timestep's part alone."""
        half = 128
        exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=timestep.device)
        angle = timestep.float()[:, None] * torch.exp(exponent / (half - self.frequency_shift))
        linear_1, linear_2 = self.timestep_embedder["linear_1"], self.timestep_embedder["linear_2"]
        h = torch.cat([angle.cos(), angle.sin()], dim=-1).to(linear_1.weight.dtype)
        h = linear_2(F.silu(linear_1(h)))
        if class_labels is None:
            return h
        # Any label past the last class is the null class: DiTPipeline sends 1000 whatever the number of classes.
        return h + self.class_embedder["embedding_table"](class_labels.clamp(max=self.num_classes))


@dataclass
class Layout:
    """How the kept tokens of a batch lie in memory; ``lengths`` is None for even batches.

    Even batches are [B, M, D]. Ragged ones are packed end to end, [T, D], so that no layer works on padding: ``place``
    [T] says where a token goes in the padded B * M, which attention on a GPU needs. ``lengths`` are the tokens of each
    sample, their sum is T; compiled graphs know ``batch`` B and ``longest`` M only. ``key_bias`` is added to attention
    logits, [B, 1, 1, M] or None.

    While a cache of diffusers is enabled, what passes between blocks is at full resolution, [B, L, D], every position
    with its owner's token: ``spread`` is then (``index``, ``owner_slot``) as in `Chunks`, else None. What a cache keeps
    of a position then means something at the next step too, where other tokens may be kept.
    """

    lengths: list[int] | None
    key_bias: torch.Tensor | None = None
    place: torch.Tensor | None = None
    spread: tuple[torch.Tensor, torch.Tensor] | None = None

    def __post_init__(self):
        self.batch, self.longest = (len(self.lengths), max(self.lengths)) if self.lengths else (0, 0)
        self._bias_channels: torch.Tensor | None = None

    @functools.cached_property
    def starts(self) -> torch.Tensor:
        """Where each sample begins among the packed tokens, and their end: int32 [B + 1]. Made on the device."""
        assert self.place is not None
        sample = torch.arange(self.batch + 1, device=self.place.device)
        return torch.searchsorted(self.place, sample * self.longest).int()

    def bias_channels(self, k: torch.Tensor, scale: float) -> torch.Tensor:
        """key_bias / scale of the packed tokens, in channels whose sum it is more precisely than k's dtype holds it;
        k's dtype, [T, heads, BIAS_CHANNELS]."""
        if self._bias_channels is None:
            assert self.place is not None
            bias = torch.zeros(len(k), device=k.device)
            if self.key_bias is not None:
                bias = self.key_bias.flatten()[self.place].float() / scale
            high = bias.to(k.dtype)
            parts = torch.stack([high, (bias - high.float()).to(k.dtype)], dim=-1)
            self._bias_channels = F.pad(parts, (0, BIAS_CHANNELS - 2))[:, None]
        return self._bias_channels.expand(-1, k.shape[1], -1)

    def pack(self, x_BMD: torch.Tensor) -> torch.Tensor:
        """[B, M, D] -> [T, D], or unchanged where the batch is even."""
        return x_BMD if self.place is None else _Pack.apply(x_BMD, self.place)

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """Inverse of `pack`; padding is zero."""
        if self.place is None:
            return x
        return _pad(x, self.place, self.batch, self.longest)

    def enter(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What passes between blocks -> the tokens that they work on."""
        return hidden_states if self.spread is None else self.pack(gather_tokens(hidden_states, self.spread[0]))

    def leave(self, tokens: torch.Tensor) -> torch.Tensor:
        """Inverse of `enter`."""
        return tokens if self.spread is None else gather_tokens(self.pad(tokens), self.spread[1])

    def modulate(self, x: torch.Tensor, scale_BD: torch.Tensor, shift_BD: torch.Tensor) -> torch.Tensor:
        """x (1 + scale) + shift, with vectors per sample; may overwrite x where no gradient is asked for."""
        scale_BD, lengths = 1 + scale_BD, self.known_lengths(x)
        if self.place is None:
            return _add(_multiply(x, scale_BD[:, None]), shift_BD[:, None])
        if lengths is None or not _may_overwrite(x, scale_BD):
            return _Modulate.apply(x, scale_BD, shift_BD, self.place, self.longest, lengths)
        for rows, scale, shift in zip(x.split(lengths), scale_BD, shift_BD, strict=True):
            rows.mul_(scale).add_(shift)
        return x

    def add_gated(self, hidden_states: torch.Tensor, x: torch.Tensor, gate_BD: torch.Tensor) -> torch.Tensor:
        """hidden_states + gate x, with a vector per sample; may overwrite x where no gradient is asked for."""
        lengths = self.known_lengths(x)
        if self.place is None:
            return _add(_multiply(x, gate_BD[:, None]), hidden_states)
        if lengths is None or not _may_overwrite(x, hidden_states, gate_BD):
            return hidden_states + self.scale(x, gate_BD)
        for rows, added, gate in zip(hidden_states.split(lengths), x.split(lengths), gate_BD, strict=True):
            added.mul_(gate).add_(rows)
        return x

    def scale(self, x: torch.Tensor, factor_BD: torch.Tensor) -> torch.Tensor:
        """factor x, with a vector per sample; may overwrite x of an even batch where no gradient is asked for."""
        if self.place is None:
            return _multiply(x, factor_BD[:, None])
        return _Modulate.apply(x, factor_BD, None, self.place, self.longest, self.known_lengths(x))

    def known_lengths(self, x: torch.Tensor) -> list[int] | None:
        """`lengths` where going sample by sample pays; compiled graphs should not depend on them."""
        return self.lengths if x.device.type == "cpu" and not torch.compiler.is_compiling() else None


def _may_overwrite(x: torch.Tensor, *others: torch.Tensor) -> bool:
    """Whether what is made from ``x`` and the others may take its place, which saves memory and the time to get it.

    So without gradients a forward hook of a layer inside must clone an output that it wants to keep.
    """
    alike = all(other.dtype == x.dtype for other in others)  # under autocast the wider dtype is to win
    return alike and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


# A product and a sum, and no torch.addcmul, which rounds once: the teacher's bits are to come out.


def _add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x + y, in the place of x where no gradient is asked for."""
    return x.add_(y) if _may_overwrite(x, y) else x + y


def _multiply(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """x y, in the place of x where no gradient is asked for."""
    return x.mul_(y) if _may_overwrite(x, y) else x * y


def _silu(x: torch.Tensor) -> torch.Tensor:
    """SiLU, in the place of x where no gradient is asked for."""
    return F.silu(x, inplace=_may_overwrite(x))


def _pad(x_TD: torch.Tensor, place: torch.Tensor, batch: int, longest: int) -> torch.Tensor:
    padded = x_TD.new_zeros(batch * longest, x_TD.shape[-1])
    return padded.index_copy(0, place, x_TD).unflatten(0, (batch, longest))


# Indexing of torch's own adds gradients up with atomics on the CPU, in an order that changes from run to run, and sorts
# on a GPU. The places of tokens are distinct, so that neither is needed.


class _Pack(torch.autograd.Function):
    """[B, M, D] -> [T, D]."""

    @staticmethod
    def forward(ctx, x_BMD, place):
        ctx.save_for_backward(place)
        ctx.shape = x_BMD.shape[:2]
        return x_BMD.flatten(0, 1)[place]

    @staticmethod
    def backward(ctx, gradient):
        return _pad(gradient, *ctx.saved_tensors, *ctx.shape), None


class _Modulate(torch.autograd.Function):
    """x [T, D] times a vector per sample [B, D], plus another (or None). Keeps no vectors per token for later.

    Where ``lengths`` is given (a CPU) it goes sample by sample, else over vectors expanded to the tokens.
    """

    @staticmethod
    def forward(ctx, x, factor, shift, place, longest, lengths):
        ctx.save_for_backward(x, factor, place)
        ctx.longest, ctx.lengths, ctx.shift_dtype = longest, lengths, None if shift is None else shift.dtype
        if lengths is None:
            sample = place // longest
            out = x * factor[sample]
            return out if shift is None else out + shift[sample]
        out = torch.empty_like(x, dtype=torch.result_type(x, factor))
        for i, (rows, made) in enumerate(zip(x.split(lengths), out.split(lengths), strict=True)):
            torch.mul(rows, factor[i], out=made)
            if shift is not None:
                made.add_(shift[i])
        return out

    @staticmethod
    def backward(ctx, gradient):
        x, factor, place = ctx.saved_tensors
        lengths = ctx.lengths

        def per_sample(y: torch.Tensor) -> torch.Tensor:
            if lengths is None:
                return _pad(y, place, len(factor), ctx.longest).sum(1)
            return torch.stack([rows.sum(0) for rows in y.split(lengths)])

        if lengths is None:
            of_x = gradient * factor[place // ctx.longest]
        else:
            of_x = torch.cat([rows * factor[i] for i, rows in enumerate(gradient.split(lengths))])
        of_shift = None if ctx.shift_dtype is None else per_sample(gradient).to(ctx.shift_dtype)
        return of_x.to(x.dtype), per_sample(gradient * x).to(factor.dtype), of_shift, None, None, None


@dataclass
class Chunks:
    """The tokens of a batch (lean scaffold), M of the longest sample: which positions they sit on and which they own.

    ``lengths`` the tokens of each sample (None: all have as many), ``index`` int64 [B, M] their positions, ``valid``
    bool [B, M], ``owner`` int64 [B, L] the position whose token owns each position, ``owner_slot`` int64 [B, L] that
    token's place in ``index``, ``key_bias`` [B, M] log of their cells' sizes (-inf for padding; None where all are the
    teacher's), ``move`` fp32 [B, M, C] how far their inputs move towards their cells.
    """

    lengths: list[int] | None
    index: torch.Tensor
    valid: torch.Tensor
    owner: torch.Tensor
    owner_slot: torch.Tensor
    key_bias: torch.Tensor | None
    move: torch.Tensor


@dataclass
class Width:
    """Which heads, or groups of channels, of a layer are on: ``gate`` [B, groups], 0 or 1.

    ``runs``: those that are on as pairs of first and end, where all samples have the same: the others are not computed.
    Without it they are, and multiplied by 0.
    """

    gate: torch.Tensor
    runs: list[tuple[int, int]] | None = None

    def mask(self, x: torch.Tensor, layout: Layout) -> torch.Tensor:
        """x with the channels of what is off at 0; x itself where they are not in it."""
        if self.runs is not None:
            return x
        return layout.scale(x, self.gate.repeat_interleave(x.shape[-1] // self.gate.shape[1], dim=1).to(x.dtype))

    def linear(self, layer: nn.Module, x: torch.Tensor, dim: int) -> torch.Tensor:
        """A linear layer, of which only the outputs (``dim`` 0) or inputs (1) that are on are computed."""
        if self.runs is None:
            return layer(x)
        each = layer.weight.shape[dim] // self.gate.shape[1]
        spans = [(first * each, (end - first) * each) for first, end in self.runs]

        def on(tensor: torch.Tensor, dim: int) -> torch.Tensor:
            parts = [tensor.narrow(dim, start, length) for start, length in spans]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

        return F.linear(x, on(layer.weight, dim), layer.bias if dim else on(layer.bias, 0))


class BlockGates:
    """The gates of one block. ``heads`` and ``channels`` are None where all are on; ``router`` tells the tokens that
    go through the MLP, with ``noise`` [B, M] while it trains; ``skips``: those that do not are left out. The block
    notes the ``share`` [B] that did. (No dataclass: FSDP hands copies of such to a block, and the note would be lost.)
    """

    def __init__(
        self,
        heads: Width | None,
        channels: Width | None,
        router: nn.Module,
        noise: torch.Tensor | None,
        skips: bool,
        share: torch.Tensor,
    ):
        self.heads, self.channels, self.router, self.noise, self.skips = heads, channels, router, noise, skips
        self.share = share

    def tokens(self, hidden_states: torch.Tensor, layout: Layout) -> torch.Tensor:
        """The gate of every token, [B, M] or packed [T]."""
        with torch.autocast(hidden_states.device.type, enabled=False):
            logit = self.router(hidden_states.float())[..., 0]
        noise = None if self.noise is None else layout.pack(self.noise[..., None])[..., 0]
        gate = straight_through(logit, noise)
        padded, one = (layout.pad(y[..., None])[..., 0] for y in (gate, torch.ones_like(gate)))
        self.share = padded.sum(1) / one.sum(1)
        return gate


def straight_through(logit: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
    """1 where the logit (plus logistic noise, the difference of two Gumbels) is positive, else 0, fp32; the gradient
    is that of the sigmoid at `GATE_TEMPERATURE`."""
    logit = logit.float() if noise is None else logit.float() + noise
    soft = torch.sigmoid(logit / GATE_TEMPERATURE)
    return (logit > 0).float() + (soft - soft.detach())  # the bracket is 0 to the bit


def runs_of(on: list[bool]) -> list[tuple[int, int]]:
    """Where the true ones stand, as pairs of first and end."""
    edges = [i for i in range(len(on) + 1) if (i > 0 and on[i - 1]) != (i < len(on) and on[i])]
    return list(zip(edges[::2], edges[1::2], strict=True))


class Attention(nn.Module):
    """Multi-head self-attention over kept tokens, under diffusers' parameter names."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: torch.Tensor, layout: Layout, width: Width | None = None) -> torch.Tensor:
        if width is None:
            q, k, v = (to(x).unflatten(-1, (self.heads, -1)) for to in (self.to_q, self.to_k, self.to_v))
            return self.to_out[0](attend(q, k, v, layout).flatten(-2))
        each = x.shape[-1] // self.heads
        q, k, v = (width.linear(to, x, 0).unflatten(-1, (-1, each)) for to in (self.to_q, self.to_k, self.to_v))
        return width.linear(self.to_out[0], width.mask(attend(q, k, v, layout).flatten(-2), layout), 1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Attention within samples; q, k, v [B, M, heads, d] or packed [T, heads, d], and so is what comes back.

    A ragged batch goes sample by sample on a CPU, where padding costs more than calls do (docs/log.md), packed on CUDA
    in half precision, and padded elsewhere and in compiled graphs, whose shapes should not depend on the lengths.
    """
    if layout.place is None:
        return _attend(q, k, v, layout.key_bias)
    if layout.known_lengths(q):
        return attend_per_sample(q, k, v, layout)
    return (attend_packed if _has_packed_kernel(q) else attend_padded)(q, k, v, layout)


def attend_padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout) -> torch.Tensor:
    """`attend` of packed tokens, with every sample padded to the longest."""
    pad_q, pad_k, pad_v = (layout.pad(y.flatten(-2)).unflatten(-1, y.shape[-2:]) for y in (q, k, v))
    return layout.pack(_attend(pad_q, pad_k, pad_v, layout.key_bias).flatten(-2)).unflatten(-1, q.shape[-2:])


def attend_per_sample(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout) -> torch.Tensor:
    """`attend` of packed tokens, a call a sample."""
    assert layout.lengths is not None
    parts, bias = zip(*(y[None].split(layout.lengths, dim=1) for y in (q, k, v)), strict=True), layout.key_bias
    out = [
        _attend(q, k, v, None if bias is None else bias[i : i + 1, ..., : q.shape[1]])
        for i, (q, k, v) in enumerate(parts)
    ]
    return torch.cat(out, dim=1)[0]


def _has_packed_kernel(q: torch.Tensor) -> bool:
    """Whether torch's attention over packed samples takes these queries [T, heads, d]."""
    return (
        varlen_attn is not None
        and q.is_cuda
        and torch.version.hip is None
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] + BIAS_CHANNELS <= 256
        and not torch.compiler.is_compiling()
        and torch.cuda.get_device_capability(q.device)[0] >= 8
    )


def attend_packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: Layout) -> torch.Tensor:
    """`attend` of packed tokens in one kernel without padding (CUDA, half precision).

    The kernel takes no bias. It rides on channels of its own: 1 in every query, bias / scale in the key.
    """
    scale, starts = q.shape[-1] ** -0.5, layout.starts
    k = torch.cat([k, layout.bias_channels(k, scale)], dim=-1)
    q, v = F.pad(q, (0, BIAS_CHANNELS), value=1.0), F.pad(v, (0, BIAS_CHANNELS))
    out = varlen_attn(q, k, v, starts, starts, layout.longest, layout.longest, scale=scale)
    return out[..., :-BIAS_CHANNELS]


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)


class GELUProjection(nn.Module):
    """Linear then tanh-GELU, under diffusers' parameter names."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(width, hidden)

    def forward(self, x: torch.Tensor, width: Width | None = None) -> torch.Tensor:
        h = self.proj(x) if width is None else width.linear(self.proj, x, 0)
        return torch.ops.aten.gelu_(h, approximate="tanh") if _may_overwrite(h) else F.gelu(h, approximate="tanh")


class FeedForward(nn.Module):
    """The block's MLP, under diffusers' parameter names (index 1 is diffusers' dropout, which is 0 in every DiT)."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.ModuleList([GELUProjection(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: torch.Tensor, layout: Layout, width: Width | None = None) -> torch.Tensor:
        if width is None:
            return self.net[2](self.net[0](x))
        return width.linear(self.net[2], width.mask(self.net[0](x, width), layout), 1)


class Modulation(nn.Module):
    """adaLN-Zero: six modulation vectors per sample from the conditioning, [B, D] each."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, 6 * width)

    def forward(self, condition: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.linear(condition).chunk(6, dim=-1)


class Block(nn.Module):
    """The DiT block, weights and names as in diffusers' `DiTTransformer2DModel`."""

    def __init__(self, width: int, heads: int, norm_eps: float):
        super().__init__()
        self.norm1 = Modulation(width)
        self.attn1 = Attention(width, heads)
        self.ff = FeedForward(width)
        self.norm_eps = norm_eps

    def forward(
        self, hidden_states: torch.Tensor, condition: torch.Tensor, layout: Layout, gates: BlockGates | None = None
    ) -> torch.Tensor:
        """hidden_states [B, M, D] or packed [T, D] or `Layout.spread`, condition = SiLU(c) [B, D]."""
        hidden_states = layout.enter(hidden_states)
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = self.norm1(condition)
        h = layout.modulate(F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=1e-6), scale_a, shift_a)
        attended = self.attn1(h, layout, None if gates is None else gates.heads)
        hidden_states = layout.add_gated(hidden_states, attended, gate_a)
        h = layout.modulate(F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=self.norm_eps), scale_f, shift_f)
        fed = self.ff(h, layout) if gates is None else self._feed(h, layout, gates, gates.tokens(hidden_states, layout))
        return layout.leave(layout.add_gated(hidden_states, fed, gate_f))

    def _feed(self, h: torch.Tensor, layout: Layout, gates: BlockGates, tokens: torch.Tensor) -> torch.Tensor:
        """The MLP for the tokens whose gate is on, and 0 for the others."""
        if not gates.skips:
            return self.ff(h, layout, gates.channels) * tokens[..., None].to(h.dtype)
        flat, rows = h.flatten(0, -2), tokens.flatten().nonzero()[:, 0]
        if len(rows) == len(flat):
            return self.ff(h, layout, gates.channels)
        fed = self.ff(flat[rows], layout, gates.channels)
        return fed.new_zeros(flat.shape).index_copy_(0, rows, fed).view_as(h)

    def is_plain(self) -> bool:
        """Whether its layers are nothing but their weights, so that parts of these can be taken: not compiled, no
        adapter, no quantised weights, no hooks such as those of offloading."""
        if self._compiled_call_impl is not None:
            return False
        layers = (self.attn1.to_q, self.attn1.to_k, self.attn1.to_v, self.attn1.to_out[0], self.ff.net[0].proj)
        return all(
            type(layer) is nn.Linear
            and type(layer.weight) is nn.Parameter
            and not (layer._forward_hooks or layer._forward_pre_hooks or hasattr(layer, "_diffusers_hook"))
            for layer in (*layers, self.ff.net[2])
        )


def group_norm(channels: int, groups: int = 32, fp32: bool = False) -> nn.GroupNorm:
    return (GroupNormFP32 if fp32 else nn.GroupNorm)(math.gcd(groups, channels), channels)


class ResBlock(nn.Module):
    """Latent-diffusion style residual block with a projection of the conditioning (DC-DiT, step 2)."""

    def __init__(self, width_in: int, width_out: int, condition_width: int):
        super().__init__()
        inner = min(width_in, width_out)
        self.norm1 = group_norm(width_in)
        self.conv1 = nn.Conv2d(width_in, inner, 3, padding=1)
        self.condition = nn.Linear(condition_width, inner)
        self.norm2 = group_norm(inner)
        self.conv2 = nn.Conv2d(inner, width_out, 3, padding=1)
        self.skip = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else nn.Identity()

    def forward(self, x: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """x [B, C, H, W], condition = SiLU(c) [B, D]."""
        h = self.conv1(_silu(self.norm1(x)))
        h = _add(h, self.condition(condition)[:, :, None, None])
        return _add(self.conv2(_silu(self.norm2(h))), self.skip(x))


class RMSNorm(nn.Module):
    """RMS norm over the last axis with a weight; eps 1e-5 as in the authors' code."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), 1e-5).to(x.dtype)


class _StraightThroughOne(torch.autograd.Function):
    @staticmethod
    def forward(ctx, p):
        return torch.ones_like(p)

    @staticmethod
    def backward(ctx, gradient):
        return gradient


# ---------------------------------------------------------------------------------------------------------------------
# Chunking arithmetic: functions of masks and positions, without parameters


def teacher_grid(height: int, width: int, patch: int, device: torch.device) -> torch.Tensor:
    """The top-left positions of the teacher's patches, bool [L]."""
    rows = torch.arange(height, device=device)[:, None] % patch == 0
    return (rows & (torch.arange(width, device=device) % patch == 0)).flatten()


def lattice_prior(height: int, width: int, patch: int, device: torch.device) -> torch.Tensor:
    """The router's fixed prior over positions, fp32 [L]: see `LATTICE`."""
    coarse = teacher_grid(height, width, 2 * patch, device)
    grid = teacher_grid(height, width, patch, device)
    high, zero, low = (torch.tensor(v, device=device) for v in LATTICE)
    return torch.where(coarse, high, torch.where(grid, zero, low))


def local_detail(x: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
    """log(sqrt(alpha_bar) * local standard deviation of x0 + .03) / .8, estimated from x_t alone; fp32 [B, L].

    The 3x3 variance of x_t holds that of the noise, sigma^2 * 8/9 on average with a relative spread of sqrt(2 / 9C);
    both the mean and two spreads are taken off, so that pure noise shows no detail.
    """
    x = x.float()
    mean = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    variance = (F.avg_pool2d(x * x, 3, 1, 1, count_include_pad=False) - mean * mean).mean(1)
    noise = (1 - alpha_bar)[:, None, None] * (8 / 9) * (1 + 2 * math.sqrt(2 / (9 * x.shape[1])))
    deviation = (variance - noise).clamp(min=0).sqrt()
    return torch.log(deviation.flatten(1) + DETAIL_FLOOR) / DETAIL_SCALE


def base_mask(detail: torch.Tensor, grid: torch.Tensor, tokens: int) -> torch.Tensor:
    """The tokens that an untrained router keeps: the teacher's grid, pruned or extended by detail to ``tokens``.

    detail fp32 [B, L], grid bool [L] -> bool [B, L]. The count of grid positions is passed by shape, not read back
    from the device.
    """
    rank = detail + torch.where(grid, 1e4, 0.0)  # every grid position ranks before every other one
    rank[:, 0] = torch.inf
    keep = torch.zeros_like(rank, dtype=torch.bool)
    return keep.scatter_(1, rank.topk(tokens, dim=1).indices, True)


def drop_tail(mask: torch.Tensor, logit: torch.Tensor, tail_drop: torch.Tensor) -> torch.Tensor:
    """Of the kept positions of each sample drop the fraction ``tail_drop`` with the lowest logit (DC-DiT, step 4).

    mask bool [B, L], logit [B, L], tail_drop fp32 [B] -> bool [B, L]. Ties fall to the later position; the count
    dropped is floor(kept * tail_drop) in fp32, as in the authors' code.
    """
    rank = logit.masked_fill(~mask, -torch.inf).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    kept = mask.sum(1, keepdim=True)
    dropped = (kept.float() * tail_drop[:, None]).long()
    return mask & (rank < kept - dropped)


def most_probable(logit: torch.Tensor, tokens: int) -> torch.Tensor:
    """The ``tokens`` positions of highest logit of each sample, of equal ones the earlier; [B, L] -> bool [B, L]."""
    rank = logit.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return rank < tokens


def nearest_kept(
    mask: torch.Tensor, height: int, width: int, shift: float, reach: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each position the kept position u that minimises |w - u - shift|^2; ties in raster order.

    ``shift`` >= 0 is in positions, the same for rows and columns, a multiple of 0.1. Exact integer arithmetic, first
    along rows, by scans, and then along columns, over ``reach`` rows on either side: O(L * reach), never L x M.

    Returns:
        int64 [B, L], and whether that is the nearest one for every position whatever lies outside of the reach, bool
        (always with None, which looks at all rows).
    """
    device, shift10, k = mask.device, round(10 * shift), math.ceil(shift)
    mask = mask.view(-1, height, width)
    far = 4 * (10 * (height + width) + shift10) ** 2  # farther than anything
    column = torch.arange(width, device=device)
    # In a row: the last kept column up to w - k, or the first one after it.
    left = torch.where(mask, column, -1).cummax(-1).values[..., (column - k).clamp(min=0)]
    right = torch.where(mask, column, -1).flip(-1)
    right = torch.where(right < 0, width, right).cummin(-1).values.flip(-1)[..., (column - k + 1).clamp(0, width - 1)]
    to_left = torch.where((column >= k) & (left >= 0), (10 * (column - left) - shift10) ** 2, far)
    to_right = torch.where(right < width, (10 * (column - right) - shift10) ** 2, far)
    kept_column = torch.where(to_left <= to_right, left, right)
    distance = torch.minimum(to_left, to_right)
    if far + (10 * height + shift10) ** 2 < 2**31:  # half the memory
        distance = distance.int()
    # In a column: rows i - k - reach + 1 to i - k + reach.
    if reach is None or reach >= height:
        row = torch.arange(height, device=device)
        squared = ((10 * (row[:, None] - row) - shift10) ** 2).to(distance.dtype)
        best, source_row = (squared[:, :, None] + distance[:, None]).min(2)  # of equal ones the first
        exact = torch.ones((), dtype=torch.bool, device=device)
    else:
        above, below = k + reach - 1, max(0, reach - k)
        rows = F.pad(distance, (0, 0, above, below), value=far).unfold(1, above + below + 1, 1)  # [B, H, W, rows]
        back = torch.arange(above, -below - 1, -1, device=device)
        best, nth = (rows + ((10 * back - shift10) ** 2).to(distance.dtype)).min(-1)
        source_row = torch.arange(height, device=device)[:, None] - above + nth
        source_row = source_row.clamp(0, height - 1)  # where nothing is in reach
        exact = (best < min(10 * (above + 1) - shift10, 10 * (below + 1) + shift10) ** 2).all()
    return (source_row * width + kept_column.gather(1, source_row)).flatten(1), exact


def compact(mask: torch.Tensor, longest: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kept positions of each sample in raster order.

    mask bool [B, L] -> index int64 [B, M] (padded with 0), valid bool [B, M], slot int64 [B, L] (a kept position's
    place in ``index``; undefined for the others).
    """
    batch, size = mask.shape
    slot = mask.cumsum(1) - 1
    position = torch.arange(size, device=mask.device).expand(batch, -1)
    index = position.new_zeros(batch, longest + 1).scatter_(1, torch.where(mask, slot, longest), position)[:, :longest]
    valid = torch.arange(longest, device=mask.device) < mask.sum(1, keepdim=True)
    return index * valid, valid, slot.clamp(min=0)


def _ragged(counts: list[int]) -> list[int] | None:
    """The tokens of each sample, or None where all have as many."""
    return counts if min(counts) < max(counts) else None


def gather_tokens(x_BLD: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows ``index`` [B, M] of [B, L, D] -> [B, M, D]."""
    return x_BLD.gather(1, index[:, :, None].expand(-1, -1, x_BLD.shape[-1]))


def overlap_add(
    entries: torch.Tensor, weight: torch.Tensor, index: torch.Tensor, grid: tuple[int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted mean of tokens' p x p entries where their windows lie, cut off at the border.

    entries [B, M, p*p, O], weight [B, M] (0 for padding), index int64 [B, M] -> mean [B, L, O], which is 0 where no
    window lies, and total weight [B, L, 1].
    """
    (height, width), patch = grid, math.isqrt(entries.shape[2])
    counted = F.pad(entries, (0, 1), value=1.0) * weight[..., None, None]
    where = index[..., None].expand(-1, -1, counted[0, 0].numel())
    plane = counted.new_zeros(len(counted), height * width, where.shape[-1]).scatter_add_(1, where, counted.flatten(2))
    plane = plane.unflatten(-1, counted.shape[2:]).permute(0, 3, 2, 1).flatten(1, 2)
    out = F.fold(plane, (height + patch - 1, width + patch - 1), patch)[..., :height, :width].flatten(2).transpose(1, 2)
    total, weights = out[..., :-1], out[..., -1:]
    return total / torch.where(weights > 0, weights, 1.0), weights


def smooth(
    h_BMD: torch.Tensor,
    p_BM: torch.Tensor,
    index: torch.Tensor,
    valid: torch.Tensor,
    grid: tuple[int, int],
    sigma: float,
) -> torch.Tensor:
    """Confidence-weighted Gaussian smoothing among kept tokens (DC-DiT, step 6), fp32 [B, M, D].

    h_i <- p_i h_i + (1 - p_i) sum_j W_ij h_j, W_ij = exp(-d_ij^2 / 2 sigma^2) p_j with rows normalised. Done as a
    normalised separable convolution on the grid: O(L), never M x M.
    """
    h, p = h_BMD.float(), (p_BM.float().clamp(1e-4, 1 - 1e-4) * valid)[:, :, None]
    batch, _, width = h.shape
    plane = h.new_zeros(batch, grid[0] * grid[1], width + 1)
    plane.scatter_add_(1, index[:, :, None].expand(-1, -1, width + 1), torch.cat([p * h, p], dim=-1))
    plane = plane.transpose(1, 2).unflatten(2, grid)
    with torch.autocast(h.device.type, enabled=False):
        plane = _blur(_blur(plane, sigma).transpose(2, 3), sigma).transpose(2, 3)
    total = gather_tokens(plane.flatten(2).transpose(1, 2), index)
    return p * h + (1 - p) * total[..., :-1] / (total[..., -1:] + 1e-8)


def _blur(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """Sums along the last axis [..., n] with weights exp(-d^2 / 2 sigma^2), fp32; those below 1e-11 are left out.

    One matrix product, on long axes one of band after band. (Left in, the smallest weights are denormal numbers, which
    made the product sixty times slower on a CPU.)
    """
    n = x.shape[-1]
    cut = min(n, math.ceil(GAUSSIAN_CUT * sigma))
    band = n if n <= 8 * cut else 4 * cut
    distance = torch.arange(-cut, band + cut, device=x.device)[:, None] - torch.arange(band, device=x.device)
    weight = torch.exp(-(distance.float() ** 2) / (2 * sigma**2)).masked_fill(distance.abs() > cut, 0.0)
    if band == n:
        return (x.flatten(0, -2) @ weight[cut : cut + n]).view(x.shape)
    bands = F.pad(x, (cut, cut + -n % band)).unfold(-1, band + 2 * cut, band)  # [..., bands, band + 2 cut]
    return (bands.flatten(0, -2) @ weight).view(*x.shape[:-1], -1)[..., :n]


def position_embedding(length: int, width: int, scale: float, device: torch.device) -> torch.Tensor:
    """1-D sin-cos embedding of positions 0, 1/scale, 2/scale ..., fp32 [length, width]; made in fp64 as MAE does."""
    omega = 10000.0 ** -(torch.arange(width // 2, dtype=torch.float64, device=device) / (width / 2))
    angle = (torch.arange(length, dtype=torch.float64, device=device) / scale)[:, None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=1).float()


# ---------------------------------------------------------------------------------------------------------------------
# Router


class PredictabilityScorer(nn.Module):
    """v2 router: how badly a 3x3 neighbourhood predicts the features of a position (DC-DiT, step 3), fp32 [B, L]."""

    def __init__(self, width: int, bottleneck: int):
        super().__init__()
        self.proj = Conv2dFP32(width, bottleneck, 1)
        self.context_predictor = Conv2dFP32(bottleneck, bottleneck, 3, padding=1)
        self.residual_scorer = nn.Sequential(
            Conv2dFP32(bottleneck, bottleneck, 3, padding=1),
            group_norm(bottleneck, 8, fp32=True),
            nn.SiLU(),
            Conv2dFP32(bottleneck, 1, 1),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = self.proj(x)
        return self.residual_scorer(z - self.context_predictor(z)).flatten(1)


class CosineScorer(nn.Module):
    """v1 router: dissimilarity of a position's query to the mean key of its 3x3 neighbourhood, as a logit, fp32 [B, L].

    p = (1 - q . mean(k)) / 2, so the logit is log((1 - s) / (1 + s)).
    """

    def __init__(self, width: int):
        super().__init__()
        self.query = Conv2dFP32(width, width, 1, bias=False)
        self.key = Conv2dFP32(width, width, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key = F.normalize(self.query(x), dim=1), F.normalize(self.key(x), dim=1)
        similarity = (query * F.avg_pool2d(key, 3, 1, 1)).sum(1).flatten(1).clamp(-1 + 1e-4, 1 - 1e-4)
        return torch.log((1 - similarity) / (1 + similarity))


class Router(nn.Module):
    """Learned boundary scores. In the lean scaffold the score is modulated by the conditioning and gated from zero.

    ``bias`` is a controller's state, not a parameter: training moves it so that 1/N of all positions are kept.
    """

    def __init__(self, kind: str, width: int, bottleneck: int, condition_width: int, lean: bool):
        super().__init__()
        self.scorer = PredictabilityScorer(width, bottleneck) if kind == "predictability" else CosineScorer(width)
        self.condition = LinearFP32(condition_width, 2) if lean else None
        if lean:
            self.gain = nn.Parameter(torch.zeros(1) if kind == "cosine" else torch.ones(1))  # FSDP takes no scalars
            self.register_buffer("bias", torch.zeros(()))

    def forward(
        self, features: torch.Tensor, condition: torch.Tensor, *fixed: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """features [B, E, H, W], condition = SiLU(c) [B, D] -> the score, learned plus ``fixed`` terms [B, L] or [L],
        and the score with the bias; fp32 [B, L]."""
        score = self.scorer(features)
        if self.condition is None:
            return score, score
        a, b = self.condition(condition).chunk(2, dim=1)
        score = self.gain.float() * score * (1 + a) + b
        for term in fixed:
            score = score + term
        return score, score + self.bias.float()


def hashed(seed: torch.Tensor, size: int) -> torch.Tensor:
    """``size`` evenly spread numbers below 2^32 for each of the seeds, int64 [B] -> [B, size].

    An integer hash of (seed, place), so that a sample does not depend on its batch-mates or on global state.
    """
    place = torch.arange(size, device=seed.device)[None]
    h = (place * 2654435761 + seed[:, None] * 40503) & 0xFFFFFFFF
    for _ in range(2):
        h = ((h ^ (h >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return h ^ (h >> 16)


def logistic_noise(seed: torch.Tensor, size: int) -> torch.Tensor:
    """Noise of gates that train, from seeds [B]; fp32 [B, size]."""
    return torch.logit((hashed(seed, size).double() + 0.5) / 2**32).float()


def random_logit(timestep: torch.Tensor, size: int, ratio: float) -> torch.Tensor:
    """Ablation: a fixed random choice of 1/ratio of the positions for each timestep, as logits, fp32 [B, L]."""
    uniform = hashed(timestep.long() + 1, size).double() / 2**32
    return (8 * (uniform - (1 - 1 / ratio))).float()


class DyDiTRouters(nn.Module):
    """DyDiT's routers of all blocks (arXiv 2410.03456): heads and groups of channels by the timestep alone, and by the
    token whether it goes through the MLP. The first head and group are always on. All gates start open."""

    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        self.shape = layers, 2, heads - 1
        self.width = LinearFP32(width, math.prod(self.shape))
        narrow = max(1, width // 16)
        self.tokens = nn.ModuleList(
            nn.Sequential(LinearFP32(width, narrow), nn.ReLU(), LinearFP32(narrow, 1)) for _ in range(layers)
        )
        for layer in (self.width, *(router[-1] for router in self.tokens)):
            nn.init.zeros_(layer.weight)
            nn.init.constant_(layer.bias, OPEN_GATE)

    def forward(self, time: torch.Tensor, seed: torch.Tensor | None) -> Gates:
        """time [B, D], the timestep's embedding; seeds of the noise, int64 [B], or None."""
        with torch.autocast(time.device.type, enabled=False):
            logit = self.width(time.float())
        noise = None if seed is None else logistic_noise(seed, logit.shape[1])
        gate = straight_through(logit, noise).unflatten(1, self.shape)
        heads, channels = F.pad(gate, (1, 0), value=1.0).unbind(2)
        return Gates(heads, channels, seed)

    def of_blocks(self, gates: Gates, blocks: nn.ModuleList, longest: int) -> list[BlockGates]:
        """What each block needs; on the device one thing is waited for, what is on for all blocks together."""

        def width(gate: torch.Tensor, on: list[bool] | None) -> Width | None:
            if on is None:
                return Width(gate)
            return None if all(on) else Width(gate, runs_of(on))

        kept = None
        if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            on = torch.stack([gates.heads, gates.channels]).bool().cpu()  # [2, B, layers, heads]
            kept = on[:, 0].tolist() if (on == on[:, :1]).all() else None
        out = []
        for i, block in enumerate(blocks):
            skips = kept is not None and block.is_plain()
            heads, channels = (
                width(gate[:, i], kept[which][i] if kept is not None and skips else None)
                for which, gate in enumerate((gates.heads, gates.channels))
            )
            noise = None if gates.seed is None else logistic_noise(gates.seed + i + 1, longest)
            share = torch.zeros_like(gates.heads[:, i, 0])
            out.append(BlockGates(heads, channels, self.tokens[i], noise, skips, share))
        return out


# ---------------------------------------------------------------------------------------------------------------------
# Budgets


@dataclass(frozen=True)
class Schedule:
    """A number for every timestep, piecewise constant: ``pairs`` of (t, number) hold from t up; sorted, from t = 0."""

    pairs: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, name: str, value: Any) -> "Schedule | None":
        """A mapping {t: number} or a list of pairs as a schedule, None for anything else.

        Keys may be strings, which JSON makes of them. Raises ValueError, which calls it ``name``.
        """
        pairs = [*value.items()] if isinstance(value, Mapping) else value
        if not isinstance(pairs, list | tuple) or not all(isinstance(p, list | tuple) and len(p) == 2 for p in pairs):
            return None
        try:
            made = sorted((int(str(t)), float(number)) for t, number in pairs)
        except (TypeError, ValueError):
            raise ValueError(f"{name} must hold timesteps and numbers, got {value}") from None
        starts = [t for t, _ in made]
        if starts[:1] != [0] or len(set(starts)) < len(starts):
            raise ValueError(f"{name} must begin at t = 0 and name no timestep twice, got {value}")
        return cls(tuple(made))

    def at(self, t: float) -> float:
        """The number for a timestep that the host knows."""
        return [number for start, number in self.pairs if t >= start or not start][-1]

    def values(self, timestep: torch.Tensor) -> torch.Tensor:
        """The numbers for timesteps [B], fp32 [B], made on their device without a look at them."""
        numbers = torch.full_like(timestep, self.pairs[0][1], dtype=torch.float32)
        for start, number in self.pairs[1:]:
            numbers = torch.where(timestep >= start, number, numbers)
        return numbers


TailDrop: TypeAlias = float | Sequence[float] | torch.Tensor | Mapping[int, float] | Sequence[tuple[int, float]]
"""A share in [0, 1): of all samples, of each ([B]; half as many are for the two halves of a guided batch alike), or of
each range of timesteps (see `Schedule`)."""


def _tail_drop(name: str, value: TailDrop) -> float | torch.Tensor | Schedule:
    """A share in one of its three forms; per-sample values as fp32 on the CPU. Raises ValueError for any other."""
    made: Any = Schedule.of(name, value)
    try:
        if made is not None:
            numbers = [number for _, number in made.pairs]
        elif isinstance(value, list | tuple) or (isinstance(value, torch.Tensor) and value.ndim):
            made = torch.as_tensor(value, dtype=torch.float32, device="cpu").detach()
            numbers = made.tolist() if made.ndim == 1 else []
        else:
            made = float(value)  # type: ignore[arg-type]
            numbers = [made]
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, one a sample, or a schedule, got {value!r}") from None
    if not numbers or not all(0 <= number < 1 for number in numbers):
        raise ValueError(f"{name} must be in [0, 1), got {value}")
    return made


# ---------------------------------------------------------------------------------------------------------------------
# The model


class ChunkedDiT(ModelMixin, ConfigMixin, PeftAdapterMixin, CacheMixin):
    """A DiT whose blocks run on the tokens that a router keeps.

    Args:
        num_attention_heads, attention_head_dim, in_channels, out_channels, num_layers, sample_size, norm_eps:
            as in diffusers' `DiTTransformer2DModel`; ``sample_size`` is the side of the latent grid.
        num_classes: classes without the null class, which is label ``num_classes`` (and every label past it).
        patch_size: patch size p of the teacher whose embedding and head the lean scaffold holds; 1 for ``paper``.
        time_embedding: "diffusers" or "meta", the convention of the sinusoidal timestep embedding.
        num_embedders: 1, or ``num_layers`` where a fine-tune of the teacher has split the embedders.
        scaffold: "lean" or "paper".
        ratio: target ratio N = L / tokens kept.
        router: "predictability", "cosine", "random" or "grid".
        guide: weight k of the untrained start in the router's logit (lean): large = the base mask, 0 = learned only.
        scaffold_width: E, 0 for a quarter of the block width.
        encoder_layers, decoder_layers: residual blocks on either side.
        smoothing_sigma: standard deviation of the smoothing kernel, in positions (1 at 32x32 latents, 2 at 64x64).
        condition_adaptor: a trainable LayerNorm on the conditioning of encoder and decoder (published upcycling).
        num_train_timesteps, beta_start, beta_end, beta_schedule: the noise schedule of the teacher (lean: the fill of
            uncovered positions works in x0 space).
        sample_range: clamp of the x0 estimate there: 1 for pixels, about 5 for scaled VAE latents.
        tail_drop, uncond_tail_drop, tokens, budget: what `set_tail_drop`, `set_lite_cfg`, `set_tokens` and `set_budget`
            set at first, in forms that JSON holds; ``budget`` is a share or the arguments, such as {"tflops": 40}.
        calibration: what `upcycle calibrate` measured for `set_budget`; of FLOPs a + b M + c M^2 of a forward it
            holds a, b and c.
        dydit: share of the blocks' FLOPs that gates in the blocks are trained to (DyDiT's lambda); 0 for no gates.
    """

    _auto_class = "AutoModel"
    _supports_gradient_checkpointing = True
    # Lists, not tuples: diffusers wraps anything else into a list of one.
    _no_split_modules = ["Block"]  # noqa: RUF012
    _keep_in_fp32_modules = ["routing_module", "dydit_routers"]  # noqa: RUF012
    _skip_layerwise_casting_patterns = [  # noqa: RUF012
        "pos_embed", "norm", "routing_module", "dydit_routers", "timestep_embedder",
    ]  # fmt: skip

    @register_to_config
    def __init__(
        self,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        in_channels: int = 4,
        out_channels: int = 8,
        num_layers: int = 28,
        sample_size: int = 32,
        num_classes: int = 1000,
        patch_size: int = 2,
        norm_eps: float = 1e-5,
        time_embedding: str = "diffusers",
        num_embedders: int = 1,
        scaffold: str = "lean",
        ratio: float = 4.0,
        router: str = "predictability",
        guide: float = 8.0,
        scaffold_width: int = 0,
        encoder_layers: int = 2,
        decoder_layers: int = 2,
        smoothing_sigma: float = 1.0,
        condition_adaptor: bool = False,
        num_train_timesteps: int = 1000,
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        sample_range: float = 5.0,
        tail_drop: float | list | dict = 0.0,
        uncond_tail_drop: float | list | dict | None = None,
        tokens: int | list | dict | None = None,
        budget: float | dict | None = None,
        calibration: dict[str, Any] | None = None,
        dydit: float = 0.0,
    ):
        super().__init__()
        if scaffold not in ("lean", "paper"):
            raise ValueError(f"scaffold must be 'lean' or 'paper', got {scaffold!r}")
        if router not in ("predictability", "cosine", "random", "grid"):
            raise ValueError(f"router must be predictability, cosine, random or grid, got {router!r}")
        if not 0 <= dydit < 1 or (dydit and num_attention_heads < 2):
            raise ValueError(f"dydit must be in [0, 1), and needs two heads or more; got {dydit}")
        D, lean = num_attention_heads * attention_head_dim, scaffold == "lean"
        E = scaffold_width or D // 4
        self.gradient_checkpointing = False
        self.guide = guide
        self.set_tail_drop(tail_drop)
        self.set_lite_cfg(uncond_tail_drop)
        if budget is not None and (tail_drop or tokens is not None):
            raise ValueError(f"budget {budget} finds the tail drop: give tail_drop=0 and tokens=None beside it")
        if budget is not None:
            self.set_budget(**(budget if isinstance(budget, dict) else {"share": budget}))
        self.set_tokens(tokens)
        self._constants: dict[tuple, torch.Tensor] = {}
        self._cached_run: tuple[tuple, torch.Tensor, torch.Tensor] | None = None  # what the last call was of

        self.embedders = nn.ModuleList(
            TimestepLabelEmbedder(D, num_classes, frequency_shift=int(time_embedding == "diffusers"))
            for _ in range(num_embedders)
        )
        self.transformer_blocks = nn.ModuleList(Block(D, num_attention_heads, norm_eps) for _ in range(num_layers))
        self.condition_norm = nn.LayerNorm(D) if condition_adaptor else nn.Identity()
        self.conv_in = nn.Conv2d(in_channels, E, 3, padding=1)
        learned = router in ("predictability", "cosine")
        self.routing_module: Router | None = None
        if lean:
            self.pos_embed = nn.ModuleDict({"proj": WindowConv2d(in_channels, D, patch_size, stride=patch_size)})
            self.encoder = nn.ModuleList(ResBlock(E, E, D) for _ in range(encoder_layers))
            self.widen = nn.Linear(E, D)
            bottleneck = -(-E // 16) * 8  # half the width, a multiple of the 8 groups of the scorer's norm
            if learned:
                self.routing_module = Router(router, E, bottleneck, D, lean)
            self.proj_out_1 = nn.Linear(D, 2 * D)
            self.proj_out_2 = nn.Linear(D, patch_size**2 * out_channels)
            self.fill_log_variance = nn.Linear(D, 1)
            self.narrow = nn.Linear(D, E)
            self.residual = nn.Conv2d(E, E, 1)
            self.conv_base = nn.Conv2d(in_channels + out_channels + 3, E, 3, padding=1)
            self.decoder = nn.ModuleList(ResBlock(E, E, D) for _ in range(decoder_layers))
            self.norm_correction = group_norm(E)
            self.conv_out = nn.Conv2d(E, out_channels, 3, padding=1)
        else:
            widths = [E] * encoder_layers + [D]
            self.encoder = nn.ModuleList(ResBlock(widths[i], widths[i + 1], D) for i in range(encoder_layers))
            self.encoder_norm = RMSNorm(D)
            if learned:
                self.routing_module = Router(router, D, D // 4, D, lean)
            self.blocks_norm = RMSNorm(D)
            self.residual = nn.Linear(D, D)
            self.decoder = nn.ModuleList(ResBlock(D if i == 0 else E, E, D) for i in range(decoder_layers))
            self.decoder_norm = RMSNorm(E)
            self.proj_out_1 = nn.Linear(D, 2 * E)
            self.proj_out_2 = nn.Linear(E, out_channels)
        self.dydit_routers = DyDiTRouters(D, num_attention_heads, num_layers) if dydit and num_layers else None

    # -- budgets ------------------------------------------------------------------------------------------------------

    def set_tail_drop(self, tail_drop: TailDrop) -> None:
        """Drop this share of the kept tokens from now on (DC-DiT, elastic inference): a number, one a sample, or a
        schedule over t, such as {0: 0.2, 500: 0.5}. Ends a `set_budget`. Raises ValueError unless all are in [0, 1)."""
        self.tail_drop = _tail_drop("tail_drop", tail_drop)
        self.budget: dict[str, Any] | None = None

    def set_lite_cfg(self, uncond: TailDrop | None) -> None:
        """Drop this share for samples of the null class from now on, the unconditional half under guidance; forms as of
        `set_tail_drop`, None: as for the others (DC-DiT, Lite-CFG). A `set_budget` is met anew."""
        self.uncond_tail_drop = None if uncond is None else _tail_drop("uncond", uncond)
        if self.budget is not None:
            self.set_budget(**self.budget)

    def set_tokens(self, tokens: int | Mapping[int, int] | Sequence[tuple[int, int]] | None) -> None:
        """Keep this many tokens of every sample from now on, the most probable ones, whatever the other budgets say
        (None: as many as the router likes). All shapes are static then, and a forward never waits for the device,
        but for a schedule over t, such as {0: 160, 500: 64}: it reads the timesteps, of which all must ask for as many.
        """
        schedule = Schedule.of("tokens", {0: tokens} if isinstance(tokens, int | float) else tokens)
        if tokens is not None and not (schedule and all(n >= 1 and n.is_integer() for _, n in schedule.pairs)):
            raise ValueError(f"tokens must be at least 1, or a schedule of such numbers, got {tokens}")
        changes = schedule is not None and len(schedule.pairs) > 1
        self.tokens: int | Schedule | None = schedule if schedule is None or changes else int(schedule.at(0))

    def set_budget(
        self,
        share: float | None = None,
        *,
        tflops: float | None = None,
        steps: int | None = None,
        guided: bool | None = None,
    ) -> None:
        """Spend this much on an image from now on; finds the tail drop that does, from what `upcycle calibrate` stored.

        Args:
            share: of what the teacher's run costs; or
            tflops: 10^12 FLOPs in the papers' counting (2 per multiply-add), all steps, both halves under guidance.
            steps, guided: the run that it is for, by default the one that was calibrated.

        `set_lite_cfg` stays as it is for the null class. A later `set_tail_drop` ends the budget.

        Raises:
            ValueError: no calibration, or no tail drop costs as much; it names the range that can be had.
        """
        if (share is None) == (tflops is None):
            raise ValueError("give either share, of the teacher's cost, or tflops")
        known: dict[str, Any] | None = self.config.calibration
        if not known:
            raise ValueError("this model is not calibrated, so it cannot meet a budget; run upcycle calibrate on it")
        if self.config.dydit:
            raise ValueError("gates (dydit) spend by the timestep, which no calibration holds; set a tail drop instead")
        if guided and not known["unconditional"]:
            raise ValueError("this model is calibrated without guidance; run upcycle calibrate with --guidance-scale")
        halves = 2 if guided or (guided is None and known["unconditional"]) else 1
        count = known["steps"] if steps is None else steps
        asked, unit, whole = tflops or 0.0, "TFLOPs an image", 1e12
        if share is not None:
            asked, unit, whole = share, "of its teacher's cost", count * halves * known["teacher_flops"]

        def cost(rho: float) -> float:
            return count * self._forward_flops(rho, halves) / whole

        low, high = 0.0, 1 - 2**-24
        least, most = cost(high), cost(low)
        if not least <= asked <= most:
            why = "a tail drop near 1 costs more" if asked < least else "a tail drop of 0 costs less"
            raise ValueError(f"a budget of {asked:g} {unit} is not to be had ({why}); {least:.4g} to {most:.4g} are")
        if asked < most:
            for _ in range(50):
                middle = (low + high) / 2
                low, high = (middle, high) if cost(middle) > asked else (low, middle)
        self.set_tail_drop(high if asked < most else 0.0)
        self.budget = {"share": share, "tflops": tflops, "steps": steps, "guided": guided}

    def _forward_flops(self, tail_drop: float, halves: int) -> float:
        """FLOPs of a step of an image at this tail drop, on average over the calibrated timesteps; ``halves`` 2: with
        the unconditional one."""
        known = self.config.calibration
        a, b, c = known["flops"]
        uncond = tail_drop if self.uncond_tail_drop is None else self.uncond_tail_drop
        parts = [(known["conditional"], tail_drop), (known["unconditional"], uncond)][:halves]
        total = 0.0
        for half, drop in parts:
            for t, mean, square in zip(known["timesteps"], half["tokens"], half["squares"], strict=True):
                drops = drop.tolist() if isinstance(drop, torch.Tensor) else [drop]
                for rho in (d.at(t) if isinstance(d, Schedule) else d for d in drops):
                    # The count dropped is rounded down: of M tokens (1 - rho) M and about half a token stay.
                    kept, rest = (1 - rho) * mean, min(0.5, rho * mean)
                    squares = (1 - rho) ** 2 * square + 2 * kept * rest + 4 / 3 * rest**2
                    total += (a + b * max(1.0, kept + rest) + c * max(1.0, squares)) / len(drops)
        return total / len(known["timesteps"])

    def _per_sample(self, name: str, timestep: torch.Tensor) -> float | torch.Tensor:
        """The share ``name`` ("tail_drop" or "uncond_tail_drop") for samples at ``timestep`` [B]: a float, or fp32 [B].

        Half as many values as samples are for the two halves of a guided batch.
        """
        value, batch = getattr(self, name), len(timestep)
        if isinstance(value, Schedule):
            return value.values(timestep) if len(value.pairs) > 1 else value.pairs[0][1]
        if not isinstance(value, torch.Tensor):
            return value
        if value.device != timestep.device:
            value = value.to(timestep.device)
            setattr(self, name, value)  # copied once
        if batch not in (len(value), 2 * len(value)):
            raise ValueError(f"{name} has {len(value)} values, and the batch {batch} samples; give one an image")
        return value if len(value) == batch else value.repeat(2)

    def _tokens_at(self, timestep: torch.Tensor) -> int | None:
        """What `set_tokens` asks for at ``timestep`` [B]."""
        if not isinstance(self.tokens, Schedule):
            return self.tokens
        asked = {int(self.tokens.at(t)) for t in timestep.tolist()}
        if len(asked) > 1:
            raise ValueError(f"tokens must be one number for a batch, and its timesteps ask for {sorted(asked)}")
        return asked.pop()

    # -- caches of diffusers ------------------------------------------------------------------------------------------

    def enable_cache(self, config) -> None:
        """Leave blocks out in steps that hardly differ from the last, by a `FirstBlockCacheConfig`, `MagCacheConfig` or
        `TaylorSeerCacheConfig` of diffusers; the scaffold and the router run in every step.

        The tokens kept may change between steps (`Layout`). A call that does not go on from the last one (another
        shape, other classes, a timestep that is not below) begins a new run, with an empty cache.

        Raises:
            ValueError: another cache, one that looks inside of blocks, or a diffusers that knows none.
        """
        try:
            from diffusers import hooks
            from diffusers.hooks._helpers import TransformerBlockMetadata, TransformerBlockRegistry

            known = hooks.FirstBlockCacheConfig, hooks.MagCacheConfig, hooks.TaylorSeerCacheConfig
        except (ImportError, AttributeError) as error:
            raise ValueError(f"caches of this diffusers do not fit ChunkedDiT: {error}; take 0.42") from error
        if not isinstance(config, known):
            names = ", ".join(cls.__name__ for cls in known)
            raise ValueError(f"ChunkedDiT takes {names}, not {type(config).__name__}")
        if len(self.transformer_blocks) < 2:
            raise ValueError("a cache needs two blocks or more, and this model has one")
        if isinstance(config, hooks.TaylorSeerCacheConfig):
            config = self._whole_blocks(config)
        for block in {type(block) for block in self.transformer_blocks}:
            TransformerBlockRegistry.register(block, TransformerBlockMetadata(return_hidden_states_index=0))
        super().enable_cache(config)
        self._cached_run = None

    def _whole_blocks(self, config):
        """A TaylorSeer config that predicts outputs of whole blocks, by default of the last: no other is needed."""
        last, block = len(self.transformer_blocks) - 1, r"transformer_blocks\.\d+"
        if config.use_lite_mode or config.skip_predict_identifiers:
            raise ValueError("TaylorSeer's use_lite_mode and skip_predict_identifiers are not for ChunkedDiT")
        if config.cache_identifiers is None:
            others = rf"transformer_blocks\.(?!{last}$)\d+"
            identifiers = {"cache_identifiers": [rf"transformer_blocks\.{last}"], "skip_predict_identifiers": [others]}
            return dataclasses.replace(config, **identifiers)
        names = [
            name for name, _ in self.named_modules() if any(re.fullmatch(i, name) for i in config.cache_identifiers)
        ]
        if not names or not all(re.fullmatch(block, name) for name in names):
            raise ValueError(
                f"TaylorSeer's cache_identifiers must match whole blocks of ChunkedDiT ({block}), or be left out; they "
                f"match {', '.join(names[:3]) or 'nothing'}"
            )
        return config

    @contextlib.contextmanager
    def _caching(self, x: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor):
        """A call with a cache: what was kept of another run is forgotten before, and all of it where the call fails."""
        kind = x.shape, x.dtype, x.device
        last, self._cached_run = self._cached_run, None
        if last is None or last[0] != kind or not torch.equal(last[1], class_labels) or (timestep >= last[2]).any():
            self._reset_stateful_cache()
        with self.cache_context("default"):
            yield
        self._cached_run = kind, class_labels.clone(), timestep.clone()

    # -- constants, made once a device --------------------------------------------------------------------------------

    def _constant(self, name: str, device: torch.device, make, *key) -> torch.Tensor:
        if (name, device, *key) not in self._constants:
            with torch.inference_mode(False), torch.no_grad():
                self._constants[(name, device, *key)] = make()
        return self._constants[(name, device, *key)]

    def alpha_bar(self, timestep: torch.Tensor) -> torch.Tensor:
        """Cumulative signal power at integer timesteps [B] -> fp32 [B]."""
        c = self.config

        def make() -> torch.Tensor:
            power = 0.5 if c.beta_schedule == "scaled_linear" else 1.0
            ends = c.beta_start**power, c.beta_end**power
            beta = torch.linspace(*ends, c.num_train_timesteps, dtype=torch.float64) ** (1 / power)
            return (1 - beta).cumprod(0).float().to(timestep.device)

        table = self._constant("alpha_bar", timestep.device, make)
        return table[timestep.long().clamp(0, c.num_train_timesteps - 1)]

    def positions(self, index: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """Position embeddings of the tokens ``index`` [B, M] -> [B, M, D]; columns first, as in MAE."""
        height, width = grid
        half, scale = self.config.num_attention_heads * self.config.attention_head_dim // 2, self.config.patch_size
        device = index.device
        if self.config.scaffold == "paper":
            scale = 1
        column = self._constant("column", device, lambda: position_embedding(width, half, scale, device), width)
        row = self._constant("row", device, lambda: position_embedding(height, half, scale, device), height)
        return torch.cat([column[index % width], row[index // width]], dim=-1)

    # -- routing ------------------------------------------------------------------------------------------------------

    def route(
        self,
        features: torch.Tensor,
        x: torch.Tensor,
        timestep: torch.Tensor,
        condition: torch.Tensor,
        tail_drop: float | torch.Tensor,
        guide: float | torch.Tensor,
    ) -> Routing:
        """Decide which positions to keep; see `Routing`. Runs in fp32."""
        c, device = self.config, x.device
        height, width = x.shape[-2:]
        size, lean = height * width, c.scaffold == "lean"
        with torch.autocast(device.type, enabled=False):
            if c.router == "grid":
                stride = round(c.ratio**0.5)
                on = self._constant(
                    "grid", device, lambda: teacher_grid(height, width, stride, device), height, width, stride
                )
                score = torch.where(on, 8.0, -8.0).expand(x.shape[0], -1)
                logit = score
            elif c.router == "random":
                logit = score = random_logit(timestep, size, c.ratio)
            else:
                assert self.routing_module is not None
                if not lean:
                    score, logit = self.routing_module(features, condition)
                else:
                    prior = self._constant(
                        "prior", device, lambda: lattice_prior(height, width, c.patch_size, device), height, width
                    )
                    detail = local_detail(x, self.alpha_bar(timestep))
                    score, logit = self.routing_module(features, condition, prior, detail)
                    if isinstance(guide, torch.Tensor) or guide:
                        logit = logit + guide * self.untrained_sign(detail, (height, width))
            probability = torch.sigmoid(logit)
            always = torch.zeros(size, dtype=torch.bool, device=device)
            always[0] = True
            if not lean:
                always[-1] = True
            probability = torch.where(always, 1.0, probability)
            ranking = torch.where(always, torch.inf, logit)
            natural = ranking > 0
            mask = natural
            tokens = self._tokens_at(timestep)
            if tokens is not None:
                tokens = min(tokens, size)
                mask = most_probable(ranking.detach(), tokens)
                return Routing(logit, probability, natural, mask, score, tokens)
            if isinstance(tail_drop, torch.Tensor) or tail_drop > 0:
                if not isinstance(tail_drop, torch.Tensor):
                    tail_drop = torch.full((x.shape[0],), tail_drop, device=device)  # made there, not copied
                mask = drop_tail(natural, ranking.detach(), tail_drop.to(device, torch.float32))
        return Routing(logit, probability, natural, mask, score)

    def untrained_sign(self, detail: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """g of the router's logit: +1 on the tokens that an untrained router keeps, -1 elsewhere; [B, L] or [L]."""
        (height, width), device, patch = grid, detail.device, self.config.patch_size
        on = self._constant("patches", device, lambda: teacher_grid(height, width, patch, device), height, width)
        count = -(-height // patch) * -(-width // patch)
        tokens = max(1, round(height * width / self.config.ratio))
        keep = on if tokens == count else base_mask(detail, on, tokens)
        return torch.where(keep, 1.0, -1.0)

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | None = None,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
        tail_drop: float | torch.Tensor | None = None,
        guide: float | torch.Tensor | None = None,
        gate_seed: torch.Tensor | None = None,
    ) -> ChunkedDiTOutput | tuple[torch.Tensor]:
        """Predict the noise (and the learned sigma) of noisy latents.

        Args:
            hidden_states: x_t, [B, C, H, W].
            timestep: integer timesteps, [B] or a scalar.
            class_labels: class ids, [B]; ``num_classes`` and above are the null class.
            return_dict: False for a plain tuple ``(sample,)``.
            tail_drop: fraction to drop, a float or fp32 [B] (Lite-CFG); default: what `set_tail_drop` and
                `set_lite_cfg` set.
            guide: weight k of the untrained start, a float or fp32 [B, 1]; default: ``self.guide``.
            gate_seed: while DyDiT's gates train, seeds of their noise, int64 [B]; default: no noise.

        Returns:
            `ChunkedDiTOutput`, or ``(sample,)``.
        """
        batch = hidden_states.shape[0]
        timestep = torch.as_tensor(timestep, device=hidden_states.device).reshape(-1).expand(batch)
        if tail_drop is None:
            tail_drop = self._per_sample("tail_drop", timestep)
            if self.uncond_tail_drop is not None:
                null = class_labels >= self.config.num_classes
                tail_drop = torch.where(null, self._per_sample("uncond_tail_drop", timestep), tail_drop)
        guide = self.guide if guide is None else guide
        embeddings = [embedder(timestep, class_labels) for embedder in self.embedders]
        conditions = [F.silu(c) for c in embeddings]
        scaffold_condition = F.silu(self.condition_norm(embeddings[0]))
        gates = None
        if self.dydit_routers is not None:
            gates = self.dydit_routers(self.embedders[0](timestep), gate_seed)
        run = self._forward_lean if self.config.scaffold == "lean" else self._forward_paper
        cached = self.is_cache_enabled
        with self._caching(hidden_states, timestep, class_labels) if cached else contextlib.nullcontext():
            sample, routing = run(hidden_states, timestep, conditions, scaffold_condition, tail_drop, guide, gates)
        if not return_dict:
            return (sample,)
        return ChunkedDiTOutput(sample=sample, routing=routing, gates=gates)

    def run_blocks(
        self,
        tokens: torch.Tensor,
        conditions: list[torch.Tensor],
        key_bias: torch.Tensor | None,
        valid: torch.Tensor,
        lengths: list[int] | None,
        index: torch.Tensor,
        owner_slot: torch.Tensor,
        gates: Gates | None = None,
    ) -> torch.Tensor:
        """The transformer: tokens [B, M, D], conditions one or num_layers of [B, D], key_bias [B, M] or None.

        ``valid`` bool [B, M] marks the ``lengths`` tokens that are not padding (None: there is none), which comes back
        as zero. ``index`` and ``owner_slot``: as in `Chunks`. ``gates`` get their ``tokens``
        here.
        """
        layout = Layout(lengths)
        if lengths is None:
            layout.batch, layout.longest = tokens.shape[:2]
        if key_bias is not None:
            layout.key_bias = key_bias.to(tokens.dtype)[:, None, None]
        if lengths is not None:
            layout.place = compact(valid.view(1, -1), sum(lengths))[0][0]
        tokens = layout.pack(tokens)
        if self.is_cache_enabled:
            layout.spread = index, owner_slot
            tokens = layout.leave(tokens)
        own: list[BlockGates] = []
        if self.dydit_routers is not None and gates is not None:
            own = self.dydit_routers.of_blocks(gates, self.transformer_blocks, layout.longest)
        for i, block in enumerate(self.transformer_blocks):
            condition = conditions[i % len(conditions)]
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                tokens = self._gradient_checkpointing_func(block, tokens, condition, layout, *own[i : i + 1])
            else:
                tokens = block(tokens, condition, layout, *own[i : i + 1])
        if gates is not None:
            gates.tokens = torch.stack([block.share for block in own], dim=1)
        return layout.pad(layout.enter(tokens))

    def _forward_lean(self, x, timestep, conditions, scaffold_condition, tail_drop, guide, gates):
        features = self.encode(x, scaffold_condition)
        routing = self.route(features, x, timestep, scaffold_condition, tail_drop, guide)
        chunks = self.chunk(x, routing, timestep)
        tokens = self.embed_tokens(x, features, chunks)
        tokens = self.run_blocks(
            tokens, conditions, chunks.key_bias, chunks.valid, chunks.lengths, chunks.index, chunks.owner_slot, gates
        )
        entries = self.head(tokens, conditions[0], chunks, timestep)
        base, geometry = self.dechunk(entries, tokens, x, chunks, timestep)
        correction = self.decode(tokens, x, base, geometry, features, routing, chunks, timestep, scaffold_condition)
        return (base + correction).to(x.dtype), routing

    def encode(self, x: torch.Tensor, scaffold_condition: torch.Tensor) -> torch.Tensor:
        """x_t [B, C, H, W] -> features [B, E, H, W]."""
        features = self.conv_in(x)
        for block in self.encoder:
            features = block(features, scaffold_condition)
        return features

    def chunk(self, x: torch.Tensor, routing: Routing, timestep: torch.Tensor) -> Chunks:
        """Decide who owns which position; the one host synchronisation that a ragged batch needs is here."""
        patch = self.config.patch_size
        if routing.tokens is not None:
            owner, cell_size, log_cell, _ = self._cells(routing.mask, x.shape[-2:], None)
            lengths, longest, uneven = None, routing.tokens, True
        else:
            reach = max(REACH, patch)  # a cell of the teacher's grid is within
            owner, cell_size, log_cell, exact = self._cells(routing.mask, x.shape[-2:], reach)
            flags = torch.stack([(log_cell != 0).any(), exact])
            *counts, uneven, found = torch.cat([routing.mask.sum(1), flags]).tolist()
            lengths, longest = _ragged(counts), max(counts)
            if not found:
                owner, cell_size, log_cell, _ = self._cells(routing.mask, x.shape[-2:], None)
                uneven = True
        index, valid, slot = compact(routing.mask, longest)
        owner_slot = slot.gather(1, owner)
        key_bias = None
        if uneven or lengths is not None:
            key_bias = log_cell.gather(1, index).masked_fill(~valid, -torch.inf)
        move = self._move(x, owner, owner_slot, cell_size, index, timestep)
        return Chunks(lengths, index, valid, owner, owner_slot, key_bias, move)

    def _cells(self, mask: torch.Tensor, grid: tuple[int, int], reach: int | None) -> tuple[torch.Tensor, ...]:
        """Each position's owner [B, L], positions owned [B, L], the log of that beside a window's, and `nearest_kept`'s
        word on the owners."""
        patch = self.config.patch_size
        # On the teacher's grid a cell is a window. The shift is just under the window's centre, so that nothing ties.
        owner, exact = nearest_kept(mask, *grid, max(0.0, (patch - 1) / 2 - 0.1), reach)
        ones = torch.ones_like(owner, dtype=torch.float32)
        cell_size = torch.zeros_like(ones).scatter_add_(1, owner, ones)
        return owner, cell_size, torch.where(mask, cell_size.clamp(min=1).log() - math.log(patch**2), 0.0), exact

    def embed_tokens(self, x: torch.Tensor, features: torch.Tensor, chunks: Chunks) -> torch.Tensor:
        """The teacher's embedding of each window, moved towards its cell's mean, plus a learned part, [B, M, D]."""
        patch = self.config.patch_size
        windows = F.unfold(F.pad(x, (0, patch - 1, 0, patch - 1)), patch).transpose(1, 2)
        windows = gather_tokens(windows, chunks.index).unflatten(-1, (-1, patch**2))
        windows = windows + chunks.move[..., None].to(x.dtype)
        windows = windows.flatten(0, 1).unflatten(-1, (patch, patch))
        tokens = self.pos_embed["proj"](windows).view(*chunks.index.shape, -1)
        tokens = _add(tokens, self.widen(gather_tokens(features.flatten(2).transpose(1, 2), chunks.index)))
        return _add(tokens, self.positions(chunks.index, x.shape[-2:]).to(tokens.dtype))

    def head(
        self, tokens: torch.Tensor, condition: torch.Tensor, chunks: Chunks, timestep: torch.Tensor
    ) -> torch.Tensor:
        """The teacher's final layer: what each token says of its window, fp32 [B, M, p*p, O]."""
        c = self.config
        tokens = F.layer_norm(tokens, tokens.shape[-1:], eps=1e-6)
        shift, scale = self.proj_out_1(condition)[:, None].chunk(2, dim=-1)
        tokens = _add(_multiply(tokens, 1 + scale), shift)
        entries = self.proj_out_2(tokens).unflatten(-1, (c.patch_size**2, c.out_channels))
        # The token spoke of its input after the move towards the cell: the same x0 estimate, in terms of x_t itself.
        noise = (1 - self.alpha_bar(timestep)).sqrt()[:, None, None]
        return entries.float() - F.pad(chunks.move / noise, (0, c.out_channels - c.in_channels))[:, :, None]

    def decode(
        self,
        tokens: torch.Tensor,
        x: torch.Tensor,
        base: torch.Tensor,
        geometry: torch.Tensor,
        features: torch.Tensor,
        routing: Routing,
        chunks: Chunks,
        timestep: torch.Tensor,
        scaffold_condition: torch.Tensor,
    ) -> torch.Tensor:
        """Correction [B, O, H, W]: decoder over smoothed, plugged-back features; its last layer starts at zero."""
        grid = tuple(x.shape[-2:])
        p = routing.probability.gather(1, chunks.index)
        h = smooth(self.narrow(tokens), p, chunks.index, chunks.valid, grid, self.config.smoothing_sigma)
        h = gather_tokens(h, chunks.owner_slot) * _StraightThroughOne.apply(routing.selected_probability)[..., None]
        h = h.transpose(1, 2).unflatten(2, grid).to(x.dtype)
        h = _add(h, self.residual(features))
        h = _add(h, self.conv_base(torch.cat([x, base.to(x.dtype), geometry.to(x.dtype)], dim=1)))
        for block in self.decoder:
            h = block(h, scaffold_condition)
        # Scaled down where x_t is noise: there the base is nearly right, and a correction could only disturb it.
        signal = self.alpha_bar(timestep).sqrt()[:, None, None, None]
        return self.conv_out(_silu(self.norm_correction(h))) * signal

    def _move(self, x, owner, owner_slot, cell_size, index, timestep) -> torch.Tensor:
        """How far a token's input moves from its window towards its cell: k (mean over cell - mean over window).

        k = sigma^2 / (sigma^2 + 10 alpha_bar Var_cell(x0)), the variance estimated from x_t; fp32 [B, M, C]. Exactly
        zero where the cell has no position outside of the window, which then tells all there is to tell.
        """
        batch, channels, height, width = x.shape
        patch, longest = self.config.patch_size, index.shape[1]
        pixels = x.float().flatten(2).transpose(1, 2)
        noise = (1 - self.alpha_bar(timestep))[:, None]
        n = cell_size.gather(1, index)[..., None].clamp(min=1)
        sums = pixels.new_zeros(batch, longest, 2 * channels)
        where = owner_slot[..., None].expand(-1, -1, 2 * channels)
        sums.scatter_add_(1, where, torch.cat([pixels, pixels * pixels], dim=-1))
        mean, square = (sums / n).chunk(2, dim=-1)
        variance = (square - mean * mean).mean(-1) - noise * ((n - 1) / n)[..., 0]
        k = noise / (noise + 10 * variance.clamp(min=0)).clamp(min=1e-8)
        padded = F.pad(x.float(), (0, patch - 1, 0, patch - 1))
        inside = F.pad(torch.ones(1, 1, height, width, device=x.device), (0, patch - 1, 0, patch - 1))
        window_mean = F.avg_pool2d(padded, patch, 1) / F.avg_pool2d(inside, patch, 1)
        window_mean = gather_tokens(window_mean.flatten(2).transpose(1, 2), index)
        row, column = owner // width, owner % width
        position = torch.arange(height * width, device=x.device)
        covered = (position // width - row < patch) & (position // width >= row)
        covered &= (position % width - column < patch) & (position % width >= column)
        stray = torch.zeros_like(mean[..., 0]).scatter_add_(1, owner_slot, (~covered).float())
        return torch.where(stray[..., None] == 0, 0.0, k[..., None] * (mean - window_mean))

    def dechunk(
        self, entries: torch.Tensor, tokens: torch.Tensor, x: torch.Tensor, chunks: Chunks, timestep: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Plug the tokens' p x p entries back onto the grid, filling uncovered positions in x0 space.

        entries fp32 [B, M, p*p, O] -> base fp32 [B, O, H, W] and geometry (coverage, row offset, column offset) fp32
        [B, 3, H, W]. Where windows overlap a position takes the mean of their entries, in which those of the teacher's
        grid weigh most. Neighbouring pixels share their image, not their noise: an uncovered position takes the x0
        estimate of the nearest entry of its token, and its epsilon follows from its own x_t.
        """
        c = self.config
        height, width = grid = tuple(x.shape[-2:])
        patch, channels = c.patch_size, c.in_channels
        index, valid, owner, owner_slot = chunks.index, chunks.valid, chunks.owner, chunks.owner_slot
        position = torch.arange(height * width, device=x.device)
        d_row, d_column = position // width - owner // width, position % width - owner % width
        e_row, e_column = d_row.clamp(0, patch - 1), d_column.clamp(0, patch - 1)
        entry = owner_slot * patch**2 + e_row * patch + e_column
        on_grid = (index // width % patch == 0) & (index % width % patch == 0)
        mean, weights = overlap_add(entries, torch.where(on_grid, 1.0, OFF_GRID_WEIGHT) * valid, index, grid)
        covered = weights > 0
        base = torch.where(covered, mean, gather_tokens(entries.flatten(1, 2), entry))

        alpha = self.alpha_bar(timestep)[:, None, None]
        noise, signal = 1 - alpha, alpha.sqrt()
        pixels = x.float().flatten(2).transpose(1, 2)

        def estimate(x_t: torch.Tensor, epsilon: torch.Tensor) -> torch.Tensor:
            return ((x_t - noise.sqrt() * epsilon) / signal.clamp(min=1e-4)).clamp(-c.sample_range, c.sample_range)

        nearest = owner + (e_row * width + e_column)
        x0 = estimate(gather_tokens(pixels, nearest), base[..., :channels])

        # Variance of the x0 estimate inside each token's window, over the positions that exist.
        offset = torch.arange(patch**2, device=x.device)
        row, column = index[..., None] // width + offset // patch, index[..., None] % width + offset % patch
        inside = ((row < height) & (column < width))[..., None].float()
        at = (row.clamp(max=height - 1) * width + column.clamp(max=width - 1)).flatten(1)
        window = estimate(gather_tokens(pixels, at), entries[..., :channels].flatten(1, 2))
        window = window.unflatten(1, (-1, patch**2))
        n = inside.sum(2).clamp(min=1)
        mean = (window * inside).sum(2) / n
        variance = (((window - mean[:, :, None]) ** 2 * inside).sum(2) / n).mean(-1, keepdim=True)
        v = self.fill_log_variance(tokens).float().exp() * (variance + WINDOW_VARIANCE_FLOOR)
        v = gather_tokens(v, owner_slot)

        fill = noise.sqrt() * (pixels - signal * x0) / (noise + alpha * v)
        fill = torch.cat([fill, base[..., channels:]], dim=-1)
        base = torch.where(covered, base, fill)
        geometry = torch.stack([covered[..., 0].float(), d_row.float() / patch, d_column.float() / patch], dim=1)
        return base.transpose(1, 2).unflatten(2, grid), geometry.unflatten(2, grid)

    def _forward_paper(self, x, timestep, conditions, scaffold_condition, tail_drop, guide, gates):
        c = self.config
        height, width = grid = tuple(x.shape[-2:])
        h = self.conv_in(x)
        for block in self.encoder:
            h = block(h, scaffold_condition)
        h_BLD = self.encoder_norm(h.flatten(2).transpose(1, 2))
        features = h_BLD.transpose(1, 2).unflatten(2, grid)
        routing = self.route(features, x, timestep, scaffold_condition, tail_drop, guide)

        owner, exact = nearest_kept(routing.mask, height, width, 0.0, REACH if routing.tokens is None else None)
        if routing.tokens is not None:
            lengths, longest = None, routing.tokens
        else:
            *counts, inexact = torch.cat([routing.mask.sum(1), ~exact[None]]).tolist()
            lengths, longest = _ragged(counts), max(counts)
            if inexact:
                owner, _ = nearest_kept(routing.mask, height, width, 0.0)
        index, valid, slot = compact(routing.mask, longest)
        key_bias = None
        if lengths is not None:
            key_bias = torch.zeros(valid.shape, device=x.device).masked_fill(~valid, -torch.inf)
        tokens = gather_tokens(h_BLD, index)
        tokens = tokens + self.positions(index, grid).to(tokens.dtype)
        owner_slot = slot.gather(1, owner)
        tokens = self.run_blocks(tokens, conditions, key_bias, valid, lengths, index, owner_slot, gates)
        tokens = self.blocks_norm(tokens)

        p = routing.probability.gather(1, index)
        out = gather_tokens(smooth(tokens, p, index, valid, grid, c.smoothing_sigma), owner_slot)
        out = out * _StraightThroughOne.apply(routing.selected_probability)[..., None]
        out = (out + self.residual(h_BLD)).to(x.dtype)
        h = out.transpose(1, 2).unflatten(2, grid)
        for block in self.decoder:
            h = block(h, scaffold_condition)
        h = self.decoder_norm(h.flatten(2).transpose(1, 2))
        shift, scale = self.proj_out_1(conditions[0])[:, None].chunk(2, dim=-1)
        h = self.proj_out_2(F.layer_norm(h, h.shape[-1:], eps=1e-6) * (1 + scale) + shift)
        return h.transpose(1, 2).unflatten(2, grid), routing

    # -- export -------------------------------------------------------------------------------------------------------

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """As diffusers', without its warning about the ``auto_map`` entry that its own `save_config` writes."""
        return super().extract_init_dict({k: v for k, v in config_dict.items() if k != "auto_map"}, **kwargs)

    def save_config(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """Save the config, and this file beside it: stock diffusers never copies code."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        (Path(save_directory) / f"{MODULE_NAME}.py").write_bytes(_CODE)
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)


sys.modules[MODULE_NAME] = sys.modules[__name__]
ChunkedDiT.__module__ = MODULE_NAME
