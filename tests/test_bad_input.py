"""Bad input ends with one clear line and exit code 2; nothing is half-written and nothing that exists is damaged."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run
from fake_hub import FakeHub
from safetensors.torch import load_file, save_file

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture
def copy_of(tmp_path):
    """A private copy of a folder that a test may damage."""

    def make(folder):
        return shutil.copytree(folder, tmp_path / "source")

    return make


@pytest.fixture
def refused(failing, tmp_path):
    """`upcycle convert` must refuse and leave nothing behind."""

    def check(source, *options, says):
        before = sorted(tmp_path.rglob("*"))
        line = failing("convert", source, "-o", tmp_path / "out", *options)
        assert sorted(tmp_path.rglob("*")) == before
        for part in says:
            assert part in line, line

    return check


@pytest.mark.parametrize(
    ("ratio", "says"),
    [("1", "greater than 1"), ("0.5", "greater than 1"), ("-4", "greater than 1"), ("four", "not a number"),
     ("nan", "greater than 1"), ("inf", "greater than 1"), ("257", "256 positions")],
)  # fmt: skip
def test_ratio(pipeline_dir, refused, ratio, says):
    refused(pipeline_dir, "--ratio", ratio, says=[ratio, says])


@pytest.mark.parametrize(
    ("options", "says"),
    [(["--init", "magic"], "magic"), (["--init", "exact", "--scaffold", "paper"], "lean scaffold"),
     (["--router", "grid", "--ratio", "6"], "square"), (["--router", "best"], "predictability"),
     (["--weights", "best"], "ema"), (["--time-embedding", "mine"], "meta"), (["--max-shard-size", "big"], "5GB"),
     (["--revision", "main"], "revision"), (["--variant", "fp16"], "fp16"), (["--vae", "nowhere"], "nowhere"),
     (["--frobnicate"], "frobnicate"), (["--seed", "x"], "--seed")],
)  # fmt: skip
def test_options(pipeline_dir, refused, options, says):
    refused(pipeline_dir, *options, says=[says])


@pytest.mark.parametrize(
    ("config", "says"),
    [({"_class_name": "FluxTransformer2DModel"}, "Flux"), ({"_class_name": "UNet2DConditionModel"}, "UNet"),
     ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "llama")],
)  # fmt: skip
def test_folders_that_are_no_dit(refused, tmp_path, config, says):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, tmp_path / "model" / "diffusion_pytorch_model.safetensors")
    line = [says] if says != "llama" else []
    refused(tmp_path / "model", says=[str(tmp_path / "model"), *line])


def test_a_student_is_not_converted_again(export_dir, refused):
    refused(export_dir, says=["converted model already"])


def test_missing_path_and_file_that_is_no_checkpoint(refused, tmp_path):
    refused(tmp_path / "nowhere", says=["nowhere"])
    (tmp_path / "text.pt").write_text("hello")
    refused(tmp_path / "text.pt", says=["text.pt"])


@pytest.mark.parametrize("keep", [0.5, 0.999, 0.0001])
def test_truncated_safetensors(pipeline_dir, copy_of, refused, keep):
    folder = copy_of(pipeline_dir)
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: int(len(data) * keep)])
    refused(folder, says=["diffusion_pytorch_model.safetensors"])


@pytest.mark.parametrize("fault", ["missing", "extra", "mis-shaped"])
def test_wrong_tensors_are_named(pipeline_dir, copy_of, refused, fault):
    folder = copy_of(pipeline_dir)
    tensors = load_file(folder / WEIGHTS)
    name = "transformer_blocks.1.ff.net.2.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "extra":
        name = "transformer_blocks.1.attn2.to_q.weight"
        tensors[name] = torch.zeros(64, 64)
    else:
        tensors[name] = torch.zeros(3, 3)
    save_file(tensors, folder / WEIGHTS)
    refused(folder, says=[name])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_weights_are_named_and_nothing_is_left(pipeline_dir, copy_of, refused, value):
    folder = copy_of(pipeline_dir)
    tensors = load_file(folder / WEIGHTS)
    tensors["transformer_blocks.1.ff.net.2.weight"][3, 5] = value
    save_file(tensors, folder / WEIGHTS)
    refused(folder, says=["transformer_blocks.1.ff.net.2.weight", "1"])


class _Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


def test_a_pickle_that_wants_to_run_code(refused, tmp_path):
    torch.save({"model": {}, "config": _Bomb(tmp_path / "exploded")}, tmp_path / "bomb.pt")
    refused(tmp_path / "bomb.pt", says=["bomb.pt", "system"])
    assert not (tmp_path / "exploded").exists()


def test_existing_output(pipeline_dir, export_dir, failing, tmp_path):
    out = shutil.copytree(export_dir, tmp_path / "out")
    assert "--force" in failing("convert", pipeline_dir, "-o", out)
    # A replacement that fails leaves the old output whole.
    broken = shutil.copytree(pipeline_dir, tmp_path / "broken")
    tensors = load_file(broken / WEIGHTS)
    tensors["proj_out_2.weight"][0, 0] = torch.nan
    save_file(tensors, broken / WEIGHTS)
    failing("convert", broken, "-o", out, "--force")
    assert (out / WEIGHTS).read_bytes() == (export_dir / WEIGHTS).read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["broken", "out"]


def test_force_never_deletes_what_is_not_an_output_or_holds_the_source(pipeline_dir, failing, tmp_path, monkeypatch):
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    assert "does not look like" in failing("convert", pipeline_dir, "-o", mine, "--force")
    assert (mine / "thesis.txt").read_text() == "years of work"
    source = shutil.copytree(pipeline_dir, tmp_path / "source")
    assert "delete" in failing("convert", source, "-o", source, "--force", "--no-verify")
    assert (source / WEIGHTS).is_file()
    monkeypatch.chdir(source)
    failing("convert", pipeline_dir, "-o", ".", "--force", "--no-verify")
    (tmp_path / "file").write_text("x")
    assert "is a file" in failing("convert", pipeline_dir, "-o", tmp_path / "file")


def test_no_space_left(pipeline_dir, tmp_path):
    """A file-size limit stands in for a full disk: writing fails in the middle of the weights."""
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "from upcycle.cli import main; main()"
    )
    arguments = ["convert", str(pipeline_dir), "-o", str(tmp_path / "out"), "--no-verify"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "no space left" in done.stderr.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


HUB_CASES = {
    "nobody/nothing": "check the name",
    "someone/gated": "hf auth login",
    "someone/dit --revision lost": "lost",
    "someone/flux": "Flux",
}


def test_the_hub(pipeline_dir, tmp_path):
    """Every Hub error through the real command, in one process that talks to a local Hub; then with no network."""
    flux = tmp_path / "flux"
    (flux / "transformer").mkdir(parents=True)
    index = {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (flux / "model_index.json").write_text(json.dumps(index))
    (flux / "transformer" / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    code = """
