"""Where an export comes from: `upcycle.json` beside the weights, and the same inside their files."""

import hashlib
import importlib.metadata
import json
import platform
import re
import shlex
import sys
import unicodedata
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from upcycle.errors import UpcycleError
from upcycle.output import to_json, write_text

FILE = "upcycle.json"
_PACKAGES = ("upcycle", "torch", "diffusers", "safetensors", "accelerate")
# Options that change where things go and what is printed, and nothing in the weights.
_PLACES, _SWITCHES = ("-o", "--out"), ("--force", "--json", "--no-verify", "--resume", "--debug")
# People edit the card; the rest is what was exported.
_UNHASHED = {FILE, "README.md", ".gitattributes"}


def command() -> str | None:
    """The command line that is running, as a user would type it; None where the package is used as a library."""
    program = Path(sys.argv[0])
    if program.name != "upcycle" and program.parts[-2:] != ("upcycle", "__main__.py"):
        return None
    # A resumed run is the run that began: it ends with the same bytes.
    return shlex.join(["upcycle", *(word for word in sys.argv[1:] if word not in ("--resume", "--debug"))])


def event(what: str, **details: Any) -> dict[str, Any]:
    """One line of an export's history: what was done, with which command, options and versions."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"what": what, "command": command(), **details, "versions": versions | {"python": platform.python_version()}}


def metadata(base: Mapping[str, Any], history: list[dict[str, Any]]) -> dict[str, str]:
    """The header entries of an export's safetensors files.

    Outputs are left out of commands and recipes: equal conversions and runs have equal files, wherever they lie.
    """
    return {"format": "pt", "upcycle": json.dumps({"base": base, "history": [_placeless(done) for done in history]})}


def extended(header: Mapping[str, str], done: dict[str, Any]) -> dict[str, str]:
    """The header entries of a file that is made from one with ``header``, after one more `event`."""
    told = from_header(header)
    if told is None:
        return {"format": "pt", **header}
    return {**header, **metadata(told["base"], [*told["history"], done])}


def from_header(header: Mapping[str, str]) -> dict[str, Any] | None:
    """As `read`, from the entries that `metadata` wrote, without evidence and files; None where there are none.

    Raises:
        UpcycleError: they are damaged.
    """
    if "upcycle" not in header:
        return None
    try:
        return {**_checked(header["upcycle"], _Told), "evidence": [], "files": {}}
    except ValueError as error:
        raise UpcycleError(f"the provenance in the header of its weights is damaged ({error})") from error


def _placeless(done: dict[str, Any]) -> dict[str, Any]:
    done = dict(done)
    if done.get("command"):
        done["command"] = shlex.join(_placeless_words(shlex.split(done["command"])))
    if done.get("recipe"):
        done["recipe"] = {key: value for key, value in done["recipe"].items() if key != "out"}
    return done


def _placeless_words(words: list[str]) -> Iterator[str]:
    rest = iter(words)
    for word in rest:
        if word in _PLACES:
            next(rest, None)
        elif word == "--set":
            assignment = next(rest, "")
            if not assignment.startswith("out="):
                yield from (word, assignment)
        elif word not in _SWITCHES and not word.startswith(("--out=", "--set=out=")) and not re.match("-o.", word):
            yield word


def write(
    folder: Path,
    base: Mapping[str, Any],
    history: list[dict[str, Any]],
    *,
    evidence: list[dict[str, Any]] | None = None,
    sha256: Mapping[str, str] | None = None,
    names: Collection[str] | None = None,
) -> None:
    """Write ``folder/upcycle.json``.

    Args:
        base: ``id``, ``kind``, ``revision`` (None for local paths) and ``licence`` (None where unknown) of the teacher.
        history: `event` by `event`, oldest first.
        evidence: what was measured, see `add_evidence`.
        sha256: digests that are known already, by file name relative to the folder; the others are computed.
        names: the files that belong to the export; all that are there by default.
    """
    known = sha256 or {}
    files = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": known.get(name) or digest(folder / name)}
        for name in (content(folder) if names is None else sorted(names))
    }
    write_text(folder / FILE, to_json({"base": base, "history": history, "evidence": evidence or [], "files": files}))


def read(folder: Path) -> dict[str, Any] | None:
    """What `write` wrote; None for an export without it.

    Raises:
        UpcycleError: it is damaged.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        return parse(path.read_text())
    except (OSError, ValueError) as error:
        raise UpcycleError(f"{path} is damaged ({error}); export the model again") from error


