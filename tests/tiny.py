"""Tiny checkpoints of every kind that `upcycle.sources` reads, for all tests."""

import argparse
import json
import sys
import types
from dataclasses import field, make_dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file

GOLDEN = Path(__file__).parent / "golden"


def make_dit(
    seed: int,
    *,
    width: int = 64,
    heads: int = 2,
    layers: int = 2,
    patch: int = 2,
    size: int = 16,
    in_channels: int = 4,
    classes: int = 10,
    learned_sigma: bool = True,
) -> DiTTransformer2DModel:
    """A DiT in eval mode whose weights are all random, also those that training starts at zero.

    Outputs are of order 1 and depend on the timestep and the class. All blocks have the same embedders, as real
    conversions have.
    """
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=width // heads,
        in_channels=in_channels,
        out_channels=in_channels * (2 if learned_sigma else 1),
        num_layers=layers,
        sample_size=size,
        patch_size=patch,
        num_embeds_ada_norm=classes,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(generator=generator)
            if name.endswith("bias"):
                parameter.mul_(0.1)
            elif not name.endswith("embedding_table.weight"):
                parameter.mul_(parameter[0].numel() ** -0.5)
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(first)
    return model.eval()


def make_vae(seed: int = 0, *, latent_channels: int = 4) -> AutoencoderKL:
    """An autoencoder of 25 K parameters that enlarges latents by 8, as the real one does."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=latent_channels,
        sample_size=64,
    )


def save_transformer(
    folder: Path,
    model: DiTTransformer2DModel,
    *,
    legacy_config: bool = False,
    variant: str | None = None,
    max_shard_size: str | None = None,
    bin: bool = False,
) -> Path:
    """Write the transformer alone, optionally with the config that `facebook/DiT-XL-2-256` has; returns `folder`.

    A variant changes file names only; pass a model of that dtype.
    """
    options = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    model.save_pretrained(folder, variant=variant, safe_serialization=not bin, **options)
    if legacy_config:
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config |= {
            "_class_name": "Transformer2DModel",
            "_diffusers_version": "0.12.0.dev0",
            "cross_attention_dim": None,
            "num_vector_embeds": None,
            "only_cross_attention": False,
            "use_linear_projection": False,
        }
        del config["norm_eps"]
        path.write_text(json.dumps(config, indent=2))
    return folder


def save_pipeline(
    folder: Path,
    model: DiTTransformer2DModel,
    *,
    legacy_config: bool = False,
    variant: str | None = None,
    max_shard_size: str | None = None,
    bin: bool = False,
) -> Path:
    """Write a `DiTPipeline` folder as the real repository has it: three components, id2label, a card; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    save_transformer(
        folder / "transformer",
        model,
        legacy_config=legacy_config,
        variant=variant,
        max_shard_size=max_shard_size,
        bin=bin,
    )
    make_vae(latent_channels=model.config.in_channels).save_pretrained(folder / "vae", safe_serialization=not bin)
    DDIMScheduler(clip_sample=False).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": "0.12.0.dev0",
        "id2label": {str(index): f"label {index}" for index in range(model.config.num_embeds_ada_norm)},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "Transformer2DModel" if legacy_config else "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    (folder / "README.md").write_text("---\nlicense: cc-by-nc-4.0\ntags:\n- dit\n---\n\n# A tiny DiT\n")
    return folder


def meta_state(model: DiTTransformer2DModel) -> dict[str, torch.Tensor]:
    """The model's weights in the names of Meta's code, with fused qkv and the position embedding."""
    theirs = {
        "pos_embed.proj": "x_embedder.proj",
        "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "transformer_blocks.0.norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
    }
    ours = model.state_dict()
    state = {"pos_embed": model.pos_embed.pos_embed.clone()}
    for index in range(model.config.num_layers):
        block, short = f"transformer_blocks.{index}.", f"blocks.{index}."
        theirs |= {
            block + "attn1.to_out.0": short + "attn.proj",
            block + "ff.net.0.proj": short + "mlp.fc1",
            block + "ff.net.2": short + "mlp.fc2",
            block + "norm1.linear": short + "adaLN_modulation.1",
        }
        for part in ("weight", "bias"):
            fused = torch.cat([ours[f"{block}attn1.to_{letter}.{part}"] for letter in "qkv"])
            state[f"{short}attn.qkv.{part}"] = fused
    for name, tensor in ours.items():
        module, part = name.rsplit(".", 1)
        if module in theirs:
            state[f"{theirs[module]}.{part}"] = tensor.clone()
    return state


