"""How often a 95% interval over patients contains the truth, by the number of patients.

    python tests/test_intervals.py    prints the table of docs/RESULTS.md (a minute)

The cohorts are simulated, so the truth is known. The results are why evaluate.py gives no interval
for fewer than FEW patients.
"""

import os
import sys

import numpy as np
import pytest

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from evaluate import FEW, bootstrap_counts, estimate, rates

PATIENTS = (5, 10, 20, 40, 80)


def accuracy_of(right, patient, counts):
    """Accuracy [R] from whether each prediction is right, [n] bool, and its patient [n]."""
    probabilities = np.stack([right, ~right], axis=1).astype(float)
    return rates(probabilities, np.zeros(len(right), int), patient, counts)["accuracy"]


def patches(rng, P, share=0.7, number=40):
    """Whether each patch is right, and its patient. Each patient's accuracy varies around share."""
    of_patient = rng.beta(6 * share, 6 * (1 - share), P)
    return (rng.random((P, number)) < of_patient[:, None]).ravel(), np.repeat(np.arange(P), number)


def simulate(kind, P, rng):
    """(interval, truth) for one simulated cohort of P patients."""
    counts = bootstrap_counts(P, 400, seed=int(rng.integers(2**31)))
    if kind == "patients, 0.9 right":
        right = rng.random(P) < 0.9
        return estimate("a", accuracy_of(right, np.arange(P), counts))["a_interval"], 0.9
    right, patient = patches(rng, P)
    values = accuracy_of(right, patient, counts)
    if kind == "patches, 0.7 right":
        return estimate("a", values)["a_interval"], 0.7
    # Another encoder, equally good on each patient but right on other patches.
    other = rng.permuted(right.reshape(P, -1), axis=1).ravel()
    other ^= rng.random(len(right)) < np.where(other, 0.1 * 0.3 / 0.7, 0.1)
    gains = accuracy_of(other, patient, counts) - values
    return estimate("a", gains)["a_interval"], 0.0


KINDS = ("patches, 0.7 right", "patients, 0.9 right", "gain, patches")


def coverage(kind, P, cohorts, seed=0):
    """The share of simulated cohorts whose interval contains the truth."""
    rng = np.random.default_rng(seed)
    held = 0
    for _ in range(cohorts):
        (low, high), truth = simulate(kind, P, rng)
        held += low <= truth <= high
    return held / cohorts


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_intervals_are_too_narrow_for_few_patients_and_fair_from_there_on(kind):
    assert coverage(kind, 5, 400) < 0.9
    assert coverage(kind, FEW, 400) > 0.8
    assert coverage(kind, 80, 400) > 0.91


def main():
    print("| patients | " + " | ".join(KINDS) + " |")
    print("|---" * (1 + len(KINDS)) + "|")
    for P in PATIENTS:
        cells = [f"{100 * coverage(kind, P, 1000):.0f}%" for kind in KINDS]
        print(f"| {P} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
