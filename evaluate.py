"""What a frozen encoder knows of held-out patients, and what it sees, in the words of its bank.

    python evaluate.py runs/demo                        a run's newest checkpoint, on its own cohort
    python evaluate.py runs/demo --against start        what training changed, with intervals
    python evaluate.py runs/demo --embed FOLDER z.npz   embeddings of any images, without a manifest
    torchrun --nproc_per_node=4 evaluate.py runs/demo   embed in four processes

The functions stand in the order of the work: embeddings -> probes -> intervals -> words. What it
writes: metrics.json (every number), embeddings.npz (z, attribute scores, paths, slides, patients,
labels and splits of all patches, for a classifier of your own) and last report.html, for a browser.
"""

import argparse
import json
import os
import sys
import warnings

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

from data import SPLITS, load_batches, plain_view, plural, read_cohort
from describe import check_sentences, encode_bank, read_json, tokenizer_of
from losses import LEVELS, attributes_used, standardise
from model import HLSS, load_run, make_tower, text_tower, write_whole
from tools import report
from tools.cohort import index
from tools.processes import processes, user_errors
from tools.weights import load_clip

NEIGHBOURS = {"knn200": 200, "knn20": 20}  # the k of each kNN probe
# "linear" is a regression on z, "attributes" the same one on nothing but the attribute scores.
PROBES = (*NEIGHBOURS, "linear", "attributes")
RESAMPLES = 1000  # of the bootstrap
FEW = 20  # of fewer patients than this, intervals come out too narrow: see docs/RESULTS.md


