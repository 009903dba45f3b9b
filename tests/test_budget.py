"""Budgets: a fixed number of tokens, tail drop and Lite-CFG in every form, and a tail drop found for a cost."""

import json
import shutil

import pytest
import torch
from conftest import inside, run
from test_fresh_process import fresh
from torch._dynamo.testing import CompileCounter

from upcycle import provenance
from upcycle.errors import UpcycleError
from upcycle.evaluation.flops import chunked_dit_flops, dit_flops, teacher_flops
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.sampling.budget import parse
from upcycle.sampling.pipeline import load_pipeline
from upcycle.sources import open_source
from upcycle.sources.student import load_student
from upcycle.training.run import _open_student

X = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
T, Y = torch.tensor([900, 20, 500]), torch.tensor([1, 10, 3])


@pytest.fixture(params=["lean", "paper"])
def student(request):
    """Random weights, so that the router keeps what it likes."""
    torch.manual_seed(0)
    lean = request.param == "lean"
    model = ChunkedDiT(
        2,
        16,
        num_layers=2,
        sample_size=16,
        num_classes=10,
        patch_size=2 if lean else 1,
        scaffold=request.param,
        guide=0,
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


@torch.no_grad()
def test_the_tokens_that_tail_dropping_keeps(student):
    for i in range(3):
        arguments = X[i : i + 1], T[i : i + 1], Y[i : i + 1]
        student.set_tokens(None)
        dropped = student(*arguments, tail_drop=0.37)
        student.set_tokens(int(dropped.routing.mask.sum()))
        fixed = student(*arguments)
        assert torch.equal(fixed.routing.mask, dropped.routing.mask)
        torch.testing.assert_close(fixed.sample, dropped.sample, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 40, 256])
def test_every_sample_keeps_that_many_in_a_batch_of_mixed_t_and_classes(student, tokens):
    student.set_tokens(tokens)
    out = student(X, T, Y)
    assert out.routing.mask.sum(1).tolist() == [tokens] * 3
    for i in range(3):
        alone = student(X[i : i + 1], T[i : i + 1], Y[i : i + 1]).sample
        assert (out.sample[i] - alone[0]).abs().max() <= 1e-5 * alone.abs().max()


@torch.no_grad()
def test_one_graph_serves_batches_of_any_size(student):
    student.set_tokens(40)
    student(X, T, Y)  # makes the constants, whose absence a graph would depend on
    counter = CompileCounter()
    compiled = torch.compile(student, fullgraph=True, dynamic=True, backend=counter)
    for size in (3, 2, 7, 12, 5, 11):
        rows = torch.arange(size) % 3
        assert torch.equal(compiled(X[rows], T[rows], Y[rows]).sample, student(X[rows], T[rows], Y[rows]).sample)
    assert counter.frame_count == 1
    torch._dynamo.reset()


@torch.no_grad()
def test_the_whole_forward_is_one_graph(student):
    """A look at a tensor's value on the host would break it."""
    student.set_tokens(40)
    compiled = torch.compile(student, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(X, T, Y).sample, student(X, T, Y).sample)
    torch._dynamo.reset()
    student.set_tokens(None)
    with pytest.raises((torch._dynamo.exc.TorchDynamoException, RuntimeError)):
        torch.compile(student, fullgraph=True, backend="aot_eager")(X, T, Y)


def test_gradients_flow(student):
    student.set_tokens(40)
    student(X, T, Y).sample.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in student.transformer_blocks.parameters())


# -- forms ------------------------------------------------------------------------------------------------------------


def kept(student, x=X, t=T, y=Y):
    return student(x, timestep=t, class_labels=y).routing.mask.sum(1).tolist()


