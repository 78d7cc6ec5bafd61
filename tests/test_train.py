"""Training on one process: flags, schedule, a whole run, the log and config.json."""

import json
import math
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, newest

import evaluate
import train
from data import decode, read_cohort
from losses import LEVELS, attributes_used, ha, hvc
from model import load_run
from tools.runs import checkpoint_path, checkpoints
from tools.weights import load_clip

CPU = torch.device("cpu")


def log_of(out, drop=("images_per_s", "seconds_left")):
    """The lines of the log without what depends on the machine."""
    with open(os.path.join(out, "log.jsonl")) as file:
        return [{k: v for k, v in json.loads(line).items() if k not in drop} for line in file]


def weights_of(out):
    return torch.load(newest(out), weights_only=True)["model"]


def test_flags_become_the_config():
    config = train.parse_config(
        ["--preset", "opensrh", "--lr", "3e-4", "--objective", "simclr", "--no-amp"]
    )
    assert (config.lr, config.objective, config.amp, config.image_size) == (
        3e-4,
        "simclr",
        False,
        224,
    )
    assert train.parse_config(["--data", "tiles", "--clip", "RN50"]) == train.Config(
        data="tiles", clip="RN50"
    )


def test_the_demo_is_hidisc_unless_it_is_asked_for_hlss():
    assert train.parse_config([]).objective == "hidisc"
    assert train.parse_config(["--objective", "hlss"]) == train.Config()


def test_there_are_at_most_30_flags():
    assert len(vars(train.Config())) + 1 <= 30  # and --preset


def test_every_flag_is_explained(capsys):
    with pytest.raises(SystemExit):
        train.parse_config(["--help"])
    text = capsys.readouterr().out
    assert text.count("(default:") == len(vars(train.Config()))


def test_one_view_is_refused(capsys):
    with pytest.raises(SystemExit):
        train.parse_config(["--draw", "1,2,2"])
    assert "give 3 numbers: 2 or more views, then 1 or more" in capsys.readouterr().err


def test_draw_is_fine_to_coarse(flags):
    """3 views of each patch, 1 patch of each slide, 2 slides of each patient; 4 patients."""
    config, _, cohort, _, facts = built([*flags, "--draw", "3,1,2"])
    batches = train.make_batches(config, cohort.restrict("train"), 4, facts, 0, 0, 1, CPU)
    _, ids = next(iter(batches))
    for level, groups, size in zip(LEVELS, (8, 8, 4), (3, 3, 6)):
        assert ids[level].unique(return_counts=True)[1].tolist() == [size] * groups


def test_the_learning_rate_climbs_and_falls():
    config = train.Config(steps=100, lr=1.0)
    rates = [train.learning_rate(step, config) for step in range(1, 101)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[99] < 0.001


def test_perplexity_counts_the_attributes_in_use():
    t = torch.eye(8)
    assert attributes_used(t, t) == pytest.approx(8)
    assert attributes_used(t[[0, 0, 1, 1]], t) == pytest.approx(2)
    assert attributes_used(t[[3, 3, 3]], t) == pytest.approx(1)


@pytest.mark.parametrize("objective", ["hlss", "hidisc", "simclr"])
def test_the_whole_road(flags, objective, capsys, monkeypatch):
    config = train.parse_config([*flags, "--objective", objective])
    assert train.train(config)
    lines = log_of(config.out)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 4]
    assert set(lines[-1]["probe"]["knn20"]["levels"]) == {"patch", "slide", "patient"}
    terms = {name for name in lines[1] if name.startswith(("hvc", "ha"))}
    assert len(terms) == {"hlss": 6, "hidisc": 3, "simclr": 1}[objective]
    assert lines[1]["loss"] == pytest.approx(sum(lines[1][name] for name in terms), rel=1e-5)
    assert list(checkpoints(config.out)) == [0, 2, 4]  # the start, for --against start
    assert "step 4 knn200" in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", ["evaluate.py", config.out])
    evaluate.main()  # from the checkpoint alone
    assert "step 4 knn200" in capsys.readouterr().out
    with open(os.path.join(config.out, "metrics.json")) as file:
        probes = json.load(file)["probes"]  # these say more
    for kind, result in lines[-1]["probe"].items():
        for level, metrics in result["levels"].items():
            assert probes[kind]["levels"][level].items() >= metrics.items()


