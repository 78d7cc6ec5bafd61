"""Cohorts, batches, decoding and views."""

import os
import re
import shutil
import struct
import subprocess
import sys
import zlib

import numpy as np
import PIL
import pytest
import tifffile
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from conftest import ROOT, manifest
from PIL import Image

import data
import train

RNG = np.random.default_rng(0)
PLANES = RNG.integers(2000, 20000, (2, 40, 40), np.uint16)


def many(folder, patients, slides=3, patches=4):
    """A cohort without image files: only decoding needs them."""
    lines = [
        f"{p}/{s}/{b}.png,p{p:03d},p{p}s{s},c{p % 2}"
        for p in range(patients)
        for s in range(slides)
        for b in range(patches)
    ]
    return data.read_cohort(manifest(folder, lines))


# ------------------------------------------------------------------------------------------- cohort


def test_a_manifest_becomes_a_cohort(tmp_path):
    """The rows may come in any order: patches are sorted by slide, slides by patient."""
    lines = [
        "b/1.png,bob,b-2,tumour",
        "a/1.png,amy,a-1,normal",
        "b/0.png,bob,b-1,",
        "b/2.png,bob,b-2,tumour",
    ]
    cohort = data.read_cohort(manifest(tmp_path, lines))
    assert cohort.group_names == [["a-1", "b-1", "b-2"], ["amy", "bob"]]
    assert cohort.classes == ["normal", "tumour"]
    names = [cohort.name(row) for row in range(4)]
    assert names == ["a/1.png", "b/0.png", "b/1.png", "b/2.png"]
    assert cohort.path(0) == str(tmp_path / "a/1.png")
    assert cohort.parents[0].tolist() == [0, 1, 2, 2]
    assert cohort.patient.tolist() == [0, 1, 1, 1]
    assert cohort.label.tolist() == [0, -1, 1, 1]
    assert cohort.ids(np.array([3, 0])).tolist() == [[3, 2, 1], [0, 0, 0]]
    assert cohort.groups_of(3) == ["bob", "b-2"]
    assert str(cohort) == "2 patients, 3 slides, 4 patches"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["x.png,amy,s1,a", "x.png,amy,s1,a"], "line 3.*a second time"),
        (
            ["x.png,amy,s1,a", "y.png,bob,s1,a"],
            "line 3: slide 's1' belongs to 'bob' here and to 'amy' above",
        ),
        (["../x.png,amy,s1,a"], "line 2.*must be a plain path inside the root"),
        (["/etc/x.png,amy,s1,a"], "line 2.*must be a plain path"),
        (["img/x.png,amy,s1,a", "./img/x.png,amy,s1,a"], "line 3.*must be a plain path"),
        (["img//x.png,amy,s1,a"], "line 2.*must be a plain path"),
        (["img/..,amy,s1,a"], "line 2.*must be a plain path"),
        (["img/,amy,s1,a"], "line 2.*must be a plain path"),
        ([r"img\x.png,amy,s1,a"], "line 2.*must be a plain path"),
        ([r"C:\img\x.png,amy,s1,a"], "line 2.*must be a plain path"),
        (["C:/img/x.png,amy,s1,a"], "line 2.*must be a plain path"),
        (["x.png,,s1,a"], "line 2: only label, split and root may be empty"),
        # An unclosed quote would swallow every line up to the next quote.
        (
            ["a.png,p1,s1,x", 'b.png,p2,s2,"x', "c.png,p3,s3,y", "d.png,p4,s4,y"],
            r"""line 3: fix the quotes in 'b\.png,p2,s2,"x' """,
        ),
        (['a.png,p1,s1,"x', 'b.png,p2,s2,"y"'], "line 2: fix the quotes"),
        (["a.png,p1,s1,x", 'b.png,p2,s2,y"', '"c.png,p3,s3,y'], "line 4: fix the quotes"),
        (['a.png,p1,s1,"x"y'], "line 2: fix the quotes"),
        (["a.png,p1,s1," + 200_000 * "x"], "line 2: fix the quotes .*field larger than"),
        (["x.png,amy,s1"], "line 2: 3 fields"),
        ([], "no patches"),
    ],
)
def test_a_bad_manifest_is_refused_by_line(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        data.read_cohort(manifest(tmp_path, lines))


def test_names_may_have_dots_quotes_and_commas(tmp_path):
    cohort = data.read_cohort(manifest(tmp_path, ['..a/.b/c..png,"Doe, J.",s 1,3" nail']))
    assert cohort.name(0) == "..a/.b/c..png"
    assert cohort.groups_of(0) == ["Doe, J.", "s 1"]
    assert cohort.classes == ['3" nail']


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
def test_any_line_ends_are_read(tmp_path, end):
    lines = ["\ufeffpath,patient,slide", "a.png,amy,s1", "b.png,bob,s2", ""]
    (tmp_path / "manifest.csv").write_bytes(end.join(lines).encode())
    assert str(data.read_cohort(tmp_path)) == "2 patients, 2 slides, 2 patches"


def test_a_manifest_that_is_not_utf_8_is_named(tmp_path):
    """Excel saves one, unless you choose CSV UTF-8."""
    lines = "path,patient,slide\r\na.png,amy,s1\r\nb.png,M\u00fcller,s2\r\n"
    (tmp_path / "manifest.csv").write_bytes(lines.encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"manifest\.csv, line 3: 'b.png,M.ller,s2' is not UTF-8: save"
    ):
        data.read_cohort(tmp_path)
    (tmp_path / "manifest.csv").write_bytes(lines.encode("utf-8-sig"))  # CSV UTF-8
    assert data.read_cohort(tmp_path).group_names[-1] == ["M\u00fcller", "amy"]


@pytest.mark.parametrize(
    ("header", "missing"),
    [
        ("path,case", "patient, slide"),
        ("path;patient;slide", "path, patient, slide"),  # Excel, where commas mark decimals
        ("Path,Patient,Slide", "path, patient, slide"),
    ],
)
def test_a_missing_column_is_named(tmp_path, header, missing):
    message = rf"manifest\.csv, line 1: '{header}' has no column {missing} \(in lower case\)"
    with pytest.raises(ValueError, match=message):
        data.read_cohort(manifest(tmp_path, ["x.png;amy;s1"], header))


def test_the_finest_level_is_the_image_and_has_no_column(tmp_path):
    with pytest.raises(ValueError, match="patch is the image itself: drop that column"):
        data.read_cohort(manifest(tmp_path, ["x.png,amy,s1,0"], "path,patient,slide,patch"))


def test_blanks_beside_the_names_of_columns_do_no_harm(tmp_path):
    cohort = data.read_cohort(manifest(tmp_path, ["x.png, amy, s1"], "path, patient, slide"))
    assert cohort.groups_of(0) == ["amy", "s1"]


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"manifest\.csv does not exist"):
        data.read_cohort(str(tmp_path / "nowhere"))


