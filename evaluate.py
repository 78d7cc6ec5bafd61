"""What a frozen encoder knows about held-out patients, and what it sees, in the words of its bank.

    python evaluate.py runs/demo                        a run's newest checkpoint, on its own cohort
    python evaluate.py runs/demo --against start        what training changed, with intervals
    torchrun --nproc_per_node=4 evaluate.py runs/demo   four processes share the work

Embeddings -> probes -> intervals -> words. Writes metrics.json (every number), embeddings.npz (z,
attribute scores, names, labels and splits of all patches) and report.html, a page for a browser.
"""

import argparse
import os
import sys
import warnings

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from data import SPLITS, load_batches, plain_view, plural, read_cohort, short_side
from describe import check_sentences, encode_bank, read_json, tokenizer_of
from losses import attributes_used
from model import load_run, text_tower
from tools import report, runs
from tools.processes import add_up, processes, user_errors
from tools.weights import export, load_clip

NEIGHBOURS = {"knn200": 200, "knn20": 20}  # the k of each kNN probe
# "linear" is a regression on z, "attributes" the same on nothing but the attribute scores.
PROBES = (*NEIGHBOURS, "linear", "attributes")
RESAMPLES = 1000  # of the bootstrap
FEW = 20  # with fewer patients intervals come out too narrow: see docs/RESULTS.md


# ----------------------------------------------------------------------------------- embeddings


