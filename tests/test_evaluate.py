"""evaluate.py: probes and metrics against scikit-learn, splits, intervals, words, the command."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT, newest
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    recall_score,
    roc_auc_score,
)
from sklearn.neighbors import KNeighborsClassifier
from test_model import small_clip
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
import tools.cohort
import train
from data import build_cohort, decode, plain_view, read_cohort
from losses import LEVELS
from model import HLSS, backbone_tower, image_tower, load_run
from tools import report
from tools.processes import user_errors
from tools.weights import load_clip

RNG = np.random.default_rng(0)
Z = F.normalize(torch.from_numpy(RNG.normal(size=(300, 8))).float(), dim=1)
Y = RNG.integers(0, 4, 300)


@pytest.fixture(scope="module", autouse=True)
def few():
    """Gives the small cohorts of these tests intervals, too narrow as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "FEW", 5)
        yield


@pytest.mark.parametrize("k", [1, 20, 200])
def test_knn_is_scikit_learns(k):
    (ours, _) = evaluate.knn(Z[:240], torch.from_numpy(Y[:240]), Z[240:], 4, ks=(k, 7))
    theirs = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    )
    expected = theirs.fit(Z[:240].double().numpy(), Y[:240]).predict_proba(Z[240:].double().numpy())
    np.testing.assert_allclose(ours.numpy(), expected, atol=2e-5)
    exact = evaluate.knn(Z[:240].double(), torch.from_numpy(Y[:240]), Z[240:].double(), 4, ks=(k,))
    np.testing.assert_allclose(exact[0].numpy(), expected, atol=1e-5)


def test_k_is_capped_at_the_training_rows():
    y = torch.from_numpy(Y[:10])
    many, all_of_them = evaluate.knn(Z[:10], y, Z[10:], 4, ks=(200, 10))
    torch.testing.assert_close(many, all_of_them)


def test_a_class_without_training_rows_gets_nothing():
    y = torch.from_numpy(Y[:100] % 2 * 2)  # classes 0 and 2 of 4
    inputs = Z[:100], y, Z[100:], 4
    for scores in (*evaluate.knn(*inputs), evaluate.logistic(*inputs)):
        assert (scores[:, [1, 3]] == 0).all()
        torch.testing.assert_close(scores.sum(dim=1), torch.ones(200))


def test_knn_holds_no_more_than_a_chunk_of_similarities():
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            for part in result if isinstance(result, (tuple, list)) else [result]:
                self.size = max(
                    self.size, part.numel() if function is not torch.ops.aten.split.Tensor else 0
                )
            return result

    with Largest() as largest:
        evaluate.knn(torch.randn(5000, 4), torch.zeros(5000).long(), torch.randn(900, 4), 2)
    assert largest.size == 256 * 5000


@pytest.mark.parametrize("scale", [1, 0.1])
def test_the_linear_probe_is_scikit_learns(scale):
    """Also if features share a large mean and hardly differ, as embeddings do."""
    rng = np.random.default_rng(1)
    y = rng.integers(0, 3, 400)
    x = torch.from_numpy(
        scale * (np.eye(3)[y] @ rng.normal(size=(3, 16)) + 2 * rng.normal(size=(400, 16))) + 1
    )
    theirs = LogisticRegression(C=16 * 3 / 100, tol=1e-10, max_iter=100000).fit(
        x[:300].numpy(), y[:300]
    )
    ours = evaluate.logistic(x[:300], torch.from_numpy(y[:300]), x[300:], 3)
    np.testing.assert_allclose(ours, theirs.predict_proba(x[300:].numpy()), atol=1e-3)


def cohort_of(labels, patients):
    """A cohort with one patch per label; its last two patients are held out."""
    last = sorted(set(patients))[-2:]
    entries = [
        ("", f"{i}.png", (p, p), c, "val" if p in last else "train", "")
        for i, (c, p) in enumerate(zip(labels, patients))
    ]
    return build_cohort("cohort", iter(entries))


def test_metrics_are_scikit_learns(cohort_folder):
    cohort = read_cohort(cohort_folder)
    splits = evaluate.probe_splits(cohort)
    _, rows = splits[0]
    scores = np.random.default_rng(0).dirichlet(np.ones(4), len(rows)).round(2)  # with ties
    scores /= scores.sum(axis=1, keepdims=True)
    results = evaluate.assess({"linear": scores}, cohort, splits)["linear"]["levels"]
    y = cohort.label[rows]
    slide = cohort.parents[0][rows]
    slide_scores = np.stack([scores[slide == s].mean(axis=0) for s in np.unique(slide)])
    slide_y = np.array([y[slide == s][0] for s in np.unique(slide)])
    for level, s, labels in (("patch", scores, y), ("slide", slide_scores, slide_y)):
        metrics = results[level]
        found = s.argmax(axis=1)
        assert metrics["accuracy"] == pytest.approx(accuracy_score(labels, found))
        assert metrics["mca"] == pytest.approx(balanced_accuracy_score(labels, found))
        assert metrics["auc"] == pytest.approx(roc_auc_score(labels, s, multi_class="ovr"))
        recalls = [recall["recall"] for recall in metrics["recall"].values()]
        assert recalls == pytest.approx(recall_score(labels, found, average=None).tolist())
        assert metrics["confusion"] == confusion_matrix(labels, found, labels=range(4)).tolist()
        low, high = metrics["accuracy_interval"]
        assert low < metrics["accuracy"] < high


