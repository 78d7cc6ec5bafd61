"""The probes and their scores against scikit-learn, the protocols, the intervals, and the attributes."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    accuracy_score,
    balanced_accuracy_score,
    confusion_matrix,
    recall_score,
    roc_auc_score,
)
from sklearn.neighbors import KNeighborsClassifier
from torch.utils._python_dispatch import TorchDispatchMode

import evaluate
from data import build_cohort, decode, plain_view, read_cohort
from losses import LEVELS
from model import HLSS, image_tower
from tools.weights import load_clip

RNG = np.random.default_rng(0)
Z = F.normalize(torch.from_numpy(RNG.normal(size=(300, 8))).float(), dim=1)
Y = RNG.integers(0, 4, 300)


@pytest.mark.parametrize("k", [1, 20, 200])
def test_knn_is_scikit_learns(k):
    ours = evaluate.knn(Z[:240], torch.from_numpy(Y[:240]), Z[240:], 4, k=k, chunk=17)
    theirs = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    )
    expected = theirs.fit(Z[:240].double().numpy(), Y[:240]).predict_proba(Z[240:].double().numpy())
    np.testing.assert_allclose(ours.numpy(), expected, atol=2e-5)


def test_k_is_capped_at_the_bank():
    y = torch.from_numpy(Y[:10])
    torch.testing.assert_close(
        evaluate.knn(Z[:10], y, Z[10:], 4, k=200), evaluate.knn(Z[:10], y, Z[10:], 4, k=10)
    )


def test_a_class_that_the_bank_lacks_gets_nothing():
    y = torch.from_numpy(Y[:100] % 2 * 2)  # classes 0 and 2 of 4
    for probe in (evaluate.knn, evaluate.logistic):
        scores = probe(Z[:100], y, Z[100:], 4)
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
        evaluate.knn(
            torch.randn(5000, 4), torch.zeros(5000).long(), torch.randn(900, 4), 2, chunk=64
        )
    assert largest.size == 64 * 5000


@pytest.mark.parametrize("scale", [1, 0.1])
def test_the_linear_probe_is_scikit_learns(scale):
    """Also where features share a large mean, as embeddings do, and hardly differ."""
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
    """A cohort of so many patches, every patient in train but the last two, which are for validation."""
    last = sorted(set(patients))[-2:]
    entries = [
        ("", f"{i}.png", p, p, c, "val" if p in last else "train")
        for i, (c, p) in enumerate(zip(labels, patients))
    ]
    return build_cohort("cohort", iter(entries), 0.2)


def test_metrics_are_scikit_learns(cohort_folder):
    cohort = read_cohort(cohort_folder)
    pairs = evaluate.sides(cohort)
    scores = np.random.default_rng(0).dirichlet(np.ones(4), len(pairs[0][1])).round(2)  # with ties
    scores /= scores.sum(axis=1, keepdims=True)
    metrics = evaluate.assess({"linear": scores}, cohort, pairs)["linear"]
    y, names = cohort.label[pairs[0][1]], cohort.slide[pairs[0][1]]
    slides = np.stack([scores[names == s].mean(axis=0) for s in np.unique(names)])
    slide_y = np.array([y[names == s][0] for s in np.unique(names)])
    for at, s, labels in ((metrics["patch"], scores, y), (metrics["slide"], slides, slide_y)):
        found = s.argmax(axis=1)
        assert at["accuracy"] == pytest.approx(accuracy_score(labels, found))
        assert at["mca"] == pytest.approx(balanced_accuracy_score(labels, found))
        assert at["auc"] == pytest.approx(roc_auc_score(labels, s, multi_class="ovr"))
        assert [r["recall"] for r in at["recall"].values()] == pytest.approx(
            recall_score(labels, found, average=None).tolist()
        )
        assert at["confusion"] == confusion_matrix(labels, found, labels=range(4)).tolist()
        assert at["accuracy_interval"][0] < at["accuracy"] < at["accuracy_interval"][1]


def test_auc_counts_ties_as_half_and_needs_both():
    score, positive = RNG.integers(0, 5, 200), RNG.random(200) < 0.3
    assert evaluate.auc(score, positive) == pytest.approx(roc_auc_score(positive, score))
    assert evaluate.auc(np.ones(4), np.array([True, False, True, False])) == 0.5
    assert np.isnan(evaluate.auc(np.arange(3), np.ones(3, bool)))


def test_pooling_averages_probabilities_once():
    """Three weak votes and a strong one: a second softmax, as in the released code, would turn the decision."""
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
    """A slow loop that repeats the patches of every drawn patient gives each resample's accuracy and MCA."""
    scores, y, patient = RNG.random((60, 3)), RNG.integers(0, 3, 60), RNG.integers(0, 6, 60)
    weights = evaluate.patient_weights(6, 50)
    found = evaluate.rates(scores, y, patient, weights)
    for row, w in enumerate(weights):
        rows = np.concatenate(
            [np.repeat(np.flatnonzero(patient == p), int(w[p])) for p in range(6)]
        )
        assert found["accuracy"][row] == pytest.approx(
            accuracy_score(y[rows], scores[rows].argmax(1))
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # classes that are predicted and do not occur
            assert found["mca"][row] == pytest.approx(
                balanced_accuracy_score(y[rows], scores[rows].argmax(1))
            )
    assert weights[0].tolist() == [1] * 6
    np.testing.assert_array_equal(weights, evaluate.patient_weights(6, 50))  # seeded


def test_a_gain_over_itself_is_nothing_and_pairs_are_narrower(cohort_folder):
    cohort = read_cohort(cohort_folder)
    pairs = evaluate.sides(cohort)
    y, patient = cohort.label[pairs[0][1]], cohort.patient[pairs[0][1]]
    hard = np.isin(patient, np.unique(patient)[:3])  # patients that both get wrong
    first = np.append(
        True, patient[1:] != patient[:-1]
    )  # one patch of each patient, which one of them gets wrong
    ours, theirs = (np.eye(4)[np.where(wrong, (y + 1) % 4, y)] for wrong in (hard, hard ^ first))
    same = evaluate.assess({"linear": ours}, cohort, pairs, other={"linear": ours})["linear"][
        "patch"
    ]
    assert (same["accuracy_gain"], same["accuracy_gain_interval"]) == (0, [0, 0])
    both = evaluate.assess({"linear": ours}, cohort, pairs, other={"linear": theirs})["linear"][
        "patch"
    ]
    assert both["accuracy_gain"] == pytest.approx((5 - 3) / 48)
    assert np.ptp(both["accuracy_gain_interval"]) < 0.5 * np.ptp(both["accuracy_interval"])


def test_probe_of_perfect_and_of_blind_embeddings(cohort_folder):
    cohort = read_cohort(cohort_folder)
    perfect = F.one_hot(torch.from_numpy(cohort.label).long(), 4).float()
    result = evaluate.probe(perfect, cohort)
    assert all(result["knn20"][level]["accuracy"] == 1 for level in ("patch", "slide", "patient"))
    assert result["knn200"]["k"] == 72
    assert [result["knn20"][level]["n"] for level in ("patch", "slide", "patient")] == [48, 16, 8]
    assert set(result["knn20"]["patch"]) == {
        "n",
        "left_out",
        "accuracy",
        "mca",
    }  # no bootstrap while training
    assert evaluate.probe(torch.ones_like(perfect) / 2, cohort)["knn200"]["patch"]["mca"] == 0.25
    text = "\n".join(evaluate.table({"perfect": result}))
    assert "100.0  100.0" in text
    assert "only 72 training patches" in text


def test_a_few_patients_have_no_interval():
    """Resampling one patient gives that patient again: an interval of no width would look like certainty."""
    for patients, there in ((4, False), (5, True)):
        names = [f"p{i}" for i in range(patients + 3) for _ in range(4)]
        cohort = cohort_of(list("ABAB") * (patients + 3), names)
        pairs = [(np.arange(12), np.arange(12, len(cohort)))]
        at = evaluate.assess({"linear": RNG.random((4 * patients, 2))}, cohort, pairs)["linear"][
            "patch"
        ]
        assert ("accuracy_interval" in at) is there
        assert at["confusion"]


def test_no_class_is_set_apart_where_every_patient_has_several():
    cohort = cohort_of(list("ABAB"), list("wwxx"))
    scores = {"now": {level: torch.rand(4, 3) for level in LEVELS}}
    names = {level: list("abc") for level in LEVELS}
    assert evaluate.in_words(scores, names, np.arange(4), cohort, {}, {}) == {
        "apart": [],
        "truth": [],
    }
    alike = cohort_of(list("AABB"), list("wwxx"))
    found = evaluate.in_words(scores, names, np.arange(4), alike, {}, {})["apart"]
    assert len(found) == 2 * 3 * 3
    assert not any("difference_interval" in row for row in found)  # two patients are too few


def test_labels_may_be_missing(cohort_folder):
    cohort = read_cohort(cohort_folder)
    cohort.label[:] = -1
    assert evaluate.probe(torch.ones(len(cohort), 4), cohort) == {}
    assert evaluate.sides(cohort, "lopo") == []
    assert "nothing to probe" in evaluate.table({})[0]


def test_the_probe_during_training_leaves_the_test_split_alone(cohort_folder):
    cohort = read_cohort(cohort_folder)
    held = np.flatnonzero(cohort.patient_split == 1)
    cohort.patient_split[held[:4]] = 2
    assert evaluate.probe(torch.ones(len(cohort), 4), cohort)["knn20"]["patient"]["n"] == 4
    assert set(cohort.patient[evaluate.sides(cohort, "test")[0][1]]) == set(held[:4])


def test_a_missing_test_split_is_an_error_that_says_so(cohort_folder):
    with pytest.raises(ValueError, match="no patient in the split test: use val or lopo"):
        evaluate.sides(read_cohort(cohort_folder), "test")


def test_one_patient_at_a_time_is_left_out_of_its_own_neighbours():
    """Each patient's patches are alike and unlike all others: neighbours of the same patient would always be right."""
    patients = [p for p in "abcdef" for _ in range(3)]
    cohort = cohort_of(["ABCABC"["abcdef".index(p)] for p in patients], patients)
    z = F.normalize(torch.eye(6)[cohort.patient] + 0.05 * torch.eye(18)[:, :6] + 0.1, dim=1)
    pairs = evaluate.sides(cohort, "lopo")
    assert [len(queries) for _, queries in pairs] == [3] * 6
    scores = evaluate.predict("knn20", z, cohort, pairs)
    similarity = (z @ z.T).masked_fill(
        torch.from_numpy(cohort.patient[:, None] == cohort.patient), -torch.inf
    )
    weight = (similarity / 0.07).exp()
    votes = torch.stack([weight[:, cohort.label == c].sum(dim=1) for c in range(3)], dim=1)
    np.testing.assert_allclose(scores, votes / votes.sum(dim=1, keepdim=True), atol=1e-5)
    assert evaluate.predict("linear", z, cohort, pairs).shape == (18, 3)


def test_a_patient_on_both_sides_is_refused(monkeypatch):
    cohort = cohort_of(list("ABAB"), list("wxyz"))
    monkeypatch.setattr(
        type(cohort), "split", np.array([0, 1, 0, 1])
    )  # by patch, which no cohort of ours can have
    monkeypatch.setattr(type(cohort), "patient", np.array([0, 0, 1, 1]))
    with pytest.raises(AssertionError, match="both sides"):
        evaluate.sides(cohort)


def test_a_class_is_set_apart_by_what_its_patients_share():
    label = np.repeat([0, 1, 2], 10)
    scores = RNG.normal(0, 0.01, (30, 4))
    scores[label == 1, 2] += 0.3
    found = [
        (c, k, evaluate.estimate("difference", by))
        for c, k, by in evaluate.apart(scores, label, evaluate.patient_weights(30, 500), number=1)
    ]
    assert found[1][1] == 2
    assert found[1][2]["difference"] == pytest.approx(
        scores[10:20, 2].mean() - (scores[:10, 2].mean() + scores[20:, 2].mean()) / 2
    )
    low, high = found[1][2]["difference_interval"]
    assert 0.28 < low < high < 0.32
    assert not list(evaluate.apart(scores, np.zeros(30, int), evaluate.patient_weights(30, 10)))


def test_attributes_are_held_against_their_factors(cohort_folder):
    """A score that is the factor has an AUC of 1, and of 0 where the bank means the opposite."""
    cohort = read_cohort(cohort_folder)
    factor = np.random.default_rng(0).random(len(cohort))
    scores = {
        "now": {level: torch.from_numpy(np.stack([factor, -factor], axis=1)) for level in LEVELS}
    }
    names = {level: [f"high {level}", f"low {level}"] for level in LEVELS}
    truth = {f"high {level}": "+f" for level in LEVELS} | {"low patch": "+f", "low slide": "-f"}
    found = evaluate.in_words(scores, names, np.arange(len(cohort)), cohort, truth, {"f": factor})
    assert {row["attribute"]: row["AUC, now"] for row in found["truth"]} == {
        "high patch": 1,
        "low patch": 0,
        "high slide": 1,
        "low slide": 1,
        "high patient": 1,
    }
    assert len(found["apart"]) == 4 * 3 * 2


def test_embeddings_are_in_the_order_of_the_cohort(cohort_folder, clip_file):
    cohort = read_cohort(cohort_folder)
    bank = {
        level: F.normalize(torch.randn(3, 64), dim=1) for level in ("patch", "slide", "patient")
    }
    model = HLSS(image_tower(load_clip(clip_file)), bank).train()
    z = evaluate.embed(model, cohort, 64, 64, batch=13)
    assert model.training
    model.eval()
    for row in (0, 57, 119):
        alone = model.encode(
            plain_view(torch.from_numpy(decode(cohort.path(row), 64).copy())[None], 64)
        )[0]
        torch.testing.assert_close(z[row], alone, atol=1e-5, rtol=0)
