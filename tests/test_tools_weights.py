"""CLIPs by name or file: every layout gives open_clip's tensors, damaged and foreign files are
refused by name, and unknown programs are never run."""

import copy
import hashlib
import json
import os
import pickle
import re
import subprocess
import sys
import warnings
import zipfile

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from safetensors.torch import save_file
from test_model import assert_same_embeddings, images_of, randomise, size_of, small_clip
from transformers import CLIPConfig, CLIPModel

from losses import LEVELS
from model import HLSS, image_tower, text_tower
from tools import weights
from tools.weights import CLIPS, find_clip, load_clip

quiet = pytest.mark.filterwarnings(
    "ignore:.torch.jit",
    "ignore::DeprecationWarning",
    "ignore::torch.jit.TracerWarning",
)


@pytest.fixture(params=["resnet", "vit"])
def clip(request):
    return small_clip(request.param)


def sha256_of(path):
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


# ------------------------------------------------------------------------------------ the layouts


def save_torchscript(clip, path):
    """OpenAI's layout: the traced model in half precision, its sizes as integer buffers."""
    clip = copy.deepcopy(clip)
    for name, size in (("input_resolution", 64), ("context_length", 77), ("vocab_size", 49408)):
        clip.__dict__.pop(name, None)
        clip.register_buffer(name, torch.tensor(size))
    inputs = images_of(size_of(clip), 1), torch.ones(1, 77, dtype=torch.long)
    traced = torch.jit.trace(clip, inputs, check_trace=False)
    for value in [*traced.parameters(), *traced.buffers()]:
        value.data = value.data.half() if value.is_floating_point() else value.data
    torch.jit.save(traced, path)


def save_training(clip, path):
    """An open_clip checkpoint from training on several processes."""
    state = {f"module.{name}": value for name, value in clip.state_dict().items()}
    optimizer = torch.optim.AdamW(clip.parameters()).state_dict()
    torch.save({"epoch": 3, "name": "a", "optimizer": optimizer, "state_dict": state}, path)


def save_state(clip, path):
    torch.save(clip.state_dict(), path)


def save_half(clip, path):
    torch.save({name: value.half() for name, value in clip.state_dict().items()}, path)


def save_old(clip, path):
    torch.save(clip.state_dict(), path, _use_new_zipfile_serialization=False)


def save_safetensors(clip, path):
    save_file(clip.state_dict(), path, {"format": "pt"})


def save_deflated(clip, path):
    """As if another program had unpacked the file and packed it again."""
    save_state(clip, path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


FORMATS = {
    "torchscript": save_torchscript,
    "training": save_training,
    "state": save_state,
    "half": save_half,
    "old": save_old,
    "safetensors": save_safetensors,
    "deflated": save_deflated,
}


def publish(path, monkeypatch, activation="quickgelu"):
    """Registers the file as one that is known by name."""
    entry = ("https://example.org/ours.pt", sha256_of(path), activation)
    monkeypatch.setitem(CLIPS, "ours", entry)


def assert_same_tensors(clip, state):
    for name, value in clip.state_dict().items():
        assert torch.equal(state[name], value), name
        assert state[name].dtype in (torch.float32, torch.int64)


@pytest.mark.parametrize("form", FORMATS)
@quiet
def test_every_format_gives_the_tensors_of_open_clip(form, clip, tmp_path, monkeypatch):
    path = str(tmp_path / "clip.any")  # the content decides the format, not the name
    FORMATS[form](clip, path)
    publish(path, monkeypatch)
    state = load_clip(path)
    assert_same_tensors(clip, state)
    assert_same_embeddings(clip, state)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["RN50", "ViT-B-32"])
@pytest.mark.parametrize("form", FORMATS)
@quiet
def test_every_format_gives_the_tensors_of_a_full_clip(form, name, tmp_path, monkeypatch):
    torch.manual_seed(0)
    clip = randomise(open_clip.create_model(name, force_quick_gelu=True))
    path = tmp_path / "clip.any"
    FORMATS[form](clip, str(path))
    publish(path, monkeypatch)
    assert_same_tensors(clip, load_clip(str(path)))
    path.unlink()


