"""Demo tissue shows the factors behind it and is an ordinary cohort."""

import csv
import os
import sys
import time

import numpy as np
import pytest
import torch.multiprocessing as mp
from PIL import Image

from data import SPLITS, read_cohort
from demo.prepare import made_once
from demo.tissue import CLASSES, FACTORS, drift, fine_sine, main, render, write_demo


def test_demo_tissue_shows_its_factors():
    """More or larger nuclei mean more dark haematoxylin; dead tissue has less."""

    def dark(**factors):
        rng = np.random.default_rng(0)
        values = [factors.get(name, 0.3) for name in FACTORS]
        return np.mean([(render(values, rng)[..., 0] < 130).mean() for _ in range(30)])

    assert dark(cellularity=0.9) > 1.3 * dark()
    assert dark(nuclear_size=0.9) > 1.3 * dark()
    assert dark(necrosis=0.9) < 0.8 * dark()


def test_the_demo_cohort_is_an_ordinary_cohort(cohort_folder):
    cohort = read_cohort(cohort_folder)
    assert str(cohort) == "20 patients, 40 slides, 120 patches"
    assert cohort.classes == sorted(CLASSES)
    assert str(cohort.restrict("val")) == "8 patients, 16 slides, 48 patches"
    with open(os.path.join(cohort_folder, "factors.csv")) as file:
        truth = list(csv.DictReader(file))
    assert sorted(row["path"] for row in truth) == sorted(name.decode() for name in cohort.names)
    assert all(0 <= float(row[f]) <= 1 for row in truth for f in FACTORS)


def test_long_nuclei_and_varied_ones_are_seen():
    """At equal area and without fibres: long nuclei have more border, varied ones darker spots."""

    def look(measure, **factors):
        rng = np.random.default_rng(0)
        values = [
            {"cellularity": 0.3, "nuclear_size": 0.5, **factors}.get(name, 0) for name in FACTORS
        ]
        return np.mean([measure(render(values, rng)[..., 0].astype(float)) for _ in range(30)])

    def border(red):
        dark = red < 130
        return (dark[1:] != dark[:-1]).mean() / dark.mean()

    def darkest(red):
        return np.quantile(red, 0.01)

    assert look(border, elongation=1) > 1.3 * look(border)
    assert look(darkest, pleomorphism=1) < 0.8 * look(darkest)


@pytest.mark.parametrize("held_out", [0, 1, 3])
def test_so_many_patients_of_each_class_are_held_out(held_out, tmp_path):
    write_demo(str(tmp_path), patients=3, held_out=held_out, slides=1, patches=1)
    cohort = read_cohort(str(tmp_path))
    expected = {f"{label}-{p:02d}" for label in CLASSES for p in range(held_out)}
    in_val = cohort.names[cohort.split == SPLITS.index("val")].astype(str)
    assert {name.split("/")[1] for name in in_val} == expected
    assert (cohort.split == SPLITS.index("train")).sum() == len(CLASSES) * (3 - held_out)


# ------------------------------------------------------------------------------ places on a slide


