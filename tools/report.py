"""Finished numbers -> report.html, one page that needs nothing but itself.

    python -m tools.report runs/demo                         draws runs/demo/report.html again
    python -m tools.report runs/demo --show high_grade-01    a patient's, slide's or patch's words

It shows metrics.json and embeddings.npz of the folder, the run's log.jsonl and config.json, and
patches. report.html draws the picture of the results and the confusion matrices, the rest is here.
"""

import argparse
import base64
import io
import json
import string
from collections import defaultdict
from contextlib import suppress
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import SPLITS, decode, plain_view, plural
from tools.processes import user_errors
from tools.runs import write_whole

SHARES = ("accuracy", "mca", "accuracy_gain", "mca_gain", "probability")  # shown in percent
DRAWN = ("recall", "confusion")  # by report.html
UNDRAWN = ("step", "probe", "images_per_s", "memory_mib", "seconds_left")  # of log.jsonl
MARKS = 7  # of report.html, for classes on the maps; more classes share them


def read_results(out, needed=("metrics.json", "embeddings.npz")):
    """metrics.json as a dict, embeddings.npz as {name: array}; FileNotFoundError without one."""
    for name in needed:
        if not Path(out, name).exists():
            raise FileNotFoundError(f"{out} has no {name}: run python evaluate.py RUN --out {out}")
    path = Path(out, "metrics.json")
    metrics = json.loads(path.read_text("utf-8")) if path.exists() else {}
    with np.load(Path(out, "embeddings.npz")) as file:
        return metrics, dict(file)


def write_arrays(path, cohort, z, scores, names, against_scores=None):
    """Writes an .npz of all patches: path, label, split, the group of each level, z [n, D], and of
    each level scores [n, K_l] and attributes [K_l]."""
    arrays = {"path": np.array([name.decode() for name in cohort.names]), "z": z.numpy()}
    arrays |= {"label": cohort.label, "split": cohort.split}
    arrays |= {"splits": np.array(SPLITS), "classes": np.array(cohort.classes, str)}
    ids = cohort.ids(np.arange(len(cohort)))
    for level, group_names, column in zip(cohort.levels[1:], cohort.group_names, ids.T[1:]):
        arrays[level] = column.astype(np.int32)
        arrays[plural(level)] = np.array(group_names)
    for level in scores:
        arrays[f"scores_{level}"] = scores[level].numpy()
        arrays[f"attributes_{level}"] = np.array(names[level], str)
        if against_scores:
            arrays[f"against_scores_{level}"] = against_scores[level].numpy()
    write_whole(path, lambda file: np.savez(file, **arrays))


def read_log(path):
    """The lines of a log.jsonl as dicts, without one that a killed run left unfinished."""
    log = []
    for line in path.read_text("utf-8").splitlines() if path.exists() else []:
        with suppress(ValueError):
            log.append(json.loads(line))
    return log


def top(scores, names, number=5):
    """The attributes that score highest, as one line. scores: [K] array. names: K strings."""
    order = np.argsort(-scores, kind="stable")[:number]
    return ", ".join(f"{names[k]} {scores[k]:.3f}" for k in order)


def percent(value):
    """A cell of a table: a share in percent, an interval as low..high, or - for neither.

    An end that is not 0 never looks like 0: on which side of it an interval lies is what is read.
    """
    if not isinstance(value, list):
        return "-" if value is None else f"{100 * value:.1f}"
    ends = [100 * round(end, 6) or 0 for end in value]  # without a minus before 0
    low, high = [f"{end:.0f}" if abs(end) > 0.5 or end == 0 else f"{end:.1g}" for end in ends]
    return f"{low}..{high} "


def plain(value):
    """A cell of a table that is no share: two digits of an interval, three of another number."""
    if isinstance(value, list):
        return "{:.2g} to {:.2g}".format(*value)
    if isinstance(value, float):
        return f"{value:.3g}"
    return "-" if value is None else str(value)


