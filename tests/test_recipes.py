"""The recipes that come with upcycle: valid, their commands and costs right, and listed, shown and copied."""

import json
import re
import shlex

import pytest
import tiny
import torch
import yaml
from conftest import ROOT, run
from pydantic import BaseModel
from typer.main import get_command

from upcycle import shipped
from upcycle.cli import app
from upcycle.evaluation.flops import chunked_dit_flops, dit_flops, tokens_at_ratio
from upcycle.graft.plan import full_config
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.recipe import Recipe, _group, load_recipe
from upcycle.training import cost

RECIPES = shipped.shipped_recipes()
PROMISED = [
    "digits",
    "digits-dydit",
    "s4",
    "b4",
    "b16",
    "l4",
    "xl4",
    "xl16",
    "xl4-512",
    "xl4-paper",
    "xl4-no-data",
    "ddit-xl",
    "ddit-flux",
    "ddit-digits",
]
SIZES = {"s": (6, 64, 12), "b": (12, 64, 12), "l": (16, 64, 24), "xl": (16, 72, 28)}  # heads, head width, layers
each_recipe = pytest.mark.parametrize("name", RECIPES)
DIGITS = ("digits", "digits-dydit", "ddit-digits")
each_teacher = pytest.mark.parametrize("name", [n for n in RECIPES if n not in DIGITS and not n.startswith("ddit")])


def commands(name):
    """The commands in the opening of a recipe, split into words, without comments."""
    lines = shipped.opening(RECIPES[name].read_text())
    return [shlex.split(line, comments=True) for line in lines if line.startswith(("upcycle ", "accelerate launch "))]


def test_the_promised_recipes_are_those_of_the_top_folder_and_ship():
    assert list(RECIPES) == PROMISED
    for path in RECIPES.values():
        assert path.resolve() == ROOT / "recipes" / path.name
        assert path.is_relative_to(ROOT / "upcycle" / "assets"), "package data, see pyproject.toml"


@each_recipe
def test_opening(name):
    first, second, *rest = shipped.opening(RECIPES[name].read_text())
    assert first.endswith(".")
    assert second == ""
    assert any(line.startswith("Cost: ") for line in rest)
    if name not in DIGITS:
        assert any(line.startswith("Not run yet.") for line in rest)


@each_recipe
def test_opening_commands_parse_and_lead_to_what_the_recipe_needs(name):
    recipe, made, resumed = load_recipe(RECIPES[name]), {"digits", "digits-val"}, False
    for words in commands(name):
        words = words[words.index("upcycle") + 1 :]  # after the launcher
        with get_command(app).make_context("upcycle", list(words)) as context:
            group = context.command
            command = group.commands[words[0]]
        values = command.make_context(words[0], words[1:]).params
        if words[0] in ("encode", "synthesize"):
            made.add(str(values["out"]))
            assert recipe.teacher in (values.get("vae"), values.get("teacher")) or recipe.vae == values["vae"]
        elif words[0] == "finetune":
            assert str(values["recipe"]) == f"recipes/{name}.yaml"
            load_recipe(RECIPES[name], values["set_"] or [])
            resumed |= values["resume"]
    assert resumed
    assert {recipe.data, recipe.validation.data} <= made


@each_teacher
def test_cost(name):
    """What the opening says of FLOPs, GPU-hours, checkpoints and latents follows from the recipe."""
    recipe, text = load_recipe(RECIPES[name]), " ".join(shipped.opening(RECIPES[name].read_text()))
    heads, head_width, layers = SIZES["".join(c for c in name.split("-")[0] if c.isalpha())]
    paper = recipe.convert.init == "paper"
    dit = {
        "num_attention_heads": heads, "attention_head_dim": head_width, "num_layers": layers, "in_channels": 4,
        "out_channels": 8, "sample_size": 64 if "512" in name else 32, "patch_size": 2,
    }  # fmt: skip
    config = full_config(
        {**dit, "patch_size": 1 if paper else 2, "scaffold": "paper" if paper else "lean"}
        | {"num_classes": 1000, "ratio": recipe.convert.ratio}
    )
    teacher, kept = dit_flops(dit), tokens_at_ratio(config)

    def student(rho):
        return sum(chunked_dit_flops(config, kept - int(kept * rho)).values())

    flops = 0.0
    for stage in recipe.stages:
        values = stage.tail_drop.values or [0.0]
        dropped = 1 - stage.tail_drop.start
        forward = (1 - dropped) * student(0) + dropped * sum(map(student, values)) / len(values)
        answers = bool(stage.losses.distill or (stage.losses.router and not paper)) + bool(stage.losses.blocks)
        flops += stage.steps * recipe.batch_size * (3 * forward + answers * teacher)  # backward: twice forward
    assert number(r"([\d.]+) EFLOPs to train", text) == pytest.approx(flops / 1e18, rel=0.01)

    if name == "xl4-no-data":
        drawing = 50_000 * 50 * 2 * teacher  # 50 steps, guided
        assert number(r"([\d.]+) EFLOPs to make", text) == pytest.approx(drawing / 1e18, rel=0.02)
        flops += drawing
        latents = 51_000 * (8 + 8 + dit["sample_size"] ** 2 * 4 * 2)  # label, seed, z0
    else:
        row = dit["sample_size"] ** 2 * 4 * 2
        latents = 1_281_167 * (8 + 4 * row) + 50_000 * (8 + 2 * row)  # train with flips, val without
    hours = flops / 100e12 / 3600
    assert number(r"([\d.]+) GPU-hours at a sustained 100 TFLOP/s", text) == pytest.approx(hours, rel=0.03)
    assert number(r"([\d.]+) GB of latents", text) == pytest.approx(latents / 1e9, rel=0.02)

    with torch.device("meta"):
        model = ChunkedDiT(**config)
    weights = sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in model.embedders.parameters())
    checkpoint = 4 * (2 * weights + 2 * (weights - frozen))  # weights, EMA, and AdamW's two of what trains
    assert number(r"([\d.]+) GB a checkpoint", text) == pytest.approx(checkpoint / 1e9, rel=0.02)


