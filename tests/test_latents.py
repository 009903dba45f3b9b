"""`upcycle encode`, `upcycle synthesize` and the reader of what they write, on tiny data."""

import json
import os
import pickle
import signal
import sys
import time

import numpy as np
import pytest
import tiny
import torch
from conftest import run
from fake_hub import FakeHub
from PIL import Image
from processes import Process
from safetensors.torch import load_file, save_file

from upcycle.errors import UpcycleError
from upcycle.latents import folder as folder_module
from upcycle.latents.crop import center_crop
from upcycle.latents.reader import LatentFolder
from upcycle.latents.synthesize import sample_latents
from upcycle.sampling.bulk import label_and_seed
from upcycle.sampling.draw import draw
from upcycle.sampling.pipeline import load_pipeline
from upcycle.sources import DiTConfig
from upcycle.training.digits import TEACHER

SHARD = "00000.safetensors"


@pytest.fixture
def upcycle(capsys, monkeypatch):
    """Run the command line in this process; returns the JSON that it prints."""
    from upcycle.cli import main

    before = signal.getsignal(signal.SIGTERM)

    def run_here(*arguments):
        monkeypatch.setattr(sys, "argv", ["upcycle", *map(str, arguments), "--json"])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capsys.readouterr()
        assert exit_info.value.code in (0, None), captured.err
        return json.loads(captured.out)

    yield run_here
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    """A tiny AutoencoderKL with a shift, and its folder."""
    model = tiny.make_vae().eval()
    model.register_to_config(scaling_factor=0.5, shift_factor=0.25)
    model.save_pretrained(tmp_path_factory.mktemp("vae"), safe_serialization=True)
    return model, model._internal_dict.get("_name_or_path") or tmp_path_factory.getbasetemp() / "vae0"


def make_images(folder, count=4, size=(40, 56), classes=("cat", "ant", "bee")):
    """PNGs of smooth noise, ``count`` a class."""
    generator = np.random.default_rng(0)
    for name in classes:
        (folder / name / "deeper").mkdir(parents=True)
        for i in range(count):
            small = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            small.resize(size).save(folder / name / ("deeper" if i % 2 else ".") / f"{i}.png", compress_level=1)
    return folder


@pytest.fixture
def images(tmp_path):
    return make_images(tmp_path / "images")


