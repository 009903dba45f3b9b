"""A training recipe: every option of `upcycle finetune`, strict. The YAML is this."""

import difflib
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from upcycle.errors import UpcycleError

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Text = Annotated[str, Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_bool(cls, value: Any, info: ValidationInfo) -> Any:
        """pydantic takes true for the number 1."""
        items = value if isinstance(value, list) else [value]
        boolean = info.field_name is not None and cls.model_fields[info.field_name].annotation is bool
        if not boolean and any(isinstance(item, bool) for item in items):
            raise ValueError("true and false (also yes, no, on, off without quotes) do not fit here")
        return value


class Convert(_Strict):
    """How the student starts; the options of `upcycle convert`."""

    ratio: Annotated[float, Field(gt=1)] | None = None
    init: Literal["exact", "paper"] = "exact"
    scaffold: Literal["lean", "paper"] | None = None
    router: Literal["predictability", "cosine", "random", "grid"] = "predictability"
    time_embedding: Literal["diffusers", "meta"] | None = None
    dydit: BelowOne = 0.0


class DDiT(_Strict):
    """How the adapter of method ``ddit`` starts; the options of `upcycle convert --method ddit`."""

    patches: Annotated[list[Annotated[int, Field(ge=2, le=16)]], Field(min_length=1)] = [2, 4]
    rank: Annotated[int, Field(ge=0, le=4096)] = 32
    residual: bool = True

    @field_validator("patches")
    @classmethod
    def _ascending(cls, value: list[int]) -> list[int]:
        if sorted(set(value)) != value:
            raise ValueError("must ascend, such as [2, 4]")
        return value


class Losses(_Strict):
    """Weights of the losses of a stage; 0 leaves one out.

    ``diffusion``: MSE to the noise. ``variational``: the bound that trains a learned sigma, in bits per dimension as
    Meta adds it; models without a learned sigma have none. ``distill``: MSE to the teacher's output, learned sigma
    included. ``blocks``: MSE to the outputs of the teacher's blocks (DC-DiT's upcycling). ``ratio``: the published
    ratio loss over groups of ``ratio_group`` samples, which must divide what a rank sees at once (less is one group).
    ``flops``: what the blocks' gates leave of their FLOPs over the same groups, against the target; students without
    DyDiT have none.
    ``router``: BCE of the boundary score against the teacher's local detail; decays linearly to a third of its weight
    over the stage. ``min_snr``: gamma of the min-SNR weight min(snr, gamma) / snr on the noise in
    ``diffusion`` and ``distill``. ``balanced``: the weight sqrt(1 + 2 / snr) there instead, so that noisy steps count
    more, whose errors are small (docs/log.md, "noisy steps").
    """

    diffusion: NonNegative = 1.0
    variational: NonNegative = 1.0
    distill: NonNegative = 1.0
    blocks: NonNegative = 0.0
    ratio: NonNegative = 0.03
    ratio_group: Annotated[int, Field(ge=1)] = 16
    router: NonNegative = 0.5
    flops: NonNegative = 1.0
    min_snr: Positive | None = None
    balanced: bool = False

    @model_validator(mode="after")
    def _used(self) -> "Losses":
        if not any((self.diffusion, self.variational, self.distill, self.blocks, self.ratio, self.router)):
            raise ValueError("every loss has weight 0, so nothing would train")
        if self.min_snr is not None and not (self.diffusion or self.distill):
            raise ValueError("min_snr weighs diffusion and distill, which are both 0; leave it out")
        if self.balanced and not (self.diffusion or self.distill):
            raise ValueError("balanced weighs diffusion and distill, which are both 0; leave it out")
        if self.balanced and self.min_snr is not None:
            raise ValueError("min_snr and balanced are two weights of the same losses; leave out one of them")
        return self


class Anneal(_Strict):
    """From the teacher's grid to the learned router: the guide k falls to 0 over the first ``until`` of the stage.

    With ``until: null`` it stays where it is. ``bias_rate`` is the step of the controller that holds the ratio.
    """

    until: Fraction | None = 0.4
    bias_rate: Fraction = 0.1


class TailDrop(_Strict):
    """Multi-budget training: from ``start`` (a share of the stage) on, each step draws one fraction for the batch."""

    values: list[BelowOne] = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    start: Fraction = 0.4


class Stage(_Strict):
    """A part of a run with losses, learning rate and frozen parts of its own.

    ``lr`` rises linearly over ``warmup`` steps, then stays or follows a cosine to 0 at the stage's end.
    ``teacher_guidance``: scale of the classifier-free guidance in the teacher's output that ``distill`` follows; 1 is
    none.
    """

    name: Text
    steps: Annotated[int, Field(ge=1)]
    lr: Positive = 1e-4
    warmup: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "cosine"] = "constant"
    freeze: list[Literal["embedders", "blocks", "head"]] = ["embedders"]
    losses: Losses = Losses()
    anneal: Anneal = Anneal()
    tail_drop: TailDrop = TailDrop()
    teacher_guidance: Annotated[float, Field(ge=1)] = 1.0

    @model_validator(mode="after")
    def _used(self) -> "Stage":
        if self.teacher_guidance > 1 and not self.losses.distill:
            raise ValueError("teacher_guidance is for the loss distill, whose weight is 0; leave it out")
        return self


