"""Pretrain an image encoder with HLSS, HiDisc or SimCLR.

    python train.py                                  the demo: from nothing to a kNN table
    torchrun --nproc_per_node=4 train.py             the same on four processes
    python train.py --data FOLDER --out runs/mine    your own cohort (a folder with manifest.csv)

A run that was stopped, by whatever, goes on from its newest checkpoint when it is started again
with the same flags.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
import warnings
from collections import deque
from dataclasses import dataclass, field
from importlib.metadata import version

import torch
import torch.distributed as dist
from tqdm import tqdm

import data
from demo.prepare import demo_clip, demo_tissue
from describe import open_bank
from evaluate import attribute_targets, cohort_notes, embed, probe, table
from losses import LEVELS, ar, attributes_used, gather, ha, hvc
from model import (
    ACTIVATIONS,
    HLSS,
    OBJECTIVES,
    Log,
    checkpoints,
    image_tower,
    lock_folder,
    make_tower,
    newest_checkpoint,
    read_whole,
    save_checkpoint,
    share_batch_norm,
    write_whole,
)
from tools.processes import processes, user_errors
from tools.weights import CLIPS, find_clip, load_clip

CPU = torch.device("cpu")
STOPPED = 75  # exit code after SIGTERM or SIGINT: saved, start again to go on


# ----------------------------------------------------------------------------------------- settings


def flag(default, text):
    """A field of Config that is also a flag, with its help."""
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Everything that a run depends on. Each field is a flag; the checkpoint carries them all."""

    data: str = flag("", "folder with manifest.csv; empty: demo tissue, written on first use")
    out: str = flag(
        "", "folder of the run, for checkpoints and log.jsonl; empty: runs/NAME, NAME as of --data"
    )
    cache: str = flag("runs/cache", "where the demo's tissue and CLIP are kept")
    clip: str = flag(
        "",
        f"CLIP to start from: a file, or one of {', '.join(CLIPS)}, or demo, which knows demo "
        "tissue alone and is trained on first use. Real images need one, or a --backbone",
    )
    activation: str = flag("", "of the CLIP's transformers, where its file does not say it")
    vocab: str = flag(
        "",
        "CLIP's vocabulary, bpe_simple_vocab_16e6.txt.gz; empty: that of an installed open_clip, "
        "or a download",
    )
    bank: str = flag(
        "demo/attributes.json",
        "the attribute-text bank: a bank file, or the bank.pt that describe.py encode made of it",
    )
    start: str = flag(
        "clip", "what the image tower starts from. clip: the CLIP's weights; random: random ones"
    )
    backbone: str = flag(
        "",
        "a network of torchvision, such as resnet18, in place of the CLIP's image tower; hidisc "
        "and simclr then need neither --clip nor --bank",
    )
    backbone_weights: str = flag(
        "", "of the backbone. DEFAULT: torchvision's; a file: its state dict; empty: random ones"
    )
    objective: str = flag(
        "hlss",
        "hlss: three text-tied projections; hidisc: one projection, three levels; simclr: one "
        "projection, patch level only",
    )
    align: str = flag(
        "",
        "what ties z to the words. paper: it is drawn to its nearest attributes, the paper's "
        "method; regression (ours): it keeps the attribute scores that the CLIP gave at the "
        "start, so that attributes and zero-shot can be used afterwards; off: nothing. Empty: "
        "paper for hlss, off for the others",
    )
    steps: int = flag(400, "optimizer steps in all; a run may be resumed with more of them")
    seed: int = flag(0, "of batches, views and new weights")
    patients: int = flag(
        8, "patients in a batch of all processes. If the loss falls and the probe stays: more"
    )
    levels: str = flag(
        ",".join(LEVELS),
        "the hierarchy, fine to coarse. The first is the image, each other a column of the "
        "manifest, and each a level of the bank. What is said of patients here holds for the last",
    )
    draw: str = flag(
        "",
        "how many are drawn: slides of a patient, patches of a slide, views of a patch (at least "
        "2), as 2,2,2; with other levels one number for each, from coarse to fine. Empty: 2 each",
    )
    balance_classes: bool = flag(False, "draw patients evenly by class; this uses labels")
    augmentation: str = flag(
        "demo",
        "of the views. demo: geometry, light and stain, mostly mild; strong: the paper's list, for "
        "H&E; strong-srh: for stimulated Raman; weak: flips alone. python -m tools.cohort show "
        "FOLDER draws them",
    )
    normalise: str = flag(
        "",
        "mean and standard deviation of the channels. clip: CLIP's; data: estimated from training "
        "patches; empty: those of the tower's weights where they are known, or else data",
    )
    image_size: int = flag(0, "pixels of a view; 0: what the tower was made for")
    read_size: int = flag(0, "pixels a patch is read at; 0: its own, at most twice a view")
    val_fraction: float = flag(0.2, "share of the patients held out without a split column")
    lr: float = flag(1e-3, "peak learning rate. If the loss jumps or is not finite: divide by 3")
    warmup: float = flag(0.1, "share of the steps in which lr climbs. If unstable at first: more")
    weight_decay: float = flag(0.01, "of AdamW, on all weights")
    temperature: float = flag(0.07, "of the contrast. If every hvc_* stays at chance: try 0.2")
    level_weights: str = flag(
        "",
        "lambda of the contrast at each level, fine to coarse; empty: 1 each. If z tells patients "
        "by their stain: less at patient level, as 1,1,0.3",
    )
    ha_weight: float = flag(1.0, "lambda of --align paper")
    ha_temperature: float = flag(
        1.0,
        "softmax temperature of --align paper. At the paper's 1 the loss is almost 0: try 0.1; if "
        "attributes_used falls to 1, all images take one attribute: higher again",
    )
    ar_weight: float = flag(
        1.0,
        "lambda of --align regression. If ar_* rises: more; if hvc_* stays at chance: less",
    )
    amp: bool = flag(torch.cuda.is_available(), "tower and projections in bf16; on with CUDA")
    compile: bool = flag(False, "torch.compile the tower, for CUDA: a slow first step, then faster")
    sync_bn: bool = flag(True, "batch norm over all processes, as if they were one")
    workers: int = flag(2, "decoding threads of a process. If the device waits for data: more")
    log_every: int = flag(10, "steps between the lines of log.jsonl")
    probe_every: int = flag(200, "steps between kNN probes; 0: at the start and at the end alone")
    save_every: int = flag(100, "steps between checkpoints; the newest two are kept")
    timeout: int = flag(600, "seconds to wait for other processes. If a probe takes longer: more")

    def __post_init__(self):
        name = os.path.basename(os.path.abspath(self.data or "demo")).removesuffix(".csv")
        self.out = self.out or os.path.join("runs", name)
        self.align = self.align or ("paper" if self.objective == "hlss" else "off")

    @property
    def level_names(self):
        """("patch", "slide", "patient"), as in --levels."""
        return tuple(self.levels.split(","))

    @property
    def counts(self):
        """[slides a patient, patches a slide, views a patch], as in --draw."""
        return [int(n) for n in self.draw.split(",")] if self.draw else [2] * len(self.level_names)

    @property
    def lambdas(self):
        """{term: weight} of the loss: L = sum_l lambda_l SupCon_l + lambda_HA sum_l HA_l."""
        levels = self.level_names
        weights = self.level_weights.split(",") if self.level_weights else [1] * len(levels)
        lambdas = {f"hvc_{level}": float(x) for level, x in zip(levels, weights, strict=True)}
        lambdas |= {f"ha_{level}": self.ha_weight for level in levels}
        return lambdas | {f"ar_{level}": self.ar_weight for level in levels}


