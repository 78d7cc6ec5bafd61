"""demo/truth.py: scores that follow a factor or its opposite, and what happens without data."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

from data import read_cohort
from demo import truth
from demo.tissue import FACTORS
from losses import LEVELS
from tools import report
from tools.runs import write_json

BANK = {
    "levels": {level: {f"high {level}": ["a"], f"low {level}": ["b"]} for level in LEVELS},
    "truth": {f"high {level}": "+cellularity" for level in LEVELS}
    | {"low patch": "+cellularity", "low slide": "-cellularity"},
}


@pytest.fixture
def out(cohort_folder, tmp_path):
    """An evaluated run: at each level one attribute scores as cellularity, one as its opposite.

    In the encoder that it is compared with, the two are swapped.
    """
    cohort = read_cohort(cohort_folder)
    names = cohort.names.astype(str)
    cellularity = truth.read_factors(cohort_folder, names)[:, FACTORS.index("cellularity")]
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
    report.write_arrays(str(tmp_path / "embeddings.npz"), cohort, z, scores, names, other_scores)
    write_json(str(tmp_path / "metrics.json"), metrics)
    (tmp_path / "bank.json").write_text(json.dumps(BANK))
    (tmp_path / "config.json").write_text(json.dumps({"bank": str(tmp_path / "bank.json")}))
    return tmp_path


def command(monkeypatch, out):
    monkeypatch.setattr(sys, "argv", ["truth.py", str(out)])
    truth.main()


def change(out, **values):
    metrics = json.loads((out / "metrics.json").read_text())
    (out / "metrics.json").write_text(json.dumps(metrics | values))


def rewrite(out, function):
    """Rewrites embeddings.npz, applying a function to its {name: array}."""
    with np.load(out / "embeddings.npz") as file:
        data = function(dict(file))
    np.savez(out / "embeddings.npz", **data)


def test_attributes_are_held_against_their_factors(out, monkeypatch, capsys):
    """A score equal to the factor has an AUC of 1, or of 0 if the bank means the opposite."""
    command(monkeypatch, out)
    metrics = json.loads((out / "metrics.json").read_text())
    found = {row["attribute"]: row["AUC, step 4"] for row in metrics["truth"]}
    expected = {"high patch": 1, "low patch": 0, "high slide": 1, "low slide": 1, "high patient": 1}
    assert found == expected
    for row in metrics["truth"]:
        assert row["AUC, start"] == 1 - row["AUC, step 4"]
    assert metrics["truth"][0]["factor"] == "+cellularity"
    printed = capsys.readouterr().out
    lines = [line.split() for line in printed.splitlines()]
    assert lines[0] == ["mean", "AUC", "step", "4", "start", "ceiling"]
    assert lines[1][:3] == ["patch", "0.500", "0.500"]
    assert lines[2][:3] == ["slide", "1.000", "0.000"]
    assert "+cellularity" in (out / "report.html").read_text()


def test_only_the_rows_that_were_probed_count(out, monkeypatch, cohort_folder):
    """The scores of other rows have no influence."""
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
    rewrite(out, lambda data: {name: data[name] for name in data if "against" not in name})
    change(out, against="")
    command(monkeypatch, out)
    row = json.loads((out / "metrics.json").read_text())["truth"][0]
    assert [key for key in row if key.startswith("AUC")] == ["AUC, step 4", "AUC, ceiling"]


def test_a_bank_that_has_moved_is_the_demos(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"bank": "gone.json"}))
    with open(os.path.join(ROOT, "demo/attributes.json"), encoding="utf-8") as file:
        assert truth.read_truth(tmp_path) == json.load(file)["truth"]


def test_a_bank_without_truth_is_an_error(out, monkeypatch):
    (out / "bank.json").write_text(json.dumps({"levels": BANK["levels"]}))
    with pytest.raises(ValueError, match=r'bank\.json has no "truth"'):
        command(monkeypatch, out)


def test_a_bank_of_other_attributes_is_an_error(out, monkeypatch):
    (out / "config.json").write_text(json.dumps({"bank": "gone.json"}))  # so the demo's is used
    with pytest.raises(ValueError, match="names none of its attributes"):
        command(monkeypatch, out)


def test_a_cohort_without_factors_is_an_error(out, tmp_path, monkeypatch):
    change(out, root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"factors\.csv does not exist: only demo tissue"):
        command(monkeypatch, out)


def test_a_folder_without_results_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"run python evaluate\.py"):
        command(monkeypatch, tmp_path)


# ------------------------------------------------------------------ the numbers, on their own


def test_ridge_is_scikit_learns():
    """scikit-learn sums the squares, we average them; it does not scale the penalty, we do."""
    rng = np.random.default_rng(0)
    z = rng.normal(size=(80, 10)) * rng.uniform(0.1, 3, 10) + 5
    factors = z @ rng.normal(size=(10, 7)) + rng.normal(size=(80, 7)) - 2
    for penalty in (1e-3, 1.0):
        ours = truth.ridge(z[:60], factors[:60], z[60:], penalty)
        theirs = Ridge(alpha=60 * penalty * z[:60].var(axis=0).mean()).fit(z[:60], factors[:60])
        np.testing.assert_allclose(ours, theirs.predict(z[60:]), rtol=1e-6)
    np.testing.assert_allclose(
        truth.ridge(z, factors, z, 1e9), [factors.mean(axis=0)] * 80, atol=1e-6
    )


@pytest.mark.parametrize("sign", "+-")
def test_an_auc_is_scikit_learns_on_the_means_of_places(sign):
    rng = np.random.default_rng(0)
    groups = rng.permutation(np.arange(30).repeat(4))
    factor = rng.random(30)[groups] + rng.normal(0, 0.1, 120)
    score = factor + rng.normal(0, 0.5, 120)
    means = np.array([[score[groups == g].mean(), factor[groups == g].mean()] for g in range(30)])
    high = means[:, 1] > np.median(means[:, 1])
    expected = roc_auc_score(high if sign == "+" else ~high, means[:, 0])
    assert truth.truth_auc(score, factor, groups, sign) == pytest.approx(expected)
    assert 0.6 < max(expected, 1 - expected) < 0.98


def test_places_that_are_all_alike_have_no_auc():
    assert truth.truth_auc(np.arange(4.0), np.full(4, 0.5), np.arange(4)) is None


def test_the_ceiling_is_what_z_holds_whether_or_not_a_word_finds_it(out, cohort_folder):
    """If z is the factors, a regression reads all of them; if z is noise, it reads none."""
    names = read_cohort(cohort_folder).names.astype(str)
    factors = truth.read_factors(cohort_folder, names)
    noise = np.random.default_rng(0).normal(size=factors.shape)
    held_out = np.flatnonzero(read_cohort(cohort_folder).split == 1).tolist()
    change(out, rows=held_out)
    ceilings = []
    for z in (factors, noise):
        rewrite(out, lambda data, z=z: data | {"z": z})
        table = truth.truth_table(*report.read_results(out))
        ceilings.append({row["attribute"]: row["AUC, ceiling"] for row in table})
    assert ceilings[0] == dict.fromkeys(ceilings[0], 1.0)
    assert ceilings[1]["high patch"] < 0.8


def test_without_training_patches_there_is_no_ceiling(out, monkeypatch):
    rewrite(out, lambda data: data | {"split": np.ones_like(data["split"])})
    command(monkeypatch, out)
    row = json.loads((out / "metrics.json").read_text())["truth"][0]
    assert [key for key in row if key.startswith("AUC")] == ["AUC, step 4", "AUC, start"]
