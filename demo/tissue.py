"""Procedural tissue whose truth is known."""

import argparse
import csv
import os

import numpy as np
from PIL import Image
from tqdm import tqdm

from data import STAINS, read_cohort

FACTORS = (
    "cellularity",
    "nuclear_size",
    "pleomorphism",
    "elongation",
    "vessels",
    "necrosis",
    "fibres",
)
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
    along, across = (
        x * np.cos(direction) + y * np.sin(direction),
        y * np.cos(direction) - x * np.sin(direction),
    )
    warp = rng.uniform(1, 3) * np.sin(along * rng.uniform(0.05, 0.12) + rng.uniform(0, 6))
    eosin = 0.35 + 0.3 * fibres * np.sin(across * rng.uniform(0.7, 1.0) + warp)

    n = rng.poisson((6 + 54 * cellularity) * (size / 64) ** 2)
    radius = (1.6 + 2.6 * nuclear_size) * np.exp(rng.normal(0, 0.05 + 0.55 * pleomorphism, n))
    stretch = 1 + 3 * elongation * rng.uniform(0.6, 1.2, n)
    angle = direction + rng.normal(0, 0.15 + 0.9 * (1 - elongation), n)
    darkness = np.exp(rng.normal(0, 0.05 + 0.3 * pleomorphism, n)).astype(np.float32)
    x0, y0 = rng.uniform(0, size, (2, n))
    # The squared distance from a centre, in units of the radii, is a quadratic form in x and y: one product for all.
    cos, sin, long, short = (
        np.cos(angle),
        np.sin(angle),
        1 / (radius**2 * stretch),
        stretch / radius**2,
    )
    a, b, c = (
        cos**2 * long + sin**2 * short,
        2 * cos * sin * (long - short),
        sin**2 * long + cos**2 * short,
    )
    form = np.stack(
        [a, b, c, -2 * a * x0 - b * y0, -2 * c * y0 - b * x0, a * x0**2 + b * x0 * y0 + c * y0**2],
        axis=1,
    )
    distance = form.astype(np.float32) @ np.stack(
        [x * x, x * y, y * y, x, y, np.ones_like(x)]
    ).reshape(6, -1)
    nuclei = (
        (np.clip(1.8 - distance, 0, 1) * darkness[:, None])
        .max(axis=0, initial=0)
        .reshape(size, size)
    )

    for _ in range(rng.poisson(4 * vessels)):
        r, lumen = np.hypot(x - rng.uniform(0, size), y - rng.uniform(0, size)), rng.uniform(3, 7)
        inside = np.clip(lumen - r, 0, 1)
        nuclei = nuclei * (1 - inside)
        eosin = eosin * (1 - 0.9 * inside) + 0.7 * np.exp(-np.square((r - lumen - 1) / 1.2))
    ragged = (
        np.hypot(x - rng.uniform(0, size), y - rng.uniform(0, size))
        + 2 * np.sin(x * 0.6)
        + 2 * np.sin(y * 0.5)
    )
    dead = np.clip((size * 0.75 * necrosis * rng.uniform(0.6, 1.2) - ragged) / 4, 0, 1)
    nuclei, eosin = (
        nuclei * (1 - 0.85 * dead),
        eosin * (1 - 0.5 * dead) + 0.1 * dead * rng.random((size, size)),
    )

    haematoxylin = STAINS[0].numpy() + np.array([stain[2], 0, -stain[2]])
    density = stain[0] * (1.1 * nuclei + 0.06)[..., None] * haematoxylin + rng.normal(
        0, 0.03, (size, size, 3)
    )
    density += stain[1] * np.maximum(eosin, 0)[..., None] * STAINS[1].numpy()
    return (255 * np.exp(-np.maximum(density, 0))).round().astype(np.uint8)


def write_demo(out, patients=40, slides=3, patches=8, seed=0):
    """Write demo tissue: so many patients a class, slides a patient and patches a slide. Returns the folder.

    Factors vary by class, patient, slide and patch (factors.csv holds them); stain varies by patient and slide and
    means nothing. A fifth of the patches of a tumour look normal but carry its label. Two of five patients are for
    validation.
    """
    rng = np.random.default_rng(seed)
    tables = {
        "factors.csv": [["path", *FACTORS]],
        "manifest.csv": [["path", "patient", "slide", "label", "split"]],
    }
    with tqdm(
        total=len(DEMO_CLASSES) * patients * slides * patches, desc="demo tissue", unit="patch"
    ) as bar:
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
                        factors = np.clip(
                            centre + of_slide + rng.normal(0, 0.06, len(FACTORS)), 0, 1
                        )
                        path = f"images/{patient}/{s}-{b}.png"
                        Image.fromarray(render(factors, rng, stain)).save(os.path.join(out, path))
                        tables["factors.csv"].append([path, *factors.round(4)])
                        tables["manifest.csv"].append(
                            [path, patient, f"{patient}-{s}", label, split]
                        )
                        bar.update()
    for (
        name,
        rows,
    ) in tables.items():  # the manifest comes last and whole: where it is, everything is
        with open(os.path.join(out, f"{name}.part"), "w", newline="") as file:
            csv.writer(file).writerows(rows)
        os.replace(os.path.join(out, f"{name}.part"), os.path.join(out, name))
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", help="folder to write to")
    parser.add_argument(
        "--patients", type=int, default=40, help="patients in each of the four classes"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="another seed is another cohort of the same kind"
    )
    args = parser.parse_args()
    print(read_cohort(write_demo(args.out, patients=args.patients, seed=args.seed)))


if __name__ == "__main__":
    main()
