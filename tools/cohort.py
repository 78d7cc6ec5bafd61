"""The manifest of a cohort: make it, check it, look at it.

    python -m tools.cohort index ROOT --pattern '{label}/{patient}/{slide}/*.png'
    python -m tools.cohort opensrh ROOT      make it from OpenSRH's own JSON
    python -m tools.cohort check ROOT        decode every patch, say which cannot be used, and why
    python -m tools.cohort show ROOT         draw a patient's patches and their views

The first two write ROOT/manifest.csv, which is all that training reads.
"""

import argparse
import csv
import json
import os
import re
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

import data
from tools.processes import user_errors

TILES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".jp2")

# --------------------------------------------------------------------------------- write a manifest


def write_manifest(path, cohort, rows, with_split):
    """Writes the manifest of some rows of a cohort, completely or not at all.

    Outside the cohort's folder it gets a column root, which names that folder.
    """
    columns = ["path", *reversed(cohort.levels[1:])]
    root = os.path.abspath(cohort.root)
    if cohort.classes:
        columns.append("label")
    if with_split:
        columns.append("split")
    if os.path.dirname(os.path.abspath(path)) != root:
        columns.append("root")
    with open(f"{path}.part", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        splits = cohort.split
        for row in rows:
            line = dict(zip(columns[1:], cohort.groups_of(row)))
            label = cohort.label[row]
            line |= {"path": cohort.name(row), "root": root}
            line["label"] = cohort.classes[label] if label >= 0 else ""
            line["split"] = data.SPLITS[splits[row]]
            writer.writerow(line)
    os.replace(f"{path}.part", path)


def path_pattern(pattern, levels=data.LEVELS):
    """'{label}/{patient}/{slide}/*.png' -> a regular expression with groups of these names.

    {name} matches within a folder or file name, and a second time only what it matched before; *
    matches there too, and ** across folders. A pattern that has groups (?P<name>...) is taken as
    the regular expression that it is. Raises ValueError unless it names the coarsest level.
    """
    expression = pattern
    if "(?P<" not in pattern:
        expression = ""
        seen = set()
        for part in re.split(r"(\{\w+\}|\*\*|\*)", pattern):
            name = part[1:-1]
            if part == "**":
                expression += ".*"
            elif part == "*":
                expression += "[^/]*"
            elif not part.startswith("{"):
                expression += re.escape(part)
            elif name in seen:
                expression += f"(?P={name})"
            else:
                expression += f"(?P<{name}>[^/]+?)"
                seen.add(name)
    try:
        compiled = re.compile(expression)
    except re.error as error:
        raise ValueError(f"--pattern '{pattern}' is no regular expression: {error}") from error
    names = set(compiled.groupindex)
    may = [*levels[-2:0:-1], "label", "split"]
    if not {levels[-1]} <= names <= {levels[-1], *may}:
        raise ValueError(
            f"--pattern '{pattern}' must name {levels[-1]}, and may name {', '.join(may)}; "
            f"it names {', '.join(compiled.groupindex) or 'nothing'}"
        )
    return compiled


def image_files(root):
    """The paths of all image files below a folder, relative to it, in order.

    Linked folders are followed. One that is reached twice, as in a circle of links, is read once.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root} is no folder")
    paths = []
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()  # os.walk goes no deeper here
            continue
        seen.add(real)
        folders.sort()
        for name in sorted(files):
            if not name.startswith(".") and name.lower().endswith(TILES):  # not macOS's ._x.jpg
                path = os.path.relpath(os.path.join(folder, name), root)
                paths.append(path.replace(os.sep, "/"))
    return paths


def index(root, pattern, label_level="", nested=False, partial=False, levels=data.LEVELS):
    """The image files below a folder -> Cohort: patient, slide, label and split are in their paths.

    Without {slide} in the pattern, a patient is one slide, which has the patient's name.
    label_level: what has one label, as "patient"; by default the patch. nested: slides of several
    patients share names (1, 2, ...) and are different slides. partial: leaves out the files that
    the pattern does not match. Raises ValueError, with examples, for such files, for nothing at
    all, for a slide under two patients, and for two labels within one slide or patient.
    """
    expression = path_pattern(pattern, levels)
    paths = image_files(root)
    if not paths:
        raise ValueError(
            f"{root}: no tile is below it ({', '.join(TILES)}); whole slides (.svs, .ndpi, .mrxs) "
            "are cut into tiles by TRIDENT, TIAToolbox or hs2p"
        )
    entries = []
    others = []
    for path in paths:
        match = expression.fullmatch(path)
        if match is None:
            others.append(path)
            continue
        found = match.groupdict("")
        groups = []  # coarse to fine
        for level in reversed(levels[1:]):
            groups.append(found[level] if level in found else groups[-1])
        if nested:
            groups = ["/".join(groups[: i + 1]) for i in range(len(groups))]
        entries.append((path, path, groups, found.get("label", ""), found.get("split", ""), ""))
    if not entries or (others and not partial):
        examples = "".join(f"\n    {path}" for path in others[:3])
        remedy = ", or leave those out with --partial" if entries else ""
        raise ValueError(
            f"{root}: '{pattern}' matches {len(entries)} image files and not {len(others)} others"
            f"{examples}\nMend the pattern{remedy}"
        )
    if others:
        print(f"left out: {len(others)} image files that do not match, as {others[0]}")
    cohort = data.build_cohort(root, entries, levels)
    check_labels(cohort, label_level)
    return cohort


def check_labels(cohort, level):
    """Raises ValueError, with examples, where one patient or one slide has two labels."""
    if level not in cohort.levels[1:]:
        return
    column = cohort.levels.index(level)
    groups = cohort.ids(np.arange(len(cohort)))[:, column]  # never decreasing
    mixed = (np.diff(groups) == 0) & (np.diff(cohort.label) != 0)
    rows = np.flatnonzero(mixed)[:3]
    if len(rows):
        examples = [f"{cohort.name(row)} and {cohort.name(row + 1)}" for row in rows]
        raise ValueError(f"{cohort.root}: one {level} has two labels: {'; '.join(examples)}")


def doubts(cohort):
    """Why a pattern has probably not found the patients, as a message; "" for no doubt."""
    counts = np.bincount(cohort.patient)
    if len(counts) < len(cohort.classes):
        people = data.plural(cohort.levels[-1])
        return f"fewer {people} ({len(counts)}) than classes ({len(cohort.classes)})"
    if 2 * counts.max() > len(cohort):
        name = cohort.group_names[-1][counts.argmax()]
        return f"{cohort.levels[-1]} {name} has {counts.max()} of the {len(cohort)} patches"
    return ""


def opensrh(root):
    """OpenSRH (Jiang et al. 2022) as released -> Cohort, with its split.

    Tumour patches of tumour patients, normal patches of normal patients. Raises ValueError for
    other content than was released.
    """
    meta = os.path.join(root, "meta", "opensrh.json")
    split_file = os.path.join(root, "meta", "train_val_split.json")
    entries = []
    try:
        with open(meta, encoding="utf-8") as file:
            patients = json.load(file)
        with open(split_file, encoding="utf-8") as file:
            splits = json.load(file)
        split_of = {patient: split for split, names in splits.items() for patient in names}
        for patient, facts in patients.items():
            label = facts["class"]
            kind = "normal_patches" if label == "normal" else "tumor_patches"
            for slide, patches in facts["slides"].items():
                name = f"{patient}/{slide}"  # slides of all patients are called 1, 2, ...
                for path in patches[kind]:
                    where = f"{meta}, {patient}"
                    entries.append((where, path, (patient, name), label, split_of[patient], ""))
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{meta} and {split_file} are not OpenSRH's ({type(error).__name__} {error})"
        ) from error
    return data.build_cohort(root, entries)


# ----------------------------------------------------------------------------------- check and show


def summary(cohort):
    """What a person wants to see of a cohort before training on it, as lines."""
    lines = [f"{cohort}, {len(cohort.classes)} classes"]
    pairs = zip(cohort.levels, cohort.levels[1:], cohort.starts)
    for level, group, starts in reversed(list(pairs)):
        counts = np.diff(starts)
        counts = counts[counts > 0]
        spread = f"{counts.min()} to {counts.max()}, median {np.median(counts):.0f}"
        lines.append(f"{data.plural(level)} a {group}: {spread}")
    counts = Counter(cohort.label.tolist())
    by_class = [f"{name} {counts[c]}" for c, name in enumerate(cohort.classes)]
    if counts[-1]:
        by_class.append(f"without {counts[-1]}")
    lines.append("patches by class: " + ", ".join(by_class))
    for i, split in enumerate(data.SPLITS):
        there = cohort.split == i
        line = f"patients in {split}: {len(np.unique(cohort.patient[there]))}"
        for c, name in enumerate(cohort.classes):
            line += f", {name} {len(np.unique(cohort.patient[there & (cohort.label == c)]))}"
        lines.append(line)
    return lines


def belonging(cohort, row):
    """What a patch belongs to: 'patient amy, slide 1, label tumour'."""
    pairs = zip(reversed(cohort.levels), cohort.groups_of(row))
    words = [f"{level} {name}" for level, name in pairs]
    if cohort.label[row] >= 0:
        words.append(f"label {cohort.classes[cohort.label[row]]}")
    return ", ".join(words)


def look(path):
    """The shape of a patch, or what is wrong with it, as "truncated: " and the reason."""
    if not os.path.exists(path):
        return "missing: no such file"
    try:
        pixels = data.decode(path)
    except ValueError as error:
        reason = str(error.__cause__).replace(f" {path!r}", "")
        return f"{'truncated' if 'truncated' in reason else 'unreadable'}: {reason}"
    # Glass varies by its noise alone. SRH uses a small part of its 65,536 levels: only what is flat
    # is refused.
    least = 2.5 if pixels.dtype == np.uint8 else 64
    spread = pixels.std(axis=(1, 2)).max()
    if spread < least:
        return f"constant: standard deviation {spread:.1f}, less than {least}"
    return pixels.shape


def check(cohort, workers=2):
    """Decodes every patch. Returns {row: what is wrong with it} for those that cannot be used."""
    paths = [cohort.path(row) for row in range(len(cohort))]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        looks = tqdm(pool.map(look, paths), "check", len(paths), unit="patch", leave=False)
        results = list(looks)
    shapes = Counter(result for result in results if isinstance(result, tuple))
    if len(shapes) > 1:
        print(
            f"remark: {len(shapes)} sizes (channels, height, width), mostly", shapes.most_common(1)
        )
    return {row: result for row, result in enumerate(results) if isinstance(result, str)}


def contact_sheet(cohort, augmentation, views=4, seed=0, size=160):
    """A Pillow image: two slides of a patient, two patches of each, and views beside each patch."""
    # Pixels: a column for the patch as it is, one for each view.
    counts = [2] * (len(cohort.levels) - 1)
    rows = data.hierarchical_batch(cohort, 1, seed, 1, counts).reshape(-1)
    _, patches = next(data.load_batches(cohort, [rows], 2 * size))
    kind = data.AUGMENTATIONS[augmentation]
    parameters = data.view_parameters(kind, seed, 1, range(len(rows)), views)
    drawn = data.make_views(patches, parameters, size).unflatten(0, (len(rows), views))
    plain = data.plain_view(patches, size)[:, None]
    sheet = torch.cat([plain, drawn], dim=1)  # [R, 1 + V, 3, H, W]

    # One image: room for a line of text above each, then rows and columns side by side.
    sheet = F.pad(sheet, (2, 2, 18, 2), value=1)
    sheet = sheet.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # [R H, (1 + V) W, 3]
    image = Image.fromarray(sheet.mul(255).round().byte().numpy())
    draw = ImageDraw.Draw(image)
    for i, row in enumerate(rows):
        words = f"{belonging(cohort, row)}, {cohort.name(row)}"
        draw.text((4, i * (size + 20) + 4), words, fill="black")
    return image


# ----------------------------------------------------------------------------------------- commands


CUT_REMEDY = r"""{name} ends where the rest of the pattern first fits. Where that is too early, say
how long a name is in a regular expression, as for TCGA:
    --pattern '(?P<label>[^/]+)/(?P<slide>(?P<patient>TCGA-\w{2}-\w{4})[^_]*)_.*'
If it is right as it is: --yes"""


def run_index(args):
    """`index` and `opensrh`: write ROOT/manifest.csv. Exit code 2: `index` doubts its patients."""
    path = args.out or os.path.join(args.root, "manifest.csv")
    if os.path.exists(path) and not args.overwrite:
        raise SystemExit(f"{path} is there already: --overwrite replaces it")
    doubt = ""
    if args.command == "opensrh":
        cohort = opensrh(args.root)
        with_split = True
    else:
        levels = args.levels.split(",")
        options = (args.label_level, args.nested, args.partial, levels)
        cohort = index(args.root, args.pattern, *options)
        with_split = "split" in path_pattern(args.pattern, levels).groupindex
        for row in np.unique(np.linspace(0, len(cohort) - 1, 4).astype(int)):
            print(f"{cohort.name(row)} -> {belonging(cohort, row)}")
        doubt = "" if args.yes else doubts(cohort)
    print("\n".join(summary(cohort)))
    if doubt:
        print(f"Nothing is written: {doubt}.\n{CUT_REMEDY}", file=sys.stderr)
        raise SystemExit(2)
    write_manifest(path, cohort, range(len(cohort)), with_split)
    print(f"{path} is written")


def run_check(args):
    """`check`: list what cannot be used, write a manifest without it; exit code 1 if some is."""
    cohort = data.read_cohort(args.root, args.levels.split(","))
    path = os.path.join(cohort.root, args.clean)
    if args.clean and (not path.endswith(".csv") or os.path.exists(path)):
        raise SystemExit(f"--clean {args.clean}: name a file NAME.csv that is not there yet")
    problems = check(cohort, args.workers)
    print("\n".join(summary(cohort)))
    for row, problem in problems.items():
        print(f"{cohort.name(row)}: {problem}")
    counts = Counter(problem.partition(":")[0] for problem in problems.values())
    by_kind = [f"{count} {kind}" for kind, count in counts.items()]
    print("cannot be used: " + (", ".join(by_kind) or "none"))
    if args.clean:
        good = [row for row in range(len(cohort)) if row not in problems]
        by_hash = (cohort.patient_split == data.hash_split(cohort.group_names[-1])).all()
        write_manifest(path, cohort, good, with_split=not by_hash)  # a hash needs no column
        print(f"{path} holds the other {len(good)}")
    raise SystemExit(1 if problems else 0)


def run_show(args):
    """`show`: draw views."""
    cohort = data.read_cohort(args.root, args.levels.split(","))
    contact_sheet(cohort, args.augmentation, seed=args.seed).save(args.out)
    print(f"{args.out}: each row is a patch, as it is and in four views")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, run, text, root="a cohort"):
        sub = commands.add_parser(name, help=text)
        sub.set_defaults(run=run)
        sub.add_argument("root", help=root)
        sub.add_argument("--levels", default=",".join(data.LEVELS), help="as in train.py")
        return sub.add_argument

    overwrite = "replace a manifest.csv that is there"
    folder = "the folder; manifest.csv is written there"
    flag = command("index", run_index, "write a manifest from a folder tree", folder)
    pattern = "how paths are made: '{label}/{patient}/{slide}/*.png', or a regular expression with "
    pattern += "such groups; split may be one; without slide, each patient is one slide"
    flag("--pattern", required=True, help=pattern)
    label = "what a label belongs to, as patient: two labels in one are refused"
    flag("--label-level", default="", metavar="LEVEL", help=label)
    flag("--nested", action="store_true", help="slides of different patients share names: 1, 2")
    flag("--partial", action="store_true", help="leave out images that the pattern does not match")
    yes = "write it although patients are fewer than classes, or one has over half of the patches"
    flag("--yes", action="store_true", help=yes)
    out = "write FILE.csv elsewhere, for data that is read-only; it then names the data's folder"
    flag("--out", default="", metavar="FILE.csv", help=out)
    flag("--overwrite", action="store_true", help=overwrite)
    flag = command("opensrh", run_index, "write a manifest from OpenSRH as released", folder)
    flag("--out", default="", metavar="FILE.csv", help=out)
    flag("--overwrite", action="store_true", help=overwrite)
    flag = command("check", run_check, "decode every patch; exit with 1 if some cannot be used")
    clean = "write a manifest without them, in the cohort's folder"
    flag("--clean", metavar="NAME.csv", default="", help=clean)
    flag("--workers", type=int, default=os.cpu_count(), help="decoding threads, at least 1")
    flag = command("show", run_show, "draw a patient, two slides, their patches and their views")
    flag("--out", default="views.png", help="the picture to write")
    flag("--augmentation", choices=data.AUGMENTATIONS, default="demo", help="as in train.py")
    flag("--seed", type=int, default=0, help="another seed: another patient and other views")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    with user_errors():
        main()