def number(pattern, text):
    found = re.search(pattern, text)
    assert found, f"{pattern} is not in: {text}"
    return float(found[1])


# -- the command ------------------------------------------------------------------------------------------------------


def test_list(tmp_path):
    rows = json.loads(run("recipes", "--json", cwd=tmp_path).stdout)["recipes"]
    assert [row["name"] for row in rows] == PROMISED
    assert all(row.keys() == {"name", "what", "base", "steps"} for row in rows)
    lines = run("recipes", cwd=tmp_path).stdout.splitlines()
    assert len(lines) == len(PROMISED), "one line each"
    for line, row in zip(lines, rows, strict=True):
        assert all(str(value) in line for value in row.values())


def test_show_and_copy(tmp_path, failing, monkeypatch):
    assert run("recipes", "show", "xl4").stdout == RECIPES["xl4"].read_text()
    out = run("recipes", "copy", "xl4", cwd=tmp_path).stdout
    copied = tmp_path / "recipes" / "xl4.yaml"
    assert copied.read_text() == RECIPES["xl4"].read_text()
    assert "upcycle finetune recipes/xl4.yaml" in out

    monkeypatch.chdir(tmp_path)
    copied.write_text("mine")
    assert "recipes/xl4.yaml exists already" in failing("recipes", "copy", "xl4")
    assert copied.read_text() == "mine"
    run("recipes", "copy", "xl4", "--force")
    assert copied.read_text() == RECIPES["xl4"].read_text()
    run("recipes", "copy", "b4.yaml", tmp_path)
    run("recipes", "copy", "b4", "new/folder/my.yaml")
    assert (tmp_path / "b4.yaml").read_text() == (tmp_path / "new/folder/my.yaml").read_text()

    assert "did you mean xl16?" in failing("recipes", "show", "xxl16")
    assert "did you mean digits?" in failing("recipes", "copy", "digit")
    assert "there are digits, digits-dydit, s4" in failing("recipes", "show", "qqq")
    (tmp_path / "file").touch()
    assert "cannot be written" in failing("recipes", "copy", "xl4", "file/xl4.yaml")
    assert not list(tmp_path.rglob(".*"))


def test_copy_onto_itself(failing, monkeypatch):
    monkeypatch.chdir(ROOT)
    before = RECIPES["xl4"].read_text()
    assert "is the shipped recipe itself" in failing("recipes", "copy", "xl4", "--force")
    assert RECIPES["xl4"].read_text() == before


def test_finetune_takes_a_name(tmp_path, failing, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shipped.find_recipe(shipped.Path("b4")) == RECIPES["b4"]
    assert "DiT-B-2-256.pt: no such file" in failing("finetune", "b4")
    assert "upcycle finetune b4, or copy it" in failing("finetune", "recipes/b4.yaml")
    assert "did you mean b4?" in failing("finetune", "b5")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "b4.yaml").write_text("- no mapping")
    assert "recipes/b4.yaml must be a mapping" in failing("finetune", "b4"), "one's own copy goes first"
    (tmp_path / "b4").write_text("- no mapping")
    assert "recipe b4 must be a mapping" in failing("finetune", "b4")


# -- the docs ---------------------------------------------------------------------------------------------------------


def documented():
    """{group of options: {key: default}} of the tables in docs/recipes.md."""
    sections = re.split(r"^#+ ", (ROOT / "docs" / "recipes.md").read_text(), flags=re.MULTILINE)
    tables = {}
    for section in sections:
        title = section.partition("\n")[0].strip("` ")
        rows = re.findall(r"^\| `(\w+)` \| (.*?) \| .*\|$", section, flags=re.MULTILINE)
        tables[title] = dict(rows)
    return tables


def shown_default(field):
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, BaseModel):
        return "below"
    if value is None:
        return "–"
    if isinstance(value, str):
        return f"`{value}`"
    value = list(value) if isinstance(value, tuple) else value
    return "`" + yaml.safe_dump(value, default_flow_style=True).removesuffix("\n").removesuffix("\n...") + "`"


def groups(model, title):
    yield title, model
    for key, field in model.model_fields.items():
        if inner := _group(field.annotation):
            yield from groups(inner, key)


GROUPS = dict(groups(Recipe, "The run"))


@pytest.mark.parametrize("title", GROUPS)
def test_docs_list_every_key_with_its_default(title):
    assert documented()[title] == {key: shown_default(field) for key, field in GROUPS[title].model_fields.items()}


@pytest.fixture(scope="module")
def thousand_classes(tmp_path_factory):
    """A tiny teacher with ImageNet's number of classes, to stand in for the real ones."""
    folder = tmp_path_factory.mktemp("thousand") / "tiny-dit"
    tiny.save_pipeline(folder, tiny.make_dit(0, classes=1000))
    return folder


@each_teacher
def test_dry_run(name, thousand_classes):
    """What `upcycle finetune NAME --dry-run` says, with a tiny teacher and without the data."""
    overrides = [f"teacher={thousand_classes}", "vae=null", "data=not-there", "validation=null"]
    recipe = load_recipe(RECIPES[name], overrides)
    facts = cost.estimate(recipe, measure=False)
    assert [stage["name"] for stage in facts["stages"]] == [stage.name for stage in recipe.stages]
    assert facts["disk"]["checkpoint"] > 0