def shards(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


# What is cut out of an image


def resample(pixels, height, width, kernel):
    """Filtering with a kernel on both axes, as a matrix product each; pixels [h, w, c]."""
    for axis, target in ((1, width), (0, height)):  # PIL rounds between the axes, too
        length = pixels.shape[axis]
        scale = length / target
        offsets = np.arange(length)[None] + 0.5 - ((np.arange(target) + 0.5) * scale)[:, None]
        weights = kernel(offsets / max(scale, 1))
        weights /= weights.sum(1, keepdims=True)
        mixed = np.moveaxis(np.tensordot(weights, pixels, (1, axis)), 0, axis)
        pixels = np.clip(np.floor(mixed + 0.5), 0, 255)
    return pixels


def box(x):
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def bicubic(x, a=-0.5):
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


@pytest.mark.parametrize("size", [(64, 64), (70, 131), (257, 129), (33, 20), (32, 200), (8, 9)])
def test_the_crop_is_that_of_adm(size):
    """Halve by boxes while twice too large, then bicubic, then the centre; written down anew with matrices."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8))
    pixels = np.asarray(image).astype(float)
    while min(pixels.shape[:2]) >= 64:
        pixels = resample(pixels, pixels.shape[0] // 2, pixels.shape[1] // 2, box)
    scale = 32 / min(pixels.shape[:2])
    pixels = resample(pixels, round(pixels.shape[0] * scale), round(pixels.shape[1] * scale), bicubic)
    top, left = (pixels.shape[0] - 32) // 2, (pixels.shape[1] - 32) // 2
    expected = pixels[top : top + 32, left : left + 32]
    cut = np.asarray(center_crop(image, 32)).astype(float)
    assert cut.shape == (32, 32, 3)
    assert np.abs(cut - expected).max() <= 1


def test_a_crop_of_a_thread_is_refused():
    with pytest.raises(ValueError, match="as long as wide"):
        center_crop(Image.new("RGB", (1, 5000)), 256)


# encode


def test_encode_stores_the_posterior_in_the_models_scale(images, vae, tmp_path):
    model, where = vae
    done = run("encode", images, "-o", tmp_path / "out", "--vae", where, "--size", 32, "--shard-size", 5, "--batch", 2)
    assert done.stdout.splitlines()[-1] == str(tmp_path / "out")
    data = LatentFolder(tmp_path / "out")
    index = data.index
    assert index["complete"] is True
    assert index["kind"] == "encoded"
    assert index["classes"] == ["ant", "bee", "cat"]
    assert [entry["count"] for entry in index["shards"]] == [5, 5, 2]
    assert (len(data), data.sample_shape, data.num_classes, data.flips, data.has_posterior) == (
        12,
        (4, 4, 4),
        3,
        True,
        True,
    )
    assert data.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert data.vae["shift_factor"] == 0.25
    data.verify()
    names = ["ant/0.png", "ant/2.png", "ant/deeper/1.png", "ant/deeper/3.png"]
    for row, name in enumerate(names):
        cut = torch.from_numpy(np.array(center_crop(Image.open(images / name), 32))).permute(2, 0, 1)[None]
        for flip in (False, True):
            x = (cut.flip(-1) if flip else cut).float() / 127.5 - 1
            posterior = model.encode(x).latent_dist
            mean = (posterior.mean - 0.25) * 0.5
            assert torch.allclose(data.row(row, flip=flip), mean[0], atol=2e-3)
            noise = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(row))
            drawn = mean[0] + 0.5 * posterior.std[0] * noise
            assert torch.allclose(data.row(row, flip=flip, noise=noise), drawn, atol=4e-3)
    random = torch.Generator().manual_seed(0)
    draws = torch.stack([data.row(7, noise=torch.randn(4, 4, 4, generator=random)) for _ in range(2000)])
    stored = load_file(tmp_path / "out" / "00001.safetensors")
    assert torch.allclose(draws.mean(0), stored["mean"][2].float(), atol=5 * float(stored["std"][2].max()) / 2000**0.5)
    assert torch.allclose(draws.std(0), stored["std"][2].float(), rtol=0.1)


def test_pixels_go_through_an_identity_vae(tmp_path, upcycle):
    for label in range(10):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "images" / "7" / "a.png")
    report = upcycle("encode", tmp_path / "images", "-o", tmp_path / "out", "--vae", TEACHER, "--size", 16, "--no-flip")
    assert report["num_classes"] == 10
    assert set(load_file(tmp_path / "out" / SHARD)) == {"z0", "label"}
    data = LatentFolder(tmp_path / "out")
    assert (data.flips, data.has_posterior, data.labels.tolist()) == (False, False, [7])
    row = data.row(0, noise=torch.ones(1, 16, 16))
    assert torch.allclose(row, torch.from_numpy(grey).float()[None] / 127.5 - 1, atol=5e-4)
    data.check_fits(config(), json.loads((TEACHER / "vae" / "config.json").read_text()))
    flipped = tmp_path / "flipped"
    upcycle("encode", tmp_path / "images", "-o", flipped, "--vae", TEACHER, "--size", 16)
    assert torch.equal(LatentFolder(flipped).row(0, flip=True), row.flip(-1))


def test_unreadable_images_are_listed_or_fatal(images, vae, tmp_path, upcycle, failing):
    (images / "bee" / "0.png").write_bytes(b"this is no image")
    truncated = (images / "bee" / "2.png").read_bytes()
    (images / "bee" / "2.png").write_bytes(truncated[: len(truncated) // 2])
    (images / "bee" / "notes.txt").write_text("not looked at")
    Image.new("L", (9, 9)).save(images / "bee" / "grey.jpg")
    Image.new("RGBA", (300, 50)).save(images / "bee" / "alpha.webp")
    given = ["encode", images, "-o", tmp_path / "out", "--vae", vae[1], "--size", 32, "--shard-size", 5]
    line = failing(*given, "--strict")
    assert "bee/0.png" in line
    assert "not an image" in line
    assert SHARD not in shards(tmp_path / "out"), "the shard that holds it is not written"
    report = upcycle(*given)
    assert report["count"] == 12
    assert [name for name, _ in report["skipped"]] == ["bee/0.png", "bee/2.png"]
    assert LatentFolder(tmp_path / "out").labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert "bee/0.png" in failing(*given, "--strict")
    # A shard that was lost is made again, and what the others skipped stays listed.
    before = shards(tmp_path / "out")
    (tmp_path / "out" / "00001.safetensors").unlink()
    assert upcycle(*given)["skipped"] == report["skipped"]
    assert shards(tmp_path / "out") == before


def test_a_shard_without_a_readable_image(images, vae, tmp_path, upcycle, failing):
    for path in (images / "bee").rglob("*.png"):
        path.write_text("damaged")
    given = ["encode", images, "--vae", vae[1], "--size", 32, "--shard-size", 4]
    assert upcycle(*given, "-o", tmp_path / "out")["count"] == 8
    data = LatentFolder(tmp_path / "out")
    assert data.labels.tolist() == [0] * 4 + [2] * 4
    stored = load_file(tmp_path / "out" / "00002.safetensors")["mean"]
    assert torch.equal(data.row(4), stored[0].float())
    for path in (images / "ant").rglob("*.png"):
        path.write_text("damaged")
    assert "none of the first 4 images" in failing(*given, "-o", tmp_path / "none")


def test_a_full_disk_costs_one_shard(images, vae, tmp_path, upcycle, failing, monkeypatch):
    given = ["encode", images, "-o", tmp_path / "out", "--vae", vae[1], "--size", 32, "--shard-size", 5]

    def full(tensors, path):
        if "00001" in path.name:
            path.write_bytes(b"x")
            raise OSError(28, "No space left on device")
        save_file(tensors, path)

    monkeypatch.setattr(folder_module, "save_file", full)
    assert "no space left" in failing(*given)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [SHARD, "index.json"]
    with pytest.raises(UpcycleError, match="finish it with: upcycle encode"):
        LatentFolder(tmp_path / "out")
    monkeypatch.undo()
    assert upcycle(*given)["already_done"] == 5


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--size", "64"], "size is 32 there and 64 now"),
        (["--no-flip"], "flips is true there and false now"),
        (["--shard-size", "6"], "shard_size is 5 there and 6 now"),
        (["--dtype", "bf16"], 'dtype is "float32" there and "bfloat16" now'),
        (["--vae", "other"], "vae.encoder_sha256"),
    ],
)
def test_other_settings_are_refused(encoded, vae, failing, tmp_path, options, says):
    images, out = encoded
    if "other" in options:
        tiny.make_vae(1).save_pretrained(tmp_path / "other")
        options = ["--vae", tmp_path / "other"]
    given = ["encode", images, "-o", out, "--vae", vae[1], "--size", "32", "--shard-size", "5"]
    line = failing(*given, *options)
    assert says in line
    assert "choose another folder" in line


@pytest.fixture(scope="session")
def encoded(vae, tmp_path_factory):
    """A finished folder and its images; not to be changed."""
    where = tmp_path_factory.mktemp("encoded")
    images = make_images(where / "images")
    from upcycle.latents import encode
    from upcycle.latents.folder import LatentWriter
    from upcycle.latents.images import open_images

    listed = open_images(str(images))
    settings = {"size": 32, "flips": True, "dtype": torch.float32}
    header = encode.encoding_header(listed, vae[0], str(vae[1]), **settings)
    writer = LatentWriter(where / "out", header, len(listed.names), 5)
    encode.encode(listed, vae[0], writer, **settings, batch_size=4, workers=2, strict=True)
    return images, where / "out"


def test_a_complete_folder_says_so_and_another_list_of_images_is_refused(encoded, vae, upcycle, failing, tmp_path):
    images, out = encoded
    given = ["-o", out, "--vae", vae[1], "--size", "32", "--shard-size", "5"]
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    report = upcycle("encode", images, *given)
    assert (report["already_done"], report["images_per_second"]) == (12, None)
    assert {path: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert "source.images is 12 there and 15 now" in failing("encode", make_images(tmp_path / "more", 5), *given)


# Killed at any time


def test_killed_and_gone_on_with(vae, tmp_path, upcycle):
    """SIGKILL in the middle of both commands; the same commands finish with the same bytes."""
    images = make_images(tmp_path / "images", count=10, size=(700, 700))
    commands = {
        "encode": ["encode", images, "--vae", vae[1], "--size", 32, "--shard-size", 3, "--batch", 2, "--workers", 1],
        "synthesize": [
            *("synthesize", "digits", "--count", 24, "--guidance-scale", 1),
            *("--shard-size", 3, "--batch", 2, "--steps", 5),
        ],
    }
    running = {name: Process(*given, "-o", tmp_path / name) for name, given in commands.items()}
    deadline = time.monotonic() + 120
    while running:
        for name, process in list(running.items()):
            index = tmp_path / name / "index.json"
            if index.is_file() and len(json.loads(index.read_text())["shards"]) >= 2:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                del running[name]
            assert process.poll() in (None, -signal.SIGKILL), process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    for name, given in commands.items():
        out = tmp_path / name
        index = json.loads((out / "index.json").read_text())
        assert index["complete"] is False
        kept = {entry["file"]: (out / entry["file"]).stat().st_mtime_ns for entry in index["shards"]}
        with pytest.raises(UpcycleError, match=f"finish it with: upcycle {name}"):
            LatentFolder(out)
        (out / "00007.safetensors").write_bytes(b"left over")
        (out / ".00007.safetensors.partial").write_bytes(b"left over")
        again = ["--batch", 5] if name == "synthesize" else []
        report = upcycle(*given, "-o", out)
        assert report["already_done"] == sum(entry["count"] for entry in index["shards"])
        assert {file: (out / file).stat().st_mtime_ns for file in kept} == kept, "no finished shard is made again"
        upcycle(*given, "-o", tmp_path / f"{name}-at-once")
        assert shards(out) == shards(tmp_path / f"{name}-at-once")
        assert not list(out.glob(".*"))
        data = LatentFolder(out)
        data.verify()
        if again:  # another batch size: the same samples, up to the last bit
            upcycle(*given, *again, "-o", tmp_path / "other-batch")
            other = LatentFolder(tmp_path / "other-batch")
            assert torch.equal(other.labels, data.labels)
            assert max((data.row(i) - other.row(i)).abs().max() for i in range(24)) <= 2e-3


# synthesize


def test_latents_are_what_the_stock_pipeline_decodes(pipeline_dir):
    pipe = load_pipeline(str(pipeline_dir))
    pipe.set_progress_bar_config(disable=True)
    labels, seeds = [1, 7, 3], [5, 6, 2**32 - 1]
    torch.manual_seed(0)
    before = torch.get_rng_state()
    for guidance in (1.0, 1.5):
        images = draw(pipe, labels, seeds, 3, guidance)
        latents = sample_latents(pipe, labels, seeds, 3, guidance)
        with torch.no_grad():
            decoded = pipe.vae.decode(1 / pipe.vae.config.scaling_factor * latents).sample
        assert torch.equal((decoded / 2 + 0.5).clamp(0, 1), images)
        alone = torch.cat([sample_latents(pipe, [labels[i]], [seeds[i]], 3, guidance) for i in range(3)])
        assert torch.allclose(alone / latents.abs().max(), latents / latents.abs().max(), rtol=0, atol=1e-5)
    assert torch.equal(torch.get_rng_state(), before), "the global generator is left alone"


def test_synthesize_digits(tmp_path, upcycle):
    given = ["synthesize", "digits", "--count", 14, "--steps", 4, "--guidance-scale", 2, "--shard-size", 8]
    report = upcycle(*given, "-o", tmp_path / "out")
    assert report["count"] == 14
    data = LatentFolder(tmp_path / "out")
    seeds = torch.cat([load_file(path)["seed"] for path in sorted((tmp_path / "out").glob("*.safetensors"))])
    assert data.labels.tolist() == [*range(10), *range(4)]
    assert len(set(seeds.tolist())) == 14
    assert data.index["teacher"]["id"] == "digits"
    assert data.index["scheduler"]["class"] == "DDIMScheduler"
    data.check_fits(config(), json.loads((TEACHER / "vae" / "config.json").read_text()))
    pipe = load_pipeline(str(TEACHER))
    pipe.set_progress_bar_config(disable=True)
    images = draw(pipe, data.labels.tolist(), seeds.tolist(), 4, 2.0)
    ours = torch.stack([data.row(i) for i in range(14)])
    assert torch.allclose((ours / 2 + 0.5).clamp(0, 1), images, atol=1e-3)
    other = upcycle(
        "synthesize", "digits", "--count", 4, "--steps", 2, "--classes", "3,8", "--seed", 1, "-o", tmp_path / "o"
    )
    assert other["num_classes"] == 10
    assert LatentFolder(tmp_path / "o").labels.tolist() == [3, 8, 3, 8]


def test_a_teacher_of_the_hub(pipeline_dir, tmp_path):
    with FakeHub() as hub:
        repo = hub.add("someone/dit", pipeline_dir)
        given = [
            "synthesize",
            "someone/dit",
            "-o",
            tmp_path / "out",
            "--count",
            3,
            "--steps",
            2,
            "--classes",
            "label 7,1",
        ]
        run(*given, env=hub.env(tmp_path / "home"))
    data = LatentFolder(tmp_path / "out")
    assert data.index["teacher"]["revision"] == repo.commit("main")[0]
    assert data.labels.tolist() == [7, 1, 7]
    assert data.index["classes"][7] == "label 7"


def test_samples_of_other_seeds_share_no_noise():
    draws = [{label_and_seed(i, [0], seed)[1] for i in range(10_000)} for seed in range(20)]
    assert sum(map(len, draws)) == len(set.union(*draws))


# The reader


def config(**changes):
    """The shipped teacher's sizes."""
    sizes = {"in_channels": 1, "out_channels": 2, "sample_size": 16, "patch_size": 2, "num_classes": 10}
    layers = {"num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 24}
    return DiTConfig(**{**layers, **sizes, "time_embedding": "diffusers", "norm_eps": 1e-5, **changes})


@pytest.fixture
def latents(encoded, tmp_path):
    """A copy of a finished folder, to be damaged."""
    import shutil

    return shutil.copytree(encoded[1], tmp_path / "latents")


def test_rows_after_pickling_and_in_workers(latents):
    data = LatentFolder(latents)
    first = data.row(11)
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy.row(11), first)
    loader = torch.utils.data.DataLoader(
        range(12), batch_size=4, num_workers=1, collate_fn=lambda rows: torch.stack([data.row(i) for i in rows])
    )
    assert torch.equal(torch.cat(list(loader)), torch.stack([data.row(i) for i in range(12)]))


def test_a_bare_folder_of_shards(tmp_path, failing):
    save_file({"z0": torch.full((2, 1, 16, 16), 0.5), "label": torch.tensor([3, 9])}, tmp_path / "a.safetensors")
    save_file({"z0": torch.ones(1, 1, 16, 16).half(), "label": torch.tensor([0])}, tmp_path / "b.safetensors")
    data = LatentFolder(tmp_path)
    assert (len(data), data.num_classes, data.flips, data.has_posterior, data.vae) == (3, 10, False, False, None)
    assert data.row(2).unique().tolist() == [1.0]
    data.check_fits(config(), {"_class_name": "AutoencoderKL"})
    with pytest.raises(UpcycleError, match=r"labels outside 0\.\.4"):
        data.check_fits(config(num_classes=5))


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({"z0": torch.zeros(1, 1, 2, 2)}, "must hold label"),
        ({"label": torch.zeros(1).long()}, "must hold label, and z0"),
        ({"mean": torch.zeros(1, 1, 2, 2), "label": torch.zeros(1).long()}, "mean and std"),
        ({"z0": torch.zeros(1, 2, 2), "label": torch.zeros(1).long()}, r"\[N, C, H, W\]"),
        ({"z0": torch.zeros(0, 1, 2, 2), "label": torch.zeros(0).long()}, "at least one sample"),
        ({"z0": torch.zeros(1, 1, 2, 2).long(), "label": torch.zeros(1).long()}, "floating point"),
        ({"z0": torch.zeros(2, 1, 2, 2), "label": torch.zeros(1).long()}, "one label a sample"),
        ({"z0": torch.zeros(1, 1, 2, 2), "label": torch.zeros(1)}, "whole numbers"),
        ({"z0": torch.zeros(1, 1, 2, 2), "label": torch.tensor([-1])}, "labels outside"),
        ({"z0": torch.zeros(1, 1, 2, 2), "z0_flip": torch.zeros(1, 1, 2, 1), "label": torch.zeros(1).long()}, "agree"),
    ],
)
def test_shards_that_cannot_be_used(tmp_path, tensors, says):
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(UpcycleError, match=says):
        LatentFolder(tmp_path)


