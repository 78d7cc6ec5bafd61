"""What a new user meets in the first hours: defaults, notes, pretrained backbones, mistakes."""

import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import ROOT, manifest
from test_train import log_of

import evaluate
import train
from demo.prepare import made_once
from model import load_run
from tools.processes import user_errors


def call(monkeypatch, module, *words):
    """Runs a command as `python MODULE WORDS` does. Returns 0, its exit code or its message."""
    monkeypatch.setattr(sys, "argv", [f"{module}.py", *map(str, words)])
    try:
        with user_errors():
            importlib.import_module(module).main()
    except SystemExit as stop:
        return stop.code or 0
    return 0


# ------------------------------------------------------------------------------------- defaults


def test_a_run_is_named_after_its_data():
    words = ["--clip", "demo"]
    assert train.parse_config([]).out == os.path.join("runs", "demo")
    assert train.parse_config([*words, "--data", "some/mine/"]).out == os.path.join("runs", "mine")
    assert train.parse_config([*words, "--data", "a/b.csv"]).out == os.path.join("runs", "b")
    assert train.parse_config([*words, "--data", "a", "--out", "x"]).out == "x"


def test_real_images_need_a_clip_or_no_words(capsys):
    with pytest.raises(SystemExit):
        train.parse_config(["--data", "mine"])
    said = capsys.readouterr().err
    assert "name a CLIP with --clip (a file, RN50" in said
    assert "or demo, which knows only demo" in said
    assert "--objective hidisc --backbone resnet18" in said
    train.parse_config(["--data", "mine", "--objective", "hidisc", "--backbone", "resnet18"])


def test_the_demos_clip_may_be_asked_for(flags, clip_file, tmp_path, monkeypatch):
    """For a dry run on your own images; it comes from the cache."""
    (tmp_path / "runs/cache").mkdir(parents=True)
    os.symlink(clip_file, tmp_path / "runs/cache/clip.pt")
    monkeypatch.chdir(tmp_path)
    assert train.train(train.parse_config([*flags, "--clip", "demo", "--steps", "1"]))


def test_a_start_that_failed_is_no_hindrance(flags):
    with pytest.raises(FileNotFoundError, match="--clip nowhere"):
        train.train(train.parse_config([*flags, "--clip", "nowhere"]))
    assert train.train(train.parse_config([*flags, "--steps", "1"]))


# ---------------------------------------------------------------------------------- a longer run


def test_steps_may_grow_and_the_rates_follow(flags):
    first = train.parse_config([*flags, "--steps", "4", "--save-every", "2"])
    assert train.train(first)
    longer = train.parse_config([*flags, "--steps", "8", "--save-every", "2"])
    assert train.train(longer)
    old, new = (train.learning_rate(4, config) for config in (first, longer))
    assert old < new
    rates = {line["step"]: line["lr"] for line in log_of(first.out) if "lr" in line}
    assert rates == {
        step: train.learning_rate(step, first if step <= 4 else longer) for step in range(1, 9)
    }
    with pytest.raises(ValueError, match=r"--steps 4 \(was 8\)"):
        train.train(train.parse_config([*flags, "--steps", "4"]))


# ------------------------------------------------------------------------- pretrained backbones

LIGHT = ["--objective", "hidisc", "--backbone", "resnet18", "--image-size", "32"]
LIGHT += ["--clip", "", "--steps", "1"]


def test_a_backbone_starts_from_a_file(flags, tmp_path):
    """With all weights except those of the last layer, which knows other classes."""
    theirs = torchvision.models.resnet18().state_dict()
    torch.save(theirs, tmp_path / "theirs.pt")
    config = train.parse_config([*flags, *LIGHT, "--backbone-weights", str(tmp_path / "theirs.pt")])
    files = {"data": config.data} | train.find_text(config, 0)
    model, _ = train.build_model(config, files, evaluate.read_cohort(config.data), 0, train.CPU)
    ours = model.tower.state_dict()
    assert set(theirs) - set(ours) == {"fc.weight", "fc.bias"}
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name
    del theirs["layer1.0.conv1.weight"]
    torch.save(theirs, tmp_path / "theirs.pt")
    with pytest.raises(ValueError, match=r"theirs\.pt for resnet18: layer1\.0\.conv1\.weight is"):
        train.train(config)


