"""Finished numbers -> report.html, one self-contained page.

    python -m tools.report runs/demo                         draws runs/demo/report.html again
    python -m tools.report runs/demo --slides normal-01-2    with maps of this slide too
    python -m tools.report runs/demo --show high_grade-01    a patient's, slide's or patch's words

The page shows the folder's metrics.json and embeddings.npz, the run's log and settings, and
patches. Its template, report.html, draws results, training curves and confusion matrices.
"""

import argparse
import base64
import io
import json
import string
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from data import SPLITS, decode, plain_view, plural
from tools.cohort import coordinates
from tools.processes import user_errors
from tools.runs import write_whole

SHARES = ("accuracy", "mca", "accuracy_gain", "mca_gain", "probability")  # shown in percent
DRAWN = ("recall", "confusion")  # by report.html
PANEL = 216  # pixels, the longer side of a slide's map
ACROSS = 5  # maps in a line


def read_results(out, needed=("metrics.json", "embeddings.npz")):
    """metrics.json as a dict, embeddings.npz as {name: array}. Raises FileNotFoundError."""
    for name in needed:
        if not Path(out, name).exists():
            raise FileNotFoundError(f"{out} has no {name}: run python evaluate.py RUN --out {out}")
    path = Path(out, "metrics.json")
    metrics = json.loads(path.read_text("utf-8")) if path.exists() else {}
    with np.load(Path(out, "embeddings.npz")) as file:
        return metrics, dict(file)


def write_arrays(path, cohort, z, scores, names, root="", rows=(), votes=None):
    """Writes an .npz of all patches: path, label, split, the group of each level, z [n, D], and
    each level's scores [n, K_l] and attributes [K_l]; x and y, if the manifest of `root` has them;
    knn200 [n, C], the votes of kNN on these rows, nan elsewhere."""
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
    places = coordinates(root) if root else {}
    if places:
        xy = [places.get(name, (np.nan, np.nan)) for name in arrays["path"].tolist()]
        arrays["x"], arrays["y"] = np.array(xy).T
    if votes is not None:
        arrays["knn200"] = np.full((len(cohort), votes.shape[1]), np.nan, np.float32)
        arrays["knn200"][rows] = votes
    write_whole(path, lambda file: np.savez(file, **arrays))


def read_log(path):
    """The lines of a log.jsonl as dicts, without one that a killed run left unfinished."""
    lines = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def top(scores, names, number=5):
    """The attributes that score highest, as one line. scores: [K] array. names: K strings."""
    order = np.argsort(-scores, kind="stable")[:number]
    return ", ".join(f"{names[k]} {scores[k]:.3f}" for k in order)


def percent(value):
    """A cell of a table: a share in percent, an interval as low..high, or - for neither.

    A nonzero end is never printed as 0: what matters is on which side of 0 the interval lies.
    """
    if not isinstance(value, list):
        return "-" if value is None else f"{100 * value:.1f}"
    ends = [100 * round(end, 6) or 0 for end in value]  # without a minus before 0
    low, high = [f"{end:.0f}" if abs(end) > 0.5 or end == 0 else f"{end:.1g}" for end in ends]
    return f"{low}..{high} "


def plain(value):
    """A table cell that is not a share: intervals to two digits, other numbers to three."""
    if isinstance(value, list):
        return "{:.2g} to {:.2g}".format(*value)
    if isinstance(value, float):
        return f"{value:.3g}"
    return "-" if value is None else str(value)


def table(results):
    """The lines of a table in percent, for a terminal. results: {encoder: as in assess()}."""
    rows = [(name, kind, probes[kind]) for name, probes in results.items() for kind in probes]
    if not rows:
        return ["no held-out patient or no training patient has a label: there is nothing to probe"]
    width = 3 + max(len(name + kind) for name, kind, _ in rows)
    levels = rows[0][2]["levels"]
    lines = [" " * width + "".join(f"{level:>16}" for level in levels)]
    lines.append(" " * width + f"{'acc':>9}{'MCA':>7}" * len(levels))
    notes = {}  # used as an ordered set
    for name, kind, probe in rows:
        levels = probe["levels"]
        titles = {"": f"{name} {kind}", "_interval": "  95%"}
        titles |= {"_gain": "  gain", "_gain_interval": "  gain, 95%"}
        for end, title in titles.items():
            cells = ""
            for of in levels.values():
                cells += f"{percent(of.get('accuracy' + end)):>9}{percent(of.get('mca' + end)):>7}"
            if end == "" or cells.strip(" -"):
                lines.append((title.ljust(width) + cells).rstrip())
        notes["scored: " + ", ".join(f"{of['n']} {plural(at)}" for at, of in levels.items())] = 1
        for level, of in levels.items():
            if of["left_out"]:
                total = of["n"] + of["left_out"]
                notes[f"{level}: {of['left_out']} of {total} left out: mixed labels"] = 1
        if "k" in probe and kind != f"knn{probe['k']}":
            notes[f"{kind}: only {probe['k']} labelled training patches, and all of them vote"] = 1
    return lines + [f"  {note}" for note in notes]


