"""Shared fixtures: tiny checkpoints made once, and the real command line in a subprocess."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

# Two tests run at a time (pyproject.toml); with two threads each they would wait for each other in every operation.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import processes
import pytest
import runs
import tiny

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def dit():
    """A tiny stock DiT, patch 2, 16x16 latents, 10 classes."""
    return tiny.make_dit(0)


@pytest.fixture(scope="session")
def pipeline_dir(dit, tmp_path_factory):
    """That DiT as a diffusers pipeline folder."""
    folder = tmp_path_factory.mktemp("source") / "tiny-dit"
    tiny.save_pipeline(folder, dit)
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A tiny teacher and data for training runs (`runs`)."""
    return runs.make_world(tmp_path_factory.mktemp("world"))


def run(*arguments, env=None, cwd=None, check=True, timeout=300):
    """Run the real command line in a process of its own (`processes`)."""
    if any(name.startswith("HF_") for name in env or {}):
        done = subprocess.run(
            [sys.executable, "-m", "upcycle", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=cwd,
            env={**os.environ, **env},
        )
    else:
        done = processes.run(*arguments, env=env, cwd=cwd, timeout=timeout)
    if check:
        assert done.returncode == 0, done.stderr
    return done


def inside(*arguments, check=True):
    """The same command line in this process, which saves the seconds that imports take."""
    from upcycle.cli import main

    out, err, argv, before = io.StringIO(), io.StringIO(), sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = ["upcycle", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code or 0
    finally:
        sys.argv = argv
        signal.signal(signal.SIGTERM, before)
    assert not check or code == 0, err.getvalue()
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="session")
def export_dir(pipeline_dir, tmp_path_factory):
    """What `upcycle convert` makes of it; the command's JSON lies beside it."""
    folder = tmp_path_factory.mktemp("export") / "tiny-dc4"
    done = run("convert", pipeline_dir, "--ratio", "4", "-o", folder, "--json")
    folder.with_suffix(".json").write_text(done.stdout)
    return folder


@pytest.fixture(scope="session")
def export_json(export_dir):
    """The JSON that `upcycle convert --json` printed for `export_dir`."""
    return json.loads(export_dir.with_suffix(".json").read_text())


@pytest.fixture
def failing(capsys, monkeypatch):
    """Run the command line in this process; returns the one line that it must end with, with exit code 2."""
    from upcycle.cli import main

    def run_failing(*arguments):
        monkeypatch.setattr(sys, "argv", ["upcycle", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main()
        captured = capsys.readouterr()
        assert exit_info.value.code == 2, captured.err
        lines = [line for line in captured.err.strip().splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, captured.err
        assert captured.err.strip().splitlines()[-1] == lines[0]
        assert "Traceback" not in captured.err
        return lines[0]

    return run_failing