@pytest.mark.parametrize(
    ("objective", "align"),
    [("hlss", "regression"), ("hlss", "off"), ("hidisc", "paper"), ("hidisc", "regression")],
)
def test_any_contrast_goes_with_any_alignment(flags, objective, align):
    config = train.parse_config([*flags, "--objective", objective, "--align", align])
    config.steps = 1
    assert train.train(config)
    line = log_of(config.out)[1]
    levels = ("patch", "slide", "patient")
    parts = {"paper": ["hvc", "ha"], "regression": ["hvc", "ar"], "off": ["hvc"]}[align]
    terms = {f"{part}_{level}" for part in parts for level in levels}
    assert {name for name in line if name.startswith(("hvc", "ha_", "ar_"))} == terms
    assert line["loss"] == pytest.approx(sum(line[name] for name in terms), rel=1e-5)


def test_by_default_hlss_is_the_papers_and_the_others_are_without_words():
    assert train.parse_config(["--objective", "hlss"]).align == "paper"
    assert train.parse_config(["--objective", "hidisc"]).align == "off"
    assert train.parse_config(["--objective", "simclr", "--align", "paper"]).align == "paper"
    lambdas = train.parse_config(["--align", "regression", "--align-weight", "3"]).lambdas
    assert lambdas["ar_slide"] == 3


# ---------------------------------------------------------------------- the teacher of a regression


def built(flags):
    """What train.py builds before it trains: (config, files, cohort, model, facts)."""
    config = train.parse_config(flags)
    files = {"data": config.data} | train.find_text(config, 0)
    cohort = read_cohort(config.data, config.level_names)
    return config, files, cohort, *train.build_model(config, files, cohort, 0, CPU)


def targets_of(flags):
    """What train.py holds the attribute scores to, with the cohort that trains, and the model."""
    config, files, cohort, model, facts = built([*flags, "--align", "regression"])
    cohort = cohort.restrict("train")
    return train.teach(config, files, model, facts, cohort, CPU), cohort, model


def test_the_targets_are_the_standardised_scores_of_the_clip_that_training_began_with(flags):
    targets, cohort, model = targets_of(flags)
    ids = cohort.ids(np.arange(len(cohort)))
    images = [torch.tensor(decode(cohort.path(row))) for row in range(len(cohort))]
    z = model.eval().encode(torch.stack(images) / 255).detach()  # the model starts as the teacher
    for column, level in enumerate(("patch", "slide", "patient")):
        scores = z @ model.bank[level].T
        scores = (scores - scores.mean(dim=0)) / (scores.var(dim=0, correction=0) + 1e-8).sqrt()
        groups = np.unique(ids[:, column])
        means = torch.stack([scores[ids[:, column] == group].mean(dim=0) for group in groups])
        means = (means - means.mean(dim=0)) / (means.var(dim=0, correction=0) + 1e-8).sqrt()
        torch.testing.assert_close(targets[level][groups], means, rtol=0, atol=2e-3)
        others = np.setdiff1d(np.arange(len(targets[level])), groups)  # groups not in training
        assert not targets[level][others].any()


def test_the_teacher_is_the_clip_whatever_the_run_starts_from(flags, tmp_path):
    clip, *_ = targets_of(flags)
    small = ["--image-size", "32"]
    for start in ([*small, "--start", "random"], [*small, "--backbone", "resnet18"]):
        targets, *_ = targets_of([*flags, *start, "--out", str(tmp_path / start[-1])])
        assert all(torch.equal(targets[level], clip[level]) for level in clip)


