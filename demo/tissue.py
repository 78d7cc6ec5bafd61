"""Procedural H&E-like tissue: a cohort with known ground truth, for the demo and the tests.

    python -m demo.tissue OUT

writes an ordinary cohort (images and manifest.csv) and beside it factors.csv: the seven numbers
behind each image. The patches of a slide lie on a grid, over which two of the factors drift.
"""

import argparse
import math
import os
from functools import partial
from itertools import product

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import STAINS, read_cohort
from tools.processes import user_errors
from tools.runs import write_whole

FACTORS = "cellularity nuclear_size pleomorphism elongation vessels necrosis fibres".split()
CLASSES = {  # the mean of each factor
    "high_grade": (0.60, 0.50, 0.80, 0.30, 0.45, 0.35, 0.30),
    "low_grade": (0.55, 0.45, 0.25, 0.30, 0.40, 0.25, 0.30),
    "normal": (0.35, 0.40, 0.25, 0.30, 0.35, 0.20, 0.40),
    "spindle": (0.55, 0.45, 0.30, 0.80, 0.40, 0.25, 0.80),
}
STAIN_SPREAD = (0.17, 0.17, 0.05)  # of both strengths and the hue: standard deviation over slides
SMOOTH = np.isin(FACTORS, ("cellularity", "necrosis"))  # those that drift over a slide
PATCH_SPREAD = np.where(SMOOTH, 0.03, 0.06)  # standard deviation of each factor over patches


def draw_nuclei(x, y, rng, direction, factors):
    """Soft ellipses, along `direction` if elongated: haematoxylin, about 0 to 1.5, [size, size].

    x, y: the coordinates of all pixels, [size, size]. factors: {name: number in [0, 1]}.
    """
    size = len(x)
    pleomorphism, elongation = factors["pleomorphism"], factors["elongation"]
    n = rng.poisson((6 + 54 * factors["cellularity"]) * (size / 64) ** 2)
    radius = 1.6 + 2.6 * factors["nuclear_size"]
    radius = radius * np.exp(rng.normal(0, 0.05 + 0.55 * pleomorphism, n))
    stretch = np.sqrt(1 + 4 * elongation * rng.uniform(0.8, 1.2, n))
    angle = direction + rng.normal(0, 0.15 + 0.9 * (1 - elongation), n)
    darkness = np.exp(rng.normal(0, 0.05 + 0.4 * pleomorphism, n))
    x0, y0 = rng.uniform(0, size, (2, n))

    # Ellipse by ellipse: how far each pixel is from the centre, in radii along it and across it.
    cos, sin = np.cos(angle), np.sin(angle)
    nuclei = np.zeros_like(x)
    ellipses = np.stack([x0, y0, cos, sin, radius * stretch, radius / stretch, darkness], axis=1)
    for x0, y0, cos, sin, long, short, dark in ellipses.astype(np.float32):
        along = ((x - x0) * cos + (y - y0) * sin) / long
        across = ((y - y0) * cos - (x - x0) * sin) / short
        nuclei = np.maximum(nuclei, dark * np.clip(1.8 - along**2 - across**2, 0, 1))
    return nuclei


def render(factors, rng, stain=(1.0, 1.0, 0.0), size=64, scanner=1.0):
    """One patch of tissue, uint8 [size, size, 3].

    factors: seven numbers in [0, 1], as in FACTORS. stain: strengths of haematoxylin and eosin, and
    shift of hue. scanner: a factor on the density, [size, size] or a number.
    """
    factors = dict(zip(FACTORS, factors))
    y, x = np.mgrid[:size, :size].astype(np.float32)

    # Fibres: a warped sine of eosin, in the direction that long nuclei follow.
    direction = rng.uniform(0, np.pi)
    along = x * np.cos(direction) + y * np.sin(direction)
    across = y * np.cos(direction) - x * np.sin(direction)
    warp = rng.uniform(1, 3) * np.sin(along * rng.uniform(0.05, 0.12) + rng.uniform(0, 6))
    waves = np.sin(across * rng.uniform(0.7, 1.0) + warp)
    eosin = 0.35 + 0.3 * factors["fibres"] * waves

    nuclei = draw_nuclei(x, y, rng, direction, factors)

    # Vessels: an empty lumen in a ring of eosin.
    for _ in range(int(5 * factors["vessels"] + rng.random())):
        r = np.hypot(x - rng.uniform(0, size), y - rng.uniform(0, size))
        lumen = rng.uniform(3, 5)
        inside = np.clip(lumen - r, 0, 1)
        nuclei = nuclei * (1 - inside)
        eosin = eosin * (1 - 0.9 * inside) + 1.2 * np.exp(-np.square((r - lumen - 1) / 1.2))

    # Necrosis: a ragged blob in which nuclei fade and eosin turns to dust.
    ragged = np.hypot(x - rng.uniform(0, size), y - rng.uniform(0, size))
    ragged = ragged + 2 * np.sin(x * 0.6) + 2 * np.sin(y * 0.5)
    radius = size * 0.75 * factors["necrosis"] * rng.uniform(0.6, 1.2)
    dead = np.clip((radius - ragged) / 4, 0, 1)
    nuclei = nuclei * (1 - 0.85 * dead)
    eosin = eosin * (1 - 0.5 * dead) + 0.1 * dead * rng.random((size, size))

    # Light: what passes through a density is exp(-density), and the densities of stains add up.
    haematoxylin = STAINS[0].numpy() + np.array([stain[2], 0, -stain[2]])
    density = stain[0] * (1.1 * nuclei + 0.06)[..., None] * haematoxylin
    density = density + rng.normal(0, 0.03, (size, size, 3))
    density += stain[1] * np.maximum(eosin, 0)[..., None] * STAINS[1].numpy()
    density *= np.reshape(scanner, (*np.shape(scanner), 1))
    return (255 * np.exp(-np.maximum(density, 0))).round().astype(np.uint8)


