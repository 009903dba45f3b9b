"""The examples of coarser patches and their benchmark, as they stand, in processes of their own; nothing is fetched."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image

from upcycle.models import ddit

# Pipelines import names of transformers, of which one without text encoders uses nothing. Where it is not installed,
# these are names of nothing.
STAND_IN = """
import importlib.machinery, importlib.metadata, runpy, sys, types
class Names(types.ModuleType):
    __path__ = []
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("transformers", "tokenizers"):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
    def create_module(self, spec):
        return Names(spec.name)
    def exec_module(self, module):
        pass
sys.meta_path.insert(0, Finder())
version = importlib.metadata.version
importlib.metadata.version = lambda name: "5.0" if name == "transformers" else version(name)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def script(*arguments):
    """Run a script of the repository; returns its stdout."""
    before = () if importlib.util.find_spec("transformers") else ("-c", STAND_IN)
    done = subprocess.run(
        [sys.executable, *before, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def steps(text):
    """(m, why) of the lines of a log."""
    lines = text.split("step  m  why\n")[1].splitlines()[:-1]
    return [(int(m), why) for _, m, why in (line.split(maxsplit=2) for line in lines)]


@pytest.mark.parametrize(("name", "size"), [("flux", (64, 64)), ("wan", (96, 64))])
def test_examples_run_offline(name, size, tmp_path):
    out = tmp_path / ("out.gif" if name == "wan" else "out.png")
    small = ("--size", "64") if name == "flux" else ("--size", "64x96", "--frames", "5")
    said = script(f"examples/{name}_ddit.py", "--steps", "5", *small, "--out", out)
    assert said.startswith("m = 1: the stock pipeline's bits\n")
    assert steps(said) == [(m, "fixed schedule") for m in (4, 4, 2, 2, 1)]
    picture = Image.open(out)
    assert picture.size == size
    assert getattr(picture, "n_frames", 1) == (5 if name == "wan" else 1)


def test_an_example_takes_an_adapter_with_a_threshold_of_its_own(tmp_path):
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=16,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip
    config = ddit.DDiTConfig("FluxTransformer2DModel", [2], prediction="flow", threshold=1e9)
    ddit.save_adapter(ddit.attach(model, config), tmp_path / "adapter")
    given = ("examples/flux_ddit.py", "--adapter", tmp_path / "adapter", "--steps", "5", "--size", "64")
    said = script(*given, "--out", tmp_path / "own.png")
    assert [m for m, _ in steps(said)] == [1, 1, 1, 2, 2]
    said = script(*given, "--threshold", "0", "--out", tmp_path / "fine.png")
    assert [m for m, _ in steps(said)] == [1] * 5


def test_the_benchmark_measures_what_it_says():
    report = json.loads(script("benchmarks/ddit.py", "--small", "--steps", "25", "--repeats", "1", "--json"))
    assert set(report["models"]) == {"flux", "wan", "z-image", "dit-xl"}
    for found in report["models"].values():
        rows, runs, cost = found["step"], found["run"], found["overhead"]
        assert rows["stock"]["tokens"] == rows["m = 1"]["tokens"] == 4 * rows["m = 2"]["tokens"]
        assert rows["m = 2"]["tokens"] == 4 * rows["m = 4"]["tokens"]
        assert rows["stock"]["flops"] == rows["m = 1"]["flops"] > rows["m = 2"]["flops"] > rows["m = 4"]["flops"]
        assert runs["76 % at 2"]["steps_by_size"] == {"2": 19, "1": 6}
        assert runs["4:0.3,2:0.5,1:0.2"]["steps_by_size"] == {"4": 8, "2": 12, "1": 5}
        one, two = (rows[f"m = {m}"]["flops"] for m in (1, 2))
        assert runs["76 % at 2"]["flops_speed_up"] == pytest.approx(25 * one / (6 * one + 19 * two))
        for row in [*rows.values(), *runs.values()]:
            assert row["ms"] > 0
            assert row["realised"] == pytest.approx(row["speed_up"] / row["flops_speed_up"])
        for name, row in runs.items():
            count = sum(row["steps_by_size"].values())
            assert 0 < count < 25 if name.endswith("cache") else count == 25
            assert ("product_of_both" in row) == (name.endswith("cache") and not name.startswith("m = 1"))
        assert set(cost["scheduler_ms"]) == {"look", "decide", "observe"}
        assert cost["scheduler_share"] == pytest.approx(sum(cost["scheduler_ms"].values()) / cost["ms_of_a_step"])