def test_auc_counts_ties_as_half_and_needs_both():
    score, positive = RNG.integers(0, 5, 200), RNG.random(200) < 0.3
    assert evaluate.auc(score, positive) == pytest.approx(roc_auc_score(positive, score))
    assert evaluate.auc(np.ones(4), np.array([True, False, True, False])) == 0.5
    assert np.isnan(evaluate.auc(np.arange(3), np.ones(3, bool)))


def test_pooling_averages_probabilities_once():
    """A second softmax, as in the released code, would let two weak votes beat a strong one."""
    scores = np.array([[0.45, 0.55], [0.45, 0.55], [1.0, 0.0], [0.2, 0.8], [0.5, 0.5]])
    pooled, labels, first, left_out = evaluate.pool(
        scores, np.array([0, 0, 0, 1, 1]), np.array([7, 7, 7, 9, 9])
    )
    np.testing.assert_allclose(pooled, [[1.9 / 3, 1.1 / 3], [0.35, 0.65]])
    assert (labels.tolist(), first.tolist(), left_out) == ([0, 1], [0, 3], 0)


def test_a_group_of_several_labels_is_left_out():
    pooled, labels, _, left_out = evaluate.pool(
        np.full((4, 2), 0.5), np.array([0, 1, 1, 1]), np.array([3, 3, 4, 4])
    )
    assert (len(pooled), labels.tolist(), left_out) == (1, [1], 1)


def test_the_bootstrap_draws_patients_and_not_patches():
    """A slow loop that repeats the patches of each drawn patient gives the same."""
    scores, y, patient = RNG.random((60, 3)), RNG.integers(0, 3, 60), RNG.integers(0, 6, 60)
    counts = evaluate.bootstrap_counts(6, 50)
    values = evaluate.rates(scores, y, patient, counts)
    for resample, count in enumerate(counts):
        drawn = []
        for p in range(6):
            drawn += int(count[p]) * np.flatnonzero(patient == p).tolist()
        found = scores[drawn].argmax(axis=1)
        assert values["accuracy"][resample] == pytest.approx(accuracy_score(y[drawn], found))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # classes that are predicted but do not occur
            assert values["mca"][resample] == pytest.approx(
                balanced_accuracy_score(y[drawn], found)
            )
    assert counts[0].tolist() == [1] * 6
    np.testing.assert_array_equal(counts, evaluate.bootstrap_counts(6, 50))  # seeded


def test_a_gain_over_itself_is_nothing_and_pairs_are_narrower(cohort_folder):
    cohort = read_cohort(cohort_folder)
    splits = evaluate.probe_splits(cohort)
    _, rows = splits[0]
    y = cohort.label[rows]
    patient = cohort.patient[rows]
    hard = np.isin(patient, np.unique(patient)[:3])  # patients that both encoders get wrong
    first = np.append(True, patient[1:] != patient[:-1])  # one patch of each patient
    ours = np.eye(4)[np.where(hard, (y + 1) % 4, y)]
    theirs = np.eye(4)[np.where(hard ^ first, (y + 1) % 4, y)]

    def gain_over(other):
        found = evaluate.assess({"linear": ours}, cohort, splits, other={"linear": other})
        return found["linear"]["levels"]

    same = gain_over(ours)["patch"]
    assert (same["accuracy_gain"], same["accuracy_gain_interval"]) == (0, [0, 0])
    both = gain_over(theirs)["patch"]
    assert both["accuracy_gain"] == pytest.approx((5 - 3) / 48)
    assert np.ptp(both["accuracy_gain_interval"]) < 0.5 * np.ptp(both["accuracy_interval"])


def test_probe_of_perfect_and_of_blind_embeddings(cohort_folder):
    cohort = read_cohort(cohort_folder)
    perfect = F.one_hot(torch.from_numpy(cohort.label).long(), 4).float()
    result = evaluate.probe(perfect, cohort)
    levels = result["knn20"]["levels"]
    assert [levels[level]["accuracy"] for level in LEVELS] == [1, 1, 1]
    assert result["knn200"]["k"] == 72
    assert [levels[level]["n"] for level in LEVELS] == [48, 16, 8]
    no_bootstrap = {"n", "left_out", "accuracy", "mca"}
    assert set(levels["patch"]) == no_bootstrap
    blind = evaluate.probe(torch.ones_like(perfect) / 2, cohort)["knn200"]["levels"]
    assert blind["patch"]["mca"] == 0.25
    text = "\n".join(report.table({"perfect": result}))
    assert "100.0  100.0" in text
    assert "knn200: only 72 labelled training patches, and all of them vote" in text


