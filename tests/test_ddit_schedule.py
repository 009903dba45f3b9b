"""DDiT's noise arithmetic and its choice of a patch size for every step, against samplers and plain differences."""

import itertools
import types

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_ddit import PREDICTION, arguments, as_latents, attach, draw, latents, make, output

from upcycle.models import ddit

CLASSES = {"epsilon": "DiTTransformer2DModel", "flow": "FluxTransformer2DModel"}
every_prediction = pytest.mark.parametrize("prediction", ddit.PREDICTIONS)


def noise_of(prediction, **options):
    cls = CLASSES.get(prediction, "ZImageTransformer2DModel")
    return ddit.Noise(ddit.DDiTConfig(cls, [2, 4], prediction=prediction, **options))


def sampler_of(prediction, steps=12, **options):
    if prediction == "epsilon":
        sampler = DDIMScheduler(clip_sample=False, **options)
    else:
        sampler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    sampler.set_timesteps(steps)
    return sampler


def schedule_of(prediction, **options):
    return ddit.PatchSchedule(noise_of(prediction), [2, 4], **options)


def field(z, time):
    """In place of a model; bends more in some samples and places than in others."""
    place = torch.linspace(0.2, 2, z.shape[-1]) * torch.linspace(0.1, 1, z.shape[-2])[:, None]
    sample = 1 + torch.arange(len(z)).view(-1, 1, 1, 1)
    return torch.tanh(z + place) * torch.cos(3 * sample * place * time) + 0.1 * z


def sample(schedule, prediction, z, *, steps=12, sampler=None, sight=lambda z: z, calls=1):
    """Run a sampler on `field`; returns all latents and all answers of the schedule."""
    sampler = sampler or sampler_of(prediction, steps)
    sign = -1 if prediction == "negative flow" else 1
    trajectory, answers = [z], []
    for t in sampler.timesteps:
        time = t if prediction == "epsilon" else t / 1000
        out = sign * field(z, t / 1000)
        for call in range(calls):
            seen = sight(z)
            look = ddit.Sight(seen[:, :, None], time.expand(len(seen)), (1, 2))
            answers.append(schedule.decide(look))
            schedule.observe(sight(out if call == 0 else out + 1)[:, :, None])
        z = sampler.step(sign * out, t, z, return_dict=False)[0]
        trajectory.append(z)
    return trajectory, answers


def deviations(trajectory, order, m, percentile=0.4):
    """Of the differences of latents themselves: [steps, samples], from step `order` on."""
    difference = trajectory[:-1]
    for _ in range(order):
        difference = [b - a for a, b in itertools.pairwise(difference)]
    P, rows = 2 * m, []
    for d in difference:
        height, width = (-(-size // P) * P for size in d.shape[-2:])
        d = d[..., torch.arange(height).clamp(max=d.shape[-2] - 1), :]
        d = d[..., torch.arange(width).clamp(max=d.shape[-1] - 1)]
        patches = torch.nn.functional.unfold(d, P, stride=P)
        rows.append(patches.std(dim=1, correction=0).quantile(percentile, dim=1))
    return torch.stack(rows)


# Noise


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(ddit.PREDICTIONS), st.integers(0, 18), st.integers(0, 2**16), st.booleans())
def test_an_increment_is_the_samplers_step(prediction, index, seed, scaled):
    options = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012} if scaled else {}
    noise = noise_of(prediction, **options)
    sampler = sampler_of(prediction, 20, **(options if prediction == "epsilon" else {}))
    then, now = sampler.timesteps[index : index + 2]
    z, out = draw(2, 4, 8, 8, seed=seed), draw(2, 4, 8, 8, seed=seed + 1)
    stepped = sampler.step(-out if prediction == "negative flow" else out, then, z, return_dict=False)[0]
    if prediction != "epsilon":
        then, now = then / 1000, now / 1000
    torch.testing.assert_close(noise.increment(z, out, then, now), stepped - z, atol=3e-5, rtol=1e-4)
    learned = torch.cat([out, draw(2, 4, 8, 8)], dim=1)  # channels of sigma do not count
    assert torch.equal(noise.increment(z, learned, then, now), noise.increment(z, out, then, now))


