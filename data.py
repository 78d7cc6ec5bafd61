"""The data: a manifest becomes a cohort, a cohort batches of patches, a patch views.

A cohort is a folder with a manifest.csv: the columns path, patient and slide, and optionally label
(of the patch) and split (of the patient: train, val or test). Paths are relative to the manifest.
Pretraining needs no labels. `python -m tools.cohort` writes, checks and shows manifests. With other
levels than patch, slide and patient there is a column for each but the finest, which is the image;
what is said of patients here holds for the coarsest level, whatever it is called.

One batch takes the road of this file from top to bottom (`load_views`, at its end):

    manifest.csv -> Cohort -> hierarchical_batch: rows -> decode: patches -> make_views: views
"""

import csv
import hashlib
import os
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from losses import LEVELS

SPLITS = ("train", "val", "test")


# ---------------------------------------------------------------------------------------- cohort


@dataclass
class Cohort:
    """n patches in a hierarchy of L levels, fine to coarse, as arrays that all threads share.

    A million patches take about 100 MB. Members of a group follow one another: patches are in the
    order of slides, slides in the order of patients. In a part of a cohort, groups and classes keep
    their numbers, rows do not.
    """

    root: str
    levels: tuple  # L names, as LEVELS
    names: np.ndarray  # [n] bytes: the path of each patch, relative to the root
    parents: list  # L - 1 arrays: parents[0] [n] is the slide of each patch, then slide -> patient
    groups: list  # L - 1 lists: the names of the slides, of the patients
    label: np.ndarray  # [n] int32: the class of each patch, -1 where it has none
    patient_split: np.ndarray  # [P] int8: of the coarsest level, an index into SPLITS
    classes: list  # C names, sorted; empty without labels

    def __post_init__(self):
        self.starts = []  # members starts[l][g] to starts[l][g + 1] of level l are of group g
        for parent, names in zip(self.parents, self.groups):
            self.starts.append(np.searchsorted(parent, np.arange(len(names) + 1)))
        ids = self.ids(np.arange(len(self)))
        self.patient = ids[:, -1].copy()  # [n]: the patient of each patch
        self.present = np.unique(self.patient)  # the patients with patches here

    def __len__(self):
        return len(self.names)

    def __str__(self):
        counts = [len(np.unique(column)) for column in self.ids(np.arange(len(self))).T]
        parts = [f"{count} {plural(level)}" for count, level in zip(counts, self.levels)]
        return ", ".join(reversed(parts))

    def name(self, row):
        """The path of a patch as it stands in the manifest."""
        return self.names[row].decode()

    def path(self, row):
        """Where a patch is on disk."""
        return os.path.join(self.root, self.name(row))

    @property
    def split(self):
        """[n]: the split of each patch, an index into SPLITS."""
        return self.patient_split[self.patient]

    def ids(self, rows):
        """rows [n] -> ids [n, L]: the patch, slide and patient of each, as the losses want them."""
        columns = [rows]
        for parent in self.parents:
            columns.append(parent[columns[-1]])
        return np.stack(columns, axis=1)

    def group_names(self, row):
        """The names of the groups that a row is in, coarse to fine."""
        numbers = self.ids(np.array([row]))[0, 1:]
        return [names[number] for names, number in zip(self.groups, numbers)][::-1]

    def select(self, rows):
        """The cohort of these rows alone: ascending numbers, or a mask."""
        parents = [self.parents[0][rows], *self.parents[1:]]
        return replace(self, names=self.names[rows], parents=parents, label=self.label[rows])

    def digests(self):
        """{what: SHA-256} of all that a run depends on, so not of where the folder is."""
        parts = {
            "paths of patches": self.names.tobytes(),
            "slides and patients": repr([self.levels, self.groups]).encode()
            + b"".join(parent.tobytes() for parent in self.parents),
            "labels": repr(self.classes).encode() + self.label.tobytes(),
            "splits": self.patient_split.tobytes(),
        }
        return {what: hashlib.sha256(content).hexdigest() for what, content in parts.items()}

    def restrict(self, split):
        """The patches of the patients in a split. Raises ValueError when there are none."""
        rows = np.flatnonzero(self.split == SPLITS.index(split))
        if len(rows) == 0:
            remedy = "add patients, or a column split to the manifest"
            raise ValueError(f"{self.root}: no patient is in the split {split!r}: {remedy}")
        return self.select(rows)