def test_a_few_patients_have_no_interval():
    """Resampling one patient gives that patient again: a width of 0 would look like certainty."""
    for patients, there in ((evaluate.FEW - 1, False), (evaluate.FEW, True)):
        names = [f"p{i}" for i in range(patients + 3) for _ in range(4)]
        cohort = cohort_of(list("ABAB") * (patients + 3), names)
        splits = [(np.arange(12), np.arange(12, len(cohort)))]
        scores = RNG.random((4 * patients, 2))
        found = evaluate.assess({"linear": scores}, cohort, splits)
        metrics = found["linear"]["levels"]["patch"]
        assert ("accuracy_interval" in metrics) is there
        assert metrics["confusion"]


def test_no_class_is_set_apart_where_every_patient_has_several():
    scores = {level: torch.rand(4, 3) for level in LEVELS}
    names = {level: list("abc") for level in LEVELS}
    mixed = cohort_of(list("ABAB"), list("wwxx"))
    assert evaluate.class_attributes(scores, names, mixed, np.arange(4)) == []
    alike = cohort_of(list("AABB"), list("wwxx"))
    found = evaluate.class_attributes(scores, names, alike, np.arange(4))
    assert len(found) == 3 * 3  # what is higher in one of two classes is lower in the other
    assert all(row["difference"] > 0 for row in found)
    assert not any("difference_interval" in row for row in found)  # two patients are too few


def test_no_class_is_set_apart_without_labels_or_another_class():
    scores = {level: torch.rand(4, 3) for level in LEVELS}
    names = {level: list("abc") for level in LEVELS}
    for labels in (["A", "A", "", ""], list("AAAA")):
        cohort = cohort_of(labels, list("wwxx"))
        assert evaluate.class_attributes(scores, names, cohort, np.arange(4)) == []


def test_labels_may_be_missing(cohort_folder):
    cohort = read_cohort(cohort_folder)
    cohort.label[:] = -1
    assert evaluate.probe(torch.ones(len(cohort), 4), cohort) == {}
    assert evaluate.probe_splits(cohort, "lopo") == []
    assert "nothing to probe" in report.table({})[0]


def test_the_probe_during_training_leaves_the_test_split_alone(cohort_folder):
    cohort = read_cohort(cohort_folder)
    held = np.flatnonzero(cohort.patient_split == 1)
    cohort.patient_split[held[:4]] = 2
    cohort.split[:] = cohort.patient_split[cohort.patient]
    found = evaluate.probe(torch.ones(len(cohort), 4), cohort)
    assert found["knn20"]["levels"]["patient"]["n"] == 4
    assert set(cohort.patient[evaluate.probe_splits(cohort, "test")[0][1]]) == set(held[:4])


def test_a_missing_test_split_is_an_error_that_says_so(cohort_folder):
    with pytest.raises(ValueError, match="no patient in the test split: use val or lopo"):
        evaluate.probe_splits(read_cohort(cohort_folder), "test")


def test_one_patient_at_a_time_is_left_out_of_its_own_neighbours():
    """Patches of one patient look alike: neighbours from the same patient would always be right."""
    patients = [p for p in "abcdef" for _ in range(3)]
    cohort = cohort_of(["ABCABC"["abcdef".index(p)] for p in patients], patients)
    z = F.normalize(torch.eye(6)[cohort.patient] + 0.05 * torch.eye(18)[:, :6] + 0.1, dim=1)
    splits = evaluate.probe_splits(cohort, "lopo")
    assert [len(held_out) for _, held_out in splits] == [3] * 6
    found = evaluate.predict(["knn20", "linear"], z, cohort, splits)
    similarity = (z @ z.T).masked_fill(
        torch.from_numpy(cohort.patient[:, None] == cohort.patient), -torch.inf
    )
    weight = (similarity / 0.07).exp()
    votes = torch.stack([weight[:, cohort.label == c].sum(dim=1) for c in range(3)], dim=1)
    np.testing.assert_allclose(found["knn20"], votes / votes.sum(dim=1, keepdim=True), atol=1e-5)
    assert found["linear"].shape == (18, 3)


def test_a_class_is_set_apart_by_what_its_patients_share():
    cohort = cohort_of("a" * 20 + "b" * 20 + "c" * 20, [f"{i:02}" for i in range(60)])
    label = cohort.label
    scores = RNG.normal(0, 0.01, (60, 4))
    scores[label == 1, 2] += 0.3
    tensors = dict.fromkeys(LEVELS, torch.from_numpy(scores))
    names = dict.fromkeys(LEVELS, tuple("wxyz"))
    found = evaluate.class_attributes(tensors, names, cohort, np.arange(60), number=1)
    assert [row["level"] for row in found] == [level for level in LEVELS for _ in "abc"]
    best = found[1]
    others = (scores[label == 0, 2].mean() + scores[label == 2, 2].mean()) / 2
    assert (best["class"], best["attribute"]) == ("b", "y")
    assert best["difference"] == pytest.approx(scores[label == 1, 2].mean() - others)
    low, high = best["difference_interval"]
    assert 0.28 < low < high < 0.32


