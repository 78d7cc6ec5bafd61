"""What a run keeps on disk: whole files, a lock, checkpoints, a log; and if it is the same run.

RUN/config.json         the settings, and what it takes to repeat the run
RUN/log.jsonl           a line of numbers every few steps
RUN/step-0000000.pt     the start of training, without an optimizer
RUN/step-0000400.pt     the newest checkpoint, and the one before it
"""

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

import numpy as np
import torch

OUR_PARTS = re.compile(r"(step-\d{7,}\.pt|log\.jsonl|config\.json)\.\d+\.part")


def write_whole(path, write):
    """Writes a file by write(file), completely or not at all. Raises OSError."""
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
        remedy = "make room and start again" if "space" in str(error) else "look at the folder"
        raise OSError(f"{path} cannot be written ({error}): {remedy}") from error


def write_json(path, value):
    """Writes a value as JSON, completely or not at all."""
    content = json.dumps(value, indent=1).encode()
    write_whole(path, lambda file: file.write(content))


def read_whole(path, remedy="take the one before"):
    """What torch.save wrote to a file, on the CPU. Raises ValueError, with its name, if damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()  # torch.load does not look at the checksums
        if member:
            raise ValueError(f"wrong checksum of {member}")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever zip, pickle and torch make of a damaged file
        raise ValueError(f"{path} is damaged, or another file ({error}): {remedy}") from error


def lock_folder(folder):
    """A file lock on a run's folder, which is made; released when the file is closed.

    Removes our own unfinished files. Raises ValueError if another process trains here.
    """
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
        warnings.warn(f"{folder} cannot be locked ({error}): train there once", stacklevel=2)
        return lock
    lock.truncate(0)
    lock.write(f"{os.getpid()} on {socket.gethostname()}")
    lock.flush()
    for name in os.listdir(folder):
        if OUR_PARTS.fullmatch(name):  # of a process that was killed
            os.remove(os.path.join(folder, name))
    return lock


def command_line(world):
    """What was typed to start this, as one line."""
    launcher = f"torchrun --nproc_per_node={world}" if world > 1 else "python"
    return f"{launcher} {shlex.join(sys.argv)}"


def describe(folder, settings, world, device):
    """Writes config.json: the settings, and what else it takes to repeat the run."""
    here = os.path.dirname(os.path.abspath(__file__))
    git = "git describe --always --dirty --abbrev=40".split()
    try:
        commit = subprocess.run(git, cwd=here, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        commit = ""
    about = {"command": command_line(world), "commit": commit, "processes": world}
    about |= {"device": device.type, "python": sys.version.split()[0]}
    about |= {name: version(name) for name in ("torch", "numpy", "pillow")}
    write_json(os.path.join(folder, "config.json"), settings | about)


# ----------------------------------------------------------------------------------- checkpoints


def checkpoint_path(folder, step):
    """Where the checkpoint of a step is."""
    return os.path.join(folder, f"step-{step:07d}.pt")


def checkpoints(folder):
    """{step: path} of the checkpoints that train.py wrote to a folder, in the order of steps."""
    steps = []
    for path in glob.glob(os.path.join(glob.escape(folder), "step-*.pt")):
        number = os.path.basename(path)[5:-3]
        if number.isascii() and number.isdigit() and path == checkpoint_path(folder, int(number)):
            steps.append(int(number))
    return {step: checkpoint_path(folder, step) for step in sorted(steps)}


def save_checkpoint(folder, checkpoint):
    """Writes step-N.pt, N = checkpoint["step"]; keeps it, the one before and the start."""
    step = checkpoint["step"]
    write_whole(checkpoint_path(folder, step), lambda file: torch.save(checkpoint, file))
    for old in [n for n in checkpoints(folder) if 0 < n < step][:-1]:
        os.remove(checkpoint_path(folder, old))


def newest_checkpoint(folder):
    """The newest checkpoint that is whole, reporting those that are not; {"step": 0} in a new run.

    Raises ValueError if there are some and none is whole: starting anew would cost the log.
    """
    paths = checkpoints(folder)
    start = paths.pop(0, None)
    for step, path in reversed(paths.items()):
        try:
            checkpoint = read_whole(path)
            if checkpoint.get("step") == step:
                return checkpoint
            print(f"{path} holds step {checkpoint.get('step')}: take the one before")
        except ValueError as error:
            print(error)
    if paths:
        raise ValueError(f"no checkpoint in {folder} is whole: restore one, or give another --out")
    return read_whole(start) if start else {"step": 0}


# ----------------------------------------------------------------------------- is it the same run


def cohort_hashes(cohort):
    """{"patches": [n] int64, "train_patients": [names' hashes]}, for comparing cohorts later.

    A patch's hash is of its path, groups, split and label, but not of where the folder is.
    """
    patches = np.empty(len(cohort), np.int64)
    last = None
    for row in range(len(cohort)):
        slide = cohort.parents[0][row]
        if slide != last:
            place = "\n".join([*cohort.groups_of(row), str(cohort.split[row])]).encode()
            last = slide
        label = cohort.classes[cohort.label[row]].encode() if cohort.label[row] >= 0 else b""
        patches[row] = _hash64(b"\n".join([cohort.names[row], place, label]))
    train = np.unique(cohort.patient[cohort.split == 0])
    names = [cohort.group_names[-1][patient] for patient in train]
    return {
        "patches": torch.from_numpy(patches),
        "train_patients": torch.tensor([_hash64(name.encode()) for name in names]),
    }


def _hash64(content):
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "big", signed=True)


def trained_on(cohort, patients, hashes):
    """How many of some patients (ids) of a cohort a run was trained on, by `cohort_hashes`."""
    known = set(hashes["train_patients"].tolist())
    return sum(_hash64(cohort.group_names[-1][p].encode()) in known for p in patients)


def check_same_cohort(folder, cohort, hashes, before):
    """Prints how many patches are gone; raises ValueError where some are new or changed."""
    now, then = hashes["patches"].numpy(), before["patches"].numpy()
    new = ~np.isin(now, then)
    if not new.any() and (then[np.isin(then, now)] != now).any():
        raise ValueError(
            f"{cohort.root} lists the patches of {folder} in another order: restore it"
        )
    if new.any():
        raise ValueError(
            f"{cohort.root} is not the cohort of {folder}: {new.sum()} patches are new or renamed, "
            f"or have another slide, patient, split or label: {cohort.name(new.argmax())}, ...: "
            "restore the manifest, or give another --out to start anew"
        )
    if len(then) > len(now):
        print(
            f"note: {len(then) - len(now)} of the run's {len(then)} patches are gone from here on"
        )


def check_same_flags(folder, now, before, may_change):
    """Raises ValueError unless the flags that affect the result match. {flag: value} each.

    A flag that either side does not know is not compared, so that a fork may add and drop flags.
    """
    changed = []
    for name in now.keys() & before.keys() - set(may_change):
        if now[name] != before[name]:
            changed.append(f"--{name.replace('_', '-')} {now[name]} (there: {before[name]})")
    if changed:
        raise ValueError(
            f"{folder} holds another run: {', '.join(sorted(changed))}. Give the same flags to go "
            "on with it, or another --out to start anew"
        )


# -------------------------------------------------------------------------------------------- log


class Log:
    """log.jsonl, one JSON line at a time. Every rank knows it; only rank 0 writes and prints.

    Opening it drops what a killed run wrote after its last checkpoint, of step `until`.
    """

    def __init__(self, folder, until, rank):
        self.path = os.path.join(folder, "log.jsonl")
        self.lines = []
        self.silent = rank > 0
        content = b""
        if until and os.path.exists(self.path):
            with open(self.path, "rb") as file:
                content = file.read()
        elif until and not self.silent:
            print(f"{self.path} is gone: a new one begins after step {until}")
        for number, line in enumerate(content.split(b"\n")[:-1], 1):  # a kill leaves half a line
            try:
                line = json.loads(line)
                if line["step"] <= until:
                    self.lines.append(line)
            except (ValueError, TypeError, KeyError):
                if not self.silent:
                    print(f"{self.path}, line {number}, is damaged and left out")
        if not self.silent:
            kept = "".join(json.dumps(line) + "\n" for line in self.lines).encode()
            write_whole(self.path, lambda file: file.write(kept))

    def write(self, **line):
        """Appends a line, on the disk before the checkpoint that it describes."""
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
