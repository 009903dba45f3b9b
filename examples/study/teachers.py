"""Stock DiTs for the study: the teacher of the shapes, larger ones (S, B), and teachers that are trained on.

    python examples/study/teachers.py --out examples/study/shapes-teacher

Writes a pipeline in diffusers' layout, and TRAINING.md in it. Goes on where it was interrupted.
"""

import argparse
import copy
import json
import math
import platform
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from shapes import CLASSES, make_shapes
from torch import nn

from upcycle.models.identity_vae import IdentityVAE
from upcycle.training.variational import VariationalBound

SIZES = {  # heads, width of a head, layers; S and B are DiT's
    "tiny": (4, 24, 4),
    "S": (6, 64, 12),
    "B": (12, 64, 12),
}
LABEL_DROPOUT, EMA = 0.1, 0.999
BETAS = {"beta_start": 1e-4, "beta_end": 0.02}


def new_teacher(size: str, pixels: int, channels: int, classes: int, seed: int) -> DiTTransformer2DModel:
    """A stock DiT of patch 2 that learns sigma, initialised as DiT is: blocks at the identity, the output at 0."""
    heads, width, layers = SIZES[size]
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width,
        num_layers=layers,
        patch_size=2,
        sample_size=pixels,
        in_channels=channels,
        out_channels=2 * channels,
        num_embeds_ada_norm=classes,
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    nn.init.xavier_uniform_(model.pos_embed.proj.weight.flatten(1))
    nn.init.zeros_(model.pos_embed.proj.bias)
    embedder = model.transformer_blocks[0].norm1.emb
    for weight in (
        embedder.timestep_embedder.linear_1.weight,
        embedder.timestep_embedder.linear_2.weight,
        embedder.class_embedder.embedding_table.weight,
    ):
        nn.init.normal_(weight, std=0.02)
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
    return model


def train(
    model: DiTTransformer2DModel,
    images: torch.Tensor,
    labels: torch.Tensor,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    state: Path | None = None,
    warmup: int = 200,
    ema: float = EMA,
    every: int = 500,
    clock: Callable[[int, float], None] = lambda step, loss: None,
) -> DiTTransformer2DModel:
    """Train ``model`` (on its device) and return its averaged weights, in a stock model on the CPU.

    The loss is the noise MSE, weighted so that noisy steps count too, and the bound that trains sigma; AdamW, a cosine
    to 0. ``images`` [n, C, H, W] and ``labels`` [n] on the CPU. Every ``every`` steps ``clock`` gets step and noise
    MSE, and what the run has come to is kept in the file ``state``; it goes on from one of the same settings.
    """
    device = next(model.parameters()).device
    embedder = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks:  # diffusers has a copy in every block, and DiT one
        block.norm1.emb = embedder
    model.train()
    embedder.class_embedder.eval()  # labels are dropped below; diffusers would draw anew in every block
    betas = torch.linspace(*BETAS.values(), 1000, dtype=torch.float64)
    alpha_bar = (1 - betas).cumprod(0).float().to(device)
    balance = (1 + 2 * (1 - alpha_bar) / alpha_bar).sqrt()
    bound = VariationalBound(betas.to(device))
    averaged = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0, fused=device.type == "cuda")
    done, settings = 0, [steps, batch_size, lr, seed, warmup, ema, len(images)]
    saved = torch.load(state, map_location=device, weights_only=True) if state and state.exists() else {}
    if saved.get("settings") == settings:
        model.load_state_dict(saved["model"])
        averaged.load_state_dict(saved["averaged"])
        optimizer.load_state_dict(saved["optimizer"])
        done = saved["step"]
    images, labels = images.to(device), labels.to(device)
    null = model.config.num_embeds_ada_norm
    for step in range(done, steps):
        random = torch.Generator().manual_seed(1_000_003 * seed + step)
        rows = torch.randint(len(images), (batch_size,), generator=random).to(device)
        x0, y = images[rows].float(), labels[rows]
        dropped = torch.rand(batch_size, generator=random) < LABEL_DROPOUT
        y = torch.where(dropped.to(device), null, y)
        t = torch.randint(1000, (batch_size,), generator=random).to(device)
        noise = torch.randn(x0.shape, generator=random).to(device)
        signal = alpha_bar[t][:, None, None, None]
        x_t = signal.sqrt() * x0 + (1 - signal).sqrt() * noise
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            output = model(x_t, timestep=t, class_labels=y).sample.float()
        error = (output[:, : x0.shape[1]] - noise).square().flatten(1).mean(1)
        loss = (balance[t] * error + bound(output, x0, x_t, t)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - decay)
        if (step + 1) % every:
            continue
        clock(step + 1, error.mean().item())
        if state:
            parts = {"model": model, "averaged": averaged, "optimizer": optimizer}
            content = {name: part.state_dict() for name, part in parts.items()}
            partial = state.with_suffix(".partial")
            torch.save({**content, "step": step + 1, "settings": settings}, partial)
            partial.replace(state)
    stock = DiTTransformer2DModel.from_config(model.config)
    stock.load_state_dict(averaged.state_dict())
    return stock.eval().requires_grad_(False)


