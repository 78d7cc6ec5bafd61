"""The data: a manifest becomes a cohort, a cohort batches of patches, a patch augmented views.

    python data.py [FOLDER]    one batch: its rows, its ids, and its views as a picture

    manifest.csv -> Cohort -> hierarchical_batch: rows -> decode: patches -> make_views: views

A cohort is a folder with a manifest.csv: columns path, patient and slide, and optionally label (of
the patch), split (of the patient: train, val or test) and root (of the paths; default: the
manifest's folder). Pretraining needs no labels. `python -m tools.cohort` writes, checks and shows
manifests. Other levels than patch, slide and patient have a column each, except the finest, which
is the image; what is said of patients here then holds for the coarsest.
"""

import csv
import functools
import hashlib
import math
import os
import re
import sys
import tempfile
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, ImageSequence
from torchvision.transforms.v2.functional import autocontrast, solarize
from torchvision.utils import save_image

from losses import LEVELS

SPLITS = ("train", "val", "test")


def load_views(
    cohort,
    steps,
    patients,
    counts,
    augmentation,
    sizes,
    seed=0,
    device="cpu",
    share=(0, 1),
    workers=2,
):
    """Yields one batch per step: (images [n, 3, S, S] in [0, 1], ids {level: [n]}).

    steps: a range; a run begins with step 1. patients: in a global batch. counts: views of a patch,
    patches of a slide, slides of a patient. sizes: pixels at which patches are decoded, and S.
    share: (rank, world), which part of the patients is wanted. Rows are ordered by patient, slide,
    patch and view. All randomness is a function of (seed, step, place in the batch): resuming needs
    no state, and any number of processes makes the same batches.
    """
    rank, world = share
    places = range(rank * patients // world, (rank + 1) * patients // world)
    read_size, image_size = sizes
    views, *members = counts

    def batches():
        for step in steps:
            yield hierarchical_batch(cohort, step, seed, patients, members, places).reshape(-1)

    for step, (rows, patches) in zip(steps, load_batches(cohort, batches(), read_size, workers)):
        n = len(rows) * views // len(places)  # views at each place
        numbers = view_parameters(AUGMENTATIONS[augmentation], seed, step, places, n)
        patches = patches.to(device, non_blocking=True)
        images = make_views(patches, numbers, image_size, seed_of("noise", seed, step))
        ids = torch.from_numpy(cohort.ids(rows)).to(device)  # [patches, L]
        ids = dict(zip(cohort.levels, ids.repeat_interleave(views, dim=0).T))
        yield images.contiguous(memory_format=torch.channels_last), ids


def seed_of(stream, *numbers):
    """A seed in [0, 2^63) from a stream's name, which keeps streams apart, and some integers."""
    words = " ".join([stream, *(str(int(number)) for number in numbers)])
    return int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") >> 1


# --------------------------------------------------------------------------------------- batches


def hierarchical_batch(cohort, step, seed, patients, counts=(2, 2), places=None):
    """The patches of one batch: rows [patients, slides of a patient, patches of a slide].

    counts: patches of a slide, slides of a patient. places: the part of the batch that is wanted.
    A patient with too few slides contributes one of them twice, with different patches if it has
    enough; the losses recognise repeats by id.
    """
    # An epoch is one shuffle of all patients, cut into whole batches; the rest is left over.
    epoch, number = divmod(step - 1, len(cohort.present) // patients)
    order = shuffle(len(cohort.present), seed, epoch)
    batch = cohort.present[order[number * patients : (number + 1) * patients]]
    rows = []
    for place in range(patients) if places is None else places:
        rng = np.random.default_rng(seed_of("patches", seed, step, place))
        rows.append(draw_below(cohort, rng, len(counts), batch[place], 1, counts))
    return np.concatenate(rows)


@functools.lru_cache(maxsize=2)
def shuffle(n, seed, epoch):
    """A permutation of n, made once an epoch."""
    return np.random.default_rng(seed_of("epoch", seed, epoch)).permutation(n)


def draw_below(cohort, rng, level, group, times, counts):
    """Patches below one group of a level (1: slide), drawn `times` times: [times, ..., counts[0]].

    Members are drawn without replacement if possible, otherwise cycling.
    """
    low, high = cohort.starts[level - 1][group : group + 2]
    count = times * counts[level - 1]
    if high - low >= count:
        drawn = low + rng.choice(high - low, count, replace=False)
    else:
        drawn = low + np.resize(rng.permutation(high - low), count)
    drawn = drawn.reshape(times, counts[level - 1])
    if level == 1:
        return drawn
    rows = np.empty((times, *counts[level - 1 :: -1]), np.int64)
    for member in np.unique(drawn):
        places = drawn == member  # several where the member was drawn several times
        rows[places] = draw_below(cohort, rng, level - 1, member, places.sum(), counts)
    return rows


# ------------------------------------------------------------------------------------------ views

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
    "solarise": (0.5, 0.2, 0.2),  # threshold above which values are inverted
    "sharpen": (0.5, 1, 1),
    "blur": (0.5, 1, 1),
    "noise": (0.5, 0.01, 0.1),
    "erase": (0.5, 0.02, 0.33),
}
AUGMENTATIONS = {
    "demo": DEMO,
    "strong-srh": STRONG,  # the channels of SRH are not colours, so nothing mixes them
    # H&E varies in its stains, not in hue as such. On a white background a threshold of 0.2 would
    # invert everything; 0.9 inverts the glass.
    "strong": STRONG
    | {"stain": (0.5, 0.7, 1.3), "background": (0.5, -0.05, 0.05), "solarise": (0.5, 0.9, 0.9)},
    "weak": {"flip": (0.5, 0, 0)},  # HiDisc's
}
NUMBERS = 64  # uniform random numbers a view; a new transform may take what is left of them
READ_AT = 1.3  # pixels at which a patch is read, of those of a view: crops neither alias nor blur
WINDOWS = 2**16  # places in the batch's field of noise where a view's window may begin


def view_parameters(augmentation, seed, step, places, views):
    """The random numbers behind the views of some places in a batch: {name: [n, ...]} on the CPU.

    views: how many at each place, so n = len(places) x views. A transform that is not drawn gets
    its neutral value. Each place has its own generator, so a process draws for its patients alone.
    """
    numbers = []
    for place in places:
        generator = torch.Generator().manual_seed(seed_of("views", seed, step, place))
        numbers.append(torch.rand(views, NUMBERS, generator=generator))
    columns = iter(torch.cat(numbers).T)

    def random(k=1):  # [n], or [n, k]
        return next(columns) if k == 1 else torch.stack([next(columns) for _ in range(k)], dim=1)

    def drawn(name, neutral, k=1):
        probability, low, high = augmentation.get(name, (0, neutral, neutral))
        chosen = random() < probability
        values = low + (high - low) * random(k)
        return torch.where(chosen if k == 1 else chosen[:, None], values, float(neutral))

    # The crop's area is uniform; so is the log of its aspect, up to 4/3 and as far as it fits.
    area = drawn("crop", 1)
    widest = (-area.log()).clamp(max=math.log(4 / 3))
    aspect = ((2 * random() - 1) * widest).exp()
    size = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()], dim=1)
    flip_probability, _, _ = augmentation.get("flip", (0, 0, 0))
    parameters = {"size": size}  # width and height of the crop as shares of the patch
    parameters["centre"] = (2 * random(2) - 1) * (1 - size) + 2 * drawn("translate", 0, 2)
    parameters["flip"] = 1 - 2 * (random(2) < flip_probability).float()
    parameters["stain"] = drawn("stain", 1, 3)
    parameters["background"] = drawn("background", 0, 3)
    parameters["hole"] = random(2)  # where `erase` acts
    parameters["window"] = (WINDOWS * random()).int()  # where the view's noise begins
    for name in ("brightness", "contrast"):
        parameters[name] = drawn(name, 1)
    for name in ("rotate", "autocontrast", "solarise", "sharpen", "blur", "noise", "erase"):
        parameters[name] = drawn(name, 0)
    return parameters


