"""Does language help? HLSS, its rivals and its controls on demo tissue with known ground truth.

    python -m demo.study            all runs, two at a time; resumes where it stopped
    python -m demo.study --table    the tables and verdicts, from demo/study.jsonl alone

These rules were written down before the first run. There are two worlds: the CLIP's captions
describe either all seven factors of the tissue or four. Each of eight seeds has its own CLIP and
cohort, with 96 patients to train on and 128 held out. Accuracies are per slide; AUCs are means over
all levels. Differences are paired by seed, with 95% intervals by Student's t over seeds: "above"
means that the interval lies above 0, "below" that it lies below; anything else is open.

A. Is it the text? HVC against HVC from random rows, in knn200 and linear.
B. Does the paper's alignment help? HLSS against HVC, in knn200 and linear.
C. Who keeps words best? Take AR, its control, distillation, WiSE-FT and the two lower rates, and
   keep those whose mean knn200 is at most a point below HiDisc's: AR against each of the others,
   in zero-shot accuracy and AUC.
D. Does AR gain accuracy? HiDisc + AR against HiDisc and against its control, in knn200 and linear.

No arm, seed or setting is added once numbers have been seen.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import read_cohort
from demo.clip import train_demo_clip
from demo.prepare import TOLD, made_once
from demo.tissue import FACTORS, write_demo
from demo.truth import DEMO_BANK, read_factors, read_truth, ridge, truth_auc
from describe import open_bank, rotate, save_bank
from evaluate import assess, embed, predict, probe_splits, zero_shot
from losses import LEVELS
from model import HLSS, image_tower, load_run
from tools.runs import checkpoint_path
from tools.weights import load_clip

HERE = Path(__file__).parent
LINES, PROMPTS = HERE / "study.jsonl", HERE / "classes.json"
WORLDS = {"seven captions": FACTORS, "four captions": TOLD}
SEEDS = 8
TISSUE = {"patients": 56, "held_out": 32}  # of each of four classes
AR = "--align regression --align-weight 3"  # the weight was chosen on two other seeds
ARMS = {  # flags of train.py
    "start": "",
    "SimCLR": "--objective simclr",
    "HiDisc": "--objective hidisc",
    "HiDisc, rate 3e-4": "--objective hidisc --lr 3e-4",
    "HiDisc, rate 1e-4": "--objective hidisc --lr 1e-4",
    "WiSE-FT": "",  # halfway between HiDisc's weights and the start's
    "HLSS": "--objective hlss",
    "HVC": "--objective hlss --align off",
    "HVC, random rows": "--objective hlss --align off",
    "HVC + AR": f"--objective hlss {AR}",
    "HiDisc + AR": f"--objective hidisc {AR}",
    "HiDisc + AR, rotated": f"--objective hidisc {AR}",  # the control
    "HiDisc + AR, all of z": f"--objective hidisc {AR}",  # feature distillation
}
LOWER_RATES = ["HiDisc, rate 3e-4", "HiDisc, rate 1e-4"]
OF_AR = ["HiDisc + AR", "HiDisc + AR, rotated", "HiDisc + AR, all of z"]
KEEPERS = [*LOWER_RATES, "WiSE-FT", *OF_AR]  # the arms of question C
METRICS = ("knn200", "linear", "attributes", "zero-shot", "auc", "ceiling", "rank_z", "rank_p")
T95 = (0, 0, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365)  # Student's t, by seed count


def bank_of(arm, attributes, bank, seed):
    """An arm's attribute names and vectors: those of the text, or vectors made without text."""
    if arm.endswith("rotated"):
        return attributes, rotate(bank, seed)
    if arm.endswith("random rows"):
        torch.manual_seed(seed)
        return attributes, {at: F.normalize(torch.randn(t.shape), dim=1) for at, t in bank.items()}
    if arm.endswith("all of z"):  # an orthonormal basis of all D dimensions, at every level
        D = bank[LEVELS[0]].shape[1]
        basis = rotate({level: torch.eye(D) for level in bank}, seed)
        return {level: [f"direction {d}" for d in range(D)] for level in bank}, basis
    return attributes, bank


def halfway(model, start):
    """Moves a model's weights and running statistics halfway to another's (WiSE-FT, 2109.01903)."""
    theirs = start.state_dict()
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            value.lerp_(theirs[name], 0.5)
    return model


def effective_rank(x):
    """exp(-sum_d q_d log q_d) of x [n, D]; q: eigenvalues of the covariance, as shares."""
    eigenvalues = torch.linalg.eigvalsh(x.double().T.cov()).clamp(min=0)
    return torch.special.entr(eigenvalues / eigenvalues.sum()).sum().exp().item()