def test_embeddings_are_in_the_order_of_the_cohort(cohort_folder, clip_file):
    cohort = read_cohort(cohort_folder)
    bank = {level: F.normalize(torch.randn(3, 64), dim=1) for level in LEVELS}
    model = HLSS(image_tower(load_clip(clip_file)), bank).train()
    z = evaluate.embed(model, cohort, 64, 64, batch=13)
    assert model.training
    model.eval()
    for row in (0, 57, 119):
        patch = torch.from_numpy(decode(cohort.path(row), 64).copy())[None]
        alone = model.encode(plain_view(patch, 64))[0]
        torch.testing.assert_close(z[row], alone, atol=1e-5, rtol=0)


# The command as a whole, on one tiny trained run.


@pytest.fixture(scope="module")
def run(cohort_folder, clip_file, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("run") / "a<b>&$c")
    flags = ["--data", cohort_folder, "--clip", clip_file, "--out", out]
    flags += ["--bank", os.path.join(ROOT, "demo/attributes.json")]
    flags += ["--patients", "4", "--steps", "4", "--no-compile", "--no-amp"]
    train.train(train.parse_config(flags))
    return out


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on such small tensors, several only wait for each other
    evaluate.main()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory):
    """The results of that run, compared with its start, with a zero-shot probe."""
    out = tmp_path_factory.mktemp("out")
    classes = ("high_grade", "low_grade", "normal", "spindle")
    prompts = {name: [f"tissue of {name}", "a patch"] for name in classes}
    (out / "prompts.json").write_text(json.dumps(prompts))
    with pytest.MonkeyPatch.context() as patch:
        flags = ["--against", "start", "--prompts", out / "prompts.json", "--out", out]
        command(patch, run, *flags)
    return out