def test_our_own_checkpoint_starts_another_run(clip, tmp_path):
    state = clip.state_dict() | {"activation": "quickgelu"}
    bank = {level: F.normalize(torch.randn(3, 64), dim=1) for level in LEVELS}
    hlss = HLSS(image_tower(state), bank).eval()
    config = {"objective": "hlss", "backbone": ""}
    kept = {"activation": "quickgelu"}
    path = str(tmp_path / "step-0000001.pt")
    torch.save({"model": hlss.state_dict(), "config": config, "clip": kept}, path)
    again = load_clip(path)
    images = torch.rand(2, 3, 64, 64)
    assert torch.equal(image_tower(again).eval()(images), hlss.tower(images))
    with pytest.raises(ValueError, match=r"no text tower: give --bank a bank\.pt"):
        text_tower(again)


# ------------------------------------------------------------------- Hugging Face's layout


HUGGING_FACE = {  # transformers' names of the two activations
    "quick_gelu": "quickgelu",
    "gelu": "gelu",
}


def hugging_face_clip(activation, heads=(1, 2)):
    """A small random CLIPModel of transformers, like PLIP. heads: of the text and image tower.
    Images are 64 pixels wide, texts have 16 tokens, and token 99 ends a text."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "hidden_act": activation}
    text = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": heads[0]}
    text |= {"vocab_size": 100, "max_position_embeddings": 16}
    text |= {"bos_token_id": 98, "eos_token_id": 99, "pad_token_id": 0}
    vision = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": heads[1]}
    vision |= {"image_size": 64, "patch_size": 16}
    config = CLIPConfig(text_config=text | sizes, vision_config=vision | sizes, projection_dim=32)
    clip = CLIPModel(config).eval()
    for parameter in clip.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)  # no bias is 0, no norm is 1
    return clip


def save_bin(clip, path):
    """As pytorch_model.bin, which until 2023 also held the position numbers."""
    state = clip.state_dict()
    for part, length in (("text", 16), ("vision", 17)):
        state[f"{part}_model.embeddings.position_ids"] = torch.arange(length)[None]
    torch.save(state, path)


TEXTS = torch.tensor([[98, 5, 7, 99, 0, 0], [98, 1, 2, 3, 4, 99]])


@pytest.mark.parametrize("activation", HUGGING_FACE)
@pytest.mark.parametrize("save", [save_bin, save_safetensors])
def test_a_clip_of_hugging_face_is_the_same_in_embeddings_and_gradients(save, activation, tmp_path):
    theirs = hugging_face_clip(activation)
    save(theirs, tmp_path / "model.any")
    state = load_clip(str(tmp_path / "model.any"), HUGGING_FACE[activation])
    images = torch.randn(3, 3, 64, 64)
    image = image_tower(state)
    text = text_tower(state).requires_grad_(True)

    # Embeddings: theirs come normalised.
    out = theirs(pixel_values=images, input_ids=TEXTS)
    z = F.normalize(image(images), dim=1)
    t = F.normalize(text(TEXTS), dim=1)
    torch.testing.assert_close(z, out.image_embeds, atol=1e-4, rtol=0)
    torch.testing.assert_close(t, out.text_embeds, atol=1e-4, rtol=0)
    assert state["logit_scale"] == theirs.logit_scale
    other = "gelu" if activation == "quick_gelu" else "quickgelu"
    wrong = F.normalize(image_tower(state | {"activation": other})(images), dim=1)
    assert (wrong - z).abs().max() > 1e-3  # wrong, without an error

    # Gradients of a loss that weights each dimension differently.
    weight = torch.arange(32.0)
    (z @ weight).square().sum().add((t @ weight).square().sum()).backward()
    loss = (out.image_embeds @ weight).square().sum() + (out.text_embeds @ weight).square().sum()
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    del gradients["logit_scale"]
    expected = weights._from_hugging_face(gradients)
    ours = {f"visual.{name}": parameter.grad for name, parameter in image.named_parameters()}
    ours |= {name: parameter.grad for name, parameter in text.named_parameters()}
    assert ours.keys() == expected.keys()
    for name, gradient in ours.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < 1e-4, name


def test_config_json_tells_the_heads_and_the_activation(tmp_path):
    """8 and 4 heads with 16 channels each; assuming 64 channels would be silently wrong."""
    theirs = hugging_face_clip("gelu", heads=(4, 8))
    save_file(theirs.state_dict(), tmp_path / "model.safetensors")
    theirs.config.to_json_file(tmp_path / "config.json")
    state = load_clip(str(tmp_path / "model.safetensors"))  # without --activation
    assert (state["heads"], state["activation"]) == ({"visual": 8, "text": 4}, "gelu")
    images = torch.randn(3, 3, 64, 64)
    out = theirs(pixel_values=images, input_ids=TEXTS)
    z = F.normalize(image_tower(state)(images), dim=1)
    t = F.normalize(text_tower(state)(TEXTS), dim=1)
    torch.testing.assert_close(z, out.image_embeds, atol=1e-4, rtol=0)
    torch.testing.assert_close(t, out.text_embeds, atol=1e-4, rtol=0)
    del state["heads"]
    assert (F.normalize(image_tower(state)(images), dim=1) - z).abs().max() > 1e-3


def test_a_part_of_a_clip_of_hugging_face_is_refused(tmp_path):
    path = str(tmp_path / "vision.safetensors")
    vision = hugging_face_clip("gelu").vision_model
    save_file({f"vision_model.{name}": value for name, value in vision.state_dict().items()}, path)
    with pytest.raises(ValueError, match=r"vision\.safetensors is not a CLIP in OpenAI's layout"):
        load_clip(path, "gelu")


# ------------------------------------------------------------------------------ the activation


def test_the_activation_is_asked_for(tmp_path):
    """QuiltNet-B-32, PLIP and OpenAI's ViT-B/32 have the same shapes."""
    path = str(tmp_path / "clip.pt")
    save_state(small_clip("vit"), path)
    message = r"clip\.pt names no activation, .*give --activation quickgelu .* or gelu"
    with pytest.raises(ValueError, match=message):
        load_clip(path)
    assert load_clip(path, "gelu")["activation"] == "gelu"
    named = str(tmp_path / "RN50.pt")  # the name of a file tells nothing
    os.rename(path, named)
    with pytest.raises(ValueError, match="names no activation"):
        load_clip(named)


