"""Which files of a diffusers component folder hold its weights: formats, shards and variants."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from upcycle.errors import UpcycleError

_PATTERN = re.compile(
    r"diffusion_pytorch_model(\.(?P<variant>\w+))?\.(?P<format>safetensors|bin)"
    r"(?P<index>\.index(\.(?P<index_variant>\w+))?\.json)?"
)


def pick_file(names: Iterable[str], variant: str | None) -> str | None:
    """The weight file, or index of shards, of that variant (None: the one without a suffix); None if there is none.

    safetensors comes before `.bin`, and a single file before shards.
    """
    matches = [match for name in names if (match := _PATTERN.fullmatch(name))]
    mine = [match for match in matches if _variant(match) == variant]
    mine.sort(key=lambda match: (match["format"] != "safetensors", match["index"] is not None))
    return mine[0].string if mine else None


def variants(names: Iterable[str]) -> list[str]:
    """Variants (such as "fp16") that there are weights of; the one without a suffix is not counted."""
    found = {_variant(match) for name in names if (match := _PATTERN.fullmatch(name))}
    return sorted(variant for variant in found if variant is not None)


def is_weights(name: str) -> bool:
    """Whether a file of a component folder holds weights or lists them, of whatever format."""
    return name.endswith((".safetensors", ".bin", ".index.json")) or ".index." in name


def choose_file(spec: str, names: Iterable[str], variant: str | None, notes: list[str]) -> str:
    """The weight file or index to read. Without a wish, the plain weights, else the only variant (which is noted).

    Raises `UpcycleError` if there are no weights, or not of the variant asked for.
    """
    names = list(names)
    chosen = pick_file(names, variant)
    if chosen:
        return chosen
    there = variants(names)
    if variant is not None:
        plain = ["the plain weights"] if pick_file(names, None) else []
        shown = ", ".join(plain + there) or "none"
        raise UpcycleError(f"{spec}: has no weights of variant {variant!r} (there are: {shown}); choose one of those")
    if not there:
        raise UpcycleError(
            f"{spec}: no weights (diffusion_pytorch_model.safetensors or .bin) beside its config; fetch them too"
        )
    if len(there) > 1:
        raise UpcycleError(f"{spec}: has weights only as variants {', '.join(there)}; choose one with --variant")
    notes.append(f"only {there[0]} weights are there; they are used")
    only = pick_file(names, there[0])
    assert only is not None
    return only


def shards_of(spec: str, folder: Path, chosen: str) -> list[str]:
    """File names that hold the weights: `chosen` itself, or the shards that it lists.

    Raises `UpcycleError` if the index is damaged, or names anything but a file beside it.
    """
    if not chosen.endswith(".json"):
        return [chosen]
    index = read_json(spec, folder / chosen)
    table = index.get("weight_map")
    if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
        raise UpcycleError(f"{spec}: {chosen} has no proper weight_map; fetch it again")
    shards = sorted(set(table.values()))
    suffix = ".safetensors" if ".safetensors." in chosen else ".bin"
    for shard in shards:
        # An index comes from a stranger: it must not make us read files elsewhere on the disk.
        if not re.fullmatch(r"[\w.-]+", shard) or not shard.endswith(suffix):
            raise UpcycleError(f"{spec}: {chosen} names {shard!r}, which is no weight file beside it; refused")
    return shards


def read_json(spec: str, path: Path) -> dict:
    """A JSON object; raises `UpcycleError` if the file is not one."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UpcycleError(f"{spec}: {path.name} cannot be read ({error.strerror}); check the folder") from error
    except (ValueError, RecursionError) as error:
        raise UpcycleError(f"{spec}: {path.name} is not valid JSON; fetch it again") from error
    if not isinstance(content, dict):
        raise UpcycleError(f"{spec}: {path.name} is not a JSON object; fetch it again")
    return content


def _variant(match: re.Match[str]) -> str | None:
    return match["variant"] or match["index_variant"]