@torch.no_grad()
def embed(model, cohort, read_size, image_size, batch=128, workers=2, stop=()):
    """z of every patch of a cohort, not augmented: [n, D] float32 on the CPU.

    Under torch.distributed the processes share the batches, and each gets all of z. stop: a list;
    returns None once it is non-empty on any process.
    """
    device = next(model.parameters()).device
    was_training = model.training
    rank, world = rank_and_world()
    batches = np.array_split(np.arange(len(cohort)), -(-len(cohort) // batch))[rank::world]
    z = torch.zeros(len(cohort), model.tower.dim)
    model.eval()
    loader = load_batches(cohort, batches, read_size, workers)
    for rows, images in tqdm(loader, "embed", len(batches), leave=False, disable=rank > 0):
        z[rows] = model.encode(plain_view(images.to(device), image_size)).cpu()
        if stop:
            break
    model.train(was_training)
    if add_up(torch.tensor(len(stop))) > 0:
        return None
    return add_up(z)  # other processes' rows are 0 here


def rank_and_world():
    """(rank, world size) of this process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def attribute_scores(z, bank):
    """{level: [n, K_l]}: the cosine similarity of each patch to each attribute."""
    return {level: z @ t.cpu().T for level, t in bank.items()}


# --------------------------------------------------------------------------------------- probes


def knn(train_z, train_labels, z, classes, ks=(200, 20), temperature=0.07):
    """Class probabilities [len(ks), n, classes] by weighted cosine kNN (Wu et al. 2018).

        p(c) ~ sum over the k nearest training rows i with label c of exp(cos(z, z_i) / temperature)

    train_z: [m, D], labelled patches of training patients; z: [n, D], held-out ones; both
    L2-normalised. train_labels: [m], from 0 to classes - 1. A k above m means m. Under
    torch.distributed the processes share the queries, and rank 0 alone gets all probabilities.
    """
    rank, world = rank_and_world()
    probabilities = torch.zeros(len(ks), len(z), classes, dtype=z.dtype)
    chunks = torch.arange(len(z)).split(256)[rank::world]
    for rows in tqdm(chunks, "kNN", leave=False, disable=rank > 0 or len(chunks) < 40):
        similarity, nearest = (z[rows] @ train_z.T).topk(min(max(ks), len(train_z)), dim=1)
        weight = ((similarity - similarity[:, :1]) / temperature).exp()  # at most 1: no overflow
        labels = train_labels[nearest]
        for i, k in enumerate(ks):
            votes = torch.zeros(len(rows), classes, dtype=z.dtype, device=z.device)
            votes.scatter_add_(1, labels[:, :k], weight[:, :k])
            probabilities[i, rows] = (votes / votes.sum(dim=1, keepdim=True)).cpu()
    return add_up(probabilities, only_first=True)


def logistic(train_x, train_labels, x, classes):
    """Class probabilities [n, classes] by logistic regression, solved to convergence.

        minimise over w and b:   1/2 ||w||^2 + C sum_i CE(w x_i + b, y_i)
        C = D classes / 100

    C is UNI's (Chen et al. 2024). train_x: [m, D] and x: [n, D]. train_labels: [m], from 0 to
    classes - 1; a class without a training row gets 0. Warns if L-BFGS has not converged.
    """
    present, target = train_labels.unique(return_inverse=True)
    cost = len(train_x) * train_x.shape[1] * classes / 100  # C m, so that the sum becomes a mean
    centre = train_x.mean(dim=0)
    rows = train_x - centre

    # Embeddings hardly vary along most directions, so the loss is a long narrow valley, in which
    # L-BFGS takes thousands of steps. At w = 0 the curvature is variance / classes + 1 / cost
    # along each eigenvector of the covariance; in v, where w = v axes^T, the valley is round.
    variance, axes = torch.linalg.eigh((rows.T @ rows / len(rows)).double())  # [D], [D, D]
    axes = axes / (variance.clamp(min=0) / classes + 1 / cost).sqrt()
    v = axes.new_zeros(len(present), len(axes) + 1, requires_grad=True)  # the last column is b
    lbfgs = torch.optim.LBFGS([v], max_iter=1000, line_search_fn="strong_wolfe")

    def closure():
        lbfgs.zero_grad()
        w = v[:, :-1] @ axes.T  # [classes, D]
        logits = F.linear(rows, w.to(rows)).double() + v[:, -1]
        loss = F.cross_entropy(logits, target) + w.square().sum() / (2 * cost)
        loss.backward()
        return loss

    # Most steps in single precision, which is twice as fast, and the last ones in double.
    for dtype, grad, change in ((torch.float32, 1e-5, 1e-9), (torch.float64, 2e-7, 1e-13)):
        rows = None  # frees the memory
        rows = train_x.to(dtype, copy=True).sub_(centre)
        lbfgs.param_groups[0].update(tolerance_grad=grad, tolerance_change=change)
        lbfgs.step(closure)
    if lbfgs.state[v]["n_iter"] >= 1000:
        warnings.warn("the linear probe has not converged in 1,000 steps of L-BFGS", stacklevel=2)
    logits = F.linear((x - centre).double(), v[:, :-1] @ axes.T, v[:, -1])
    probabilities = torch.zeros(len(x), classes)
    probabilities[:, present.cpu()] = logits.softmax(dim=1).detach().float().cpu()
    return probabilities


def zero_shot(path, z, classes, clip, activation="", vocab=""):
    """Class probabilities [n, C] without training labels: softmax(s z t^T).

    path: JSON, {class: [sentences]}; t: [C, D], one vector per class, encoded like a bank. s: the
    logit scale of clip, the encoder's own CLIP.
    """
    prompts = read_json(path)
    if not isinstance(prompts, dict) or sorted(prompts) != classes:
        raise ValueError(f"{path} must hold {{class: [sentences]}} for the classes {classes}")
    for name, sentences in prompts.items():
        check_sentences(path, name, sentences)
    state = load_clip(clip, activation)
    content = {"levels": {"class": {name: prompts[name] for name in classes}}}
    t = encode_bank(content, text_tower(state), tokenizer_of(state, vocab))["class"]
    scale = state.get("logit_scale", torch.tensor(100.0).log()).exp()
    return (scale * z @ t.T).softmax(dim=1).numpy()


def probe_splits(cohort, protocol="val"):
    """The pairs (train rows, held-out rows) to probe, labelled patches only; may be empty.

    val, test: one pair, the patients in train and in that split. lopo: a pair per patient.
    """
    labelled = cohort.label >= 0
    split = np.array(SPLITS)[cohort.split]
    if protocol == "test" and "test" not in split:
        raise ValueError(f"{cohort.root} has no patient in the test split: use val or lopo")
    masks = [(split == "train", split == protocol)]
    if protocol == "lopo":
        masks = [(cohort.patient != p, cohort.patient == p) for p in cohort.present]
    pairs = [[np.flatnonzero(labelled & mask) for mask in pair] for pair in masks]
    return [(train, held_out) for train, held_out in pairs if len(train) and len(held_out)]


def predict(kinds, features, cohort, splits, device="cpu"):
    """{kind: class probabilities [n, C] of all held-out rows}, for some of PROBES.

    features: [rows, D]. All processes must call it; only rank 0 gets complete results.
    """
    features = features.to(device)
    neighbours = {kind: k for kind, k in NEIGHBOURS.items() if kind in kinds}
    found = {kind: [] for kind in kinds}
    for train, held_out in tqdm(splits, "probes", disable=len(splits) == 1, leave=False):
        labels = torch.from_numpy(cohort.label[train]).long().to(device)
        inputs = features[train], labels, features[held_out], len(cohort.classes)
        votes = knn(*inputs, ks=list(neighbours.values())) if neighbours else []
        for kind, probabilities in zip(neighbours, votes):
            found[kind].append(probabilities)
        for kind in found.keys() - neighbours.keys():
            if rank_and_world()[0] == 0:
                found[kind].append(logistic(*inputs))
    return {kind: torch.cat(parts).numpy() for kind, parts in found.items() if parts}


# ------------------------------------------------------------------------------------ intervals


def group_mean(values, groups):
    """Means [G, K] of values [n, K] by groups [n], in ascending order; first row [G] of each."""
    options = {"return_index": True, "return_inverse": True, "return_counts": True}
    _, first, index, size = np.unique(groups, **options)
    total = np.stack([np.bincount(index, weights=column) for column in values.T], axis=1)
    return total / size[:, None], first


def pool(probabilities, labels, groups):
    """Each group's mean probabilities [G, C], label [G] and first row [G], and how many groups were
    left out because their patches have several labels. Votes are averaged once, without the second
    softmax of the released code. groups: [n], the ids of a level."""
    mean, first = group_mean(probabilities, groups)
    shares = group_mean(np.eye(labels.max() + 1)[labels], groups)[0]  # [G, C], of the labels
    agree = shares.max(axis=1) == 1
    return mean[agree], labels[first[agree]], first[agree], int((~agree).sum())


def rates(probabilities, labels, patient, counts):
    """Accuracy [R], recall [R, C] and mean class accuracy (MCA) [R] of each resample.

        recall_c = sum_p w_p correct_pc / sum_p w_p total_pc
        MCA      = mean of recall_c over the classes that occur

    probabilities: [n, C]. labels: [n]. patient: [n], each row's column in counts. counts: [R, P],
    w_p, from bootstrap_counts(). A class that does not occur has recall nan.
    """
    P = counts.shape[1]
    C = probabilities.shape[1]
    cell = patient * C + labels  # one number for (patient, class)
    right = probabilities.argmax(axis=1) == labels
    total = counts @ np.bincount(cell, minlength=P * C).reshape(P, C)  # [R, C]
    correct = counts @ np.bincount(cell[right], minlength=P * C).reshape(P, C)
    with np.errstate(invalid="ignore"):  # 0 / 0 where a class does not occur
        recall = correct / total
    accuracy = correct.sum(axis=1) / total.sum(axis=1)
    mca = np.nansum(recall, axis=1) / (total > 0).sum(axis=1)
    return {"accuracy": accuracy, "recall": recall, "mca": mca}


def auc(score, positive):
    """Area under the ROC curve, by rank sum (Mann and Whitney 1947); nan unless both classes occur.

        AUC = (sum of the positives' ranks - p (p + 1) / 2) / (p (n - p))

    score: [n]; ties share their mean rank. positive: [n] bool, p of them true.
    """
    n, p = len(score), int(positive.sum())
    if p in (0, n):
        return np.nan
    _, index, size = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(size) - (size - 1) / 2)[index]
    return float((rank[positive].sum() - p * (p + 1) / 2) / (p * (n - p)))


def bootstrap_counts(P, resamples, seed=0):
    """How often each of P patients counts, [1 + resamples, P]: once in row 0, the cohort; the other
    rows draw P with replacement, since patients are independent and patches are not."""
    drawn = np.random.default_rng(seed).multinomial(P, np.full(P, 1 / P), resamples)
    return np.concatenate([np.ones((1, P)), drawn])


def estimate(name, values):
    """{name: values[0], name_interval: the central 95% of values[1:], if there are any}."""
    value = None if np.isnan(values[0]) else float(values[0])
    resampled = values[1:][~np.isnan(values[1:])]
    if not len(resampled):
        return {name: value}
    return {name: value, f"{name}_interval": np.percentile(resampled, (2.5, 97.5)).tolist()}


def assess_level(predictions, labels, groups, patient, counts, names):
    """The metrics of one probe at one level. predictions: probabilities [n, C] of one encoder, or
    of two to compare. groups: [n], ids. patient, counts: as in rates(). names: of the C classes."""
    probabilities, label, first, left_out = pool(predictions[0], labels, groups)
    metrics = {"n": len(label), "left_out": left_out}
    if not len(label):
        return metrics
    patient = patient[first]
    resampled = counts if len(np.unique(patient)) >= FEW else counts[:1]  # or no interval
    values = rates(probabilities, label, patient, resampled)
    metrics |= estimate("accuracy", values["accuracy"]) | estimate("mca", values["mca"])
    for other in predictions[1:]:
        # The gain is paired: both encoders on the same resamples of the patients.
        other_values = rates(pool(other, labels, groups)[0], label, patient, resampled)
        for name in ("accuracy", "mca"):
            metrics |= estimate(f"{name}_gain", values[name] - other_values[name])
    if len(counts) > 1:  # not for a probe during training
        C = len(names)
        areas = [auc(probabilities[:, c], label == c) for c in np.unique(label)]
        confusion = np.bincount(label * C + probabilities.argmax(axis=1), minlength=C * C)
        metrics["auc"] = float(np.mean(areas)) if len(areas) > 1 else None
        recalls = values["recall"].T
        metrics["recall"] = {c: estimate("recall", r) for c, r in zip(names, recalls)}
        metrics["confusion"] = confusion.reshape(C, C).tolist()
    return metrics


def assess(predictions, cohort, splits, resamples=RESAMPLES, other=None):
    """{probe: {"levels": {level: metrics}, "k": of kNN, "patients": [each one's prediction]}}.

    predictions: {kind: probabilities [n, C] of the held-out rows}, from predict(). other: the same
    for another encoder, to compare with; probes that it lacks are left out. metrics: n, left_out
    (groups with several labels); if n > 0: accuracy, mca; with resamples: intervals, macro
    one-vs-rest auc, recall by class and confusion (rows: true, columns: predicted).
    """
    rows = np.concatenate([held_out for _, held_out in splits])
    patients, patient = np.unique(cohort.patient[rows], return_inverse=True)
    labels = cohort.label[rows]
    counts = bootstrap_counts(len(patients), resamples)
    results = {}
    for kind in [kind for kind in predictions if other is None or kind in other]:
        encoders = [one[kind] for one in (predictions, other) if one]
        levels = {}
        for level, groups in zip(cohort.levels, cohort.ids(rows).T):
            levels[level] = assess_level(encoders, labels, groups, patient, counts, cohort.classes)
        results[kind] = {"levels": levels}
        if kind in NEIGHBOURS:
            results[kind]["k"] = min(NEIGHBOURS[kind], *(len(train) for train, _ in splits))
        if resamples:
            results[kind]["patients"] = []
            mean, label, first, _ = pool(encoders[0], labels, cohort.patient[rows])
            for p, c, group in zip(mean, label, cohort.patient[rows[first]]):
                row = {"patient": cohort.group_names[-1][group], "class": cohort.classes[c]}
                row |= {"predicted": cohort.classes[p.argmax()], "probability": float(p.max())}
                results[kind]["patients"].append(row)
    return results


def probe(z, cohort, device="cpu"):
    """The probe during training: kNN of z [n, D] from train to val, without intervals; {} if either
    side has no labels. All processes must call it; rank 0 alone gets the numbers."""
    splits = probe_splits(cohort)
    if not splits:
        return {}
    return assess(predict(NEIGHBOURS, z, cohort, splits, device), cohort, splits, resamples=0)


# ---------------------------------------------------------------------------------------- words


def class_attributes(scores, names, cohort, rows, number=5):
    """The attributes whose score in a class most exceeds that in the other classes.

    scores: {level: [all rows, K_l]}. names: {level: [K_l]}. rows: those to look at, all labelled.
    Returns dicts with class, level, attribute, difference (the mean of the class's patients less
    the mean of the other classes' means) and its interval; empty unless there are two classes.
    """
    found = []
    labels = cohort.label[rows]
    for level in cohort.levels if labels.min() >= 0 else ():
        # Patients are the independent unit, whatever the level of the words.
        score, label, *_ = pool(scores[level][rows].numpy(), labels, cohort.patient[rows])
        present = np.unique(label)
        if len(present) < 2:
            return []
        counts = bootstrap_counts(len(label), RESAMPLES if len(label) >= FEW else 0)
        members = counts[:, None] * (label == present[:, None])  # [R, C, P]
        with np.errstate(invalid="ignore"):  # 0 / 0 where a resample lacks a class
            means = members @ score / members.sum(axis=2, keepdims=True)  # [R, C, K]
        others = (means.sum(axis=1, keepdims=True) - means) / (len(present) - 1)
        difference = means - others
        for i, c in enumerate(present):
            highest = np.argsort(-difference[0, i])[:number]
            for k in highest[difference[0, i, highest] > 0]:
                row = {"class": cohort.classes[c], "level": level, "attribute": names[level][k]}
                found.append(row | estimate("difference", difference[:, i, k]))
    return found


# ------------------------------------------------------------------------------------ the command


def evaluate(args, device):
    """Evaluates a run, given main()'s flags; all processes share the work, rank 0 writes."""
    # The run, and the cohort: its own, or the one that --data names.
    model, checkpoint = load_run(args.run)
    if args.export:
        return export(args.export, model, checkpoint)
    config, names = checkpoint["config"], checkpoint["attributes"]
    data = os.path.abspath(args.data or config["data"])
    cohort = read_cohort(data, config["levels"].split(","), config["val_fraction"])
    run = args.run if os.path.isdir(args.run) else os.path.dirname(os.path.abspath(args.run))
    out = args.out or run
    refuse_other_results(out, data, args)
    splits = probe_splits(cohort, args.protocol)
    rows = np.concatenate([held_out for _, held_out in splits] or [np.arange(len(cohort))])

    # Embeddings, attribute scores and predictions, also for the encoder that --against names.
    encoders = [(model, checkpoint)]
    if args.against:
        start = runs.checkpoint_path(run, 0)
        encoders.append(load_run(start if args.against == "start" else args.against))
    z, scores, predictions = [], [], []
    for encoder, kept in encoders:
        sizes = kept["read_size"], kept["image_size"]
        z.append(embed(encoder.to(device), cohort, *sizes, workers=args.workers))
        scores.append(attribute_scores(z[-1], encoder.bank))
        predictions.append(predict_all(args, kept, z[-1], scores[-1], cohort, splits, device))
    if rank_and_world()[0] > 0:
        return

    # Intervals and words.
    other = predictions[1] if args.against else None
    probes = assess(predictions[0], cohort, splits, other=other) if splits else {}
    words, used = [], {}
    if any(names.values()):
        words = class_attributes(scores[0], names, cohort, rows)
        used = {level: attributes_used(z[0], t.cpu()) for level, t in model.bank.items()}

    # Results.
    metrics = {
        "command": " ".join(["python", *sys.argv]),
        "run": run,
        "step": checkpoint["step"],
        "data": data,
        "root": cohort.root,
        "cohort": str(cohort),
        "classes": cohort.classes,
        "protocol": args.protocol,
        "rows": rows.tolist(),
        "notes": reader_notes(checkpoint, cohort, rows, probes),
        "against": args.against,
        "probes": probes,
        "levels": cohort.levels,
        "attributes_used": used,
        "class_attributes": words,
    }
    path = os.path.join(out, "embeddings.npz")
    votes = predictions[0].get("knn200")
    report.write_arrays(path, cohort, z[0], scores[0], names, data, rows, votes)
    runs.write_json(os.path.join(out, "metrics.json"), metrics)
    print(*report.table({f"step {checkpoint['step']}": probes}), *metrics["notes"], sep="\n")

    # The page is drawn last, from these files, so that nothing is lost if drawing fails.
    try:
        print(f"everything is in {report.draw(out)}")
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        print(f"no page was drawn ({reason}): retry with python -m tools.report {out}")


def refuse_other_results(out, data, args):
    """Refuses a folder that has results for other data or protocols; warns of lost gains."""
    os.makedirs(out, exist_ok=True)
    path = os.path.join(out, "metrics.json")
    before = read_json(path) if os.path.exists(path) and not args.overwrite else {}
    if before and (before["data"], before["protocol"]) != (data, args.protocol):
        raise ValueError(
            f"{out} has results for {before['data']} ({before['protocol']}), not for {data} "
            f"({args.protocol}): give another --out, or --overwrite"
        )
    if before and before["against"] and not args.against and rank_and_world()[0] == 0:
        print(f"note: without --against, the gains over {before['against']} in {path} are lost")


def predict_all(args, kept, z, scores, cohort, splits, device):
    """predict() of all probes. kept: the encoder's checkpoint. scores: its attribute scores."""
    on_z = [kind for kind in PROBES if kind != "attributes"]
    found = predict(on_z, z, cohort, splits, device)
    if any(kept["attributes"].values()):
        features = torch.cat(list(scores.values()), dim=1)
        found |= predict(["attributes"], features, cohort, splits, device)
    if args.prompts and splits:  # by the encoder's own CLIP
        rows = np.concatenate([held_out for _, held_out in splits])
        clip = args.clip or kept["config"]["clip"], kept["clip"].get("activation", "")
        found["zero-shot"] = zero_shot(args.prompts, z[rows], cohort.classes, *clip)
    return found


def cohort_notes(config, cohort):
    """Warnings about using this bank on this cohort: a list of sentences, possibly empty."""
    real = not os.path.exists(os.path.join(cohort.root, "factors.csv"))  # demo tissue has one
    demo_bank = config["bank"].endswith(os.path.join("demo", "attributes.json"))
    demo_clip = config["clip"].endswith(os.path.join("cache", "clip.pt"))
    fresh = config["backbone"] or config["start"] == "random"
    wordless = config["bank"] and fresh and config["align"] != "regression"
    train, val = (cohort.split == SPLITS.index(split) for split in ("train", "val"))
    rules = [
        (wordless, "the encoder started from random weights: its attribute names mean nothing"),
        (real and demo_bank, "the bank describes demo tissue: name another with --bank"),
        (real and demo_clip, "the CLIP is the demo's and knows only demo tissue"),
    ]
    for c, name in enumerate(cohort.classes):
        unseen = train.any() and not (train & (cohort.label == c)).any()
        rules.append((unseen, f"no training patient has the class {name}: its recall is 0"))
        alone = set(cohort.label[val]) - {-1} == {c}
        rules.append((alone, f"{name} is the only class in val: accuracy and gains say nothing"))
    return [note for holds, note in rules if holds]


def reader_notes(checkpoint, cohort, rows, probes):
    """Caveats for readers of the numbers, as sentences. rows: those that were probed."""
    patients, people = np.unique(cohort.patient[rows]), plural(cohort.levels[-1])
    seen = runs.trained_on(cohort, patients, checkpoint["cohort"]) if probes else 0
    side, before = short_side(cohort)[0], checkpoint["short_side"]
    size = f"patches are {side} pixels wide and the run's were {before}: same magnification?"
    rules = [
        (seen, f"pretraining saw {seen} of the {len(patients)} held-out {people}, without labels"),
        (side != before, size),
        (os.path.exists(os.path.join(cohort.root, "factors.csv")), "a program drew this tissue"),
    ]
    for level in cohort.levels if probes else ():
        metrics = probes["knn20"]["levels"][level]
        few = "accuracy" in metrics and "accuracy_interval" not in metrics
        rules.append((few, f"{level}: no interval with fewer than {FEW} {people}"))
    return cohort_notes(checkpoint["config"], cohort) + [note for holds, note in rules if holds]


def main():
    style = argparse.RawDescriptionHelpFormatter  # keeps the line breaks above
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    flag = parser.add_argument
    flag("run", help="a run folder (its newest checkpoint is used) or a checkpoint file")
    flag("--data", default="", help="a cohort other than the run's: a folder or a manifest .csv")
    flag("--out", default="", help="folder to write to (default: RUN)")
    flag("--overwrite", action="store_true", help="replace results for other data or protocols")
    protocol = "test on a split, or (lopo) on each patient in turn, training on the rest"
    flag("--protocol", choices=("val", "test", "lopo"), default="val", help=protocol)
    flag("--against", default="", help="another run, or 'start': adds the gain over that encoder")
    flag("--export", default="", metavar="FILE", help="save the tower for open_clip or torchvision")
    flag("--prompts", default="", help="JSON, {class: [sentences]}: adds a zero-shot probe")
    flag("--clip", default="", help="where the run's CLIP is now, for --prompts")
    flag("--workers", type=int, default=2, help="decoding threads; more if the device waits")
    args = parser.parse_args()
    with user_errors(), processes(timeout=1800) as (_, _, device):
        evaluate(args, device)


if __name__ == "__main__":
    main()
