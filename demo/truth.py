"""Do the words mean what they say? Attribute scores against the factors behind the demo's images.

    python -m demo.truth runs/demo    after python evaluate.py runs/demo

factors.csv says what each image was made with, the demo's bank which factor an attribute means.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np

from demo.tissue import FACTORS
from describe import read_bank_file
from evaluate import auc, group_mean
from tools import report
from tools.processes import user_errors
from tools.runs import write_json

DEMO_BANK = Path(__file__).with_name("attributes.json")


def read_truth(run):
    """{attribute: "+factor" or "-factor"} of a run's bank, or of the demo's if that is gone."""
    config = Path(run, "config.json")
    bank = Path(json.loads(config.read_text("utf-8"))["bank"]) if config.exists() else DEMO_BANK
    if not bank.exists():
        bank = DEMO_BANK
    truth = read_bank_file(bank).get("truth") if bank.suffix == ".json" else None
    if not truth:
        raise ValueError(f'{bank} has no "truth": only a bank as {DEMO_BANK} says what it means')
    return truth


def read_factors(folder, paths):
    """The factors [n, 7] of patches, from a cohort's factors.csv. FileNotFoundError for none."""
    path = Path(folder, "factors.csv")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: only demo tissue has known factors")
    with open(path, newline="", encoding="utf-8") as file:
        table = {
            row["path"]: [float(row[name]) for name in FACTORS] for row in csv.DictReader(file)
        }
    return np.array([table[path] for path in paths])


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
    """Whether places with the factor above its median score higher, as an AUC; for the sign "-",
    whether those with the factor not above it do. None where all places are alike.

    score, factor, groups: [n]; score and factor are averaged over each group.
    """
    mean, _ = group_mean(np.stack([score, factor], axis=1), groups)
    area = auc(mean[:, 0], (mean[:, 1] > np.median(mean[:, 1])) == (sign == "+"))
    return None if np.isnan(area) else area


def truth_table(metrics, data):
    """How well each attribute tells its factor: dicts with an AUC for each encoder.

    ceiling: the same of a ridge regression on z, fitted to the true factors of the training patches
    (left out without any): what z holds, whether or not a word finds it. metrics, data: of
    `read_results`.
    """
    rows = np.array(metrics["rows"])
    train = np.flatnonzero(data["split"] == 0)
    truth = read_truth(metrics["run"])
    factors = read_factors(metrics["root"], data["path"])
    if len(train):
        held = ridge(data["z"][train], factors[train], data["z"][rows])
    found = []
    for level in metrics["levels"]:
        groups = rows if level == metrics["levels"][0] else data[level][rows]
        encoders = {f"step {metrics['step']}": data[f"scores_{level}"][rows]}
        if f"against_scores_{level}" in data:
            encoders[metrics["against"]] = data[f"against_scores_{level}"][rows]
        for k, name in enumerate(data[f"attributes_{level}"].tolist()):
            if name not in truth:
                continue
            sign, factor = truth[name][0], FACTORS.index(truth[name][1:])
            values = factors[rows, factor]
            row = {"attribute": name, "level": level, "factor": truth[name]}
            for encoder, scores in encoders.items():
                row[f"AUC, {encoder}"] = truth_auc(scores[:, k], values, groups, sign)
            if len(train):
                row["AUC, ceiling"] = truth_auc(held[:, factor], values, groups)
            found.append(row)
    if not found:
        raise ValueError(f"the truth of {metrics['run']}'s bank names none of its attributes")
    return found


def main():
    parser = argparse.ArgumentParser(description="Attribute scores against the demo's factors.")
    parser.add_argument("run", help="a folder that evaluate.py wrote to")
    run = parser.parse_args().run
    metrics, data = report.read_results(run)
    metrics["truth"] = truth_table(metrics, data)
    write_json(str(Path(run, "metrics.json")), metrics)
    encoders = [key for key in metrics["truth"][0] if key.startswith("AUC")]
    print(" mean AUC" + "".join(f"{encoder.removeprefix('AUC, '):>12}" for encoder in encoders))
    for level in metrics["levels"]:
        rows = [row for row in metrics["truth"] if row["level"] == level]
        line = f"{level:>9}"
        for encoder in encoders:
            line += f"{np.mean([row[encoder] for row in rows if row[encoder] is not None]):12.3f}"
        print(line)
    print(f"the page is {report.draw(run)}")


if __name__ == "__main__":
    with user_errors():
        main()
