"""tools.cohort: manifests from folders and from OpenSRH, and their check."""

import json
import os
import re
import shutil
import sys

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from test_train import log_of

import data
import train
from tools import cohort as tool

RNG = np.random.default_rng(0)


def tiles(root, names):
    for name in names:
        os.makedirs(os.path.dirname(root / name), exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (16, 16, 3), np.uint8)).save(root / name)
    return str(root)


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["cohort.py", *words])
    tool.main()


# ------------------------------------------------------------------------------------------ OpenSRH


def write_opensrh(root, patients=3, slides=2, patches=3, size=40):
    """Writes OpenSRH as released: two classes; files listed for the other class do not exist."""
    meta, split = {}, {"train": [], "val": []}
    for i, kind in enumerate(["hgg", "normal"] * patients):
        patient = f"NIO_{i:03d}"
        meta[patient] = {"patient_id": patient, "class": kind, "slides": {}}
        split["val" if i < 2 else "train"].append(patient)
        for slide in map(str, range(1, slides + 1)):
            lists = meta[patient]["slides"][slide] = {
                "slide_id": slide,
                "tumor_patches": [],
                "normal_patches": [],
                "nondiagnostic_patches": [f"studies/{patient}/{slide}/patches/blank.tif"],
            }
            own = "normal_patches" if kind == "normal" else "tumor_patches"
            for b in range(patches):
                path = f"studies/{patient}/{slide}/patches/{patient}-{slide}-{b}.tif"
                os.makedirs(os.path.dirname(root / path), exist_ok=True)
                tifffile.imwrite(root / path, RNG.integers(2000, 20000, (2, size, size), np.uint16))
                lists[own].append(path)
            other = "normal_patches" if own == "tumor_patches" else "tumor_patches"
            lists[other].append(f"studies/{patient}/{slide}/patches/of-the-other-kind.tif")
    os.makedirs(root / "meta")
    (root / "meta/opensrh.json").write_text(json.dumps(meta))
    (root / "meta/train_val_split.json").write_text(json.dumps(split))
    return str(root)


def test_opensrh_as_released(tmp_path, monkeypatch):
    command(monkeypatch, "opensrh", write_opensrh(tmp_path))
    cohort = data.read_cohort(str(tmp_path))
    assert str(cohort) == "6 patients, 12 slides, 36 patches"
    assert cohort.classes == ["hgg", "normal"]
    assert cohort.group_names[0][:3] == [
        "NIO_000/1",
        "NIO_000/2",
        "NIO_001/1",
    ]  # every patient's slides are called 1 and 2
    assert str(cohort.restrict("val")) == "2 patients, 4 slides, 12 patches"
    assert not any(b"other-kind" in name for name in cohort.names)


def test_opensrh_as_its_own_loaders_read_it(tmp_path):
    """Only the split's patients, labelled by the patient's class; [2, H, W] is CH2 and CH3."""
    root = write_opensrh(tmp_path)
    file = tmp_path / "meta/opensrh.json"
    meta = json.loads(file.read_text())
    meta["NIO_900"] = {"patient_id": "NIO_900", "class": "lowgrade", "slides": {"1": {}}}
    meta["NIO_000"]["slides"]["1"]["slide_class"] = "normal"  # FastGlioma adds this
    file.write_text(json.dumps(meta))
    cohort = tool.opensrh(root)
    assert str(cohort) == "6 patients, 12 slides, 36 patches"
    assert cohort.name(0) == "studies/NIO_000/1/patches/NIO_000-1-0.tif"
    assert cohort.classes[cohort.label[0]] == "hgg"
    assert (cohort.split == 0).sum() == 24
    pixels = tifffile.imread(cohort.path(0))
    assert pixels.shape == (2, 40, 40)
    assert (data.decode(cohort.path(0)) == pixels).all()
    ch2 = data.intensities(torch.from_numpy(pixels)[None])[0, 1]
    assert np.allclose(ch2, pixels[0] / 65536)