def test_folders_that_cannot_be_used(latents, tmp_path):
    def refused(says, path=latents):
        with pytest.raises(UpcycleError, match=says):
            LatentFolder(path)

    refused("no such folder", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("no \\*.safetensors", tmp_path / "empty")
    (tmp_path / "empty" / "a.safetensors").write_text("x" * 100)
    refused("not a readable safetensors", tmp_path / "empty")
    shape = {"label": torch.zeros(1).long()}
    save_file({"z0": torch.zeros(1, 1, 2, 2), **shape}, tmp_path / "empty" / "a.safetensors")
    save_file({"z0": torch.zeros(1, 1, 4, 4), **shape}, tmp_path / "empty" / "b.safetensors")
    refused("mixes sample shapes", tmp_path / "empty")

    index = json.loads((latents / "index.json").read_text())

    def with_index(says, **changes):
        (latents / "index.json").write_text(json.dumps({**index, **changes}))
        refused(says)

    with_index("of version 2", version=2)
    with_index("not the index", format="other")
    with_index("labels outside", num_classes=2)
    with_index("damaged", shards=3)
    with_index("refused", shards=[{**index["shards"][0], "file": "../evil.safetensors"}])
    with_index("not complete", complete=False)
    (latents / "index.json").write_text("{")
    refused("cannot be read as JSON")
    (latents / "index.json").write_text(json.dumps(index))
    content = (latents / SHARD).read_bytes()
    (latents / SHARD).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UpcycleError, match="damaged"):
        LatentFolder(latents).verify()
    (latents / SHARD).write_bytes(content[:-1])
    refused("cut off")
    (latents / SHARD).unlink()
    refused("missing")


