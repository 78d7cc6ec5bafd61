"""Cohorts as they come: OpenSRH, folders of tiles, bad files, unbalanced classes."""

import json
import os
import shutil
import sys

import numpy as np
import pytest
import tifffile
import torch
from bench_data import speed
from PIL import Image
from test_data import manifest, many
from test_train import log_of

import data
import train
from model import checkpoints

RNG = np.random.default_rng(0)
PLANES = RNG.integers(2000, 20000, (2, 40, 40), np.uint16)


# ------------------------------------------------------------------------------------------------------------- OpenSRH


def write_opensrh(root, patients=3, slides=2, patches=3, size=40):
    """A cohort as released: two classes, of whose slides the other class's patches are never shown."""
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


def test_opensrh_as_released(tmp_path):
    cohort = data.read_cohort(write_opensrh(tmp_path))
    assert str(cohort) == "6 patients, 12 slides, 36 patches"
    assert cohort.classes == ["hgg", "normal"]
    assert cohort.slides[:3] == [
        "NIO_000/1",
        "NIO_000/2",
        "NIO_001/1",
    ]  # slides of all patients are called 1 and 2
    assert str(cohort.restrict("val")) == "2 patients, 4 slides, 12 patches"
    assert not any(b"other-kind" in name for name in cohort.names)


def test_opensrh_of_another_form_is_refused(tmp_path):
    root = write_opensrh(tmp_path)
    (tmp_path / "meta/train_val_split.json").write_text('{"train": ["NIO_000"]}')
    with pytest.raises(
        ValueError, match=r"train_val_split\.json are not OpenSRH's \(KeyError 'NIO_001'\)"
    ):
        data.read_cohort(root)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"compression": "zlib"},
        {"compression": "zlib", "predictor": 2},
        {"tile": (16, 16)},
        {"bigtiff": True},
        {"byteorder": ">"},
        {"byteorder": ">", "compression": "zlib"},
        {"photometric": "minisblack", "metadata": None},
    ],
)
def test_two_planes_are_tifffiles_bit_by_bit(tmp_path, how):
    tifffile.imwrite(tmp_path / "x.tif", PLANES, **how)
    pixels = data.decode(str(tmp_path / "x.tif"), 40)
    assert pixels.dtype == np.uint16
    assert (pixels == tifffile.imread(tmp_path / "x.tif")).all()
    assert (pixels == PLANES).all()


def test_a_damaged_tiff_is_refused_wherever_it_is_cut(tmp_path):
    with tifffile.TiffWriter(tmp_path / "x.tif") as file:
        file.write(PLANES[0])
        file.write(PLANES[1], contiguous=False)
    whole = (tmp_path / "x.tif").read_bytes()
    assert (data.decode(str(tmp_path / "x.tif")) == PLANES).all()
    for kept in [*range(0, len(whole) - 1, 97), len(whole) - 10]:
        (tmp_path / "x.tif").write_bytes(whole[:kept])
        with pytest.raises(ValueError, match=r"x\.tif cannot be read \("):
            data.decode(str(tmp_path / "x.tif"), 40)
    with pytest.raises(ValueError, match="truncated"):
        data.decode(str(tmp_path / "x.tif"), 40)


@pytest.mark.parametrize(
    ("pixels", "layout"),
    [
        (
            np.moveaxis(PLANES, 0, -1),
            "40 frames of 2 x 40, I;16",
        ),  # channels last: opens as forty narrow frames
        (PLANES[:1], "1 frames of 40 x 40, I;16"),
        (np.concatenate([PLANES, PLANES]), "4 frames of 40 x 40, I;16"),
        (PLANES.astype(np.float32), "2 frames of 40 x 40, F"),
        ((PLANES >> 8).astype(np.uint8), "2 frames of 40 x 40, L"),
    ],
)
def test_another_layout_is_refused_by_name(tmp_path, pixels, layout):
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="minisblack")
    with pytest.raises(ValueError, match=rf"x\.tif cannot be read \({layout}; beside 8-bit"):
        data.decode(str(tmp_path / "x.tif"), 40)


def test_frames_of_two_sizes_and_deep_pngs_are_refused(tmp_path):
    with tifffile.TiffWriter(tmp_path / "x.tif") as file:
        file.write(PLANES[0])
        file.write(PLANES[1, :20])
    with pytest.raises(ValueError, match="2 frames of 40 x 20, I;16 and 40 x 40, I;16"):
        data.decode(str(tmp_path / "x.tif"), 40)
    Image.fromarray(PLANES[0]).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"1 frames of 40 x 40, I"):
        data.decode(str(tmp_path / "x.png"), 40)


