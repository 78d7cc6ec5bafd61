"""Pretrain an image encoder with HLSS, HiDisc or SimCLR.

    python train.py                                          the demo: from nothing to a kNN table
    torchrun --nproc_per_node=4 train.py                     the same on four processes
    python train.py --data FOLDER --out runs/mine            your own cohort (a folder with manifest.csv)

A run that was stopped, by whatever, goes on from its newest checkpoint when it is started again with the same flags.
"""

import argparse
import dataclasses
import json
import math
import os
import resource
import shlex
import signal
import subprocess
import sys
import threading
import time
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from importlib.metadata import version

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from demo.clip import train_demo_clip
from demo.tissue import write_demo
from describe import open_bank
from evaluate import embed, probe, table
from losses import attributes_used, gather, ha, hvc
from model import (
    ACTIVATIONS,
    CLIP_MEAN,
    CLIP_STD,
    HLSS,
    OBJECTIVES,
    backbone_tower,
    image_tower,
    newest_checkpoint,
    save_checkpoint,
    write_whole,
)
from tools.weights import CLIPS, find_clip, load_clip

STOPPED = 75  # exit code after SIGTERM or SIGINT: saved, start again to go on


def flag(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Everything that a run depends on. Each field is a flag, and the checkpoint carries them all."""

    data: str = flag("", "folder with manifest.csv; empty: demo tissue, written on first use")
    out: str = flag("runs/demo", "folder of the run: checkpoints, log.jsonl, config.json")
    cache: str = flag("runs/cache", "where the demo's tissue and CLIP are kept")
    clip: str = flag(
        "",
        f"CLIP to start from, a file or one of {', '.join(CLIPS)}; empty: the demo's small CLIP, "
        "trained on first use",
    )
    activation: str = flag("", "of the CLIP's transformers, where its file does not say it")
    vocab: str = flag(
        "",
        "CLIP's bpe_simple_vocab_16e6.txt.gz; empty: an installed open_clip's copy, or a download",
    )
    bank: str = flag(
        "demo/attributes.json",
        "the attribute-text bank: a bank file, or the bank.pt that describe.py "
        "encode made of it. The default is about demo tissue",
    )
    backbone: str = flag(
        "",
        "a torchvision classifier (resnet18) with new weights in place of the CLIP's image tower",
    )
    objective: str = flag(
        "hlss",
        "hlss: three text-tied projections and alignment; hidisc: one projection, three "
        "levels; simclr: one projection, patch level only",
    )
    init: str = flag(
        "text",
        "how the projections of --objective hlss start. text: as the bank, the paper's; random: "
        "an ablation",
    )
    steps: int = flag(800, "optimizer steps in all")
    seed: int = flag(0, "of batches, views and new weights")
    patients: int = flag(
        8,
        "patients in a global batch, each with slides x patches x views images. The loss "
        "falls but the probe stays: more, for harder negatives",
    )
    slides: int = flag(2, "slides a patient")
    patches: int = flag(2, "patches a slide")
    views: int = flag(2, "views a patch, at least 2")
    balance_classes: bool = flag(
        False, "draw patients evenly by class, as the paper's code does. It uses labels"
    )
    augmentation: str = flag(
        "demo",
        "of the views. demo: geometry, light and stain, mostly mild; strong: the paper's "
        "list, for H&E; strong-srh: for stimulated Raman; weak: flips alone. python data.py show "
        "FOLDER draws them",
    )
    augmentation_probability: float = flag(
        0.0, "of every transform, in place of its own; 0: its own"
    )
    normalise: str = flag(
        "",
        "mean and standard deviation of the channels. clip: CLIP's; data: estimated from "
        "training patches; or six numbers in [0, 1], as 0.7,0.5,0.7,0.2,0.2,0.2; empty: clip with "
        "a CLIP's tower, data with --backbone",
    )
    image_size: int = flag(0, "pixels of a view; 0: what the tower was made for")
    read_size: int = flag(
        0, "pixels that a patch is read at, before the views; 0: its own, at most twice a view"
    )
    val_fraction: float = flag(
        0.2, "share of the patients held out where the manifest has no split column"
    )
    lr: float = flag(1e-3, "peak learning rate. The loss jumps or is not finite: divide it by 3")
    warmup: float = flag(
        0.1, "share of the steps that the learning rate climbs. The first steps are unstable: more"
    )
    weight_decay: float = flag(0.01, "AdamW's")
    temperature: float = flag(0.07, "of the contrast. The loss stays at chance: try 0.2")
    patch_weight: float = flag(1.0, "lambda of the contrast at patch level")
    slide_weight: float = flag(1.0, "lambda of the contrast at slide level")
    patient_weight: float = flag(
        1.0, "lambda of the contrast at patient level. z tells patients by their stain: less"
    )
    ha_weight: float = flag(1.0, "lambda of the alignment with text (hlss only)")
    ha_temperature: float = flag(
        1.0,
        "softmax temperature of the alignment. At the paper's 1 it is hardly felt: 0.1; "
        "attributes_used falls to 1: back up",
    )
    amp: bool = flag(
        torch.cuda.is_available(), "bf16 autocast of the encoder; the losses stay in float32"
    )
    compile: bool = flag(
        torch.cuda.is_available(), "torch.compile the encoder: a slow first step, then faster ones"
    )
    sync_bn: bool = flag(
        False, "batch norm over all processes (CUDA only): the statistics of one big batch"
    )
    skip_unreadable: bool = flag(
        False,
        "show another patch of the same slide or patient in place of one that cannot "
        "be read, and stop only when more than one in a hundred is bad",
    )
    workers: int = flag(2, "decoding threads a process. The device waits for data: more")
    log_every: int = flag(10, "steps between the lines of log.jsonl")
    probe_every: int = flag(
        200, "steps between kNN probes on the held-out patients; 0: at the start and the end"
    )
    save_every: int = flag(100, "steps between checkpoints; the newest two are kept")
    timeout: int = flag(
        600,
        "seconds without progress after which a job of several processes ends and says which "
        "rank is missing. A probe of a large cohort takes longer: more",
    )


_LONG = dict(
    image_size=224,
    patients=64,
    steps=60000,
    workers=8,
    log_every=50,
    probe_every=5000,
    save_every=1000,
)
PRESETS = {  # over the defaults above, which are the demo's
    "demo": {},
    "opensrh": dict(
        bank="attributes/opensrh.json", out="runs/opensrh", augmentation="strong-srh", **_LONG
    ),
    "tcga": dict(bank="attributes/tcga.json", out="runs/tcga", augmentation="strong", **_LONG),
}
CHOICES = {
    "objective": list(OBJECTIVES),
    "init": ["text", "random"],
    "activation": list(ACTIVATIONS),
    "augmentation": list(data.AUGMENTATIONS),
}
MAY_CHANGE = {
    "data",
    "out",
    "cache",
    "clip",
    "vocab",
    "bank",
    "workers",
    "log_every",
    "probe_every",
    "save_every",
    "compile",
    "timeout",
    "skip_unreadable",
}


def parse_config(argv=None):
    """Flags -> Config: the defaults, over them the preset, over it what was typed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--preset", choices=PRESETS, default="demo", help="a set of defaults, which flags override"
    )
    for f in dataclasses.fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        if f.name in CHOICES:
            kind["choices"] = CHOICES[f.name]
        parser.add_argument(
            "--" + f.name.replace("_", "-"),
            default=argparse.SUPPRESS,
            **kind,
            help=f"{f.metadata['help']} (default: {f.default!r})",
        )
    typed = vars(parser.parse_args(argv))
    config = Config(**PRESETS[typed.pop("preset")] | typed)
    for name, low, high in (
        ("augmentation_probability", 0, 1),
        ("val_fraction", 0, 1),
        ("warmup", 0, 1),
        ("steps", 1, math.inf),
        ("workers", 1, math.inf),
        ("patients", 1, math.inf),
    ):
        if not low <= getattr(config, name) <= high:
            parser.error(
                f"--{name.replace('_', '-')} {getattr(config, name)} is not between {low} and {high}"
            )
    if config.views < 2:
        parser.error(
            f"--views {config.views}: a patch needs at least 2 views, or nothing attracts at patch level"
        )
    return config


