"""Wan 2.1 with coarser patches in the steps that allow it (DDiT): the stock pipeline, and one call that puts an adapter
on it.

    python examples/wan_ddit.py                                    # tiny random weights: nothing is downloaded
    python examples/wan_ddit.py Wan-AI/Wan2.1-T2V-1.3B-Diffusers --adapter DIR_OR_ID --prompt "waves at night"

It shows that the pipeline draws what it drew before while m = 1 is asked for, bit for bit; then it draws with coarse
steps, prints the factor m of every step and why it was chosen, and saves an animated GIF (or, for another ending, the
first frame). A step's two calls, with and without the prompt, run at one m. Without --adapter a fresh one is attached,
whose coarse steps nobody has taught yet (`upcycle finetune` does). Needs transformers, as the stock pipeline.
"""

import argparse
import time

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.utils import export_to_gif

from upcycle.models import ddit


def tiny_pipeline() -> WanPipeline:
    """Wan 2.1 in shape, with two layers of random weights and without a text encoder."""
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=32, freq_dim=32,
        ffn_dim=64, num_layers=2,
    )  # fmt: skip
    vae = AutoencoderKLWan(base_dim=8, z_dim=4, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    return WanPipeline(None, None, vae, FlowMatchEulerDiscreteScheduler(shift=3.0), transformer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", metavar="ID", help="of a Wan pipeline; default: tiny random weights")
    parser.add_argument("--adapter", metavar="DIR_OR_ID", help="default: a fresh one")
    parser.add_argument("--prompt", default="a paper boat on a brook in the rain")
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--size", metavar="HxW", help="default: 480x832, or 64x96 with tiny weights")
    parser.add_argument("--frames", type=int, help="one more than a multiple of 4; default: 81, or 5 with tiny weights")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--schedule", metavar="m:share,...", help="factors for shares of the steps, in order")
    how.add_argument("--threshold", type=float, metavar="T", help="coarser steps below this deviation")
    parser.add_argument("--out", default="out.gif")
    options = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.model:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        # Its VAE loses too much in bf16.
        pipe = WanPipeline.from_pretrained(options.model, torch_dtype={"default": dtype, "vae": torch.float32})
        given = {"prompt": options.prompt}
    else:
        pipe = tiny_pipeline()
        given = {name: torch.randn(1, 16, 32, device=device) for name in ("prompt_embeds", "negative_prompt_embeds")}
    pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    size = options.size or ("480x832" if options.model else "64x96")
    height, width = map(int, size.split("x"))
    count = options.frames or (81 if options.model else 5)

    def draw(steps: int, output_type: str):
        generator = torch.Generator().manual_seed(0)
        run = {"num_inference_steps": steps, "output_type": output_type, "generator": generator}
        return pipe(**given, height=height, width=width, num_frames=count, **run).frames

    stock = draw(2, "latent")

    # All of it: an adapter on a stock pipeline.
    if options.adapter:
        model = ddit.apply(pipe, options.adapter)
    else:
        config = ddit.DDiTConfig("WanTransformer3DModel", patches=[2, 4], prediction="flow")
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
    frames = draw(options.steps, "pil")[0]
    seconds = time.perf_counter() - start

    print("step  m  why")
    for entry in model.schedule.log:
        print(f"{entry['step']:4}  {entry['m']}  {entry['why']}")
    if options.out.endswith(".gif"):
        export_to_gif(frames, options.out, fps=16)
    else:
        frames[0].save(options.out)
    print(f"{options.out}: {len(frames)} frames, {width} x {height}, {options.steps} steps in {seconds:.1f} s")


if __name__ == "__main__":
    main()
