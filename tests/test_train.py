"""Training from the outside: flags, schedule, the whole road, resuming, and several processes."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, on_processes

import evaluate
import train


def log_of(out, drop=("images_per_s",)):
    with open(os.path.join(out, "log.jsonl")) as file:
        return [{k: v for k, v in json.loads(line).items() if k not in drop} for line in file]


def weights_of(out):
    return torch.load(train.checkpoints(out)[-1], weights_only=True)["model"]


def test_flags_become_the_config():
    config = train.parse_config(["--preset", "opensrh", "--lr", "3e-4", "--objective", "simclr", "--no-amp"])
    assert (config.lr, config.objective, config.amp, config.image_size) == (3e-4, "simclr", False, 224)
    assert train.parse_config([]) == train.Config()


def test_every_flag_is_explained(capsys):
    with pytest.raises(SystemExit):
        train.parse_config(["--help"])
    text = capsys.readouterr().out
    assert text.count("(default:") == len(vars(train.Config()))


def test_one_view_is_refused(capsys):
    with pytest.raises(SystemExit):
        train.parse_config(["--views", "1"])
    assert "at least 2 views" in capsys.readouterr().err


def test_the_learning_rate_climbs_and_falls():
    config = train.Config(steps=100, lr=1.0, warmup=0.1)
    rates = [train.learning_rate(step, config) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[99] < 0.001


def test_perplexity_counts_the_attributes_in_use():
    t = torch.eye(8)
    assert train.perplexity(t, t) == pytest.approx(8)
    assert train.perplexity(t[[0, 0, 1, 1]], t) == pytest.approx(2)
    assert train.perplexity(t[[3, 3, 3]], t) == pytest.approx(1)


@pytest.mark.parametrize("objective", ["hlss", "hidisc", "simclr"])
def test_the_whole_road(flags, objective, capsys, monkeypatch):
    config = train.parse_config([*flags, "--objective", objective])
    assert train.train(config)
    lines = log_of(config.out)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 4]
    assert set(lines[-1]["probe"]["knn20"]) == {"k", "patch", "slide", "patient"}
    terms = {name for name in lines[1] if name.startswith(("hvc", "ha"))}
    assert len(terms) == {"hlss": 6, "hidisc": 3, "simclr": 1}[objective]
    assert lines[1]["loss"] == pytest.approx(sum(lines[1][name] for name in terms), rel=1e-5)
    assert [os.path.basename(p) for p in train.checkpoints(config.out)] == ["step-0000002.pt", "step-0000004.pt"]
    assert "step 4 knn200" in capsys.readouterr().out

    monkeypatch.setattr(sys, "argv", ["evaluate.py", config.out])
    evaluate.main()  # from the checkpoint alone
    assert "step 4 knn200" in capsys.readouterr().out
    with open(os.path.join(config.out, "metrics.json")) as file:
        assert json.load(file)["probes"] == lines[-1]["probe"]


def test_a_resumed_run_is_an_uninterrupted_one(flags, tmp_path, monkeypatch):
    whole = train.parse_config([*flags, "--out", str(tmp_path / "whole")])
    train.train(whole)
    halves = train.parse_config([*flags, "--out", str(tmp_path / "halves")])
    save = train.save_checkpoint

    def save_and_die(folder, checkpoint):
        save(folder, checkpoint)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "save_checkpoint", save_and_die)
        train.train(halves)
    with open(os.path.join(halves.out, "log.jsonl"), "a") as file:
        file.write('{"step": 3, "loss": 99}\n{"step": 4, "lo')  # logged after the checkpoint, before the crash
    train.train(train.parse_config([*flags, "--out", halves.out]))
    for name, value in weights_of(whole.out).items():
        assert torch.equal(value, weights_of(halves.out)[name]), name
    assert log_of(whole.out) == log_of(halves.out)


def test_a_finished_run_shows_its_table_again(flags, capsys):
    train.train(train.parse_config(flags))
    before = weights_of(flags[flags.index("--out") + 1])
    train.train(train.parse_config(flags))
    assert capsys.readouterr().out.count("step 4 knn200") == 2
    assert all(torch.equal(v, before[k]) for k, v in weights_of(flags[flags.index("--out") + 1]).items())


def test_a_contradicting_flag_is_refused(flags):
    train.train(train.parse_config([*flags, "--steps", "1"]))
    with pytest.raises(ValueError, match=r"--lr 0\.5 \(there: 0\.001\)"):
        train.train(train.parse_config([*flags, "--steps", "1", "--lr", "0.5"]))


def test_sigterm_saves_and_says_so(flags):
    command = [sys.executable, "train.py", *flags, "--steps", "100000", "--save-every", "100000"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    out = flags[flags.index("--out") + 1]
    while not os.path.exists(os.path.join(out, "log.jsonl")) or len(log_of(out)) < 3:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == train.STOPPED
    assert len(train.checkpoints(out)) == 1


def test_a_loss_that_is_not_finite_ends_the_run(flags):
    with pytest.raises(FloatingPointError, match="step 2: the loss is nan"):
        train.train(train.parse_config([*flags, "--lr", "1e30", "--warmup", "0"]))


def test_bf16_follows_float32(flags, tmp_path):
    flags = [*flags, "--lr", "1e-5"]  # a rate at which four steps of an untrained tower are not chaos
    train.train(full := train.parse_config([*flags, "--out", str(tmp_path / "full")]))
    train.train(half := train.parse_config([*flags, "--amp", "--out", str(tmp_path / "half")]))
    for a, b in zip(log_of(full.out)[1:5], log_of(half.out)[1:5]):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.02)


# --------------------------------------------------------------------------------------------------- several processes


def _gradients(rank, world, flags):
    """The gradients of one step of the real model on this rank's share of one global batch, in eval mode."""
    from data import read_manifest
    from describe import Tokenizer, encode_bank, read_bank
    from model import HLSS, image_tower, load_state, text_tower

    config = train.parse_config(flags)
    state = load_state(config.clip)
    vectors = encode_bank(read_bank(config.bank), text_tower(state), Tokenizer())
    torch.manual_seed(0)
    model = HLSS(image_tower(state), vectors, config.objective).eval()  # batch norm's averages: no row sees another
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
    cohort = read_manifest(config.data).restrict("train")
    config.seed = 3
    images, ids = next(train.load_views(cohort, config, 0, 64, 64, torch.device("cpu"), rank, world))
    loss, _, _ = train.losses_of(wrapped, images.round(decimals=1), ids, model.bank, config)
    loss.backward()
    return train.average(loss)[0], {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("objective", ["hlss", "hidisc", "simclr"])
def test_two_processes_train_as_one(flags, objective, monkeypatch):
    import data

    monkeypatch.setitem(data.AUGMENTATION, "noise", (0.0, 0, 0))  # the one thing that is drawn a process
    flags = [*flags, "--objective", objective, "--ha-weight", "10"]
    (one_loss, one), = on_processes(1, _gradients, flags)
    for loss, gradients in on_processes(2, _gradients, flags):
        assert loss == pytest.approx(one_loss, abs=1e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, one[name], atol=1e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def torchrun(processes, *arguments):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    command += arguments
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_torchrun_trains_and_probes(flags):
    done = torchrun(4, "train.py", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 4 knn200") == 1
    done = torchrun(2, "evaluate.py", flags[flags.index("--out") + 1])
    assert done.returncode == 0, done.stderr
    with open(os.path.join(flags[flags.index("--out") + 1], "metrics.json")) as file:
        assert json.load(file)["probes"] == log_of(flags[flags.index("--out") + 1])[-1]["probe"]


def test_patients_that_cannot_be_shared_are_refused(flags):
    done = torchrun(2, "train.py", *flags, "--patients", "3")
    assert done.returncode != 0
    assert "--patients 3 cannot be shared by 2 processes: use 2 or 4" in done.stderr
