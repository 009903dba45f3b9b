"""Recipes: strict, every mistake at once, and every shipped one valid."""

import contextlib

import pytest
import yaml
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from upcycle.errors import UpcycleError
from upcycle.recipe import Recipe, Stage, load_recipe, parse_recipe
from upcycle.training import schedule

LEAST = {"teacher": "digits", "data": "digits", "out": "runs/x", "stages": [{"name": "post-train", "steps": 100}]}


def staged(**changes):
    """With changes to its one stage."""
    return {**LEAST, "stages": [{**LEAST["stages"][0], **changes}]}


@pytest.fixture
def recipe_file(tmp_path):
    """The least recipe as a file, with lines of YAML after it."""

    def write(*lines):
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(LEAST) + "\n".join(lines))
        return tmp_path / "r.yaml"

    return write


def test_all_mistakes_at_once_with_the_nearest_right_name():
    stage = {"steps": "many", "losses": {"distil": 1.0}, "freeze": ["blocks", "nose"], "anneall": {}, "lr": -1}
    wrong = {**staged(**stage), "bacth_size": 3, "optimizer": {"betaz": 1, "clip": -1}}
    wrong["validation"] = {"data": "d", "evry": 3}
    del wrong["out"]
    with pytest.raises(UpcycleError) as error:
        parse_recipe(wrong, "r.yaml")
    line = str(error.value)
    assert "\n" not in line
    for part in ("'out' is missing", "'stages.0.steps' is 'many'", "'bacth_size', did you mean 'batch_size'?",
                 "'optimizer.betaz', did you mean 'betas'?", "'optimizer.clip' is -1", "'stages.0.lr' is -1",
                 "'stages.0.losses.distil', did you mean 'distill'?", "stages.0.freeze.1",
                 "'stages.0.anneall', did you mean 'anneal'?", "'validation.evry', did you mean 'every'?"):  # fmt: skip
        assert part in line


@pytest.mark.parametrize("key", ["steps", "lr", "losses", "anneal", "tail_drop", "freeze", "warmup", "schedule"])
def test_keys_of_a_stage_are_sent_there(key):
    """Also those that recipes had under `optimizer` before there were stages."""
    for wrong, where in (({key: 1}, key), ({"optimizer": {key: 1}}, f"optimizer.{key}")):
        with pytest.raises(UpcycleError) as error:
            parse_recipe({**LEAST, **wrong}, "r.yaml")
        hint = f"it belongs to a stage: stages: [{{name: post-train, {key}: ...}}]"
        assert str(error.value) == f"recipe r.yaml: unknown key '{where}', {hint}"


def test_stages_have_names_of_their_own():
    stages = [{"name": name, "steps": 1} for name in ("align", "post-train", "align")]
    with pytest.raises(UpcycleError, match="the name align is given twice"):
        parse_recipe({**LEAST, "stages": stages}, "r.yaml")
    with pytest.raises(UpcycleError, match=r"'stages.1.name' is missing"):
        parse_recipe({**LEAST, "stages": [stages[0], {"steps": 1}]}, "r.yaml")
    with pytest.raises(UpcycleError, match="at least 1 item"):
        parse_recipe({**LEAST, "stages": []}, "r.yaml")
    assert parse_recipe({**LEAST, "stages": stages[:2]}, "r.yaml").steps == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n- b", "mapping"),
        ("a: [", "not YAML"),
        ("", "mapping"),
        ("\x00", "not YAML"),
        ("a: " + "[" * 5000, "nested too deeply"),
        ("a: 2026-13-40", "not YAML"),
        ("seed: 3\nout: x\nseed: 4", "the key 'seed' is given twice"),
        ("stages: [{losses: {ratio: 1, ratio: 2}}]", "the key 'ratio' is given twice"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, text, says):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UpcycleError, match=says):
        load_recipe(tmp_path / "r.yaml")


