"""The data: a cohort (patient > slide > patch), hierarchical batches, augmentation on the device, and demo tissue.

    python data.py demo OUT          write a small cohort of procedural H&E-like tissue

A cohort is a folder with a manifest.csv: columns path, patient, slide, and optionally label (of the patch) and split
(of the patient: train, val or test). Paths are relative to the manifest. Pretraining needs no labels.
"""

import argparse
import csv
import hashlib
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
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
        # Slide s holds the rows slide_rows[s] : slide_rows[s + 1], patient p the slides patient_slides[p] : ...[p +
        # 1].
        self.slide_rows = np.searchsorted(self.slide, np.arange(len(self.slides) + 1))
        self.patient_slides = np.searchsorted(self.slide_patient, np.arange(len(self.patients) + 1))
        self.present = np.flatnonzero(np.diff(self.slide_rows[self.patient_slides]))  # the patients with patches here

    def __len__(self):
        return len(self.slide)

    def __str__(self):
        return f"{len(self.present)} patients, {(np.diff(self.slide_rows) > 0).sum()} slides, {len(self)} patches"

    def path(self, row):
        """Where a patch is on disk."""
        return os.path.join(self.root, self.names[row].decode())

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
            raise ValueError(f"{self.root}: no patient is in the split {split!r}: add patients, or a split column")
        return replace(self, names=self.names[keep], slide=self.slide[keep], label=self.label[keep])


def hash_split(patients, val_fraction=0.2):
    """Split names by their hash: the same on every machine, and no patient moves when another is added.

    Returns int8 indices into SPLITS. If chance leaves no patient in val (in train), as it can with a handful of
    patients, the one with the lowest (highest) hash goes there.
    """
    value = np.array([int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48 for name in patients])
    split = (value < val_fraction).astype(np.int8)
    if len(patients) > 1 and not split.any():
        split[value.argmin()] = 1
    if len(patients) > 1 and split.all():
        split[value.argmax()] = 0
    return split


