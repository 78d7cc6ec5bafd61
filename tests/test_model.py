"""The networks: CLIP's towers agree with open_clip's, HLSS starts its projections from the bank,
and damaged checkpoints are refused."""

import copy
import functools

import open_clip
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import torchvision
from conftest import on_processes

from losses import LEVELS, ha, hvc
from model import (
    HLSS,
    OBJECTIVES,
    ModifiedResNet,
    TextTower,
    backbone_tower,
    image_tower,
    load_run,
    main,
    make_tower,
    resize_positions,
    share_batch_norm,
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


OF_LEVEL = dict(zip(LEVELS, IDS.T))


def step(hlss, optimizer):
    z, projections = hlss(IMAGES)
    loss = sum(hvc(projections, OF_LEVEL).values()) + sum(ha(z, hlss.bank, 0.1).values())
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
    step(hlss, optimizer)  # fails here if the bank has a graph
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
    for objective in OBJECTIVES:
        levels = LEVELS[:1] if objective == "simclr" else LEVELS
        _, projections = model(objective)(IMAGES)
        assert tuple(projections) == levels
    _, shared = model("hidisc")(IMAGES)
    assert shared["patch"] is shared["patient"]


def test_the_image_is_normalised_inside():
    tower = model().tower
    tower.normalisation = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    hlss = HLSS(tower, model().bank).eval()
    mean = torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)
    std = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1)
    by_hand = (IMAGES - mean) / std
    torch.testing.assert_close(hlss.encode(IMAGES), F.normalize(hlss.tower(by_hand), dim=1))


def write_run(folder, hlss, backbone=""):
    """Writes a checkpoint of step 1 as train.py does; returns its path."""
    path = folder / "step-0000001.pt"
    config = {"objective": hlss.objective, "backbone": backbone, "start": "clip"}
    attributes = {level: ["word"] * len(t) for level, t in hlss.bank.items()}
    facts = {"attributes": attributes, "clip": {"activation": "quickgelu"}, "image_size": 64}
    torch.save({"model": hlss.state_dict(), "config": config, "step": 1, **facts}, path)
    return path


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_model_is_rebuilt_from_its_checkpoint_alone(objective, tmp_path):
    original = model(objective).eval()
    original.mean.mul_(2)  # as for a backbone with other means
    rebuilt, _ = load_run(str(write_run(tmp_path, original)))
    for a, b in zip(original(IMAGES)[1].values(), rebuilt(IMAGES)[1].values(), strict=True):
        assert torch.equal(a, b)


def test_sizes_are_read_off_the_state_dict(clip_file):
    state = load_clip(clip_file)
    tower = image_tower(state)
    text = text_tower(state)
    assert (tower.image_size, tower.dim) == (64, 64)
    assert text.context == 77
    assert len(text.token_embedding.weight) == 514 + len(state["merges"])
    assert not any(p.requires_grad for p in text.parameters())
    torch.manual_seed(1)
    other = ModifiedResNet((1, 2, 1, 3), 8, 48, 96)
    rebuilt = image_tower({f"visual.{k}": v for k, v in other.state_dict().items()})
    x = torch.rand(2, 3, 96, 96)
    assert torch.equal(other.eval()(x), rebuilt.eval()(x))


def test_the_text_tower_is_causal_and_reads_the_end_token():
    torch.manual_seed(0)
    text = TextTower(
        vocabulary=20, context=10, width=64, layers=2, heads=1, dim=8, activation="quickgelu"
    ).eval()
    tokens = torch.tensor([[18, 3, 4, 19, 0, 0]])
    padded = torch.tensor([[18, 3, 4, 19, 7, 7, 7, 0]])  # what follows the end token is ignored
    torch.testing.assert_close(text(tokens), text(padded))
    assert not torch.allclose(text(tokens), text(torch.tensor([[18, 4, 3, 19, 0, 0]])))


# ---------------------------------------------------------------------- towers against open_clip

TEXT = {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2}
RESNET = {"image_size": 64, "layers": [1, 2, 1, 1], "width": 16, "patch_size": None}
VIT = {"image_size": 64, "layers": 2, "width": 128, "patch_size": 16}


def images_of(size, n=4):
    """Coloured clouds: images that differ clearly."""
    clouds = torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return F.interpolate(clouds, (size, size), mode="bilinear")