def refusal(monkeypatch, capsys, *arguments):
    """The command's answer to a user's mistake: one line, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, *arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def read_metrics(folder):
    text = (folder / "metrics.json").read_text()
    return json.loads(text, parse_constant=pytest.fail)  # no NaN, so any JSON reader can read it


def read_embeddings(folder):
    with np.load(folder / "embeddings.npz") as file:
        return dict(file)


def test_metrics_hold_every_probe_and_what_the_words_say(evaluated, run):
    metrics = read_metrics(evaluated)
    assert set(metrics["probes"]) == {*evaluate.PROBES, "zero-shot"}
    expected = {"accuracy_interval", "mca_interval", "auc", "recall", "confusion", "mca_gain"}
    for probe in metrics["probes"].values():
        assert expected <= set(probe["levels"]["slide"])
    found = {(row["class"], row["level"]) for row in metrics["class_attributes"]}
    assert found <= {(name, level) for name in metrics["classes"] for level in LEVELS}
    assert {level for _, level in found} == set(LEVELS)
    assert all(1 <= used <= 14 for used in metrics["attributes_used"].values())
    assert metrics["notes"] == ["a program drew this tissue"]
    assert (metrics["against"], metrics["step"], metrics["run"]) == ("start", 4, run)


def test_metrics_say_which_rows_were_probed(evaluated, cohort_folder):
    cohort = read_cohort(cohort_folder)
    assert read_metrics(evaluated)["rows"] == np.flatnonzero(cohort.split == 1).tolist()


def test_embeddings_are_enough_for_a_probe_of_ones_own(evaluated, run):
    """The file alone reproduces the linear probe, and names what the numbers stand for."""
    data = read_embeddings(evaluated)
    split = data["splits"][data["split"]]
    train_rows = np.flatnonzero(split == "train")
    held_out = np.flatnonzero(split == "val")
    z = torch.from_numpy(data["z"])
    y = torch.from_numpy(data["label"]).long()
    scores = evaluate.logistic(z[train_rows], y[train_rows], z[held_out], len(data["classes"]))
    right = scores.numpy().argmax(axis=1) == data["label"][held_out]
    linear = read_metrics(evaluated)["probes"]["linear"]["levels"]
    assert right.mean() == linear["patch"]["accuracy"]

    assert data["patients"][data["patient"][0]] in data["path"][0]
    vectors = torch.load(newest(run), weights_only=True)["model"]["bank_slide"].numpy()
    np.testing.assert_allclose(data["scores_slide"], data["z"] @ vectors.T, atol=1e-6)
    assert data["attributes_slide"][0] == "thinly cellular slide regions"


def test_all_text_of_the_embeddings_is_text(run, cohort_folder, tmp_path, monkeypatch):
    """Also if a file name is not ASCII."""
    small_cohort(cohort_folder, tmp_path, r"path|.*/\w+-0[12]/0-")
    manifest = (tmp_path / "manifest.csv").read_text()
    old = next(line.split(",")[0] for line in manifest.splitlines() if "normal-01/0-0" in line)
    new = "images/nüklei-β.png"
    (tmp_path / old).rename(tmp_path / new)
    (tmp_path / "manifest.csv").write_text(manifest.replace(old, new), "utf-8")
    command(monkeypatch, run, "--data", tmp_path, "--out", tmp_path)
    data = read_embeddings(tmp_path)
    assert new in data["path"].tolist()
    text = ["path", "classes", "slides", "patients", "splits", "attributes_patch"]
    assert {data[name].dtype.kind for name in text} == {"U"}
    assert new in (tmp_path / "report.html").read_text("utf-8")


def test_two_processes_give_the_same_table_numbers_and_embeddings(run, cohort_folder, tmp_path):
    """The same as one process. Both have work: there are six batches of patches and two of kNN
    queries."""
    header, *lines = Path(cohort_folder, "manifest.csv").read_text().splitlines()
    turned = [header]
    for line in lines:
        path, rest = line.split(",", 1)
        for turn in list(Image.Transpose)[:6]:
            name = f"{path[:-4].replace('/', '-')}-{turn.name}.png"
            Image.open(Path(cohort_folder, path)).transpose(turn).save(tmp_path / name)
            turned.append(f"{name},{rest}")
    (tmp_path / "manifest.csv").write_text("\n".join(turned))

    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    found = []
    for launcher in ([], torchrun):
        out = tmp_path / f"{len(found)}"
        process = subprocess.run(
            [sys.executable, *launcher, "evaluate.py", run, "--data", tmp_path, "--out", out],
            cwd=ROOT,
            check=True,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            timeout=150,
        )
        said = [line for line in process.stdout.splitlines() if "[Gloo]" not in line]  # torch 2.9's
        *table, last = said
        assert last == f"everything is in {out}/report.html"
        found.append([table, read_metrics(out)["probes"], (out / "embeddings.npz").read_bytes()])
    assert found[0] == found[1]
    assert found[0][1]["knn20"]["levels"]["patch"]["n"] == 6 * 48
    assert [line.split()[:3] for line in found[0][0][2:4]] == [
        ["step", "4", "knn200"],
        ["step", "4", "knn20"],
    ]


def test_a_crash_while_writing_leaves_what_was_there(run, tmp_path, monkeypatch):
    def crash(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    (tmp_path / "embeddings.npz").write_bytes(b"before")
    monkeypatch.setattr(evaluate.np, "savez", crash)
    with pytest.raises(SystemExit, match="stopped"):
        command(monkeypatch, run, "--out", tmp_path)
    assert (tmp_path / "embeddings.npz").read_bytes() == b"before"


def test_a_page_that_cannot_be_drawn_is_no_loss(run, tmp_path, monkeypatch, capsys):
    def fail(out):
        raise RuntimeError("no ink")

    monkeypatch.setattr(evaluate.report, "draw", fail)
    command(monkeypatch, run, "--out", tmp_path)  # no error
    assert read_metrics(tmp_path)["probes"]
    assert len(read_embeddings(tmp_path)["z"]) == 120
    printed = capsys.readouterr().out
    assert "RuntimeError: no ink" in printed
    assert f"retry with python -m tools.report {tmp_path}" in printed


def test_another_cohort_and_another_protocol(run, cohort_folder, tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    small_cohort(cohort_folder, other, r"path|.*/\w+-0[0-2]/0-")
    (other / "manifest.csv").rename(other / "clean.csv")
    out = tmp_path / "out"
    command(monkeypatch, run, "--data", other / "clean.csv", "--protocol", "lopo", "--out", out)
    found = read_metrics(out)
    assert (found["data"], found["root"]) == (str(other / "clean.csv"), str(other))
    assert "data:image/jpeg" in (out / "report.html").read_text("utf-8")
    assert not Path(run, "metrics.json").exists()


def test_a_cohort_may_have_other_classes_than_the_runs(run, cohort_folder, tmp_path, monkeypatch):
    """Probing on other data is what pretraining is for."""
    with open(os.path.join(cohort_folder, "manifest.csv")) as file:
        (tmp_path / "manifest.csv").write_text(file.read().replace(",spindle,", ",round,"))
    shutil.copytree(os.path.join(cohort_folder, "images"), tmp_path / "images")
    command(monkeypatch, run, "--data", tmp_path, "--against", "start", "--out", tmp_path)
    metrics = read_metrics(tmp_path)
    assert metrics["classes"] == ["high_grade", "low_grade", "normal", "round"]
    assert metrics["probes"]["linear"]["levels"]["patch"]["recall"]["round"]["recall"] is not None


def test_a_gain_is_a_number_where_patients_are_too_few_for_an_interval(cohort_folder, monkeypatch):
    monkeypatch.setattr(evaluate, "FEW", 20)
    cohort = read_cohort(cohort_folder)
    splits = evaluate.probe_splits(cohort)
    y = cohort.label[splits[0][1]]
    right, wrong = ({"linear": np.eye(4)[(y + shift) % 4]} for shift in (0, 1))
    lines = report.table({"step 4": evaluate.assess(right, cohort, splits, other=wrong)})
    assert [line.split() for line in lines[2:4]] == [
        ["step", "4", "linear", *["100.0"] * 6],
        ["gain", *["100.0"] * 6],
    ]
    assert "95%" not in "".join(lines)


def test_an_interval_that_excludes_zero_shows_it_and_columns_stay():
    assert report.percent([0.003, 0.164]) == "0.3..16 "
    assert report.percent([-0.16, -0.0004]) == "-16..-0.04 "
    assert report.percent([0.0, 0.164]) == "0..16 "
    assert report.percent([-1e-17, 0.5]) == "0..50 "
    ends = {f"{name}_gain_interval": [-0.0043, -0.0004] for name in ("accuracy", "mca")}
    level = {"n": 9, "left_out": 0, "accuracy": 0.5, "mca": 0.5, "accuracy_gain": 0, "mca_gain": 0}
    plain = {"accuracy_gain_interval": [0, 0], "mca_gain_interval": [0, 0]}
    levels = {"patch": level | ends, "slide": level | plain}
    lines = report.table({"step 9": {"linear": {"levels": levels}}})
    assert lines[-2] == "  gain, 95%    -0.4..-0.04 -0.4..-0.04     0..0   0..0"


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_open_clip_loads_an_exported_tower(kind, tmp_path, capsys):
    clip = small_clip(kind, quick_gelu=True).eval()
    bank = {level: F.normalize(torch.randn(3, 64), dim=1) for level in LEVELS}
    tower = image_tower(clip.state_dict())
    tower.normalisation = (0.7, 0.5, 0.6), (0.1, 0.2, 0.3)
    model = HLSS(tower, bank).eval()
    path = str(tmp_path / "tower.pt")
    kept = {"clip": {"activation": "quickgelu"}, "config": {"backbone": ""}, "image_size": 64}
    evaluate.export(path, model, kept)
    assert "'image_size': 64, 'network': 'quickgelu'" in capsys.readouterr().out

    state = torch.load(path, weights_only=True)
    about = json.loads(Path(path + ".json").read_text())
    mean, std = (torch.tensor(about[name]).view(3, 1, 1) for name in ("mean", "std"))
    other = small_clip(kind, quick_gelu=True).eval()
    for parameter in other.visual.parameters():
        torch.nn.init.normal_(parameter)  # so nothing agrees by chance
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert unexpected == []
    assert not any(name.startswith("visual.") for name in missing)
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        theirs = F.normalize(other.encode_image((images - mean) / std), dim=1)
        torch.testing.assert_close(theirs, model.encode(images), atol=1e-5, rtol=0)


def test_torchvision_loads_an_exported_backbone(tmp_path):
    bank = {level: torch.randn(3, 64) for level in LEVELS}
    model = HLSS(backbone_tower("resnet18", bank), bank).eval()
    kept = {"config": {"backbone": "resnet18"}, "image_size": 32}
    evaluate.export(str(tmp_path / "tower.pt"), model, kept)
    state = torch.load(tmp_path / "tower.pt", weights_only=True)
    theirs = torchvision.models.resnet18(num_classes=64).eval()
    theirs.load_state_dict(state)
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(theirs(images), model.tower(images), atol=1e-5, rtol=0)


def test_the_command_exports(run, tmp_path, monkeypatch, capsys):
    command(monkeypatch, run, "--export", tmp_path / "tower.pt")
    assert "tower.pt.json; for images in [0, 1]:" in capsys.readouterr().out
    assert "visual.conv1.weight" in torch.load(tmp_path / "tower.pt", weights_only=True)
    assert not Path(run, "metrics.json").exists()


def test_any_images_are_embedded_without_labels(
    run, evaluated, cohort_folder, tmp_path, monkeypatch
):
    """As the README does: each image a patient of its own. Links are followed."""
    folder = tmp_path / "any"
    folder.mkdir()
    (folder / "linked").symlink_to(os.path.join(cohort_folder, "images"))
    data = read_embeddings(evaluated)
    Image.open(os.path.join(cohort_folder, data["path"][5])).save(folder / "b.bmp")
    (folder / "notes.txt").write_text("no image")
    flags = ["--pattern", "(?P<patient>.+)", "--out", tmp_path / "any.csv"]
    monkeypatch.setattr(sys, "argv", ["cohort.py", "index", *map(str, [folder, *flags])])
    tools.cohort.main()
    command(monkeypatch, run, "--data", tmp_path / "any.csv", "--out", tmp_path / "new/folder")
    found = read_embeddings(tmp_path / "new/folder")
    paths = ["b.bmp", *(path.replace("images", "linked") for path in data["path"])]
    assert found["path"].tolist() == sorted(paths)
    assert found["path"].dtype.kind == found["attributes_slide"].dtype.kind == "U"
    order = np.argsort(paths)
    for name in ("z", "scores_patch", "scores_slide", "scores_patient"):
        expected = np.concatenate([data[name][5:6], data[name]])[order]
        np.testing.assert_allclose(found[name], expected, atol=1e-6)

    # The same in a notebook.
    model, checkpoint = load_run(run)
    cohort = tools.cohort.index(str(folder), "(?P<patient>.+)")
    z = evaluate.embed(model, cohort, checkpoint["read_size"], checkpoint["image_size"])
    np.testing.assert_allclose(z, found["z"], atol=1e-6)


def test_a_users_mistake_needs_no_traceback(tmp_path, monkeypatch, capsys):
    assert "is neither a run folder nor a ch" in refusal(monkeypatch, capsys, tmp_path / "typo")
    (tmp_path / "step-0000001.pt").write_bytes(b"damaged")
    file = tmp_path / "step-0000001.pt"
    assert f"{file} is damaged or not a checkpoint" in refusal(monkeypatch, capsys, file)


def test_of_several_processes_the_first_speaks_at_once_and_others_if_it_does_not(
    monkeypatch, capsys
):
    """torchrun ends the others once one has failed, so a message that all share appears once."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit), user_errors():
            raise OSError("no space")
        assert capsys.readouterr().err == "error: no space\n"
    assert waited == [2]


