"""FSDP2 on two processes, which talk over the CPU. Run as a script, this file is what they do."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from conftest import ROOT
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from upcycle.models.chunked_dit import ChunkedDiT, Conv2dFP32
from upcycle.recipe import Recipe
from upcycle.training.run import finetune, prepare, ranks

WEIGHTS = "export/transformer/diffusion_pytorch_model.safetensors"


def recipe(out, **changes):
    """Two stages, of which the first trains the scaffold alone, and an accumulated batch."""
    losses = {"ratio_group": 2, "blocks": 0.1}
    stages = [
        {"name": "align", "steps": 2, "lr": 1e-3, "freeze": ["embedders", "blocks", "head"], "losses": losses},
        {"name": "train", "steps": 2, "lr": 1e-3, "losses": losses, "anneal": {"until": 0.5}},
    ]
    return Recipe(**{
        "teacher": "digits", "data": "digits", "out": str(out), "batch_size": 8, "gradient_accumulation": 2,
        "convert": {"dydit": 0.6}, "stages": stages, "ema": 0.5, "log_every": 1, "save_every": 2, "data_workers": 0,
        "validation": {"data": "digits-val", "every": 2, "samples": 4}, **changes,
    })  # fmt: skip


def rows(folder):
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


def test_sharded_as_on_one_process(tmp_path):
    """The losses of one process, a continuation that is bit-identical, and a router in fp32 under bf16 autocast."""
    finetune(prepare(recipe(tmp_path / "one")))
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__, str(tmp_path)]
    done = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=300,
        env={
            **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true",
            "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true",
        },
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    names = (
        "loss", "diffusion", "distill", "blocks", "ratio_loss", "router", "flops", "block_flops", "grad_norm",
        "tokens_kept",
    )  # fmt: skip
    for a, b in zip(rows(tmp_path / "one"), rows(tmp_path / "straight"), strict=True):
        for name in names:
            torch.testing.assert_close(float(a[name]), float(b[name]), atol=1e-5, rtol=1e-5, msg=f"{name}: {a} {b}")
    straight, resumed = (load_file(tmp_path / name / WEIGHTS) for name in ("straight", "resumed"))
    assert straight.keys() == ChunkedDiT.from_pretrained(tmp_path / "one/export/transformer").state_dict().keys()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == {"sharded": True, "router": ["torch.float32"], "rounded": False}


def main(folder: Path) -> None:
    straight = prepare(recipe(folder / "straight"))
    finetune(straight)
    if ranks().is_main_process:
        shutil.copytree(folder / "straight", folder / "resumed")
        shutil.rmtree(folder / "resumed/checkpoints/step-0000004")
    ranks().wait_for_everyone()
    finetune(prepare(recipe(folder / "resumed"), resume=True), resume=True)

    seen, rounded, convolve = set(), set(), Conv2dFP32.forward

    def look(module, x):
        seen.add(str(module.weight.dtype))
        rounded.add(torch.equal(module.weight, module.weight.bfloat16().float()))
        return convolve(module, x)

    Conv2dFP32.forward = look
    step = {"name": "one", "steps": 1}
    finetune(prepare(recipe(folder / "bf16", mixed_precision="bf16", validation=None, stages=[step])))
    if ranks().is_main_process:
        sharded = any(isinstance(parameter, DTensor) for parameter in straight.student.parameters())
        print(json.dumps({"sharded": sharded, "router": sorted(seen), "rounded": all(rounded)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
