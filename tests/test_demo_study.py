"""The study: its runs, its measurements, and the verdicts drawn from its lines."""

import json
import shutil
import sys
from collections import Counter
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
from demo.truth import read_factors, read_truth, truth_auc
from describe import open_bank, rotate
from losses import LEVELS
from tools.weights import load_clip

AR = "HiDisc + AR"
CONTROL = "HiDisc + AR, control"
METRICS = {"knn200", "linear", "attributes", "zero-shot", "auc", "ceiling"}


def line(setting, seed, arm, weight=1.0, **changes):
    """A line of the study in which every metric is 0.5, apart from the changes."""
    metrics = dict.fromkeys(METRICS, 0.5) | {
        name.replace("_", "-"): x for name, x in changes.items()
    }
    return {"setting": setting, "seed": seed, "arm": arm, "weight": weight} | dict.fromkeys(
        LEVELS, metrics
    )


def lines_of(**gains):
    """Lines of five seeds at the centre. HiDisc + AR beats all other arms by the given gains, give
    or take 0.001 from seed to seed; otherwise the arms are equal."""
    lines = []
    for seed in range(5):
        for arm in ("start", "HiDisc", CONTROL, "HVC + AR", "HVC + AR, control"):
            lines.append(line("centre", seed, arm))
        jitter = 0.001 * (-1) ** seed
        lines.append(line("centre", seed, AR, **{k: 0.5 + v + jitter for k, v in gains.items()}))
    return lines


# ------------------------------------------------------------------------------------ what is run


def test_the_weight_is_chosen_on_seeds_of_their_own():
    jobs = study.tuning_jobs([])
    assert len(jobs) == len(set(jobs)) == 2 * 2 * 3  # seeds, arms, weights
    assert {seed for _, seed, _, _ in jobs}.isdisjoint(range(study.CENTRE["seeds"]))


def test_it_is_the_best_for_words_and_control_together():
    """Choosing the best weight for the words alone would favour them."""
    lines = []
    for weight, words, control in ((0.3, 0.5, 0.5), (1.0, 0.6, 0.7), (3.0, 0.9, 0.2)):
        lines.append(line("tuning", 100, AR, weight, knn200=words))
        lines.append(line("tuning", 100, CONTROL, weight, knn200=control))
    lines.append(line("centre", 0, AR, 0.3, knn200=1.0))  # must not influence the choice
    assert study.chosen_weight(lines) == 1.0
    assert {weight for *_, weight in study.study_jobs(lines)} == {1.0}


def test_every_setting_has_its_seeds_and_its_arms():
    jobs = study.study_jobs([line("tuning", 100, AR, weight) for weight in study.WEIGHTS])
    assert len(jobs) == len(set(jobs)) == 5 * 9 + 5 * 3 * 5
    five = ["start", "HiDisc", "HLSS", AR, CONTROL]
    for setting, changes in study.SETTINGS.items():
        arms = five if changes else list(study.ARMS)
        expected = {(seed, arm) for seed in range(changes.get("seeds", 5)) for arm in arms}
        assert {job[1:3] for job in jobs if job[0] == setting} == expected
    assert [job[1] for job in jobs] == sorted(job[1] for job in jobs)  # so one can stop early


@pytest.mark.parametrize("arm", list(study.ARMS)[1:])
def test_an_arm_and_its_control_are_commands_that_train_understands(arm):
    config = train.parse_config(study.ARMS[arm].split())
    assert (config.align == "regression") == ("AR" in arm)
    assert study.ARMS[arm] == study.ARMS[arm.removesuffix(", control")]


def test_what_has_a_line_is_not_run_again(tmp_path, monkeypatch):
    """Each job keeps one line."""
    ran = []

    def run(folder, job):
        ran.append(job)
        return line(*job)

    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(study, "LINES", tmp_path / "study.jsonl")
    monkeypatch.setattr(study, "clip_of", lambda *_: None)
    monkeypatch.setattr(study, "run", run)
    jobs = study.tuning_jobs([])
    study.run_all(str(tmp_path), lambda lines: jobs[:3])
    study.run_all(str(tmp_path), lambda lines: jobs[:5])
    assert ran == jobs[:5]
    kept = [(x["setting"], x["seed"], x["arm"], x["weight"]) for x in study.read_lines()]
    assert sorted(kept) == sorted(jobs[:5])


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
    truth = read_truth(study.HERE)
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


def test_a_line_has_all_metrics_of_all_levels(world, clip_file):
    cohort, _, attributes, bank, z = world
    found = study.measure(z, cohort, bank, bank, attributes, clip_file)
    assert set(found) == {"r2", *LEVELS}
    assert list(found["r2"]) == FACTORS
    for level in LEVELS:
        assert set(found[level]) == METRICS
        assert all(0 <= value <= 1 for value in found[level].values())
    assert json.loads(json.dumps(found)) == found