LONG = dict(image_size=224, patients=64, steps=60000, workers=8)
LONG |= dict(log_every=50, probe_every=5000, save_every=1000)
PRESETS = {  # over the defaults above, which are the demo's
    "demo": {},
    "opensrh": LONG | dict(bank="attributes/opensrh.json", augmentation="strong-srh"),
    "tcga": LONG | dict(bank="attributes/tcga.json", augmentation="strong"),
}
CHOICES = {
    "objective": OBJECTIVES,
    "start": ["clip", "random"],
    "align": ["paper", "regression", "off"],
    "activation": list(ACTIVATIONS),
    "augmentation": list(data.AUGMENTATIONS),
    "normalise": ["clip", "data"],
}
LOWEST = {
    "steps patients workers log_every save_every timeout": 1,
    "seed image_size read_size probe_every lr weight_decay val_fraction warmup": 0,
    "ha_weight ar_weight": 0,
    "temperature ha_temperature": 1e-3,
}
MAY_CHANGE = (  # on resuming: it makes no other run
    "data out cache clip vocab bank workers log_every probe_every save_every compile timeout"
).split()


def parse_config(argv=None):
    """Flags -> Config: the defaults, over them the preset, over it what was typed."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=style, allow_abbrev=False)
    preset_help = "defaults, which flags override; tcga and opensrh are for 60,000 steps on GPUs"
    parser.add_argument("--preset", choices=PRESETS, default="demo", help=preset_help)
    for f in dataclasses.fields(Config):
        options = {"type": f.type}
        if f.type is bool:
            options = {"action": argparse.BooleanOptionalAction}
        if f.name in CHOICES:
            options["choices"] = CHOICES[f.name]
        parser.add_argument(
            "--" + f.name.replace("_", "-"),
            default=argparse.SUPPRESS,
            help=f"{f.metadata['help']} (default: {f.default!r})",
            **options,
        )
    typed = vars(parser.parse_args(argv))
    preset = PRESETS[typed.pop("preset")]
    config = Config(**preset | typed)
    for names, low in LOWEST.items():
        for name in names.split():
            value = getattr(config, name)
            high = 1 if name in ("val_fraction", "warmup") else math.inf
            if not low <= value <= high:
                parser.error(f"--{name.replace('_', '-')} {value} is not between {low} and {high}")
    try:
        check_flags(config)
    except ValueError as error:
        parser.error(error)
    return config


def check_flags(config):
    """Raises ValueError unless --levels, --draw and --level-weights fit each other, and where words
    are needed and no CLIP gives them."""
    levels = config.level_names
    if len(set(levels)) < 2 or not all(level.isidentifier() for level in levels):
        remedy = "name at least two; with one, nothing would tell patients apart"
        raise ValueError(f"--levels {config.levels}: {remedy}")
    if len(config.counts) != len(levels) or min(config.counts) < 1 or config.counts[-1] < 2:
        names = ", ".join([*map(data.plural, levels[-2::-1]), "views"])
        remedy = f"give {len(levels)} numbers of at least 1: {names} (at least 2, to attract)"
        raise ValueError(f"--draw {config.draw}: {remedy}")
    if min(config.lambdas.values()) < 0:
        raise ValueError(f"--level-weights {config.level_weights}: none may be below 0")
    wordless = config.backbone and config.objective != "hlss" and config.align == "off"
    if (config.data or config.backbone) and not config.clip and not wordless:
        clips = f"a file, {', '.join(CLIPS)}, or demo, which knows demo tissue alone"
        raise ValueError(
            f"name a CLIP with --clip ({clips}), or train without words: --objective hidisc "
            "--backbone resnet18"
        )


def learning_rate(step, config):
    """The rate of a step (0 is the first): linear warm-up, then a cosine to zero."""
    warmup = max(1, round(config.warmup * config.steps))
    if step < warmup:
        return config.lr * (step + 1) / warmup
    falling = max(1, config.steps - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / falling))


# ---------------------------------------------------------------------------------------- processes


def average(numbers, device):
    """{name: number} -> the same as floats, each averaged over the processes."""
    values = [torch.as_tensor(value, dtype=torch.float64) for value in numbers.values()]
    values = torch.stack([value.detach().to(device) for value in values])
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return dict(zip(numbers, values.tolist()))


# ------------------------------------------------------------------------ what the loop begins with


def prepare(config, rank):
    """Fill in the paths that were not typed. Rank 0 makes and downloads, the others wait.

    Returns a lock on the run folder: no other training may begin there while it is referenced.
    """
    with_words = config.clip or not config.backbone
    config.bank = find_bank(config.bank) if with_words else ""
    lock = None
    if rank == 0:
        os.makedirs(config.out, exist_ok=True)
        lock = lock_folder(config.out)
        if config.data:
            data.find_manifest(config.data)  # before anything that takes long
        else:
            print(
                f"the demo makes tissue and a small CLIP, once, in {config.cache} (a minute and a "
                f"half on two cores), then trains for {config.steps} steps (400 take 40 seconds)"
            )
        os.makedirs(config.cache, exist_ok=True)
        config.data = config.data or demo_tissue(config.cache)
        if config.clip in ("", "demo") and with_words:
            config.clip = demo_clip(config.cache)
        if with_words:
            find_clip(config.clip)  # a download, once
    paths = [config.data, config.clip]
    if dist.is_initialized():
        dist.broadcast_object_list(paths)
    config.data, config.clip = paths
    return lock


def find_bank(path):
    """A bank's path, from whatever folder this is run. Raises FileNotFoundError."""
    here = os.path.dirname(os.path.abspath(__file__))
    for place in (path, os.path.join(here, path)):
        if os.path.exists(place):
            return place
    raise FileNotFoundError(f"--bank {path} is neither here nor beside train.py: name a bank file")