def learning_rate(step, config):
    """Linear warm-up, then a cosine to zero: a pure function of the step."""
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    return (
        config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, config.steps - warmup)))
    )


# ------------------------------------------------------------------------------------------------------- the processes


def start_processes(timeout):
    """Join the processes of torchrun, if there are any. Returns (rank, world size, device, watchdog)."""
    rank, world, local = (
        int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    )
    device = torch.device(f"cuda:{local}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if rank > 0:
        warnings.simplefilter("ignore")  # rank 0 says it for all
    if world <= 1:
        return 0, 1, device, Watchdog(dist.HashStore(), 0, 1, timeout)
    store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(seconds=timeout)))
    watchdog = Watchdog(store, rank, world, timeout)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout + 60),
    )  # later than the watchdog, which says more
    return rank, world, device, watchdog


class Watchdog:
    """Ends a job of several processes that makes no progress for `timeout` seconds, and says which rank is missing.

    A process that waits for another cannot tell for whom. So each notes where it is in the store that all share, and
    that it gives up when it does. Who has not given up 5 seconds later is dead, stopped or far behind. If all have,
    whoever got least far is holding up the others.
    """

    def __init__(self, store, rank, world, timeout):
        self.store, self.rank, self.world, self.timeout, self.grace = (
            store,
            rank,
            world,
            timeout,
            min(5, timeout),
        )
        self.moves = 0
        self.at(0, "starting")

    def __enter__(self):
        if self.world > 1:
            threading.Thread(target=self.watch, daemon=True).start()

    def __exit__(self, kind, error, trace):
        self.timeout = math.inf
        if error and ("gloo" in str(error) or isinstance(error, dist.DistError)):  # a peer is gone
            raise RuntimeError(self.missing()) from error

    def at(self, step, doing):
        """Every rank alike calls this when `step` was its last and it begins to do something else."""
        self.moves += 1
        self.store.set(f"rank {self.rank} is at", json.dumps([self.moves, step, doing]))

    def watch(self):
        waited = moves = 0
        while (
            waited < self.timeout
        ):  # counts seconds awake: a job that was suspended as a whole is not late
            time.sleep(1)
            waited, moves = waited + 1 if moves == self.moves else 0, self.moves
        print(
            f"rank {self.rank}: no progress in {self.timeout} s. {self.missing()}",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def missing(self):
        self.store.set(f"rank {self.rank} gave up", "")
        time.sleep(self.grace)
        places = [json.loads(self.store.get(f"rank {rank} is at")) for rank in range(self.world)]
        gone = [
            rank for rank in range(self.world) if not self.store.check([f"rank {rank} gave up"])
        ]
        least = [rank for rank in range(self.world) if places[rank][0] == min(places)[0]]
        return "; ".join(
            f"rank {rank} is missing: step {places[rank][1]} was its last, then {places[rank][2]}"
            for rank in gone or least
        )


def memory(device):
    """The most that this process has held so far, in MiB: on the GPU, or in all when it trains on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )


def average(*values, device="cpu"):
    """The mean of each number over the processes."""
    values = torch.tensor(
        [float(torch.as_tensor(v).detach()) for v in values], dtype=torch.float64, device=device
    )
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values.tolist()


def prepare_demo(config, rank):
    """Write what the demo needs and is not there yet: rank 0 does, the others wait. Fills in config.data and .clip."""
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), config.bank)
    config.bank = (
        config.bank if os.path.exists(config.bank) else beside
    )  # from wherever this is run
    if not os.path.exists(config.bank):
        raise FileNotFoundError(
            f"--bank {config.bank} does not exist: name a bank file or a bank.pt"
        )
    if rank == 0 and not (config.data and config.clip):
        os.makedirs(config.cache, exist_ok=True)
        threads = torch.get_num_threads()
        torch.set_num_threads(os.cpu_count())  # the other processes only wait
        tissue, clip = (
            os.path.join(config.cache, "demo-tissue"),
            os.path.join(config.cache, "demo-clip.pt"),
        )
        if not config.data and not os.path.exists(os.path.join(tissue, "manifest.csv")):
            write_demo(tissue)
        if not config.clip and not os.path.exists(clip):
            train_demo_clip(clip)
        torch.set_num_threads(threads)
    config.data = config.data or os.path.join(config.cache, "demo-tissue")
    config.clip = config.clip or os.path.join(config.cache, "demo-clip.pt")
    if rank == 0:
        find_clip(config.clip)  # a download, once
    if dist.is_initialized():
        dist.barrier()


# ---------------------------------------------------------------------------------------------- one step's ingredients


def load_views(cohort, config, first, read_size, image_size, device, rank, world):
    """This rank's share of every global batch from step `first` on: yields (images [n, 3, S, S], ids [n, 3]).

    Rows stand in the order of patient, slide, patch, view. All randomness is a function of (seed, step).
    """
    mine = slice(rank * config.patients // world, (rank + 1) * config.patients // world)
    groups = data.class_patients(cohort) if config.balance_classes else None
    sizes = config.patients, config.slides, config.patches
    batches = (
        data.hierarchical_batch(cohort, step, config.seed, *sizes, groups)[mine].reshape(-1)
        for step in range(first, config.steps)
    )
    augmentation = data.AUGMENTATIONS[config.augmentation]
    if config.augmentation_probability:
        augmentation = data.with_probability(augmentation, config.augmentation_probability)
    loaded = data.load_batches(
        cohort, batches, read_size, config.workers, skip=config.skip_unreadable
    )
    for step, (rows, patches) in enumerate(loaded, first):
        parameters = data.view_parameters(
            len(rows) * world * config.views, config.seed, step, augmentation
        )
        parameters = {name: value.chunk(world)[rank] for name, value in parameters.items()}
        images = data.make_views(patches.to(device, non_blocking=True), parameters, image_size)
        ids = torch.from_numpy(cohort.ids(rows)).to(device).repeat_interleave(config.views, dim=0)
        yield images.contiguous(memory_format=torch.channels_last), ids


def losses_of(model, images, ids, bank, config):
    """L = sum_l lambda_l SupCon(p_l) + lambda_HA sum_l HA_l. Returns (L, {term: scalar before weighting}, z)."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=config.amp):
        z, projections = model(images)
    contrast = hvc(projections, ids, config.temperature)
    terms = {f"hvc_{level}": value for level, value in contrast.items()}
    loss = sum(getattr(config, f"{level}_weight") * value for level, value in contrast.items())
    if config.objective == "hlss":
        alignment = ha(z, bank, config.ha_temperature)
        terms |= {f"ha_{level}": value for level, value in alignment.items()}
        loss = loss + config.ha_weight * sum(alignment.values())
    return loss, terms, z


# --------------------------------------------------------------------------------------------- checkpoints and the log


def resume(config, model, optimizer, attributes):
    """Load the run's newest checkpoint, if it has one, into model and optimizer. Returns the step to go on from.

    Raises ValueError when a flag contradicts the checkpoint's: that would be neither the old run nor a new one.
    """
    checkpoint = newest_checkpoint(config.out)
    step = checkpoint["step"]
    if average(step, device=next(model.parameters()).device)[0] != step:
        raise ValueError(
            f"{config.out} ends at step {step} here, but not for other ranks: put it on a shared disk"
        )
    if step == 0:
        return 0
    then = checkpoint["config"]
    changed = [
        f"--{name.replace('_', '-')} {value} (there: {then[name]})"
        for name, value in vars(config).items()
        if name not in MAY_CHANGE and then[name] != value
    ]
    if changed:
        raise ValueError(
            f"{config.out} holds a run with other settings: {', '.join(changed)}. Give the same flags to "
            "go on with it, or another --out to start anew"
        )
    was = checkpoint["model"]
    if attributes != checkpoint["attributes"] or not all(
        torch.allclose(t.cpu(), was[f"bank_{level}"], atol=0.01) for level, t in model.bank.items()
    ):
        raise ValueError(
            f"{config.bank} is not the bank that {config.out} was trained with: restore it, or give "
            "another --out to start anew"
        )
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return step


def describe_run(typed, config, world, device):
    """Write config.json: the settings, and what else it takes to repeat the run.

    The command means the same on any machine, since it spells out the defaults that depend on the machine.
    """
    command = (
        ["torchrun", f"--nproc_per_node={world}", "train.py"]
        if world > 1
        else ["python", "train.py"]
    )
    for f in dataclasses.fields(typed):
        value, name = getattr(typed, f.name), f.name.replace("_", "-")
        if value != f.default or f.name in ("amp", "compile"):
            command += (
                [f"--{name}" if value else f"--no-{name}"]
                if f.type is bool
                else [f"--{name}", str(value)]
            )
    git = "git describe --always --dirty --abbrev=40 --exclude=*"
    here = os.path.dirname(os.path.abspath(__file__))
    commit = subprocess.run(
        git, shell=True, cwd=here, capture_output=True, text=True
    ).stdout.strip()
    about = {
        "command": shlex.join(command),
        "commit": commit,
        "processes": world,
        "device": device.type,
        "python": sys.version.split()[0],
        **{name: version(name) for name in ("torch", "numpy", "pillow")},
    }
    write_whole(
        os.path.join(config.out, "config.json"),
        lambda file: file.write(json.dumps(vars(config) | about, indent=1).encode()),
    )


class Log:
    """log.jsonl, a JSON line at a time. What a killed run wrote after its last checkpoint is dropped on opening."""

    def __init__(self, folder, until):
        self.path = os.path.join(folder, "log.jsonl")
        self.lines = []
        if until and os.path.exists(self.path):
            with open(self.path) as file:
                self.lines = [
                    line
                    for line in map(json.loads, filter(lambda s: s.endswith("\n"), file))
                    if line["step"] <= until
                ]
        write_whole(
            self.path,
            lambda file: file.writelines(json.dumps(line).encode() + b"\n" for line in self.lines),
        )

    def write(self, **line):
        self.lines.append(line)
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")

    def probes(self):
        """{"step N": result} of the first and the last kNN probe."""
        probes = [line for line in self.lines if line.get("probe")]
        return {f"step {line['step']}": line["probe"] for line in (probes[:1] + probes[-1:])}


# --------------------------------------------------------------------------------------------------------------- train


def share_patients(config, cohort, world):
    """Lowers --patients to what there are. Raises ValueError unless the processes can share them evenly."""
    if config.patients > len(cohort.present):
        config.patients = len(cohort.present)
        print(f"all {config.patients} training patients are in every batch: there are no more")
    n = len(cohort.present)
    if config.balance_classes:
        data.class_patients(cohort)  # what it refuses is better refused now
    elif (n + 1) // 2 < config.patients < n:
        print(
            f"batches of {(n + 1) // 2} of the {n} training patients: larger ones cannot show each once an epoch"
        )
        config.patients = (n + 1) // 2
    if config.patients % world:
        sizes = [str(size) for size in range(1, config.patients + 1) if config.patients % size == 0]
        below = sum(int(size) < world for size in sizes)
        raise ValueError(
            f"--patients {config.patients} cannot be shared by {world} processes: use "
            f"{' or '.join(sizes[below - 1 : below + 1])}, or a multiple of {world} patients"
        )


def normalisation(config, cohort, read_size):
    """What --normalise says -> (mean, standard deviation), three numbers each. ValueError for something else."""
    kind = config.normalise or ("data" if config.backbone else "clip")
    if kind == "data":
        return data.channel_statistics(
            cohort, read_size, workers=config.workers, skip=config.skip_unreadable
        )
    if kind == "clip":
        return CLIP_MEAN, CLIP_STD
    try:
        *mean, r, g, b = map(float, kind.split(","))
        if (
            len(mean) == 3
            and 0 <= min(mean) <= max(mean) <= 1
            and 0 < min(r, g, b) <= max(r, g, b) <= 1
        ):
            return mean, (r, g, b)
    except ValueError:
        pass
    raise ValueError(
        f"--normalise {kind}: 'clip', 'data', or three means and three standard deviations in "
        "[0, 1]"
    )


def build_model(config, device):
    """The model, and the names of its attributes at each level. Fills in config.activation."""
    state = load_clip(config.clip, config.activation)
    config.activation = state["activation"]
    first = not dist.is_initialized() or dist.get_rank() == 0  # the text is encoded once, for all
    bank = [open_bank(config.bank, state, config.vocab) if first else None]
    if dist.is_initialized():
        dist.broadcast_object_list(bank, device=device)
    ((attributes, vectors),) = bank  # all that is left of the language from here on
    torch.manual_seed(config.seed)  # of the projections and backbones that start at random
    dim = vectors["patch"].shape[1]
    tower = (
        backbone_tower(config.backbone, dim)
        if config.backbone
        else image_tower(state, config.image_size)
    )
    model = HLSS(tower, vectors, config.objective, config.init)
    return model.to(device, memory_format=torch.channels_last), attributes


def wrap(model, config, world, device):
    """Compile the tower and share the gradients, all in place: names in the checkpoint stay what they are."""
    if config.compile:
        model.tower.compile()
    if world == 1:
        return model
    if config.sync_bn and device.type == "cuda":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return torch.nn.parallel.DistributedDataParallel(model)


def check_finite(numbers, step, ids, cohort, config, rank):
    """Raises FloatingPointError, and lists the batch in a file, unless loss, terms and gradient norm are finite."""
    bad = [f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value)]
    if not bad:
        return
    path, rows = (
        os.path.join(config.out, f"fault-{step:07d}.json"),
        gather(ids[:: config.views, 0]).tolist(),
    )
    fault = {"step": step, "fault": bad, "rows": rows, "paths": [cohort.path(row) for row in rows]}
    if rank == 0:
        write_whole(path, lambda file: file.write(json.dumps(fault, indent=1).encode()))
    raise FloatingPointError(
        f"step {step}: {', '.join(bad)}. The step was not taken, the last checkpoint is kept and "
        f"{path} lists the batch. If its images are sound, start anew with a lower --lr"
    )


