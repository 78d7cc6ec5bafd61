"""Pretrain an image encoder with HLSS, HiDisc or SimCLR.

    python train.py                                  the demo, up to its kNN table
    torchrun --nproc_per_node=4 train.py             the same on four processes
    python train.py --data FOLDER --out runs/mine    your own cohort (a folder with manifest.csv)

An interrupted run resumes from its newest checkpoint when you rerun the same command.
"""

import argparse
import math
import os
import time
import warnings
from collections import deque
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, fields

import numpy as np
import torch
from tqdm import tqdm

from data import AUGMENTATIONS, READ_AT, SPLITS, load_views, read_cohort, seed_of, short_side
from demo.prepare import demo_clip, demo_tissue
from describe import open_bank
from evaluate import attribute_scores, cohort_notes, embed, group_mean, probe
from losses import LEVELS, ar, attributes_used, floors, gather, ha, hvc, standardise
from model import ACTIVATIONS, HLSS, OBJECTIVES, image_tower, make_tower, share_batch_norm
from tools import report, runs
from tools.processes import average, from_first, processes, stop_signals, user_errors
from tools.weights import CLIPS, find_clip, load_clip

CPU = torch.device("cpu")
STOPPED = 75  # exit code after SIGTERM, SIGINT or SIGUSR1: saved; rerun to continue
WARMUP = 0.1  # share of the steps in which the learning rate climbs, as in the paper


# ------------------------------------------------------------------------------------- settings


def flag(default, text, **options):
    """A field of Config that is also a flag. options: argparse's, or low and high bounds."""
    return field(default=default, metadata={"help": text} | options)


@dataclass
class Config:
    """Everything that a run depends on. Each field is a flag; the checkpoint carries them all."""

    # What is read and written.
    data: str = flag("", "folder with manifest.csv; empty: demo tissue, made on first use")
    out: str = flag("", "folder for checkpoints and log.jsonl; empty: runs/NAME, NAME from --data")
    clip: str = flag("", f"CLIP to start from: a file, demo, or one of {', '.join(CLIPS)}")
    activation: str = flag("", "needed if the CLIP's file names none", choices=["", *ACTIVATIONS])
    bank: str = flag("demo/attributes.json", "a bank file, or a bank.pt made by describe.py encode")

    # The encoder.
    start: str = flag("clip", "weights the image tower starts from", choices=["clip", "random"])
    backbone: str = flag("", "a torchvision network, like resnet18, in place of the CLIP's tower")
    backbone_weights: str = flag("", "DEFAULT (torchvision's), a file, or empty (random)")
    image_size: int = flag(0, "side of a view in pixels; 0: the tower's own", low=0)

    # The losses.
    objective: str = flag(
        "hlss",
        "hlss: a projection per level, from text; hidisc: one for all; simclr: patch level only",
        choices=OBJECTIVES,
    )
    align: str = flag(
        "",
        "paper: z is drawn to its nearest attributes; regression (ours): z keeps the CLIP's "
        "attribute scores; empty: paper for hlss, otherwise off",
        choices=["", "paper", "regression", "off"],
    )
    temperature: float = flag(0.07, "for the contrast", low=1e-3)
    level_weights: str = flag("", "weights of the contrast, fine to coarse; empty: 1 each")
    align_weight: float = flag(1.0, "lambda of --align", low=0)
    ha_temperature: float = flag(1.0, "for the softmax in --align paper", low=1e-3)

    # The batches.
    levels: str = flag(",".join(LEVELS), "fine to coarse: the image, then columns of the manifest")
    patients: int = flag(8, "patients in a global batch", low=1)
    draw: str = flag("", "views per patch, patches per slide, ...; empty: 2 each")
    augmentation: str = flag(
        "demo",
        "demo: mild; strong-srh: the paper's; strong: the paper's, adapted to H&E; weak: flips. "
        "python data.py FOLDER NAME shows them",
        choices=list(AUGMENTATIONS),
    )
    val_fraction: float = flag(0.2, "rough share of patients held out, if no split", low=0, high=1)
    seed: int = flag(0, "for batches, views and new weights", low=0)

    # The steps.
    steps: int = flag(400, "optimizer steps in all; a run may be resumed with more", low=1)
    lr: float = flag(1e-3, "peak learning rate", low=0)
    amp: bool = flag(torch.cuda.is_available(), "bf16 in tower and projections; on with CUDA")
    compile: bool = flag(False, "torch.compile the tower, for CUDA: one slow step, then faster")
    workers: int = flag(2, "decoding threads per process", low=1)
    probe_every: int = flag(200, "steps between kNN probes; 0: only at start and end", low=0)
    save_every: int = flag(100, "steps between checkpoints; kept: the start, the last two", low=1)
    timeout: int = flag(600, "seconds before an unresponsive process counts as lost", low=1)

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
        """[views per patch, patches per slide, slides per patient], as in --draw."""
        return [int(n) for n in self.draw.split(",")] if self.draw else [2] * len(self.level_names)

    @property
    def lambdas(self):
        """{term: weight} of the loss: L = sum_l lambda_l SupCon_l + lambda_align sum_l HA_l."""
        levels = self.level_names
        weights = self.level_weights.split(",") if self.level_weights else [1] * len(levels)
        lambdas = {f"hvc_{level}": float(x) for level, x in zip(levels, weights, strict=True)}
        aligned = {f"{a}_{level}": self.align_weight for a in ("ha", "ar") for level in levels}
        return lambdas | aligned