def read_manifest(root, val_fraction=0.2):
    """The folder of a manifest.csv, or that file -> Cohort.

    Raises ValueError, with file and line, for a missing column, an empty field, a path that leaves the folder, a path
    twice, a slide under two patients, and a patient in two splits.
    """
    manifest = str(root) if str(root).endswith(".csv") else os.path.join(root, "manifest.csv")
    if not os.path.exists(manifest):
        raise FileNotFoundError(f"{manifest} does not exist: a cohort needs one, with columns path, patient, slide")
    with open(manifest, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if missing := [c for c in ("path", "patient", "slide") if c not in header]:
            raise ValueError(f"{manifest}: no column {', '.join(missing)}; the first line is {','.join(header)!r}")
        places = [header.index(c) if c in header else -1 for c in ("path", "patient", "slide", "label", "split")]

        def entries():
            for row in filter(None, reader):
                where = f"{manifest}, line {reader.line_num}"
                if len(row) != len(header):
                    raise ValueError(f"{where}: {len(row)} fields, but the first line names {len(header)} columns")
                yield where, *(row[i].strip() if i >= 0 else "" for i in places)

        return build_cohort(os.path.dirname(os.path.abspath(manifest)), entries(), val_fraction)


def build_cohort(root, entries, val_fraction):
    """An iterable of (where it stands, path, patient, slide, label or "", split or "") -> Cohort."""
    names, slide_of, label_of, seen = [], [], [], set()
    slides, patients, labels = {}, {}, {}  # slide -> (number, patient), patient -> split, label -> number
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
            raise ValueError(f"{where}: the slide {slide!r} is of patient {owner!r} above and of {patient!r} here; "
                             "if these are two slides, name them differently")
        if patients.setdefault(patient, split) != split:
            raise ValueError(f"{where}: the patient {patient!r} is in {patients[patient]!r} above and in {split!r} "
                             "here; all patches of a patient must be on one side")
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
    return Cohort(root, np.array(names)[order], slide[order], label[order], slide_patient, split,
                  slide_names, patient_names, classes)


# ----------------------------------------------------------------------------------------------- batches and decoding


def check_patients(cohort, patients):
    """Raises ValueError unless batches of this many distinct patients can show every patient once an epoch."""
    n = len(cohort.present)
    if patients != n and 2 * patients - 1 > n:
        raise ValueError(f"--patients {patients} of {n} training patients: use {n}, or at most {(n + 1) // 2}")


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
        if tail := number * n % patients:  # places of the first batch that the epoch before has filled
            before = np.random.default_rng((seed, number - 1)).permutation(cohort.present)[-tail:]
            head = order[:patients]
            order[:patients] = head[np.argsort(np.isin(head, before), kind="stable")]
        return order

    number, place = divmod(step * patients, n)
    batch = epoch(number)[place:place + patients]
    if len(batch) < patients:
        batch = np.concatenate([batch, epoch(number + 1)[:patients - len(batch)]])
    return batch


def _draw(rng, low, high, count):
    """`count` of the integers low .. high - 1, distinct if there are enough, otherwise each about equally often."""
    if high - low >= count:
        return low + rng.choice(high - low, count, replace=False)
    return low + np.resize(rng.permutation(high - low), count)


def hierarchical_batch(cohort, step, seed, patients, slides=2, patches=2):
    """The patches of one global batch, rows [patients, slides, patches]. A pure function of (seed, step).

    A patient with too few slides gives one twice (with different patches if it has enough), a slide with too few
    patches gives one twice. The losses know repeats by their id.
    """
    rng = np.random.default_rng((seed, step, 1))
    rows = np.empty((patients, slides, patches), np.int64)
    for i, patient in enumerate(batch_patients(cohort, step, seed, patients)):
        drawn = _draw(rng, cohort.patient_slides[patient], cohort.patient_slides[patient + 1], slides)
        for slide in np.unique(drawn):
            places = drawn == slide
            low, high = cohort.slide_rows[slide:slide + 2]
            rows[i, places] = _draw(rng, low, high, places.sum() * patches).reshape(-1, patches)
    return rows


def decode(path, size):
    """An image file -> uint8 [3, size, size]: the short side is brought to `size` and the middle kept. ValueError."""
    try:
        with Image.open(path) as image:
            image.draft("RGB", (size, size))  # a JPEG decodes at a half or a quarter, never below `size`
            image = image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read ({error}): restore it or take it out of the manifest") from error
    if image.size != (size, size):
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
    return np.asarray(image).transpose(2, 0, 1)


def patch_size(cohort):
    """The short side of the cohort's first patch, in pixels."""
    with Image.open(cohort.path(0)) as image:
        return min(image.size)


def load_batches(cohort, batches, size, workers=2, ahead=3):
    """Decode in the background. batches: an iterable of arrays of rows. Yields (rows, uint8 [n, 3, size, size]) in
    order.

    Threads, not processes: Pillow decodes outside the interpreter lock, and threads share the cohort, not copy it.
    """
    with ThreadPoolExecutor(workers) as pool:
        queue = deque()
        for rows in batches:
            queue.append((rows, [pool.submit(decode, cohort.path(row), size) for row in rows]))
            if len(queue) > ahead:
                rows, images = queue.popleft()
                yield rows, torch.from_numpy(np.stack([image.result() for image in images]))
        for rows, images in queue:
            yield rows, torch.from_numpy(np.stack([image.result() for image in images]))


# ------------------------------------------------------------------------------------------------------- augmentation

# Optical density of haematoxylin, eosin and the rest in red, green, blue (Ruifrok and Johnston 2001).
STAINS = torch.tensor([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])

AUGMENTATION = {  # transform: (probability, lowest, highest)
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


def view_parameters(n, seed, step, augmentation=AUGMENTATION):
    """The random numbers behind n views, {name: [n, ...]} on the CPU. A pure function of (seed, step).

    Where a transform is not drawn its value is the neutral one. Draw for the global batch and let each rank take its
    rows: then the views do not depend on the number of ranks.
    """
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, step)).generate_state(1)[0]))

    def random(*shape):
        return torch.rand(n, *shape, generator=generator)

    def draw(name, neutral, *shape):
        probability, low, high = augmentation[name]
        drawn = (random() < probability).view(n, *[1] * len(shape))
        return torch.where(drawn, low + (high - low) * random(*shape), torch.tensor(float(neutral)))

    area = draw("crop", 1)
    aspect = (4 / 3) ** ((2 * random() - 1) * (area < 1))
    size = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=1).clamp(max=1)  # width, height
    return {"size": size, "centre": (2 * random(2) - 1) * (1 - size) + 2 * draw("translate", 0, 2),
            "flip": 1 - 2 * (random(2) < augmentation["flip"][0]).float(), "angle": draw("rotate", 0),
            "stain": draw("stain", 1, 3), "background": draw("background", 0, 3),
            "brightness": draw("brightness", 1), "contrast": draw("contrast", 1), "blur": draw("blur", 0),
            "noise": draw("noise", 0), "erase": draw("erase", 0), "hole": random(2)}