def test_a_mistake_of_ours_keeps_its_traceback():
    with pytest.raises(KeyError), user_errors():
        raise KeyError


def small_cohort(folder, to, pattern, columns=5):
    """Copies a cohort: the matching lines of its manifest, with their first columns."""
    lines = []
    with open(os.path.join(folder, "manifest.csv")) as file:
        for line in file.read().splitlines():
            if re.match(pattern, line):
                lines.append(",".join(line.split(",")[:columns]))
    (to / "manifest.csv").write_text("\n".join(lines))
    shutil.copytree(os.path.join(folder, "images"), to / "images")


def test_from_the_checkpoint_alone(run, cohort_folder, tmp_path, monkeypatch, capsys):
    """A checkpoint with outdated settings is enough, without the CLIP and without labels."""
    checkpoint = torch.load(newest(run), weights_only=True)
    checkpoint["config"] |= {"clip": "gone.pt", "bank": "gone.json", "data": "gone"}
    checkpoint["config"] |= {"skip_unreadable": False, "a_flag_of_an_older_version": 3}
    torch.save(checkpoint, tmp_path / "moved.pt")
    small_cohort(cohort_folder, tmp_path, r"path|.*/high_grade-00", columns=3)
    command(monkeypatch, tmp_path / "moved.pt", "--data", tmp_path, "--out", tmp_path)
    assert "nothing to probe" in capsys.readouterr().out
    assert len(read_embeddings(tmp_path)["z"]) == 6
    assert (tmp_path / "report.html").exists()
    flags = ["--data", cohort_folder, "--against", "start", "--out", tmp_path / "new"]
    said = refusal(monkeypatch, capsys, tmp_path / "moved.pt", *flags)
    assert "step-0000000.pt is neither a run folder nor a checkpoint" in said


