"""The GPU agrees with the CPU: steps in bf16, resuming, views, probes, all of evaluate.py.

Skipped without CUDA. To keep the tests in working order, run them on the CPU:

    HLSS_TEST_DEVICE=cpu python -m pytest tests/test_cuda.py
"""

import json
import os
import subprocess
import sys
from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, newest
from test_train import CPU, built, log_of, weights_of

import data
import evaluate
import train
from losses import LEVELS, ar, ha, hvc
from model import share_batch_norm

DEVICE = torch.device(os.environ.get("HLSS_TEST_DEVICE", "cuda"))
if DEVICE.type == "cuda" and not torch.cuda.is_available():
    pytest.skip("no CUDA here; HLSS_TEST_DEVICE=cpu runs these on the CPU", allow_module_level=True)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # otherwise cuBLAS differs between runs


@pytest.fixture(autouse=True)
def exact(monkeypatch):
    """Deterministic kernels without TF32, which rounds the inputs of a convolution to 11 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def unit(*shape, seed=0):
    """Random rows of length 1."""
    return F.normalize(torch.randn(shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


# -------------------------------------------------------------------------------- a training step


def first_step(flags, device, amp=False, shared=False):
    """{term: value} and the gradient of all weights at a run's first step, from the CPU's views."""
    config, files, cohort, _, facts = built(flags)
    batch = cohort.restrict("train"), 4, facts, 0, 0, 1, CPU
    images, ids = next(train.make_batches(config, *batch))
    ids = {level: of.to(device) for level, of in ids.items()}
    model, _ = train.build_model(config, files, cohort, 0, device)
    if shared:
        share_batch_norm(model)
    wrapped = train.wrap(model, config, 1, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=amp):
        z, projections = wrapped(images.to(device))
    terms = hvc(projections, ids) | ha(z, model.bank, 0.1)
    sum(terms.values()).backward()
    gradient = torch.cat([p.grad.flatten().cpu() for p in model.parameters()])
    return {name: term.item() for name, term in terms.items()}, gradient


@pytest.mark.parametrize(
    ("extra", "amp", "shared", "loss_tolerance", "gradient_tolerance"),
    [
        ("--no-compile", False, False, 1e-4, 1e-2),
        # bf16 keeps 8 bits (0.4%) of every activation; on the CPU its gradient is 13% off.
        ("--no-compile", True, True, 2e-2, 0.25),
        ("--compile", True, False, 2e-2, 0.25),
    ],
)
def test_a_step_is_the_cpus(flags, extra, amp, shared, loss_tolerance, gradient_tolerance):
    """With torch's batch norm, and with the one that several processes share."""
    expected_terms, expected = first_step(flags, CPU)
    terms, gradient = first_step([*flags, extra], DEVICE, amp, shared)
    assert terms == pytest.approx(expected_terms, rel=loss_tolerance)
    assert (gradient - expected).norm() < gradient_tolerance * expected.norm()


