"""Post-training: the losses against their definitions, runs on two ranks, and what is refused before a run starts."""

import dataclasses
import json
import shutil
import signal
from types import SimpleNamespace

import psutil
import pytest
import tiny
import torch
from conftest import run
from diffusers import AutoencoderKL
from PIL import Image
from runs import names_in, rows_of, run_here, small, start, steps_in, until, write_recipe
from safetensors.torch import save_file

from upcycle.errors import UpcycleError
from upcycle.graft.convert import convert
from upcycle.graft.plan import Options, make_plan
from upcycle.models.chunked_dit import ChunkedDiT, Routing, lattice_prior
from upcycle.sources import open_source
from upcycle.training import losses
from upcycle.training.data import Draws, open_data
from upcycle.training.run import prepare


def routing(probability, mask, score=None):
    return Routing(probability, probability, mask, mask, probability if score is None else score)


def test_ratio_loss_is_least_where_the_ratio_is_met():
    """Its value is 1 at mean probability = mean mask = 1/N; a group is averaged before the product."""
    p, mask = torch.full((4, 64), 0.25), torch.zeros(4, 64, dtype=torch.bool)
    mask[:, ::4] = True
    assert losses.ratio_loss(routing(p, mask), 4, group=2).item() == pytest.approx(1)
    ragged = mask.clone()
    ragged[0], ragged[1] = True, False
    whole = losses.ratio_loss(routing(p, ragged), 4, group=4)
    groups = losses.ratio_loss(routing(p, ragged), 4, group=1)
    r = ragged.float().mean()
    assert whole.item() == pytest.approx((4 / 3 * ((1 - r) * 0.75 + 3 * r * 0.25)).item())
    each = [4 / 3 * ((1 - q) * 0.75 + 3 * q * 0.25) for q in ragged.float().mean(1)]
    assert groups.item() == pytest.approx((sum(each) / 4).item())


def router_target(x0, alpha_bar, prior):
    return losses.router_target(losses.visible_detail(x0, alpha_bar, prior), 4)


