"""`upcycle inspect`: its numbers against exact ones, and a page that needs nothing else."""

import base64
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import inside
from PIL import Image

from upcycle.inspection.look import batches, look_at_latents, look_at_sampling, look_at_tail_drops, spearman
from upcycle.models.chunked_dit import local_detail
from upcycle.sampling.draw import TokenCounter, draw
from upcycle.sampling.pipeline import load_pipeline
from upcycle.sampling.sampler import Sampling

LABELS, STEPS, GUIDANCE = [1, 1, 3, 3], 5, 2.0


@pytest.fixture(scope="module")
def student(export_dir, tmp_path_factory):
    """An export without training wheels: its router keeps more where there is more detail."""
    folder = shutil.copytree(export_dir, tmp_path_factory.mktemp("inspect") / "student")
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "guide": 0.0}))
    return folder


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("real") / "images"
    random = np.random.default_rng(0)
    for name in ("label 2", "7"):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(random.integers(0, 256, (140, 150, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def inspected(student, images, tmp_path_factory):
    """The folder that the command makes, and what it prints."""
    out = tmp_path_factory.mktemp("out") / "inspection"
    done = inside(
        "inspect", student, "--classes", "1,label 3", "--num", 2, "--seed", 5, "--steps", STEPS, "--guidance-scale",
        GUIDANCE, "--batch-size", 2, "-o", out, "--json",
    )  # fmt: skip
    real = tmp_path_factory.mktemp("out") / "real"
    also = inside("inspect", student, "--images", images, "--timesteps", "0,900,300", "--num", 2, "--steps", 2,
                  "--guidance-scale", 1, "-o", real, "--json")  # fmt: skip
    return out, json.loads(done.stdout), real, json.loads(also.stdout)


class Page(HTMLParser):
    """Tags with attributes, and those that are not closed as they should be."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def test_tokens_are_those_of_the_stock_pipeline(inspected, student):
    _, report, _, _ = inspected
    pipe = load_pipeline(str(student))
    pipe.set_progress_bar_config(disable=True)
    kept = []
    for rows in batches(4, 2):
        counter = TokenCounter(pipe.transformer, 2)
        draw(pipe, [LABELS[i] for i in rows], [5 + i for i in rows], STEPS, GUIDANCE)
        counter.remove()
        kept.append(torch.tensor(counter.kept))
    kept = torch.cat(kept, 1).double()
    seen = report["samples"]
    assert kept.min() < kept.max(), "a router that decides"
    assert [step["t"] for step in seen["steps"]] == counter.timesteps
    assert [step["tokens"] for step in seen["steps"]] == kept.mean(1).tolist()
    assert [step["tokens_deviation"] for step in seen["steps"]] == pytest.approx(kept.std(1).tolist())
    assert [step["tokens_least"] for step in seen["steps"]] == kept.amin(1).tolist()
    assert [step["tokens_most"] for step in seen["steps"]] == kept.amax(1).tolist()
    assert seen["tokens"] == kept.mean().item()
    assert {row["class"]: row["tokens"] for row in seen["classes"]} == {
        1: kept[:, :2].mean().item(), 3: kept[:, 2:].mean().item()
    }  # fmt: skip
    assert all(0 < step["ms_per_image_least"] <= step["ms_per_image"] for step in seen["steps"])


def test_tail_drops_of_the_report_are_those_of_the_paper(inspected):
    _, report, _, _ = inspected
    rows = report["samples"]["tail_drops"]
    natural = {row["t"]: row["tokens"] for row in rows if row["tail_drop"] == 0}
    assert len(natural) == 4
    for row in rows:
        dropped = int(torch.tensor(float(natural[row["t"]])) * torch.tensor(row["tail_drop"]))
        assert row["tokens"] == natural[row["t"]] - dropped
        assert (row["noise_change"] > 0) == (dropped > 0)
    assert len({row["tokens"] for row in rows}) > 4


def test_a_grid_keeps_what_it_keeps(pipeline_dir, tmp_path):
    inside("convert", pipeline_dir, "--ratio", "4", "--router", "grid", "--no-verify", "-o", tmp_path / "grid")
    pipe = load_pipeline(str(tmp_path / "grid"))
    seen = look_at_sampling(pipe, [0, 1, 2], [0, 1, 2], Sampling(3, 2.0), 2)
    assert seen.kept.shape == (3, 3)
    assert (seen.kept == 64).all()
    assert (seen.mask == (seen.probability > 0.5)).all()
    natural = look_at_tail_drops(pipe, seen)
    assert natural.mask[:, 0].equal(seen.mask[0, [0, 1, 2]])
    pipe.transformer.set_tokens(40)
    fixed = look_at_sampling(pipe, [0, 1, 2], [0, 1, 2], Sampling(3, 2.0), 2)
    assert (fixed.kept == 40).all()
    assert look_at_tail_drops(pipe, seen).mask.equal(natural.mask), "whatever the budget is"
    assert pipe.transformer.tokens == 40


def test_real_images_are_noised_as_the_schedule_says(student):
    pipe = load_pipeline(str(student))
    generator = torch.Generator().manual_seed(1)
    clean = torch.randn(3, 4, 16, 16, generator=generator)
    seen = look_at_latents(pipe, clean, [0, 1, 2], [7, 8, 9], [900, 0], 2)
    for s, seed in enumerate((7, 8, 9)):
        noise = torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(seed))
        for k, t in enumerate((900, 0)):
            signal = pipe.scheduler.alphas_cumprod[t]
            x_t = signal.sqrt() * clean[s] + (1 - signal).sqrt() * noise
            assert torch.equal(seen.x_t[s, k], x_t)
            with torch.inference_mode():
                answer = pipe.transformer(x_t[None], torch.tensor(t), torch.tensor([s]))
            assert int(answer.routing.mask.sum()) == seen.kept[k, s]
            detail = local_detail(clean[s : s + 1], torch.ones(1))
            expected = spearman(answer.routing.probability, detail)[0]
            assert seen.correlation[k, s] == pytest.approx(expected.item(), abs=1e-6)


def test_spearman():
    ordered = torch.arange(5.0)
    assert spearman(ordered, ordered**3) == pytest.approx(1)
    assert spearman(ordered, -ordered.exp()) == pytest.approx(-1)
    # Ranks 0, 1.5, 1.5, 3 and 0, 2, 1, 3: 4.5 / sqrt(4.5 * 5).
    tied, other = torch.tensor([1.0, 2, 2, 3]), torch.tensor([10.0, 30, 20, 40])
    both = spearman(torch.stack([tied, torch.ones(4)]), other.expand(2, -1))
    assert both[0].item() == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert both[1].isnan()


def test_batches_are_alike():
    assert [len(rows) for rows in batches(17, 8)] == [5, 6, 6]
    assert [i for rows in batches(17, 8) for i in rows] == list(range(17))


def test_the_page_needs_nothing_else(inspected):
    for folder in (inspected[0], inspected[2]):
        text = (folder / "report.html").read_text()
        page = Page(text)
        assert not page.open
        pictures = {path.read_bytes(): path.name for path in folder.glob("*.png")}
        shown = page.all("img")
        assert len(shown) == len(pictures)
        for picture in shown:
            kind, data = picture["src"].split(",", 1)
            assert kind == "data:image/png;base64"
            assert pictures.pop(base64.b64decode(data)), "the file beside it"
            assert len(picture["alt"]) > 40
        assert not re.search(r"https?:|//|url\(|@import|<script", re.sub(r"base64,[^\"]*|<code>.*?</code>", "", text))
        assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
        assert "max-width: 100%" in text


def test_files(inspected):
    out, report, real, also = inspected
    assert json.loads((out / "report.json").read_text()) == report
    curves = {f"samples-{name}.png" for name in ("tokens", "detail", "tail-drop", "classes")}
    maps = {"samples-map-class0001-seed5.png", "samples-map-class0003-seed7.png", "samples-map-class0003-seed8.png"}
    assert {path.name for path in out.iterdir()} == {"report.html", "report.json", *curves, *maps}
    assert [step["t"] for step in also["images"]["steps"]] == [900, 300, 0]
    assert [(row["class"], row["images"]) for row in also["images"]["classes"]] == [(2, 2), (7, 2)]
    assert (real / "images-map-1.png").is_file()
    for path in (*out.glob("*.png"), *real.glob("*.png")):
        assert len(Image.open(path).convert("L").getcolors(256)) > 20, "a picture, not a blank page"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser here")
def test_in_a_browser_as_wide_as_a_phone(inspected, tmp_path):
    """No error in the console, every figure there, and nothing to scroll sideways."""
    for folder in (inspected[0], inspected[2]):
        text = html.escape((folder / "report.html").read_text())
        look = (
            "const d = f.contentDocument, i = [...d.images];"
            "document.title = [d.documentElement.scrollWidth - d.documentElement.clientWidth, i.length,"
            "i.filter(x => x.complete && x.naturalWidth && x.width > 330 && x.width <= 400).length].join(' ')"
        )
        frame = f'<iframe id="f" style="width: 400px; border: 0" srcdoc="{text}" onload="{html.escape(look)}"></iframe>'
        (tmp_path / "phone.html").write_text(f"<!doctype html><meta charset='utf-8'><title></title>{frame}")
        done = subprocess.run(
            ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--enable-logging=stderr",
             "--disable-background-networking", "--disable-component-update", "--disable-sync", "--dump-dom",
             f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "phone.html").as_uri()],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert "CONSOLE" not in done.stderr
        beyond, count, fine = map(int, re.search(r"<title>([\d ]+)</title>", done.stdout)[1].split())
        assert beyond == 0
        assert count == fine == len(list(folder.glob("*.png")))


def test_bad_input(failing, pipeline_dir, student, images, tmp_path):
    out = ("-o", tmp_path / "out")
    assert "no router" in failing("inspect", pipeline_dir, *out)
    assert "0 to 999" in failing("inspect", student, "--timesteps", "900,1000", *out)
    assert "less than 1" in failing("inspect", student, "--tail-drop", "1", *out)
    assert "no image of the classes" in failing("inspect", student, "--images", images, "--classes", "0", *out)
    assert "no such folder" in failing("inspect", student, "--images", tmp_path / "none", *out)
    wrong = shutil.copytree(images, tmp_path / "wrong")
    (wrong / "7").rename(wrong / "cat")
    assert "cat is no class of this model" in failing("inspect", student, "--images", wrong, *out)
    damaged = shutil.copytree(images, tmp_path / "damaged")
    (damaged / "7" / "0.png").write_bytes(b"no image")
    line = failing("inspect", student, "--images", damaged, "--steps", "1", "--num", "1", "--classes", "7", *out)
    assert "7/0.png cannot be read" in line
    assert not (tmp_path / "out").exists()


def test_force_replaces_a_report_and_nothing_else(inspected, student, tmp_path, failing):
    out = shutil.copytree(inspected[0], tmp_path / "out")
    given = ("inspect", student, "--classes", "0", "--num", "1", "--steps", "1", "--guidance-scale", "1", "-o", out)
    assert "--force" in failing(*given)
    done = inside(*given, "--force", "--tokens", "0:96,500:32")
    assert json.loads((out / "report.json").read_text())["budget"] == "0:96,500:32 tokens"
    assert "report.html" in done.stdout
    assert (out / "samples-map-class0000-seed0.png").is_file()
    assert not (out / "samples-map-class0001-seed5.png").exists()
    (out / "notes.txt").write_text("mine")
    assert "notes.txt" in failing(*given, "--force")
