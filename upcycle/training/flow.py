"""DDiT on models that read text (FLUX.1, Wan, Z-Image): the student of `upcycle.training.patches` with flow matching.

Neither text encoders nor a VAE are needed: embeddings and clean latents come from the data (`PromptFolder`).
Legend: B samples, C latent channels, F x H x W latent grid, T tokens of text; sigma is the noise level, 0 to 1.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput

from upcycle.errors import UpcycleError
from upcycle.evaluation.validation import TIMESTEPS, Validation
from upcycle.graft.patches import Adapter
from upcycle.latents.prompts import PromptFolder
from upcycle.models import ddit
from upcycle.recipe import Recipe
from upcycle.sources import hub
from upcycle.sources.backbone import Backbone, backbone_class, open_backbones
from upcycle.training.patches import VARIANCE_SAMPLES, PatchStudent, measured_variance

SECOND = ddit.COMPONENTS[1]
NO_EMPTY_PROMPT = "label_dropout is left out: the data has no empty prompt (an empty line of synthesize --prompts)"


def text_backbones(recipe: Recipe) -> list[Backbone]:
    """The bases of a recipe of method ddit, if they read text (otherwise none): the one of ``component``, or all of the
    pipeline; of the Hub their embeddings and heads are fetched.

    Raises:
        UpcycleError: it is damaged, or the recipe has options that are not for it.
    """
    if recipe.method != "ddit" or recipe.teacher == "digits":
        return []
    if backbone_class(recipe.teacher, recipe.revision) in (None, "DiTTransformer2DModel"):
        return []
    found = open_backbones(recipe.teacher, component=recipe.component, revision=recipe.revision, whole=False)
    if recipe.component and found[0].boundary is None:
        raise UpcycleError(f"component: teacher {recipe.teacher} has one transformer; leave it out")
    return found


def open_prompts(spec: str, backbone: Backbone) -> PromptFolder:
    """Data of a recipe; raises `UpcycleError` where it does not fit the base."""
    data = PromptFolder(spec)
    data.check_model(backbone.base_class, backbone.config)
    return data


def stored_dtype(recipe: Recipe, backbone: Backbone) -> torch.dtype:
    """The dtype of the base's files, which it trains in; raises `UpcycleError` where the recipe needs another."""
    dtype = backbone.tensors[f"{backbone.layers.embed.name}.weight"].dtype
    if dtype not in (torch.float32, torch.bfloat16):
        raise UpcycleError(f"teacher {recipe.teacher} is stored in {dtype}; method ddit trains on fp32 or bf16")
    if dtype == torch.bfloat16 and recipe.mixed_precision != "bf16":
        raise UpcycleError(f"teacher {recipe.teacher} is stored in bf16; give mixed_precision: bf16")
    return dtype


def start_student(
    recipe: Recipe, backbones: list[Backbone], data: PromptFolder, adapters: list[Adapter], name: str
) -> "FlowStudent":
    """The stock transformers in their own dtype with the adapters in fp32; of ``backbones`` those train that have one.

    ``name``: what the adapters are called in errors. Raises `UpcycleError` where one does not fit, or there is none.
    """
    made = {config.component: (config, tensors) for config, tensors in adapters}
    trained = [backbone for backbone in backbones if (backbone.subfolder or "transformer") in made]
    if not trained:
        asked = recipe.component or "transformer"
        raise UpcycleError(f"{name} has no adapter for {asked}; it has {', '.join(made)}")
    bases = [_start_base(recipe, each, data, *made[each.subfolder or "transformer"], name) for each in trained]
    boundary, low, high = trained[0].boundary, 0.0, 1.0
    if boundary is not None and len(trained) == 1:
        low, high = (0.0, boundary) if trained[0].subfolder == ddit.COMPONENTS[1] else (boundary, 1.0)
    return FlowStudent(bases[0], data, (low, high), *bases[1:], boundary=boundary)


