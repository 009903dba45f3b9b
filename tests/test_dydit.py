"""DyDiT's gates in the blocks: equal to the teacher at step 0, computed as they are counted, trained and continued."""

import json
import shutil
import subprocess
import sys

import pytest
import tiny
import torch
from accelerate import Accelerator
from conftest import inside
from fresh import BLOCK
from runs import WEIGHTS, rows_of, run_here, same, small
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from upcycle.evaluation.flops import block_flops, chunked_dit_flops, gate_share, least_gate_share
from upcycle.graft.verify import load_student
from upcycle.models.chunked_dit import ChunkedDiT, Gates, logistic_noise, runs_of, straight_through
from upcycle.training import losses, schedule
from upcycle.training.data import Batch, Draws
from upcycle.training.loop import place_teacher
from upcycle.training.run import prepare
from upcycle.training.state import RunState
from upcycle.training.step import Updater

EXACT = {"atol": 1e-5, "rtol": 0}
CLOSE = {"atol": 2e-5, "rtol": 1e-5}  # of sums in another order, on outputs of order 1


@pytest.fixture(scope="module")
def teacher():
    return tiny.make_dit(0, heads=4)


@pytest.fixture(scope="module")
def exports(teacher, tmp_path_factory):
    """What `convert` makes with gates and without."""
    folder = tmp_path_factory.mktemp("dydit")
    tiny.save_pipeline(folder / "teacher", teacher)
    for name, options in (("gated", ["--dydit", "0.7"]), ("plain", [])):
        done = inside("convert", folder / "teacher", *options, "-o", folder / name, "--json")
        (folder / f"{name}.json").write_text(done.stdout)
    return folder