@torch.no_grad()
def embed(model, cohort, read_size, image_size, batch=128, workers=2, stop=()):
    """z of every patch, [n, D] float32 on the CPU, in the order of the cohort.

    Under torch.distributed the processes share the batches, and each gets the whole of z. The
    batches, and so the last digits of z, do not depend on how many processes there are. The model
    is in eval mode meanwhile. stop: a list; once something is in it, on any process, None is
    returned. Raises ValueError, naming it, for a patch that cannot be read.
    """
    device = next(model.parameters()).device
    was_training = model.training
    rank = dist.get_rank() if dist.is_initialized() else 0
    world = dist.get_world_size() if dist.is_initialized() else 1
    batches = np.array_split(np.arange(len(cohort)), -(-len(cohort) // batch))
    mine = batches[rank::world]
    parts = []
    model.eval()
    loader = load_batches(cohort, mine, read_size, workers)
    for _, images in tqdm(loader, "embed", len(mine), leave=False, disable=rank > 0):
        z = model.encode(plain_view(images.to(device), image_size))
        parts.append(z.cpu().numpy())
        if stop:
            break
    model.train(was_training)
    everyone = [None if stop else parts]
    if world > 1:
        everyone *= world
        dist.all_gather_object(everyone, everyone[0])
    if None in everyone:
        return None
    # Batch number i is part i // world of process i % world.
    parts = [everyone[i % world][i // world] for i in range(len(batches))]
    return torch.from_numpy(np.concatenate(parts))


def knn(train_z, train_labels, z, classes, k=200, temperature=0.07, chunk=256):
    """Class probabilities [n, classes] by weighted cosine kNN (Wu et al. 2018).

        p(c) ~ sum over the k nearest training rows i with label c of exp(cos(z, z_i) / temperature)

    train_z: [m, D] and z: [n, D], L2-normalised. train_labels: [m], from 0 to classes - 1. k is at
    most m. Memory is bounded by chunk x m similarities.
    """
    probabilities = []
    for part in z.split(chunk):
        similarity, nearest = (part @ train_z.T).topk(min(k, len(train_z)), dim=1)
        weight = ((similarity - similarity[:, :1]) / temperature).exp()  # at most 1: no overflow
        votes = torch.zeros(len(part), classes, device=train_z.device)
        votes.scatter_add_(1, train_labels[nearest], weight)
        probabilities.append(votes / votes.sum(dim=1, keepdim=True))
    return torch.cat(probabilities)


def preconditioner(x, classes, cost):
    """The centre [D] and new axes [D, D] in which the loss of `logistic` is round at its start.

    Embeddings share a large mean and hardly vary along most directions: the loss is then a long
    narrow valley, in which L-BFGS takes thousands of steps. At w = 0 every class has the
    probability 1 / classes, and along an eigenvector of the covariance of x the loss curves by

        spread / classes + 1 / cost

    where spread is the eigenvalue and 1 / cost is of the penalty. Each eigenvector, divided by the
    root of its curvature, is an axis here, so that all curvatures are 1. x: [m, D], float64.
    """
    centre = x.mean(dim=0)
    spread, directions = torch.linalg.eigh((x - centre).T.cov(correction=0))
    axes = directions / (spread.clamp(min=0) / classes + 1 / cost).sqrt()
    return centre, axes


def logistic(train_x, train_labels, x, classes):
    """Class probabilities [n, classes] by logistic regression, solved to convergence.

        minimise over w and b:   1/2 ||w||^2 + C sum_i CE(w x_i + b, y_i)
        C = D classes / 100

    C is that of UNI (Chen et al. 2024). train_x: [m, D] and x: [n, D]. train_labels: [m], from 0 to
    classes - 1; a class without a training row gets 0. Warns if L-BFGS has not converged.
    """
    present, target = train_labels.unique(return_inverse=True)
    cost = len(train_x) * train_x.shape[1] * classes / 100  # C m: the sum, divided by it, is a mean
    centre, axes = preconditioner(train_x.double(), classes, cost)
    turned = (train_x.double() - centre) @ axes

    # What is sought: w = axes v[:-1], and b = v[-1], which takes up the centre too.
    v = torch.zeros(train_x.shape[1] + 1, len(present), dtype=torch.float64, requires_grad=True)
    tolerance = {"tolerance_grad": 1e-7, "tolerance_change": 1e-14}
    lbfgs = torch.optim.LBFGS([v], max_iter=1000, line_search_fn="strong_wolfe", **tolerance)

    def closure():
        lbfgs.zero_grad()
        error = F.cross_entropy(turned @ v[:-1] + v[-1], target)
        penalty = (axes @ v[:-1]).square().sum() / (2 * cost)
        loss = error + penalty
        loss.backward()
        return loss

    lbfgs.step(closure)
    if lbfgs.state[v]["n_iter"] == 1000:
        warnings.warn("the linear probe has not converged in 1,000 steps of L-BFGS", stacklevel=2)
    logits = (x.double() - centre) @ axes @ v[:-1] + v[-1]
    probabilities = torch.zeros(len(x), classes)
    probabilities[:, present] = logits.softmax(dim=1).detach().float()
    return probabilities


def zero_shot(path, z, classes, clip, activation="", vocab=""):
    """Class probabilities [n, C] without any training label: softmax(s z t^T).

    path: JSON, {class: [sentences]}; t: [C, D], a vector for each class, encoded as a bank is. s:
    the scale of the clip, a source of `load_clip`. Raises ValueError for prompts of other classes.
    """
    prompts = read_json(path)
    if not isinstance(prompts, dict):
        raise ValueError(f"{path} must hold {{class: [sentences]}}")
    for name, sentences in prompts.items():
        check_sentences(path, name, sentences)
    if sorted(prompts) != classes:
        given = f"{path} has prompts for {sorted(prompts)}"
        raise ValueError(f"{given}, but the classes are {classes}: name them alike")
    state = load_clip(clip, activation)
    tower = text_tower(state)
    bank = {"levels": {"class": {name: prompts[name] for name in classes}}}
    t = encode_bank(bank, tower, tokenizer_of(state, vocab))["class"]
    scale = state.get("logit_scale", torch.tensor(100.0).log()).exp()
    return (scale * z @ t.T).softmax(dim=1).numpy()


def probe_splits(cohort, protocol="val"):
    """The pairs (train rows, held-out rows) to probe, of patches with a label; may be empty.

    val, test: one pair, the patients in train and those in that split. lopo: a pair for each
    patient, that one held out from all others. Raises ValueError if there is no test split.
    """
    labelled = cohort.label >= 0
    patient = cohort.patient
    split = np.array(SPLITS)[cohort.split]
    if protocol == "test" and "test" not in split:
        raise ValueError(f"{cohort.root} has no patient in the split test: use val or lopo")
    masks = [(split == "train", split == protocol)]
    if protocol == "lopo":
        masks = [(patient != p, patient == p) for p in np.unique(patient[labelled])]

    splits = []
    for train_mask, held_out_mask in masks:
        train = np.flatnonzero(labelled & train_mask)
        held_out = np.flatnonzero(labelled & held_out_mask)
        shared = np.isin(patient[train], patient[held_out])
        assert not shared.any(), "a patient is on both sides of the split"
        if len(train) and len(held_out):
            splits.append((train, held_out))
    return splits


def predict(kind, features, cohort, splits):
    """Class probabilities [n, C] of all held-out rows, by one of PROBES. features: [rows, D]."""
    bar = tqdm(splits, desc=kind, unit="patient", disable=len(splits) == 1, leave=False)
    parts = []
    for train, held_out in bar:
        labels = torch.from_numpy(cohort.label[train]).long()
        inputs = features[train], labels, features[held_out], len(cohort.classes)
        if kind in NEIGHBOURS:
            parts.append(knn(*inputs, k=NEIGHBOURS[kind]))
        else:
            parts.append(logistic(*inputs))
    return torch.cat(parts).numpy()


def group_mean(values, groups):
    """The mean of each group of rows [G, K], and the first row of each group [G].

    values: [n, K]. groups: [n] integers; the G groups are in the order of these.
    """
    options = {"return_index": True, "return_inverse": True, "return_counts": True}
    _, first, index, size = np.unique(groups, **options)
    total = np.stack([np.bincount(index, weights=column) for column in values.T], axis=1)
    return total / size[:, None], first


def attribute_targets(teacher, cohort, read_size, workers=2):
    """What `losses.ar` holds the attribute scores to: {level: [G_l, K_l]}, a row for each id.

        a_l = standardise(mean of each patch, slide or patient of standardise(z_T t_l^T))

    z_T: the embedding of a plain view of every patch, by the teacher, an HLSS with the bank. The
    mean and variance are over the patches of this cohort, then over its groups; the row of an id
    that is not among its `ids` is 0.
    """
    z = embed(teacher, cohort, read_size, teacher.tower.image_size, workers=workers)
    ids = cohort.ids(np.arange(len(cohort)))
    targets = {}
    for (level, t), groups in zip(teacher.bank.items(), ids.T):
        scores = standardise(z @ t.cpu().T)  # [n, K_l]
        mean, first = group_mean(scores.numpy(), groups)
        targets[level] = torch.zeros(groups.max() + 1, len(t))
        targets[level][groups[first]] = standardise(torch.from_numpy(mean)).float()
    return targets


def pool(probabilities, labels, groups):
    """The mean probabilities [G, C] of each slide or patient, with its label [G], its first row [G]
    and how many groups were left out because their patches have several labels.

    Probabilities [n, C] of patches are averaged once, with no second softmax.
    """
    mean, first = group_mean(probabilities, groups)
    one_hot = np.eye(labels.max() + 1)[labels]
    agree = group_mean(one_hot, groups)[0].max(axis=1) == 1
    return mean[agree], labels[first[agree]], first[agree], int((~agree).sum())


def rates(probabilities, labels, patient, counts):
    """Accuracy [R], recall [R, C] and mean class accuracy (MCA) [R], for each of R resamples.

        recall_c = sum_p w_p correct_pc / sum_p w_p total_pc
        MCA      = mean of recall_c over the classes that occur

    probabilities: [n, C]. labels: [n]. patient: [n], a column of counts. counts: [R, P], w_p, how
    often each patient counts. The recall of a class that does not occur is nan.
    """
    P = counts.shape[1]
    C = probabilities.shape[1]
    cell = patient * C + labels
    right = probabilities.argmax(axis=1) == labels
    total = counts @ np.bincount(cell, minlength=P * C).reshape(P, C)  # [R, C]
    correct = counts @ np.bincount(cell[right], minlength=P * C).reshape(P, C)
    with np.errstate(invalid="ignore"):  # 0 / 0 where a class does not occur
        recall = correct / total
    accuracy = correct.sum(axis=1) / total.sum(axis=1)
    mca = np.nansum(recall, axis=1) / (total > 0).sum(axis=1)
    return {"accuracy": accuracy, "recall": recall, "mca": mca}


def auc(score, positive):
    """Area under the ROC curve, by the rank sum (Mann and Whitney 1947); nan unless both occur.

        AUC = (sum of the positives' ranks - p (p + 1) / 2) / (p (n - p))

    score: [n], equal ones share their mean rank. positive: [n] bool, p of them true.
    """
    n = len(score)
    p = int(positive.sum())
    if p in (0, n):
        return np.nan
    _, index, size = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(size) - (size - 1) / 2)[index]
    return float((rank[positive].sum() - p * (p + 1) / 2) / (p * (n - p)))


def bootstrap_counts(P, resamples, seed=0):
    """How often each of P patients counts, [1 + resamples, P].

    Row 0 is the cohort as it is, each patient once. In the others P patients are drawn with
    replacement (the bootstrap): patients are what is independent, patches are not.
    """
    drawn = np.random.default_rng(seed).multinomial(P, np.full(P, 1 / P), resamples)
    return np.concatenate([np.ones((1, P)), drawn])


def estimate(name, values):
    """{name: value, name_interval: [low, high]}: row 0, and the central 95% of the resamples.

    values: [1 + R], as `bootstrap_counts`. Where row 0 is nan the value is None; resamples that are
    nan do not count, and without any there is no interval.
    """
    value = None if np.isnan(values[0]) else float(values[0])
    resampled = values[1:][~np.isnan(values[1:])]
    if not len(resampled):
        return {name: value}
    return {name: value, f"{name}_interval": np.percentile(resampled, (2.5, 97.5)).tolist()}


def assess_level(predictions, labels, groups, patient, counts, classes):
    """The metrics of one probe at one level, as `assess` describes them.

    predictions: probabilities [n, C], and where there is one those of the other encoder. groups:
    [n], the slide or patient of each patch, or its own number. patient: [n], a column of counts.
    """
    probabilities, label, first, left_out = pool(predictions[0], labels, groups)
    metrics = {"n": len(label), "left_out": left_out}
    if not len(label):
        return metrics
    patient = patient[first]
    resampled = counts if len(np.unique(patient)) >= FEW else counts[:1]
    values = rates(probabilities, label, patient, resampled)
    metrics |= estimate("accuracy", values["accuracy"]) | estimate("mca", values["mca"])
    for other in predictions[1:]:
        # The gain is paired: both encoders on the same resamples of the patients.
        other_values = rates(pool(other, labels, groups)[0], label, patient, resampled)
        for name in ("accuracy", "mca"):
            metrics |= estimate(f"{name}_gain", values[name] - other_values[name])
    if len(counts) > 1:
        C = len(classes)
        areas = [auc(probabilities[:, c], label == c) for c in np.unique(label)]
        confusion = np.bincount(label * C + probabilities.argmax(axis=1), minlength=C * C)
        metrics |= estimate("auc", np.mean(areas, keepdims=True))
        recalls = values["recall"].T
        metrics["recall"] = {c: estimate("recall", r) for c, r in zip(classes, recalls)}
        metrics["confusion"] = confusion.reshape(C, C).tolist()
    return metrics


def patient_results(probabilities, cohort, rows):
    """What a probe says of each patient: dicts with patient, class, predicted, its probability."""
    mean, label, first, _ = pool(probabilities, cohort.label[rows], cohort.patient[rows])
    found = []
    for p, c, patient in zip(mean, label, cohort.patient[rows[first]]):
        row = {"patient": cohort.groups[-1][patient], "class": cohort.classes[c]}
        row |= {"predicted": cohort.classes[p.argmax()], "probability": float(p.max())}
        found.append(row)
    return found


def assess(predictions, cohort, splits, resamples=RESAMPLES, other=None):
    """The metrics of each probe at each level: {kind: {level: metrics}}, with "k" used by kNN.

    predictions: {kind: probabilities [n, C] of the held-out rows}, as `predict`. other: the same of
    another encoder, to gain over. metrics: n and left_out (slides or patients with several labels);
    if n > 0 accuracy and mca; with resamples also intervals, macro one-vs-rest auc, recall by class
    and confusion (rows: true, columns: predicted), and for each kind what it says of "patients".
    """
    rows = np.concatenate([held_out for _, held_out in splits])
    patients, patient = np.unique(cohort.patient[rows], return_inverse=True)
    labels = cohort.label[rows]
    counts = bootstrap_counts(len(patients), resamples)
    results = {}
    for kind, probabilities in predictions.items():
        results[kind] = {}
        if kind in NEIGHBOURS:
            results[kind]["k"] = min(NEIGHBOURS[kind], *(len(train) for train, _ in splits))
        if resamples:
            results[kind]["patients"] = patient_results(probabilities, cohort, rows)
        both = [probabilities, other[kind]] if other else [probabilities]
        for level, groups in zip(cohort.levels, cohort.ids(rows).T):
            metrics = assess_level(both, labels, groups, patient, counts, cohort.classes)
            results[kind][level] = metrics
    return results


def probe(z, cohort):
    """The probe during training: kNN of z [n, D] from train to val, as `assess` but without
    intervals; {} if either side has no label."""
    splits = probe_splits(cohort)
    if not splits:
        return {}
    predictions = {kind: predict(kind, z, cohort, splits) for kind in NEIGHBOURS}
    return assess(predictions, cohort, splits, resamples=0)


def class_differences(scores, labels, counts):
    """The classes that occur [C], and how much more each scores than the others [R, C, K].

    That is the mean of its patients less the mean of the other classes' means, or nan where a
    resample lacks a class. scores: [P, K]. labels: [P]. counts: [R, P].
    """
    present = np.unique(labels)
    members = counts[:, None] * (labels == present[:, None])  # [R, C, P]
    with np.errstate(invalid="ignore"):
        means = members @ scores / members.sum(axis=2, keepdims=True)  # [R, C, K]
    others = (means.sum(axis=1, keepdims=True) - means) / max(1, len(present) - 1)
    return present, means - others


def class_attributes(scores, names, cohort, rows, number=5):
    """What sets each class apart: the attributes that its patients score highest in, as dicts with
    class, level, attribute, difference and its interval.

    scores: {level: [all rows, K_l]}. names: {level: [K_l]}. rows: those to look at, with labels.
    Empty without two classes that have a patient whose patches share a label.
    """
    labels = cohort.label[rows]
    if labels.min() < 0:
        return []
    found = []
    for level in cohort.levels:
        # Patients are what is independent, whatever the level of the words.
        mean, label, *_ = pool(scores[level][rows].numpy(), labels, cohort.patient[rows])
        if len(np.unique(label)) < 2:
            return []
        counts = bootstrap_counts(len(label), RESAMPLES if len(label) >= FEW else 0)
        present, difference = class_differences(mean, label, counts)
        for i, c in enumerate(present):
            for k in np.argsort(-difference[0, i])[:number]:
                row = {"class": cohort.classes[c], "level": level, "attribute": names[level][k]}
                found.append(row | estimate("difference", difference[:, i, k]))
    return found


def table(results):
    """The lines of a table, in percent. results: {encoder: what `assess` or `probe` gave}."""
    if not any(results.values()):
        return ["no held-out patient or no training patient has a label: there is nothing to probe"]
    first = next(iter(next(iter(results.values())).values()))
    levels = [key for key in first if isinstance(first[key], dict)]
    width = 2 + max(len(f"{name} {kind}") for name in results for kind in results[name])
    lines = [" " * width + "".join(f"{level:>16}" for level in levels)]
    lines.append(" " * width + f"{'acc':>9}{'MCA':>7}" * len(levels))
    notes = []
    for name, probes in results.items():
        for kind, metrics in probes.items():
            heads = {"": f"{name} {kind}", "_interval": "  95%"}
            heads |= {"_gain": "  gain", "_gain_interval": "  gain, 95%"}
            for end, head in heads.items():
                line = head.ljust(width)
                for level in levels:
                    accuracy = report.percent(metrics[level].get(f"accuracy{end}"))
                    mca = report.percent(metrics[level].get(f"mca{end}"))
                    line += f"{accuracy + mca.rjust(7):>16}"
                if end == "" or any(f"accuracy{end}" in metrics[level] for level in levels):
                    lines.append(line.rstrip())
            notes += table_notes(kind, metrics, levels)
    return lines + [f"  {note}" for note in dict.fromkeys(notes)]


def table_notes(kind, metrics, levels):
    """What a table says of a probe below its numbers: how many were scored, and how many not."""
    notes = []
    k = metrics.get("k")
    if k != NEIGHBOURS.get(kind):
        few = f"{kind}: there are only {k} training patches with a label, so k = {k}"
        notes.append(f"{few}: every one of them votes, which favours the commonest class")
    numbers = [f"{metrics[level]['n']} {plural(level)}" for level in levels]
    notes.append(f"scored: {', '.join(numbers)}")
    for level in levels:
        n, left_out = metrics[level]["n"], metrics[level]["left_out"]
        if left_out:
            of_all = f"{level}: {left_out} of {n + left_out} left out"
            notes.append(f"{of_all}, having patches of several labels")
    return notes


def starting_model(model, checkpoint, clip=""):
    """The model that training started from, and the checkpoint, as `load_run` gives them.

    clip: where the run's CLIP is now. A tower that started at random is made anew.
    """
    config = checkpoint["config"]
    state = model.state_dict() | {"activation": config["activation"]}  # of a tower that was new
    if not config.get("backbone") and config.get("start") != "random":
        state = load_clip(clip or config["clip"], config["activation"])
    torch.manual_seed(config["seed"])  # as train.py does
    tower = make_tower(config, model.bank, state, checkpoint["image_size"])
    start = HLSS(tower, model.bank, "simclr").eval()
    start.mean = model.mean
    start.std = model.std
    return start, checkpoint


def open_encoders(args, run):
    """{name: (model, checkpoint)}: the run's encoder first, then the one that --against names."""
    encoders = {f"step {run[1]['step']}": run}
    if args.against == "start":
        encoders["start"] = starting_model(*run, args.clip)
    elif args.against:
        encoders[args.against] = load_run(args.against)
    return encoders


def embed_run(model, checkpoint, cohort, args, device):
    """z [n, D] of a cohort, at the sizes in pixels that the run was trained at, and the attribute
    scores {level: [n, K_l]}: how alike a patch and an attribute are, as a cosine."""
    sizes = checkpoint["read_size"], checkpoint["image_size"]
    z = embed(model.to(device), cohort, *sizes, workers=args.workers)
    return z, {level: z @ t.cpu().T for level, t in model.bank.items()}


def show(args, run, cohort, device):
    """Print the top attributes of the patients, slides and patches that --show names."""
    attributes = run[1]["attributes"]
    ids = cohort.ids(np.arange(len(cohort)))
    for name in args.show:
        named = cohort.names == name.encode()
        for names, column in zip(cohort.groups, ids.T[1:]):
            named |= np.array(names)[column] == name
        if not named.any():
            first = ", ".join([cohort.name(0), *reversed(cohort.group_names(0))])
            missing = f"{cohort.root} has no such path, {' or '.join(cohort.levels[1:])}"
            raise ValueError(f"--show {name}: {missing}; the first is called {first}")
        _, scores = embed_run(*run, cohort.select(named), args, device)
        print(name)
        for level, values in scores.items():
            print(f"{level:>9}: {report.top(values.mean(dim=0).numpy(), attributes[level])}")
    for note in cohort_notes(run[1]["config"], cohort):
        print(f"note: {note}")


def cohort_notes(config, cohort):
    """What to know of a run's words on a cohort, before any number: sentences, perhaps none."""
    elsewhere = not os.path.exists(os.path.join(cohort.root, "factors.csv"))  # as demo tissue has
    demo_bank = config["bank"].endswith(os.path.join("demo", "attributes.json"))
    demo_clip = config["clip"] == os.path.join(config.get("cache", ""), "clip.pt")
    at_random = config.get("backbone") or config.get("start") == "random"
    wordless = at_random and config.get("align") != "regression"
    alone = len(np.unique(cohort.patient[cohort.split == SPLITS.index("train")])) == 1
    rules = [
        (wordless, "the encoder started from random weights: its attribute names mean nothing"),
        (elsewhere and demo_bank, "the bank describes demo tissue: --bank names another"),
        (elsewhere and demo_clip, "the CLIP is the demo's and knows demo tissue alone"),
        (alone, "one training patient: nothing shows how patients differ"),
    ]
    return [note for holds, note in rules if holds]


def export(path, model, config):
    """Write the tower for others to load, and print how it wants its images.

    A state dict: a CLIP's image tower under the names of CLIP and open_clip (visual.*), a backbone
    under torchvision's; with the "mean" and "std" [3] of images in [0, 1] beside the weights.
    """
    prefix = "" if config.get("backbone") else "visual."
    state = {prefix + name: value for name, value in model.tower.state_dict().items()}
    state |= {"mean": model.mean.flatten(), "std": model.std.flatten()}
    write_whole(path, lambda file: torch.save(state, file))
    kind = config.get("backbone") or config["activation"]
    print(f"{path}: {model.tower.image_size} pixels, {kind}; of images in [0, 1]")
    print(f"the mean is {state['mean'].tolist()} and the std {state['std'].tolist()}")


def run_probes(args, config, z, scores, cohort, splits):
    """All probes of the run's encoder (the first of z and scores) and its gain over the other."""
    held_out = np.concatenate([rows for _, rows in splits])
    clip = args.clip or config["clip"], config["activation"], config["vocab"]
    joined = {name: torch.cat(list(scores[name].values()), dim=1) for name in z}
    with_words = all(features.shape[1] for features in joined.values())
    predictions = []
    for name in z:
        features = dict.fromkeys(PROBES, z[name]) | {"attributes": joined[name]}
        if not with_words:
            del features["attributes"]
        found = {kind: predict(kind, x, cohort, splits) for kind, x in features.items()}
        if args.prompts:
            found["zero-shot"] = zero_shot(args.prompts, z[name][held_out], cohort.classes, *clip)
        predictions.append(found)
    other = predictions[1] if args.against else None
    return assess(predictions[0], cohort, splits, other=other)


def reader_notes(args, config, cohort, rows, probes, words):
    """What a reader of the numbers must know, as sentences. rows: those that were probed."""
    lopo = probes and args.protocol == "lopo"
    seen = len(np.unique(cohort.patient[rows][cohort.split[rows] == SPLITS.index("train")]))
    wordless = probes and config["clip"] and not words
    rules = [
        (lopo and seen, f"pretraining may have seen {seen} of the patients, without labels"),
        (probes and len(cohort.classes) == 1, "one class alone: to be right about it says nothing"),
        (wordless, "no class is set apart: that takes patients of two classes"),
    ]
    for c, name in enumerate(cohort.classes if lopo else ()):
        alone = len(np.unique(cohort.patient[cohort.label == c])) == 1
        rules.append((alone, f"{name} has one patient: nothing shows it with that one out"))
    for level in cohort.levels if probes else ():
        metrics = probes["knn20"][level]
        few = "accuracy" in metrics and "accuracy_interval" not in metrics
        rules.append((few, f"{level}: fewer than {FEW} patients are too few for an interval"))
    return cohort_notes(config, cohort) + [note for holds, note in rules if holds]


def write_arrays(path, cohort, z, scores, names, **arrays):
    """Write an .npz: path [n] str, z [n, D], and of each level scores [n, K_l] and attributes."""
    arrays |= {"path": np.array([name.decode() for name in cohort.names]), "z": z.numpy()}
    for level in scores:
        arrays[f"scores_{level}"] = scores[level].numpy()
        arrays[f"attributes_{level}"] = np.array(names[level], str)
    write_whole(path, lambda file: np.savez(file, **arrays))


def embed_folder(args, run, device):
    """Write z and the attribute scores of all images below a folder, as --embed says."""
    folder, path = args.embed
    cohort = index(folder, "(?P<patient>.+)")  # each image a patient of its own: nothing is pooled
    z, scores = embed_run(*run, cohort, args, device)
    if not dist.is_initialized() or dist.get_rank() == 0:
        write_arrays(path, cohort, z, scores, run[1]["attributes"])
        print(f"{len(z)} images are in {path}: path, z, and scores and attributes of each level")


def write(out, metrics, cohort, z, scores, names, against_scores):
    """Write embeddings.npz, of all patches, and metrics.json; each replaces the old one whole."""
    arrays = {"label": cohort.label, "split": cohort.split, "splits": np.array(SPLITS)}
    arrays["classes"] = np.array(cohort.classes, str)
    ids = cohort.ids(np.arange(len(cohort)))
    for level, names_of_groups, column in zip(cohort.levels[1:], cohort.groups, ids.T[1:]):
        arrays[level] = column.astype(np.int32)
        arrays[plural(level)] = np.array(names_of_groups)
    for level, values in against_scores.items():
        arrays[f"against_scores_{level}"] = values.numpy()
    os.makedirs(out, exist_ok=True)
    text = json.dumps(metrics, indent=1)
    write_arrays(os.path.join(out, "embeddings.npz"), cohort, z, scores, names, **arrays)
    write_whole(os.path.join(out, "metrics.json"), lambda file: file.write(text.encode()))


def evaluate(args, device):
    """Evaluate a run as the flags of `main` say: all processes embed, the first does the rest."""
    # The run, and the cohort: its own, or the one that --data names.
    run = load_run(args.run)
    model, checkpoint = run
    config, names = checkpoint["config"], checkpoint["attributes"]
    if args.export:
        return export(args.export, model, config)
    if args.embed:
        return embed_folder(args, run, device)
    levels = config.get("levels", ",".join(LEVELS)).split(",")
    cohort = read_cohort(args.data or config["data"], levels, config["val_fraction"])
    if args.show:
        return show(args, run, cohort, device)

    # Embeddings, and attribute scores.
    splits = probe_splits(cohort, args.protocol)
    encoders = open_encoders(args, run)
    z = {}
    scores = {}
    for name, encoder in encoders.items():
        z[name], scores[name] = embed_run(*encoder, cohort, args, device)
    if dist.is_initialized() and dist.get_rank() > 0:
        return

    # Probes, with intervals.
    step = f"step {checkpoint['step']}"
    rows = np.arange(len(cohort))  # without labels there is nothing to probe, but much to see
    probes = {}
    if splits:
        rows = np.concatenate([held_out for _, held_out in splits])
        probes = run_probes(args, config, z, scores, cohort, splits)

    # Words.
    words = []
    used = {}
    if any(names.values()):
        words = class_attributes(scores[step], names, cohort, rows)
        used = {level: attributes_used(z[step], t.cpu()) for level, t in model.bank.items()}

    # Results.
    folder = args.run if os.path.isdir(args.run) else os.path.dirname(os.path.abspath(args.run))
    other = os.path.basename(os.path.abspath(args.data)).removesuffix(".csv") if args.data else ""
    protocol = "" if args.protocol == "val" else args.protocol
    out = args.out or os.path.normpath(os.path.join(folder, other, protocol))
    metrics = {
        "command": " ".join(["python", *sys.argv]),
        "run": folder,
        "step": checkpoint["step"],
        "data": os.path.abspath(args.data or config["data"]),
        "root": cohort.root,
        "cohort": str(cohort),
        "classes": cohort.classes,
        "protocol": args.protocol,
        "rows": rows.tolist(),
        "notes": reader_notes(args, config, cohort, rows, probes, words),
        "against": args.against,
        "probes": probes,
        "levels": levels,
        "attributes_used": used,
        "class_attributes": words,
    }
    alike = args.against and encoders[args.against][1]["attributes"] == names
    write(out, metrics, cohort, z[step], scores[step], names, scores[args.against] if alike else {})
    print("\n".join([*table({step: probes}), *metrics["notes"]]))

    # The page last: it is drawn from these files, so that one that cannot be drawn loses nothing.
    try:
        print(f"all is in {report.draw(out)}")
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        print(f"no page was drawn ({reason}): python -m tools.report {out} draws it later")


def main():
    style = argparse.RawDescriptionHelpFormatter  # line breaks as above
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    flag = parser.add_argument
    flag("run", help="a run folder (its newest checkpoint is taken) or a checkpoint file")
    flag("--data", default="", help="another cohort than the run's: a folder or a manifest .csv")
    flag("--out", default="", help="folder to write to (default: RUN, RUN/DATA, RUN/PROTOCOL)")
    protocol = "who is tested. val, test: that split, after train; lopo: each patient, after all "
    protocol += "others (default: val)"
    flag("--protocol", choices=("val", "test", "lopo"), default="val", help=protocol)
    flag("--against", default="", help="a run, or start, the first tower: adds the gain over it")
    flag("--show", nargs="+", default=[], help="patients, slides, paths: print their top words")
    flag("--embed", nargs=2, metavar=("FOLDER", "FILE.npz"), help="write z of all images below it")
    flag("--export", default="", metavar="FILE", help="write the tower for open_clip, torchvision")
    flag("--prompts", default="", help="JSON, {class: [sentences]}: adds a zero-shot probe")
    flag("--clip", default="", help="where the run's CLIP is now, for --against start, --prompts")
    flag("--workers", type=int, default=2, help="decoding threads; raise it if the device waits")
    args = parser.parse_args()
    with user_errors(), processes(timeout=1800) as (_, _, device):
        evaluate(args, device)


if __name__ == "__main__":
    main()