def backward(model, optimizer, images, ids, bank, config, signals):
    """The loss and its gradients. Returns ({"loss", every term, "gradient_norm"}, z [n, D], signals).

    Numbers are averaged over the ranks, so that all decide alike: whether to go on, and when to stop.
    """
    loss, terms, z = losses_of(model, images, ids, bank, config)
    optimizer.zero_grad()
    loss.backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
    names = ("loss", *terms, "gradient_norm")
    *means, signals = average(loss, *terms.values(), norm, signals, device=images.device)
    return dict(zip(names, means)), z.detach(), signals


def train(config):
    """Train to the end, or to a SIGTERM or SIGINT. Returns whether it reached the end."""
    typed = dataclasses.replace(config)  # before the paths of the demo are filled in
    rank, world, device, watchdog = start_processes(config.timeout)
    with watchdog:
        prepare_demo(config, rank)
        cohort = data.read_cohort(config.data, config.val_fraction)
        train_cohort = cohort.restrict("train")
        share_patients(config, train_cohort, world)
        model, attributes = build_model(config, device)
        image_size = config.image_size or model.tower.image_size
        read_size = config.read_size or min(data.patch_size(cohort), 2 * image_size)
        model.normalise(*normalisation(config, train_cohort, read_size))
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=config.lr, weight_decay=config.weight_decay
        )
        os.makedirs(config.out, exist_ok=True)
        first = resume(config, model, optimizer, attributes)
        wrapped = wrap(model, config, world, device)
        n = config.patients * config.slides * config.patches * config.views
        if rank == 0:
            log = Log(config.out, until=first)
            describe_run(typed, config, world, device)
            print(
                f"{config.objective} from step {first} on {world} x {device}: {train_cohort} to train on, of "
                f"{cohort}\nbatches of {n} images; a contrast that learns nothing stays at log({n} - 1) = "
                f"{math.log(n - 1):.2f}"
            )
            print(
                f"patches are read at {read_size} pixels and viewed at {image_size}; {config.clip}, {config.bank}"
            )
            if typed.data and (not typed.clip or typed.bank == Config.bank):
                print(
                    "note: the demo's CLIP and bank know nothing but demo tissue: --clip RN50 and --bank "
                    "attributes/tcga.json, or your own, are for real images"
                )

        def probe_now(step):
            watchdog.at(step, "probing")
            if (
                world > 1
            ):  # batch norm's averages differ from rank to rank, and the checkpoint holds those of rank 0
                for buffer in model.buffers():
                    dist.broadcast(buffer, 0)
            z = embed(
                model,
                cohort,
                read_size,
                image_size,
                workers=config.workers,
                skip=config.skip_unreadable,
            )
            if rank == 0:
                log.write(step=step, probe=probe(z, cohort))

        stop = []
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda signum, frame: stop.append(signum))
        if first == 0:
            probe_now(0)
        model.train()
        since, since_step = time.perf_counter(), first
        views = load_views(train_cohort, config, first, read_size, image_size, device, rank, world)
        bar = tqdm(
            views,
            initial=first,
            total=config.steps,
            desc=config.objective,
            unit="step",
            disable=rank > 0,
        )
        watchdog.at(first, "reading")
        for step, (images, ids) in enumerate(bar, first + 1):
            watchdog.at(step - 1, "computing")
            numbers, z, signals = backward(
                wrapped, optimizer, images, ids, model.bank, config, len(stop)
            )
            check_finite(numbers, step, ids, train_cohort, config, rank)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step - 1, config)
            optimizer.step()
            last = step == config.steps or signals > 0
            if step % config.log_every == 0 or last:
                pace = (time.perf_counter() - since) / (step - since_step)  # seconds a step
                used = {
                    f"attributes_used_{level}": attributes_used(gather(z), t)
                    for level, t in model.bank.items()
                }
                if rank == 0:
                    log.write(
                        step=step,
                        **numbers,
                        lr=learning_rate(step - 1, config),
                        **used,
                        images_per_s=round(n / pace, 1),
                        memory_mib=round(memory(device)),
                        seconds_left=round(pace * (config.steps - step)),
                    )
                    bar.set_postfix(loss=f"{numbers['loss']:.3f}")
                since, since_step = time.perf_counter(), step
            if step == config.steps or (config.probe_every and step % config.probe_every == 0):
                probe_now(step)
                since, since_step = time.perf_counter(), step
            if rank == 0 and (last or step % config.save_every == 0):
                save_checkpoint(
                    config.out,
                    {
                        "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(),
                        "step": step,
                        "config": vars(config),
                        "attributes": attributes,
                        "classes": cohort.classes,
                        "image_size": image_size,
                        "read_size": read_size,
                    },
                )
            watchdog.at(step, "reading")
            if signals and step < config.steps:
                bar.close()
                return False

        if rank == 0:
            print("\n".join(table(log.probes())))
            print(
                f"the run is in {config.out}; python evaluate.py {config.out} probes its newest checkpoint"
            )
        return True


def main():
    config = parse_config()
    try:
        finished = train(config)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    raise SystemExit(0 if finished else STOPPED)


if __name__ == "__main__":
    main()
