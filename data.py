"""The data: a cohort (patient > slide > patch), hierarchical batches, augmentation on the device, and demo tissue.

    python data.py index ROOT --pattern '{label}/{patient}/{slide}/*.png'      write ROOT/manifest.csv
    python data.py check ROOT                                                  find the patches that cannot be used
    python data.py show ROOT                                                   a picture of patches and their views
    python data.py demo OUT                                                    procedural H&E-like tissue, known truth

A cohort is a folder with a manifest.csv: columns path, patient, slide, and optionally label (of the patch) and split
(of the patient: train, val or test). Paths are relative to the manifest. Pretraining needs no labels. OpenSRH is read
as it was released, by its meta/opensrh.json.
"""

import argparse
import csv
import hashlib
import json
import os
import re
import sys
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

SPLITS = ("train", "val", "test")


# ------------------------------------------------------------------------------------------------------------- cohort


@dataclass
class Cohort:
    """n patches of S slides of P patients, as arrays: a million patches take about 100 MB, and threads share them.

    Patches are in the order of slides and slides in the order of patients. What `restrict` leaves keeps its numbers.
    """

    root: str
    names: np.ndarray  # [n] bytes: the path of each patch, relative to the root
    slide: np.ndarray  # [n] int32: the slide of each patch, never decreasing
    label: np.ndarray  # [n] int32: the class of each patch, -1 where it has none
    slide_patient: np.ndarray  # [S] int32: the patient of each slide, never decreasing
    patient_split: np.ndarray  # [P] int8: an index into SPLITS
    slides: list  # S names
    patients: list  # P names
    classes: list  # C names, sorted; empty without labels

    def __post_init__(self):
        # Slide s holds the rows slide_rows[s] to slide_rows[s + 1], patient p the slides from patient_slides[p] on.
        self.slide_rows = np.searchsorted(self.slide, np.arange(len(self.slides) + 1))
        self.patient_slides = np.searchsorted(self.slide_patient, np.arange(len(self.patients) + 1))
        self.present = np.flatnonzero(
            np.diff(self.slide_rows[self.patient_slides])
        )  # the patients with patches here

    def __len__(self):
        return len(self.slide)

    def __str__(self):
        return f"{len(self.present)} patients, {(np.diff(self.slide_rows) > 0).sum()} slides, {len(self)} patches"

    def path(self, row):
        """Where a patch is on disk. Raises ValueError if a link leads out of the cohort's folder."""
        path = os.path.join(self.root, self.names[row].decode())
        if not os.path.realpath(path).startswith(os.path.join(os.path.realpath(self.root), "")):
            raise ValueError(
                f"{path} is a link that leaves {self.root}: put the patches there, or the manifest here"
            )
        return path

    @property
    def patient(self):
        """[n]: the patient of each patch."""
        return self.slide_patient[self.slide]

    @property
    def split(self):
        """[n]: the split of each patch, an index into SPLITS."""
        return self.patient_split[self.patient]

    def ids(self, rows):
        """rows [n] -> ids [n, 3]: the patch, slide and patient of each, as the losses want them."""
        return np.stack([rows, self.slide[rows], self.slide_patient[self.slide[rows]]], axis=1)

    def restrict(self, split):
        """The patches of the patients in a split. Raises ValueError when there are none."""
        keep = np.flatnonzero(self.split == SPLITS.index(split))
        if len(keep) == 0:
            raise ValueError(
                f"{self.root}: no patient is in the split {split!r}: add patients, or a split column"
            )
        return replace(self, names=self.names[keep], slide=self.slide[keep], label=self.label[keep])


def hash_split(patients, val_fraction=0.2):
    """Split names by their hash: the same on every machine, and no patient moves when another is added.

    Returns int8 indices into SPLITS. If chance leaves no patient in val (in train), as it can with a handful of
    patients, the one with the lowest (highest) hash goes there.
    """
    value = np.array(
        [
            int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48
            for name in patients
        ]
    )
    split = (value < val_fraction).astype(np.int8)
    if len(patients) > 1 and not split.any():
        split[value.argmin()] = 1
    if len(patients) > 1 and split.all():
        split[value.argmax()] = 0
    return split


