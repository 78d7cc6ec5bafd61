"""Do the words mean what they say? Attribute scores against the factors behind demo images."""

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
    """{attribute: "+factor" or "-factor"}: of a run's bank, or of the demo's if that is gone."""
    config = Path(run, "config.json")
    bank = Path(json.loads(config.read_text("utf-8"))["bank"]) if config.exists() else DEMO_BANK
    bank = bank if bank.exists() else DEMO_BANK
    truth = read_bank_file(bank).get("truth") if bank.suffix == ".json" else None
    if not truth:
        raise ValueError(f'{bank} has no "truth": name what attributes mean, as {DEMO_BANK} does')
    return truth


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


def truth_table(metrics, data):
    """A dict for each attribute: its AUC for each encoder. metrics, data: from `read_results`."""
    rows = np.array(metrics["rows"])
    train = np.flatnonzero(data["split"] == 0)
    truth = read_truth(metrics["run"])
    factors = read_factors(metrics["root"], data["path"])
    # The ceiling: what z holds of a factor, whether or not a word finds it.
    held = ridge(data["z"][train], factors[train], data["z"][rows]) if len(train) else None
    table = []
    for level in metrics["levels"]:
        groups = rows if level == metrics["levels"][0] else data[level][rows]
        encoders = {f"AUC, step {metrics['step']}": data[f"scores_{level}"]}
        if f"against_scores_{level}" in data:
            encoders[f"AUC, {metrics['against']}"] = data[f"against_scores_{level}"]
        for k, name in enumerate(data[f"attributes_{level}"].tolist()):
            if name not in truth:
                continue
            sign, factor = truth[name][0], FACTORS.index(truth[name][1:])
            values = factors[rows, factor]
            row = {"attribute": name, "level": level, "factor": truth[name]}
            for encoder, scores in encoders.items():
                row[encoder] = truth_auc(scores[rows, k], values, groups, sign)
            if held is not None:
                row["AUC, ceiling"] = truth_auc(held[:, factor], values, groups)
            table.append(row)
    if not table:
        raise ValueError(f"the truth of {metrics['run']}'s bank names none of its attributes")
    return table


def main():
    parser = argparse.ArgumentParser(description="Attribute scores against the demo's factors.")
    parser.add_argument("run", help="a folder that evaluate.py wrote to")
    run = parser.parse_args().run
    metrics, data = report.read_results(run)
    metrics["truth"] = truth_table(metrics, data)
    write_json(str(Path(run, "metrics.json")), metrics)
    encoders = [key for key in metrics["truth"][0] if key.startswith("AUC")]
    print(" mean AUC" + "".join(f"{encoder.removeprefix('AUC, '):>12}" for encoder in encoders))
    for level in dict.fromkeys(row["level"] for row in metrics["truth"]):
        rows = [row for row in metrics["truth"] if row["level"] == level]
        table = np.array([[row[encoder] for encoder in encoders] for row in rows], float)
        print(f"{level:>9}" + "".join(f"{mean:12.3f}" for mean in np.nanmean(table, axis=0)))
    print(f"the page is {report.draw(run)}")


if __name__ == "__main__":
    with user_errors():
        main()
