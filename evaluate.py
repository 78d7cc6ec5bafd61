"""Probe a frozen encoder: embed every patch, classify held-out patients by nearest neighbours, score three levels.

    python evaluate.py runs/demo                          the newest checkpoint of a run, on the cohort it saw
    python evaluate.py runs/demo --data FOLDER            on another cohort
    torchrun --nproc_per_node=4 evaluate.py runs/demo     embed in four processes
"""

import argparse
import json
import os

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from data import SPLITS, load_batches, plain_view, read_cohort
from losses import LEVELS
from model import load_run

NEIGHBOURS = (200, 20)


@torch.no_grad()
def embed(model, cohort, read_size, image_size, batch=128, workers=2, skip=False):
    """z of every patch, [n, D] float32 on the CPU, in the cohort's order. Processes share the work, all get the whole.

    The model is in eval mode meanwhile.
    """
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batches = np.array_split(np.arange(len(cohort)), -(-len(cohort) // batch))
    mine = batches[rank::world]
    bar = tqdm(load_batches(cohort, mine, read_size, workers, skip=skip), desc="embed", unit="batch", total=len(mine),
               disable=rank > 0, leave=False)
    parts = [model.encode(plain_view(images.to(device), image_size)).cpu().numpy() for _, images in bar]
    if world > 1:
        everyone = [None] * world
        dist.all_gather_object(everyone, parts)
        parts = [everyone[i % world][i // world] for i in range(len(batches))]
    model.train(was_training)
    return torch.from_numpy(np.concatenate(parts))


# --------------------------------------------------------------------------------------------------- probes and scores


def knn(bank, labels, queries, classes, k=200, temperature=0.07, chunk=1024):
    """Class probabilities by weighted cosine kNN (Wu et al. 2018): each of the k nearest votes with exp(cos / T).

    bank [m, D], queries [n, D]: L2-normalised. labels: [m] in 0 .. classes - 1. k is capped at m. Returns [n,
    classes], rows sum to 1.
    """
    scores = []
    for part in queries.split(chunk):  # bounds the memory at chunk x m
        similarity, nearest = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        weight = ((similarity - similarity[:, :1]) / temperature).exp()  # the nearest weighs 1: nothing overflows
        votes = torch.zeros(len(part), classes, device=bank.device).scatter_add_(1, labels[nearest], weight)
        scores.append(votes / votes.sum(dim=1, keepdim=True))
    return torch.cat(scores)


def pool(scores, labels, groups):
    """Patch probabilities [n, C] -> the mean probability of each slide or patient, averaged once, no second softmax.

    A group has a label only if all its patches share one. Returns (scores [G, C], labels [G], groups left out).
    """
    index = np.unique(groups, return_inverse=True)[1]
    size = np.bincount(index)
    mean = np.stack([np.bincount(index, weights=column) for column in scores.T], axis=1) / size[:, None]
    votes = np.zeros((len(size), scores.shape[1]), np.int64)
    np.add.at(votes, (index, labels), 1)
    constant = votes.max(axis=1) == size
    return mean[constant], votes.argmax(axis=1)[constant], int((~constant).sum())


def accuracy(scores, labels):
    """Share of the rows whose largest score is at their label."""
    return float((scores.argmax(axis=1) == labels).mean())


def mean_class_accuracy(scores, labels):
    """MCA: the accuracy within each class that occurs, averaged over these classes. Chance is 1 / classes."""
    correct = scores.argmax(axis=1) == labels
    return float(np.mean([correct[labels == c].mean() for c in np.unique(labels)]))


def probe(z, cohort):
    """kNN from the labelled train patches to the other labelled ones. z: [n, D] of the whole cohort.

    Returns {"knn200": {"k": used, "patch": {"n", "left_out", "accuracy", "mca"}, "slide": ..., "patient": ...}, ...},
    where a level whose groups have no label of their own has n = 0 and no accuracy. Empty if either side has no label.
    """
    labelled = cohort.label >= 0
    bank, held = np.flatnonzero(labelled & (cohort.split == 0)), np.flatnonzero(labelled & (cohort.split > 0))
    if not len(bank) or not len(held):
        return {}
    assert not set(cohort.patient[bank]) & set(cohort.patient[held]), "a patient is on both sides of the split"
    labels, held_labels = torch.from_numpy(cohort.label[bank]).long(), cohort.label[held]
    result = {}
    for k in NEIGHBOURS:
        scores = knn(z[bank], labels, z[held], len(cohort.classes), k).numpy()
        pooled = {"patch": (scores, held_labels, 0), "slide": pool(scores, held_labels, cohort.slide[held]),
                  "patient": pool(scores, held_labels, cohort.patient[held])}
        result[f"knn{k}"] = {"k": min(k, len(bank))}
        for level, (s, y, left_out) in pooled.items():
            scored = {"accuracy": accuracy(s, y), "mca": mean_class_accuracy(s, y)} if len(y) else {}
            result[f"knn{k}"][level] = {"n": len(y), "left_out": left_out} | scored
    return result


def table(results):
    """{name: what `probe` returned} -> the lines of a table, accuracy and MCA in percent, and what was left out."""
    if not results:
        return ["no held-out patient or no training patient has a label: there is nothing to probe"]
    width = max(len(name) for name in results) + 9
    lines = [" " * width + "".join(f"{level:>16}" for level in LEVELS),
             " " * width + "".join(f"{'acc':>9}{'MCA':>7}" for _ in LEVELS)]
    notes = []
    for name, result in results.items():
        for kind, at in result.items():
            cells = [f"{100 * at[level]['accuracy']:9.1f}{100 * at[level]['mca']:7.1f}" if at[level]["n"] else
                     f"{'-':>9}{'-':>7}" for level in LEVELS]
            lines.append(f"{name} {kind}".ljust(width) + "".join(cells))
            if f"knn{at['k']}" != kind:
                notes.append(f"{kind}: there are only {at['k']} training patches with a label, so k = {at['k']}")
            for level in LEVELS:
                n, left_out = at[level]["n"], at[level]["left_out"]
                if left_out:
                    notes.append(f"{level}: {left_out} of {n + left_out} left out, having patches of several labels")
    return lines + [f"  {note}" for note in dict.fromkeys(notes)]


def save_results(out, checkpoint, cohort, z, result):
    """Write metrics.json and embeddings.npz, each whole or not at all."""
    os.makedirs(out, exist_ok=True)
    metrics, embeddings = os.path.join(out, "metrics.json"), os.path.join(out, "embeddings.npz")
    with open(metrics + ".part", "w") as file:
        json.dump({"step": checkpoint["step"], "data": cohort.root, "classes": cohort.classes, "probes": result}, file,
                  indent=1)
    with open(embeddings + ".part", "wb") as file:
        np.savez(file, z=z.numpy(), path=cohort.names, label=cohort.label, slide=cohort.slide, patient=cohort.patient,
                 split=cohort.split, classes=np.array(cohort.classes, dtype=str), slides=np.array(cohort.slides),
                 patients=np.array(cohort.patients), splits=np.array(SPLITS))
    for path in (metrics, embeddings):
        os.replace(path + ".part", path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run folder (its newest checkpoint is taken) or a checkpoint file")
    parser.add_argument("--data", help="another cohort than the one that was trained on")
    parser.add_argument("--out", help="folder for metrics.json and embeddings.npz (default: the run's)")
    parser.add_argument("--workers", type=int, default=2, help="decoding threads a process")
    args = parser.parse_args()
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo")  # nothing but finished embeddings is exchanged
    model, checkpoint = load_run(args.run)
    config = checkpoint["config"]
    cohort = read_cohort(args.data or config["data"], config["val_fraction"])
    z = embed(model.to(device), cohort, checkpoint["read_size"], checkpoint["image_size"], workers=args.workers,
              skip=config.get("skip_unreadable", False))
    if not dist.is_initialized() or dist.get_rank() == 0:
        result = probe(z, cohort)
        print("\n".join(table({f"step {checkpoint['step']}": result} if result else {})))
        out = args.out or (args.run if os.path.isdir(args.run) else os.path.dirname(os.path.abspath(args.run)))
        save_results(out, checkpoint, cohort, z, result)
        print(f"metrics.json and embeddings.npz are in {out}")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
