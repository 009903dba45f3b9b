"""The order of the data: every row once an epoch, whatever the ranks, workers and interruptions; and what is read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import ROWS, rows_of, run_here, same, small
from safetensors.torch import load_file, save_file

from upcycle.errors import UpcycleError
from upcycle.recipe import Recipe
from upcycle.training.data import Draws, TensorData, batches, open_data
from upcycle.training.digits import load_digits


class Numbered(TensorData):
    """Rows that say which they are."""

    def __init__(self, count):
        super().__init__(torch.arange(count).view(-1, 1, 1, 1).expand(-1, 1, 2, 2), torch.arange(count))


def recipe(**changes):
    return Recipe(teacher="t", data="d", out="o", stages=[{"name": "a", "steps": 9}], **{"label_dropout": 0, **changes})


def taken(draws, recipe, steps, ranks):
    """The whole batches that ``ranks`` ranks get at some steps."""
    loaders = [iter(batches(draws, recipe, steps[0], rank, ranks)) for rank in range(ranks)]
    for _ in steps:
        parts = [next(loader) for loader in loaders]
        yield {name: torch.cat([getattr(part, name) for part in parts]) for name in vars(parts[0])}


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 4), st.integers(1, 6), st.integers(0, 30), st.integers(0, 2**32 - 1))
def test_every_row_comes_once_an_epoch(count, ranks, share, first, seed):
    """Also where epochs end within a batch, and from whichever step a run goes on."""
    r = recipe(batch_size=ranks * share, seed=seed, data_workers=0)
    draws = Draws(Numbered(count), r, 1000, 99)
    size = r.batch_size
    last = first + 2 * count // size + 2
    met = [row for batch in taken(draws, r, range(first, last), ranks) for row in batch["x0"][:, 0, 0, 0].tolist()]
    start = -(-first * size // count) * count - first * size  # the first whole epoch begins here
    assert sorted(met[start : start + count]) == list(range(count))
    assert met == [draws.row(item) for item in range(first * size, last * size)]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 20), st.sampled_from([1, 2, 3, 6]), st.integers(0, 2**32 - 1))
def test_neither_ranks_nor_the_first_step_change_what_is_drawn(first, ranks, seed):
    r = recipe(batch_size=6, seed=seed, label_dropout=0.3, data_workers=0)
    draws = Draws(Numbered(11), r, 1000, 99)
    whole = list(taken(draws, r, range(first + 3), 1))[first:]
    parts = list(taken(draws, r, range(first, first + 3), ranks))
    assert same(whole, parts)


def test_workers_do_not_change_what_is_drawn():
    r = recipe(batch_size=6, label_dropout=0.3)
    draws = Draws(Numbered(11), r, 1000, 99)
    alone = list(taken(draws, r.model_copy(update={"data_workers": 0}), range(5, 12), 1))
    assert same(alone, list(taken(draws, r.model_copy(update={"data_workers": 2}), range(5, 12), 1)))


@pytest.mark.parametrize("other", [1, 2**31, 2**32 - 1])
def test_seeds_and_items_share_nothing(other):
    """The generators of torch take 32 bits of a seed; neighbours and distant seeds must differ in all that is drawn."""
    ours, theirs = (Draws(Numbered(50), recipe(seed=seed), 1000, 99) for seed in (0, other))
    assert [ours.row(i) for i in range(50)] != [theirs.row(i) for i in range(50)]
    assert [ours.row(i) for i in range(50)] != [ours.row(i) for i in range(50, 100)]
    noises = [draws[i].noise for draws in (ours, theirs) for i in range(50)]
    assert len({tuple(noise.flatten().tolist()) for noise in noises}) == 100
    timesteps = [[int(draws[i].timestep) for i in range(50)] for draws in (ours, theirs)]
    assert sum(a == b for a, b in zip(*timesteps, strict=True)) < 5


def test_what_is_drawn_has_the_right_distribution():
    draws = Draws(Numbered(50), recipe(label_dropout=0.2), 1000, 99)
    items = [draws[i] for i in range(4000)]
    noise = torch.stack([item.noise for item in items])
    timestep = torch.stack([item.timestep for item in items])
    assert noise.mean().abs() < 0.03
    assert (noise.std() - 1).abs() < 0.03
    assert timestep.min() < 5
    assert timestep.max() > 994
    assert torch.histc(timestep.float(), 10).min() > 330
    assert 0.17 < sum(int(item.label) == 99 for item in items) / len(items) < 0.23


def test_workers_do_not_change_a_run(world, tmp_path):
    """Not a bit of it: the last checkpoint with its random states, the log, the export."""
    for workers in (0, 2):
        run_here(small(world, tmp_path / str(workers), {"steps": 4}, data_workers=workers, batch_size=12))
    last = [tmp_path / str(workers) / "checkpoints" / "step-0000004" for workers in (0, 2)]
    assert same(*(load_file(path / "model.safetensors") for path in last))
    for name in ("optimizer.bin", "run.pt", "random_states_0.pkl"):
        assert same(*(torch.load(path / name, weights_only=False) for path in last)), name
    assert same(*(rows_of(path.parent.parent / "log.csv") for path in last))


def test_rows_come_in_their_epochs_from_shards(world):
    data = open_data(str(world / "data"))
    assert len(data) == ROWS
    shards = [load_file(path)["z0"] for path in sorted((world / "data").iterdir())]
    assert torch.equal(torch.stack([data.row(i, flip=False, noise=None) for i in range(ROWS)]), torch.cat(shards))


def test_held_out_digits_are_not_in_the_training_split():
    train, val = load_digits("train")[0].flatten(1), load_digits("val")[0].flatten(1)
    assert len(train) == 1500
    assert len(val) == 297
    assert torch.cdist(val, train).amin() > 0


def test_shards_read_like_one_tensor(tmp_path):
    generator = torch.Generator().manual_seed(0)
    z0, label = torch.randn(7, 4, 8, 8, generator=generator), torch.arange(7)
    save_file({"z0": z0[:3].contiguous(), "label": label[:3].contiguous()}, tmp_path / "00000.safetensors")
    save_file({"z0": z0[3:].half(), "label": label[3:].contiguous()}, tmp_path / "00001.safetensors")
    data = open_data(str(tmp_path))
    assert data.labels.tolist() == list(range(7))
    x0 = torch.stack([data.row(i, flip=False, noise=None) for i in (6, 0, 3)])
    assert x0.dtype == torch.float32
    torch.testing.assert_close(x0, z0[[6, 0, 3]], atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("z0", "label", "says"),
    [
        (torch.zeros(0, 1, 4, 4), torch.zeros(0, dtype=torch.long), "at least one sample"),
        (torch.tensor(0.0), torch.tensor([1]), "z0 of []"),
        (torch.zeros(2, 1, 4, 4), torch.tensor([[1], [2]]), "int64 [2, 1]"),
        (torch.zeros(2, 1, 4, 4), torch.tensor(1), "int64 []"),
        (torch.zeros(2, 1, 4, 4), torch.tensor([0.5, 1]), "float32 [2]"),
        (torch.zeros(2, 1, 4, 4), torch.tensor([True, False]), "bool [2]"),
        (torch.zeros(2, 1, 4, 4), torch.tensor([1]), "1 labels"),
    ],
)
def test_shards_that_cannot_be_trained_on(tmp_path, z0, label, says):
    save_file({"z0": z0, "label": label}, tmp_path / "00007.safetensors")
    with pytest.raises(UpcycleError, match=r"00007\.safetensors") as error:
        open_data(str(tmp_path))
    assert says in str(error.value)