@pytest.mark.parametrize(("patches", "columns"), [(1, 1), (2, 2), (3, 3), (7, 4), (8, 4), (10, 4)])
def test_the_patches_of_a_slide_lie_on_a_grid(patches, columns, tmp_path):
    write_demo(str(tmp_path), patients=1, held_out=0, slides=1, patches=patches)
    assert len(read_cohort(str(tmp_path))) == 4 * patches
    slides = {}
    for row in csv.DictReader(open(tmp_path / "manifest.csv")):
        slides.setdefault(row["slide"], []).append((int(row["x"]), int(row["y"])))
    expected = [(64 * (b % columns), 64 * (b // columns)) for b in range(patches)]
    assert list(slides.values()) == [expected] * 4


def test_two_factors_drift_over_a_slide():
    """A smooth wave with mean 0: neighbours differ less than distant places."""
    grid = np.array([(x, y) for y in range(8) for x in range(8)])
    rng = np.random.default_rng(0)
    waves = np.stack([drift(grid, rng) for _ in range(100)])
    smooth = [FACTORS.index("cellularity"), FACTORS.index("necrosis")]
    assert not np.delete(waves, smooth, axis=2).any()
    waves = waves[..., smooth].reshape(100, 8, 8, 2)
    np.testing.assert_allclose(waves.mean(axis=(1, 2)), 0, atol=1e-12)
    assert np.abs(waves[:, :, 1:] - waves[:, :, :-1]).max() < 0.15 * np.pi / 7
    assert 0.05 < waves.std() < 0.15
    assert abs(np.corrcoef(waves.reshape(-1, 2).T)[0, 1]) < 0.2
    assert not drift(np.array([[0, 0]]), rng).any()


def test_the_drift_is_in_the_truth(tmp_path):
    """Within a slide, these two factors vary more than the others, which vary only by noise."""
    write_demo(str(tmp_path), patients=8, held_out=0, slides=2, patches=8)
    with open(tmp_path / "factors.csv") as file:
        rows = [[float(row[f]) for f in FACTORS] for row in csv.DictReader(file)]
    slides = np.array(rows).reshape(-1, 8, len(FACTORS))
    steps = np.abs(np.diff(slides.reshape(-1, 2, 4, len(FACTORS)), axis=1))[:, 0]
    assert np.median(steps, axis=(0, 1))[FACTORS.index("fibres")] > 0.04
    ends = slides[:, [0, 4]].mean(axis=1) - slides[:, [3, 7]].mean(axis=1)  # left minus right
    spread = np.median(np.abs(ends), axis=0)
    assert spread[FACTORS.index("necrosis")] > 1.5 * spread[FACTORS.index("nuclear_size")]


# ---------------------------------------------------------------------- the signature of a patient


def peak(path):
    """A patch's strongest wave of 3 to 5 pixels: its cycles in x and y, and how much stronger it is
    than the median wave."""
    density = -np.log((np.asarray(Image.open(path), dtype=float) + 1) / 256).mean(axis=2)
    window = np.hanning(64)  # keeps waves sharp that do not fit a whole number of times
    spectrum = np.abs(np.fft.fft2((density - density.mean()) * np.outer(window, window)))
    frequency = np.fft.fftfreq(64, 1 / 64)
    radius = np.hypot(frequency[:, None], frequency)
    band = (radius > 64 / 5.2) & (radius < 64 / 2.9) & (frequency[:, None] >= 0)
    y, x = np.unravel_index(np.where(band, spectrum, 0).argmax(), band.shape)
    return (frequency[y], frequency[x]), spectrum[y, x] / np.median(spectrum[band])


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    """The same cohort without and with scanner signatures of strength 0.25: {signature: folder}."""
    folders = {}
    for signature in (0.0, 0.25):
        folder = str(tmp_path_factory.mktemp("twin"))
        folders[signature] = write_demo(
            folder, patients=2, held_out=1, slides=2, patches=3, signature=signature
        )
    return folders


def peaks_of_patients(folder):
    """(where, strength) for each patient: what `peak` finds in each patch."""
    cohort = read_cohort(folder)
    found = {}
    for row, patient in enumerate(cohort.patient):
        found.setdefault(patient, []).append(peak(cohort.path(row)))
    return [tuple(zip(*peaks)) for peaks in found.values()]


def test_no_signature_leaves_the_pixels_as_they_are():
    values = [0.5] * len(FACTORS)
    plain = render(values, np.random.default_rng(0))
    blank = fine_sine(np.random.default_rng(1), 0.0)
    assert np.array_equal(render(values, np.random.default_rng(0), scanner=blank), plain)


def test_a_signature_changes_nothing_else(twins):
    """The factors stay the same, and so does the mean of each patch."""
    plain, signed = (open(os.path.join(folder, "factors.csv")).read() for folder in twins.values())
    assert plain == signed
    for name in read_cohort(twins[0.0]).names.astype(str):
        a, b = (np.asarray(Image.open(os.path.join(f, name)), float) for f in twins.values())
        assert 1 < np.abs(a - b).mean() < 20
        assert abs(a.mean() - b.mean()) < 2


def test_a_signature_is_one_wave_for_all_patches_of_a_patient(twins):
    """Tissue without a signature has a different strongest wave in each patch."""
    pairs = zip(*map(peaks_of_patients, twins.values()))
    for (plain_where, plain_strength), (where, strength) in pairs:
        assert np.ptp(where, axis=0).max() <= 1  # out of 13 to 21 cycles per patch
        assert np.ptp(plain_where, axis=0).max() > 1
        assert np.median(strength) > 1.4 * np.median(plain_strength)


def test_a_signature_tells_patients_apart(twins):
    first = [where[0] for where, _ in peaks_of_patients(twins[0.25])]
    distances = [np.hypot(*np.subtract(a, b)) for i, a in enumerate(first) for b in first[:i]]
    assert np.median(distances) > 5


def test_the_command_refuses_a_folder_that_holds_a_cohort(tmp_path, monkeypatch, capsys):
    command = [
        "tissue.py",
        str(tmp_path),
        "--patients",
        "1",
        "--held-out",
        "0",
        "--signature",
        "0.1",
    ]
    monkeypatch.setattr(sys, "argv", command)
    main()
    assert "4 patients, 12 slides, 96 patches" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="already holds a cohort: name another folder"):
        main()


def _make(folder):
    """Slowly writes a folder that says who wrote it."""
    os.makedirs(folder)
    for name in ("a", "b", "c"):
        time.sleep(0.2)
        with open(os.path.join(folder, name), "w") as file:
            file.write(str(os.getpid()))


def test_of_two_first_demos_at_once_both_take_the_same_files(tmp_path):
    context = mp.get_context("forkserver")
    folder = str(tmp_path / "tissue")
    both = [context.Process(target=made_once, args=(folder, _make)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert os.listdir(tmp_path) == ["tissue"]
    writers = {(tmp_path / "tissue" / name).read_text() for name in ("a", "b", "c")}
    assert len(writers) == 1