def prepare(folder, world, seed):
    """The paths of a seed's tissue and of a world's CLIP, made on first use."""
    torch.set_num_threads(1)
    told = WORLDS[world]
    tissue = os.path.join(folder, f"tissue-{seed}")
    clip = os.path.join(folder, f"clip-{len(told)}-{seed}.pt")
    made_once(tissue, lambda path: write_demo(path, seed=seed, **TISSUE))
    made_once(clip, lambda path: train_demo_clip(path, steps=450, seed=seed, factors=told))
    return tissue, clip


def run(folder, world, seed, arm, steps=500):
    """Trains one arm and measures it. Returns its line and, for HiDisc, WiSE-FT's."""
    began = time.perf_counter()
    tissue, clip = prepare(folder, world, seed)
    cohort = read_cohort(tissue)
    state = load_clip(clip)
    attributes, text = open_bank(str(DEMO_BANK), state)
    names, bank = bank_of(arm, attributes, text, seed)
    start = HLSS(image_tower(state), bank, "simclr").eval()
    models = {arm: start}
    out = os.path.join(folder, f"{len(WORLDS[world])}-{seed}-{arm}".replace(" ", ""))
    if arm != "start":
        os.makedirs(out, exist_ok=True)
        save_bank(f"{out}/bank.pt", {"levels": names}, bank)
        paths = ["--data", tissue, "--clip", clip, "--bank", f"{out}/bank.pt", "--out", out]
        flags = f"{ARMS[arm]} --seed {seed} --steps {steps} --probe-every 0"
        command = [sys.executable, "train.py", *paths, *flags.split()]
        with open(f"{out}/output.txt", "w") as file:
            subprocess.run(command, cwd=HERE.parent, stdout=file, stderr=file, check=True)
        models[arm], _ = load_run(out)
    if arm == "HiDisc":
        models["WiSE-FT"] = halfway(load_run(out)[0], load_run(checkpoint_path(out, 0))[0])
    lines = []
    for name, model in models.items():
        z = embed(model, cohort, 64, model.tower.image_size)
        line = {"world": world, "seed": seed, "arm": name}
        line |= measure(z, cohort, text, attributes, clip)
        if "hlss" in ARMS[name]:  # each level has a projection that starts as the bank
            z = embed(start, cohort, 64, start.tower.image_size)
            for level, t in bank.items():
                rank = effective_rank(F.normalize(z @ t.T, dim=1))
                line[level]["rank_p"] = round(rank, 2)
        lines.append(line | {"seconds": round(time.perf_counter() - began)})
    shutil.rmtree(out, ignore_errors=True)
    return lines[::-1]  # HiDisc last: if a kill truncates its line, both are redone


def measure(z, cohort, bank, attributes, clip):
    """{level: {metric: value}} of z on the held-out patients. bank: from the text, in every arm."""
    train, held_out = probe_splits(cohort)[0]
    scores = z @ torch.cat(list(bank.values())).T
    predictions = predict(["knn200", "linear"], z, cohort, [(train, held_out)])
    predictions |= predict(["attributes"], scores, cohort, [(train, held_out)])
    predictions["zero-shot"] = zero_shot(PROMPTS, z[held_out], cohort.classes, clip)
    found = assess(predictions, cohort, [(train, held_out)], resamples=0)
    truth = read_truth()
    factors = read_factors(cohort.root, cohort.names.astype(str))
    ceiling = ridge(z.numpy()[train], factors[train], z.numpy()[held_out])
    line = {}
    for level, groups in zip(LEVELS, cohort.ids(held_out).T):
        values = {kind: probe["levels"][level]["accuracy"] for kind, probe in found.items()}
        areas = []  # of the words, and of the best linear reading of the same factor
        for score, name in zip((z[held_out] @ bank[level].T).numpy().T, attributes[level]):
            sign, factor = truth[name][0], FACTORS.index(truth[name][1:])
            truths = factors[held_out, factor], groups
            areas.append([truth_auc(score, *truths, sign), truth_auc(ceiling[:, factor], *truths)])
        values |= dict(zip(("auc", "ceiling"), np.mean(areas, axis=0).tolist()))
        line[level] = {name: round(value, 4) for name, value in values.items()}
        line[level]["rank_z"] = round(effective_rank(z[held_out]), 2)
    return line


# ------------------------------------------------------------------------------ what the lines say


