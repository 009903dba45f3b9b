"""One long-lived process for many commands against a `FakeHub`: importing diffusers takes seconds, a command does not.

`HF_ENDPOINT` and the cache's place are read when `huggingface_hub` is imported, so a worker belongs to one hub and one
home. Run as a script, it answers each line of JSON on stdin with one on stdout.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from fake_hub import FakeHub


class Done(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Its one JSON object on stdout."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """Its one line of error."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert self.code == 2, self
        assert len(lines) == 1, self
        assert self.err.splitlines()[-1] == lines[0], self
        assert "Traceback" not in self.err, self
        return lines[0].removeprefix("error: ")


class Worker:
    """The process; use it as a context manager."""

    def __init__(self, hub: FakeHub, home: Path) -> None:
        self.hub = hub
        self._errors = (home / "worker.log").open("w+")
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=hub.env(
                home, PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1", HF_MODULES_CACHE=str(home / "m")
            ),
        )

    def run(self, *arguments: object, token: str | None = FakeHub.token, cwd: Path | None = None) -> Done:
        """Run a command; no token may be in what it prints."""
        answer = self._ask({"argv": list(map(str, arguments)), "token": token, "cwd": str(cwd) if cwd else None})
        done = Done(answer["code"], answer["out"], answer["err"])
        assert not any(secret in done.out + done.err for secret in self.hub.tokens), done
        return done

    def do(self, code: str, token: str | None = FakeHub.token, **values: Any) -> dict[str, Any]:
        """What `code`, which finds `values` as names, leaves in the dict `out`; its other names stay for later code."""
        return self._ask({"code": code, "values": values, "token": token, "cwd": None})["left"]

    def _ask(self, question: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(json.dumps(question) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise AssertionError(f"the worker died:\n{self._errors.read()[-5000:]}")
        answer = json.loads(line)
        assert "raised" not in answer, answer["raised"]
        return answer

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(20)
        self._errors.close()


def _serve() -> None:
    import contextlib
    import io
    import time
    import traceback

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever writes past sys.stdout
    time.sleep = lambda seconds: None  # between the attempts of huggingface_hub
    start = os.getcwd()
    names: dict[str, Any] = {}

    from upcycle.cli import main

    for line in sys.stdin:
        asked = json.loads(line)
        os.environ.pop("HF_TOKEN", None)
        if asked["token"]:
            os.environ["HF_TOKEN"] = asked["token"]
        os.chdir(asked["cwd"] or start)
        out, err = io.StringIO(), io.StringIO()
        answer: dict[str, Any] = {}
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                if "argv" in asked:
                    sys.argv = ["upcycle", *asked["argv"]]
                    main()
                else:
                    names.update(asked["values"], out={})
                    exec(asked["code"], names)
                    answer["left"] = names["out"]
        except SystemExit as done:
            answer["code"] = done.code or 0
        except BaseException:
            answer["raised"] = traceback.format_exc()
        answers.write(json.dumps({**answer, "out": out.getvalue(), "err": err.getvalue()}) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