class Optimizer(_Strict):
    """AdamW. The learning rate of the router's parameters is ``router_lr_scale`` times a stage's ``lr``, that of the
    parameters that come from the teacher ``teacher_lr_scale`` times.
    """

    weight_decay: NonNegative = 0.0
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    clip: Positive = 1.0
    router_lr_scale: Positive = 10.0
    teacher_lr_scale: Positive = 1.0


class Validation(_Strict):
    """Validation loss of student and teacher on held-out ``data``, every so many steps, by noise level.

    ``samples``: how many of them (spread evenly over the data), all by default. ``patience``: stop after so many
    validations without a better one.
    """

    data: Text
    every: Annotated[int, Field(ge=1)] = 1000
    samples: Annotated[int, Field(ge=1)] | None = None
    patience: Annotated[int, Field(ge=1)] | None = None


class Preview(_Strict):
    """A sample grid and router maps from fixed seeds, every so many steps; one sample for each of ``labels``."""

    every: Annotated[int, Field(ge=1)] = 1000
    labels: list[Annotated[int, Field(ge=0)]] = [0, 1, 2, 3, 4, 5, 6, 7]
    steps: Annotated[int, Field(ge=1)] = 50
    guidance_scale: Annotated[float, Field(ge=1)] = 2.0
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