def make_views(images, parameters, size, noise_seed=0):
    """The views of n patches, made on their device: float32 [n V, 3, size, size] in [0, 1].

    images: [n, ...], as returned by decode(). parameters: of n V views, those of a patch adjacent.
    """
    V = len(parameters["flip"]) // len(images)
    out = torch.empty(len(images) * V, 3, size, size, device=images.device)
    # One field of white noise serves the batch; to draw noise for every pixel would be slow.
    generator = torch.Generator().manual_seed(noise_seed)
    noise = torch.randn(3 * size * size + WINDOWS, generator=generator)
    noise = noise.to(images.device, non_blocking=True)
    # A few patches at a time stay in a CPU's cache, several times as fast; a GPU takes them all.
    some = len(images) if out.is_cuda else max(1, 2**18 // (V * 3 * size * size))
    for first in range(0, len(images), some):
        part = slice(first * V, (first + some) * V)
        mine = {name: value[part] for name, value in parameters.items()}
        torch.clamp(augment(images[first : first + some], mine, size, noise), 0, 1, out=out[part])
    return out


def augment(images, parameters, size, noise):
    """`make_views` for a few patches: one transform after the other."""
    moved = {name: value.to(images.device, non_blocking=True) for name, value in parameters.items()}
    V = len(parameters["flip"]) // len(images)
    x = intensities(images)[:, None].expand(-1, V, -1, -1, -1).flatten(0, 1)
    x = resample(x, size, moved)
    if (parameters["stain"] != 1).any() or parameters["background"].any():
        x = stain_jitter(x, moved["stain"], moved["background"])
    brightness = moved["brightness"][:, None, None, None]
    contrast = moved["contrast"][:, None, None, None]
    x *= brightness * contrast
    x += x.mean(dim=(1, 2, 3), keepdim=True) * (1 / contrast - 1)

    # These change only the views for which they were drawn.
    for name, transform in (
        ("autocontrast", lambda x, rows: autocontrast(x)),
        ("solarise", lambda x, rows: solarize(x, float(parameters["solarise"].max()))),
        ("sharpen", lambda x, rows: sharpen(x)),
        ("blur", lambda x, rows: blur(x, moved["blur"][rows])),
        ("noise", lambda x, rows: add_noise(x, noise, moved["window"][rows], moved["noise"][rows])),
        ("erase", lambda x, rows: erase(x, moved["erase"][rows], moved["hole"][rows])),
    ):
        rows = parameters[name].nonzero()[:, 0]  # on the CPU: no waiting for a GPU
        if len(rows):
            there = rows.to(x.device, non_blocking=True)
            x.index_copy_(0, there, transform(x.index_select(0, there), rows))
    return x


def intensities(images):
    """Pixels as returned by decode() -> float32 [n, 3, H, W] in [0, 1].

    Two 16-bit planes [n, 2, H, W] are stimulated Raman histology: CH2 (lipid) and CH3 (protein and
    DNA). They become the three channels CH3 - CH2 + 5000 / 65536, CH2 and CH3.
    """
    if images.dtype == torch.uint8:
        return images.float().div(255)
    ch2, ch3 = images.float().div_(65536).unbind(dim=1)
    return torch.stack([(ch3 - ch2 + 5000 / 65536).clamp(0, 1), ch2, ch3], dim=1)


def resample(x, size, parameters):
    """Crops, shifts, flips and rotates by one bilinear look-up. Returns [n, 3, size, size]."""
    angle = torch.deg2rad(parameters["rotate"])
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1)
    scale = parameters["size"] * parameters["flip"]  # [n, 2]
    affine = turn.view(-1, 2, 2) * scale[:, None]  # output -> input coordinates, both in [-1, 1]
    place = (2 * torch.arange(size, device=x.device) + 1) / size - 1  # the centres of pixels
    across = affine[:, :, 0, None] * place
    down = affine[:, :, 1, None] * place + parameters["centre"][:, :, None]
    grid = across[:, :, None, :] + down[:, :, :, None]  # [n, 2, size, size]
    grid = grid.permute(0, 2, 3, 1)  # same layout as F.affine_grid, 30x faster
    return F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)


