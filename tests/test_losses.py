"""The losses against loops and closed forms, and the mistakes of the paper's code."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import on_processes

import losses
from losses import (
    LEVELS,
    ar,
    floors,
    gather,
    ha,
    hvc,
    nearest_attribute,
    standardise,
    supcon,
    symmetric_kl,
)


def unit(*shape, seed=0, dtype=torch.float64):
    return F.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1
    )


# 2 patients x 2 slides x 2 patches x 2 views
IDS = torch.tensor(
    [
        [8 * p + 4 * s + b, 2 * p + s, p]
        for p in range(2)
        for s in range(2)
        for b in range(2)
        for _ in range(2)
    ]
)


OF_LEVEL = dict(zip(LEVELS, IDS.T))


def supcon_by_loops(f, ids, tau):
    total = 0.0
    for i in range(len(f)):
        others = [k for k in range(len(f)) if k != i]
        log_denominator = math.log(sum(math.exp(float(f[i] @ f[k]) / tau) for k in others))
        positives = [j for j in others if ids[j] == ids[i]]
        total += -sum(float(f[i] @ f[j]) / tau - log_denominator for j in positives) / len(
            positives
        )
    return total / len(f)


@pytest.mark.parametrize("column", [0, 1, 2])
def test_supcon_is_the_double_loop(column):
    f = unit(16, 5)
    expected = supcon_by_loops(f, IDS[:, column].tolist(), 0.07)
    assert supcon(f, IDS[:, column]).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [2, 4, 32])
def test_equal_similarities_give_log_2n_minus_1(n):
    f = torch.ones(2 * n, 4) / 2
    assert supcon(f, torch.arange(n).repeat(2)).item() == pytest.approx(
        math.log(2 * n - 1), rel=1e-6
    )


def test_the_floor_is_what_perfect_features_reach():
    for level, floor in zip(LEVELS, floors((2, 2, 2))):
        perfect = F.one_hot(OF_LEVEL[level]).double()
        assert supcon(perfect, OF_LEVEL[level], 0.02).item() == pytest.approx(floor, abs=1e-6)


def test_the_file_shows_its_stage(capsys):
    losses.main()
    printed = capsys.readouterr().out
    assert "patient  . + + + + + + + - - - - - - - -   equal similarities: 2.71 = log 15" in printed
    assert "perfect: 1.10 = log 3" in printed and "perfect: 1.95 = log 7" in printed


def test_levels_have_their_own_positives():
    projections = {level: unit(16, 5, seed=i) for i, level in enumerate(LEVELS)}
    terms = hvc(projections, OF_LEVEL)
    assert terms == hvc(dict(reversed(projections.items())), OF_LEVEL)  # paired by name
    assert hvc({"patient": projections["patient"]}, OF_LEVEL)["hvc_patient"] == terms["hvc_patient"]
    for i, level in enumerate(LEVELS):
        expected = supcon_by_loops(projections[level], IDS[:, i].tolist(), 0.07)
        assert terms[f"hvc_{level}"].item() == pytest.approx(expected, rel=1e-12)


def test_a_slide_drawn_twice_is_not_its_own_negative():
    """Equal rows cost less if they share an id than if they do not."""
    f = unit(2, 5).repeat_interleave(4, dim=0)  # two slides, each drawn twice with two views
    by_id = supcon(f, torch.tensor([7, 7, 7, 7, 9, 9, 9, 9]))
    by_place = supcon(
        f, torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    )  # as in the released code, where the place is the identity
    assert by_id.item() == pytest.approx(
        math.log(3), abs=1e-3
    )  # three equal positives; the other slide is far away
    assert by_id < by_place + 1e-6
    f = F.normalize(f + 0.1 * unit(8, 5, seed=3), dim=1).requires_grad_()
    (gradient,) = torch.autograd.grad(supcon(f, torch.tensor([7, 7, 7, 7, 9, 9, 9, 9])), f)
    pulled = -(
        gradient[0] @ f[2] - (gradient[0] @ f[0]) * (f[0] @ f[2])
    )  # along the sphere, towards the second draw
    assert pulled > 0


def test_one_view_a_patch_is_refused():
    with pytest.raises(ValueError, match="at least 2 views"):
        supcon(unit(4, 5), torch.arange(4))


def test_losses_are_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        f = unit(16, 5, dtype=torch.float32)
        low = supcon(f.bfloat16(), IDS[:, 0])
        exact = supcon(f, IDS[:, 0])
    assert low.dtype == exact.dtype == torch.float32
    assert exact.item() == pytest.approx(supcon(f, IDS[:, 0]).item(), rel=1e-6)


def test_gradients_are_those_of_the_equations():
    f, z, t = unit(6, 4).requires_grad_(), unit(6, 4, seed=1).requires_grad_(), unit(6, 4, seed=2)
    assert torch.autograd.gradcheck(lambda x: supcon(x, torch.tensor([0, 0, 1, 1, 2, 2])), f)
    assert torch.autograd.gradcheck(lambda x: symmetric_kl(x, t, 0.5), z)


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_alignment_is_the_equation(temperature):
    z, bank = unit(8, 16), {"patch": unit(5, 16, seed=1), "slide": unit(3, 16, seed=2)}
    losses = ha(z, bank, temperature)
    for level, t in bank.items():
        total = 0.0
        for row in z:
            star = t[max(range(len(t)), key=lambda k: float(row @ t[k]))]
            p, q = (row / temperature).softmax(0), (star / temperature).softmax(0)
            total += float((p * (p / q).log()).sum() + (q * (q / p).log()).sum()) / 2
        assert losses[f"ha_{level}"].item() == pytest.approx(total / len(z), rel=1e-10)


def test_alignment_moves_z_and_a_second_step_works():
    raw, bank = unit(8, 16).requires_grad_(), {"patch": unit(5, 16, seed=1).requires_grad_()}
    values = []
    for _ in range(2):  # the released code's graph is gone after the first step
        z = F.normalize(raw, dim=1)
        loss = ha(z, bank, temperature=0.1)["ha_patch"]
        (gradient,) = torch.autograd.grad(loss, raw)
        assert gradient.norm() > 1e-3
        raw = (raw - 0.1 * gradient).detach().requires_grad_()
        values.append(loss.item())
    assert values[1] < values[0]
    assert bank["patch"].grad is None


def test_at_temperature_1_the_alignment_is_almost_nothing():
    """With RN50's 1,024 dimensions, the softmax of a unit vector is flat, and the divergence of
    unrelated vectors is about 1 / D."""
    assert ha(unit(64, 1024), {"patch": unit(128, 1024, seed=1)})["ha_patch"].item() < 2e-3


def test_nearest_attribute():
    t = unit(5, 16)
    assert nearest_attribute(t[[3, 1, 4]] + 0.01, t).tolist() == [3, 1, 4]


def test_the_nearest_attribute_is_the_same_under_bf16_autocast():
    z, t = unit(2000, 64).float(), unit(128, 64, seed=1).float()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_attribute(z, t), (z.double() @ t.double().T).argmax(dim=1))


# ----------------------------------------------------------------------------- attribute regression

BANK = {"patch": unit(5, 8, seed=1), "slide": unit(3, 8, seed=2), "patient": unit(4, 8, seed=3)}
TARGETS = {level: 3 * unit(16, len(t), seed=4) for level, t in BANK.items()}


def test_attribute_regression_is_the_equation():
    z = unit(16, 8)
    losses = ar(z, BANK, TARGETS)
    assert list(losses) == ["ar_patch", "ar_slide", "ar_patient"]
    for level, t in BANK.items():
        total = 0.0
        for k, attribute in enumerate(t):
            scores = [float(row @ attribute) for row in z]
            mean = sum(scores) / 16
            variance = sum((score - mean) ** 2 for score in scores) / 16
            for score, target in zip(scores, TARGETS[level][:, k].tolist()):
                total += ((score - mean) / math.sqrt(variance + 1e-8) - target) ** 2
        assert losses[f"ar_{level}"].item() == pytest.approx(total / (16 * len(t)), rel=1e-12)


def test_to_standardise_is_batch_norm_without_parameters():
    x = 0.02 * unit(16, 5) + 0.3
    norm = torch.nn.BatchNorm1d(5, affine=False, eps=1e-8).double().train()
    torch.testing.assert_close(standardise(x), norm(x), rtol=0, atol=1e-12)
    narrow = 0.003 * standardise(unit(1000, 2), eps=0)  # cosines vary as little
    variance = standardise(narrow).var(dim=0, correction=0)
    expected = torch.full((2,), 9e-6 / (9e-6 + 1e-8), dtype=torch.float64)  # 0.9989
    torch.testing.assert_close(variance, expected, rtol=0, atol=1e-9)


def test_scores_that_are_those_of_the_teacher_cost_nothing_whatever_their_offset_and_scale():
    z = unit(16, 8)
    targets = {level: standardise(0.1 * z @ t.T + 7, eps=1e-7) for level, t in BANK.items()}
    assert all(term < 1e-6 for term in ar(z, BANK, targets).values())
    others = {level: standardise(unit(16, 8, seed=9) @ t.T) for level, t in BANK.items()}
    assert all(1 < term < 3 for term in ar(z, BANK, others).values())


def test_the_gradient_of_attribute_regression_reaches_z():
    z = unit(16, 8).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: sum(ar(z, BANK, TARGETS).values()), z)


def test_an_attribute_that_all_images_share_gives_no_nan():
    """If all images are the same, or an attribute is orthogonal to all of them."""
    z = unit(1, 8).float().repeat(16, 1).requires_grad_()
    bank = {level: t.float() for level, t in BANK.items()}
    loss = sum(ar(z, bank, TARGETS).values())
    loss.backward()
    assert loss.isfinite()
    assert z.grad.isfinite().all()
    assert standardise(torch.full((16, 1), 0.3)).abs().max() < 1e-3


def test_attribute_regression_is_float32_under_autocast():
    z = unit(16, 8).float()
    exact = ar(z, BANK, TARGETS)["ar_patch"]
    with torch.autocast("cpu", torch.bfloat16):
        assert ar(z, BANK, TARGETS)["ar_patch"].item() == exact.item()


# -------------------------------------------------------------------------------------- distributed


# A bank with 5 dimensions, and targets for 16 rows.
REGRESSION = (
    {level: unit(3 + i, 5, seed=6 + i) for i, level in enumerate(LEVELS)},
    {level: unit(16, 3 + i, seed=9 + i) for i, level in enumerate(LEVELS)},
)


def _gradient(rank, world, how):
    """The loss and its gradient on a linear encoder's weights, averaged as DistributedDataParallel
    does."""
    import torch.distributed as dist

    x, weight = unit(16, 6, seed=4), unit(6, 5, seed=5).requires_grad_()
    share = slice(rank * 16 // world, (rank + 1) * 16 // world)
    f = F.normalize(x[share] @ weight, dim=1)
    if how == "contrast":
        loss = sum(
            hvc({at: f for at in LEVELS}, {at: of[share] for at, of in OF_LEVEL.items()}).values()
        )
    elif how == "regression":
        targets = {level: a[share] for level, a in REGRESSION[1].items()}
        loss = sum(ar(f, REGRESSION[0], targets).values())
    else:
        # Plain all_gather with its own slice put back: the rows of the other processes are
        # constants, though they should carry a gradient.
        parts = [torch.empty_like(f) for _ in range(world)]
        dist.all_gather(parts, f.detach())
        parts[rank] = f
        everyone, loss = torch.cat(parts), 0
        for column in range(3):
            itself = torch.eye(16, dtype=torch.bool)
            positive = (IDS[:, column, None] == IDS[None, :, column]) & ~itself
            log_p = (everyone @ everyone.T / 0.07).masked_fill(itself, -torch.inf).log_softmax(1)
            loss = loss - (log_p.masked_fill(~positive, 0).sum(1) / positive.sum(1)).mean()
    (gradient,) = torch.autograd.grad(loss, weight)
    dist.all_reduce(gradient)
    dist.all_reduce(loss := loss.detach())
    return loss / world, gradient / world


@pytest.mark.parametrize("how", ["contrast", "regression"])
@pytest.mark.parametrize("world", [2, 4])
def test_processes_give_the_gradient_of_one(world, how):
    x, weight = unit(16, 6, seed=4), unit(6, 5, seed=5).requires_grad_()
    f = F.normalize(x @ weight, dim=1)
    if how == "contrast":
        loss = sum(hvc({level: f for level in LEVELS}, OF_LEVEL).values())
    else:
        loss = sum(ar(f, *REGRESSION).values())
    (expected,) = torch.autograd.grad(loss, weight)
    for got_loss, got in on_processes(world, _gradient, how):
        torch.testing.assert_close(got_loss, loss.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def test_a_gather_without_gradient_is_too_small():
    """The trap: if each of W processes holds all rows, a plain gather gives a gradient W times too
    small."""
    x, weight = unit(16, 6, seed=4), unit(6, 5, seed=5).requires_grad_()
    f = F.normalize(x @ weight, dim=1)
    (expected,) = torch.autograd.grad(
        sum(hvc({level: f for level in LEVELS}, OF_LEVEL).values()), weight
    )
    for _, got in on_processes(2, _gradient, "plain"):
        torch.testing.assert_close(2 * got, expected, rtol=0, atol=1e-10)


def test_gather_of_one_process_is_the_tensor_itself():
    x = unit(3, 2)
    assert gather(x) is x