def test_a_manifest_may_lie_elsewhere_and_name_the_root(tmp_path):
    header = "path,patient,slide,root"
    lines = ["x.png,amy,s1,/data/tiles", "y.png,bob,s2,/data/tiles"]
    assert data.read_cohort(manifest(tmp_path, lines, header)).path(1) == "/data/tiles/y.png"
    for other in ("/other", "tiles", ""):
        folder = manifest(tmp_path, [*lines, f"z.png,bob,s2,{other}"], header)
        with pytest.raises(ValueError, match="line 4: use one absolute root"):
            data.read_cohort(folder)
    with pytest.raises(ValueError, match="line 2: use one absolute root"):
        data.read_cohort(manifest(tmp_path, ["x.png,amy,s1,tiles"], header))


def test_a_manifest_may_have_any_name_that_ends_in_csv(tmp_path):
    manifest(tmp_path, ["x.png,amy,s1,a"])
    os.rename(tmp_path / "manifest.csv", tmp_path / "X.CSV")
    assert data.read_cohort(tmp_path / "X.CSV").path(0) == str(tmp_path / "x.png")


@pytest.mark.parametrize("name", ["amy ", " amy", "a\nb", "a\rb", "caf\udce9"])
def test_a_name_that_a_manifest_cannot_hold_is_refused(name):
    """tools.cohort index finds such names in folders. Python reads non-UTF-8 as surrogates."""
    for entry in (("x.png", [name, "s1"]), ("x.png", ["p1", name]), (name, ["p1", "s1"])):
        with pytest.raises(ValueError, match=re.escape(f"here: rename {name!r}")):
            data.build_cohort("root", [("here", *entry, "", "", "")])


def test_a_path_with_a_backslash_is_refused_by_name():
    with pytest.raises(ValueError, match=re.escape(r"here: 'a\\b.png' must be a plain path")):
        data.build_cohort("root", [("here", r"a\b.png", ["amy", "s1"], "", "", "")])


def test_nobody_is_held_out_at_a_fraction_of_0(tmp_path):
    root = manifest(tmp_path, ["x.png,amy,s1,a", "y.png,bob,s2,a"])
    assert len(data.read_cohort(root, val_fraction=0).restrict("train")) == 2