def hash_split(patients, val_fraction=0.2):
    """[P] int8, indices into SPLITS, by the hash of P patients' names: the same on every machine.

    If chance leaves nobody in val (in train), the one with the lowest (highest) hash goes there.
    """
    digests = [hashlib.sha256(name.encode()).hexdigest() for name in patients]
    value = np.array([int(digest[:12], 16) / 2**48 for digest in digests])  # in [0, 1)
    split = (value < val_fraction).astype(np.int8)
    if len(patients) > 1:
        split[value.argmin()] = 1
        split[value.argmax()] = 0
    return split


def find_manifest(root):
    """The manifest of a cohort's folder, or the file that it is. Raises FileNotFoundError."""
    manifest = str(root) if str(root).endswith(".csv") else os.path.join(root, "manifest.csv")
    if not os.path.exists(manifest):
        remedy = "a cohort needs one; python -m tools.cohort --help says how to make it"
        raise FileNotFoundError(f"{manifest} does not exist: {remedy}")
    return manifest


def plural(level):
    """A level's name for several: patches, slides."""
    return level + ("es" if level.endswith("ch") else "s")


def read_cohort(root, levels=LEVELS, val_fraction=0.2):
    """A folder with a manifest.csv, or another manifest (.csv) -> Cohort.

    levels: fine to coarse; each but the first is a column. val_fraction: share of the patients held
    out where there is no split column. Raises ValueError, with file and line, for a missing column,
    an empty field, other bytes than UTF-8, a path that leaves the folder, a path twice, a slide
    under two patients, and a patient in two splits.
    """
    manifest = find_manifest(root)
    folder = os.path.dirname(os.path.abspath(manifest))
    return build_cohort(folder, read_manifest(manifest, levels), levels, val_fraction)


def read_manifest(manifest, levels=LEVELS):
    """Yields (file and line, path, patient, slide, label, split); a column not there gives ""."""
    columns = ["path", *reversed(levels[1:]), "label", "split"]
    with open(manifest, newline="", encoding="utf-8-sig", errors="replace") as file:
        reader = csv.reader(file)
        header = [column.strip() for column in next(reader, [])]
        missing = [column for column in columns[:-2] if column not in header]
        if missing:
            remedy = "name them in small letters, with commas (no ; or tab) between, in UTF-8"
            found = f"{manifest}, line 1 is {','.join(header)!r}"
            raise ValueError(f"{found}: no column {', '.join(missing)}; {remedy}")
        if levels[0] in header:
            remedy = f"--levels is fine to coarse: put the image, as patch, before {levels[0]}"
            raise ValueError(f"{manifest} has a column {levels[0]}: {remedy}")
        places = [header.index(column) if column in header else -1 for column in columns]
        for row in filter(None, reader):  # without empty lines
            where = f"{manifest}, line {reader.line_num}"
            if "\ufffd" in "".join(row):  # what stands for bytes that are not UTF-8
                raise ValueError(f"{where}: {','.join(row)!r} is not UTF-8: save it as CSV UTF-8")
            if len(row) != len(header):
                raise ValueError(f"{where}: {len(row)} fields, but {len(header)} columns in line 1")
            row.append("")  # what place -1 looks up
            yield where, *(row[place].strip() for place in places)


