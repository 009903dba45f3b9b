"""The converted model equals its teacher: the stock diffusers model, called as its users call it."""

import pytest
import tiny
import torch
from conftest import run
from diffusers import DiTPipeline, DiTTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st

from upcycle.graft.convert import convert
from upcycle.graft.plan import Options, make_plan
from upcycle.graft.verify import load_student, load_teacher, measure_difference
from upcycle.models.chunked_dit import ChunkedDiT, Routing, teacher_grid
from upcycle.sampling.pipeline import load_pipeline
from upcycle.sources import open_source
from upcycle.training.digits import TEACHER, load_digits

EXACT = {"atol": 1e-5, "rtol": 0}


def graft(folder, out, **options):
    convert(make_plan(open_source(str(folder)), Options(**options)), out)
    return load_student(out)


def noisy(model, batch, seed=0):
    c = model.config
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, c.in_channels, c.sample_size, c.sample_size, generator=generator)


@pytest.fixture(scope="module")
def student(export_dir):
    return load_student(export_dir)


def test_convert_reports_the_difference_that_it_measured(export_json, dit):
    assert export_json["max_abs_diff"] <= 1e-5
    assert export_json["tokens_kept"] == 64
    assert set(export_json["flops_per_image"]["student"]) == {"0", "0.3", "0.6"}
    embedders = sum(p.numel() for n, p in dit.transformer_blocks[0].named_parameters() if ".emb." in n)
    copies = (dit.config.num_layers - 1) * embedders
    assert export_json["parameters"]["reused"] == sum(p.numel() for p in dit.parameters()) - copies


@torch.inference_mode()
def test_every_class_and_the_null_class(dit, student):
    labels = torch.arange(11)
    timestep = torch.linspace(0, 999, 11).long()
    x = noisy(dit, 11)
    torch.testing.assert_close(student(x, timestep, labels).sample, dit(x, timestep, labels).sample, **EXACT)


@torch.inference_mode()
def test_every_timestep(dit, student):
    x, labels = noisy(dit, 50), torch.arange(50) % 11
    for start in range(0, 1000, 50):
        timestep = torch.arange(start, start + 50)
        torch.testing.assert_close(student(x, timestep, labels).sample, dit(x, timestep, labels).sample, **EXACT)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.01, 30), st.integers(0, 999), st.integers(0, 2**16))
@torch.inference_mode()
def test_any_input_scale(dit, student, scale, t, seed):
    x, y = scale * noisy(dit, 2, seed), torch.tensor([3, 10])
    timestep = torch.tensor([t, 999 - t])
    torch.testing.assert_close(student(x, timestep, y).sample, dit(x, timestep, y).sample, **EXACT)


@pytest.mark.parametrize(
    "shape",
    [
        {"patch": 4},
        {"patch": 8, "size": 32},
        {"size": 64, "layers": 1},
        {"in_channels": 1, "learned_sigma": False, "width": 96, "heads": 4},
        {"in_channels": 3, "patch": 2, "size": 8},
        {"width": 384, "heads": 6, "layers": 2, "size": 32, "classes": 1000},
    ],
    ids=str,
)
@pytest.mark.parametrize("router", ["predictability", "cosine", "grid"])
@torch.inference_mode()
def test_other_shapes(shape, router, tmp_path):
    teacher = tiny.make_dit(1, **shape)
    tiny.save_transformer(tmp_path / "dit", teacher)
    student = graft(tmp_path / "dit", tmp_path / "out", ratio=float(teacher.config.patch_size**2), router=router)
    x, labels = noisy(teacher, 2), torch.tensor([0, teacher.config.num_embeds_ada_norm])
    for t in (0, 400, 999):
        timestep = torch.full((2,), t)
        torch.testing.assert_close(student(x, timestep, labels).sample, teacher(x, timestep, labels).sample, **EXACT)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "heads", "layers"), [(768, 12, 12), (1024, 16, 24), (1152, 16, 28)], ids=["B", "L", "XL"]
)
@torch.inference_mode()
def test_full_shapes(width, heads, layers, tmp_path):
    teacher = tiny.make_dit(1, width=width, heads=heads, layers=layers, size=32, classes=1000)
    tiny.save_transformer(tmp_path / "dit", teacher)
    student = graft(tmp_path / "dit", tmp_path / "out")
    x, labels = noisy(teacher, 2), torch.tensor([7, 1000])
    for t in (0, 500, 999):
        timestep = torch.full((2,), t)
        torch.testing.assert_close(student(x, timestep, labels).sample, teacher(x, timestep, labels).sample, **EXACT)