def test_losses_and_their_gradients_are_the_cpus():
    """Also under bf16 autocast, where the losses compute in float32."""

    def found(device):
        bank = {level: unit(20, 64, seed=i).to(device) for i, level in enumerate(LEVELS)}
        row = torch.arange(32, device=device)
        ids = {level: row // n for level, n in zip(LEVELS, (2, 4, 8))}
        targets = dict.fromkeys(LEVELS, 8 * unit(32, 20, seed=3).to(device))
        z = unit(32, 64, seed=4).to(device).requires_grad_()
        with torch.autocast(device.type, torch.bfloat16):
            terms = hvc(dict.fromkeys(LEVELS, z), ids) | ha(z, bank, 0.1) | ar(z, bank, targets)
        sum(terms.values()).backward()
        return torch.stack(list(terms.values())).detach().cpu(), z.grad.cpu()

    torch.testing.assert_close(found(DEVICE), found(CPU), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------ a run, resumed


def test_a_killed_run_resumes(flags):
    """In bf16, the GPU's default: on the GPU to equal weights, on the CPU equal up to rounding."""
    config = train.parse_config([*flags, "--amp", "--lr", "1e-5"])
    weights, logs = [], []
    for device in (DEVICE, DEVICE, CPU):
        assert train.train(config, device=device)
        weights.append(weights_of(config.out))
        logs.append([line for line in log_of(config.out) if "loss" in line])
        os.remove(newest(config.out))  # back to step 2 of 4
    assert all(value.device == CPU for value in weights[0].values())  # so any machine can read them
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    losses = [[line["loss"] for line in log] for log in logs]
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=0.02)
    assert all(("memory_mib" in line) == (DEVICE.type == "cuda") for line in logs[0])


@pytest.mark.skipif(DEVICE.type == "cuda" and torch.cuda.device_count() < 2, reason="one GPU")
def test_two_gpus_train_as_one(flags, tmp_path):
    """NCCL, SyncBatchNorm and DistributedDataParallel together, in float32 with TF32 allowed."""
    logs = []
    for world in (1, 2):
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={world}"]
        command += ["--standalone", "train.py", *flags, "--out", str(tmp_path / str(world))]
        hidden = {} if DEVICE.type == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        subprocess.run(command, cwd=ROOT, env=os.environ | hidden, check=True, capture_output=True)
        logs.append(log_of(tmp_path / str(world)))
    one, two = (log[1] for log in logs)  # the first step; the probe before it ran as well
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-3)
    assert two["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=0.05)


# ------------------------------------------------------------------------------------------ views


@pytest.mark.parametrize("name", data.AUGMENTATIONS)
def test_views_are_the_cpus(name):
    """Rounding changes few pixels: those at a threshold, or at the edge of an erased square."""
    rng = np.random.default_rng(0)
    shape, dtype = ((12, 3, 80, 80), np.uint8) if name != "strong-srh" else ((12, 2, 80, 80), "u2")
    images = torch.from_numpy(rng.integers(0, np.iinfo(dtype).max, shape, dtype))
    drawn = data.view_parameters(data.AUGMENTATIONS[name], 0, 1, range(12), 4)
    expected = data.make_views(images, drawn, 64)
    views = data.make_views(images.to(DEVICE), drawn, 64)
    assert views.device.type == DEVICE.type
    difference = (views.cpu() - expected).abs()
    assert (difference > 1e-3).float().mean() < 1e-3
    assert difference.mean() < 1e-4


def test_batches_are_the_cpus(cohort_folder):
    cohort = data.read_cohort(cohort_folder)
    batch = cohort, range(1, 3), 4, (2, 2, 2), "demo", (64, 64)
    ours, expected = data.load_views(*batch, device=DEVICE), data.load_views(*batch)
    for (images, ids), (their_images, their_ids) in zip(ours, expected, strict=True):
        assert images.is_contiguous(memory_format=torch.channels_last)
        assert (images.cpu() - their_images).abs().mean() < 1e-4
        assert all(torch.equal(ids[level].cpu(), their_ids[level]) for level in LEVELS)


# ----------------------------------------------------------------------------------------- probes


@pytest.mark.parametrize("probe", [evaluate.knn, evaluate.logistic])
def test_probes_are_the_cpus(probe):
    """On five classes that overlap."""
    labels = torch.arange(900) % 5
    z = F.normalize(unit(5, 32)[labels] + 1.5 * unit(900, 32, seed=1) + 1, dim=1)

    def found(device):
        there, on_device = z.to(device), labels.to(device)
        return probe(there[:600], on_device[:600], there[600:], 5)

    torch.testing.assert_close(found(DEVICE), found(CPU), rtol=0, atol=1e-4)  # both on the CPU


def test_evaluate_gives_the_cpus_table(flags, monkeypatch):
    """Rounding may flip one patch of 48, where the votes tie."""
    config = train.parse_config(flags)
    train.train(config, device=DEVICE)
    found = []
    for device in (CPU, DEVICE):
        joined = nullcontext((0, 1, device))
        monkeypatch.setattr(evaluate, "processes", lambda timeout, joined=joined: joined)
        monkeypatch.setattr(sys, "argv", ["evaluate.py", config.out, "--against", "start"])
        evaluate.main()
        with open(os.path.join(config.out, "metrics.json")) as file:
            probes = json.load(file)["probes"]
        found.append((np.load(os.path.join(config.out, "embeddings.npz"))["z"], probes))
    (their_z, their_probes), (z, probes) = found
    np.testing.assert_allclose(z, their_z, atol=1e-4)
    assert list(probes) == list(their_probes) == list(evaluate.PROBES)
    for kind, result in their_probes.items():
        for name in ("accuracy", "mca", "accuracy_gain"):
            ours = probes[kind]["levels"]["patch"][name]
            assert ours == pytest.approx(result["levels"]["patch"][name], abs=1.01 / 48)
