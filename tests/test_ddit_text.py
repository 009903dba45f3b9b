"""DDiT on tiny pipelines that read text, through the real commands: sample, synthesize, finetune, calibrate."""

import importlib.util
import json
import shutil

import pytest
import tiny_text
import torch
from conftest import inside, run
from diffusers import DiffusionPipeline
from fake_hub import FakeHub
from PIL import Image
from runs import names_in, rows_of, same, start
from safetensors.torch import load_file, save_file
from tiny_text import KINDS, SIDES

from upcycle.latents import prompts as latents
from upcycle.latents.prompts import PromptFolder
from upcycle.models import ddit
from upcycle.recipe import load_recipe
from upcycle.sampling import prompts
from upcycle.training import flow

PROMPTS = ["a red fox", "", "a blue house"]
STAGE = {"name": "distill", "steps": 6, "lr": 3e-3, "losses": {"distill": 1.0}}
each_kind = pytest.mark.parametrize("kind", KINDS)


def sides(kind):
    height, width = SIDES[kind]
    return ["--height", height, "--width", width, *(["--num-frames", 9] if kind == "wan" else [])]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """For each kind: KIND (the pipeline), KIND-ddit (converted), KIND-latents, and a file of prompts."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    for kind in KINDS:
        tiny_text.make(kind, folder / kind)
        inside("convert", folder / kind, "--method", "ddit", "--rank", 2, "-o", folder / f"{kind}-ddit")
        synthesize(folder, kind, folder / f"{kind}-latents")
    return folder


def synthesize(made, kind, out, *changes):
    given = ["synthesize", made / kind, "--prompts", made / "prompts.txt", "--count", 7, "--steps", 3]
    return inside(*given, "--shard-size", 3, "--seed", 5, *sides(kind), *changes, "-o", out, "--json")


def sample(model, kind, out, *options):
    words = [part for text in ("a red fox", "a blue house") for part in ("--prompt", text)]
    done = inside("sample", model, *words, "--steps", 6, *sides(kind), *options, "--json", "-o", out)
    return json.loads(done.stdout)


def recipe(made, kind, out, **changes):
    path = out.with_suffix(".yaml")
    content = {
        "method": "ddit", "teacher": str(made / kind), "data": str(made / f"{kind}-latents"), "out": str(out),
        "ddit": {"patches": [2, 4], "rank": 2}, "stages": [STAGE], "batch_size": 4, "data_workers": 0, "ema": 0.5,
        "log_every": 1, "save_every": 2, **changes,
    }  # fmt: skip
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


# -- sample -----------------------------------------------------------------------------------------------------------


@each_kind
def test_with_the_base_patches_the_stock_pipelines_bits_come_out(made, kind, tmp_path):
    """By the adapter beside the base, by the plain pipeline, and by diffusers alone."""
    sample(made / f"{kind}-ddit", kind, tmp_path / "adapter", "--threshold", "0")
    sample(made / kind, kind, tmp_path / "plain", "--batch-size", 1)
    end = "gif" if kind == "wan" else "png"
    names = {f"prompt000-seed0.{end}", f"prompt001-seed1.{end}", "samples.png"}
    assert {*names_in(tmp_path / "plain")} == names
    assert {*names_in(tmp_path / "adapter")} == {*names, "patches.json", "patches.png"}
    for name in names:
        assert (tmp_path / "adapter" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    found = prompts.find(str(made / f"{kind}-ddit"))
    pipe = prompts.load_text_pipeline(found, torch.float32)
    stock = DiffusionPipeline.from_pretrained(made / kind)
    stock.set_progress_bar_config(disable=True)
    height, width = SIDES[kind]
    options = {"height": height, "width": width, "num_inference_steps": 3, "output_type": "pt", "return_dict": False}
    options |= {"num_frames": 9} if kind == "wan" else {}
    expected = stock(prompt="a red fox", **options, generator=torch.Generator().manual_seed(3))[0]
    frames = 9 if kind == "wan" else None
    guidance = found.kind.defaults["guidance_scale"]
    wish = prompts.Settings(3, guidance, height, width, frames)
    pixels = prompts.draw_pixels(pipe, ["a red fox"], [3], wish)
    assert torch.equal(pixels, expected)
    assert not torch.equal(pixels, prompts.draw_pixels(pipe, ["a blue house"], [3], wish)), "the text is read"
    if kind == "wan":
        with Image.open(tmp_path / "plain/prompt000-seed0.gif") as gif:
            assert (gif.n_frames, gif.size) == (9, (width, height))


@each_kind
def test_schedules_are_followed_and_counted(made, kind, tmp_path):
    told = sample(made / f"{kind}-ddit", kind, tmp_path / "fixed", "--schedule", "4:0.5,2:0.25,1:0.25")
    assert told["steps_by_size"] == {"4": 6, "2": 2, "1": 4}
    told = sample(made / f"{kind}-ddit", kind, tmp_path / "coarse", "--threshold", "1e9", "--order", "2")
    assert told["steps_by_size"] == {"4": 8, "1": 4}
    runs = json.loads((tmp_path / "coarse/patches.json").read_text())["batches"]
    assert [[entry["m"] for entry in run] for run in runs] == [[1, 1, 4, 4, 4, 4]] * 2
    sample(made / f"{kind}-ddit", kind, tmp_path / "coarse", "--force")  # knows the names of its own files


def test_an_adapter_alone_finds_its_base(made, tmp_path):
    shutil.copytree(made / "flux-ddit/ddit", tmp_path / "alone")
    schedule = ("--schedule", "2:0.5,1:0.5")
    sample(tmp_path / "alone", "flux", tmp_path / "a", *schedule)
    shutil.copytree(made / "flux", tmp_path / "copy")
    sample(tmp_path / "alone", "flux", tmp_path / "b", *schedule, "--base", tmp_path / "copy")
    sample(made / "flux-ddit", "flux", tmp_path / "c", *schedule)
    for name in ("b", "c"):
        assert (tmp_path / name / "samples.png").read_bytes() == (tmp_path / "a/samples.png").read_bytes()


# -- synthesize -------------------------------------------------------------------------------------------------------


@each_kind
def test_latents_are_what_the_pipeline_would_decode(made, kind):
    data = PromptFolder(made / f"{kind}-latents")
    assert data.prompts == PROMPTS
    assert (len(data), data.num_classes, data.empty) == (7, 3, 1)
    assert data.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert data.sample_shape == ((4, 3, 4, 6) if kind == "wan" else (4, 8, 12))
    seeds = [seed for file in sorted((made / f"{kind}-latents").glob("0*.safetensors"))
             for seed in load_file(file)["seed"].tolist()]  # fmt: skip
    stock = DiffusionPipeline.from_pretrained(made / kind)
    stock.set_progress_bar_config(disable=True)
    decoded = []
    stock.vae.decode = lambda z, **_: decoded.append(z) or (torch.zeros(1, 3, *([9] if kind == "wan" else []), 8, 8),)
    height, width = SIDES[kind]
    options = {"num_frames": 9} if kind == "wan" else {}
    generator = torch.Generator().manual_seed(seeds[2])
    stock(prompt=PROMPTS[2], height=height, width=width, num_inference_steps=3, generator=generator, **options)
    z = decoded[0][0] if kind == "wan" else (decoded[0][0] - 0.1) * 0.5  # shift and scale of the tiny VAE
    torch.testing.assert_close(data.row(2), z, atol=3e-3, rtol=3e-3)  # stored in fp16


@each_kind
def test_embeddings_are_those_that_the_transformer_gets(made, kind):
    data = PromptFolder(made / f"{kind}-latents")
    stock = DiffusionPipeline.from_pretrained(made / kind)
    stock.set_progress_bar_config(disable=True)
    seen = []
    stock.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(dict(zip(("x", "t", "cap_feats"), args, strict=False)) | kwargs),
        with_kwargs=True,
    )
    height, width = SIDES[kind]
    options = {"num_frames": 9} if kind == "wan" else {}
    stock(prompt=PROMPTS[2], height=height, width=width, num_inference_steps=1, output_type="latent", **options)
    for name, value in data.embeddings(2).items():
        assert torch.equal(value, seen[0][name][0])


def test_embeddings_of_many_prompts_go_through_files_of_a_few(made, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "AT_ONCE", 2)
    synthesize(made, "z-image", tmp_path / "few")
    assert names_in(tmp_path / "few") == names_in(made / "z-image-latents")
    for name in ("prompts.safetensors", "00002.safetensors"):
        assert (tmp_path / "few" / name).read_bytes() == (made / "z-image-latents" / name).read_bytes()


def test_an_interrupted_synthesis_goes_on(made, tmp_path, failing):
    whole = made / "flux-latents"
    shutil.copytree(whole, tmp_path / "cut")
    (tmp_path / "cut/00001.safetensors").unlink()
    done = json.loads(synthesize(made, "flux", tmp_path / "cut").stdout)
    assert done["already_done"] == 4
    for name in names_in(whole):
        if name != "index.json":
            assert (tmp_path / "cut" / name).read_bytes() == (whole / name).read_bytes()
    (tmp_path / "begun").mkdir()
    shutil.copy(whole / "prompts.safetensors", tmp_path / "begun")  # cut off before the first index
    synthesize(made, "flux", tmp_path / "begun")
    assert names_in(tmp_path / "begun") == names_in(whole)
    (tmp_path / "other.txt").write_text("a house\n")
    given = ("--count", 7, *sides("flux"), "-o", whole)
    assert "was made of other prompts" in failing(
        "synthesize", made / "flux", "--prompts", tmp_path / "other.txt", *given
    )
    assert "steps is 3 there and 4 now" in failing(
        "synthesize", made / "flux", "--prompts", made / "prompts.txt", "--steps", 4, "--seed", 5, *given
    )
    PromptFolder(whole)


# -- finetune ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(made, tmp_path_factory):
    """Runs of 40 steps, by kind."""
    folder = tmp_path_factory.mktemp("trained")
    for kind in KINDS:
        (folder / "held-out.txt").write_text("a blue fox\na red house\n")
        given = ("--prompts", folder / "held-out.txt", "--count", 4, "--steps", 3, *sides(kind))
        inside("synthesize", made / kind, *given, "-o", folder / f"{kind}-held-out")
        changes = {"label_dropout": 0.2, "validation": {"data": str(folder / f"{kind}-held-out"), "every": 10}}
        path = recipe(made, kind, folder / kind, stages=[{**STAGE, "steps": 40}], **changes)
        inside("finetune", path)
    return folder


def errors(model, kind, data):
    """Relative error of each size against m = 1 at two noise levels, on the data and other noise."""
    x0 = torch.stack([data.row(i) for i in range(len(data))])
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(99))
    student = flow.FlowStudent(model, data)
    timestep = torch.tensor([300, 700, 300, 700, 300, 700, 300])
    x = student.mix(x0, noise, timestep)
    expected = student.target(x, timestep, data.labels)
    with torch.no_grad():
        found = [student(x, timestep, data.labels, m).sample - expected for m in (2, 4)]
    return [(error.square().mean() / expected.square().mean()).sqrt().item() for error in found]


@each_kind
def test_a_trained_adapter_is_nearer_to_its_base(made, trained, kind):
    assert names_in(trained / kind / "export") == ["ddit.json", "ddit.py", "ddit.safetensors", "upcycle.json"]
    assert {row["m"] for row in rows_of(trained / kind / "log.csv")} == {"2", "4"}
    far = [float(row["student"]) for row in rows_of(trained / kind / "validation.csv")]
    assert len(far) == 4
    assert far[-1] < far[0] < 2
    data = PromptFolder(made / f"{kind}-latents")
    found = []
    for folder in (trained / kind / "start", trained / kind / "export"):
        model = DiffusionPipeline.from_pretrained(made / kind).transformer.requires_grad_(False)
        ddit.apply(model, folder)
        found.append(errors(model, kind, data))
    assert all(after < 0.9 * before for before, after in zip(*found, strict=True))
    config, tensors = ddit.load_adapter(trained / kind / "export")
    assert set(config.variance) == {"2", "4"}
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


@each_kind
def test_training_calls_the_base_as_its_pipeline_does(made, kind):
    """What `flow.inputs` gives is what the stock pipeline gives at the same latents and noise level."""
    stock = DiffusionPipeline.from_pretrained(made / kind)
    stock.set_progress_bar_config(disable=True)
    seen = []
    stock.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(dict(zip(("x", "t", "cap_feats"), args, strict=False)) | kwargs),
        with_kwargs=True,
    )
    data = PromptFolder(made / f"{kind}-latents")
    z = torch.randn(1, *data.sample_shape, generator=torch.Generator().manual_seed(0))
    latents = flow.inputs(stock.transformer, z, torch.ones(1), [data.embeddings(0)], 3.5)["hidden_states"] if (
        kind == "flux") else z  # fmt: skip
    height, width = SIDES[kind]
    options = {"num_frames": 9} if kind == "wan" else {}
    stock(prompt=PROMPTS[0], height=height, width=width, num_inference_steps=4, latents=latents, guidance_scale=3.5,
          output_type="latent", **options)  # fmt: skip
    sigma = stock.scheduler.sigmas[:1].float()
    given = flow.inputs(stock.transformer, z, sigma, [data.embeddings(0)], 3.5)
    for name, value in given.items():
        theirs = seen[0][name]
        if isinstance(value, list):
            value, theirs = value[0], theirs[0]
        theirs = theirs[:1] if name == "t" else theirs  # guided in one call
        torch.testing.assert_close(value, theirs.to(value.dtype), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_a_continued_run_ends_where_an_uninterrupted_one_ends(made, kind, tmp_path):
    inside("finetune", recipe(made, kind, tmp_path / "whole"))
    path = recipe(made, kind, tmp_path / "cut", stages=[{**STAGE, "steps": 6}])
    inside("finetune", path)
    shutil.rmtree(tmp_path / "cut/export")
    for name in names_in(tmp_path / "cut/checkpoints"):  # as if it had been killed after the second step kept
        if name != "step-0000004":
            shutil.rmtree(tmp_path / "cut/checkpoints" / name)
    inside("finetune", path, "--resume")
    weights = [load_file(tmp_path / name / "export/ddit.safetensors") for name in ("whole", "cut")]
    assert same(*weights)
    assert rows_of(tmp_path / "whole/log.csv")[-1]["distill"] == rows_of(tmp_path / "cut/log.csv")[-1]["distill"]


@each_kind
def test_a_base_in_bf16_trains_an_adapter_in_fp32(made, kind, tmp_path, failing):
    shutil.copytree(made / kind, tmp_path / "half")
    weights = tmp_path / "half/transformer/diffusion_pytorch_model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    given = {"teacher": str(tmp_path / "half"), "gradient_accumulation": 2, "gradient_checkpointing": True}
    says = "is stored in bf16; give mixed_precision: bf16"
    assert says in failing("finetune", recipe(made, kind, tmp_path / "no", **given))
    inside("finetune", recipe(made, kind, tmp_path / "run", mixed_precision="bf16", **given))
    loaded = load_recipe(tmp_path / "run.yaml")
    assert flow.stored_dtype(loaded, flow.text_backbones(loaded)[0]) == torch.bfloat16
    model = DiffusionPipeline.from_pretrained(tmp_path / "half", torch_dtype=torch.bfloat16).transformer
    data, timestep = PromptFolder(made / f"{kind}-latents"), torch.tensor([700])
    x, texts = data.row(0)[None], [{name: value.bfloat16() for name, value in data.embeddings(0).items()}]
    given = flow.inputs(model, x.bfloat16(), (timestep + 0.5) / 1000, texts, data.guidance_scale)
    with torch.no_grad():
        expected = model(**given, return_dict=False)[0]
    ddit.apply(model, tmp_path / "run/export")
    with torch.autocast("cpu", torch.bfloat16):
        target = flow.FlowStudent(model, data).target(x, timestep, data.labels[:1])
    assert torch.equal(target[0], expected[0]), "the target is the stock model's in bf16, not one under autocast"
    before, after = (load_file(tmp_path / f"run/{name}/ddit.safetensors") for name in ("start", "export"))
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(moved) > len(before) / 2
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in after.values()), "more than bf16 holds"


def test_without_an_empty_prompt_no_label_is_dropped(made, tmp_path):
    (tmp_path / "one.txt").write_text("a red fox\n")
    given = ("--count", 4, "--steps", 2, *sides("flux"), "-o", tmp_path / "latents")
    inside("synthesize", made / "flux", "--prompts", tmp_path / "one.txt", *given)
    path = recipe(made, "flux", tmp_path / "run", data=str(tmp_path / "latents"), label_dropout=1.0)
    assert "label_dropout is left out" in inside("finetune", path).stderr


def test_two_ranks_learn_what_one_learns(made, tmp_path):
    inside("finetune", recipe(made, "z-image", tmp_path / "one"))
    process = start(recipe(made, "z-image", tmp_path / "two"), ranks=2)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    one, two = (load_file(tmp_path / name / "export/ddit.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=1e-3)


def test_of_a_base_on_the_hub_training_downloads_the_transformer_alone(made, tmp_path):
    with FakeHub() as hub:
        hub.add("lab/flux", made / "flux")
        environment = hub.env(tmp_path / "home")
        path = recipe(made, "flux", tmp_path / "run", teacher="lab/flux", stages=[{**STAGE, "steps": 1}])
        run("finetune", path, env=environment)
        fetched = [name for name in hub.downloads() if name.endswith(".safetensors")]
        assert fetched == ["transformer/diffusion_pytorch_model.safetensors"]
        config, _ = ddit.load_adapter(tmp_path / "run/export")
        assert (config.base, len(str(config.base_revision))) == ("lab/flux", 40)
        hub.add("lab/adapter", tmp_path / "run/export")
        words = ("--prompt", "a red fox", "--steps", 2, *sides("flux"), "--schedule", "2:1")
        run("sample", "lab/adapter", *words, "-o", tmp_path / "hub", env=environment)
    inside("sample", tmp_path / "run/export", "--base", made / "flux", *words, "-o", tmp_path / "local")
    assert (tmp_path / "hub/samples.png").read_bytes() == (tmp_path / "local/samples.png").read_bytes()


def test_pushing_what_was_trained(trained):
    done = json.loads(inside("push-to-hub", trained / "wan/export", "you/x", "--dry-run", "--json").stdout)
    assert set(done["files"]) == {"ddit.json", "ddit.py", "ddit.safetensors", "upcycle.json", "README.md"}


# -- calibrate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_calibration_stores_a_threshold_that_reaches_the_speed_up(made, trained, kind, tmp_path):
    shutil.copytree(trained / kind / "export", tmp_path / "x")
    options = ("--prompt", "a red fox", "--steps", 12, "--cost", "tokens", *sides(kind), "--json")
    done = json.loads(inside("calibrate", tmp_path / "x", "--speed-up", 1.3, *options).stdout)
    assert done["speed_up"] >= 1.3 * 0.98
    config, _ = ddit.load_adapter(tmp_path / "x")
    assert config.threshold == done["threshold"]
    assert config.calibration["prompts"] == ["a red fox"]
    given = ("--prompt", "a red fox", "--steps", 12, *sides(kind), "--json", "-o", tmp_path / "s")
    used = json.loads(inside("sample", tmp_path / "x", *given).stdout)
    assert used["steps_by_size"] == done["steps_by_size"]


# -- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input_of_sampling(made, pipeline_dir, tmp_path, failing, monkeypatch):
    out = ("-o", tmp_path / "x")
    flux = made / "flux-ddit"
    words = ("--prompt", "a")
    for model, options, says in (
        (flux, (), "give it with --prompt TEXT"),
        (flux, (*words, "--classes", "1"), "leave out --classes"),
        (flux, (*words, "--tokens", "4"), "leave out --tokens"),
        (flux, (*words, "--num-frames", "5"), "--num-frames is for videos"),
        (flux, (*words, "--height", "15"), "--height 15 must be a multiple of 4"),
        (flux, (*words, "--schedule", "3:1"), "this model has 1, 2, 4, not 3"),
        (flux, (*words, "--base", made / "flux"), "is for an adapter alone"),
        (made / "flux", (*words, "--threshold", "1"), "has no adapter for coarser patches"),
        (made / "wan", (*words, "--num-frames", "8"), "1 more than a multiple of 4"),
        (made / "wan", (*words, "--width", "40"), "--width 40 must be a multiple of 16"),
        (pipeline_dir, words, "takes no text"),
        (pipeline_dir, ("--height", "64"), "--height is for pipelines with text"),
        (tmp_path / "none", words, "no such folder"),
    ):
        assert says in failing("sample", model, *options, *out)
    shutil.copytree(made / "wan", tmp_path / "unknown")
    index = json.loads((tmp_path / "unknown/model_index.json").read_text())
    path = tmp_path / "unknown/model_index.json"
    path.write_text(json.dumps(index | {"_class_name": "WanImageToVideoPipeline"}))
    assert "is a WanImageToVideoPipeline, which is not known" in failing("sample", tmp_path / "unknown", *words, *out)
    shutil.copytree(made / "flux", tmp_path / "broken")
    (tmp_path / "broken/text_encoder/config.json").unlink()
    assert "does not load" in failing("sample", tmp_path / "broken", *words, *out)
    look = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "transformers" else look(name))
    assert "pip install transformers" in failing("sample", flux, *words, *out)
    assert not (tmp_path / "x").exists()


def test_bad_input_of_training(made, world, tmp_path, failing):
    words = ("--prompts", made / "prompts.txt", "--count", 2, "-o", tmp_path / "x")
    assert "give a file with --prompts" in failing("synthesize", made / "flux", "--count", 2, "-o", tmp_path / "x")
    assert "takes no text" in failing("synthesize", world / "teacher", *words)
    assert "leave out --classes" in failing("synthesize", made / "flux", *words, "--classes", "1")
    assert "cannot be read" in failing("synthesize", made / "flux", "--prompts", tmp_path / "no.txt", *words[2:])
    (tmp_path / "empty.txt").write_text("\n\n")
    assert "holds no prompt" in failing("synthesize", made / "flux", "--prompts", tmp_path / "empty.txt", *words[2:])
    for changes, says in (
        ({"data": str(world / "data")}, "has no prompts"),
        ({"data": str(made / "wan-latents")}, "has texts of widths"),
        ({"validation": {"data": str(made / "wan-latents")}}, "has texts of widths"),
        ({"student": str(made / "wan-ddit"), "ddit": None}, "the adapter is for WanTransformer3DModel"),
    ):
        assert says in failing("finetune", recipe(made, "flux", tmp_path / "run", **changes))
    shutil.copytree(made / "flux-latents", tmp_path / "damaged")
    tensors = load_file(tmp_path / "damaged/prompts.safetensors")
    save_file(tensors | {"0/pooled_projections": torch.zeros(8)}, tmp_path / "damaged/prompts.safetensors")
    path = recipe(made, "flux", tmp_path / "run", data=str(tmp_path / "damaged"))
    assert "is missing or damaged" in failing("finetune", path)
    path = recipe(made, "flux", tmp_path / "run")
    weights = made / "flux/transformer/diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    save_file({name: tensor.half() for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    try:
        assert "trains on fp32 or bf16" in failing("finetune", path)
    finally:
        weights.write_bytes(before)
    assert "leave out --classes" in failing("calibrate", made / "flux-ddit", "--prompt", "a", "--classes", "1")
    assert "--prompt TEXT" in failing("calibrate", made / "flux-ddit")
