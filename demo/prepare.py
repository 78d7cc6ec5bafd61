"""What the demo needs before it can train: its tissue and its small CLIP, made on first use."""

import os
import shutil

from demo.clip import train_demo_clip
from demo.tissue import write_demo


def made_once(path, make):
    """The path of a file or folder, made by make(path) unless it is there.

    It appears whole. Where several processes make it at once, all take that of the first.
    """
    if not os.path.exists(path):
        mine = f"{path}.{os.getpid()}.part"
        make(mine)
        try:
            os.rename(mine, path)
        except OSError:  # a folder that another process has put there meanwhile
            shutil.rmtree(mine)
    return path


def demo_tissue(cache):
    """The folder of the demo's cohort, in the folder `cache`."""
    return made_once(os.path.join(cache, "tissue"), write_demo)


def demo_clip(cache):
    """The path of the demo's CLIP, in the folder `cache`."""
    return made_once(os.path.join(cache, "clip.pt"), train_demo_clip)
