"""tools/report.py: the page of a small folder of results, as text and in a browser."""

import base64
import csv
import io
import json
import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from xml.dom import minidom

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import evaluate
import train
from data import read_cohort
from demo.tissue import CLASSES, FACTORS, render, write_demo
from losses import LEVELS
from tools import report
from tools.cohort import coordinates
from tools.runs import write_json

SECTIONS = "results curves slides gallery class_attributes used confusion patients settings".split()
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
NODE = shutil.which("node")
NAMES = {level: [f"{level} attribute {k}" for k in range(7)] for level in LEVELS}


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
        json.dumps({"command": "python train.py", "objective": "hlss", "align": "paper"})
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
    }
    report.write_arrays(str(folder / "embeddings.npz"), cohort, z, scores, NAMES)
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
    addresses = set(re.findall(r"(?:href|src)=\"([^\"]{1,15})", page))
    assert addresses <= {"data:image/jpeg", "data:,"}
    assert "a&lt;b&gt;&amp;$c" in page  # names are data, whatever they look like
    assert "a &lt;note&gt;" in page


def test_the_page_shows_everything(out):
    page = report.draw(out).read_text("utf-8")
    assert re.findall(r'<section id="(\w+)"', page) == SECTIONS  # results first
    assert page.count('<div class="card">') == 12
    assert not drawings(page)  # the manifest's coordinates were not handed over
    assert section(page, "results").count("<tr>") == 1 + 4 * 3
    assert section(page, "patients").count("<tr>") == 1 + 4 * 8
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
    images = re.findall(r'<div class="card"><img alt="" src="([^"]*)"', page)
    assert len(images) == 12
    assert len(set(images)) == 1  # a grey square
    assert '"log": []' in page


def test_an_unfinished_last_line_of_the_log_is_left_out(out):
    before = report.draw(out).read_text("utf-8")
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 9, "lr": 0.')
    assert report.draw(out).read_text("utf-8") == before


FAKE_DOM = """
const made = [];
function element(name) {
  const self = {name, attributes: {}, textContent: "", append() {}, remove() {},
    setAttribute(key, value) { this.attributes[key] = String(value) },
    closest: () => name == "svg", querySelector: () => true};
  made.push(self);
  return self;
}
const data = element("script");
data.textContent = require("fs").readFileSync(0, "utf8");
globalThis.document = {createElement: element, createElementNS: (_, name) => element(name),
  getElementById: id => id == "json" ? data : element(id), querySelectorAll: () => []};
"""