def size_of(clip):
    """The side in pixels of the images that an open_clip CLIP takes."""
    size = clip.visual.image_size
    return size if isinstance(size, int) else size[0]


def randomise(clip):
    """Makes weights look trained: no layer is an identity, batch norm has statistics, and half
    precision represents all of them exactly."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in clip.named_parameters():
        if parameter.dim() == 1:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = 0.1 * noise + (1 if name.endswith("weight") else 0)
    norms = [module for module in clip.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None  # a plain average, not a moving one
    clip.train()
    with torch.no_grad():
        clip.encode_image(images_of(size_of(clip), 3 if norms else 1))
    return clip.half().float().eval()


@functools.cache
def small_clip(kind, quick_gelu=True):
    """A small open_clip CLIP. kind: "resnet" or "vit"."""
    torch.manual_seed(0)
    vision = open_clip.CLIPVisionCfg(**{"resnet": RESNET, "vit": VIT}[kind])
    return randomise(
        open_clip.model.CLIP(64, vision, open_clip.CLIPTextCfg(**TEXT), quick_gelu=quick_gelu)
    )


@pytest.fixture(params=["resnet", "vit"])
def clip(request):
    return small_clip(request.param)


def tokens():
    """Four texts of 77, 3, 20 and 50 tokens, each ending in the end token."""
    torch.manual_seed(0)
    tokens = torch.randint(1, 49406, (4, 77))
    for row, length in zip(tokens, (77, 3, 20, 50)):
        row[length - 1] = 49407
        row[length:] = 0
    return tokens


def assert_same_embeddings(clip, state):
    images = images_of(size_of(clip))
    with torch.no_grad():
        pairs = [
            (image_tower(state).eval()(images), clip.encode_image(images)),
            (text_tower(state)(tokens()), clip.encode_text(tokens())),
        ]
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, atol=1e-4 * theirs.abs().max().item(), rtol=0)
        spread = theirs.std(dim=0).mean()
        assert spread > 1e-2 * theirs.abs().mean()  # the rows differ: the comparison counts


def test_the_embeddings_are_those_of_open_clip(clip):
    assert_same_embeddings(clip, clip.state_dict())


@pytest.mark.parametrize("name", ["RN50", "ViT-B-32"])
def test_the_full_towers_and_their_gradients_are_those_of_open_clip(name):
    torch.manual_seed(0)
    clip = randomise(open_clip.create_model(name, force_quick_gelu=True))
    state = clip.state_dict()
    assert_same_embeddings(clip, state)
    tower = image_tower(state).eval()
    images = images_of(224)
    for encode in (tower, clip.encode_image):
        F.normalize(encode(images), dim=1)[:, 0].sum().backward()
    gradients = {key: value.grad for key, value in clip.visual.named_parameters()}
    for key, parameter in tower.named_parameters():
        tolerance = 1e-4 * gradients[key].abs().max().item() + 1e-8
        torch.testing.assert_close(
            parameter.grad,
            gradients[key],
            rtol=0,
            atol=tolerance,
            msg=lambda message, key=key: f"{key}: {message}",
        )


def test_the_activation_matters():
    clip = small_clip("vit", quick_gelu=False)
    state = clip.state_dict()
    assert_same_embeddings(clip, state | {"activation": "gelu"})
    with pytest.raises(AssertionError):
        assert_same_embeddings(clip, state | {"activation": "quickgelu"})


@pytest.mark.parametrize("size", [96, 32])
def test_other_image_sizes_interpolate_the_positions(size):
    """For a ViT as open_clip does; for the attention pool by the same rule."""
    clip = small_clip("vit")
    state = clip.state_dict()
    other = open_clip.model.CLIP(
        64,
        open_clip.CLIPVisionCfg(**VIT | {"image_size": size}),
        open_clip.CLIPTextCfg(**TEXT),
        quick_gelu=True,
    ).eval()
    resized = dict(state)
    open_clip.model.resize_pos_embed(resized, other)
    other.load_state_dict(resized)
    images = torch.rand(2, 3, size, size)
    tower = image_tower(state, size).eval()
    torch.testing.assert_close(tower(images), other.encode_image(images), atol=1e-5, rtol=1e-4)
    assert tower.image_size == size

    state = small_clip("resnet").state_dict()
    tower = image_tower(state, size).eval()
    assert tower(images).shape == (2, 64)
    grid = state["visual.attnpool.positional_embedding"]
    ours = tower.attnpool.positional_embedding
    assert torch.equal(ours[0], grid[0])

    # Under bicubic interpolation a ramp stays a ramp.
    ramp = torch.linspace(-1, 1, 16).repeat_interleave(16).view(-1, 1)
    positions = torch.cat([torch.zeros(1, 1), ramp])
    small = resize_positions(positions, size // 8)[1:].view(size // 8, size // 8)
    assert (small.diff(dim=0) > 0).all()
    torch.testing.assert_close(small, small[:, :1].expand_as(small), atol=1e-5, rtol=0)


def test_a_size_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="--image-size 100: this tower needs a multiple of 32"):
        image_tower(small_clip("resnet").state_dict(), 100)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "convnext_tiny"])
def test_a_torchvision_backbone_stands_in(name, tmp_path):
    bank = {level: F.normalize(torch.randn(3, 48), dim=1) for level in LEVELS}
    hlss = HLSS(backbone_tower(name, bank), bank).eval()
    images = torch.rand(2, 3, 64, 64)
    z, _ = hlss(images)
    assert z.shape == (2, 48)
    again, _ = load_run(str(write_run(tmp_path, hlss, name)))
    assert torch.equal(again(images)[0], z)


def test_an_unknown_backbone_is_refused():
    with pytest.raises(ValueError, match="--backbone resnet19: not a torchvision classifier"):
        backbone_tower("resnet19", {})
    with pytest.raises(ValueError, match="--backbone squeezenet1_1: it has no linear"):
        backbone_tower("squeezenet1_1", {})


@pytest.mark.parametrize(
    ("name", "size"), [("googlenet", 224), ("inception_v3", 299), ("vit_b_16", 64), ("vgg11", 16)]
)
def test_a_network_that_cannot_train_at_that_size_is_refused_in_a_line(name, size):
    """It has auxiliary outputs, positions for another size, or a map without pixels."""
    config = {"backbone": name, "backbone_weights": "", "start": "clip"}
    with pytest.raises(ValueError, match=f"^{name} does not [^\n]*$"):
        make_tower(config, {}, None, size)


def test_weights_of_another_network_are_refused_and_of_this_one_read(tmp_path):
    path = str(tmp_path / "weights.pt")
    for name in ("resnet34", "resnet50"):
        torch.save(torchvision.models.get_model(name).state_dict(), path)
        with pytest.raises(
            ValueError, match=r"weights.pt for resnet18: layer1[^\n]*wrong network[^\n]*$"
        ):
            backbone_tower("resnet18", {}, path)
    before_torch_1_6 = functools.partial(torch.save, _use_new_zipfile_serialization=False)
    for save in (torch.save, before_torch_1_6, safetensors.torch.save_file):
        network = torchvision.models.resnet18()
        save(network.state_dict(), path)
        tower = backbone_tower("resnet18", {}, path)
        assert torch.equal(tower.layer4[1].conv2.weight, network.layer4[1].conv2.weight)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("ls_1.gamma", lambda t: torch.ones(128), "ls_1.gamma is .128. but should be absent"),
        (
            "mlp.c_fc.weight",
            lambda t: t[:100],
            "c_fc.weight is .100, 128. but should be .512, 128.",
        ),
        ("positional_embedding", lambda t: t[:-1], "has 15 positions: not a square"),
        ("attn_pool.query", lambda t: torch.ones(4), "attn_pool.query is .4. but should be absent"),
    ],
)
def test_what_is_almost_a_clip_is_refused_in_a_line(name, change, message):
    """CoCa's attention pool, layer scale, another MLP, positions that form no square."""
    state = small_clip("vit").state_dict()
    deep = name.startswith(("ls", "mlp"))
    name = f"visual.transformer.resblocks.0.{name}" if deep else f"visual.{name}"
    state[name] = change(state.get(name))
    with pytest.raises(ValueError, match=message) as error:
        image_tower(state)
    assert "\n" not in str(error.value)


