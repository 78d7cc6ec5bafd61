"""Write and check a cohort's manifest, ROOT/manifest.csv. `python data.py ROOT` draws a batch.

python -m tools.cohort index ROOT --pattern '{label}/{patient}/{slide}/*.png'
python -m tools.cohort opensrh ROOT      write it from OpenSRH's own JSON
python -m tools.cohort check ROOT        decode every patch, say which fail and why (exit code 1)
"""

import argparse
import csv
import json
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
from tqdm import tqdm

import data
from tools.processes import user_errors

TILES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".jp2")


def index(root, pattern, label_level="", nested=False, partial=False, levels=data.LEVELS):
    """The image files below a folder -> Cohort: patient, slide, label and split are in their paths.

    label_level: the level that must have one label, like "patient". nested: patients share slide
    names. partial: leaves out files that do not match. Raises ValueError if ambiguous.
    """
    expression = path_pattern(pattern, levels)
    entries, others, labels = [], [], {}
    for path in image_files(root):
        match = expression.fullmatch(path)
        if not match:
            others.append(path)
            continue
        names = match.groupdict("")
        groups, name = [], ""  # coarse to fine
        for level in levels[:0:-1]:
            name = names.get(level, name)
            groups.append(f"{groups[-1]}/{name}" if nested and groups else name)
        label = names.get("label", "")
        entries.append((path, path, groups, label, names.get("split", ""), ""))
        group = dict(zip(levels[:0:-1], groups)).get(label_level, path)  # this has one label
        other, example = labels.setdefault(group, (label, path))
        if label != other:
            raise ValueError(f"{root}: one {label_level} has two labels: {example} and {path}")
    if not entries or (others and not partial):
        raise ValueError(
            f"{root}: '{pattern}' matches {len(entries)} image files but not {len(others)} others"
            + "".join(f"\n    {path}" for path in others[:3])
            + f"\nFix the pattern{', or leave them out with --partial' if entries else ''}"
        )
    if others:
        print(f"left out: {len(others)} image files that do not match, like {others[0]}")
    return data.build_cohort(root, entries, levels)


def path_pattern(pattern, levels=data.LEVELS):
    """'{label}/{patient}/{slide}/*.png' -> a regular expression with groups of these names.

    {name} and * match within a folder or file name, ** across folders; {x} and {y} match numbers.
    """
    expression = pattern
    if "(?P<" not in pattern:
        expression = re.escape(pattern).replace(r"\*\*", ".*").replace(r"\*", "[^/]*")
        expression = re.sub(r"\\\{(\w+)\\\}", r"(?P=\1)", expression)
        for name in set(re.findall(r"\(\?P=(\w+)\)", expression)):  # its first occurrence
            kind = r"-?\d+(?:\.\d+)?" if name in ("x", "y") else "[^/]+?"
            expression = expression.replace(f"(?P={name})", f"(?P<{name}>{kind})", 1)
    try:
        compiled = re.compile(expression)
    except re.error as error:
        raise ValueError(f"--pattern '{pattern}' is not a regular expression: {error}") from error
    must, may = levels[-1], [*levels[-2:0:-1], "label", "split", "x", "y"]
    if not {must} <= set(compiled.groupindex) <= {must, *may}:
        raise ValueError(
            f"--pattern '{pattern}' must name {must}, and may name {', '.join(may)}; "
            f"it names {', '.join(compiled.groupindex) or 'nothing'}"
        )
    return compiled


def image_files(root):
    """The paths of all tiles below a folder, relative to it, in order; each linked folder once."""
    paths, seen = [], set()
    for folder, folders, files in os.walk(root, followlinks=True):
        if os.path.realpath(folder) in seen:
            folders.clear()  # os.walk goes no deeper here
            continue
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if name.lower().endswith(TILES) and not name.startswith("."):
                paths.append(os.path.relpath(os.path.join(folder, name), root))
    if not paths:
        raise ValueError(f"{root}: no tiles found ({', '.join(TILES)}); TRIDENT can cut slides")
    return paths


def check_patients(cohort):
    """Raises ValueError if a pattern has probably not found the patients."""
    counts = np.bincount(cohort.patient)
    level, name = cohort.levels[-1], cohort.group_names[-1][counts.argmax()]
    if len(counts) >= len(cohort.classes) and 2 * counts.max() <= len(cohort):
        return
    doubt = f"{level} {name} has {counts.max()} of the {len(cohort)} patches"
    if len(counts) < len(cohort.classes):
        doubt = f"fewer {data.plural(level)} ({len(counts)}) than classes ({len(cohort.classes)})"
    raise ValueError(
        f"nothing was written: {doubt}. Confirm with --yes, or fix the pattern: {{name}} matches "
        "as little as it can, unless a regular expression says how much, as for TCGA:\n"
        r"    --pattern '(?P<label>[^/]+)/(?P<slide>(?P<patient>TCGA-\w{2}-\w{4})[^_]*)_.*'"
    )


