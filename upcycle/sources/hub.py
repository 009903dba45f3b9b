"""Models on the Hugging Face Hub: fetch what is needed of a repository into the usual cache.

The descriptions come first (JSON, model card), so that a repository that is no DiT is refused before its weights
are downloaded, and only one of several formats of the weights is fetched.
"""

import errno
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, get_cached_repo_tree, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    DisabledRepoError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    SafetensorsParsingError,
)

from upcycle.errors import UpcycleError
from upcycle.sources.diffusers_folder import IGNORED, Layout, identify, inside, list_files
from upcycle.sources.safetensors_file import DTYPE_NAMES, read_metadata, read_safetensors
from upcycle.sources.weight_files import choose_file, pick_file, shards_of, variants

_DESCRIPTIONS = [
    "model_index.json",
    "config.json",
    "diffusion_pytorch_model.*.json",
    "README.md",
    "upcycle.json",
    "LICENSE*",
    "transformer/*.json",
    "scheduler/*.json",
    "vae/*.json",
]
_UNKNOWN = "no such local path and no such model on the Hub, or a private one; check the name, or `hf auth login`"


def is_hub_id(spec: str) -> bool:
    """Whether `spec` has the form "owner/name"."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", spec, re.ASCII) is not None


def fetch(spec: str, *, revision: str | None, variant: str | None) -> tuple[Path, str]:
    """Bring the model "owner/name" into the cache; returns its folder there and the commit.

    Without a network, or with HF_HUB_OFFLINE=1, what is in the cache is used.

    Raises `UpcycleError` for everything that a user can mend: unknown, gated or private repositories, unknown
    revisions, models that are no DiT, no network, server faults, no disk space.
    """
    folder = _download(spec, revision, revision, _DESCRIPTIONS)
    commit = folder.name
    names = _listing(spec, commit, folder)
    layout = identify(spec, folder, names)
    prefix = f"{layout.subfolder}/" if layout.subfolder else ""
    chosen = choose_file(spec, inside(names, layout.subfolder), variant, [])
    wanted = [prefix + shard for shard in shards_of(spec, folder / layout.subfolder, chosen)]
    if layout.subfolder:
        wanted += _vae_files(spec, folder, names, variant)
    _download(spec, commit, revision, wanted)
    return folder, commit


@dataclass(frozen=True)
class Glimpse:
    """A repository without its weights: the folder with its descriptions, what they say, and its tensors' headers.

    ``tensors``: name -> (shape, safetensors' name of the dtype), and the ``metadata`` of the first file; None where the
    weights are pickles.
    """

    folder: Path
    commit: str
    layout: Layout
    tensors: dict[str, tuple[tuple[int, ...], str]] | None
    files: list[str]
    metadata: dict[str, str] | None = None


def peek(spec: str, *, revision: str | None, variant: str | None = None) -> Glimpse:
    """Look at the model "owner/name" without downloading weights: of those, headers are read by ranged requests.

    Raises `UpcycleError` as `fetch` does.
    """
    folder = _download(spec, revision, revision, _DESCRIPTIONS)
    commit = folder.name
    names = _listing(spec, commit, folder)
    layout = identify(spec, folder, names)
    prefix = f"{layout.subfolder}/" if layout.subfolder else ""
    chosen = choose_file(spec, inside(names, layout.subfolder), variant, [])
    files = [prefix + shard for shard in shards_of(spec, folder / layout.subfolder, chosen)]
    if not all(name.endswith(".safetensors") for name in files):
        return Glimpse(folder, commit, layout, None, files)
    tensors: dict[str, tuple[tuple[int, ...], str]] = {}
    metadata: dict[str, str] | None = None
    for name in files:
        if isinstance(cached := try_to_load_from_cache(spec, name, revision=commit), str):
            there = read_safetensors(Path(cached)).values()
            metadata = metadata or read_metadata(Path(cached))
            tensors |= {tensor.name: (tensor.shape, DTYPE_NAMES[tensor.dtype]) for tensor in there}
            continue
        try:
            header = HfApi().parse_safetensors_file_metadata(spec, name, revision=commit)
        except Exception as error:
            mended = explain(spec, revision, error)
            if isinstance(error, SafetensorsParsingError):
                mended = UpcycleError(f"{spec}: {name} is no safetensors file; take another --revision")
            if mended is None:
                raise
            raise mended from error
        tensors |= {tensor: (tuple(info.shape), info.dtype) for tensor, info in header.tensors.items()}
        metadata = metadata or header.metadata
    tensors = {name: tensor for name, tensor in tensors.items() if name not in IGNORED}
    return Glimpse(folder, commit, layout, tensors, files, metadata)


def fetch_adapter(spec: str, revision: str | None) -> Path | None:
    """Bring a DDiT adapter of the repository into the cache; its folder there, or None where it has none."""
    names = ("ddit.json", "ddit.safetensors")
    folder = _download(spec, revision, revision, [f"{at}{name}" for at in ("", "ddit/") for name in names])
    return next((path for path in (folder, folder / "ddit") if (path / names[0]).is_file()), None)


def fetch_vae(spec: str) -> Path:
    """Bring a VAE into the cache, from a repository of its own or from the ``vae`` folder of a pipeline's.

    Returns the repository's folder there. Raises `UpcycleError` as `fetch` does.
    """
    described = [f"{at}{name}" for at in ("", "vae/") for name in ("config.json", "diffusion_pytorch_model.*.json")]
    folder = _download(spec, None, None, described)
    names = _listing(spec, folder.name, folder)
    prefix = "vae/" if "vae/config.json" in names else ""
    beside = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    chosen = next((file for wish in (None, *variants(beside)) if (file := pick_file(beside, wish))), None)
    if chosen is None:
        raise UpcycleError(f"{spec}: has no VAE weights; give the repository of a diffusers AutoencoderKL")
    return _download(spec, folder.name, None, [prefix + shard for shard in shards_of(spec, folder / prefix, chosen)])


def _vae_files(spec: str, folder: Path, names: list[str], variant: str | None) -> list[str]:
    """One format of the VAE's weights, in the wished variant if there is one, and any code of its own."""
    beside = inside(names, "vae")
    wishes = [variant, None, *variants(beside)]
    chosen = next((file for wish in wishes if (file := pick_file(beside, wish))), None)
    if chosen is None:
        return [f"vae/{name}" for name in beside]
    code = [name for name in beside if name.endswith(".py")]
    return [f"vae/{name}" for name in shards_of(spec, folder / "vae", chosen) + code]


def _listing(spec: str, commit: str, folder: Path) -> list[str]:
    """Files of the repository at that commit; those in the cache if the list itself is not cached."""
    try:
        return [file.path for file in get_cached_repo_tree(spec, revision=commit)]
    except CachedRepoTreeNotFoundError:
        return list_files(spec, folder)


def _download(spec: str, revision: str | None, asked: str | None, patterns: list[str]) -> Path:
    try:
        return Path(snapshot_download(spec, revision=revision, allow_patterns=patterns))
    except Exception as error:
        mended = explain(spec, asked, error)
        if mended is None:
            raise
        raise mended from error


def explain(spec: str, revision: str | None, error: Exception) -> UpcycleError | None:
    """The line for an error of `huggingface_hub`; None if it is nothing that a user can mend.

    The message is made here, never copied from the error, whose text may quote request headers.
    """
    chain = list(causes(error))
    for cause in chain:
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            return UpcycleError(
                f"{spec}: no space left in {constants.HF_HUB_CACHE}; free some, or set HF_HOME to a larger disk"
            )
        if isinstance(cause, PermissionError) or (isinstance(cause, OSError) and cause.errno == errno.EROFS):
            return UpcycleError(f"{spec}: {constants.HF_HUB_CACHE} cannot be written; mend its rights, or set HF_HOME")
    if any(isinstance(cause, json.JSONDecodeError) for cause in chain):
        return UpcycleError(f"{spec}: {constants.ENDPOINT} does not answer as the Hub would; try again later")
    for cause in chain:
        line = _hub_line(spec, revision, cause)
        if line:
            return UpcycleError(f"{spec}: {line}")
    # Transport errors come from the HTTP library in use, which the hub library has changed before.
    unreachable = LocalEntryNotFoundError | OfflineModeIsEnabled | ConnectionError | TimeoutError
    if any(isinstance(cause, unreachable) or type(cause).__module__.startswith("httpx") for cause in chain):
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the Hub cannot be reached"
        return UpcycleError(
            f"{spec}: no such local path, {why}, and the model is not all in the cache; connect and try again"
        )
    return None


def _hub_line(spec: str, revision: str | None, error: BaseException) -> str | None:
    if isinstance(error, GatedRepoError):
        page = f"{constants.ENDPOINT}/{spec}"
        return f"access is restricted; accept its terms at {page}, then log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return _UNKNOWN
    if isinstance(error, RevisionNotFoundError):
        return f"has no revision {revision!r}; give one of its branches, tags or commits"
    if isinstance(error, DisabledRepoError):
        return "was disabled on the Hub; take another model"
    if isinstance(error, HFValidationError):
        return "neither a local path nor a valid Hub id (owner/name); check it"
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return f"the Hub denies access ({status}), or has no such model; check the name, or `hf auth login` again"
        if status == 429:
            return "the Hub asks for a pause (429, too many requests); wait some minutes, logging in raises the limit"
        if isinstance(error, EntryNotFoundError):
            return "a file listed in the repository is not there; try another --revision"
        if status == 404:
            return _UNKNOWN
        return f"the Hub answers with an error ({status}); try again later"
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
