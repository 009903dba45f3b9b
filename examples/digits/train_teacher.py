"""Train the digits teacher: a stock diffusers DiT on 16x16 handwritten digits, in pixel space, on one CPU core.

    python examples/digits/train_teacher.py --out runs/digits-stage1
    python examples/digits/train_teacher.py --init runs/digits-stage1 --balance --steps 5500 --out upcycle/assets/digits

Writes OUT/teacher (a diffusers pipeline), OUT/TRAINING.md, OUT/loss.csv, OUT/loss.png and OUT/samples.png.
"""

import argparse
import copy
import csv
import math
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import diffusers
import matplotlib
import torch
import torch.nn.functional as F
from check_teacher import check
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from torch import nn

from upcycle.models.identity_vae import IdentityVAE
from upcycle.training.digits import IMAGE_SIZE, NUM_CLASSES, load_digits

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TIMESTEPS = 1000
NULL_CLASS = NUM_CLASSES  # the extra row of the label table: "no class", for guidance
LABEL_DROPOUT = 0.1


class Diffusion:
    """Linear betas 1e-4..0.02 and the loss of a model that predicts the noise and a learned variance."""

    def __init__(self) -> None:
        # float64 for the products of a thousand factors, float32 for use
        betas = torch.linspace(1e-4, 0.02, TIMESTEPS, dtype=torch.float64)
        bar = torch.cumprod(1 - betas, dim=0)
        bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
        posterior_var = betas * (1 - bar_prev) / (1 - bar)
        posterior_var[0] = posterior_var[1]  # it is 0 at t = 0, which has no logarithm
        self.signal = bar.sqrt().float()
        self.noise = (1 - bar).sqrt().float()
        self.mean_x0 = (betas * bar_prev.sqrt() / (1 - bar)).float()
        self.mean_xt = ((1 - bar_prev) * (1 - betas).sqrt() / (1 - bar)).float()
        self.min_log_var = posterior_var.log().float()
        self.max_log_var = betas.log().float()
        # One over the root of the noise MSE of a Gaussian guess for pixels of variance 1/2 (that of the digits).
        # Without it the steps near pure noise, whose MSE is a thousand times smaller, are hardly trained at all,
        # and there the outline of the digit is decided.
        self.balance = (1 + 2 * (1 - bar) / bar).sqrt().float()

    def add_noise(self, x0: torch.Tensor, t: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
        """Images and noise [n, c, h, w] and timesteps [n] to noisy images [n, c, h, w]."""
        return _at(self.signal, t) * x0 + _at(self.noise, t) * eps

    def loss(
        self, model: nn.Module, x0: torch.Tensor, labels: torch.Tensor, t: torch.Tensor, eps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Per-image noise MSE [n] and variational term in bits per dimension [n]; the training loss is their sum.

        The variational term trains the variance only: the mean inside it is detached. There is no factor
        of steps/1000 on it, as in DiT (`LossType.MSE`); with 1,000 steps it would be 1 anyway.
        """
        xt = self.add_noise(x0, t, eps)
        eps_hat, v = model(xt, timestep=t, class_labels=labels).sample.chunk(2, dim=1)
        mse = (eps_hat - eps).square().flatten(1).mean(1)

        # v in [-1, 1] goes from the smallest to the largest sensible variance, on a log scale
        low, high = _at(self.min_log_var, t), _at(self.max_log_var, t)
        log_var = low + (v + 1) / 2 * (high - low)
        x0_hat = (xt - _at(self.noise, t) * eps_hat.detach()) / _at(self.signal, t)
        mean_hat = _at(self.mean_x0, t) * x0_hat + _at(self.mean_xt, t) * xt
        mean = _at(self.mean_x0, t) * x0 + _at(self.mean_xt, t) * xt
        kl = 0.5 * (log_var - low - 1 + (low - log_var).exp() + (mean - mean_hat).square() * (-log_var).exp())
        # t = 0 has no posterior: there the term is the likelihood of the image under its 8-bit rounding
        nll = -_rounded_log_prob(x0, mean_hat, log_var)
        vb = torch.where((t == 0)[:, None, None, None], nll, kl).flatten(1).mean(1) / math.log(2)
        return mse, vb


def _at(table: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Entries [n, 1, 1, 1] of a table [1000] at timesteps [n]."""
    return table[t][:, None, None, None]


def _rounded_log_prob(x: torch.Tensor, mean: torch.Tensor, log_var: torch.Tensor) -> torch.Tensor:
    """Log of the mass a Gaussian puts on the 1/255 bin around each pixel [n, c, h, w]; the end bins are open."""
    inv_std = (-0.5 * log_var).exp()
    upper = torch.special.ndtr((x - mean + 1 / 255) * inv_std)
    lower = torch.special.ndtr((x - mean - 1 / 255) * inv_std)
    upper = torch.where(x > 0.999, torch.ones_like(upper), upper)
    lower = torch.where(x < -0.999, torch.zeros_like(lower), lower)
    return (upper - lower).clamp(min=1e-12).log()


def build_model() -> DiTTransformer2DModel:
    """A stock DiT of 0.8 M parameters with the initialisation of the DiT paper, its embedders shared by all blocks."""
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        num_layers=4,
        patch_size=2,
        sample_size=IMAGE_SIZE,
        in_channels=1,
        out_channels=2,  # noise and variance
        num_embeds_ada_norm=NUM_CLASSES,
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    embedder = model.transformer_blocks[0].norm1.emb
    nn.init.normal_(embedder.timestep_embedder.linear_1.weight, std=0.02)
    nn.init.normal_(embedder.timestep_embedder.linear_2.weight, std=0.02)
    nn.init.normal_(embedder.class_embedder.embedding_table.weight, std=0.02)
    # every block starts as the identity, and the output as zero
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
    proj = model.pos_embed.proj
    nn.init.xavier_uniform_(proj.weight.view(proj.weight.shape[0], -1))
    nn.init.zeros_(proj.bias)
    # diffusers stores one copy of the embedders per block; a DiT has one, so train one. Saving copies it out again.
    for block in model.transformer_blocks[1:]:
        block.norm1.emb = embedder
    # Labels are dropped here, once per image. The embedder in train mode would drop them again, in each block anew.
    model.train()
    embedder.class_embedder.eval()
    return model


def untie(model: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """A copy in the stock layout, with a copy of the embedders in each block: a state dict of separate tensors."""
    stock = DiTTransformer2DModel.from_config(model.config)
    stock.load_state_dict(model.state_dict())
    return stock.eval()


def batches(
    images: torch.Tensor, labels: torch.Tensor, batch: int, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless shuffled batches: images [b, 1, 16, 16] moved sideways by -1, 0 or 1 pixel, and labels [b].

    Only sideways: nearly all digits leave the outer columns empty, while they reach the first and the last row.
    """
    while True:
        order = torch.randperm(len(images), generator=generator)
        for index in order.split(batch):
            if len(index) < batch:
                continue
            padded = F.pad(images[index], (1, 1, 0, 0), value=-1.0)
            start = torch.randint(0, 3, (batch,), generator=generator)
            columns = start[:, None] + torch.arange(IMAGE_SIZE)
            moved = padded.gather(3, columns[:, None, None, :].expand(-1, 1, IMAGE_SIZE, -1))
            yield moved, labels[index]


@torch.no_grad()
def evaluate(
    model: nn.Module, diffusion: Diffusion, images: torch.Tensor, labels: torch.Tensor, seed: int = 1234
) -> tuple[float, float]:
    """Mean noise MSE and variational term over images [n, 1, 16, 16] at t = 25, 75 ... 975, with fixed noise."""
    generator = torch.Generator().manual_seed(seed)
    mse_sum = vb_sum = 0.0
    grid = range(25, TIMESTEPS, 50)
    for step in grid:
        eps = torch.randn(images.shape, generator=generator)
        mse, vb = diffusion.loss(model, images, labels, torch.full((len(images),), step), eps)
        mse_sum += mse.mean().item()
        vb_sum += vb.mean().item()
    return mse_sum / len(grid), vb_sum / len(grid)


def train(args: argparse.Namespace) -> tuple[DiTTransformer2DModel, list[dict[str, float]]]:
    """Train and return the averaged (EMA) weights in a stock model, and one row per report."""
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    images, labels = load_digits("train")
    val_images, val_labels = load_digits("val")
    diffusion = Diffusion()
    model = build_model()
    history: list[dict[str, float]] = []
    if args.init:
        first = DiTTransformer2DModel.from_pretrained(args.init / "teacher", subfolder="transformer")
        model.load_state_dict(first.state_dict())
        with (args.init / "loss.csv").open(newline="") as file:
            history += [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]
    done, seconds = (int(history[-1]["step"]), history[-1]["seconds"]) if history else (0, 0.0)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    data = batches(images, labels, args.batch, generator)
    mse_sum = vb_sum = 0.0
    start = time.perf_counter()
    for step in range(1, args.steps + 1):
        lr = args.lr * min(1.0, step / 200) * 0.5 * (1 + math.cos(math.pi * step / args.steps))
        for group in optimizer.param_groups:
            group["lr"] = lr
        x0, y = next(data)
        dropped = torch.rand(len(y), generator=generator) < LABEL_DROPOUT
        y = torch.where(dropped, NULL_CLASS, y)
        t = torch.randint(0, TIMESTEPS, (len(y),), generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        mse, vb = diffusion.loss(model, x0, y, t, eps)
        optimizer.zero_grad(set_to_none=True)
        weight = diffusion.balance[t] if args.balance else 1.0
        (weight * mse + vb).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(args.ema, (1 + step) / (10 + step))  # forget the random start quickly
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        mse_sum += mse.mean().item()
        vb_sum += vb.mean().item()
        if step % args.every == 0 or step == args.steps:
            count = (step - 1) % args.every + 1
            val_mse, val_vb = evaluate(ema, diffusion, val_images, val_labels)
            row = {"step": done + step, "seconds": seconds + time.perf_counter() - start, "lr": lr}
            row |= {"train_mse": mse_sum / count, "train_vb": vb_sum / count, "val_mse": val_mse, "val_vb": val_vb}
            history.append(row)
            mse_sum = vb_sum = 0.0
            print("  ".join(f"{k} {v:.5g}" for k, v in row.items()), flush=True)
    return untie(ema), history


def save_pipeline(transformer: DiTTransformer2DModel, folder: Path) -> None:
    """Write the diffusers pipeline: transformer, identity VAE with its code, DDIM scheduler and the class names."""
    # clip_sample=False as DiT ships it: clipping each predicted image to +-1 made samples worse, guided ones most
    scheduler = DDIMScheduler(
        num_train_timesteps=TIMESTEPS, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False
    )
    pipe = DiTPipeline(transformer=transformer, vae=IdentityVAE(), scheduler=scheduler)
    # the argument id2label only fills a lookup table; this writes it into model_index.json
    pipe.register_to_config(id2label={str(i): str(i) for i in range(NUM_CLASSES)})
    pipe.save_pretrained(folder)


def report(
    args: argparse.Namespace, history: list[dict[str, float]], train_mse: float, checked: dict[str, float]
) -> None:
    """Write loss.csv, loss.png and TRAINING.md into the output folder."""
    with (args.out / "loss.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(history[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: int(v) if k == "step" else f"{v:.6g}" for k, v in row.items()} for row in history)

    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    steps = [row["step"] for row in history]
    axes.plot(steps, [row["train_mse"] for row in history], label="train batches")
    axes.plot(steps, [row["val_mse"] for row in history], label="held out, EMA")
    axes.set(xlabel="step", ylabel="noise MSE", yscale="log")
    axes.legend()
    figure.savefig(args.out / "loss.png", dpi=80)

    last = history[-1]
    earlier = []
    if args.init:
        first = (args.init / "TRAINING.md").read_text().splitlines()
        earlier = [f"- after {line[2:]}, whose losses and time are counted in" for line in first if "command:" in line]
    lines = [
        "# How the digits teacher was trained",
        "",
        f"- command: `python {shlex.join(sys.argv)}`",
        *earlier,
        f"- seed {args.seed}, {args.steps} steps of {args.batch} images, learning rate {args.lr}, EMA {args.ema}",
        f"- wall time {last['seconds'] / 60:.1f} min on {args.threads} thread(s) of one CPU",
        f"- Python {platform.python_version()}, torch {torch.__version__}, diffusers {diffusers.__version__}",
        "- the stored weights are the EMA weights of the last step, not the best of several by the held-out digits",
        "",
        "| | value |",
        "| --- | --- |",
        f"| noise MSE, held-out 297 digits | {last['val_mse']:.5f} |",
        f"| noise MSE, first 297 training digits, same t and noise | {train_mse:.5f} |",
        f"| noise MSE, last training batches (shifts, label dropout, raw weights) | {last['train_mse']:.5f} |",
        f"| variational term, held out, bits per dimension | {last['val_vb']:.5f} |",
        *(f"| {name} | {value:.4f} |" for name, value in checked.items()),
        "",
        "The first two use the EMA weights at t = 25, 75 ... 975 with noise from seed 1234.",
        "Samples: DDIM, 50 steps. The classifier is an SVM trained on the real training digits at 16x16.",
        "`samples.png`, a row per class: four held-out digits, eight samples without guidance, eight with guidance 2.",
        "",
    ]
    (args.out / "TRAINING.md").write_text("\n".join(lines))


def main() -> None:
    """Train, save, look at samples, write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/digits-teacher"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=6500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--init", type=Path, default=None, help="output folder of an earlier run to go on from")
    parser.add_argument("--balance", action="store_true", help="weigh the noise MSE so that noisy steps count too")
    parser.add_argument("--every", type=int, default=500, help="steps between reports")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--samples-per-class", type=int, default=50)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    transformer, history = train(args)
    save_pipeline(transformer, args.out / "teacher")
    images, labels = load_digits("train")
    train_mse, _ = evaluate(transformer, Diffusion(), images[:297], labels[:297])
    checked = check(args.out / "teacher", args.out / "samples.png", args.samples_per_class, args.seed)
    report(args, history, train_mse, checked)
    print((args.out / "TRAINING.md").read_text())


if __name__ == "__main__":
    main()