def test_torchvisions_weights_bring_their_normalisation(flags, monkeypatch):
    """The checkpoint keeps it, so evaluation downloads nothing."""
    downloads = []

    def download(*arguments, **options):
        downloads.append(arguments)
        return torchvision.models.resnet18().state_dict()

    monkeypatch.setattr(torchvision.models._api.WeightsEnum, "get_state_dict", download)
    config = train.parse_config([*flags, *LIGHT, "--backbone-weights", "DEFAULT"])
    assert train.train(config)
    assert len(downloads) == 1
    model, _ = load_run(config.out)
    assert len(downloads) == 1
    assert model.mean.flatten().tolist() == pytest.approx([0.485, 0.456, 0.406])
    assert model.std.flatten().tolist() == pytest.approx([0.229, 0.224, 0.225])


# -------------------------------------------------------------------------------------- notes


def one_patient(cohort_folder, folder):
    """The demo's cohort with one patient per class, only one of them for training, and without
    factors."""
    folder.mkdir()
    os.symlink(os.path.join(cohort_folder, "images"), folder / "images")
    header, *rows = Path(cohort_folder, "manifest.csv").read_text().splitlines()
    kept = [row for row in rows if row.split(",")[1].endswith("-04")]
    kept = [row if "normal-04" in row else row.replace(",train", ",val") for row in kept]
    (folder / "manifest.csv").write_text("\n".join([header, *kept]) + "\n")
    return str(folder)


@pytest.fixture(scope="module")
def noted(cohort_folder, clip_file, tmp_path_factory):
    """A run that triggers every note except the one about words that mean nothing."""
    folder = tmp_path_factory.mktemp("noted")
    data = one_patient(cohort_folder, folder / "mine")
    (folder / "cache").mkdir()
    os.symlink(clip_file, folder / "cache" / "clip.pt")  # the name of the demo's own CLIP
    words = f"--data {data} --clip {folder}/cache/clip.pt --out {folder}/run --no-amp"
    return [*words.split(), "--steps", "1", "--patients", "1"], folder / "run"


NOTES = [
    "the bank describes demo tissue: name another with --bank",
    "the CLIP is the demo's and knows only demo tissue",
]


def test_what_a_reader_must_know_is_said_everywhere(noted, monkeypatch, capsys):
    flags, run = noted
    assert train.train(train.parse_config(flags))
    said = capsys.readouterr().out
    assert all(f"note: {note}" in said for note in NOTES)
    assert call(monkeypatch, "evaluate", run) == 0
    assert set(NOTES) <= set(json.loads((run / "metrics.json").read_text())["notes"])
    page = (run / "report.html").read_text()
    assert all(note.replace("'", "&#x27;") in page for note in NOTES)
    capsys.readouterr()
    assert call(monkeypatch, "tools.report", run, "--show", "normal-04") == 0
    said = capsys.readouterr().out
    assert all(f"note: {note}" in said for note in NOTES)


def test_words_that_mean_nothing_are_noted(cohort_folder):
    cohort = evaluate.read_cohort(cohort_folder)
    config = {"bank": "x", "clip": "x", "backbone": "", "start": "random", "align": "paper"}
    (note,) = evaluate.cohort_notes(config, cohort)
    assert note == "the encoder started from random weights: its attribute names mean nothing"
    assert evaluate.cohort_notes(config | {"align": "regression"}, cohort) == []
    assert evaluate.cohort_notes(config | {"bank": ""}, cohort) == []  # there are no names


def test_held_out_patients_of_one_class_are_noted(cohort_folder):
    cohort = evaluate.read_cohort(cohort_folder)
    cohort.label[cohort.split == evaluate.SPLITS.index("val")] = 0
    config = {"bank": "", "clip": "", "backbone": "resnet18", "start": "clip", "align": "off"}
    (note,) = evaluate.cohort_notes(config, cohort)
    assert note == "high_grade is the only class in val: accuracy and gains say nothing"


# ------------------------------------------------------------------------------------ mistakes


