"""Does language pay? HLSS, HiDisc and attribute regression on demo tissue, whose truth is known.

    python -m demo.study            all runs, two at a time; goes on where it was stopped
    python -m demo.study --table    the tables and verdicts, from demo/study.jsonl alone

What counts was written down before the first run. Every seed has its own cohort, its own CLIP and
64 held-out patients. Differences are paired by seed; 95% intervals by Student's t over seeds. A
control is the same run with the bank turned by one random rotation: its vectors have the same
angles among them and mean nothing, so only a gain above it is language's.

Accuracy pays if an arm with AR is above HiDisc and above its control in the slide accuracy of
knn200 or of the attributes-only probe, at the centre. Words pay if, at the centre or with 16
patients, HiDisc + AR has all three: its attributes-only probe is at most a point below the linear
probe on HiDisc's z; its attribute AUC is above HiDisc's and its control's, and not more than 0.01
below the start's; its zero-shot accuracy is above the start's, HiDisc's and its control's. "Above"
is an interval that lies above, and no is an interval that lies below; otherwise it is not settled.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data import read_cohort
from demo.clip import train_demo_clip
from demo.prepare import made_once
from demo.tissue import FACTORS, write_demo
from demo.truth import DEMO_BANK, read_factors, read_truth, ridge, truth_auc
from describe import open_bank, read_bank_file, rotate, save_bank
from evaluate import assess, embed, predict, probe_splits, zero_shot
from losses import LEVELS
from model import HLSS, image_tower, load_run
from tools.weights import load_clip

HERE = Path(__file__).parent
LINES, PROMPTS = HERE / "study.jsonl", HERE / "classes.json"
CENTRE = {"seeds": 5, "told": FACTORS, "patients": 40, "signature": 0.0, "start": "clip"}
FOUR = ["cellularity", "nuclear_size", "vessels", "necrosis"]
SETTINGS = {  # what differs from the centre; 40 patients a class are 96 to train on, 20 are 16
    "centre": {},
    "4 captions": {"seeds": 3, "told": FOUR},
    "16 patients": {"seeds": 3, "patients": 20},
    "signature": {"seeds": 3, "signature": 0.25},
    "random start": {"seeds": 3, "start": "random"},
    "16 patients, signature": {"seeds": 3, "patients": 20, "signature": 0.25},
}
ARMS = {
    "start": "",
    "HiDisc": "--objective hidisc",
    "HLSS": "--objective hlss",
    "HiDisc + AR": "--objective hidisc --align regression",
    "HiDisc + AR, control": "--objective hidisc --align regression",
    "SimCLR": "--objective simclr",
    "HVC": "--objective hlss --align off",
    "HVC + AR": "--objective hlss --align regression",
    "HVC + AR, control": "--objective hlss --align regression",
}
WEIGHTS = (0.3, 1.0, 3.0)  # of AR: one for all, chosen on the cohorts of two other seeds
TUNING = (100, 101)
T95 = (0, 0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, by n


def tuning_jobs(lines):
    """(setting, seed, arm, weight of AR) of the runs that the weight is chosen from."""
    arms = ("HiDisc + AR", "HiDisc + AR, control")
    return [("tuning", seed, arm, weight) for seed in TUNING for arm in arms for weight in WEIGHTS]


def study_jobs(lines):
    """The same of all other runs, seed by seed, so that one can stop early."""
    weight = chosen_weight(lines)
    jobs = []
    for seed in range(CENTRE["seeds"]):
        for setting, changes in SETTINGS.items():
            arms = list(ARMS) if setting == "centre" else list(ARMS)[:5]
            if seed < (CENTRE | changes)["seeds"]:
                jobs += [(setting, seed, arm, weight) for arm in arms]
    return jobs


def clip_of(folder, seed, told):
    """The path of the CLIP of a seed whose captions tell of these factors; trained if need be."""
    torch.set_num_threads(1)
    path = os.path.join(folder, f"clip-{seed}-{len(told)}.pt")
    return made_once(path, lambda path: train_demo_clip(path, steps=450, seed=seed, factors=told))


def run(folder, job):
    """Train one arm, and measure it. Returns the line that is kept of it."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    setting, seed, arm, weight = job
    world = CENTRE | SETTINGS.get(setting, {})
    options = {"patients": world["patients"], "signature": world["signature"], "seed": seed}
    tissue = os.path.join(folder, "-".join(["tissue", *map(str, options.values())]))
    made_once(tissue, lambda path: write_demo(path, **options))
    clip = clip_of(folder, seed, world["told"])
    state = load_clip(clip)
    attributes, true_bank = open_bank(str(DEMO_BANK), state, "", LEVELS)
    out = os.path.join(folder, "-".join(map(str, job)).replace(" ", ""))
    os.makedirs(out, exist_ok=True)
    bank = os.path.join(out, "bank.pt")
    rotated = seed if arm.endswith("control") else None
    own_bank = true_bank if rotated is None else rotate(true_bank, rotated)
    save_bank(bank, read_bank_file(DEMO_BANK), own_bank, rotated)

    if arm == "start":
        torch.manual_seed(seed)
        tower = image_tower(state, weights=world["start"] == "clip")
        model = HLSS(tower, own_bank, "simclr").eval()
    else:
        paths = ["--data", tissue, "--clip", clip, "--bank", bank, "--out", out]
        flags = f"{ARMS[arm]} --align-weight {weight} --seed {seed} --start {world['start']}"
        flags += " --steps 500 --probe-every 0 --amp"
        command = [sys.executable, "train.py", *paths, *flags.split()]
        with open(os.path.join(out, "output.txt"), "w") as file:
            subprocess.run(command, cwd=HERE.parent, stdout=file, stderr=file, check=True)
        model, _ = load_run(out)
    cohort = read_cohort(tissue)
    z = embed(model, cohort, 64, model.tower.image_size)
    line = {"setting": setting, "seed": seed, "arm": arm, "weight": weight}
    line |= measure(z, cohort, own_bank, true_bank, attributes, clip)
    shutil.rmtree(out)
    return line | {"seconds": round(time.perf_counter() - began)}


