"""What a conversion will make, decided before anything is written: the student's config, its tensors, their cost."""

import math
import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from upcycle.errors import UpcycleError
from upcycle.evaluation.flops import (
    PAPER_STEPS,
    dit_flops,
    least_gate_share,
    student_flops_by_tail_drop,
    tokens_at_ratio,
)
from upcycle.graft import exact, paper
from upcycle.graft.dcdit_names import from_authors
from upcycle.graft.embedders import merge_embedders
from upcycle.graft.pieces import FreshTensor, ReusedTensor
from upcycle.graft.writer import Piece, nbytes
from upcycle.models.chunked_dit import ChunkedDiT, DyDiTRouters
from upcycle.sources import DCDiTConfig, DiTConfig, Source, StudentConfig
from upcycle.sources.weight_files import read_json

INITS = ("exact", "paper")
SCAFFOLDS = ("lean", "paper")
ROUTERS = ("predictability", "cosine", "random", "grid")
TIME_EMBEDDINGS = ("diffusers", "meta")


@dataclass(frozen=True)
class Options:
    """Choices of a conversion, named as on the command line; None means the default that the source implies."""

    ratio: float | None = None
    init: str = "exact"
    scaffold: str | None = None
    router: str = "predictability"
    time_embedding: str | None = None
    dydit: float = 0.0
    seed: int = 0


@dataclass
class Plan:
    """A conversion, ready to be carried out by `upcycle.graft.convert`."""

    source: Source
    options: Options
    config: dict[str, Any]
    pieces: dict[str, Piece]
    reused: list[str]
    exact: bool
    notes: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> dict[str, int]:
        count = {name: math.prod(piece.shape) for name, piece in self.pieces.items()}
        reused = sum(count[name] for name in self.reused)
        return {"reused": reused, "fresh": sum(count.values()) - reused}

    @property
    def bytes(self) -> int:
        components = (f for folder in self.source.components.values() for f in folder.rglob("*") if f.is_file())
        return sum(map(nbytes, self.pieces.values())) + sum(f.stat().st_size for f in components)

    @property
    def peak_memory(self) -> int:
        """Estimated peak resident bytes of writing: this process now, and the largest tensor, if it is read whole."""
        now = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return now + max(map(nbytes, self.pieces.values()))

    @property
    def flops_per_image(self) -> dict[str, Any]:
        """FLOPs per image over 250 unguided steps: the teacher's (None if there is none), the student's by rho."""
        config = self.source.config
        teacher = PAPER_STEPS * dit_flops(vars(config)) if isinstance(config, DiTConfig) else None
        return {"teacher": teacher, "student": student_flops_by_tail_drop(self.config)}


def full_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A `ChunkedDiT` config with every default filled in."""
    with torch.device("meta"):
        model = ChunkedDiT(**{**config, "num_layers": 0})
    registered = {k: v for k, v in model.config.items() if not k.startswith("_")}
    return {**registered, "num_layers": config["num_layers"]}


def make_plan(source: Source, options: Options) -> Plan:
    """Decide everything about a conversion; raises `UpcycleError` for a choice that cannot be made."""
    for name, value, allowed in (
        ("--init", options.init, INITS),
        ("--scaffold", options.scaffold, (None, *SCAFFOLDS)),
        ("--router", options.router, ROUTERS),
        ("--time-embedding", options.time_embedding, (None, *TIME_EMBEDDINGS)),
    ):
        if value not in allowed:
            raise UpcycleError(f"{name} {value} is unknown; choose one of {', '.join(a for a in allowed if a)}")
    plan = _make_plan(source, options)
    return _with_gates(plan, options) if options.dydit else plan


def _make_plan(source: Source, options: Options) -> Plan:
    """The conversion without DyDiT's gates."""
    own = replace(options, dydit=0.0, seed=0)
    if isinstance(source.config, DCDiTConfig | StudentConfig) and own != Options():
        kind = "a converted model" if source.kind == "student" else "a DC-DiT"
        raise UpcycleError(
            f"{source.spec} is {kind} already and is exported as it is; leave out --ratio, --init, --scaffold, "
            "--router and --time-embedding"
        )
    if isinstance(source.config, StudentConfig):
        pieces = {name: ReusedTensor(name, tensor) for name, tensor in source.tensors.items()}
        config = full_config(source.config.values)
        return Plan(source, options, config, dict(pieces), reused=list(pieces), exact=False, notes=list(source.notes))
    if isinstance(source.config, DCDiTConfig):
        return _plan_authors(source, source.config, options)
    return _plan_graft(source, source.config, options)


