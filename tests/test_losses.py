"""Losses with parts of their own: the variational term (Meta's code is the judge), block distillation, guidance."""

import copy
import math

import pytest
import tiny
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch.distributions import Normal, kl_divergence
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import set_checkpoint_early_stop

from upcycle.graft.convert import convert
from upcycle.graft.plan import Options, make_plan
from upcycle.models.chunked_dit import ChunkedDiT
from upcycle.sources import open_source
from upcycle.training import losses
from upcycle.training.block_distillation import BlockRecorder, bilinear_corners, block_loss
from upcycle.training.variational import VariationalBound, noise_schedule

META = load_file(tiny.GOLDEN / "meta_vlb.safetensors")
BETAS = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
ALPHA_BAR = (1 - BETAS).cumprod(0)

# ---------------------------------------------------------------------------------------------------------------------
# The variational term


@pytest.fixture(scope="module")
def bound():
    return VariationalBound(BETAS)


def test_variational_term_equals_metas(bound):
    """Values and gradients, t = 0 with open bins and clamped probabilities included; none reaches epsilon."""
    output = META["output"].clone().requires_grad_()
    bits = bound(output, META["x0"], META["x_t"], META["t"])
    torch.testing.assert_close(bits, META["vb"], atol=2e-7, rtol=1e-5)
    bits.sum().backward()
    torch.testing.assert_close(output.grad, META["vb_grad"], atol=1e-7, rtol=1e-5)
    assert output.grad[:, :3].count_nonzero() == 0
    assert output.grad[:, 3:].flatten(1).any(1).all()
    assert not META["vb_grad"][:, :3].any()


def test_golden_noise_is_what_x_t_holds():
    """So that the rest of Meta's loss, the MSE to the noise, is ours too."""
    mse = (META["output"][:, :3] - META["noise"]).square().flatten(1).mean(1)
    torch.testing.assert_close(mse, META["mse"])
    alpha = ALPHA_BAR[META["t"]][:, None, None, None]
    x_t = alpha.sqrt() * META["x0"] + (1 - alpha).sqrt() * META["noise"]
    torch.testing.assert_close(x_t.float(), META["x_t"], atol=1e-6, rtol=1e-6)


def noisy(t, seed=0, error=0.3):
    """x0, x_t, a model's output with v = 0 and the noise that is in x_t, all [4, ., 4, 4] in fp64."""
    generator = torch.Generator().manual_seed(seed)
    x0, noise, wrong = torch.randn(3, 4, 2, 4, 4, generator=generator, dtype=torch.float64)
    x_t = ALPHA_BAR[t].sqrt() * x0 + (1 - ALPHA_BAR[t]).sqrt() * noise
    return x0, x_t, torch.cat([noise + error * wrong, torch.zeros_like(noise)], 1), noise


def posterior(x0, x_t, t):
    """Mean and variance of q(x_{t-1} | x_t, x0), t > 0, by Bayes' rule and not by the formula that the code has."""
    before, beta = ALPHA_BAR[t - 1], BETAS[t]
    precision = (1 - beta) / beta + 1 / (1 - before)
    mean = ((1 - beta).sqrt() * x_t / beta + before.sqrt() * x0 / (1 - before)) / precision
    return mean, 1 / precision


@pytest.mark.parametrize("t", [1, 2, 17, 500, 999])
def test_variational_term_is_the_divergence(bound, t):
    x0, x_t, output, _ = noisy(t, seed=t)
    output[:, 2:].normal_(generator=torch.Generator().manual_seed(t))
    mean, variance = posterior(x0, x_t, t)
    estimate = (x_t - (1 - ALPHA_BAR[t]).sqrt() * output[:, :2]) / ALPHA_BAR[t].sqrt()
    share = (output[:, 2:] + 1) / 2
    deviation = (BETAS[t] ** share * variance ** (1 - share)).sqrt()
    kl = kl_divergence(Normal(mean, variance.sqrt()), Normal(posterior(estimate, x_t, t)[0], deviation))
    bits = bound(output.float(), x0.float(), x_t.float(), torch.full((4,), t))
    torch.testing.assert_close(bits.double(), kl.flatten(1).mean(1) / math.log(2), atol=1e-6, rtol=1e-4)


