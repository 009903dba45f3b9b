"""upcycle: turn a pretrained Diffusion Transformer into one that spends its compute where the picture needs it."""

__version__ = "0.1.0"
