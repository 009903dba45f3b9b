"""Bad input ends with one clear line and exit code 2; nothing is half-written and nothing that exists is damaged."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest
import torch
from conftest import ROOT, run
from fake_hub import FakeHub
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import GOLDEN

from upcycle.errors import UpcycleError
from upcycle.output import check_output, disk_full, new_folder, to_json

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


@pytest.fixture
def command(capsys, monkeypatch):
    """Run the command line in this process; returns exit code, stdout and stderr."""
    from upcycle.cli import main

    def run_here(*arguments):
        monkeypatch.setattr(sys, "argv", ["upcycle", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capsys.readouterr()
        return exit_info.value.code, captured.out, captured.err

    before = signal.getsignal(signal.SIGTERM)
    yield run_here
    signal.signal(signal.SIGTERM, before)


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
     (["--frobnicate"], "frobnicate"), (["--seed", "x"], "--seed"), (["--seed", 2**70], "--seed"),
     (["--max-shard-size", "infGB"], "infGB"), (["--max-shard-size", "0GB"], "0GB"), (["-o", "x" * 300], "too long")],
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
    refused(export_dir, "--ratio", "8", says=["converted model already", "--ratio"])


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


def test_force_never_deletes_the_model_that_is_sampled(export_dir, failing, tmp_path):
    model = shutil.copytree(export_dir, tmp_path / "demo" / "pipeline")
    (tmp_path / "demo" / "report.json").write_text("{}")
    for out in (model, model.parent):
        assert "delete" in failing("sample", model, "-o", out, "--force", "--steps", "1")
    assert (model / WEIGHTS).is_file()


def test_force_replaces_outputs_only(export_dir, pipeline_dir, tmp_path):
    def holding(*names):
        folder = tmp_path / "samples"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name in names:
            (folder / name).write_text("x")
        return folder

    demo = tmp_path / "demo"
    shutil.copytree(export_dir, demo / "pipeline")
    for name in ("report.json", "samples.png", "router.png", "compression.png"):
        (demo / name).write_text("{}")
    export = shutil.copytree(export_dir, tmp_path / "export")
    for out in (demo, export, holding(), holding("samples.png", "class0001-seed7.png")):
        check_output(out, force=True)

    for folder in (demo, export):
        (folder / "thesis.txt").write_text("years of work")
        with pytest.raises(UpcycleError, match=r"thesis\.txt"):
            check_output(folder, force=True)
    with pytest.raises(UpcycleError, match=r"holiday\.png"):
        check_output(holding("samples.png", "holiday.png"), force=True)
    for names in (["config.json"], ["model_index.json"], ["report.json"], ["run.json"]):
        with pytest.raises(UpcycleError, match="does not look like"):
            check_output(holding(*names), force=True)
    with pytest.raises(UpcycleError, match="does not look like"):
        check_output(shutil.copytree(pipeline_dir, tmp_path / "stock"), force=True)


def test_force_replaces_what_a_link_points_to(export_dir, tmp_path):
    shutil.copytree(export_dir, tmp_path / "export")
    (tmp_path / "link").symlink_to("export")
    with new_folder(tmp_path / "link", force=True) as folder:
        (folder / "new").write_text("x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "link"]
    assert (tmp_path / "link").is_symlink()
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["new"]
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UpcycleError, match="loop"):
        check_output(tmp_path / "loop", force=True)


def test_a_replacement_that_fails_at_the_last_moment_leaves_the_old_folder(export_dir, tmp_path):
    out = shutil.copytree(export_dir, tmp_path / "out")
    with pytest.raises(UpcycleError, match="cannot be used"), new_folder(out, force=True) as folder:
        shutil.rmtree(folder)
    assert (out / WEIGHTS).is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_names_as_long_as_the_file_system_allows(tmp_path):
    with new_folder(tmp_path / ("x" * 255), force=False) as folder:
        (folder / "new").write_text("x")
    assert (tmp_path / ("x" * 255) / "new").is_file()


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        shutil.Error([("a", "b", "[Errno 28] No space left on device: 'a' -> 'b'")]),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534"),
    ],
)
def test_a_full_disk_whoever_reports_it(tmp_path, error):
    with pytest.raises(UpcycleError, match="no space left"), new_folder(tmp_path / "out", force=False):
        raise RuntimeError("saving failed") from error
    assert list(tmp_path.iterdir()) == []
    assert not disk_full(ValueError("something else"))


def test_what_users_name_is_printed_as_it_is(pipeline_dir, failing, command, tmp_path, monkeypatch):
    assert "foo[/bar]" in failing("convert", "foo[/bar]")
    assert "foo[/bar]" in failing("sample", "foo[/bar]")
    monkeypatch.chdir(tmp_path)
    for name in ("o[/x]", "o[b] :smile:", "long " * 40):
        code, out, err = command("convert", pipeline_dir, "-o", name, "--no-verify")
        assert code in (0, None), err
        assert out.splitlines()[-1] == name
        assert name in command("convert", pipeline_dir, "-o", name, "--dry-run")[1]


def test_the_resume_hint_can_be_pasted(command, tmp_path, monkeypatch):
    from upcycle.training import loop, run

    def interrupted(*_, **__):
        raise loop.Interrupted(3)

    recipe = tmp_path / "my recipe.yaml"
    recipe.write_text("teacher: digits\ndata: digits\nout: run\nstages: [{name: post-train, steps: 3}]\n")
    monkeypatch.setattr(run, "prepare", lambda *_, **__: None)
    monkeypatch.setattr(run, "finetune", interrupted)
    given = ["finetune", str(recipe), "--set", "stages.post-train.freeze=[blocks]"]
    code, _, err = command(*given)
    assert code == 130
    assert shlex.split(err.strip().splitlines()[-1].partition("go on with: ")[2]) == ["upcycle", *given, "--resume"]


def test_an_interrupted_demo_is_no_fault(command, tmp_path, monkeypatch):
    from upcycle import demo
    from upcycle.training.loop import Interrupted

    def interrupted(*_, **__):
        raise Interrupted(7)

    monkeypatch.setattr(demo, "run_demo", interrupted)
    code, _, err = command("demo", "-o", tmp_path / "out")
    assert code == 130
    assert "interrupted at step 7" in err
    assert "fault" not in err


def test_sigterm_leaves_nothing_half_written(pipeline_dir, command, tmp_path, monkeypatch):
    from upcycle.graft import convert

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # so that without a handler the conversion would succeed
    monkeypatch.setattr(convert, "write_weights", lambda *_: signal.raise_signal(signal.SIGTERM))
    code, _, err = command("convert", pipeline_dir, "-o", tmp_path / "out", "--no-verify")
    assert (code, err.strip().splitlines()[-1]) == (130, "error: interrupted")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("worst", [1e-3, float("nan")])
def test_a_conversion_that_should_be_exact_and_is_not(pipeline_dir, command, tmp_path, monkeypatch, worst):
    from upcycle.graft import verify

    measured = verify.Difference(worst, {999: worst}, 64, 1.0)
    monkeypatch.setattr(verify, "measure_difference", lambda *_, **__: measured)
    code, out, err = command("convert", pipeline_dir, "-o", tmp_path / "out", "--json")
    assert code == 1
    assert "differs from its teacher" in err
    report = json.loads(out, parse_constant=pytest.fail)
    assert report["max_abs_diff"] == (None if worst != worst else worst)
    assert (tmp_path / "out" / WEIGHTS).is_file()


def test_json_is_strict():
    value = {"a": [float("nan"), 1.5], "b": {"c": (float("inf"), -float("inf"))}, "d": 2}
    assert json.loads(to_json(value)) == {"a": [None, 1.5], "b": {"c": [None, None]}, "d": 2}


@pytest.mark.parametrize("content", ["{broken", "[]", "{}", '{"_class_name": 3}'])
def test_vae_that_is_none(refused, tmp_path, content):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(content)
    refused(GOLDEN / "meta_dit_tiny.pt", "--vae", tmp_path / "vae", says=["--vae", str(tmp_path / "vae")])


def test_the_scheduler_made_beside_a_vae_is_removed(pipeline_dir, command, tmp_path, monkeypatch):
    from upcycle.graft import components

    at_exit = []
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(components.atexit, "register", lambda *call, **options: at_exit.append((call, options)))
    code, _, err = command("convert", GOLDEN / "meta_dit_tiny.pt", "--vae", pipeline_dir, "--dry-run")
    assert code in (0, None), err
    assert [path.name[:18] for path in tmp_path.iterdir()] == ["upcycle-scheduler-"]
    for (function, *arguments), options in at_exit:
        function(*arguments, **options)
    assert list(tmp_path.iterdir()) == []


def test_no_command_prints_the_help(command):
    code, out, err = command()
    assert code == 2
    assert "Usage" in out + err
    assert not re.search(r"^error:", err, flags=re.M)


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
    assert "leave out --tail-drop" in failing("sample", pipeline_dir, "--tail-drop", "0.5", *out)
    assert "at least 1" in failing("sample", export_dir, "--steps", "0", *out)
    assert "nowhere" in failing("sample", tmp_path / "nowhere", *out)
    assert "no pipeline" in failing("sample", export_dir / "transformer", *out)
    for scale in ("nan", "inf"):
        assert "--guidance-scale" in failing("sample", export_dir, "--guidance-scale", scale, *out)
    for option in (("--guidance-interval", "200:700"), ("--guidance-channels", "3")):
        line = failing("sample", export_dir, "--guidance-scale", "1", *option, *out)
        assert f"--guidance-scale 1 is no guidance, and {option[0]} changes it" in line
    for command in (
        ("evaluate", export_dir, "--reference", "digits"),
        ("sample", export_dir, *out),
        ("compare", pipeline_dir, export_dir, *out),
        ("synthesize", pipeline_dir, "--count", "1", *out),
    ):
        assert "--guidance-scale 0.5 is less than none" in failing(*command, "--guidance-scale", "0.5")
    line = failing("evaluate", export_dir, "--reference", "digits", "--guidance-scale", "1", *option)
    assert "and --guidance-channels changes it" in line
    assert "--device meta" in failing("sample", export_dir, "--device", "meta", *out)
    assert "--seed" in failing("sample", export_dir, "--seed", 2**70, *out)
    assert "--revision" in failing("sample", export_dir, "--revision", "main", *out)
    assert "too long" in failing("sample", export_dir, "-o", tmp_path / ("x" * 300))
    assert list(tmp_path.iterdir()) == []


def test_finetune(failing, pipeline_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "does not exist" in failing("finetune", "nothing.yaml")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("teacher: digits\ndata: digits\nout: run\nstages: [{name: a, stpes: 3}]\n")
    assert "did you mean 'steps'?" in failing("finetune", recipe)
    recipe.write_text(f"teacher: {pipeline_dir}\ndata: digits\nout: run\nstages: [{{name: a, steps: 3}}]\n")
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
