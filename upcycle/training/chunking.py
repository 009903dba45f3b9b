"""What is particular to dynamic chunking while it trains: what trains, at which rates, and what comes out."""

from typing import Any

import torch

from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.recipe import Recipe
from upcycle.training import schedule
from upcycle.training.log import TIMES
from upcycle.training.state import RunState
from upcycle.training.step import TERMS, Updater, parts_of

COLUMNS = (
    "step", "stage", "loss", *TERMS, "ratio", "tokens_kept", "tokens_t0", "tokens_t250", "tokens_t500", "tokens_t750",
    "block_flops", "tail_drop", "guide", "bias", "lr", "grad_norm", "skipped", *TIMES,
)  # fmt: skip


FROM_TEACHER = {
    "lean": ("embedders.", "pos_embed.", "transformer_blocks.", "proj_out_1.", "proj_out_2."),
    "paper": ("embedders.", "transformer_blocks."),
}


def make_optimizer(student: ChunkedDiT, recipe: Recipe, *, fused: bool) -> torch.optim.AdamW:
    """AdamW with groups for the routers, for what comes from the teacher, and for the rest of the scaffold."""
    o = recipe.optimizer
    scales = {"router": o.router_lr_scale, "teacher": o.teacher_lr_scale, "scaffold": 1.0}
    members: dict[str, list[torch.nn.Parameter]] = {name: [] for name in scales}
    theirs = FROM_TEACHER["lean" if student.config.scaffold == "lean" else "paper"]
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            part = "router" if name.startswith(("routing_module.", "dydit_routers.")) else "scaffold"
            members["teacher" if name.startswith(theirs) else part].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "lr_scale": scales[part]} for part, parameters in members.items() if parameters
    ]
    return torch.optim.AdamW(groups, lr=recipe.stages[0].lr, betas=o.betas, weight_decay=o.weight_decay, fused=fused)


def prepare_student(student: ChunkedDiT, recipe: Recipe) -> None:
    """Set what trains (a part that every stage freezes never does), checkpointing and compilation."""
    student.train().requires_grad_(True)
    always = set.intersection(*(set(stage.freeze) for stage in recipe.stages))
    for module in parts_of(student, sorted(always)):
        module.requires_grad_(False)
    if recipe.gradient_checkpointing:
        student.enable_gradient_checkpointing()
    if recipe.compile:
        for block in student.transformer_blocks:
            block.compile(dynamic=True)  # token numbers change from batch to batch


def finished(student: ChunkedDiT, run: RunState, recipe: Recipe, updater: Updater) -> ChunkedDiT:
    """The student with its averaged weights and the guide of the end, on the CPU in fp32, to be exported."""
    weights = run.averaged_weights(student)
    result = ChunkedDiT.from_config(student.config)
    result.load_state_dict(weights)
    result.guide = schedule.guide(recipe, recipe.steps, updater.start_guide)
    result.register_to_config(guide=result.guide)
    return result.eval().requires_grad_(False)
