"""What the demo needs before it can train: its tissue and its small CLIP, made on first use."""

import os

import torch

from demo.clip import train_demo_clip
from demo.tissue import write_demo

BANK = os.path.join(os.path.dirname(os.path.abspath(__file__)), "attributes.json")


def demo_tissue(cache):
    """The folder of the demo's cohort, written to `cache` if it is not there yet."""
    folder = os.path.join(cache, "demo-tissue")
    if not os.path.exists(os.path.join(folder, "manifest.csv")):
        write_demo(folder)
    return folder


def demo_clip(cache):
    """The path of the demo's CLIP, trained to `cache` if it is not there yet."""
    path = os.path.join(cache, "demo-clip.pt")
    if not os.path.exists(path):
        threads = torch.get_num_threads()
        torch.set_num_threads(os.cpu_count())  # all others only wait for it
        train_demo_clip(path)
        torch.set_num_threads(threads)
    return path
