"""What DyDiT's gates and tail dropping cost in quality, beside each other at equal FLOPs: the table of docs/dydit.md.

    python benchmarks/dydit.py runs/digits/export runs/digits-dydit/export
    python benchmarks/dydit.py --speed

For every student of the shipped digits teacher and every ρ: the share of the blocks' FLOPs that the gates left and
GFLOPs per image, both measured along the sampling runs (``--images`` of them, DDIM, 50 steps, unguided; the papers'
counting), the validation loss on held-out digits, and the paired MSE: of the images to those that the teacher makes of
the same noise. Of students with gates also the share by timestep, in validation. The teacher with fewer steps closes
the table.

``--speed``: what the gates save in time, on random weights of B/2's width (12 heads of 64, 4 blocks), in fp32: all
gates open beside every other head and group off, about half of the tokens skipping the MLP, and both; in turn, medians.
"""

import argparse
import statistics
import time

import torch
from diffusers import DiTPipeline

from upcycle.evaluation.flops import chunked_dit_flops, dit_flops, gate_share
from upcycle.evaluation.validation import validate
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.sampling.pipeline import load_pipeline
from upcycle.sampling.sampler import Sampling, sample, set_sampler
from upcycle.training.digits import TEACHER, load_digits

STEPS, CLASSES = 50, 10
FEWER_STEPS = (40, 30, 25, 20, 15)


def draw(pipe: DiTPipeline, images: int, steps: int = STEPS) -> torch.Tensor:
    seeds = list(range(images))
    return sample(pipe, [seed % CLASSES for seed in seeds], seeds, Sampling(steps, guidance_scale=1.0))


@torch.inference_mode()
def speed(batch: int, repeats: int) -> None:
    torch.manual_seed(0)
    plain = {"num_attention_heads": 12, "attention_head_dim": 64, "num_layers": 4, "router": "grid"}
    models = {"none": ChunkedDiT(**plain).eval()}
    for name in ("open", "width", "tokens", "both"):
        model = models[name] = ChunkedDiT(**plain, dydit=0.5).eval()
        if name in ("width", "both"):
            model.dydit_routers.width.bias.view(4, 2, 11)[..., ::2] = -5.0
        for router in model.dydit_routers.tokens if name in ("tokens", "both") else ():
            torch.nn.init.normal_(router[-1].weight)
            router[-1].bias.zero_()
    inputs = torch.randn(batch, 4, 32, 32), torch.full((batch,), 500), torch.arange(batch)
    seconds = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            start = time.perf_counter()
            model(*inputs)
            seconds[name].append(time.perf_counter() - start)
    print(f"{'gates':8} {'blocks':>7} {'GFLOPs':>7} {'ms':>7} {'time':>6} {'FLOPs':>6}")
    base = None
    for name, model in models.items():
        out = model(*inputs)
        tokens = out.routing.mask.sum(1)
        share = gate_share(model.config, out.gates, tokens).mean().item()
        flops = sum(chunked_dit_flops(model.config, tokens[0].item(), share).values()) / 1e9
        ms = 1000 * statistics.median(seconds[name])
        base = base or (ms, flops)
        print(f"{name:8} {share:7.3f} {flops:7.2f} {ms:7.0f} {ms / base[0]:6.2f} {flops / base[1]:6.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exports", nargs="*")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--tail-drops", default="0,0.1,0.2,0.3,0.4,0.5,0.6")
    parser.add_argument("--images", type=int, default=40)
    options = parser.parse_args()
    if options.speed:
        speed(options.batch, options.repeats)
        return
    x0, labels = load_digits("val")

    teacher = load_pipeline(str(TEACHER))
    set_sampler(teacher, "ddim")
    wanted = draw(teacher, options.images)
    print(f"{'model':40} {'ρ':>4} {'blocks':>7} {'tokens':>7} {'GFLOPs':>7} {'val MSE':>8} {'paired MSE':>10}")
    for name in options.exports:
        pipe = load_pipeline(name)
        set_sampler(pipe, "ddim")
        model, spent = pipe.transformer, []

        def count(module, args, kwargs, out, spent=spent) -> None:
            tokens = out.routing.mask.sum(1)
            shares = gate_share(module.config, out.gates, tokens)
            for n, share in zip(tokens.tolist(), shares.tolist(), strict=True):
                spent.append((n, share, sum(chunked_dit_flops(module.config, n, share).values())))

        alpha_bar = model.alpha_bar(torch.arange(1000))
        for rho in map(float, options.tail_drops.split(",")):
            model.set_tail_drop(rho)
            spent.clear()
            handle = model.register_forward_hook(count, with_kwargs=True)
            images = draw(pipe, options.images)
            handle.remove()
            tokens, share, flops = (sum(column) / len(spent) for column in zip(*spent, strict=True))
            found = validate(model, x0, labels, alpha_bar)
            paired = (images - wanted).square().mean().item()
            row = f"{share:7.3f} {tokens:7.1f} {STEPS * flops / 1e9:7.2f} {found.mean_loss:8.4f} {paired:10.5f}"
            print(f"{name:40} {rho:4g} {row}", flush=True)
            if rho == 0 and model.config.dydit:
                print(f"{name:40}    0 blocks", *(f"t={t}: {left:.2f}" for t, left in found.share.items()))
    for steps in (STEPS, *FEWER_STEPS):
        paired = (draw(teacher, options.images, steps) - wanted).square().mean().item()
        cost = steps * dit_flops({**teacher.transformer.config, "num_classes": CLASSES}) / 1e9
        row = f"{'':4} {'':7} {64:7.1f} {cost:7.2f} {'':8} {paired:10.5f}"
        print(f"{f'teacher, {steps} steps':40} {row}")


if __name__ == "__main__":
    main()
