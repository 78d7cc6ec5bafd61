"""CLIP's tokens match open_clip's, and a real CLIP goes through the same steps as the demo's."""

import json
import os
import random
import string
import subprocess
import sys

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from test_model import small_clip

import describe
import train
from describe import Tokenizer, encode_bank, open_bank, read_bank_file, read_merges, save_bank
from losses import LEVELS
from model import load_run, text_tower
from tools.bank import is_plain
from tools.weights import load_clip

BANKS = ["demo/attributes.json", "attributes/opensrh.json", "attributes/tcga.json"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(read_merges())


def assert_same_tokens(tokenizer, texts):
    ours = tokenizer(texts, 77)
    theirs = open_clip.tokenizer.SimpleTokenizer()(texts)
    for text, a, b in zip(texts, ours, theirs):
        assert a.tolist() == b.tolist(), text


@pytest.mark.parametrize("path", BANKS)
def test_a_bank_has_the_tokens_of_open_clip(tokenizer, path):
    texts = []
    for attributes in read_bank_file(os.path.join(ROOT, path))["levels"].values():
        for name, sentences in attributes.items():
            texts += [name, *sentences]
    assert_same_tokens(tokenizer, texts)


# Text that CLIP's cleaning or its regular expression treats specially.
PIECES = (
    ["'s", "'LL", "don't", "we've", "0.5", "1,000", "H&E", "...", "!!!", "--", "x-ray", "(a/b)"]
    + ["<start_of_text>", "<End_Of_Text>", "&", "&amp ", "&lt ", "&#65 ", "&c;", "AT&T;"]
    + ["\t", "\n", "  "]
)


def test_any_ascii_has_the_tokens_of_open_clip(tokenizer):
    rng = random.Random(0)
    printable = string.printable[:95]
    texts = ["".join(rng.choices(printable, k=rng.randint(1, 120))) for _ in range(2000)]
    for _ in range(500):
        pieces = [rng.choice([rng.choice(PIECES), rng.choice(printable)]) for _ in range(20)]
        texts.append("".join(pieces))
    texts += ["", " ", "word " * 200, "!" * 500, "a" * 300, "<end_of_text>" * 90]
    assert_same_tokens(tokenizer, [text for text in texts if is_plain(text)])


@pytest.mark.parametrize(
    "text",
    ["5 \u00b5m", "na\u00efve", "\u212a", "a\u00a0b", "it\u2019s"]
    + ["H&amp;E", "&LT;b>", "&#38;amp", "&#x26;", "&APOS;s", "&eacute;", "&#650"]
    + ["a\x07b", "\x1b[31mred", "a\x1cb", "\x7f"],
)
def test_what_cleaning_would_change_is_refused(tokenizer, text):
    with pytest.raises(ValueError, match="only ASCII without HTML entities can be tokenized, not "):
        tokenizer.encode(text)


def test_another_vocabulary_is_refused(tmp_path):
    (tmp_path / "vocab.gz").write_bytes(b"other")
    with pytest.raises(
        ValueError, match=r"vocab\.gz is not https://github.com/openai/CLIP/.*: delete it"
    ):
        read_merges(str(tmp_path / "vocab.gz"))
    with pytest.raises(FileNotFoundError, match=r"absent\.gz"):
        read_merges(str(tmp_path / "absent.gz"))


def test_the_vocabulary_is_downloaded_where_open_clip_is_absent(tmp_path, monkeypatch):
    url = f"file://{tmp_path}/absent/bpe_simple_vocab_16e6.txt.gz"
    hub = tmp_path / "cache/hub/checkpoints"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(describe, "VOCABULARY", url)
    message = rf"file.*vocab_16e6\.txt\.gz failed .* save the file as {hub}/bpe_simple"
    with pytest.raises(ConnectionError, match=message):
        read_merges()


# -------------------------------------------------------- a real CLIP on the road from text to run


def bank_of(*sentences):
    """A bank with one attribute per sentence, the same at each level."""
    attributes = {f"attribute {i}": [sentence] for i, sentence in enumerate(sentences)}
    return {"name": "a few", "levels": {level: attributes for level in LEVELS}}


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_a_bank_is_what_open_clip_makes_of_its_sentences(kind, tokenizer):
    clip = small_clip(kind)
    bank = bank_of("Crowded nuclei! Everywhere!", "pale")
    vectors = encode_bank(bank, text_tower(clip.state_dict()), tokenizer)
    theirs = clip.encode_text(open_clip.tokenizer.tokenize(["Crowded nuclei! Everywhere!", "pale"]))
    torch.testing.assert_close(vectors["slide"], F.normalize(theirs, dim=1), atol=1e-5, rtol=0)


@pytest.fixture
def road(tmp_path):
    """A folder with clip.pt, bank.json and bank.pt; and the bank's vectors."""
    clip = {"state_dict": small_clip("resnet").state_dict(), "activation": "quickgelu"}
    bank = bank_of("crowded nuclei", "sparse nuclei, few of them")
    torch.save(clip, tmp_path / "clip.pt")
    (tmp_path / "bank.json").write_text(json.dumps(bank))
    _, vectors = open_bank(str(tmp_path / "bank.json"), load_clip(str(tmp_path / "clip.pt")))
    save_bank(tmp_path / "bank.pt", bank, vectors)
    return tmp_path, vectors


def test_describe_encodes_a_bank_with_a_real_clip(road):
    folder, vectors = road
    command = [sys.executable, "describe.py", "encode", str(folder / "bank.json")]
    command += ["--clip", str(folder / "clip.pt"), "--out", str(folder / "encoded.pt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    expected = "quickgelu: patch (2, 64), slide (2, 64), patient (2, 64)"
    assert expected in done.stdout, done.stderr
    attributes, again = open_bank(str(folder / "encoded.pt"), {})
    assert attributes == open_bank(str(folder / "bank.pt"), {})[0]
    for level in LEVELS:
        torch.testing.assert_close(again[level], vectors[level], atol=1e-6, rtol=0)


@pytest.mark.parametrize("backbone", ["", "resnet18"])
def test_train_starts_from_a_real_clip_or_a_backbone(backbone, road, flags):
    """From a CLIP and a bank's sentences, or from a backbone and a bank's vectors."""
    folder, vectors = road
    bank = "bank.pt" if backbone else "bank.json"
    flags += ["--clip", str(folder / "clip.pt"), "--bank", str(folder / bank)]
    flags += ["--backbone", backbone, "--steps", "2", "--image-size", "32"]
    config = train.parse_config(flags)
    assert train.train(config)
    hlss, checkpoint = load_run(config.out)
    assert (checkpoint["image_size"], checkpoint["clip"]["activation"]) == (32, "quickgelu")
    for level in LEVELS:
        assert torch.equal(hlss.bank[level], vectors[level])

    # No text tower is kept, and the optimizer has two moments per weight of the model.
    assert not any("token" in name or "text" in name for name in checkpoint["model"])
    moments = 0
    for state in checkpoint["optimizer"]["state"].values():
        moments += sum(value.numel() for value in state.values() if value.dim())
    assert moments == 2 * sum(parameter.numel() for parameter in hlss.parameters())