def test_an_encoder_that_knows_the_words_scores_high_and_noise_does_not(world, clip_file):
    cohort, _, attributes, bank, z = world
    noise = F.normalize(torch.randn(z.shape, generator=torch.Generator().manual_seed(1)), dim=1)
    knows = study.measure(z, cohort, bank, bank, attributes, clip_file)
    knows_nothing = study.measure(noise, cohort, bank, bank, attributes, clip_file)
    assert knows["patch"]["auc"] > 0.85
    assert knows["patch"]["ceiling"] > 0.95
    assert min(knows["r2"].values()) > 0.8
    assert 0.35 < knows_nothing["patch"]["auc"] < 0.65
    assert max(knows_nothing["r2"].values()) < 0.5


def test_the_truth_is_measured_with_the_words_whatever_the_arm_was_trained_on(world, clip_file):
    """A control's factors are read with the true bank; its own bank serves only its own probe."""
    cohort, _, attributes, bank, z = world
    own = {level: torch.zeros_like(t) for level, t in bank.items()}  # all scores are 0
    true_bank = study.measure(z, cohort, bank, bank, attributes, clip_file)
    control = study.measure(z, cohort, own, bank, attributes, clip_file)
    for level in LEVELS:
        changed = {name for name in METRICS if control[level][name] != true_bank[level][name]}
        assert changed <= {"attributes"}
    assert control["patch"]["attributes"] < true_bank["patch"]["attributes"]


def test_a_rotated_bank_is_a_control(world):
    """Its angles are unchanged, but its words mean nothing: a knowing encoder is at chance."""
    _, factors, attributes, bank, z = world
    truth = read_truth(study.HERE)
    together = torch.cat(list(bank.values()))

    def mean_auc(vectors):
        areas = []
        for level in LEVELS:
            for t, name in zip(vectors[level], attributes[level]):
                values = factors[:, FACTORS.index(truth[name][1:])]
                areas.append(truth_auc((z @ t).numpy(), values, np.arange(len(z)), truth[name][0]))
        return np.mean(areas)

    controls = []
    for seed in range(10):
        rotated = rotate(bank, seed)
        same = torch.cat(list(rotated.values()))
        torch.testing.assert_close(same @ same.T, together @ together.T, atol=1e-5, rtol=0)
        controls.append(mean_auc(rotated))
    assert mean_auc(bank) > 0.85
    assert abs(np.mean(controls) - 0.5) < 0.05
    assert max(controls) < 0.7


@pytest.mark.parametrize("arm", ["start", AR, CONTROL])
def test_a_run_trains_measures_and_clears_away(
    arm, cohort_folder, clip_file, tmp_path, monkeypatch
):
    """The start is not trained. A control trains with another bank that has the same angles."""
    trained = []
    banks = []

    def start(command, **_):
        config = train.parse_config(command[2:])
        config.steps, config.patients, config.amp = 1, 4, False
        trained.append(config)
        banks.append(torch.load(config.bank, weights_only=True)["vectors"])
        train.train(config)

    def copy(path, **options):
        assert options == {"patients": 40, "signature": 0.0, "seed": 3}
        return shutil.copytree(cohort_folder, path)

    monkeypatch.setattr(study, "subprocess", SimpleNamespace(run=start))
    monkeypatch.setattr(study, "write_demo", copy)
    monkeypatch.setattr(study, "clip_of", lambda *_: clip_file)
    found = study.run(str(tmp_path), ("centre", 3, arm, 0.3))
    assert (found["setting"], found["seed"], found["arm"]) == ("centre", 3, arm)
    assert found["weight"] == 0.3
    assert set(found["slide"]) == METRICS
    assert [path.name for path in tmp_path.iterdir()] == ["tissue-40-0.0-3"]
    if arm == "start":
        assert not trained
        return
    (config,) = trained
    assert (config.objective, config.align, config.align_weight) == ("hidisc", "regression", 0.3)
    _, true_bank = open_bank(str(study.DEMO_BANK), load_clip(clip_file), "", LEVELS)
    expected = rotate(true_bank, 3) if arm == CONTROL else true_bank
    for level in LEVELS:
        torch.testing.assert_close(banks[0][level], expected[level], atol=1e-6, rtol=0)


# ------------------------------------------------------------------------------ what the lines say


def test_a_difference_is_scipys():
    rng = np.random.default_rng(0)
    for n in range(2, 11):
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
    one = line("centre", 7, AR)
    for level, value in zip(LEVELS, (0.1, 0.2, 0.6)):
        one[level] = dict.fromkeys(METRICS, value)
    assert study.values([one], "centre", AR, "auc") == {7: pytest.approx(0.3)}
    assert study.values([one], "centre", AR, "knn200") == {7: 0.2}
    assert study.values([one], "centre", "HiDisc", "knn200") == {}