def table(results):
    """The lines of a table in percent, for a terminal. results: {encoder: as of assess()}."""
    if not any(results.values()):
        return ["no held-out patient or no training patient has a label: there is nothing to probe"]
    rows = [
        (f"{name} {kind}", of) for name, probes in results.items() for kind, of in probes.items()
    ]
    width = 2 + max(len(head) for head, _ in rows)
    levels = rows[0][1]["levels"]
    lines = [" " * width + "".join(f"{level:>16}" for level in levels)]
    lines.append(" " * width + f"{'acc':>9}{'MCA':>7}" * len(levels))
    notes = {}  # as a set that keeps its order
    for head, probe in rows:
        metrics = probe["levels"]
        gains = {"_gain": "  gain", "_gain_interval": "  gain, 95%"}
        for end, title in ({"": head, "_interval": "  95%"} | gains).items():
            if end == "" or any(f"accuracy{end}" in of for of in metrics.values()):
                cells = ""
                for of in metrics.values():
                    cells += (
                        f"{percent(of.get(f'accuracy{end}')):>9}{percent(of.get(f'mca{end}')):>7}"
                    )
                lines.append((title.ljust(width) + cells).rstrip())
        notes["scored: " + ", ".join(f"{of['n']} {plural(at)}" for at, of in metrics.items())] = 1
        for level, of in metrics.items():
            if of["left_out"]:
                total = of["n"] + of["left_out"]
                notes[f"{level}: {of['left_out']} of {total} left out: their labels differ"] = 1
        kind = head.rpartition(" ")[2]
        if "k" in probe and kind != f"knn{probe['k']}":
            notes[f"{kind}: only {probe['k']} labelled training patches, and all of them vote"] = 1
    return lines + [f"  {note}" for note in notes]


def html_table(rows):
    """A table of dicts, their keys as its header; `x_interval` stands in brackets behind `x`."""
    if not any(rows):
        return ""
    keys = dict.fromkeys(key for row in rows for key in row if not key.endswith("_interval"))
    lines = ["".join(f"<th>{escape(key)}</th>" for key in keys)]
    for row in rows:
        line = ""
        for key in keys:
            cell = percent if key in SHARES else plain
            text = cell(row.get(key))
            if f"{key}_interval" in row:
                text += f" ({cell(row[f'{key}_interval']).strip()})"
            line += f"<td>{escape(text)}</td>"
        lines.append(line)
    return f'<div class="scroll"><table><tr>{"</tr><tr>".join(lines)}</tr></table></div>'


def figure(caption, height, svg):
    """A drawing of 340 pixels' width under its caption, in a box that scrolls sideways."""
    head = f'<figure class="scroll"><figcaption>{escape(caption)}</figcaption>'
    return f'{head}<svg width="340" height="{height}" role="img">{svg}</svg></figure>'


def results(metrics):
    """All numbers of all probes at all levels, and what each probe says of each patient: tables."""
    rows, patients = [], []
    for kind, probe in metrics["probes"].items():
        patients += [{"probe": kind, **row} for row in probe.get("patients", [])]
        for level, numbers in probe["levels"].items():
            kept = {key: value for key, value in numbers.items() if key not in DRAWN}
            rows.append({"probe": kind, "level": level, **kept})
    return {"results": html_table(rows), "patients": html_table(patients)}


def curves(log, levels):
    """What was logged over the steps of training: a drawing for each term, a line a level."""
    points = defaultdict(lambda: defaultdict(list))  # {"hvc": {"slide": [(step, value), ...]}}
    for line in log:
        for name in [name for name in line if name not in UNDRAWN]:
            term, _, level = name.rpartition("_")
            if level not in levels:
                term, level = name, ""
            points[term][level].append((line["step"], line[name]))
        for kind, probe in line.get("probe", {}).items():
            for level, numbers in probe["levels"].items():
                if numbers["n"]:
                    point = (line["step"], 100 * numbers["accuracy"])
                    points[f"accuracy of {kind}, percent"][level].append(point)
    drawings = ""
    for term, lines in points.items():
        every = np.concatenate(list(lines.values()))
        low, high = every.min(axis=0), every.max(axis=0)  # step, value
        svg = '<path class="axis" d="M4 8V150H330"/>'
        for level, line in lines.items():
            colour = levels.index(level) if level in levels else 0
            xy = (np.array(line) - low) / (high - low).clip(1e-12) * (326, -142) + (4, 150)
            text = " ".join(f"{x:.0f},{y:.0f}" for x, y in xy)
            svg += f'<polyline class="line{colour}" points="{text}"/>'
        span = f"{low[1]:.3g} to {high[1]:.3g}, steps {low[0]:.0f} to {high[0]:.0f}"
        drawings += figure(f"{term}: {span}", 154, svg)
    return drawings


