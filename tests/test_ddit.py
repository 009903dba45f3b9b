"""DDiT through the real commands: convert, finetune, sample, calibrate, push, on tiny pipelines."""

import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch
from conftest import inside, run
from diffusers import DiTPipeline, DiTTransformer2DModel, FluxTransformer2DModel
from fake_hub import FakeHub
from runs import names_in, rows_of, run_here, same, start
from safetensors.torch import load_file, save_file

from upcycle.graft.patches import Options, make_plan
from upcycle.models import ddit
from upcycle.recipe import parse_recipe
from upcycle.sampling.pipeline import load_pipeline
from upcycle.sources.backbone import open_backbone
from upcycle.training.patches import PatchStudent

STAGE = {"name": "distill", "steps": 6, "lr": 1e-2, "losses": {"distill": 1.0}}


def recipe(world, out, **changes):
    return {
        "method": "ddit", "teacher": str(world / "teacher"), "data": str(world / "data"), "out": str(out),
        "ddit": {"patches": [2, 4], "rank": 2}, "stages": [STAGE], "batch_size": 8, "data_workers": 0, "ema": 0.9,
        "log_every": 1, "save_every": 2, **changes,
    }  # fmt: skip


def parsed(world, out, **changes):
    return parse_recipe(recipe(world, out, **changes), "of a test")


@pytest.fixture(scope="module")
def converted(pipeline_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddit") / "made"
    done = run("convert", pipeline_dir, "--method", "ddit", "--rank", "4", "-o", folder, "--json")
    (folder.parent / "report.json").write_text(done.stdout)
    return folder


@torch.no_grad()
def loss(folder, world):
    """What training makes smaller, at each size, on held-out samples at fixed noise levels."""
    student = PatchStudent(load_pipeline(str(folder)).transformer)
    data = load_file(world / "held-out/00000.safetensors")
    x0, labels, t = data["z0"], data["label"], torch.linspace(0, 999, len(data["label"])).long()
    x = student.mix(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)), t)
    error = {m: (student(x, t, labels, m).sample - student.target(x, t, labels)).square().flatten(1) for m in (2, 4)}
    return {m: float((student.level_weight(t) * e.mean(1)).mean()) for m, e in error.items()}


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run"
    validation = {"data": str(world / "held-out"), "every": 3}
    run_here(parsed(world, out, stages=[{**STAGE, "steps": 30}], validation=validation))
    return out


