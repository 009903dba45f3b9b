"""DDiT on Wan 2.2: two transformers, of which the second takes over at low noise. Tiny weights, the real commands."""

import copy
import dataclasses
import json
import shutil

import pytest
import tiny_text
import torch
from conftest import inside
from diffusers import WanPipeline
from runs import names_in, rows_of
from safetensors.torch import load_file
from tiny_text import TWO

from upcycle.latents.prompts import PromptFolder
from upcycle.models import ddit
from upcycle.training import flow

SIDES = ("--height", 32, "--width", 48, "--num-frames", 9)
WORDS = ("--prompt", "a red fox")
STAGE = {"name": "distill", "steps": 30, "lr": 3e-3, "losses": {"distill": 1.0}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """``wan`` (the pipeline), ``wan-ddit`` (converted), ``alone`` (its adapters alone) and ``latents``."""
    folder = tmp_path_factory.mktemp("two")
    tiny_text.make(TWO, folder / "wan")
    inside("convert", folder / "wan", "--method", "ddit", "--rank", 2, "-o", folder / "wan-ddit")
    inside("convert", folder / "wan", "--method", "ddit", "--rank", 2, "--adapter-only", "-o", folder / "alone")
    (folder / "prompts.txt").write_text("a red fox\n\na blue house\n")
    given = ("--prompts", folder / "prompts.txt", "--count", 6, "--steps", 3, *SIDES)
    inside("synthesize", folder / "wan", *given, "-o", folder / "latents")
    return folder


def pipeline(folder, **options):
    pipe = WanPipeline.from_pretrained(folder, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, steps=8, **options):
    options = {"num_inference_steps": steps, "height": 32, "width": 48, "num_frames": 9, **options}
    return pipe("a red fox", output_type="latent", generator=torch.Generator().manual_seed(0), **options).frames


def recipe(made, out, **changes):
    path = out.with_suffix(".yaml")
    content = {
        "method": "ddit", "teacher": str(made / "wan"), "data": str(made / "latents"), "out": str(out),
        "ddit": {"patches": [2, 4], "rank": 2}, "stages": [STAGE], "batch_size": 4, "data_workers": 0, "ema": 0.5,
        "log_every": 1, "save_every": 10, **changes,
    }  # fmt: skip
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


# -- convert ----------------------------------------------------------------------------------------------------------


def test_each_transformer_gets_an_adapter_in_its_place(made, tmp_path):
    before = {path.relative_to(made / "wan") for path in (made / "wan").rglob("*") if path.is_file()}
    for name in before:
        assert (made / "wan-ddit" / name).read_bytes() == (made / "wan" / name).read_bytes()
    parts = ["ddit.json", "ddit.py", "ddit.safetensors"]
    assert names_in(made / "wan-ddit/ddit") == names_in(made / "wan-ddit/ddit_2") == parts
    assert names_in(made / "alone") == sorted([*parts, "ddit_2", "upcycle.json"])
    found = ddit.load_adapters(made / "wan-ddit")
    assert [config.component for config, _ in found] == ["transformer", "transformer_2"]
    for (_, tensors), name in zip(found, ("transformer", "transformer_2"), strict=True):
        weights = load_file(made / "wan" / name / "diffusion_pytorch_model.safetensors")
        assert torch.equal(tensors["patch_embedding.coarse.2.bias"], weights["patch_embedding.bias"])
    # One of them: alone at the top of its folder, beside the pipeline in its own place.
    options = ("--method", "ddit", "--rank", 2, "--component", "transformer_2")
    inside("convert", made / "wan", *options, "--adapter-only", "-o", tmp_path / "second")
    assert names_in(tmp_path / "second") == sorted([*parts, "upcycle.json"])
    inside("convert", made / "wan", *options, "-o", tmp_path / "beside")
    assert "ddit" not in names_in(tmp_path / "beside")
    assert (tmp_path / "beside/ddit_2/ddit.json").read_bytes() == (tmp_path / "second/ddit.json").read_bytes()
    inside("convert", made / "wan", *options, "-o", tmp_path / "beside", "--force")  # knows what it wrote
    inside("convert", made / "wan", "--method", "ddit", "--adapter-only", "-o", tmp_path / "second", "--force")
    inside("convert", made / "wan", "--method", "ddit", "--adapter-only", "-o", tmp_path / "second", "--force")
    told = json.loads(inside("convert", made / "wan", "--method", "ddit", "--dry-run", "--json").stdout)
    assert told["components"] == ["transformer", "transformer_2"]
    assert told["parameters"]["reused"] == sum(
        p.numel() for name in told["components"] for p in getattr(pipeline(made / "wan"), name).parameters()
    )


# -- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"expand_timesteps": True}], ids=["plain", "a time for every token"])
def test_with_the_base_patches_the_stock_pipelines_bits_come_out(made, options):
    stock = draw(pipeline(made / "wan", **options), guidance_scale_2=3.0)
    pipe = pipeline(made / "wan", **options)
    ddit.apply(pipe, made / "alone")
    assert torch.equal(draw(pipe, guidance_scale_2=3.0), stock)
    schedule = pipe.transformer.set_schedule(threshold=0.0)
    assert torch.equal(draw(pipe, guidance_scale_2=3.0), stock)
    assert [entry["m"] for entry in schedule.log] == [1] * 8
    pipe.transformer_2.set_schedule(threshold=1e9)
    coarse = draw(pipe, guidance_scale_2=3.0)
    assert coarse.isfinite().all()
    assert not torch.equal(coarse, stock)
    assert [entry["m"] for entry in schedule.log] == [1] * 3 + [4] * 5


def test_a_run_goes_on_when_the_second_transformer_takes_over(made):
    """Where both are the same model, every decision and every bit is that of one transformer."""
    (config, tensors), (second, _) = ddit.load_adapters(made / "alone")
    one = pipeline(made / "wan", transformer_2=None)
    one.register_to_config(boundary_ratio=None)
    ddit.put_on(one, [(config, tensors)])
    two = pipeline(made / "wan")
    two.register_modules(transformer_2=copy.deepcopy(two.transformer))
    ddit.put_on(two, [(config, tensors), (second, tensors)])
    for model in (two.transformer, two.transformer_2):  # the same memory: kernels round by where it begins
        for mine, theirs in zip(model.parameters(), one.transformer.parameters(), strict=True):
            mine.data = theirs.data
    probe = one.transformer.schedule
    probe.always_look = True
    draw(one, 12)
    values = sorted(entry["deviation"]["2"][0] for entry in probe.log[3:])
    for settings in ({"threshold": values[len(values) // 2]}, {"fixed": [(4, 0.5), (2, 0.25), (1, 0.25)]}):
        logs, outs, calls = [], [], []
        two.transformer_2.register_forward_hook(lambda *_: calls.append(1))  # noqa: B023
        for pipe in (one, two):
            schedule = pipe.transformer.set_schedule(**settings)
            outs.append(draw(pipe, 12))
            logs.append(schedule.log)
        assert logs[0] == logs[1]
        assert torch.equal(*outs)
        assert len({entry["m"] for entry in logs[0]}) > 1
        assert 0 < len(calls) < 24, "with and without the prompt, of some steps"
    assert [entry["m"] for entry in logs[1]] == [4] * 6 + [2] * 3 + [1] * 3


def test_adapters_may_be_put_on_one_after_the_other(made):
    pipe = pipeline(made / "wan")
    first = ddit.apply(pipe, made / "wan-ddit/ddit", threshold=0.5)
    assert ddit.apply(pipe, made / "wan-ddit/ddit_2") is pipe.transformer_2
    assert pipe.transformer_2.schedule is first.schedule
    assert first.schedule.threshold == 0.5
    pipe = pipeline(made / "wan")
    ddit.apply(pipe, made / "alone/ddit_2", fixed=[(2, 0.5), (1, 0.5)])
    draw(pipe)
    count = len(pipe.transformer_2.schedule.log)
    assert 0 < count < 8
    assert [entry["m"] for entry in pipe.transformer_2.schedule.log] == [2] * round(count / 2) + [1] * (
        count - round(count / 2)
    ), "the shares are of the steps that it sees"
    with pytest.raises(ValueError, match="give the pipeline, or the folder of one"):
        ddit.apply(pipeline(made / "wan").transformer, made / "alone")
    with pytest.raises(ValueError, match="has no transformer_2"):
        ddit.apply(pipeline(made / "wan", transformer_2=None), made / "alone")
    with pytest.raises(ValueError, match="no id of the Hub"):
        ddit.apply(pipeline(made / "wan"), made / "alone", revision="main")
    other = pipeline(made / "wan")
    ddit.apply(other, made / "wan-ddit/ddit")
    config, _ = ddit.load_adapter(made / "wan-ddit/ddit_2")
    config.patches = [2]
    ddit.attach(other.transformer_2, config)
    with pytest.raises(ValueError, match="have other patches"):
        ddit.follow(other.transformer_2, other)


def test_an_adapter_that_does_not_fit_leaves_the_pipeline_as_it_was(made):
    (first, tensors), (second, others) = ddit.load_adapters(made / "alone")
    pipe = pipeline(made / "wan")
    name = min(others)
    for second_adapter, says in (
        ((second, {**others, name: others[name][:1]}), "does not fit the model"),
        ((dataclasses.replace(second, patches=[2]), None), "have other patches"),
    ):
        with pytest.raises(ValueError, match=says):
            ddit.put_on(pipe, [(first, tensors), second_adapter])
        assert ddit.switching(pipe) == []
        assert not any(".coarse." in name for name in pipe.transformer.state_dict())
    ddit.put_on(pipe, [(first, tensors)])
    with pytest.raises(ValueError, match="have other patches"):
        ddit.put_on(pipe, [(dataclasses.replace(second, patches=[2]), None)])
    assert ddit.switching(pipe) == [pipe.transformer]
    ddit.put_on(pipe, [(second, others)])
    assert ddit.switching(pipe) == [pipe.transformer, pipe.transformer_2]
    same = pipeline(made / "wan")
    same.register_modules(transformer_2=same.transformer)
    with pytest.raises(ValueError, match="are one model"):
        ddit.apply(same, made / "alone")


def test_two_thresholds_are_refused(made, tmp_path, failing):
    shutil.copytree(made / "wan-ddit", tmp_path / "x")
    for place, threshold in (("ddit", 0.25), ("ddit_2", 0.5)):
        path = tmp_path / "x" / place / "ddit.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "threshold": threshold}))
    says = "have threshold 0.25 and 0.5; give one threshold for both"
    with pytest.raises(ValueError, match=says):
        ddit.apply(pipeline(made / "wan"), tmp_path / "x")
    pipe = pipeline(made / "wan")
    ddit.apply(pipe, tmp_path / "x/ddit")
    with pytest.raises(ValueError, match=says):
        ddit.apply(pipe, tmp_path / "x/ddit_2")
    for given in ({"threshold": 0.3}, {"fixed": [(2, 0.5), (1, 0.5)]}):
        pipe = pipeline(made / "wan")
        schedule = ddit.apply(pipe, tmp_path / "x", **given).schedule
        assert schedule is pipe.transformer_2.schedule
        assert {name: getattr(schedule, name) for name in given} == given
    given = (*WORDS, "--steps", 4, *SIDES, "-o", tmp_path / "s")
    assert says in failing("sample", tmp_path / "x", *given)
    inside("sample", tmp_path / "x", *given, "--schedule", "2:0.5,1:0.5")
    inside("sample", tmp_path / "x", *given, "--threshold", 0.3, "--force")
    given = ("--steps", 12, "--cost", "tokens", *WORDS, *SIDES)
    inside("calibrate", tmp_path / "x", "--speed-up", 1.4, *given)
    ddit.apply(pipeline(made / "wan"), tmp_path / "x")


def test_the_commands_know_both(made, tmp_path):
    def sample(model, out, *options):
        return json.loads(inside("sample", model, *WORDS, "--steps", 8, *SIDES, "--json", "-o", out, *options).stdout)

    told = sample(made / "wan-ddit", tmp_path / "a", "--schedule", "4:0.5,2:0.25,1:0.25")
    assert told["steps_by_size"] == {"4": 4, "2": 2, "1": 2}
    (log,) = json.loads((tmp_path / "a/patches.json").read_text())["batches"]
    assert [entry["m"] for entry in log] == [4] * 4 + [2] * 2 + [1] * 2
    sample(made / "alone", tmp_path / "b", "--schedule", "4:0.5,2:0.25,1:0.25", "--base", made / "wan")
    assert (tmp_path / "b/samples.png").read_bytes() == (tmp_path / "a/samples.png").read_bytes()

    shutil.copytree(made / "wan-ddit", tmp_path / "x")
    given = ("--steps", 12, "--cost", "tokens", *WORDS, *SIDES, "--json")
    done = json.loads(inside("calibrate", tmp_path / "x", "--speed-up", 1.4, *given).stdout)
    configs = [config for config, _ in ddit.load_adapters(tmp_path / "x")]
    assert configs[0].threshold == configs[1].threshold == done["threshold"]
    assert configs[0].variance == configs[1].variance != {}
    assert configs[0].calibration == configs[1].calibration
    used = json.loads(inside("sample", tmp_path / "x", *given[:2], *given[4:], "-o", tmp_path / "s").stdout)
    assert used["steps_by_size"] == done["steps_by_size"]

    facts = json.loads(inside("info", tmp_path / "x", "--json").stdout)
    assert facts["components"] == ["transformer", "transformer_2"]
    assert facts["parameters"] == sum(t.numel() for _, ts in ddit.load_adapters(tmp_path / "x") for t in ts.values())
    assert "transformer and transformer_2" in inside("info", made / "alone").stdout
    done = json.loads(inside("push-to-hub", tmp_path / "x", "you/x", "--dry-run", "--json").stdout)
    assert {"ddit/ddit.safetensors", "ddit_2/ddit.safetensors", "ddit_2/ddit.py"} <= set(done["files"])
    assert "Both transformers have an adapter" in done["card"]


# -- finetune ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def loss(made, folder, component, low, high):
    """What training makes smaller, of one transformer on its own noise levels."""
    model = getattr(pipeline(made / "wan"), component)
    config, tensors = next(a for a in ddit.load_adapters(folder) if a[0].component == component)
    data = PromptFolder(made / "latents")
    student = flow.FlowStudent(ddit.attach(model, config, tensors), data, (low, high))
    rows, labels = [i % len(data) for i in range(24)], data.labels.repeat(4)
    x0 = torch.stack([data.row(i) for i in rows])
    t = torch.linspace(0, 999, 24).long()
    x = student.mix(x0, torch.randn(x0.shape, generator=torch.Generator().manual_seed(99)), t)
    expected = student.target(x, t, labels)
    return sum((student(x, t, labels, m).sample - expected).square().mean().item() for m in (2, 4))


def test_both_are_trained_each_on_its_own_noise_levels(made, tmp_path):
    given = {"validation": {"data": str(made / "latents"), "every": 15}}
    inside("finetune", recipe(made, tmp_path / "run", **given))
    far = [float(row["student"]) for row in rows_of(tmp_path / "run/validation.csv")]
    assert far[-1] < far[0]
    export = tmp_path / "run/export"
    assert names_in(export) == ["ddit.json", "ddit.py", "ddit.safetensors", "ddit_2", "upcycle.json"]
    for component, ends in (("transformer", (0.5, 1.0)), ("transformer_2", (0.0, 0.5))):
        before, after = (loss(made, folder, component, *ends) for folder in (made / "alone", export))
        assert after < 0.9 * before


def test_a_dry_run_counts_both(made, tmp_path, failing):
    reports = [
        json.loads(inside("finetune", recipe(made, tmp_path / "run", **given), "--dry-run", "--json", *options).stdout)
        for given, options in (
            ({}, []),
            ({"component": "transformer_2"}, ["--no-measure"]),
            ({"student": str(made / "alone"), "ddit": None}, ["--no-measure"]),
        )
    ]
    both, one, begun = (report["parameters"] for report in reports)
    assert both == begun
    assert (both["adapter"], both["base"]) == (2 * one["adapter"], 2 * one["base"])
    assert both["adapter"] == sum(t.numel() for _, ts in ddit.load_adapters(made / "alone") for t in ts.values())
    assert reports[0]["stages"][0]["flops_per_step"] == reports[1]["stages"][0]["flops_per_step"], "a sample sees one"
    assert reports[0]["hours"] > 0
    path = recipe(made, tmp_path / "run", data=str(tmp_path / "none"))
    assert "synthesize some first" in failing("finetune", path, "--dry-run")
    assert not (tmp_path / "run").exists()


def test_the_student_asks_each_transformer_about_its_own_levels(made):
    pipe = pipeline(made / "wan")
    ddit.apply(pipe, made / "alone")
    data = PromptFolder(made / "latents")
    both = flow.FlowStudent(pipe.transformer, data, (0.0, 1.0), pipe.transformer_2, boundary=0.5)
    x = torch.stack([data.row(i) for i in range(4)])
    t, labels = torch.tensor([900, 100, 499, 500]), data.labels[:4]
    with torch.no_grad():
        out = both(x, t, labels, 2).sample
        for model, rows in ((pipe.transformer, [0, 3]), (pipe.transformer_2, [1, 2])):
            alone = flow.FlowStudent(model, data)(x[rows], t[rows], labels[rows], 2).sample
            assert torch.equal(out[rows], alone)


def test_one_of_them_is_trained_and_the_other_kept(made, tmp_path, failing):
    path = recipe(made, tmp_path / "low", component="transformer_2", student=str(made / "alone"), ddit=None)
    inside("finetune", path)
    first, second = (load_file(tmp_path / "low/export" / at / "ddit.safetensors") for at in ("", "ddit_2"))
    starts = [load_file(made / "alone" / at / "ddit.safetensors") for at in ("", "ddit_2")]
    assert all(torch.equal(first[name], starts[0][name]) for name in first)
    assert any(not torch.equal(second[name], starts[1][name]) for name in second)
    before, after = (
        loss(made, folder, "transformer_2", 0.0, 0.5) for folder in (made / "alone", tmp_path / "low/export")
    )
    assert after < 0.9 * before
    inside("finetune", recipe(made, tmp_path / "high", component="transformer"))
    assert names_in(tmp_path / "high/export") == ["ddit.json", "ddit.py", "ddit.safetensors", "upcycle.json"]
    config, _ = ddit.load_adapter(tmp_path / "high/export")
    assert config.component == "transformer"
    says = "has no adapter for transformer_2; it has transformer"
    given = {"student": str(tmp_path / "high/export"), "ddit": None, "component": "transformer_2"}
    assert says in failing("finetune", recipe(made, tmp_path / "no", **given))