def read_or_header(folder: Path, header: Mapping[str, str]) -> dict[str, Any] | None:
    """`read`, else `from_header` of the weights' metadata."""
    return read(folder) or from_header(header)


def parse(text: str) -> dict[str, Any]:
    """The content of an `upcycle.json`; raises ValueError where it is not one."""
    return _checked(text, _Provenance)


def _checked(text: str, kind: type[BaseModel]) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(text)
        kind.model_validate(found)
        return _printable(found)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise ValueError(f"{where}: {first['msg'][0].lower()}{first['msg'][1:]}") from None
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None


_CONTROL, _HARMLESS = ("Cc", "Cf"), "\n\t\u200c\u200d"  # the last two join letters in some languages


def _printable(value: Any) -> Any:
    """Without control characters, which strangers may have meant for a terminal; keys, such as names of files, stay."""
    if isinstance(value, str):
        return "".join(" " if unicodedata.category(c) in _CONTROL and c not in _HARMLESS else c for c in value)
    if isinstance(value, dict):
        return {key: _printable(item) for key, item in value.items()}
    return [_printable(item) for item in value] if isinstance(value, list) else value


class _Part(BaseModel):
    """Whatever else stands in a part is kept: a later version may know what it is."""

    model_config = ConfigDict(extra="allow", strict=True)


class _Base(_Part):
    id: str | None = None
    kind: str | None = None
    revision: str | None = None
    licence: str | None = None


class _TailDrop(_Part):
    values: list[float]


class _Stage(_Part):
    tail_drop: _TailDrop


class _Recipe(_Part):
    data: str
    batch_size: int
    seed: int
    stages: list[_Stage]


class _Event(_Part):
    what: str
    command: str | None = None
    versions: dict[str, str] = {}
    options: dict[str, Any] = {}
    steps: int | None = None
    data: dict[str, Any] = {}
    student: str | None = None
    student_revision: str | None = None
    exact: bool | None = None
    recipe: _Recipe | None = None

    @model_validator(mode="after")
    def _steps_of_a_recipe(self) -> "_Event":
        if self.steps is not None and self.recipe is None:
            raise ValueError("steps without a recipe")
        return self


class _Evidence(_Part):
    metric: str
    better: str
    student: float | None = None
    teacher: float | None = None
    settings: dict[str, str | float | bool | None]


class _File(_Part):
    bytes: int
    sha256: str


class _Told(_Part):
    base: _Base
    history: list[_Event]


class _Provenance(_Told):
    evidence: list[_Evidence]
    files: dict[str, _File]


def add_evidence(folder: Path, *found: dict[str, Any], drawn: Collection[str] = ()) -> None:
    """Add measurements to the `upcycle.json` of an export (again: replace them), and its new files to the list.

    Each has ``metric``, ``student`` and ``teacher`` (None where not measured), ``better`` ("lower" or "higher") and
    ``settings`` (a flat dict of how it was measured). ``drawn``: files that were made or replaced on purpose; whatever
    else differs from its digest goes on to differ from it, and what else lies there does not become a part of it.

    Raises:
        UpcycleError: a file that belongs to the export is not there.
    """
    now = read(folder)
    assert now is not None, folder
    known = {name: file["sha256"] for name, file in now["files"].items() if name not in drawn}
    keys = [(new["metric"], new["settings"]) for new in found]
    older = [old for old in now["evidence"] if (old["metric"], old["settings"]) not in keys]
    names = now["files"].keys() | set(drawn)
    if missing := [name for name in sorted(names) if not (folder / name).is_file()]:
        raise UpcycleError(f"{folder}: {missing[0]}, which {FILE} lists, is not there; export the model again")
    write(folder, now["base"], now["history"], evidence=[*older, *found], sha256=known, names=names)


def content(folder: Path) -> list[str]:
    """Files that belong to an export, relative to it; not those that users edit, nor hidden or cached ones."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        name.as_posix()
        for name in names
        if name.as_posix() not in _UNHASHED and not any(p.startswith((".", "__pycache__")) for p in name.parts)
    )


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