def scripted(page):
    """What the page's script makes, in Node: [{"name", "attributes", "textContent"}]."""
    content, script = re.findall("<script[^>]*>(.*?)</script>", page, re.DOTALL)
    program = FAKE_DOM + script + "console.log(JSON.stringify(made))"
    command = [NODE, "-e", program]
    result = subprocess.run(command, input=content, capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


@pytest.mark.skipif(not NODE, reason="no Node here")
def test_every_term_that_was_logged_has_a_curve(out):
    made = scripted(report.draw(out).read_text("utf-8"))
    captions = [one["textContent"] for one in made if one["name"] == "figcaption"]
    terms = [caption.partition(":")[0] for caption in captions if ": " in caption]
    probes = [f"accuracy of {kind}, percent" for kind in ("knn200", "knn20")]
    assert sorted(terms) == sorted([*probes, "lr", "loss", "hvc", "ha"])
    assert sum(one["name"] == "polyline" for one in made) == 3 + 3 + 1 + 1 + 3 + 3


@pytest.mark.skipif(not NODE, reason="no Node here")
def test_a_curve_goes_through_what_was_logged(out):
    lines = [{"step": step, "ha_slide": value} for step, value in ((0, 3.0), (5, 1.0), (10, 2.0))]
    lines[0] |= {"a_new_term": 3.0, "memory_mib": 9}
    (out / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = scripted(report.draw(out).read_text("utf-8"))
    curves = {
        one["attributes"]["class"]: one["attributes"]["points"]
        for one in made
        if one["name"] == "polyline"
    }
    assert curves == {"line1": "4,8 167,150 330,79", "line0": "4,150"}
    captions = [one["textContent"] for one in made if one["name"] == "figcaption"]
    assert "ha: 1 to 3, steps 0 to 10" in captions
    assert "a_new_term: 3 to 3, steps 0 to 0" in captions
    assert not any("memory" in caption for caption in captions)


@pytest.mark.skipif(not NODE, reason="no Node here")
def test_the_contrast_stands_beside_its_chance_and_its_lowest_values(out):
    config = json.loads((out / "config.json").read_text())
    config |= {"chance": "4.14", "lowest": "patch 0.00, slide 1.10"}  # as train.py writes them
    (out / "config.json").write_text(json.dumps(config))
    made = scripted(report.draw(out).read_text("utf-8"))
    captions = [one["textContent"] for one in made if one["name"] == "figcaption"]
    (hvc,) = [caption for caption in captions if caption.startswith("hvc: ")]
    assert hvc.endswith("; chance is 4.14, the lowest possible: patch 0.00, slide 1.10")


# ------------------------------------------------------------------------------------------- slides


def drawings(page):
    """{slide: its svg, parsed: each has to be well-formed XML} of a page."""
    found = re.findall(
        r'<figure class="scroll slide"><figcaption>(.*?): \d+ patches</figcaption>(.*?)</figure>',
        page,
    )
    return {unescape(name): minidom.parseString(svg) for name, svg in found}


def panels(svg):
    """{title: (pixels [rows, columns, channels], lowest, highest)} of a slide's drawing."""
    found = {}
    for panel in svg.getElementsByTagName("g"):
        title, *ends = [
            "".join(child.data for child in text.childNodes)
            for text in panel.getElementsByTagName("text")
        ]
        address = panel.getElementsByTagName("image")[0].getAttribute("href")
        file = io.BytesIO(base64.b64decode(address.partition("base64,")[2]))
        found[title] = (np.asarray(Image.open(file)), *ends)
    return found


def said(svg):
    """{path: what is said of a patch, a word a map} of a slide's drawing."""
    lines = [title.firstChild.data.split(", ") for title in svg.getElementsByTagName("title")]
    return {path: words for path, *words in lines}


def write_results(folder, cohort, scores, names, votes=None):
    """What evaluate.py writes of a cohort, without probes. votes: of its held-out patches."""
    rows = evaluate.probe_splits(cohort)[0][1]
    z = F.normalize(torch.ones(len(cohort), 4), dim=1)
    metrics = {
        "command": "",
        "run": str(folder),
        "step": 1,
        "data": cohort.root,
        "root": cohort.root,
        "cohort": str(cohort),
        "classes": cohort.classes,
        "protocol": "val",
        "rows": list(map(int, rows)),
        "notes": [],
        "against": "",
        "probes": {},
        "levels": list(LEVELS),
        "attributes_used": {},
        "class_attributes": [],
    }
    write_json(str(folder / "metrics.json"), metrics)
    path = str(folder / "embeddings.npz")
    report.write_arrays(path, cohort, z, scores, names, cohort.root, rows, votes)
    return report.read_results(folder)


@pytest.fixture(scope="module")
def tissue(tmp_path_factory):
    """The demo's tissue, whose factors are the scores: 4 classes x 2 patients x 2 slides x 36."""
    folder = tmp_path_factory.mktemp("tissue")
    write_demo(str(folder), patients=2, held_out=1, slides=2, patches=36)
    cohort = read_cohort(str(folder))
    lines = csv.DictReader(open(folder / "factors.csv"))
    factors = {line["path"]: [float(line[factor]) for factor in FACTORS] for line in lines}
    factors = np.array([factors[cohort.name(row)] for row in range(len(cohort))])
    scores = {level: torch.from_numpy(factors) for level in LEVELS}
    rows = evaluate.probe_splits(cohort)[0][1]
    votes = np.random.default_rng(0).dirichlet(np.ones(4), len(rows))
    write_results(folder, cohort, scores, dict.fromkeys(LEVELS, FACTORS), votes)
    return folder, cohort, factors, votes


def test_the_maps_of_the_demo_are_its_truth(tissue):
    """Necrosis drifts over a slide: its map holds the factor of each patch where the patch lies."""
    folder, cohort, factors, votes = tissue
    page = report.draw(folder).read_text("utf-8")
    slides = drawings(page)
    assert list(slides) == [f"{name}-00-{slide}" for name in CLASSES for slide in (0, 1)]
    assert section(page, "gallery").count("card") == 0  # slides take its place
    _, data = report.read_results(folder)
    drawn = 0
    for name, svg in slides.items():
        maps, words = panels(svg), said(svg)
        titles = ["patches", *[f"probability of {name}" for name in CLASSES], "label"]
        assert list(maps)[:6] == titles
        members = np.flatnonzero(data["slides"][data["slide"]] == name)
        deviation = factors[members].std(axis=0)
        chosen = np.argsort(-deviation)[:3]
        assert list(maps)[6:] == [FACTORS[k] for k in chosen]
        assert maps["patches"][0].shape == (216, 216, 3)
        column, row = (np.stack([data["x"], data["y"]])[:, members] / 64).astype(int)
        for k in chosen:
            truth = factors[members, k]
            pixels, low, high = maps[FACTORS[k]]
            assert (low, high) == (f"{truth.min():.3f}", f"{truth.max():.3f}")
            grey = 255 * (truth - truth.min()) / np.ptp(truth)
            assert np.abs(pixels[row, column, 0] - grey).max() <= 1
            assert (pixels[..., 1] == 255).all()  # nothing is missing
            drawn += FACTORS[k] == "necrosis"
        shares, low, high = maps["probability of high_grade"]
        held_out = votes[np.isin(np.flatnonzero(np.isfinite(data["knn200"][:, 0])), members)]
        assert (low, high) == ("0%", "100%")
        assert np.abs(shares[row, column, 0] - 255 * held_out[:, 0]).max() <= 1
        path = data["path"][members[5]]
        numbers = [f"{share:.0%}" for share in held_out[5]]
        numbers += [name[:-5], *(f"{factors[members[5], k]:.3f}" for k in chosen)]
        assert words[path] == numbers
    assert drawn >= 2


def test_an_evaluation_maps_the_slides_of_its_manifest(flags, monkeypatch):
    """embeddings.npz holds its coordinates, and the votes behind the accuracy of knn200."""
    config = train.parse_config(flags)
    assert train.train(config)
    monkeypatch.setattr(sys, "argv", ["evaluate.py", config.out])
    evaluate.main()
    metrics, data = report.read_results(config.out)
    places = coordinates(config.data)
    assert len(places) == len(data["path"]) == 120
    assert [places[path] for path in data["path"]] == list(zip(data["x"], data["y"]))
    votes = data["knn200"]
    held_out = np.flatnonzero(np.isfinite(votes[:, 0]))
    assert held_out.tolist() == metrics["rows"]
    right = votes[held_out].argmax(axis=1) == data["label"][held_out]
    assert right.mean() == metrics["probes"]["knn200"]["levels"]["patch"]["accuracy"]
    slides = drawings(Path(config.out, "report.html").read_text("utf-8"))
    assert list(slides) == [f"{name}-00-{slide}" for name in CLASSES for slide in (0, 1)]


def test_a_place_on_the_page_is_a_place_on_the_slide(tissue):
    """A patch's square, which is pointed at, lies over its thumbnail and its pixel in each map."""
    folder, cohort, *_ = tissue
    svg = drawings(report.draw(folder).read_text("utf-8"))["normal-00-1"]
    _, data = report.read_results(folder)
    places = {path: (x, y) for path, x, y in zip(data["path"], data["x"], data["y"])}
    squares = [use for use in svg.getElementsByTagName("use") if use.getElementsByTagName("title")]
    assert len(squares) == 36
    for use in squares:
        x, y = places[use.getElementsByTagName("title")[0].firstChild.data.split(", ")[0]]
        assert (int(use.getAttribute("x")), int(use.getAttribute("y"))) == (
            36 * x / 64,
            36 * y / 64,
        )
    (path,) = svg.getElementsByTagName("path")
    assert squares[0].getAttribute("href") == "#" + path.getAttribute("id")
    corners = re.findall(r"M(\d+) (\d+)h36v36h-36z", path.getAttribute("d"))
    origins = []
    for panel in svg.getElementsByTagName("g"):
        left, top = re.findall(r"\d+", panel.getAttribute("transform"))
        image = panel.getElementsByTagName("image")[0]
        origins.append((left, str(int(top) + int(image.getAttribute("y")))))
    assert corners == origins


def results_of(tmp_path, lines, **values):
    """A folder of results on a cohort without files. lines: of its manifest, as slide_of()."""
    tmp_path.mkdir(exist_ok=True)
    header = "path,patient,slide,label,split,x,y"
    (tmp_path / "manifest.csv").write_text("\n".join([header, *lines]) + "\n", "utf-8")
    cohort = read_cohort(str(tmp_path))
    scores = {level: torch.rand(len(cohort), 5) for level in LEVELS}
    names = {level: ['a & "b" <c>', *"defg"] for level in LEVELS}
    return write_results(tmp_path, cohort, scores, names, **values)


def slide_of(name, patient, n, label="ill", split="val"):
    return [f"{name}-{i}.png,{patient},{name},{label},{split},{i % 3},{i // 3}" for i in range(n)]


def test_the_two_largest_held_out_slides_of_each_class_and_those_named(
    tmp_path, monkeypatch, capsys
):
    lines = slide_of("a", "p", 4) + slide_of("b", "p", 6) + slide_of("c", "q", 5)
    lines += slide_of("d", "q", 2, "well") + slide_of("e", "r", 9, "well", "train")
    results_of(tmp_path, lines)
    assert list(drawings(report.draw(tmp_path).read_text())) == ["b", "c", "d"]
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path), "--slides", "e", "b", "r"])
    report.main()
    slides = drawings((tmp_path / "report.html").read_text())
    assert list(slides) == ["b", "c", "d", "e", "r"]  # r: a patient, all of whose patches lie there
    assert [len(said(svg)) for svg in slides.values()] == [6, 5, 2, 9, 9]
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path), "--slides", "nobody"])
    with pytest.raises(SystemExit, match="2"):
        report.main()
    assert (
        "error: --slides nobody: no slide with coordinates has this name" in capsys.readouterr().err
    )


