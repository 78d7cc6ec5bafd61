"""The command as a whole, on one tiny trained run: its files, its report in a browser, its errors, two processes."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import evaluate
import train
from model import checkpoints

SECTIONS = {
    "results",
    "gains",
    "confusion",
    "curves",
    "maps",
    "gallery",
    "apart",
    "truth",
    "settings",
}
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()  # on tensors this small several only wait for each other
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(cohort_folder, clip_file, tmp_path_factory):
    out = str(tmp_path_factory.mktemp("run") / "a<b>&$c")
    train.train(
        train.parse_config(
            [
                "--data",
                cohort_folder,
                "--clip",
                clip_file,
                "--out",
                out,
                "--patients",
                "4",
                "--steps",
                "4",
                "--log-every",
                "1",
                "--no-compile",
                "--no-amp",
                "--bank",
                os.path.join(ROOT, "demo/attributes.json"),
            ]
        )
    )
    return out


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    evaluate.main()


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory):
    """What the command wrote of it, with prompts for the zero-shot probe."""
    out = tmp_path_factory.mktemp("out")
    prompts = {
        name: [f"tissue of {name}", "a patch"]
        for name in ("high_grade", "low_grade", "normal", "spindle")
    }
    (out / "prompts.json").write_text(json.dumps(prompts))
    with pytest.MonkeyPatch.context() as patch:
        command(patch, run, "--out", out, "--prompts", out / "prompts.json")
    return out


def test_metrics_hold_every_probe_and_what_the_words_say(evaluated):
    metrics = json.loads(
        (evaluated / "metrics.json").read_text(), parse_constant=pytest.fail
    )  # no NaN: any reader
    assert set(metrics["probes"]) == {*evaluate.PROBES, "zero-shot"}
    for at in metrics["probes"].values():
        assert {
            "accuracy_interval",
            "mca_interval",
            "auc",
            "recall",
            "confusion",
            "mca_gain",
        } <= set(at["slide"])
    assert (
        metrics["against"] == "start"
    )  # since the truth is known, before and after training are told apart
    assert len(metrics["truth"]) == 42
    assert all(
        0 <= row["AUC, step 4"] <= 1 and 0 <= row["AUC, start"] <= 1 for row in metrics["truth"]
    )
    assert {(row["class"], row["level"]) for row in metrics["apart"]} == {
        (name, level) for name in metrics["classes"] for level in evaluate.LEVELS
    }
    assert all(1 <= used <= 14 for used in metrics["attributes_used"].values())
    assert metrics["notes"] == []


def test_embeddings_are_enough_for_a_probe_of_ones_own(evaluated, run):
    """The README's recipe: the linear probe again from the file alone, and names instead of numbers."""
    with np.load(evaluated / "embeddings.npz") as file:
        data = dict(file)
    bank, held = (
        np.flatnonzero(data["splits"][data["split"]] == name) for name in ("train", "val")
    )
    z, y = torch.from_numpy(data["z"]), torch.from_numpy(data["label"]).long()
    scores = evaluate.logistic(z[bank], y[bank], z[held], len(data["classes"])).numpy()
    metrics = json.loads((evaluated / "metrics.json").read_text())
    assert (scores.argmax(axis=1) == data["label"][held]).mean() == metrics["probes"]["linear"][
        "patch"
    ]["accuracy"]
    assert data["patients"][data["patient"][0]] in data["path"][0].decode()
    vectors = torch.load(checkpoints(run)[-1], weights_only=True)["model"]["bank_slide"].numpy()
    np.testing.assert_allclose(data["scores_slide"], data["z"] @ vectors.T, atol=1e-6)
    assert data["attributes_slide"][0] == "thinly cellular slide regions"