def training_cohort(cohort, config, world):
    """The split train; lowers --patients to what it has. ValueError for shares that are uneven."""
    cohort = cohort.restrict("train")
    if config.patients > len(cohort.present):
        config.patients = len(cohort.present)
        print(f"all {config.patients} training patients are in every batch: there are no more")
    if config.patients % world:
        raise ValueError(
            f"--patients {config.patients} cannot be shared evenly by {world} processes: use a "
            f"multiple of {world}, or a number of processes that divides {config.patients}"
        )
    return cohort


def build_model(config, device):
    """The model, and the names of its attributes, {level: [names]}. Fills in config.activation."""
    bank = [({level: [] for level in config.level_names}, {})]  # without a CLIP: no words
    state = None
    if config.clip:
        state = load_clip(config.clip, config.activation)
        config.activation = state["activation"]
        if not dist.is_initialized() or dist.get_rank() == 0:  # the text is encoded once, for all
            bank = [open_bank(config.bank, state, config.vocab, config.level_names)]
        if dist.is_initialized():
            dist.broadcast_object_list(bank, device=device)
    attributes, vectors = bank[0]  # all that is left of the language from here on

    torch.manual_seed(config.seed)  # of all that starts at random
    tower = make_tower(vars(config), vectors, state, config.image_size)
    vectors = vectors or {level: torch.zeros(0, tower.dim) for level in attributes}
    model = HLSS(tower, vectors, config.objective)
    return model.to(device, memory_format=torch.channels_last), attributes


