"""The model card: complete and true, and what people write into it stays."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from fake_hub import FakeHub
from huggingface_hub import ModelCard, ModelCardData
from hypothesis import given, settings
from hypothesis import strategies as st
from worker import Worker

from upcycle import provenance
from upcycle.errors import UpcycleError
from upcycle.hub.card import NOT_MEASURED, Card, edited_parts, make_card, render
from upcycle.hub.check import Export
from upcycle.hub.licence import IDENTIFIERS, PERMISSIVE
from upcycle.sources import open_source
from upcycle.training.digits import TEACHER

CARD = Card({"license": "mit", "tags": ["a", "b"], "pipeline_tag": "x"}, {name: f"## {name}\n\nold" for name in "pqr"})
NEXT = Card({"license": "mit", "tags": ["c"], "library": "d"}, {name: f"## {name}\n\nnew" for name in "pqrs"})


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def section(text: str, name: str) -> str:
    found = re.findall(rf"<!-- upcycle: {name} -->\n(.*?)\n<!-- /upcycle: {name} -->", text, re.DOTALL)
    assert len(found) == 1, f"{name} is there {len(found)} times"
    return found[0]


# -- merging ----------------------------------------------------------------------------------------------------------

# Text that people write, on lines of its own: no marker, no line that ends the metadata.
LINES = st.lists(
    st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=30).filter(lambda s: s.strip()[:3] != "---"),
    min_size=1,
    max_size=4,
).map(lambda lines: "\n".join(line.strip() or "word" for line in lines))
PLAIN = st.none() | st.booleans() | st.integers() | st.dates() | st.floats(allow_nan=False) | st.text(max_size=9)
VALUES = PLAIN | st.lists(PLAIN, max_size=3) | st.dictionaries(st.text(max_size=5), PLAIN, max_size=3)


def test_unedited_text_is_brought_up_to_date():
    first = render(CARD)
    assert front(first) == CARD.metadata
    assert edited_parts(CARD, first) == []
    assert render(CARD, first) == first, "again changes nothing"
    second = render(NEXT, first)
    assert front(second) == NEXT.metadata, "what we wrote and no longer say is gone"
    assert [section(second, name) for name in "pqrs"] == [f"## {name}\n\nnew" for name in "pqrs"]
    assert render(NEXT, second) == second == render(NEXT)


@settings(max_examples=60, deadline=None)
@given(LINES, LINES, LINES, st.sampled_from("pqr"))
def test_text_of_people_stays(above, between, below, name):
    first = render(CARD)
    edited = first.replace(f"<!-- upcycle: {name} -->", f"{between}\n<!-- upcycle: {name} -->")
    edited = edited.replace("---\n\n", f"---\n\n{above}\n\n", 1) + f"\n{below}\n"
    for card in (CARD, NEXT, NEXT):
        edited = render(card, edited)
        for text in (above, between, below):
            assert text.strip() in edited
        assert section(edited, name) == card.sections[name]
    assert render(NEXT, edited) == edited


@settings(max_examples=60, deadline=None)
@given(LINES, st.sampled_from("pqr"))
def test_an_edited_section_stays_and_the_others_do_not(text, name):
    edited = render(CARD).replace(f"## {name}\n\nold", text)
    assert edited_parts(CARD, edited) == [name]
    for _ in range(2):
        edited = render(NEXT, edited)
        assert section(edited, name) == text
        assert edited_parts(NEXT, edited) == [name]
    for other in set("pqrs") - {name}:
        assert section(edited, other) == NEXT.sections[other]


@pytest.mark.parametrize("name", "pqr")
def test_a_removed_section_stays_removed(name):
    edited = re.sub(rf"<!-- upcycle: {name} -->.*?<!-- /upcycle: {name} -->\n*", "", render(CARD), flags=re.DOTALL)
    for _ in range(2):
        assert edited_parts(NEXT, edited) == [name]
        edited = render(NEXT, edited)
        assert f"## {name}" not in edited
    emptied = render(CARD).replace(f"## {name}\n\nold\n", "")
    assert f"## {name}" not in render(NEXT, emptied)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["tags", "pipeline_tag", "language", "datasets"]), VALUES.filter(lambda value: value != "x"))
def test_edited_metadata_stays(key, value):
    text = render(CARD)
    metadata = {**front(text), key: value}
    edited = text.replace(yaml.safe_dump(CARD.metadata, sort_keys=False), yaml.safe_dump(metadata, sort_keys=False))
    for _ in range(2):
        edited = render(NEXT, edited)
        assert front(edited)[key] == value
        assert front(edited)["library"] == "d"
    assert render(NEXT, edited) == edited


def test_removed_metadata_stays_removed_but_not_the_licence():
    text = render(CARD)
    edited = re.sub(r"tags:\n(- \w\n)+", "", text).replace("license: mit\n", "")
    assert "tags" not in front(edited)
    again = render(NEXT, edited)
    assert "tags" not in front(again)
    assert front(again)["license"] == "mit"


@pytest.mark.parametrize(
    ("ours", "theirs", "result"),
    [
        ({"license": "cc-by-nc-4.0"}, {"license": "mit"}, {"license": "cc-by-nc-4.0"}),
        (
            {"license": "other", "license_name": "their-own"},
            {"license": "mit"},
            {"license": "other", "license_name": "their-own"},
        ),
        (
            {"license": "other", "license_name": "their-own"},
            {"license": "other", "license_name": "mine", "license_link": "LICENSE"},
            {"license": "other", "license_name": "their-own", "license_link": "LICENSE"},
        ),
        # Who has looked up what its base does not say may state it.
        ({"license": "other", "license_name": "unknown"}, {"license": "mit"}, {"license": "mit"}),
    ],
)
def test_only_an_unknown_licence_can_be_changed(ours, theirs, result):
    card = Card(ours, CARD.sections)
    text = render(card).replace(yaml.safe_dump(ours, sort_keys=False), yaml.safe_dump(theirs, sort_keys=False))
    assert front(text) == theirs
    assert front(render(card, text)) == result


@pytest.mark.parametrize(
    "existing",
    [
        "",
        "# Just text\n",
        "---\nlanguage: en\n---\n# With metadata\n",
        "\ufeff---\r\nlanguage: en\r\n---\r\n# From Windows\r\n",
        "---\n---\n# Empty metadata\n\nabove\n\n---\n\nbelow\n",
        "---\nA line between rulers\n---\nand text\n",
        "---\nlanguage: en\n---",
        "# Text\n\n---\n\nwith a ruler\n\n---\n",
        "# Broken record\n\n<!-- upcycle card {not JSON} -->\n",
        '# Other record\n\n<!-- upcycle card {"metadata": []} -->\n',
    ],
)
def test_cards_that_we_did_not_write(existing):
    text = render(CARD, existing)
    for line in existing.replace("\r", "").replace("\ufeff", "").splitlines():
        assert line in text or "upcycle card" in line
    assert front(text).items() >= CARD.metadata.items()
    assert front(text).get("language") == ("en" if "language" in existing else None)
    assert [section(text, name) for name in "pqr"] == list(CARD.sections.values())
    assert render(CARD, text) == text
    assert edited_parts(CARD, existing) == []


def test_windows_line_ends_are_no_edit():
    text = render(CARD)
    assert render(NEXT, text.replace("\n", "\r\n")) == render(NEXT, text)
    assert edited_parts(CARD, text.replace("\n", "\r\n")) == []


def test_metadata_that_is_no_yaml():
    for bad in ("---\nlicense: [mit\n---\n", "---\na: b: c\n---\n"):
        with pytest.raises(UpcycleError, match="not valid YAML"):
            render(CARD, bad)


# -- content ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub() -> Iterator[FakeHub]:
    with FakeHub() as server:
        yield server


@pytest.fixture(scope="module")
def worker(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    with Worker(hub, tmp_path_factory.mktemp("home")) as process:
        yield process


@pytest.fixture(scope="module")
def digits(worker: Worker, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "digits"
    done = worker.run("convert", TEACHER, "--ratio", 8, "--no-verify", "-o", folder)
    assert done.code == 0, done.err
    return folder


def card_of(folder: Path, **changes) -> str:
    """The card of an export whose `upcycle.json` is changed so."""
    source = open_source(str(folder))
    origin = {**source.origin, **changes}
    files = {name: (folder / name).stat().st_size for name in provenance.content(folder)}
    changed = Export(folder, type(source)(**{**vars(source), "origin": origin}), files)
    return render(make_card(changed, "me/digits"))


@pytest.mark.parametrize(
    ("exact", "says"),
    [(True, "computes what its teacher computes"), (False, "far from its teacher's"), (None, "by rule.")],
)
def test_what_an_untrained_model_is(digits, exact, says):
    """Known from the conversion itself, also where it was not verified."""
    history = open_source(str(digits)).origin["history"]
    assert history[0]["exact"] is False, "at ratio 8"
    limits = section(card_of(digits, history=[{**history[0], "exact": exact}], evidence=[]), "limits")
    assert f"has not been post-trained: {'its' if not exact else 'it'}" in limits
    assert says in limits


def test_odd_histories_of_strangers(digits):
    """Fields that are null or alone say nothing, and no text of theirs gets into the metadata."""
    for event in ({"what": "x", "steps": None}, {"what": "x", "student_revision": "abc"},
                  {"what": "x", "student_revision": "abc", "student": "no id: <b>"}):  # fmt: skip
        text = card_of(digits, history=[event])
        assert "base_model" not in text.split("---")[1]
        assert "**x**" in section(text, "made")


def test_what_was_not_measured_is_not_claimed(digits):
    text = card_of(digits)
    assert f"| FID | | {NOT_MEASURED} | {NOT_MEASURED} | |" in text
    assert f"| IS | | {NOT_MEASURED} | {NOT_MEASURED} | |" in text
    assert f"Speed: {NOT_MEASURED}." in text
    assert "none were drawn" in section(text, "pictures")
    assert "model-index" not in front(text)
    assert "not been post-trained" in section(text, "limits")
    assert "not trained for it" in section(text, "budget")
    assert f"with Lite-CFG: {NOT_MEASURED}" in section(text, "budget")
    assert "base_model" not in front(text), "a local base is none on the Hub"
    assert str(TEACHER) not in section(text, "summary"), "paths of somebody's disk say nothing"
    history = open_source(str(digits)).origin["history"][0]
    made = section(text, "made")
    assert history["command"] in made
    assert f"upcycle {history['versions']['upcycle']}, torch {history['versions']['torch']}" in made
    assert "seed 0" in made
    assert "one of 8 of the 16×16 positions of a latent as tokens, 32 on average." in section(text, "summary")
    rows = re.findall(r"^\| ([\d.]+) \| ([\d.e+-]+) \|$", section(text, "cost"), re.MULTILINE)
    assert [rho for rho, _ in rows] == ["0", "0.3", "0.6"]
    assert [float(value) for _, value in rows] == sorted((float(value) for _, value in rows), reverse=True)


LOSS = {
    "metric": "ε-MSE on held-out data",
    "better": "lower",
    "student": 0.012345678,
    "teacher": 0.0125,
    "settings": {"data": "/home/somebody/a|b", "samples": 100, "tail_drop": 0},
}
SPEED = {
    "metric": "seconds per image",
    "better": "lower",
    "student": 0.5,
    "teacher": None,
    "settings": {"steps": 50, "machine": "a fast one"},
}


def test_evidence_is_shown_with_its_settings(digits):
    text = card_of(digits, evidence=[LOSS, SPEED, {**LOSS, "metric": "FID", "student": None}])
    quality = section(text, "quality")
    assert "| ε-MSE on held-out data | lower is better | 0.01235 | 0.0125 | data a&#124;b, samples 100" in quality
    assert f"| FID | lower is better | {NOT_MEASURED} | 0.0125 |" in quality, "a NaN is no measurement"
    assert "| IS | |" in quality
    assert "seconds per image" not in quality
    speed = f"| seconds per image | lower is better | 0.5 | {NOT_MEASURED} | steps 50, machine a fast one |"
    assert speed in section(text, "cost")
    assert "/home/somebody" not in text
    for row in (line for line in text.splitlines() if line.startswith("| ") and "measured" not in line[:10]):
        assert row.count("|") in (3, 6), row

    data = ModelCard(text).data
    assert isinstance(data, ModelCardData)
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == (LOSS["metric"], LOSS["student"])
    assert (result.dataset_name, result.task_type) == ("a|b", "unconditional-image-generation")
    assert data.model_name == "digits"
    assert yaml.safe_load(data.to_yaml())["model-index"] == front(text)["model-index"]


def test_a_base_of_the_hub_is_named(digits):
    base = {"id": "facebook/DiT-XL-2-256", "kind": "diffusers", "revision": "a" * 40, "licence": "cc-by-nc-4.0"}
    text = card_of(digits, base=base)
    assert front(text)["base_model"] == base["id"]
    assert front(text)["base_model_relation"] == "finetune"
    assert "(https://huggingface.co/facebook/DiT-XL-2-256)" in section(text, "summary")
    assert f"`{base['id']}` at revision `{'a' * 40}`" in section(text, "made")
    assert "non-commercial use only" in section(text, "licence")
    unknown = card_of(digits, base={"id": None, "kind": None, "revision": None, "licence": None}, history=[])
    assert "a DiT that its files do not name" in unknown
    assert "Not recorded." in unknown


def test_licence_identifiers():
    assert set(IDENTIFIERS) >= PERMISSIVE
    assert not any("-nc" in name or "-nd" in name for name in PERMISSIVE)


# -- the code in it ---------------------------------------------------------------------------------------------------


def test_the_six_lines_of_a_pushed_card_run_as_they_stand(hub, worker, world, tmp_path):
    """And those about tail drop and Lite-CFG after them."""
    worker.run("convert", world / "teacher", "--no-verify", "-o", tmp_path / "small")
    assert worker.run("push-to-hub", tmp_path / "small", "--yes", "--accept-license").code == 0
    text = hub.repos["me/small"].files()["README.md"].decode()
    (use,) = re.findall(r"```python\n(.*?)```", section(text, "use"), re.DOTALL)
    assert len([line for line in use.splitlines() if line]) == 6
    (budget,) = re.findall(r"```python\n(.*?)```", section(text, "budget"), re.DOTALL)
    fresh = subprocess.run(
        [sys.executable, "-I", "-c", use + budget + "images = pipe(class_labels=[1], num_inference_steps=2).images"],
        env=hub.env(tmp_path / "home", HF_MODULES_CACHE=str(tmp_path / "modules"), OMP_NUM_THREADS="1"),
        cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert fresh.returncode == 0, fresh.stderr[-3000:]
    assert (tmp_path / "sample.png").read_bytes().startswith(b"\x89PNG")
