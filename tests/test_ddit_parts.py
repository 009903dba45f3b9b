"""The study of what each part of a DDiT start brings: the script runs, and goes on where it was interrupted."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
BOTH = {"full", "no-lora", "no-residual", "default-variance", "random-start", "corner"}


def test_quick(tmp_path):
    def run():
        return subprocess.run(
            [sys.executable, ROOT / "examples/study/ddit_parts.py", "--quick", "--out", tmp_path],
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
        )

    printed = run().stdout
    results = json.loads((tmp_path / "ddit_parts.json").read_text())
    assert {name: set(arms) for name, arms in results["runs"].items()} == {
        "epsilon": BOTH,
        "flow": BOTH | {"no-text-vector"},
    }
    for arms in results["runs"].values():
        for arm in arms.values():
            assert set(arm) == {"0"}
            for when in ("before", "after"):
                assert set(arm["0"][when]) == {"2", "4"}
                for m, by_level in arm["0"][when].items():
                    assert len(by_level) == 6
                    assert all(math.isfinite(error) and error > 0 for error in by_level.values())
                    squares = [error**2 for error in by_level.values()]
                    assert math.isclose(arm["0"]["relative_mse"][when][m], sum(squares) / 6)
            assert arm["0"]["before"] != arm["0"]["after"]
        for m in "24":
            full, without = (list(arms[arm]["0"]["before"][m].values()) for arm in ("full", "no-residual"))
            assert full[-1] < without[-1]  # the noisiest level
        # what is left out shows where it should, and nowhere else
        untrained = {name: arm["0"]["before"] for name, arm in arms.items()}
        same = {name for name, errors in untrained.items() if errors == untrained["full"]}
        assert same == {"full", "no-lora"} | ({"no-text-vector"} & set(arms))
    assert printed.count("| full start |") == 4
    assert (tmp_path / "ddit_parts.png").stat().st_size > 10_000

    written = (tmp_path / "ddit_parts.json").read_bytes()
    again = run().stdout
    assert "seed 0" not in again  # all is there already
    assert (tmp_path / "ddit_parts.json").read_bytes() == written
    assert again == printed[printed.index("Relative MSE") :]
