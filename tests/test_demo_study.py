"""The study: its arms, its measurements, and what its lines say."""

import copy
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats

import train
from data import read_cohort
from demo import study
from demo.tissue import FACTORS
from demo.truth import read_factors, read_truth
from describe import open_bank, rotate
from losses import LEVELS
from model import HLSS, image_tower
from tools.weights import load_clip

AR = "HiDisc + AR"
WORLD = "seven captions"
MEASURED = {"knn200", "linear", "attributes", "zero-shot", "auc", "ceiling", "rank_z"}


def line(world, seed, arm, **changes):
    """A line of the study in which every metric is 0.5, apart from the changes."""
    changes = {name.replace("_", "-"): value for name, value in changes.items()}
    levels = {level: dict.fromkeys(MEASURED, 0.5) | changes for level in LEVELS}
    return {"world": world, "seed": seed, "arm": arm} | levels


def lines_of(arm, **gains):
    """Lines of five seeds: one arm beats all others, give or take 0.001 from seed to seed."""
    lines = []
    for seed in range(5):
        jitter = 0.001 * (-1) ** seed
        lines += [line(WORLD, seed, other) for other in study.ARMS if other != arm]
        lines.append(line(WORLD, seed, arm, **{k: 0.5 + v + jitter for k, v in gains.items()}))
    return lines


# ------------------------------------------------------------------------------------ what is run


@pytest.mark.parametrize("arm", study.ARMS)
def test_an_arm_is_a_command_that_train_understands(arm):
    config = train.parse_config(study.ARMS[arm].split())
    assert (config.align == "regression") == ("AR" in arm)
    assert config.lr == (float(arm.split()[-1]) if "rate" in arm else 1e-3)


def test_a_random_bank_and_a_basis_have_no_meaning():
    bank = {level: F.normalize(torch.randn(5, 16), dim=1) for level in LEVELS}
    names = {level: list("abcde") for level in LEVELS}
    assert study.bank_of(AR, names, bank, 0) == (names, bank)
    _, random = study.bank_of("HVC, random rows", names, bank, 0)
    basis_names, basis = study.bank_of("HiDisc + AR, all of z", names, bank, 0)
    _, rotated = study.bank_of("HiDisc + AR, rotated", names, bank, 0)
    for level, t in bank.items():
        assert random[level].shape == t.shape
        torch.testing.assert_close(random[level].norm(dim=1), torch.ones(5))
        assert not torch.allclose(random[level] @ random[level].T, t @ t.T, atol=0.1)
        torch.testing.assert_close(rotated[level] @ rotated[level].T, t @ t.T)
        torch.testing.assert_close(basis[level] @ basis[level].T, torch.eye(16))
        assert len(basis_names[level]) == 16


def test_wise_ft_is_halfway_in_weights_and_in_the_averages_of_batch_norm(clip_file):
    bank = {level: torch.eye(64)[:3] for level in LEVELS}
    start = HLSS(image_tower(load_clip(clip_file)), bank)
    end = copy.deepcopy(start)
    for tensor in end.state_dict().values():
        tensor.add_(2)
    middle = study.halfway(end, start).state_dict()
    for name, value in start.state_dict().items():
        moved = 1 if value.is_floating_point() else 2  # the number of batches is no average
        torch.testing.assert_close(middle[name], value + moved)


def test_the_effective_rank_counts_directions():
    x = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0))
    assert study.effective_rank(x) == pytest.approx(8, abs=0.05)
    x[:, 3:] = 7.0  # constant: no direction
    assert study.effective_rank(x) == pytest.approx(3, abs=0.02)


def test_what_has_a_line_is_not_run_again(tmp_path, monkeypatch):
    """Also after a kill in the middle of writing a line."""
    ran = []

    def run(folder, *job):
        ran.append(job)
        return [line(*job)] + [line(*job[:2], "WiSE-FT")] * (job[2] == "HiDisc")

    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(study, "LINES", tmp_path / "study.jsonl")
    monkeypatch.setattr(study, "prepare", lambda *_: None)
    monkeypatch.setattr(study, "run", run)
    monkeypatch.setattr(study, "SEEDS", 1)
    study.run_all(str(tmp_path), 1)
    assert len(ran) == len(set(ran)) == 2 * 12
    lines = study.LINES.read_text().splitlines(keepends=True)
    assert len(lines) == 2 * 13
    study.LINES.write_text("".join(lines[:20]) + lines[20][:30])
    study.run_all(str(tmp_path), 1)
    kept = [(one["world"], one["seed"], one["arm"]) for one in study.read_lines()]
    assert len(kept) == len(set(kept)) == 2 * 13
    assert len(ran) <= 2 * 12 + 6


# ------------------------------------------------------------------------------- what is measured


@pytest.fixture(scope="module")
def world(cohort_folder, clip_file):
    """The small cohort, its factors, a bank, and an encoder that knows what the bank means.

    The bank consists of random unit vectors with 64 dimensions. In the encoder, each factor moves z
    from the vector of its low attribute towards that of its high attribute, at all levels.
    """
    cohort = read_cohort(cohort_folder)
    factors = read_factors(cohort_folder, cohort.names.astype(str))
    attributes, _ = open_bank(str(study.DEMO_BANK), load_clip(clip_file), "", LEVELS)
    truth = read_truth()
    generator = torch.Generator().manual_seed(0)
    bank = {}
    z = torch.zeros(len(cohort), 64)
    standard = (factors - factors.mean(axis=0)) / factors.std(axis=0)
    for level in LEVELS:
        t = torch.randn(len(attributes[level]), 64, generator=generator)
        bank[level] = F.normalize(t, dim=1)
        for vector, name in zip(bank[level], attributes[level]):
            sign = 1 if truth[name][0] == "+" else -1
            column = torch.from_numpy(standard[:, FACTORS.index(truth[name][1:])]).float()
            z += sign * column[:, None] * vector
    return cohort, factors, attributes, bank, F.normalize(z, dim=1)


