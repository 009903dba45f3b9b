"""Checkpoints of the authors' DC-DiT code (AMD-AGI/DynamicChunkingDiT), under their own names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from upcycle.errors import UpcycleError
from upcycle.sources.description import TIMESTEP_FEATURES, DCDiTConfig, Source, linear
from upcycle.sources.recognise import choose_heads, count_layers, setting, shape_of, square_root
from upcycle.sources.tensors import LazyTensor, check_tensors

_MAIN = "hnet.main_network.main_network."


def open_dcdit(spec: str, path: Path, tensors: Mapping[str, LazyTensor], settings: Any, *, heads: int | None) -> Source:
    """Describe a state dict of the authors' one-stage model; `settings` is their pickled config, or None.

    Raises `UpcycleError` if tensors are missing, unexpected or mis-shaped; more stages show up as unexpected tensors.
    """
    notes: list[str] = []
    enc_dec_dim, in_channels, _, _ = shape_of(spec, tensors, "x_embedder.proj.weight", 4)
    _, positions, width = shape_of(spec, tensors, "pos_embed", 3)
    rows, _ = shape_of(spec, tensors, "y_embedder.embedding_table.weight", 2)
    (out_channels,) = shape_of(spec, tensors, "final_layer.linear.bias", 1)
    grid = square_root(spec, "pos_embed", positions)
    if setting(settings, "data", "num_classes") == rows:
        raise UpcycleError(f"{spec}: was trained without label dropout and has no null class, which is not supported")
    hnet = setting(settings, "model", "hnet")
    stages = setting(hnet, "num_heads")
    stated = setting(settings, "training", "downsample_factor")
    stated = stated[0] if isinstance(stated, list) and stated else stated
    config = DCDiTConfig(
        d_model=width,
        heads=choose_heads(spec, width, heads, stages[-1] if isinstance(stages, list) and stages else None, notes),
        layers=count_layers(tensors, _MAIN + "layers."),
        enc_dec_dim=enc_dec_dim,
        sample_size=grid,
        in_channels=in_channels,
        out_channels=out_channels,
        num_classes=rows - 1,
        sigma=_sigma(spec, setting(hnet, "dechunk_kernel_sigma"), grid, notes),
        encoder_layers=count_layers(tensors, "hnet.encoder.layers."),
        decoder_layers=count_layers(tensors, "hnet.decoder.layers."),
        ratio=float(stated) if isinstance(stated, int | float) and stated > 1 else 4.0,
    )
    check_tensors(spec, dcdit_shapes(config), tensors)
    return Source("dc-dit", spec, path.stem, config, tensors, notes=notes)


def _sigma(spec: str, stated: Any, grid: int, notes: list[str]) -> float:
    """Width of the smoothing kernel: as stated, else what the authors use for 256 and 512 px."""
    if stated is None:
        sigma = 1.0 if grid <= 32 else 2.0
        notes.append(f"assumed a smoothing width of {sigma:g}, as the authors use for a {grid}×{grid} grid")
        return sigma
    if not isinstance(stated, int | float) or not stated > 0:
        raise UpcycleError(f"{spec}: dechunk_kernel_sigma is {stated!r} in its config; it must be a positive number")
    return float(stated)


def dcdit_shapes(config: DCDiTConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors of the authors' one-stage model."""
    width, narrow = config.d_model, config.enc_dec_dim
    squeeze = width // 4
    shapes: dict[str, tuple[int, ...]] = {
        "pos_embed": (1, config.sample_size**2, width),
        "y_embedder.embedding_table.weight": (config.num_classes + 1, width),
    }
    shapes |= _conv("x_embedder.proj", config.in_channels, narrow, 3)
    shapes |= linear("t_embedder.mlp.0", TIMESTEP_FEATURES, width)
    shapes |= linear("t_embedder.mlp.2", width, width)
    for index in range(config.encoder_layers):  # the last one widens
        outputs = width if index == config.encoder_layers - 1 else narrow
        shapes |= _conv_block(f"hnet.encoder.layers.{index}.", narrow, outputs, width)
    shapes["hnet.encoder.rmsnorm.weight"] = (width,)
    shapes |= _conv("hnet.routing_module.proj", width, squeeze, 1)
    shapes |= _conv("hnet.routing_module.context_predictor", squeeze, squeeze, 3)
    shapes |= _conv("hnet.routing_module.residual_scorer.0", squeeze, squeeze, 3)
    shapes |= _norm("hnet.routing_module.residual_scorer.1", squeeze)
    shapes |= _conv("hnet.routing_module.residual_scorer.3", squeeze, 1, 1)
    for index in range(config.layers):
        block = f"{_MAIN}layers.{index}."
        shapes |= linear(block + "attn.qkv", width, 3 * width)
        shapes |= linear(block + "attn.proj", width, width)
        shapes |= linear(block + "mlp.fc1", width, 4 * width)
        shapes |= linear(block + "mlp.fc2", 4 * width, width)
        shapes |= linear(block + "adaLN_modulation.1", width, 6 * width)
    shapes[_MAIN + "rmsnorm.weight"] = (width,)
    shapes |= linear("hnet.residual_proj", width, width)
    for index in range(config.decoder_layers):  # the first one narrows
        inputs = width if index == 0 else narrow
        shapes |= _conv_block(f"hnet.decoder.layers.{index}.", inputs, narrow, width)
    shapes["hnet.decoder.rmsnorm.weight"] = (narrow,)
    shapes |= linear("final_layer.adaLN_modulation.1", width, 2 * narrow)
    shapes |= linear("final_layer.linear", narrow, config.out_channels)
    return shapes


def _conv_block(name: str, inputs: int, outputs: int, condition: int) -> dict[str, tuple[int, ...]]:
    inner = min(inputs, outputs)
    shapes = _norm(name + "norm1", inputs) | _norm(name + "norm2", inner)
    shapes |= _conv(name + "conv1", inputs, inner, 3) | _conv(name + "conv2", inner, outputs, 3)
    shapes |= linear(name + "cond_proj.1", condition, inner)
    if inputs != outputs:
        shapes |= _conv(name + "skip_proj", inputs, outputs, 1)
    return shapes


def _conv(name: str, inputs: int, outputs: int, kernel: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (outputs, inputs, kernel, kernel), f"{name}.bias": (outputs,)}


def _norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}
