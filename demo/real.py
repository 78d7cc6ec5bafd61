"""Real tissue, breast tiles with or without carcinoma: what does training add to colours?

`python -m demo.real FOLDER` does all runs, resuming where it stopped; without FOLDER, it prints
the table. FOLDER: the IDC tiles, as in docs/GUIDE.md. Fixed in advance (steps by run time): a hash
holds out about a fifth of the patients; means of three seeds; `tower` is the start; `colours`, a
logistic regression on each channel's mean, deviation and skew; gains over the start;
intervals over patients; `1-NN`, how often a tile's nearest neighbour is from its own patient.
"""

import argparse
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from data import decode, read_cohort
from evaluate import assess, predict, probe_splits
from tools.report import percent, read_log, read_results

LINES, KINDS = Path(__file__).with_name("real.jsonl"), ("knn200", "linear")
SETTINGS = "--clip demo --augmentation strong --image-size 64 --patients 8 --steps 600 --amp"
OBJECTIVES = ("tower", "simclr", "hidisc", "hlss", "hlss --align off")
ARMS = ["colours", *(f"{o} --start {s}" for s in ("random", "clip") for o in OBJECTIVES)]
COLUMNS = ("mca", "mca_interval", "auc", "mca_gain", "mca_gain_interval", "1-NN")


def colours(pixels):
    """Mean, standard deviation and skew of each channel of [3, H, W], as [9]."""
    x = torch.tensor(pixels).flatten(1) / 255
    deviation, mean = torch.std_mean(x, dim=1, keepdim=True, correction=0)
    skew = ((x - mean) / deviation.clamp(min=1e-3)).pow(3).mean(dim=1, keepdim=True)
    return torch.cat([mean, deviation, skew]).flatten()


def same_patient(z, patient):
    """Share of the unit vectors z [n, D] whose nearest neighbour has the same patient [n]."""
    nearest = [(z - z[i]).norm(dim=1).index_fill(0, i, 9e9).argmin() for i in torch.arange(len(z))]
    return float((patient[nearest] == patient).mean())


def run(cohort, arm, seed):
    """Measures the colours, or trains and evaluates an arm in runs/real; adds its line."""
    splits = probe_splits(cohort)
    if arm == "colours":
        z = torch.stack([colours(decode(cohort.path(row))) for row in range(len(cohort))])
        z = (z - z.mean(dim=0)) / z.std(dim=0)
        probes = assess(predict(["linear"], z, cohort, splits), cohort, splits)
    else:
        out = Path("runs/real", f"{arm}-{seed}".replace(" ", ""))
        flags = f"{SETTINGS} --seed {seed} --objective {arm}".replace("tower", "simclr --steps 1")
        train = ["train.py", "--data", cohort.root, "--out", out, *flags.split()]
        encoder = out / "step-0000000.pt" if "tower" in arm else out
        for command in (train, ["evaluate.py", encoder, "--against", "start"]):
            subprocess.run([sys.executable, *command], stdout=subprocess.DEVNULL, check=True)
        metrics, arrays = read_results(out)
        z, probes = torch.from_numpy(arrays["z"]), metrics["probes"]
    rows = splits[0][1]
    line = {"arm": arm, "seed": seed, "1-NN": same_patient(z[rows], cohort.patient[rows])}
    line |= {kind: probes[kind]["levels"]["patch"] for kind in KINDS if kind in probes}
    LINES.open("a").write(json.dumps(line) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", nargs="?", help="the IDC tiles; omit it to print the table alone")
    if folder := parser.parse_args().folder:
        os.environ["OMP_NUM_THREADS"] = "1"
        cohort = read_cohort(folder)
        LINES.write_text("".join(json.dumps(line) + "\n" for line in read_log(LINES)))  # mends it
        done = [(line["arm"], line["seed"]) for line in read_log(LINES)]
        jobs = [(arm, seed) for seed in range(3) for arm in ARMS if (arm, seed) not in done]
        list(ThreadPoolExecutor(2).map(lambda job: run(cohort, *job), jobs))
    lines = read_log(LINES)
    base = next((x["linear"]["mca"] for x in lines if x["arm"] == "colours"), torch.nan)
    for kind in KINDS:
        print(f"\n{kind:34}    MCA       95%       AUC      gain       95%      1-NN over colours")
        for arm in sorted({line["arm"] for line in lines if kind in line}, key=ARMS.index):
            mine = [line | line[kind] for line in lines if line["arm"] == arm]
            table = [[line.get(name, torch.nan) for line in mine] for name in COLUMNS]
            means = [torch.tensor(column).mean(dim=0).tolist() for column in table]
            cells = [percent(mean) for mean in (*means, means[0] - base)]
            print(f"{arm:31}" + "".join(f"{cell:>10}" for cell in cells))


if __name__ == "__main__":
    main()