LONG = dict(image_size=224, patients=64, steps=60000, workers=8, probe_every=5000, save_every=1000)
PRESETS = {  # replace the defaults above
    "demo": dict(objective="hidisc"),  # which gains most on demo tissue
    "opensrh": LONG | dict(bank="attributes/opensrh.json", augmentation="strong-srh"),
    "tcga": LONG | dict(bank="attributes/tcga.json", augmentation="strong"),
}
TROUBLE = """
what to do:
  real images                              name a CLIP that has seen some: --clip PLIP; or train
                                           without text: --objective hidisc --backbone resnet18
  the loss jumps or diverges               divide --lr by 3
  every hvc_* stays at chance              --temperature 0.2, a lower --align-weight
  the loss falls, the probe does not rise  more --patients
  z encodes stain rather than tissue       a lower last weight: --level-weights 1,1,0.3
  ha_* is almost 0                         normal at the paper's temperature: --ha-temperature 0.1
  attributes_used falls towards 1          raise --ha-temperature again
  ar_* rises                               raise --align-weight
  the device waits for images              more --workers
  out of memory                            lower --patients, --draw or --image-size
"""
MAY_CHANGE = (  # when a run is resumed, without making it a different run
    "data out clip bank steps workers probe_every save_every compile timeout".split()
)


def parse_config(argv=None):
    """Flags -> Config: the defaults, then the preset, then the flags."""
    style = argparse.RawDescriptionHelpFormatter
    about = {"description": __doc__, "epilog": TROUBLE, "formatter_class": style}
    parser = argparse.ArgumentParser(**about, allow_abbrev=False)
    parser.add_argument("--preset", choices=PRESETS, help="a set of defaults; demo if no --data")
    for f in fields(Config):
        options = {"type": f.type}
        if f.type is bool:
            options = {"action": argparse.BooleanOptionalAction}
        if "choices" in f.metadata:
            options["choices"] = f.metadata["choices"]
        name = "--" + f.name.replace("_", "-")
        text = f"{f.metadata['help']} (default: {f.default!r})"
        parser.add_argument(name, default=argparse.SUPPRESS, help=text, **options)
    typed = vars(parser.parse_args(argv))
    preset = typed.pop("preset") or ("" if typed.get("data") else "demo")
    try:
        config = Config(**PRESETS.get(preset, {}) | typed)
        check_config(config)
    except ValueError as error:
        parser.error(str(error))
    return config


