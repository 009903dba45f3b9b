"""Output folders and files that appear complete or not at all."""

import contextlib
import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from upcycle.errors import UpcycleError

# What folders of ours hold at their top; --force deletes nothing else.
EXPORT = r"model_index\.json|transformer|vae|scheduler|upcycle\.json|README\.md|images"
ADAPTER = r"ddit\.(json|safetensors|py)|ddit_2|upcycle\.json|README\.md|images"
WITH_ADAPTER = (
    rf"{EXPORT}|ddit(_2)?|LICENSE.*|(text|image)_encoder(_\d)?|tokenizer(_\d)?|transformer_2|feature_extractor"
)
DEMO = r"report\.json|pipeline|(samples|router|compression)\.png"
SAMPLES = r"samples\.png|class\d+-seed-?\d+\.png|prompt\d+-seed\d+\.(png|gif)|patches\.(json|png)"
BULK = r"\d+\.png|\.\d+\.png\.partial|samples\.json|costs-\d+\.jsonl"
INSPECTION = r"report\.(html|json)|(samples|images)-(map-.+|tokens|detail|tail-drop|classes)\.png"
COMPARISON = r"compare\.(png|json)"

# How libraries say it that hide the error number; the last two are torch.save's.
DISK_FULL = ("No space left", "File too large", "Disk quota exceeded", "unexpected pos", "iostream error")


def check_output(out: Path, force: bool, keep: tuple[Path, ...] = ()) -> None:
    """Raise `UpcycleError` unless ``out`` can be made (or, with ``force``, replaced).

    ``keep``: paths that must survive, such as the source of a conversion.
    """
    with _explained(out):
        target = out.resolve()
        if _exists(target):
            _check_replaceable(out, target, force, keep)
        _check_parent(out, target)


def check_output_file(out: Path, force: bool, keep: tuple[Path, ...] = ()) -> None:
    """Raise `UpcycleError` unless the file ``out`` can be made (or, with ``force``, replaced).

    ``keep``: files and folders that must survive, such as the model that is exported.
    """
    with _explained(out):
        target = out.resolve()
        if _exists(target):
            if target.is_dir():
                raise UpcycleError(f"{out} is a folder; choose a file with -o")
            if not force:
                raise UpcycleError(f"{out} exists already; choose another file with -o, or replace it with --force")
            for path in keep:
                if path.resolve() in (target, *target.parents):
                    raise UpcycleError(f"{out} belongs to {path}, which is being read; choose another file with -o")
        _check_parent(out, target)


def _check_parent(out: Path, target: Path) -> None:
    parent = target.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UpcycleError(
            f"{out} cannot be made: {parent} is not a folder that can be written; choose another with -o"
        )


def _check_replaceable(out: Path, target: Path, force: bool, keep: tuple[Path, ...]) -> None:
    if not target.is_dir():
        raise UpcycleError(f"{out} is a file; choose another output folder with -o")
    names = sorted(path.name for path in target.iterdir())
    if names and not force:
        raise UpcycleError(f"{out} exists already; choose another folder with -o, or replace it with --force")
    for path in (*keep, Path.cwd()):
        if target in (path.resolve(), *path.resolve().parents):
            raise UpcycleError(f"{out} holds {path}, which replacing it would delete; choose another folder with -o")
    if not names:
        return
    if _is_student(target / "transformer"):
        ours = EXPORT
    elif {"ddit.json", "ddit.safetensors"} <= {*names}:
        ours = ADAPTER
    elif any((target / place / "ddit.json").is_file() for place in ("ddit", "ddit_2")):
        ours = WITH_ADAPTER
    elif "report.json" in names and _is_student(target / "pipeline" / "transformer"):
        ours = DEMO
    elif "samples.png" in names:
        ours = SAMPLES
    elif "samples.json" in names:
        ours = BULK
    elif "report.html" in names:
        ours = INSPECTION
    elif "compare.json" in names:
        ours = COMPARISON
    else:
        raise UpcycleError(
            f"{out} does not look like an output of upcycle, so --force will not replace it; choose another with -o"
        )
    if foreign := [name for name in names if not re.fullmatch(ours, name)]:
        raise UpcycleError(
            f"{out} holds {foreign[0]}, which no output of upcycle has, so --force will not replace it; "
            "move that away, or choose another folder with -o"
        )