def test_latents_that_do_not_fit_a_teacher(encoded):
    data = LatentFolder(encoded[1])
    fits = {"in_channels": 4, "sample_size": 4, "num_classes": 3}
    theirs = {"_class_name": "AutoencoderKL", "latent_channels": 4, "scaling_factor": 0.5, "shift_factor": 0.25}
    data.check_fits(config(**fits), theirs)
    for changes, says in (
        ({"sample_size": 8}, "--size 64"),
        ({"in_channels": 16}, "VAE of the teacher"),
        ({"num_classes": 2}, "labels outside"),
        ({"num_classes": 1000}, "3 classes and the teacher 1000"),
    ):
        with pytest.raises(UpcycleError, match=says):
            data.check_fits(config(**{**fits, **changes}), theirs)
    with pytest.raises(UpcycleError, match=r"scaling_factor 0.5, the teacher's has 0.18215"):
        data.check_fits(config(**fits), {"_class_name": "AutoencoderKL", "latent_channels": 4, "shift_factor": 0.25})


# Bad input


def test_bad_input(images, vae, tmp_path, failing):
    out = tmp_path / "out"

    def refused(*given, says):
        assert says in failing(*given)
        assert not out.exists()

    encode = ["-o", out, "--vae", vae[1], "--size", "32"]
    refused("encode", tmp_path / "nowhere", *encode, says="no such folder of images")
    refused("encode", images / "bee", *encode, says="outside of any class folder")
    (tmp_path / "empty" / "class").mkdir(parents=True)
    refused("encode", tmp_path / "empty", *encode, says="holds no images")
    refused("encode", images, "-o", images / "ant" / "out", says="choose another folder with -o")
    refused("encode", images, *encode, "--size", "30", says="not a multiple of 8")
    refused("encode", images, *encode, "--vae", "nowhere", says="no such folder, and no Hub id")
    refused("encode", images, *encode, "--vae", images, says="holds no VAE")
    refused("encode", images, *encode, "--device", "warp9", says="--device warp9 cannot be used")
    refused("encode", images, *encode, "--image-column", "x", says="is no dataset")
    refused("encode", images, *encode, "--dtype", "fp8", says="fp8")
    refused("encode", images, says="--out")
    assert "holds no latents" in failing("encode", images, "-o", tmp_path, "--vae", vae[1])
    synthesize = ["-o", out, "--count", "3"]
    refused("synthesize", "nowhere", *synthesize, says="no such folder, and no Hub id")
    refused("synthesize", images, *synthesize, says="is no pipeline")
    refused("synthesize", "digits", *synthesize, "--classes", "3,10", says="out of range")
    refused("synthesize", "digits", *synthesize, "--revision", "main", says="no revisions")
    refused("synthesize", "digits", *synthesize, "--guidance-scale", "nan", says="--guidance-scale nan")
    refused("synthesize", "digits", "-o", out, "--count", "0", says="--count")


