"""The recipes that come with the package: those of recipes/ in a clone."""

import difflib
import itertools
import os
from pathlib import Path

from upcycle.errors import UpcycleError

SIZES = ("digits", "s", "b", "l", "xl")


def shipped_recipes() -> dict[str, Path]:
    """Files of the shipped recipes by name, smaller models first."""
    package = Path(__file__).parent
    folder = package / "assets" / "recipes"  # in a clone a link to recipes/, which not every git checks out as one
    folder = folder if folder.is_dir() else package.parent / "recipes"
    found = {path.stem: path for path in folder.glob("*.yaml")}
    return dict(sorted(found.items(), key=lambda item: _size_order(item[0])))


def _size_order(name: str) -> tuple[int, int, str]:
    family = "".join(itertools.takewhile(str.isalpha, name))
    return SIZES.index(family) if family in SIZES else len(SIZES), len(name), name


def find_recipe(name: Path) -> Path:
    """The file that a user means: a path, or NAME for recipes/NAME.yaml here, or else for the shipped recipe.

    Raises:
        UpcycleError: there is none; says which shipped one is near.
    """
    if os.path.isfile(name):  # not a folder that happens to be called like a recipe
        return name
    shipped = shipped_recipes()
    if name.parent == Path() and not name.suffix:
        own = Path("recipes") / f"{name}.yaml"
        found = own if os.path.isfile(own) else shipped.get(str(name))
        if found:
            return found
    if name.stem in shipped:
        raise UpcycleError(
            f"recipe {name} does not exist here; run the shipped one with: upcycle finetune {name.stem}, or copy it "
            f"with: upcycle recipes copy {name.stem}"
        )
    raise UpcycleError(f"recipe {name} does not exist; {_hint(name.stem, shipped)}")


def shipped_recipe(name: str) -> Path:
    """The file of a shipped recipe; raises `UpcycleError` with the nearest name where there is none."""
    shipped = shipped_recipes()
    stem = os.path.basename(name).removesuffix(".yaml")
    if stem not in shipped:
        raise UpcycleError(f"no recipe {name} comes with upcycle; {_hint(stem, shipped)}")
    return shipped[stem]


def _hint(name: str, shipped: dict[str, Path]) -> str:
    near = difflib.get_close_matches(name, shipped, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(shipped)}"


def opening(text: str) -> list[str]:
    """The lines of the comment that a recipe opens with; the first one says what it is."""
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return lines