@pytest.mark.parametrize("variance", [0.01, 0.3, 2.0])
@every_prediction
def test_the_gain_is_that_of_least_squares(prediction, variance):
    noise = noise_of(prediction)
    x, n = draw(10**6, seed=1) * variance**0.5, draw(10**6, seed=2)
    for level in (0.05, 0.3, 0.6, 0.95):
        time = torch.tensor(int(level * 1000) if prediction == "epsilon" else level)
        alpha, sigma = noise.levels(time)
        z = alpha * x + sigma * n
        target = {"epsilon": n, "flow": n - x, "negative flow": x - n}[prediction]
        expected = (z * target).sum() / (z * z).sum()
        error = (target - expected * z).std() / z.std() / 1000  # of the estimate
        assert abs(noise.gain(time, variance) - expected) < 5 * error


def test_negative_flow_is_minus_flow():
    time, z, out = torch.linspace(0, 1, 9), draw(9, 4, 8, 8), draw(9, 4, 8, 8, seed=1)
    flow, negative = noise_of("flow"), noise_of("negative flow")
    assert torch.equal(negative.gain(time, 0.3), -flow.gain(time, 0.3))
    then, now = torch.tensor(0.7), torch.tensor(0.6)
    assert torch.equal(negative.increment(z, -out, then, now), flow.increment(z, out, then, now))


def test_noise_levels_are_the_samplers():
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    for options in ({}, betas):
        alpha, sigma = noise_of("epsilon", **options).levels(torch.arange(1000))
        expected = DDIMScheduler(**options).alphas_cumprod
        torch.testing.assert_close(alpha**2, expected, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(sigma**2, 1 - expected, atol=1e-6, rtol=1e-4)


# Decisions


@every_prediction
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("size", [(16, 16), (12, 18)])
def test_deviations_are_those_of_the_differences_of_latents(prediction, order, size):
    schedule = schedule_of(prediction, order=order)
    schedule.always_look = True
    trajectory, answers = sample(schedule, prediction, draw(3, 4, *size))
    assert answers == [[1, 1, 1]] * 12
    assert [entry["why"] for entry in schedule.log[:order]] == [f"among the first {order} steps"] * order
    for m in (2, 4):
        got = torch.tensor([entry["deviation"][str(m)] for entry in schedule.log[order:]])
        torch.testing.assert_close(got, deviations(trajectory, order, m), atol=2e-6, rtol=2e-3)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(ddit.PREDICTIONS),
    st.sampled_from([1, 2, 3]),
    st.floats(0.05, 1),
    st.floats(-4, 1),
    st.sampled_from(["min", "grouped"]),
)
def test_the_largest_size_below_the_threshold_is_taken(prediction, order, percentile, exponent, policy):
    threshold = 10.0**exponent
    schedule = schedule_of(prediction, order=order, percentile=percentile, threshold=threshold, policy=policy)
    trajectory, answers = sample(schedule, prediction, draw(3, 4, 16, 16))
    assert answers[:order] == [[1, 1, 1]] * order
    plain = {m: deviations(trajectory, order, m, percentile) for m in (2, 4)}
    for step, (answer, entry) in enumerate(zip(answers, schedule.log, strict=True)):
        assert entry["step"] == step
        assert entry["m"] == (answer[0] if len(set(answer)) == 1 else answer)
        if step < order:
            continue
        values = entry["deviation"]
        wanted = [max([1, *(m for m in (2, 4) if values[str(m)][i] < threshold)]) for i in range(3)]
        assert answer == (wanted if policy == "grouped" else [min(wanted)] * 3)
        below = max(answer) > 1
        assert entry["why"] == f"deviation {'below' if below or max(wanted) > 1 else 'above'} the threshold"
        for m in (2, 4):
            torch.testing.assert_close(
                torch.tensor(values[str(m)]), plain[m][step - order], atol=2e-6, rtol=2e-3
            )  # fmt: skip


def test_a_threshold_of_zero_or_none_is_never_coarse():
    for options in ({"threshold": 0.0}, {}):
        schedule = schedule_of("flow", **options)
        assert sample(schedule, "flow", torch.zeros(2, 4, 16, 16))[1] == [[1, 1]] * 12
    assert [entry["why"] for entry in schedule.log] == ["no threshold"] * 12