def set_pixels(model, config, cohort):
    """Sets the model's normalisation. Returns at how many pixels patches are read and viewed."""
    image_size = config.image_size or model.tower.image_size
    quiet = dist.is_initialized() and dist.get_rank() > 0
    read_size = config.read_size or min(data.short_side(cohort, quiet=quiet), 2 * image_size)
    known = getattr(model.tower, "normalisation", None)
    if known and not config.normalise:
        model.normalise(*known)
    elif config.normalise == "data" or (config.backbone and not config.normalise):
        train_cohort = cohort.restrict("train")
        model.normalise(*data.channel_statistics(train_cohort, read_size, workers=config.workers))
    return {"read_size": read_size, "image_size": image_size}


def targets_of(config, model, cohort, rank, device):
    """The `attribute_targets` of --align regression, {level: [G_l, K_l]}, on the device.

    The teacher is the CLIP's image tower as it came, whatever the run itself starts from. They stay
    in the run's folder, teacher.pt, until cohort, CLIP or bank is another.
    """
    if config.align != "regression":
        return {}
    bank = {level: t.cpu() for level, t in model.bank.items()}
    teacher = HLSS(image_tower(load_clip(config.clip, config.activation)), bank, "simclr")
    image_size = teacher.tower.image_size
    read_size = config.read_size or min(data.short_side(cohort, quiet=True), 2 * image_size)
    digest = hashlib.sha256(f"{config.activation} {read_size}".encode())
    for value in [*teacher.tower.state_dict().values(), *bank.values()]:
        digest.update(value.numpy().tobytes())
    origin = cohort.digests() | {"teacher": digest.hexdigest()}

    path = os.path.join(config.out, "teacher.pt")
    kept = {}
    if os.path.exists(path):
        kept = read_whole(path, "delete it, and it is made again")
    same = average({"same": kept.get("origin") == origin}, device)["same"]
    if same < 1:  # not the one, or not on every process
        teacher.to(device, memory_format=torch.channels_last)
        targets = attribute_targets(teacher, cohort, read_size, config.workers)
        kept = {"origin": origin, "targets": targets}
        if rank == 0:
            write_whole(path, lambda file: torch.save(kept, file))
    return {level: table.to(device) for level, table in kept["targets"].items()}


