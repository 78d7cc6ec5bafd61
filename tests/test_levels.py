"""A level is data: another hierarchy needs a column in the manifest and a level in the bank."""

import csv
import json
import os
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, manifest, newest
from test_train import log_of, weights_of

import data
import describe
import evaluate
import train
from model import load_run
from tools import cohort as tool

FOUR = ("patch", "region", "slide", "patient")


@pytest.fixture(scope="module")
def four(cohort_folder, tmp_path_factory):
    """The flags of a run with regions: a further column in the cohort and level in the bank."""
    folder = tmp_path_factory.mktemp("four")
    os.symlink(os.path.join(cohort_folder, "images"), folder / "images")
    with open(os.path.join(cohort_folder, "manifest.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        number = row["path"].rpartition("-")[2].removesuffix(".png")
        row["region"] = f"{row['slide']}-{'left' if number == '0' else 'right'}"
    with open(folder / "manifest.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    bank = describe.read_bank_file(os.path.join(ROOT, "demo/attributes.json"))
    patch = bank["levels"]["patch"]
    region = {f"region of {name}": [f"region, {s}" for s in said] for name, said in patch.items()}
    bank["levels"] = {"region": region, **bank["levels"]}  # in any order
    (folder / "bank.json").write_text(json.dumps(bank))
    levels = ["--levels", ",".join(FOUR)]
    return [*levels, "--data", str(folder), "--bank", str(folder / "bank.json")]


def test_four_levels_train_resume_evaluate_and_report(flags, four, tmp_path, monkeypatch):
    flags = [*flags, *four, "--draw", "2,1,2,2", "--level-weights", "1,0.5,1,1"]
    config = train.parse_config(flags)
    assert train.train(config)
    line = log_of(config.out)[1]
    terms = {f"{term}_{level}" for term in ("hvc", "ha", "attributes_used") for level in FOUR}
    assert terms <= set(line)
    total = sum(line[f"hvc_{level}"] + line[f"ha_{level}"] for level in FOUR)
    assert line["loss"] == pytest.approx(total - 0.5 * line["hvc_region"], rel=1e-5)
    assert list(log_of(config.out)[-1]["probe"]["knn20"]["levels"]) == [*FOUR]

    whole = weights_of(config.out)
    os.remove(newest(config.out))  # back to step 2
    assert train.train(train.parse_config(flags))
    assert all(torch.equal(value, whole[name]) for name, value in weights_of(config.out).items())

    hlss, checkpoint = load_run(config.out)
    assert tuple(hlss.bank) == tuple(checkpoint["attributes"]) == FOUR
    monkeypatch.setattr(sys, "argv", ["evaluate.py", config.out])
    evaluate.main()
    with open(os.path.join(config.out, "metrics.json")) as file:
        metrics = json.load(file)
    assert [metrics["probes"]["linear"]["levels"][level]["n"] for level in FOUR] == [48, 32, 16, 8]
    assert {row["level"] for row in metrics["class_attributes"]} == set(FOUR)
    with np.load(os.path.join(config.out, "embeddings.npz")) as arrays:
        assert arrays["regions"][arrays["region"][0]] == "high_grade-00-0-left"
        assert arrays["scores_region"].shape == (120, 14)
    with open(os.path.join(config.out, "report.html")) as file:
        assert "<td>region</td>" in file.read()


def test_two_levels_are_enough_and_one_is_not(flags, capsys):
    config = train.parse_config([*flags, "--levels", "patch,patient"])
    assert train.train(config)
    assert {name for name in log_of(config.out)[1] if name[:3] == "hvc"} == {
        "hvc_patch",
        "hvc_patient",
    }
    with pytest.raises(SystemExit):
        train.parse_config(["--levels", "patch"])
    assert "with one, nothing tells patients apart" in capsys.readouterr().err


def test_a_batch_of_four_levels_has_its_hierarchy(four):
    cohort = data.read_cohort(four[3], FOUR)
    assert str(cohort) == "20 patients, 40 slides, 80 regions, 120 patches"
    rows = data.hierarchical_batch(cohort, 1, 0, 4, (1, 2, 2))
    ids = cohort.ids(rows.reshape(-1)).reshape(4, 2, 2, 4)
    for patient in ids:
        assert len(np.unique(patient[..., 3])) == 1
        for slide in patient:
            assert len(np.unique(slide[..., 2])) == 1
            assert len(np.unique(slide[..., 1])) == 2


def test_what_does_not_fit_is_refused_by_name(flags, four, tmp_path):
    header = "path,patient,slide,region"
    twice = manifest(tmp_path / "a", ["x.png,amy,s1,r", "y.png,amy,s2,r"], header)
    with pytest.raises(
        ValueError, match="line 3: region 'r' belongs to 's2' here and to 's1' above"
    ):
        data.read_cohort(twice, FOUR)
    twice = manifest(tmp_path / "b", ["x.png,amy,s,r1", "y.png,bob,s,r2"], header)
    with pytest.raises(ValueError, match="line 3: slide 's' belongs to 'bob' here"):
        data.read_cohort(twice, FOUR)
    with pytest.raises(ValueError, match="slide is the image itself: drop that column"):
        data.read_cohort(four[3], ("slide", "patient"))
    with pytest.raises(ValueError, match="no column region"):
        train.train(train.parse_config([*flags, "--levels", ",".join(FOUR)]))
    with pytest.raises(ValueError, match=r"attributes\.json has .* no level region: add it"):
        bank = os.path.join(ROOT, "demo/attributes.json")
        train.train(train.parse_config([*flags, *four, "--bank", bank]))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--draw 2,2", "--draw 2,2, --level-weights 1 each: give 3 numbers"),
        ("--draw 2,0,2", "give 3 numbers: 2 or more views, then 1 or more"),
        ("--draw 1,2,2", "give 3 numbers: 2 or more views, then 1 or more"),
        ("--draw 2,2,x", "--draw 2,2,x, --level-weights 1 each: give 3 numbers"),
        ("--level-weights 1,1", "--draw 2 each, --level-weights 1,1: give 3 numbers"),
        ("--level-weights 1,1,x", "--level-weights 1,1,x: give 3 numbers"),
        ("--level-weights 1,1,-1", "weights from 0 up"),
        ("--levels patch,patch", "--levels patch,patch: name at least two"),
    ],
)
def test_counts_that_do_not_fit_the_levels_are_refused(words, said, capsys):
    with pytest.raises(SystemExit):
        train.parse_config(words.split())
    assert said in capsys.readouterr().err.partition("error: ")[2]


def test_a_pattern_may_name_further_levels(tmp_path):
    for path in ("amy/s/left/0.png", "amy/s/right/0.png", "bob/s/left/0.png"):
        os.makedirs(os.path.dirname(tmp_path / path))
        (tmp_path / path).write_bytes(b"")
    cohort = tool.index(str(tmp_path), "{patient}/{slide}/{region}/*.png", nested=True, levels=FOUR)
    tool.write_manifest(tmp_path / "manifest.csv", cohort, range(3), with_split=False, place={}.get)
    again = data.read_cohort(str(tmp_path), FOUR)
    assert again.group_names[0] == ["amy/s/left", "amy/s/right", "bob/s/left"]
    assert (tmp_path / "manifest.csv").read_text().startswith("path,patient,slide,region\n")


def test_a_language_model_is_told_what_the_bank_says_of_a_level(tmp_path):
    path = tmp_path / "bank.json"
    with pytest.raises(ValueError, match=r'bank\.json must say what a region shows, as "shows"'):
        describe.generate(str(path), None, "H&E", levels=FOUR)
    shows = {"region": "one region of a slide"}
    bank = {"tissue": "H&E", "shows": shows, "levels": {"region": {}}}
    prompt = describe.prompt_for(bank, "region", 8, 4)
    assert "can be seen in one region of a slide" in prompt