def resample(x, size, parameters):
    """Crop, shift, flip and rotate as one affine map and one bilinear look-up. [n, 3, H, W] -> [n, 3, size, size]."""
    angle = torch.deg2rad(parameters["angle"])
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(-1, 2, 2)
    affine = turn * (parameters["size"] * parameters["flip"])[:, None]  # output -> input coordinates, both in [-1, 1]
    affine = torch.cat([affine, parameters["centre"][:, :, None]], dim=2)
    grid = F.affine_grid(affine, [len(x), 3, size, size], align_corners=False)
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def stain_jitter(x, factor, shift):
    """Scale and shift the density of each stain. x: [n, 3, H, W] in [0, 1]; factor, shift: [n, 3], neutral at 1 and 0.

    Beer-Lambert: x = exp(-density), and the density of a pixel is a sum of stains.
    """
    stains = STAINS.to(x)
    mix = torch.linalg.inv(stains) @ (factor[:, :, None] * stains)  # [n, 3, 3]: density -> stains -> scaled -> density
    density = mix.transpose(1, 2) @ -x.clamp(min=1 / 255).log().flatten(2) + (shift @ stains)[:, :, None]  # [n, 3, HW]
    return density.neg().exp().view_as(x)


def blur(x, sigma):
    """Gaussian blur, 5 x 5, reflected at the border. x: [n, C, H, W]; sigma: [n] in pixels, above 0."""
    n, C, H, W = x.shape
    kernel = torch.exp(-torch.arange(-2, 3, device=x.device) ** 2 / (2 * sigma[:, None] ** 2))
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).repeat_interleave(C, dim=0)  # [n C, 5]
    x = F.pad(x, (2, 2, 2, 2), mode="reflect").view(1, n * C, H + 4, W + 4)
    x = F.conv2d(F.conv2d(x, kernel[:, None, :, None], groups=n * C), kernel[:, None, None, :], groups=n * C)
    return x.view(n, C, H, W)


def make_views(images, parameters, size, generator=None):
    """The views of a batch, on its device: uint8 [n, 3, H, W] -> float32 [n V, 3, size, size] in [0, 1].

    parameters: of n V views (`view_parameters`); the V views of a patch follow one another. generator: of pixel noise.
    """
    blurred = parameters["blur"].nonzero()[:, 0]  # found on the CPU: the device need not be waited for
    parameters = {name: value.to(images.device, non_blocking=True) for name, value in parameters.items()}

    def each(name):
        return parameters[name][:, None, None, None]

    views = len(parameters["angle"]) // len(images)
    x = resample(images.float().div(255).repeat_interleave(views, dim=0), size, parameters)
    x = stain_jitter(x, parameters["stain"], parameters["background"]) * each("brightness")
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    x = mean + (x - mean) * each("contrast")
    if len(blurred):
        blurred = blurred.to(x.device)
        x[blurred] = blur(x[blurred], parameters["blur"][blurred])
    x = x + each("noise") * torch.randn(x.shape, generator=generator, device=x.device)
    at = (torch.arange(size, device=x.device) + 0.5) / size
    erased = (at - parameters["hole"][:, :, None]).abs() < parameters["erase"].sqrt()[:, None, None] / 2
    x = torch.where((erased[:, 0, :, None] & erased[:, 1, None, :])[:, None], mean, x)
    return x.clamp(0, 1)