@pytest.mark.parametrize(
    "how",
    [
        {},  # forty frames of 40 x 2
        {"photometric": "minisblack", "planarconfig": "contig"},  # one frame of two samples
    ],
)
def test_opensrh_with_channels_last_is_refused_and_mended(tmp_path, how):
    root = write_opensrh(tmp_path)
    first = tmp_path / "studies/NIO_000/1/patches/NIO_000-1-0.tif"
    tifffile.imwrite(first, np.moveaxis(tifffile.imread(first), 0, -1), **how)
    assert tifffile.imread(first).shape == (40, 40, 2)
    with pytest.raises(ValueError, match=r"NIO_000-1-0\.tif is not a TIFF .*\[2, H, W\]"):
        tool.opensrh(root)
    tifffile.imwrite(first, tifffile.imread(first).transpose(2, 0, 1))  # the remedy in the error
    assert len(tool.opensrh(root)) == 36


def test_opensrh_has_its_places_in_its_names(tmp_path, monkeypatch):
    """ix_jx_iy_jy: fields of 1,000 pixels with 3 x 3 patches, 300 pixels apart; i goes down."""
    root = write_opensrh(tmp_path)
    file = tmp_path / "meta/opensrh.json"
    ends = {"0": "0_0_0_300", "1": "0_1000_600_0", "2": "2000_0_300_600"}
    for b, end in ends.items():
        for path in tmp_path.glob(f"studies/*/*/patches/*-{b}.tif"):
            path.rename(path.with_name(path.name.replace(f"-{b}.tif", f"-{end}.tif")))
        file.write_text(file.read_text().replace(f"-{b}.tif", f"-{end}.tif"))
    command(monkeypatch, "opensrh", root)
    places = tool.coordinates(root)
    assert len(places) == 36
    found = [places[f"studies/NIO_001/2/patches/NIO_001-2-{end}.tif"] for end in ends.values()]
    assert found == [(1, 0), (3, 2), (2, 7)]  # column, row


def test_opensrh_without_its_images_is_for_the_check_to_say(tmp_path):
    root = write_opensrh(tmp_path)
    shutil.rmtree(tmp_path / "studies")
    assert len(tool.opensrh(root)) == 36


def test_opensrh_of_another_form_is_refused(tmp_path):
    root = write_opensrh(tmp_path)
    (tmp_path / "meta/train_val_split.json").write_text('{"train": ["NIO_000"]}')
    with pytest.raises(ValueError, match=r"train_val_split\.json are not OpenSRH's \(KeyError"):
        tool.opensrh(root)


def test_opensrh_trains(tmp_path, flags, monkeypatch):
    root = write_opensrh(tmp_path / "srh")
    command(monkeypatch, "opensrh", root)
    train.train(
        config := train.parse_config(
            [
                "--preset",
                "opensrh",
                *flags,
                "--data",
                root,
                "--steps",
                "2",
                "--image-size",
                "0",
            ]
        )
    )
    assert config.augmentation == "strong-srh"
    assert log_of(config.out)[-1]["probe"]["knn20"]["levels"]["patient"]["n"] == 2


# --------------------------------------------------------------------------------- folders of tiles


def test_a_folder_tree_becomes_a_manifest(tmp_path, monkeypatch, capsys):
    root = tiles(
        tmp_path,
        [
            f"{label}/{patient}/s{s}-{patient}/{b}.png"
            for label, patient in [("glioma", "amy"), ("normal", "bob")]
            for s in range(2)
            for b in range(3)
        ],
    )
    (tmp_path / "notes.txt").write_text("no image")
    command(
        monkeypatch,
        "index",
        root,
        "--pattern",
        "{label}/{patient}/{slide}/*.png",
        "--label-level",
        "patient",
    )
    printed = capsys.readouterr().out
    assert "glioma/amy/s0-amy/0.png -> patient amy, slide s0-amy, label glioma\n" in printed
    assert "normal/bob/s1-bob/2.png -> patient bob, slide s1-bob, label normal\n" in printed
    assert "2 patients, 4 slides, 12 patches, 2 classes" in printed
    assert "patches per slide: 3 to 3, median 3" in printed
    assert "patches: 12, glioma 6, normal 6\n" in printed
    assert "patients in train: 1, normal 1\npatients in val: 1, glioma 1\n" in printed
    cohort = data.read_cohort(root)
    assert cohort.group_names[0] == ["s0-amy", "s1-amy", "s0-bob", "s1-bob"]
    assert cohort.path(0) == os.path.join(root, "glioma/amy/s0-amy/0.png")
    with pytest.raises(ValueError, match="--overwrite"):
        command(monkeypatch, "index", root, "--pattern", "{label}/{patient}/{slide}/*.png")


