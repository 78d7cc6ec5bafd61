"""The benchmarks run, and what they compare computes the same."""

import sys

import bench
import pytest

SMALL = {
    "losses": lambda: bench.losses(sizes=(16,), rounds=1),
    "batch": lambda: bench.batch(sizes=(16,), rounds=1),
    "step": lambda: bench.step({"small": (((1, 1, 1, 1), 8, 16, 32), 8, 1, "")}),
    "views": lambda: bench.views(patches=8, rounds=2),
    "cohort": lambda: bench.cohort(patients=(100,)),
    "knn": lambda: bench.probes(m=300, n=20, D=8, rounds=1),
}


def test_the_released_way_gives_the_same_losses():
    """Otherwise it would be no comparison."""
    assert bench.ours(*bench.inputs(32)) == pytest.approx(bench.released(*bench.inputs(32)))


@pytest.mark.parametrize("section", SMALL)
def test_a_section_gives_rows(section):
    rows = list(SMALL[section]())
    assert rows
    for row in rows:
        assert row["ours"] >= 0
        assert bench.line_of(row).startswith(row["what"])


def test_views_are_made_faster_than_one_by_one():
    """About four times on a quiet core."""
    (row,) = SMALL["views"]()
    assert row["ratio"] < 1


def test_an_unknown_section_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "speed"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "no section speed: take of losses, batch" in capsys.readouterr().err
