"""Where images come from: a folder with one sub-folder a class, or a Hugging Face dataset."""

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from upcycle.errors import UpcycleError

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif")


@dataclass(frozen=True)
class Images:
    """Labelled images that are not read yet. Item ``i`` is ``names[i]`` of class ``labels[i]``."""

    names: Sequence[str]
    labels: Sequence[int]
    num_classes: int
    classes: list[str] | None
    """Names of the classes, by label."""
    open: Callable[[int], Image.Image]
    source: dict[str, Any]
    """Where they come from, for the index."""


def open_images(spec: str, image_column: str | None = None, label_column: str | None = None) -> Images:
    """List the images of a folder, or of the dataset ``hf:NAME[:SPLIT]``.

    Raises:
        UpcycleError: no such folder or dataset, no images in it, or images without a class.
    """
    if spec.startswith("hf:"):
        return _open_dataset(spec, image_column, label_column)
    if image_column or label_column:
        raise UpcycleError(f"{spec} is no dataset: --image-column and --label-column are for hf:NAME; leave them out")
    return _open_folder(spec)


def _open_folder(spec: str) -> Images:
    """Labels are the places of the sub-folders' sorted names; images may lie deeper in them."""
    folder = Path(spec)
    if not os.path.isdir(folder):
        raise UpcycleError(f"{spec}: no such folder of images; for a dataset of the Hub write hf:NAME")
    try:
        entries = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise UpcycleError(f"{spec} cannot be listed ({error.strerror}); check its rights") from error
    classes = [name for name in entries if os.path.isdir(folder / name)]
    loose = [name for name in entries if _is_image(name) and name not in classes]
    if loose:
        raise UpcycleError(
            f"{spec} holds {loose[0]} outside of any class folder, and every image needs a class; "
            "make one sub-folder a class and move the images into them"
        )
    names, labels = [], []
    for label, name in enumerate(classes):
        found = _images_below(folder, name)
        names += found
        labels += [label] * len(found)
    if not names:
        raise UpcycleError(f"{spec} holds no images ({' '.join(ENDINGS)}) in sub-folders; make one sub-folder a class")

    def open_image(index: int) -> Image.Image:
        return Image.open(folder / names[index])

    source = {"kind": "folder", "path": str(folder.resolve()), "images": len(names), "sha256": _hash(names, labels)}
    return Images(names, labels, len(classes), classes, open_image, source)


def _images_below(folder: Path, name: str) -> list[str]:
    """Images in the sub-folder ``name`` and below it, by their paths in ``folder``, sorted."""
    found = []
    for at, _, files in os.walk(folder / name, followlinks=True):
        found += [os.path.relpath(os.path.join(at, file), folder) for file in files if _is_image(file)]
    return sorted(found)


def _is_image(name: str) -> bool:
    return name.lower().endswith(ENDINGS) and not name.startswith(".")


def _open_dataset(spec: str, image_column: str | None, label_column: str | None) -> Images:
    name, _, split = spec.removeprefix("hf:").partition(":")
    split = split or "train"
    try:
        import datasets
    except ImportError as error:
        raise UpcycleError(f"{spec} needs the package datasets; pip install 'upcycle[datasets]'") from error
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # a builder may raise anything
        what = " ".join(str(error).split())[:300] or type(error).__name__
        raise UpcycleError(f"{spec} cannot be loaded as a dataset ({what}); check its name and split") from error
    features = rows.features
    image_column = _column(spec, features, "image", image_column, lambda kind: isinstance(kind, datasets.Image))
    label_column = _column(spec, features, "label", label_column, lambda kind: isinstance(kind, datasets.ClassLabel))
    kind = features[label_column]
    classes = list(kind.names) if isinstance(kind, datasets.ClassLabel) else None
    labels = list(rows[label_column])
    if not labels or any(type(label) is not int or label < 0 for label in labels):
        raise UpcycleError(
            f"{spec}: column {label_column} does not hold whole numbers from 0 on, as classes have; "
            "choose another with --label-column, or another split"
        )
    # Undecoded, so that a damaged image is met where it can be named.
    try:
        files = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    except (TypeError, ValueError, NotImplementedError) as error:  # the last is pyarrow's, for a cast that it lacks
        raise UpcycleError(f"{spec}: column {image_column} holds no images; choose one with --image-column") from error

    def open_image(index: int) -> Image.Image:
        file = files[index][image_column]
        return Image.open(io.BytesIO(file["bytes"]) if file["bytes"] is not None else file["path"])

    names = [f"row {index}" for index in range(len(labels))]
    columns = {"image_column": image_column, "label_column": label_column}
    listing = {"images": len(names), "sha256": _hash(names, labels)}
    source = {"kind": "dataset", "path": name, "split": split, **columns, **listing}
    return Images(names, labels, len(classes or range(max(labels) + 1)), classes, open_image, source)


def _column(spec: str, features: Any, what: str, chosen: str | None, fits: Callable[[Any], bool]) -> str:
    there = f"it has {', '.join(features)}; choose one with --{what}-column"
    if chosen is not None:
        if chosen not in features:
            raise UpcycleError(f"{spec} has no column {chosen}: {there}")
        return chosen
    found = [name for name, kind in features.items() if fits(kind)] or [name for name in (what,) if name in features]
    if len(found) != 1:
        raise UpcycleError(f"{spec} has {len(found) or 'no'} columns that look like the {what}: {there}")
    return found[0]


def _hash(names: Sequence[str], labels: Sequence[int]) -> str:
    digest = hashlib.sha256()
    for name, label in zip(names, labels, strict=True):
        digest.update(f"{label} {name}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()
