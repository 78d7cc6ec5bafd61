"""Do the words mean what they say? Attribute scores against the factors behind demo images."""

import csv
from pathlib import Path

import numpy as np

from demo.tissue import FACTORS
from describe import read_bank_file
from evaluate import auc, group_mean

DEMO_BANK = Path(__file__).with_name("attributes.json")


def read_truth():
    """{attribute: "+factor" or "-factor"} of the demo's bank."""
    return read_bank_file(DEMO_BANK)["truth"]


def read_factors(folder, paths):
    """The factors [n, 7] of patches, from a cohort's factors.csv. Raises FileNotFoundError."""
    path = Path(folder, "factors.csv")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: only demo tissue has known factors")
    with open(path, newline="", encoding="utf-8") as file:
        table = {row["path"]: row for row in csv.DictReader(file)}
    return np.array([[float(table[path][name]) for name in FACTORS] for path in paths])


def ridge(train_z, train_factors, z, penalty=1e-3):
    """The factors [n, F] that a ridge regression reads off z [n, D].

    minimise over W and b:  mean_i ||z_i W + b - factors_i||^2 + penalty ||W||^2 sum_d var(z_d) / D
    """
    centre = train_z.mean(axis=0)
    x = train_z - centre
    covariance = x.T @ x / len(x)
    spread = penalty * np.trace(covariance) / len(covariance)
    target = train_factors - train_factors.mean(axis=0)
    weight = np.linalg.solve(covariance + spread * np.eye(len(covariance)), x.T @ target / len(x))
    return (z - centre) @ weight + train_factors.mean(axis=0)


def truth_auc(score, factor, groups, sign="+"):
    """AUC of a score [n] for a factor [n] above its median ("-": not above it), on group means."""
    mean, _ = group_mean(np.stack([score, factor], axis=1), groups)
    area = auc(mean[:, 0], (mean[:, 1] > np.median(mean[:, 1])) == (sign == "+"))
    return None if np.isnan(area) else area  # nan: all groups are alike