def fine_sine(rng, share, size=64):
    """A scanner's pattern, 1 + share sin(...), [size, size]: a wave of 3 to 5 pixels."""
    y, x = np.mgrid[:size, :size]
    angle = rng.uniform(0, np.pi)
    wave = 2 * np.pi / rng.uniform(3, 5)
    return 1 + share * np.sin(wave * (x * np.cos(angle) + y * np.sin(angle)))


def drift(grid, rng, amplitude=0.15):
    """What each place on a slide adds to the factors, [patches, 7]: its mean over the slide is 0.

    Each factor in SMOOTH follows half a wave with its own direction and phase; the others are 0.
    grid: the column and row of each patch, [patches, 2].
    """
    place = (grid - grid.mean(axis=0)) / max(1, np.ptp(grid, axis=0).max())
    angle, phase = rng.uniform(0, 2 * np.pi, (2, 7))
    wave = np.sin(np.pi * place @ np.stack([np.cos(angle), np.sin(angle)]) + phase)
    return amplitude * SMOOTH * (wave - wave.mean(axis=0))


def write_demo(out, patients=40, held_out=16, slides=3, patches=8, signature=0.0, seed=0):
    """Writes a cohort: patients per class, slides per patient, patches per slide. Returns `out`.

    Factors vary by class, patient, slide and patch; stain varies by patient and slide and means
    nothing. A fifth of the patches look normal, whatever their label. held_out: patients of each
    class in the val split. signature: the share of the density by which a patient's scanner
    varies, a shortcut for a model that merely tells patients apart.
    """
    rng = np.random.default_rng(seed)
    # A near-square grid of patches: 4 x 2 for eight.
    columns = math.ceil(patches / math.isqrt(patches))
    grid = np.array([(b % columns, b // columns) for b in range(patches)])
    factor_rows = [["path", *FACTORS]]
    manifest_rows = [["path", "patient", "slide", "label", "split", "x", "y"]]
    bar = tqdm(total=len(CLASSES) * patients * slides * patches, desc="demo tissue", unit="patch")
    for label, p in product(CLASSES, range(patients)):
        patient = f"{label}-{p:02d}"
        split = "val" if p < held_out else "train"
        os.makedirs(os.path.join(out, "images", patient), exist_ok=True)
        patient_offset = rng.normal(0, 0.12, 7)
        patient_stain = np.array((1, 1, 0)) + rng.normal(0, (0.15, 0.15, 0.05))
        scanner = fine_sine(rng, signature)
        for s in range(slides):
            slide_offset = patient_offset + rng.normal(0, 0.05, 7)
            stain = patient_stain + rng.normal(0, (0.07, 0.07, 0.02))
            for b, offset in enumerate(slide_offset + drift(grid, rng)):
                centre = CLASSES["normal" if rng.random() < 0.2 else label]
                factors = np.clip(centre + offset + rng.normal(0, PATCH_SPREAD), 0, 1)
                path = f"images/{patient}/{s}-{b}.png"
                image = Image.fromarray(render(factors, rng, stain, scanner=scanner))
                image.save(os.path.join(out, path))
                factor_rows.append([path, *factors.round(4)])
                x, y = 64 * grid[b]
                manifest_rows.append([path, patient, f"{patient}-{s}", label, split, x, y])
                bar.update()
    bar.close()
    # The manifest comes last: if it exists, everything does.
    for name, rows in (("factors.csv", factor_rows), ("manifest.csv", manifest_rows)):
        save = partial(np.savetxt, X=rows, fmt="%s", delimiter=",")
        write_whole(os.path.join(out, name), save)
    return out


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    flag = parser.add_argument
    flag("out", help="folder to write to")
    flag("--patients", type=int, default=40, help="patients in each of the four classes")
    flag("--held-out", type=int, default=16, help="how many of these are in the val split")
    flag("--signature", type=float, default=0.0, help="strength of each patient's own pattern")
    flag("--seed", type=int, default=0, help="a new seed gives a new cohort of the same kind")
    args = parser.parse_args()
    if os.path.exists(os.path.join(args.out, "manifest.csv")):
        raise SystemExit(f"{args.out} already holds a cohort: name another folder")
    print(read_cohort(write_demo(**vars(args))))


if __name__ == "__main__":
    with user_errors():
        main()