def plain_view(images, size):
    """The view to evaluate: the whole patch, resized. uint8 [n, 3, H, W] -> float32 [n, 3, size, size] in [0, 1]."""
    x = images.float().div(255)
    if x.shape[-1] != size:
        x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
    return x


# -------------------------------------------------------------------------------------------------------- demo tissue

FACTORS = ("cellularity", "nuclear_size", "pleomorphism", "elongation", "vessels", "necrosis", "fibres")
DEMO_CLASSES = {  # the mean of each factor
    "high_grade": (0.60, 0.50, 0.80, 0.30, 0.45, 0.35, 0.30),
    "low_grade": (0.55, 0.45, 0.25, 0.30, 0.40, 0.25, 0.30),
    "normal": (0.35, 0.40, 0.25, 0.30, 0.35, 0.20, 0.40),
    "spindle": (0.55, 0.45, 0.30, 0.80, 0.40, 0.25, 0.80),
}


def render(factors, rng, stain=(1.0, 1.0, 0.0), size=64):
    """One procedural H&E-like patch, uint8 [size, size, 3].

    factors: seven numbers in [0, 1], as FACTORS. stain: strength of haematoxylin, of eosin, shift of hue. Nuclei are
    soft ellipses of haematoxylin, fibres a warped sine of eosin, vessels rings about a lumen, necrosis a pale blob.
    """
    cellularity, nuclear_size, pleomorphism, elongation, vessels, necrosis, fibres = factors
    y, x = np.mgrid[:size, :size].astype(np.float32)
    direction = rng.uniform(0, np.pi)
    along, across = x * np.cos(direction) + y * np.sin(direction), y * np.cos(direction) - x * np.sin(direction)
    warp = rng.uniform(1, 3) * np.sin(along * rng.uniform(0.05, 0.12) + rng.uniform(0, 6))
    eosin = 0.35 + 0.3 * fibres * np.sin(across * rng.uniform(0.7, 1.0) + warp)

    n = rng.poisson((6 + 54 * cellularity) * (size / 64) ** 2)
    radius = (1.6 + 2.6 * nuclear_size) * np.exp(rng.normal(0, 0.05 + 0.55 * pleomorphism, n))
    stretch = 1 + 3 * elongation * rng.uniform(0.6, 1.2, n)
    angle = direction + rng.normal(0, 0.15 + 0.9 * (1 - elongation), n)
    darkness = np.exp(rng.normal(0, 0.05 + 0.3 * pleomorphism, n)).astype(np.float32)
    x0, y0 = rng.uniform(0, size, (2, n))
    # The squared distance from a centre, in units of the radii, is a quadratic form in x and y: one product for all.
    cos, sin, long, short = np.cos(angle), np.sin(angle), 1 / (radius**2 * stretch), stretch / radius**2
    a, b, c = cos**2 * long + sin**2 * short, 2 * cos * sin * (long - short), sin**2 * long + cos**2 * short
    form = np.stack([a, b, c, -2 * a * x0 - b * y0, -2 * c * y0 - b * x0, a * x0**2 + b * x0 * y0 + c * y0**2], axis=1)
    distance = form.astype(np.float32) @ np.stack([x * x, x * y, y * y, x, y, np.ones_like(x)]).reshape(6, -1)
    nuclei = (np.clip(1.8 - distance, 0, 1) * darkness[:, None]).max(axis=0, initial=0).reshape(size, size)

    for _ in range(rng.poisson(4 * vessels)):
        r, lumen = np.hypot(x - rng.uniform(0, size), y - rng.uniform(0, size)), rng.uniform(3, 7)
        inside = np.clip(lumen - r, 0, 1)
        nuclei = nuclei * (1 - inside)
        eosin = eosin * (1 - 0.9 * inside) + 0.7 * np.exp(-np.square((r - lumen - 1) / 1.2))
    ragged = np.hypot(x - rng.uniform(0, size), y - rng.uniform(0, size)) + 2 * np.sin(x * 0.6) + 2 * np.sin(y * 0.5)
    dead = np.clip((size * 0.75 * necrosis * rng.uniform(0.6, 1.2) - ragged) / 4, 0, 1)
    nuclei, eosin = nuclei * (1 - 0.85 * dead), eosin * (1 - 0.5 * dead) + 0.1 * dead * rng.random((size, size))

    haematoxylin = STAINS[0].numpy() + np.array([stain[2], 0, -stain[2]])
    density = stain[0] * (1.1 * nuclei + 0.06)[..., None] * haematoxylin + rng.normal(0, 0.03, (size, size, 3))
    density += stain[1] * np.maximum(eosin, 0)[..., None] * STAINS[1].numpy()
    return (255 * np.exp(-np.maximum(density, 0))).round().astype(np.uint8)