def test_converting_leaves_the_base_as_it_is(converted, pipeline_dir, dit):
    report = json.loads((converted.parent / "report.json").read_text())
    assert report["exact_at_1"] is True
    assert set(report["relative_error"]) == {"2", "4"}
    for path in pipeline_dir.rglob("*"):
        if path.is_file() and path.name != "README.md":
            assert (converted / path.relative_to(pipeline_dir)).read_bytes() == path.read_bytes()
    model, found = DiTTransformer2DModel.from_pretrained(converted / "transformer", output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    x, t, y = torch.randn(2, 4, 16, 16), torch.tensor([5, 900]), torch.tensor([0, 10])
    with torch.no_grad():
        expected = dit(x, t, y).sample
        assert torch.equal(model(x, t, y).sample, expected)
        ddit.apply(model, converted)
        assert torch.equal(model(x, t, y).sample, expected)
        with model.at(2):
            assert not torch.equal(model(x, t, y).sample, expected)
    assert report["parameters"]["fresh"] == sum(
        t.numel() for t in load_file(converted / "ddit/ddit.safetensors").values()
    )


def test_an_adapter_alone_names_its_base_and_samples_on_it(pipeline_dir, converted, tmp_path):
    inside("convert", pipeline_dir, "--method", "ddit", "--rank", "4", "--adapter-only", "-o", tmp_path / "a")
    assert names_in(tmp_path / "a") == ["ddit.json", "ddit.py", "ddit.safetensors", "upcycle.json"]
    same_tensors = load_file(tmp_path / "a/ddit.safetensors"), load_file(converted / "ddit/ddit.safetensors")
    assert same(*same_tensors)
    common = ("--steps", "4", "--classes", "0", "--schedule", "2:0.5,1:0.5")
    inside("sample", tmp_path / "a", *common, "-o", tmp_path / "alone")
    inside("sample", converted, *common, "-o", tmp_path / "beside")
    assert (tmp_path / "alone/samples.png").read_bytes() == (tmp_path / "beside/samples.png").read_bytes()


def test_a_base_of_the_hub_whose_weights_are_not_wanted_is_not_downloaded(tmp_path):
    """FLUX's shards without embedding and head stay where they are."""
    flux = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    flux.save_pretrained(tmp_path / "flux/transformer", max_shard_size="30KB")
    index = json.loads((tmp_path / "flux/transformer/diffusion_pytorch_model.safetensors.index.json").read_text())
    needed = {index["weight_map"][f"{layer}.weight"] for layer in ("x_embedder", "proj_out")}
    assert needed < {*index["weight_map"].values()}
    with FakeHub() as hub:
        hub.add("lab/flux", tmp_path / "flux")
        environment = hub.env(tmp_path / "home")
        run(
            "convert",
            "lab/flux",
            "--method",
            "ddit",
            "--rank",
            "2",
            "--adapter-only",
            "-o",
            tmp_path / "a",
            env=environment,
        )
        fetched = {name.rsplit("/", 1)[-1] for name in hub.downloads() if name.endswith(".safetensors")}
    assert fetched == needed
    here = make_plan(open_backbone(str(tmp_path / "flux")), Options(rank=2), adapter_only=True)
    assert same(load_file(tmp_path / "a/ddit.safetensors"), here.tensors)
    config, tensors = ddit.load_adapter(tmp_path / "a")
    assert (config.base, config.prediction, len(str(config.base_revision))) == ("lab/flux", "flow", 40)
    ddit.attach(flux, config, tensors)


def test_training_brings_coarse_steps_nearer_and_changes_nothing_else(trained, world):
    assert {row["m"] for row in rows_of(trained / "log.csv")} == {"2", "4"}
    before, after = (loss(trained / name, world) for name in ("start", "export"))
    assert all(after[m] < 0.9 * before[m] for m in (2, 4)), (before, after)
    assert len(rows_of(trained / "validation.csv")) == 10
    for path in (world / "teacher").rglob("*.safetensors"):
        assert (trained / "export" / path.relative_to(world / "teacher")).read_bytes() == path.read_bytes()
    config, _ = ddit.load_adapter(trained / "export")
    assert set(config.variance) == {"2", "4"}
    history = json.loads((trained / "export/upcycle.json").read_text())["history"]
    assert [event["what"] for event in history] == ["convert", "finetune"]


def test_a_continued_run_ends_where_an_uninterrupted_one_ends(world, tmp_path):
    whole, cut = parsed(world, tmp_path / "whole"), parsed(world, tmp_path / "cut")
    run_here(whole)
    path = tmp_path / "cut.yaml"
    path.write_text(json.dumps(recipe(world, tmp_path / "cut", stages=[STAGE])))
    process = start(path)
    while process.poll() is None and not (tmp_path / "cut/checkpoints/step-0000002").exists():
        pass
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    run_here(cut, resume=(tmp_path / "cut/checkpoints").exists())
    weights = [load_file(tmp_path / name / "export/ddit/ddit.safetensors") for name in ("whole", "cut")]
    assert same(*weights)


def test_two_ranks_learn_what_one_learns(world, tmp_path):
    run_here(parsed(world, tmp_path / "one"))
    path = tmp_path / "two.yaml"
    path.write_text(json.dumps(recipe(world, tmp_path / "two")))
    process = start(path, ranks=2)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    one, two = (load_file(tmp_path / name / "export/ddit/ddit.safetensors") for name in ("one", "two"))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=1e-3)


def test_sampling_says_which_step_took_which_size_and_why(trained, tmp_path):
    arguments = ("sample", trained / "export", "--steps", "8", "--classes", "0,1")
    done = inside(*arguments, "--schedule", "4:0.25,2:0.5,1:0.25", "--json", "-o", tmp_path / "fixed")
    assert json.loads(done.stdout)["steps_by_size"] == {"4": 2, "2": 4, "1": 2}
    inside(*arguments, "-o", tmp_path / "plain")
    assert "patches.json" not in names_in(tmp_path / "plain")
    done = inside(*arguments, "--threshold", "1e9", "--json", "-o", tmp_path / "coarse")
    assert json.loads(done.stdout)["steps_by_size"] == {"4": 5, "1": 3}
    told = json.loads((tmp_path / "coarse/patches.json").read_text())
    assert [entry["m"] for entry in told["batches"][0]] == [1] * 3 + [4] * 5
    assert all(entry["why"] for entry in told["batches"][0])
    assert (tmp_path / "coarse/patches.png").stat().st_size > 1000
    inside(*arguments, "--threshold", "0", "-o", tmp_path / "never")
    assert (tmp_path / "never/samples.png").read_bytes() == (tmp_path / "plain/samples.png").read_bytes()
    done = inside(*arguments, "--threshold", "1e9", "--order", "1", "--json", "-o", tmp_path / "first")
    assert json.loads(done.stdout)["steps_by_size"] == {"4": 7, "1": 1}