def noisy(batch, seed=0):
    return torch.randn(batch, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


def dynamic(folder):
    """A student whose gates depend on the timestep and the token, and whose router keeps what it likes."""
    model = load_student(folder)
    generator = torch.Generator().manual_seed(1)
    routers = model.dydit_routers
    routers.width.weight.normal_(generator=generator).mul_(0.3)
    routers.width.bias.zero_()
    for router in routers.tokens:
        router[-1].weight.normal_(generator=generator)
        router[-1].bias.zero_()
    model.guide = 0.0
    model.register_to_config(guide=0.0)
    model.routing_module.scorer.residual_scorer[-1].weight.normal_(generator=generator)
    return model


# -- the start --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_equals_the_teacher_at_every_timestep(teacher, exports):
    assert json.loads((exports / "gated.json").read_text())["max_abs_diff"] <= 1e-5
    gated, plain = load_student(exports / "gated"), load_student(exports / "plain")
    x, labels = noisy(50), torch.arange(50) % 11
    for start in range(0, 1000, 50):
        timestep = torch.arange(start, start + 50)
        out = gated(x, timestep, labels)
        torch.testing.assert_close(out.sample, teacher(x, timestep, labels).sample, **EXACT)
        assert torch.equal(out.sample, plain(x, timestep, labels).sample)
        assert all(bool((gate == 1).all()) for gate in (out.gates.heads, out.gates.channels, out.gates.tokens))


def test_open_gates_are_ones_to_the_bit_while_gradients_are_kept(exports):
    gated, plain = load_student(exports / "gated"), load_student(exports / "plain")
    gated.requires_grad_(True)
    x, t, y = noisy(3), torch.tensor([5, 500, 990]), torch.tensor([1, 2, 10])
    out = gated(x, t, y, tail_drop=torch.tensor([0.0, 0.3, 0.6]))  # packed
    expected = plain(x, t, y, tail_drop=torch.tensor([0.0, 0.3, 0.6]))
    assert torch.equal(out.sample, expected.sample)
    out.sample.square().mean().backward()
    assert all(p.grad is not None for p in gated.dydit_routers.parameters())
    assert gated.dydit_routers.width.weight.grad.abs().min() > 0


def test_off_is_as_if_it_were_not_there(exports):
    plain = load_student(exports / "plain")
    assert plain.config.dydit == 0
    assert plain(noisy(1), torch.tensor([5]), torch.tensor([1])).gates is None
    gated = load_file(exports / "gated/transformer/diffusion_pytorch_model.safetensors")
    assert {name for name in gated if not name.startswith("dydit_routers.")} == set(plain.state_dict())
    older = {key: value for key, value in plain.config.items() if key != "dydit"}
    assert ChunkedDiT.from_config(older).state_dict().keys() == plain.state_dict().keys()


# -- gates at work ----------------------------------------------------------------------------------------------------


def test_runs():
    assert runs_of([True, True, False, True, False, False, True]) == [(0, 2), (3, 4), (6, 7)]
    assert runs_of([False, True]) == [(1, 2)]
    assert runs_of([True, True]) == [(0, 2)]


@pytest.mark.parametrize("budget", ["even", "ragged", "tokens"])
@pytest.mark.parametrize("t", [20, 430, 960])
def test_left_out_as_masked(exports, t, budget):
    """Without gradients what is off is not computed, with gradients it is multiplied by 0."""
    model = dynamic(exports / "gated")
    x, timestep, labels = noisy(4), torch.full((4,), t), torch.tensor([1, 2, 3, 10])
    drop = None
    if budget == "even":
        x = x[:1].expand(4, -1, -1, -1)
        labels = labels[:1].expand(4)
    elif budget == "tokens":
        model.set_tokens(40)
    else:
        drop = torch.tensor([0.0, 0.2, 0.5, 0.7])
    masked = model(x, timestep, labels, tail_drop=drop)
    with torch.inference_mode():
        left_out = model(x, timestep, labels, tail_drop=drop)
    torch.testing.assert_close(left_out.sample, masked.sample, **CLOSE)
    for name in ("heads", "channels", "tokens"):
        ours = getattr(left_out.gates, name)
        assert torch.equal(ours, getattr(masked.gates, name).detach())
        assert 0 < ours.mean() < 1, name
    assert bool((left_out.gates.heads[..., 0] == 1).all())
    assert bool((left_out.gates.channels[..., 0] == 1).all())


@torch.inference_mode()
def test_timesteps_mix_in_a_batch(exports):
    model = dynamic(exports / "gated")
    x, timestep, labels = noisy(4), torch.tensor([3, 300, 600, 990]), torch.tensor([1, 2, 3, 10])
    together = model(x, timestep, labels)
    assert len({str(gate.tolist()) for gate in together.gates.heads}) > 1
    for i in range(4):
        alone = model(x[i : i + 1], timestep[i : i + 1], labels[i : i + 1])
        torch.testing.assert_close(together.sample[i : i + 1], alone.sample, **CLOSE)
        assert torch.equal(together.gates.tokens[i : i + 1], alone.gates.tokens)


@torch.inference_mode()
def test_what_is_counted_is_what_is_computed(exports):
    model = dynamic(exports / "gated")
    c, inputs = model.config, (noisy(1), torch.tensor([430]), torch.tensor([3]))
    with FlopCounterMode(display=False) as counter:
        out = model(*inputs)
    seen = sum(n for op, n in counter.get_flop_counts()["Global"].items() if "attention" not in str(op))
    tokens = out.routing.mask.sum(1)
    share = gate_share(c, out.gates, tokens).item()
    assert 0.2 < share < 0.95
    n, heads = tokens.item(), out.gates.heads.sum().item()
    attention = heads * n**2 * (4 * c.attention_head_dim + 3)
    assert sum(chunked_dit_flops(c, n, share).values()) - attention == pytest.approx(seen, rel=1e-6)
    blocks = block_flops(64, 4, 2, n)
    assert chunked_dit_flops(c, n)["blocks"] == pytest.approx(0.7 * blocks), "the target, where nothing was measured"


@torch.inference_mode()
def test_layers_that_are_more_than_their_weights_are_masked(exports):
    """A hook (an adapter, offloading) must see a whole layer."""
    model, whole = dynamic(exports / "gated"), dynamic(exports / "gated")
    inputs = noisy(2), torch.tensor([430, 430]), torch.tensor([3, 4])
    widths = []
    for block in whole.transformer_blocks:
        block.attn1.to_q.register_forward_hook(lambda module, args, output: widths.append(output.shape[-1]))
    torch.testing.assert_close(whole(*inputs).sample, model(*inputs).sample, **CLOSE)
    assert widths == [64, 64]


@torch.inference_mode()
def test_one_graph_with_a_fixed_budget(exports):
    model = dynamic(exports / "gated")
    model.set_tokens(40)
    inputs = noisy(2), torch.tensor([430, 430]), torch.tensor([3, 4])
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs).sample, model(*inputs).sample, **CLOSE)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_noise_belongs_to_a_sample(exports, checkpointing):
    """Neither batch-mates, nor the global state, nor a block that is computed again change it."""
    model = load_student(exports / "gated").requires_grad_(True).train()
    with torch.no_grad():
        for layer in (model.dydit_routers.width, *(router[-1] for router in model.dydit_routers.tokens)):
            layer.bias.zero_()
    if checkpointing:
        model.enable_gradient_checkpointing()
    x, t, y, seed = noisy(3), torch.tensor([5, 500, 990]), torch.tensor([1, 2, 10]), torch.tensor([7, 8, 9])
    out = model(x, t, y, gate_seed=seed)
    out.sample.square().mean().backward()
    grad = model.dydit_routers.tokens[0][0].weight.grad.clone()
    torch.manual_seed(5)
    alone = model(x[1:2], t[1:2], y[1:2], gate_seed=seed[1:2])
    assert torch.equal(out.gates.heads[1:2], alone.gates.heads)
    assert torch.equal(out.gates.tokens[1:2], alone.gates.tokens)
    assert 0.2 < out.gates.tokens.mean() < 0.8
    model.zero_grad()
    model.disable_gradient_checkpointing()
    again = model(x, t, y, gate_seed=seed)
    again.sample.square().mean().backward()
    assert torch.equal(again.sample, out.sample)
    torch.testing.assert_close(model.dydit_routers.tokens[0][0].weight.grad, grad)
    other = model(x, t, y, gate_seed=seed + 1000)
    assert not torch.equal(other.gates.heads, out.gates.heads)