@pytest.mark.parametrize("changes", [{"bin": True}, {"legacy_config": True}, {"max_shard_size": "200KB"}], ids=str)
@torch.inference_mode()
def test_layouts_of_a_pipeline_folder(dit, changes, tmp_path):
    tiny.save_pipeline(tmp_path / "p", dit, **changes)
    student = graft(tmp_path / "p", tmp_path / "out")
    x, t, y = noisy(dit, 2), torch.tensor([10, 900]), torch.tensor([1, 10])
    torch.testing.assert_close(student(x, t, y).sample, dit(x, t, y).sample, **EXACT)


@torch.inference_mode()
def test_embedders_that_a_fine_tune_has_split_are_kept(dit, tmp_path):
    teacher = tiny.make_dit(0)
    with torch.no_grad():
        teacher.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight.add_(1)
    tiny.save_transformer(tmp_path / "dit", teacher)
    student = graft(tmp_path / "dit", tmp_path / "out")
    assert student.config.num_embedders == 2
    x, t, y = noisy(dit, 2), torch.tensor([10, 900]), torch.tensor([1, 10])
    torch.testing.assert_close(student(x, t, y).sample, teacher(x, t, y).sample, **EXACT)


@pytest.mark.parametrize("ratio", [3.0, 6.0, 9.0, 16.0])
@torch.inference_mode()
def test_other_ratios_keep_their_budget(pipeline_dir, dit, ratio, tmp_path):
    """Off the exact ratio the start is near, not equal; the budget is met exactly."""
    student = graft(pipeline_dir, tmp_path / "out", ratio=ratio)
    out = student(noisy(dit, 3), torch.tensor([10, 500, 999]), torch.tensor([0, 5, 10]))
    assert out.routing.mask.sum(1).tolist() == [round(256 / ratio)] * 3
    assert out.sample.isfinite().all()


@torch.inference_mode()
def test_untrained_start_is_nearer_the_more_it_keeps(tmp_path):
    """On real digits: detail decides, and beats random boundaries at the same ratio."""
    teacher = load_teacher(open_source(str(TEACHER)))
    x0, labels = (part[:32] for part in load_digits("val"))
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    error = {}
    starts = {"5": {"ratio": 5.0}, "8": {"ratio": 8.0}, "random": {"ratio": 5.0, "router": "random"}}
    for name, options in starts.items():
        student = graft(TEACHER, tmp_path / name, **options)
        error[name] = 0.0
        for t in (100, 300, 500):
            timestep = torch.full((32,), t)
            alpha = student.alpha_bar(timestep)[:, None, None, None]
            x = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
            expected = teacher(x, timestep, labels).sample[:, :1]
            error[name] += (student(x, timestep, labels).sample[:, :1] - expected).square().mean().item() / 3
    assert error["5"] < error["8"]
    assert error["5"] < error["random"]


@pytest.mark.parametrize("router", ["predictability", "cosine", "random"])
@torch.inference_mode()
def test_published_start_runs_for_every_router(pipeline_dir, dit, router, tmp_path):
    student = graft(pipeline_dir, tmp_path / "out", init="paper", router=router)
    assert student.config.scaffold == "paper"
    out = student(noisy(dit, 2), torch.tensor([10, 900]), torch.tensor([0, 5]))
    assert out.sample.abs().max() == 0  # the published head starts at zero
    blocks = {n for n, _ in student.named_parameters() if n.startswith("transformer_blocks.")}
    theirs = dict(dit.named_parameters())
    assert blocks
    assert all(torch.equal(student.get_parameter(n), theirs[n]) for n in blocks)


