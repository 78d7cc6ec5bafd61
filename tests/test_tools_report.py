"""tools/report.py: the page of a small folder of results, as text and in a browser."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import evaluate
from data import read_cohort
from losses import LEVELS
from tools import report
from tools.runs import write_json

SECTIONS = (
    "results curves maps gallery class_attributes used truth confusion patients settings".split()
)
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
NAMES = {level: [f"{level} attribute {k}" for k in range(7)] for level in LEVELS}
TRUTH = [
    {"attribute": "patch attribute 1", "level": "patch", "factor": "+size", "AUC, step 4": 0.7}
]


@pytest.fixture(scope="module")
def cohort(cohort_folder):
    return read_cohort(cohort_folder)


@pytest.fixture
def out(cohort, tmp_path):
    """A four-step run, evaluated into its own folder; its embeddings are random."""
    folder = tmp_path / "a<b>&$c"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return F.normalize(torch.randn(*shape, generator=generator), dim=1)

    # Probes of two encoders.
    splits = evaluate.probe_splits(cohort)
    rows = splits[0][1]
    predictions = []
    for z in (random(len(cohort), 64), random(len(cohort), 64)):
        predictions.append(evaluate.predict(evaluate.PROBES, z, cohort, splits))
    probes = evaluate.assess(predictions[0], cohort, splits, other=predictions[1])
    scores = {level: z @ random(7, 64).T for level in LEVELS}

    # What train.py writes.
    probed = evaluate.probe(z, cohort)
    log = [{"step": 0, "probe": probed}]
    for step in range(1, 5):
        losses = {f"{loss}_{level}": step / 7 for loss in ("hvc", "ha") for level in LEVELS}
        log.append({"step": step, "lr": 1e-3 / step, "loss": 2.0} | losses)
    log.append({"step": 4, "probe": probed})
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    (folder / "config.json").write_text(
        json.dumps({"command": "python train.py", "objective": "hlss"})
    )

    # What evaluate.py writes.
    metrics = {
        "command": "python evaluate.py",
        "run": str(folder),
        "step": 4,
        "data": f"{cohort.root}/manifest.csv",
        "root": cohort.root,
        "cohort": str(cohort),
        "classes": cohort.classes,
        "protocol": "val",
        "rows": rows.tolist(),
        "notes": ["a <note>"],
        "against": "start",
        "probes": probes,
        "levels": list(LEVELS),
        "attributes_used": dict.fromkeys(LEVELS, 2.5),
        "class_attributes": evaluate.class_attributes(scores, NAMES, cohort, rows),
        "truth": TRUTH,
    }
    report.write_arrays(str(folder / "embeddings.npz"), cohort, z, scores, NAMES, {})
    write_json(str(folder / "metrics.json"), metrics)
    return folder


def change(out, **values):
    metrics = json.loads((out / "metrics.json").read_text())
    (out / "metrics.json").write_text(json.dumps(metrics | values))


def section(page, name):
    return re.search(f'<section id="{name}">(.*?)</section>', page, re.DOTALL)[1]


def test_the_page_needs_nothing_but_itself(out):
    page = report.draw(out).read_text("utf-8")
    assert len(page) < 3e6
    assert "<script src" not in page
    marks = {f"#mark{i}" for i in range(7)}
    addresses = set(re.findall(r"(?:href|src)=\"([^\"]{1,15})", page))
    assert addresses <= {"data:image/jpeg", "data:,", *marks}
    assert "a&lt;b&gt;&amp;$c" in page  # names are escaped
    assert "a &lt;note&gt;" in page


def test_the_page_shows_everything(out):
    page = report.draw(out).read_text("utf-8")
    assert re.findall(r'<section id="(\w+)"', page) == SECTIONS  # results come first
    assert page.count('<g class="dot">') == 48 + 16 + 8
    assert page.count('<div class="card">') == 12
    assert page.count("<polyline") == 3 + 3 + 1 + 1 + 3 + 3
    assert section(page, "results").count("<tr>") == 1 + 4 * 3
    assert section(page, "patients").count("<tr>") == 1 + 4 * 8
    assert "+size" in section(page, "truth")
    assert "objective" in section(page, "settings")
    assert "<td>python evaluate.py</td>" in section(page, "settings")
    assert "<td>python train.py</td>" in section(page, "settings")


def test_the_command_draws_the_page_again(out, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", str(out)])
    report.main()
    assert f"{out}/report.html" in capsys.readouterr().out
    assert (out / "report.html").exists()


def test_a_folder_without_results_is_an_error_with_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no metrics\.json: run python evaluate\.py RUN"):
        report.draw(tmp_path)


def test_the_command_says_it_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        report.main()
    assert capsys.readouterr().err.startswith(f"error: {tmp_path} has no metrics.json")


def test_a_page_without_labels_logs_or_images(out):
    change(out, probes={}, classes=[], class_attributes=[], against="", root="gone", run="gone")
    page = report.draw(out).read_text("utf-8")
    assert page.count('<div class="card">') == 12
    assert "data:image/jpeg" not in page
    assert "<polyline" not in page


def test_an_unfinished_last_line_of_the_log_is_left_out(out):
    before = section(report.draw(out).read_text("utf-8"), "curves")
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 9, "lr": 0.')
    assert section(report.draw(out).read_text("utf-8"), "curves") == before


def test_a_curve_goes_through_what_was_logged():
    log = [{"step": step, "ha_slide": value} for step, value in ((0, 3.0), (5, 1.0), (10, 2.0))]
    drawing = report.curves(log, list(LEVELS))
    assert 'class="line1" points="4,8 167,150 330,79"' in drawing
    assert "ha: 1 to 3, steps 0 to 10" in drawing


def test_every_term_that_was_logged_has_a_curve():
    line = {
        "step": 1,
        "loss": 1.0,
        "attributes_used_patch": 2.0,
        "a_new_term": 3.0,
        "memory_mib": 9,
    }
    drawings = report.curves([line, line | {"step": 2}], list(LEVELS))
    captions = re.findall("<figcaption>(.*?):", drawings)
    assert captions == ["loss", "attributes_used", "a_new_term"]


def test_a_class_has_its_mark_and_a_slide_of_several_is_grey(out, cohort):
    rows = evaluate.probe_splits(cohort)[0][1]
    page = section(report.draw(out).read_text("utf-8"), "maps")
    assert page.count('href="#mark-1"') == 0
    assert page.count('href="#mark2"') == 12 + 4 + 2  # patches, slides, patients

    data = report.read_results(out)[1]
    data["label"][rows[0]] = (data["label"][rows[0]] + 1) % 4
    data["label"][rows[-1]] = -1
    np.savez(out / "embeddings.npz", **data)
    page = section(report.draw(out).read_text("utf-8"), "maps")
    assert (
        page.count('href="#mark-1"') == 2 + 3
    )  # two slides, two patients and the unlabelled patch


def test_a_table_has_a_column_for_each_key_and_intervals_in_brackets():
    rows = [{"x": 0.5, "x_interval": [0.25, 0.75], "n": 3}, {"y": "<", "x": None}]
    text = re.sub("<[^>]*>", " ", report.html_table(rows))
    assert " ".join(text.split()) == "x n y 0.5 (0.25 to 0.75) 3 - - - &lt;"
    assert report.html_table([]) == report.html_table([{}]) == ""


def test_shares_are_in_percent_and_intervals_show_their_side_of_zero():
    row = {"mca_gain": 0.0512, "mca_gain_interval": [0.003, 0.1], "auc": 0.91234}
    text = re.sub("<[^>]*>", " ", report.html_table([row]))
    assert " ".join(text.split()) == "mca_gain auc 5.1 (0.3..10) 0.912"


def test_top_is_the_highest_scores_first():
    scores = np.array([0.1, 0.5, -0.2, 0.4], np.float32)
    assert report.top(scores, list("abcd"), 3) == "b 0.500, d 0.400, a 0.100"
    assert report.top(scores, list("abcd")).count(",") == 3


def browse(tmp_path, html):
    """Opens a page in Chromium; returns the document after its scripts ran."""
    (tmp_path / "look.html").write_text(html, "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1400,900"]
    flags += ["--enable-logging=stderr", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    flags += ["--virtual-time-budget=5000", f"file://{tmp_path}/look.html"]
    result = subprocess.run([CHROMIUM, *flags], capture_output=True, text=True, timeout=60)
    assert "CONSOLE" not in result.stderr
    return result.stdout


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_the_picture_and_the_matrices_are_those_of_the_numbers(out, tmp_path):
    page = browse(tmp_path, report.draw(out).read_text("utf-8"))
    metrics = json.loads((out / "metrics.json").read_text())
    knn200 = metrics["probes"]["knn200"]["levels"]["slide"]
    drawing = section(page, "results").split("</figure>")[1]
    assert "<figcaption>slide, n = 16<" in drawing
    assert drawing.count('class="value"') == drawing.count('class="other"') == 4
    value, other = [float(x) for x in re.findall(r'cx="([\d.]+)"', drawing)][1::-1]
    assert value == pytest.approx(84 + 240 * knn200["mca"])
    assert other == pytest.approx(value - 240 * knn200["mca_gain"])
    assert 'class="chance" d="M144 4' in drawing  # a quarter of the 240 pixels

    assert section(page, "confusion").count("<table>") == 4 * 3
    _, matrix, *_ = section(page, "confusion").split("</table>")  # knn200, slide
    cells = re.findall(r"<td[^>]*>(\d+)</td>", matrix)
    assert cells == [str(count) for row in knn200["confusion"] for count in row]
    words = re.search(r'<p id="words">(.*?)</p>', page)[1]
    assert "20 patients, 40 slides, 120 patches. Probes are fitted to the split train" in words
    assert "2 high_grade, 2 low_grade, 2 normal, 2 spindle. A guess" in words
    assert "accuracy of 25.0%" in words


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_sections_without_content_are_left_out(out, tmp_path):
    change(out, probes={}, classes=[], class_attributes=[], against="", truth=[], run="gone")
    page = browse(tmp_path, report.draw(out).read_text("utf-8"))
    assert re.findall(r'<section id="(\w+)"', page) == ["maps", "gallery", "used", "settings"]
    assert "there is nothing to probe" in page


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
@pytest.mark.parametrize("width", [375, 1280])
def test_the_page_in_a_browser(out, tmp_path, width):
    """Chromium lays it out in a frame of that width, as its window cannot be so narrow."""
    look = """<iframe id="f" width="%d" height="900" srcdoc="%s" style="border:0"></iframe><script>
      onload = () => {
        const d = document.getElementById("f").contentDocument;
        const box = e => e.getBoundingClientRect();
        const seen = q => [...d.querySelectorAll(q)];
        const wide = e => box(e).right > %d + 1 && !e.closest(".scroll");
        document.title = JSON.stringify({
          spare: d.documentElement.clientWidth - d.documentElement.scrollWidth,
          out: seen("body *").filter(wide).length,
          flat: seen("section").filter(e => box(e).height < 60).length,
          tables: seen("table").length,
          images: seen(".card img").filter(e => e.naturalWidth == 96).length,
          marks: seen(".dot use").length,
          shown: seen(".dot image").filter(e => box(e).width > 0).length})}</script>"""
    page = report.draw(out).read_text("utf-8").replace("&", "&amp;").replace('"', "&quot;")
    document = browse(tmp_path, look % (width, page, width))
    seen = json.loads(re.search("<title>(.*?)</title>", document)[1])
    assert (seen["spare"] >= 0, seen["out"], seen["flat"]) == (True, 0, 0)
    assert seen["tables"] == 1 + 3 + 4 * 3 + 2  # results; words; matrices; patients, settings
    assert (seen["images"], seen["marks"], seen["shown"]) == (12, 72, 0)


def shown(out, monkeypatch, capsys, *names):
    monkeypatch.setattr(sys, "argv", ["report.py", str(out), "--show", *names])
    report.main()
    return capsys.readouterr().out.splitlines()


def attributes_of(level, scores):
    return f"{level:>9}: {report.top(scores.mean(axis=0, dtype=float), NAMES[level])}"


def test_show_prints_the_top_attributes(out, monkeypatch, capsys):
    """For a patch, and for the mean over the patches of a patient or slide; then the notes."""
    _, data = report.read_results(out)
    path = data["path"][7]
    lines = shown(out, monkeypatch, capsys, path, "normal-02", "normal-02-1")
    expected = []
    members = {
        f"patch {path}": data["path"] == path,
        "patient normal-02": data["patients"][data["patient"]] == "normal-02",
        "slide normal-02-1": data["slides"][data["slide"]] == "normal-02-1",
    }
    assert [member.sum() for member in members.values()] == [1, 6, 3]
    for head, member in members.items():
        scores = {level: data[f"scores_{level}"][member] for level in LEVELS}
        expected += [head, *(attributes_of(level, scores[level]) for level in LEVELS)]
    assert lines == [*expected, "note: a <note>"]


def test_show_needs_the_embeddings_alone(out, monkeypatch, capsys):
    (out / "metrics.json").unlink()
    (out / "config.json").unlink()
    assert len(shown(out, monkeypatch, capsys, "normal-02")) == 1 + 3
    (out / "embeddings.npz").unlink()
    with pytest.raises(SystemExit, match="2"):
        shown(out, monkeypatch, capsys, "normal-02")
    assert "has no embeddings.npz: run python evaluate.py RUN" in capsys.readouterr().err


def test_show_says_which_names_there_are(out, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        shown(out, monkeypatch, capsys, "nobody")
    said = capsys.readouterr().err
    assert said.startswith(f"error: --show nobody: {out} has no such patch, slide, patient; ")
    known = "patch images/high_grade-00/0-0.png, slide high_grade-00-0, patient high_grade-00"
    assert said.endswith(f"try {known}\n")


def test_a_patient_and_a_slide_of_one_name_are_shown_apart(out, monkeypatch, capsys):
    """Each from its own patches; here the slide belongs to another patient."""
    _, data = report.read_results(out)
    assert data["patients"][data["patient"][data["slide"] == 0]].tolist() == ["high_grade-00"] * 3
    slide, patient = data["slide"] == 0, data["patients"][data["patient"]] == "normal-02"
    data["slides"][0] = "normal-02"
    np.savez(out / "embeddings.npz", **data)
    lines = shown(out, monkeypatch, capsys, "normal-02")
    assert [lines[0], lines[4]] == ["slide normal-02", "patient normal-02"]
    assert lines[1] == attributes_of("patch", data["scores_patch"][slide])
    assert lines[5] == attributes_of("patch", data["scores_patch"][patient])


def test_a_run_without_a_bank_has_no_words_to_show(out, monkeypatch, capsys):
    _, data = report.read_results(out)
    for level in LEVELS:
        data[f"attributes_{level}"] = np.array([], str)
        data[f"scores_{level}"] = np.zeros((len(data["z"]), 0), np.float32)
    np.savez(out / "embeddings.npz", **data)
    said = ["this run has no words: it was trained without a bank"]
    assert shown(out, monkeypatch, capsys, "normal-02") == said