@every_prediction
@pytest.mark.parametrize("policy", ["min", "grouped"])
def test_guidance_decides_once_a_step(prediction, policy):
    z = draw(2, 4, 16, 16)
    plain = schedule_of(prediction)
    threshold = deviations(sample(plain, prediction, z)[0], 3, 2).median().item()
    plain = schedule_of(prediction, threshold=threshold, policy=policy)
    answers = sample(plain, prediction, z)[1]
    assert len({str(answer) for answer in answers}) > 1
    halves = schedule_of(prediction, threshold=threshold, policy=policy)
    doubled = sample(halves, prediction, z, sight=lambda x: torch.cat([x, x]))[1]
    assert doubled == [answer * 2 for answer in answers]
    assert halves.log == plain.log
    twice = schedule_of(prediction, threshold=threshold, policy=policy)
    assert sample(twice, prediction, z, calls=2)[1] == [answer for answer in answers for _ in range(2)]
    assert twice.log == plain.log


@every_prediction
def test_a_run_goes_on_where_guidance_ends_or_begins(prediction):
    """cfg_truncation of Z-Image, guidance intervals: the batch halves, or doubles, in mid-run."""
    z = draw(3, 4, 16, 16)
    probe = schedule_of(prediction)
    probe.always_look = True
    sample(probe, prediction, z)
    threshold = min(probe.log[7]["deviation"]["4"])
    plain = schedule_of(prediction, threshold=threshold)
    sample(plain, prediction, z)
    assert {entry["m"] for entry in plain.log} > {1}
    for guided in (range(6), range(6, 12)):
        schedule = schedule_of(prediction, threshold=threshold)
        calls = iter(range(24))  # what is decided on, then what is observed
        sample(schedule, prediction, z, sight=lambda x: torch.cat([x, x]) if next(calls) // 2 in guided else x)  # noqa: B023
        assert schedule.log == plain.log
    schedule = schedule_of("flow", fixed=[(1, 0.25), (4, 0.75)], steps=12)
    sample(schedule, "flow", torch.zeros(2, 4, 16, 16))  # equal at first only
    assert [entry["m"] for entry in schedule.log] == [1] * 3 + [4] * 9


def test_a_run_that_begins_in_the_middle_gets_its_shares():
    """img2img: the scheduler keeps the steps that are left out."""
    for prediction in ("flow", "epsilon"):
        schedule = schedule_of(prediction, fixed=[(4, 0.5), (2, 0.25), (1, 0.25)])
        sampler = sampler_of(prediction, 20)
        follow(schedule, sampler, prediction)
        cut = types.SimpleNamespace(timesteps=sampler.timesteps[8:], step=sampler.step)
        sample(schedule, prediction, draw(1, 4, 16, 16), sampler=cut)
        assert [entry["m"] for entry in schedule.log] == [4] * 6 + [2] * 3 + [1] * 3


def test_a_new_run_starts_afresh():
    z = draw(2, 4, 16, 16)
    schedule = schedule_of("flow", threshold=0.02)
    first = sample(schedule, "flow", z)[1]
    log = schedule.log
    assert sample(schedule, "flow", z)[1] == first  # the noise has risen
    assert schedule.log == log
    assert schedule.log is not log
    sampler = sampler_of("flow", 12)
    for steps in (1, 5):  # broken off, then another shape
        cut = types.SimpleNamespace(timesteps=sampler.timesteps[:steps], step=sampler.step)
        sampler._step_index = None
        sample(schedule, "flow", z, sampler=cut)
        assert len(schedule.log) == steps
        sample(schedule, "flow", z[:1])
        assert [entry["step"] for entry in schedule.log] == list(range(12))
    schedule.reset()
    assert len(schedule.log) == 12  # to be read after the run
    assert sample(schedule, "flow", z)[1] == first


@pytest.mark.parametrize("kind", ["dit", "flux", "wan", "z-image"])
def test_the_pipelines_end_resets_the_schedule(kind):
    model = attach(kind)
    schedule = model.set_schedule(threshold=1e9)
    run = [arguments(kind, latents(kind, seed=step), 0.9 - step / 10) for step in range(5)]
    for call in run:
        output(model, call)
    assert [entry["m"] for entry in schedule.log] == [1, 1, 1, 4, 4]
    model._reset_stateful_cache()
    output(model, arguments(kind, latents(kind), 0.3))  # below the last one
    assert [entry["step"] for entry in schedule.log] == [0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 9)), min_size=1, max_size=4), st.integers(1, 60))