def thumbnail(metrics, data, row, size):
    """A patch as the encoder sees it, as the address of a small JPEG; empty if unreadable."""
    path = Path(metrics["root"], data["path"][row])
    try:
        pixels = torch.from_numpy(decode(path, size).copy())[None]
    except ValueError:
        return "data:,"
    view = plain_view(pixels, size)[0].permute(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray((255 * view).round().byte().numpy()).save(file, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def maps(metrics, data, levels, most=300):
    """The first two principal components of z: a map for each level, of so many marks at most.

    A mark is the mean of a place's z, in the colour of its class, or grey without one class of its
    own. Hovering shows its name and its first patch.
    """
    rows = metrics["rows"]
    z, label = data["z"][rows], data["label"][rows]
    axes = np.linalg.eigh(np.cov(z.T, bias=True))[1][:, :-3:-1]
    drawings = ""
    for level in levels:
        finest = level == levels[0]
        groups = rows if finest else data[level][rows]
        names = data["path"] if finest else data[plural(level)]
        places = np.unique(groups)
        shown = places[np.linspace(0, len(places) - 1, min(most, len(places))).astype(int)]
        members = [np.flatnonzero(groups == place) for place in shown]
        xy = np.stack([z[member].mean(axis=0, dtype=float) for member in members]) @ axes
        xy = 8 + (324, 184) * (xy - xy.min(axis=0)) / np.ptp(xy, axis=0).clip(1e-9)
        svg = ""
        for (x, y), place, member in zip(xy, shown, members):
            c = set(label[member].tolist())
            mark = c.pop() % MARKS if len(c) == 1 and min(c) >= 0 else -1
            image = thumbnail(metrics, data, rows[member[0]], 48)
            svg += f'<g class="dot"><use href="#mark{mark}" x="{x:.0f}" y="{y:.0f}"/>'
            svg += f'<g><image y="204" width="48" href="{image}"/>'
            svg += f'<text x="56" y="232">{escape(names[place])}</text></g></g>'
        drawings += figure(plural(level).capitalize(), 256, svg)
    return drawings


def gallery(metrics, data, levels, most=12):
    """Some patches, and the attributes of each level that they score highest in."""
    rows = np.array(metrics["rows"])
    cards = ""
    for row in rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)]:
        words = [top(data[f"scores_{at}"][row], data[f"attributes_{at}"], 3) for at in levels]
        image = thumbnail(metrics, data, row, 96)
        text = "<br>".join(escape(line) for line in [data["path"][row], *words])
        cards += f'<div class="card"><img alt="" src="{image}"><p>{text}</p></div>'
    return cards


def draw(out):
    """Draw the page of a folder that evaluate.py wrote to; returns the page's path."""
    metrics, data = read_results(out)
    levels = metrics["levels"]
    path = Path(metrics["run"], "config.json")
    config = json.loads(path.read_text("utf-8")) if path.exists() else {}
    config = {"evaluation": metrics["command"]} | config  # its command is that of training
    sections = {
        "title": escape(f"{metrics['run']}, step {metrics['step']}"),
        "notes": "".join(f'<p class="note">{escape(note)}</p>' for note in metrics["notes"]),
        "json": json.dumps(metrics | {"rows": len(metrics["rows"])}).replace("<", "\\u003c"),
        **results(metrics),
        "curves": curves(read_log(Path(metrics["run"], "log.jsonl")), levels),
        "maps": maps(metrics, data, levels),
        "gallery": gallery(metrics, data, levels),
        "class_attributes": html_table(metrics["class_attributes"]),
        "used": html_table([metrics["attributes_used"]]),
        "truth": html_table(metrics.get("truth", [])),
        "settings": html_table([{"setting": key, "value": config[key]} for key in config]),
    }
    template = string.Template(Path(__file__).with_name("report.html").read_text("utf-8"))
    unfinished = Path(out, "report.html.part")  # the old page stays until the new one is whole
    unfinished.write_text(template.substitute(sections), "utf-8")
    return unfinished.replace(Path(out, "report.html"))


def show(out, wanted):
    """Prints the top attributes of every patient, slide and patch of a name, one after another."""
    metrics, data = read_results(out, needed=["embeddings.npz"])
    levels = [key.removeprefix("scores_") for key in data if key.startswith("scores_")]
    names = {levels[0]: data["path"]} | {at: data[plural(at)][data[at]] for at in levels[1:]}
    if not len(data[f"attributes_{levels[0]}"]):
        print("this run has no words: it was trained without a bank")
        return
    for name in wanted:
        places = [level for level in names if (names[level] == name).any()]
        if not places:
            known = ", ".join(f"{level} {names[level][0]}" for level in names)
            raise ValueError(f"--show {name}: {out} has no such {', '.join(names)}; try {known}")
        for place in places:
            print(f"{place} {name}")
            for level in names:
                scores = data[f"scores_{level}"][names[place] == name].mean(axis=0, dtype=float)
                print(f"{level:>9}: {top(scores, data[f'attributes_{level}'])}")
    for note in metrics.get("notes", []):
        print(f"note: {note}")


def main():
    parser = argparse.ArgumentParser(description="Draw a run's report.html again, or show words.")
    parser.add_argument("run", help="a folder that evaluate.py wrote to")
    words = "print the top attributes of these patients, slides or paths instead"
    parser.add_argument("--show", nargs="+", metavar="NAME", help=words)
    args = parser.parse_args()
    with user_errors():
        if args.show:
            return show(args.run, args.show)
        print(f"the page is {draw(args.run)}")


if __name__ == "__main__":
    main()
