"""What a run keeps on disk, written whole or not at all, and whether it is still the same run."""

import glob
import hashlib
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import warnings
import zipfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

CHECKPOINT = re.compile(r"step-([0-9]{7}|[1-9][0-9]{7,})\.pt")
UNFINISHED = re.compile(rf"({CHECKPOINT.pattern}|log\.jsonl|config\.json)\.[0-9]+\.part")


def write_whole(path, write):
    """Writes a file via write(file), completely or not at all. Raises OSError."""
    part = f"{path}.{os.getpid()}.part"  # of this process alone
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:
        error = error.__context__ or error  # torch.save turns an OSError into a RuntimeError
        if os.path.exists(part):
            os.remove(part)
        raise OSError(f"{path} cannot be written ({error}): check the folder and disk") from error


def write_json(path, value):
    """Writes a value as JSON, completely or not at all."""
    write_whole(path, lambda file: file.write(json.dumps(value, indent=1).encode()))


def read_whole(path, remedy="use the previous one"):
    """What torch.save wrote to a file, on the CPU. Raises ValueError if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()  # torch.load does not look at the checksums
        if member:
            raise ValueError(f"wrong checksum of {member}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever zip, pickle and torch make of a damaged file
        raise ValueError(f"{path} is damaged or not a checkpoint ({error}): {remedy}") from error


def lock_folder(folder):
    """Makes a run's folder; returns a file that locks it until closed. ValueError if in use."""
    os.makedirs(folder, exist_ok=True)
    lock = open(os.path.join(folder, "lock"), "a+")
    try:
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        raise ValueError(
            f"process {lock.read()} is training in {folder}: wait for it, or give another --out"
        ) from None
    except (ImportError, OSError) as error:  # Windows; a disk without locks
        warnings.warn(f"{folder} cannot be locked ({error}): one run at a time", stacklevel=2)
        return lock
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {socket.gethostname()}")
    lock.flush()
    for name in os.listdir(folder):
        if UNFINISHED.fullmatch(name):  # left by a process that was killed
            os.remove(os.path.join(folder, name))
    return lock


def command_line(world):
    """The command that started this, on one line."""
    launcher = f"torchrun --nproc_per_node={world}" if world > 1 else "python"
    return f"{launcher} {shlex.join(sys.argv)}"


def describe(folder, settings, world, device):
    """Writes config.json: the settings, and what else it takes to repeat the run."""
    here = os.path.dirname(os.path.abspath(__file__))
    git = "git describe --always --dirty --abbrev=40"  # by the shell: git may be missing
    done = subprocess.run(git, shell=True, cwd=here, capture_output=True, text=True)
    about = {"command": command_line(world), "commit": done.stdout.strip(), "processes": world}
    about |= {"device": device.type, "python": sys.version.split()[0]}
    about |= {name: version(name) for name in ("torch", "numpy", "pillow")}
    write_json(os.path.join(folder, "config.json"), settings | about)


def checkpoint_path(folder, step):
    """Where the checkpoint of a step is."""
    return os.path.join(folder, f"step-{step:07d}.pt")


def checkpoints(folder):
    """{step: path} of the checkpoints that train.py wrote to a folder, in the order of steps."""
    names = filter(CHECKPOINT.fullmatch, glob.glob("step-*.pt", root_dir=folder))
    steps = sorted(int(name[5:-3]) for name in names)
    return {step: checkpoint_path(folder, step) for step in steps}


def save_checkpoint(folder, checkpoint):
    """Writes step-N.pt, N = checkpoint["step"]; keeps it, the one before and the start."""
    step = checkpoint["step"]
    write_whole(checkpoint_path(folder, step), lambda file: torch.save(checkpoint, file))
    for old in [n for n in checkpoints(folder) if 0 < n < step][:-1]:
        os.remove(checkpoint_path(folder, old))


def newest_checkpoint(folder):
    """The newest intact checkpoint, or {"step": 0} in a new run. ValueError if all are damaged."""
    paths = checkpoints(folder)
    start = paths.pop(0, None)
    for step, path in reversed(paths.items()):
        try:
            checkpoint = read_whole(path)
            if checkpoint.get("step") == step:
                return checkpoint
            print(f"{path} holds step {checkpoint.get('step')}: using the previous one")
        except ValueError as error:
            print(error)
    if paths:
        raise ValueError(f"no checkpoint in {folder} is intact: restore one, or give another --out")
    return read_whole(start) if start else {"step": 0}