def test_a_slide_of_several_labels_counts_for_each(tmp_path):
    lines = slide_of("a", "p", 5) + slide_of("b", "p", 4) + slide_of("c", "q", 3)
    lines += [line.replace("c-", "c-w").replace("ill", "well") for line in slide_of("c", "q", 2)]
    results_of(tmp_path, [*lines, *slide_of("d", "r", 1, split="train")])
    slides = drawings(report.draw(tmp_path).read_text())
    assert list(slides) == ["a", "b", "c"]
    label = panels(slides["c"])["label"]
    assert label[1:] == ("ill", "well")
    assert sorted(word for word, *_ in said(slides["c"]).values()) == ["ill"] * 3 + ["well"] * 2


def test_names_are_data_whatever_they_look_like(tmp_path):
    name = "<b> & 'c'"
    lines = [line.replace("left", name) for line in slide_of("left", "p", 3)]
    results_of(tmp_path, lines + slide_of("x", "q", 2, split="train"))
    page = report.draw(tmp_path).read_text("utf-8")
    slides = drawings(page)
    assert name in slides
    assert set(said(slides[name])) == {f"{name}-{i}.png" for i in range(3)}
    assert "<b>" not in page
    data = report.read_results(tmp_path)[1]
    data["scores_patch"][:, 0] *= np.arange(len(data["z"]))  # varies most, so it is drawn
    np.savez(tmp_path / "embeddings.npz", **data)
    assert 'a & "b" <c>' in panels(drawings(report.draw(tmp_path).read_text("utf-8"))[name])