def test_a_fixed_schedule_keeps_its_shares(parts, steps):
    total = sum(weight for _, weight in parts)
    fixed = [(m, weight / total) for m, weight in parts]
    schedule = schedule_of("flow", fixed=fixed, steps=steps)
    got = [schedule._fixed_at(step) for step in range(steps)]
    assert [m for m, _ in itertools.groupby(got)] == [m for m, _ in itertools.groupby(got)]
    for m in (1, 2, 4):
        share = sum(weight for size, weight in parts if size == m) / total
        assert abs(got.count(m) - share * steps) <= len(parts)
    ends = [round(steps * sum(share for _, share in fixed[: i + 1])) for i in range(len(fixed))]
    ends[-1] = steps
    assert got == [
        m for (m, _), (a, b) in zip(fixed, itertools.pairwise([0, *ends]), strict=True) for _ in range(b - a)
    ]


def test_a_fixed_schedule_is_followed_and_explained():
    schedule = schedule_of("flow", fixed=[(1, 0.25), (4, 0.5), (2, 0.25)], steps=12)
    answers = sample(schedule, "flow", draw(1, 4, 16, 16))[1]
    assert answers == [[1]] * 3 + [[4]] * 6 + [[2]] * 3
    assert {entry["why"] for entry in schedule.log} == {"fixed schedule"}
    with pytest.raises(ValueError, match="number of steps"):
        sample(schedule_of("flow", fixed=[(2, 1.0)]), "flow", draw(1, 4, 16, 16))


@pytest.mark.parametrize(
    "options",
    [
        {"policy": "max"},
        {"order": 0},
        {"threshold": -1.0},
        {"threshold": float("nan")},
        {"percentile": 0.0},
        {"fixed": [(8, 1.0)]},
        {"fixed": [(2, 0.4)]},
    ],
)
def test_bad_schedules_are_refused(options):
    with pytest.raises(ValueError):  # noqa: PT011
        schedule_of("flow", **options)


# Times


def follow(schedule, sampler, prediction):
    """The schedule knows the sampler's times, as `apply` does it."""
    model = types.SimpleNamespace(schedule=schedule, ddit=schedule.noise.config)
    ddit.follow(model, types.SimpleNamespace(scheduler=sampler))


@pytest.mark.parametrize("steps", [20, 50, 200])
def test_rounded_times_change_nothing(steps):
    """Flux passes t in bf16, divided by 1000: at 200 steps neighbours become equal."""
    exact = schedule_of("flow", threshold=1e-3)
    z = draw(1, 4, 16, 16)
    sampler = sampler_of("flow", steps)
    follow(exact, sampler, "flow")
    trajectory, answers = sample(exact, "flow", z, sampler=sampler)
    rounded = schedule_of("flow", threshold=1e-3)
    follow(rounded, sampler, "flow")
    for _ in range(2):  # also a second run
        got = []
        for t, latent in zip(sampler.timesteps, trajectory, strict=False):
            time = (t.expand(1).to(torch.bfloat16) / 1000).to(torch.bfloat16)
            for _ in range(2):  # with guidance by two calls
                answer = rounded.decide(ddit.Sight(latent[:, :, None], time, (1, 2)))
                rounded.observe(field(latent, t / 1000)[:, :, None])
            got.append(answer)
        assert got == answers
        assert rounded.log == exact.log
    assert len({str(answer) for answer in answers}) > 1


def test_whole_timesteps_of_unipc_are_told_apart_from_noise_levels():
    sampler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    sampler.set_timesteps(50)
    schedule = schedule_of("flow")
    follow(schedule, sampler, "flow")
    for t, latent in zip(sampler.timesteps, draw(50, 1, 4, 16, 16), strict=True):
        schedule.decide(ddit.Sight(latent[:, :, None], t.expand(1) / 1000, (1, 2)))
    assert [entry["time"] for entry in schedule.log] == sampler.sigmas[:-1].tolist()