def save_pipeline(transformer: DiTTransformer2DModel, folder: Path, names: tuple[str, ...], told: str) -> None:
    """The pipeline in diffusers' layout: identity VAE and DDIM, as the digits teacher has them; and TRAINING.md."""
    scheduler = DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False, **BETAS)
    vae = IdentityVAE(in_channels=transformer.config.in_channels)
    pipe = DiTPipeline(transformer=transformer, vae=vae, scheduler=scheduler)
    pipe.register_to_config(id2label={str(i): name for i, name in enumerate(names)})
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe.save_pretrained(partial)
    (partial / "TRAINING.md").write_text(told)
    partial.rename(folder)


def make_teacher(
    out: Path,
    *,
    size: str,
    pixels: int,
    images: int,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    device: str,
    init: Path | None = None,
) -> dict[str, float]:
    """Train on shapes of ``seed`` 0 and write ``out``; returns the held-out noise MSE and minutes. ``init``: a pipeline
    to start from."""
    from upcycle.evaluation.validation import validate

    begun = time.perf_counter()
    model = new_teacher(size, pixels, 3, len(CLASSES), seed).to(device)
    if init:
        model.load_state_dict(DiTTransformer2DModel.from_pretrained(init, subfolder="transformer").state_dict())
    shapes = make_shapes(images, 0, pixels)
    out.parent.mkdir(parents=True, exist_ok=True)

    def clock(step: int, loss: float) -> None:
        text = f"{out.name}: step {step} of {steps}, noise MSE {loss:.4f}, {time.perf_counter() - begun:.0f} s"
        print(text, file=sys.stderr, flush=True)

    settings = {"steps": steps, "batch_size": batch_size, "lr": lr, "seed": seed}
    state = out.with_suffix(".state")
    stock = train(model, shapes.images, shapes.labels, **settings, state=state, clock=clock)
    held_out = make_shapes(200, 1, pixels)
    alpha_bar = (1 - torch.linspace(*BETAS.values(), 1000, dtype=torch.float64)).cumprod(0).float()
    loss = validate(stock.to(device), held_out.images, held_out.labels, alpha_bar).mean_loss
    minutes = (time.perf_counter() - begun) / 60
    settings |= {"size": size, "pixels": pixels, "images": images}
    before = (init / "TRAINING.md").read_text().partition("\n\n")[2] if init else ""
    told = (
        f"# How this teacher was trained\n\n{before}- `python {shlex.join(sys.argv)}`\n- {json.dumps(settings)}\n"
        f"- {minutes:.1f} min (since the last interruption, if any), {torch.get_num_threads()} thread(s), {device}\n"
        f"- Python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}\n"
        f"- noise MSE of the averaged weights, 200 held-out images, ten timesteps: {loss:.5f}\n"
    )
    save_pipeline(stock.cpu(), out, CLASSES, told)
    state.unlink(missing_ok=True)
    return {"val_loss": loss, "minutes": minutes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/shapes-teacher"))
    parser.add_argument("--init", type=Path, help="a pipeline to start from")
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--pixels", type=int, default=32)
    parser.add_argument("--images", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = vars(parser.parse_args())
    torch.set_num_threads(options.pop("threads"))
    print(json.dumps(make_teacher(**options)))


if __name__ == "__main__":
    main()