def test_straight_through_and_its_noise():
    logit = torch.tensor([-2.0, 0.5, 3.0], requires_grad=True)
    gate = straight_through(logit)
    assert gate.tolist() == [0, 1, 1]
    gate.sum().backward()
    soft = torch.sigmoid(logit.detach() / 5)
    torch.testing.assert_close(logit.grad, soft * (1 - soft) / 5)
    noise = logistic_noise(torch.arange(20), 5000)
    assert abs(noise.mean()) < 0.03
    assert noise.std() == pytest.approx(3.1416 / 3**0.5, rel=0.02)
    torch.testing.assert_close((noise + 1.5 > 0).float().mean(), torch.tensor(1.5).sigmoid(), atol=0.01, rtol=0)


# -- training ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_of_the_true_cost():
    c = {"num_attention_heads": 4, "attention_head_dim": 16, "num_layers": 2}
    ones, tokens = torch.ones(3, 2, 4), torch.tensor([10, 20, 64])
    everything = Gates(ones, ones, None, torch.ones(3, 2))
    assert torch.equal(gate_share(c, everything, tokens), torch.ones(3))
    assert torch.equal(gate_share(c, None, tokens), torch.ones(3))
    first = ones * torch.tensor([1.0, 0, 0, 0])
    least = gate_share(c, Gates(first, first, None, torch.zeros(3, 2)), tokens)
    torch.testing.assert_close(least[2].item(), least_gate_share(c, 64))
    no_mlp = gate_share(c, Gates(ones, first, None, torch.ones(3, 2)), tokens)
    mlp = 16 * 64**2 * 64
    assert 1 - no_mlp[2].item() == pytest.approx(0.75 * 2 * mlp / block_flops(64, 4, 2, 64))

    share = torch.tensor([0.9, 0.5, 0.6, 0.6])
    assert losses.flops_loss(share, 0.7, 16).item() == pytest.approx(0.05**2)
    assert losses.flops_loss(share, 0.7, 2).item() == pytest.approx(0.1**2 / 2), "0.9 and 0.5 are 0.7 together"


def test_seeds_of_a_step_do_not_know_the_ranks(world, tmp_path):
    recipe = small(world, tmp_path / "run")
    whole = schedule.gate_seeds(recipe, 3, range(8))
    assert schedule.gate_seeds(recipe, 3, range(4, 8)) == whole[4:]
    assert len(set(whole + schedule.gate_seeds(recipe, 4, range(8)))) == 16
    assert schedule.gate_seeds(recipe.model_copy(update={"seed": 1}), 3, range(8)) != whole


def gated(world, out, steps=4, **changes):
    stage = {"steps": steps, "losses": {"flops": 2.0, "ratio_group": 4}, "tail_drop": {"start": 0.5}}
    return small(world, out, stage, convert={"ratio": 4, "dydit": 0.6}, **changes)