def check_config(config):
    """Raises ValueError for flags that are out of range or contradict each other."""
    for f in fields(config):
        value, low = getattr(config, f.name), f.metadata.get("low", -math.inf)
        high = f.metadata.get("high", math.inf)
        if f.type in (int, float) and not low <= value <= high:
            name = f.name.replace("_", "-")
            raise ValueError(f"--{name} {value} is not between {low} and {high}")
    levels = config.level_names
    if len(set(levels)) < 2 or not all(level.isidentifier() for level in levels):
        raise ValueError(
            f"--levels {config.levels}: name at least two; with one, nothing tells patients apart"
        )
    good = False
    with suppress(ValueError):  # not numbers, or not as many
        good = len(config.counts) == len(levels) and min(config.lambdas.values()) >= 0
    if not good or min(config.counts) < 1 or config.counts[0] < 2:
        raise ValueError(
            f"--draw {config.draw or '2 each'}, --level-weights {config.level_weights or '1 each'}:"
            f" give {len(levels)} numbers: 2 or more views, then 1 or more; weights from 0 up"
        )
    wordless = config.backbone and config.objective != "hlss" and config.align == "off"
    if (config.data or config.backbone) and not config.clip and not wordless:
        raise ValueError(
            f"name a CLIP with --clip (a file, {', '.join(CLIPS)}, or demo, which knows only demo "
            "tissue), or train without text: --objective hidisc --backbone resnet18"
        )


# ---------------------------------------------------------------------------------------- train


