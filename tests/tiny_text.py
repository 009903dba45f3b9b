"""Tiny pipelines that read text, made without a network: FLUX.1, Wan and Z-Image with text encoders and tokenizers."""

import json
from pathlib import Path

import tiny_ddit
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
    ZImagePipeline,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "blue", "fox", "house", "user", "assistant"]
KINDS = ["flux", "wan", "z-image"]
TWO = "wan-two"
"""Wan 2.2: `make` knows it too; the second transformer takes over below half of the noise."""
SIDES = {"flux": (16, 24), "wan": (32, 48), "z-image": (16, 24), TWO: (32, 48)}
"""Height and width in pixels: latents of 8 x 12, Wan's of 4 x 6."""


def word_tokenizer(length: int, end: bool = True) -> PreTrainedTokenizerFast:
    """One token a word."""
    tokens = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokens.pre_tokenizer = pre_tokenizers.Whitespace()
    if end:
        tokens.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokens, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """Letters alone, no merges."""
    folder.mkdir(parents=True)
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    names = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def image_vae() -> AutoencoderKL:
    """4 channels, half the side."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=2, sample_size=16,
        scaling_factor=0.5, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def make(kind: str, folder: Path) -> Path:
    """Save the pipeline to ``folder``."""
    torch.manual_seed(0)
    transformer = tiny_ddit.make(kind)
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    if kind == "flux":
        text = CLIPTextConfig(
            vocab_size=54, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=16, bos_token_id=52, eos_token_id=53, pad_token_id=53,
        )  # fmt: skip
        t5 = T5Config(vocab_size=10, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        clip = clip_tokenizer(folder.parent / f"{folder.name}-clip")
        pipe = FluxPipeline(
            flow, image_vae(), CLIPTextModel(text), clip, T5EncoderModel(t5), word_tokenizer(512), transformer
        )
    elif kind in ("wan", TWO):
        vae = AutoencoderKLWan(
            base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4
        )
        umt5 = UMT5Config(vocab_size=10, d_model=8, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
        sampler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
        more = {"transformer_2": tiny_ddit.make("wan", seed=3), "boundary_ratio": 0.5} if kind == TWO else {}
        pipe = WanPipeline(word_tokenizer(512), UMT5EncoderModel(umt5), vae, sampler, transformer, **more)
    else:
        qwen = Qwen3Config(
            vocab_size=10, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, head_dim=4,
        )  # fmt: skip
        tokens = word_tokenizer(512, end=False)
        tokens.chat_template = (
            "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
            "{% if add_generation_prompt %}assistant{% endif %}"
        )
        pipe = ZImagePipeline(flow, image_vae(), Qwen3Model(qwen), tokens, transformer)
    pipe.save_pretrained(folder)
    return folder