def _start_base(
    recipe: Recipe, backbone: Backbone, data: PromptFolder, config: ddit.DDiTConfig, tensors: dict[str, torch.Tensor],
    name: str,
) -> Any:  # fmt: skip
    options: dict[str, Any] = {"torch_dtype": stored_dtype(recipe, backbone), "revision": backbone.revision}
    try:
        model: Any = getattr(diffusers, backbone.base_class)
        base = model.from_pretrained(recipe.teacher, subfolder=backbone.subfolder or None, **options)
    except Exception as error:
        told = hub.explain(recipe.teacher, recipe.revision, error)
        if told is None and not isinstance(error, OSError | ValueError | RuntimeError):
            raise
        raise told or UpcycleError(f"teacher {recipe.teacher} does not load: {' '.join(str(error).split())}") from error
    try:
        ddit.attach(base, config, tensors)
    except ValueError as error:
        raise UpcycleError(f"{name}: {error}; choose the teacher that it was made from") from error
    for key, parameter in base.adapter_parameters().items():
        parameter.data = tensors[key].float().clone()  # attach rounds to the base's dtype
    if not config.variance and config.residual:
        rows = [i * len(data) // VARIANCE_SAMPLES for i in range(VARIANCE_SAMPLES)]
        config.variance = measured_variance(base, [data.row(i) for i in dict.fromkeys(rows)])
    return base


class FlowStudent(PatchStudent):
    """`PatchStudent` of a model that reads text; a label is the number of a prompt.

    Args:
        base: with its adapter.
        ends: the noise levels that timesteps cover.
        second: the transformer that takes over below ``boundary``, if both train. Its parameters are called
            ``transformer_2/...``.
    """

    def __init__(
        self, base: Any, data: PromptFolder, ends: tuple[float, float] = (0.0, 1.0), second: Any = None,
        *, boundary: float | None = None,
    ):  # fmt: skip
        super().__init__(base)
        self.data, self.ends, self.boundary = data, ends, boundary
        if second is not None:
            self.bases.append(second)
            for name, parameter in second.adapter_parameters().items():
                self.adapter[f"{SECOND}/{name.replace('.', '/')}"] = parameter
        # Of the embedding: some parameters stay in fp32 in a model in bf16, and the adapter does.
        self.dtype = base.get_submodule(base.switching_layers(base.config).embed.name).weight.dtype

    @contextmanager
    def reading(self, data: PromptFolder) -> Iterator[None]:
        """Labels are numbers of these prompts inside the block."""
        before, self.data = self.data, data
        try:
            yield
        finally:
            self.data = before

    @staticmethod
    def describe(base: Any) -> SimpleNamespace:
        """``num_classes`` is set by `use_empty_prompt`: the label that dropout gives."""
        noise = base.ddit
        return SimpleNamespace(
            num_train_timesteps=noise.num_train_timesteps, num_classes=None, patches=tuple(noise.patches)
        )

    def use_empty_prompt(self) -> bool:
        """Let label_dropout give the empty prompt; returns whether the data has it."""
        self.config.num_classes = self.data.empty
        return self.data.empty is not None

    def sigma(self, timestep: torch.Tensor) -> torch.Tensor:
        """Noise levels fp32 [B] of integer timesteps: the middles of equal parts of what they cover."""
        low, high = self.ends
        return low + (high - low) * (timestep.float() + 0.5) / self.config.num_train_timesteps

    def alpha_bar(self, timestep: torch.Tensor) -> torch.Tensor:
        return (1 - self.sigma(timestep)) ** 2

    def level_weight(self, timestep: torch.Tensor) -> torch.Tensor:
        """1: an error of the velocity moves the latents alike at every noise level."""
        return torch.ones_like(timestep, dtype=torch.float32)

    def mix(self, x0: torch.Tensor, noise: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        sigma = self.sigma(timestep).view(-1, *[1] * (x0.ndim - 1))
        return (1 - sigma) * x0 + sigma * noise

    def target(self, x: torch.Tensor, timestep: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """In the base's own arithmetic: one in bf16 is not one under autocast, whose norms are in fp32."""
        kind = x.device.type
        with torch.autocast(kind, enabled=torch.is_autocast_enabled(kind) and self.dtype == torch.float32):
            return super().target(x, timestep, label)

    def predict(self, x: torch.Tensor, timestep: torch.Tensor, label: torch.Tensor, m: int) -> Any:
        texts = [
            {name: value.to(x.device, self.dtype) for name, value in self.data.embeddings(number).items()}
            for number in label.tolist()
        ]
        x, sigma = x.to(self.dtype), self.sigma(timestep)
        if len(self.bases) == 1:
            return Transformer2DModelOutput(sample=self._call(self.base, x, sigma, texts, m))
        early = sigma >= self.boundary
        parts, order = [], []
        for base, mask in zip(self.bases, (early, ~early), strict=True):
            rows = mask.nonzero().flatten().tolist()
            if rows:
                parts.append(self._call(base, x[rows], sigma[rows], [texts[row] for row in rows], m))
                order += rows
        back = torch.tensor(order, device=x.device).argsort()
        return Transformer2DModelOutput(sample=torch.cat(parts)[back])

    def _call(
        self, base: Any, x: torch.Tensor, sigma: torch.Tensor, texts: list[dict[str, torch.Tensor]], m: int
    ) -> torch.Tensor:
        given = inputs(base, x, sigma, texts, self.data.guidance_scale)
        with base.at(m):
            out = base(**given, return_dict=False)[0]
        return torch.stack(out) if isinstance(out, list) else out

    def adapters(self, tensors: dict[str, torch.Tensor]) -> list[Adapter]:
        second = {name: value for name, value in tensors.items() if name.startswith(f"{SECOND}.")}
        first = {name: value for name, value in tensors.items() if name not in second}
        parts = [first, {name.removeprefix(f"{SECOND}."): value for name, value in second.items()}]
        return [(base.ddit, part) for base, part in zip(self.bases, parts, strict=False)]


@torch.no_grad()
def distance(
    model: torch.nn.Module,
    student: FlowStudent,
    x0: torch.Tensor,
    labels: torch.Tensor,
    *,
    batch: int,
    seed: int = 0,
    rank: int = 0,
    ranks: int = 1,
) -> Validation:
    """How far the size ``student.m`` is from the base: the relative root mean square error of a sample, by noise level.

    Args:
        model: the student as accelerate prepared it.
        x0: [n, ...] on the CPU; labels: int64 [n].
        batch: samples at a time; rank, ranks: as in `upcycle.evaluation.validation.validate`.
    """
    device = next(student.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(rank, -(-len(x0) // ranks) * ranks, ranks)
    share = (rows < len(x0)) * (ranks / len(x0))  # the last ranks may have one less, and measure another in its place
    rows = rows.clamp(max=len(x0) - 1)
    loss = {}
    for t in TIMESTEPS:
        noise = torch.randn(x0.shape, generator=generator)
        far = torch.zeros((), device=device)
        for some, weight in zip(rows.split(batch), share.to(device).split(batch), strict=True):
            timestep = torch.full((len(some),), t * student.config.num_train_timesteps // 1000, device=device)
            label = labels[some].to(device)
            x = student.mix(x0[some].to(device), noise[some].to(device), timestep)
            expected = student.target(x, timestep, label).float()
            error = model(x, timestep, label).sample.float() - expected
            far += weight @ (error.square().flatten(1).mean(1) / expected.square().flatten(1).mean(1)).sqrt()
        loss[t] = far.item()
    return Validation(loss, dict.fromkeys(TIMESTEPS, math.nan))


def inputs(
    model: Any, x: torch.Tensor, sigma: torch.Tensor, texts: list[dict[str, torch.Tensor]], guidance: float
) -> dict[str, Any]:
    """Arguments of a stock transformer as its pipeline gives them.

    Args:
        x: noisy latents [B, C, H, W], of Wan [B, C, F, H, W]; ``sigma``: their noise levels, fp32 [B].
        texts: embeddings of each sample (`upcycle.latents.prompts.NAMES`).
        guidance: what a model with guidance embeddings (FLUX.1-dev) is told.
    """
    if isinstance(model, diffusers.ZImageTransformer2DModel):
        return {"x": list(x[:, :, None]), "t": 1 - sigma, "cap_feats": [text["cap_feats"] for text in texts]}
    given: dict[str, Any] = {name: torch.stack([text[name] for text in texts]) for name in texts[0]}
    if isinstance(model, diffusers.WanTransformer3DModel):
        return {"hidden_states": x, "timestep": sigma * 1000, **given}
    batch, channels, height, width = x.shape
    pipeline = diffusers.FluxPipeline
    tokens = given["encoder_hidden_states"].shape[1]
    return {
        "hidden_states": pipeline._pack_latents(x, batch, channels, height, width),
        "timestep": sigma,
        "guidance": torch.full_like(sigma, guidance) if model.config.guidance_embeds else None,
        "img_ids": pipeline._prepare_latent_image_ids(batch, height // 2, width // 2, x.device, x.dtype),
        "txt_ids": torch.zeros(tokens, 3, device=x.device, dtype=x.dtype),
        **given,
    }