@pytest.mark.parametrize("activation", ["quickgelu", "gelu"])
@pytest.mark.parametrize("length", [64, 8])
def test_a_known_file_under_another_name_is_recognised(activation, length, tmp_path, monkeypatch):
    path = str(tmp_path / "renamed.pt")
    save_state(small_clip("vit"), path)
    entry = ("https://example.org/ours.pt", sha256_of(path)[:length], activation)
    monkeypatch.setitem(CLIPS, "ours", entry)
    assert load_clip(path)["activation"] == activation
    other = "gelu" if activation == "quickgelu" else "quickgelu"
    message = rf"--activation {other}: .*renamed\.pt was trained with {activation}"
    with pytest.warns(UserWarning, match=message):
        assert load_clip(path, other)["activation"] == other


# --------------------------------------------------------------------------- what would run code


class Evil:
    """Unpickling this creates a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def evil_pickle(ran, path):
    path.write_bytes(pickle.dumps({"visual.conv1.weight": Evil(ran)}, 2))


def evil_old(ran, path):
    torch.save({"state_dict": Evil(ran)}, path, _use_new_zipfile_serialization=False)


def evil_zip(ran, path):
    torch.save({"visual.conv1.weight": torch.zeros(1), "optimizer": [Evil(ran)]}, path)


@pytest.mark.parametrize("write", [evil_pickle, evil_old, evil_zip])
def test_a_pickle_that_would_run_code_is_refused_and_does_not(write, tmp_path):
    ran = tmp_path / "ran"
    path = tmp_path / "clip.pt"
    write(str(ran), path)
    message = r"clip\.pt is not a tensors-only checkpoint: it asks for posix\.mkdir, which was"
    with pytest.raises(ValueError, match=message):
        load_clip(str(path))
    assert not ran.exists()
    if write is evil_pickle:  # the trap works
        pickle.loads(path.read_bytes())
        assert ran.exists()


def torchscript_around(data, path):
    """A pickle inside an archive with TorchScript's layout."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", data)
        archive.writestr("a/constants.pkl", b"")


def evil_data(ran, path):
    torchscript_around(pickle.dumps(Evil(ran), 2), path)


def evil_nested_data(ran, path):
    module = b"\x80\x02c__torch__\nM\n)\x81}X\x01\x00\x00\x00a"
    torchscript_around(module + pickle.dumps(Evil(ran), 2)[2:-1] + b"sb.", path)