def test_held_steps_and_guidance_intervals_leave_the_schedule_as_it_is(trained, tmp_path):
    """A fixed schedule goes by the sampler's steps, whether the model was asked or not; a change of the batch within a
    run does not begin another."""
    arguments = ("sample", trained / "export", "--steps", "8", "--classes", "0,1", "--json")
    fixed = ("--schedule", "4:0.5,1:0.5", "--sampler", "ddim")
    done = json.loads(inside(*arguments, *fixed, "--hold", "2", "-o", tmp_path / "held").stdout)
    assert done["steps_by_size"] == {"4": 2, "1": 3}
    told = json.loads((tmp_path / "held/patches.json").read_text())["batches"][0]
    assert [(entry["step"], entry["m"]) for entry in told] == [(0, 4), (2, 4), (4, 1), (6, 1), (7, 1)]
    interval = ("--guidance-interval", "0:500")
    done = json.loads(inside(*arguments, *interval, "--threshold", "1e9", "-o", tmp_path / "some").stdout)
    assert done["steps_by_size"] == {"4": 5, "1": 3}
    alone = (*fixed, "--hold", "0.8", "--batch-size", "1", "--json", "-o", tmp_path / "alone")
    done = json.loads(inside(*arguments[:4], "--classes", "0", *alone).stdout)
    assert sum(done["steps_by_size"].values()) == done["steps_asked"] < 8
    told = json.loads((tmp_path / "alone/patches.json").read_text())["batches"][0]
    assert all(entry["m"] == (4 if entry["step"] < 4 else 1) for entry in told)


def test_sizes_that_would_go_by_the_rest_of_a_batch(trained, tmp_path, failing):
    model, threshold = trained / "export", ("--threshold", "0.1", "-o", tmp_path / "x")
    assert "--policy grouped" in failing("sample", model, "--balanced", "-n", "4", *threshold)
    assert "--hold with a limit" in failing("sample", model, "--hold", "0.1", *threshold)
    fixed = ("--schedule", "4:0.5,1:0.5", "-o", tmp_path / "x")
    assert "--hold with a limit" in failing("sample", model, "--hold", "0.1", *fixed)


def test_stock_pipelines_have_the_base_bits_with_the_base_patches(trained, world):
    pipe = DiTPipeline.from_pretrained(trained / "export")
    pipe.set_progress_bar_config(disable=True)

    def draw():
        labels = {"class_labels": [0, 3], "num_inference_steps": 4, "output_type": "np"}
        return pipe(**labels, generator=torch.Generator().manual_seed(0)).images

    pipe.transformer.register_forward_pre_hook(  # DiTPipeline sends 1000 for the null class
        lambda module, args, kwargs: (args, {**kwargs, "class_labels": kwargs["class_labels"].clamp(max=4)}),
        with_kwargs=True,
    )
    plain = draw()
    ddit.apply(pipe, trained / "export")
    assert (draw() == plain).all()
    pipe.transformer.set_schedule(fixed=[(4, 0.5), (1, 0.5)])
    assert (draw() != plain).any()
    pipe.transformer.set_schedule(threshold=0.0)
    assert (draw() == plain).all()


def test_calibration_stores_a_threshold_that_reaches_the_speed_up(trained, tmp_path):
    shutil.copytree(trained / "export", tmp_path / "x")
    options = ("--steps", "12", "--classes", "0,1", "--cost", "tokens", "--json")
    done = json.loads(inside("calibrate", tmp_path / "x", "--speed-up", "1.3", *options).stdout)
    config, _ = ddit.load_adapter(tmp_path / "x")
    assert config.threshold == done["threshold"]
    assert config.calibration["steps"] == 12
    sample = ("sample", tmp_path / "x", "--steps", "12", "--classes", "0,1", "--json", "-o", tmp_path / "s")
    used = json.loads(inside(*sample).stdout)
    assert used["steps_by_size"] == done["steps_by_size"]
    cost = sum(n / int(m) ** 2 for m, n in used["steps_by_size"].items())
    assert done["speed_up"] == pytest.approx(12 / cost, abs=1e-3)
    assert done["speed_up"] >= 1.3 * 0.98
    inside("push-to-hub", tmp_path / "x", "you/x", "--dry-run", "--json")  # its digests are right


