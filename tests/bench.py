"""What the parts cost, each beside what it is compared with, in one table.

    python tests/bench.py                   everything: about 12 minutes on two cores
    python tests/bench.py losses knn        these sections alone

One thread, unless a row says otherwise; the two sides of a ratio take turns in one run, and the
median counts. Nothing else should run meanwhile. The rows are also written as JSON.
"""

import argparse
import csv
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tifffile
import torch
import torch.nn.functional as F
import torchvision.transforms as T
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
import train  # noqa: E402
from demo.prepare import demo_clip, demo_tissue  # noqa: E402
from evaluate import assess, embed, knn  # noqa: E402
from losses import LEVELS, ha, hvc  # noqa: E402
from model import HLSS, ModifiedResNet, load_run  # noqa: E402


def take_turns(rounds, **functions):
    """The median seconds of each function, {name: seconds}: one after the other, many times."""
    seconds = {name: [] for name in functions}
    for function in functions.values():
        function()  # the first call is slower
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(values)) for name, values in seconds.items()}


def row(what, ours, unit, beside=None, than="", aim=""):
    """A line of the table: our number, the one beside it, and what that is."""
    ratio = ours / beside if beside else None
    return {"what": what, "ours": ours, "unit": unit, "beside": beside, "than": than} | {
        "ratio": ratio,
        "aim": aim,
    }


# ---------------------------------------------------------------------------------- the losses


