"""What the commands share: to join the processes of torchrun, to say which of them is missing when
one is, and to say what a user did wrong."""

import os
import sys
import time
import warnings
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist


@contextmanager
def user_errors():
    """Turns a user's mistake, as ValueError or OSError, into a line `error: ...` and exit code 2.

    `python -X dev` shows the traceback. Of several processes rank 0 speaks first.
    """
    try:
        yield
    except (ValueError, OSError, FloatingPointError) as error:
        if sys.flags.dev_mode:
            raise
        if os.environ.get("RANK", "0") != "0":
            time.sleep(2)  # if all made the same mistake, torchrun ends this process meanwhile
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit("stopped") from None


@contextmanager
def processes(timeout):
    """Join the processes of torchrun, if there are any. Yields (rank, world size, device).

    A process that is dead, stopped or stuck makes the others fail within `timeout` seconds. On
    gloo, the error says which rank it is.
    """
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
    try:
        yield rank, world, device
    except RuntimeError as error:  # as a collective raises, among others
        missing = who_is_missing(store, rank, world)
        if not missing:
            raise
        raise RuntimeError(f"{missing} is dead, stopped or stuck: see what it said") from error
    finally:
        dist.destroy_process_group()


def who_is_missing(store, rank, world, seconds=5):
    """The ranks that do not report in the store that all share, as a text; "" if all do."""
    try:
        store.set(f"rank {rank} reports", "")
        time.sleep(seconds)
        reports = [store.check([f"rank {other} reports"]) for other in range(world)]
    except RuntimeError:  # the store went with the process that kept it
        return "rank 0"
    return ", ".join(f"rank {other}" for other in range(world) if not reports[other])
