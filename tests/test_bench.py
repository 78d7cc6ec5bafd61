"""The benchmarks run, and both sides of a comparison compute the same thing."""

import sys

import bench
import pytest
import torch

TINY = {"tiny": (((1, 1, 1, 1), 8, 16, 32), 8, ("cpu", True, False), 1, "")}
SMALL = {
    "losses": lambda: bench.losses(sizes=(16,), rounds=1),
    "step": lambda: bench.step(TINY),
    "views": lambda: bench.views(patches=8, rounds=2),
    "cohort": lambda: bench.cohort(patients=(100,)),
    "probe": lambda: bench.probe(m=300, n=20, D=8, rounds=1, rows=600, tiles=600),
    "cuda": lambda: bench.cuda(TINY, sizes=(16,), probe=(900, 300, 8), device="cpu"),
}


def test_the_released_way_gives_the_same_losses():
    """Otherwise the comparison would be meaningless."""
    assert bench.ours(*bench.inputs(32)) == pytest.approx(bench.released(*bench.inputs(32)))


@pytest.mark.parametrize("section", SMALL)
def test_a_section_gives_rows(section):
    rows = list(SMALL[section]())
    assert rows
    for row in rows:
        assert row["ours"] >= 0
        assert bench.line_of(row).startswith(row["what"])


def test_views_are_made_faster_than_one_by_one():
    """About four times as fast on an idle core."""
    (row,) = bench.views(patches=8, rounds=9)
    assert row["ratio"] < 1


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    return stop.value.code


def test_an_unknown_section_is_refused(monkeypatch, capsys):
    command(monkeypatch, "speed")
    assert "no section speed: choose from losses, step" in capsys.readouterr().err


def test_without_cuda_its_section_is_refused_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = command(monkeypatch, "cuda", "--out", tmp_path / "bench.json")
    assert said == "bench.py cuda: there is no CUDA device here"
    assert not (tmp_path / "bench.json").exists()


def test_what_was_measured_before_a_mishap_is_shown(monkeypatch, capsys, tmp_path):
    def fails():
        yield bench.row("a thing", 2.0, "s", 1.0, "another", "1.1")
        raise SystemExit("stopped")

    monkeypatch.setitem(bench.SECTIONS, "losses", fails)
    command(monkeypatch, "losses", "--out", tmp_path / "bench.json")
    assert "a thing" in capsys.readouterr().out.splitlines()[-1]
    assert (tmp_path / "bench.json").exists()