def test_against_itself_and_leaving_out_patients(run, cohort_folder, tmp_path, monkeypatch):
    small_cohort(cohort_folder, tmp_path, r"path|.*/\w+-0[12]/0-")
    flags = ["--data", tmp_path, "--against", run, "--protocol", "lopo", "--out", tmp_path]
    command(monkeypatch, run, *flags)
    metrics = read_metrics(tmp_path)
    patients = metrics["probes"]["attributes"]["levels"]["patient"]
    assert patients["n"] == 8  # all patients, not only those of one split
    gains = set()
    for probe in metrics["probes"].values():
        gains |= {probe["levels"][at]["accuracy_gain"] for at in ("patch", "slide")}
    assert gains == {0}
    assert "pretraining saw 4 of the 8 held-out patients" in " ".join(metrics["notes"])


def test_nothing_is_held_against_the_start_unasked(run, tmp_path, monkeypatch, capsys):
    command(monkeypatch, run, "--out", tmp_path, "--against", "start")
    assert "accuracy_gain" in read_metrics(tmp_path)["probes"]["linear"]["levels"]["patch"]
    assert "are lost" not in capsys.readouterr().out
    command(monkeypatch, run, "--out", tmp_path)
    assert "without --against, the gains over start in" in capsys.readouterr().out
    metrics = read_metrics(tmp_path)
    assert metrics["against"] == ""
    assert "accuracy_gain" not in metrics["probes"]["linear"]["levels"]["patch"]


def test_a_backbone_has_never_seen_language(
    cohort_folder, clip_file, tmp_path, monkeypatch, capsys
):
    flags = ["--data", cohort_folder, "--clip", clip_file, "--out", str(tmp_path / "run")]
    flags += ["--bank", os.path.join(ROOT, "demo/attributes.json"), "--backbone", "resnet18"]
    flags += ["--patients", "2", "--steps", "1", "--image-size", "32", "--probe-every", "0"]
    config = train.parse_config([*flags, "--no-compile", "--no-amp"])
    train.train(config)
    capsys.readouterr()
    command(monkeypatch, config.out)
    assert "attribute names mean nothing" in capsys.readouterr().out
    assert "attribute names mean nothing" in (tmp_path / "run/report.html").read_text()


