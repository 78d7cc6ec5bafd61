"""What goes wrong in a long run: kills, full disks, numbers that are not finite, hanging ranks."""

import builtins
import contextlib
import errno
import glob
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.multiprocessing as mp
from conftest import ROOT, newest
from test_distributed import free_port
from test_train import log_of, weights_of

import train
from data import hierarchical_batch, read_cohort
from tools.processes import user_errors
from tools.runs import (
    checkpoints,
    lock_folder,
    newest_checkpoint,
    save_checkpoint,
    write_whole,
)


def out_of(flags):
    return flags[len(flags) - flags[::-1].index("--out")]


def _main(flags, rank, world, port, trouble):
    """Runs train.py on one rank, with its output in OUT-RANK.txt. trouble(rank) is called first."""
    sys.path.insert(0, ROOT)
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    with open(f"{out_of(flags)}-{rank}.txt", "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.argv = ["train.py", *flags]
    if trouble:
        trouble(rank)
    try:
        with user_errors():
            train.main()
    except Exception:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)


def start(flags, world=1, trouble=None):
    """Starts the ranks of a run, each in a process that has already imported everything."""
    port, context = free_port(), mp.get_context("forkserver")
    ranks = [
        context.Process(target=_main, args=(flags, rank, world, port, trouble))
        for rank in range(world)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def end(ranks, timeout=120):
    """Waits for the ranks; returns their exit codes."""
    for rank in ranks:
        rank.join(timeout)
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    return codes


def words(flags, rank=0):
    with open(f"{out_of(flags)}-{rank}.txt") as file:
        return file.read()


def steps_in(out):
    """The number of steps in the log."""
    try:
        with open(os.path.join(out, "log.jsonl")) as file:
            return sum(line.startswith('{"step"') and '"loss"' in line for line in file)
    except FileNotFoundError:
        return 0


def wait_for(condition, ranks, timeout=60):
    """Whether the condition came true while all ranks were alive."""
    until = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > until or not all(rank.is_alive() for rank in ranks):
            return False
        time.sleep(0.0005)
    return True


# ------------------------------------------------------------------------------------------- killed


def half_written(out):
    found = set()
    for path in glob.glob(f"{out}/step-*.part"):
        with contextlib.suppress(FileNotFoundError):  # finished in the meantime
            found.add((path, os.path.getmtime(path)))
    return found


def kill_and_go_on(flags, tmp_path, world, moments, seed):
    """Kills a run with kill -9 at each of the moments, then lets it finish.

    Returns (flags of the run, flags of an undisturbed run, number of kills that left a half-written
    checkpoint).
    """
    whole, broken = ([*flags, "--out", str(tmp_path / name)] for name in ("whole", "broken"))
    reference = start(whole, world)
    rng, out, halves = random.Random(seed), out_of(broken), set()
    for moment in moments:
        ranks, before = start(broken, world), steps_in(out)
        if moment == "starting":
            time.sleep(rng.uniform(0, 1.5))
        elif moment == "training":
            wait_for(lambda: steps_in(out) > before, ranks)  # noqa: B023
            time.sleep(rng.uniform(0, 0.3))
        elif moment == "checkpointing":
            wait_for(lambda known=halves: half_written(out) - known, ranks)
            time.sleep(rng.uniform(0, 0.03))
        for rank in rng.sample(ranks, world):
            rank.kill()
        end(ranks)
        halves |= half_written(out)
    assert end(start(broken, world)) == [0] * world, words(broken)
    assert end(reference) == [0] * world, words(whole)
    return broken, whole, len(halves)


def assert_same(a, b):
    assert len(log_of(out_of(a))) > 2
    assert log_of(out_of(a)) == log_of(out_of(b))  # losses, gradient norms and the kNN probes
    a, b = (torch.load(newest(out_of(flags)), weights_only=True) for flags in (a, b))
    assert a["model"].keys() == b["model"].keys()
    assert all(torch.equal(value, b["model"][name]) for name, value in a["model"].items())
    for i, state in a["optimizer"]["state"].items():
        assert all(
            torch.equal(value, b["optimizer"]["state"][i][name]) for name, value in state.items()
        )


LIGHT = ["--draw", "2,1,1", "--save-every", "1", "--probe-every", "0"]


@pytest.mark.parametrize("world", [1, 2])
def test_kill_9_loses_nothing_and_changes_nothing(flags, tmp_path, world):
    moments = ["training", "checkpointing", "training"]
    broken, whole, _ = kill_and_go_on(
        [*flags, *LIGHT, "--steps", "12"], tmp_path, world, moments, seed=world
    )
    assert_same(broken, whole)
    assert words(broken).count("hlss from step") > 2


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_kill_9_at_20_moments(flags, tmp_path, world):
    moments = ["starting"] * 3 + ["training"] * 7 + ["checkpointing"] * 10
    random.Random(world).shuffle(moments)
    flags = [*flags, *LIGHT, "--steps", "60", "--probe-every", "20"]
    broken, whole, halves = kill_and_go_on(flags, tmp_path, world, moments, seed=world)
    print(f"{world} processes: {halves} of 20 kills left a half-written checkpoint")
    assert halves >= 3
    assert_same(broken, whole)


def test_another_number_of_processes_goes_on(flags):
    """A run on one process resumes on two. test_distributed.py checks that the batches stay the
    same."""
    assert end(start([*flags, *LIGHT, "--steps", "6"])) == [0]
    os.remove(newest(out_of(flags)))  # back to step 5
    assert end(start([*flags, *LIGHT, "--steps", "6"], world=2)) == [0, 0], words(flags)
    assert "hlss from step 5 on 2" in words(flags)
    assert [line["step"] for line in log_of(out_of(flags))] == [0, 1, 2, 3, 4, 5, 6, 6]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_finishes_the_step_and_saves(flags, number):
    """On two processes, one of which gets the signal."""
    flags = [*flags, *LIGHT, "--steps", "100000", "--save-every", "100000"]
    ranks = start(flags, world=2)
    assert wait_for(lambda: steps_in(out_of(flags)) > 2, ranks), words(flags)
    os.kill(ranks[1].pid, number)
    assert end(ranks) == [train.STOPPED] * 2, words(flags)
    _, saved = checkpoints(out_of(flags)).values()  # the start and this one
    assert torch.load(saved, weights_only=True)["step"] == log_of(out_of(flags))[-1]["step"]


# -------------------------------------------------------------------------------------- checkpoints


class Malice:
    def __reduce__(self):
        return os.mkdir, (os.environ["MALICE"],)


def damage(path, how):
    with open(path, "rb") as file:
        content = bytearray(file.read())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "empty":
        content = b""
    elif how == "one bit":
        content[len(content) // 2] ^= 1  # in a tensor: torch.load alone would accept it
    with open(path, "wb") as file:
        file.write(content)
    if how == "malicious":
        torch.save({"step": 4, "model": Malice()}, path)


@pytest.mark.parametrize("how", ["truncated", "empty", "one bit", "malicious"])
def test_a_damaged_checkpoint_is_reported_and_not_used(tmp_path, how, capsys, monkeypatch):
    monkeypatch.setenv("MALICE", str(tmp_path / "executed"))
    for step in (2, 4):
        save_checkpoint(tmp_path, {"step": step, "model": {"weight": torch.arange(1000.0)}})
    damage(tmp_path / "step-0000004.pt", how)
    assert newest_checkpoint(tmp_path)["step"] == 2
    assert "step-0000004.pt is damaged" in capsys.readouterr().out
    assert not (tmp_path / "executed").exists()
    damage(tmp_path / "step-0000002.pt", how)
    with pytest.raises(ValueError, match=r"no checkpoint in .* is intact"):
        newest_checkpoint(tmp_path)


def test_a_run_goes_on_from_before_the_damage(flags, tmp_path, capsys):
    train.train(train.parse_config(flags))
    whole, lines = weights_of(out_of(flags)), log_of(out_of(flags))
    damage(newest(out_of(flags)), "one bit")
    train.train(train.parse_config(flags))
    assert "hlss from step 2" in capsys.readouterr().out
    assert all(torch.equal(value, whole[name]) for name, value in weights_of(out_of(flags)).items())
    assert log_of(out_of(flags)) == lines


def test_the_newest_two_checkpoints_are_kept(tmp_path):
    """And the start. Files that are not exactly ours are neither removed nor resumed from."""
    strange = ["step-best.pt", "step-0000002 (copy).pt", "step-2.pt", "step-0000001.pt.7.bak"]
    strange += ["step-best.pt.12.part", "other.part"]
    for name in strange:
        (tmp_path / name).write_bytes(b"mine")
    for step in range(5):
        save_checkpoint(tmp_path, {"step": step})
    (tmp_path / "step-0000009.pt.77.part").write_bytes(b"of a process that was killed")
    lock_folder(str(tmp_path)).close()
    ours = [f"step-000000{step}.pt" for step in (0, 3, 4)]
    assert sorted(os.listdir(tmp_path)) == sorted([*ours, *strange, "lock"])
    assert newest_checkpoint(tmp_path)["step"] == 4
    shutil.copy(tmp_path / "step-0000003.pt", tmp_path / "step-0000008.pt")  # another step's name
    assert newest_checkpoint(tmp_path)["step"] == 4


def test_ranks_that_see_different_checkpoints_are_told(flags, monkeypatch):
    # As if the other of two ranks found no checkpoint.
    monkeypatch.setattr(train, "average", lambda numbers, device: {"step": numbers["step"] / 2})
    monkeypatch.setattr(train.runs, "newest_checkpoint", lambda folder: {"step": 4})
    with pytest.raises(ValueError, match="use a shared disk"):
        train.resume(train.parse_config(flags), {}, torch.nn.Linear(1, 1), None, {}, None)


def test_a_full_disk_leaves_the_checkpoint_before(flags, tmp_path):
    """On a tmpfs with room for two and a half checkpoints, in its own mount namespace."""
    out, kept = tmp_path / "small", tmp_path / "kept"
    out.mkdir()
    kept.mkdir()
    if subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", out], capture_output=True
    ).returncode:
        pytest.skip("this machine lets no one mount a tmpfs")
    state = torch.load(flags[flags.index("--clip") + 1], weights_only=True)["state_dict"]
    weights = sum(value.nbytes for name, value in state.items() if name.startswith("visual."))
    run = [sys.executable, "train.py", *flags, *LIGHT, "--out", str(out), "--steps", "8"]
    script = (
        'mount -t tmpfs -o size="$1" tmpfs "$2"; out="$2" kept="$3"; shift 3; "$@"; code=$?; '
        'cp "$out"/* "$kept"; exit $code'
    )
    size = int(2.5 * 3 * weights)  # weights and AdamW's two moments
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", str(size), out, kept, *run],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "step-0000003.pt cannot be written" in done.stderr
    assert "No space left on device" in done.stderr
    assert sorted(path.name for path in kept.glob("step*")) == [
        "step-0000000.pt",
        "step-0000001.pt",
        "step-0000002.pt",
    ]
    shutil.copytree(kept, out_of(flags))  # with enough room, the run resumes
    train.train(train.parse_config([*flags, *LIGHT, "--steps", "8"]))
    assert log_of(out_of(flags))[-1]["step"] == 8


def test_a_read_only_folder_is_not_a_full_disk(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError("Permission denied")

    monkeypatch.setattr(builtins, "open", refuse)
    with pytest.raises(OSError, match=r"x\.json cannot be written \(Perm.*: check the folder"):
        write_whole(str(tmp_path / "x.json"), None)


# -------------------------------------------------------------------------- resuming another thing


SPOILS = {  # what the error must say: what we do to the lines of manifest.csv
    "is not the cohort of .*: 120 patches are new .*: images/high_grade-00/0-0.png": lambda lines: [
        re.sub("train|val", lambda m: {"train": "val", "val": "train"}[m[0]], x) for x in lines
    ],
    "6 patches are new or renamed, .*: images/normal-04/0-0.png": lambda lines: [
        line.replace(",normal-04,", ",nobody,") for line in lines
    ],
    "lists the patches of .* in another order": lambda lines: [
        lines[0],
        lines[2],
        lines[1],
        *lines[3:],
    ],
    "30 patches are new .* or label: images/spindle-00/0-0.png": lambda lines: [
        line.replace(",spindle,", ",round,") for line in lines
    ],
}


@pytest.mark.parametrize("said", SPOILS)
def test_another_cohort_is_not_resumed(flags, cohort_folder, tmp_path, said):
    folder = tmp_path / "elsewhere"
    shutil.copytree(cohort_folder, folder)
    flags = [*flags, "--probe-every", "0"]
    train.train(train.parse_config([*flags, "--steps", "1"]))
    moved = train.parse_config([*flags, "--steps", "1", "--data", str(folder)])
    assert train.train(moved)  # the same cohort in another folder is accepted
    header, *lines = (folder / "manifest.csv").read_text().splitlines()
    (folder / "manifest.csv").write_text("\n".join([header, *SPOILS[said](lines)]))
    with pytest.raises(ValueError, match=said):
        train.train(train.parse_config([*flags, "--steps", "1", "--data", str(folder)]))


def test_a_run_goes_on_without_patches_that_were_taken_out(flags, cohort_folder, tmp_path, capsys):
    folder = shutil.copytree(cohort_folder, tmp_path / "elsewhere")
    flags = [*flags, "--probe-every", "0", "--data", str(folder)]
    train.train(train.parse_config([*flags, "--steps", "1"]))
    lines = (folder / "manifest.csv").read_text().splitlines()
    (folder / "manifest.csv").write_text("\n".join([*lines[:3], *lines[5:]]))
    assert train.train(train.parse_config([*flags, "--steps", "2"]))
    assert "2 of the run's 120 patches are gone from here on" in capsys.readouterr().out


def test_a_run_goes_on_in_a_fork_with_another_flag_and_back(flags, monkeypatch):
    flags = [*flags, "--probe-every", "0"]
    train.train(train.parse_config([*flags, "--steps", "1"]))

    @dataclass
    class Forked(train.Config):
        entropy_weight: float = train.flag(0.0, "of a term of the fork's")

    with monkeypatch.context() as fork:
        fork.setattr(train, "Config", Forked)
        forked = [*flags, "--steps", "2", "--entropy-weight"]
        assert train.train(train.parse_config([*forked, "0.1"]))
        with pytest.raises(ValueError, match=r"--entropy-weight 0\.2 \(was 0\.1\)"):
            train.train(train.parse_config([*forked, "0.2"]))
    assert train.train(train.parse_config([*flags, "--steps", "3"]))


def test_a_disk_without_locks_is_warned_of_and_trained_on(flags, monkeypatch):
    def no_locks(*arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with pytest.warns(UserWarning, match="cannot be locked .*No locks available"):
        assert train.train(train.parse_config([*flags, "--steps", "1"]))


def test_signal_handlers_are_given_back_and_a_thread_can_train(flags, tmp_path):
    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1
    before = [signal.getsignal(number) for number in numbers]
    train.train(train.parse_config([*flags, "--steps", "1"]))
    assert before == [signal.getsignal(number) for number in numbers]
    config = train.parse_config([*flags, "--steps", "1", "--out", str(tmp_path / "thread")])
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train.train, config).result()


def test_two_trainings_in_one_folder_are_refused(flags):
    out = out_of(flags)
    os.makedirs(out)
    lock = lock_folder(out)
    message = f"process {os.getpid()} on .* is training in {out}: wait for it, or give another"
    with pytest.raises(ValueError, match=message):
        train.train(train.parse_config(flags))
    lock.close()  # as the kernel does when a process exits
    assert train.train(train.parse_config(flags))


def test_the_log_is_on_the_disk_before_the_checkpoint_that_it_describes(flags, monkeypatch):
    fsync = os.fsync
    synced = []

    def spy(descriptor):
        synced.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    train.train(train.parse_config([*flags, "--save-every", "1"]))
    checkpoint = [i for i, name in enumerate(synced) if name.startswith("step-")]
    assert len(checkpoint) == 5  # the first is the start, when there is nothing to log yet
    assert all(synced[i - 1] == "log.jsonl" for i in checkpoint[1:-1])


def test_what_is_missing_or_damaged_in_the_log_is_said(flags, capsys):
    config = train.parse_config(flags)
    train.train(config)
    path = os.path.join(config.out, "log.jsonl")
    with open(path) as file:
        lines = file.read().splitlines()
    with open(path, "w") as file:
        file.write("\n".join([*lines[:2], "\0\0\0", *lines[4:]]) + "\n")
    train.train(train.parse_config(flags))
    said = capsys.readouterr().out
    assert "log.jsonl, line 3, is damaged and left out" in said
    os.remove(path)
    train.train(train.parse_config(flags))
    assert "log.jsonl is gone: a new one begins after step 4" in capsys.readouterr().out


@pytest.mark.parametrize("backbone", ["mobilenet_v3_small", "convnext_tiny"])
def test_dropout_and_stochastic_depth_resume_bit_by_bit(flags, backbone):
    """Their random masks depend only on seed, step and rank."""
    flags = [*flags, *LIGHT, "--backbone", backbone, "--image-size", "32", "--patients", "2"]
    train.train(train.parse_config(flags))
    whole = weights_of(out_of(flags))
    os.remove(newest(out_of(flags)))  # back to step 3
    torch.manual_seed(123)
    train.train(train.parse_config(flags))
    assert all(torch.equal(value, whole[name]) for name, value in weights_of(out_of(flags)).items())


def test_a_signal_ends_a_probe_that_the_resumed_run_begins_again(flags, tmp_path, monkeypatch):
    flags = [*flags, "--probe-every", "2"]
    train.train(train.parse_config([*flags, "--out", str(tmp_path / "whole")]))
    embed = train.embed
    calls = []

    def interrupted(*arguments, stop, **options):
        calls.append(stop)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return embed(*arguments, stop=stop, **options)

    monkeypatch.setattr(train, "embed", interrupted)
    assert not train.train(train.parse_config(flags))
    assert [line["step"] for line in log_of(out_of(flags))] == [0, 1, 2]
    assert train.train(train.parse_config(flags))
    assert log_of(out_of(flags)) == log_of(tmp_path / "whole")


# ------------------------------------------------------------------------------------------ numbers


def test_a_loss_that_is_not_finite_ends_the_run(flags):
    message = "step 2: loss is nan, hvc_patch is nan.* last checkpoint is kept; .* a lower --lr"
    with pytest.raises(FloatingPointError, match=message):
        train.train(train.parse_config([*flags, "--lr", "1e30"]))
    assert list(checkpoints(out_of(flags))) == [0]


def test_a_clip_that_is_not_finite_does_not_blame_the_rate(flags, tmp_path):
    clip = torch.load(flags[flags.index("--clip") + 1], weights_only=True)
    clip["state_dict"]["visual.conv1.weight"][:] = float("nan")
    torch.save(clip, tmp_path / "clip.pt")
    with pytest.raises(FloatingPointError, match=r"step 1: .* check the CLIP, the bank and the"):
        train.train(train.parse_config([*flags, "--clip", str(tmp_path / "clip.pt")]))


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(flags, monkeypatch):
    """The loss is finite but its gradient is 0 / 0: noticed before the step, naming the batch."""
    hvc = train.hvc
    calls = []

    def poisoned(projections, *arguments):
        terms = hvc(projections, *arguments)
        calls.append(terms)
        if len(calls) == 4:
            terms["hvc_patch"] = terms["hvc_patch"] + (0 * projections["patch"]).sum().sqrt()
        return terms

    monkeypatch.setattr(train, "hvc", poisoned)
    config = train.parse_config([*flags, "--steps", "6", "--save-every", "3", "--probe-every", "0"])
    with pytest.raises(FloatingPointError, match="step 4: gradient_norm is nan") as error:
        train.train(config)
    assert list(checkpoints(config.out)) == [0, 3]
    assert all(torch.isfinite(value).all() for value in weights_of(config.out).values())
    cohort = read_cohort(config.data).restrict("train")
    paths = {cohort.path(row) for row in hierarchical_batch(cohort, 4, config.seed, 4).ravel()}
    assert sum(path in str(error.value) for path in paths) == 3  # some patches of its batch


# -------------------------------------------------------------------------------------------- hangs


def hang(rank):
    """Rank 1 never gets the batch of step 4."""
    load_views = train.load_views

    def hanging(*arguments, **options):
        for step, batch in enumerate(load_views(*arguments, **options), 1):
            if rank == 1 and step == 4:
                time.sleep(1000)
            yield batch

    train.load_views = hanging


def run_out_of_memory(rank):
    """Rank 1 has no memory for step 4."""
    load_views = train.load_views

    def short(*arguments, **options):
        for step, batch in enumerate(load_views(*arguments, **options), 1):
            if rank == 1 and step == 4:
                raise torch.OutOfMemoryError("CUDA out of memory")
            yield batch

    train.load_views = short


def slow_down(module, name, rank):
    """The first call of a function takes 15 seconds longer on rank 0."""
    module = sys.modules[module]
    function = getattr(module, name)

    def slow(*arguments, **options):
        setattr(module, name, function)
        if rank == 0:
            time.sleep(15)
        return function(*arguments, **options)

    setattr(module, name, slow)


SLOW = {
    "checkpoint": partial(slow_down, "tools.runs", "save_checkpoint"),
    "embedding": partial(slow_down, "train", "embed"),
    "kNN": partial(slow_down, "evaluate", "knn"),
    "metrics": partial(slow_down, "evaluate", "assess"),
}


def test_what_rank_0_does_alone_may_take_longer_than_the_timeout(flags, tmp_path):
    """Four jobs of two processes each, at the same time."""
    jobs = []
    for name, trouble in SLOW.items():
        mine = [*flags, "--out", str(tmp_path / name), "--steps", "2", "--timeout", "10"]
        jobs.append((mine, start(mine, world=2, trouble=trouble)))
    for mine, ranks in jobs:
        assert end(ranks) == [0, 0], words(mine)


def test_out_of_memory_is_said_by_the_rank_that_ran_out_with_what_to_lower(flags):
    mine = [*flags, *LIGHT, "--timeout", "10"]
    assert end(start(mine, world=2, trouble=run_out_of_memory)) == [1, 2]
    remedy = "Lower --patients, --draw or --image-size, or use more processes"
    assert words(mine, 1).endswith(f"error: CUDA out of memory. {remedy}\n")
    assert "dead, stopped or stuck: rank 1; see its output" in words(mine)


def test_a_rank_that_dies_stops_or_hangs_is_named(flags, tmp_path):
    """Three jobs of two processes at the same time; in each, rank 0 ends within the timeout."""
    jobs = {}
    for what in ("dies", "stops", "hangs"):
        mine = [*flags, *LIGHT, "--out", str(tmp_path / what), "--steps", "100000"]
        mine += ["--timeout", "10"]
        jobs[what] = mine, start(mine, world=2, trouble=hang if what == "hangs" else None)
    for what, (mine, ranks) in jobs.items():
        alive = ranks if what != "hangs" else []
        assert wait_for(lambda: steps_in(out_of(mine)) >= 3, alive), words(mine)  # noqa: B023
        if what != "hangs":
            os.kill(ranks[1].pid, signal.SIGKILL if what == "dies" else signal.SIGSTOP)
    since = time.monotonic()
    for what, (mine, ranks) in jobs.items():
        (code,) = end(ranks[:1], timeout=60)
        end(ranks[1:], timeout=0)
        assert time.monotonic() - since < 10 + 5 + 15  # the 15 allow for a busy machine
        assert code == 1, what
        assert "dead, stopped or stuck: rank 1" in words(mine), words(mine)
