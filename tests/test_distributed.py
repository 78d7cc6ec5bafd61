"""Several processes train as one: same loss, gradient and batches. And how torchrun starts them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, newest, on_processes
from test_train import log_of, weights_of
from torch.utils.flop_counter import FlopCounterMode

import train
from data import load_views, read_cohort
from demo.clip import train_demo_clip
from demo.tissue import write_demo
from losses import ar, ha, hvc, supcon
from model import share_batch_norm
from tools.processes import average
from tools.runs import checkpoints

CPU = torch.device("cpu")
OBJECTIVES = ("simclr", "hidisc", "hlss")


def views(flags, first=0, rank=0, world=1, steps=1):
    """The batches [(images, ids)] that a rank gets after step `first`."""
    config = train.parse_config([*flags, "--steps", str(first + steps)])
    cohort = read_cohort(config.data).restrict("train")
    batch = cohort, range(first + 1, first + steps + 1), config.patients, config.counts, "demo"
    return list(load_views(*batch, sizes=(64, 64), share=(rank, world)))


# ------------------------------------------------------------------------- equivalence and its cost


def _gradients(rank, world, flags, images, ids, mode):
    """{objective: (loss, {parameter: gradient})} of the real model, from this rank's share."""
    mine = slice(rank * len(images) // world, (rank + 1) * len(images) // world)
    ids = {level: of[mine] for level, of in ids.items()}
    result = {}
    for objective in OBJECTIVES:
        config = train.parse_config([*flags, "--objective", objective])
        files = {"data": config.data} | train.find_text(config, rank)
        cohort = read_cohort(config.data)
        model, _ = train.build_model(config, files, cohort, rank, CPU)
        # An untrained text tower makes all attributes alike, which amplifies rounding, so here the
        # projections do not start from the text.
        for projection in model.projections.values():
            projection.reset_parameters()
        if mode == "eval":
            for module in model.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.momentum = 1.0
            with torch.no_grad():
                model(images)  # batch norm now holds the averages of the global batch
            model.eval()
        else:
            model.tower.double()  # in float32, an untrained tower amplifies rounding
            images = images.double()
        wrapped = train.wrap(model, config, world, torch.device("cpu"))
        z, projections = wrapped(images[mine])
        terms = hvc(projections, ids)
        if objective == "hlss":
            terms |= ha(z, model.bank)
        elif objective == "hidisc":  # any targets will do
            wave = torch.sin(torch.arange(14) * ids["patch"][:, None])  # [n, K]
            targets = dict.fromkeys(model.bank, wave)
            terms |= ar(z, model.bank, targets)
        loss = sum(terms.values())
        loss.backward()
        loss = average({"loss": loss}, "cpu")["loss"]
        result[objective] = loss, {name: p.grad for name, p in model.named_parameters()}
    return result


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_1_2_and_4_processes_train_as_one(flags, mode, tolerance=1e-6):
    """On the same global batch. In training mode, batch norm uses all processes. hlss is aligned as
    in the paper, hidisc by regression.

    The relative error of the loss is below the tolerance. The error of each parameter's gradient is
    below ten times the tolerance, relative to the norm of the whole gradient. float32, the type of
    z, resolves no more.
    """
    ((images, ids),) = views(flags)
    (one,) = on_processes(1, _gradients, flags, images, ids, mode)
    print(
        f"\n{'':9}{'processes':>9}{'loss':>13}{'difference':>12}{'gradient norm':>15}"
        f"{'largest difference':>20}"
    )
    for world in (1, 2, 4):
        for rank, result in enumerate(on_processes(world, _gradients, flags, images, ids, mode)):
            for objective, (loss, gradients) in result.items():
                expected_loss, expected = one[objective]
                norm = torch.nn.utils.get_total_norm(expected.values()).item()
                worst = max((gradients[name] - g).norm().item() for name, g in expected.items())
                if rank == 0:
                    print(
                        f"{objective:9}{world:9}{loss:13.7f}{abs(loss - expected_loss):12.1e}"
                        f"{norm:15.5f}"
                        f"{worst:20.1e}"
                    )
                assert gradients.keys() == expected.keys()
                assert loss == pytest.approx(expected_loss, rel=tolerance)
                assert worst < 10 * tolerance * norm


def _targets(rank, world, flags):
    config = train.parse_config([*flags, "--align", "regression"])
    files = {"data": config.data} | train.find_text(config, rank)
    cohort = read_cohort(config.data)
    model, facts = train.build_model(config, files, cohort, rank, CPU)
    return train.teach(config, files, model, facts, cohort.restrict("train"), CPU)


def test_the_teacher_says_the_same_on_any_number_of_processes(flags, tmp_path):
    results = []
    for world in (1, 2):
        results += on_processes(world, _targets, [*flags, "--out", str(tmp_path / str(world))])
    for result in results:
        assert all(torch.equal(result[level], table) for level, table in results[0].items())


def small_net():
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()
    return torch.nn.Sequential(*layers)


def _normed(rank, world, images, dtype):
    """Output, gradients and running averages of a batch norm on this rank's share."""
    net = small_net().to(dtype, memory_format=torch.channels_last)
    share_batch_norm(net)
    x = images.chunk(world)[rank].to(dtype).requires_grad_()
    y = net(x)
    y = net(y[:, :3])  # applied twice, so a gradient passes through it
    y.square().mean().backward()
    gradients = [p.grad for p in net.parameters()]
    for gradient in gradients:
        dist.all_reduce(gradient)
    return y.detach(), x.grad, [g / world for g in gradients], dict(net.named_buffers())


@pytest.mark.parametrize("world", [1, 2, 4])
def test_batch_norm_over_all_processes_is_that_of_one(world):
    images = torch.randn(16, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    net = small_net().double()
    x = images.double().requires_grad_()
    y = net(x)
    y = net(y[:, :3])
    y.square().mean().backward()
    shares = on_processes(world, _normed, images, torch.float32)

    def assert_close(ours, theirs, scale=1.0):
        torch.testing.assert_close(ours.double(), theirs, rtol=0, atol=1e-6 * scale)

    assert_close(torch.cat([share[0] for share in shares]), y.detach())
    x_gradient = torch.cat([share[1] for share in shares]) / world
    assert_close(x_gradient, x.grad, scale=x.grad.abs().max().item())
    largest = max(p.grad.abs().max().item() for p in net.parameters())
    for _, _, gradients, buffers in shares:
        for ours, p in zip(gradients, net.parameters(), strict=True):
            assert_close(ours, p.grad, scale=2 * largest)
        for name, buffer in net.named_buffers():
            assert_close(buffers[name], buffer.double())


DEMO_STEPS = ["--steps", "20", "--lr", "2.5e-4"]  # the demo's first 20 steps


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The flags of the README's demo, whose files are made once."""
    cache = tmp_path_factory.mktemp("cache")
    write_demo(cache / "tissue")
    train_demo_clip(str(cache / "clip.pt"))
    return ["--data", cache / "tissue", "--clip", cache / "clip.pt", "--no-amp"]


@pytest.mark.slow
@pytest.mark.parametrize("align", ["paper", "regression"])
def test_1_2_and_4_processes_train_alike(demo, tmp_path, align):
    """The demo's first 20 steps in training mode, also resumed on another number of processes."""
    losses = {}
    for name, worlds in {"1": [1], "2": [2], "4": [4], "1 2 4": [1, 2, 4]}.items():
        out = tmp_path / name.replace(" ", "-")
        flags = [*demo, *DEMO_STEPS, "--out", out, "--probe-every", "0"]
        flags += ["--align", align]
        for world in worlds:
            flags += ["--save-every", "8"]
            code, _, errors = finish(
                torchrun(f"--nproc_per_node={world}", "--standalone", "train.py", *flags)
            )
            assert code == 0, errors
            if world != worlds[-1]:  # back to step 16
                os.remove(newest(str(out)))
        losses[name] = [line["loss"] for line in log_of(str(out)) if "loss" in line]
    for name, values in losses.items():
        assert len(values) == 11  # steps 1 to 10, and 20
        worst = max(abs(a - b) for a, b in zip(values, losses["1"]))
        print(f"{name} processes: largest difference of the loss from one process {worst:.1e}")
        assert worst < 1e-3  # for a loss of about 10: rounding grows from step to step


def _seeds(rank, world, flags):
    """The seed of the dropout masks at each step on this rank."""
    seeds = []
    manual_seed = torch.manual_seed
    torch.manual_seed = lambda seed: seeds.append(seed) or manual_seed(seed)
    train.train(train.parse_config([*flags, "--steps", "3"]), rank, world)
    return seeds[-3:]


def test_every_step_of_every_rank_has_its_own_random_masks(flags):
    first, second = on_processes(2, _seeds, flags)
    assert len({*first, *second}) == 6


def _contrast_flops(rank, world, n):
    """This rank's floating-point operations, forward and backward, for the contrast of n rows in
    total."""
    f = torch.nn.functional.normalize(torch.randn(n // world, 128), dim=1).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        supcon(f, torch.arange(n // 2).repeat_interleave(2).chunk(world)[rank]).backward()
    return counter.get_total_flops()


def test_the_contrast_costs_1_over_w_a_rank():
    print(f"\n{'processes':>9}{'MFLOP of the contrast, a rank':>32}")
    for world in (1, 2, 4):
        for flops in on_processes(world, _contrast_flops, 512):
            assert (
                flops == 3 * 2 * 512 * 512 * 128 // world
            )  # forward, then backward to rows and to columns
        print(f"{world:9}{flops / 1e6:32.1f}")


# ------------------------------------------------------------------------------------- same batches


@pytest.mark.parametrize("world", [2, 4])
def test_the_shares_are_the_batch_of_one_process(flags, world):
    for first in (0, 5):  # at the start; resumed at step 5 on another number
        whole = views(flags, first, steps=2)
        shares = [views(flags, first, rank, world, steps=2) for rank in range(world)]
        for step, (images, ids) in enumerate(whole):
            for level, of in ids.items():
                assert torch.equal(torch.cat([share[step][1][level] for share in shares]), of)
            together = torch.cat([share[step][0] for share in shares])
            torch.testing.assert_close(together, images, rtol=0, atol=1e-4)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_patient_once_an_epoch_on_any_number_of_processes(flags, world):
    epoch = [
        views(flags, 0, rank, world, steps=3) for rank in range(world)
    ]  # 12 training patients, 4 per batch
    patients = torch.cat([ids["patient"] for share in epoch for _, ids in share])
    assert (
        patients.unique(return_counts=True)[1] == 2 * 2 * 2
    ).all()  # slides x patches x views: no patient twice
    assert len(patients.unique()) == 12


@pytest.mark.parametrize(("patients", "world"), [(4, 3), (8, 6), (4, 8)])
def test_patients_that_cannot_be_shared_are_refused(cohort_folder, patients, world):
    message = f"--patients {patients} cannot be shared by {world} processes"
    with pytest.raises(ValueError, match=f"{message}: use a multiple"):
        cohort = read_cohort(cohort_folder)
        train.make_batches(train.Config(), cohort, patients, {}, 0, 0, world, CPU)


# ----------------------------------------------------------------------------------------- torchrun


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    """(exit code, output, errors) of a torchrun; if it takes too long, SIGTERM ends it and its
    workers."""
    try:
        output = process.communicate(timeout=150)
    except subprocess.TimeoutExpired:
        process.terminate()
        output = process.communicate(timeout=60)
    return process.returncode, *output


def test_two_nodes_meet_over_c10d(flags):
    """Two torchrun agents train, as on two machines; evaluate.py on one machine finds the same
    numbers."""
    meet = [
        "--nnodes=2",
        "--nproc_per_node=2",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{free_port()}",
        "--rdzv-id=hlss",
        "--local-addr=127.0.0.1",
    ]
    agents = [torchrun(*meet, "train.py", *flags) for _ in range(2)]
    done = [finish(agent) for agent in agents]
    assert [code for code, *_ in done] == [0, 0], done
    assert sum(output.count("step 4 knn200") for _, output, _ in done) == 1  # rank 0 writes
    out = flags[flags.index("--out") + 1]
    assert [line["step"] for line in log_of(out)] == [0, 1, 2, 3, 4, 4]
    assert not any(
        name.startswith(("module.", "_orig_mod.")) or "._orig_mod." in name
        for name in weights_of(out)
    )
    code, _, errors = finish(torchrun("--nproc_per_node=2", "--standalone", "evaluate.py", out))
    assert code == 0, errors
    with open(os.path.join(out, "metrics.json")) as file:
        found = json.load(file)["probes"]["knn20"]["levels"]["patch"]
    assert found.items() >= log_of(out)[-1]["probe"]["knn20"]["levels"]["patch"].items()


def test_more_processes_than_gpus_are_told_what_to_type(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    message = "than GPUs here: torchrun --nproc_per_node=2"
    with pytest.raises(SystemExit, match=message), train.processes(600):
        pass


def workers_of(agent):
    with open(f"/proc/{agent.pid}/task/{agent.pid}/children") as file:
        return [int(pid) for pid in file.read().split()]


@pytest.mark.slow
def test_torchrun_starts_again_by_itself(flags):
    """kill -9 ends a worker; torchrun --max-restarts restarts all of them, and they resume from the
    checkpoint."""
    agent = torchrun(
        "--nproc_per_node=2",
        "--standalone",
        "--max-restarts=1",
        "train.py",
        *flags,
        "--steps",
        "30",
        "--probe-every",
        "0",
        "--save-every",
        "1",
    )
    out = flags[flags.index("--out") + 1]
    while agent.poll() is None and len(checkpoints(out)) < 2:
        time.sleep(0.02)
    os.kill(workers_of(agent)[1], signal.SIGKILL)
    code, output, errors = finish(agent)
    assert code == 0, errors
    assert "hlss from step 0 on 2" in output
    assert output.count("hlss from step") == 2
    assert [line["step"] for line in log_of(out)] == [*range(11), 20, 30, 30]