def train(config, rank=0, world=1, device=CPU):
    """Trains to the end, or until a signal arrives. Returns whether it reached the end."""
    # The cohort, the model, the optimizer, and the step to resume from.
    lock = runs.lock_folder(config.out) if rank == 0 else nullcontext()  # held from here on
    folder = from_first(None if rank else config.data or demo_tissue())  # others wait for rank 0
    cohort = read_cohort(folder, config.level_names, config.val_fraction)
    train_cohort = cohort.restrict("train")  # with the same ids
    patients = min(config.patients, len(train_cohort.present))  # in a global batch
    files = {"data": folder} | find_text(config, rank)  # {"data", "clip", "bank"}: paths
    model, facts = build_model(config, files, cohort, rank, device)  # facts: for checkpoints
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, fused=True)
    done = resume(config, files, model, optimizer, facts, cohort)  # the last finished step
    targets = teach(config, files, model, facts, train_cohort, device)  # {level: a row for each id}
    wrapped = wrap(model, config, world, device)  # gradients and batch norm over all processes
    log = runs.Log(config.out, done, rank)
    batches = make_batches(config, train_cohort, patients, facts, done, rank, world, device)
    if rank == 0:
        introduce(config, files, done, world, device, cohort, train_cohort, patients)

    durations = deque(maxlen=10)  # seconds of each step
    bar = tqdm(total=config.steps, initial=done, desc="train", unit="step", disable=rank > 0)
    with lock, bar, stop_signals() as signals:
        run = (config, rank, cohort, model, optimizer, facts, log, signals)
        if not save_and_probe(done, *run):  # a signal came
            return False
        began = time.perf_counter()
        for step, (images, ids) in enumerate(batches, done + 1):  # [n, 3, S, S]; {level: [n]}
            # Dropout masks, if any, depend on step and rank alone, so resuming repeats them.
            torch.manual_seed(seed_of("dropout", config.seed, step, rank))

            # Forward, in bf16 if asked for; the losses are float32 inside.
            with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
                z, projections = wrapped(images)  # [n, D]; {level: [n, K_l]}
            terms = hvc(projections, ids, config.temperature)  # {"hvc_patch": scalar, ...}
            if config.align == "paper":
                terms |= ha(z, model.bank, config.ha_temperature)  # {"ha_patch": scalar, ...}
            elif config.align == "regression":
                wanted = {level: a[ids[level]] for level, a in targets.items()}  # a row for each id
                terms |= ar(z, model.bank, wanted)  # {"ar_patch": scalar, ...}
            loss = sum(config.lambdas[name] * term for name, term in terms.items())

            # Backward. DistributedDataParallel averages the gradients over the processes.
            optimizer.zero_grad()
            loss.backward()

            # The numbers are averaged too, so that all processes stop, or go on, together.
            gradients = [p.grad for p in model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
            numbers = {"loss": loss, **terms, "gradient_norm": norm, "signals": len(signals)}
            numbers = average(numbers, device)
            check_finite(numbers, step, ids, cohort)  # a bad step would spoil the weights

            # Step. The rate is a pure function of the step: nothing is stored to resume it.
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
            optimizer.step()

            # Progress to watch, and checkpoints from which a killed run resumes.
            durations.append(time.perf_counter() - began)
            bar.update()
            if step <= 10 or step % 10 == 0 or step == config.steps or numbers["signals"]:
                log.write(step=step, **vitals(step, numbers, z, model.bank, config, durations))
                bar.set_postfix(loss=f"{numbers['loss']:.3f}")
            if not save_and_probe(step, *run, stop=numbers["signals"] > 0):
                return False
            began = time.perf_counter()

    if rank == 0:
        print(*report.table(log.probes()), f"next: python evaluate.py {config.out}", sep="\n")
    return True


# ------------------------------------------------ train()'s helpers, in the order of the calls


def find_text(config, rank):
    """{"clip", "bank"}: paths, empty without text. Rank 0 makes or downloads what is missing."""
    files = {"clip": "", "bank": ""}
    if rank == 0 and (config.clip or not config.backbone):
        beside = os.path.join(os.path.dirname(__file__), config.bank)  # run from any folder
        files["bank"] = config.bank if os.path.exists(config.bank) else beside
        if not os.path.isfile(files["bank"]):  # fails before a CLIP is made or downloaded
            raise FileNotFoundError(f"--bank {config.bank} does not exist: name a bank file")
        files["clip"] = demo_clip() if config.clip in ("", "demo") else find_clip(config.clip)
    return from_first(files)


def build_model(config, files, cohort, rank, device):
    """The model, and what its checkpoints hold besides weights: {name: value}."""
    attributes, bank, clip = {level: [] for level in config.level_names}, {}, {}
    if files["clip"]:
        clip = load_clip(files["clip"], config.activation)
        opened = None
        if rank == 0:  # the text is encoded once, for all processes
            opened = open_bank(files["bank"], clip, levels=config.level_names)
        attributes, bank = from_first(opened)  # all that is left of the text from here on
    torch.manual_seed(seed_of("weights", config.seed))
    tower = make_tower(asdict(config), bank, clip, config.image_size)
    bank = bank or {level: torch.zeros(0, tower.dim) for level in attributes}
    model = HLSS(tower, bank, config.objective)

    side, smallest, largest = short_side(cohort)
    if rank == 0 and smallest < largest:
        print(f"note: most patches are {side} pixels wide, others {smallest} to {largest}")
    facts = {
        "config": asdict(config) | files,
        "attributes": attributes,
        "clip": {name: clip[name] for name in ("activation", "heads") if name in clip},
        "classes": cohort.classes,
        "cohort": runs.cohort_hashes(cohort),
        "image_size": tower.image_size,
        "read_size": min(side, round(READ_AT * tower.image_size)),
        "short_side": side,
    }
    return model.to(device, memory_format=torch.channels_last), facts


def resume(config, files, model, optimizer, facts, cohort):
    """Loads the newest checkpoint, if it is from this run. Returns the step to resume from."""
    checkpoint = runs.newest_checkpoint(config.out)
    step = checkpoint["step"]
    device = next(model.parameters()).device
    if average({"step": step}, device)["step"] != step:
        raise ValueError(f"not all processes find {config.out} at step {step}: use a shared disk")
    if step == 0:
        return 0
    shorter = config.steps < checkpoint["config"]["steps"]
    may_change = set(MAY_CHANGE) - {"steps"} if shorter else MAY_CHANGE
    runs.check_same_flags(config.out, vars(config), checkpoint["config"], may_change)
    runs.check_same_cohort(config.out, cohort, facts["cohort"], checkpoint["cohort"])
    same = facts["attributes"] == checkpoint["attributes"]
    for level, t in model.bank.items():
        before = checkpoint["model"][f"bank_{level}"]
        same = same and t.shape == before.shape and torch.allclose(t.cpu(), before, atol=0.01)
    if not same:
        raise ValueError(
            f"{files['bank']} is not the bank of {config.out}: restore it, or give another --out"
        )
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return step


def teach(config, files, model, facts, cohort, device):
    """The attribute scores that --align regression aims for; otherwise {}.

        a_l = standardise(mean over each patch, slide or patient of standardise(z t_l^T))

    z is the teacher's: the CLIP's image tower as published, whatever the run itself starts from.
    Returns {level: a_l [G_l, K_l]}, one row for each id of the level.
    """
    if config.align != "regression":
        return {}
    tower = image_tower(load_clip(files["clip"], config.activation))
    teacher = HLSS(tower, model.bank, "simclr").to(device, memory_format=torch.channels_last)
    read_size = min(facts["short_side"], round(READ_AT * tower.image_size))
    z = embed(teacher, cohort, read_size, tower.image_size, workers=config.workers)
    ids = dict(zip(cohort.levels, cohort.ids(np.arange(len(cohort))).T))
    targets = {}
    for level, cosines in attribute_scores(z, model.bank).items():
        scores = standardise(cosines)  # [n, K_l]
        mean, first = group_mean(scores.numpy(), ids[level])
        a = torch.zeros(ids[level].max() + 1, scores.shape[1])
        a[ids[level][first]] = standardise(torch.from_numpy(mean)).float()
        targets[level] = a.to(device)
    return targets


def wrap(model, config, world, device):
    """Compiles the tower and averages gradients and batch norm over the processes, in place."""
    if config.compile:
        model.tower.compile()
    if world == 1:
        return model
    if device.type == "cuda":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    else:
        share_batch_norm(model)
    warnings.filterwarnings("ignore", "`broadcast_buffers`")  # its new name is not in torch 2.9
    return torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)