def opensrh(root):
    """OpenSRH (Jiang et al. 2022) as its own loaders read it -> Cohort, with its split: tumour
    patches from tumour patients, normal from normal; the label is the patient's class."""
    files = [os.path.join(root, "meta", f"{name}.json") for name in ("opensrh", "train_val_split")]
    entries = []
    try:
        patients, splits = (json.load(open(path, encoding="utf-8")) for path in files)
        for split in ("train", "val"):  # a patient in neither is left out
            for patient in splits[split]:
                label = patients[patient]["class"]
                kind = "normal_patches" if label == "normal" else "tumor_patches"
                for slide, patches in patients[patient]["slides"].items():
                    groups = (patient, f"{patient}/{slide}")  # each has slides 1, 2, ...
                    for path in patches[kind]:
                        entries.append((f"{files[0]}, {patient}", path, groups, label, split, ""))
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{' and '.join(files)} are not OpenSRH's ({error!r})") from error
    cohort = data.build_cohort(root, entries)
    if str(look(cohort.path(0))).startswith("unreadable"):
        raise ValueError(
            f"{cohort.path(0)} is not a TIFF of two frames [2, H, W]: "
            "rewrite [H, W, 2] with tifffile.imwrite(path, pixels.transpose(2, 0, 1))"
        )
    return cohort


