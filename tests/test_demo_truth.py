"""demo/truth.py: factors, what z holds of them, and AUCs of scores for them."""

import numpy as np
import pytest
from sklearn.linear_model import Ridge
from sklearn.metrics import roc_auc_score

from data import read_cohort
from demo import truth


def test_a_cohort_without_factors_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"factors\.csv does not exist: only demo tissue"):
        truth.read_factors(tmp_path, [])


def test_factors_are_those_of_the_patches_asked_for(cohort_folder):
    names = read_cohort(cohort_folder).names.astype(str)
    factors = truth.read_factors(cohort_folder, names)
    np.testing.assert_array_equal(truth.read_factors(cohort_folder, names[::-1]), factors[::-1])
    assert factors.shape == (len(names), 7)


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