def test_results_of_other_data_or_another_protocol_are_not_overwritten(
    run, cohort_folder, tmp_path, monkeypatch, capsys
):
    for name in ("a", "b"):
        (tmp_path / name / "tiles").mkdir(parents=True)
        small_cohort(cohort_folder, tmp_path / name / "tiles", r"path|.*/\w+-0[0-2]/0-")
    a, b = ((run, "--data", tmp_path / x / "tiles", "--out", tmp_path / "out") for x in "ab")
    command(monkeypatch, *a)
    said = refusal(monkeypatch, capsys, *b)
    assert f"out has results for {tmp_path}/a/tiles" in said and "--overwrite" in said
    refusal(monkeypatch, capsys, *a, "--protocol", "lopo")
    assert read_metrics(tmp_path / "out")["data"] == f"{tmp_path}/a/tiles"
    command(monkeypatch, *b, "--overwrite")
    assert read_metrics(tmp_path / "out")["data"] == f"{tmp_path}/b/tiles"


def test_a_reader_is_told_of_classes_sizes_and_patients_seen(
    run, cohort_folder, tmp_path, monkeypatch
):
    """Held-out patients seen in pretraining, a class that only they have, and larger tiles."""
    small_cohort(cohort_folder, tmp_path, r"path|.*/\w+-0[0-3]/")
    lines = (tmp_path / "manifest.csv").read_text().splitlines()
    swap = {"train": "val", "val": "train"}
    swapped = [line.rpartition(",")[0] + "," + swap[line.rpartition(",")[2]] for line in lines[1:]]
    swapped = [line for line in swapped if not ("spindle" in line and line.endswith("train"))]
    (tmp_path / "manifest.csv").write_text("\n".join([lines[0], *swapped]))
    for path in tmp_path.glob("images/*/*.png"):
        Image.open(path).resize((96, 96)).save(path)
    command(monkeypatch, run, "--data", tmp_path, "--out", tmp_path)
    notes = " ".join(read_metrics(tmp_path)["notes"])
    assert "pretraining saw 8 of the 8 held-out patients" in notes
    assert "no training patient has the class spindle" in notes
    assert "patches are 96 pixels wide and the run's were 64" in notes


def test_each_encoders_prompts_are_of_its_own_clip(
    run, cohort_folder, clip_file, tmp_path, monkeypatch
):
    """The same CLIP with its D axes rotated gives another z but the same zero-shot."""
    turned = tmp_path / "turned"
    shutil.copytree(run, turned)
    turn, _ = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(0)))
    clip = torch.load(clip_file, weights_only=True)
    clip["state_dict"]["text_projection"] = clip["state_dict"]["text_projection"] @ turn
    torch.save(clip, tmp_path / "clip.pt")
    path = newest(str(turned))
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["config"]["clip"] = str(tmp_path / "clip.pt")
    for name in ("weight", "bias"):
        projection = checkpoint["model"][f"tower.attnpool.c_proj.{name}"]
        checkpoint["model"][f"tower.attnpool.c_proj.{name}"] = turn.T @ projection
    torch.save(checkpoint, path)
    prompts = {name: [name.replace("_", " ")] for name in checkpoint["classes"]}
    (tmp_path / "p.json").write_text(json.dumps(prompts))
    flags = ["--against", turned, "--prompts", tmp_path / "p.json", "--out", tmp_path / "out"]
    command(monkeypatch, run, *flags)
    levels = read_metrics(tmp_path / "out")["probes"]["zero-shot"]["levels"].values()
    assert [level["accuracy_gain"] for level in levels] == [0, 0, 0]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ('{"cat": "a cat"}', "cat: must be a list of sentences"),
        ('{"cat": []}', "cat: must be a list of sentences"),
        ('{"cat": ["a cat", ""]}', "cat: must be a list of sentences, none of them empty"),
        ('{"cat": ["a cat"], "cat": ["a dog"]}', "'cat' appears twice"),
        ("[]", "must hold {class: "),
        ("{", "is not JSON"),
    ],
)
def test_prompts_are_checked_as_a_bank_is(tmp_path, prompts, message):
    """A string would be encoded letter by letter, and an empty list would give nan."""
    (tmp_path / "p.json").write_text(prompts)
    with pytest.raises(ValueError, match=rf"p\.json.*{message}"):
        evaluate.zero_shot(str(tmp_path / "p.json"), torch.ones(1, 64), ["cat"], "no.pt")


def test_prompts_for_other_classes_are_refused(tmp_path):
    (tmp_path / "p.json").write_text('{"cat": ["a cat"]}')
    with pytest.raises(ValueError, match=r"p\.json must hold .* for the classes \['dog'\]"):
        evaluate.zero_shot(str(tmp_path / "p.json"), torch.ones(1, 64), ["dog"], "no.pt")