def save_meta_pt(path: Path, model: DiTTransformer2DModel, training: bool = False, name: str = "DiT-S/2") -> Path:
    """Write a `.pt` of Meta's code; with `training`, one with model, ema, optimiser and arguments.

    In the training checkpoint `ema` is the given model and `model` is zero everywhere but in its position embedding.
    """
    state = meta_state(model)
    content: dict = state
    if training:
        raw = {key: value if key == "pos_embed" else torch.zeros_like(value) for key, value in state.items()}
        optimiser = torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], lr=1e-4)
        arguments = argparse.Namespace(
            model=name, image_size=8 * model.config.sample_size, num_classes=model.config.num_embeds_ada_norm
        )
        content = {"model": raw, "ema": state, "opt": optimiser.state_dict(), "args": arguments}
    torch.save(content, path)
    return path


def meta_as_stock(model: DiTTransformer2DModel) -> DiTTransformer2DModel:
    """Switch a stock model, in place, to the conventions of Meta's code (timestep frequencies and epsilon)."""
    for block in model.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        block.norm3.eps = 1e-6
    return model


def dcdit_state() -> dict[str, torch.Tensor]:
    """The authors' tiny model of the golden data, in their names."""
    tensors = load_file(GOLDEN / "dcdit_official_tiny.safetensors")
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name.startswith("model.")}


def dcdit_description() -> dict:
    """The golden model's sizes, from the golden file."""
    with safe_open(GOLDEN / "dcdit_official_tiny.safetensors", "pt") as file:
        return json.loads(file.metadata()["config"])


def save_dcdit_pt(path: Path, with_config: bool = True, *, sigma: float = 1.0, heads: int = 2) -> Path:
    """Write a checkpoint of the authors' trainer, whose pickle refers to dataclasses of a module `config`.

    In it `ema` is the golden model and `model` is zero. Without the config: the golden model's plain state dict.
    """
    state = dcdit_state()
    if not with_config:
        torch.save(state, path)
        return path
    module = _authors_config_module()
    size = dcdit_description()
    hnet = module.HNetConfig(
        arch_layout=["c2", [f"D{size['layers']}"], "c2"],
        d_model=[size["d_model"]] * 2,
        num_heads=[heads] * 2,
        enc_dec_dim_factor=[size["d_model"] // size["enc_dec_dim"], None],
        dechunk_kernel_sigma=sigma,
    )
    data = module.DataConfig(image_size=8 * size["sample_size"], num_classes=size["num_classes"])
    config = module.Config(model=module.ModelConfig(hnet=hnet), data=data)
    content = {
        "model": {name: torch.zeros_like(tensor) for name, tensor in state.items()},
        "ema": state,
        "opt": {"state": {}, "param_groups": []},
        "config": config,
    }
    # The pickle must name `config.Config`, and no such module may stay importable while it is read.
    sys.modules["config"] = module
    try:
        torch.save(content, path)
    finally:
        del sys.modules["config"]
    return path


def _authors_config_module() -> types.ModuleType:
    """A module with the fields of the authors' config classes that matter for reading checkpoints."""
    module = types.ModuleType("config")

    def add(name: str, /, **defaults: object) -> type:
        fields = [(key, object, field(default_factory=lambda value=value: value)) for key, value in defaults.items()]
        cls = make_dataclass(name, fields)
        cls.__module__ = "config"
        setattr(module, name, cls)
        return cls

    hnet = add(
        "HNetConfig",
        arch_layout=["c2", ["D12"], "c2"],
        d_model=[768, 768],
        num_heads=[12, 12],
        tie_embeddings=False,
        enc_dec_dim_factor=None,
        dechunk_kernel_sigma=1.0,
        fp32_router_dechunk=True,
    )
    parts = {
        "model": add("ModelConfig", name="DC-DiT", hnet=hnet(), mlp_ratio=4.0)(),
        "training": add("TrainingConfig", epochs=80, class_dropout_prob=0.1, learn_sigma=True)(),
        "data": add("DataConfig", feature_path="features", image_size=256, num_classes=1000)(),
        "diffusion": add("DiffusionConfig", noise_schedule="linear", diffusion_steps=1000)(),
        "logging": add("LoggingConfig", results_dir="results", log_every=100)(),
    }
    add("Config", **parts, ckpt=None)
    return module