def _with_gates(plan: Plan, options: Options) -> Plan:
    """The conversion with DyDiT's gates in the blocks, all of them open."""
    config, wish = plan.config, f"--dydit {options.dydit:g}"
    heads, layers = config["num_attention_heads"], config["num_layers"]
    if config["dydit"]:
        raise UpcycleError(f"{plan.source.spec} has DyDiT's gates already, for {config['dydit']:g}; leave out --dydit")
    if not 0 < options.dydit < 1:
        raise UpcycleError(f"{wish} is no share of the blocks' FLOPs between 0 and 1; 0.7 and 0.5 are usual")
    if heads < 2:
        raise UpcycleError(f"{wish} needs two attention heads or more, and {plan.source.spec} has {heads}")
    least = least_gate_share(config, tokens_at_ratio(config))
    if options.dydit <= least:
        raise UpcycleError(f"{wish} cannot be reached: a block with all that may be off costs {least:.0%} still")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        routers = DyDiTRouters(heads * config["attention_head_dim"], heads, layers)
    pieces = {f"dydit_routers.{name}": FreshTensor(tensor) for name, tensor in routers.state_dict().items()}
    return replace(
        plan,
        config={**config, "dydit": options.dydit},
        pieces={**plan.pieces, **pieces},
        notes=[
            *plan.notes,
            f"DyDiT's gates are all open until they are trained: the blocks cost all of their FLOPs, and "
            f"{options.dydit:.0%} of them afterwards, which is what FLOPs per image are counted with",
        ],
    )


def _ratio(options: Options, teacher: DiTConfig) -> float:
    positions = teacher.sample_size**2
    ratio = float(teacher.patch_size**2) if options.ratio is None else options.ratio
    if not math.isfinite(ratio) or ratio <= 1:
        raise UpcycleError(f"--ratio {ratio:g} keeps every token or more; it must be greater than 1 (4 is usual)")
    if ratio > positions:
        raise UpcycleError(
            f"--ratio {ratio:g} is larger than the grid of {teacher.sample_size}x{teacher.sample_size} = "
            f"{positions} positions; choose a smaller one"
        )
    if options.router == "grid" and round(ratio**0.5) ** 2 != ratio:
        raise UpcycleError(f"--router grid needs a square --ratio (4, 9, 16 ...), got {ratio:g}")
    return ratio


