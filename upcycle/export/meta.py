"""`--to meta`: a fixed-grid model as a `.pt` in the layout of Meta's DiT code (facebookresearch/DiT)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from upcycle.errors import UpcycleError
from upcycle.graft.embedders import merge_embedders
from upcycle.graft.pieces import FreshTensor, JoinedTensor, reused
from upcycle.graft.torch_writer import write_torch_file
from upcycle.graft.writer import Piece, nbytes
from upcycle.output import new_file
from upcycle.sources import DiTConfig, LazyTensor, Source
from upcycle.sources.meta import diffusers_names, position_table
from upcycle.sources.recognise import HEADS
from upcycle.sources.student import Student

# All that a lean student adds to its teacher on the teacher's own grid goes through these two layers.
_SCAFFOLD_ENDS = ("widen.weight", "widen.bias", "conv_out.weight", "conv_out.bias")


def export_meta(
    model: Student | Source,
    out: Path,
    dtype: torch.dtype | None = None,
    *,
    force: bool = False,
    written: Callable[[int], None] = lambda n: None,
) -> list[str]:
    """Write the plain state dict ``out``, as Meta publishes its models; returns notes.

    Raises `UpcycleError` for a model that is no DiT with a fixed grid and one embedder for all blocks, where ``out``
    exists (without ``force``), for NaN, and for what ``dtype`` cannot hold.
    """
    if isinstance(model, Student):
        config, tensors, path = _of_student(model), _teacher_names(model.tensors), model.path
    else:
        config, tensors, path = _of_source(model), dict(model.tensors), Path(model.spec).expanduser()
    table = diffusers_names(config.num_layers)
    used = {name for names in table.values() for name in names}
    pieces = reused({name: tensor for name, tensor in tensors.items() if name in used}, dtype)
    state: dict[str, Piece] = {
        theirs: pieces[ours[0]] if len(ours) == 1 else JoinedTensor(tuple(pieces[name] for name in ours))
        for theirs, ours in table.items()
    }
    positions = position_table(config.hidden_size, config.sample_size // config.patch_size).float()
    state = {"pos_embed": FreshTensor(positions.to(state["x_embedder.proj.weight"].dtype)), **state}
    keep = (path,) if path.exists() else ()
    with new_file(out, force, bytes_needed=sum(map(nbytes, state.values())), keep=keep) as file:
        write_torch_file(file, state, written=written)
    return convention_notes(config.time_embedding, config.norm_eps) + _heads_note(config)


def convention_notes(time_embedding: str, norm_eps: float) -> list[str]:
    """What a reader with Meta's conventions built in computes differently."""
    if time_embedding == "meta" and norm_eps == 1e-6:
        return []
    return [
        "the weights are the same, but code in that layout has Meta's timestep frequencies and norm epsilon 1e-6 built "
        f"in, and this model has {time_embedding}'s and {norm_eps:g}: there its outputs are near, not equal"
    ]


def _heads_note(config: DiTConfig) -> list[str]:
    if HEADS.get(config.hidden_size) == config.num_attention_heads:
        return []
    heads = config.num_attention_heads
    return [f"the layout does not tell the attention heads: convert it with --heads {heads}"]


def _of_source(source: Source) -> DiTConfig:
    if not isinstance(source.config, DiTConfig):
        raise UpcycleError(f"{source.spec} is a DC-DiT, and Meta's layout holds fixed-patch DiTs only")
    _, number = merge_embedders(source.tensors)
    if number > 1:
        raise UpcycleError(_split(source.spec))
    return source.config


def _of_student(student: Student) -> DiTConfig:
    """The config of the DiT that the student is; raises `UpcycleError` with the first reason why it is none."""
    c, spec = student.config, str(student.path)
    if c["num_embedders"] > 1:
        raise UpcycleError(_split(spec))
    if reason := _no_dit(c, student.tensors):
        raise UpcycleError(
            f"{spec} is no DiT with a fixed grid, and Meta's layout holds nothing else: {reason}; "
            "--to diffusers and --to single take every converted model"
        )
    return DiTConfig(
        num_layers=c["num_layers"],
        num_attention_heads=c["num_attention_heads"],
        attention_head_dim=c["attention_head_dim"],
        in_channels=c["in_channels"],
        out_channels=c["out_channels"],
        sample_size=c["sample_size"],
        patch_size=c["patch_size"],
        num_classes=c["num_classes"],
        time_embedding=c["time_embedding"],
        norm_eps=c["norm_eps"],
    )


def _no_dit(c: dict[str, Any], tensors: dict[str, LazyTensor]) -> str | None:
    if c["scaffold"] != "lean":
        return f"its scaffold is {c['scaffold']}"
    if c["router"] != "grid":
        return f"its router is {c['router']} and not grid"
    if c["ratio"] != c["patch_size"] ** 2:
        return f"its ratio is {c['ratio']:g} and not {c['patch_size'] ** 2}, its patch size squared"
    budget = next((name for name in ("tail_drop", "uncond_tail_drop", "tokens", "budget") if c[name]), None)
    if budget:
        return f"its {budget} is {c[budget]} by default, so that it drops tokens"
    if c["dydit"]:
        return "its blocks have DyDiT's gates"
    trained = next((name for name in _SCAFFOLD_ENDS if tensors[name].load().any()), None)
    return f"{trained} is not zero any more, so that its scaffold adds to the DiT" if trained else None


def _teacher_names(tensors: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """A student's one embedder under the name that diffusers gives that of block 0."""
    old, new = "embedders.0.", "transformer_blocks.0.norm1.emb."
    return {new + name.removeprefix(old) if name.startswith(old) else name: t for name, t in tensors.items()}


def _split(spec: str) -> str:
    return f"{spec}: its blocks have embedders of their own, and Meta's layout holds one for all; it cannot be written"
