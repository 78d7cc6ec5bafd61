"""What the data costs, on one core: opening a cohort, drawing a batch, and making views beside
torchvision.

python tests/bench_data.py
"""

import argparse
import csv
import os
import random
import resource
import sys
import tempfile
import time

import numpy as np
import tifffile
import torch
import torchvision.transforms as T

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import data


def scale(folder):
    """Open cohorts of 10^4 to 10^6 patches, 100 a patient, and draw batches of 64 patients."""
    print("   patches   open (s)   adds (MiB)   a batch (ms)")
    for patients in (100, 1000, 10000):
        with open(os.path.join(folder, "manifest.csv"), "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "patient", "slide", "label"])
            for p in range(patients):
                writer.writerows(
                    [
                        f"tiles/TCGA-02-{p:05d}/DX{i // 25}/{i:05d}_{i * 224:06d}.jpg",
                        f"TCGA-02-{p:05d}",
                        f"TCGA-02-{p:05d}-DX{i // 25}",
                        "ab"[p % 2],
                    ]
                    for i in range(100)
                )
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        cohort = data.read_cohort(folder, val_fraction=0.01)
        opened = time.perf_counter() - start
        added = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
        start = time.perf_counter()
        for step in range(200):
            data.hierarchical_batch(cohort, step, 0, 50)
        print(
            f"{len(cohort):10d}{opened:11.2f}{added:13.0f}"
            f"{(time.perf_counter() - start) * 5:15.2f}",
            flush=True,
        )


class Noise(torch.nn.Module):
    def forward(self, x):
        return (x + random.uniform(0.01, 0.1) * torch.randn(x.shape)).clamp(0, 1)


def per_sample(path, pipeline):
    """A view as the paper's code makes it: decode, three channels, one random transform after
    the other."""
    ch2, ch3 = torch.from_numpy(tifffile.imread(path).astype(np.float32)) / 65536
    return pipeline(torch.stack([ch3 - ch2 + 5000 / 65536, ch2, ch3]).clamp(0, 1))


def speed(folder, patches=64, views=2, rounds=5):
    """Views a second of 300 -> 224 pixel SRH patches, decoding included; the two take turns."""

    def half(transform):
        return T.RandomApply([transform], p=0.5)

    pipeline = T.Compose(
        [
            T.RandomHorizontalFlip(),
            T.RandomVerticalFlip(),
            half(Noise()),
            half(T.ColorJitter(0.2, 0.2)),
            T.RandomAutocontrast(),
            T.RandomSolarize(0.2),
            T.RandomAdjustSharpness(2),
            half(T.GaussianBlur(5, 1.0)),
            half(T.RandomAffine(10, (0.1, 0.1))),
            half(T.RandomResizedCrop(300, (0.2, 1.0))),
            T.RandomErasing(),
            T.Resize(224),
        ]
    )
    rng = np.random.default_rng(0)
    paths = [os.path.join(folder, f"{i}.tif") for i in range(patches)]
    for path in paths:
        smooth = np.kron(rng.integers(3000, 15000, (2, 30, 30)), np.ones((10, 10)))
        tifffile.imwrite(path, (smooth + rng.normal(0, 500, smooth.shape)).astype(np.uint16))
    times = {"torchvision, one by one": [], "data.py, batched": []}
    for step in range(rounds):
        start = time.perf_counter()
        for some in np.array_split(paths, patches // 16):  # 16 patches, 32 views a batch
            torch.stack([per_sample(path, pipeline) for path in some for _ in range(views)])
        times["torchvision, one by one"].append(time.perf_counter() - start)
        start = time.perf_counter()
        for some in np.array_split(paths, patches // 16):
            images = torch.from_numpy(np.stack([data.decode(path, 300) for path in some]))
            parameters = data.view_parameters(
                len(some) * views, 0, step, data.AUGMENTATIONS["strong-srh"]
            )
            data.make_views(images, parameters, 224)
        times["data.py, batched"].append(time.perf_counter() - start)
    for name, seconds in times.items():
        each = np.array(seconds) / patches / views * 1e3
        print(f"{name:24s} {np.median(each):6.2f} ms a view ({each.min():.2f} to {each.max():.2f})")
    slow, fast = times.values()
    print(f"{np.median(slow) / np.median(fast):.1f} x as many views a second")
    return np.median(slow) / np.median(fast)


def main():
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        scale(folder)
        speed(folder)


if __name__ == "__main__":
    main()
