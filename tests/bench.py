"""The cost of each part, beside that of its alternative, in one table.

    python tests/bench.py                   all but cuda: about half an hour
    python tests/bench.py losses views      these sections alone
    python tests/bench.py probe --tiles 100000 --rows 185000    the probes at OpenSRH's size
    python tests/bench.py cuda              on a GPU, under ten minutes

One thread per process, unless a row says otherwise. The two sides of a ratio take turns in one
run, and the median counts. Run nothing else meanwhile. The rows are also written as JSON.
"""

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import tifffile
import torch
import torch.nn.functional as F
import torchvision.transforms as T
from conftest import ROOT, on_processes
from PIL import Image
from tqdm import tqdm

import data
import evaluate
import train
from losses import LEVELS, ha, hvc
from model import HLSS, ModifiedResNet, load_run
from tools import runs


def seconds_of(function):
    """How long a call takes, including its work on the GPU."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(rounds, **functions):
    """{name: median seconds} of functions that are called in turn, `rounds` times."""
    seconds = {name: [] for name in functions}
    for function in functions.values():
        seconds_of(function)  # the first call is slower
    for _ in range(rounds):
        for name, function in functions.items():
            seconds[name].append(seconds_of(function))
    return {name: float(np.median(values)) for name, values in seconds.items()}


def added_memory(function, device="cpu"):
    """The MiB that a function adds at its peak (on the CPU: Linux only)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def status(field):
        text = Path("/proc/self/status").read_text()
        return int(text.partition(f"{field}:")[2].split()[0]) / 2**10

    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    function()
    return status("VmHWM") - before


def row(what, ours, unit, beside=None, than="", aim=""):
    """A row of the table: our number, the alternative's, and what the alternative is."""
    ratio = ours / beside if beside else None
    return dict(what=what, ours=ours, unit=unit, beside=beside, ratio=ratio, than=than, aim=aim)


# ---------------------------------------------------------------------------------- the losses