def measure(z, cohort, own_bank, true_bank, attributes, clip):
    """{level: {metric: value}} of an encoder on the held-out patients, and "r2" of each factor."""
    splits = probe_splits(cohort)
    train, held_out = splits[0]
    own_scores = z @ torch.cat(list(own_bank.values())).T
    predictions = predict(["knn200", "linear"], z, cohort, splits)
    predictions |= predict(["attributes"], own_scores, cohort, splits)
    predictions["zero-shot"] = zero_shot(PROMPTS, z[held_out], cohort.classes, clip)
    found = assess(predictions, cohort, splits, resamples=0)

    truth = read_truth(HERE)
    factors = read_factors(cohort.root, cohort.names.astype(str))
    read = ridge(z.numpy()[train], factors[train], z.numpy()[held_out])
    error = np.square(read - factors[held_out]).mean(axis=0) / factors[held_out].var(axis=0)
    line = {"r2": dict(zip(FACTORS, (1 - error).round(4).tolist()))}
    for level, groups in zip(LEVELS, cohort.ids(held_out).T):
        probes = {kind: probe["levels"][level]["accuracy"] for kind, probe in found.items()}
        areas = []  # of the words, and at most
        for score, name in zip((z[held_out] @ true_bank[level].T).numpy().T, attributes[level]):
            sign, factor = truth[name][0], FACTORS.index(truth[name][1:])
            truths = factors[held_out, factor], groups
            areas.append([truth_auc(score, *truths, sign), truth_auc(read[:, factor], *truths)])
        probes |= dict(zip(("auc", "ceiling"), np.mean(areas, axis=0).tolist()))
        line[level] = {name: round(value, 4) for name, value in probes.items()}
    return line


# ------------------------------------------------------------------------------ what the lines say


def read_lines():
    return [json.loads(line) for line in LINES.read_text().splitlines()] if LINES.exists() else []


def values(lines, setting, arm, metric, level="slide"):
    """{seed: value} of an arm. "auc" and "ceiling" are means over the levels."""
    levels = LEVELS if metric in ("auc", "ceiling") else [level]
    mine = [line for line in lines if (line["setting"], line["arm"]) == (setting, arm)]
    return {line["seed"]: float(np.mean([line[at][metric] for at in levels])) for line in mine}


def difference(one, other):
    """(mean, low, high) of one - other over the seeds that both have; open if they are under 2."""
    paired = [one[seed] - other[seed] for seed in one.keys() & other.keys()]
    if len(paired) < 2:
        return float("nan"), -np.inf, np.inf
    half = T95[len(paired)] * np.std(paired, ddof=1) / len(paired) ** 0.5
    return np.mean(paired), np.mean(paired) - half, np.mean(paired) + half


