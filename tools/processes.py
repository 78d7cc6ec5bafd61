"""What the commands share: torchrun's processes, signals, and a user's mistake in one line."""

import os
import pickle
import signal
import sys
import threading
import time
import warnings
from contextlib import contextmanager
from datetime import timedelta
from itertools import count

import torch
import torch.distributed as dist

_patient = None  # a group of all processes without a time limit
_store = None  # the key-value store that all processes share
_turns = count()  # of from_first()


@contextmanager
def user_errors():
    """Turns a user's mistake into one line, `error: ...`; `python -X dev` shows the traceback."""
    try:
        yield
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        if sys.flags.dev_mode:
            raise
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # rank 0 has probably said the same, and torchrun then ends this one
        if isinstance(error, torch.OutOfMemoryError):
            error = f"{error}. Lower --patients, --draw or --image-size, or use more processes"
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None


@contextmanager
def stop_signals():
    """Yields a list to which SIGTERM, SIGINT and SIGUSR1 (SLURM's warning) are appended."""
    signals = []
    may_listen = threading.current_thread() is threading.main_thread()
    names = ("SIGTERM", "SIGINT", "SIGUSR1") if may_listen else ()  # Windows has no SIGUSR1
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    old = {n: signal.signal(n, lambda number, frame: signals.append(number)) for n in numbers}
    try:
        yield signals
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def processes(timeout):
    """Joins torchrun's processes; yields (rank, world size, device). timeout: seconds per step."""
    global _patient, _store
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", 0))
        gpus = torch.cuda.device_count()
        if local >= gpus:
            raise SystemExit(f"more processes than GPUs here: torchrun --nproc_per_node={gpus}")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if world == 1:
        yield rank, world, device
        return

    if rank > 0:
        warnings.simplefilter("ignore")  # rank 0 warns for all
    limit = timedelta(seconds=timeout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store, rank, world = next(dist.rendezvous("env://", timeout=limit))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":  # torchrun's store outlives a restart
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    _patient = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    _store = store
    try:
        yield rank, world, device
    except RuntimeError as error:  # such as a collective that timed out
        if isinstance(error, torch.OutOfMemoryError):
            raise
        missing = who_is_missing(store, rank, world)
        if not missing:
            raise
        raise RuntimeError(f"dead, stopped or stuck: {missing}; see its output") from error
    finally:
        _patient = _store = None
        dist.destroy_process_group()


def from_first(value):
    """Rank 0's value on every process. The others wait as long as it takes; rank 0 never waits."""
    if not dist.is_initialized():
        return value
    if _store is None:  # not joined by processes()
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]
    key = f"from first {next(_turns)}"
    if dist.get_rank() == 0:
        _store.set(key, pickle.dumps(value))
        return value
    _store.wait([key], timedelta(days=30))
    return pickle.loads(_store.get(key))


def add_up(x, only_first=False):
    """Waits for all processes and sums a CPU tensor in place, on rank 0 alone if only_first."""
    if dist.is_initialized() and only_first:
        dist.reduce(x, 0, group=_patient)
    elif dist.is_initialized():
        dist.all_reduce(x, group=_patient)
    return x


def average(numbers, device):
    """{name: number} -> {name: float}, averaged over the processes."""
    values = [torch.as_tensor(value, dtype=torch.float64) for value in numbers.values()]
    values = torch.stack([value.detach().to(device) for value in values])
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return dict(zip(numbers, values.tolist()))


def who_is_missing(store, rank, world, seconds=5):
    """The ranks that do not report to the shared store in time, as text; "" if all do."""
    try:
        store.set(f"rank {rank} reports", "")
        time.sleep(seconds)
        reports = [store.check([f"rank {other} reports"]) for other in range(world)]
    except RuntimeError:  # rank 0 keeps the store
        return "rank 0"
    return ", ".join(f"rank {other}" for other in range(world) if not reports[other])
