"""Output folders that appear complete or not at all."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from upcycle.errors import UpcycleError

# What an output of ours holds; --force deletes nothing that does not look like one.
MARKS = ("model_index.json", "transformer", "report.json", "samples.png", "config.json", "run.json")


def check_output(out: Path, force: bool, keep: tuple[Path, ...] = ()) -> None:
    """Raise `UpcycleError` unless ``out`` can be made (or, with ``force``, replaced).

    ``keep``: paths that must survive, such as the source of a conversion.
    """
    if out.exists() or out.is_symlink():
        if not out.is_dir():
            raise UpcycleError(f"{out} is a file; choose another output folder with -o")
        if any(out.iterdir()):
            if not force:
                raise UpcycleError(f"{out} exists already; choose another folder with -o, or replace it with --force")
            if not any((out / mark).exists() for mark in MARKS):
                raise UpcycleError(f"{out} does not look like an output of upcycle, so --force will not replace it")
        resolved = out.resolve()
        for path in (*keep, Path.cwd()):
            if path.resolve() == resolved or resolved in path.resolve().parents:
                raise UpcycleError(
                    f"{out} holds {path}, which replacing it would delete; choose another folder with -o"
                )
    parent = out.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UpcycleError(
            f"{out} cannot be made: {parent} is not a folder that can be written; choose another with -o"
        )


@contextlib.contextmanager
def new_folder(out: Path, force: bool, bytes_needed: int = 0, keep: tuple[Path, ...] = ()) -> Iterator[Path]:
    """Yield a hidden folder beside ``out`` that becomes ``out`` on success and is removed on failure.

    An existing ``out`` is replaced only with ``force``, and only once the new one is complete.
    """
    check_output(out, force, keep)
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if bytes_needed > free:
        raise UpcycleError(
            f"{out} needs {bytes_needed / 2**20:,.0f} MiB and {free / 2**20:,.0f} MiB are free; "
            "make room or choose another folder with -o"
        )
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        yield partial
        _replace(partial, out)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UpcycleError(
                f"{out}: no space left to write it; make room or choose another folder with -o"
            ) from error
        raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _replace(new: Path, out: Path) -> None:
    if not out.exists():
        new.rename(out)
        return
    old = out.parent / f".{out.name}.replaced-{os.getpid()}"
    out.rename(old)
    try:
        new.rename(out)
    except OSError:
        old.rename(out)
        raise
    shutil.rmtree(old)


def write_text(path: Path, text: str) -> None:
    """Write a file so that it holds the old text or the new one, whatever interrupts."""
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        partial.write_text(text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