def test_first_step_is_a_likelihood(bound):
    """At t = 0: the probability of a bin 2/255 wide. The tanh in place of erf costs a few thousandths."""
    x0, x_t, output, _ = noisy(0)
    estimate = (x_t - (1 - ALPHA_BAR[0]).sqrt() * output[:, :2]) / ALPHA_BAR[0].sqrt()
    first = posterior(x0, x_t, 1)[1]  # v = -1 means the variance of t = 1
    gaussian = Normal(estimate, (first * BETAS[0]) ** 0.25)  # v = 0: halfway between the two logs
    low, high = gaussian.cdf(x0 - 1 / 255), gaussian.cdf(x0 + 1 / 255)
    probability = torch.where(x0 > 0.999, 1 - low, torch.where(x0 < -0.999, high, high - low))
    bits = bound(output.float(), x0.float(), x_t.float(), torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(bits.double(), -probability.log2().flatten(1).mean(1), atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("t", [1, 100, 900])
def test_variational_term_is_least_at_the_right_variance(bound, t):
    """Zero for the true noise and the posterior's variance; else least where the variance holds the error as well."""
    x0, x_t, output, noise = noisy(t, error=0.05)
    timestep = torch.full((4,), t)

    def bits(epsilon, v):
        return bound(torch.cat([epsilon, v], 1).float(), x0.float(), x_t.float(), timestep)

    assert bits(noise, torch.full_like(noise, -1)).abs().max() < 1e-5
    mean, variance = posterior(x0, x_t, t)
    estimate = (x_t - (1 - ALPHA_BAR[t]).sqrt() * output[:, :2]) / ALPHA_BAR[t].sqrt()
    right = (variance + (mean - posterior(estimate, x_t, t)[0]) ** 2).log()
    v = 2 * (right - variance.log()) / (BETAS[t].log() - variance.log()) - 1
    for other in (v - 0.5, v + 0.5):
        assert (bits(output[:, :2], v) <= bits(output[:, :2], other) + 1e-7).all()


def test_outputs_out_of_range_stay_finite(bound):
    """An untrained student's first outputs, in bf16."""
    output = (30 * torch.randn(10, 6, 4, 4, generator=torch.Generator().manual_seed(0))).bfloat16().requires_grad_()
    bits = bound(output, META["x0"], META["x_t"], META["t"])
    bits.sum().backward()
    assert bits.isfinite().all()
    assert torch.equal(bits, bound(output.float(), META["x0"], META["x_t"], META["t"]))
    assert output.grad.isfinite().all()


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_noise_schedule_is_the_students(schedule):
    student = ChunkedDiT(2, 8, num_layers=1, sample_size=8, num_classes=2, beta_schedule=schedule, beta_end=0.012)
    table = student.alpha_bar(torch.arange(1000))
    torch.testing.assert_close((1 - noise_schedule(student)).cumprod(0).float(), table, atol=0, rtol=0)


# ---------------------------------------------------------------------------------------------------------------------
# Weights and targets


def test_min_snr_weight():
    alpha_bar = torch.tensor([0.999, 5 / 6, 0.5, 1e-6])  # snr 999, 5, 1, 1e-6
    weight = losses.min_snr_weight(alpha_bar, 5.0)
    torch.testing.assert_close(weight, torch.tensor([5 / 999, 1, 1, 1]), atol=1e-6, rtol=1e-4)
    assert losses.min_snr_weight(torch.tensor([0.0, 1.0]), 5.0).tolist() == [1, 0]


def test_balanced_weight():
    alpha_bar = torch.tensor([1, 2 / 3, 0.5, 1e-4, 0])  # snr inf, 2, 1, 1e-4, 0
    weight = losses.balanced_weight(alpha_bar)
    torch.testing.assert_close(weight, torch.tensor([1, 2**0.5, 3**0.5, 141.42, 1414.2]), atol=1e-6, rtol=1e-4)


def test_weighted_mse():
    a, b = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(losses.weighted_mse(a, b, torch.ones(3)), F.mse_loss(a, b))
    torch.testing.assert_close(losses.weighted_mse(a, b, torch.tensor([0.0, 3, 0])), F.mse_loss(a[1], b[1]))
    first = losses.weighted_mse(a, b, torch.zeros(3), channels=1)  # the second of two is not weighed
    torch.testing.assert_close(first, F.mse_loss(a[:, 1], b[:, 1]) / 2)


def test_guided_target():
    """Epsilon is guided in all channels, sigma is the conditional one, and null labels stay as they are."""
    cond, uncond = torch.randn(2, 3, 8, 4, 4, generator=torch.Generator().manual_seed(0))
    uncond[2] = cond[2]  # its label is the null class
    target = losses.guided_target(cond, uncond, 4.0, 4)
    torch.testing.assert_close(target[:, :4], 4 * cond[:, :4] - 3 * uncond[:, :4])
    assert torch.equal(target[:, 4:], cond[:, 4:])
    assert torch.equal(target[2], cond[2])
    torch.testing.assert_close(losses.guided_target(cond, uncond, 1.0, 4), cond)


# ---------------------------------------------------------------------------------------------------------------------
# Block distillation


@pytest.fixture(scope="module")
def teacher(dit):
    return copy.deepcopy(dit).requires_grad_(False)


@pytest.fixture(scope="module")
def starts(pipeline_dir, tmp_path_factory):
    """Folders of an exact graft and of a published start."""
    folder = tmp_path_factory.mktemp("starts")
    for init in ("exact", "paper"):
        convert(make_plan(open_source(str(pipeline_dir)), Options(init=init, ratio=4)), folder / init)
    return folder


def load(starts, init="exact", **changes):
    return ChunkedDiT.from_pretrained(starts / init / "transformer", **changes)


def question():
    x = torch.randn(4, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    x[::2, :, 8:] *= 0.1  # flat parts, so that samples want different numbers of tokens
    return x, torch.linspace(20, 980, 4).long(), torch.arange(4)


RAGGED = torch.tensor([0.0, 0.5, 0.3, 0.9])


def ask(student, teacher, *, tail_drop=0.0, blocks=None):
    """Both passes, and the recorder and the routing that they leave."""
    x, timestep, label = question()
    with BlockRecorder(student, teacher, blocks) as recorder:
        with torch.inference_mode():
            teacher(x, timestep, label)
        routing = student(x, timestep, label, tail_drop=tail_drop).routing
    return recorder, routing


def reference(recorder, routing, student, side=16, patch=2):
    """The loss by loops over blocks, samples and tokens; the picture of the teacher is read with hat functions."""
    terms = []
    for number, ours in recorder.student.items():
        theirs = recorder.teacher[number].unflatten(1, (side // patch, side // patch))
        ours = recorder.layout.pad(ours)
        for sample, mask in enumerate(routing.mask):
            errors = []
            for slot, position in enumerate(mask.nonzero().flatten().tolist()):
                row, column = (hats(i, side // patch, student.config.patch_size, patch) for i in divmod(position, side))
                target = torch.einsum("r,c,rcd->d", row, column, theirs[sample].double())
                errors.append((ours[sample, slot] - target).square().mean())
            terms.append(torch.stack(errors).mean())
    return torch.stack(terms).mean()


def hats(place, count, window, patch):
    """Share of each of the teacher's ``count`` rows for a token that starts at ``place``, by pixel coordinates."""
    centres = torch.arange(count, dtype=torch.float64) * patch + patch / 2
    centre = min(max(place + window / 2, centres[0].item()), centres[-1].item())
    return (1 - (centres - centre).abs() / patch).clamp(min=0)


@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 6), st.booleans(), st.data())
def test_bilinear_corners(patch, teacher_side, lean, data):
    side, window = patch * teacher_side, patch if lean else 1
    index = torch.tensor(data.draw(st.lists(st.integers(0, side**2 - 1), min_size=1, max_size=20)))
    corner, share = bilinear_corners(index, side, teacher_side, window)
    dense = torch.zeros(len(index), teacher_side**2, dtype=torch.float64).scatter_add_(1, corner, share.double())
    for position, row in zip(index.tolist(), dense, strict=True):
        of_row, of_column = (hats(i, teacher_side, window, patch) for i in divmod(position, side))
        torch.testing.assert_close(row, torch.outer(of_row, of_column).flatten(), atol=1e-6, rtol=0)


def test_block_loss_is_zero_at_an_exact_graft(starts, teacher):
    student = load(starts)
    assert block_loss(*ask(student, teacher), student).item() < 1e-10


@pytest.mark.parametrize(("init", "tail_drop"), [("exact", 0.5), ("exact", RAGGED), ("paper", 0.0), ("paper", RAGGED)])
def test_block_loss_by_brute_force(starts, teacher, init, tail_drop):
    """Even and ragged batches; the exact graft without its guide, so that tokens lie off the grid."""
    student = load(starts, init, guide=0.0)
    recorder, routing = ask(student, teacher, tail_drop=tail_drop)
    expected = reference(recorder, routing, student)
    assert expected > 0.01
    torch.testing.assert_close(block_loss(recorder, routing, student).double(), expected.double(), atol=0, rtol=1e-5)


def test_block_loss_does_not_depend_on_how_a_batch_is_split(starts, teacher):
    student = load(starts, guide=0.0)
    x, timestep, label = question()
    values = []
    for part in (slice(0, 4), slice(0, 2), slice(2, 4)):
        with torch.no_grad(), BlockRecorder(student, teacher) as recorder:
            teacher(x[part], timestep[part], label[part])
            routing = student(x[part], timestep[part], label[part], tail_drop=RAGGED[part]).routing
        values.append(block_loss(recorder, routing, student).item())
    assert values[0] == pytest.approx((values[1] + values[2]) / 2, rel=1e-5)


def test_chosen_blocks_are_compared(starts, teacher):
    student = load(starts, guide=0.0)
    recorder, routing = ask(student, teacher, blocks=[1], tail_drop=RAGGED)
    assert list(recorder.student) == list(recorder.teacher) == [1]
    whole, _ = ask(student, teacher, tail_drop=RAGGED)
    only = reference(recorder, routing, student)
    torch.testing.assert_close(block_loss(recorder, routing, student).double(), only.double(), atol=0, rtol=1e-5)
    assert not block_loss(whole, routing, student).isclose(only.float())


@pytest.mark.parametrize("init", ["exact", "paper"])
def test_block_loss_goes_down(starts, teacher, init):
    student = load(starts, init, guide=0.0).train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=2e-3)
    values = []
    for _ in range(15):
        loss = block_loss(*ask(student, teacher, tail_drop=RAGGED), student)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    assert values[-1] < 0.8 * values[0]


def gradients(student, loss):
    student.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_gives_the_same_gradients(starts, teacher):
    """Also when the backward pass, which runs the blocks and their hooks again, comes while still recording."""
    student = load(starts, guide=0.0).train()
    plain = gradients(student, block_loss(*ask(student, teacher, tail_drop=RAGGED), student))
    student.enable_gradient_checkpointing()
    x, timestep, label = question()
    # Without early stop: with it a block usually stops before its hooks.
    with set_checkpoint_early_stop(False), BlockRecorder(student, teacher) as recorder:
        with torch.inference_mode():
            teacher(x, timestep, label)
        routing = student(x, timestep, label, tail_drop=RAGGED).routing
        before = dict(recorder.student)
        checkpointed = gradients(student, block_loss(recorder, routing, student))
        assert all(recorder.student[number] is before[number] for number in before)
    assert plain.keys() == checkpointed.keys()
    assert any(name.startswith("transformer_blocks.1.ff") for name in plain)
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name])


def test_no_hook_is_left(starts, teacher):
    student = load(starts)
    with pytest.raises(RuntimeError, match="midway"), BlockRecorder(student, teacher):
        raise RuntimeError("midway")
    for block in (*student.transformer_blocks, *teacher.transformer_blocks):
        assert not block._forward_hooks
        assert not block._forward_pre_hooks


def test_block_loss_under_autocast(starts, teacher):
    """bf16 passes, an fp32 loss near that of fp32 passes."""
    student = load(starts, guide=0.0).train()
    exact = block_loss(*ask(student, teacher, tail_drop=0.5), student)
    with torch.autocast("cpu", torch.bfloat16):
        recorder, routing = ask(student, teacher, tail_drop=0.5)
        loss = block_loss(recorder, routing, student)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    assert all(g.isfinite().all() for g in gradients(student, loss).values())


def test_block_loss_through_ddp(starts, teacher):
    """Hooks on the unwrapped student see a pass through its wrapper."""
    student = load(starts, guide=0.0).train()
    expected = gradients(student, block_loss(*ask(student, teacher, tail_drop=RAGGED), student))
    x, timestep, label = question()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(student)
        for _ in range(2):
            with BlockRecorder(student, teacher) as recorder:
                with torch.inference_mode():
                    teacher(x, timestep, label)
                out = wrapped(x, timestep, label, tail_drop=RAGGED)
            # DDP wants a gradient for the heads too, which this loss leaves out.
            got = gradients(student, block_loss(recorder, out.routing, student) + 0 * out.sample.sum())
    finally:
        dist.destroy_process_group()
    for name in expected:
        torch.testing.assert_close(got[name], expected[name])
