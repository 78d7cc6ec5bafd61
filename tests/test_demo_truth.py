"""demo/truth.py: attribute scores that are the factor, or its opposite, and what is missing."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import evaluate
from data import read_cohort
from demo import truth
from losses import LEVELS

BANK = {
    "levels": {level: {f"high {level}": ["a"], f"low {level}": ["b"]} for level in LEVELS},
    "truth": {f"high {level}": "+cellularity" for level in LEVELS}
    | {"low patch": "+cellularity", "low slide": "-cellularity"},
}


@pytest.fixture
def out(cohort_folder, tmp_path):
    """An evaluated run: at each level one attribute scores as cellularity, one as its opposite.

    The encoder that it is held against has the two the other way round.
    """
    cohort = read_cohort(cohort_folder)
    names = cohort.names.astype(str)
    cellularity = truth.read_factors(cohort_folder, names)["cellularity"]
    score = torch.from_numpy(np.stack([cellularity, -cellularity], axis=1))
    scores = dict.fromkeys(LEVELS, score)
    metrics = {
        "command": "python evaluate.py",
        "run": str(tmp_path),
        "step": 4,
        "root": cohort.root,
        "classes": cohort.classes,
        "rows": list(range(len(cohort))),
        "notes": [],
        "against": "start",
        "probes": {},
        "levels": list(LEVELS),
        "attributes_used": dict.fromkeys(LEVELS, 2.0),
        "class_attributes": [],
    }
    names = {level: list(BANK["levels"][level]) for level in LEVELS}
    other_scores = dict.fromkeys(LEVELS, -score)
    z = torch.rand(len(cohort), 4)
    evaluate.write(str(tmp_path), metrics, cohort, z, scores, names, other_scores)
    (tmp_path / "bank.json").write_text(json.dumps(BANK))
    (tmp_path / "config.json").write_text(json.dumps({"bank": str(tmp_path / "bank.json")}))
    return tmp_path


def command(monkeypatch, out):
    monkeypatch.setattr(sys, "argv", ["truth.py", str(out)])
    truth.main()


def change(out, **values):
    metrics = json.loads((out / "metrics.json").read_text())
    (out / "metrics.json").write_text(json.dumps(metrics | values))


def test_attributes_are_held_against_their_factors(out, monkeypatch, capsys):
    """A score that is the factor has an AUC of 1, and of 0 where the bank means the opposite."""
    command(monkeypatch, out)
    metrics = json.loads((out / "metrics.json").read_text())
    found = {row["attribute"]: row["AUC, step 4"] for row in metrics["truth"]}
    expected = {"high patch": 1, "low patch": 0, "high slide": 1, "low slide": 1, "high patient": 1}
    assert found == expected
    for row in metrics["truth"]:
        assert row["AUC, start"] == 1 - row["AUC, step 4"]
    assert metrics["truth"][0]["factor"] == "+cellularity"
    printed = capsys.readouterr().out
    assert "patch: mean AUC, step 4 0.500" in printed
    assert "slide: mean AUC, start 0.000" in printed
    assert "+cellularity" in (out / "report.html").read_text()


def test_only_the_rows_that_were_probed_count(out, monkeypatch, cohort_folder):
    """The others' scores may be anything."""
    rows = [0, 3, 60, 119]
    change(out, rows=rows)
    with np.load(out / "embeddings.npz") as file:
        data = dict(file)
    others = np.setdiff1d(np.arange(len(data["z"])), rows)
    data["scores_patch"][others] = 0
    np.savez(out / "embeddings.npz", **data)
    command(monkeypatch, out)
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["truth"][0]["AUC, step 4"] == 1


def test_without_another_encoder_there_is_one_auc(out, monkeypatch):
    with np.load(out / "embeddings.npz") as file:
        data = {name: array for name, array in dict(file).items() if "against" not in name}
    np.savez(out / "embeddings.npz", **data)
    change(out, against="")
    command(monkeypatch, out)
    row = json.loads((out / "metrics.json").read_text())["truth"][0]
    assert [key for key in row if key.startswith("AUC")] == ["AUC, step 4"]


@pytest.mark.parametrize("bank", ["gone.json", "attributes/demo.json"])
def test_a_bank_that_has_moved_is_the_demos(tmp_path, bank):
    (tmp_path / "config.json").write_text(json.dumps({"bank": bank}))
    with open(os.path.join(ROOT, "demo/attributes.json"), encoding="utf-8") as file:
        assert truth.read_truth(tmp_path) == json.load(file)["truth"]


def test_a_bank_without_truth_is_an_error(out, monkeypatch):
    (out / "bank.json").write_text(json.dumps({"levels": BANK["levels"]}))
    with pytest.raises(ValueError, match=r'bank\.json has no "truth"'):
        command(monkeypatch, out)


def test_a_bank_of_other_attributes_is_an_error(out, monkeypatch):
    (out / "config.json").write_text(json.dumps({"bank": "gone.json"}))  # the demo's, then
    with pytest.raises(ValueError, match="names none of its attributes"):
        command(monkeypatch, out)


def test_a_cohort_without_factors_is_an_error(out, tmp_path, monkeypatch):
    change(out, data=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"factors\.csv does not exist: only demo tissue"):
        command(monkeypatch, out)


def test_a_folder_without_results_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"run python evaluate\.py"):
        command(monkeypatch, tmp_path)