class Recipe(_Strict):
    """One training run. Paths are relative to where the command runs.

    ``teacher``: any source that `upcycle convert` takes, or ``digits`` for the shipped one; ``revision``, ``weights``
    and ``heads`` say how to open it, and ``vae`` adds one to a bare checkpoint. ``student``: an export to start from, a
    folder or a Hub id (at ``student_revision``); without it the teacher is converted first, with ``convert``.
    ``data``: ``digits``, or a folder that `upcycle encode` or `upcycle synthesize` wrote, or one of ``*.safetensors``
    shards with ``z0`` [N, C, H, W] and ``label`` [N].

    ``method``: ``dc-dit`` trains dynamic chunking; ``ddit`` an adapter for coarser patches, which starts as ``ddit``
    says, has its own base for a teacher, of the losses ``distill`` alone, and trains one size in each step.
    ``component``: of a pipeline with two transformers (Wan 2.2) the one to train, over its own noise levels; without it
    both are in memory and train.

    ``batch_size`` is the whole batch of an update, over all ranks and ``gradient_accumulation`` parts.
    ``teacher_precision``: of the teacher's weights and arithmetic; by default the one of ``mixed_precision``.
    ``max_skipped``: stop after so many steps in a row whose loss or gradient is not finite. ``export``: which weights
    the run ends with, the last (averaged) ones or those of the best validation.
    """

    method: Literal["dc-dit", "ddit"] = "dc-dit"
    teacher: Text
    revision: Text | None = None
    weights: Literal["ema", "model"] = "ema"
    heads: Annotated[int, Field(ge=1)] | None = None
    vae: Text | None = None
    student: Text | None = None
    student_revision: Text | None = None
    convert: Convert = Convert()
    ddit: DDiT = DDiT()
    component: Literal["transformer", "transformer_2"] | None = None
    data: Text
    data_workers: Annotated[int, Field(ge=0)] = 2
    validation: Validation | None = None
    out: Text
    stages: Annotated[list[Stage], Field(min_length=1)]
    batch_size: Annotated[int, Field(ge=1)] = 256
    gradient_accumulation: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    label_dropout: Fraction = 0.1
    optimizer: Optimizer = Optimizer()
    ema: BelowOne = 0.9999
    mixed_precision: Literal["no", "bf16"] = "no"
    teacher_precision: Literal["no", "bf16", "fp16"] | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    max_skipped: Annotated[int, Field(ge=1)] = 10
    log_every: Annotated[int, Field(ge=1)] = 10
    save_every: Annotated[int, Field(ge=1)] = 1000
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = []
    preview: Preview | None = None
    export: Literal["last", "best"] = "last"

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    @model_validator(mode="before")
    @classmethod
    def _bare_no(cls, content: Any) -> Any:
        """YAML reads a bare no as false."""
        if not isinstance(content, dict):
            return content
        precisions = ("mixed_precision", "teacher_precision")
        return {key: "no" if key in precisions and value is False else value for key, value in content.items()}

    @model_validator(mode="after")
    def _consistent(self) -> "Recipe":
        if self.student is not None and self.convert != Convert():
            raise ValueError("student: start from an export, or convert the teacher, not both; leave out one of them")
        if self.student is not None and self.vae is not None:
            raise ValueError("vae: the student keeps its own; leave out 'vae' or 'student'")
        frozen = [stage.name for stage in self.stages if "head" in stage.freeze]
        if frozen and self.student is None and "paper" in (self.convert.init, self.convert.scaffold):
            raise ValueError(f"stages.{frozen[0]}.freeze: the paper scaffold's head is fresh; leave 'head' out")
        if self.student is None and self.student_revision is not None:
            raise ValueError("student_revision: there is no student whose revision it could be; leave it out")
        self._check_method()
        names = [stage.name for stage in self.stages]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"stages: the name {min(twice)} is given twice; every stage needs one of its own")
        if self.export == "best" and self.validation is None:
            raise ValueError("export: best needs 'validation' to judge by; add it, or export the last weights")
        return self

    def _check_method(self) -> None:
        if self.method == "dc-dit":
            if self.ddit != DDiT():
                raise ValueError("ddit: is for method: ddit; add that, or leave it out")
            if self.component is not None:
                raise ValueError("component: is for method: ddit; add that, or leave it out")
            return
        wrong = [name for name in ("convert", "preview", "teacher_precision", "vae", "heads", "compile")
                 if getattr(self, name) != type(self).model_fields[name].default]  # fmt: skip
        if wrong:
            raise ValueError(f"{wrong[0]}: does not go with method: ddit; leave it out")
        if self.student is not None and self.ddit != DDiT():
            raise ValueError("student: start from an adapter, or make one with ddit, not both; leave out one of them")
        for stage in self.stages:
            for key in {"freeze", "anneal", "tail_drop", "teacher_guidance"} & stage.model_fields_set:
                raise ValueError(f"stages.{stage.name}.{key}: does not go with method: ddit; leave it out")
            if stage.losses.model_fields_set - {"distill"} or not stage.losses.distill:
                raise ValueError(f"stages.{stage.name}.losses: method ddit has the loss distill alone")


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice; PyYAML takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(problem=f"the key '{key.value}' is given twice")
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _parse_yaml(text: str, name: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError) as error:
        raise UpcycleError(f"{name} is not YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise UpcycleError(f"{name} is not YAML of a recipe: it is nested too deeply") from None


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a YAML recipe; ``overrides`` are of the form "optimizer.clip=0.5" or "stages.align.lr=0.001".

    Raises:
        UpcycleError: one line with every mistake in it; unknown keys come with the nearest right name.
    """
    try:
        text = path.read_text()
    except FileNotFoundError:
        raise UpcycleError(f"recipe {path} does not exist; recipes/ holds examples") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UpcycleError(f"recipe {path} cannot be read: {error}") from error
    content = _parse_yaml(text, f"recipe {path}")
    if not isinstance(content, dict):
        raise UpcycleError(f"recipe {path} must be a mapping of options such as 'batch_size: 256'")
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UpcycleError(f"--set {override} is not of the form key=value, such as optimizer.clip=0.5")
        _override(content, override, key.split("."), _parse_yaml(value, f"--set {override}"))
    return parse_recipe(content, str(path))


def _override(content: Any, override: str, path: list[str], value: Any) -> None:
    """Set what ``path`` names; a stage is named by its name or its number."""
    target = content
    for key in path[:-1]:
        if isinstance(target, list):
            stages = {str(item.get("name")): item for item in target if isinstance(item, dict)}
            found = stages.get(key) or dict(enumerate(target)).get(int(key) if key.isdecimal() else -1)
            if found is None:
                raise UpcycleError(f"--set {override}: there is no stage {key}; there are {', '.join(stages)}")
            target = found
        elif isinstance(target, dict):
            target = target.setdefault(key, {})
    if not isinstance(target, dict):
        raise UpcycleError(f"--set {override}: {path[-2]} is not a group of options")
    target[path[-1]] = value


def parse_recipe(content: dict[str, Any], name: str) -> Recipe:
    """Check the options of a recipe; raises `UpcycleError` with every mistake in one line."""
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        mistakes = [_describe(e) for e in error.errors()]
        raise UpcycleError(f"recipe {name}: " + "; ".join(mistakes)) from error


def _describe(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        *group, key = error["loc"]
        near = difflib.get_close_matches(str(key), _keys(group), n=1, cutoff=0.5)
        hint = f", did you mean '{near[0]}'?" if near else ""
        if key in Stage.model_fields and "stages" not in group:
            hint = f", it belongs to a stage: stages: [{{name: post-train, {key}: ...}}]"
        return f"unknown key '{where}'{hint}"
    if error["type"] == "missing":
        return f"'{where}' is missing"
    message = error["msg"].removeprefix("Value error, ")
    return f"'{where}' is {error['input']!r}: {message}" if where else message


def _keys(path: Sequence[Any]) -> list[str]:
    """Keys of the group of options at ``path``."""
    model: Any = Recipe
    for part in path:
        if isinstance(part, str):  # a number is the place in a list
            model = _group(model.model_fields[part].annotation)
    return list(model.model_fields) if model else []


def _group(annotation: Any) -> type[BaseModel] | None:
    """The group of options inside an annotation such as ``Validation | None`` or ``list[Stage]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _group(inner))), None)