def test_trains_to_its_share_and_every_parameter_moves(world, tmp_path):
    recipe = gated(world, tmp_path / "run", steps=40, validation={"data": str(world / "held-out"), "every": 40})
    run_here(recipe)
    shares = [float(row["block_flops"]) for row in rows_of(tmp_path / "run/log.csv")]
    assert shares[0] > 0.95
    assert abs(sum(shares[-10:]) / 10 - 0.6) < 0.12
    before, after = (load_file(tmp_path / "run" / name / WEIGHTS.partition("/")[2]) for name in ("start", "export"))
    routers = [name for name in after if name.startswith("dydit_routers.")]
    assert len(routers) == 2 + 2 * 4
    assert not any(torch.equal(before[name], after[name]) for name in routers)

    row = rows_of(tmp_path / "run/validation.csv")[-1]
    assert 0.3 < float(row["block_flops"]) < 0.9
    facts = json.loads(inside("info", tmp_path / "run/export", "--json").stdout)
    assert facts["dydit"] == {"target": 0.6, "measured": round(float(row["block_flops"]), 3)}
    assert "60% of their FLOPs wanted" in " ".join(
        inside("info", tmp_path / "run/export").stdout.replace("│", "").split()
    )


def test_continues_bit_for_bit_and_parts_change_nothing(world, tmp_path):
    run_here(gated(world, tmp_path / "straight"))
    shutil.copytree(tmp_path / "straight", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed/export")
    shutil.rmtree(tmp_path / "resumed/checkpoints/step-0000004")
    run_here(gated(world, tmp_path / "resumed"), resume=True)
    assert same(*(load_file(tmp_path / name / WEIGHTS) for name in ("straight", "resumed")))
    assert rows_of(tmp_path / "straight/log.csv") == rows_of(tmp_path / "resumed/log.csv")

    run_here(gated(world, tmp_path / "parts", gradient_accumulation=2))
    for a, b in zip(rows_of(tmp_path / "straight/log.csv"), rows_of(tmp_path / "parts/log.csv"), strict=True):
        for name in ("loss", "flops", "block_flops", "distill", "grad_norm"):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-4, abs=1e-6), name


def test_every_parameter_gets_a_gradient_in_every_step(world, tmp_path, monkeypatch):
    """Also where the FLOPs loss is left out and where the blocks are frozen; DDP and FSDP count on it."""
    losses_ = {"flops": 0, "ratio_group": 4}
    recipe = small(
        world, tmp_path / "run", {"losses": losses_, "freeze": ["embedders", "blocks"]},
        convert={"ratio": 4, "dydit": 0.6},
    )  # fmt: skip
    prepared, accelerator = prepare(recipe), Accelerator(cpu=True)
    student = prepared.student.train()
    assert all(p.dim() > 0 for p in student.parameters())
    optimizer = torch.optim.SGD([{"params": student.requires_grad_(True).parameters(), "lr_scale": 1.0}], lr=0.0)
    teacher = place_teacher(prepared.teacher, recipe, accelerator.device)
    draws = Draws(prepared.data, recipe, 1000, student.config.num_classes)
    items = [draws[i] for i in range(8)]
    batch = Batch(**{name: torch.stack([getattr(item, name) for item in items]) for name in vars(items[0])})
    updater = Updater(recipe, accelerator, student, teacher, optimizer, RunState(student, 0.9))
    seen = []
    monkeypatch.setattr(updater, "_norm", lambda parameters: seen.extend(
        name for name, p in student.named_parameters() if p.grad is not None
    ) or torch.ones(()))  # fmt: skip
    updater.update(batch)
    assert {name for name, _ in student.dydit_routers.named_parameters(prefix="dydit_routers")} <= set(seen)


# -- commands ---------------------------------------------------------------------------------------------------------


def test_plan(exports):
    reports = {}
    for λ in ("0", "0.7", "0.5"):
        done = inside("convert", exports / "teacher", "--dydit", λ, "--dry-run", "--json")
        reports[λ] = json.loads(done.stdout)
    fresh = {λ: report["parameters"]["fresh"] for λ, report in reports.items()}
    routers = 64 * 12 + 12 + 2 * (64 * 4 + 4 + 4 + 1)  # 2 layers x (3 heads + 3 groups); 64 -> 4 -> 1 twice
    assert fresh["0.7"] - fresh["0"] == fresh["0.5"] - fresh["0"] == routers
    flops = {λ: report["flops_per_image"]["student"]["0"] for λ, report in reports.items()}
    assert flops["0.7"] - flops["0.5"] == pytest.approx(0.2 * 250 * block_flops(64, 4, 2, 64))
    assert [report["config"]["dydit"] for report in reports.values()] == [0, 0.7, 0.5]
    assert any("open until they are trained" in note for note in reports["0.5"]["notes"])
    assert reports["0.7"]["out"].endswith("-dydit0.7")