OUTCOMES = [  # gains of HiDisc + AR over all other arms, and the verdict on accuracy
    ({"knn200": 0.1}, "accuracy: language pays"),
    ({"attributes": 0.1}, "accuracy: language pays"),
    ({"knn200": 0.0}, "accuracy: not settled"),
]


@pytest.mark.parametrize(("gains", "said"), OUTCOMES)
def test_accuracy_pays_in_one_metric_or_another(gains, said):
    assert study.verdict(study.comparisons(lines_of(**gains)), "accuracy") == said


def test_accuracy_does_not_pay_where_every_way_is_below():
    lines = lines_of(knn200=-0.1, attributes=-0.1)
    assert study.verdict(study.comparisons(lines), "accuracy") == "accuracy: not settled"
    for one in lines:  # HVC + AR neither gains nor loses until here
        if one["arm"] == "HVC + AR":
            one["slide"] = one["slide"] | {"knn200": 0.4 + 0.001 * one["seed"], "attributes": 0.4}
    assert study.verdict(study.comparisons(lines), "accuracy") == "accuracy: language does not pay"


def test_a_gain_that_the_control_has_too_is_not_languages():
    lines = lines_of(knn200=0.1)
    for one in lines:
        if one["arm"] == CONTROL:
            one["slide"] = one["slide"] | {"knn200": 0.6}
    assert study.verdict(study.comparisons(lines), "accuracy") == "accuracy: not settled"


WORDS = [  # gains of HiDisc + AR over all other arms, at the centre
    ({"attributes": 0.0, "auc": 0.1, "zero_shot": 0.1}, "words: language pays"),
    ({"attributes": -0.005, "auc": 0.1, "zero_shot": 0.1}, "words: language pays"),
    ({"attributes": -0.05, "auc": 0.1, "zero_shot": 0.1}, "words: not settled"),
    ({"attributes": 0.0, "auc": 0.1, "zero_shot": 0.0}, "words: not settled"),
]


@pytest.mark.parametrize(("gains", "said"), WORDS)
def test_words_pay_only_in_all_three(gains, said):
    """A loss at the centre leaves it open: 16 patients, not run here, might still win."""
    assert study.verdict(study.comparisons(lines_of(**gains)), "words") == said


def test_words_do_not_pay_where_both_settings_have_lost():
    lines = lines_of(attributes=-0.05, auc=0.1, zero_shot=0.1)
    lines += [one | {"setting": "16 patients"} for one in lines]
    assert study.verdict(study.comparisons(lines), "words") == "words: language does not pay"


def test_the_auc_may_be_a_point_below_the_start_and_not_below_the_others():
    rows = study.comparisons(lines_of(auc=-0.005))
    holds = {row["claim"]: row["holds"] for row in rows if row["verdict"] == "words, centre"}
    assert holds[f"{AR}, auc, above start's auc -0.01"] == "yes"
    assert holds[f"{AR}, auc, above HiDisc's auc"] == "no"
    assert holds[f"{AR}, zero-shot, above start's zero-shot"] == "open"


def test_a_verdict_rests_on_each_comparison_once():
    rows = study.comparisons([])
    assert Counter(row["verdict"] for row in rows) == {
        "accuracy, HiDisc + AR, knn200": 2,
        "accuracy, HiDisc + AR, attributes": 2,
        "accuracy, HVC + AR, knn200": 2,
        "accuracy, HVC + AR, attributes": 2,
        "words, centre": 7,
        "words, 16 patients": 7,
    }
    assert {row["holds"] for row in rows} == {"open"}


def test_the_table_comes_from_the_lines_alone(tmp_path, monkeypatch, capsys):
    path = tmp_path / "study.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in lines_of(knn200=0.1)))
    monkeypatch.setattr(study, "LINES", path)
    monkeypatch.setattr(study, "run_all", lambda *_: pytest.fail("it ran"))
    monkeypatch.setattr(sys, "argv", ["study.py", "--table"])
    study.main()
    printed = capsys.readouterr().out.splitlines()
    rows = [text.split() for text in printed]
    assert ["HiDisc", "+", "AR", "60.0", *["50.0"] * 5, "5"] in rows
    assert ["SimCLR"] not in [row[:1] for row in rows]  # an arm without lines
    gain = [text for text in printed if f"centre: {AR}, knn200, above HiDisc's knn200" in text]
    assert gain[0].split()[:2] == ["yes", "+10.0"]
    assert printed[-2:] == ["accuracy: language pays", "words: not settled"]
    assert list(tmp_path.iterdir()) == [path]