def html_table(rows):
    """A table of dicts, with their keys as its header; `x_interval` follows `x` in brackets."""
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


def results(metrics):
    """Tables: every probe's numbers at every level, and its prediction for every patient."""
    rows, patients = [], []
    for kind, probe in metrics["probes"].items():
        patients += [{"probe": kind, **row} for row in probe.get("patients", [])]
        for level, numbers in probe["levels"].items():
            kept = {key: value for key, value in numbers.items() if key not in DRAWN}
            rows.append({"probe": kind, "level": level, **kept})
    return {"results": html_table(rows), "patients": html_table(patients)}


def thumbnail(metrics, data, row, size):
    """A patch as the encoder sees it, uint8 [size, size, 3]; grey if its file cannot be read."""
    try:
        pixels = decode(Path(metrics["root"], data["path"][row]), size)
    except ValueError:
        return np.full((size, size, 3), 160, np.uint8)
    view = plain_view(torch.from_numpy(pixels.copy())[None], size)[0].permute(1, 2, 0)
    return (255 * view).round().byte().numpy()


def address(pixels):
    """An image as a data URL. pixels: uint8, [height, width, 3], or 2 for grey and opacity."""
    file = io.BytesIO()
    kind = "jpeg" if pixels.shape[2] == 3 else "png"
    Image.fromarray(pixels).save(file, kind, quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def slides(metrics, data, wanted):
    """Drawings of the two slides of each class with the most held-out patches, and of those wanted.

    wanted: names of slides, or of groups above or below them. Raises ValueError for an unknown one.
    """
    groups = np.stack([data[plural(at)][data[at]] for at in metrics["levels"][1:]])  # [L - 1, n]
    slide = groups[-2:][0]  # below the coarsest level, if there is one
    placed = np.isfinite(data["x"] + data["y"]) if "x" in data else np.zeros(len(slide), bool)
    rows = [row for row in metrics["rows"] if placed[row]]
    chosen = []
    for c in np.unique(data["label"][rows]):
        names, counts = np.unique(slide[rows][data["label"][rows] == c], return_counts=True)
        chosen += names[np.argsort(-counts, kind="stable")[:2]].tolist()
    drawings = ""
    for name in dict.fromkeys([*chosen, *wanted]):
        members = np.flatnonzero(placed & (groups == name).any(axis=0))
        if not len(members):
            raise ValueError(f"--slides {name}: no slide with coordinates has this name")
        drawings += draw_slide(metrics, data, name, members)
    return drawings


def slide_maps(metrics, data, members):
    """Yields each map of a slide: (title, value of each patch, lowest, highest, value -> text).

    A value that is nan or below the lowest is unknown.
    """
    classes, level = metrics["classes"], metrics["levels"][0]
    if "knn200" in data:
        for name, share in zip(classes, data["knn200"][members].T):
            yield f"probability of {name}", share, 0, 1, "{:.0%}".format
    if classes:
        yield "label", data["label"][members], 0, len(classes) - 1, [*classes, "-"].__getitem__
    scores = data[f"scores_{level}"][members]
    for k in np.argsort(-scores.std(axis=0), kind="stable")[:3]:
        low, high = scores[:, k].min(), scores[:, k].max()
        yield data[f"attributes_{level}"][k], scores[:, k], low, high, "{:.3f}".format


def grid(xy):
    """The column and row of each patch, [2, n] integers from 0, from its coordinates [2, n].

    The step is the commonest distance between neighbouring columns or rows.
    """
    gaps = np.concatenate([np.diff(np.unique(axis)) for axis in xy])
    steps, counts = np.unique([float(f"{gap:.4g}") for gap in gaps] or [1], return_counts=True)
    step = max(steps[counts.argmax()], np.ptp(xy, axis=1).max() / (PANEL - 1))  # PANEL at most
    return ((xy - xy.min(axis=1, keepdims=True)) / step).round().astype(int)


def draw_slide(metrics, data, name, members):
    """A slide: its patches where they lie, then each of slide_maps() on the same grid."""
    column, row = grid(np.stack([data["x"], data["y"]])[:, members])
    columns, rows = column.max() + 1, row.max() + 1
    side = PANEL // max(columns, rows)  # of a cell, in pixels
    width, height = side * columns, side * rows
    mosaic = np.full((rows, side, columns, side, 3), 160, np.uint8)
    for r, c, patch in zip(row, column, members):
        mosaic[r, :, c] = thumbnail(metrics, data, patch, side)
    panels = [("patches", mosaic.reshape(height, width, 3), "", "", data["path"][members])]
    for title, values, low, high, text in slide_maps(metrics, data, members):
        share = np.nan_to_num((values - low) / max(high - low, 1e-9), nan=-1)
        pixels = np.zeros((rows, columns, 2), np.uint8)  # grey, which the page colours, and opacity
        pixels[row, column] = np.stack([255 * share.clip(0), 255 * (share >= 0)], axis=1)
        panels.append((title, pixels, text(low), text(high), map(text, values)))
    svg = squares = ""
    for i, (title, pixels, low, high, _) in enumerate(panels):
        x, y = i % ACROSS * (PANEL + 12), i // ACROSS * (height + 64)
        squares += f"M{x} {y + 18}h{side}v{side}h-{side}z"
        svg += f'<g transform="translate({x} {y})"><text y="12">{escape(title[:36])}</text>'
        svg += f'<image y="18" width="{width}" height="{height}" href="{address(pixels)}"/>'
        svg += f'<use href="#scale" y="{height + 24}"/>' if low else ""
        svg += f'<text y="{height + 46}">{escape(low)}</text>'
        svg += f'<text y="{height + 46}" x="{PANEL}">{escape(high)}</text></g>'
    # A patch has a square in each panel: pointing at one outlines them all.
    svg += f'<defs><path id="at{members[0]}" d="{squares}"/></defs>'
    for c, r, *words in zip(column, row, *(panel[-1] for panel in panels)):
        svg += f'<use href="#at{members[0]}" x="{side * c}" y="{side * r}">'
        svg += f"<title>{escape(', '.join(words))}</title></use>"
    size = f'width="{ACROSS * (PANEL + 12)}" height="{y + height + 64}"'
    caption = f"<figcaption>{escape(name)}: {len(members)} patches</figcaption>"
    return f'<figure class="scroll slide">{caption}<svg {size}>{svg}</svg></figure>'


def gallery(metrics, data, levels, most=12):
    """Some patches, and their top attributes at each level."""
    rows = np.array(metrics["rows"])
    cards = ""
    for row in rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).astype(int)]:
        words = [top(data[f"scores_{at}"][row], data[f"attributes_{at}"], 3) for at in levels]
        image = address(thumbnail(metrics, data, row, 96))
        text = "<br>".join(escape(line) for line in [data["path"][row], *words])
        cards += f'<div class="card"><img alt="" src="{image}"><p>{text}</p></div>'
    return cards