def write_demo(out, patients=40, slides=3, patches=8, seed=0):
    """Write demo tissue: so many patients a class, slides a patient and patches a slide. Returns the folder.

    Factors vary by class, patient, slide and patch (factors.csv holds them); stain varies by patient and slide and
    means nothing. A fifth of the patches of a tumour look normal but carry its label. Two of five patients are for
    validation.
    """
    rng = np.random.default_rng(seed)
    tables = {"factors.csv": [["path", *FACTORS]], "manifest.csv": [["path", "patient", "slide", "label", "split"]]}
    with tqdm(total=len(DEMO_CLASSES) * patients * slides * patches, desc="demo tissue", unit="patch") as bar:
        for label, mean in DEMO_CLASSES.items():
            for p in range(patients):
                patient, split = f"{label}-{p:02d}", "val" if p % 5 in (1, 3) else "train"
                os.makedirs(os.path.join(out, "images", patient), exist_ok=True)
                of_patient = rng.normal(0, 0.12, len(FACTORS))
                patient_stain = np.array((1, 1, 0)) + rng.normal(0, (0.15, 0.15, 0.05))
                for s in range(slides):
                    of_slide = of_patient + rng.normal(0, 0.05, len(FACTORS))
                    stain = patient_stain + rng.normal(0, (0.07, 0.07, 0.02))
                    for b in range(patches):
                        centre = DEMO_CLASSES["normal"] if rng.random() < 0.2 else mean
                        factors = np.clip(centre + of_slide + rng.normal(0, 0.06, len(FACTORS)), 0, 1)
                        path = f"images/{patient}/{s}-{b}.png"
                        Image.fromarray(render(factors, rng, stain)).save(os.path.join(out, path))
                        tables["factors.csv"].append([path, *factors.round(4)])
                        tables["manifest.csv"].append([path, patient, f"{patient}-{s}", label, split])
                        bar.update()
    for name, rows in tables.items():  # the manifest comes last and whole: where it is, everything is
        with open(os.path.join(out, f"{name}.part"), "w", newline="") as file:
            csv.writer(file).writerows(rows)
        os.replace(os.path.join(out, f"{name}.part"), os.path.join(out, name))
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="write a cohort of procedural tissue with known truth")
    demo.add_argument("out", help="folder to write to")
    demo.add_argument("--patients", type=int, default=40, help="patients in each of the four classes")
    demo.add_argument("--seed", type=int, default=0, help="another seed is another cohort of the same kind")
    args = parser.parse_args()
    if args.command == "demo":
        print(read_manifest(write_demo(args.out, patients=args.patients, seed=args.seed)))


if __name__ == "__main__":
    main()
