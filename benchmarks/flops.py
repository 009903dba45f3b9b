"""TFLOPs per image over 250 unguided steps, in the papers' counting: the table of docs/results.md.

python benchmarks/flops.py
"""

from upcycle.evaluation.flops import PAPER_STEPS, dit_flops, student_flops_by_tail_drop
from upcycle.graft.plan import full_config
from upcycle.sources import SHAPES

for size, (heads, head_dim, layers) in SHAPES.items():
    dit = {
        "num_attention_heads": heads, "attention_head_dim": head_dim, "num_layers": layers, "sample_size": 32,
        "patch_size": 2, "in_channels": 4, "out_channels": 8, "num_classes": 1000,
    }  # fmt: skip
    lean = student_flops_by_tail_drop(full_config(dit))
    paper = student_flops_by_tail_drop(full_config({**dit, "patch_size": 1, "scaffold": "paper"}))
    row = [PAPER_STEPS * dit_flops(dit), *lean.values(), paper["0"]]
    print(f"{size}/2".ljust(5), *(f"{value / 1e12:7.2f}" for value in row))