def draw(out, wanted=()):
    """Draws the page of a folder that evaluate.py wrote to; returns its path. wanted: slides."""
    metrics, data = read_results(out)
    path = Path(metrics["run"], "config.json")
    config = json.loads(path.read_text("utf-8")) if path.exists() else {}
    config = {"evaluation": metrics["command"]} | config  # its command is that of training
    maps = slides(metrics, data, wanted)
    log = read_log(Path(metrics["run"], "log.jsonl"))
    shown = metrics | {"rows": len(metrics["rows"]), "log": log, "config": config}
    sections = {
        "title": escape(f"{metrics['run']}, step {metrics['step']}"),
        "notes": "".join(f'<p class="note">{escape(note)}</p>' for note in metrics["notes"]),
        "json": json.dumps(shown).replace("<", "\\u003c"),
        **results(metrics),
        "slides": maps,
        "gallery": "" if maps else gallery(metrics, data, metrics["levels"]),
        "class_attributes": html_table(metrics["class_attributes"]),
        "used": html_table([metrics["attributes_used"]]),
        "settings": html_table([{"setting": key, "value": config[key]} for key in config]),
    }
    template = string.Template(Path(__file__).with_name("report.html").read_text("utf-8"))
    page = template.substitute(sections).encode()
    write_whole(Path(out, "report.html"), lambda file: file.write(page))
    return Path(out, "report.html")


def show(out, wanted):
    """Prints the top attributes of every patient, slide and patch with a wanted name, in turn."""
    metrics, data = read_results(out, needed=["embeddings.npz"])
    levels = [key.removeprefix("scores_") for key in data if key.startswith("scores_")]
    names = {levels[0]: data["path"]} | {at: data[plural(at)][data[at]] for at in levels[1:]}
    if not len(data[f"attributes_{levels[0]}"]):
        return print("this run has no words: it was trained without a bank")
    for name in wanted:
        places = [level for level in names if (names[level] == name).any()]
        if not places:
            known = ", ".join(f"{level} {names[level][0]}" for level in names)
            raise ValueError(f"--show {name}: {out} has no such {' or '.join(names)}; try {known}")
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
    parser.add_argument("--slides", nargs="+", default=(), metavar="NAME", help="map these too")
    parser.add_argument("--show", nargs="+", metavar="NAME", help=words)
    args = parser.parse_args()
    with user_errors():
        if args.show:
            return show(args.run, args.show)
        print(f"the page is {draw(args.run, args.slides)}")


if __name__ == "__main__":
    main()
