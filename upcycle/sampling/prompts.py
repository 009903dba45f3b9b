"""Pipelines that take text (FLUX.1, Wan, Z-Image): found, loaded with their adapter, and drawn from.

They are the stock classes of diffusers, loaded by `DiffusionPipeline.from_pretrained` without code from the folder.
Shape legend: n samples, C latent channels, F x H x W latent grid; images and frames are in pixels.
"""

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from huggingface_hub import snapshot_download
from PIL import Image

from upcycle.errors import UpcycleError
from upcycle.graft.patches import adapter_folder
from upcycle.models import ddit
from upcycle.sampling.patches import put_on
from upcycle.sources import hub
from upcycle.sources.weight_files import read_json

INDEX = "model_index.json"
FRAME_MILLISECONDS = 60
"""Of an animated GIF, which counts in hundredths of a second: about the 16 frames a second of Wan."""
SHOWN_FRAMES = 6


@dataclass(frozen=True)
class Kind:
    """A pipeline class: ``video``, and the guidance that is ``none`` (0 where 1 still runs the model twice)."""

    name: str
    video: bool = False
    none: float = 1.0

    @property
    def defaults(self) -> dict[str, Any]:
        """What the stock pipeline takes for steps and guidance where nobody says."""
        parameters = inspect.signature(getattr(diffusers, self.name).__call__).parameters
        return {name: parameters[name].default for name in ("num_inference_steps", "guidance_scale")}


KINDS = {
    kind.name: kind for kind in (Kind("FluxPipeline"), Kind("WanPipeline", video=True), Kind("ZImagePipeline", none=0))
}
_TRANSFORMERS = {name for name in ddit.BACKBONES if name != "DiTTransformer2DModel"}


@dataclass(frozen=True)
class Found:
    """A pipeline with text: a folder or a Hub id at a commit, and the folder of the adapters that go onto it."""

    spec: str
    pipeline: str
    revision: str | None
    kind: Kind
    adapter: Path | None


def find(spec: str, revision: str | None = None, base: str | None = None, *, wanted: bool = False) -> Found | None:
    """What ``spec`` is (a pipeline folder, an adapter beside one or alone, or a Hub id); None where it takes no text.

    Only descriptions are read, and of an adapter its files. ``base``: the pipeline for an adapter alone, by default the
    one that it was made from. ``wanted``: to take no text is an error too.

    Raises:
        UpcycleError: a pipeline with text whose class is not known, or an adapter without a base.
    """
    folder, revision = _descriptions(spec, revision)
    if folder is None:
        return None
    adapter = adapter_folder(folder)
    if adapter == folder:
        config = read_json(spec, folder / ddit.CONFIG)
        if config.get("base_class") not in _TRANSFORMERS:
            return _none(spec, str(config.get("base_class")), wanted)
        where = base or config.get("base")
        if where is None:
            raise UpcycleError(f"{spec} is an adapter that does not say of which model; give that with --base")
        below = find(where, None if base else config.get("base_revision"), wanted=True)
        if below is None:
            raise UpcycleError(f"{spec} is an adapter for {where}, which is not there; give its base with --base")
        return Found(spec, below.pipeline, below.revision, below.kind, folder)
    if not (folder / INDEX).is_file():
        return _none(spec, "folder without a model_index.json", wanted)
    index = read_json(spec, folder / INDEX)
    name, parts = index.get("_class_name"), index.get("transformer")
    inner = parts[1] if isinstance(parts, list) and len(parts) == 2 else None
    if name not in KINDS:
        if inner in _TRANSFORMERS:
            raise UpcycleError(f"{spec} is a {name}, which is not known here; known with text are {', '.join(KINDS)}")
        return _none(spec, str(name), wanted)
    if base is not None:
        raise UpcycleError(f"--base {base} is for an adapter alone, and {spec} is none; leave it out")
    return Found(spec, spec, revision, KINDS[name], folder if adapter else None)


