"""Demo tissue: it shows the factors behind it, and is an ordinary cohort."""

import csv
import os

import numpy as np

from data import read_cohort
from demo.tissue import CLASSES, FACTORS, render


def test_demo_tissue_shows_its_factors():
    """Dark haematoxylin covers more with more or larger nuclei, less where tissue is dead."""

    def dark(**factors):
        rng = np.random.default_rng(0)
        values = [factors.get(name, 0.3) for name in FACTORS]
        return np.mean([(render(values, rng)[..., 0] < 130).mean() for _ in range(30)])

    assert dark(cellularity=0.9) > 1.3 * dark()
    assert dark(nuclear_size=0.9) > 1.3 * dark()
    assert dark(necrosis=0.9) < 0.8 * dark()


def test_the_demo_cohort_is_an_ordinary_cohort(cohort_folder):
    cohort = read_cohort(cohort_folder)
    assert str(cohort) == "20 patients, 40 slides, 120 patches"
    assert cohort.classes == sorted(CLASSES)
    assert str(cohort.restrict("val")) == "8 patients, 16 slides, 48 patches"
    with open(os.path.join(cohort_folder, "factors.csv")) as file:
        truth = list(csv.DictReader(file))
    assert sorted(row["path"] for row in truth) == sorted(name.decode() for name in cohort.names)
    assert all(0 <= float(row[f]) <= 1 for row in truth for f in FACTORS)
