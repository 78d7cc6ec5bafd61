"""The probe: neighbours, pooling and scores against scikit-learn, and what is left out."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from data import read_cohort
from evaluate import accuracy, embed, knn, mean_class_accuracy, pool, probe, table
from model import HLSS, image_tower, load_state

RNG = np.random.default_rng(0)
Z = F.normalize(torch.from_numpy(RNG.normal(size=(300, 8))).float(), dim=1)
Y = RNG.integers(0, 4, 300)


@pytest.mark.parametrize("k", [1, 20, 200])
def test_knn_is_scikit_learns(k):
    ours = knn(Z[:240], torch.from_numpy(Y[:240]), Z[240:], 4, k=k, chunk=17)
    theirs = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
    expected = theirs.fit(Z[:240].double().numpy(), Y[:240]).predict_proba(Z[240:].double().numpy())
    np.testing.assert_allclose(ours.numpy(), expected, atol=2e-5)


def test_k_is_capped_at_the_bank():
    torch.testing.assert_close(knn(Z[:10], torch.from_numpy(Y[:10]), Z[10:], 4, k=200),
                               knn(Z[:10], torch.from_numpy(Y[:10]), Z[10:], 4, k=10))


def test_scores_are_scikit_learns():
    scores, y = RNG.random((500, 5)), RNG.choice(5, 500, p=[0.6, 0.2, 0.1, 0.05, 0.05])
    assert accuracy(scores, y) == pytest.approx(accuracy_score(y, scores.argmax(1)))
    assert mean_class_accuracy(scores, y) == pytest.approx(balanced_accuracy_score(y, scores.argmax(1)))
    some = y < 3  # a class that does not occur is not averaged
    assert mean_class_accuracy(scores[some], y[some]) == pytest.approx(
        np.mean([(scores[y == c].argmax(1) == c).mean() for c in range(3)]))


def test_pooling_averages_probabilities_once():
    """Three weak votes and a strong one: a second softmax, as in the released code, would turn the decision."""
    scores = np.array([[0.45, 0.55], [0.45, 0.55], [1.0, 0.0], [0.2, 0.8], [0.5, 0.5]])
    pooled, labels, left_out = pool(scores, np.array([0, 0, 0, 1, 1]), np.array([7, 7, 7, 9, 9]))
    np.testing.assert_allclose(pooled, [[1.9 / 3, 1.1 / 3], [0.35, 0.65]])
    assert labels.tolist() == [0, 1]
    assert left_out == 0


def test_a_group_of_several_labels_is_left_out():
    pooled, labels, left_out = pool(np.full((4, 2), 0.5), np.array([0, 1, 1, 1]), np.array([3, 3, 4, 4]))
    assert (len(pooled), labels.tolist(), left_out) == (1, [1], 1)


def test_probe_of_perfect_and_of_blind_embeddings(cohort_folder):
    cohort = read_cohort(cohort_folder)
    perfect = F.one_hot(torch.from_numpy(cohort.label).long(), 4).float()
    result = probe(perfect, cohort)
    assert all(result["knn20"][level]["accuracy"] == 1 for level in ("patch", "slide", "patient"))
    assert result["knn200"]["k"] == 72
    assert [result["knn20"][level]["n"] for level in ("patch", "slide", "patient")] == [48, 16, 8]
    assert probe(torch.ones_like(perfect) / 2, cohort)["knn200"]["patch"]["mca"] == 0.25
    text = "\n".join(table({"perfect": result}))
    assert "100.0  100.0" in text
    assert "only 72 training patches" in text


def test_labels_may_be_missing(cohort_folder):
    cohort = read_cohort(cohort_folder)
    cohort.label[:] = -1
    assert probe(torch.ones(len(cohort), 4), cohort) == {}
    assert "nothing to probe" in table({})[0]


def test_embeddings_are_in_the_order_of_the_cohort(cohort_folder, clip_file):
    from data import decode, plain_view

    cohort = read_cohort(cohort_folder)
    bank = {level: F.normalize(torch.randn(3, 64), dim=1) for level in ("patch", "slide", "patient")}
    model = HLSS(image_tower(load_state(clip_file)), bank).train()
    z = embed(model, cohort, 64, 64, batch=13)
    assert model.training
    model.eval()
    for row in (0, 57, 119):
        alone = model.encode(plain_view(torch.from_numpy(decode(cohort.path(row), 64).copy())[None], 64))[0]
        torch.testing.assert_close(z[row], alone, atol=1e-5, rtol=0)