def test_the_report_needs_nothing_but_itself(evaluated):
    page = (evaluated / "report.html").read_text()
    assert len(page) < 3e6
    assert "<script" not in page
    assert set(re.findall(r"(?:href|src)=\"([^\"]{1,15})", page)) <= {
        "data:image/jpeg",
        "data:,",
        *(f"#mark{i}" for i in range(7)),
    }
    assert "a&lt;b&gt;&amp;$c" in page  # names are data, whatever they look like

    assert {*re.findall(r'<section id="(\w+)"', page)} == SECTIONS
    assert page.count('<g class="dot">') == 48 + 16 + 8
    assert page.count('<div class="card">') == 12
    assert page.count("<polyline") == 3 + 3 + 1 + 3 + 3


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
@pytest.mark.parametrize("width", [375, 1280])
def test_the_report_in_a_browser(evaluated, tmp_path, width):
    """Chromium lays it out in a frame of that width (its window cannot be as narrow as a phone) and looks."""
    look = """<iframe id="f" width="%d" height="900" srcdoc="%s" style="border:0"></iframe><script>
      onload = () => { const d = document.getElementById("f").contentDocument, seen = q => [...d.querySelectorAll(q)];
        const box = e => e.getBoundingClientRect(), wide = e => box(e).right > %d + 1 && !e.closest(".scroll");
        const spare = d.documentElement.clientWidth - d.documentElement.scrollWidth;
        document.title = JSON.stringify({out: seen("body *").filter(wide).length, tables: seen("table").length, spare,
          flat: seen("section").filter(e => box(e).height < 60).length, marks: seen(".dot use").length,
          images: seen(".card img").filter(e => e.naturalWidth == 96).length, shown:
          seen(".dot image").filter(e => box(e).width > 0).length})}</script>"""
    page = (evaluated / "report.html").read_text().replace("&", "&amp;").replace('"', "&quot;")
    (tmp_path / "look.html").write_text(look % (width, page, width))
    result = subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--window-size=1400,900",
            "--enable-logging=stderr",
            f"--user-data-dir={tmp_path}/profile",
            "--dump-dom",
            "--virtual-time-budget=5000",
            f"file://{tmp_path}/look.html",
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    seen = json.loads(re.search("<title>(.*?)</title>", result.stdout)[1])
    assert (seen["spare"] >= 0, seen["out"], seen["flat"]) == (True, 0, 0)
    assert seen["tables"] == 2 + 5 * 3 + 4
    assert (seen["images"], seen["marks"], seen["shown"]) == (12, 72, 0)
    assert "CONSOLE" not in result.stderr


def test_two_processes_write_the_same_embeddings(run, tmp_path):
    for processes, out in ((1, "one"), (2, "two")):
        subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                f"--nproc_per_node={processes}",
                "evaluate.py",
                run,
                "--out",
                tmp_path / out,
            ],
            cwd=ROOT,
            check=True,
            capture_output=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            timeout=150,
        )
    assert (tmp_path / "one/embeddings.npz").read_bytes() == (
        tmp_path / "two/embeddings.npz"
    ).read_bytes()


def test_a_crash_while_writing_leaves_what_was_there(run, tmp_path, monkeypatch):
    (tmp_path / "embeddings.npz").write_bytes(b"before")
    monkeypatch.setattr(
        evaluate.np, "savez", lambda file, **arrays: file.write(b"half") and file.no_such_method()
    )
    with pytest.raises(AttributeError):
        command(monkeypatch, run, "--out", tmp_path)
    assert (tmp_path / "embeddings.npz").read_bytes() == b"before"


def test_other_classes_are_refused_with_both_lists(run, cohort_folder, tmp_path, monkeypatch):
    with open(os.path.join(cohort_folder, "manifest.csv")) as file:
        (tmp_path / "manifest.csv").write_text(file.read().replace(",spindle,", ",round,"))
    with pytest.raises(
        ValueError, match=r"'round'\], step 4 \['high_grade', 'low_grade', 'normal', 'spindle"
    ):
        command(monkeypatch, run, "--data", tmp_path)


def small_cohort(folder, to, pattern, columns=5):
    with open(os.path.join(folder, "manifest.csv")) as file:
        lines = [
            ",".join(line.split(",")[:columns])
            for line in file.read().splitlines()
            if re.match(pattern, line)
        ]
    (to / "manifest.csv").write_text("\n".join(lines))
    shutil.copytree(os.path.join(folder, "images"), to / "images")


