"""The manifest of a cohort: make it, check it, look at it.

    python -m tools.cohort index ROOT --pattern '{label}/{patient}/{slide}/*.png'
    python -m tools.cohort opensrh ROOT      make it from OpenSRH's own JSON
    python -m tools.cohort check ROOT        decode every patch, say which cannot be used, and why
    python -m tools.cohort show ROOT         draw a patient's patches and their views

The first two write ROOT/manifest.csv, or with --out another file: all that training reads of it.
"""

import argparse
import csv
import hashlib
import json
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

import data
from tools.processes import user_errors

TILES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".jp2")


def write_manifest(path, cohort, rows, with_split):
    """Writes a manifest of these rows, complete or not at all; outside the root, it names that."""
    root = os.path.abspath(cohort.root)
    elsewhere = os.path.dirname(os.path.abspath(path)) != root
    columns = ["path", *reversed(cohort.levels[1:])]
    columns += ["label"] * bool(cohort.classes) + ["split"] * with_split + ["root"] * elsewhere
    with open(f"{path}.part", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            line = {"path": cohort.name(row), "split": data.SPLITS[cohort.split[row]], "root": root}
            writer.writerow(line | belonging(cohort, row))
    os.replace(f"{path}.part", path)


def belonging(cohort, row):
    """What a patch belongs to: {"patient": "amy", "slide": "1", "label": "tumour", or ""}."""
    label = [*cohort.classes, ""][cohort.label[row]]  # -1, for none, is the last
    return dict(zip(reversed(cohort.levels), cohort.groups_of(row)), label=label)


def words(cohort, row):
    """The same as words: "patient amy, slide 1, label tumour"."""
    return ", ".join(f"{level} {name}" for level, name in belonging(cohort, row).items() if name)


def path_pattern(pattern, levels=data.LEVELS):
    """'{label}/{patient}/{slide}/*.png' -> a regular expression with groups of these names.

    {name} matches within a folder or file name, and a second time only what it matched before; *
    matches there too, and ** across folders. A pattern that has groups (?P<name>...) is taken as
    the regular expression that it is. Raises ValueError unless it names the coarsest level.
    """
    expression = pattern
    if "(?P<" not in pattern:
        expression = ""
        for part in re.split(r"(\{\w+\}|\*\*|\*)", pattern):
            if part.startswith("{"):
                name = part[1:-1]
                again = f"(?P<{name}>" in expression
                expression += f"(?P={name})" if again else f"(?P<{name}>[^/]+?)"
            else:
                expression += {"**": ".*", "*": "[^/]*"}.get(part, re.escape(part))
    try:
        compiled = re.compile(expression)
    except re.error as error:
        raise ValueError(f"--pattern '{pattern}' is no regular expression: {error}") from error
    must, may = levels[-1], [*levels[-2:0:-1], "label", "split"]
    if not {must} <= set(compiled.groupindex) <= {must, *may}:
        raise ValueError(
            f"--pattern '{pattern}' must name {must}, and may name {', '.join(may)}; "
            f"it names {', '.join(compiled.groupindex) or 'nothing'}"
        )
    return compiled


def image_files(root):
    """The paths of all tiles below a folder, relative to it, in order.

    Linked folders are followed, and each is read once. Names with a leading dot are left out.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root} is no folder")
    paths, seen = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()  # os.walk goes no deeper here
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(TILES) and not name.startswith("."):
                paths.append(os.path.relpath(os.path.join(folder, name), root))
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
    matches = {path: expression.fullmatch(path) for path in image_files(root)}
    if not matches:
        raise ValueError(
            f"{root}: no tile is below it ({', '.join(TILES)}); whole slides (.svs, .ndpi, .mrxs) "
            "are cut into tiles by TRIDENT, TIAToolbox or hs2p"
        )
    found = {path: match.groupdict("") for path, match in matches.items() if match}
    others = [path for path in matches if path not in found]
    if not found or (others and not partial):
        examples = "".join(f"\n    {path}" for path in others[:3])
        remedy = ", or leave those out with --partial" if found else ""
        raise ValueError(
            f"{root}: '{pattern}' matches {len(found)} image files and not {len(others)} others"
            f"{examples}\nMend the pattern{remedy}"
        )
    if others:
        print(f"left out: {len(others)} image files that do not match, as {others[0]}")
    entries = []
    for path, names in found.items():
        groups = []  # coarse to fine
        for level in levels[:0:-1]:
            groups.append(names[level] if level in names else groups[-1])
        if nested:
            groups = list(accumulate(groups, "{}/{}".format))
        entries.append((path, path, groups, names.get("label", ""), names.get("split", ""), ""))
    cohort = data.build_cohort(root, entries, levels)
    check_labels(cohort, label_level)
    return cohort


def check_labels(cohort, level):
    """Raises ValueError, with examples, where one patient or one slide has two labels."""
    if level not in cohort.levels[1:]:
        return
    groups = cohort.ids(np.arange(len(cohort)))[:, cohort.levels.index(level)]  # never decreasing
    mixed = np.flatnonzero((np.diff(groups) == 0) & (np.diff(cohort.label) != 0))
    if len(mixed):
        examples = [f"{cohort.name(row)} and {cohort.name(row + 1)}" for row in mixed[:3]]
        raise ValueError(f"{cohort.root}: one {level} has two labels: {'; '.join(examples)}")


CUT_REMEDY = r"""{name} ends where the rest of the pattern first fits. Where that is too early, say
how long a name is in a regular expression, as for TCGA:
    --pattern '(?P<label>[^/]+)/(?P<slide>(?P<patient>TCGA-\w{2}-\w{4})[^_]*)_.*'
If it is right as it is: --yes"""


def check_patients(cohort):
    """Raises ValueError where a pattern has probably not found the patients."""
    counts = np.bincount(cohort.patient)
    level, name = cohort.levels[-1], cohort.group_names[-1][counts.argmax()]
    doubt = ""
    if len(counts) < len(cohort.classes):
        doubt = f"fewer {data.plural(level)} ({len(counts)}) than classes ({len(cohort.classes)})"
    elif 2 * counts.max() > len(cohort):
        doubt = f"{level} {name} has {counts.max()} of the {len(cohort)} patches"
    if doubt:
        raise ValueError(f"nothing is written: {doubt}.\n{CUT_REMEDY}")


def opensrh(root):
    """OpenSRH (Jiang et al. 2022) as released -> Cohort, with its split.

    Tumour patches of tumour patients, normal patches of normal patients. Raises ValueError for
    other content than was released.
    """
    files = [os.path.join(root, "meta", f"{name}.json") for name in ("opensrh", "train_val_split")]
    entries = []
    try:
        patients, splits = (json.load(open(path, encoding="utf-8")) for path in files)
        split_of = {patient: split for split, names in splits.items() for patient in names}
        for patient, facts in patients.items():
            label, split = facts["class"], split_of[patient]
            kind = "normal_patches" if label == "normal" else "tumor_patches"
            for slide, patches in facts["slides"].items():
                groups = (patient, f"{patient}/{slide}")  # slides of all are called 1, 2, ...
                for path in patches[kind]:
                    entries.append((f"{files[0]}, {patient}", path, groups, label, split, ""))
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{' and '.join(files)} are not OpenSRH's ({error!r})") from error
    return data.build_cohort(root, entries)


# ----------------------------------------------------------------------------------- check and show


def summary(cohort):
    """What a person wants to see of a cohort before training on it, as lines."""
    lines = [f"{cohort}, {len(cohort.classes)} classes"]
    for level, group, starts in zip(cohort.levels, cohort.levels[1:], cohort.starts):
        counts = np.diff(starts)
        spread = f"{counts.min()} to {counts.max()}, median {np.median(counts):.0f}"
        lines.append(f"{data.plural(level)} a {group}: {spread}")
    people = data.plural(cohort.levels[-1])
    parts = [(data.plural(cohort.levels[0]), cohort.patch, cohort.split >= 0)]
    for i, split in enumerate(data.SPLITS):
        parts.append((f"{people} in {split}", cohort.patient, cohort.split == i))
    for name, ids, there in parts:
        counts = [f"{len(np.unique(ids[there]))}"]
        for c, kind in [*enumerate(cohort.classes), (-1, "without a label")]:
            n = len(np.unique(ids[there & (cohort.label == c)]))
            counts += [f"{kind} {n}"] * (n > 0)
        lines.append(f"{name}: {', '.join(counts)}")
    return lines


def look(path):
    """(shape, hash of the pixels) of a patch; or a str, what is wrong: "truncated: " and so on."""
    if not os.path.exists(path):
        return "missing: no such file"
    try:
        pixels = data.decode(path)
    except ValueError as error:
        reason = str(error.__cause__).replace(f" {path!r}", "")
        return f"{'truncated' if 'truncated' in reason else 'unreadable'}: {reason}"
    # Glass varies by its noise alone. SRH uses few of its 65,536 levels: only the flat is refused.
    least = 2.5 if pixels.dtype == np.uint8 else 64
    spread = pixels.std(axis=(1, 2)).max()
    if spread < least:
        return f"constant: standard deviation {spread:.1f}, less than {least}"
    return pixels.shape, hashlib.sha256(pixels.tobytes()).digest()


def check(cohort, workers=2):
    """Decodes every patch. Returns {row: why it cannot be used}, and remarks on the others."""
    paths = [cohort.path(row) for row in range(len(cohort))]
    with ThreadPoolExecutor(max(1, workers)) as pool:
        looks = list(tqdm(pool.map(look, paths), "check", len(paths), unit="patch", leave=False))
    problems = {row: found for row, found in enumerate(looks) if isinstance(found, str)}
    good = {row: found for row, found in enumerate(looks) if row not in problems}
    remarks = []
    sizes = Counter(shape for shape, _ in good.values())
    if len(sizes) > 1:
        usual = " x ".join(map(str, sizes.most_common(1)[0][0]))
        remarks.append(f"remark: {len(sizes)} sizes, mostly {usual} (channels, height, width)")
    first = {}  # {hash: the first row that has it}
    pairs = [(first.setdefault(pixels, row), row) for row, (_, pixels) in good.items()]
    twins = [(one, two) for one, two in pairs if cohort.patient[one] != cohort.patient[two]]
    if twins:
        names = " and ".join(map(cohort.name, twins[0]))
        remarks.append(f"remark: {len(twins)} images equal another patient's, as {names}")
    return problems, remarks


def contact_sheet(cohort, augmentation, views=4, seed=0, size=160):
    """A Pillow image: two slides of a patient, two patches of each, and views beside each patch."""
    # Pixels: a column for the patch as it is, one for each view.
    counts = [views] + [2] * (len(cohort.levels) - 1)
    sizes = 2 * size, size
    drawn, ids = next(data.load_views(cohort, [1], 1, counts, augmentation, sizes, seed))
    rows = ids[cohort.levels[0]][::views].tolist()
    _, patches = next(data.load_batches(cohort, [rows], size))
    plain = data.plain_view(patches, size)[:, None]
    sheet = np.concatenate([plain, drawn.unflatten(0, (-1, views))], axis=1)  # [R, 1 + V, 3, H, W]

    # One image: room for a line of text above each, then rows and columns side by side.
    sheet = np.pad(sheet, ((0, 0), (0, 0), (0, 0), (18, 2), (2, 2)), constant_values=1)
    sheet = sheet.transpose(0, 3, 1, 4, 2).reshape(len(rows) * (size + 20), -1, 3)
    image = Image.fromarray((255 * sheet).round().astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for i, row in enumerate(rows):
        text = f"{words(cohort, row)}, {cohort.name(row)}"
        draw.text((4, i * (size + 20) + 4), text, fill="black")
    return image


# ----------------------------------------------------------------------------------------- commands


def run_index(args):
    """`index` and `opensrh`: write a manifest."""
    path = args.out or os.path.join(args.root, "manifest.csv")
    if not path.endswith(".csv") or (os.path.exists(path) and not args.overwrite):
        raise ValueError(f"{path} is no .csv, or it is there already: --overwrite replaces it")
    levels = args.levels.split(",")
    if args.command == "opensrh":
        cohort, with_split = opensrh(args.root), True
    else:
        options = args.label_level, args.nested, args.partial, levels
        cohort = index(args.root, args.pattern, *options)
        with_split = "split" in path_pattern(args.pattern, levels).groupindex
        for row in np.unique(np.linspace(0, len(cohort) - 1, 4).astype(int)):
            print(f"{cohort.name(row)} -> {words(cohort, row)}")
    print(*summary(cohort), sep="\n")
    if args.command == "index" and not args.yes:
        check_patients(cohort)
    write_manifest(path, cohort, range(len(cohort)), with_split)
    print(f"{path} is written")


def run_check(args):
    """`check`: list what cannot be used, write a manifest without it; exit code 1 if some is."""
    cohort = data.read_cohort(args.root, args.levels.split(","))
    folder = args.root if os.path.isdir(args.root) else os.path.dirname(args.root)
    path = os.path.join(folder, args.clean)
    if args.clean and (not path.endswith(".csv") or os.path.exists(path)):
        raise ValueError(f"--clean {args.clean}: name a file NAME.csv that is not there yet")
    problems, remarks = check(cohort, args.workers)
    print(*summary(cohort), *remarks, sep="\n")
    for row, problem in problems.items():
        print(f"{cohort.name(row)}: {problem}")
    counts = Counter(problem.partition(":")[0] for problem in problems.values())
    by_kind = ", ".join(f"{count} {kind}" for kind, count in counts.items())
    print(f"cannot be used: {by_kind or 'none'}")
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
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name, run, text):
        sub = commands.add_parser(name, help=text)
        sub.set_defaults(run=run)
        sub.add_argument("root", help="the cohort's folder, or to check and show its manifest.csv")
        sub.add_argument("--levels", default=",".join(data.LEVELS), help="as in train.py")
        if run == run_index:
            out = "elsewhere than ROOT/manifest.csv, as for read-only data"
            sub.add_argument("--out", default="", metavar="FILE.csv", help=out)
            sub.add_argument("--overwrite", action="store_true", help="replace it if it is there")
        return sub.add_argument

    command("opensrh", run_index, "write a manifest from OpenSRH as released")
    flag = command("index", run_index, "write a manifest from a folder tree")
    pattern = "how paths are made: '{label}/{patient}/{slide}/*.png', or a regular expression with "
    pattern += "such groups; split may be one; without slide, each patient is one slide"
    flag("--pattern", required=True, help=pattern)
    flag("--label-level", default="", metavar="LEVEL", help="what must have one label, as patient")
    flag("--nested", action="store_true", help="slides of different patients share names: 1, 2")
    flag("--partial", action="store_true", help="leave out images that the pattern does not match")
    flag("--yes", action="store_true", help="write it although its patients seem wrong")
    flag = command("check", run_check, "decode every patch; exit with 1 if some cannot be used")
    flag("--clean", metavar="NAME.csv", default="", help="write a manifest without them, beside it")
    flag("--workers", type=int, default=os.cpu_count(), help="decoding threads")
    flag = command("show", run_show, "draw a patient, two slides, their patches and their views")
    flag("--out", default="views.png", help="the picture to write")
    flag("--augmentation", choices=data.AUGMENTATIONS, default="demo", help="as in train.py")
    flag("--seed", type=int, default=0, help="another seed: another patient and other views")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    with user_errors():
        main()
