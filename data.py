"""The data: from a manifest to a cohort, to batches of patches, to augmented views.

    python data.py [FOLDER [AUGMENTATION]]    one batch: its patches, ids, and views as a picture

    manifest.csv -> Cohort -> hierarchical_batch: rows -> decode: patches -> make_views: views

A cohort is a folder with a manifest.csv, which `python -m tools.cohort` writes: columns path,
patient and slide, and optionally label (of the patch), split (of the patient: train, val or test)
and root (of the paths; default: the manifest's folder). Another hierarchy has other columns.
"""

import csv
import hashlib
import math
import os
import re
import sys
import tempfile
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import cycle, islice

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, ImageSequence
from torchvision.transforms.v2.functional import adjust_sharpness, autocontrast
from torchvision.utils import save_image

from losses import LEVELS

SPLITS = ("train", "val", "test")
ODD = re.compile(r"[\n\r\ud800-\udfff]")  # a line break, or bytes that are not UTF-8


def load_views(
    cohort,
    steps,  # a range; a run begins with step 1
    patients,  # in a global batch
    counts,  # views per patch, patches per slide, slides per patient
    augmentation,  # a name in AUGMENTATIONS
    sizes,  # pixels of a decoded patch (1.3 S, see READ_AT) and of a view (S)
    seed=0,
    device="cpu",
    share=(0, 1),  # (rank, world): which share of the patients to load
    workers=2,
):
    """Yields one batch per step: (images [n, 3, S, S] in [0, 1], ids {level: [n]}).

    Rows are ordered by patient, slide, patch and view. All randomness is a function of seed, step
    and place in the batch: resuming needs no state, and the number of processes changes nothing.
    """
    rank, world = share
    places = range(rank * patients // world, (rank + 1) * patients // world)
    read_size, image_size = sizes
    views, *others = counts
    batches = (hierarchical_batch(cohort, step, seed, patients, others, places) for step in steps)
    # Threads decode the next batches while the model trains on this one.
    for step, (rows, patches) in zip(steps, load_batches(cohort, batches, read_size, workers)):
        views_each = math.prod(counts)  # of a patient
        parameters = view_parameters(AUGMENTATIONS[augmentation], seed, step, places, views_each)
        noise_seed = seed_of("noise", seed, step)
        images = make_views(patches.to(device), parameters, image_size, noise_seed)
        ids = torch.from_numpy(cohort.ids(rows)).to(device)  # [n / views, levels]
        ids = dict(zip(cohort.levels, ids.repeat_interleave(views, dim=0).T))
        yield images.contiguous(memory_format=torch.channels_last), ids


def seed_of(stream, *numbers):
    """A seed in [0, 2^63). Streams with different names never share one, whatever the numbers."""
    words = " ".join(map(str, [stream, *numbers]))
    return int(hashlib.sha256(words.encode()).hexdigest()[:16], 16) >> 1


def hierarchical_batch(cohort, step, seed, patients, counts=(2, 2), places=None):
    """The patches of one batch: rows [patients, slides of a patient, patches of a slide].

    counts: patches per slide, slides per patient. places: which part of the batch to draw. A
    patient with too few slides contributes one twice; the losses recognise repeats by id.
    """
    # An epoch is one shuffle of all patients, cut into whole batches; the remainder is dropped.
    epoch, number = divmod(step - 1, len(cohort.present) // patients)
    order = shuffle(len(cohort.present), seed, epoch)
    batch = cohort.present[order[number * patients : (number + 1) * patients]]
    rows = []
    for place in range(patients) if places is None else places:
        rng = np.random.default_rng(seed_of("patches", seed, step, place))
        drawn = [batch[place]]
        for depth, count in reversed(list(enumerate(counts))):  # slides, then their patches
            # Each group deals its members from a shuffled deck, and starts over when it runs out.
            decks, most = {}, len(drawn) * count  # most: what one group deals, if all is from it
            for group in dict.fromkeys(drawn):
                first, last = cohort.starts[depth][group : group + 2]  # where its members are
                members = cohort.members[depth][first:last]
                deck = rng.choice(members, min(most, len(members)), replace=False)
                decks[group] = cycle(deck.tolist())
            drawn = [next(decks[group]) for group in drawn for _ in range(count)]
        rows.append(drawn)
    return np.reshape(rows, (-1, *counts[::-1]))


@lru_cache(maxsize=2)
def shuffle(n, seed, epoch):
    """A permutation of n integers, made once an epoch."""
    return np.random.default_rng(seed_of("epoch", seed, epoch)).permutation(n)


# ------------------------------------------------------------------------------------------ views

# Optical density of haematoxylin, eosin and the rest in red, green, blue (Ruifrok, Johnston 2001).
STAINS = torch.tensor([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])

DEMO = {  # transform: (probability, lowest, highest)
    "crop": (1.0, 0.6, 1.0),  # share of the area kept, at an aspect ratio from 3/4 to 4/3
    "flip": (0.5, -1, -1),  # a factor along each axis, independently; -1 mirrors
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
STRONG |= {  # the rest of the paper's list, each with probability 1/2 as in its code
    "crop": (0.5, 0.2, 1.0),
    "rotate": (0.5, -10, 10),
    "autocontrast": (0.5, 1, 1),  # each channel stretched to [0, 1]
    "solarise": (0.5, 0.2, 0.2),  # threshold above which values are inverted
    "sharpen": (0.5, 1, 1),
    "blur": (0.5, 1, 1),
    "noise": (0.5, 0.01, 0.1),
    "erase": (0.5, 0.02, 0.33),
}
AUGMENTATIONS = {
    "demo": DEMO,
    "strong-srh": STRONG,  # the channels of SRH are not colours, so nothing mixes them
    # H&E varies in stain, not in hue. A threshold of 0.2 would invert the whole background.
    "strong": STRONG
    | {"stain": (0.5, 0.7, 1.3), "background": (0.5, -0.05, 0.05), "solarise": (0.5, 0.9, 0.9)},
    "weak": {"flip": (0.5, -1, -1)},  # HiDisc's
}
READ_AT = 1.3  # patches are read at this multiple of a view's size: crops neither alias nor blur
WINDOWS = 2**16  # possible start offsets of a view's window in the batch's noise


def view_parameters(transforms, seed, step, places, views_each):
    """The random numbers of len(places) x views_each = n views: {name: [n, ...]} on the CPU. Each
    place has its own generator; a transform that is not drawn gets its neutral value."""
    seeds = [seed_of("views", seed, step, place) for place in places]
    numbers = [np.random.default_rng(s).random((views_each, 64), np.float32) for s in seeds]
    columns = iter(torch.from_numpy(np.concatenate(numbers)).T)  # 64 is more than needed

    def random(k=1):  # [n, k]
        return torch.stack([next(columns) for _ in range(k)], dim=1)

    def draw(name, neutral, k=1):  # [n, k]: one coin toss for all k
        probability, low, high = transforms.get(name, (0, neutral, neutral))
        return torch.where(random() < probability, low + (high - low) * random(k), float(neutral))

    # Uniform: the crop's area, and the log of its aspect ratio, at most 4/3 or what still fits.
    log_area = draw("crop", 1).log()
    log_aspect = (2 * random() - 1) * (-log_area).clamp(max=math.log(4 / 3))
    extent = torch.cat([log_area + log_aspect, log_area - log_aspect], dim=1).div(2).exp()
    parameters = {
        "extent": extent,  # width and height of the crop as shares of the patch
        # Coordinates run from -1 to 1, so a share s of the side is 2 s.
        "centre": (2 * random(2) - 1) * (1 - extent) + 2 * draw("translate", 0, 2),
        "flip": torch.cat([draw("flip", 1), draw("flip", 1)], dim=1),
        "stain": draw("stain", 1, 3),
        "background": draw("background", 0, 3),
        "brightness": draw("brightness", 1),
        "contrast": draw("contrast", 1),
        "hole": random(2),  # where `erase` acts
        "window": (WINDOWS * random()).int(),  # where the view's noise begins
    }
    for name in ("rotate", "autocontrast", "solarise", "sharpen", "blur", "noise", "erase"):
        parameters[name] = draw(name, 0)
    return {name: value.squeeze(1) for name, value in parameters.items()}  # [n, 1] -> [n]


def make_views(patches, parameters, size, noise_seed=0):
    """V views of each of m patches, on their device: float32 [m V, 3, size, size] in [0, 1].

    patches: uint8 [m, 3, H, W] or uint16 [m, 2, H, W]. parameters: V consecutive rows per patch.
    """
    # Each view takes a window of one field of white noise: a field for each would be slow.
    generator = torch.Generator().manual_seed(noise_seed)
    noise = torch.randn(3 * size * size + WINDOWS, generator=generator).to(patches.device)
    # Small chunks fit a CPU's cache and run several times faster; a GPU takes them all at once.
    V = len(parameters["flip"]) // len(patches)
    chunk = len(patches) if patches.is_cuda else max(1, 2**18 // (V * 3 * size * size))
    views = []
    for first in range(0, len(patches), chunk):
        part = {name: value[first * V : (first + chunk) * V] for name, value in parameters.items()}
        views.append(augment(patches[first : first + chunk], part, size, noise))
    return torch.cat(views)


def augment(patches, parameters, size, noise):
    """make_views() for a few patches: one transform after another."""
    # The parameters themselves stay on the CPU, to choose rows without waiting for a GPU.
    moved = {key: value.to(patches.device, non_blocking=True) for key, value in parameters.items()}
    V = len(parameters["flip"]) // len(patches)
    x = intensities(patches)[:, None].expand(-1, V, -1, -1, -1).flatten(0, 1)
    x = resample(x, size, moved)
    if (parameters["stain"] != 1).any() or parameters["background"].any():
        x = stain_jitter(x, moved["stain"], moved["background"])
    brightness, contrast = (moved[name].view(-1, 1, 1, 1) for name in ("brightness", "contrast"))
    x *= brightness * contrast  # brightness (contrast x + (1 - contrast) mean x)
    x += x.mean(dim=(1, 2, 3), keepdim=True) * (1 / contrast - 1)

    # These change only the views for which they were drawn (not 0); their inputs follow them.
    windows = noise.unfold(0, 3 * size * size, 1).unflatten(1, (3, size, size))  # no copy
    for name, transform, *inputs in (
        ("autocontrast", autocontrast),
        ("solarise", lambda x, t: torch.where(x < t.view(-1, 1, 1, 1), x, 1 - x), "solarise"),
        ("sharpen", lambda x: adjust_sharpness(x.to(memory_format=torch.channels_last), 2)),
        ("blur", blur, "blur"),
        ("noise", lambda x, s, at: x + s.view(-1, 1, 1, 1) * windows[at], "noise", "window"),
        ("erase", erase, "erase", "hole"),
    ):
        rows = parameters[name].nonzero()[:, 0]
        if len(rows):
            rows = rows.to(x.device, non_blocking=True)
            changed = transform(x.index_select(0, rows), *(moved[key][rows] for key in inputs))
            x.index_copy_(0, rows, changed)
    return x.clamp_(0, 1)


def intensities(images):
    """Pixels as returned by decode() -> float32 [n, 3, H, W] in [0, 1].

    Two 16-bit planes, CH2 (lipid) and CH3 (protein, DNA), give CH3 - CH2 + 5000 / 65536, CH2, CH3.
    """
    if images.dtype == torch.uint8:
        return images.float().div(255)
    ch2, ch3 = images.float().div_(65536).unbind(dim=1)
    return torch.stack([(ch3 - ch2 + 5000 / 65536).clamp(0, 1), ch2, ch3], dim=1)


def resample(x, size, parameters):
    """Crops, shifts, flips and rotates in one bilinear look-up. Returns [n, 3, size, size]."""
    angle = torch.deg2rad(parameters["rotate"])
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1)
    scale = parameters["extent"] * parameters["flip"]  # [n, 2]
    affine = turn.view(-1, 2, 2) * scale[:, None]  # output -> input: scaled, then turned
    pixel = (2 * torch.arange(size, device=x.device) + 1) / size - 1  # the centres of pixels
    pixels = torch.stack(torch.meshgrid(pixel, pixel, indexing="xy")).flatten(1)  # [2, size x size]
    grid = (affine @ pixels + parameters["centre"][:, :, None]).unflatten(2, (size, size))
    grid = grid.permute(0, 2, 3, 1)  # like F.affine_grid's, but several times faster
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def stain_jitter(x, factor, shift):
    """Scales and shifts each stain's share of the optical density, -log x (Beer-Lambert).
    x: [n, 3, H, W] in [0, 1]. factor, shift: [n, 3], neutral at 1 and 0."""
    stains = STAINS.to(x)
    mix = torch.linalg.inv(stains) @ (factor[:, :, None] * stains)  # [n, 3, 3]: to stains and back
    density = -x.clamp(min=1 / 255).log().flatten(2)  # [n, 3, HW]
    density = mix.transpose(1, 2) @ density + (shift @ stains)[:, :, None]
    return density.neg().exp().view_as(x)


def blur(x, sigma):
    """Gaussian blur, 5 x 5, reflected at the border; sigma [n] in pixels. x: [n, C, H, W]."""
    distance = torch.arange(-2, 3, device=x.device)
    weight = (-(distance**2) / (2 * sigma[:, None] ** 2)).softmax(dim=1)  # [n, 5]
    outer, inner, middle, _, _ = weight.T[:, :, None, None, None]
    x = F.pad(x, (2, 2, 2, 2), mode="reflect")
    for _ in range(2):  # along the rows, then along the columns
        y = middle * x[..., 2:-2]
        y.addcmul_(inner, x[..., 1:-3] + x[..., 3:-1])
        y.addcmul_(outer, x[..., :-4] + x[..., 4:])
        x = y.mT
    return x


def erase(x, area, hole):
    """Fills a square with the image's mean. area [n]: the square's share; hole [n, 2]: where."""
    side = area.sqrt()[:, None]
    middle = side / 2 + hole * (1 - side)  # [n, 2]: the whole square lies inside
    place = (torch.arange(x.shape[-1], device=x.device) + 0.5) / x.shape[-1]
    near = (place - middle[:, :, None]).abs() < side[:, :, None] / 2  # [n, 2, W]
    inside = near[:, 0, :, None] & near[:, 1, None, :]  # [n, H, W]
    return torch.where(inside[:, None], x.mean(dim=(1, 2, 3), keepdim=True), x)


def plain_view(images, size):
    """The view used for evaluation: the whole patch, as float32 [n, 3, size, size] in [0, 1]."""
    x = F.interpolate(intensities(images), (size, size), mode="bilinear", antialias=True)
    return x.clamp(0, 1)


def load_batches(cohort, batches, size, workers=2, ahead=3):
    """Decodes batches of rows in the background. Yields (rows [n], images [n, ...]) in order.
    size: as in decode(), whose errors are passed on. ahead: batches prepared in advance."""
    read = partial(decode, size=size)
    with ThreadPoolExecutor(max(1, workers)) as pool:  # Pillow decodes without the GIL
        jobs = ((rows, pool.map(read, map(cohort.path, rows))) for rows in map(np.ravel, batches))
        queue = deque(islice(jobs, ahead))
        while queue:
            queue.extend(islice(jobs, 1))
            rows, images = queue.popleft()
            images = list(images)
            depths = {image.dtype: cohort.path(row) for row, image in zip(rows, images)}
            if len(depths) > 1:
                paths = " and ".join(depths.values())
                raise ValueError(f"{paths}: one is 8-bit, one 16-bit; put them in two cohorts")
            yield rows, torch.from_numpy(np.stack(images))


def decode(path, size=None):
    """The pixels of an image file: uint8 [3, size, size], transparency on white.

    A TIFF of two 16-bit frames, as in OpenSRH, gives uint16 [2, size, size]. The middle square is
    resized to `size`; without a size, [C, H, W] as stored. Raises ValueError, with the path.
    """
    try:
        with Image.open(path) as image:
            # Pillow would silently cut 16-bit colours to 8 bits; the layout of the file shows them.
            deep = image.mode[0] in "IF" or re.search(";16|65535", str([t[3] for t in image.tile]))
            if image.format == "TIFF":
                deep = deep or image.n_frames > 1 or max(image.tag_v2.get(258, (8,))) > 8  # bits
            if deep:
                return two_planes(image, size)
            if image.has_transparency_data:
                image = image.convert(image.mode.upper())  # La, premultiplied grey, becomes LA
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image.convert("RGBA"))
            elif size:
                image.draft("RGB", (size, size))  # a JPEG is decoded smaller, never below `size`
            return fit(image.convert("RGB"), size).transpose(2, 0, 1)
    except Exception as error:  # a damaged file also makes Pillow raise KeyError and TypeError
        raise ValueError(f"{path} cannot be read ({error}): restore it or drop its line") from error


def two_planes(image, size):
    """Two 16-bit frames -> uint16 [2, size, size]. Raises ValueError for any other layout."""
    frames = [frame.copy() for frame in ImageSequence.Iterator(image)]
    layouts = {f"{frame.width} x {frame.height}, {frame.mode}" for frame in frames}
    if len(frames) != 2 or len(layouts) != 1 or "I;16" not in frames[0].mode:
        raise ValueError(
            f"{len(frames)} frames of {' and '.join(sorted(layouts))}; must be 8-bit or 2 x 16-bit"
        )
    # As floats: Pillow does not resize 16-bit integers.
    planes = [fit(Image.fromarray(np.float32(frame)), size) for frame in frames]
    return np.stack(planes).round().clip(0, 65535).astype(np.uint16)


def fit(image, size):
    """A Pillow image -> array: the middle square at size x size; without a size, as it is."""
    return np.asarray(ImageOps.fit(image, (size, size)) if size else image)


def short_side(cohort, number=100):
    """The commonest, smallest and largest short side in pixels, from `number` file headers."""
    sides = []
    for row in np.unique(np.linspace(0, len(cohort) - 1, number).astype(int)):
        try:
            with Image.open(cohort.path(row)) as image:
                sides.append(min(image.size))
        except Exception:
            decode(cohort.path(row))  # says what is wrong with it
    return Counter(sides).most_common(1)[0][0], min(sides), max(sides)


# ------------------------------------------------------------------------------------ the cohort


@dataclass
class Cohort:
    """n patches in a hierarchy of L levels, fine to coarse, as arrays, sorted by patient and slide.
    After select(), ids are unchanged and rows restart at 0."""

    root: str
    levels: tuple  # L names, like LEVELS
    names: np.ndarray  # [n] bytes: the path of each patch relative to the root
    parents: list  # L - 1 arrays: the slide of each row, then the patient of each slide
    group_names: list  # L - 1 lists: the names of the slides, of the patients
    label: np.ndarray  # [n] int32: the class of each patch, -1 if none
    patient_split: np.ndarray  # [P] int8: for each patient, an index into SPLITS
    classes: list  # C names, sorted; empty without labels
    patch: np.ndarray  # [n] int32: the id of each patch, its row in the whole cohort

    def __post_init__(self):
        # Group g of level l + 1 owns members[l][starts[l][g] : starts[l][g + 1]]: rows, slides.
        ids = self.ids(np.arange(len(self)))
        self.members = [np.arange(len(self)), *map(np.unique, ids[:, 1:].T)]
        self.starts = []
        for parent, members, names in zip(self.parents, self.members, self.group_names):
            self.starts.append(np.searchsorted(parent[members], np.arange(len(names) + 1)))
        self.patient = ids[:, -1].copy()  # [n]
        self.split = self.patient_split[self.patient]  # [n], an index into SPLITS
        self.present = self.members[-1]  # the patients that have patches here

    def __len__(self):
        return len(self.names)

    def __str__(self):
        counts = [f"{len(ids)} {plural(level)}" for ids, level in zip(self.members, self.levels)]
        return ", ".join(reversed(counts))

    def name(self, row):
        """A patch's path as written in the manifest."""
        return self.names[row].decode()

    def path(self, row):
        """Where a patch is on disk."""
        return os.path.join(self.root, self.name(row))

    def ids(self, rows):
        """rows [n] -> [n, L]: the ids of each row's patch, slide and patient."""
        columns = [self.patch[rows], self.parents[0][rows]]
        for parent in self.parents[1:]:
            columns.append(parent[columns[-1]])
        return np.stack(columns, axis=1)

    def groups_of(self, row):
        """The names of a patch's groups, coarse to fine."""
        numbers = self.ids(np.array([row]))[0, 1:]
        return [names[number] for names, number in zip(self.group_names, numbers)][::-1]

    def select(self, rows):
        """The cohort restricted to rows: ascending indices or a mask."""
        own = {name: getattr(self, name)[rows] for name in ("names", "label", "patch")}
        return replace(self, parents=[self.parents[0][rows], *self.parents[1:]], **own)

    def restrict(self, split):
        """The patches of the patients in a split. Raises ValueError when there are none."""
        rows = np.flatnonzero(self.split == SPLITS.index(split))
        if len(rows) == 0:
            raise ValueError(f"{self.root}: no patient is in the split {split!r}: add patients")
        return self.select(rows)


def plural(level):
    """The plural of a level's name: patches, slides."""
    return level + ("es" if level.endswith("ch") else "s")


def read_cohort(root, levels=LEVELS, val_fraction=0.2):
    """A folder with a manifest.csv, or another manifest (.csv) -> Cohort. val_fraction: share of
    patients held out if there is no split column. Raises ValueError for a faulty line."""
    is_file = os.fspath(root).lower().endswith(".csv")
    manifest = os.path.abspath(root if is_file else os.path.join(root, "manifest.csv"))
    if not os.path.exists(manifest):
        raise FileNotFoundError(f"{manifest} does not exist: tools.cohort index writes it")
    entries = read_manifest(manifest, levels)
    return build_cohort(os.path.dirname(manifest), entries, levels, val_fraction)


def read_manifest(manifest, levels=LEVELS):
    """Yields (file and line, path, groups, label, split, root) of each patch; groups: names, coarse
    to fine. A missing column gives "". Raises ValueError for a faulty line."""
    needed = ["path", *levels[:0:-1]]
    for number, line in enumerate(open(manifest, encoding="utf-8-sig", errors="replace"), 1):
        where, line = f"{manifest}, line {number}", line.strip()
        if "\ufffd" in line:  # replaces bytes that are not UTF-8
            raise ValueError(f"{where}: {line!r} is not UTF-8: save it as CSV UTF-8")
        try:  # line by line, so that an open quote cannot swallow the next line
            plain = '"' not in line and len(line) < csv.field_size_limit()  # splitting is faster
            rows = [line.split(",")] if plain else csv.reader([line], strict=True)
            fields = [field.strip() for field in next(iter(rows))]
        except csv.Error as error:
            raise ValueError(f"{where}: fix the quotes in {line!r} ({error})") from error
        if number == 1:
            header = fields
            missing = ", ".join(column for column in needed if column not in header)
            if missing:
                raise ValueError(f"{where}: {line!r} has no column {missing} (in lower case)")
            if levels[0] in header:
                raise ValueError(f"{where}: {levels[0]} is the image itself: drop that column")
        elif line and len(fields) != len(header):
            raise ValueError(f"{where}: {len(fields)} fields, but {len(header)} columns")
        elif line:
            field = defaultdict(str, zip(header, fields))
            groups = [field[level] for level in needed[1:]]
            yield where, field["path"], groups, field["label"], field["split"], field["root"]


def build_cohort(root, entries, levels=LEVELS, val_fraction=0.2):
    """What read_manifest() yields -> Cohort. root: the folder, unless the entries name another."""
    names = {}  # path: None; the dict serves as an ordered set
    above = {level: {} for level in levels[:0:-1]}  # {"patient": {name: split}, "slide": ...}
    slides, labels, kinds = [], [], set()
    for where, path, groups, label, split, other in entries:
        check_entry(where, path, groups, split)
        if path.encode() in names:
            raise ValueError(f"{where}: the path {path!r} appears a second time")
        for level, name, parent in zip(above, groups, [split, *groups]):  # for patients, the split
            before = above[level].setdefault(name, parent)
            if before != parent:
                raise ValueError(
                    f"{where}: {level} {name!r} belongs to {parent!r} here and to {before!r} above;"
                    " rename one (tools.cohort index --nested does), or give both one split"
                )
        names[path.encode()] = None
        slides.append(sys.intern(groups[-1]))  # one string for all patches of a slide
        labels.append(sys.intern(label))
        kinds.add((other, bool(split)))
        if len(kinds) > 1 or (other and not os.path.isabs(other)):
            raise ValueError(f"{where}: use one absolute root, and a split on every line or none")
    if not names:
        raise ValueError(f"{root}: the cohort has no patches: list one per line")

    # From the order of appearance to the order of names: patients first, then their slides.
    parents, group_names, number = [], [], dict.fromkeys(["", *SPLITS], 0)
    for group_of in above.values():
        ordered = sorted(group_of, key=lambda name: (number[group_of[name]], name))
        parents.insert(0, np.array([number[group_of[name]] for name in ordered], np.int32))
        group_names.insert(0, ordered)
        number = {name: i for i, name in enumerate(ordered)}
    slide = np.array([number[name] for name in slides], np.int32)
    order = np.argsort(slide, kind="stable")
    classes = sorted(set(labels) - {""})
    class_of = {"": -1} | {name: c for c, name in enumerate(classes)}
    other, has_split = kinds.pop()
    split = hash_split(group_names[-1], val_fraction)
    if has_split:
        given = above[levels[-1]]
        split = np.array([SPLITS.index(given[name]) for name in group_names[-1]], np.int8)
    return Cohort(
        root=other or root,
        levels=tuple(levels),
        names=np.array(list(names))[order],
        parents=[slide[order], *parents[:-1]],  # nothing is above the patients
        group_names=group_names,
        label=np.array([class_of[label] for label in labels], np.int32)[order],
        patient_split=split,
        classes=classes,
        patch=np.arange(len(names), dtype=np.int32),
    )


def check_entry(where, path, groups, split):
    """Raises ValueError for a manifest line that is invalid on its own."""
    for name in (path, *groups):
        if not name:
            raise ValueError(f"{where}: only label, split and root may be empty")
        if name != name.strip() or ODD.search(name):
            raise ValueError(f"{where}: rename {name!r} to one trimmed line of UTF-8")
    # A part that is empty, . or .. would leave the folder, or give a file two names.
    if {"", ".", ".."}.intersection(path.split("/")) or "\\" in path or path[1:2] == ":":
        raise ValueError(f"{where}: {path!r} must be a plain path inside the root, like a/b.png")
    if split and split not in SPLITS:
        raise ValueError(f"{where}: the split {split!r} is not one of {', '.join(SPLITS)}")


def hash_split(patients, val_fraction=0.2):
    """[P] int8, 0 (train) or 1 (val), from hashes of the P patients' names: the same everywhere."""
    value = np.array([int(hashlib.sha256(name.encode()).hexdigest()[:12], 16) for name in patients])
    split = (value < val_fraction * 2**48).astype(np.int8)
    if len(patients) > 1 and val_fraction > 0:  # so that neither is empty
        split[[value.argmin(), value.argmax()]] = 1, 0
    return split


def main():
    with tempfile.TemporaryDirectory() as made:
        lines = ["path,patient,slide"]
        for row, colour in enumerate(["indigo", "purple", "crimson", "brown"] * 3):
            lines.append(f"{row}.png,patient-{row % 4 // 2},slide-{row % 4}")
            noise = Image.effect_noise((8, 8), 90).resize((64, 64))
            ImageOps.colorize(noise, colour, "white").save(f"{made}/{row}.png")
        open(f"{made}/manifest.csv", "w").write("\n".join(lines))
        folder = sys.argv[1] if len(sys.argv) > 1 else made
        augmentation = sys.argv[2] if len(sys.argv) > 2 else "demo"
        cohort = read_cohort(folder, val_fraction=0)
        patients = min(2, len(cohort.present))
        images, ids = next(load_views(cohort, [1], patients, (4, 2, 2), augmentation, (128, 96)))
    save_image(images, "views.png", nrow=4)
    print(f"{cohort}; views.png shows one batch, {list(images.shape)}, with a patch in each row:")
    for row, *groups in zip(*(column[::4].tolist() for column in ids.values())):
        print(f"row {row}, slide and patient {groups}: {cohort.name(row)}")


if __name__ == "__main__":
    main()