class EvilModule(torch.nn.Module):
    """A module that writes a file when torch.jit.load restores it."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    @torch.jit.export
    def __getstate__(self):
        return self.path, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]):
        self.path = state[0]
        self.training = state[1]
        torch.save(torch.zeros(1), self.path)

    def forward(self, x):
        return x


def evil_code(ran, path):
    torch.jit.save(torch.jit.script(EvilModule(ran)), path)


@pytest.mark.parametrize("write", [evil_data, evil_nested_data, evil_code])
@quiet
def test_an_unknown_torchscript_archive_is_refused_and_not_run(write, tmp_path):
    ran = tmp_path / "ran"
    path = tmp_path / "clip.pt"
    write(str(ran), path)
    with pytest.raises(ValueError, match=r"clip\.pt .*: it is a TorchScript program"):
        load_clip(str(path))
    assert not ran.exists()
    if write is evil_code:  # the trap works
        torch.jit.load(path)
        assert ran.exists()


@quiet
def test_a_beginning_of_a_checksum_does_not_make_an_archive_known(tmp_path, monkeypatch):
    path = str(tmp_path / "clip.pt")
    save_torchscript(small_clip("resnet"), path)
    entry = ("https://example.org/ours.pt", sha256_of(path)[:8], "quickgelu")
    monkeypatch.setitem(CLIPS, "ours", entry)
    with pytest.raises(ValueError, match="not OpenAI's"):
        load_clip(path)


@quiet
def test_the_refusal_of_an_archive_says_how_to_export_one_that_is_trusted(clip, tmp_path):
    save_torchscript(clip, tmp_path / "unknown.pt")
    with pytest.raises(ValueError, match="is a TorchScript program and not OpenAI") as error:
        load_clip(str(tmp_path / "unknown.pt"))
    command = re.search(r'python (-c ".*")', str(error.value))[1]
    subprocess.run(f"{sys.executable} {command}", shell=True, check=True, cwd=tmp_path)
    assert_same_embeddings(clip, load_clip(str(tmp_path / "clip.pt"), "quickgelu"))


def test_an_archive_of_openai_is_opened_without_a_warning(tmp_path, monkeypatch):
    path = str(tmp_path / "clip.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_torchscript(small_clip("resnet"), path)
    publish(path, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert load_clip(path)["activation"] == "quickgelu"


# ------------------------------------------------------------------------ damaged and foreign files


@pytest.mark.parametrize("form", FORMATS)
@quiet
def test_a_truncated_file_is_refused(form, tmp_path):
    path = tmp_path / "clip.pt"
    FORMATS[form](small_clip("resnet"), str(path))
    content = path.read_bytes()
    for kept in (0, 8, 1000, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:kept])
        with pytest.raises(ValueError, match=r"clip\.pt is not a tensors-only checkpoint: \w+"):
            load_clip(str(path))


@pytest.mark.parametrize("form", ["training", "state", "half", "deflated"])
def test_one_flipped_bit_is_refused_by_name(form, tmp_path):
    path = tmp_path / "clip.pt"
    FORMATS[form](small_clip("resnet"), str(path))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in a tensor: torch.load alone would take it
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"clip\.pt is not a .*(wrong checksum of|damaged\?)"):
        load_clip(str(path))


def safetensors(header, data=b""):
    header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


def two_tensors(**second):
    """16 bytes of data and two tensors: a has the first eight bytes, `second` describes b."""
    first = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    second = first | {"data_offsets": [8, 16]} | second
    return safetensors({"visual.b": second, "visual.a": first}, b"0123456789abcdef")


def test_the_two_tensors_of_the_tests_below_are_fine_as_they_are(tmp_path):
    (tmp_path / "clip.pt").write_bytes(two_tensors())
    state = load_clip(str(tmp_path / "clip.pt"), "gelu")
    assert state["visual.b"].numpy().tobytes() == b"89abcdef"
    (tmp_path / "clip.pt").write_bytes(two_tensors(shape=[0], data_offsets=[8, 8]))
    assert load_clip(str(tmp_path / "clip.pt"), "gelu")["visual.b"].shape == (0,)


BROKEN = {
    "double precision": (two_tensors(dtype="F64", shape=[1]), r"damaged\? KeyError"),
    "an unknown type": (two_tensors(dtype="Q4"), r"damaged\? KeyError"),
    "an overlap": (two_tensors(data_offsets=[4, 12]), "visual.b overlaps another tensor"),
    "the same bytes": (two_tensors(data_offsets=[0, 8]), r"visual\.[ab] overlaps another tensor"),
    "behind the end": (two_tensors(data_offsets=[16, 24]), "visual.b .* lies outside the file"),
    "over the end": (two_tensors(data_offsets=[12, 20]), "visual.b .* lies outside the file"),
    "before the start": (two_tensors(data_offsets=[-8, 0]), "visual.b .* lies outside the file"),
    "backwards": (two_tensors(data_offsets=[16, 8]), r"damaged\? RuntimeError"),
    "another shape": (two_tensors(shape=[3]), r"damaged\? RuntimeError"),
    "a header without end": ((2**62).to_bytes(8, "little") + b"{" + b" " * 20, ""),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_safetensors_are_refused_by_name(name, tmp_path):
    content, message = BROKEN[name]
    (tmp_path / "clip.pt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"clip\.pt is not a tensors-only checkpoint: {message}"):
        load_clip(str(tmp_path / "clip.pt"))


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
FOREIGN = {
    "a page": b"<!DOCTYPE html><html>Not Found</html>",
    "a list": pickle.dumps([1, 2, 3], 2),
    "a dict of no tensors": pickle.dumps({"visual.conv1.weight": 1}, 2),
    "another network": safetensors({"features.0.weight": ENTRY}, b"12345678"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_foreign_file_is_refused_by_name(name, tmp_path):
    (tmp_path / "clip.pt").write_bytes(FOREIGN[name])
    with pytest.raises(ValueError, match=r"clip\.pt is not a "):
        load_clip(str(tmp_path / "clip.pt"))


NO_CLIP = {  # names in such a file; the refusal says the last
    "UNI": ["cls_token", "pos_embed", "blocks.0.attn.qkv.weight"],
    "CONCH": ["text.cls_emb", "visual.trunk.cls_token"],
    "BiomedCLIP": ["visual.conv1.weight", "text.transformer.embeddings.word_embeddings.weight"],
    "SigLIP": ["vision_model.embeddings.patch_embedding.weight"],
    "ResNet": ["conv1.weight"],
}


@pytest.mark.parametrize("name", NO_CLIP)
def test_what_is_no_clip_is_refused_in_one_line_that_says_why(name, tmp_path):
    torch.save({tensor: torch.zeros(2) for tensor in NO_CLIP[name]}, tmp_path / "model.bin")
    said = rf"model\.bin is not a CLIP in OpenAI's layout: it has {NO_CLIP[name][-1]}"
    with pytest.raises(ValueError, match=said) as error:
        load_clip(str(tmp_path / "model.bin"), "gelu")
    assert "\n" not in str(error.value)


def test_what_is_neither_a_file_nor_a_name_is_refused(tmp_path):
    message = "--clip RN51: neither a file nor one of RN50, RN101, .*RN50-cc12m"
    with pytest.raises(FileNotFoundError, match=message):
        load_clip("RN51")
    with pytest.raises(FileNotFoundError, match="neither a file"):
        load_clip(str(tmp_path))


# -------------------------------------------------------------------------------------- downloads


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty download cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path / "cache/hub/checkpoints"


def test_a_named_clip_is_downloaded_once_and_verified(hub, tmp_path, clip_file, monkeypatch):
    with open(clip_file, "rb") as file:
        content = file.read()
    served = tmp_path / "RN50.pt"
    served.write_bytes(content)
    monkeypatch.setitem(CLIPS, "RN50", (f"file://{served}", sha256_of(served), "quickgelu"))
    state = load_clip("RN50")
    served.unlink()
    again = load_clip("RN50")  # from the cache
    values = {name: state.pop(name) for name in ("activation", "merges")}
    assert values == {name: again.pop(name) for name in values}
    assert all(torch.equal(state[name], again[name]) for name in state)
    assert values["activation"] == "quickgelu"
    (hub / "RN50.pt").write_bytes(content[:-1] + b"?")
    with pytest.raises(ValueError, match=r"hub/checkpoints/RN50\.pt is not file.*: delete it"):
        load_clip("RN50")


def test_a_clip_whose_publisher_gives_no_checksum_is_checked_for_its_layout(
    hub, tmp_path, monkeypatch
):
    served = tmp_path / "pytorch_model.bin"  # a common name, so the cache uses the CLIP's
    save_bin(hugging_face_clip("gelu"), served)
    monkeypatch.setitem(CLIPS, "PathGen-CLIP", (f"file://{served}", "", "gelu"))
    assert load_clip("PathGen-CLIP")["activation"] == "gelu"
    assert os.listdir(hub) == ["PathGen-CLIP.pt"]
    assert load_clip(find_clip("PathGen-CLIP"))["activation"] == "gelu"  # as train.py asks for it
    (hub / "PathGen-CLIP.pt").write_text("<!DOCTYPE html><html>Sign in</html>")
    with pytest.raises(ValueError, match=r"PathGen-CLIP\.pt is not a .*: delete it and download"):
        load_clip("PathGen-CLIP")


@pytest.mark.parametrize("served", [None, b"something else"])
def test_a_download_that_fails_says_what_to_do(served, hub, tmp_path, monkeypatch):
    url = f"file://{tmp_path}/RN50.pt"
    if served:
        (tmp_path / "RN50.pt").write_bytes(served)
    monkeypatch.setitem(CLIPS, "RN50", (url, "0" * 64, "quickgelu"))
    message = f"{url} failed .*: save the file as {hub}/RN50.pt"
    with pytest.raises(ConnectionError, match=message):
        load_clip("RN50")
    assert os.listdir(hub) == []


def test_the_clips_known_by_name():
    """The addresses of OpenAI and open_clip hold the checksum; Hugging Face's name a revision,
    whose file never changes."""
    for name, (url, sha256, activation) in CLIPS.items():
        assert activation == ("gelu" if name in ("QuiltNet-B-32", "PathGen-CLIP") else "quickgelu")
        assert re.fullmatch("([0-9a-f]{64})?|f000538c", sha256)
        if "huggingface.co" in url:
            assert re.search("/resolve/[0-9a-f]{40}/", url)
        elif name != "PathGen-CLIP":
            assert sha256 and sha256 in url
            start = name.split("-cc")[0].replace("/", "-").lower()
            assert os.path.basename(url).lower().startswith(start)


def test_no_two_named_clips_share_a_file_of_the_cache(monkeypatch):
    monkeypatch.setattr(weights, "published", lambda url, sha256, cached: cached)
    files = {find_clip(name) for name in CLIPS}
    assert len(files) == len(CLIPS)
    assert {"ViT-B-32.pt", "QuiltNet-B-32.pt", "PLIP.pt"} <= set(map(os.path.basename, files))


# ----------------------------------------------------------------------------------------- memory

START = """
import re, sys
import torch
import train
from describe import open_bank
from model import HLSS, image_tower
from tools.weights import CLIPS, load_clip

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])