def _is_student(folder: Path) -> bool:
    try:
        config = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("_class_name") == "ChunkedDiT"


@contextlib.contextmanager
def new_folder(out: Path, force: bool, bytes_needed: int = 0, keep: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield a hidden folder beside ``out`` that becomes ``out`` on success and is removed on failure.

    An existing ``out`` is replaced only with ``force``, and only once the new one is complete. Where ``out`` is a
    link, what it points to is replaced.
    """
    check_output(out, force, keep)
    target = out.resolve()
    hidden = f".{target.name[:40]}"  # short, because a name may be as long as the file system allows
    partial = target.with_name(f"{hidden}.partial-{os.getpid()}")
    old = target.with_name(f"{hidden}.replaced-{os.getpid()}")
    try:
        with _explained(out):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
        _check_space(out, target.parent, bytes_needed)
        with _full_disk_explained(out):
            yield partial
        with _explained(out):
            _replace(partial, target, old)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def new_file(out: Path, force: bool, bytes_needed: int = 0, keep: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield the path of a hidden file beside ``out`` that becomes ``out`` on success and is removed on failure.

    An existing ``out`` is replaced only with ``force``, and only once the new one is complete; where ``out`` is a
    link, what it points to.
    """
    check_output_file(out, force, keep)
    target = out.resolve()
    partial = target.with_name(f".{target.stem[:40]}.partial-{os.getpid()}{target.suffix}")
    try:
        with _explained(out):
            target.parent.mkdir(parents=True, exist_ok=True)
        _check_space(out, target.parent, bytes_needed)
        with _full_disk_explained(out):
            yield partial
        with _explained(out):
            partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _check_space(out: Path, parent: Path, bytes_needed: int) -> None:
    with _explained(out):
        free = shutil.disk_usage(parent).free
    if bytes_needed > free:
        raise UpcycleError(
            f"{out} needs {bytes_needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are free; "
            "make room or choose another with -o"
        )


def _replace(new: Path, target: Path, old: Path) -> None:
    try:
        if target.exists():
            target.rename(old)
        new.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise


def disk_full(error: BaseException | None) -> bool:
    """Whether the disk ran full: libraries hide the error number in causes, in arguments or in the text."""
    if error is None:
        return False
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    text = str(error)
    return any(words in text for words in DISK_FULL) or disk_full(error.__cause__ or error.__context__)


@contextlib.contextmanager
def _explained(out: Path) -> Iterator[None]:
    """Errors of the operating system about ``out`` itself, such as a name that is too long."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # pathlib reports a loop of links as a RuntimeError
        if disk_full(error):
            raise _no_space(out) from error
        what = getattr(error, "strerror", None) or error
        raise UpcycleError(f"{out} cannot be used: {what}; choose another output folder with -o") from error


@contextlib.contextmanager
def _full_disk_explained(out: Path) -> Iterator[None]:
    """Whatever else fails while ``out`` is written is not about ``out``."""
    try:
        yield
    except Exception as error:
        if disk_full(error) and not isinstance(error, UpcycleError):
            raise _no_space(out) from error
        raise


def _no_space(out: Path) -> UpcycleError:
    return UpcycleError(f"{out}: no space left to write it; make room or choose another folder with -o")


def _exists(path: Path) -> bool:
    """Unlike ``path.exists()``, raises for what cannot be looked at."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def write_text(path: Path, text: str) -> None:
    """`write_bytes` of text."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file so that it holds the old content or the new one, whatever interrupts."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def to_json(value: Any) -> str:
    """Strict JSON: numbers that are not finite, which JSON does not know, become null."""
    return json.dumps(_finite(value), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
