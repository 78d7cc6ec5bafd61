"""The README's fork recipes work: each is a diff of a few lines. We apply it to a copy of the
repository, train on a small cohort until the table appears, and evaluate."""

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import ROOT

pytestmark = pytest.mark.slow  # each command is a new process; CI runs these tests

HLSS = "--bank demo/attributes.json --image-size 64"
RECIPES = {  # name: flags for its training
    "level": f"{HLSS} --levels patch,region,slide,patient --draw 2,2,1,2",
    "loss": f"{HLSS} --uniformity-weight 0.1",
    "head": f"{HLSS} --objective hidisc",
    "tower": "--objective hidisc --backbone tiny",
    "tissue": "--preset lung --image-size 64",
    "probe": HLSS,
    "balance": f"{HLSS} --balance-classes",
}


BALANCED = """
import sys
from data import hierarchical_batch, read_cohort
cohort = read_cohort(sys.argv[1]).restrict("train")
for step in range(1, 9):
    rows = hierarchical_batch(cohort, step, 0, 4, balance=True)
    print(sorted(cohort.label[rows[:, 0, 0]].tolist()))
"""


def run(fork, *words):
    """Runs one of the fork's commands and returns its output."""
    command = [sys.executable, *words]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=fork, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def made(name, clip_file, cohort, folder):
    """A copy of the repository with a recipe applied, after its training and evaluation."""
    fork = folder / name
    rooms = shutil.ignore_patterns(".*", "runs", "tests", "docs", "__pycache__")
    shutil.copytree(ROOT, fork, ignore=rooms)
    recipe = os.path.join(ROOT, "tests", "forks", f"{name}.diff")
    subprocess.run(["git", "apply", recipe], cwd=fork, check=True)
    run(fork, "-m", "ruff", "check", ".")

    if name == "level":  # its tissue has a fourth level
        cohort = "cohort"
        run(fork, "-m", "demo.tissue", cohort, "--patients", "5", "--held-out", "2")
    text = [] if name == "tower" else ["--clip", clip_file]
    flags = ["--data", cohort, *"--patients 4 --steps 4 --no-amp --out run".split()]
    table = run(fork, "train.py", *text, *flags, *RECIPES[name].split())
    assert "step 4 knn200" in table
    table = run(fork, "evaluate.py", "run")
    assert "step 4 linear" in table
    return fork


@pytest.fixture(scope="module")
def forks(request, clip_file, cohort_folder, tmp_path_factory):
    """{recipe: its future fork}, two at a time, of the recipes that were asked for."""
    folder = tmp_path_factory.mktemp("forks")
    parameters = [getattr(item, "callspec", None) for item in request.session.items]
    asked = [one.params["name"] for one in parameters if one and one.params.get("name") in RECIPES]
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(made, name, clip_file, cohort_folder, folder) for name in asked}


@pytest.mark.parametrize("name", RECIPES)
def test_a_fork_trains_to_a_table_and_is_evaluated(name, forks, cohort_folder):
    fork = forks[name].result()
    state = torch.load(fork / "run" / "step-0000004.pt", weights_only=True)
    line = json.loads((fork / "run" / "log.jsonl").read_text().splitlines()[1])
    metrics = json.loads((fork / "run" / "metrics.json").read_text())
    centroid = metrics["probes"].get("centroid", {"levels": {"patient": {}}})
    there = {
        "level": {"hvc_region", "ha_region"} <= set(line) and metrics["levels"][1] == "region",
        "loss": line.get("uniformity", 1) < 0,
        "head": "projections.shared.2.weight" in state["model"],
        "tower": "tower.conv3.weight" in state["model"],
        "tissue": state["attributes"]["slide"] == ["preserved air spaces", "solid tumour nests"],
        "probe": "accuracy" in centroid["levels"]["patient"],
        "balance": state["config"].get("balance_classes"),
    }
    assert there[name]
    if name == "balance":  # every batch has four patients, one of each class
        assert run(fork, "-c", BALANCED, cohort_folder) == "[0, 1, 2, 3]\n" * 8


def test_every_recipe_is_here_and_short():
    recipes = sorted(Path(ROOT, "tests", "forks").glob("*.diff"))
    assert [recipe.stem for recipe in recipes] == sorted(RECIPES)
    for recipe in recipes:
        lines = recipe.read_text().splitlines()
        added = [line for line in lines if line.startswith("+") and not line.startswith("+++")]
        assert len(added) <= 50, recipe