def test_a_text_tower_without_a_projection_is_refused():
    state = small_clip("vit").state_dict()
    del state["text_projection"]
    with pytest.raises(ValueError, match="it has no text_projection"):
        text_tower(state)


def test_a_forks_buffer_does_not_become_a_level(tmp_path, monkeypatch):
    class Fork(HLSS):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.register_buffer("bank_extra", torch.zeros(2, 32))

    monkeypatch.setattr("model.HLSS", Fork)
    hlss = Fork(model().tower, bank())
    hlss.bank_extra += 1
    again, _ = load_run(str(write_run(tmp_path, hlss)))
    assert again.levels == tuple(again.bank) == LEVELS
    assert torch.equal(again.bank_extra, hlss.bank_extra)


def test_the_file_shows_its_stage(capsys):
    main()
    printed = capsys.readouterr().out
    assert "images [16, 3, 64, 64] -> z [16, 64], each of length 1.000" in printed
    assert "slide    t [10, 64], p [16, 10], p = norm(z t^T): True" in printed


def test_a_bank_of_another_clip_is_refused():
    with pytest.raises(ValueError, match="vectors have 48 dimensions and the image tower's 64"):
        HLSS(
            image_tower(small_clip("resnet").state_dict()),
            {level: torch.eye(48) for level in LEVELS},
        )