def test_an_encoder_that_knows_the_words_scores_high_and_noise_does_not(world, clip_file):
    cohort, _, attributes, bank, z = world
    noise = F.normalize(torch.randn(z.shape, generator=torch.Generator().manual_seed(1)), dim=1)
    knows = study.measure(z, cohort, bank, attributes, clip_file)
    knows_nothing = study.measure(noise, cohort, bank, attributes, clip_file)
    assert set(knows) == set(LEVELS)
    assert {name for at in LEVELS for name in knows[at]} == MEASURED
    assert json.loads(json.dumps(knows)) == knows
    assert knows["patch"]["auc"] > 0.85
    assert knows["patch"]["ceiling"] > 0.95
    assert 0.35 < knows_nothing["patch"]["auc"] < 0.65


@pytest.mark.parametrize("arm", ["start", "HiDisc", "HVC, random rows", "HiDisc + AR, rotated"])
def test_a_run_trains_measures_and_clears_away(
    arm, cohort_folder, clip_file, tmp_path, monkeypatch
):
    """The start is not trained; HiDisc also gives WiSE-FT; a control trains with its own bank."""
    trained = []

    def start(command, **_):
        config = train.parse_config(command[2:])
        config.steps, config.patients, config.amp = 1, 4, False
        trained.append(torch.load(config.bank, weights_only=True)["vectors"])
        train.train(config)

    monkeypatch.setattr(study, "subprocess", SimpleNamespace(run=start))
    monkeypatch.setattr(study, "prepare", lambda *_: (cohort_folder, clip_file))
    lines = study.run(str(tmp_path), WORLD, 3, arm)
    assert [one["arm"] for one in lines] == ["WiSE-FT"] * (arm == "HiDisc") + [arm]
    assert set(lines[-1]["slide"]) == MEASURED | ({"rank_p"} if "HVC" in arm else set())
    assert not list(tmp_path.iterdir())
    assert len(trained) == (arm != "start")
    if "rotated" in arm:
        _, bank = open_bank(str(study.DEMO_BANK), load_clip(clip_file))
        for level, t in rotate(bank, 3).items():
            torch.testing.assert_close(trained[0][level], t, atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------ what the lines say


def test_a_difference_is_scipys():
    rng = np.random.default_rng(0)
    for n in range(2, 9):
        one = dict(enumerate(rng.random(n)))
        other = dict(enumerate(rng.random(n)))
        interval = stats.ttest_rel(list(one.values()), list(other.values())).confidence_interval()
        mean, low, high = study.difference(one, other)
        assert mean == pytest.approx(np.mean([one[seed] - other[seed] for seed in one]))
        np.testing.assert_allclose((low, high), interval, rtol=1e-3)


def test_a_difference_is_of_the_seeds_that_both_have():
    mean, low, high = study.difference({0: 0.5, 1: 0.7, 2: 9.0}, {3: 0.0, 1: 0.4, 0: 0.3})
    assert (mean, (low + high) / 2) == pytest.approx((0.25, 0.25))
    assert study.difference({0: 1.0}, {0: 0.0})[1:] == (-np.inf, np.inf)
    assert study.difference({0: 1.0}, {1: 0.0})[1:] == (-np.inf, np.inf)


def test_the_auc_is_a_mean_over_the_levels_and_the_accuracy_is_that_of_slides():
    one = line(WORLD, 7, AR)
    for level, value in zip(LEVELS, (0.1, 0.2, 0.6)):
        one[level] = dict.fromkeys(MEASURED, value)
    assert study.values([one], WORLD, AR, "auc") == {7: pytest.approx(0.3)}
    assert study.values([one], WORLD, AR, "knn200") == {7: 0.2}
    assert study.values([one], WORLD, "HiDisc", "knn200") == {}


def test_words_are_compared_among_the_arms_that_keep_accuracy():
    """WiSE-FT loses more than a point of knn200, so that its words do not count."""
    lines = lines_of("WiSE-FT", knn200=-0.02)
    others = [row[2] for row in study.comparisons(lines, WORLD) if row[0] == "C"]
    assert sorted(set(others)) == sorted(set(study.KEEPERS) - {AR, "WiSE-FT"})
    lines = lines_of(AR, knn200=-0.02)
    assert not [row for row in study.comparisons(lines, WORLD) if row[0] == "C"]


def test_only_seeds_that_every_arm_has_finished_count():
    lines = lines_of(AR, knn200=0.1)
    assert study.finished(lines) == lines
    assert study.finished(lines[:-1]) == [one for one in lines if one["seed"] < 4]
    assert study.finished(lines[:5]) == []


@pytest.mark.parametrize(("gain", "verdict"), [(0.1, "above"), (0.0, "open"), (-0.1, "below")])
def test_the_table_and_the_verdicts_come_from_the_lines_alone(
    gain, verdict, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "study.jsonl"
    lines = lines_of("HVC", knn200=gain)
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    monkeypatch.setattr(study, "LINES", path)
    monkeypatch.setattr(study, "run_all", lambda *_: pytest.fail("it ran"))
    monkeypatch.setattr(sys, "argv", ["study.py", "--table"])
    study.main()
    printed = capsys.readouterr().out.splitlines()
    row, _ = [text for text in printed if text.endswith("HVC against HVC, random rows, knn200")]
    assert row.split()[:2] == ["A", verdict]
    row, _ = [text for text in printed if text.endswith("HLSS against HVC, knn200")]
    assert row.split()[1] == {"above": "below", "below": "above"}.get(verdict, "open")
    assert list(tmp_path.iterdir()) == [path]