def test_splits(tmp_path):
    def read(*lines):
        return data.read_cohort(manifest(tmp_path, lines, "path,patient,slide,label,split"))

    cohort = read("x.png,amy,s1,a,val", "y.png,bob,s2,a,train")
    assert cohort.restrict("train").name(0) == "y.png"
    assert cohort.restrict("val").name(0) == "x.png"
    with pytest.raises(ValueError, match="no patient is in the split 'test'"):
        cohort.restrict("test")
    with pytest.raises(ValueError, match="line 3: patient 'amy' belongs to 'train' here and to 'v"):
        read("x.png,amy,s1,a,val", "y.png,amy,s2,a,train")
    with pytest.raises(ValueError, match=r"line 3: .* a split on every line or none"):
        read("x.png,amy,s1,a,val", "y.png,bob,s2,a,")
    with pytest.raises(ValueError, match="line 2: the split 'Val' is not one of train, val, test"):
        read("x.png,amy,s1,a,Val")


def test_the_hash_split_does_not_move():
    """A patient is on the same side on every machine, in every version and in every cohort."""
    names = [f"patient {i}" for i in range(1000)]
    split = data.hash_split(names)
    assert 0.15 < split.mean() < 0.25
    assert (data.hash_split([*names, "one more"])[:1000] == split).all()
    assert split[:30].nonzero()[0].tolist() == [9, 15, 24, 26, 27, 28]
    for few in (["a", "b"], ["Case-3", "Case-4", "Case-48", "P5"]):  # neither side is empty
        assert 0 < data.hash_split(few, 0.01).sum() < len(few)
        assert 0 < data.hash_split(few, 0.99).sum() < len(few)


def test_real_tiles():
    folder = os.path.join(os.path.dirname(__file__), "../../shared/data/osteo60")
    if not os.path.exists(folder):
        pytest.skip("the 60 osteosarcoma tiles are not beside the project")
    cohort = data.read_cohort(folder)
    assert str(cohort) == "4 patients, 26 slides, 60 patches"
    assert 0 < len(cohort.restrict("val").present) < 4
    rows, images = next(iter(data.load_batches(cohort, [np.arange(8)], 128)))
    assert images.shape == (8, 3, 128, 128)


# ------------------------------------------------------------------------------------------ batches


@pytest.mark.parametrize(("n", "patients"), [(12, 4), (13, 4), (7, 4), (4, 4), (101, 32), (5, 1)])
def test_an_epoch_is_a_shuffle_cut_into_whole_batches(tmp_path, n, patients):
    """No patient comes twice in an epoch; the remainder waits for the next shuffle."""
    cohort = many(tmp_path, n, 1, 1)
    batches = n // patients
    left_out = set()
    for epoch in range(200):
        steps = range(epoch * batches, (epoch + 1) * batches)
        drawn = [data.hierarchical_batch(cohort, step + 1, 3, patients, (1, 1)) for step in steps]
        drawn = cohort.patient[np.concatenate(drawn).reshape(-1)]
        assert len(drawn) == len(set(drawn)) == batches * patients
        left_out |= set(range(n)) - set(drawn)
    assert len(left_out) in (0, n)  # nobody, or everyone in turn


def test_a_batch_is_a_pure_function_of_seed_and_step(tmp_path):
    cohort = many(tmp_path, 12)
    batch = data.hierarchical_batch(cohort, 5, 0, 4)
    data.hierarchical_batch(cohort, 6, 0, 4)
    assert (data.hierarchical_batch(cohort, 5, 0, 4) == batch).all()
    assert (data.hierarchical_batch(cohort, 5, 1, 4) != batch).any()


def test_a_batch_has_the_hierarchy(tmp_path):
    cohort = many(tmp_path, 12)
    rows = data.hierarchical_batch(cohort, 1, 0, patients=4, counts=(3, 2))
    assert rows.shape == (4, 2, 3)  # patients, slides per patient, patches per slide
    patch, slide, patient = cohort.ids(rows.reshape(-1)).T.reshape(3, 4, 2, 3)
    assert len(np.unique(patch)) == 24
    for p in range(4):
        assert len(np.unique(patient[p])) == 1
        assert len(np.unique(slide[p])) == 2
        assert all(len(np.unique(of_a_slide)) == 1 for of_a_slide in slide[p])


def test_too_few_slides_and_patches_are_repeated(tmp_path):
    one_slide = many(tmp_path / "a", 2, slides=1, patches=4)
    for rows in data.hierarchical_batch(one_slide, 1, 0, patients=2, counts=(2, 2)):
        assert len(np.unique(rows)) == 4  # the same slide twice, with different patches
    one_patch = many(tmp_path / "b", 2, slides=2, patches=1)
    for patient in data.hierarchical_batch(one_patch, 1, 0, patients=2, counts=(2, 2)):
        assert all(len(np.unique(slide)) == 1 for slide in patient)


def test_a_process_draws_its_own_places_alone(tmp_path):
    """It gets what a single process drawing the whole batch gets there."""
    cohort = many(tmp_path, 12)
    rows = data.hierarchical_batch(cohort, 7, 1, 8)
    assert (data.hierarchical_batch(cohort, 7, 1, 8, places=range(2, 4)) == rows[2:4]).all()
    strong = data.AUGMENTATIONS["strong"]
    whole = data.view_parameters(strong, 1, 7, range(8), 4)
    mine = data.view_parameters(strong, 1, 7, range(2, 4), 4)
    assert all(torch.equal(mine[name], whole[name][8:16]) for name in whole)
    other_step = data.view_parameters(strong, 1, 8, range(2, 4), 4)
    assert not torch.equal(mine["stain"], other_step["stain"])