def make_batches(config, cohort, patients, facts, first, rank, world, device):
    """The batches after step `first`; each process gets its share."""
    # By default every patient contributes 2 slides x 2 patches x 2 views, so row 0 has one positive
    # at patch level and seven at patient level.
    if patients % world:
        raise ValueError(
            f"--patients {patients} cannot be shared by {world} processes: use a multiple"
        )
    steps = range(first + 1, config.steps + 1)
    sizes = facts["read_size"], facts["image_size"]
    how = config.counts, config.augmentation, sizes, config.seed, device
    return load_views(cohort, steps, patients, *how, (rank, world), config.workers)


def introduce(config, files, first, world, device, cohort, train_cohort, patients):
    """Writes config.json, and prints what to know before the loop begins."""
    n = patients * math.prod(config.counts)
    lows = [f"{at} {low:.2f}" for at, low in zip(config.level_names, floors(config.counts))]
    bounds = {"chance": f"{math.log(n - 1):.2f}", "lowest": ", ".join(lows)}  # of the contrast
    runs.describe(config.out, vars(config) | files | bounds, world, device)
    print(
        f"{config.objective} from step {first} on {world} x {device}, training on {train_cohort}, "
        f"out of {cohort}\n"
        f"batches of {n} images: at chance each hvc term is log({n} - 1) = {bounds['chance']}; "
        f"the lowest possible: {bounds['lowest']}\n"
        f"{files['clip'] or 'no CLIP'}, {files['bank'] or 'no bank'}, --align {config.align}"
    )
    if patients < config.patients:
        more = "there are no more" if patients > 1 else "it has no negatives"
        print(f"note: every batch holds every training {cohort.levels[-1]} ({patients}): {more}")
    for note in cohort_notes(vars(config) | files, cohort):
        print(f"note: {note}")