def test_pushing_an_adapter(trained, tmp_path):
    done = json.loads(inside("push-to-hub", trained / "export", "you/x", "--dry-run", "--json").stdout)
    assert "ddit/ddit.safetensors" in done["files"]
    assert "transformer/diffusion_pytorch_model.safetensors" in done["files"]
    for words in ("trained by distillation", "ddit.apply", "distill: 1.0", "mean over x2, x4"):
        assert words in done["card"]
    for words in ("base_model", "router", "tail_drop"):
        assert words not in done["card"]
    shutil.copytree(trained / "export/ddit", tmp_path / "alone")
    alone = json.loads(inside("push-to-hub", tmp_path / "alone", "you/x", "--dry-run", "--json").stdout)
    assert set(alone["files"]) == {"ddit.json", "ddit.py", "ddit.safetensors", "README.md"}


def test_info(trained, tmp_path):
    facts = json.loads(inside("info", trained / "export", "--json").stdout)
    assert (facts["kind"], facts["patches"], facts["rank"]) == ("ddit", [2, 4], 2)
    assert [event["what"] for event in facts["provenance"]["history"]] == ["convert", "finetune"]
    assert "an adapter for coarser patches" in inside("info", trained / "export/ddit").stdout


def test_damaged_adapters_are_not_pushed(converted, tmp_path, failing):
    shutil.copytree(converted, tmp_path / "x")
    tensors = load_file(tmp_path / "x/ddit/ddit.safetensors")
    save_file({**tensors, "proj_out_2.coarse.2.bias": tensors["proj_out_2.coarse.2.bias"] * torch.nan},
              tmp_path / "x/ddit/ddit.safetensors")  # fmt: skip
    assert "is not what was exported" in failing("push-to-hub", tmp_path / "x", "you/x", "--dry-run")
    (tmp_path / "x/upcycle.json").unlink()
    assert "NaN" in failing("push-to-hub", tmp_path / "x", "you/x", "--dry-run")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--ratio", "4"), "--ratio is for --method dc-dit"),
        (("--patches", "4,2"), "--patches 4,2 is not a list of ascending factors"),
        (("--patches", "two"), "--patches two is not a list"),
        (("--component", "unet"), "neither unet/config.json nor config.json"),
        (("--variant", "fp16"), "has no weights of variant 'fp16'"),
    ],
)
def test_bad_conversions(pipeline_dir, tmp_path, failing, arguments, says):
    assert says in failing("convert", pipeline_dir, "--method", "ddit", *arguments, "-o", tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_other_bad_input(pipeline_dir, converted, trained, world, tmp_path, failing):
    assert "--patches is for --method ddit" in failing("convert", pipeline_dir, "--patches", "2", "-o", tmp_path / "x")
    for options, says in (
        (("--schedule", "3:1"), "this model has 1, 2, 4, not 3"),
        (("--schedule", "2:0.5"), "whose shares add up to 1"),
        (("--threshold", "-1"), "--threshold -1.0 must be a number"),
        (("--threshold", "1", "--schedule", "2:1"), "two ways"),
        (("--tokens", "3"), "leave out --tokens"),
        (("--schedule", "2:1", "--order", "2"), "--order is for decisions by a threshold"),
        (("--base", "x/y"), "--base x/y is for an adapter alone"),
    ):
        assert says in failing("sample", converted, *options, "-o", tmp_path / "x")
    assert "leave out --schedule" in failing("sample", pipeline_dir, "--schedule", "2:1", "-o", tmp_path / "x")
    assert "holds no adapter" in failing("calibrate", pipeline_dir)
    assert "no threshold is 99 times as fast" in failing(
        "calibrate", trained / "export", "--speed-up", "99", "--steps", "6"
    )
    shutil.copytree(converted, tmp_path / "odd")
    (tmp_path / "odd/ddit/ddit.json").write_text("{")
    assert str(tmp_path / "odd") in failing("sample", tmp_path / "odd", "-o", tmp_path / "x")
    path = tmp_path / "r.yaml"
    for change, says in (
        ({"convert": {"ratio": 4}}, "convert: does not go with method: ddit"),
        ({"preview": {}}, "preview: does not go with method: ddit"),
        ({"stages": [{**STAGE, "losses": {"router": 1}}]}, "method ddit has the loss distill alone"),
        ({"stages": [{**STAGE, "freeze": []}]}, "freeze: does not go with method: ddit"),
        ({"ddit": {"patches": [4, 2]}}, "must ascend"),
        ({"method": "dc-dit"}, "ddit: is for method: ddit"),
    ):
        path.write_text(json.dumps(recipe(world, tmp_path / "run", **change)))
        assert says in failing("finetune", path)


def test_another_base_is_refused(converted, world, tmp_path, failing):
    path = tmp_path / "r.yaml"
    values = recipe(world, tmp_path / "run", student=str(converted))
    del values["ddit"]
    path.write_text(json.dumps(values))
    assert "does not fit the model" in failing("finetune", path)


def test_noise_schedules_are_those_of_the_base(pipeline_dir, tmp_path):
    shutil.copytree(pipeline_dir, tmp_path / "p")
    file = tmp_path / "p/scheduler/scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_end": 0.012, "beta_schedule": "scaled_linear"}))
    config = make_plan(open_backbone(str(tmp_path / "p")), Options()).config
    assert (config.beta_end, config.beta_schedule) == (0.012, "scaled_linear")
    sigma = ddit.Noise(config).levels(torch.tensor([999]))[1]
    assert sigma != ddit.Noise(replace(config, beta_schedule="linear")).levels(torch.tensor([999]))[1]