def test_coordinates_are_in_the_names_and_stay(tmp_path, monkeypatch):
    """Numbers in any unit; a patch that cannot be read is left out, and its place with it."""
    names = ["s_1_-64_12.5.png", "s_1_0_12.5.png", "t_64_0.png"]
    root = tiles(tmp_path, [f"{patient}/{name}" for patient in ("amy", "bob") for name in names])
    command(monkeypatch, "index", root, "--pattern", "{patient}/{slide}_{x}_{y}.png", "--nested")
    places = {"s_1_-64_12.5.png": (-64, 12.5), "s_1_0_12.5.png": (0, 12.5), "t_64_0.png": (64, 0)}
    expected = {f"{patient}/{name}": places[name] for patient in ("amy", "bob") for name in names}
    assert tool.coordinates(root) == tool.coordinates(f"{root}/manifest.csv") == expected
    assert data.read_cohort(root).group_names[0] == ["amy/s_1", "amy/t", "bob/s_1", "bob/t"]

    (tmp_path / "amy/t_64_0.png").write_bytes(b"not an image")
    with pytest.raises(SystemExit):
        command(monkeypatch, "check", root, "--clean", "clean.csv")
    del expected["amy/t_64_0.png"]
    assert tool.coordinates(f"{root}/clean.csv") == expected


def test_what_is_no_coordinate_is_missing(tmp_path):
    """Also where a spreadsheet left a mark in front, and blanks; without the columns, all are."""
    lines = ["path, patient,slide, x,y", "a.png,p,s,1,2", "b.png,p,s,,2", "c.png,p,s,1,left"]
    text = "\ufeff" + "\n".join([*lines, '"d,e.png",p,s, 3.5, -4'])
    (tmp_path / "manifest.csv").write_text(text, "utf-8")
    assert tool.coordinates(str(tmp_path)) == {"a.png": (1, 2), "d,e.png": (3.5, -4)}
    assert len(data.read_cohort(tmp_path)) == 4
    (tmp_path / "manifest.csv").write_text("path,patient,slide\na.png,p,s\n")
    assert tool.coordinates(str(tmp_path)) == {}


def test_names_of_tcga(tmp_path):
    root = tiles(
        tmp_path,
        [
            "TCGA-02-0001-01Z-00-DX1_12_34.jpg",
            "TCGA-02-0001-01Z-00-DX2_0_0.jpg",
            "TCGA-06-0125-01A-01-TS1_7_8.jpg",
        ],
    )
    cohort = tool.index(root, r"(?P<slide>(?P<patient>TCGA-\w{2}-\w{4})-.*)_\d+_\d+\.jpg")
    assert cohort.group_names[-1] == ["TCGA-02-0001", "TCGA-06-0125"]
    assert cohort.group_names[0] == [
        "TCGA-02-0001-01Z-00-DX1",
        "TCGA-02-0001-01Z-00-DX2",
        "TCGA-06-0125-01A-01-TS1",
    ]
    assert cohort.classes == []


TCGA = [
    "brca/TCGA-02-0001-01Z-00-DX1_12_34.jpg",
    "brca/TCGA-02-0001-01Z-00-DX2_0_0.jpg",
    "brca/TCGA-02-0003-01Z-00-DX1_5_6.jpg",
    "luad/TCGA-06-0125-01A-01-TS1_7_8.jpg",
]