def test_sixteen_bits_reach_the_device(tmp_path):
    """The third channel is CH3 - CH2 + 5000 / 65536; 8 bits would leave 256 levels."""
    tifffile.imwrite(tmp_path / "x.tif", PLANES)
    images = torch.from_numpy(data.decode(str(tmp_path / "x.tif"), 40))[None]
    ch2, ch3 = torch.from_numpy(PLANES.astype(np.float64)) / 65536
    expected = torch.stack([(ch3 - ch2 + 5000 / 65536).clamp(0, 1), ch2, ch3])[None].float()
    torch.testing.assert_close(data.plain_view(images, 40), expected, atol=1e-6, rtol=0)
    still = data.view_parameters(2, 0, 0, {})
    torch.testing.assert_close(data.make_views(images, still, 40)[1:], expected, atol=1e-5, rtol=0)
    assert expected.min() == 0  # the clamp acts
    half = data.decode(str(tmp_path / "x.tif"), 20)
    assert half.dtype == np.uint16
    assert abs(half.mean() - PLANES.mean()) < 200


def test_a_cohort_is_of_one_depth(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", PLANES)
    Image.new("RGB", (40, 40)).save(tmp_path / "b.png")
    cohort = data.read_cohort(manifest(tmp_path, ["a.tif,amy,s1,x", "b.png,amy,s1,x"]))
    with pytest.raises(ValueError, match=r"a\.tif and .*b\.png: one has 8 bits, one 16"):
        list(data.load_batches(cohort, [[0, 1]], 40))


def test_opensrh_trains(tmp_path, flags, capsys):
    root = write_opensrh(tmp_path / "srh")
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
                "--normalise",
                "data",
            ]
        )
    )
    assert config.augmentation == "strong-srh"
    assert log_of(config.out)[-1]["probe"]["knn20"]["patient"]["n"] == 2
    mean = torch.load(checkpoints(config.out)[-1])["model"]["mean"]
    assert mean.flatten()[1].item() == pytest.approx(11000 / 65536, rel=0.02)


# ---------------------------------------------------------------------------------------------------- folders of tiles


def tiles(root, names):
    for name in names:
        os.makedirs(os.path.dirname(root / name), exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (16, 16, 3), np.uint8)).save(root / name)
    return str(root)


def command(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["data.py", *words])
    data.main()


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
    assert "2 patients, 4 slides, 12 patches" in printed
    assert "patches a slide: 3 to 3, median 3" in printed
    assert "glioma 6, normal 6" in printed
    cohort = data.read_cohort(root)
    assert cohort.slides == ["s0-amy", "s1-amy", "s0-bob", "s1-bob"]
    assert cohort.path(0) == os.path.join(root, "glioma/amy/s0-amy/0.png")
    with pytest.raises(SystemExit, match="--overwrite"):
        command(monkeypatch, "index", root, "--pattern", "{label}/{patient}/{slide}/*.png")


def test_names_of_tcga(tmp_path):
    root = tiles(
        tmp_path,
        [
            "TCGA-02-0001-01Z-00-DX1_12_34.jpg",
            "TCGA-02-0001-01Z-00-DX2_0_0.jpg",
            "TCGA-06-0125-01A-01-TS1_7_8.jpg",
        ],
    )
    cohort = data.index(root, r"(?P<slide>(?P<patient>TCGA-\w{2}-\w{4})-.*)_\d+_\d+\.jpg")
    assert cohort.patients == ["TCGA-02-0001", "TCGA-06-0125"]
    assert cohort.slides == [
        "TCGA-02-0001-01Z-00-DX1",
        "TCGA-02-0001-01Z-00-DX2",
        "TCGA-06-0125-01A-01-TS1",
    ]
    assert cohort.classes == []


def test_a_name_may_stand_twice(tmp_path):
    root = tiles(tmp_path, ["amy/amy_1/0.png", "amy/amy_2/0.png", "bob/bob_1/x/0.png"])
    cohort = data.index(root, "{patient}/{patient}_{slide}/**.png", nested=True)
    assert cohort.slides == ["amy/1", "amy/2", "bob/1"]
    with pytest.raises(ValueError, match="not 1 others"):
        data.index(root, "{patient}/{patient}_{slide}/*.png")


def test_ambiguity_is_refused_with_examples(tmp_path):
    root = tiles(tmp_path, ["a/amy/1/x.png", "a/bob/1/x.png", "b/amy/2/x.png", "stray.png"])
    with pytest.raises(ValueError, match=r"matches 3 image files and not 1 others\n    stray\.png"):
        data.index(root, "{label}/{patient}/{slide}/*.png")
    with pytest.raises(ValueError, match="'1' is of patient 'amy' above and of 'bob' here"):
        data.index(root, "{label}/{patient}/{slide}/*.png", partial=True)
    assert (
        len(data.index(root, "{label}/{patient}/{slide}/*.png", partial=True, nested=True).slides)
        == 3
    )
    with pytest.raises(
        ValueError, match=r"one patient has two labels: a/amy/1/x\.png and b/amy/2/x\.png"
    ):
        data.index(root, "{label}/{patient}/{slide}/*.png", "patient", partial=True, nested=True)
    with pytest.raises(ValueError, match="matches 0 image files"):
        data.index(root, "{patient}/{slide}.tif")
    with pytest.raises(ValueError, match=r"'\(\?P<slide>\[' is no regular expression"):
        data.index(root, "(?P<slide>[")
    with pytest.raises(
        ValueError, match="must name patient and slide, and may name label and split; it names case"
    ):
        data.index(root, "{case}/*.png")