def _none(spec: str, what: str, wanted: bool) -> Found | None:
    if wanted:
        raise UpcycleError(f"{spec} is a {what}, which takes no text; known are {', '.join(KINDS)}")
    return None


def _descriptions(spec: str, revision: str | None) -> tuple[Path | None, str | None]:
    """The folder with what says which pipeline it is, and the commit; (None, None) where there is nothing."""
    folder = Path(spec).expanduser()
    if folder.exists() or not hub.is_hub_id(spec):
        return (folder if folder.is_dir() else None), None
    places = ["", *(f"{place}/" for place in ddit.PLACES)]
    names = [INDEX, *(f"{at}{name}" for at in places for name in (ddit.CONFIG, ddit.WEIGHTS))]
    with _hub(spec, revision):
        found = Path(snapshot_download(spec, revision=revision, allow_patterns=names))
    return found, found.name


class _hub:
    """Errors of the Hub as one line."""

    def __init__(self, spec: str, revision: str | None):
        self._asked = spec, revision

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, Exception) and (line := hub.explain(*self._asked, error)):
            raise line from error


def load_text_pipeline(found: Found, dtype: torch.dtype, *, adapter: bool = True, **schedule: Any) -> Any:
    """The stock pipeline in ``dtype``, on the CPU, with its adapters on (`ddit.switching`) unless not wanted.

    ``schedule``: as of `ddit.apply`.

    Raises:
        UpcycleError: transformers is missing, a component does not load, or an adapter does not fit.
    """
    if importlib.util.find_spec("transformers") is None:
        raise UpcycleError(f"{found.spec} reads text, which needs the package transformers; pip install transformers")
    diffusers.utils.logging.disable_progress_bar()
    importlib.import_module("transformers").utils.logging.disable_progress_bar()
    try:
        with _hub(found.pipeline, found.revision):
            pipe = diffusers.DiffusionPipeline.from_pretrained(
                found.pipeline, revision=found.revision, torch_dtype=dtype, trust_remote_code=False
            )
    except UpcycleError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError, KeyError, ImportError) as error:
        raise UpcycleError(f"{found.pipeline} does not load: {' '.join(str(error).split())[:300]}") from error
    pipe.set_progress_bar_config(disable=True)
    if adapter and found.adapter:
        put_on(pipe, found.adapter, found.spec, **schedule)
    return pipe


