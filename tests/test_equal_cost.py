"""Who is best at equal cost, of a report that is made up."""

import sys

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "examples" / "study"))
from equal_cost import BUDGETS, best, equal_cost_table, short_table, tables, verdict


def row(name, flops, time, mse):
    return {"name": name, "flops": flops, "time": time, "mse": mse, "frechet": 1e4 * mse, "accuracy": 0.5}


def report(student_mse):
    teacher = [row("25 steps", 0.5, 0.5, 1e-3), row("12 steps", 0.25, 0.25, 1e-2)]
    student = [row("ρ = 0", 1.2, 1.4, student_mse), row("ρ = 0.6", 0.52, 0.7, student_mse)]
    full = {"accuracy": 1.0, "seconds": 1.0, "mse": 1e-4}
    return {
        # A student whose name begins like the teacher's families is a student.
        "families": {"teacher, steps": teacher, "teacher-made data at ρ": student},
        "set": "digits", "samples": 2, "guidance": 2.0, "steps": 50, "full": full, "converged": {"name": "200 steps"},
        "machine": "here",
    }  # fmt: skip


def at_half(of):
    """The teacher, the student and their ratio at half of the FLOPs."""
    (line,) = (line for line in short_table(of, "mse").splitlines() if line.startswith("| 0.5 |"))
    return line.split(" | ")[1:4]


def test_the_best_of_a_budget_is_the_best_that_it_pays_for():
    rows = report(1e-4)["families"]["teacher, steps"]
    assert best(rows, "flops", 1.0, "mse")["name"] == "25 steps"
    assert best(rows, "flops", 0.25, "mse")["name"] == "12 steps"
    assert best(rows, "flops", 0.2, "mse") is None


def test_a_student_that_loses_everywhere_is_told_so():
    losing = report(1e-2)
    assert "no student is ahead" in verdict(losing, "mse")
    assert "**1.0e-03**, 50%: 25 steps" in equal_cost_table(losing, "flops", "mse")
    assert at_half(losing) == ["1.0e-03, 50%: steps, 25 steps", "1.0e-02, 50%: teacher-made data at ρ, ρ = 0.6", "10"]


@pytest.mark.parametrize(("cost", "budget"), [("FLOPs", 0.5), ("measured time", 0.75)])
def test_a_student_that_wins_is_told_where(cost, budget):
    winning = report(1e-4)
    said = verdict(winning, "mse")
    assert said in tables(winning)
    budgets = ", ".join(f"{b:g}" for b in BUDGETS if b >= budget)
    assert f"at {budgets} of the full run's {cost}" in said
    assert "**1.0e-04**, 50%: ρ = 0" in equal_cost_table(winning, "flops", "mse")
    assert "By Fréchet distance students are ahead" in verdict(winning, "frechet")
    for one in winning["families"]["teacher-made data at ρ"]:
        one["accuracy"] = 0.4
    assert "By Fréchet distance no student is ahead" in verdict(winning, "frechet")
    winning["families"]["other at ρ"] = [{**row("ρ = 0", 0.5, 0.5, 2e-4), "accuracy": 0.5}]  # less far ahead, and right
    assert "(`other at ρ`)" in verdict(winning, "frechet")


def test_a_student_does_not_win_where_the_teacher_has_nothing_as_cheap():
    cheap = report(1e-4)
    cheap["families"]["teacher, steps"] = [row("60 steps", 1.2, 1.2, 1e-5)]
    assert "no student is ahead" in verdict(cheap, "mse")
    assert at_half(cheap) == ["-", "1.0e-04, 50%: teacher-made data at ρ, ρ = 0.6", "-"]