def test_batches_do_not_depend_on_processes_or_on_where_a_run_resumes(cohort_folder):
    cohort = data.read_cohort(cohort_folder)

    def views(first, **options):
        steps = range(first, 4)
        return list(data.load_views(cohort, steps, 4, (2, 3, 2), "strong", (48, 32), **options))

    whole = views(1)
    images, ids = whole[0]
    assert images.shape == (48, 3, 32, 32)
    assert images.min() >= 0 and images.max() <= 1
    assert list(ids) == ["patch", "slide", "patient"]
    assert ids["patch"].tolist() == ids["patch"][::2].repeat_interleave(2).tolist()
    assert ids["slide"].tolist() == ids["slide"][::6].repeat_interleave(6).tolist()
    assert ids["patient"].tolist() == ids["patient"][::12].repeat_interleave(12).tolist()
    halves = zip(views(1, share=(0, 2)), views(1, share=(1, 2)))
    for (images, ids), *shares in zip(whole, *zip(*halves)):
        assert torch.equal(torch.cat([share[0] for share in shares]), images)
        for level in ids:
            assert torch.equal(torch.cat([share[1][level] for share in shares]), ids[level])
    assert torch.equal(views(3)[0][0], whole[2][0])
    assert not torch.equal(views(1, seed=1)[0][0], whole[0][0])


def test_ids_of_a_part_are_those_of_the_whole(tmp_path):
    cohort = many(tmp_path, 6)
    rows = np.arange(30, 40)
    assert (cohort.select(rows).ids(np.arange(10)) == cohort.ids(rows)).all()
    assert (cohort.select(cohort.label == 1).select([0]).ids(np.array([0])) == [12, 3, 1]).all()


def test_a_part_without_some_slides_draws_from_the_others(tmp_path):
    cohort = many(tmp_path, 4)
    part = cohort.select(cohort.ids(np.arange(len(cohort)))[:, 1] % 3 == 2)  # the third slides
    assert str(part) == "4 patients, 4 slides, 16 patches"
    for rows in data.hierarchical_batch(part, 1, 0, 4):
        assert len(np.unique(rows)) == 4
        assert len(np.unique(part.patient[rows])) == 1


def test_no_two_random_streams_share_a_seed():
    """Whatever their names and numbers."""
    assert data.seed_of("views", 1, 2) != data.seed_of("noise", 1, 2)
    assert data.seed_of("x", 1, 0) != data.seed_of("x", 1)
    streams = ("epoch", "patches", "views", "noise", "weights", "dropout")
    numbers = ((), (1,), (1, 0), (0, 1), (1, 0, 0), (10,), (1, 10), (11, 0))
    seeds = {data.seed_of(stream, *of) for stream in streams for of in numbers}
    assert len(seeds) == len(streams) * len(numbers)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_batch_costs_the_same_in_a_large_cohort(tmp_path):
    """Only the epoch's shuffle grows, with the number of patients, not of patches."""
    cohort = many(tmp_path, 3000, slides=2, patches=2)
    rows = data.hierarchical_batch(cohort, 10**6, 0, 64)
    assert rows.shape == (64, 2, 2)
    nbytes = cohort.names.itemsize * len(cohort) + cohort.parents[0].nbytes
    assert nbytes < 300 * len(cohort)  # arrays, not objects


# ----------------------------------------------------------------------------------------- decoding