def cohort_hashes(cohort):
    """{"patches": [n], "train_patients": [P]}, int64 hashes by which cohorts are compared."""
    _, first, slide = np.unique(cohort.parents[0], return_index=True, return_inverse=True)
    places = []  # of each slide
    for row in first:
        places.append("\n".join([*cohort.groups_of(row), str(cohort.split[row])]).encode())
    labels = [name.encode() for name in [*cohort.classes, ""]]  # label -1 is none
    patches = []
    for name, number, label in zip(cohort.names, slide, cohort.label):
        patches.append(_hash64(b"\n".join([name, places[number], labels[label]])))
    train = np.unique(cohort.patient[cohort.split == 0])
    patients = [_hash64(cohort.group_names[-1][patient].encode()) for patient in train]
    return {"patches": torch.tensor(patches), "train_patients": torch.tensor(patients)}


def _hash64(content):
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big", signed=True)


def trained_on(cohort, patients, hashes):
    """How many of a cohort's patients (ids) a run was trained on, by its `cohort_hashes`."""
    known = set(hashes["train_patients"].tolist())
    return sum(_hash64(cohort.group_names[-1][p].encode()) in known for p in patients)


def check_same_cohort(folder, cohort, hashes, before):
    """Prints how many patches are gone; raises ValueError if some are new, changed or moved."""
    now, then = hashes["patches"].numpy(), before["patches"].numpy()
    new = ~np.isin(now, then)
    if new.any():
        raise ValueError(
            f"{cohort.root} is not the cohort of {folder}: {new.sum()} patches are new or renamed, "
            f"or changed slide, patient, split or label: {cohort.name(new.argmax())}, ...: "
            "restore the manifest, or give another --out"
        )
    if (then[np.isin(then, now)] != now).any():
        raise ValueError(
            f"{cohort.root} lists the patches of {folder} in another order: restore the run's"
        )
    gone = len(then) - len(now)
    if gone:
        print(f"note: {gone} of the run's {len(then)} patches are gone from here on")


def check_same_flags(folder, now, before, may_change):
    """Raises ValueError if {flag: value} differ, other than in flags that may change."""
    changed = []  # a fork may add and drop flags: what one side does not know is not compared
    for name in sorted(now.keys() & before.keys() - set(may_change)):
        if now[name] != before[name]:
            changed.append(f"--{name.replace('_', '-')} {now[name]} (was {before[name]})")
    if changed:
        raise ValueError(
            f"{folder} holds another run: {', '.join(changed)}. Give the same flags to "
            "resume it, or another --out"
        )


class Log:
    """log.jsonl up to a step, a JSON line at a time. Ranks other than 0 neither write nor print."""

    def __init__(self, folder, until, rank):
        self.path = Path(folder, "log.jsonl")
        self.lines = []
        self.silent = rank > 0
        say = (lambda text: None) if self.silent else print
        content = self.path.read_bytes() if until and self.path.exists() else b""
        if until and not content:
            say(f"{self.path} is gone: a new one begins after step {until}")
        for number, line in enumerate(content.split(b"\n")[:-1], 1):  # a kill leaves half a line
            try:
                line = json.loads(line)
                if line["step"] <= until:  # later lines are written anew
                    self.lines.append(line)
            except (ValueError, TypeError, KeyError):
                say(f"{self.path}, line {number}, is damaged and left out")
        if not self.silent:
            kept = "".join(json.dumps(line) + "\n" for line in self.lines).encode()
            write_whole(self.path, lambda file: file.write(kept))

    def write(self, **line):
        """Appends a line, flushed to disk before the checkpoint that it describes."""
        self.lines.append(line)
        if not self.silent:
            with open(self.path, "a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def has_probe(self, step):
        """Whether the probe after a step is in the log."""
        return any("probe" in line for line in self.lines if line["step"] == step)

    def probes(self):
        """{"step N": result} of the first and the last kNN probe."""
        probes = [line for line in self.lines if line.get("probe")]
        return {f"step {line['step']}": line["probe"] for line in [*probes[:1], *probes[-1:]]}