def build_cohort(root, entries, levels=LEVELS, val_fraction=0.2):
    """Lines of a manifest -> Cohort. entries: as `read_manifest` yields them. Raises as it says."""
    names = {}  # path: None; a dict, for its keys keep their order and are found at once
    chains = {}  # slide: [patient, slide], the names of all that it is in
    label_numbers = {}
    patient_splits = {}
    slide_of = []  # for each patch, its slide
    label_of = []
    for where, path, *chain, label, split in entries:
        check_entry(root, where, path, chain, split)
        name = path.encode()
        slide = chain[-1]
        if name in names:
            raise ValueError(f"{where}: the path {path!r} stands here a second time")
        if chains.setdefault(slide, chain) != chain:
            both = f"in {chains[slide][:-1]} above and in {chain[:-1]} here"
            remedy = "name two of them differently (tools.cohort index --nested does)"
            raise ValueError(f"{where}: the {levels[1]} {slide!r} is {both}: {remedy}")
        patient = chain[0]
        if patient_splits.setdefault(patient, split) != split:
            both = f"{patient_splits[patient]!r} above and in {split!r} here"
            raise ValueError(f"{where}: {patient!r} is in {both}; all of it must be on one side")
        names[name] = None
        slide_of.append(chains[slide][-1])  # one string for all patches of the slide
        label_of.append(label_numbers.setdefault(label, len(label_numbers)) if label else -1)
    if not names:
        raise ValueError(f"{root}: the cohort has no patches")

    # From the order of appearance to the order of names.
    parents, groups = sort_groups(root, chains.values(), levels)
    number = {name: i for i, name in enumerate(groups[0])}
    slide = np.array([number[name] for name in slide_of], np.int32)
    order = np.argsort(slide, kind="stable")
    names = np.array(list(names))  # the dict, which is much larger, is free from here on
    classes, label_number = np.unique(list(label_numbers), return_inverse=True)
    label = np.append(label_number, -1).astype(np.int32)[label_of]  # -1 looks up the last
    return Cohort(
        root,
        levels=tuple(levels),
        names=names[order],
        parents=[slide[order], *parents],
        groups=groups,
        label=label[order],
        patient_split=splits_of(root, groups[-1], patient_splits, val_fraction),
        classes=classes.tolist(),
    )


def sort_groups(root, chains, levels):
    """parents and groups as of Cohort, sorted by name, but without the parents of the patches.

    chains: [patient, slide] of each slide. Raises ValueError for a name that stands in two groups.
    """
    parents = []
    groups = []
    chains = sorted(map(tuple, chains))
    for level in levels[1:]:
        groups.append([chain[-1] for chain in chains])
        name, times = Counter(groups[-1]).most_common(1)[0]
        if times > 1:
            raise ValueError(f"{root}: {times} different {plural(level)} are called {name!r}")
        above = [chain[:-1] for chain in chains]
        chains = sorted(set(above))
        number = {chain: i for i, chain in enumerate(chains)}
        parents.append(np.array([number[chain] for chain in above], np.int32))
    return parents[:-1], groups  # nothing is above the patients


def check_entry(root, where, path, chain, split):
    """Raises ValueError for a line of a manifest that is wrong by itself."""
    if not (path and all(chain)):
        raise ValueError(f"{where}: only label and split may be empty")
    parts = path.replace("\\", "/").split("/")
    if parts[0] == "" or parts[0].endswith(":") or ".." in parts:  # C: is Windows' root
        raise ValueError(f"{where}: the path {path!r} leaves {root}; use paths relative to it")
    if "" in parts or "." in parts or "\\" in path:  # one file could stand under two names
        plain = "/".join(part for part in parts if part not in ("", "."))
        raise ValueError(f"{where}: the path {path!r} must be written {plain!r}")
    if split and split not in SPLITS:
        raise ValueError(f"{where}: the split {split!r} is none of {', '.join(SPLITS)}")


def splits_of(root, patients, patient_splits, val_fraction):
    """[P] int8, indices into SPLITS: as the manifest says, or by hash where it says nothing."""
    without = [name for name in patients if not patient_splits[name]]
    if len(without) == len(patients):
        return hash_split(patients, val_fraction)
    if without:
        raise ValueError(f"{root}: some patients have a split, but {without[0]!r} has none")
    return np.array([SPLITS.index(patient_splits[name]) for name in patients], np.int8)


# --------------------------------------------------------------------------------------- batches