def opensrh_place(path):
    """(column, row) of a patch from the end of its name, ix_jx_iy_jy; None otherwise."""
    if found := re.search(r"(\d+)_(\d+)_(\d+)_(\d+)\.\w+$", path):
        ix, jx, iy, jy = map(int, found.groups())  # i goes down; each field has 3 x 3 patches
        return 3 * (jx // 1000) + jy // 300, 3 * (ix // 1000) + iy // 300


def coordinates(root):
    """{path: (x, y)} of the patches that have both. root: as for data.read_cohort."""
    path = root if root.lower().endswith(".csv") else os.path.join(root, "manifest.csv")
    places = {}
    for line in csv.DictReader(open(path, encoding="utf-8-sig"), skipinitialspace=True):
        with suppress(KeyError, TypeError, ValueError):  # no such column, a short line, no number
            places[line["path"].strip()] = float(line["x"]), float(line["y"])
    return places


def belonging(cohort, row):
    """What a patch belongs to: {"patient": "amy", "slide": "1", "label": "tumour", or ""}."""
    label = [*cohort.classes, ""][cohort.label[row]]  # -1, for none, is the last
    return dict(zip(reversed(cohort.levels), cohort.groups_of(row)), label=label)


def write_manifest(path, cohort, rows, with_split, place):
    """Writes a manifest of these rows, whole or not at all. place: path -> (x, y) or None."""
    root = os.path.abspath(cohort.root)
    elsewhere = os.path.dirname(os.path.abspath(path)) != root
    columns = ["path", *reversed(cohort.levels[1:])]
    columns += ["label"] * bool(cohort.classes) + ["split"] * with_split + ["root"] * elsewhere
    columns += ["x", "y"] * any(place(cohort.name(row)) for row in rows)
    with open(f"{path}.part", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            line = {"path": cohort.name(row), "split": data.SPLITS[cohort.split[row]], "root": root}
            line |= zip("xy", place(cohort.name(row)) or ())
            writer.writerow(line | belonging(cohort, row))
    os.replace(f"{path}.part", path)
    print(f"wrote {path}: {len(rows)} patches")


def print_summary(cohort):
    """Prints what to know before training on a cohort."""
    print(f"{cohort}, {len(cohort.classes)} classes")
    for level, group, starts in zip(cohort.levels, cohort.levels[1:], cohort.starts):
        n = np.diff(starts)
        middle = np.median(n)
        print(f"{data.plural(level)} per {group}: {n.min()} to {n.max()}, median {middle:.0f}")
    patches, *_, people = map(data.plural, cohort.levels)
    parts = [(patches, cohort.patch, cohort.split >= 0)]
    for i, split in enumerate(data.SPLITS):
        parts.append((f"{people} in {split}", cohort.patient, cohort.split == i))
    for name, ids, there in parts:
        counts = [f"{name}: {len(np.unique(ids[there]))}"]
        for c, kind in [*enumerate(cohort.classes), (-1, "without a label")]:
            n = len(np.unique(ids[there & (cohort.label == c)]))
            counts += [f"{kind} {n}"] * (n > 0)
        print(", ".join(counts))


def look(path):
    """A hash of a patch's pixels; or what is wrong with it: "truncated: ..."."""
    if not os.path.exists(path):
        return "missing: no such file"
    try:
        pixels = data.decode(path)
    except ValueError as error:
        reason = str(error.__cause__).replace(f" {path!r}", "")
        return f"{'truncated' if 'truncated' in reason else 'unreadable'}: {reason}"
    # Glass varies only by noise. SRH uses few of 65,536 levels: only flat patches are refused.
    least = 2.5 if pixels.dtype == np.uint8 else 64
    spread = pixels.std(axis=(1, 2)).max()
    if spread < least:
        return f"constant: standard deviation {spread:.1f}, less than {least}"
    return hash(pixels.tobytes())


def run_index(args):
    """`index` and `opensrh`: write a manifest."""
    path = args.out or os.path.join(args.root, "manifest.csv")
    if not path.endswith(".csv") or (os.path.exists(path) and not args.overwrite):
        raise ValueError(f"{path} already exists (--overwrite replaces it) or is not a .csv")
    if args.command == "opensrh":
        cohort, with_split, place = opensrh(args.root), True, opensrh_place
    else:
        flags = args.label_level, args.nested, args.partial, args.levels
        cohort = index(args.root, args.pattern, *flags)
        names = path_pattern(args.pattern, args.levels)
        with_split = "split" in names.groupindex
        axes = [axis for axis in "xy" if axis in names.groupindex]
        place = lambda path: [names.fullmatch(path)[axis] for axis in axes]  # noqa: E731
    for row in np.unique(np.linspace(0, len(cohort) - 1, 4).astype(int)):
        groups = [f"{level} {name}" for level, name in belonging(cohort, row).items() if name]
        print(f"{cohort.name(row)} -> {', '.join(groups)}")
    print_summary(cohort)
    if args.command == "index" and not args.yes:
        check_patients(cohort)
    write_manifest(path, cohort, range(len(cohort)), with_split, place)


def run_check(args):
    """`check`: list unusable patches, write a manifest without them; exit code 1 if any."""
    cohort = data.read_cohort(args.root, args.levels)
    folder = args.root if os.path.isdir(args.root) else os.path.dirname(args.root)
    path = os.path.join(folder, args.clean)
    if args.clean and (not path.endswith(".csv") or os.path.exists(path)):
        raise ValueError(f"--clean {args.clean}: name a file NAME.csv that does not exist")
    print_summary(cohort)
    with ThreadPoolExecutor(max(1, args.workers)) as pool:
        looks = pool.map(look, map(cohort.path, range(len(cohort))))
        looks = list(tqdm(looks, "check", len(cohort), unit="patch", leave=False))
    faults = {row: found for row, found in enumerate(looks) if isinstance(found, str)}
    for row, fault in faults.items():
        print(f"{cohort.name(row)}: {fault}")
    good = [row for row in range(len(cohort)) if row not in faults]
    twins, first = [], {}
    for row in good:
        one = first.setdefault(looks[row], row)  # with the same pixels
        if cohort.patient[one] != cohort.patient[row]:
            twins.append(f"{cohort.name(one)} and {cohort.name(row)}")
    if twins:
        print(f"note: {len(twins)} images are also another patient's, like {twins[0]}")
    kinds = Counter(fault.partition(":")[0] for fault in faults.values())
    print("cannot be used:", ", ".join(f"{n} {kind}" for kind, n in kinds.items()) or "none")
    if args.clean:
        by_hash = (cohort.patient_split == data.hash_split(cohort.group_names[-1])).all()
        write_manifest(path, cohort, good, not by_hash, coordinates(args.root).get)
    raise SystemExit(1 if faults else 0)


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    commands = parser.add_subparsers(dest="command", required=True)
    every = argparse.ArgumentParser(add_help=False)
    every.add_argument("root", help="the cohort's folder or, for check, its manifest.csv")
    every.add_argument("--levels", default=",".join(data.LEVELS), help="as in train.py")
    write = argparse.ArgumentParser(add_help=False, parents=[every])
    write.add_argument("--out", metavar="FILE.csv", help="elsewhere, if the data are read-only")
    write.add_argument("--overwrite", action="store_true", help="replace it if it exists")
    text = "write it from OpenSRH as released: TIFFs read as [2, H, W] by tifffile, not [H, W, 2]"
    commands.add_parser("opensrh", parents=[write], help=text, description=text)
    flag = commands.add_parser("index", parents=[write], help="write it from a tree").add_argument
    text = "like '{label}/{patient}/{slide}/{x}_{y}.png', or a regular expression; needs patient"
    flag("--pattern", required=True, help=text)
    flag("--label-level", default="", metavar="LEVEL", help="the level whose groups have one label")
    flag("--nested", action="store_true", help="slides of different patients share names: 1, 2")
    flag("--partial", action="store_true", help="leave out images that the pattern does not match")
    flag("--yes", action="store_true", help="write it even if the patients look wrong")
    flag = commands.add_parser("check", parents=[every], help="decode every patch").add_argument
    flag("--clean", metavar="NAME.csv", default="", help="write a manifest without the failures")
    flag("--workers", type=int, default=os.cpu_count(), help="decoding threads")
    args = parser.parse_args()
    args.levels = args.levels.split(",")
    (run_check if args.command == "check" else run_index)(args)


if __name__ == "__main__":
    with user_errors():
        main()
