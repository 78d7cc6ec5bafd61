"""What several tests share: a small cohort, a small CLIP, a function on several processes."""

import os
import sys
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
torch.set_num_threads(2)
# New processes start as copies of one that has imported it: that takes seconds.
mp.set_forkserver_preload(["train"])


def manifest(folder, lines, header="path,patient,slide,label"):
    """Writes a manifest.csv; returns its folder. Nothing but decoding looks at the files."""
    folder.mkdir(exist_ok=True)
    (folder / "manifest.csv").write_text("\n".join([header, *lines]) + "\n")
    return str(folder)


@pytest.fixture(scope="session")
def cohort_folder(tmp_path_factory):
    """Demo tissue: 4 classes x 5 patients x 2 slides x 3 patches of 64 pixels; of each 5
    patients 2 are for validation."""
    from demo.tissue import write_demo

    folder = tmp_path_factory.mktemp("cohort")
    return str(write_demo(folder, patients=5, held_out=2, slides=2, patches=3))


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory):
    """The demo's CLIP after four steps of training: all the machinery, none of the knowledge."""
    from demo.clip import train_demo_clip

    path = str(tmp_path_factory.mktemp("clip") / "clip.pt")
    train_demo_clip(path, steps=4, patches=32, batch=8)
    return path


@pytest.fixture
def flags(cohort_folder, clip_file, tmp_path):
    """Flags of a run that takes seconds."""
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
    """function(rank, world, *arguments) on `world` gloo processes; returns their results by
    rank."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _process, (world, folder, function, arguments), nprocs=world, start_method="forkserver"
        )
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]


def newest(run):
    """The path of the newest checkpoint of a run."""
    from tools.runs import checkpoints

    return list(checkpoints(run).values())[-1]