def read_cohort(root, val_fraction=0.2):
    """The folder of a manifest.csv, that file, or the folder of OpenSRH -> Cohort.

    Raises ValueError, with file and line, for a missing column, an empty field, a path that leaves the folder, a path
    twice, a slide under two patients, and a patient in two splits.
    """
    manifest = str(root) if str(root).endswith(".csv") else os.path.join(root, "manifest.csv")
    if not os.path.exists(manifest) and os.path.exists(os.path.join(root, "meta", "opensrh.json")):
        return build_cohort(str(root), opensrh_entries(root), val_fraction)
    if not os.path.exists(manifest):
        raise FileNotFoundError(
            f"{manifest} does not exist: a cohort needs one, with columns path, patient, slide"
        )
    with open(manifest, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if missing := [c for c in ("path", "patient", "slide") if c not in header]:
            raise ValueError(
                f"{manifest}: no column {', '.join(missing)}; the first line is {','.join(header)!r}"
            )
        places = [
            header.index(c) if c in header else -1
            for c in ("path", "patient", "slide", "label", "split")
        ]

        def entries():
            for row in filter(None, reader):
                where = f"{manifest}, line {reader.line_num}"
                if len(row) != len(header):
                    raise ValueError(
                        f"{where}: {len(row)} fields, but the first line names {len(header)} columns"
                    )
                yield where, *(row[i].strip() if i >= 0 else "" for i in places)

        return build_cohort(os.path.dirname(os.path.abspath(manifest)), entries(), val_fraction)


def opensrh_entries(root):
    """The patches of OpenSRH (Jiang et al. 2022) for `build_cohort`: tumour patches of tumour patients, normal ones of
    normal patients. Raises ValueError for other content than was released."""
    meta, split_file = (
        os.path.join(root, "meta", name) for name in ("opensrh.json", "train_val_split.json")
    )
    try:
        with open(meta) as file, open(split_file) as other:
            patients, splits = json.load(file), json.load(other)
        split_of = {patient: split for split, names in splits.items() for patient in names}
        for patient, entry in patients.items():
            kind = "normal_patches" if entry["class"] == "normal" else "tumor_patches"
            for slide, patches in entry["slides"].items():
                for path in patches[kind]:
                    yield (
                        f"{meta}, {patient}",
                        path,
                        patient,
                        f"{patient}/{slide}",
                        entry["class"],
                        split_of[patient],
                    )
    except (OSError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{meta} and {split_file} are not OpenSRH's ({type(error).__name__} {error})"
        ) from error


def build_cohort(root, entries, val_fraction):
    """An iterable of (where it stands, path, patient, slide, label or "", split or "") -> Cohort."""
    names, slide_of, label_of, seen = [], [], [], set()
    slides, patients, labels = (
        {},
        {},
        {},
    )  # slide -> (number, patient), patient -> split, label -> number
    for where, path, patient, slide, label, split in entries:
        name = path.encode()
        number, owner = slides.setdefault(slide, (len(slides), patient))
        if not (path and patient and slide):
            raise ValueError(f"{where}: path, patient and slide must not be empty")
        if path.startswith(("/", "\\")) or ".." in path.replace("\\", "/").split("/"):
            raise ValueError(f"{where}: the path {path!r} leaves {root}; use paths relative to it")
        if name in seen:
            raise ValueError(f"{where}: the path {path!r} stands here a second time")
        if split and split not in SPLITS:
            raise ValueError(f"{where}: the split {split!r} is none of {', '.join(SPLITS)}")
        if owner != patient:
            raise ValueError(
                f"{where}: the slide {slide!r} is of patient {owner!r} above and of {patient!r} here; "
                "if these are two slides, name them differently (data.py index --nested does)"
            )
        if patients.setdefault(patient, split) != split:
            raise ValueError(
                f"{where}: the patient {patient!r} is in {patients[patient]!r} above and in {split!r} "
                "here; all patches of a patient must be on one side"
            )
        seen.add(name)
        names.append(name)
        slide_of.append(number)
        label_of.append(labels.setdefault(label, len(labels)) if label else -1)
    if not names:
        raise ValueError(f"{root}: the cohort has no patches")
    if "" in patients.values() and any(patients.values()):
        without = next(p for p in patients if not patients[p])
        raise ValueError(f"{root}: some patients have a split, but {without!r} has none")

    patient_names, classes = sorted(patients), sorted(labels)
    slide_names = sorted(slides, key=lambda slide: (slides[slide][1], slide))
    patient_number = {name: i for i, name in enumerate(patient_names)}
    # From the order of appearance to the order of names; the last label is what -1 looks up.
    slide = np.argsort([slides[name][0] for name in slide_names]).astype(np.int32)[slide_of]
    label = np.append(np.argsort([labels[name] for name in classes]), -1).astype(np.int32)[label_of]
    order = np.argsort(slide, kind="stable")
    split = hash_split(patient_names, val_fraction)
    if all(patients.values()):
        split = np.array([SPLITS.index(patients[name]) for name in patient_names], np.int8)
    slide_patient = np.array([patient_number[slides[name][1]] for name in slide_names], np.int32)
    return Cohort(
        root,
        np.array(names)[order],
        slide[order],
        label[order],
        slide_patient,
        split,
        slide_names,
        patient_names,
        classes,
    )


# ----------------------------------------------------------------------------------------------- batches and decoding


def class_patients(cohort):
    """The patients here by class, a list of arrays. Raises ValueError for a patient without or with several labels."""
    groups = {}
    for patient in cohort.present:
        first, last = cohort.slide_rows[cohort.patient_slides[patient : patient + 2]]
        labels = np.unique(cohort.label[first:last])
        if len(labels) > 1 or labels[0] < 0:
            raise ValueError(
                f"--balance-classes needs one class a patient; {cohort.patients[patient]!r} has "
                + (" and ".join(cohort.classes[c] for c in labels if c >= 0) or "none")
                + ": leave the flag out, or label by patient"
            )
        groups.setdefault(labels[0], []).append(patient)
    return [np.array(group) for _, group in sorted(groups.items())]


def balanced_patients(groups, step, seed, patients):
    """As `batch_patients`, but the classes take turns, each through its own epochs. groups: as `class_patients`.

    A class of few patients comes round sooner, perhaps twice in a batch; the losses know repeats by their id.
    """
    batch, orders = [], {}
    for place in range(step * patients, (step + 1) * patients):
        turn, c = divmod(place, len(groups))
        epoch, at = divmod(turn, len(groups[c]))
        if (c, epoch) not in orders:
            orders[c, epoch] = np.random.default_rng((seed, epoch, c)).permutation(groups[c])
        batch.append(orders[c, epoch][at])
    return np.array(batch)


def check_patients(cohort, patients):
    """Raises ValueError unless batches of this many distinct patients can show every patient once an epoch."""
    n = len(cohort.present)
    if patients != n and 2 * patients - 1 > n:
        raise ValueError(
            f"--patients {patients} of {n} training patients: use {n}, or at most {(n + 1) // 2}"
        )


def batch_patients(cohort, step, seed, patients):
    """The patients of one global batch: distinct in the batch, each once an epoch. A pure function of (seed, step).

    Epochs are shuffles of all patients, laid end to end and cut into batches. A batch that spans two epochs could hold
    a patient twice, so the head of a shuffle skips those in the tail of the one before. That reorders only the first
    `patients` places, never the tail that the next epoch looks at.
    """
    check_patients(cohort, patients)
    n = len(cohort.present)

    def epoch(number):
        order = np.random.default_rng((seed, number)).permutation(cohort.present)
        if (
            tail := number * n % patients
        ):  # places of the first batch that the epoch before has filled
            before = np.random.default_rng((seed, number - 1)).permutation(cohort.present)[-tail:]
            head = order[:patients]
            order[:patients] = head[np.argsort(np.isin(head, before), kind="stable")]
        return order

    number, place = divmod(step * patients, n)
    batch = epoch(number)[place : place + patients]
    if len(batch) < patients:
        batch = np.concatenate([batch, epoch(number + 1)[: patients - len(batch)]])
    return batch


def _draw(rng, low, high, count):
    """`count` of the integers low .. high - 1, distinct if there are enough, otherwise each about equally often."""
    if high - low >= count:
        return low + rng.choice(high - low, count, replace=False)
    return low + np.resize(rng.permutation(high - low), count)


def hierarchical_batch(cohort, step, seed, patients, slides=2, patches=2, groups=None):
    """The patches of one global batch, rows [patients, slides, patches]. A pure function of (seed, step).

    A patient with too few slides gives one twice (with different patches if it has enough), a slide with too few
    patches gives one twice. The losses know repeats by their id. groups: `class_patients`, to balance the classes.
    """
    rng = np.random.default_rng((seed, step, 1))
    rows = np.empty((patients, slides, patches), np.int64)
    who = (
        balanced_patients(groups, step, seed, patients)
        if groups
        else batch_patients(cohort, step, seed, patients)
    )
    for i, patient in enumerate(who):
        drawn = _draw(
            rng, cohort.patient_slides[patient], cohort.patient_slides[patient + 1], slides
        )
        for slide in np.unique(drawn):
            places = drawn == slide
            low, high = cohort.slide_rows[slide : slide + 2]
            rows[i, places] = _draw(rng, low, high, places.sum() * patches).reshape(-1, patches)
    return rows


def _sixteen_bits(image):
    """The pixels of a 16-bit frame; straight from the file if they lie there as they are, in half of Pillow's time."""
    if len(image.tile) != 1 or image.tile[0][0] != "raw" or image.tile[0][3][0] != "I;16":
        return np.asarray(image)
    pixels = np.fromfile(image.filename, "<u2", image.width * image.height, offset=image.tile[0][2])
    if len(pixels) < image.width * image.height:
        raise OSError("image file is truncated")
    return pixels.reshape(image.height, image.width)


def _fit(image, size):
    """A Pillow image -> array: the short side is brought to `size` and the middle kept; without a size, as it is."""
    deep = image.mode.startswith("I;16")
    pixels = _sixteen_bits(image) if deep else image
    if not size or image.size == (size, size):
        return np.asarray(pixels).astype(np.uint16 if deep else np.uint8, copy=False)
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    image = Image.fromarray(pixels.astype(np.float32)) if deep else image
    pixels = np.asarray(
        image.resize(
            (size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side)
        )
    )
    return pixels.clip(0, 65535).round().astype(np.uint16) if deep else pixels


def decode(path, size=None):
    """An image file -> uint8 [3, size, size]; a TIFF of two 16-bit frames, as OpenSRH has -> uint16 [2, size, size].

    The short side is brought to `size` and the middle kept; without a size it is [C, H, W] as stored. ValueError.
    """
    try:
        with Image.open(path) as image:
            if image.mode[0] not in "IF" and (image.format != "TIFF" or image.n_frames == 1):
                if size:
                    image.draft(
                        "RGB", (size, size)
                    )  # a JPEG decodes at a half or a quarter, never below `size`
                return _fit(image.convert("RGB"), size).transpose(2, 0, 1)
            planes, layout = [], set()
            with suppress(EOFError):  # to ask for n_frames first would read all the headers twice
                for frame in range(3):
                    image.seek(frame)
                    layout.add(f"{image.width} x {image.height}, {image.mode}")
                    planes.append(_fit(image, size))
            if len(planes) != 2 or len(layout) != 1 or "I;16" not in min(layout):
                raise ValueError(
                    f"{getattr(image, 'n_frames', 1)} frames of {' and '.join(sorted(layout))}; beside "
                    "8-bit images, only two 16-bit frames (I;16) of one size are understood"
                )
            return np.stack(planes)
    except (
        Exception
    ) as error:  # whatever a damaged file does to Pillow: KeyError and TypeError have been seen
        raise ValueError(
            f"{path} cannot be read ({error}): restore it or take it out of the manifest"
        ) from error


def patch_size(cohort):
    """The short side of the cohort's first patch that can be opened, in pixels. Raises ValueError if 100 cannot."""
    for row in range(min(100, len(cohort))):
        try:
            with Image.open(cohort.path(row)) as image:
                return min(image.size)
        except Exception as error:  # as in `decode`, which names them
            reason = error
    raise ValueError(f"{cohort.path(0)} cannot be read, nor the patches after it ({reason})")


def substitutes(cohort, row):
    """Patches to show in place of one: those of its slide, then those of the patient's other slides."""
    slide = cohort.slide[row]
    low, high = cohort.slide_rows[slide : slide + 2]
    patient = cohort.slide_patient[slide]
    first, last = cohort.slide_rows[cohort.patient_slides[patient : patient + 2]]
    return [*range(row + 1, high), *range(low, row), *range(high, last), *range(first, low)]


def load_batches(cohort, batches, size, workers=2, ahead=3, skip=False):
    """Decode in the background. batches: arrays of rows. Yields (rows, images [n, ...] as of `decode`) in order.

    Raises ValueError for a patch that cannot be read, naming it. skip: show another patch of the same slide or patient
    instead, always the same one, and stop only when more than 1% of the cohort is bad. Threads, not processes: Pillow
    decodes outside the interpreter lock, and threads share the cohort, not copy it.
    """
    bad = set()

    def read(row):
        for candidate in [row, *substitutes(cohort, row)] if skip else [row]:
            try:
                return candidate, decode(cohort.path(candidate), size)
            except ValueError as error:
                if skip and candidate not in bad:
                    bad.add(candidate)
                    print(
                        f"{error}. Another of its slide or patient stands in ({len(bad)} so far)",
                        file=sys.stderr,
                    )
                if not skip:
                    raise
                if len(bad) > max(1, len(cohort) / 100):
                    raise ValueError(
                        f"{len(bad)} of {len(cohort)} patches cannot be read, more than 1%: data.py "
                        f"check --clean leaves them out. The last: {error}"
                    ) from error
        raise ValueError(
            f"no patch of patient {cohort.patients[cohort.patient[row]]!r} can be read"
        )

    def collect(futures):
        rows, images = zip(*(future.result() for future in futures))
        if len({image.dtype for image in images}) > 1:
            odd = next(row for row, image in zip(rows, images) if image.dtype != images[0].dtype)
            raise ValueError(
                f"{cohort.path(rows[0])} and {cohort.path(odd)}: one has 8 bits, one 16: split them"
            )
        return np.array(rows), torch.from_numpy(np.stack(images))

    with ThreadPoolExecutor(workers) as pool:
        queue = deque()
        for rows in batches:
            queue.append([pool.submit(read, row) for row in rows])
            if len(queue) > ahead:
                yield collect(queue.popleft())
        while queue:
            yield collect(queue.popleft())


def intensities(images):
    """uint8 [n, 3, H, W] -> float32 in [0, 1]; the two planes of SRH, uint16 [n, 2, H, W] -> three channels in [0, 1].

    SRH measures CH2 (lipid) and CH3 (protein, DNA); the channels are CH3 - CH2 + 5000 / 65536, CH2, CH3.
    """
    if images.dtype == torch.uint8:
        return images.float().div(255)
    n, _, H, W = images.shape
    x = torch.empty(n, 3, H, W, device=images.device)
    x[:, 1:] = images
    x[:, 1:] /= 65536
    x[:, 0] = (x[:, 2] - x[:, 1]).add_(5000 / 65536).clamp_(0, 1)
    return x


def channel_statistics(cohort, size, patches=256, workers=2, skip=False):
    """Mean and standard deviation of each channel over some patches, always the same: two lists of three numbers."""
    rows = np.sort(np.random.default_rng(0).permutation(len(cohort))[:patches])
    sums = torch.zeros(2, 3, dtype=torch.float64)
    for _, images in load_batches(
        cohort, np.array_split(rows, -(-len(rows) // 16)), size, workers, skip=skip
    ):
        x = intensities(images).double()
        sums += torch.stack(
            [x.mean(dim=(2, 3)).sum(dim=0), x.square().mean(dim=(2, 3)).sum(dim=0)]
        ) / len(rows)
    return sums[0].tolist(), (sums[1] - sums[0] ** 2).clamp(min=1e-6).sqrt().tolist()


# ------------------------------------------------------------------------------------------------------- augmentation

# Optical density of haematoxylin, eosin and the rest in red, green, blue (Ruifrok and Johnston 2001).
STAINS = torch.tensor([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])

_DEMO = {  # transform: (probability, lowest, highest)
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
_STRONG = {  # the paper's list, each with probability 1/2 as in its code
    "crop": (0.5, 0.2, 1.0),
    "flip": (0.5, 0, 0),
    "rotate": (0.5, -10, 10),
    "translate": (0.5, -0.1, 0.1),
    "brightness": (0.5, 0.8, 1.2),
    "contrast": (0.5, 0.8, 1.2),
    "autocontrast": (0.5, 1, 1),  # each channel stretched to [0, 1]
    "solarise": (0.5, 0.2, 0.2),  # what is above is inverted
    "sharpness": (0.5, 1, 1),  # how much of what a blur takes away is added
    "blur": (0.5, 1, 1),
    "noise": (0.5, 0.01, 0.1),
    "erase": (0.5, 0.02, 0.33),
}
AUGMENTATIONS = {
    "demo": _DEMO,
    "strong-srh": _STRONG,  # the channels of SRH are no colours: nothing mixes them
    # H&E varies in its stains, not in hue as such. On white, 0.2 would invert all of it, and 0.9 inverts the glass.
    "strong": _STRONG
    | {"stain": (0.5, 0.7, 1.3), "background": (0.5, -0.05, 0.05), "solarise": (0.5, 0.9, 0.9)},
    "weak": {"flip": (0.5, 0, 0)},  # HiDisc's
}


def with_probability(augmentation, probability):
    """An augmentation, each of its transforms applied with this probability."""
    return {name: (probability, low, high) for name, (_, low, high) in augmentation.items()}


def view_parameters(n, seed, step, augmentation=_DEMO):
    """The random numbers behind n views, {name: [n, ...]} on the CPU. A pure function of (seed, step).

    Where a transform is not drawn its value is the neutral one. Draw for the global batch and let each rank take its
    rows: then the views do not depend on the number of ranks.
    """
    number = int(np.random.SeedSequence((seed, step)).generate_state(1)[0])
    generator = torch.Generator().manual_seed(number)

    def random(*shape):
        return torch.rand(n, *shape, generator=generator)

    def draw(name, neutral, *shape):
        probability, low, high = augmentation.get(name, (0, neutral, neutral))
        drawn = (random() < probability).view(n, *[1] * len(shape))
        return torch.where(drawn, low + (high - low) * random(*shape), torch.tensor(float(neutral)))

    area = draw("crop", 1)
    aspect = (4 / 3) ** ((2 * random() - 1) * (area < 1))
    size = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=1).clamp(
        max=1
    )  # width, height
    flip, _, _ = augmentation.get("flip", (0, 0, 0))
    parameters = {
        "size": size,
        "centre": (2 * random(2) - 1) * (1 - size) + 2 * draw("translate", 0, 2),
        "flip": 1 - 2 * (random(2) < flip).float(),
        "angle": draw("rotate", 0),
        "stain": draw("stain", 1, 3),
        "background": draw("background", 0, 3),
        "hole": random(2),
        "corner": (64 * random(2)).int(),
        "field": torch.full((n,), number),
    }
    for name, neutral in {
        "brightness": 1,
        "contrast": 1,
        "autocontrast": 0,
        "solarise": 0,
        "sharpness": 0,
        "blur": 0,
        "noise": 0,
        "erase": 0,
    }.items():
        parameters[name] = draw(name, neutral)
    return parameters


def resample(x, size, parameters):
    """Crop, shift, flip and rotate as one affine map and one bilinear look-up. [n, 3, H, W] -> [n, 3, size, size]."""
    angle = torch.deg2rad(parameters["angle"])
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(-1, 2, 2)
    affine = (
        turn * (parameters["size"] * parameters["flip"])[:, None]
    )  # output -> input coordinates, both in [-1, 1]
    at = (2 * torch.arange(size, device=x.device) + 1) / size - 1
    across, down = (
        affine[:, :, 0, None] * at,
        affine[:, :, 1, None] * at + parameters["centre"][:, :, None],
    )
    grid = (
        across[:, :, None, :] + down[:, :, :, None]
    )  # [n, 2, size, size]; F.affine_grid takes 30 times as long
    return F.grid_sample(
        x, grid.permute(0, 2, 3, 1), padding_mode="reflection", align_corners=False
    )


def stain_jitter(x, factor, shift):
    """Scale and shift the density of each stain. x: [n, 3, H, W] in [0, 1]; factor, shift: [n, 3], neutral at 1 and 0.

    Beer-Lambert: x = exp(-density), and the density of a pixel is a sum of stains.
    """
    stains = STAINS.to(x)
    mix = torch.linalg.inv(stains) @ (
        factor[:, :, None] * stains
    )  # [n, 3, 3]: density -> stains -> scaled -> density
    density = (
        mix.transpose(1, 2) @ -x.clamp(min=1 / 255).log().flatten(2) + (shift @ stains)[:, :, None]
    )  # [n, 3, HW]
    return density.neg().exp().view_as(x)


def autocontrast(x):
    """Each channel stretched to [0, 1]; one that is constant stays. x: [n, C, H, W]."""
    low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
    constant = high <= low
    return (x - low * ~constant).div_((high - low) + constant)


def solarise(x, threshold):
    """What is at the threshold [n] or above it is inverted. x: [n, C, H, W] in [0, 1]."""
    above = x.clone().ge_(
        threshold[:, None, None, None]
    )  # 0 or 1; torch.where takes several times as long
    return above.mul_(torch.rsub(x, 1, alpha=2)).add_(x)  # x + above (1 - 2 x)


def blur(x, sigma):
    """Gaussian blur, 5 x 5, reflected at the border. x: [n, C, H, W]; sigma: [n] in pixels, above 0."""
    weight = torch.exp(-(torch.arange(3, device=x.device) ** 2) / (2 * sigma[:, None] ** 2))
    weight = weight / (
        2 * weight.sum(dim=1, keepdim=True) - 1
    )  # of the middle, its neighbours and theirs
    a, b, c = weight.T[:, :, None, None, None]
    x = F.pad(x, (2, 2, 2, 2), mode="reflect")
    for _ in range(
        2
    ):  # along the rows, then along the columns; a grouped convolution takes several times as long
        y = a * x[..., 2:-2]
        y.addcmul_(b, x[..., 1:-3] + x[..., 3:-1]).addcmul_(c, x[..., :-4] + x[..., 4:])
        x = y.mT
    return x


def sharpen(x, amount):
    """Unsharp mask: adds `amount` [n] of what a 3 x 3 binomial blur takes away. x: [n, C, H, W]."""
    smooth, amount = F.pad(x, (1, 1, 1, 1), mode="reflect"), amount[:, None, None, None]
    for _ in range(2):  # 1, 2, 1 along the rows, then along the columns
        smooth = (smooth[..., :-2] + smooth[..., 2:]).add_(smooth[..., 1:-1], alpha=2).mT
    return (x * (1 + amount)).addcmul_(smooth, -amount / 16)


def erase(x, area, hole):
    """A square of `area` [n], a share of the image, about `hole` [n, 2] gets the image's mean. x: [n, C, H, W]."""
    at = (torch.arange(x.shape[-1], device=x.device) + 0.5) / x.shape[-1]
    inside = ((at - hole[:, :, None]).abs() < area.sqrt()[:, None, None] / 2).to(x)  # [n, 2, side]
    inside = (inside[:, 0, :, None] * inside[:, 1, None, :])[:, None]
    return torch.lerp(x, x.mean(dim=(1, 2, 3), keepdim=True), inside)


def make_views(images, parameters, size):
    """The views of a batch, on its device: images of `decode` [n, ...] -> float32 [n V, 3, size, size] in [0, 1].

    parameters: of n V views (`view_parameters`); the V views of a patch follow one another.
    """
    views = len(parameters["angle"]) // len(images)
    out = torch.empty(len(images) * views, 3, size, size, device=images.device)
    # One field of white noise serves the batch, and each view takes a window of it: to draw every pixel is slow.
    generator = torch.Generator().manual_seed(int(parameters["field"][0]))
    field = torch.randn(3, size + 64, size + 64, generator=generator).to(
        images.device, non_blocking=True
    )
    # A patch at a time stays in a CPU's cache, which is several times as fast; a GPU takes the batch at once.
    step = len(images) if out.is_cuda else max(1, 2**18 // (views * 3 * size * size))
    for first in range(0, len(images), step):
        part = slice(first * views, (first + step) * views)
        some = {name: value[part] for name, value in parameters.items()}
        torch.clamp(_views(images[first : first + step], some, size, field), 0, 1, out=out[part])
    return out


def _views(images, parameters, size, field):
    to = {name: value.to(images.device, non_blocking=True) for name, value in parameters.items()}

    def each(name):
        return to[name][:, None, None, None]

    def where_drawn(name, transform, *others):
        """Costly transforms take only the views that drew them; who did is found on the CPU: no waiting for a GPU."""
        rows = parameters[name].nonzero()[:, 0]
        if len(rows):
            first, last = int(rows[0]), int(rows[-1]) + 1
            neighbours = last - first == len(
                rows
            )  # as all of two views are: a slice need not be copied
            rows = slice(first, last) if neighbours else rows.to(x.device, non_blocking=True)
            x[rows] = transform(x[rows], *(to[other][rows] for other in (name, *others)))

    x = (
        intensities(images)[:, None]
        .expand(-1, len(to["angle"]) // len(images), -1, -1, -1)
        .flatten(0, 1)
    )
    x = resample(x, size, to)
    if (parameters["stain"] != 1).any() or parameters["background"].any():
        x = stain_jitter(x, to["stain"], to["background"])
    x *= each("brightness") * each("contrast")
    x += x.mean(dim=(1, 2, 3), keepdim=True) * (1 / each("contrast") - 1)
    where_drawn("autocontrast", lambda x, _: autocontrast(x))
    where_drawn("solarise", solarise)
    where_drawn("sharpness", sharpen)
    where_drawn("blur", blur)
    for row in parameters["noise"].nonzero()[:, 0].tolist():
        down, across = parameters["corner"][row].tolist()
        x[row].add_(
            field[:, down : down + size, across : across + size],
            alpha=float(parameters["noise"][row]),
        )
    where_drawn("erase", erase, "hole")
    return x


def plain_view(images, size):
    """The view to evaluate: all that `decode` gave, resized. [n, ...] -> float32 [n, 3, size, size] in [0, 1]."""
    x = intensities(images)
    if x.shape[-1] != size:
        x = F.interpolate(
            x, (size, size), mode="bilinear", antialias=True, align_corners=False
        ).clamp(0, 1)
    return x


# ------------------------------------------------------------------------------------------------------- your own data


def summary(cohort):
    """What a person wants to see of a cohort before training on it, as lines."""

    def spread(counts, name):
        return f"{name}: {counts.min()} to {counts.max()}, median {np.median(counts):.0f}"

    patches, slides = np.diff(cohort.slide_rows), np.diff(cohort.patient_slides)
    by_class = [f"{name} {(cohort.label == c).sum()}" for c, name in enumerate(cohort.classes)]
    unlabelled = (cohort.label < 0).sum()
    splits = [
        f"{name} {(cohort.patient_split[cohort.present] == i).sum()}"
        for i, name in enumerate(SPLITS)
    ]
    return [
        str(cohort),
        spread(slides[slides > 0], "slides a patient"),
        spread(patches[patches > 0], "patches a slide"),
        "patches by class: " + ", ".join(by_class + [f"without {unlabelled}"] * bool(unlabelled)),
        "patients by split: " + ", ".join(splits),
    ]


def write_manifest(path, cohort, rows, split=True):
    """Write the manifest of some rows of a cohort, whole or not at all."""
    columns = ["path", "patient", "slide", *["label"] * bool(cohort.classes), *["split"] * split]
    with open(f"{path}.part", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for row in rows:
            slide, label = cohort.slide[row], cohort.label[row]
            patient = cohort.slide_patient[slide]
            values = {
                "path": cohort.names[row].decode(),
                "patient": cohort.patients[patient],
                "slide": cohort.slides[slide],
                "label": cohort.classes[label] if label >= 0 else "",
                "split": SPLITS[cohort.patient_split[patient]],
            }
            writer.writerow([values[name] for name in columns])
    os.replace(f"{path}.part", path)


def path_pattern(pattern):
    """'{label}/{patient}/{slide}/*.png' -> a regular expression with these names; one that has names stays as it is.

    {name} matches within a folder or file name, and again only what it matched before; * matches there too, and **
    across folders. Raises ValueError without patient and slide, and for what is no regular expression.
    """
    expression = pattern
    if "(?P<" not in pattern:
        expression, seen = "", set()
        for part in re.split(r"(\{\w+\}|\*\*|\*)", pattern):
            name = part[1:-1]
            named = f"(?P={name})" if name in seen else f"(?P<{name}>[^/]+?)"
            expression += {"**": ".*", "*": "[^/]*"}.get(part) or (
                named if part[:1] == "{" else re.escape(part)
            )
            seen.add(name)
    try:
        compiled = re.compile(expression)
    except re.error as error:
        raise ValueError(f"--pattern {pattern!r} is no regular expression: {error}") from error
    if (
        not {"patient", "slide"}
        <= set(compiled.groupindex)
        <= {"patient", "slide", "label", "split"}
    ):
        raise ValueError(
            f"--pattern {pattern!r} must name patient and slide, and may name label and split; it names "
            + (", ".join(compiled.groupindex) or "nothing")
        )
    return compiled


def index(root, pattern, label_level="patch", nested=False, partial=False):
    """The image files under a folder -> Cohort, patient, slide, label and split as read off their paths.

    nested: slides of several patients share names (1, 2, ...) and are different slides. partial: leaves out the files
    that the pattern does not match. Raises ValueError, with examples, for such files, for nothing at all, for a slide
    under two patients, and for two labels within one slide or patient where label_level says that there is one.
    """
    if not os.path.isdir(root):
        raise FileNotFoundError(f"{root} is no folder")
    expression, known = path_pattern(pattern), Image.registered_extensions()
    found, others = [], []
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted(files):
            path = os.path.relpath(os.path.join(folder, name), root).replace(os.sep, "/")
            if os.path.splitext(name)[1].lower() in known:
                match = expression.fullmatch(path)
                found += [(path, match.groupdict(""))] if match else []
                others += [] if match else [path]
    if not found or (others and not partial):
        raise ValueError(
            f"{root}: {pattern!r} matches {len(found)} image files and not {len(others)} others"
            + "".join(f"\n    {path}" for path in others[:3])
            + "\nMend the pattern"
            + ", or leave those out with --partial" * bool(found)
        )
    cohort = build_cohort(
        root,
        (
            (
                path,
                path,
                at["patient"],
                f"{at['patient']}/" * nested + at["slide"],
                at.get("label", ""),
                at.get("split", ""),
            )
            for path, at in found
        ),
        0.2,
    )
    groups = {"patient": cohort.patient, "slide": cohort.slide, "patch": np.arange(len(cohort))}[
        label_level
    ]
    order = np.argsort(groups, kind="stable")
    torn = np.flatnonzero((np.diff(groups[order]) == 0) & (np.diff(cohort.label[order]) != 0))
    if len(torn):
        examples = [
            " and ".join(cohort.names[row].decode() for row in order[i : i + 2]) for i in torn[:3]
        ]
        raise ValueError(f"{root}: one {label_level} has two labels: " + "; ".join(examples))
    return cohort


def check(cohort, workers=2):
    """Decode every patch. Returns {problem: rows}: unreadable, truncated, constant (background), odd-sized."""

    def look(row):
        try:
            pixels = decode(cohort.path(row))
        except ValueError as error:
            return "truncated" if "truncated" in str(error) else "unreadable"
        # Glass varies by its noise alone. SRH uses a small part of its 65,536 levels: only what is flat is refused.
        flat = pixels.std(axis=(1, 2)).max() < (2.5 if pixels.dtype == np.uint8 else 64)
        return "constant" if flat else pixels.shape

    results = []
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(cohort), desc="check", unit="patch", leave=False) as bar,
    ):
        for rows in np.array_split(np.arange(len(cohort)), -(-len(cohort) // 1024)):
            results += pool.map(look, rows)
            bar.update(len(rows))
    shapes = Counter(result for result in results if isinstance(result, tuple))
    usual = shapes.most_common(1)[0][0] if shapes else None
    problems = {name: [] for name in ("unreadable", "truncated", "constant", "odd-sized")}
    for row, result in enumerate(results):
        if result != usual:
            problems["odd-sized" if isinstance(result, tuple) else result].append(row)
    return problems


def contact_sheet(cohort, augmentation, views=4, seed=0, size=160):
    """A Pillow image: a patient, two slides, two patches of each, and views of every patch beside it."""
    rows = hierarchical_batch(cohort, 0, seed, patients=1).reshape(-1)
    _, patches = next(load_batches(cohort, [rows], 2 * size))
    parameters = view_parameters(len(rows) * views, seed, 0, AUGMENTATIONS[augmentation])
    sheet = make_views(patches, parameters, size).unflatten(0, (len(rows), views))
    sheet = torch.cat(
        [plain_view(patches, size)[:, None], sheet], dim=1
    )  # [patches, 1 + views, 3, size, size]
    sheet = F.pad(sheet, (2, 2, 18, 2), value=1).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    image = Image.fromarray(sheet.mul(255).round().byte().numpy())
    draw = ImageDraw.Draw(image)
    for i, row in enumerate(rows):
        slide, label = cohort.slide[row], cohort.label[row]
        text = (
            f"patient {cohort.patients[cohort.patient[row]]}, slide {cohort.slides[slide]}, "
            + (f"{cohort.classes[label]}, " if label >= 0 else "")
            + cohort.names[row].decode()
        )
        draw.text((4, i * (size + 20) + 4), text, fill="black")
    return image


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    index_ = commands.add_parser("index", help="write a manifest from a folder tree")
    index_.add_argument("root", help="the folder; manifest.csv is written there")
    index_.add_argument(
        "--pattern",
        required=True,
        help="how paths below it are made, as '{label}/{patient}/{slide}/"
        "*.png', or a regular expression with groups patient, slide, and optionally label and split",
    )
    index_.add_argument(
        "--label-level",
        choices=("patch", "slide", "patient"),
        default="patch",
        help="what a label belongs to; two in one are refused",
    )
    index_.add_argument(
        "--nested", action="store_true", help="slides of different patients share names, as 1, 2, 3"
    )
    index_.add_argument(
        "--partial",
        action="store_true",
        help="leave out the images that the pattern does not match",
    )
    index_.add_argument(
        "--overwrite", action="store_true", help="replace a manifest.csv that is there"
    )
    check_ = commands.add_parser(
        "check", help="decode every patch; exit with 1 if some cannot be used"
    )
    check_.add_argument("root", help="a cohort")
    check_.add_argument(
        "--clean",
        metavar="NAME.csv",
        default="",
        help="write a manifest without them, in the cohort's folder",
    )
    check_.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="decoding threads, at least 1"
    )
    show = commands.add_parser(
        "show", help="draw a patient, two slides, their patches and views of them"
    )
    show.add_argument("root", help="a cohort")
    show.add_argument("--out", default="views.png", help="the picture to write")
    show.add_argument(
        "--augmentation", choices=AUGMENTATIONS, default="demo", help="as in train.py"
    )
    show.add_argument(
        "--seed", type=int, default=0, help="another seed is another patient and other views"
    )
    args = parser.parse_args()
    if args.command == "index":
        path = os.path.join(args.root, "manifest.csv")
        if os.path.exists(path) and not args.overwrite:
            raise SystemExit(f"{path} is there already: --overwrite replaces it")
        cohort = index(args.root, args.pattern, args.label_level, args.nested, args.partial)
        write_manifest(
            path, cohort, range(len(cohort)), split="split" in path_pattern(args.pattern).groupindex
        )
        print("\n".join([*summary(cohort), f"{path} is written"]))
    if args.command == "check":
        cohort = read_cohort(args.root)
        path = os.path.join(cohort.root, args.clean)
        if args.clean and (not path.endswith(".csv") or os.path.exists(path)):
            check_.error(f"--clean {args.clean}: name a file NAME.csv that is not there yet")
        problems = check(cohort, args.workers)
        print("\n".join(summary(cohort)))
        for name, rows in problems.items():
            print(
                f"{name}: {len(rows)}"
                + "".join(f"\n    {cohort.names[row].decode()}" for row in rows[:5])
            )
        bad = set().union(*problems.values())
        if args.clean:
            by_hash = (
                cohort.patient_split == hash_split(cohort.patients)
            ).all()  # then it needs no column
            write_manifest(
                path,
                cohort,
                [row for row in range(len(cohort)) if row not in bad],
                split=not by_hash,
            )
            print(f"{path} holds the other {len(cohort) - len(bad)}")
        raise SystemExit(1 if bad else 0)
    if args.command == "show":
        contact_sheet(read_cohort(args.root), args.augmentation, seed=args.seed).save(args.out)
        print(f"{args.out}: each row a patch, as it is and in four views")


if __name__ == "__main__":
    main()
