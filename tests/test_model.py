"""The networks: CLIP's towers, and how HLSS ties its projections to the bank."""

import pytest
import torch
import torch.nn.functional as F

from losses import LEVELS, ha, hvc
from model import (
    HLSS,
    OBJECTIVES,
    ModifiedResNet,
    TextTower,
    hlss_from_state,
    image_tower,
    text_tower,
)
from tools.weights import load_clip


def bank(dim=32):
    generator = torch.Generator().manual_seed(0)
    return {
        level: F.normalize(torch.randn(k, dim, generator=generator), dim=1)
        for level, k in zip(LEVELS, (5, 6, 7))
    }


def model(objective="hlss", **options):
    torch.manual_seed(0)
    return HLSS(ModifiedResNet((1, 1, 1, 1), 4, 32, 64), bank(), objective, **options)


IMAGES = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[i // 2, i // 4, i // 4] for i in range(8)])


def step(hlss, optimizer):
    z, projections = hlss(IMAGES)
    loss = sum(hvc(projections, IDS).values()) + sum(ha(z, hlss.bank, 0.1).values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def test_projections_start_as_the_bank_and_move_but_the_bank_does_not():
    hlss, text = model(), bank()
    for level in LEVELS:
        assert torch.equal(hlss.projections[level].weight, text[level])
        assert not hlss.projections[level].bias.any()
    optimizer = torch.optim.AdamW(hlss.parameters(), lr=1e-2)
    step(hlss, optimizer)
    step(hlss, optimizer)  # a bank with a graph behind it would fail here
    for level in LEVELS:
        assert torch.equal(hlss.bank[level], text[level])
        assert not torch.allclose(hlss.projections[level].weight, text[level], atol=1e-4)
        assert hlss.projections[level].bias.any()
    assert not any(name.startswith("bank") for name, _ in hlss.named_parameters())


def test_a_projection_is_the_equation():
    z, projections = model().eval()(IMAGES)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(8))
    for level in LEVELS:
        torch.testing.assert_close(projections[level], F.normalize(z @ bank()[level].T, dim=1))


def test_objectives_differ_in_their_projections():
    for objective, levels in OBJECTIVES.items():
        _, projections = model(objective)(IMAGES)
        assert tuple(projections) == levels
    _, shared = model("hidisc")(IMAGES)
    assert shared["patch"] is shared["patient"]
    random = model(init="random")
    assert random.projections["slide"].weight.shape == bank()["slide"].shape
    assert not torch.allclose(random.projections["slide"].weight, bank()["slide"], atol=0.1)


def test_the_image_is_normalised_inside():
    hlss = model().eval()
    hlss.normalise((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    by_hand = (IMAGES - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor(
        [0.4, 0.5, 0.6]
    ).view(3, 1, 1)
    torch.testing.assert_close(hlss.encode(IMAGES), F.normalize(hlss.tower(by_hand), dim=1))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_model_is_rebuilt_from_its_state_alone(objective):
    original = model(objective).eval()
    original.normalise((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    rebuilt = hlss_from_state(original.state_dict(), objective).eval()
    for a, b in zip(original(IMAGES)[1].values(), rebuilt(IMAGES)[1].values(), strict=True):
        assert torch.equal(a, b)


def test_sizes_are_read_off_the_state_dict(clip_file):
    state = load_clip(clip_file)
    tower, text = image_tower(state), text_tower(state)
    assert (tower.image_size, tower.dim, text.dim, text.context, text.vocabulary) == (
        64,
        64,
        64,
        77,
        514,
    )
    assert not any(p.requires_grad for p in text.parameters())
    torch.manual_seed(1)
    other = ModifiedResNet((1, 2, 1, 3), 8, 48, 96)
    rebuilt = image_tower({f"visual.{k}": v for k, v in other.state_dict().items()})
    x = torch.rand(2, 3, 96, 96)
    assert torch.equal(other.eval()(x), rebuilt.eval()(x))


def test_the_text_tower_is_causal_and_reads_the_end_token():
    torch.manual_seed(0)
    text = TextTower(
        vocabulary=20, context=10, width=64, layers=2, dim=8, activation="quickgelu"
    ).eval()
    tokens = torch.tensor([[18, 3, 4, 19, 0, 0]])
    padded = torch.tensor([[18, 3, 4, 19, 7, 7, 7, 0]])  # what follows the end token is not seen
    torch.testing.assert_close(text(tokens), text(padded))
    assert not torch.allclose(text(tokens), text(torch.tensor([[18, 4, 3, 19, 0, 0]])))