def test_a_vae_that_gives_nan_leaves_no_shard(images, tmp_path, failing):
    model = tiny.make_vae()
    model.quant_conv.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "vae")
    assert "not finite" in failing("encode", images, "-o", tmp_path / "out", "--vae", tmp_path / "vae", "--size", "32")
    assert shards(tmp_path / "out") == {}


# Hugging Face datasets


def test_a_dataset_without_the_package(monkeypatch, failing, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'upcycle[datasets]'" in failing("encode", "hf:some/thing", "-o", tmp_path / "out")


def test_a_dataset(images, vae, tmp_path, upcycle, failing, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for path in images.rglob("deeper/*.png"):  # datasets gives labels only to images of one depth
        path.rename(path.parent.parent / path.name)
    (images / "ant" / "0.png").write_bytes(b"damaged")
    given = ["--vae", vae[1], "--size", "32"]
    report = upcycle("encode", f"hf:{images}", "-o", tmp_path / "out", *given)
    assert report["count"] == 11
    assert [why for _, why in report["skipped"]] == ["not an image, or of an unknown format"]
    index = LatentFolder(tmp_path / "out").index
    assert index["classes"] == ["ant", "bee", "cat"]
    columns = {"split": "train", "image_column": "image", "label_column": "label"}
    assert columns.items() <= index["source"].items()
    line = failing("encode", f"hf:{images}", "-o", tmp_path / "no", "--label-column", "coarse")
    assert "it has image, label" in line
    line = failing("encode", f"hf:{images}", "-o", tmp_path / "no", "--image-column", "label")
    assert "label holds no images" in line
    assert "cannot be loaded" in failing("encode", f"hf:{images}:test", "-o", tmp_path / "no")
