"""The beginning of code for a fresh process that cannot import this package; its arguments are two words."""

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "upcycle":
            raise ImportError("blocked")
sys.meta_path.insert(0, Block())
import torch
from diffusers import AutoModel, DiffusionPipeline, DiTPipeline
where, scratch = sys.argv[1:]
def draw(pipe, guidance=4.0):
    pipe.set_progress_bar_config(disable=True)
    return pipe(class_labels=[1, 9, 3], num_inference_steps=3, guidance_scale=guidance,
                generator=torch.Generator().manual_seed(0), output_type="pt").images
"""