def test_patches_without_coordinates_are_left_out(tmp_path):
    lines = slide_of("a", "p", 4) + ["lost.png,p,a,ill,val,,", "odd.png,p,a,ill,val,1,left"]
    lines += slide_of("t", "q", 2, split="train")
    _, data = results_of(tmp_path, lines)
    assert np.isnan(data["x"]).sum() == np.isnan(data["y"]).sum() == 2
    (svg,) = drawings(report.draw(tmp_path).read_text()).values()
    assert set(said(svg)) == {f"a-{i}.png" for i in range(4)}
    assert panels(svg)["label"][0][..., 1].tolist() == [[255, 255, 255], [255, 0, 0]]  # 3 and 1


def test_without_any_coordinate_the_page_is_as_before(tmp_path):
    lines = [re.sub(r"[^,]*,[^,]*$", ",", line) for line in slide_of("a", "p", 4)]
    _, data = results_of(tmp_path, lines + ["t.png,q,t,ill,train,,"])
    assert "x" not in data
    page = report.draw(tmp_path).read_text()
    assert not drawings(page)
    assert section(page, "gallery").count('<div class="card">') == 4


def test_unlabelled_patches_have_no_probability_and_no_label(tmp_path):
    lines = slide_of("a", "p", 2) + ["u.png,p,a,,val,5,0"] + slide_of("t", "q", 2, split="train")
    results_of(tmp_path, lines, votes=np.ones((2, 1)))
    (svg,) = drawings(report.draw(tmp_path).read_text()).values()
    maps = panels(svg)
    for title in ("probability of ill", "label"):
        assert maps[title][0][0, :, 1].tolist() == [255, 255, 0, 0, 0, 0]
    assert said(svg)["u.png"][:2] == ["nan%", "-"]