def inputs(N, K=128, D=1024, device="cpu"):
    """z [N, D], three projections [N, K], a bank of three levels [K, D], and ids {level: [N]}."""
    generator = torch.Generator().manual_seed(0)

    def unit(n, d):
        return F.normalize(torch.randn(n, d, generator=generator), dim=1).to(device)

    z = unit(N, D).requires_grad_()
    bank = {level: unit(K, D) for level in LEVELS}
    projections = {level: unit(N, K).requires_grad_() for level in LEVELS}
    number = torch.arange(N, device=device)
    return z, projections, bank, {at: number // n for at, n in zip(LEVELS, (2, 4, 8))}


def ours(z, projections, bank, ids):
    """HVC and HA of losses.py with their gradients. Returns the six terms."""
    terms = hvc(projections, ids) | ha(z, bank)
    sum(terms.values()).backward()
    return [term.item() for term in terms.values()]


def released(z, projections, bank, ids, temperature=0.07):
    """The same as the released code computes it: it contrasts each projection with the ids of every
    level, of which one counts; the nearest attribute comes from a cosine broadcast over [N, K, D];
    the alignment has no gradient. Returns the six terms."""
    contrast = {}
    for name, p in projections.items():
        for level in LEVELS:
            positive = (ids[level][:, None] == ids[level]).float()
            others = 1 - torch.eye(len(p), device=p.device)
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


def peak(rank, world, function, N, device="cpu"):
    """The MiB that a function takes beyond its inputs."""
    arguments = inputs(N, device=device)
    function(*inputs(16, device=device))  # loads what is loaded on first use
    return added_memory(lambda: function(*arguments), device)


def losses(sizes=(256, 1024, 2048), rounds=3, device="cpu"):
    """HVC + HA beside the released code's way, K = 128 attributes, D = 1,024 dimensions."""
    for N in sizes:
        x = inputs(N, device=device)
        seconds = take_turns(rounds, ours=lambda x=x: ours(*x), other=lambda x=x: released(*x))
        yield row(f"HVC + HA, N = {N}", seconds["ours"], "s", seconds["other"], "the released way")
        memory = [on_processes(1, peak, f, N, device)[0] for f in (ours, released)]
        yield row(f"HVC + HA, N = {N}: memory", memory[0], "MiB", memory[1], "the released way")


# -------------------------------------------------------------------------------- a training step


def steps(sizes, N, device, amp, compile):
    """Two functions: a whole step of train.py; the bare tower's forward, backward and AdamW."""
    tower = ModifiedResNet(*sizes)
    if compile:
        tower.compile()
    bank = {level: F.normalize(torch.randn(128, tower.dim), dim=1) for level in LEVELS}
    model = HLSS(tower, bank).to(device, memory_format=torch.channels_last)
    config = train.Config(clip="demo")
    images = torch.rand(N, 3, tower.image_size, tower.image_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    *_, ids = inputs(N, device=device)
    whole = torch.optim.AdamW(model.parameters(), fused=True)
    bare = torch.optim.AdamW(tower.parameters(), fused=True)
    half = torch.autocast(images.device.type, torch.bfloat16, enabled=amp)

    def step():  # as in the loop of train.py
        with half:
            z, projections = model(images)
        terms = hvc(projections, ids, config.temperature)
        terms |= ha(z, model.bank, config.ha_temperature)
        loss = sum(config.lambdas[name] * term for name, term in terms.items())
        whole.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        numbers = train.average({"loss": loss, **terms, "norm": norm}, images.device)
        train.check_finite(numbers, 1, ids, None)
        for group in whole.param_groups:
            group["lr"] = train.learning_rate(1, config)
        whole.step()

    def bare_tower():
        with half:
            z = tower(images)
        bare.zero_grad()
        z.float().square().mean().backward()
        bare.step()

    return step, bare_tower


RN50 = ((3, 4, 6, 3), 64, 1024, 224)  # layers, width, dim, pixels
SMALL = ((1, 1, 1, 1), 16, 64, 64)  # the demo's
TOWERS = {  # tower, images, (device, bf16, compile), rounds, aim
    "RN50, 32 images": (RN50, 32, ("cpu", False, False), 3, "1.03"),
    "RN50, 32 images, bf16": (RN50, 32, ("cpu", True, False), 3, ""),
    "the demo's tower, 64 images": (SMALL, 64, ("cpu", False, False), 30, "1.05"),
    "the demo's tower, 1,024 images": (SMALL, 1024, ("cpu", False, False), 2, ""),
}
GPU_TOWERS = {
    f"RN50, {N} images{', compiled' * compile}": (RN50, N, ("cuda", True, compile), 10, "1.03")
    for N, compile in ((128, False), (128, True), (256, False), (512, False))
}


def step(towers=TOWERS):
    """A whole training step beside the bare tower's. Returns the highest images per second."""
    speeds, than = [], "its tower alone"
    for name, (sizes, N, how, rounds, aim) in towers.items():
        try:
            whole, bare = steps(sizes, N, *how)
            seconds = take_turns(rounds, whole=whole, bare=bare)
            memory = added_memory(whole, how[0])
        except torch.OutOfMemoryError:
            yield row(f"step, {name}: does not fit", float("nan"), "s")
            continue
        yield row(f"step, {name}", seconds["whole"], "s", seconds["bare"], than, aim)
        speeds.append(N / seconds["whole"])
        yield row(f"step, {name}: speed", speeds[-1], "images/s")
        if how[0] == "cuda":
            yield row(f"step, {name}: activations", memory, "MiB")
    return max(speeds, default=0)


# ------------------------------------------------------------------------------------------- data


PIPELINE = [  # of the paper's code, which applies each listed augmentation with probability 1/2
    T.RandomHorizontalFlip(),
    T.RandomVerticalFlip(),
    T.RandomApply([lambda x: (x + random.uniform(0.01, 0.1) * torch.randn_like(x)).clamp(0, 1)]),
    T.RandomApply([T.ColorJitter(0.2, 0.2)]),
    T.RandomAutocontrast(),
    T.RandomSolarize(0.2),
    T.RandomAdjustSharpness(2),
    T.RandomApply([T.GaussianBlur(5, 1.0)]),
    T.RandomApply([T.RandomAffine(10, (0.1, 0.1))]),
    T.RandomApply([T.RandomResizedCrop(300, (0.2, 1.0))]),
    T.RandomErasing(),
    T.Resize(224),
]


def one_by_one(paths, views):
    """Views as the paper's code makes them: it decodes and transforms the file for each view."""
    for path in paths:
        for _ in range(views):
            ch2, ch3 = torch.from_numpy(tifffile.imread(path).astype(np.float32)) / 65536
            image = torch.stack([ch3 - ch2 + 5000 / 65536, ch2, ch3]).clamp(0, 1)
            for transform in PIPELINE:
                image = transform(image)


def srh_views(images, views=2, device="cpu"):
    """The same views in one batch, from decoded patches."""
    drawn = data.view_parameters(data.AUGMENTATIONS["strong-srh"], 0, 1, range(len(images)), views)
    return data.make_views(images.to(device), drawn, 224)


def write_srh(folder, number):
    """Writes patches like OpenSRH's, two 16-bit frames of 300 pixels. Returns their paths."""
    rng = np.random.default_rng(0)
    paths = [os.path.join(folder, f"{i}.tif") for i in range(number)]
    for path in paths:
        smooth = np.kron(rng.integers(3000, 15000, (2, 30, 30)), np.ones((10, 10)))
        tifffile.imwrite(path, (smooth + rng.normal(0, 500, smooth.shape)).astype(np.uint16))
    return paths


def views(patches=16, rounds=15):
    """Views of SRH patches, 300 -> 224 pixels, including decoding."""
    with tempfile.TemporaryDirectory() as folder:
        paths = write_srh(folder, patches)

        def in_batches():
            srh_views(torch.from_numpy(np.stack([data.decode(path, 300) for path in paths])))

        seconds = take_turns(rounds, ours=in_batches, other=lambda: one_by_one(paths, 2))
    each = {name: 1e3 * value / patches / 2 for name, value in seconds.items()}
    yield row("a strong view", each["ours"], "ms", each["other"], "torchvision, singly", "1 / 3.5")


def write_cohort(folder, patients, patches=100):
    """Writes a manifest with seven classes and four slides per patient, but no images."""
    lines = ["path,patient,slide,label"]
    for p in range(patients):
        for i in range(patches):
            slide = f"TCGA-02-{p:05d}-DX{4 * i // patches}"
            path = f"tiles/{slide}/{i:05d}_{i * 224:06d}.jpg"
            lines.append(f"{path},TCGA-02-{p:05d},{slide},{'abcdefg'[p % 7]}")
    Path(folder, "manifest.csv").write_text("\n".join(lines))


def open_and_draw(rank, world, folder):
    """Seconds to open a cohort, the MiB it adds, and seconds for a batch of 50 patients."""
    kept = []
    opened = seconds_of(lambda: data.read_cohort(folder, val_fraction=0.01))
    added = added_memory(lambda: kept.append(data.read_cohort(folder, val_fraction=0.01)))
    batches = range(1, 51)
    drawn = [seconds_of(lambda n=n: data.hierarchical_batch(*kept, n, 0, 50)) for n in batches]
    return opened, added, sum(drawn) / 50


def cohort(patients=(100, 1000, 10000)):
    """Cohorts of 10^4 to 10^6 patches: opening, memory, one batch."""
    for number in patients:
        aims = ("4 s", "250 MiB", "5 ms") if number == 10000 else ("", "", "")
        with tempfile.TemporaryDirectory() as folder:
            write_cohort(folder, number)
            ((opened, added, drawn),) = on_processes(1, open_and_draw, folder)
        name = f"{100 * number:,} patches"
        yield row(f"{name}: open", opened, "s", aim=aims[0])
        yield row(f"{name}: memory", added, "MiB", aim=aims[1])
        yield row(f"{name}: a batch of 50 patients", 1e3 * drawn, "ms", aim=aims[2])


# ------------------------------------------------------------------------------------- the probes


def embeddings(labels, D):
    """z [n, D] like an encoder's: classes overlap, the mean is large, few directions vary much."""
    torch.manual_seed(0)
    z = torch.randn(len(labels), D)
    z += 0.1 * torch.randn(labels.max() + 1, D)[labels]
    z = z.mul_(torch.arange(1, D + 1) ** -0.5).add_(0.1)
    return z.div_(z.norm(dim=1, keepdim=True))


def knn_inputs(m, n, D):
    """The arguments of knn() for n queries and m training rows."""
    labels = torch.arange(m) % 7
    train_z = embeddings(labels, D)
    return train_z, labels, train_z[:n].clone(), 7


def seconds_of_knn(rank, world, *sizes):
    """How long this process takes for its share of a kNN, once all processes are ready."""
    inputs = knn_inputs(*sizes)
    evaluate.add_up(torch.zeros(1))
    return seconds_of(lambda: evaluate.knn(*inputs))


def whole_probe(device, m, n, D, aim=""):
    """The probes of evaluate.py on z [m + n, D], one after another, and their intervals."""
    with tempfile.TemporaryDirectory() as folder:
        write_cohort(folder, 300, -(-(m + n) // 300))
        cohort = data.read_cohort(folder)
    z = embeddings(torch.from_numpy(cohort.label).long(), D)
    splits = [(np.arange(m), np.arange(m, m + n))]
    of_knn = f"kNN of {n:,} among {m:,}", list(evaluate.NEIGHBOURS), z
    linear = f"linear probe, {m:,} x {D:,} by 7", ["linear"], z
    attributes = f"attribute probe, {m:,} x 384 by 7", ["attributes"], z[:, :384]
    found, total = {}, 0
    for what, kinds, features in (of_knn, linear, attributes):
        start = time.perf_counter()
        found |= evaluate.predict(kinds, features, cohort, splits, device)
        total += (seconds := time.perf_counter() - start)
        yield row(what, seconds, "s")
    seconds = seconds_of(lambda: evaluate.assess(found, cohort, splits))
    yield row("intervals of all four, 1,000 resamples", seconds, "s")
    yield row("the whole probe", total + seconds, "s", aim=aim)


def write_run(folder, tiles, D):
    """Writes a cohort of small tiles of 300 patients, and a run with a small tower and large z."""
    write_cohort(folder, 300, tiles // 300)
    cohort = data.read_cohort(folder)
    rng = np.random.default_rng(0)
    for i in range(len(cohort)):
        os.makedirs(os.path.dirname(cohort.path(i)), exist_ok=True)
        pixels = rng.integers(20 * cohort.label[i], 200, (16, 16, 3), np.uint8)
        Image.fromarray(pixels).save(cohort.path(i))
    bank = {level: F.normalize(torch.randn(128, D), dim=1) for level in LEVELS}
    checkpoint = {
        "model": HLSS(ModifiedResNet((1, 1, 1, 1), 8, D, 32), bank).state_dict(),
        "config": asdict(train.Config(data=folder, clip="demo")),
        "attributes": {level: [f"{level} {k}" for k in range(128)] for level in LEVELS},
        "cohort": runs.cohort_hashes(cohort),
    }
    checkpoint |= {"step": 1, "clip": {}, "classes": cohort.classes}
    checkpoint |= {"image_size": 32, "read_size": 16, "short_side": 16}
    os.makedirs(os.path.join(folder, "run"))
    runs.save_checkpoint(os.path.join(folder, "run"), checkpoint)


def memory_of(rank, world, what, folder):
    """The MiB that embed() or the whole of evaluate.py adds on this process."""
    run = os.path.join(folder, "run")
    if what == "embed":
        model, _ = load_run(run)
        cohort = data.read_cohort(folder)
        return added_memory(lambda: evaluate.embed(model, cohort, 16, 32))
    sys.argv = [what, run]
    evaluate.processes = lambda timeout: nullcontext((rank, world, train.CPU))
    with redirect_stdout(io.StringIO()):
        return added_memory(evaluate.main)


def probe(m=185_000, n=512, D=1024, rounds=10, rows=20_000, tiles=20_000):
    """kNN beside its bare product, and over processes; all probes; the memory of evaluate.py."""
    train_z, labels, z, _ = knn_inputs(m, n, D)

    def bare():
        for part in z.split(256):
            part @ train_z.T

    seconds = take_turns(rounds, ours=lambda: evaluate.knn(train_z, labels, z, 7), bare=bare)
    what = f"kNN of {n:,} among {m:,}, k = 200 and 20"
    yield row(what, seconds["ours"], "s", seconds["bare"], "one bare product", "1.1")
    turns = []
    for _ in range(min(3, rounds)):
        turns.append([max(on_processes(world, seconds_of_knn, m, 5 * n, D)) for world in (2, 1)])
    two, one = np.median(turns, axis=0).tolist()
    yield row(f"kNN of {5 * n:,} by two processes", two, "s", one, "one process", "0.6")
    yield from whole_probe("cpu", rows, rows // 4, D)
    with tempfile.TemporaryDirectory() as folder:
        write_run(folder, tiles, D)
        for what, world in product(("embed", "evaluate.py"), (1, 2)):
            most = max(on_processes(world, memory_of, what, folder))
            name = f"{what}, {tiles:,} tiles, processes: {world}"
            yield row(name, most, "MiB", tiles * D / 2**18, "z", "3")


def cuda(towers=GPU_TOWERS, sizes=(256, 1024, 4096), probe=(185_000, 50_000, 1024), device="cuda"):
    """The performance of one GPU at the paper's size, in bf16."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench.py cuda: there is no CUDA device here")
    eaten = yield from step(towers)
    yield from losses(sizes, device=device)
    yield from gpu_input(eaten, device)
    yield from whole_probe(device, *probe, aim="60 s")


def gpu_input(eaten, device):
    """Views and decoded patches per second, beside the images per second that a step consumes."""
    patches = 512 if device == "cuda" else 64  # few for the test
    images = torch.randint(0, 2**16, (patches, 2, 300, 300)).to(torch.uint16)
    than = "what the step eats"
    speed = 2 * patches / take_turns(3, ours=lambda: srh_views(images, device=device))["ours"]
    yield row("strong views of SRH", speed, "views/s", eaten, than, "over 1")
    parts = np.arange(patches).reshape(-1, 64)
    with tempfile.TemporaryDirectory() as folder:
        files = SimpleNamespace(path=write_srh(folder, patches).__getitem__)
        for threads in [n for n in (1, 2, 4, 8, 16, 32) if n <= os.cpu_count()]:
            loader = data.load_batches(files, parts, 291, threads)
            speed = patches / seconds_of(lambda loader=loader: list(loader))
            yield row(f"decoded, {threads} threads", speed, "patches/s", eaten / 2, than, "over 1")


def processes(numbers=(1, 2, 4), length=60):
    """Images per second of the demo on several processes, one thread each."""
    one = None
    for number in numbers:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc_per_node={number}", "train.py", "--out", folder]
            command += ["--steps", str(length), "--probe-every", "0"]
            threads = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run(command, cwd=ROOT, env=threads, check=True, capture_output=True)
            lines = map(json.loads, open(os.path.join(folder, "log.jsonl")))
            speed = [line["images_per_s"] for line in lines if "images_per_s" in line][-1]
        one = one or speed
        yield row(f"processes: {number}", speed, "images/s", one, "one process")


SECTIONS = {f.__name__: f for f in (losses, step, views, cohort, probe, processes, cuda)}


def line_of(found):
    """A row of the table as text."""
    beside = "" if found["beside"] is None else f"{found['beside']:10.3g}"
    ratio = "" if found["ratio"] is None else f"{found['ratio']:8.3f}"
    start = f"{found['what']:46}{found['ours']:10.3g} {found['unit']:9}{beside:>10}{ratio:>9}"
    return f"{start}  {found['than']:24}{found['aim']}".rstrip()


def main():
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style)
    help = f"some of {', '.join(SECTIONS)}; default: all but cuda"
    parser.add_argument("sections", nargs="*", help=help)
    parser.add_argument("--rows", type=int, default=20_000, help="probe: of the linear probe")
    parser.add_argument("--tiles", type=int, default=20_000, help="probe: for evaluate.py's memory")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench.json"), help="JSON of all rows"
    )
    args = parser.parse_args()
    unknown = set(args.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"no section {', '.join(unknown)}: choose from {', '.join(SECTIONS)}")
    torch.set_num_threads(1)
    found = []
    bar = tqdm(args.sections or [name for name in SECTIONS if name != "cuda"], disable=None)
    try:
        for name in bar:
            sizes = {"rows": args.rows, "tiles": args.tiles} if name == "probe" else {}
            for one in SECTIONS[name](**sizes):
                found.append({"section": name} | one)
                bar.set_postfix_str(one["what"])
    finally:  # keeps what was measured before an error
        bar.close()
        if found:
            gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
            print(f"torch {torch.__version__}, {os.cpu_count()} cores, {gpu}")
            head = (
                f"{'':46}{'ours':>10} {'':9}{'baseline':>10}{'ratio':>9}  {'which baseline':24}aim"
            )
            print(head, *map(line_of, found), sep="\n")
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
