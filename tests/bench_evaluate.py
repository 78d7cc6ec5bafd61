"""python tests/bench_evaluate.py: what kNN costs beyond its product and top-k, and what the bootstrap costs."""

import os
import sys
import time
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from evaluate import assess, knn


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


bank, queries = torch.randn(200_000, 1024), torch.randn(5_000, 1024)
labels = torch.randint(0, 10, (len(bank),))


def bare():
    for part in queries.split(256):
        (part @ bank.T).topk(200, dim=1)


alone, ours = zip(
    *((seconds(bare), seconds(lambda: knn(bank, labels, queries, 10))) for _ in range(2))
)
print(
    f"kNN {min(ours):.1f} s, its matrix product and top-k alone {min(alone):.1f} s: {min(ours) / min(alone):.2f} x"
)

patches, patients, classes = 60_000, 60, 10
patient, slide = np.arange(patches) // (patches // patients), np.arange(patches) // 200
cohort = SimpleNamespace(
    patient=patient,
    label=patient % classes,
    classes=[str(c) for c in range(classes)],
    ids=lambda rows: np.stack([rows, slide[rows], patient[rows]], axis=1),
)
scores = np.random.default_rng(0).random((patches, classes))
pairs = [(np.arange(1), np.arange(patches))]
print(
    f"metrics and 1,000 resamples at 3 levels, {patients} patients, {patches} patches: "
    f"{seconds(lambda: assess({'linear': scores}, cohort, pairs)):.2f} s"
)
