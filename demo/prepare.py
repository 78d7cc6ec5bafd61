"""What the demo needs before it can train: its tissue and its small CLIP, made on first use."""

import os
import shutil

from demo.clip import train_demo_clip
from demo.tissue import write_demo

CACHE = os.path.join("runs", "cache")
TOLD = ["cellularity", "nuclear_size", "vessels", "necrosis"]


def made_once(path, make):
    """The path of a file or folder, made by make(path) unless it exists.

    If make() is interrupted, nothing appears at the path. If several processes make it at once, all
    use the one that is finished first.
    """
    if os.path.exists(path):
        return path
    mine = f"{path}.{os.getpid()}.part"
    try:
        make(mine)
        os.rename(mine, path)
    except OSError:
        if not os.path.exists(path):  # unless another process was faster
            raise
    finally:
        if os.path.isdir(mine):
            shutil.rmtree(mine)
        elif os.path.exists(mine):
            os.remove(mine)
    return path


def demo_tissue():
    """The folder of the demo's cohort."""
    return cached("tissue", write_demo)


def demo_clip():
    """The path of the demo's CLIP. Its captions describe only part of what tissue shows, so it
    knows tissue only in part, like a CLIP trained on photos."""
    return cached("clip.pt", lambda path: train_demo_clip(path, factors=TOLD))


def cached(name, make):
    """The path of a file or folder in runs/cache, made on first use, with a message."""
    path = os.path.join(CACHE, name)
    if not os.path.exists(path):
        print(f"making the demo's {name}, once, in {CACHE}")
        os.makedirs(CACHE, exist_ok=True)
    return made_once(path, make)