def stain_jitter(x, factor, shift):
    """Scales and shifts each stain's density: x = exp(-density), a sum of stains (Beer, Lambert).

    x: [n, 3, H, W] in [0, 1]. factor, shift: [n, 3], neutral at 1 and 0.
    """
    stains = STAINS.to(x)
    # [n, 3, 3]: density -> amounts of stain -> scaled amounts -> density
    mix = torch.linalg.inv(stains) @ (factor[:, :, None] * stains)
    density = -x.clamp(min=1 / 255).log().flatten(2)  # [n, 3, HW]
    density = mix.transpose(1, 2) @ density + (shift @ stains)[:, :, None]
    return density.neg().exp().view_as(x)


def sharpen(x):
    """torchvision's adjust_sharpness(x, 2), 8 times as fast. x: [n, C, H, W] in [0, 1].

    x + (x - blurred),  blurred = (sum of the 3 x 3 neighbours + 4 x) / 13; the border stays.
    """
    out = x.clone()
    out[..., 1:-1, 1:-1] = (22 * x[..., 1:-1, 1:-1] - 9 * F.avg_pool2d(x, 3, stride=1)) / 13
    return out.clamp_(0, 1)


def blur(x, sigma):
    """Gaussian blur, 5 x 5, reflected at the border; sigma [n] in pixels. x: [n, C, H, W]."""
    weight = torch.exp(-(torch.arange(3, device=x.device) ** 2) / (2 * sigma[:, None] ** 2))
    weight = weight / (2 * weight.sum(dim=1, keepdim=True) - 1)  # [n, 3]
    middle, inner, outer = weight.T[:, :, None, None, None]
    x = F.pad(x, (2, 2, 2, 2), mode="reflect")
    for _ in range(2):  # along the rows, then along the columns
        y = middle * x[..., 2:-2]
        y.addcmul_(inner, x[..., 1:-3] + x[..., 3:-1])
        y.addcmul_(outer, x[..., :-4] + x[..., 4:])
        x = y.mT
    return x