def batch_patients(cohort, step, seed, patients):
    """The patients of one global batch, [patients], all different. A pure function of (seed, step).

    An epoch is a shuffle of all patients, cut into whole batches; the rest waits for the next.
    """
    epoch, place = divmod(step, len(cohort.present) // patients)
    order = np.random.default_rng((seed, epoch)).permutation(cohort.present)
    return order[place * patients : (place + 1) * patients]


def class_patients(cohort):
    """The patients by class, a list of arrays. ValueError for one without one label."""
    groups = {}
    for patient in cohort.present:
        first, last = np.searchsorted(cohort.patient, (patient, patient + 1))
        labels = np.unique(cohort.label[first:last])
        if len(labels) > 1 or labels[0] < 0:
            found = " and ".join(cohort.classes[label] for label in labels if label >= 0)
            name = cohort.groups[-1][patient]
            remedy = "leave the flag out, or label by patient"
            raise ValueError(f"--balance-classes: {name!r} has {found or 'none'}: {remedy}")
        groups.setdefault(labels[0], []).append(patient)
    return [np.array(group) for _, group in sorted(groups.items())]


def balanced_patients(groups, step, seed, patients):
    """As `batch_patients`, but the classes take turns, each through its own shuffles.

    groups: of `class_patients`. A class of few patients comes round sooner, perhaps twice in a
    batch; the losses know repeats by their id.
    """
    batch = []
    for place in range(step * patients, (step + 1) * patients):
        turn, label = divmod(place, len(groups))
        group = groups[label]
        epoch, number = divmod(turn, len(group))
        order = np.random.default_rng((seed, epoch, label)).permutation(group)
        batch.append(order[number])
    return np.array(batch)


def draw(rng, low, high, count):
    """`count` of the integers low to high - 1: distinct if there are enough, else evenly often."""
    if high - low >= count:
        return low + rng.choice(high - low, count, replace=False)
    return low + np.resize(rng.permutation(high - low), count)


def draw_below(cohort, rng, level, group, times, counts):
    """Patches below a group of a level (1: slide), drawn several times: [times, *counts]."""
    low, high = cohort.starts[level - 1][group : group + 2]
    drawn = draw(rng, low, high, times * counts[0]).reshape(times, counts[0])
    if level == 1:
        return drawn
    rows = np.empty((times, *counts), np.int64)
    for member in np.unique(drawn):
        places = drawn == member  # several, if it was drawn several times
        rows[places] = draw_below(cohort, rng, level - 1, member, places.sum(), counts[1:])
    return rows


def hierarchical_batch(cohort, step, seed, patients, counts=(2, 2), groups=None):
    """The patches of one global batch: rows [patients, *counts], counts of slides and of patches.

    A pure function of (seed, step), so that resuming needs no state. A patient with too few slides
    gives one twice (with different patches if it has enough), a slide with too few patches gives
    one twice; the losses know repeats by their id. groups: of `class_patients`, to balance them.
    """
    rng = np.random.default_rng((seed, step, 1))
    if groups:
        batch = balanced_patients(groups, step, seed, patients)
    else:
        batch = batch_patients(cohort, step, seed, patients)
    top = len(cohort.levels) - 1
    return np.concatenate([draw_below(cohort, rng, top, p, 1, counts) for p in batch])


# -------------------------------------------------------------------------------------- decoding


BITS_PER_SAMPLE = 258  # TIFF's tag


def decode(path, size=None):
    """The pixels of an image file: uint8 [3, size, size].

    A TIFF of two 16-bit frames, as OpenSRH has them, gives uint16 [2, size, size]. The short side
    is brought to `size` and the middle is kept; without a size, [C, H, W] as stored. Raises
    ValueError, with the path, for a damaged file and for what is neither.
    """
    try:
        with Image.open(path) as image:
            deep = image.mode[0] in "IF"
            if image.format == "TIFF":  # Pillow reads three 16-bit samples as if they had 8
                deep |= image.n_frames > 1 or max(image.tag_v2.get(BITS_PER_SAMPLE, (8,))) > 8
            if deep:
                return two_planes(image, size)
            if size:
                image.draft("RGB", (size, size))  # a JPEG is decoded smaller, never below `size`
            return fit(image.convert("RGB"), size).transpose(2, 0, 1)
    except Exception as error:  # a damaged file also makes Pillow raise KeyError and TypeError
        remedy = "restore it or take it out of the manifest"
        raise ValueError(f"{path} cannot be read ({error}): {remedy}") from error


def two_planes(image, size):
    """Two 16-bit frames -> uint16 [2, size, size]. Raises ValueError for any other layout."""
    frames = getattr(image, "n_frames", 1)
    layouts = set()
    for frame in range(frames):
        image.seek(frame)
        layouts.add(f"{image.width} x {image.height}, {image.mode}")
    layout = " and ".join(sorted(layouts))
    if frames != 2 or len(layouts) != 1 or "I;16" not in layout:
        known = "only 8-bit images and two 16-bit frames (I;16) of one size are understood"
        raise ValueError(f"{frames} frames of {layout}; {known}")
    planes = []
    for frame in (0, 1):
        image.seek(frame)
        plane = np.asarray(image)
        if size and image.size != (size, size):  # as float32, which Pillow can resize
            plane = fit(Image.fromarray(plane.astype(np.float32)), size).clip(0, 65535).round()
        planes.append(plane.astype(np.uint16))
    return np.stack(planes)


def fit(image, size):
    """A Pillow image -> array: the middle square at size x size; without a size, as it is."""
    if size and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def short_side(cohort, number=100, quiet=False):
    """The commonest short side, in pixels, of so many patches spread over the cohort.

    Reads their headers alone, and raises as `decode`. Prints a line where sides differ.
    """
    sides = []
    for row in np.unique(np.linspace(0, len(cohort) - 1, number).astype(int)):
        try:
            with Image.open(cohort.path(row)) as image:
                sides.append(min(image.size))
        except Exception:
            decode(cohort.path(row))  # says what is wrong with it
    side, times = Counter(sides).most_common(1)[0]
    if times < len(sides) and not quiet:
        others = f"{len(sides) - times} of {len(sides)} patches looked at have another short side"
        print(f"{others} than {side} pixels: {min(sides)} to {max(sides)}")
    return side


def load_batches(cohort, batches, size, workers=2, ahead=3):
    """Decodes patches in the background. Yields (rows, images [n, ...] as of `decode`) in order.

    batches: arrays of rows. size: as of `decode`, which raises. ahead: batches in preparation.
    Threads, not processes: Pillow decodes outside of the interpreter's lock, and threads share the
    cohort, not copy it.
    """

    def collect(rows, futures):
        images = [future.result() for future in futures]
        for row, image in zip(rows, images):
            if image.dtype != images[0].dtype:
                paths = f"{cohort.path(rows[0])} and {cohort.path(row)}"
                raise ValueError(f"{paths}: one has 8 bits, one 16: make a cohort of each")
        return rows, torch.from_numpy(np.stack(images))

    with ThreadPoolExecutor(workers) as pool:
        queue = deque()
        for rows in batches:
            queue.append((rows, [pool.submit(decode, cohort.path(row), size) for row in rows]))
            if len(queue) > ahead:
                yield collect(*queue.popleft())
        while queue:
            yield collect(*queue.popleft())


def intensities(images):
    """Pixels of `decode` -> float32 [n, 3, H, W] in [0, 1].

    Two 16-bit planes [n, 2, H, W] are stimulated Raman histology: CH2 (lipid) and CH3 (protein and
    DNA). Their three channels are CH3 - CH2 + 5000 / 65536, CH2 and CH3.
    """
    if images.dtype == torch.uint8:
        return images.float().div(255)
    ch2, ch3 = images.float().div_(65536).unbind(dim=1)
    return torch.stack([(ch3 - ch2 + 5000 / 65536).clamp(0, 1), ch2, ch3], dim=1)


def channel_statistics(cohort, size, patches=256, workers=2):
    """Mean and standard deviation of each channel in [0, 1], of so many patches: two lists."""
    rows = np.sort(np.random.default_rng(0).permutation(len(cohort))[:patches])
    moments = []  # the means of x and of x^2, [2, n, 3]
    batches = np.array_split(rows, -(-len(rows) // 16))
    for _, images in load_batches(cohort, batches, size, workers):
        x = intensities(images).double()
        moments.append(torch.stack([x.mean(dim=(2, 3)), x.square().mean(dim=(2, 3))]))
    mean, mean_square = torch.cat(moments, dim=1).mean(dim=1)
    return mean.tolist(), (mean_square - mean**2).clamp(min=1e-6).sqrt().tolist()


# ---------------------------------------------------------------------------------- augmentation

# Optical density of haematoxylin, eosin and the rest in red, green, blue (Ruifrok, Johnston 2001).
STAINS = torch.tensor([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])

DEMO = {  # transform: (probability, lowest, highest)
    "crop": (1.0, 0.6, 1.0),  # share of the area that is kept, at an aspect between 3/4 and 4/3
    "flip": (0.5, 0, 0),  # along each axis, independently
    "rotate": (0.5, -180, 180),  # degrees
    "translate": (0.5, -0.1, 0.1),  # of the side
    "brightness": (0.5, 0.8, 1.2),  # factor
    "contrast": (0.5, 0.8, 1.2),  # factor
    "stain": (0.8, 0.7, 1.3),  # factor on the density of each stain
    "background": (0.8, -0.05, 0.05),  # density added to each stain
    "blur": (0.1, 0.3, 1.2),  # standard deviation in pixels
    "noise": (0.1, 0.0, 0.05),  # standard deviation
    "erase": (0.1, 0.02, 0.15),  # share of the area
}
STRONG = {name: DEMO[name] for name in ("flip", "translate", "brightness", "contrast")}
STRONG |= {  # with these the paper's list, each with probability 1/2 as in its code
    "crop": (0.5, 0.2, 1.0),
    "rotate": (0.5, -10, 10),
    "autocontrast": (0.5, 1, 1),  # each channel stretched to [0, 1]
    "solarise": (0.5, 0.2, 0.2),  # threshold: what is above is inverted
    "sharpen": (0.5, 1, 1),
    "blur": (0.5, 1, 1),
    "noise": (0.5, 0.01, 0.1),
    "erase": (0.5, 0.02, 0.33),
}
AUGMENTATIONS = {
    "demo": DEMO,
    "strong-srh": STRONG,  # the channels of SRH are no colours: nothing mixes them
    # H&E varies in its stains, not in hue as such. On white, a threshold of 0.2 would invert
    # everything; 0.9 inverts the glass.
    "strong": STRONG
    | {"stain": (0.5, 0.7, 1.3), "background": (0.5, -0.05, 0.05), "solarise": (0.5, 0.9, 0.9)},
    "weak": {"flip": (0.5, 0, 0)},  # HiDisc's
}


def seed_of(*numbers):
    """One seed that is a function of several numbers, as the run's seed and the step."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def view_parameters(n, seed, step, augmentation=DEMO):
    """The random numbers behind n views, {name: [n, ...]} on the CPU.

    A pure function of (seed, step). Where a transform is not drawn, its value is the neutral one.
    Draw for the global batch and let each process take its rows: then the views do not depend on
    the number of processes.
    """
    generator = torch.Generator().manual_seed(seed_of(seed, step))

    def random(*shape):
        return torch.rand(n, *shape, generator=generator)

    def drawn(name, neutral, *shape):
        probability, low, high = augmentation.get(name, (0, neutral, neutral))
        chosen = (random() < probability).view(n, *[1] * len(shape))
        return torch.where(chosen, low + (high - low) * random(*shape), float(neutral))

    area = drawn("crop", 1)
    aspect = (4 / 3) ** ((2 * random() - 1) * (area < 1))
    size = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=1).clamp(max=1)
    flip_probability, _, _ = augmentation.get("flip", (0, 0, 0))
    parameters = {"size": size}  # width and height of the crop, of the patch's side
    parameters["centre"] = (2 * random(2) - 1) * (1 - size) + 2 * drawn("translate", 0, 2)
    parameters["flip"] = 1 - 2 * (random(2) < flip_probability).float()
    parameters["angle"] = drawn("rotate", 0)
    parameters["stain"] = drawn("stain", 1, 3)
    parameters["background"] = drawn("background", 0, 3)
    parameters["hole"] = random(2)  # where `erase` acts
    parameters["corner"] = (64 * random(2)).int()  # where the view's window of noise begins
    parameters["brightness"] = drawn("brightness", 1)
    parameters["contrast"] = drawn("contrast", 1)
    for name in ("autocontrast", "solarise", "sharpen", "blur", "noise", "erase"):
        parameters[name] = drawn(name, 0)
    return parameters


def resample(x, size, parameters):
    """Crop, shift, flip and rotate, as one affine map and one bilinear look-up.

    x: [n, 3, H, W]. Returns [n, 3, size, size].
    """
    angle = torch.deg2rad(parameters["angle"])
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1)
    scale = parameters["size"] * parameters["flip"]  # [n, 2]
    affine = turn.view(-1, 2, 2) * scale[:, None]  # output -> input coordinates, both in [-1, 1]
    place = (2 * torch.arange(size, device=x.device) + 1) / size - 1  # the middles of pixels
    across = affine[:, :, 0, None] * place
    down = affine[:, :, 1, None] * place + parameters["centre"][:, :, None]
    grid = across[:, :, None, :] + down[:, :, :, None]  # [n, 2, size, size]
    grid = grid.permute(0, 2, 3, 1)  # as of F.affine_grid, which takes 30 times as long
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def stain_jitter(x, factor, shift):
    """Scales and shifts the density of each stain.

    By Beer and Lambert x = exp(-density), and the density of a pixel is a sum of stains.
    x: [n, 3, H, W] in [0, 1]. factor, shift: [n, 3], neutral at 1 and 0.
    """
    stains = STAINS.to(x)
    # [n, 3, 3]: density -> amounts of stain -> scaled amounts -> density
    mix = torch.linalg.inv(stains) @ (factor[:, :, None] * stains)
    density = -x.clamp(min=1 / 255).log().flatten(2)  # [n, 3, HW]
    density = mix.transpose(1, 2) @ density + (shift @ stains)[:, :, None]
    return density.neg().exp().view_as(x)


# The next four are torchvision's autocontrast, solarize, adjust_sharpness(x, 2) and gaussian_blur,
# 5 to 30 times as fast, with a threshold or sigma for each image.


def autocontrast(x):
    """Each channel stretched to [0, 1]; a constant one stays. x: [n, C, H, W]."""
    low = x.amin(dim=(2, 3), keepdim=True)
    high = x.amax(dim=(2, 3), keepdim=True)
    constant = high <= low
    return (x - low * ~constant).div_((high - low) + constant)


def solarise(x, threshold):
    """Inverts what is at the threshold [n] or above it. x: [n, C, H, W] in [0, 1]."""
    above = x.clone().ge_(threshold[:, None, None, None])  # 0 or 1
    return above.mul_(torch.rsub(x, 1, alpha=2)).add_(x)  # x + above (1 - 2 x)


def sharpen(x):
    """Adds what a 3 x 3 blur takes away; the outermost pixels stay. x: [n, C, H, W] in [0, 1].

    x + (x - blurred),  blurred = (sum of the 3 x 3 neighbours + 4 x) / 13
    """
    rows = x[..., :-2, :] + x[..., 1:-1, :]
    rows += x[..., 2:, :]
    box = rows[..., :-2] + rows[..., 1:-1]
    box += rows[..., 2:]  # the sum of the neighbours
    out = x.clone()
    out[..., 1:-1, 1:-1].mul_(22 / 13).sub_(box, alpha=1 / 13)
    return out.clamp_(0, 1)


def blur(x, sigma):
    """Gaussian blur, 5 x 5, reflected at the border. x: [n, C, H, W]. sigma: [n] pixels."""
    weight = torch.exp(-(torch.arange(3, device=x.device) ** 2) / (2 * sigma[:, None] ** 2))
    weight = weight / (2 * weight.sum(dim=1, keepdim=True) - 1)  # [n, 3]
    middle, next_to_it, outer = weight.T[:, :, None, None, None]
    x = F.pad(x, (2, 2, 2, 2), mode="reflect")
    for _ in range(2):  # along the rows, then along the columns
        y = middle * x[..., 2:-2]
        y.addcmul_(next_to_it, x[..., 1:-3] + x[..., 3:-1])
        y.addcmul_(outer, x[..., :-4] + x[..., 4:])
        x = y.mT
    return x


def erase(x, area, hole):
    """A square of this area inside the image gets the image's mean.

    x: [n, C, H, W]. area: [n], a share of the image. hole: [n, 2] in [0, 1], where the square is.
    """
    side = area.sqrt()[:, None]
    middle = side / 2 + hole * (1 - side)  # [n, 2]: nothing of the square is outside
    place = (torch.arange(x.shape[-1], device=x.device) + 0.5) / x.shape[-1]
    distance = (place - middle[:, :, None]).abs()  # [n, 2, W]
    inside = (distance < side[:, :, None] / 2).to(x)
    inside = (inside[:, 0, :, None] * inside[:, 1, None, :])[:, None]  # [n, 1, side, side]
    return torch.lerp(x, x.mean(dim=(1, 2, 3), keepdim=True), inside)


def make_views(images, parameters, size, noise_seed=0):
    """The views of a batch of patches, made on its device: float32 [n V, 3, size, size] in [0, 1].

    images: of `decode`, [n, ...]. parameters: of n V views (`view_parameters`); the V views of a
    patch follow one another.
    """
    V = len(parameters["angle"]) // len(images)
    out = torch.empty(len(images) * V, 3, size, size, device=images.device)
    # One field of white noise serves the batch, and each view takes a window of it: to draw noise
    # for every pixel is slow.
    generator = torch.Generator().manual_seed(noise_seed)
    noise = torch.randn(3, size + 64, size + 64, generator=generator)
    noise = noise.to(images.device, non_blocking=True)
    # A few patches at a time stay in a CPU's cache, which is several times as fast; a GPU takes
    # the batch at once.
    some = len(images) if out.is_cuda else max(1, 2**18 // (V * 3 * size * size))
    for first in range(0, len(images), some):
        part = slice(first * V, (first + some) * V)
        mine = {name: value[part] for name, value in parameters.items()}
        torch.clamp(augment(images[first : first + some], mine, size, noise), 0, 1, out=out[part])
    return out


def augment(images, parameters, size, noise):
    """`make_views` for a few patches: one transform after the other."""
    moved = {name: value.to(images.device, non_blocking=True) for name, value in parameters.items()}
    V = len(parameters["angle"]) // len(images)
    x = intensities(images)[:, None].expand(-1, V, -1, -1, -1).flatten(0, 1)

    def where_drawn(name, transform, *arguments):
        """transform(x, parameters of these names), on the views that have drawn `name`."""
        rows = parameters[name].nonzero()[:, 0]  # on the CPU: no waiting for a GPU
        if len(rows):
            rows = rows.to(x.device, non_blocking=True)
            values = [moved[argument][rows] for argument in arguments]
            x.index_copy_(0, rows, transform(x.index_select(0, rows), *values))

    x = resample(x, size, moved)
    if (parameters["stain"] != 1).any() or parameters["background"].any():
        x = stain_jitter(x, moved["stain"], moved["background"])
    brightness = moved["brightness"][:, None, None, None]
    contrast = moved["contrast"][:, None, None, None]
    x *= brightness * contrast
    x += x.mean(dim=(1, 2, 3), keepdim=True) * (1 / contrast - 1)
    where_drawn("autocontrast", autocontrast)
    where_drawn("solarise", solarise, "solarise")
    where_drawn("sharpen", sharpen)
    where_drawn("blur", blur, "blur")
    for view in parameters["noise"].nonzero()[:, 0].tolist():
        top, left = parameters["corner"][view].tolist()
        window = noise[:, top : top + size, left : left + size]
        x[view].add_(window, alpha=parameters["noise"][view].item())
    where_drawn("erase", erase, "erase", "hole")
    return x


def plain_view(images, size):
    """The view to evaluate: all that `decode` gave, resized.

    images: [n, ...] of `decode`. Returns float32 [n, 3, size, size] in [0, 1].
    """
    x = intensities(images)
    if x.shape[-1] == size:
        return x
    x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return x.clamp(0, 1)


def load_views(cohort, config, first, read_size, image_size, device, rank=0, world=1):
    """The batches of a run from step `first` on: yields (images [n, 3, S, S], ids [n, L]).

    images: views in [0, 1]. This process gets its share, rank of world, of every global batch. Rows
    stand in the order of patient, slide, patch and view. config: of train.py. read_size: pixels
    that a patch is read at. image_size: S. All randomness is a function of (seed, step), where
    step is 0 for the batch that the loop and the log call step 1.
    """
    share = slice(rank * config.patients // world, (rank + 1) * config.patients // world)
    groups = class_patients(cohort) if config.balance_classes else None
    *counts, views = config.counts
    augmentation = AUGMENTATIONS[config.augmentation]

    def batches():
        for step in range(first, config.steps):
            rows = hierarchical_batch(cohort, step, config.seed, config.patients, counts, groups)
            yield rows[share].reshape(-1)

    loaded = load_batches(cohort, batches(), read_size, config.workers)
    for step, (rows, patches) in enumerate(loaded, first):
        # The numbers of the global batch, of which this process takes its rows.
        n = len(rows) * world * views
        parameters = view_parameters(n, config.seed, step, augmentation)
        parameters = {name: value.chunk(world)[rank] for name, value in parameters.items()}

        patches = patches.to(device, non_blocking=True)
        images = make_views(patches, parameters, image_size, seed_of(config.seed, step))
        ids = torch.from_numpy(cohort.ids(rows)).to(device).repeat_interleave(views, dim=0)
        yield images.contiguous(memory_format=torch.channels_last), ids