def test_a_pattern_that_makes_one_patient_of_all_writes_nothing(tmp_path, monkeypatch, capsys):
    """{patient} ends at the first dash, so all are TCGA. The suggested pattern finds them."""
    root = tiles(tmp_path, TCGA)
    words = ["index", root, "--pattern", "{label}/{patient}-{slide}_*.jpg"]
    with pytest.raises(ValueError, match=r"fewer patients \(1\) than classes \(2\)") as doubt:
        command(monkeypatch, *words)
    printed = capsys.readouterr().out
    assert f"{TCGA[0]} -> patient TCGA, slide 02-0001-01Z-00-DX1, label brca\n" in printed
    assert not os.path.exists(tmp_path / "manifest.csv")

    (remedy,) = re.findall("--pattern '(.*)'", str(doubt.value))
    command(monkeypatch, "index", root, "--pattern", remedy)
    cohort = data.read_cohort(root)
    assert cohort.group_names[-1] == ["TCGA-02-0001", "TCGA-02-0003", "TCGA-06-0125"]
    assert cohort.group_names[0][0] == "TCGA-02-0001-01Z-00-DX1"

    command(monkeypatch, *words, "--yes", "--overwrite")
    assert data.read_cohort(root).group_names[-1] == ["TCGA"]


def test_a_patient_with_over_half_of_the_patches_is_doubted(tmp_path, monkeypatch):
    root = tiles(tmp_path, ["amy/1/0.png", "amy/1/1.png", "amy/2/0.png", "bob/3/0.png"])
    words = ["index", root, "--pattern", "{patient}/{slide}/*.png"]
    with pytest.raises(ValueError, match="patient amy has 3 of the 4 patches"):
        command(monkeypatch, *words)
    tiles(tmp_path, ["bob/3/1.png", "bob/3/2.png"])
    command(monkeypatch, *words)  # exactly half is accepted


def test_linked_folders_are_followed_but_not_for_ever(tmp_path):
    tiles(tmp_path, ["disk/bob/1/0.png"])
    root = tiles(tmp_path / "cohort", ["amy/1/0.png"])
    os.symlink(tmp_path / "disk/bob", tmp_path / "cohort/bob")
    os.symlink(tmp_path / "cohort", tmp_path / "cohort/amy/back")  # a cycle
    os.symlink(tmp_path / "disk/bob", tmp_path / "cohort/twin")  # bob again: his images count once
    os.symlink(tmp_path / "nowhere", tmp_path / "cohort/broken")
    assert tool.image_files(root) == ["amy/1/0.png", "bob/1/0.png"]


BREAKHIS = {  # tumour type: file names up to the magnification
    "benign/SOB/adenosis": ["SOB_B_A-14-22549AB", "SOB_B_A-14-22549CD"],
    "benign/SOB/fibroadenoma": ["SOB_B_F-14-14134"],
    "benign/SOB/phyllodes_tumor": ["SOB_B_PT-14-21998AB"],
    "benign/SOB/tubular_adenoma": ["SOB_B_TA-14-3411F"],
    "malignant/SOB/ductal_carcinoma": ["SOB_M_DC-14-2523", "SOB_M_DC-14-13412"],
    "malignant/SOB/lobular_carcinoma": ["SOB_M_LC-14-13412"],  # filed under two types
    "malignant/SOB/mucinous_carcinoma": ["SOB_M_MC-14-13-418DE"],
    "malignant/SOB/papillary_carcinoma": ["SOB_M_PC-14-9146"],
}


@pytest.fixture
def breakhis(tmp_path):
    """BreaKHis as released (Spanhol et al. 2016), but smaller; one slide each, four magnifications.

    benign/SOB/adenosis/SOB_B_A_14-22549AB/40X/SOB_B_A-14-22549AB-40-001.png
    """
    names = []
    for tumour, patients in BREAKHIS.items():
        for patient in patients:
            for times in (40, 100, 200, 400):
                folder = f"{tumour}/{patient.replace('-', '_', 1)}/{times}X"
                names += [f"{folder}/{patient}-{times}-{i:03d}.png" for i in (1, 10)]
    return tiles(tmp_path / "BreaKHis_v1/histology_slides/breast", names)


