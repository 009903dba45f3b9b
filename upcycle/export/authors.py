"""`--to authors`: a model with the published scaffold as a `.pt` of the DC-DiT authors' code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from upcycle.errors import UpcycleError
from upcycle.export.meta import convention_notes
from upcycle.graft.dcdit_names import to_authors
from upcycle.graft.pieces import FreshTensor, reused
from upcycle.graft.torch_writer import write_torch_file
from upcycle.graft.writer import Piece, nbytes
from upcycle.output import new_file
from upcycle.sources.meta import position_table
from upcycle.sources.student import Student


def export_authors(
    student: Student,
    out: Path,
    dtype: torch.dtype | None = None,
    *,
    force: bool = False,
    written: Callable[[int], None] = lambda n: None,
) -> list[str]:
    """Write ``out`` as the authors' trainer does, without the optimiser's state; returns notes.

    ``ema`` and ``model`` are the same tensors, stored once. ``config`` has the layout of their YAML files, as a plain
    dictionary: an object of their classes cannot be pickled without their code, which reads ``ema`` alone.

    Raises `UpcycleError` for a model that has no place in their layout, where ``out`` exists (without ``force``), for
    NaN, and for what ``dtype`` cannot hold.
    """
    c = student.config
    if reason := _no_place(c):
        raise UpcycleError(
            f"{student.path} has no place in the layout of the DC-DiT authors' code: {reason}; "
            "--to diffusers and --to single take every converted model"
        )
    state = to_authors(reused(student.tensors, dtype))
    width = c["num_attention_heads"] * c["attention_head_dim"]
    positions = position_table(width, c["sample_size"]).float()
    state = {"pos_embed": FreshTensor(positions.to(state["x_embedder.proj.weight"].dtype)), **state}
    config = _their_config(c, state)
    with new_file(out, force, bytes_needed=sum(map(nbytes, state.values())), keep=(student.path,)) as file:
        write_torch_file(file, state, lambda ours: {"model": ours, "ema": ours, "config": config}, written)
    notes = convention_notes(c["time_embedding"], c["norm_eps"])
    if isinstance(c["tail_drop"], int | float) and c["tail_drop"]:
        notes.append(f"the layout holds no budget: pass --tail-dropping-fraction {c['tail_drop']:g} to their sample.py")
    elif budget := next((name for name in ("tail_drop", "uncond_tail_drop", "tokens", "budget") if c[name]), None):
        notes.append(f"the layout holds no budget: {budget} {c[budget]} is left out")
    return notes


def _no_place(c: dict[str, Any]) -> str | None:
    if c["scaffold"] != "paper":
        return f"its scaffold is {c['scaffold']}, and theirs is paper"
    if c["router"] != "predictability":
        return f"its router is {c['router']}, and theirs is predictability"
    if c["dydit"]:
        return "its blocks have DyDiT's gates, and theirs have none"
    if c["condition_adaptor"]:
        return "it has an adaptor of the conditioning (--init paper puts one in), and theirs has none"
    return "its blocks have embedders of their own, and theirs share one" if c["num_embedders"] > 1 else None


def _their_config(c: dict[str, Any], state: dict[str, Piece]) -> dict[str, Any]:
    """What the tensors do not tell, and what their ``create_dit`` wants to know besides."""
    heads, width = c["num_attention_heads"], c["num_attention_heads"] * c["attention_head_dim"]
    narrow = state["x_embedder.proj.weight"].shape[0]
    hnet = {
        "arch_layout": [f"c{c['encoder_layers']}", [f"D{c['num_layers']}"], f"c{c['decoder_layers']}"],
        "d_model": [width, width],
        "num_heads": [heads, heads],
        "enc_dec_dim_factor": [width // narrow, None],
        "dechunk_kernel_sigma": float(c["smoothing_sigma"]),
    }
    return {
        "model": {"hnet": hnet},
        "training": {"learn_sigma": c["out_channels"] == 2 * c["in_channels"], "downsample_factor": float(c["ratio"])},
        "data": {"image_size": 8 * c["sample_size"], "num_classes": c["num_classes"]},
    }