def unsettle(student: ChunkedDiT, guide: float = 0.0) -> ChunkedDiT:
    """A student away from its start: every fresh parameter random, the router free; keeps ragged batches."""
    copy = ChunkedDiT.from_config(student.config)
    copy.load_state_dict(student.state_dict())
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in copy.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.05, generator=generator)
        copy.routing_module.bias.fill_(3.0)
    copy.guide = guide
    return copy.eval()


@pytest.mark.parametrize("scaffold", ["lean", "paper"])
@torch.inference_mode()
def test_batch_mates_do_not_influence_each_other(student, scaffold, tmp_path):
    if scaffold == "lean":
        model = unsettle(student)
    else:
        tiny.save_dcdit_pt(tmp_path / "authors.pt")
        model = graft(tmp_path / "authors.pt", tmp_path / "out")
    x, t = noisy(model, 5), torch.tensor([999, 700, 400, 100, 0])
    y = torch.tensor([0, 3, 10, 1000, 9])
    rho = torch.tensor([0.0, 0.3, 0.9, 0.0, 0.5])
    together = model(x, t, y, tail_drop=rho)
    counts = together.routing.mask.sum(1).tolist()
    assert len(set(counts)) > 1, "the batch must be ragged for this test to say anything"
    for i in range(5):
        alone = model(x[i : i + 1], t[i : i + 1], y[i : i + 1], tail_drop=rho[i : i + 1])
        assert alone.routing.mask.sum() == counts[i]
        torch.testing.assert_close(alone.sample[0], together.sample[i], **EXACT)


@torch.inference_mode()
def test_zero_tail_drop_changes_no_bit(student):
    model = unsettle(student)
    x, t, y = noisy(model, 3), torch.tensor([900, 500, 10]), torch.tensor([1, 2, 10])
    plain = model(x, t, y).sample
    assert torch.equal(plain, model(x, t, y, tail_drop=0.0).sample)
    assert torch.equal(plain, model(x, t, y, tail_drop=torch.zeros(3)).sample)
    model.set_tail_drop(0.5)
    assert not torch.equal(plain, model(x, t, y).sample)


@torch.inference_mode()
def test_lite_cfg_drops_in_the_unconditional_half(student):
    model = unsettle(student)
    x, t, y = noisy(model, 4), torch.tensor([900, 900, 300, 300]), torch.tensor([1, 10, 2, 1000])
    plain = model(x, t, y)
    kept = plain.routing.mask.sum(1)
    model.set_lite_cfg(uncond=0.5)
    lite = model(x, t, y)
    assert lite.routing.mask.sum(1).tolist() == [kept[0], kept[1] - kept[1] // 2, kept[2], kept[3] - kept[3] // 2]
    torch.testing.assert_close(lite.sample[[0, 2]], plain.sample[[0, 2]], **EXACT)
    assert torch.equal(lite.sample, model(x, t, y, tail_drop=torch.tensor([0.0, 0.5, 0.0, 0.5])).sample)
    # It goes with tail drop, and what is passed comes before both.
    model.set_tail_drop(0.25)
    both = model(x, t, y)
    assert torch.equal(both.sample, model(x, t, y, tail_drop=torch.tensor([0.25, 0.5, 0.25, 0.5])).sample)
    assert torch.equal(plain.sample, model(x, t, y, tail_drop=0.0).sample)
    # None is as if it had never been set, to the last bit; 0 is none for the null class.
    model.set_lite_cfg(uncond=0)
    assert model(x, t, y).routing.mask.sum(1)[[1, 3]].tolist() == kept[[1, 3]].tolist()
    model.set_tail_drop(0.0)
    model.set_lite_cfg(None)
    assert torch.equal(plain.sample, model(x, t, y).sample)
    for wrong in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="uncond must be in"):
            model.set_lite_cfg(wrong)


