"""Do the words mean what they say? Attribute scores against the factors behind the demo's images.

    python -m demo.truth runs/demo    after python evaluate.py runs/demo

factors.csv says what each image was made with, the demo's bank which factor an attribute means.
"""

import argparse
import csv
import json
from pathlib import Path

import numpy as np

from describe import read_bank
from evaluate import auc, group_mean
from model import write_whole
from tools import report

DEMO_BANK = Path(__file__).with_name("attributes.json")


def read_truth(run):
    """{attribute: "+factor" or "-factor"} of a run's bank, or of the demo's if that is gone."""
    config = Path(run, "config.json")
    bank = Path(json.loads(config.read_text("utf-8"))["bank"]) if config.exists() else DEMO_BANK
    if not bank.exists() or bank.parts[-2:] == ("attributes", "demo.json"):
        bank = DEMO_BANK
    truth = read_bank(bank).get("truth") if bank.suffix == ".json" else None
    if not truth:
        raise ValueError(f'{bank} has no "truth": only a bank as {DEMO_BANK} says what it means')
    return truth


def read_factors(folder, paths):
    """{factor: [n]} of patches, from a cohort's factors.csv. Raises FileNotFoundError for none."""
    path = Path(folder, "factors.csv")
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: only demo tissue has known factors")
    with open(path, newline="", encoding="utf-8") as file:
        table = {row.pop("path"): row for row in csv.DictReader(file)}
    return {name: np.array([float(table[p][name]) for p in paths]) for name in table[paths[0]]}


def truth_table(metrics, data):
    """How well each attribute tells its factor: dicts with an AUC for each encoder.

    The AUC asks whether places with the factor above its median score higher; for "-factor",
    whether those with the factor not above it do. Score and factor are averaged over the patch,
    slide or patient. It is None where all places are alike. metrics, data: of `read_results`.
    """
    rows = np.array(metrics["rows"])
    truth = read_truth(metrics["run"])
    factors = read_factors(metrics["data"], data["path"][rows])
    found = []
    for level in metrics["levels"]:
        groups = rows if level == metrics["levels"][0] else data[level][rows]
        encoders = {f"step {metrics['step']}": data[f"scores_{level}"][rows]}
        if f"against_scores_{level}" in data:
            encoders[metrics["against"]] = data[f"against_scores_{level}"][rows]
        for k, name in enumerate(data[f"attributes_{level}"].tolist()):
            if name not in truth:
                continue
            factor = group_mean(factors[truth[name][1:]][:, None], groups)[0][:, 0]
            high = (factor > np.median(factor)) == (truth[name][0] == "+")
            row = {"attribute": name, "level": level, "factor": truth[name]}
            for encoder, scores in encoders.items():
                area = auc(group_mean(scores[:, [k]], groups)[0][:, 0], high)
                row[f"AUC, {encoder}"] = None if np.isnan(area) else area
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
    text = json.dumps(metrics, indent=1)
    write_whole(str(Path(run, "metrics.json")), lambda file: file.write(text.encode()))
    encoders = [key for key in metrics["truth"][0] if key.startswith("AUC")]
    for level in metrics["levels"]:
        rows = [row for row in metrics["truth"] if row["level"] == level]
        for encoder in encoders:
            mean = np.mean([row[encoder] for row in rows if row[encoder] is not None])
            print(f"{level:>9}: mean {encoder} {mean:.3f}")
    print(f"the page is {report.draw(run)}")


if __name__ == "__main__":
    main()
