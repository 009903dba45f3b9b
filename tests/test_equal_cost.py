"""Who is nearest at equal cost, of a report that is made up."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "examples" / "study"))
from equal_cost import BUDGETS, best, equal_cost_table, tables, verdict


def row(name, flops, time, mse):
    return {"name": name, "flops": flops, "time": time, "mse_converged": mse, "accuracy": 0.5}


def report(student_mse):
    teacher = [row("25 steps", 0.5, 0.5, 1e-3), row("12 steps", 0.25, 0.25, 1e-2)]
    student = [row("ρ = 0", 1.2, 1.4, student_mse), row("ρ = 0.6", 0.52, 0.7, student_mse)]
    full = {"accuracy": 1.0, "seconds": 1.0, "mse_converged": 1e-4}
    return {
        "families": {"teacher, fewer steps": teacher, "exact at ρ": student},
        "set": "digits", "samples": 2, "guidance": 2.0, "steps": 50, "full": full, "converged": {"name": "200 steps"},
        "machine": "here",
    }  # fmt: skip


def test_the_best_of_a_budget_is_the_nearest_that_it_pays_for():
    rows = report(1e-4)["families"]["teacher, fewer steps"]
    assert best(rows, "flops", 1.0)["name"] == "25 steps"
    assert best(rows, "flops", 0.25)["name"] == "12 steps"
    assert best(rows, "flops", 0.2) is None


def test_a_student_that_loses_everywhere_is_told_so():
    losing = report(1e-2)
    assert "No student wins" in verdict(losing)
    last = equal_cost_table(losing, "flops").splitlines()[-1].split(" | ")
    assert last[1 + BUDGETS.index(0.5)] == "10"
    assert "**1.0e-03**, 50%: 25 steps" in equal_cost_table(losing, "flops")


@pytest.mark.parametrize(("cost", "budget"), [("flops", 0.5), ("time", 0.75)])
def test_a_student_that_wins_is_told_where(cost, budget):
    winning = report(1e-4)
    assert f"exact at ρ at {budget:g} of its {'FLOPs' if cost == 'flops' else 'time'}" in verdict(winning)
    assert "at 0.25" not in verdict(winning)
    assert "**1.0e-04**, 50%: ρ = 0" in equal_cost_table(winning, cost)
    assert verdict(winning) in tables(winning)