def default_dtype(device: str | None) -> torch.dtype:
    """bf16 on CUDA, and fp32 on a CPU, which is slow at less."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


@dataclass(frozen=True)
class Settings:
    """How to draw: ``steps``, ``guidance_scale``, sides in pixels and frames; None: what the pipeline takes itself."""

    steps: int
    guidance_scale: float
    height: int | None = None
    width: int | None = None
    frames: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """As a pipeline is called."""
        sides = {"height": self.height, "width": self.width, "num_frames": self.frames}
        given = {name: value for name, value in sides.items() if value is not None}
        return {"num_inference_steps": self.steps, "guidance_scale": self.guidance_scale, **given}


def settings(
    found: Found, steps: int | None, guidance_scale: float | None, height: int | None, width: int | None,
    frames: int | None,
) -> Settings:  # fmt: skip
    """What options mean for a pipeline; raises `UpcycleError` for --num-frames of one that draws images."""
    if frames is not None and not found.kind.video:
        raise UpcycleError(f"--num-frames is for videos, and {found.spec} draws images; leave it out")
    theirs = found.kind.defaults
    steps = theirs["num_inference_steps"] if steps is None else steps
    return Settings(
        steps, theirs["guidance_scale"] if guidance_scale is None else guidance_scale, height, width, frames
    )


def check_sides(pipe: Any, wish: Settings) -> None:
    """Raise `UpcycleError` for sides that pipelines would round, or refuse in words of their own."""
    if isinstance(pipe, diffusers.WanPipeline):
        unit = pipe.vae_scale_factor_spatial * pipe.transformer.config.patch_size[1]
        unit = max(unit, 16)  # all that the stock pipeline takes
        every = pipe.vae_scale_factor_temporal
        if wish.frames is not None and (wish.frames < 1 or (wish.frames - 1) % every):
            raise UpcycleError(f"--num-frames {wish.frames} must be 1 more than a multiple of {every}")
    else:
        unit = 2 * pipe.vae_scale_factor
    for name, side in (("--height", wish.height), ("--width", wish.width)):
        if side is not None and (side < unit or side % unit):
            raise UpcycleError(f"{name} {side} must be a multiple of {unit}")


def latent_shape(pipe: Any, wish: Settings) -> tuple[int, ...]:
    """Of one sample: (C, H, W), of videos (C, F, H, W)."""
    if isinstance(pipe, diffusers.WanPipeline):
        theirs = inspect.signature(type(pipe).__call__).parameters
        height, width = (_wish_or(theirs, wish.height, "height"), _wish_or(theirs, wish.width, "width"))
        frames = _wish_or(theirs, wish.frames, "num_frames")
        scale = pipe.vae_scale_factor_spatial
        whole = (frames - 1) // pipe.vae_scale_factor_temporal + 1
        return pipe.transformer.config.in_channels, whole, height // scale, width // scale
    flux = isinstance(pipe, diffusers.FluxPipeline)
    scale = pipe.vae_scale_factor
    default = pipe.default_sample_size * scale if flux else 1024
    height, width = (2 * ((side or default) // (2 * scale)) for side in (wish.height, wish.width))
    return pipe.transformer.config.in_channels // (4 if flux else 1), height, width


def _wish_or(parameters: Any, value: int | None, name: str) -> int:
    """The value, or the default of a parameter."""
    return parameters[name].default if value is None else value


def _call(
    pipe: Any, prompts: list[str], seeds: list[int], wish: Settings, on_step: Callable[[], None], **options: Any
) -> torch.Tensor:
    def stepped(_pipe: Any, _step: int, _time: Any, kept: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return kept

    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    given = {"prompt": list(prompts)} if "prompt_embeds" not in options else {}
    return pipe(
        **given, **options, **wish.options, generator=generators, return_dict=False, callback_on_step_end=stepped
    )[0]


def draw_pixels(
    pipe: Any, prompts: list[str], seeds: list[int], wish: Settings, on_step: Callable[[], None] = lambda: None
) -> torch.Tensor:
    """One sample for each (prompt, seed): fp32 in [0, 1] on the CPU, [n, 3, H, W], of videos [n, F, 3, H, W]."""
    return _call(pipe, prompts, seeds, wish, on_step, output_type="pt").float().cpu()


def draw_latents(
    pipe: Any,
    prompts: list[str],
    seeds: list[int],
    wish: Settings,
    on_step: Callable[[], None] = lambda: None,
    **embeddings: Any,
) -> torch.Tensor:
    """What would be decoded, in the transformer's scale: fp32 [n, C, H, W], of videos [n, C, F, H, W].

    ``embeddings``: of the texts, in place of ``prompts``.
    """
    out = _call(pipe, prompts, seeds, wish, on_step, output_type="latent", **embeddings)
    if isinstance(pipe, diffusers.FluxPipeline):
        _, height, width = latent_shape(pipe, wish)
        scale = pipe.vae_scale_factor
        out = pipe._unpack_latents(out, height * scale, width * scale, scale)
    return out.float()


def save_gif(frames: torch.Tensor, path: Path) -> None:
    """Write frames, fp32 in [0, 1], [F, 3, H, W], as an animated GIF without end."""
    array = (frames.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    first, *rest = (Image.fromarray(frame) for frame in array)
    first.save(path, save_all=True, append_images=rest, duration=FRAME_MILLISECONDS, loop=0)


def some_frames(videos: torch.Tensor) -> torch.Tensor:
    """Frames spread over each video, [n, F, 3, H, W] -> [n * k, 3, H, W] with k at most `SHOWN_FRAMES`."""
    count = videos.shape[1]
    shown = min(count, SHOWN_FRAMES)
    return videos[:, torch.linspace(0, count - 1, shown).round().long()].flatten(0, 1)