def test_a_student_can_get_gates_later(exports, tmp_path):
    inside("convert", exports / "plain", "--dydit", "0.5", "-o", tmp_path / "later")
    later, plain = load_student(tmp_path / "later"), load_student(exports / "plain")
    inputs = noisy(2), torch.tensor([3, 700]), torch.tensor([3, 4])
    assert torch.equal(later(*inputs).sample, plain(*inputs).sample)
    assert later.config.dydit == 0.5


def test_refusals(exports, tmp_path, failing):
    def wrong(*options, source="teacher"):
        return failing("convert", exports / source, "-o", tmp_path / "out", *options)

    assert "between 0 and 1" in wrong("--dydit", "1")
    assert "between 0 and 1" in wrong("--dydit", "-0.5")
    assert "cannot be reached" in wrong("--dydit", "0.05")
    assert "has DyDiT's gates already, for 0.7" in wrong("--dydit", "0.5", source="gated")
    assert "--dydit is for --method dc-dit" in wrong("--method", "ddit", "--dydit", "0.5")
    tiny.save_pipeline(tmp_path / "one", tiny.make_dit(0, heads=1))
    assert "two attention heads" in failing("convert", tmp_path / "one", "--dydit", "0.5", "-o", tmp_path / "out")

    inside("convert", exports / "teacher", "--dydit", "0.5", "--router", "grid", "-o", tmp_path / "grid")
    to_meta = failing("export", tmp_path / "grid", "--to", "meta", "-o", tmp_path / "m.pt")
    assert "its blocks have DyDiT's gates" in to_meta
    inside(
        "convert", exports / "teacher", "--dydit", "0.5", "--init", "paper", "--scaffold", "paper",
        "-o", tmp_path / "paper",
    )  # fmt: skip
    to_authors = failing("export", tmp_path / "paper", "--to", "authors", "-o", tmp_path / "a.pt")
    assert "its blocks have DyDiT's gates" in to_authors
    config = json.loads((tmp_path / "grid/transformer/config.json").read_text())
    (tmp_path / "grid/transformer/config.json").write_text(json.dumps(config | {"dydit": 2.0}))
    assert "dydit is 2.0" in failing("info", tmp_path / "grid")


FRESH = (
    BLOCK
    + """
transformer = AutoModel.from_pretrained(where, subfolder="transformer", trust_remote_code=True)
torch.save(transformer(torch.load(scratch + "/x.pt"), torch.tensor([430, 430]), torch.tensor([3, 4])).sample.detach(),
           scratch + "/out.pt")
transformer.save_pretrained(scratch + "/again")
"""
)


def test_stock_diffusers_loads_and_saves_it(exports, tmp_path):
    model = dynamic(exports / "gated")
    shutil.copytree(exports / "gated", tmp_path / "export")
    model.save_pretrained(tmp_path / "export/transformer")
    torch.save(noisy(2), tmp_path / "x.pt")
    done = subprocess.run(
        [sys.executable, "-c", FRESH, tmp_path / "export", tmp_path], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    expected = model(noisy(2), torch.tensor([430, 430]), torch.tensor([3, 4])).sample
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected, **CLOSE)
    inside("export", tmp_path / "export", "--to", "single", "-o", tmp_path / "one.safetensors")
    assert same(dict(load_student(tmp_path / "one.safetensors").state_dict()), dict(model.state_dict()))
    saved = load_file(tmp_path / "again/diffusion_pytorch_model.safetensors")
    assert same(saved, load_file(tmp_path / "export/transformer/diffusion_pytorch_model.safetensors"))


def test_half_precision_and_budgets(exports):
    model = dynamic(exports / "gated")
    label, t = torch.tensor([1, 10]), torch.tensor([500, 500])
    before = model(noisy(2), t, label).sample
    half = model.to(torch.bfloat16)(noisy(2).bfloat16(), t, label).sample
    assert half.isfinite().all()
    assert (half.float() - before).abs().mean() < 0.1 * before.abs().mean()
    model.register_to_config(calibration={"steps": 4})
    with pytest.raises(ValueError, match="gates"):  # no calibration holds what they spend
        model.set_budget(share=0.7)
