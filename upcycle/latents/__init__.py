"""Folders of latents: what `upcycle encode` and `upcycle synthesize` write and training reads.

Such a folder holds safetensors shards, ``00000.safetensors`` and so on, and an ``index.json`` that lists them and says
how they were made. A shard holds some of

    mean, std [n, C, H, W] fp16             the VAE's posterior of each image, in the model's scale
    mean_flip, std_flip                     the same of the images flipped left to right
    z0, z0_flip [n, C, H, W] fp16           clean samples: pixels, or a teacher's own samples
    label [n] int64, seed [n] int64

"In the model's scale": z = (x − shift_factor) · scaling_factor, so that training adds noise to them as they are.
"""