def wrap(model, config, world, device):
    """Compile the tower and average the gradients over the processes.

    All in place, so that names in the checkpoint stay what they are.
    """
    if config.compile:
        model.tower.compile()
    if world == 1:
        return model
    if config.sync_bn and device.type == "cuda":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif config.sync_bn:
        share_batch_norm(model)
    warnings.filterwarnings("ignore", "`broadcast_buffers`")  # its new name is not in torch 2.6
    return torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=not config.sync_bn)


def resume(config, model, optimizer, attributes, cohort):
    """Load the newest checkpoint, if there is one. Returns the step to go on from.

    Raises ValueError when that would be neither the old run nor a new one.
    """
    checkpoint = newest_checkpoint(config.out)
    step = checkpoint["step"]
    device = next(model.parameters()).device
    if average({"step": step}, device)["step"] != step:
        raise ValueError(f"{config.out} ends at step {step} here alone: put it on a shared disk")
    if step == 0:
        return 0

    check_same_run(config, model, attributes, cohort, checkpoint)
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return step


def check_same_run(config, model, attributes, cohort, checkpoint):
    """Raises ValueError when flags, cohort or bank are not those of the checkpoint."""
    # The same cohort, wherever its folder is now.
    now = cohort.digests()
    before = checkpoint.get("cohort", now)
    changed = [what for what in now if now[what] != before[what]]
    if changed:
        what = f"other {', '.join(changed)} (added, removed, renamed or in another order)"
        remedy = "restore its manifest, or give another --out to start anew"
        raise ValueError(f"{config.data} is not the cohort of {config.out}: {what}: {remedy}")

    # The same flags, as far as they make the run. One that is newer than the checkpoint had its
    # default there.
    then = checkpoint["config"]
    known = {name: value for name, value in then.items() if name in vars(config)}
    before = vars(Config(**known))
    changed = []
    if config.steps > before["steps"]:
        print(f"--steps {config.steps} (there: {before['steps']}): its rates from here on")
        before["steps"] = config.steps
    for name, value in vars(config).items():
        if name not in MAY_CHANGE and before[name] != value:
            changed.append(f"--{name.replace('_', '-')} {value} (there: {before[name]})")
    for name in then.keys() - vars(config).keys():
        if then[name]:
            changed.append(f"no flag {name} any more (there: {then[name]})")
    if changed:
        remedy = "Give the same flags to go on with it, or another --out to start anew"
        raise ValueError(f"{config.out} holds another run: {', '.join(changed)}. {remedy}")

    # The same bank, up to rounding.
    same = attributes == checkpoint["attributes"]
    for level, t in model.bank.items():
        before = checkpoint["model"][f"bank_{level}"]
        same = same and t.shape == before.shape and torch.allclose(t.cpu(), before, atol=0.01)
    if not same:
        remedy = "restore it, or give another --out to start anew"
        raise ValueError(f"{config.bank} is not the bank of {config.out}: {remedy}")


# --------------------------------------------------------------------------------- what a run keeps


def command_of(world):
    """What was typed to start this, as one line."""
    launcher = f"torchrun --nproc_per_node={world}" if world > 1 else "python"
    return f"{launcher} {shlex.join(sys.argv)}"