path, bank, sha256 = sys.argv[1:]
CLIPS["ours"] = ("https://example.org/ours.pt", sha256, "quickgelu")
before = peak()
state = load_clip(path, "quickgelu")
_, vectors = open_bank(bank, state)
hlss = HLSS(image_tower(state, 64), vectors)
hlss = hlss.to(memory_format=torch.channels_last)
del state
optimizer = torch.optim.AdamW(hlss.parameters())
hlss(torch.rand(2, 3, 64, 64))[0][:, 0].sum().backward()
optimizer.step()
needed = 4 * 4 * sum(p.numel() for p in hlss.parameters())  # weights, gradients, two moments
print((peak() - before) / needed)
"""


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
@quiet
def test_training_starts_in_the_memory_of_the_image_tower(form, tmp_path):
    """RN50 needs less than 1.5 x (weights, gradients and Adam's state) beyond the imports, although
    it loads the text tower too."""
    path = tmp_path / "RN50.any"
    FORMATS[form](randomise(open_clip.create_model("RN50", force_quick_gelu=True)), str(path))
    command = [sys.executable, "-c", START, str(path), "demo/attributes.json", sha256_of(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    print(form, done.stdout)
    assert float(done.stdout) < 1.5
    path.unlink()


def test_a_flat_checkpoint_keeps_its_words(clip_file, tmp_path):
    """Its tensors, activation and merges are on one level, without a "state_dict"."""
    checkpoint = torch.load(clip_file, weights_only=True)
    torch.save(checkpoint.pop("state_dict") | checkpoint, tmp_path / "flat.pt")
    assert load_clip(str(tmp_path / "flat.pt"))["merges"] == checkpoint["merges"]