def test_check_finds_what_cannot_be_used(tmp_path, monkeypatch, capsys):
    root = tiles(tmp_path, [f"amy/s/{i}.png" for i in range(8)])
    whole = (tmp_path / "amy/s/0.png").read_bytes()
    (tmp_path / "amy/s/0.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "amy/s/1.png").write_bytes(b"not an image")
    Image.new("RGB", (16, 16), (235, 205, 225)).save(tmp_path / "amy/s/2.png")  # glass is tinted
    tiles(tmp_path, ["amy/s/tmp.png"])
    Image.open(tmp_path / "amy/s/tmp.png").resize((16, 20)).save(tmp_path / "amy/s/3.png")
    os.remove(tmp_path / "amy/s/tmp.png")
    command(monkeypatch, "index", root, "--pattern", "{patient}/{slide}/*.png")
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, "check", root, "--clean", "clean.csv")
    assert stop.value.code == 1
    printed = capsys.readouterr().out
    for problem, i in {"truncated": 0, "unreadable": 1, "constant": 2, "odd-sized": 3}.items():
        assert f"{problem}: 1\n    amy/s/{i}.png" in printed
    assert len(data.read_cohort(str(tmp_path / "clean.csv"))) == 4
    assert (tmp_path / "clean.csv").read_text().splitlines()[
        0
    ] == "path,patient,slide"  # the hash needs no column
    for name in ("clean.csv", "manifest.csv", "clean"):
        with pytest.raises(SystemExit):
            command(monkeypatch, "check", root, "--clean", name)
        assert f"--clean {name}: name a file" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        command(monkeypatch, "check", str(tmp_path / "clean.csv"))
    assert stop.value.code == 0


def test_paths_that_leave_the_root_and_bombs_are_refused(tmp_path, monkeypatch):
    root = tiles(tmp_path / "root", ["x.png"])
    tiles(tmp_path, ["outside.png"])
    os.symlink(tmp_path / "outside.png", tmp_path / "root/link.png")
    cohort = data.read_cohort(manifest(tmp_path / "root", ["x.png,amy,s,a", "link.png,amy,s,a"]))
    assert cohort.path(0) == os.path.join(root, "x.png")
    with pytest.raises(ValueError, match=r"link\.png is a link that leaves"):
        list(data.load_batches(cohort, [[0, 1]], 16))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"x\.png cannot be read .*decompression bomb"):
        data.decode(str(tmp_path / "root/x.png"), 16)


def test_a_contact_sheet(cohort_folder, tmp_path, monkeypatch):
    command(
        monkeypatch,
        "show",
        cohort_folder,
        "--out",
        str(tmp_path / "views.png"),
        "--augmentation",
        "strong",
    )
    image = Image.open(tmp_path / "views.png")
    assert image.size == (5 * 164, 4 * 180)  # a patch and four views; two slides of two patches
    assert np.asarray(image)[20:178, 2:162].std() > 10


# ----------------------------------------------------------------------------------------------- bad files in training


def spoil(folder, tmp_path, share):
    folder = str(shutil.copytree(folder, tmp_path / "spoilt"))
    cohort = data.read_cohort(folder)
    for row in range(0, len(cohort), round(1 / share)):
        with open(cohort.path(row), "wb") as file:
            file.write(b"not an image")
    return folder, cohort


def test_a_patch_of_the_same_slide_stands_in(cohort_folder, tmp_path, capsys):
    folder, cohort = spoil(cohort_folder, tmp_path, 1 / 120)
    ((rows, images),) = data.load_batches(cohort, [np.arange(6)], 64, skip=True)
    assert rows.tolist() == [1, 1, 2, 3, 4, 5]
    assert (images[0] == images[1]).all()
    ((again, _),) = data.load_batches(cohort, [np.arange(6)], 64, skip=True)
    assert (again == rows).all()
    assert "0-0.png cannot be read" in capsys.readouterr().err
    assert data.substitutes(cohort, 4) == [
        5,
        3,
        0,
        1,
        2,
    ]  # first of its slide (3, 4, 5), then of the patient (0 to 5)