def describe_run(config, world, device):
    """Write config.json: the settings, and what else it takes to repeat the run."""
    here = os.path.dirname(os.path.abspath(__file__))
    git = "git describe --always --dirty --abbrev=40"  # says nothing where there is no repository
    commit = subprocess.run(git, shell=True, cwd=here, capture_output=True, text=True).stdout
    about = {
        "command": command_of(world),
        "commit": commit.strip(),
        "processes": world,
        "device": device.type,
        "python": sys.version.split()[0],
    }
    about |= {name: version(name) for name in ("torch", "numpy", "pillow")}
    content = json.dumps(vars(config) | about, indent=1).encode()
    write_whole(os.path.join(config.out, "config.json"), lambda file: file.write(content))


def check_finite(numbers, step, ids, cohort, config):
    """Raises FloatingPointError, and lists the batch in a file, unless all numbers are finite."""
    bad = [f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value)]
    if not bad:
        return
    rows = gather(ids[:: config.counts[-1], 0]).tolist()  # a patch's id is its row in this cohort
    remedy = "If the images are sound, start anew with a lower --lr"
    if step == 1:
        remedy = "No step was taken: look at the CLIP, the bank and the images, not at --lr"
    kept = "the last checkpoint is kept" if checkpoints(config.out) else "there is no checkpoint"
    path = os.path.join(config.out, f"fault-{step:07d}.json")
    fault = {"step": step, "fault": bad, "paths": [cohort.path(row) for row in rows]}
    if not dist.is_initialized() or dist.get_rank() == 0:
        content = json.dumps(fault, indent=1).encode()
        write_whole(path, lambda file: file.write(content))
    raise FloatingPointError(
        f"step {step}: {', '.join(bad)}. The step was not taken, {kept} and {path} lists the "
        f"batch. {remedy}"
    )


def introduce(config, first, rank, world, device, cohort):
    """Writes config.json, and tells a person what to know before the loop begins."""
    if rank > 0:
        return
    describe_run(config, world, device)
    n = config.patients * math.prod(config.counts)
    print(
        f"{config.objective} from step {first} on {world} x {device}: {cohort.restrict('train')} "
        f"to train on, of {cohort}\n"
        f"batches of {n} images; each hvc term stays at log({n} - 1) = {math.log(n - 1):.2f} "
        "where nothing is learnt\n"
        f"{config.clip or 'no CLIP'}, {config.bank or 'no bank'}, --align {config.align}"
    )
    for note in cohort_notes(vars(config), cohort):
        print(f"note: {note}")


def catch_signals():
    """A list that SIGTERM and SIGINT are added to, so that a step is finished before it ends."""
    signals = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: signals.append(number))
    return signals


def probe_due(step, config):
    """Whether the held-out patients are probed after a step."""
    every = config.probe_every
    return step in (0, config.steps) or (every > 0 and step % every == 0)