def test_from_the_checkpoint_alone(run, cohort_folder, tmp_path, monkeypatch, capsys):
    """One file, and images without labels, factors and the CLIP: what cannot be said is left out, with a reason."""
    checkpoint = torch.load(checkpoints(run)[-1], weights_only=True)
    checkpoint["config"] |= {"clip": "gone.pt", "bank": "gone.json", "data": "gone", "backbone": ""}
    torch.save(checkpoint, tmp_path / "moved.pt")
    small_cohort(cohort_folder, tmp_path, r"path|.*/high_grade-00", columns=3)
    shutil.copy(os.path.join(cohort_folder, "factors.csv"), tmp_path)
    command(monkeypatch, tmp_path / "moved.pt", "--data", tmp_path)
    printed = capsys.readouterr().out
    assert "nothing to probe" in printed
    assert "gone.json" in printed
    assert len(np.load(tmp_path / "embeddings.npz")["z"]) == 6
    with pytest.raises(FileNotFoundError, match=r"--clip gone\.pt"):
        command(monkeypatch, tmp_path / "moved.pt", "--data", cohort_folder, "--against", "start")


def test_against_itself_and_leaving_out_patients(run, cohort_folder, tmp_path, monkeypatch):
    small_cohort(cohort_folder, tmp_path, r"path|.*/\w+-0[01]/0-")
    command(
        monkeypatch,
        run,
        "--data",
        tmp_path,
        "--against",
        run,
        "--protocol",
        "lopo",
        "--out",
        tmp_path,
    )
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["probes"]["attributes"]["patient"]["n"] == 8  # all, not only those of a split
    assert {
        at["accuracy_gain"]
        for kind in metrics["probes"].values()
        for at in (kind["patch"], kind["slide"])
    } == {0}


def test_a_backbone_has_never_seen_language(
    cohort_folder, clip_file, tmp_path, monkeypatch, capsys
):
    config = train.parse_config(
        [
            "--data",
            cohort_folder,
            "--clip",
            clip_file,
            "--out",
            str(tmp_path / "run"),
            "--backbone",
            "resnet18",
            "--patients",
            "2",
            "--steps",
            "1",
            "--image-size",
            "32",
            "--no-compile",
            "--no-amp",
            "--probe-every",
            "0",
        ]
    )
    train.train(config)
    command(monkeypatch, config.out)
    assert "attribute names carry no meaning" in capsys.readouterr().out
    assert "attribute names carry no meaning" in (tmp_path / "run/report.html").read_text()
    start, _ = evaluate.starting_model(*evaluate.load_run(config.out))
    expected, _ = train.build_model(config, torch.device("cpu"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(start.tower.parameters(), expected.tower.parameters(), strict=True)
    )


def test_show_prints_the_top_attributes(run, evaluated, monkeypatch, capsys):
    with np.load(evaluated / "embeddings.npz") as data:
        path, best = (
            data["path"][7].decode(),
            data["attributes_patch"][data["scores_patch"][7].argmax()],
        )
    command(monkeypatch, run, "--show", path, "normal-02", "normal-02-1")
    lines = capsys.readouterr().out.splitlines()
    assert [lines[0], lines[4], lines[8]] == [path, "normal-02", "normal-02-1"]
    assert lines[1].startswith(f"    patch: {best} 0.")
    with pytest.raises(ValueError, match="no such path, slide or patient"):
        command(monkeypatch, run, "--show", "nobody")


def test_prompts_for_other_classes_are_refused(evaluated, tmp_path):
    (tmp_path / "p.json").write_text('{"cat": ["a cat"]}')
    with pytest.raises(ValueError, match=r"prompts for \['cat'\], but the classes are \['dog'\]"):
        evaluate.zero_shot(str(tmp_path / "p.json"), torch.ones(1, 64), ["dog"], "no.pt")