def add_noise(x, noise, start, deviation):
    """Adds to each image a window of one field of white noise. start, deviation: [n]."""
    windows = noise.unfold(0, x[0].numel(), 1)[start].view_as(x)
    return torch.addcmul(x, windows, deviation[:, None, None, None])


def erase(x, area, hole):
    """Fills a square with the image's mean.

    x: [n, C, H, W]. area: [n], the square's share of the image. hole: [n, 2] in [0, 1], its place.
    """
    side = area.sqrt()[:, None]
    middle = side / 2 + hole * (1 - side)  # [n, 2]: the whole square lies inside
    place = (torch.arange(x.shape[-1], device=x.device) + 0.5) / x.shape[-1]
    distance = (place - middle[:, :, None]).abs()  # [n, 2, W]
    inside = (distance < side[:, :, None] / 2).to(x)
    inside = (inside[:, 0, :, None] * inside[:, 1, None, :])[:, None]  # [n, 1, side, side]
    return torch.lerp(x, x.mean(dim=(1, 2, 3), keepdim=True), inside)


def plain_view(images, size):
    """The view used for evaluation: the whole patch, resized.

    images: [n, ...], as returned by decode(). Returns float32 [n, 3, size, size] in [0, 1].
    """
    x = intensities(images)
    if x.shape[-1] == size:
        return x
    x = F.interpolate(x, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return x.clamp(0, 1)


# -------------------------------------------------------------------------------------- decoding

BITS_PER_SAMPLE = 258  # TIFF's tag


def load_batches(cohort, batches, size, workers=2, ahead=3):
    """Decodes patches in the background. Yields (rows, images [n, ...] as of decode()) in order.

    batches: arrays of rows. size: as in decode(), which raises. ahead: batches in preparation.
    Threads, not processes: Pillow decodes outside the interpreter's lock, and threads share the
    cohort instead of copying it.
    """
    with ThreadPoolExecutor(max(1, workers)) as pool:
        queue = deque()
        for rows in chain(batches, [None] * ahead):
            if rows is not None:
                queue.append((rows, [pool.submit(decode, cohort.path(row), size) for row in rows]))
            if queue and (len(queue) > ahead or rows is None):
                rows, images = queue.popleft()
                images = [image.result() for image in images]
                deep = [image.dtype == np.uint16 for image in images]
                if any(deep) and not all(deep):
                    paths = [cohort.path(rows[deep.index(one)]) for one in (False, True)]
                    raise ValueError(f"{' has 8 bits, '.join(paths)} has 16: make a cohort of each")
                yield rows, torch.from_numpy(np.stack(images))


def decode(path, size=None):
    """The pixels of an image file: uint8 [3, size, size], transparency on white.

    A TIFF of two 16-bit frames, as in OpenSRH, gives uint16 [2, size, size]. The short side is
    resized to `size` and the middle square kept; without a size, [C, H, W] as stored. Raises
    ValueError with the path for a damaged file, and for any other layout of more than 8 bits.
    """
    try:
        with Image.open(path) as image:
            deep = image.mode[0] in "IF"
            # Pillow reads colours of 16 bits as if they had 8: what it will unpack says so.
            deep |= bool(re.search(r";16|65535", str(image.tile)))
            if image.format == "TIFF":
                deep |= image.n_frames > 1 or max(image.tag_v2.get(BITS_PER_SAMPLE, (8,))) > 8
            if deep:
                return two_planes(image, size)
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            elif size:
                image.draft("RGB", (size, size))  # a JPEG is decoded smaller, never below `size`
            return fit(image.convert("RGB"), size).transpose(2, 0, 1)
    except Exception as error:  # a damaged file also makes Pillow raise KeyError and TypeError
        raise ValueError(
            f"{path} cannot be read ({error}): restore it, or take its line out of the manifest; "
            "a run goes on without it"
        ) from error


def two_planes(image, size):
    """Two 16-bit frames -> uint16 [2, size, size]. Raises ValueError for any other layout."""
    frames = [frame.copy() for frame in ImageSequence.Iterator(image)]
    layouts = {f"{frame.width} x {frame.height}, {frame.mode}" for frame in frames}
    if len(frames) != 2 or len(layouts) != 1 or "I;16" not in frames[0].mode:
        raise ValueError(
            f"{len(frames)} frames of {' and '.join(sorted(layouts))}; only 8-bit images and two "
            "16-bit frames (I;16) of one size are understood"
        )
    planes = np.stack(frames)
    if size and frames[0].size != (size, size):  # as float32, which Pillow can resize
        planes = [fit(Image.fromarray(plane.astype(np.float32)), size) for plane in planes]
        planes = np.stack(planes).clip(0, 65535).round()
    return planes.astype(np.uint16)


def fit(image, size):
    """A Pillow image -> array: the middle square at size x size; without a size, as it is."""
    if size and image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
    return np.asarray(image)


def short_side(cohort, number=100):
    """The commonest, smallest and largest short side in pixels, from `number` headers of files."""
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
    """n patches in a hierarchy of L levels, fine to coarse, as arrays that all threads share.

    A million patches take about 100 MB. The members of a group are adjacent: patches are sorted by
    slide, slides by patient. After select() the ids of patches, slides, patients and classes are
    unchanged; rows restart at 0.
    """

    root: str
    levels: tuple  # L names, as LEVELS
    names: np.ndarray  # [n] bytes: the path of each patch relative to the root
    parents: list  # L - 1 arrays: the slide of each row, then the patient of each slide
    group_names: list  # L - 1 lists: the names of the slides, of the patients
    label: np.ndarray  # [n] int32: the class of each patch, -1 without one
    patient_split: np.ndarray  # [P] int8: of the coarsest level, an index into SPLITS
    classes: list  # C names, sorted; empty without labels
    patch: np.ndarray  # [n] int32: the id of each patch, its row in the whole cohort

    def __post_init__(self):
        # Group g of a level owns the members starts[l][g]:starts[l][g + 1] of the level below.
        self.starts = []
        for parent, names in zip(self.parents, self.group_names):
            self.starts.append(np.searchsorted(parent, np.arange(len(names) + 1)))
        self.patient = self.ids(np.arange(len(self)))[:, -1].copy()  # [n]
        self.split = self.patient_split[self.patient]  # [n], an index into SPLITS
        self.present = np.unique(self.patient)  # the patients that have patches here

    def __len__(self):
        return len(self.names)

    def __str__(self):
        counts = [len(np.unique(column)) for column in self.ids(np.arange(len(self))).T]
        parts = [f"{count} {plural(level)}" for count, level in zip(counts, self.levels)]
        return ", ".join(reversed(parts))

    def name(self, row):
        """The path of a patch as the manifest spells it."""
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
        """The cohort of these rows alone: ascending numbers, or a mask."""
        own = {name: getattr(self, name)[rows] for name in ("names", "label", "patch")}
        return replace(self, parents=[self.parents[0][rows], *self.parents[1:]], **own)

    def restrict(self, split):
        """The patches of the patients in a split. Raises ValueError when there are none."""
        rows = np.flatnonzero(self.split == SPLITS.index(split))
        if len(rows) == 0:
            raise ValueError(
                f"{self.root}: no patient is in the split {split!r}: add patients, or a column "
                "split to the manifest"
            )
        return self.select(rows)


def plural(level):
    """A level's name for several: patches, slides."""
    return level + ("es" if level.endswith("ch") else "s")


def read_cohort(root, levels=LEVELS, val_fraction=0.2):
    """A folder with a manifest.csv, or another manifest (.csv) -> Cohort.

    levels: fine to coarse; each but the first is a column. val_fraction: share of the patients held
    out where there is no split column. Raises FileNotFoundError, and ValueError with file and line
    for a missing column, an empty field, bytes that are not UTF-8, an open quote, a path that
    leaves the folder, a path twice, a slide under two patients, and a patient in two splits.
    """
    root = os.fspath(root)
    manifest = root if root.lower().endswith(".csv") else os.path.join(root, "manifest.csv")
    if not os.path.exists(manifest):
        raise FileNotFoundError(
            f"{manifest} does not exist: name the cohort's folder with --data; "
            "python -m tools.cohort index makes a manifest"
        )
    folder = os.path.dirname(os.path.abspath(manifest))
    return build_cohort(folder, read_manifest(manifest, levels), levels, val_fraction)


def read_manifest(manifest, levels=LEVELS):
    """Yields (file and line, path, groups, label, split, root) of each patch.

    groups: names, coarse to fine. What has no column is "". Raises ValueError as read_cohort().
    """
    needed = ["path", *levels[:0:-1]]
    header = []
    with open(manifest, encoding="utf-8-sig", errors="replace") as file:
        for number, line in enumerate(file, 1):  # line by line: a quote cannot swallow the next
            where = f"{manifest}, line {number}"
            try:
                fields = [field.strip() for field in next(csv.reader([line], strict=True), [])]
            except csv.Error as error:
                raise ValueError(f"{where}: mend its quotes ({error}): {line.strip()}") from error
            if "\ufffd" in line:  # what stands for bytes that are not UTF-8
                raise ValueError(f"{where}: {line.strip()!r} is not UTF-8: save it as CSV UTF-8")
            if number == 1:
                header = fields
                missing = ", ".join(column for column in needed if column not in header)
                if missing or levels[0] in header:
                    raise ValueError(
                        f"{where}: {line.strip()!r} has no column {missing or 'to spare'}: name "
                        f"{', '.join(needed)} in small letters, separated by commas, in UTF-8; the "
                        f"finest level, {levels[0]}, is the image and has no column"
                    )
            elif fields and len(fields) != len(header):
                raise ValueError(f"{where}: {len(fields)} fields, but {len(header)} columns")
            elif fields:
                field = dict(zip(header, fields))
                more = [field.get(column, "") for column in ("label", "split", "root")]
                yield where, field["path"], [field[level] for level in needed[1:]], *more


def build_cohort(root, entries, levels=LEVELS, val_fraction=0.2):
    """What `read_manifest` yields -> Cohort. root: the folder, unless the entries name another."""
    names = {}  # path: None; a dict, whose keys keep their order and are found at once
    parent_of = [{} for _ in levels[1:]]  # fine to coarse: {slide: its patient}, {patient: ""}
    split_of = {}  # {patient: split}
    slides, labels, roots = [], [], set()
    for where, path, groups, label, split, other in entries:
        check_entry(where, path, groups, split)
        if path.encode() in names:
            raise ValueError(f"{where}: the path {path!r} appears a second time")
        for level, parents, name, parent in zip(
            levels[:0:-1], reversed(parent_of), groups, ["", *groups]
        ):
            if parents.setdefault(name, parent) != parent:
                raise ValueError(
                    f"{where}: {level} {name!r} belongs to {parent!r} here and to "
                    f"{parents[name]!r} above; rename one (tools.cohort index --nested does)"
                )
        if split_of.setdefault(groups[0], split) != split:
            raise ValueError(
                f"{where}: {levels[-1]} {groups[0]!r} is in the splits {split_of[groups[0]]!r} "
                f"and {split!r}; put all of its patches in one split"
            )
        names[path.encode()] = None
        slides.append(sys.intern(groups[-1]))  # one string for all patches of a slide
        labels.append(sys.intern(label))
        roots.add(other)
    if not names:
        raise ValueError(f"{root}: the cohort has no patches: list one in each line")
    if len(roots) > 1:
        raise ValueError(f"{root}: the column root must be the same in every line")

    # From the order of appearance to the order of names: patients first, then their slides.
    parents, group_names, number = [], [], {"": 0}
    for above in reversed(parent_of):
        ordered = sorted(above, key=lambda name: (number[above[name]], name))
        parents.insert(0, np.array([number[above[name]] for name in ordered], np.int32))
        group_names.insert(0, ordered)
        number = {name: i for i, name in enumerate(ordered)}
    slide = np.array([number[name] for name in slides], np.int32)
    order = np.argsort(slide, kind="stable")
    classes = sorted(set(labels) - {""})
    class_of = {"": -1} | {name: c for c, name in enumerate(classes)}
    return Cohort(
        root=roots.pop() or root,
        levels=tuple(levels),
        names=np.array(list(names))[order],
        parents=[slide[order], *parents[:-1]],  # nothing is above the patients
        group_names=group_names,
        label=np.array([class_of[label] for label in labels], np.int32)[order],
        patient_split=splits_of(root, group_names[-1], split_of, val_fraction),
        classes=classes,
        patch=np.arange(len(names), dtype=np.int32),
    )


def check_entry(where, path, groups, split):
    """Raises ValueError for a line of a manifest that is wrong by itself."""
    for name in (path, *groups):
        if not name:
            raise ValueError(f"{where}: only label, split and root may be empty")
        if name != name.strip() or len(name.splitlines()) > 1:
            raise ValueError(f"{where}: rename {name!r}: no blank at its ends, no line break")
        if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
            raise ValueError(f"{where}: rename {name!r}: its bytes are not UTF-8")
    if (
        path != os.path.normpath(path)
        or path[:2] == ".."
        or re.match(r"/|\w:", path)
        or "\\" in path
    ):
        raise ValueError(
            f"{where}: {path!r} must be a plain path inside the cohort's folder, such as a/b.png: "
            "no .., no ., no backslash, no drive"
        )
    if split and split not in SPLITS:
        raise ValueError(f"{where}: the split {split!r} is none of {', '.join(SPLITS)}")


def splits_of(root, patients, split_of, val_fraction):
    """[P] int8, indices into SPLITS: as the manifest says, or by hash where it says nothing."""
    without = [name for name in patients if not split_of[name]]
    if len(without) == len(patients):
        return hash_split(patients, val_fraction)
    if without:
        raise ValueError(f"{root}: some patients have a split, but {without[0]!r} has none")
    return np.array([SPLITS.index(split_of[name]) for name in patients], np.int8)


def hash_split(patients, val_fraction=0.2):
    """[P] int8, 0 (train) or 1 (val), by the hash of P patients' names: alike on every machine.

    If chance leaves nobody in val (train), the patient of the lowest (highest) hash goes there.
    """
    digests = [hashlib.sha256(name.encode()).hexdigest() for name in patients]
    value = np.array([int(digest[:12], 16) / 2**48 for digest in digests])  # in [0, 1)
    split = (value < val_fraction).astype(np.int8)
    if len(patients) > 1 and val_fraction > 0:
        split[value.argmin()] = 1
        split[value.argmax()] = 0
    return split


def main():
    with tempfile.TemporaryDirectory() as folder:
        root = folder if len(sys.argv) == 1 else sys.argv[1]
        if root == folder:  # 2 patients x 2 slides x 3 patches of coloured noise
            lines = ["path,patient,slide"]
            for p, s, b in np.ndindex(2, 2, 3):
                lines.append(f"{p}-{s}-{b}.png,patient-{p},slide-{p}-{s}")
                noise = np.random.default_rng(b).integers(60, size=(64, 64, 3), dtype=np.uint8)
                image = Image.fromarray(noise + np.uint8([100 + 90 * p, 100 + 90 * s, 150]))
                image.save(os.path.join(folder, f"{p}-{s}-{b}.png"))
            Path(folder, "manifest.csv").write_text("\n".join(lines))
        cohort = read_cohort(root, val_fraction=0)
        patients = min(2, len(cohort.present))
        images, _ = next(load_views(cohort, range(1, 2), patients, (4, 2, 2), "strong", (128, 96)))
    print(f"{cohort}; one batch:")
    for row in hierarchical_batch(cohort, 1, 0, patients).reshape(-1):
        ids = dict(zip(cohort.levels, cohort.ids(np.array([row]))[0].tolist()))
        print(f"row {row}: {ids}, {cohort.name(row)}")
    save_image(images, "views.png", nrow=4)
    print(f"views.png: images {list(images.shape)}, the four views of a patch in each row")


if __name__ == "__main__":
    main()
