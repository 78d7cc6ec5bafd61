"""Real tissue: what the IDC tiles become by docs/GUIDE.md, what is run on them, and the table."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image

from data import hash_split, read_cohort
from demo import real
from tools.report import read_log, read_results


@pytest.fixture(scope="module")
def idc(tmp_path_factory):
    """Eight patients' tiles as released, 0 pale and 1 dark, with the manifest that GUIDE makes."""
    root = tmp_path_factory.mktemp("tiles") / "IDC"
    rng = np.random.default_rng(0)
    for patient in range(9, 17):
        for place, label in enumerate((0, 0, 0, 1, 1)):
            name = f"{patient}/{label}/{patient}_idx5_x{401 + 50 * place}_y951_class{label}.png"
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.normal(200 - 60 * label, 20, (50, 50, 3)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name)
    guide = Path(ROOT, "docs/GUIDE.md").read_text()
    (pattern,) = re.findall(r"index IDC --pattern '(.*)'", guide)
    (code,) = re.findall(r"```python\n(from pathlib import Path\n.*?)```", guide, re.S)
    index = [sys.executable, "-m", "tools.cohort", "index", root, "--pattern", pattern]
    subprocess.run(index, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    exec(code.replace('"IDC/', f'"{root}/'), {})
    return str(root)


def test_the_guide_makes_fields_of_500_pixels_of_the_names(idc):
    cohort = read_cohort(idc)
    assert str(cohort) == "8 patients, 16 slides, 40 patches"
    by_name = {cohort.name(row): cohort.groups_of(row) for row in range(40)}
    assert by_name["9/0/9_idx5_x451_y951_class0.png"] == ["9", "9-0-1"]
    assert by_name["9/0/9_idx5_x501_y951_class0.png"] == ["9", "9-1-1"]
    assert by_name["16/1/16_idx5_x601_y951_class1.png"] == ["16", "16-1-1"]
    assert (cohort.patient_split == hash_split(cohort.group_names[-1])).all()


def test_the_colours_are_three_moments_of_each_channel():
    pixels = np.random.default_rng(0).gamma(2, 30, (3, 7, 5)).clip(0, 255).astype(np.uint8)
    found = real.colours(pixels).reshape(3, 3)
    for channel, (mean, deviation, skew) in zip(pixels / 255, found.T.tolist()):
        assert mean == pytest.approx(channel.sum() / 35)
        second, third = (sum((x - mean) ** k for x in channel.flat) / 35 for k in (2, 3))
        assert deviation == pytest.approx(second**0.5, rel=1e-4)
        assert skew == pytest.approx(third / second**1.5, rel=1e-3)
    assert real.colours(np.full((3, 4, 4), 255, np.uint8)).tolist() == [1] * 3 + [0] * 6


def test_the_nearest_other_tile_is_that_of_a_loop():
    z = F.normalize(torch.randn(60, 4, generator=torch.Generator().manual_seed(0)))
    patient = np.random.default_rng(0).integers(0, 3, 60)
    same = 0
    for i in range(60):
        _, j = max((float(z[i] @ z[j]), j) for j in range(60) if j != i)
        same += patient[i] == patient[j]
    assert real.same_patient(z, patient) == pytest.approx(same / 60)


def line(arm, seed, mca, **changes):
    kinds = ["linear"] if arm == "colours" else real.KINDS
    patch = {"mca": mca, "auc": 0.9} | changes
    return {"arm": arm, "seed": seed, "1-NN": 0.25} | dict.fromkeys(kinds, patch)


def test_a_run_measures_what_has_no_line_yet(idc, clip_file, tmp_path, monkeypatch):
    for name in ("train.py", "evaluate.py"):
        os.symlink(Path(ROOT, name), tmp_path / name)
    monkeypatch.chdir(tmp_path)
    bank = Path(ROOT, "demo/attributes.json")
    settings = f"--clip {clip_file} --bank {bank} --image-size 32 --patients 3 --steps 2 --no-amp"
    monkeypatch.setattr(real, "SETTINGS", settings)
    monkeypatch.setattr(real, "LINES", tmp_path / "real.jsonl")
    arms = ["colours", "tower --start random", "hlss --align off --start clip"]
    jobs = {(arm, seed) for arm in real.ARMS for seed in range(3)}
    there = [line(*job, 0.5) for job in sorted(jobs - {(arm, 0) for arm in arms})]
    real.LINES.write_text("".join(json.dumps(x) + "\n" for x in there))
    monkeypatch.setattr(sys, "argv", ["real.py", idc])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    real.main()
    found = read_log(real.LINES)
    assert found[: len(there)] == there
    added = {x["arm"]: x for x in found[len(there) :]}
    assert sorted(added) == sorted(arms) and len(found) == len(jobs)
    assert added["colours"]["linear"]["mca"] == 1  # pale against dark
    tower, trained = (added[arm] for arm in arms[1:])
    metrics, _ = read_results("runs/real/hlss--alignoff--startclip-0")
    for kind in real.KINDS:
        assert tower[kind]["mca_gain"] == 0
        assert trained[kind] == metrics["probes"][kind]["levels"]["patch"]
    real.main()  # nothing is left to run
    assert read_log(real.LINES) == found


def test_the_table_comes_from_the_lines_alone(tmp_path, monkeypatch, capsys):
    arm, gain = "hlss --start clip", {"mca_gain": 0.02, "mca_gain_interval": [-0.01, 0.05]}
    lines = [line(arm, 0, 0.81, mca_interval=[0.7, 0.9], **gain)]
    lines.append(line(arm, 1, 0.83, mca_interval=[0.74, 0.94], **gain))
    monkeypatch.setattr(real, "LINES", tmp_path / "real.jsonl")
    lines.append(line("colours", 0, 0.8))
    real.LINES.write_text("".join(json.dumps(x) + "\n" for x in lines))
    monkeypatch.setattr(real, "run", lambda *_: pytest.fail("it ran"))
    monkeypatch.setattr(sys, "argv", ["real.py"])
    real.main()
    rows = [text.split() for text in capsys.readouterr().out.splitlines() if text]
    expected = ["82.0", "72..92", "90.0", "2.0", "-1..5", "25.0", "2.0"]
    assert rows.count([*arm.split(), *expected]) == 2
    assert ["colours", "80.0", "nan", "90.0", "nan", "nan", "25.0", "0.0"] in rows
