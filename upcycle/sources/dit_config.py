"""The `config.json` of a diffusers transformer: is it a DiT that can be converted, and of what shape."""

from collections.abc import Mapping
from typing import Any

from upcycle.errors import UpcycleError
from upcycle.sources.description import DiTConfig

# What `DiTTransformer2DModel` takes for a size that its config leaves out.
_SIZES = {
    "num_layers": 28,
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}
# Options that change what the model computes, and the values under which it is the DiT we know. The lower half
# exists in the legacy `Transformer2DModel` only, which covers many architectures.
_OPTIONS: dict[str, tuple[Any, ...]] = {
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "norm_type": ("ada_norm_zero",),
    "norm_elementwise_affine": (False,),
    "quantization_config": (None,),
    "cross_attention_dim": (None,),
    "only_cross_attention": (None, False),
    "double_self_attention": (None, False),
    "num_vector_embeds": (None,),
    "caption_channels": (None,),
    "attention_type": (None, "default"),
    "interpolation_scale": (None, 1),
}
# Where an option is absent it has the value that we know, but the legacy class has other defaults.
_LEGACY_DEFAULTS = {
    "activation_fn": "geglu",
    "attention_bias": False,
    "norm_type": "layer_norm",
    "norm_elementwise_affine": True,
}


def model_kind(config: Mapping[str, Any]) -> str:
    """What a `config.json` describes, in words: its class, or the type of a transformers model."""
    name = config.get("_class_name")
    if isinstance(name, list):  # pipelines with code of their own
        name = name[-1] if name else None
    if isinstance(name, str):
        return name
    if isinstance(config.get("model_type"), str):
        classes = config.get("architectures")
        named = f" ({classes[0]})" if isinstance(classes, list) and classes else ""
        return f"{config['model_type']} model of transformers{named}"
    return "model of unknown class"


def read_dit_config(spec: str, config: Mapping[str, Any]) -> DiTConfig:
    """Check the config of a `DiTTransformer2DModel`, or of a legacy `Transformer2DModel` that is one.

    Raises `UpcycleError` naming the class if it is another model, or the first option that is not supported.
    """
    kind = model_kind(config)
    if kind not in ("DiTTransformer2DModel", "Transformer2DModel"):
        raise UpcycleError(
            f"{spec}: is a {kind}, not a class-conditional DiT (DiTTransformer2DModel); give one of those"
        )
    legacy = kind == "Transformer2DModel"
    if legacy and config.get("patch_size") is None:
        raise UpcycleError(
            f"{spec}: is a Transformer2DModel without patches, not a class-conditional DiT; give one of those"
        )
    for option, allowed in _OPTIONS.items():
        default = _LEGACY_DEFAULTS.get(option, allowed[0]) if legacy else allowed[0]
        value = config.get(option, default)
        if value not in allowed:
            raise UpcycleError(f"{spec}: {option} is {value!r} in its config; only {allowed[0]!r} is supported")
    sizes = {key: _size(spec, key, config.get(key, default)) for key, default in _SIZES.items()}
    out_channels = config.get("out_channels")
    norm_eps = config.get("norm_eps", 1e-5)
    if not isinstance(norm_eps, float) or not 0 < norm_eps < 1:
        raise UpcycleError(f"{spec}: norm_eps is {norm_eps!r} in its config; it must be a small positive number")
    size, patch = sizes["sample_size"], sizes["patch_size"]
    if size % patch:
        raise UpcycleError(f"{spec}: sample_size {size} in its config is no multiple of patch_size {patch}")
    return DiTConfig(
        num_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_attention_heads"],
        attention_head_dim=sizes["attention_head_dim"],
        in_channels=sizes["in_channels"],
        out_channels=sizes["in_channels"] if out_channels is None else _size(spec, "out_channels", out_channels),
        sample_size=sizes["sample_size"],
        patch_size=sizes["patch_size"],
        num_classes=sizes["num_embeds_ada_norm"],
        time_embedding="diffusers",
        norm_eps=norm_eps,
    )


def _size(spec: str, key: str, value: Any) -> int:
    # The upper limit keeps a corrupt config from asking for endless lists of names.
    if type(value) is not int or not 0 < value <= 1_000_000:
        raise UpcycleError(f"{spec}: {key} is {value!r} in its config; it must be a positive whole number")
    return value