def test_adapters_of_the_hub_are_used(converted, pipeline_dir, tmp_path):
    """Beside their base, and alone: whatever the id says, the adapter in it counts."""
    run("convert", pipeline_dir, "--method", "ddit", "--rank", "4", "--adapter-only", "-o", tmp_path / "alone")
    common = ("--steps", "4", "--classes", "0", "--schedule", "2:0.5,1:0.5", "--json")
    with FakeHub() as hub:
        hub.add("lab/beside", converted)
        hub.add("lab/alone", tmp_path / "alone")
        for name in ("beside", "alone"):
            done = run("sample", f"lab/{name}", *common, "-o", tmp_path / f"{name}-s", env=hub.env(tmp_path / "home"))
            assert json.loads(done.stdout)["steps_by_size"] == {"2": 2, "1": 2}
    assert (tmp_path / "beside-s/samples.png").read_bytes() == (tmp_path / "alone-s/samples.png").read_bytes()


def test_a_base_of_the_hub_comes_without_copies_for_other_programs(pipeline_dir, tmp_path):
    shutil.copytree(pipeline_dir, tmp_path / "base")
    weights = tmp_path / "base/transformer/diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), tmp_path / "base/transformer/diffusion_pytorch_model.bin")
    weights.unlink()  # as legacy DiTs are
    (tmp_path / "base/all-in-one.safetensors").write_bytes(b"large")
    with FakeHub() as hub:
        hub.add("lab/dit", tmp_path / "base")
        options = ("--method", "ddit", "--rank", "2", "--no-verify", "-o", tmp_path / "x")
        run("convert", "lab/dit", *options, env=hub.env(tmp_path / "home"))
        assert "all-in-one.safetensors" not in hub.downloads()
    assert (tmp_path / "x/transformer/diffusion_pytorch_model.bin").is_file()


def test_what_a_threshold_was_chosen_for_is_told(trained, tmp_path):
    shutil.copytree(trained / "export", tmp_path / "x")
    inside("calibrate", tmp_path / "x", "--speed-up", "1.3", "--steps", "8", "--cost", "tokens")
    done = inside("sample", tmp_path / "x", "--steps", "9", "--classes", "0", "-o", tmp_path / "s")
    assert "the threshold was chosen for 8 steps and this run has 9" in done.stderr
    scheduler = tmp_path / "x/scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"_class_name": "DDPMScheduler"}))
    done = inside("sample", tmp_path / "x", "--steps", "8", "--classes", "0", "-o", tmp_path / "t")
    assert "DDPMScheduler adds noise" in done.stderr


def test_a_transformer_without_its_pipeline_becomes_an_adapter_only(pipeline_dir, tmp_path, failing):
    folder = pipeline_dir / "transformer"
    assert "add --adapter-only" in failing("convert", folder, "--method", "ddit", "-o", tmp_path / "x")
    inside("convert", folder, "--method", "ddit", "--adapter-only", "-o", tmp_path / "x")
    config = json.loads((tmp_path / "x/ddit.json").read_text())
    for key, value in (("num_train_timesteps", "a"), ("variance", {"2": "x"}), ("base", 5), ("beta_end", 2.0)):
        (tmp_path / "x/ddit.json").write_text(json.dumps(config | {key: value}))
        assert key in failing("info", tmp_path / "x")