@torch.no_grad()
@pytest.mark.parametrize("nothing", [0, [0] * 3, {0: 0}, torch.zeros(3), {"0": 0, "500": 0}, [[0, 0.0]]])
def test_nothing_dropped_changes_no_bit(student, nothing):
    plain = student(X, T, Y).sample
    student.set_tail_drop(nothing)
    assert torch.equal(student(X, T, Y).sample, plain)
    student.set_lite_cfg(uncond=nothing)
    assert torch.equal(student(X, T, Y).sample, plain)


@torch.no_grad()
def test_every_form_drops_what_the_forward_drops_with_its_numbers(student):
    expected = student(X, T, Y, tail_drop=torch.tensor([0.5, 0.2, 0.5])).sample  # t = 900, 20, 500
    for form in ({0: 0.2, 500: 0.5}, {"500": 0.5, "0": 0.2}, [[0, 0.2], [500, 0.5]], [0.5, 0.2, 0.5],
                 torch.tensor([0.5, 0.2, 0.5], dtype=torch.float64)):  # fmt: skip
        student.set_tail_drop(form)
        assert torch.equal(student(X, T, Y).sample, expected)
    student.set_tail_drop(0.2)
    expected = student(X, T, Y, tail_drop=torch.tensor([0.2, 0.9, 0.2])).sample
    for form in (0.9, {0: 0.9, 500: 0.1}, [0.1, 0.9, 0.3]):  # label 10 is null
        student.set_lite_cfg(uncond=form)
        assert torch.equal(student(X, T, Y).sample, expected)


@torch.no_grad()
def test_the_halves_of_a_guided_batch_get_the_same_values(student):
    x, t, y = torch.cat([X, X]), torch.full((6,), 300), torch.tensor([1, 2, 3, 1000, 1000, 1000])
    student.set_tail_drop([0.1, 0.3, 0.5])
    assert torch.equal(student(x, t, y).sample, student(x, t, y, tail_drop=torch.tensor([0.1, 0.3, 0.5] * 2)).sample)
    student.set_lite_cfg(uncond=[0.6, 0.7, 0.8])
    expected = student(x, t, y, tail_drop=torch.tensor([0.1, 0.3, 0.5, 0.6, 0.7, 0.8]))
    assert torch.equal(student(x, t, y).sample, expected.sample)
    with pytest.raises(ValueError, match="tail_drop has 3 values, and the batch 4 samples"):
        student(x[:4], t[:4], y[:4])


@torch.no_grad()
def test_a_schedule_of_tail_drops_never_looks_at_the_timesteps(student):
    """A tensor without data gives its values to nobody."""
    student.set_tail_drop({0: 0.2, 300: 0.5, 500: 0.7})
    student.set_lite_cfg({0: 0.3, 500: 0.9})
    drops = student._per_sample("tail_drop", torch.empty(3, dtype=torch.int64, device="meta"))
    assert drops.shape == (3,)
    assert drops.is_meta
    assert student._per_sample("tail_drop", torch.tensor([299, 300, 500])).tolist() == pytest.approx([0.2, 0.5, 0.7])


def test_schedules_of_tokens(student):
    student.set_tokens({"0": 96, "500": 32})
    with torch.no_grad():
        assert [kept(student, t=torch.full((3,), t)) for t in (999, 500, 499, 0)] == [[32] * 3] * 2 + [[96] * 3] * 2
        with pytest.raises(ValueError, match=r"ask for \[32, 96\]"):
            student(X, T, Y)
    student.set_tokens([(0, 40)])
    assert student.tokens == 40


def test_forms_that_say_nothing(student):
    for wrong in (1, -0.1, [], [0.1, 1.0], {}, {500: 0.1}, {0: 0.1, 500: 1}, [[0, 0.1], [0, 0.2]], "many", None,
                  {0.5: 0.1}, torch.zeros(2, 2), [[0, "x"]], float("nan")):  # fmt: skip
        with pytest.raises(ValueError, match="tail_drop must"):
            student.set_tail_drop(wrong)
    for wrong in (0, -1, 1.5, {0: 0}, {10: 5}, {}, "x", [1, 2]):
        with pytest.raises(ValueError, match="tokens must"):
            student.set_tokens(wrong)


