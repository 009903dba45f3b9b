"""Real processes for commands that do not spend their first ten seconds on `import diffusers`.

A server process of `multiprocessing` imports libraries (nothing of ours) once and forks for every command. What is read
from the environment while libraries are imported, such as `HF_ENDPOINT`, cannot be given to its processes.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

LIBRARIES = """
torch accelerate diffusers diffusers.models diffusers.pipelines.dit.pipeline_dit diffusers.training_utils
matplotlib.figure pydantic rich.progress safetensors.torch typer yaml
""".split()  # noqa: SIM905

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(LIBRARIES)


class Process:
    """`python -m upcycle ARGUMENTS` in a process group of its own; as much of `subprocess.Popen` as tests need."""

    def __init__(self, *arguments: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> None:
        assert not any(name.startswith("HF_") for name in env or {}), "that takes a process from scratch"
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name, name) for name in ("stdout", "stderr")]
        given = [*map(str, arguments)], {**os.environ, **(env or {})}, str(cwd or os.getcwd()), self._files
        self._process = _context.Process(target=_run, args=given)
        self._process.start()
        self.pid = self._process.pid
        while not self._files[1].exists() and self.poll() is None:  # until then it is in our group
            time.sleep(0.001)

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float = 300) -> tuple[str, str]:
        """Wait for the end; returns stdout and stderr."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            os.killpg(self.pid, signal.SIGKILL)
            self._process.join()
            raise TimeoutExpired("upcycle", timeout)
        out, err = (path.read_text() for path in self._files)
        self._folder.cleanup()
        return out, err


def run(*arguments: object, env: dict[str, str] | None = None, cwd: Path | None = None, timeout: float = 300):
    """`subprocess.run` of the command."""
    process = Process(*arguments, env=env, cwd=cwd)
    out, err = process.communicate(timeout)
    return CompletedProcess(arguments, process.returncode, out, err)


def _run(arguments: list[str], env: dict[str, str], cwd: str, files: list[Path]) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=False)

    import torch

    torch.set_num_threads(int(env.get("OMP_NUM_THREADS", os.cpu_count())))
    sys.argv = ["upcycle", *arguments]
    runpy.run_module("upcycle", run_name="__main__", alter_sys=True)