def test_decode_brings_a_patch_to_size(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    middle = data.decode(str(tmp_path / "x.png"), 40)
    assert middle.dtype == np.uint8
    assert (middle == pixels[:, 10:50].transpose(2, 0, 1)).all()
    assert data.decode(str(tmp_path / "x.png"), 20).shape == (3, 20, 20)


def test_an_unreadable_file_is_named_and_ends_the_loader(tmp_path, cohort_folder):
    folder = shutil.copytree(cohort_folder, tmp_path / "cohort")
    cohort = data.read_cohort(str(folder))
    whole = open(cohort.path(3), "rb").read()
    for content in (whole[: len(whole) // 2], b"not an image", b""):
        open(cohort.path(3), "wb").write(content)
        with pytest.raises(ValueError, match=os.path.basename(cohort.path(3))):
            list(data.load_batches(cohort, [[0, 1], [2, 3]], 64))


def test_batches_come_in_order(cohort_folder):
    cohort = data.read_cohort(cohort_folder)
    order = [np.array([i, (7 * i) % len(cohort)]) for i in range(20)]
    for expected, (rows, images) in zip(order, data.load_batches(cohort, order, 64), strict=True):
        assert (rows == expected).all()
        assert (images[1].numpy() == data.decode(cohort.path(rows[1]), 64)).all()


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
    said = "truncated" if PIL.__version__ >= "13" else "cannot be read"  # Pillow 12's other words
    with pytest.raises(ValueError, match=said):
        data.decode(str(tmp_path / "x.tif"), 40)


@pytest.mark.parametrize(
    ("pixels", "layout"),
    [
        # Channels last opens as forty narrow frames.
        (np.moveaxis(PLANES, 0, -1), "40 frames of 2 x 40, I;16"),
        (PLANES[:1], "1 frames of 40 x 40, I;16"),
        (np.concatenate([PLANES, PLANES]), "4 frames of 40 x 40, I;16"),
        (PLANES.astype(np.float32), "2 frames of 40 x 40, F"),
        ((PLANES >> 8).astype(np.uint8), "2 frames of 40 x 40, L"),
    ],
)
def test_another_layout_is_refused_by_name(tmp_path, pixels, layout):
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="minisblack")
    with pytest.raises(ValueError, match=rf"x\.tif cannot be read \({layout}; must be 8-bit"):
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
    """The third channel is CH3 - CH2 + 5000 / 65536; 8 bits would leave only 256 levels."""
    tifffile.imwrite(tmp_path / "x.tif", PLANES)
    images = torch.from_numpy(data.decode(str(tmp_path / "x.tif"), 40))[None]
    ch2, ch3 = torch.from_numpy(PLANES.astype(np.float64)) / 65536
    expected = torch.stack([(ch3 - ch2 + 5000 / 65536).clamp(0, 1), ch2, ch3])[None].float()
    torch.testing.assert_close(data.plain_view(images, 40), expected, atol=1e-6, rtol=0)
    still = data.view_parameters({}, 0, 1, range(1), 2)
    torch.testing.assert_close(data.make_views(images, still, 40)[1:], expected, atol=1e-5, rtol=0)
    assert expected.min() == 0  # the clamp is active
    half = data.decode(str(tmp_path / "x.tif"), 20)
    assert half.dtype == np.uint16
    assert abs(half.mean() - PLANES.mean()) < 200


def test_a_cohort_is_of_one_depth(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", PLANES)
    Image.new("RGB", (40, 40)).save(tmp_path / "b.png")
    cohort = data.read_cohort(manifest(tmp_path, ["a.tif,amy,s1,x", "b.png,amy,s1,x"]))
    with pytest.raises(ValueError, match=r"a\.tif and .*b\.png: one is 8-bit, one 16-bit"):
        list(data.load_batches(cohort, [[0, 1]], 40))


@pytest.mark.parametrize("how", [{"tile": (512, 512)}, {"extratags": [(274, 3, 1, 3, False)]}])
def test_a_tile_larger_than_the_image_and_an_orientation_are_read_right(tmp_path, how):
    tifffile.imwrite(tmp_path / "x.tif", PLANES, photometric="minisblack", **how)
    expected = PLANES if "tile" in how else PLANES[:, ::-1, ::-1]  # 3: rotated by 180 degrees
    assert (data.decode(str(tmp_path / "x.tif"), 40) == expected).all()


def png(path, mode, pixels):
    """Writes a PNG with 16 bits per sample, as Pillow cannot. pixels: [H, W, C] uint16."""
    height, width, _ = pixels.shape
    kind = {"RGB": 2, "LA": 4, "RGBA": 6}[mode]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))]
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in parts:
        content += struct.pack(">I", len(body)) + name + body
        content += struct.pack(">I", zlib.crc32(name + body))
    path.write_bytes(content)


@pytest.mark.parametrize("mode", ["RGB", "LA", "RGBA"])
def test_a_png_of_16_bit_colours_is_refused(tmp_path, mode):
    """Pillow would read only the high bytes."""
    png(tmp_path / "x.png", mode, RNG.integers(0, 2**16, (8, 8, len(mode)), np.uint16))
    with pytest.raises(ValueError, match=r"x\.png cannot be read .*must be 8-bit or 2 x 16-bit"):
        data.decode(str(tmp_path / "x.png"))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "1", "L", "RGB"])