def test_words_of_the_command_line(failing, export_dir, tmp_path):
    words = {"--tail-drop": "500:0.5,0:0.2", "--uncond-tail-drop": "0.9"}
    assert parse(words) == {"--tail-drop": [(0, 0.2), (500, 0.5)], "--uncond-tail-drop": 0.9}
    assert parse({"--tokens": "500:32,0:96", "--budget": None}) == {"--tokens": [(0, 96), (500, 32)]}
    assert parse({"--budget": "40T"}) == {"--budget": {"tflops": 40}}
    assert parse({"--budget": "0.6"}) == {"--budget": {"share": 0.6}}
    for text in ("", "many", "10:5", "0:5,0:6", "0:5,1000:6", "0:5,6", "0:5:6"):
        with pytest.raises(UpcycleError, match="--tokens"):
            parse({"--tokens": text})
    for option, text in (("--tail-drop", "1"), ("--uncond-tail-drop", "0:0.1,5:-1"), ("--budget", "T"),
                         ("--budget", "0"), ("--budget", "nan")):  # fmt: skip
        with pytest.raises(UpcycleError, match=f"{option} {text}"):
            parse({option: text})
    for other in ("--tail-drop", "--uncond-tail-drop", "--budget"):
        assert "two budgets" in failing("sample", export_dir, "--tokens", "20", other, "0.3")


def test_sample(export_dir, pipeline_dir, tmp_path, failing):
    common = ["--classes", "1,9", "--steps", "4", "--json", "-o"]
    fixed = json.loads(run("sample", export_dir, "--tokens", "20", *common, tmp_path / "fixed").stdout)
    assert fixed["tokens_kept"] == 20
    # DDIM, 4 steps of 1000: t = 751, 501, 251, 1 or near
    for words, mean in (("--tokens 0:96,400:32", 64), ("--tail-drop 0:0.25,400:0.5", 40)):
        done = json.loads(inside("sample", export_dir, *words.split(), *common, tmp_path / words[2:6]).stdout)
        assert done["tokens_kept"] == mean
    lite = json.loads(inside("sample", export_dir, "--uncond-tail-drop", "0.5", *common, tmp_path / "lite").stdout)
    config = load_pipeline(str(export_dir)).transformer.config
    assert lite["tokens_kept"] == 64
    spent = sum(sum(chunked_dit_flops(config, tokens).values()) for tokens in (64, 32))
    assert lite["share_of_teacher"] == pytest.approx(spent / (2 * teacher_flops(config)), rel=1e-12)
    assert "--tokens 300" in failing("sample", export_dir, "--tokens", "300", "-o", tmp_path / "no")
    assert "leave out --tokens" in failing("sample", pipeline_dir, "--tokens", "20", "-o", tmp_path / "no")
    assert not (tmp_path / "no").exists()


# -- a tail drop for a cost -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def calibrated(export_dir, tmp_path_factory):
    """An export that has been calibrated in four guided steps; every sample of it keeps 64 tokens."""
    folder = shutil.copytree(export_dir, tmp_path_factory.mktemp("calibrated") / "student")
    inside("calibrate", folder, "--steps", "4", "--classes", "1,9")
    return folder