# ------------------------------------------------------------------------- batch norm of processes

RANDOM = torch.randn(8, 4, 16, 16, generator=torch.Generator().manual_seed(2))
NORMS = {  # batch norms and their inputs, some far from zero, where E[x^2] - E[x]^2 cancels
    "constant": (torch.nn.BatchNorm2d(4), torch.full((8, 4, 16, 16), 20.3)),
    "narrow": (torch.nn.BatchNorm2d(4), 10 + 0.01 * RANDOM),
    "channels last": (torch.nn.BatchNorm2d(4), (10 + RANDOM).to(memory_format=torch.channels_last)),
    "bf16": (torch.nn.BatchNorm2d(4), (10 + RANDOM).bfloat16()),
    "of a head": (torch.nn.BatchNorm1d(4), RANDOM[:, :, 0, 0]),
    "cumulative": (torch.nn.BatchNorm2d(4, momentum=None), RANDOM),
    "not affine": (torch.nn.BatchNorm2d(4, affine=False), RANDOM),
}


def _normed(rank, world):
    found = {}
    for name, (norm, x) in NORMS.items():
        net = torch.nn.Sequential(copy.deepcopy(norm))
        share_batch_norm(net)
        with torch.autocast("cpu", torch.bfloat16):
            y = net(x.chunk(world)[rank])
        found[name] = y.detach(), net.state_dict()
    return found


def test_a_shared_batch_norm_is_that_of_one_process():
    """So are its running averages. For its gradients see test_distributed.py."""
    shares = on_processes(2, _normed)
    for name, (norm, x) in NORMS.items():
        norm = copy.deepcopy(norm)
        expected = norm(x.contiguous())
        torch.testing.assert_close(torch.cat([share[name][0] for share in shares]), expected)
        for _, buffers in [share[name] for share in shares]:
            for key, value in norm.state_dict().items():
                torch.testing.assert_close(buffers[f"0.{key}"], value)
    assert (shares[0]["constant"][0].abs() < 1e-2).all()


# ----------------------------------------------------------------------------- a run's checkpoints


def test_a_run_is_loaded_from_its_folder_or_its_checkpoint(tmp_path):
    hlss = model().eval()
    path = write_run(tmp_path, hlss)
    for source in (tmp_path, path):
        again, checkpoint = load_run(str(source))
        assert checkpoint["step"] == 1
        assert torch.equal(again.encode(IMAGES), hlss.encode(IMAGES))


@pytest.mark.parametrize("damage", ["one bit", "truncated", "empty", "a page"])
def test_a_damaged_checkpoint_is_refused_by_name(damage, tmp_path):
    path = write_run(tmp_path, model())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in a tensor
    damaged = {
        "one bit": content,
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "a page": b"<!DOCTYPE html><html>Not Found</html>",
    }
    path.write_bytes(damaged[damage])
    with pytest.raises(
        ValueError, match=r"step-0000001\.pt is damaged .* \(.+\): use the previous one"
    ):
        load_run(str(path))
    with pytest.raises(ValueError, match=r"no checkpoint in .* is intact: restore one"):
        load_run(str(tmp_path))


def test_what_is_no_run_is_refused(clip_file, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent is neither a run folder nor a checkpoint"):
        load_run(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"clip\.pt holds no train\.py checkpoint"):
        load_run(clip_file)