@torch.inference_mode()
def test_lite_cfg_in_a_guided_stock_pipeline(export_dir):
    pipe = load_pipeline(str(export_dir))
    assert type(pipe) is DiTPipeline
    pipe.set_progress_bar_config(disable=True)
    route, seen = pipe.transformer.route, []

    def watched(*arguments):
        seen.append(routing := route(*arguments))
        return routing

    pipe.transformer.route = watched

    def draw():
        return pipe([1, 9], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images

    plain = draw()
    pipe.transformer.set_lite_cfg(uncond=0.5)
    seen.clear()
    lite = draw()
    assert [routing.mask.sum(1).tolist() for routing in seen] == [[64, 64, 32, 32]] * 2
    assert (lite != plain).any()
    pipe.transformer.set_lite_cfg(None)
    assert (draw() == plain).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_low_precision_decides_alike_and_stays_near(student, dit, dtype):
    import copy

    low = copy.deepcopy(student).to(dtype)
    x, t, y = noisy(dit, 2), torch.tensor([900, 10]), torch.tensor([1, 10])
    out = low(x.to(dtype), t, y)
    assert out.sample.dtype == dtype
    assert out.routing.mask.sum(1).tolist() == [64, 64]
    stock = copy.deepcopy(dit).to(dtype)(x.to(dtype), t, y).sample.float()
    exact = dit(x, t, y).sample
    # As near to the fp32 teacher as the stock model in the same precision is.
    assert (out.sample.float() - exact).square().mean() < 4 * (stock - exact).square().mean()


def test_gradients_reach_every_trainable_part(student):
    model = unsettle(student).train().requires_grad_(True)
    x, t, y = noisy(model, 4), torch.tensor([900, 600, 300, 10]), torch.tensor([1, 2, 3, 10])
    out = model(x, t, y, tail_drop=0.3)
    (out.sample.square().mean() + out.routing.probability.mean()).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_gradient_checkpointing_changes_no_gradient(student):
    gradients = []
    for checkpointing in (False, True):
        model = unsettle(student).train().requires_grad_(True)
        if checkpointing:
            model.enable_gradient_checkpointing()
        x, t, y = noisy(model, 2), torch.tensor([900, 10]), torch.tensor([1, 10])
        model(x, t, y).sample.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_nan_student_is_not_called_equal(student, dit):
    broken = unsettle(student)
    broken.conv_out.bias.data.fill_(torch.nan)
    assert measure_difference(dit, student).equal
    assert not measure_difference(dit, broken).equal


def test_stock_class_is_what_was_compared(dit):
    assert type(dit) is DiTTransformer2DModel
    assert run("--version").stdout.strip()


@pytest.mark.parametrize(
    ("change", "bounds"),
    [("add", {250: 5e-3, 550: 5e-4, 950: 1e-5}), ("remove", {250: 6e-2, 550: 3e-3, 950: 1e-4})],
)
def test_untrained_graft_bears_another_mask(tmp_path, monkeypatch, change, bounds):
    """Tokens beside the grid, or fewer of them, cost little before any training, least at high noise.

    What a token says of its input must be read in terms of that input: it holds what its cell holds, not its window.
    """
    teacher, student = load_teacher(open_source(str(TEACHER))), graft(TEACHER, tmp_path / "student")
    images, labels = load_digits("val")
    x0, y = images[:32], labels[:32]
    generator = torch.Generator().manual_seed(0)
    grid = teacher_grid(16, 16, 2, torch.device("cpu"))
    picked = torch.rand(32, 256, generator=generator)
    mask = grid | (picked < 0.1) if change == "add" else grid & (picked > 0.3)
    mask[:, 0] = True
    routing = Routing(mask.float(), mask.float(), mask, mask, mask.float())
    monkeypatch.setattr(student, "route", lambda *arguments: routing)
    for t, bound in bounds.items():
        alpha = student.alpha_bar(torch.tensor([t]))
        x_t = alpha.sqrt() * x0 + (1 - alpha).sqrt() * torch.randn(x0.shape, generator=generator)
        timestep = torch.full((32,), t)
        with torch.inference_mode():
            theirs, ours = teacher(x_t, timestep, y).sample[:, :1], student(x_t, timestep, y).sample[:, :1]
        assert (ours - theirs).square().mean() < bound, t