def chosen_weight(lines):
    """The weight of AR: the best mean slide accuracy of text and control together (knn200)."""
    score = {}
    for weight in WEIGHTS:
        mine = [x for x in lines if x["setting"] == "tuning" and x["weight"] == weight]
        score[weight] = np.mean([x["slide"]["knn200"] for x in mine])
    return max(score, key=score.get)


def comparisons(lines):
    """All that the verdicts rest on, as dicts; what "holds" is "yes", "no" or "open"."""
    rows = []

    def compare(verdict, setting, arm, metric, other, other_metric=None, above=0.0):
        mine = values(lines, setting, arm, metric)
        mean, low, high = difference(mine, values(lines, setting, other, other_metric or metric))
        holds = "yes" if low > above else "no" if high < above else "open"
        claim = f"{arm}, {metric}, above {other}'s {other_metric or metric}"
        claim += f" {above:+}" if above else ""
        row = {"verdict": verdict, "setting": setting, "claim": claim, "holds": holds}
        rows.append(row | {"difference": [mean, low, high]})

    for arm in ("HiDisc + AR", "HVC + AR"):
        for metric in ("knn200", "attributes"):
            for other in ("HiDisc", f"{arm}, control"):
                compare(f"accuracy, {arm}, {metric}", "centre", arm, metric, other)
    for setting in ("centre", "16 patients"):
        words = (f"words, {setting}", setting, "HiDisc + AR")
        compare(*words, "attributes", "HiDisc", "linear", above=-0.01)
        for other, above in (("HiDisc", 0), ("HiDisc + AR, control", 0), ("start", -0.01)):
            compare(*words, "auc", other, above=above)
            compare(*words, "zero-shot", other)
    return rows


def verdict(rows, name):
    """Whether language pays in accuracy or in words: if one way of it holds in all its parts."""
    ways = {}
    for row in rows:
        if row["verdict"].startswith(name):
            ways.setdefault(row["verdict"], []).append(row["holds"])
    if any(set(parts) == {"yes"} for parts in ways.values()):
        return f"{name}: language pays"
    if all("no" in parts for parts in ways.values()):
        return f"{name}: language does not pay"
    return f"{name}: not settled"


def show(lines):
    """Print the table of each setting, all comparisons, and the verdicts."""
    metrics = ("knn200", "linear", "attributes", "zero-shot", "auc", "ceiling")
    for setting in SETTINGS:
        print(f"\n{setting:24}" + "".join(f"{metric:>11}" for metric in metrics) + "  seeds")
        for arm in ARMS:
            found = [list(values(lines, setting, arm, metric).values()) for metric in metrics]
            if found[0]:
                cells = [f"{100 * np.mean(column):11.1f}" for column in found]
                print(f"  {arm:22}" + "".join(cells) + f"{len(found[0]):7}")
    rows = comparisons(lines)
    for row in rows:
        mean, low, high = (100 * number for number in row["difference"])
        where = f"{row['setting']}: {row['claim']}"
        print(f"{row['holds']:>5}  {mean:+5.1f} ({low:+5.1f} to {high:+5.1f})  {where}")
    print(verdict(rows, "accuracy"), verdict(rows, "words"), sep="\n")


def run_all(folder, make_jobs):
    """Run the jobs that have no line yet, two at a time, each on one thread."""
    lines = read_lines()
    done = {(line["setting"], line["seed"], line["arm"], line["weight"]) for line in lines}
    jobs = [job for job in make_jobs(lines) if job not in done]
    told = {name: (CENTRE | changes)["told"] for name, changes in SETTINGS.items()}
    clips = dict.fromkeys((seed, tuple(told.get(setting, FACTORS))) for setting, seed, *_ in jobs)
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        waiting = [pool.submit(clip_of, folder, *clip) for clip in clips]
        for clip in tqdm(as_completed(waiting), "CLIPs", len(waiting), unit="CLIP"):
            clip.result()
        waiting = [pool.submit(run, folder, job) for job in jobs]
        for line in tqdm(as_completed(waiting), "runs", len(waiting), unit="run"):
            with open(LINES, "a") as file:
                file.write(json.dumps(line.result()) + "\n")


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--folder", default="runs/study", help="for cohorts and CLIPs")
    parser.add_argument("--table", action="store_true", help="no runs: what the lines say")
    args = parser.parse_args()
    if not args.table:
        os.environ["OMP_NUM_THREADS"] = "1"
        os.makedirs(args.folder, exist_ok=True)
        run_all(args.folder, tuning_jobs)
        run_all(args.folder, study_jobs)
    show(read_lines())


if __name__ == "__main__":
    main()
