"""Probe a frozen encoder on held-out patients, say in the bank's words what it sees, and write a report.

    python evaluate.py runs/demo                        a run's newest checkpoint, on the cohort that it saw
    python evaluate.py runs/demo --against start        what training changed, with intervals
    torchrun --nproc_per_node=4 evaluate.py runs/demo   embed in four processes

Then open report.html in a browser. metrics.json has its numbers; embeddings.npz has z, attribute scores, paths,
slides, patients, labels and splits of all patches, for a classifier or a map of your own.
"""

import argparse
import base64
import csv
import io
import json
import os
import string
import sys
import warnings
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from tqdm import tqdm

from data import SPLITS, decode, load_batches, plain_view, read_cohort
from describe import encode_bank, read_bank, tokenizer_of
from losses import LEVELS, attributes_used
from model import HLSS, backbone_tower, image_tower, load_run, text_tower, write_whole
from tools.weights import load_clip

PROBES = (
    "knn200",
    "knn20",
    "linear",
    "attributes",
)  # the last: linear, too, but it sees only the attribute scores
FEW = 5  # patients: fewer tell nothing about others, and have no interval


@torch.no_grad()
def embed(model, cohort, read_size, image_size, batch=128, workers=2, skip=False):
    """z of every patch, [n, D] float32 on the CPU, in the cohort's order. Processes share the work, all get the whole.
    The model is in eval mode meanwhile. The batches, and so the last digits of z, do not depend on the processes."""
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    batches = np.array_split(np.arange(len(cohort)), -(-len(cohort) // batch))
    mine = load_batches(cohort, batches[rank::world], read_size, workers)
    bar = tqdm(mine, "embed", len(batches[rank::world]), leave=False, disable=rank > 0)
    parts = [
        model.encode(plain_view(images.to(device), image_size)).cpu().numpy() for _, images in bar
    ]
    if world > 1:
        everyone = [None] * world
        dist.all_gather_object(everyone, parts)
        parts = [everyone[i % world][i // world] for i in range(len(batches))]
    model.train(was_training)
    return torch.from_numpy(np.concatenate(parts))


def knn(bank, labels, queries, classes, k=200, temperature=0.07, chunk=256):
    """Class probabilities by weighted cosine kNN (Wu et al. 2018): each of the k nearest votes with exp(cos / T). bank
    [m, D], queries [n, D]: L2-normalised; labels: [m] in 0 .. classes - 1; k is capped at m. Returns [n, classes]."""
    scores = []
    for part in queries.split(chunk):  # bounds the memory at chunk x m
        similarity, nearest = (part @ bank.T).topk(min(k, len(bank)), dim=1)
        weight = (
            (similarity - similarity[:, :1]) / temperature
        ).exp()  # the nearest weighs 1: nothing overflows
        votes = torch.zeros(len(part), classes, device=bank.device).scatter_add_(
            1, labels[nearest], weight
        )
        scores.append(votes / votes.sum(dim=1, keepdim=True))
    return torch.cat(scores)


def logistic(bank, labels, queries, classes):
    """Class probabilities by logistic regression, solved to convergence: min 1/2 ||w||^2 + C sum_i CE(w x_i + b, y_i).
    C = D classes / 100 (UNI, Chen et al. 2024). The rest is as in `knn`; a class that the bank lacks gets 0."""
    present, target = labels.unique(return_inverse=True)
    cost, centre = (
        len(bank) * bank.shape[1] * classes / 100,
        bank.double().mean(dim=0),
    )  # the sum is divided by C m
    spread, axes = torch.linalg.eigh((bank.double() - centre).T.cov(correction=0))
    turn = (
        axes / (spread.clamp(min=0) / classes + 1 / cost).sqrt()
    )  # w = turn v: the loss curves alike along all v
    x = (
        bank.double() - centre
    ) @ turn  # b takes up the centre. The same solution, found far sooner
    v = torch.zeros(bank.shape[1] + 1, len(present), dtype=torch.float64, requires_grad=True)
    lbfgs = torch.optim.LBFGS(
        [v], 1, 1000, tolerance_grad=1e-7, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure():
        lbfgs.zero_grad()
        loss = F.cross_entropy(x @ v[:-1] + v[-1], target) + (turn @ v[:-1]).square().sum() / (
            2 * cost
        )
        loss.backward()
        return loss

    lbfgs.step(closure)
    if lbfgs.state[v]["n_iter"] == 1000:
        warnings.warn(
            "the linear probe has not converged after 1,000 steps of L-BFGS", stacklevel=2
        )
    scores = torch.zeros(len(queries), classes)
    scores[:, present] = (
        ((queries.double() - centre) @ turn @ v[:-1] + v[-1]).softmax(dim=1).detach().float()
    )
    return scores


def zero_shot(path, z, classes, clip, activation="", vocab=""):
    """Class probabilities [n, C]: softmax(s z t^T), t the prompts of a JSON file {class: [sentences]}, encoded as a
    bank, s the scale of the clip, a source of `load_state`. Raises ValueError unless for exactly these classes."""
    prompts = json.loads(Path(path).read_text("utf-8"))
    if sorted(prompts) != classes:
        raise ValueError(
            f"{path} has prompts for {sorted(prompts)}, but the classes are {classes}: name them alike"
        )
    state = load_clip(clip, activation)
    tower, bank = (
        text_tower(state),
        {"patch": {name: prompts[name] for name in classes}, "slide": {}, "patient": {}},
    )
    t = encode_bank({"levels": bank}, tower, tokenizer_of(tower, vocab))["patch"]
    return (
        (state.get("logit_scale", torch.tensor(100.0).log()).exp() * z @ t.T).softmax(dim=1).numpy()
    )


def sides(cohort, protocol="val"):
    """[(rows of the bank, rows of the queries)] of labelled patches: train and that split, or with lopo one pair a
    patient: all others, and that one. Empty if a side has no label. Raises ValueError if there is no test split."""
    labelled, patient, split = cohort.label >= 0, cohort.patient, np.array(SPLITS)[cohort.split]
    out = np.unique(patient[labelled]) if protocol == "lopo" else ()
    masks = [(patient != p, patient == p) for p in out] or [(split == "train", split == protocol)]
    if protocol == "test" and "test" not in split:
        raise ValueError(
            f"--protocol test: {cohort.root} has no patient in the split test: use val or lopo"
        )
    pairs = [tuple(np.flatnonzero(labelled & mask) for mask in pair) for pair in masks]
    assert not any(np.isin(patient[b], patient[q]).any() for b, q in pairs), (
        "a patient is on both sides of the split"
    )
    return [pair for pair in pairs if all(map(len, pair))]


def predict(kind, features, cohort, pairs):
    """Class probabilities [n, C] of the queries of `sides`, pair by pair. kind: of PROBES. features: [all rows, D]."""
    parts = []
    for bank, queries in tqdm(
        pairs, desc=kind, unit="patient", disable=len(pairs) == 1, leave=False
    ):
        labels, classes = torch.from_numpy(cohort.label[bank]).long(), len(cohort.classes)
        options = {"k": int(kind[3:])} if kind.startswith("knn") else {}
        parts.append(
            (knn if options else logistic)(
                features[bank], labels, features[queries], classes, **options
            )
        )
    return torch.cat(parts).numpy()


def group_mean(values, groups):
    """Rows of [n, K], averaged over each group: (means [G, K], the first row of each group [G])."""
    _, first, index, size = np.unique(
        groups, return_index=True, return_inverse=True, return_counts=True
    )
    return np.stack([np.bincount(index, weights=column) for column in values.T], axis=1) / size[
        :, None
    ], first


def pool(scores, labels, groups):
    """Patch probabilities [n, C] -> the mean probability of each slide or patient, averaged once, no second softmax.
    A group has a label only if all its patches share one: (scores [G, C], labels [G], first rows [G], left out)."""
    mean, first = group_mean(scores, groups)
    same = group_mean(np.eye(labels.max() + 1)[labels], groups)[0].max(axis=1) == 1
    return mean[same], labels[first[same]], first[same], int((~same).sum())


def patient_weights(P, resamples, seed=0):
    """How often each of P patients counts, [1 + resamples, P]: once in row 0, then as drawn with replacement
    (bootstrap)."""
    drawn = np.random.default_rng(seed).multinomial(P, np.full(P, 1 / P), resamples)
    return np.concatenate([np.ones((1, P)), drawn])


def rates(scores, labels, patient, weights):
    """Accuracy [R], recall [R, C] and mean class accuracy (MCA) [R], patients weighing as in a row of weights [R, P]:
    recall_c = sum_p w_p correct_pc / sum_p w_p total_pc, nan if c does not occur; MCA = mean of the recalls that are
    defined. scores [n, C], labels [n]; patient: [n], the column in weights."""
    P, C = weights.shape[1], scores.shape[1]
    cell = patient * C + labels
    total = weights @ np.bincount(cell, minlength=P * C).reshape(P, C)
    correct = weights @ np.bincount(cell[scores.argmax(axis=1) == labels], minlength=P * C).reshape(
        P, C
    )
    with np.errstate(invalid="ignore"):
        recall, accuracy = correct / total, correct.sum(axis=1) / total.sum(axis=1)
        return {
            "accuracy": accuracy,
            "recall": recall,
            "mca": np.nansum(recall, axis=1) / (total > 0).sum(axis=1),
        }


def auc(score, positive):
    """Area under the ROC curve by the rank sum (Mann and Whitney 1947). [n] and [n] bool; nan unless both occur."""
    _, index, size = np.unique(score, return_inverse=True, return_counts=True)
    rank, p = (
        (np.cumsum(size) - (size - 1) / 2)[index],
        int(positive.sum()),
    )  # equal scores share their mean rank
    return (
        float((rank[positive].sum() - p * (p + 1) / 2) / (p * (len(score) - p)))
        if 0 < p < len(score)
        else np.nan
    )


def estimate(name, draws):
    """Row 0 of [1 + R], and the central 95% of the resamples below it: {name, name_interval}; nan becomes None."""
    value, drawn = None if np.isnan(draws[0]) else float(draws[0]), draws[1:][~np.isnan(draws[1:])]
    return {name: value} | (
        {f"{name}_interval": np.percentile(drawn, (2.5, 97.5)).tolist()} if len(drawn) else {}
    )


def assess(predictions, cohort, pairs, resamples=1000, other=None):
    """{kind: patch probabilities [n, C] of the queries} -> {kind: {level: metrics}}, a kind of kNN with its k, too.
    metrics: n, left_out and, if n > 0, accuracy and mca; with resamples intervals, macro one-vs-rest auc, recall and
    confusion (true by predicted). other: predictions of another encoder, to gain over, on the same resamples."""
    rows, C, metrics = np.concatenate([queries for _, queries in pairs]), len(cohort.classes), {}
    patients, patient = np.unique(cohort.patient[rows], return_inverse=True)
    weights, y = patient_weights(len(patients), resamples), cohort.label[rows]
    for kind, scores in predictions.items():
        metrics[kind] = (
            {"k": min(int(kind[3:]), *(len(b) for b, _ in pairs))} if kind.startswith("knn") else {}
        )
        for level, groups in zip(LEVELS, cohort.ids(rows).T):
            s, labels, first, left_out = pool(scores, y, groups)
            at = metrics[kind][level] = {"n": len(labels), "left_out": left_out}
            if not at["n"]:
                continue
            w = weights if len(np.unique(patient[first])) >= FEW else weights[:1]
            drawn = rates(s, labels, patient[first], w)
            theirs = (
                rates(pool(other[kind], y, groups)[0], labels, patient[first], w) if other else None
            )
            for name in ("accuracy", "mca"):
                gain = estimate(f"{name}_gain", drawn[name] - theirs[name]) if other else {}
                at |= estimate(name, drawn[name]) | gain
            if resamples:
                at |= estimate(
                    "auc",
                    np.mean([auc(s[:, c], labels == c) for c in np.unique(labels)], keepdims=True),
                )
                at["recall"] = {
                    c: estimate("recall", r) for c, r in zip(cohort.classes, drawn["recall"].T)
                }
                at["confusion"] = (
                    np.bincount(labels * C + s.argmax(axis=1), minlength=C * C)
                    .reshape(C, C)
                    .tolist()
                )
    return metrics


def probe(z, cohort):
    """The cheap probe during training, of z [n, D]: kNN from train to val, {"knn200": {"k": used, "patch": {"n",
    "left_out", "accuracy", "mca"}, "slide": ..., "patient": ...}, ...}, empty if either side has no label."""
    pairs = sides(cohort)
    return (
        assess({kind: predict(kind, z, cohort, pairs) for kind in PROBES[:2]}, cohort, pairs, 0)
        if pairs
        else {}
    )


def top(scores, names, number=5):
    """The attributes that score highest, one line. scores: [K], names: K strings."""
    values, order = scores.topk(min(number, len(names)))
    return ", ".join(f"{names[i]} {value:.3f}" for i, value in zip(order.tolist(), values.tolist()))


def apart(scores, label, weights, number=5):
    """What sets a class apart: the mean of its patients less the mean of the other classes' means. scores [P, K],
    label [P], weights [R, P]. Yields (class, attribute, differences [R]), the largest first; for one class nothing."""
    present = np.unique(label)
    drawn = weights[:, None] * (label == present[:, None])  # [R, C, P]
    with np.errstate(invalid="ignore"):  # a resample may lack a class
        mean = drawn @ scores / drawn.sum(axis=2, keepdims=True)  # [R, C, K]
    by = mean - (mean.sum(axis=1, keepdims=True) - mean) / max(1, len(present) - 1)
    for i, c in enumerate(present if len(present) > 1 else ()):
        yield from ((c, k, by[:, i, k]) for k in np.argsort(-by[0, i])[:number])


def read_truth(bank, cohort):
    """A bank's truth, {attribute: "+factor" or "-factor"}, and the cohort's factors.csv, {factor: [n]}."""
    truth = read_bank(bank)["truth"]
    lines = Path(cohort.root, "factors.csv").read_text("utf-8").splitlines()
    table = {row["path"].encode(): row for row in csv.DictReader(lines)}
    return truth, {
        factor: np.array([float(table[name][factor]) for name in cohort.names])
        for factor in {signed[1:] for signed in truth.values()}
    }


def in_words(scores, names, rows, cohort, truth, factors):
    """What the bank says of the cohort's rows: {"apart": dicts, from `apart`, "truth": dicts of AUC}.
    scores: {encoder: {level: [n, K_l]}}, `apart` takes the first. truth, factors: of `read_truth`, or empty. AUC: of
    the score for the factor being above ("-": not above) its median, both averaged over patch, slide or patient."""
    found, ours, y = {"apart": [], "truth": []}, next(iter(scores.values())), cohort.label[rows]
    for level, groups in zip(LEVELS, cohort.ids(rows).T):
        # Classes differ by patient, whatever the level of the words: patients are what is independent.
        mean, of_patient, *_ = pool(
            ours[level][rows].numpy(), np.maximum(y, 0), cohort.patient[rows]
        )
        P = len(of_patient) if y.min() >= 0 else 0
        for c, k, by in (
            apart(mean, of_patient, patient_weights(P, 1000 if P >= FEW else 0)) if P else ()
        ):
            found["apart"].append(
                {
                    "class": cohort.classes[c],
                    "level": level,
                    "attribute": names[level][k],
                    **estimate("difference", by),
                }
            )
        for k, name in [(k, name) for k, name in enumerate(names[level]) if name in truth]:
            factor = group_mean(factors[truth[name][1:]][rows, None], groups)[0][:, 0]
            high = (factor > np.median(factor)) == (truth[name][0] == "+")
            found["truth"].append(
                {"attribute": name, "level": level, "factor": truth[name]}
                | {
                    f"AUC, {encoder}": auc(
                        group_mean(s[level][rows, k, None].numpy(), groups)[0][:, 0], high
                    )
                    for encoder, s in scores.items()
                }
            )
    return found


def table(results):
    """{name: {kind: metrics}} -> the lines of a table, in percent, intervals where there are, what was left out."""
    if not results:
        return ["no held-out patient or no training patient has a label: there is nothing to probe"]
    width = max(len(f"{name} {kind}") for name, result in results.items() for kind in result) + 2
    head, notes = " " * width, []
    lines = [
        head + "".join(f"{level:>16}" for level in LEVELS),
        head + f"{'acc':>9}{'MCA':>7}" * len(LEVELS),
    ]
    for name, kind, at in [
        (name, kind, at) for name, result in results.items() for kind, at in result.items()
    ]:
        for head, end in (
            (f"{name} {kind}", ""),
            ("  95%", "_interval"),
            ("  gain, 95%", "_gain_interval"),
        ):
            cells = [
                at[level].get(score + end) for level in LEVELS for score in ("accuracy", "mca")
            ]
            texts = [
                f"{100 * c[0]:.0f}..{100 * c[1]:.0f} "
                if isinstance(c, list)
                else "-"
                if c is None
                else f"{100 * c:.1f}"
                for c in cells
            ]
            if not end or any(cells):
                lines.append(
                    head.ljust(width)
                    + "".join(map("{:>9}{:>7}".format, texts[::2], texts[1::2])).rstrip()
                )
        if "k" in at and kind != f"knn{at['k']}":
            notes.append(
                f"{kind}: there are only {at['k']} training patches with a label, so k = {at['k']}: all vote,"
                " and the commonest class is ahead"
            )
        notes.append(
            "scored: "
            + ", ".join(
                f"{at[level]['n']} {level}{'es' * (level == 'patch') or 's'}" for level in LEVELS
            )
        )
        notes += [
            f"{level}: {at[level]['left_out']} of {at[level]['n'] + at[level]['left_out']} left out, having "
            "patches of several labels"
            for level in LEVELS
            if at[level]["left_out"]
        ]
    return lines + [f"  {note}" for note in dict.fromkeys(notes)]


def html_table(rows):
    """Dicts -> a table with their keys as header, in a box that scrolls sideways; `x_interval` stands behind `x`."""

    def text(row, key):
        value, interval = row.get(key), row.get(f"{key}_interval")
        value = "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
        return value + (" ({:.2f} to {:.2f})".format(*interval) if interval else "")

    keys = [
        key
        for key in dict.fromkeys(key for row in rows for key in row)
        if not key.endswith("_interval")
    ]
    lines = ["".join(f"<th>{escape(key)}</th>" for key in keys)]
    lines += ["".join(f"<td>{escape(text(row, key))}</td>" for key in keys) for row in rows]
    return f'<div class="scroll"><table><tr>{"</tr><tr>".join(lines)}</tr></table></div>'


def curves(log):
    """Lines of log.jsonl -> for the template {"hvc_lines": SVG, a line a level, "hvc_range": what they span, ...}."""
    sections, log = (
        {},
        [
            line
            | {
                f"{kind}_{level}": at[level]["accuracy"]
                for kind, at in line.get("probe", {}).items()
                for level in LEVELS
                if at[level]["n"]
            }
            for line in log
        ],
    )
    for kind in ("hvc", "ha", "lr", "knn200", "knn20"):
        names = dict.fromkeys(name for line in log for name in line if name.split("_")[0] == kind)
        lines = [
            np.array([(line["step"], line[name]) for line in log if name in line], float)
            for name in names
        ]
        every = np.concatenate(lines or [np.zeros((1, 2))])
        low, high, sections[f"{kind}_lines"] = every.min(axis=0), every.max(axis=0), ""
        for i, line in enumerate(lines):
            xy = (line - low) / (high - low).clip(1e-12) * (326, -142) + (4, 150)
            points = " ".join(map("{:.0f},{:.0f}".format, *xy.T))
            sections[f"{kind}_lines"] += f'<polyline class="line{i}" points="{points}"/>'
        sections[f"{kind}_range"] = (
            f"{low[1]:.3g} to {high[1]:.3g}, steps {low[0]:.0f} to {high[0]:.0f}"
        )
    return sections


def thumbnail(path, size=48):
    """A patch as the encoder sees it, as the address of a small JPEG that is part of the page; empty if unreadable."""
    try:
        view = plain_view(torch.from_numpy(decode(path, size).copy())[None], size)[0].permute(
            1, 2, 0
        )
    except ValueError:
        return "data:,"
    Image.fromarray((255 * view).round().byte().numpy()).save(
        file := io.BytesIO(), "JPEG", quality=85
    )
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def maps(z, rows, cohort, most=300):
    """The first two principal components of z [n, D] of the cohort's rows -> for the template {"map_patch": SVG, ...}.
    A place is a patch, slide or patient, so many at most; hovering shows its name and its (first) patch."""
    axes, sections, names = (
        np.linalg.eigh(np.cov(z.T, bias=True))[1][:, :-3:-1],
        {},
        cohort.names.astype(str),
    )
    label = cohort.label[rows]
    for level, groups, named in zip(
        LEVELS, cohort.ids(rows).T, (names, cohort.slides, cohort.patients)
    ):
        mean, first = group_mean(z, groups)
        alike = (
            group_mean(label[:, None] == np.arange(-1, len(cohort.classes)), groups)[0].max(axis=1)
            == 1
        )
        chosen, sections[f"map_{level}"] = (
            np.linspace(0, len(mean) - 1, min(most, len(mean))).astype(int),
            "",
        )
        places = mean[chosen] @ axes
        places = 8 + (324, 184) * (places - places.min(axis=0)) / np.ptp(places, axis=0).clip(1e-9)
        for (x, y), i, one in zip(places, first[chosen], alike[chosen]):
            mark = label[i] % 7 if one and label[i] >= 0 else -1  # several labels or none: grey
            sections[f"map_{level}"] += (
                f'<g class="dot"><use href="#mark{mark}" x="{x:.0f}" y="{y:.0f}"/><g><image y="204" width="48" href="'
                f'{thumbnail(cohort.path(rows[i]))}"/><text x="56" y="232">{escape(named[groups[i]])}</text></g></g>'
            )
    return sections


def report(metrics, z, scores, names, rows, cohort, log, config):
    """report_template.html, filled in. rows: the patches to show. log: lines of log.jsonl. config: the run's."""
    gallery, probes = (
        "",
        [
            ({"probe": kind, "level": level}, at[level])
            for kind, at in metrics["probes"].items()
            for level in LEVELS
        ],
    )
    for row in rows[np.linspace(0, len(rows) - 1, min(12, len(rows))).astype(int)]:
        lines = [
            cohort.names[row].decode(),
            *(top(scores[level][row], names[level], 3) for level in LEVELS),
        ]
        text = "<br>".join(map(escape, lines))
        gallery += f'<div class="card"><img alt="" src="{thumbnail(cohort.path(row), 96)}"><p>{text}</p></div>'
    sections = {
        "title": escape(f"{config['out']}, step {metrics['step']}"),
        "gallery": gallery,
        **curves(log),
        "notes": "".join(f'<p class="note">{escape(note)}</p>' for note in metrics["notes"]),
        "results": html_table(
            [
                at
                | {
                    key: of[key]
                    for key in of
                    if key not in ("recall", "confusion") and "gain" not in key
                }
                for at, of in probes
            ]
        ),
        "gains": html_table(
            [at | {key: of[key] for key in of if "gain" in key} for at, of in probes]
        )
        if metrics["against"]
        else "<p>Name one with --against RUN, or --against start.</p>",
        "confusion": "".join(
            html_table(
                [
                    {", ".join(at.values()): name}
                    | dict(zip(cohort.classes, row))
                    | of["recall"][name]
                    for name, row in zip(cohort.classes, of.get("confusion", ()))
                ]
            )
            for at, of in probes
        ),
        "legend": "".join(
            f'<span><svg width="16" height="16"><use href="#mark{c % 7}" x="8" y="8"/></svg>'
            f"{escape(name)}</span> "
            for c, name in enumerate(cohort.classes)
        ),
        **maps(z[rows].numpy(), rows, cohort),
        "against": escape(metrics["against"] or "no other encoder"),
        "apart": html_table(metrics["apart"]),
        "truth": html_table(metrics["truth"]),
        "used": html_table([metrics["attributes_used"]]),
        "command": escape(metrics["command"]),
        "settings": html_table([{"setting": key, "value": config[key]} for key in config]),
    }
    return string.Template(
        Path(__file__).with_name("tools").joinpath("report.html").read_text()
    ).substitute(sections)


def starting_model(model, checkpoint, clip=""):
    """As `load_run`, with the tower that training started from: its CLIP's, or this one's, or, if a backbone, new."""
    config = checkpoint["config"]
    if config.get("backbone"):
        torch.manual_seed(config["seed"])  # as train.py's build_model does
        tower = backbone_tower(config["backbone"], model.tower.dim)
    else:
        tower = image_tower(
            load_clip(clip or config["clip"], config["activation"]), checkpoint["image_size"]
        )
    start = HLSS(tower, model.bank, "simclr").eval()
    start.mean, start.std = model.mean, model.std
    return start, checkpoint


def part_named(name, cohort):
    """The part of the cohort that is a patient, a slide or a patch path. Raises ValueError if there is none."""
    slides, patients = (
        np.array(cohort.slides)[cohort.slide],
        np.array(cohort.patients)[cohort.patient],
    )
    rows = np.flatnonzero((cohort.names == name.encode()) | (slides == name) | (patients == name))
    if not len(rows):
        raise ValueError(
            f"--show {name}: {cohort.root} has no such path, slide or patient; the first is called "
            f"{cohort.names[0].decode()}, {cohort.slides[0]}, {cohort.patients[0]}"
        )
    return replace(
        cohort, names=cohort.names[rows], slide=cohort.slide[rows], label=cohort.label[rows]
    )


def evaluate(args, device):
    """Embed with the run's encoder, and the one that it is held against, on all processes; the first one writes."""
    model, checkpoint = load_run(args.run)
    config, names, notes, truth = checkpoint["config"], checkpoint["attributes"], [], ({}, {})
    cohort = read_cohort(args.data or config["data"], config["val_fraction"])
    if config.get("backbone"):
        notes.append(
            "the encoder started from random weights, not from language: attribute names carry no meaning"
        )

    def embedded(model, checkpoint, cohort=cohort):
        return embed(
            model.to(device),
            cohort,
            checkpoint["read_size"],
            checkpoint["image_size"],
            workers=args.workers,
            skip=config.get("skip_unreadable", False),
        )

    for name in args.show:
        z = embedded(model, checkpoint, part_named(name, cohort)).mean(
            dim=0
        )  # its scores are the mean scores
        print(
            "\n".join(
                [
                    name,
                    *(
                        f"{level:>9}: {top(t.cpu() @ z, names[level])}"
                        for level, t in model.bank.items()
                    ),
                ]
            )
        )
    if args.show:
        return print("\n".join(notes))
    pairs, encoders = (
        sides(cohort, args.protocol),
        {f"step {checkpoint['step']}": (model, checkpoint)},
    )
    if os.path.exists(os.path.join(cohort.root, "factors.csv")):
        try:
            truth = read_truth(config["bank"], cohort)
        except (OSError, ValueError, KeyError) as error:
            notes.append(f"attributes are not held against factors.csv: {error}")
    if args.against not in ("", "start"):
        encoders[args.against] = load_run(args.against)
    elif (
        args.against or truth[0]
    ):  # where the truth is known, before and after training are told apart unasked
        try:
            encoders["start"] = starting_model(model, checkpoint, args.clip)
        except (OSError, ValueError) as error:
            if args.against:
                raise
            notes.append(f"the encoder that training started from is not here: {error}")
    for name, (_, other) in encoders.items():
        if cohort.classes and other["classes"] and other["classes"] != cohort.classes:
            differ = sorted({*other["classes"]} ^ {*cohort.classes})
            raise ValueError(
                f"{cohort.root} has the classes {cohort.classes}, {name} {other['classes']}: rename "
                f"{', '.join(differ)} in the manifest, or take its column label out"
            )
    z = {name: embedded(*encoder) for name, encoder in encoders.items()}
    if not dist.is_initialized() or dist.get_rank() == 0:
        finish(args, cohort, pairs, encoders, z, truth, notes)


def finish(args, cohort, pairs, encoders, z, truth, notes):
    """Score, print, and write the three files. encoders: {name: (model, checkpoint)}, the run's first; z: of each."""
    (step, (model, checkpoint)), *_ = encoders.items()
    config, names, predictions = checkpoint["config"], checkpoint["attributes"], []
    rows = np.concatenate([queries for _, queries in pairs]) if pairs else np.arange(len(cohort))
    scores = {
        name: {level: z[name] @ t.cpu().T for level, t in m.bank.items()}
        for name, (m, _) in encoders.items()
    }
    for name in encoders if pairs else ():
        features = {"attributes": torch.cat([*scores[name].values()], dim=1)}
        predictions.append(
            {kind: predict(kind, features.get(kind, z[name]), cohort, pairs) for kind in PROBES}
        )
        if args.prompts:
            predictions[-1]["zero-shot"] = zero_shot(
                args.prompts,
                z[name][rows],
                cohort.classes,
                args.clip or config["clip"],
                config["activation"],
                config["vocab"],
            )
    few = [
        c
        for i, c in enumerate(cohort.classes)
        if len(np.unique(cohort.patient[cohort.label == i])) == 1
    ]
    notes += [
        f"{c} has one patient: nothing shows it with that one out"
        for c in few
        if args.protocol == "lopo"
    ]
    if args.protocol == "lopo" and (
        seen := len(np.unique(cohort.patient[rows][cohort.split[rows] == 0]))
    ):
        notes.append(
            f"{seen} of the patients that are left out here are in the split train: if it was this cohort, "
            "pretraining has seen their images (no labels)"
        )
    if len(cohort.classes) == 1:
        notes.append("there is one class alone: to be right about it says nothing")
    other = predictions[1] if len(predictions) > 1 else None
    probes = assess(predictions[0], cohort, pairs, other=other) if pairs else {}
    notes += [
        f"{level}: of fewer than {FEW} patients, which is too few for an interval"
        for level in LEVELS
        if pairs
        and "accuracy" in probes["knn20"][level]
        and "accuracy_interval" not in probes["knn20"][level]
    ]
    known = {
        name: scores[name] for name, (_, other) in encoders.items() if other["attributes"] == names
    }
    words = in_words(known, names, rows, cohort, *truth)
    if pairs and not words["apart"]:
        notes.append(
            "no class is set apart: that takes patients of two classes whose patches share a label"
        )
    metrics = {
        "command": " ".join(["python", *sys.argv]),
        "step": checkpoint["step"],
        "data": cohort.root,
        "classes": cohort.classes,
        "protocol": args.protocol,
        "notes": notes,
        "against": "".join([*encoders][1:]),
        "probes": probes,
        "attributes_used": {
            level: attributes_used(z[step], t.cpu()) for level, t in model.bank.items()
        },
        **words,
    }
    run = args.run if os.path.isdir(args.run) else os.path.dirname(os.path.abspath(args.run))
    log, about, out = Path(run, "log.jsonl"), Path(run, "config.json"), args.out or run
    log = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    config = (
        json.loads(about.read_text()) if about.exists() else config
    )  # the command and the versions, too
    page = report(metrics, z[step], scores[step], names, rows, cohort, log, config)
    arrays = {
        "z": z[step].numpy(),
        "path": cohort.names,
        "label": cohort.label,
        "slide": cohort.slide,
        "patient": cohort.patient,
        "split": cohort.split,
        "classes": np.array(cohort.classes, dtype=str),
        "slides": np.array(cohort.slides),
        "patients": np.array(cohort.patients),
        "splits": np.array(SPLITS),
        **{f"scores_{level}": scores[step][level].numpy() for level in LEVELS},
        **{f"attributes_{level}": np.array(names[level]) for level in LEVELS},
    }
    os.makedirs(out, exist_ok=True)
    write_whole(
        os.path.join(out, "metrics.json"),
        lambda file: file.write(json.dumps(metrics, indent=1).encode()),
    )
    write_whole(os.path.join(out, "report.html"), lambda file: file.write(page.encode()))
    write_whole(os.path.join(out, "embeddings.npz"), lambda file: np.savez(file, **arrays))
    print(
        "\n".join(
            [
                *table({step: metrics["probes"]} if pairs else {}),
                *notes,
                f"all is in {out}/report.html",
            ]
        )
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("run", help="a run folder (its newest checkpoint is taken) or a checkpoint file")
    flag(
        "--data",
        default="",
        help="another cohort (a folder or a manifest .csv) than the one that was trained on",
    )
    flag("--out", default="", help="folder to write to (default: the run's)")
    flag(
        "--protocol",
        choices=("val", "test", "lopo"),
        default="val",
        help="probe that split with train as bank, or, "
        "if the cohort is small, leave one patient out: each with all others as bank (default: val)",
    )
    flag(
        "--against",
        default="",
        help="a run, or start (what training started from): adds the gain over it, with "
        "intervals. Default: start, where the factors behind the images are known",
    )
    flag(
        "--show",
        nargs="+",
        default=[],
        help="patients, slides or patch paths: print their top attributes and stop",
    )
    flag("--prompts", default="", help="JSON, {class: [sentences]}: adds a zero-shot probe")
    flag(
        "--clip",
        default="",
        help="the CLIP that training started from, for start and --prompts, if it was moved",
    )
    flag(
        "--workers",
        type=int,
        default=2,
        help="decoding threads a process. The device waits for data: more",
    )
    args = parser.parse_args()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        dist.init_process_group("gloo")  # nothing but finished embeddings is exchanged
    evaluate(
        args, f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
    )
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