def read_lines():
    """The lines of all finished arms; one that a kill left unfinished is dropped."""
    text = LINES.read_text() if LINES.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def finished(lines):
    """The lines of those seeds for which every arm of a world has finished."""
    arms = Counter((line["world"], line["seed"]) for line in lines)
    return [line for line in lines if arms[line["world"], line["seed"]] == len(ARMS)]


def values(lines, world, arm, metric):
    """{seed: value} of an arm, at slide level; AUCs and ranks are means over the levels."""
    levels = ["slide"] if metric in METRICS[:4] else LEVELS
    mine = [line for line in lines if (line["world"], line["arm"]) == (world, arm)]
    return {x["seed"]: float(np.mean([x[at].get(metric, np.nan) for at in levels])) for x in mine}


def difference(one, other):
    """(mean, low, high) of one - other over the seeds both have; unbounded with fewer than two."""
    paired = [one[seed] - other[seed] for seed in one.keys() & other.keys()]
    if len(paired) < 2:
        return float("nan"), -np.inf, np.inf
    half = T95[len(paired)] * np.std(paired, ddof=1) / len(paired) ** 0.5
    return np.mean(paired), np.mean(paired) - half, np.mean(paired) + half


def comparisons(lines, world):
    """The rows (question, arm, other arm, metric) that the rules at the top ask for."""
    rows = []
    for metric in ("knn200", "linear"):
        rows += [("A", "HVC", "HVC, random rows", metric), ("B", "HLSS", "HVC", metric)]
        rows += [("D", "HiDisc + AR", arm, metric) for arm in ("HiDisc", "HiDisc + AR, rotated")]
    mean = {arm: np.mean([*values(lines, world, arm, "knn200").values()] or [0]) for arm in ARMS}
    accurate = [arm for arm in KEEPERS if mean[arm] >= mean["HiDisc"] - 0.01]
    for arm in accurate if "HiDisc + AR" in accurate else []:
        if arm != "HiDisc + AR":
            rows += [("C", "HiDisc + AR", arm, metric) for metric in ("zero-shot", "auc")]
    return sorted(rows)


def show(lines):
    """Prints each world's table, and each comparison with its verdict."""
    for world in WORLDS:
        print(f"\n{world:24}" + "".join(f"{metric:>11}" for metric in METRICS) + "  seeds")
        for arm in ARMS:
            found = [list(values(lines, world, arm, metric).values()) for metric in METRICS]
            if found[0]:
                cells = [f"{100 * np.mean(column):11.1f}" for column in found[:6]]
                cells += [f"{np.mean(column):11.1f}" for column in found[6:]]
                print(f"  {arm:22}" + "".join(cells) + f"{len(found[0]):7}")
        for question, arm, other, metric in comparisons(lines, world):
            pair = [values(lines, world, name, metric) for name in (arm, other)]
            middle, low, high = difference(*pair)
            verdict = "above" if low > 0 else "below" if high < 0 else "open"
            interval = f"{100 * middle:+6.1f} ({100 * low:+5.1f} to {100 * high:+5.1f})"
            print(f"{question} {verdict:>5} {interval}  {arm} against {other}, {metric}")


def run_all(folder, processes):
    """Runs what has no line yet, seed by seed, so that it can stop early."""
    lines = read_lines()
    LINES.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = {(line["world"], line["seed"], line["arm"]) for line in lines}
    bar = tqdm(total=SEEDS * len(WORLDS) * len(ARMS), initial=len(done), unit="arm")
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool, bar:
        for seed in range(SEEDS):
            jobs = [(world, seed, arm) for world in WORLDS for arm in ARMS if arm != "WiSE-FT"]
            jobs = [job for job in jobs if job not in done]
            for ready in [pool.submit(prepare, folder, *job) for job in {job[:2] for job in jobs}]:
                ready.result()
            for finished in as_completed([pool.submit(run, folder, *job) for job in jobs]):
                with open(LINES, "a") as file:
                    file.writelines(json.dumps(line) + "\n" for line in finished.result())
                bar.update(len(finished.result()))


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    parser.add_argument("--folder", default="runs/study", help="for cohorts and CLIPs")
    parser.add_argument("--processes", type=int, default=2, help="runs at a time, a thread each")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    args = parser.parse_args()
    if not args.table:
        os.environ["OMP_NUM_THREADS"] = "1"
        os.makedirs(args.folder, exist_ok=True)
        run_all(os.path.abspath(args.folder), args.processes)
    show(finished(read_lines()))


if __name__ == "__main__":
    main()
