"""FLUX.1 with coarser patches in the steps that allow it (DDiT): the stock pipeline, and one call that puts an adapter
on it.

    python examples/flux_ddit.py                                   # tiny random weights: nothing is downloaded
    python examples/flux_ddit.py black-forest-labs/FLUX.1-dev --adapter DIR_OR_ID --prompt "a heron at dawn"

It shows that the pipeline draws what it drew before while m = 1 is asked for, bit for bit; then it draws with coarse
steps, prints the factor m of every step and why it was chosen, and saves the picture. Without --adapter a fresh one is
attached, whose coarse steps nobody has taught yet (`upcycle finetune` does). Needs transformers, as the stock pipeline.
"""

import argparse
import time

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from upcycle.models import ddit


def tiny_pipeline() -> FluxPipeline:
    """FLUX.1 in shape, with two layers of random weights and without text encoders."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8,) * 4, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4, latent_channels=4, shift_factor=0.1,
    )  # fmt: skip
    return FluxPipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), vae, None, None, None, None, transformer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="ID", help="of a FLUX.1 pipeline; default: tiny random weights")
    parser.add_argument("--adapter", metavar="DIR_OR_ID", help="default: a fresh one")
    parser.add_argument("--prompt", default="a heron on a misty lake at dawn, photograph")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--size", type=int, help="side of the picture; default: 1024, or 256 with tiny weights")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--schedule", metavar="m:share,...", help="factors for shares of the steps, in order")
    how.add_argument("--threshold", type=float, metavar="T", help="coarser steps below this deviation")
    parser.add_argument("--out", default="out.png")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.model:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        pipe = FluxPipeline.from_pretrained(options.model, torch_dtype=dtype)
        given = {"prompt": options.prompt}
    else:
        pipe = tiny_pipeline()
        given = {"prompt_embeds": torch.randn(1, 16, 32), "pooled_prompt_embeds": torch.randn(1, 32)}
        given = {name: value.to(device) for name, value in given.items()}
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    side = options.size or (1024 if options.model else 256)

    def draw(steps: int, output_type: str):
        generator = torch.Generator().manual_seed(0)
        run = {"num_inference_steps": steps, "output_type": output_type, "generator": generator}
        return pipe(**given, height=side, width=side, **run).images

    stock = draw(2, "latent")

    # All of it: an adapter on a stock pipeline.
    if options.adapter:
        model = ddit.apply(pipe, options.adapter)
    else:
        config = ddit.DDiTConfig("FluxTransformer2DModel", patches=[2, 4], prediction="flow")
        model = ddit.attach(pipe.transformer, config)
        ddit.follow(model, pipe)  # its schedule asks the pipeline's scheduler for times and the number of steps

    with model.at(1):  # m = 1 whatever the schedule says
        same = torch.equal(draw(2, "latent"), stock)
    print("m = 1: " + ("the stock pipeline's bits" if same else "NOT the stock pipeline's output"))

    if options.threshold is not None:
        model.set_schedule(threshold=options.threshold)
    elif options.schedule or model.ddit.threshold is None:  # otherwise the adapter has a threshold of its own
        parts = [part.split(":") for part in (options.schedule or "4:0.3,2:0.5,1:0.2").split(",")]
        model.set_schedule(fixed=[(int(m), float(share)) for m, share in parts])
    start = time.perf_counter()
    picture = draw(options.steps, "pil")[0]
    seconds = time.perf_counter() - start

    print("step  m  why")
    for entry in model.schedule.log:
        print(f"{entry['step']:4}  {entry['m']}  {entry['why']}")
    picture.save(options.out)
    print(f"{options.out}: {picture.width} x {picture.height}, {options.steps} steps in {seconds:.1f} s")


if __name__ == "__main__":
    main()