def test_times_far_from_the_samplers_are_taken_as_they_are():
    schedule = schedule_of("flow")
    follow(schedule, sampler_of("flow", 4), "flow")
    schedule.decide(ddit.Sight(draw(1, 4, 1, 16, 16), torch.tensor([0.33]), (1, 2)))
    assert schedule.log[0]["time"] == pytest.approx(0.33)


def test_samplers_that_add_noise_are_warned_of():
    for sampler in (DDPMScheduler(), FlowMatchHeunDiscreteScheduler()):
        with pytest.warns(UserWarning, match="few coarse steps"):
            follow(schedule_of("flow"), sampler, "flow")


def run_model(kind, model, z, steps, dtype=torch.float32, only=None):
    """The model's own trajectory, in the dtypes of its pipeline; returns all outputs as latents. ``only``: this sample
    of the batch, alone."""
    prediction = PREDICTION.get(kind, "flow")
    sampler = sampler_of(prediction, steps)
    follow(model.schedule, sampler, prediction)
    outs, batch, z = [], len(z), (z if only is None else z[only : only + 1]).to(dtype)
    for t in sampler.timesteps:
        call = arguments(kind, z.float() if only is None else z.expand(batch, -1, -1, -1, -1), float(t) / 1000)
        for name in ("hidden_states", "encoder_hidden_states", "pooled_projections", "guidance"):
            if name in call:
                call[name] = call[name].to(dtype)
        if kind == "dit":
            call["timestep"] = t.expand(batch)
        if kind == "flux":
            call["timestep"] = t.expand(batch).to(dtype) / 1000
        if only is not None:
            call = {name: x if name.endswith("_ids") else x[only : only + 1] for name, x in call.items()}
        out = as_latents(kind, output(model, call), z)
        outs.append(out)
        z = sampler.step(-out if kind == "z-image" else out, t, z, return_dict=False)[0]
    return torch.stack(outs)


@pytest.mark.parametrize("kind", ["dit", "flux", "wan", "wan-tokens", "z-image"])
def test_a_grouped_batch_equals_its_samples_alone(kind):
    """Five samples, as many as the text of Flux has tokens; they differ in size and so in how they move."""
    z = latents(kind, batch=5) * torch.tensor([0.05, 0.3, 1.0, 2.0, 4.0]).view(-1, 1, 1, 1, 1)
    model = attach(kind)
    probe = model.set_schedule()
    probe.always_look = True
    run_model(kind, model, z, 8)
    threshold = torch.tensor(probe.log[3]["deviation"]["4"]).sort().values[1:3].mean().item()
    schedule = model.set_schedule(threshold=threshold, policy="grouped")
    together = run_model(kind, model, z, 8)
    sizes = [entry["m"] if isinstance(entry["m"], list) else [entry["m"]] * 5 for entry in schedule.log]
    assert len(set(sizes[3])) > 1
    for i in range(5):
        schedule = model.set_schedule(threshold=threshold)
        alone = run_model(kind, model, z, 8, only=i)
        assert [entry["m"] for entry in schedule.log] == [row[i] for row in sizes]
        torch.testing.assert_close(alone[:, 0], together[:, i], atol=1e-3, rtol=1e-3)


def test_decisions_in_bf16_are_those_in_fp32():
    """Latents, timesteps and outputs are bf16, as in a Flux pipeline."""
    logs = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = attach("flux", make("flux")).to(dtype)
        schedule = model.set_schedule()
        schedule.always_look = True
        run_model("flux", model, latents("flux", batch=1), 28, dtype)
        logs[dtype] = schedule.log
    assert [e["time"] for e in logs[torch.float32]] == [e["time"] for e in logs[torch.bfloat16]]
    values = [torch.tensor([e["deviation"]["4"][0] for e in log[3:]]) for log in logs.values()]
    ratio = values[1] / values[0]
    assert ((ratio > 0.5) & (ratio < 2)).all()  # in bf16 latents they would be all rounding
    assert 0.8 < ratio.median() < 1.25


def test_a_given_first_frame_does_not_lower_the_noise_level():
    model = attach("wan-tokens")
    schedule = model.set_schedule(threshold=0.0)
    output(model, arguments("wan-tokens", latents("wan-tokens"), 0.7))
    assert schedule.log[0]["time"] == pytest.approx(0.7)