def test_ctrl_c_leaves_no_half_of_a_clip(tmp_path):
    command = [sys.executable, os.path.join(ROOT, "train.py")]
    cache = tmp_path / "runs/cache"
    cache.mkdir(parents=True)
    manifest(cache / "tissue", ["x.png,amy,1,a", "y.png,bob,2,a"])
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with_ctrl_c = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also in the background
    process = subprocess.Popen(command, cwd=tmp_path, env=threads, preexec_fn=with_ctrl_c, **pipes)
    while "captioned tissue" not in process.stderr.readline():
        assert process.poll() is None
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 1
    assert said.rstrip().endswith("stopped")
    assert "Traceback" not in said
    assert [path.name for path in cache.iterdir()] == ["tissue"]


def test_what_is_made_once_appears_whole(tmp_path):
    path = tmp_path / "file"

    def stopped(part):
        Path(part).write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made_once(str(path), stopped)
    assert not list(tmp_path.iterdir())
    made_once(str(path), lambda part: Path(part).write_text("whole"))
    made_once(str(path), stopped)  # the file exists, so nothing is made
    assert path.read_text() == "whole"


def mistakes(folder):
    """(module, words, what the error must say) for commands that a user may well type."""
    files = {
        "latin.csv": "path,patient,slide\nx.png,Müller,s1\n".encode("latin-1"),
        "semicolon.csv": b"path;patient;slide\nx.png;amy;s1\n",
        "capitals.csv": b"Path,Patient,Slide\nx.png,amy,s1\n",
        "backslash.csv": b"path,patient,slide\na\\x.png,amy,s1\n",
        "empty.csv": b"",
        "good.csv": b"path,patient,slide\nx.png,amy,s1\ny.png,bob,s2\n",
        "text.pt": b"not weights",
        "bank.json": b'{"levels": {"patch": {}}}',
        "list.json": b"[1, 2",
        "picture.png": b"\x89PNG\r\n\x1a\n",
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "nothing").mkdir(exist_ok=True)

    def csv(name):
        return [folder / name]

    clip = ["--clip", "demo", "--out", folder / "run"]
    return [
        ("tools.cohort", ["check", *csv("latin.csv")], "line 2: .* is not UTF-8: save it as CSV"),
        (
            "tools.cohort",
            ["check", *csv("semicolon.csv")],
            "has no column path, patient, slide",
        ),
        (
            "tools.cohort",
            ["check", *csv("capitals.csv")],
            "has no column path, patient, slide",
        ),
        ("tools.cohort", ["check", *csv("backslash.csv")], "must be a plain path inside"),
        ("tools.cohort", ["check", *csv("empty.csv")], "lists no patches|no patches"),
        (
            "tools.cohort",
            ["check", folder / "gone"],
            r"gone/manifest\.csv does not exist: tools\.cohort index writes it",
        ),
        (
            "tools.cohort",
            ["index", folder / "nothing", "--pattern", "{patient}/*"],
            "no tiles found",
        ),
        ("tools.cohort", ["index", folder, "--pattern", "{slide}/*"], "must name patient"),
        ("train", ["--data", folder / "gone", *clip], "does not exist: tools"),
        (
            "train",
            ["--data", *csv("good.csv"), "--bank", folder / "gone.json", *clip],
            r"gone\.json does not exist: name a bank file",
        ),
        ("evaluate", [folder / "gone"], "neither a run folder nor a checkpoint file"),
        ("evaluate", [folder / "nothing"], r"holds no train.py checkpoint .*: train first"),
        ("evaluate", [folder / "text.pt"], "is damaged or not a checkpoint"),
        ("describe", ["check", folder / "bank.json"], "level patch must be .*, not empty"),
        ("describe", ["check", folder / "list.json"], "is not JSON"),
        ("describe", ["check", folder / "picture.png"], "is not JSON"),
        ("describe", ["encode", folder / "bank.json", "--clip", folder / "text.pt"], "text.pt is"),
        ("tools.report", [folder / "nothing"], r"has no metrics\.json: run python evaluate\.py"),
    ]


@pytest.mark.parametrize("number", range(18))
def test_a_mistake_is_answered_in_a_line_with_the_remedy(number, tmp_path, monkeypatch, capsys):
    module, words, said = mistakes(tmp_path)[number]
    assert call(monkeypatch, module, *words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.search(said, line), line