def test_more_than_one_percent_stops(cohort_folder, tmp_path):
    _, cohort = spoil(cohort_folder, tmp_path, 1 / 40)
    with pytest.raises(
        ValueError, match=r"of 120 patches cannot be read, more than 1%: .* The last: .*\.png"
    ):
        list(data.load_batches(cohort, [np.arange(120)], 64, skip=True))


def test_training_skips_or_stops(cohort_folder, flags, tmp_path):
    folder, _ = spoil(cohort_folder, tmp_path, 1 / 120)
    flags = [*flags, "--data", folder, "--steps", "2"]
    with pytest.raises(ValueError, match=r"0-0\.png cannot be read"):
        train.train(train.parse_config(flags))
    assert train.train(train.parse_config([*flags, "--skip-unreadable"]))


# ------------------------------------------------------------------------------- balance and normalisation


def test_classes_are_balanced(tmp_path):
    """Nine patients of class a, three of b: half of every batch is b, and each class goes through its own epochs."""
    cohort = data.read_cohort(
        manifest(
            tmp_path,
            [f"{p}/{s}.png,p{p:02d},p{p}s{s},{'ab'[p >= 9]}" for p in range(12) for s in range(2)],
        )
    )
    groups = data.class_patients(cohort)
    assert [group.tolist() for group in groups] == [list(range(9)), [9, 10, 11]]
    drawn = np.array([data.balanced_patients(groups, step, 0, 4) for step in range(18)])
    assert ((drawn >= 9).sum(axis=1) == 2).all()
    of_a, of_b = drawn[drawn < 9].reshape(-1, 9), drawn[drawn >= 9].reshape(-1, 3)
    assert (np.sort(of_a) == np.arange(9)).all()
    assert (np.sort(of_b) == np.arange(9, 12)).all()
    assert (data.balanced_patients(groups, 5, 0, 4) == drawn[5]).all()
    rows = data.hierarchical_batch(
        cohort, 0, 0, 16, groups=groups
    )  # more than there are: by repetition
    assert rows.shape == (16, 2, 2)
    assert {len(np.unique(cohort.patient[patient])) for patient in rows} == {1}


def test_balance_needs_one_class_a_patient(tmp_path):
    torn = data.read_cohort(manifest(tmp_path / "a", ["x.png,amy,s1,a", "y.png,amy,s2,b"]))
    with pytest.raises(ValueError, match="'amy' has a and b"):
        data.class_patients(torn)
    without = data.read_cohort(manifest(tmp_path / "b", ["x.png,amy,s1,a", "y.png,bob,s2,"]))
    with pytest.raises(ValueError, match="'bob' has none"):
        data.class_patients(without)


def test_balanced_training(flags):
    assert train.train(train.parse_config([*flags, "--steps", "2", "--balance-classes"]))


def test_statistics_are_numpys(cohort_folder):
    cohort = data.read_cohort(cohort_folder)
    pixels = np.stack([data.decode(cohort.path(row)) for row in range(len(cohort))]) / 255
    mean, std = data.channel_statistics(cohort, 64)
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 2, 3)), atol=1e-6)
    np.testing.assert_allclose(std, pixels.std(axis=(0, 2, 3)), atol=1e-6)


def test_normalise(cohort_folder):
    cohort, config = data.read_cohort(cohort_folder), train.Config()
    assert train.normalisation(config, cohort, 64) == (train.CLIP_MEAN, train.CLIP_STD)
    config.backbone = "resnet18"
    assert train.normalisation(config, cohort, 64) == data.channel_statistics(cohort, 64)
    config.normalise = "0.7,0.5,0.7,0.2,0.2,0.3"
    assert train.normalisation(config, cohort, 64) == ([0.7, 0.5, 0.7], (0.2, 0.2, 0.3))
    for bad in ("imagenet", "1,2,3", "0,0,0,1,1,0", "180,120,180,50,50,50"):
        config.normalise = bad
        with pytest.raises(ValueError, match=f"--normalise {bad}: 'clip', 'data'"):
            train.normalisation(config, cohort, 64)


# ------------------------------------------------------------------------------------------------------------- scale


def test_views_are_made_faster_than_one_by_one(tmp_path, capsys):
    """About four times on a quiet core (tests/bench_data.py); here only that the benchmark runs and says so."""
    assert speed(str(tmp_path), patches=16, rounds=2) > 1
    assert "ms a view" in capsys.readouterr().out


def test_a_batch_costs_the_same_in_a_large_cohort(tmp_path):
    """The epoch's shuffle is all that grows: of patients, never of patches."""
    cohort = many(tmp_path, 3000, slides=2, patches=2)
    rows = data.hierarchical_batch(cohort, 10**6, 0, 64)
    assert rows.shape == (64, 2, 2)
    assert cohort.names.itemsize * len(cohort) + cohort.slide.nbytes < 300 * len(
        cohort
    )  # arrays, not objects