def test_overrides(recipe_file):
    path = recipe_file("optimizer: {clip: 0.5}")
    sets = ["stages.post-train.steps=7", "stages.0.losses.ratio=0.5", "stages.0.lr=3e-4", "convert.ratio=8", "seed=5"]
    recipe = load_recipe(path, [*sets, "optimizer.weight_decay=0.1"])
    (stage,) = recipe.stages
    assert (stage.steps, stage.losses.ratio, stage.lr, recipe.convert.ratio, recipe.seed) == (7, 0.5, 3e-4, 8, 5)
    assert (recipe.optimizer.clip, recipe.optimizer.weight_decay) == (0.5, 0.1)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("steps", "not of the form key=value"),
        ("=3", "not of the form key=value"),
        ("steps=7", "unknown key 'steps', it belongs to a stage"),
        ("steps.x=1", "unknown key 'steps', it belongs to a stage"),
        ("seed=[", "--set seed=[ is not YAML"),
        ("seed=" + "[" * 5000, "nested too deeply"),
        ("stages.align.lr=1", "there is no stage align; there are post-train"),
        ("stages.1.lr=1", "there is no stage 1; there are post-train"),
        ("stages.².lr=1", "there is no stage ²; there are post-train"),
        ("stages.0=1", "stages is not a group of options"),
        ("teacher.x=1", "teacher is not a group of options"),
        ("stages.post-train.lrr=1", "unknown key 'stages.0.lrr', did you mean 'lr'?"),
        ("stages.post-train.losses.ratoi=1", "'stages.0.losses.ratoi', did you mean 'ratio'?"),
    ],
)
def test_overrides_that_are_refused(recipe_file, override, says):
    with pytest.raises(UpcycleError) as error:
        load_recipe(recipe_file(), [override])
    assert says in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (staged(steps=True), "'stages.0.steps' is True"),
        (staged(lr=True), "'stages.0.lr' is True"),
        ({"optimizer": {"clip": True}}, "'optimizer.clip' is True"),
        ({"optimizer": {"betas": [0.9, 1.0]}}, "'optimizer.betas.1' is 1.0"),
        ({"optimizer": {"betas": [-0.1, 0.9]}}, "'optimizer.betas.0' is -0.1"),
        (staged(tail_drop={"values": [False]}), "'stages.0.tail_drop.values' is [False]"),
        (staged(steps=0), "'stages.0.steps' is 0"),
        (staged(freeze=["nose"]), "'stages.0.freeze.0' is 'nose'"),
        ({"seed": -1}, "'seed' is -1"),
        ({"seed": 2**32}, "'seed' is 4294967296"),
        ({"out": ""}, "'out' is ''"),
        ({"heads": 0}, "'heads' is 0"),
        ({"convert": {"revision": "main"}}, "unknown key 'convert.revision'"),
        ({"student": "a", "vae": "b"}, "leave out 'vae'"),
        ({"student": "a", "convert": {"ratio": 4}}, "not both"),
        ({"export": "best"}, "needs 'validation' to judge by"),
        ({"trackers": ["mlflow"]}, "'trackers.0' is 'mlflow'"),
        (staged(losses={"diffusion": 0, "distill": 0, "min_snr": 5}), "min_snr weighs diffusion and distill"),
        (staged(losses={"diffusion": 0, "distill": 0, "balanced": True}), "balanced weighs diffusion and distill"),
        (staged(losses={"min_snr": 5, "balanced": True}), "two weights of the same losses"),
        (staged(losses={"distill": 0}, teacher_guidance=2), "teacher_guidance is for the loss distill"),
        (staged(losses=dict.fromkeys(["diffusion", "variational", "distill", "ratio", "router"], 0)), "every loss"),
    ],
)
def test_values_that_would_fail_later(wrong, says):
    with pytest.raises(UpcycleError) as error:
        parse_recipe({**LEAST, **wrong}, "r.yaml")
    assert says in str(error.value)


def test_an_unquoted_no_is_a_precision(recipe_file):
    """YAML reads it as false; a flag stays a flag."""
    path = recipe_file("mixed_precision: no", "teacher_precision: no")
    recipe = load_recipe(path, ["gradient_checkpointing=yes"])
    assert recipe.teacher_precision == "no"
    assert (recipe.mixed_precision, recipe.gradient_checkpointing) == ("no", True)


@settings(max_examples=50, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=5),
        lambda children: (
            st.dictionaries(st.sampled_from([*Recipe.model_fields, *Stage.model_fields, "x"]), children, max_size=4)
            | st.lists(children, max_size=3)
        ),
        max_leaves=12,
    )
)
def test_nothing_but_a_clear_error(content):
    if isinstance(content, dict):
        with contextlib.suppress(UpcycleError):
            assert isinstance(parse_recipe(content, "r.yaml"), Recipe)


SHAPE = st.tuples(st.integers(1, 900), st.none() | st.floats(0, 1), st.integers(0, 100))


@given(st.lists(SHAPE, min_size=1, max_size=4))
def test_annealing_ends_and_never_rises(shapes):
    stages = [
        {"name": f"s{i}", "steps": steps, "anneal": {"until": until}, "warmup": warmup}
        for i, (steps, until, warmup) in enumerate(shapes)
    ]
    recipe = Recipe(**{**LEAST, "stages": stages})
    guides = [schedule.guide(recipe, step, 8.0) for step in range(recipe.steps + 1)]
    assert guides == sorted(guides, reverse=True)
    anneals = [until is not None for _, until, _ in shapes]
    assert guides[-1] == (0 if any(anneals) else 8)
    before = sum(steps for steps, _, _ in shapes[: anneals.index(True)]) if any(anneals) else recipe.steps
    assert set(guides[:before]) <= {8.0}, "until a stage anneals it"
    assert schedule.router_weight(recipe, recipe.steps) == pytest.approx(0.5 / 3)
    assert all(0 < schedule.learning_rate(recipe, step) <= 1e-4 for step in range(recipe.steps))


def test_the_demo_runs_the_digits_recipe():
    assert (ROOT / "upcycle/assets/digits/recipe.yaml").read_text() == (ROOT / "recipes/digits.yaml").read_text()