def test_router_target_shares_the_budget_over_the_batch():
    """Detail decides over the whole batch; every sample gets at least two thirds of its even share."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.zeros(4, 1, 16, 16)
    x0[0] = torch.randn(1, 16, 16, generator=generator)
    target = router_target(x0, torch.full((4,), 0.9), torch.zeros(256))
    counts = target.sum(1).tolist()
    assert counts[0] > 128
    assert min(counts) >= int(256 / 6)
    assert sum(counts) <= 256 + 3 * int(256 / 6)
    alike = torch.randn(4, 1, 16, 16, generator=generator)
    noisy = router_target(alike, torch.tensor([1e-4, 0.9, 0.9, 0.9]), torch.zeros(256)).sum(1)
    assert noisy[0] == int(256 / 6), "detail that the noise hides attracts no tokens"
    assert noisy[1:].sum() == 256


def test_router_target_on_flat_images_is_the_lattice():
    prior = lattice_prior(16, 16, 2, torch.device("cpu"))
    target = router_target(torch.zeros(2, 1, 16, 16), torch.full((2,), 0.5), prior)
    assert torch.equal(target[0], prior >= 0)


def test_bias_controller_finds_the_ratio():
    logit = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    bias = torch.tensor(0.0)
    for _ in range(100):
        bias = bias.lerp(losses.bias_target(logit + bias, bias, 6.0), 0.1)
    assert ((logit + bias) > 0).float().mean().item() == pytest.approx(1 / 6, abs=0.002)


def test_two_ranks_train_as_one_does(world, tmp_path):
    """Two stages with other losses, frozen parts, gates and accumulation: the log and the validation of one rank, to
    1e-5."""
    align = {"diffusion": 0, "blocks": 1, "router": 0, "ratio": 0, "flops": 0}
    last = {"losses": {"ratio_group": 2}, "tail_drop": {"start": 0.0}, "teacher_guidance": 2}
    stages = (
        {"name": "align", "steps": 3, "lr": 1e-4, "losses": align, "freeze": ["head"]},
        # A small learning rate: AdamW enlarges rounding, and a token at the router's threshold may come or go.
        {"name": "rest", "steps": 3, "lr": 1e-4, **last},
    )
    changes = {"validation": {"data": str(world / "held-out"), "every": 4}, "data_workers": 1}
    changes["preview"] = {"every": 6, "labels": [0], "steps": 3}
    changes["convert"] = {"ratio": 4, "dydit": 0.6}
    run_here(small(world, tmp_path / "one", *stages, **changes))
    changes["gradient_accumulation"] = 2
    process = start(write_recipe(tmp_path / "two.yaml", world, *stages, **changes), "--json", ranks=2)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr[-3000:]
    assert json.loads(stdout)["step"] == 6, "one object, from one rank"
    assert names_in(tmp_path / "two") == names_in(tmp_path / "one") == [
        "checkpoints", "export", "log.csv", "previews", "recipe.yaml", "start", "validation.csv",
    ]  # fmt: skip
    newest = tmp_path / "two" / "checkpoints" / "step-0000006"
    assert len(list(newest.glob("random_states_*"))) == 2, "accelerate saves one a rank"
    for name in ("log.csv", "validation.csv"):
        ours, theirs = (rows_of(tmp_path / run / name) for run in ("one", "two"))
        for a, b in zip(ours, theirs, strict=True):
            assert a.get("stage") == b.get("stage")
            for key in a.keys() - {"stage"}:
                expected = pytest.approx(float(a[key]), abs=1e-5, rel=1e-5, nan_ok=True)
                assert float(b[key]) == expected, (name, a["step"], key)
    assert any(float(row["tail_drop"]) > 0 for row in rows_of(tmp_path / "one" / "log.csv"))


def test_two_ranks_stop_together_and_one_goes_on(world, tmp_path):
    """A signal that reaches one rank alone stops both; the checkpoint resumes on another number of ranks."""
    stage = {"steps": 150}
    process = start(write_recipe(tmp_path / "run.yaml", world, stage, save_every=1000), ranks=2)
    assert until(process, lambda: steps_in(tmp_path / "run") > 2), process.communicate()[1]
    psutil.Process(process.pid).children()[1].send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert stderr.count("go on with: upcycle finetune") <= 1
    (saved,) = (tmp_path / "run" / "checkpoints").glob("step-*")
    assert len(list(saved.glob("random_states_*"))) == 2
    assert 0 < int(saved.name.removeprefix("step-")) < 150
    run_here(small(world, tmp_path / "run", stage, save_every=1000), resume=True)
    assert [int(row["step"]) for row in rows_of(tmp_path / "run" / "log.csv")] == list(range(1, 151))


def test_a_nan_on_one_rank_is_explained_by_it(world, tmp_path):
    """Rank 0, which prints, does not have the bad sample; the step is skipped on both all the same."""
    recipe = small(world, tmp_path / "run")
    data = spoilt_sample(world, tmp_path / "data", recipe, 21)  # of step 3, the second half
    path = write_recipe(tmp_path / "run.yaml", world, data=data)
    process = start(path, ranks=2)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr[-3000:]
    assert stderr.count("warning: step 3 is skipped: loss, ") == 1
    assert "the data has NaN or infinite values in the samples at t=" in stderr
    assert rows_of(tmp_path / "run" / "log.csv")[-1]["skipped"] == "1"


def spoilt_sample(world, folder, recipe, item):
    """The training data with NaN in one sample."""
    data = open_data(recipe.data)
    z0 = torch.stack([data.row(i, flip=False, noise=None) for i in range(len(data))])
    z0[Draws(data, recipe, 1000, 4).row(item)] = float("nan")
    folder.mkdir()
    save_file({"z0": z0, "label": data.labels.clone()}, folder / "0.safetensors")
    return str(folder)


def test_a_student_can_be_given_and_the_published_start_trains(world, tmp_path):
    convert(make_plan(open_source(str(world / "teacher")), Options(init="paper", ratio=4)), tmp_path / "paper")
    run_here(small(world, tmp_path / "run", student=str(tmp_path / "paper"), convert={}))
    assert json.loads((tmp_path / "run/export/transformer/config.json").read_text())["scaffold"] == "paper"
    assert not (tmp_path / "run" / "start").exists()


def test_an_export_can_be_the_start_of_another_run(world, tmp_path):
    """Where the first run kept the guide, the second one anneals it."""
    run_here(small(world, tmp_path / "first", {"steps": 2, "anneal": {"until": None}}))
    student = str(tmp_path / "first" / "export")
    run_here(small(world, tmp_path / "second", {"steps": 4, "anneal": {"until": 1.0}}, student=student, convert={}))
    guides = [float(row["guide"]) for run in ("first", "second") for row in rows_of(tmp_path / run / "log.csv")]
    assert guides == pytest.approx([guides[0], guides[0], *(guides[0] * (1 - i / 4) for i in range(4))])
    assert json.loads((tmp_path / "second/export/transformer/config.json").read_text())["guide"] == 0


def test_batches_that_do_not_divide_over_ranks(world, tmp_path, monkeypatch):
    monkeypatch.setattr("upcycle.training.run.ranks", lambda: SimpleNamespace(num_processes=3))
    with pytest.raises(UpcycleError, match="batch_size 8 does not divide by 3 ranks x gradient_accumulation 1"):
        prepare(small(world, tmp_path / "run"))
    with pytest.raises(UpcycleError, match="choose a multiple of 6"):
        prepare(small(world, tmp_path / "run", batch_size=9, gradient_accumulation=2))
    with pytest.raises(UpcycleError, match="ratio_group 16 of stage post-train does not divide the 20 samples"):
        prepare(small(world, tmp_path / "run", batch_size=60))
    assert not (tmp_path / "run").exists()


def test_a_start_left_behind_is_not_reused(world, tmp_path):
    """The start is made anew for a new run, and must be there for a continued one."""
    out = tmp_path / "run"
    assert prepare(small(world, out)).student.config.ratio == 4
    assert prepare(small(world, out, convert={"ratio": 16})).student.config.ratio == 16
    recipe = small(world, out, {"steps": 1})
    run_here(recipe)
    shutil.rmtree(out / "start")
    with pytest.raises(UpcycleError, match="start is no export"):
        prepare(recipe, resume=True)


def test_a_short_run_still_has_a_log(world, tmp_path):
    run_here(small(world, tmp_path / "run", {"steps": 3}, log_every=2))
    assert [row["step"] for row in rows_of(tmp_path / "run" / "log.csv")] == ["2", "3"]


def test_what_cannot_work_is_refused_before_training(world, tmp_path):
    out = tmp_path / "run"
    out.write_text("")
    with pytest.raises(UpcycleError, match="is a file"):
        prepare(small(world, out))
    out.unlink()
    (out / "export").mkdir(parents=True)
    (out / "export" / "thesis.tex").write_text("")
    with pytest.raises(UpcycleError, match="export does not look like an output"):
        prepare(small(world, out))
    shutil.rmtree(out)
    untrained = {"distill": 0, "variational": 0}
    with pytest.raises(UpcycleError, match="predicts a sigma, which no loss of stage two trains"):
        prepare(small(world, out, {"name": "one"}, {"name": "two", "losses": untrained}))
    with pytest.raises(UpcycleError, match="data nowhere: no such folder"):
        prepare(small(world, out, validation={"data": "nowhere"}))
    with pytest.raises(UpcycleError, match=r"data digits-val has samples of \[1, 16, 16\]"):
        prepare(small(world, out, validation={"data": "digits-val"}))
    assert not out.exists()


@pytest.mark.parametrize("changes", [{"num_classes": 7}, {"out_channels": 4}])
def test_a_student_of_another_teacher_is_refused(world, tmp_path, changes):
    path = prepare(small(world, tmp_path / "first")).start / "transformer"
    student = ChunkedDiT.from_pretrained(path)
    ChunkedDiT(**{**{k: v for k, v in student.config.items() if k[0] != "_"}, **changes}).save_pretrained(path)
    name, value = next(iter(changes.items()))
    with pytest.raises(UpcycleError, match=f"has {name} {value} where the teacher has"):
        prepare(small(world, tmp_path / "run", student=str(path.parent), convert={}))


def test_a_bare_checkpoint_can_be_the_teacher(world, tmp_path, monkeypatch):
    """`weights`, `heads` and `vae` reach the source, and the start can then be sampled."""
    seen = {}

    def opened(spec, **options):
        seen.update(options)
        return dataclasses.replace(open_source(str(world / "teacher")), components={})

    tiny.make_vae().save_pretrained(tmp_path / "vae")
    monkeypatch.setattr("upcycle.training.run.open_source", opened)
    options = {"weights": "model", "heads": 2}
    start = prepare(small(world, tmp_path / "run", teacher="x.pt", vae=str(tmp_path / "vae"), **options)).start
    assert {key: seen[key] for key in options} == options
    assert (start / "model_index.json").is_file()


def test_latents_of_another_encoder_are_refused(world, tmp_path):
    """Its config is that of the teacher's VAE; its weights are not. A decoder of its own does no harm."""
    generator = torch.Generator().manual_seed(0)
    for label in range(4):
        (tmp_path / "images" / str(label)).mkdir(parents=True)
        pixels = torch.randint(0, 256, (64, 64, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(tmp_path / "images" / str(label) / "image.png")
    own = AutoencoderKL.from_pretrained(world / "teacher" / "vae")
    with torch.no_grad():
        own.decoder.conv_out.bias.add_(1)
    own.save_pretrained(tmp_path / "other-decoder")
    tiny.make_vae(5).save_pretrained(tmp_path / "other-encoder")
    for vae in ("other-decoder", "other-encoder"):
        run("encode", tmp_path / "images", "-o", tmp_path / f"of-{vae}", "--vae", tmp_path / vae, "--size", "64")
    prepare(small(world, tmp_path / "fits", data=str(tmp_path / "of-other-decoder")))
    with pytest.raises(UpcycleError, match=r"other-encoder, whose encoder has other weights than the teacher's VAE"):
        prepare(small(world, tmp_path / "refused", data=str(tmp_path / "of-other-encoder")))
    assert not (tmp_path / "refused").exists()