def test_breakhis_at_one_magnification_by_two_classes(breakhis, monkeypatch, capsys):
    """Without {slide}, each patient is one slide. Patient 14-13412 is in two folders."""
    pattern = "{label}/SOB/*/SOB_*_{patient}/40X/*.png"
    words = ["index", breakhis, "--pattern", pattern, "--partial", "--label-level", "patient"]
    command(monkeypatch, *words)
    printed = capsys.readouterr().out
    assert "left out: 60 image files that do not match, like benign/SOB/adenosis/" in printed
    assert "9 patients, 9 slides, 20 patches, 2 classes" in printed
    cohort = data.read_cohort(breakhis)
    assert cohort.classes == ["benign", "malignant"]
    assert cohort.group_names[0] == cohort.group_names[1]
    assert {"14-22549AB", "14-2523", "14-13412", "14-13-418DE"} <= set(cohort.group_names[-1])
    assert all("/40X/" in cohort.name(row) for row in range(20))


def test_breakhis_by_eight_types(breakhis):
    pattern = "*/SOB/{label}/SOB_*_{patient}/40X/*.png"
    cohort = tool.index(breakhis, pattern, partial=True)
    assert str(cohort) == "9 patients, 9 slides, 20 patches"
    assert cohort.classes == sorted(os.path.basename(tumour) for tumour in BREAKHIS)
    with pytest.raises(
        ValueError, match=r"two labels: .*DC-14-13412-40-001\.png and .*LC-14-13412"
    ):
        tool.index(breakhis, pattern, "patient", partial=True)


def test_breakhis_by_four_types_of_many_patients(breakhis):
    """As in eva, from the file names alone."""
    pattern = r".*/SOB_._(?P<label>TA|MC|F|DC)-\d+-(?P<patient>[^/]+)-40-\d+\.png"
    cohort = tool.index(breakhis, pattern, "patient", partial=True)
    assert cohort.classes == ["DC", "F", "MC", "TA"]
    assert (
        cohort.group_names[0]
        == cohort.group_names[1]
        == ["13-418DE", "13412", "14134", "2523", "3411F"]
    )
    assert len(cohort) == 10


def test_a_name_may_stand_twice(tmp_path):
    root = tiles(tmp_path, ["amy/amy_1/0.png", "amy/amy_2/0.png", "bob/bob_1/x/0.png"])
    cohort = tool.index(root, "{patient}/{patient}_{slide}/**.png", nested=True)
    assert cohort.group_names[0] == ["amy/1", "amy/2", "bob/1"]
    with pytest.raises(ValueError, match="not 1 others"):
        tool.index(root, "{patient}/{patient}_{slide}/*.png")


def test_ambiguity_is_refused_with_examples(tmp_path):
    root = tiles(tmp_path, ["a/amy/1/x.png", "a/bob/1/x.png", "b/amy/2/x.png", "stray.png"])
    with pytest.raises(ValueError, match=r"matches 3 image files but not 1 others\n    stray\.png"):
        tool.index(root, "{label}/{patient}/{slide}/*.png")
    with pytest.raises(ValueError, match="slide '1' belongs to 'bob' here and to 'amy' above"):
        tool.index(root, "{label}/{patient}/{slide}/*.png", partial=True)
    assert (
        len(
            tool.index(
                root, "{label}/{patient}/{slide}/*.png", partial=True, nested=True
            ).group_names[0]
        )
        == 3
    )
    with pytest.raises(
        ValueError, match=r"one patient has two labels: a/amy/1/x\.png and b/amy/2/x\.png"
    ):
        tool.index(root, "{label}/{patient}/{slide}/*.png", "patient", partial=True, nested=True)
    with pytest.raises(ValueError, match="matches 0 image files"):
        tool.index(root, "{patient}/{slide}.tif")
    with pytest.raises(ValueError, match=r"'\(\?P<slide>\[' is not a regular expression"):
        tool.index(root, "(?P<slide>[")
    with pytest.raises(
        ValueError, match="must name patient, and may name slide, label, split, x, y; it names case"
    ):
        tool.index(root, "{case}/*.png")