def test_calibrate(calibrated, export_dir, failing, pipeline_dir):
    before, after = (json.loads((f / "transformer/config.json").read_text()) for f in (export_dir, calibrated))
    found = after.pop("calibration")
    assert after == {key: value for key, value in before.items() if key != "calibration"}
    assert (found["steps"], found["classes"], found["seeds"], found["sampler"]) == (4, [1, 9], [0, 1], "DDIMScheduler")
    assert len(found["timesteps"]) == 4
    for half in ("conditional", "unconditional"):
        assert found[half] == {"tokens": [64] * 4, "squares": [64**2] * 4}
    a, b, c = found["flops"]
    for tokens in (1, 64, 200):
        assert a + b * tokens + c * tokens**2 == sum(chunked_dit_flops(after, tokens).values())
    assert found["teacher_flops"] == dit_flops(after)
    assert "set_budget" in inside("info", calibrated).stdout
    file = "transformer/config.json"
    assert provenance.read(calibrated)["files"][file]["sha256"] == provenance.digest(calibrated / file)
    assert "leave out --speed-up" in failing("calibrate", calibrated, "--speed-up", "2")
    assert "no student" in failing("calibrate", pipeline_dir)
    assert "nothing to calibrate; give the folder of a student or an adapter" in failing("calibrate", "digits")


def test_the_cost_that_was_asked_for(calibrated, tmp_path, failing):
    model = load_pipeline(str(calibrated)).transformer
    teacher = model.config.calibration["teacher_flops"]
    forward = lambda tokens: sum(chunked_dit_flops(model.config, tokens).values())  # noqa: E731
    for tokens in (10, 33, 60):
        model.set_budget(share=forward(tokens) / teacher)
        assert 64 - int(64 * model.tail_drop) in (tokens, tokens + 1)  # within the token that rounding leaves open
        found = model.tail_drop
        model.set_budget(tflops=8 * forward(tokens) / 1e12)
        assert model.tail_drop == pytest.approx(found, abs=1e-9)
        model.set_budget(tflops=forward(tokens) / 1e12, steps=1, guided=False)
        assert model.tail_drop == pytest.approx(found, abs=1e-9)
    # Lite-CFG leaves more to the conditional half, whichever is set first.
    lite = (forward(40) + forward(32)) / 2 / teacher
    model.set_budget(share=lite)
    even = model.tail_drop
    model.set_lite_cfg(uncond=0.5)
    assert 64 - int(64 * model.tail_drop) in (40, 41)
    assert model.tail_drop < even
    model.set_lite_cfg(uncond={0: 0.5})
    assert 64 - int(64 * model.tail_drop) in (40, 41)
    model.set_tail_drop(0.1)
    assert model.budget is None
    model.set_lite_cfg(None)
    model.set_budget(share=forward(64) / teacher)
    assert model.tail_drop == 0
    for share in (0.01, 3.0):
        with pytest.raises(ValueError, match=rf"is not to be had .*; \d.* to {forward(64) / teacher:.4g} are"):
            model.set_budget(share=share)
    asked = forward(30) / teacher
    done = json.loads(
        inside("sample", calibrated, "--budget", f"{asked}", "--classes", "3", "--steps", "3", "--json",
               "-o", tmp_path / "a").stdout)  # fmt: skip
    assert done["share_of_teacher"] == pytest.approx(asked, rel=0.02)
    assert "0.01 of its teacher's cost is not to be had" in failing(
        "sample", calibrated, "--budget", "0.01", "-o", tmp_path / "no"
    )


def test_without_calibration(export_dir, tmp_path, failing):
    with pytest.raises(ValueError, match="run upcycle calibrate"):
        load_pipeline(str(export_dir)).transformer.set_budget(share=0.6)
    assert "upcycle calibrate" in failing("sample", export_dir, "--budget", "0.6", "-o", tmp_path / "no")