def _plan_graft(source: Source, teacher: DiTConfig, options: Options) -> Plan:
    scaffold = options.scaffold or ("lean" if options.init == "exact" else "paper")
    if (options.init, scaffold) not in (("exact", "lean"), ("paper", "paper")):
        raise UpcycleError(
            f"--init {options.init} does not go with --scaffold {scaffold}: the exact start needs the lean scaffold, "
            "the paper's start the paper's"
        )
    if scaffold == "paper" and options.router == "grid":
        raise UpcycleError("--router grid does not go with --scaffold paper; choose predictability, cosine or random")
    ratio = _ratio(options, teacher)
    tensors, num_embedders = merge_embedders(source.tensors)
    lean = scaffold == "lean"
    if not lean:
        tensors = {n: t for n, t in tensors.items() if n.startswith(("embedders.", "transformer_blocks."))}
    time_embedding = options.time_embedding or teacher.time_embedding
    norm_eps = teacher.norm_eps
    if time_embedding != teacher.time_embedding:
        norm_eps = 1e-6 if time_embedding == "meta" else 1e-5
    config = full_config(
        {
            "num_attention_heads": teacher.num_attention_heads,
            "attention_head_dim": teacher.attention_head_dim,
            "in_channels": teacher.in_channels,
            "out_channels": teacher.out_channels,
            "num_layers": teacher.num_layers,
            "sample_size": teacher.sample_size,
            "num_classes": teacher.num_classes,
            "patch_size": teacher.patch_size if lean else 1,
            "norm_eps": norm_eps,
            "time_embedding": time_embedding,
            "num_embedders": num_embedders,
            "scaffold": scaffold,
            "ratio": ratio,
            "router": options.router,
            "smoothing_sigma": max(1.0, teacher.sample_size / 32),
            "condition_adaptor": not lean,
            **_schedule(source),
            "sample_range": _sample_range(source),
        }
    )
    reused = {name: ReusedTensor(name, tensor) for name, tensor in tensors.items()}
    fresh = _fresh(config, exact.initialise if lean else paper.initialise, options.seed, next(iter(reused.values())))
    notes = list(source.notes)
    if num_embedders > 1:
        notes.append(f"the blocks' embedders differ: {num_embedders} copies are kept instead of one")
    patches = (teacher.sample_size // teacher.patch_size) ** 2
    if not lean:
        notes.append("the published start is untrained: it predicts 0 and reaches its ratio by training")
    same_grid = lean and round(teacher.sample_size**2 / ratio) == patches
    if same_grid and options.router != "random":
        notes.append(
            f"ratio {ratio:g} keeps as many tokens as the teacher's patches: savings come from tail dropping "
            "(upcycle sample --tail-drop) or a higher ratio"
        )
    return Plan(
        source=source,
        options=options,
        config=config,
        pieces={**reused, **{name: piece for name, piece in fresh.items() if name not in reused}},
        reused=list(reused),
        exact=same_grid and options.router != "random" and time_embedding == teacher.time_embedding,
        notes=notes,
    )


def _plan_authors(source: Source, theirs: DCDiTConfig, options: Options) -> Plan:
    config = full_config(
        {
            "num_attention_heads": theirs.heads,
            "attention_head_dim": theirs.d_model // theirs.heads,
            "in_channels": theirs.in_channels,
            "out_channels": theirs.out_channels,
            "num_layers": theirs.layers,
            "sample_size": theirs.sample_size,
            "num_classes": theirs.num_classes,
            "patch_size": 1,
            "norm_eps": 1e-6,
            "time_embedding": "meta",
            "scaffold": "paper",
            "scaffold_width": theirs.enc_dec_dim,
            "encoder_layers": theirs.encoder_layers,
            "decoder_layers": theirs.decoder_layers,
            "smoothing_sigma": theirs.sigma,
            "ratio": theirs.ratio,
        }
    )
    pieces: dict[str, Piece] = {
        name: ReusedTensor(name, tensor) for name, tensor in from_authors(source.tensors).items()
    }
    return Plan(source, options, config, pieces, reused=list(pieces), exact=False, notes=list(source.notes))


def _fresh(config: dict[str, Any], initialise, seed: int, like: Piece) -> dict[str, Piece]:
    """The scaffold's own tensors, made from ``seed`` without the blocks, in the precision of the source."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ChunkedDiT(**{**config, "num_layers": 0, "num_embedders": 0})
        initialise(model)
    keep = tuple(ChunkedDiT._keep_in_fp32_modules)
    return {
        name: FreshTensor(tensor if name.startswith(keep) else tensor.to(like.dtype))
        for name, tensor in model.state_dict().items()
    }


def _component_config(source: Source, component: str, file: str) -> dict[str, Any]:
    folder = source.components.get(component)
    return read_json(source.spec, folder / file) if folder and (folder / file).is_file() else {}


def _schedule(source: Source) -> dict[str, Any]:
    """The noise schedule of the teacher's scheduler; DiT's own where the source has none."""
    theirs = _component_config(source, "scheduler", "scheduler_config.json")
    if theirs.get("prediction_type", "epsilon") != "epsilon":
        raise UpcycleError(
            f"{source.spec} predicts {theirs['prediction_type']}; only epsilon prediction can be converted so far"
        )
    if theirs.get("beta_schedule", "linear") not in ("linear", "scaled_linear") or theirs.get("trained_betas"):
        raise UpcycleError(
            f"{source.spec} has the noise schedule {theirs.get('beta_schedule')}; "
            "only linear and scaled_linear can be converted"
        )
    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule")
    return {key: theirs[key] for key in keys if key in theirs}


def _sample_range(source: Source) -> float:
    """Clamp of x0 estimates: pixels are in [-1, 1], scaled VAE latents within about 5 standard deviations."""
    vae = _component_config(source, "vae", "config.json")
    return 1.0 if vae and vae.get("_class_name") == "IdentityVAE" else 5.0
