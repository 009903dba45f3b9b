"""Training data of a model that reads text: its own samples of some prompts, and what its text encoders made of those.

The folder is one of latents (`upcycle.latents.folder`), whose ``label`` is the number of the prompt, with all texts'
embeddings once in ``prompts.safetensors``, named ``<number>/<what>``. Legend: T tokens, D width of the text.
"""

import hashlib
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from upcycle.errors import UpcycleError
from upcycle.graft.writer import write_safetensors
from upcycle.latents.folder import INDEX, LatentWriter, _appearing, read_index
from upcycle.latents.reader import LatentFolder
from upcycle.latents.synthesize import draw_shards
from upcycle.latents.vae import weights_hash
from upcycle.sampling.prompts import Found, Settings, draw_latents, latent_shape
from upcycle.sources.safetensors_file import read_safetensors
from upcycle.sources.tensors import LazyTensor
from upcycle.sources.vae import describe_vae

FILE = "prompts.safetensors"
AT_ONCE = 64
"""Prompts whose embeddings are in memory."""
NAMES = {
    "FluxTransformer2DModel": ("encoder_hidden_states", "pooled_projections"),  # [T, D], [D']
    "WanTransformer3DModel": ("encoder_hidden_states",),  # [T, D], zeros after the text
    "ZImageTransformer2DModel": ("cap_feats",),  # [T of this text, D]
}
"""Embeddings of one text by class of transformer, as its forward calls them."""


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; an empty line is the empty prompt. Raises `UpcycleError` where there is none."""
    try:
        texts = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UpcycleError(f"--prompts {path} cannot be read: {error}") from error
    if not any(texts):
        raise UpcycleError(f"--prompts {path} holds no prompt; write one a line")
    return texts


@torch.no_grad()
def embed(pipe: Any, text: str) -> dict[str, torch.Tensor]:
    """A text's embeddings in the transformer's dtype, on its device (`NAMES`)."""
    made: tuple[torch.Tensor, ...]
    if isinstance(pipe, diffusers.FluxPipeline):
        tokens, pooled, _ = pipe.encode_prompt(prompt=[text], prompt_2=None, device=pipe.device)
        made = (tokens[0], pooled[0])
    elif isinstance(pipe, diffusers.WanPipeline):
        made = (pipe.encode_prompt([text], do_classifier_free_guidance=False, max_sequence_length=512)[0][0],)
    else:
        made = (pipe.encode_prompt([text], do_classifier_free_guidance=False)[0][0],)
    names = NAMES[type(pipe.transformer).__name__]
    return {name: value.to(pipe.transformer.dtype) for name, value in zip(names, made, strict=True)}


def _as_arguments(pipe: Any, texts: list[dict[str, torch.Tensor]], empty: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Embeddings as the pipeline is called with them; ``empty``: those of no text, for guidance."""
    if isinstance(pipe, diffusers.FluxPipeline):
        tokens, pooled = (torch.stack([text[name] for text in texts]) for name in texts[0])
        return {"prompt_embeds": tokens, "pooled_prompt_embeds": pooled}
    if isinstance(pipe, diffusers.WanPipeline):
        tokens = torch.stack([text["encoder_hidden_states"] for text in texts])
        return {"prompt_embeds": tokens, "negative_prompt_embeds": torch.stack(list(empty.values()) * len(texts))}
    return {
        "prompt_embeds": [text["cap_feats"] for text in texts],
        "negative_prompt_embeds": list(empty.values()) * len(texts),
    }


def write_embeddings(pipe: Any, out: Path, texts: list[str], on_prompt: Callable[[], None]) -> dict[str, Any]:
    """Write `FILE` to ``out``, unless it is there already and whole; returns what the index says about it."""
    path = out / FILE
    if (out / INDEX).is_file():
        told = read_index(out).get("prompts")
        if not isinstance(told, dict) or told.get("texts") != texts:
            raise UpcycleError(f"{out} was made of other prompts; give the same, or choose another folder with -o")
        if path.is_file() and told["sha256"] == _hash(path):
            return told
    out.mkdir(parents=True, exist_ok=True)
    # Through files of a few: megabytes a prompt, of many prompts, would not fit into memory.
    with _appearing(path) as partial, tempfile.TemporaryDirectory(dir=out, prefix=".prompts-") as parts:
        pieces: dict[str, LazyTensor] = {}
        for first in range(0, len(texts), AT_ONCE):
            made: dict[str, torch.Tensor] = {}
            for number, text in enumerate(texts[first : first + AT_ONCE], first):
                made |= {f"{number}/{name}": value.cpu().contiguous() for name, value in embed(pipe, text).items()}
                on_prompt()
            part = Path(parts) / f"{first}.safetensors"
            save_file(made, part)
            pieces |= read_safetensors(part)
        sha256 = write_safetensors(partial, pieces.items(), {})
    return {"file": FILE, "sha256": sha256, "texts": texts}


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def synthesis_header(
    pipe: Any, found: Found, wish: Settings, *, count: int, seed: int, dtype: torch.dtype, prompts: dict[str, Any]
) -> dict[str, Any]:
    """What the index says about a synthesis; ``prompts``: of `write_embeddings`."""
    shape = list(latent_shape(pipe, wish))
    scheduler = {key: value for key, value in pipe.scheduler.config.items() if not key.startswith("_")}
    return {
        "kind": "synthesized",
        "sample_shape": shape,
        "num_classes": len(prompts["texts"]),
        "classes": None,
        "prompts": prompts,
        "tensors": {
            "z0": {"dtype": "float16", "shape": shape},
            "label": {"dtype": "int64", "shape": []},
            "seed": {"dtype": "int64", "shape": []},
        },
        "source": {"kind": "teacher", "samples": count},
        "vae": {"id": found.pipeline, **describe_vae({**pipe.vae.config, "_class_name": type(pipe.vae).__name__})},
        "size": None,
        "flips": False,
        "dtype": str(dtype).removeprefix("torch."),
        "teacher": {
            "id": found.pipeline, "revision": found.revision, "class": type(pipe.transformer).__name__,
            "sha256": weights_hash(pipe.transformer.state_dict()),
        },
        "scheduler": {"class": type(pipe.scheduler).__name__, **scheduler},
        "steps": wish.steps,
        "guidance_scale": wish.guidance_scale,
        "seed": seed,
    }  # fmt: skip


