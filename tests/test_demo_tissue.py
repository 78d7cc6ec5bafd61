"""Demo tissue: it shows the factors behind it, and is an ordinary cohort."""

import csv
import os
import time

import numpy as np
import torch.multiprocessing as mp

from data import read_cohort
from demo.prepare import made_once
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


def _make(folder):
    """A folder that takes a while to write, and says who wrote it."""
    os.makedirs(folder)
    for name in ("a", "b", "c"):
        time.sleep(0.2)
        with open(os.path.join(folder, name), "w") as file:
            file.write(str(os.getpid()))


def test_of_two_first_demos_at_once_both_take_the_same_files(tmp_path):
    context = mp.get_context("forkserver")
    folder = str(tmp_path / "tissue")
    both = [context.Process(target=made_once, args=(folder, _make)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert os.listdir(tmp_path) == ["tissue"]
    writers = {(tmp_path / "tissue" / name).read_text() for name in ("a", "b", "c")}
    assert len(writers) == 1