def test_defaults_of_the_config_in_stock_diffusers(calibrated, tmp_path):
    """Arguments of from_pretrained are the config's, which save_pretrained keeps."""
    code = """
        def load(folder=where, **options):
            return AutoModel.from_pretrained(folder, subfolder="transformer", trust_remote_code=True, **options)

        @torch.no_grad()
        def out(model):
            x = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1)
            return model(x, torch.tensor([700] * 6), torch.tensor([1, 2, 3] + [1000] * 3)).sample

        plain = load()
        tflops = 1.2 * 8 * plain.config.calibration["teacher_flops"] / 1e12
        for name, options, call in (
            ("number", {"tail_drop": 0.3}, lambda m: m.set_tail_drop(0.3)),
            ("schedule", {"tail_drop": {0: 0.2, 500: 0.5}}, lambda m: m.set_tail_drop([(0, 0.2), (500, 0.5)])),
            ("samples", {"tail_drop": [0.1, 0.2, 0.3]}, lambda m: m.set_tail_drop([0.1, 0.2, 0.3])),
            ("lite", {"uncond_tail_drop": 0.9}, lambda m: m.set_lite_cfg(uncond=0.9)),
            ("tokens", {"tokens": {0: 40, 500: 20}}, lambda m: m.set_tokens({0: 40, 500: 20})),
            ("share", {"budget": 1.3, "uncond_tail_drop": 0.5},
             lambda m: (m.set_budget(share=1.3), m.set_lite_cfg(uncond=0.5))),
            ("tflops", {"budget": {"tflops": tflops}}, lambda m: m.set_budget(tflops=tflops)),
        ):
            model = load(**options)
            found = out(model)
            assert not torch.equal(found, out(plain)), name
            model.save_pretrained(f"{scratch}/{name}/transformer")
            assert torch.equal(found, out(load(f"{scratch}/{name}"))), name
            called = load()
            call(called)
            assert torch.equal(found, out(called)), name
        try:
            load(tail_drop=0.3, budget=1.3)
        except ValueError as error:
            assert "tail_drop=0" in str(error)
        else:
            raise AssertionError
        plain.register_to_config(tail_drop=0.3)
        plain.save_pretrained(f"{scratch}/registered/transformer")
        assert load(f"{scratch}/registered").tail_drop == 0.3
    """
    fresh(code, calibrated, tmp_path)


def configured(folder, to, without=(), **changes):
    """A copy of an export with another config."""
    shutil.copytree(folder, to)
    path = to / "transformer/config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in without}
    path.write_text(json.dumps(config | changes))
    return to


def test_defaults_in_the_commands(export_dir, calibrated, pipeline_dir, tmp_path):
    new = ("uncond_tail_drop", "tokens", "budget", "calibration")
    old = load_student(configured(export_dir, tmp_path / "old", without=new))
    assert (old.tail_drop, old.uncond_tail_drop, old.tokens, old.budget) == (0, None, None, None)
    halved = configured(export_dir, tmp_path / "halved", tail_drop={"0": 0.5, "700": 0.25})
    assert "0:0.5,700:0.25 by default" in inside("info", halved).stdout
    draw = ["--classes", "3", "--steps", "2", "--guidance-scale", "1", "--json"]
    done = json.loads(inside("sample", halved, *draw, "-o", tmp_path / "a").stdout)
    assert (done["tail_drop"], done["tokens_kept"]) == ("0:0.5,700:0.25", 32)
    done = json.loads(inside("sample", halved, *draw, "--tail-drop", "0", "-o", tmp_path / "b").stdout)
    assert (done["tail_drop"], done["tokens_kept"]) == (0, 64)
    # A default for the run that was calibrated holds for the run that is drawn; training begins without it.
    thrifty = configured(calibrated, tmp_path / "thrifty", budget={"share": 1.3, "steps": 50})
    done = json.loads(inside("sample", thrifty, *draw, "-o", tmp_path / "c").stdout)
    assert done["share_of_teacher"] == pytest.approx(1.3, rel=0.02)
    student = _open_student(thrifty, open_source(str(pipeline_dir)).config)
    assert (student.tail_drop, student.budget, student.config.budget, student.config.calibration) == (0, *[None] * 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA tells when the host waits")
@torch.no_grad()
def test_nothing_waits_for_the_device(student):
    student.cuda().set_tokens(40)
    arguments = X.cuda(), T.cuda(), Y.cuda()
    expected = student(*arguments).sample  # makes the constants
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = student(*arguments).sample
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (again - expected).abs().max() <= 1e-4 * expected.abs().max()  # atomics add up in any order