def synthesize(
    pipe: Any,
    writer: LatentWriter,
    wish: Settings,
    *,
    seed: int,
    batch_size: int,
    on_images: Callable[[float], None] = lambda count: None,
) -> None:
    """Draw what ``writer`` lacks, prompts in turn; the text encoders are let go of.

    ``on_images`` is called after every step, with the share of the batch's samples that this step was.

    Raises:
        UpcycleError: samples that are not finite; no space left.
    """
    empty = embed(pipe, "")
    pipe.register_modules(**{name: None for name in ("text_encoder", "text_encoder_2") if hasattr(pipe, name)})
    names = NAMES[type(pipe.transformer).__name__]
    with safe_open(writer.out / FILE, "pt") as file:

        def sample(labels: list[int], seeds: list[int]) -> torch.Tensor:
            texts = [
                {name: file.get_tensor(f"{label}/{name}").to(pipe.transformer.device) for name in names}
                for label in labels
            ]
            share = len(labels) / wish.steps
            arguments = _as_arguments(pipe, texts, empty)
            return draw_latents(pipe, [], seeds, wish, lambda: on_images(share), **arguments)

        draw_shards(writer, list(range(len(writer.index["prompts"]["texts"]))), seed, batch_size, sample)


class PromptFolder(LatentFolder):
    """A folder of latents with the embeddings of its prompts.

    Attributes:
        prompts: the texts.
        empty: the number of the empty one; None where there is none.
        guidance_scale: that the samples were drawn with.

    Raises:
        UpcycleError: as `LatentFolder` does, and where the embeddings are missing or damaged.
    """

    def __init__(self, path: Path | str):
        super().__init__(path)
        told = (self.index or {}).get("prompts")
        if not isinstance(told, dict):
            raise UpcycleError(
                f"data {path} has no prompts; make it with upcycle synthesize BASE --prompts FILE, from the teacher"
            )
        self.prompts: list[str] = told["texts"]
        self.empty = self.prompts.index("") if "" in self.prompts else None
        assert self.index is not None
        self.guidance_scale = float(self.index["guidance_scale"])
        self._sha256 = told["sha256"]
        file = self.path / FILE
        if not file.is_file() or _hash(file) != self._sha256:
            raise UpcycleError(f"data {file} is missing or damaged; delete {path} and make it again")

    @property
    def fingerprint(self) -> str:
        """What a continued run must find again; the embeddings belong to it."""
        return f"{super().fingerprint} and prompts {self._sha256[:12]}"

    def embeddings(self, number: int) -> dict[str, torch.Tensor]:
        """Those of a prompt, by name, as they were stored."""
        if FILE not in self._files:
            try:
                self._files[FILE] = safe_open(self.path / FILE, "pt")
            except (SafetensorError, OSError) as error:
                raise UpcycleError(f"data {self.path / FILE} cannot be read ({error}); make it again") from error
        file, prefix = self._files[FILE], f"{number}/"
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}

    def check_model(self, model: str, config: Any) -> None:
        """Raise `UpcycleError` unless a transformer of the class ``model`` takes these samples and texts."""
        widths = {
            "FluxTransformer2DModel": ("joint_attention_dim", "pooled_projection_dim"),
            "WanTransformer3DModel": ("text_dim",),
            "ZImageTransformer2DModel": ("cap_feat_dim",),
        }[model]
        takes = {name: config[width] for name, width in zip(NAMES[model], widths, strict=True)}
        has = {name: value.shape[-1] for name, value in self.embeddings(0).items()}
        if has != takes:
            raise UpcycleError(
                f"data {self.path} has texts of widths {has} and the teacher takes {takes}; make it with the teacher"
            )
        channels = config["in_channels"] // (4 if model == "FluxTransformer2DModel" else 1)
        if self.sample_shape[0] != channels or (len(self.sample_shape) == 4) != (model == "WanTransformer3DModel"):
            raise UpcycleError(
                f"data {self.path} has samples of {list(self.sample_shape)}, which the teacher does not take (it has "
                f"{channels} channels); make it with the teacher"
            )