import json, sys
from upcycle.cli import main
for case in json.loads(sys.argv[1]):
    sys.argv = ["upcycle", "convert", *case.split(), "-o", "out"]
    try:
        main()
    except SystemExit as exit:
        print(exit.code, flush=True)
"""
    work = tmp_path / "work"
    work.mkdir()

    def ask(cases, env):
        done = subprocess.run([sys.executable, "-c", code, json.dumps(cases)], capture_output=True, text=True,
                              env=env, cwd=work, timeout=200)  # fmt: skip
        assert done.stdout.split() == ["2"] * len(cases), done.stderr
        assert "Traceback" not in done.stderr
        assert list(work.iterdir()) == []
        return [line for line in done.stderr.splitlines() if line.startswith("error: ")]

    with FakeHub() as hub:
        hub.add("someone/gated", pipeline_dir, gated=True)
        hub.add("someone/dit", pipeline_dir)
        hub.add("someone/flux", flux)
        env = hub.env(tmp_path / "home")
        lines = ask(list(HUB_CASES), env)
        assert len(lines) == len(HUB_CASES)
        for line, part in zip(lines, HUB_CASES.values(), strict=True):
            assert part in line
    assert "cannot be reached" in ask(["someone/dit"], env)[0]


def test_sample(export_dir, pipeline_dir, failing, tmp_path):
    out = ["-o", tmp_path / "out"]
    assert "0 to 9" in failing("sample", export_dir, "--classes", "3,10", *out)
    assert "0 to 9" in failing("sample", export_dir, "--classes=-1", *out)
    assert "goldfish" in failing("sample", export_dir, "--classes", "goldfish", *out)
    assert "less than 1" in failing("sample", export_dir, "--tail-drop", "1", *out)
    assert "no tail" in failing("sample", pipeline_dir, "--tail-drop", "0.5", *out)
    assert "at least 1" in failing("sample", export_dir, "--steps", "0", *out)
    assert "nowhere" in failing("sample", tmp_path / "nowhere", *out)
    assert "no pipeline" in failing("sample", export_dir / "transformer", *out)
    assert list(tmp_path.iterdir()) == []


def test_finetune(failing, pipeline_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "does not exist" in failing("finetune", "nothing.yaml")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("teacher: digits\ndata: digits\nout: run\nstpes: 3\n")
    assert "did you mean 'steps'?" in failing("finetune", recipe)
    recipe.write_text(f"teacher: {pipeline_dir}\ndata: digits\nout: run\nsteps: 3\n")
    assert "[1, 16, 16]" in failing("finetune", recipe)
    assert "nowhere" in failing("finetune", recipe, "--set", "data=nowhere")
    assert "key=value" in failing("finetune", recipe, "--set", "data")
    (tmp_path / "shards").mkdir()
    assert "no *.safetensors" in failing("finetune", recipe, "--set", "data=shards")
    save_file({"z0": torch.zeros(2, 4, 16, 16), "label": torch.tensor([0, 99])}, tmp_path / "shards" / "0.safetensors")
    assert "labels outside 0..9" in failing("finetune", recipe, "--set", "data=shards")
    assert "no checkpoint" in failing("finetune", recipe, "--resume", "--set", "teacher=digits")
    assert not (tmp_path / "run").exists()


def test_a_fault_of_ours_is_called_so(tmp_path, monkeypatch, capsys):
    """Exit code 1 and no traceback for what the user cannot mend; --debug shows it."""
    from upcycle import cli, sources

    def broken(*_, **__):
        raise ZeroDivisionError("planted")

    monkeypatch.setattr(sources, "open_source", broken)
    for extra, traceback in (([], False), (["--debug"], True)):
        monkeypatch.setattr(sys, "argv", ["upcycle", "convert", "x", *extra])
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
        assert exit_info.value.code == 1
        assert ("Traceback" in capsys.readouterr().err) == traceback


def test_works_from_a_folder_with_odd_characters(pipeline_dir, tmp_path):
    folder = shutil.copytree(pipeline_dir, tmp_path / "mödel [1] 100%")
    run("convert", folder, "--no-verify", cwd=tmp_path)
    assert (tmp_path / "mödel [1] 100%-dc4" / WEIGHTS).is_file()


def test_no_test_here_writes_into_the_project():
    assert not (ROOT / "out").exists()