def probe_now(step, model, cohort, sizes, config, log, signals):
    """kNN on the held-out patients, written to the log. False if a signal came in between."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)  # batch norm's averages; the checkpoint holds those of rank 0
    needed = cohort.select((cohort.label >= 0) & (cohort.split != data.SPLITS.index("test")))
    result = {}
    if len(needed):
        z = embed(model, needed, **sizes, workers=config.workers, stop=signals)
        if z is None:
            return False
        if not log.silent:
            result = probe(z, needed)
    log.write(step=step, probe=result)
    return True


def vitals(step, z, bank, config, durations):
    """What the log says of a step beside its losses: {name: number}."""
    z = gather(z.detach())
    pace = sum(durations) / len(durations)  # seconds for each step
    numbers = {"lr": learning_rate(step - 1, config)}
    for level, t in bank.items():
        if len(t):
            numbers[f"attributes_used_{level}"] = attributes_used(z, t)
    numbers["images_per_s"] = round(len(z) / pace, 1)
    if z.is_cuda:
        numbers["memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    numbers["seconds_left"] = round(pace * (config.steps - step))
    return numbers


# -------------------------------------------------------------------------------------------- train


def train(config, rank=0, world=1, device=CPU):
    """Train to the end, or to a SIGTERM or SIGINT. Returns whether it reached the end."""
    # The cohort, the model, the optimizer, and the step to go on from.
    _lock = prepare(config, rank)  # until this function ends
    cohort = data.read_cohort(config.data, config.level_names, config.val_fraction)
    train_cohort = training_cohort(cohort, config, world)
    model, attributes = build_model(config, device)
    sizes = set_pixels(model, config, cohort)  # {"read_size": pixels, "image_size": pixels}
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True
    )
    first = resume(config, model, optimizer, attributes, cohort)
    targets = targets_of(config, model, train_cohort, rank, device)  # {level: [G_l, K_l]} or {}
    wrapped = wrap(model, config, world, device)
    log = Log(config.out, first, rank)
    introduce(config, first, rank, world, device, cohort)
    signals = catch_signals()
    probing = (model, cohort, sizes, config, log, signals)
    if probe_due(first, config) and not log.has_probe(first) and not probe_now(first, *probing):
        return False

    durations = deque(maxlen=config.log_every)  # seconds of each step
    began = time.perf_counter()
    # Batch. The same patients, patches and views on any number of processes; each gets its share.
    batches = data.load_views(
        train_cohort, config, first, **sizes, device=device, rank=rank, world=world
    )
    bar = tqdm(batches, "train", total=config.steps, initial=first, unit="step", disable=rank > 0)
    for step, (images, ids) in enumerate(bar, first + 1):  # [n, 3, S, S] in [0, 1]; [n, L]
        # Dropout, where a tower has it: the masks are those of the step, resumed or not.
        torch.manual_seed(data.seed_of(config.seed, step, rank))

        # Forward. The encoder in bf16 where asked for; the losses are float32 inside.
        with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
            z, projections = wrapped(images)  # [n, D]; {level: [n, K_l]}
        terms = hvc(projections, ids, config.temperature)  # {"hvc_patch": scalar, ...}
        if config.align == "paper":
            terms |= ha(z, model.bank, config.ha_temperature)  # {"ha_patch": scalar, ...}
        elif config.align == "regression":
            wanted = {level: table[i] for (level, table), i in zip(targets.items(), ids.T)}
            terms |= ar(z, model.bank, wanted)  # {"ar_patch": scalar, ...}
        loss = sum(config.lambdas[name] * term for name, term in terms.items())

        # Backward. DistributedDataParallel averages the gradients over the processes meanwhile.
        optimizer.zero_grad()
        loss.backward()

        # Averaged over the processes, so that all decide alike: whether to go on, when to stop.
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
        numbers = average(
            {"loss": loss, **terms, "gradient_norm": norm, "signals": len(signals)}, device
        )
        stop = numbers.pop("signals") > 0
        check_finite(numbers, step, ids, train_cohort, config)  # a bad step spoils the weights

        # Step. The rate is a pure function of the step, so nothing is stored to resume it.
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step - 1, config)
        optimizer.step()

        # What a person watches, and what a killed run comes back to.
        durations.append(time.perf_counter() - began)
        end = step == config.steps
        due = probe_due(step, config)
        if end or stop or step % config.log_every == 0:
            log.write(step=step, **numbers, **vitals(step, z, model.bank, config, durations))
            bar.set_postfix(loss=f"{numbers['loss']:.3f}")
        if rank == 0 and (due or stop or step % config.save_every == 0):
            save_checkpoint(
                config.out,
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                    "config": vars(config),
                    "attributes": attributes,
                    "classes": cohort.classes,
                    "cohort": cohort.digests(),
                    **sizes,
                },
            )
        if (stop and not end) or (due and not probe_now(step, *probing)):
            bar.close()
            return False
        began = time.perf_counter()

    if rank == 0:
        print(*table(log.probes()), f"next: python evaluate.py {config.out}", sep="\n")
    return True


def main():
    config = parse_config()
    with processes(config.timeout) as (rank, world, device):
        finished = train(config, rank, world, device)
        if not finished and rank == 0:
            print(f"stopped and saved in {config.out}. To go on: {command_of(world)}")
    raise SystemExit(0 if finished else STOPPED)


if __name__ == "__main__":
    with user_errors():
        main()