def test_a_regression_resumes_to_the_same_weights(flags):
    flags = [*flags, "--align", "regression"]
    train.train(config := train.parse_config(flags))
    whole = weights_of(config.out)
    os.remove(newest(config.out))  # back to step 2
    train.train(train.parse_config(flags))
    assert all(torch.equal(value, whole[name]) for name, value in weights_of(config.out).items())


# ------------------------------------------------------------------------------ from random weights


@pytest.mark.parametrize("align", ["off", "regression"])
def test_a_tower_may_start_anew_and_evaluation_knows_how(flags, align, monkeypatch, capsys):
    """Words mean nothing to it, unless it regresses on a teacher's scores."""
    flags = [*flags, "--start", "random", "--align", align, "--steps", "1"]
    train.train(config := train.parse_config(flags))
    start, _ = load_run(checkpoint_path(config.out, 0))
    *_, made, _ = built(flags)
    for a, b in zip(start.tower.parameters(), made.tower.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(made.tower.conv1.weight, load_clip(config.clip)["visual.conv1.weight"])
    monkeypatch.setattr(sys, "argv", ["evaluate.py", config.out])
    evaluate.main()
    said = "attribute names mean nothing" in capsys.readouterr().out
    assert said == (align == "off")


def test_a_backbone_without_words_needs_neither_clip_nor_bank(
    flags, cohort_folder, tmp_path, monkeypatch, capsys
):
    flags = ["--data", cohort_folder, "--out", str(tmp_path / "run")]
    flags += ["--backbone", "resnet18", "--image-size", "32", "--steps", "1", "--patients", "2"]
    flags += ["--objective", "hidisc"]
    config = train.parse_config(flags)
    assert train.train(config)
    model, checkpoint = load_run(config.out)
    assert model.tower.dim == 512  # ResNet-18's own
    assert checkpoint["attributes"] == {"patch": [], "slide": [], "patient": []}

    monkeypatch.setattr(sys, "argv", ["evaluate.py", config.out, "--against", "start"])
    evaluate.main()
    with open(os.path.join(config.out, "metrics.json")) as file:
        metrics = json.load(file)
    assert list(metrics["probes"]) == ["knn200", "knn20", "linear"]
    assert (metrics["attributes_used"], metrics["class_attributes"]) == ({}, [])
    assert "report.html" in capsys.readouterr().out


@pytest.mark.parametrize("words", ["--objective hlss", "--objective hidisc --align paper"])
def test_words_for_a_backbone_come_from_a_clip_by_name(words, capsys):
    with pytest.raises(SystemExit):
        train.parse_config(["--backbone", "resnet18", *words.split()])
    assert "name a CLIP with --clip" in capsys.readouterr().err


def test_a_finished_run_shows_its_table_again(flags, capsys):
    train.train(train.parse_config(flags))
    before = weights_of(flags[flags.index("--out") + 1])
    train.train(train.parse_config(flags))
    assert capsys.readouterr().out.count("step 4 knn200") == 2
    assert all(
        torch.equal(v, before[k]) for k, v in weights_of(flags[flags.index("--out") + 1]).items()
    )


def test_the_default_bank_is_found_from_any_folder(cohort_folder, clip_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = train.find_text(train.Config(data=cohort_folder, clip=clip_file), 0)
    assert files["bank"] == os.path.join(ROOT, "demo/attributes.json")


def test_another_bank_is_refused(flags, tmp_path):
    """Its names would label the old bank's vectors."""
    train.train(train.parse_config([*flags, "--steps", "1"]))
    with open(os.path.join(ROOT, "demo/attributes.json")) as file:
        (tmp_path / "other.json").write_text(file.read().replace('"sparse nuclei"', '"XXX"'))
    with pytest.raises(ValueError, match=r"other\.json is not the bank of .*run: restore"):
        train.train(
            train.parse_config([*flags, "--steps", "1", "--bank", str(tmp_path / "other.json")])
        )


def test_numbers_out_of_range_are_refused(capsys):
    for flag in (
        "--val-fraction 1.5",
        "--workers 0",
        "--save-every 0",
        "--seed -1",
        "--temperature 0",
        "--align-weight -1",
    ):
        with pytest.raises(SystemExit):
            train.parse_config(flag.split())
        assert f"{flag} is not between" in capsys.readouterr().err.replace(".0 is", " is")


def test_flags_that_come_and_go_in_a_fork_do_not_break_its_runs(flags):
    """Flags that only the checkpoint or only the program knows are not compared."""
    config = train.parse_config(flags)
    train.train(config)
    path = newest(config.out)
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["config"] |= {"dropped": 0.5}
    for name in ("workers", "align_weight", "start"):
        del checkpoint["config"][name]
    torch.save(checkpoint, path)
    assert train.train(train.parse_config([*flags, "--align-weight", "2"]))
    with pytest.raises(ValueError, match=r"--align off \(was paper\)"):
        train.train(train.parse_config([*flags, "--align", "off"]))


def test_a_frozen_layer_stays_and_the_others_train(flags, monkeypatch):
    build = train.build_model

    def frozen(*arguments):
        model, facts = build(*arguments)
        model.tower.conv1.requires_grad_(False)
        return model, facts

    monkeypatch.setattr(train, "build_model", frozen)
    train.train(config := train.parse_config(flags))
    start = torch.load(checkpoint_path(config.out, 0), weights_only=True)["model"]
    end = weights_of(config.out)
    assert torch.equal(end["tower.conv1.weight"], start["tower.conv1.weight"])
    assert not torch.equal(end["tower.conv2.weight"], start["tower.conv2.weight"])


def test_a_contradicting_flag_is_refused(flags):
    train.train(train.parse_config([*flags, "--steps", "1"]))
    with pytest.raises(ValueError, match=r"--lr 0\.5 \(was 0\.001\)"):
        train.train(train.parse_config([*flags, "--steps", "1", "--lr", "0.5"]))


def test_bf16_follows_float32(flags, tmp_path):
    # We avoid the default rate, and projections from the fixture's text, which makes all
    # attributes alike: both amplify rounding.
    flags = [*flags, "--lr", "1e-5", "--objective", "hidisc", "--align", "paper"]
    train.train(full := train.parse_config([*flags, "--out", str(tmp_path / "full")]))
    train.train(half := train.parse_config([*flags, "--amp", "--out", str(tmp_path / "half")]))
    for a, b in zip(log_of(full.out)[1:5], log_of(half.out)[1:5]):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)


@pytest.mark.slow
def test_bf16_follows_float32_on_the_demo(tmp_path):
    flags = [
        "--steps",
        "60",
        "--probe-every",
        "0",
    ]
    train.train(full := train.parse_config([*flags, "--no-amp", "--out", str(tmp_path / "full")]))
    train.train(half := train.parse_config([*flags, "--amp", "--out", str(tmp_path / "half")]))
    a, b = (
        [line["loss"] for line in log_of(config.out) if "loss" in line] for config in (full, half)
    )
    print(
        f"largest difference of a step {max(abs(x - y) for x, y in zip(a, b)):.3f}, "
        f"of the mean of the last 20 {abs(sum(a[-20:]) - sum(b[-20:])) / 20:.4f}, "
        f"of {a[0]:.1f} to {a[-1]:.1f}"
    )
    assert max(abs(x - y) for x, y in zip(a, b)) < 0.05 * a[0]
    assert sum(a[-20:]) == pytest.approx(sum(b[-20:]), rel=0.02)


@pytest.mark.slow
def test_compiled_is_eager(flags, tmp_path):
    flags = [
        *flags,
        "--lr",
        "1e-5",
        "--probe-every",
        "0",
    ]  # at the default rate an untrained tower is chaotic
    train.train(eager := train.parse_config([*flags, "--out", str(tmp_path / "eager")]))
    train.train(
        compiled := train.parse_config([*flags, "--compile", "--out", str(tmp_path / "compiled")])
    )
    for a, b in zip(log_of(eager.out)[1:5], log_of(compiled.out)[1:5]):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-2)
    a, b = weights_of(eager.out), weights_of(compiled.out)
    assert a.keys() == b.keys()  # no _orig_mod.
    for name, value in a.items():
        torch.testing.assert_close(
            b[name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


# ----------------------------------------------------------------------------------- log and config


def test_a_line_of_the_log_has_everything(flags, capsys):
    train.train(config := train.parse_config([*flags, "--probe-every", "0"]))
    line = log_of(config.out, drop=())[2]
    levels = ("patch", "slide", "patient")
    assert set(line) == {
        "step",
        "loss",
        "lr",
        "gradient_norm",
        "images_per_s",
        "seconds_left",
        *(f"{part}_{level}" for part in ("hvc", "ha", "attributes_used") for level in levels),
    }
    assert all(1 <= line[f"attributes_used_{level}"] <= 32 for level in levels)
    assert log_of(config.out, drop=())[4]["seconds_left"] == 0
    assert "at chance each hvc term is log(32 - 1) = 3.43" in capsys.readouterr().out


def test_config_json_says_how_to_run_it_again(flags, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", *flags, "--steps", "1"])
    train.train(train.parse_config([*flags, "--steps", "1"]))
    with open(os.path.join(flags[flags.index("--out") + 1], "config.json")) as file:
        about = json.load(file)
    python, script, *words = shlex.split(about["command"])
    assert (python, script) == ("python", "train.py")
    assert train.parse_config(words) == train.parse_config([*flags, "--steps", "1"])
    assert about["torch"].startswith(torch.__version__.split("+")[0])
    assert {"python", "numpy", "pillow", "processes", "device"} <= set(about)
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    assert about["commit"].removesuffix("-dirty") == head


def test_only_what_the_probe_uses_is_embedded(flags, cohort_folder, tmp_path, monkeypatch):
    """No patients of the test split, and nothing without labels."""
    embedded = []
    embed = train.embed

    def spy(model, cohort, *arguments, **options):
        embedded.append(len(cohort))
        return embed(model, cohort, *arguments, **options)

    monkeypatch.setattr(train, "embed", spy)
    with open(os.path.join(cohort_folder, "manifest.csv")) as file:
        rows = [line.split(",") for line in file.read().splitlines()]
    os.symlink(os.path.join(cohort_folder, "images"), tmp_path / "images")
    test = [[*row[:4], "test", *row[5:]] if row[1].endswith("-01") else row for row in rows]
    for name, table in {"test": test, "none": [row[:3] for row in rows]}.items():
        (tmp_path / f"{name}.csv").write_text("\n".join(",".join(row) for row in table))
        more = ["--data", str(tmp_path / f"{name}.csv"), "--out", str(tmp_path / name)]
        train.train(train.parse_config([*flags, *more, "--steps", "1"]))
    assert embedded == [96, 96]  # of 120, before and after training


def test_an_all_background_cohort_gives_no_nan(flags, tmp_path):
    from PIL import Image

    lines = ["path,patient,slide"]
    for i in range(40):
        Image.new("RGB", (64, 64), "white").save(tmp_path / f"{i}.png")
        lines.append(f"{i}.png,p{i // 4},s{i // 2}")
    (tmp_path / "manifest.csv").write_text("\n".join(lines))
    train.train(
        config := train.parse_config([*flags, "--data", str(tmp_path)])
    )  # would raise if a number were not finite
    assert all(torch.isfinite(value).all() for value in weights_of(config.out).values())


def test_equal_images_give_a_finite_gradient(flags):
    """Without augmentation nothing tells the rows apart, so the contrast is at chance."""
    *_, model, _ = built(flags)
    ids = dict.fromkeys(LEVELS, torch.arange(4).repeat_interleave(2))
    z, projections = model(torch.ones(8, 3, 64, 64))
    terms = hvc(projections, ids) | ha(z, model.bank)
    sum(terms.values()).backward()
    assert terms["hvc_patch"].item() == pytest.approx(math.log(7), abs=1e-3)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