def test_transparent_pixels_are_white(tmp_path, mode):
    """Slide readers return (0, 0, 0, 0) outside the scan; black would pass for tissue."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0)).convert(mode)
    transparency = {"P": 0, "1": 0, "L": 0, "RGB": (0, 0, 0)}  # the others have an alpha channel
    options = {"transparency": transparency[mode]} if mode in transparency else {}
    image.save(tmp_path / "x.png", **options)
    assert (data.decode(str(tmp_path / "x.png")) == 255).all()


@pytest.mark.parametrize("mode", ["PA", "LA", "RGBA", "La", "RGBa"])
def test_transparent_pixels_of_a_tiff_are_white(tmp_path, mode):
    if mode == "La" and PIL.__version__ < "13":
        pytest.skip("before Pillow 13 such a TIFF is refused")
    if mode in ("La", "RGBa"):  # premultiplied alpha: Pillow reads but does not write it
        kind = {"La": "minisblack", "RGBa": "rgb"}[mode]
        how = {"photometric": kind, "planarconfig": "contig", "extrasamples": ["assocalpha"]}
        tifffile.imwrite(tmp_path / "x.tif", np.zeros((8, 8, len(mode)), np.uint8), **how)
    else:
        Image.new("RGBA", (8, 8), (0, 0, 0, 0)).convert(mode).save(tmp_path / "x.tif")
    assert (data.decode(str(tmp_path / "x.tif")) == 255).all()


def test_half_transparent_pixels_are_laid_on_white(tmp_path):
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4] = (200, 0, 0, 51)  # alpha of a fifth
    pixels[:, 4:] = (10, 20, 30, 255)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    decoded = data.decode(str(tmp_path / "x.png"))
    assert decoded[:, 0, 0].tolist() == [244, 204, 204]
    assert decoded[:, 0, 7].tolist() == [10, 20, 30]


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_colours_of_16_bits_are_refused(tmp_path, planar):
    """Pillow would read them as 8 bits, and planar ones as noise."""
    pixels = RNG.integers(0, 2**16, (40, 40, 3), np.uint16)
    if planar == "separate":
        pixels = np.moveaxis(pixels, 2, 0).copy()
    tifffile.imwrite(tmp_path / "x.tif", pixels, photometric="rgb", planarconfig=planar)
    with pytest.raises(ValueError, match=r"x\.tif cannot be read \(.*must be 8-bit or 2 x 16-bit"):
        data.decode(str(tmp_path / "x.tif"), 40)


def test_a_link_to_another_disk_is_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    Image.new("RGB", (16, 16), "red").save(tmp_path / "elsewhere/x.png")
    root = manifest(tmp_path / "cohort", ["link.png,amy,s,a", "folder/x.png,amy,s,a"])
    os.symlink(tmp_path / "elsewhere/x.png", tmp_path / "cohort/link.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "cohort/folder")
    ((_, images),) = data.load_batches(data.read_cohort(root), [[0, 1]], 16)
    assert (images[:, 0] == 255).all()


def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch):
    Image.new("RGB", (16, 16)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"x\.png cannot be read .*decompression bomb"):
        data.decode(str(tmp_path / "x.png"), 16)


def sized(folder, sizes):
    """A cohort of black images of these sizes (width, height)."""
    lines = [f"{i:03d}.png,a,s" for i in range(len(sizes))]
    cohort = data.read_cohort(manifest(folder, lines, "path,patient,slide"))
    for row, size in enumerate(sizes):
        Image.new("RGB", size).save(cohort.path(row))
    return cohort


def test_images_of_any_size_make_a_batch(tmp_path):
    cohort = sized(tmp_path, [(1, 1), (60, 40), (33, 70), (300, 200)])
    ((_, images),) = data.load_batches(cohort, [np.arange(4)], 48)
    assert images.shape == (4, 3, 48, 48)


def test_the_short_side_is_that_of_most_patches(tmp_path):
    """The first patch here is one pixel wide: the cohort must not be read at one pixel."""
    cohort = sized(tmp_path, [(1, 1), (60, 40), (40, 40), (40, 70), (90, 80)])
    assert data.short_side(cohort) == (40, 1, 80)
    assert data.short_side(cohort.select([1, 2, 3])) == (40, 40, 40)  # 60 x 40 and 40 x 70


def test_the_short_side_is_read_from_few_headers(tmp_path):
    """Those of the first, the last and evenly spaced patches; no pixels are decoded."""
    cohort = sized(tmp_path, [(40, 40)] * 21)
    for row in range(21):
        with open(cohort.path(row), "r+b") as file:
            file.truncate(45 if row % 5 == 0 else 0)  # a PNG's pixels start at byte 41
    assert data.short_side(cohort, number=5) == (40, 40, 40)
    with pytest.raises(ValueError, match=r"001\.png cannot be read .*: restore it"):
        data.short_side(cohort, number=21)


def test_a_bad_file_stops_training_by_name(cohort_folder, flags, tmp_path):
    folder = shutil.copytree(cohort_folder, tmp_path / "spoilt")
    cohort = data.read_cohort(folder)
    for row in range(0, len(cohort), 3):
        with open(cohort.path(row), "wb") as file:
            file.write(b"not an image")
    with pytest.raises(ValueError, match=r"0-0\.png cannot be read"):
        train.train(train.parse_config([*flags, "--data", str(folder), "--steps", "2"]))


# ------------------------------------------------------------------------------------- augmentation


PATCHES = torch.randint(
    0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
SOURCE = PATCHES.float().div(255).repeat_interleave(2, dim=0)


def views(n=2, **transforms):
    """Views of PATCHES under the named transforms only, each (lowest, highest), always applied."""
    always = {name: (1.0, *interval) for name, interval in transforms.items()}
    parameters = data.view_parameters(always, 0, 1, range(3), n)
    return data.make_views(PATCHES, parameters, 32), parameters


def test_without_a_transform_a_view_is_the_patch():
    torch.testing.assert_close(views()[0], SOURCE, atol=1e-5, rtol=0)


def test_geometry_is_exact_where_it_falls_on_pixels():
    x, parameters = views(flip=(-1, -1))
    assert (parameters["flip"] == -1).all()
    torch.testing.assert_close(x, SOURCE.flip(-1, -2), atol=1e-4, rtol=0)
    x, _ = views(rotate=(90, 90))
    torch.testing.assert_close(x, SOURCE.rot90(1, (-2, -1)), atol=1e-4, rtol=0)
    x, _ = views(translate=(0.25, 0.25))
    torch.testing.assert_close(x[..., :24, :24], SOURCE[..., 8:, 8:], atol=1e-4, rtol=0)
    x, parameters = views(crop=(0.25, 0.25))
    assert torch.allclose(parameters["extent"].prod(dim=1), torch.tensor(0.25))
    # The crop stays inside the patch.
    assert (parameters["centre"].abs() + parameters["extent"] <= 1 + 1e-6).all()


def test_the_affine_map_is_torchs():
    parameters = data.view_parameters(data.AUGMENTATIONS["demo"], 3, 1, range(6), 1)
    angle = torch.deg2rad(parameters["rotate"])
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(-1, 2, 2)
    scale = parameters["extent"] * parameters["flip"]
    affine = torch.cat([turn * scale[:, None], parameters["centre"][..., None]], dim=2)
    grid = F.affine_grid(affine, [6, 3, 20, 20], align_corners=False)
    expected = F.grid_sample(SOURCE, grid, padding_mode="reflection", align_corners=False)
    torch.testing.assert_close(data.resample(SOURCE, 20, parameters), expected, atol=1e-4, rtol=0)


def test_many_views_are_made_a_few_at_a_time():
    """On the CPU a batch is made in chunks that fit its cache; the views are the same."""
    images = torch.randint(0, 256, (40, 3, 64, 64), dtype=torch.uint8)
    parameters = data.view_parameters(data.AUGMENTATIONS["strong"], 0, 1, range(40), 2)
    whole = data.make_views(images, parameters, 64)
    for i in (0, 17, 39):
        mine = slice(2 * i, 2 * i + 2)
        alone = {name: value[mine] for name, value in parameters.items()}
        alone = data.make_views(images[i : i + 1], alone, 64)
        torch.testing.assert_close(whole[mine], alone, atol=1e-6, rtol=0)


def test_each_view_has_its_own_numbers():
    for name in ("brightness", "contrast", "rotate", "noise", "blur", "erase"):
        _, parameters = views(4, **{name: data.AUGMENTATIONS["demo"][name][1:]})
        assert len(parameters[name].unique()) == 12


def test_a_probability_is_respected():
    """The released code ignores a probability in its configuration."""
    names = "blur rotate erase noise solarise autocontrast sharpen brightness".split()
    for name in names:
        drawn = data.view_parameters({name: (0.3, 0.5, 0.9)}, 0, 1, range(40), 100)[name]
        share = ((drawn >= 0.5) & (drawn <= 0.9)).float().mean().item()
        assert share == pytest.approx(0.3, abs=0.03)


def test_a_crop_has_the_area_that_was_asked_for():
    """Uniform from 0.6 to 1, at aspect ratios up to 4/3 where they fit: no crop is cut off."""
    crop = {"crop": data.AUGMENTATIONS["demo"]["crop"]}
    parameters = data.view_parameters(crop, 0, 1, range(200), 100)
    width, height = parameters["extent"].T
    area = width * height
    assert area.mean().item() == pytest.approx(0.8, abs=0.01)
    assert (area > 0.95).float().mean().item() == pytest.approx(0.125, abs=0.01)
    assert (parameters["centre"].abs() + parameters["extent"]).max() <= 1 + 1e-6
    assert (width / height).log().abs().max() <= np.log(4 / 3) + 1e-6
    for half in (width > height, width < height):  # landscape, portrait
        assert half.float().mean().item() == pytest.approx(0.5, abs=0.02)


def test_flips_are_independent():
    flip = data.view_parameters(data.AUGMENTATIONS["weak"], 0, 1, range(100), 40)["flip"]
    assert set(flip.unique().tolist()) == {-1, 1}
    assert flip.mean(dim=0).abs().max() < 0.05
    assert flip.prod(dim=1).mean().abs() < 0.05


def test_views_do_not_share_their_noise():
    parameters = data.view_parameters(data.AUGMENTATIONS["strong"], 0, 1, range(64), 8)
    assert len(parameters["window"].unique()) > 512 - 8


def test_weak_views_are_flips():
    parameters = data.view_parameters(data.AUGMENTATIONS["weak"], 0, 1, range(3), 8)
    x = data.make_views(PATCHES, parameters, 32).unflatten(0, (3, 8))
    for patch, of_patch in zip(PATCHES.float() / 255, x):
        flips = [patch, patch.flip(-1), patch.flip(-2), patch.flip(-1, -2)]
        for view in of_patch:
            assert any(torch.allclose(view, flip, atol=1e-5) for flip in flips)


def test_colours():
    torch.testing.assert_close(views(brightness=(0.5, 0.5))[0], SOURCE / 2, atol=1e-5, rtol=0)
    mean = SOURCE.mean(dim=(1, 2, 3), keepdim=True)
    halved = views(contrast=(0.5, 0.5))[0]
    torch.testing.assert_close(halved, (SOURCE + mean) / 2, atol=1e-5, rtol=0)
    # Doubling the density of every stain squares the light that passes.
    source = SOURCE.clamp(min=1 / 255)  # black has no finite density
    torch.testing.assert_close(views(stain=(2, 2))[0], source**2, atol=1e-4, rtol=0)
    pure = torch.exp(-data.STAINS[1]).view(1, 3, 1, 1).expand(1, 3, 4, 4)  # eosin alone
    jittered = data.stain_jitter(pure, torch.tensor([[3.0, 0.5, 1.0]]), torch.zeros(1, 3))
    torch.testing.assert_close(jittered, pure.sqrt(), atol=1e-5, rtol=0)  # only eosin's factor acts


def test_blur_solarising_and_autocontrast_are_torchvisions():
    blurred = data.blur(SOURCE, torch.full((6,), 1.3))
    torch.testing.assert_close(blurred, TF.gaussian_blur(SOURCE, 5, 1.3))
    solarised = TF.solarize(SOURCE, 0.3)
    torch.testing.assert_close(views(solarise=(0.3, 0.3))[0], solarised, atol=1e-5, rtol=0)
    stretched = TF.autocontrast(SOURCE)
    torch.testing.assert_close(views(autocontrast=(1, 1))[0], stretched, atol=1e-4, rtol=0)


def test_sharpening_is_torchvisions():
    ours = views(sharpen=(1, 1))[0]
    torch.testing.assert_close(ours, TF.adjust_sharpness(SOURCE, 2), atol=1e-5, rtol=0)


def test_blur_noise_and_erasing():
    flat = torch.full((2, 3, 16, 16), 0.5)
    torch.testing.assert_close(data.blur(flat, torch.tensor([0.5, 2.0])), flat)
    point = torch.zeros(1, 1, 9, 9)
    point[..., 4, 4] = 1
    weights = torch.exp(-(torch.arange(-2, 3) ** 2) / 2.0)
    middle_row = data.blur(point, torch.tensor([1.0]))[0, 0, 4, 2:7]
    torch.testing.assert_close(middle_row, weights / weights.sum() ** 2)
    noisy, plain = views(noise=(0.02, 0.02))[0], views()[0]
    inner = (plain > 0.1) & (plain < 0.9)
    assert (noisy - plain)[inner].std().item() == pytest.approx(0.02, rel=0.1)
    ones = torch.ones(500, 3, 32, 32) * torch.linspace(0, 1, 32)
    holes = data.erase(ones, torch.full((500,), 0.25), torch.rand(500, 2)) != ones
    share = holes.any(dim=1).float().mean(dim=(1, 2))
    assert share.min() > 0.2 and share.max() < 0.3  # no square is cut off at the border


def test_plain_view():
    assert torch.equal(data.plain_view(PATCHES, 32), PATCHES.float() / 255)
    half = data.plain_view(PATCHES, 16)
    assert half.shape == (3, 3, 16, 16)
    assert half.mean().item() == pytest.approx(PATCHES.float().mean().item() / 255, abs=2e-3)


@pytest.mark.parametrize("of_a_cohort", [False, True])
def test_the_file_shows_its_stage(tmp_path, cohort_folder, of_a_cohort):
    command = [sys.executable, os.path.join(ROOT, "data.py"), *[cohort_folder] * of_a_cohort]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"{20 if of_a_cohort else 2} patients, " in done.stdout
    assert len(re.findall(r"row \d+, slide and patient \[\d+, \d+\]: .*\.png", done.stdout)) == 8
    assert Image.open(tmp_path / "views.png").size == (4 * 98 + 2, 8 * 98 + 2)
