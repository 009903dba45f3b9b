"""Recipes: strict, every mistake at once, and every shipped one valid."""

import contextlib

import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from upcycle.errors import UpcycleError
from upcycle.recipe import Recipe, load_recipe, parse_recipe
from upcycle.training import schedule

LEAST = {"teacher": "digits", "data": "digits", "out": "runs/x", "steps": 100}


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipe(path):
    recipe = load_recipe(path)
    assert recipe.steps > 0
    assert f"upcycle finetune recipes/{path.name}" in path.read_text(), "a recipe opens with the command that runs it"


def test_there_are_the_promised_recipes():
    assert {path.name for path in (ROOT / "recipes").glob("*.yaml")} >= {
        "digits.yaml",
        "xl4.yaml",
        "xl16.yaml",
        "b4.yaml",
    }


def test_all_mistakes_at_once_with_the_nearest_right_name():
    wrong = {
        **LEAST,
        "steps": "many",
        "bacth_size": 3,
        "optimizer": {"lrr": 1, "clip": -1},
        "losses": {"distil": 1.0},
        "freeze": ["blocks", "nose"],
    }
    del wrong["out"]
    with pytest.raises(UpcycleError) as error:
        parse_recipe(wrong, "r.yaml")
    line = str(error.value)
    assert "\n" not in line
    for part in ("'out' is missing", "'steps' is 'many'", "'bacth_size', did you mean 'batch_size'?",
                 "'optimizer.lrr', did you mean 'lr'?", "'optimizer.clip' is -1",
                 "'losses.distil', did you mean 'distill'?", "freeze.1"):  # fmt: skip
        assert part in line


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n- b", "mapping"),
        ("a: [", "not YAML"),
        ("", "mapping"),
        ("\x00", "not YAML"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a: 2026-13-40", "not YAML"),
        ("steps: 3\nout: x\nsteps: 4", "the key 'steps' is given twice"),
        ("losses: {ratio: 1, ratio: 2}", "the key 'ratio' is given twice"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, says):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UpcycleError, match=says):
        load_recipe(tmp_path / "r.yaml")


def test_overrides(tmp_path):
    (tmp_path / "r.yaml").write_text("\n".join(f"{k}: {v}" for k, v in LEAST.items()))
    recipe = load_recipe(tmp_path / "r.yaml", ["steps=7", "losses.ratio=0.5", "convert.ratio=8"])
    assert (recipe.steps, recipe.losses.ratio, recipe.convert.ratio) == (7, 0.5, 8)
    for bad in ("steps", "=3", "steps.x=1", "steps=[", "steps=" + "[" * 5000):
        with pytest.raises(UpcycleError):
            load_recipe(tmp_path / "r.yaml", [bad])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"steps": True}, "'steps' is True"),
        ({"optimizer": {"lr": True}}, "'optimizer.lr' is True"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "'optimizer.betas.1' is 1.0"),
        ({"optimizer": {"betas": [-0.1, 0.9]}}, "'optimizer.betas.0' is -0.1"),
        ({"tail_drop": {"values": [False]}}, "'tail_drop.values' is [False]"),
        ({"seed": -1}, "'seed' is -1"),
        ({"seed": 2**32}, "'seed' is 4294967296"),
        ({"out": ""}, "'out' is ''"),
        ({"heads": 0}, "'heads' is 0"),
        ({"convert": {"revision": "main"}}, "unknown key 'convert.revision'"),
        ({"student": "a", "vae": "b"}, "leave out 'vae'"),
    ],
)
def test_values_that_would_fail_later(wrong, says):
    with pytest.raises(UpcycleError) as error:
        parse_recipe({**LEAST, **wrong}, "r.yaml")
    assert says in str(error.value)


def test_an_unquoted_no_is_a_precision(tmp_path):
    """YAML reads it as false; a flag stays a flag."""
    (tmp_path / "r.yaml").write_text("\n".join(f"{k}: {v}" for k, v in LEAST.items()) + "\nmixed_precision: no\n")
    recipe = load_recipe(tmp_path / "r.yaml", ["gradient_checkpointing=yes"])
    assert (recipe.mixed_precision, recipe.gradient_checkpointing) == ("no", True)


@settings(max_examples=50, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda children: (
            st.dictionaries(st.sampled_from([*Recipe.model_fields, "lr", "x"]), children, max_size=4)
            | st.lists(children, max_size=3)
        ),
        max_leaves=12,
    )
)
def test_nothing_but_a_clear_error(content):
    if isinstance(content, dict):
        with contextlib.suppress(UpcycleError):
            assert isinstance(parse_recipe(content, "r.yaml"), Recipe)


@given(st.integers(1, 5000), st.floats(0, 1), st.integers(0, 100))
def test_annealing_ends_and_never_rises(steps, until, warmup):
    recipe = Recipe(**{**LEAST, "steps": steps, "anneal": {"until": until}, "optimizer": {"warmup": warmup}})
    guides = [schedule.guide(recipe, step, 8.0) for step in [*range(0, steps, max(1, steps // 50)), steps]]
    assert guides == sorted(guides, reverse=True)
    assert guides[-1] == 0
    assert guides[0] == (8.0 if until else 0.0)
    assert schedule.router_weight(recipe, steps) == pytest.approx(recipe.losses.router / 3)
    assert all(0 < schedule.learning_rate(recipe, step) <= recipe.optimizer.lr for step in range(min(steps, 50)))


def test_tail_drop_waits_and_then_draws_from_the_set():
    recipe = Recipe(**{**LEAST, "tail_drop": {"values": [0.0, 0.5], "start": 0.5}})
    drops = [schedule.tail_drop(recipe, step) for step in range(100)]
    assert set(drops[:50]) == {0.0}
    assert set(drops[50:]) == {0.0, 0.5}
    assert drops == [schedule.tail_drop(recipe, step) for step in range(100)]


def test_the_demo_runs_the_digits_recipe():
    assert (ROOT / "upcycle/assets/digits/recipe.yaml").read_text() == (ROOT / "recipes/digits.yaml").read_text()
