"""python tests/bench_evaluate.py: what kNN and the bootstrap cost."""

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


# kNN, beside nothing but its matrix product and its top-k.
train_z = torch.randn(200_000, 1024)
z = torch.randn(5_000, 1024)
train_labels = torch.randint(0, 10, (len(train_z),))


def product_and_top_k():
    for part in z.split(256):
        (part @ train_z.T).topk(200, dim=1)


bare = []
ours = []
for _ in range(2):
    bare.append(seconds(product_and_top_k))
    ours.append(seconds(lambda: knn(train_z, train_labels, z, 10)))
ratio = min(ours) / min(bare)
print(f"kNN {min(ours):.1f} s, its matrix product and top-k {min(bare):.1f} s: {ratio:.2f} x")

# Metrics and their intervals, of one probe.
patches, patients, classes = 60_000, 60, 10
patient = np.arange(patches) // (patches // patients)
slide = np.arange(patches) // 200
cohort = SimpleNamespace(
    levels=("patch", "slide", "patient"),
    patient=patient,
    label=patient % classes,
    classes=[str(c) for c in range(classes)],
    ids=lambda rows: np.stack([rows, slide[rows], patient[rows]], axis=1),
)
probabilities = np.random.default_rng(0).random((patches, classes))
splits = [(np.arange(1), np.arange(patches))]
cost = seconds(lambda: assess({"linear": probabilities}, cohort, splits))
print(
    f"metrics and 1,000 resamples at 3 levels, {patients} patients, {patches} patches: {cost:.2f} s"
)