def inputs(N, K=128, D=1024):
    """z [N, D], three projections [N, K], a bank of three levels [K, D], and ids {level: [N]}."""
    generator = torch.Generator().manual_seed(0)

    def unit(n, d):
        return F.normalize(torch.randn(n, d, generator=generator), dim=1)

    z = unit(N, D).requires_grad_()
    bank = {level: unit(K, D) for level in LEVELS}
    projections = {level: unit(N, K).requires_grad_() for level in LEVELS}
    number = torch.arange(N)
    return z, projections, bank, {at: number // n for at, n in zip(LEVELS, (2, 4, 8))}


def ours(z, projections, bank, ids):
    """HVC and HA of losses.py, and their gradients. Returns the six terms."""
    terms = hvc(projections, ids) | ha(z, bank)
    sum(terms.values()).backward()
    return [term.item() for term in terms.values()]


def released(z, projections, bank, ids, temperature=0.07):
    """The same as the released code computes it: the contrast of each projection with the ids of
    each level, of which only those of its own level count; the nearest attribute by a cosine that
    is broadcast over [N, K, D]; and no gradient of the alignment. Returns the six terms."""
    contrast = {}
    for name, p in projections.items():
        for level in LEVELS:
            positive = (ids[level][:, None] == ids[level]).float()
            others = 1 - torch.eye(len(p))
            positive = positive * others
            logits = p @ p.T / temperature
            logits = logits - logits.max(dim=1, keepdim=True).values.detach()
            log_probability = logits - (logits.exp() * others).sum(dim=1, keepdim=True).log()
            loss = -(positive * log_probability).sum(dim=1) / positive.sum(dim=1)
            contrast[name, level] = loss.mean()
    counted = [contrast[level, level] for level in LEVELS]
    sum(counted).backward()
    alignment = []
    for t in bank.values():
        nearest = t[F.cosine_similarity(z[:, None], t[None], dim=2).argmax(dim=1)]
        log_s, log_t = z.log_softmax(dim=1), nearest.log_softmax(dim=1)
        there = F.kl_div(log_t, log_s.exp(), reduction="batchmean").item()
        back = F.kl_div(log_s, log_t.exp(), reduction="batchmean").item()
        alignment.append((there + back) / 2)
    return [loss.item() for loss in counted] + alignment


def added_memory(function):
    """What a function returns, and the MiB at its peak beyond those before it (Linux alone)."""

    def status(field):
        text = Path("/proc/self/status").read_text()
        return int(text.partition(f"{field}:")[2].split()[0]) / 2**10

    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    result = function()
    return result, status("VmHWM") - before


def peak(function, N):
    """The memory in MiB that a function takes beyond its inputs."""
    torch.set_num_threads(1)
    arguments = inputs(N)
    function(*inputs(16))  # what is loaded on first use
    return added_memory(lambda: function(*arguments))[1]


def in_a_process(function, *arguments):
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def losses(sizes=(256, 1024, 2048), rounds=3):
    """HVC + HA beside the released way, K = 128 attributes, D = 1,024 dimensions."""
    for N in sizes:
        arguments = inputs(N)
        seconds = take_turns(
            rounds, ours=lambda x=arguments: ours(*x), other=lambda x=arguments: released(*x)
        )
        than = "the released way"
        yield row(f"HVC + HA, N = {N}", seconds["ours"], "s", seconds["other"], than)
        memory = [in_a_process(peak, function, N) for function in (ours, released)]
        yield row(f"HVC + HA, N = {N}: memory", memory[0], "MiB", memory[1], than)


# -------------------------------------------------------------------------------- a training step


def steps(tower, N):
    """Two functions: a whole step of train.py; forward, backward and AdamW of the bare tower."""
    bank = {level: F.normalize(torch.randn(128, tower.dim), dim=1) for level in LEVELS}
    model = HLSS(tower, bank).to(memory_format=torch.channels_last)
    config = train.Config(clip="demo")
    images = torch.rand(N, 3, tower.image_size, tower.image_size)
    images = images.contiguous(memory_format=torch.channels_last)
    *_, ids = inputs(N)
    whole = torch.optim.AdamW(model.parameters(), fused=True)
    bare = torch.optim.AdamW(tower.parameters(), fused=True)

    def step(amp=False):  # the phases of the loop in train.py
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            z, projections = model(images)
        terms = hvc(projections, ids, config.temperature)
        terms |= ha(z, model.bank, config.ha_temperature)
        loss = sum(config.lambdas[name] * term for name, term in terms.items())
        whole.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        numbers = train.average({"loss": loss, **terms, "norm": norm}, train.CPU)
        train.check_finite(numbers, 1, ids, None)
        for group in whole.param_groups:
            group["lr"] = train.learning_rate(1, config)
        whole.step()

    def bare_tower():
        bare.zero_grad()
        tower(images).square().mean().backward()
        bare.step()

    return step, bare_tower


def batch(sizes=(256, 1024, 4096), rounds=2):
    """What the losses, and a step of the demo's tower, cost as the batch grows."""
    for N in sizes:
        arguments = inputs(N)
        seconds = take_turns(rounds, ours=lambda x=arguments: ours(*x))["ours"]
        yield row(f"HVC + HA, N = {N}, D = 1,024", seconds, "s")
        yield row(f"HVC + HA, N = {N}: memory", in_a_process(peak, ours, N), "MiB")
        whole, bare = steps(ModifiedResNet((1, 1, 1, 1), 16, 64, 64), N)
        seconds = take_turns(rounds, whole=whole, bare=bare)
        what = f"step, the demo's tower, N = {N}"
        yield row(what, seconds["whole"], "s", seconds["bare"], "its tower alone")


TOWERS = {  # (layers, width, dim, pixels), images, rounds, aim
    "RN50, 224 pixels": (((3, 4, 6, 3), 64, 1024, 224), 32, 3, "1.03"),
    "the demo's tower, 64 pixels": (((1, 1, 1, 1), 16, 64, 64), 64, 30, "1.05"),
}


def step(towers=TOWERS):
    """A whole training step beside the bare tower's."""
    for name, (sizes, N, rounds, aim) in towers.items():
        whole, bare = steps(ModifiedResNet(*sizes), N)
        seconds = take_turns(rounds, whole=whole, bare=bare)
        than = "its tower alone"
        yield row(f"step, {name}", seconds["whole"], "s", seconds["bare"], than, aim)


def bf16(rounds=3):
    """The step in bf16 beside float32, where the processor has bf16."""
    with open("/proc/cpuinfo") as file:
        if not {"avx512_bf16", "amx_bf16"} & set(file.read().split()):
            yield row("bf16: this processor has none", float("nan"), "s")
            return
    whole, _ = steps(ModifiedResNet(*TOWERS["RN50, 224 pixels"][0]), 32)
    seconds = take_turns(rounds, half=lambda: whole(amp=True), full=whole)
    yield row("step in bf16, RN50", seconds["half"], "s", seconds["full"], "float32")


# ------------------------------------------------------------------------------- data and probes


class Noise(torch.nn.Module):
    def forward(self, x):
        return (x + random.uniform(0.01, 0.1) * torch.randn(x.shape)).clamp(0, 1)


def half(transform):
    return T.RandomApply([transform], p=0.5)


PIPELINE = T.Compose(
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


def one_by_one(paths, views):
    """Views as the paper's code makes them: for each the file is decoded and transformed."""
    made = []
    for path in paths:
        for _ in range(views):
            ch2, ch3 = torch.from_numpy(tifffile.imread(path).astype(np.float32)) / 65536
            image = torch.stack([ch3 - ch2 + 5000 / 65536, ch2, ch3]).clamp(0, 1)
            made.append(PIPELINE(image))
    return torch.stack(made)


def in_batches(paths, views):
    images = torch.from_numpy(np.stack([data.decode(path, 300) for path in paths]))
    augmentation = data.AUGMENTATIONS["strong-srh"]
    parameters = data.view_parameters(augmentation, 0, 1, range(len(paths)), views)
    return data.make_views(images, parameters, 224)


def views(patches=16, rounds=15):
    """Views of 300 -> 224 pixel SRH patches, decoding included."""
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        paths = [os.path.join(folder, f"{i}.tif") for i in range(patches)]
        for path in paths:
            smooth = np.kron(rng.integers(3000, 15000, (2, 30, 30)), np.ones((10, 10)))
            noisy = smooth + rng.normal(0, 500, smooth.shape)
            tifffile.imwrite(path, noisy.astype(np.uint16))
        seconds = take_turns(
            rounds, ours=lambda: in_batches(paths, 2), other=lambda: one_by_one(paths, 2)
        )
    each = {name: 1e3 * value / patches / 2 for name, value in seconds.items()}
    than = "torchvision, one by one"
    yield row("a strong view", each["ours"], "ms", each["other"], than, "1 / 3.5")


def write_large(folder, patients):
    """The manifest of a cohort of 100 patches a patient, in four slides; there are no images."""
    with open(os.path.join(folder, "manifest.csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "patient", "slide", "label"])
        for p in range(patients):
            patient = f"TCGA-02-{p:05d}"
            for i in range(100):
                slide = f"{patient}-DX{i // 25}"
                path = f"tiles/{patient}/DX{i // 25}/{i:05d}_{i * 224:06d}.jpg"
                writer.writerow([path, patient, slide, "ab"[p % 2]])


def open_and_draw(folder):
    """Seconds to open a cohort, MiB that it adds, and seconds for a batch of 50 patients."""
    start = time.perf_counter()
    cohort, added = added_memory(lambda: data.read_cohort(folder, val_fraction=0.01))
    opened = time.perf_counter() - start
    start = time.perf_counter()
    for number in range(1, 51):
        data.hierarchical_batch(cohort, number, 0, 50)
    return opened, added, (time.perf_counter() - start) / 50


def cohort(patients=(100, 1000, 10000)):
    """Cohorts of 10^4 to 10^6 patches: open, memory, a batch."""
    for number in patients:
        aims = ("4 s", "250 MiB", "5 ms") if number == 10000 else ("", "", "")
        with tempfile.TemporaryDirectory() as folder:
            write_large(folder, number)
            opened, added, drawn = in_a_process(open_and_draw, folder)
        name = f"{100 * number:,} patches"
        yield row(f"{name}: open", opened, "s", aim=aims[0])
        yield row(f"{name}: memory", added, "MiB", aim=aims[1])
        yield row(f"{name}: a batch of 50 patients", 1e3 * drawn, "ms", aim=aims[2])


def probes(m=200_000, n=2_000, D=1024, rounds=3):
    """kNN beside its product and top-k; metrics and their intervals."""
    train_z = torch.randn(m, D)
    z = torch.randn(n, D)
    labels = torch.randint(0, 10, (m,))

    def product_and_top_k():
        for part in z.split(256):
            (part @ train_z.T).topk(200, dim=1)

    seconds = take_turns(
        rounds, ours=lambda: knn(train_z, labels, z, 10, ks=(200,)), bare=product_and_top_k
    )
    what = f"kNN of {n:,} among {m:,}"
    yield row(what, seconds["ours"], "s", seconds["bare"], "product and top-k", "1.05")

    patches, patients, classes = 60_000, 60, 10
    patient = np.arange(patches) // (patches // patients)
    slide = np.arange(patches) // 200
    fake = SimpleNamespace(
        levels=LEVELS,
        patient=patient,
        label=patient % classes,
        classes=[str(c) for c in range(classes)],
        group_names=[[], [str(p) for p in range(patients)]],
        ids=lambda rows: np.stack([rows, slide[rows], patient[rows]], axis=1),
    )
    probabilities = np.random.default_rng(0).random((patches, classes))
    splits = [(np.arange(1), np.arange(patches))]
    found = take_turns(1, ours=lambda: assess({"linear": probabilities}, fake, splits))
    yield row("1,000 resamples, 60,000 patches, 60 patients", found["ours"], "s")


# ------------------------------------------------------------------------------ the whole system


def processes(numbers=(1, 2, 4), length=60):
    """Images a second of the demo on several processes, one thread each."""
    os.chdir(ROOT)
    demo_tissue()
    demo_clip()
    one = None
    for number in numbers:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc_per_node={number}", "train.py", "--out", f"{folder}/run"]
            command += ["--steps", str(length), "--probe-every", "0"]
            threads = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(command, cwd=ROOT, env=threads, check=True, capture_output=True)
            lines = Path(folder, "run", "log.jsonl").read_text().splitlines()
        logged = [json.loads(line) for line in lines]
        speed = [line["images_per_s"] for line in logged if "images_per_s" in line][-1]
        one = one or speed
        yield row(f"processes: {number}", speed, "images/s", one, "one process")


def demo():
    """The demo's stages, from nothing, on all cores."""
    torch.set_num_threads(os.cpu_count())
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        start = time.perf_counter()
        demo_tissue()
        tissue = time.perf_counter()
        yield row("demo: tissue", tissue - start, "s")
        demo_clip()
        clip = time.perf_counter()
        yield row("demo: CLIP", clip - tissue, "s")
        config = train.parse_config([])
        with redirect_stdout(sys.stderr):
            train.train(config)
        yield row(f"demo: {config.steps} steps and their probes", time.perf_counter() - clip, "s")
        model, checkpoint = load_run(config.out)
        cohort = data.read_cohort(checkpoint["config"]["data"])
        start = time.perf_counter()
        embed(model, cohort, checkpoint["read_size"], checkpoint["image_size"])
        yield row("demo: embed 3,840 patches", time.perf_counter() - start, "s")
        os.chdir(ROOT)
    torch.set_num_threads(1)


SECTIONS = {
    "losses": losses,
    "batch": batch,
    "step": step,
    "bf16": bf16,
    "views": views,
    "cohort": cohort,
    "knn": probes,
    "processes": processes,
    "demo": demo,
}


def line_of(found):
    """A row of the table as text."""
    beside = "" if found["beside"] is None else f"{found['beside']:10.3g}"
    ratio = "" if found["ratio"] is None else f"{found['ratio']:8.3f}"
    start = f"{found['what']:46}{found['ours']:10.3g} {found['unit']:9}{beside:>10}{ratio:>9}"
    return f"{start}  {found['than']:24}{found['aim']}".rstrip()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--out", default="runs/bench.json", help="JSON of all rows")
    args = parser.parse_args()
    unknown = set(args.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {', '.join(unknown)}: take of {', '.join(SECTIONS)}")
    out = Path(args.out).absolute()
    torch.set_num_threads(1)
    found = []
    print(f"{'':46}{'ours':>10} {'':9}{'beside':>10}{'ratio':>9}  {'what is beside':24}aim")
    for name in tqdm(args.sections or SECTIONS, disable=None):
        for one in SECTIONS[name]():
            found.append({"section": name} | one)
            tqdm.write(line_of(one))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