@pytest.mark.parametrize("unit", [1, 0.11264, 256, 1e-5])
def test_the_step_is_the_commonest_distance(unit):
    cells = np.array([(0, 0), (1, 0), (2, 0), (5, 1), (6, 1), (0, 9)]).T
    assert (report.grid(cells * unit + 7 * unit) == cells).all()


def test_a_grid_of_little():
    assert report.grid(np.array([[5.0], [6.0]])).tolist() == [[0], [0]]
    assert report.grid(np.array([[5.0, 5.0], [6.0, 9.0]])).tolist() == [[0, 0], [0, 1]]
    scattered = np.random.default_rng(0).random((2, 300))
    assert report.grid(scattered).max() < report.PANEL  # no place has less than a pixel


def test_twenty_slides_of_400_patches_are_under_two_megabytes(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    tiles = [render(rng.random(7), rng).transpose(2, 0, 1) for _ in range(20)]
    monkeypatch.setattr(
        report,
        "decode",
        lambda path, size: np.asarray(
            Image.fromarray(tiles[rng.integers(20)].transpose(1, 2, 0)).resize((size, size))
        ).transpose(2, 0, 1),
    )
    lines = []
    for s in range(20):
        label = list(CLASSES)[s % 4]
        for i in range(400):
            path = f"images/{label}-{s:02d}/{s}-{i:03d}.png"
            lines.append(f"{path},{label}-{s},{label}-{s}-0,{label},val,{i % 20},{i // 20}")
    lines.append("t.png,t,t,normal,train,0,0")
    results_of(tmp_path, lines, votes=rng.dirichlet(np.ones(4), 8000))
    names = [f"{list(CLASSES)[s % 4]}-{s}-0" for s in range(20)]
    page = report.draw(tmp_path, names)
    assert len(drawings(page.read_text())) == 20
    assert page.stat().st_size < 2e6


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
    assert "20 patients, 40 slides, 120 patches. Probes are fitted to the train split" in words
    assert "2 high_grade, 2 low_grade, 2 normal, 2 spindle. Guessing" in words
    assert "accuracy of 25.0%. Trained with --objective hlss --align paper, from no CLIP" in words
    assert words.endswith(" Only 72 training patches have labels, and all of them vote in knn200.")


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_sections_without_content_are_left_out(out, tmp_path):
    change(out, probes={}, classes=[], class_attributes=[], against="", run="gone")
    page = browse(tmp_path, report.draw(out).read_text("utf-8"))
    assert re.findall(r'<section id="(\w+)"', page) == ["gallery", "used", "settings"]
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
          images: seen(".card img").filter(e => e.naturalWidth == 96).length})}</script>"""
    page = report.draw(out).read_text("utf-8").replace("&", "&amp;").replace('"', "&quot;")
    document = browse(tmp_path, look % (width, page, width))
    seen = json.loads(re.search("<title>(.*?)</title>", document)[1])
    assert (seen["spare"] >= 0, seen["out"], seen["flat"]) == (True, 0, 0)
    assert seen["tables"] == 1 + 2 + 4 * 3 + 2  # results; words; matrices; patients, settings
    assert seen["images"] == 12


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
    assert said.startswith(f"error: --show nobody: {out} has no such patch or slide or patient; ")
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
