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

import torch
import torch.distributed as dist

_patient = None  # the group of all processes that waits for as long as it takes
_store = None  # what all processes share
_turn = 0  # of from_first()


@contextmanager
def user_errors():
    """Turns a user's mistake, as ValueError or OSError, into a line `error: ...` and exit code 2.

    `python -X dev` shows the traceback. Of several processes rank 0 speaks first.
    """
    try:
        yield
    except (ValueError, OSError, FloatingPointError, torch.OutOfMemoryError) as error:
        if sys.flags.dev_mode:
            raise
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # if all made the same mistake, torchrun ends this process meanwhile
        if isinstance(error, torch.OutOfMemoryError):
            error = f"{error}. Lower --patients, --draw or --image-size, or use more processes"
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None


@contextmanager
def stop_signals():
    """Yields a list to which SIGTERM, SIGINT and SIGUSR1 (SLURM's warning) are appended.

    The old handlers are restored at the end. Off the main thread the list stays empty.
    """
    signals = []
    names = ("SIGTERM", "SIGINT", "SIGUSR1")  # Windows has no SIGUSR1
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    old = {n: signal.signal(n, lambda number, frame: signals.append(number)) for n in numbers}
    try:
        yield signals
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def processes(timeout):
    """Joins the processes of torchrun, if there are any. Yields (rank, world size, device).

    In a training step, a process that is dead, stopped or stuck makes the others fail within
    `timeout` seconds. On gloo, the error says which rank it is.
    """
    global _patient, _store, _turn
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
        warnings.simplefilter("ignore")  # rank 0 says it for all
    limit = timedelta(seconds=timeout)
    backend = "nccl" if device.type == "cuda" else "gloo"
    store, rank, world = next(dist.rendezvous("env://", timeout=limit))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":  # torchrun's store outlives a restart
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    _patient = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    _store, _turn = store, 0
    try:
        yield rank, world, device
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # as a collective raises, among others
        missing = who_is_missing(store, rank, world)
        if not missing:
            raise
        raise RuntimeError(f"{missing} is dead, stopped or stuck: see what it said") from error
    finally:
        _patient = _store = None
        dist.destroy_process_group()


def from_first(value):
    """Rank 0's value, on every process; the others wait, however long rank 0 takes.

    Through the store, so that rank 0 itself waits for nobody.
    """
    global _turn
    if not dist.is_initialized():
        return value
    if _store is None:  # not joined by processes()
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]
    _turn += 1
    key = f"from first {_turn}"
    if dist.get_rank() == 0:
        _store.set(key, pickle.dumps(value))
        return value
    _store.wait([key], timedelta(days=30))
    return pickle.loads(_store.get(key))


def add_up(x, only_first=False):
    """Sums a CPU tensor over the processes, in place, once all of them have come here.

    only_first: on rank 0 alone, so that the others may forget theirs.
    """
    if dist.is_initialized() and only_first:
        dist.reduce(x, 0, group=_patient)
    elif dist.is_initialized():
        dist.all_reduce(x, group=_patient)
    return x


def average(numbers, device):
    """{name: number} -> the same as floats, each averaged over the processes."""
    values = [torch.as_tensor(value, dtype=torch.float64) for value in numbers.values()]
    values = torch.stack([value.detach().to(device) for value in values])
    if dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return dict(zip(numbers, values.tolist()))


def who_is_missing(store, rank, world, seconds=5):
    """The ranks that do not report in the store that all share, as a text; "" if all do."""
    try:
        store.set(f"rank {rank} reports", "")
        time.sleep(seconds)
        reports = [store.check([f"rank {other} reports"]) for other in range(world)]
    except RuntimeError:  # the store went with the process that kept it
        return "rank 0"
    return ", ".join(f"rank {other}" for other in range(world) if not reports[other])
