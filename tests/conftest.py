"""What the tests share: a small cohort, a small CLIP, a way to run several processes."""

import os
import sys
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run two at a time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
# Importing takes seconds, so new processes are forked from one that has done it.
mp.set_forkserver_preload(["train"])


def manifest(folder, lines, header="path,patient,slide,label"):
    """Writes a manifest.csv and returns its folder. Only decoding needs the image files."""
    folder.mkdir(exist_ok=True)
    (folder / "manifest.csv").write_text("\n".join([header, *lines]) + "\n")
    return str(folder)


@pytest.fixture(scope="session")
def cohort_folder(tmp_path_factory):
    """Demo tissue: 4 classes x 5 patients x 2 slides x 3 patches of 64 pixels. Two of the five
    patients of each class are held out."""
    from demo.tissue import write_demo

    folder = tmp_path_factory.mktemp("cohort")
    return str(write_demo(folder, patients=5, held_out=2, slides=2, patches=3))


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory):
    """The demo's CLIP after four training steps: it works, but knows nothing."""
    from demo.clip import train_demo_clip

    path = str(tmp_path_factory.mktemp("clip") / "clip.pt")
    train_demo_clip(path, steps=4, patches=32, batch=8)
    return path


@pytest.fixture
def flags(cohort_folder, clip_file, tmp_path):
    """The flags of a run that takes seconds."""
    return [
        "--data",
        cohort_folder,
        "--clip",
        clip_file,
        "--bank",
        os.path.join(ROOT, "demo/attributes.json"),
        "--out",
        str(tmp_path / "run"),
        "--patients",
        "4",
        "--steps",
        "4",
        "--save-every",
        "2",
        "--no-amp",
    ]


def _process(rank, world, folder, function, arguments):
    sys.path.insert(0, ROOT)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world
    )
    torch.save(function(rank, world, *arguments), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def on_processes(world, function, *arguments):
    """Runs function(rank, world, *arguments) on `world` gloo processes. Returns the results in the
    order of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _process, (world, folder, function, arguments), nprocs=world, start_method="forkserver"
        )
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]


def newest(run):
    """The path of a run's newest checkpoint."""
    from tools.runs import checkpoints

    return list(checkpoints(run).values())[-1]