def save_and_probe(step, config, rank, cohort, model, optimizer, facts, log, signals, stop=False):
    """Saves and probes if due after a step. Returns whether to go on training."""
    ending = step == config.steps
    probing = step in (0, config.steps) or (config.probe_every and step % config.probe_every == 0)
    if log.has_probe(step):  # a resumed run has been here
        return True
    if probing or stop or step % config.save_every == 0:
        # Rank 0 saves; the others wait for it, however slow the disk is.
        if rank == 0:
            checkpoint = {"model": model.state_dict(), "step": step, **facts}
            if step:  # step 0 is for evaluate.py --against start, not for resuming
                checkpoint["optimizer"] = optimizer.state_dict()
            runs.save_checkpoint(config.out, checkpoint)
        from_first(None)
    if stop and not ending:
        return False
    if probing:
        labelled = cohort.label >= 0
        needed = cohort.select(labelled & (cohort.split != SPLITS.index("test")))
        result = {}
        if len(needed):
            sizes = facts["read_size"], facts["image_size"]
            z = embed(model, needed, *sizes, workers=config.workers, stop=signals)
            if z is None:  # a signal came; the resumed run embeds again
                return False
            result = probe(z, needed, next(model.parameters()).device)
        log.write(step=step, probe=from_first(result))
    return True


def learning_rate(step, config):
    """The rate of a step (1 is the first): linear warm-up, then a cosine towards zero."""
    warmup = max(1, round(WARMUP * config.steps))
    if step <= warmup:
        return config.lr * step / warmup
    falling = max(1, config.steps - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * (step - 1 - warmup) / falling))


def check_finite(numbers, step, ids, cohort):
    """Raises FloatingPointError, naming the step and some patches, unless all are finite."""
    bad = [f"{name} is {value}" for name, value in numbers.items() if not math.isfinite(value)]
    if bad:
        paths = [cohort.path(row) for row in ids[cohort.levels[0]].unique()[:3].tolist()]
        remedy = "If the images are sound, restart with a lower --lr"
        if step == 1:
            remedy = "No step has been taken yet: check the CLIP, the bank and the images, not --lr"
        raise FloatingPointError(
            f"step {step}: {', '.join(bad)}. The step was not taken and the last checkpoint is "
            f"kept; the batch begins with {', '.join(paths)}. {remedy}"
        )


def vitals(step, numbers, z, bank, config, durations):
    """A line of the log: the averaged numbers of a step, and other things to watch."""
    z = gather(z.detach())
    pace = sum(durations) / len(durations)  # seconds a step
    line = {name: value for name, value in numbers.items() if name != "signals"}
    line["lr"] = learning_rate(step, config)
    for level, t in bank.items():
        if len(t):
            line[f"attributes_used_{level}"] = attributes_used(z, t)
    line["images_per_s"] = round(len(z) / pace, 1)
    if z.is_cuda:
        line["memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    line["seconds_left"] = round(pace * (config.steps - step))
    return line


def main():
    config = parse_config()
    with processes(config.timeout) as (rank, world, device):
        finished = train(config, rank, world, device)
        if not finished and rank == 0:
            print(f"stopped and saved in {config.out}. To resume: {runs.command_line(world)}")
    raise SystemExit(0 if finished else STOPPED)


if __name__ == "__main__":
    with user_errors():
        main()