def test_what_is_no_tile_is_not_indexed(tmp_path):
    """Hidden files, such as macOS's, and whole slides, arrays and documents."""
    root = tiles(tmp_path, ["amy/s/0.png", "amy/s/1.JPG", "amy/s/.trash/2.png"])
    shutil.copy(tmp_path / "amy/s/0.png", tmp_path / "amy/s/._0.png")
    for name in ("0.h5", "0.pdf", "0.svs"):
        (tmp_path / "amy/s" / name).write_bytes(b"")
    assert tool.image_files(root) == ["amy/s/0.png", "amy/s/1.JPG"]
    for name in ("0.png", "1.JPG"):
        os.remove(tmp_path / "amy/s" / name)
    with pytest.raises(ValueError, match=r"TRIDENT can cut slides"):
        tool.index(root, "{patient}/{slide}/*")


def test_a_manifest_of_read_only_data_is_written_elsewhere(tmp_path, monkeypatch, capsys):
    root = tiles(tmp_path / "data", ["amy/s/0.png", "bob/t/1.png"])
    out = str(tmp_path / "mine.csv")
    words = ["index", root, "--pattern", "{patient}/{slide}/*.png", "--yes", "--out"]
    command(monkeypatch, *words, out)
    assert data.read_cohort(out).path(1) == str(tmp_path / "data/bob/t/1.png")
    with pytest.raises(SystemExit):
        command(monkeypatch, "check", out, "--clean", "clean.csv")
    assert data.read_cohort(str(tmp_path / "clean.csv")).root == root
    assert sorted(os.listdir(root)) == ["amy", "bob"]
    for name in ("mine.csv", "mine"):
        with pytest.raises(ValueError, match=rf"{name} already exists .* or is not a \.csv"):
            command(monkeypatch, *words, str(tmp_path / name))


# -------------------------------------------------------------------------------------------- check


def test_check_finds_what_cannot_be_used(tmp_path, monkeypatch, capsys):
    root = tiles(tmp_path, [f"amy/s/{i}.png" for i in range(8)])
    whole = (tmp_path / "amy/s/0.png").read_bytes()
    (tmp_path / "amy/s/0.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "amy/s/1.png").write_bytes(b"not an image")
    Image.new("RGB", (16, 16), (235, 205, 225)).save(tmp_path / "amy/s/2.png")  # tinted glass
    command(monkeypatch, "index", root, "--pattern", "{patient}/{slide}/*.png", "--yes")
    os.remove(tmp_path / "amy/s/3.png")
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, "check", root, "--clean", "clean.csv")
    assert stop.value.code == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("amy")] == [
        "amy/s/0.png: truncated: image file is truncated",
        "amy/s/1.png: unreadable: cannot identify image file",
        "amy/s/2.png: constant: standard deviation 0.0, less than 2.5",
        "amy/s/3.png: missing: no such file",
    ]
    assert "cannot be used: 1 truncated, 1 unreadable, 1 constant, 1 missing" in lines
    assert len(data.read_cohort(str(tmp_path / "clean.csv"))) == 4
    header = (tmp_path / "clean.csv").read_text().splitlines()[0]
    assert header == "path,patient,slide"  # a hash split needs no column
    for name in ("clean.csv", "manifest.csv", "clean"):
        with pytest.raises(ValueError, match=f"--clean {name}: name a file"):
            command(monkeypatch, "check", root, "--clean", name)
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, "check", str(tmp_path / "clean.csv"))
    assert stop.value.code == 0
    assert "cannot be used: none" in capsys.readouterr().out


def test_equal_images_are_remarked_on_and_stay(tmp_path, monkeypatch, capsys):
    names = ["amy/s/0.png", "amy/s/1.png", "amy/s/2.png", "bob/t/3.png", "bob/t/4.png"]
    root = tiles(tmp_path, names)
    for copy in ("amy/s/2.png", "bob/t/3.png"):  # the first belongs to the same patient
        shutil.copy(tmp_path / "amy/s/1.png", tmp_path / copy)
    command(monkeypatch, "index", root, "--pattern", "{patient}/{slide}/*.png", "--yes")
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, "check", root, "--clean", "clean.csv", "--workers", "0")
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert "note: 1 images are also another patient's, like amy/s/1.png and bob/t/3.png" in lines
    assert len(data.read_cohort(str(tmp_path / "clean.csv"))) == 5
