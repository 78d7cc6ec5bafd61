"""The bank's check, the tokenizer, and the bank as vectors."""

import copy
import json
import os
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from demo.clip import caption
from describe import Tokenizer, check_bank, encode_bank, main, read_bank, read_merges, save_bank
from losses import LEVELS
from model import text_tower
from tools.weights import load_clip

DEMO = os.path.join(ROOT, "demo/attributes.json")


def test_the_demo_bank_passes_and_its_truth_is_known():
    from demo.tissue import FACTORS

    bank = read_bank(DEMO)
    found, problems = check_bank(bank, attributes=14, tokenizer=Tokenizer())
    assert problems == {}
    assert found[0].endswith("168 sentences")
    assert {t[1:] for t in bank["truth"].values()} == set(FACTORS)
    assert set(bank["truth"]) == {name for level in LEVELS for name in bank["levels"][level]}


def replace_first(sentence):
    return lambda patch, slide: patch["crowded nuclei"].__setitem__(0, sentence)


FAULTS = {  # what the check must say <- what is done to the demo bank
    "14 attributes, not 15": lambda patch, slide: None,
    "patch / crowded nuclei: 3 sentences": lambda patch, slide: patch["crowded nuclei"].pop(),
    "names alike (1.00): patch / crowded nuclei ~ slide / nuclei, crowded": lambda patch, slide: (
        slide.update({"nuclei, crowded": slide.popitem()[1]})
    ),
    "sentences alike (1.00)": lambda patch, slide: patch["sparse nuclei"].__setitem__(
        0, patch["crowded nuclei"][0].upper()
    ),
    "restates its name": replace_first("There are very crowded nuclei here."),
    "under 6 words": replace_first("Cells huddle wall to wall."),
    "no image shows 'IDH'": replace_first(
        "Densely set tumour cells with an IDH defect throughout."
    ),
    "tokens, at most 77": replace_first(
        "Closely assembled neighbouring elements overlap, press together, "
        "and obliterate the intervening background entirely."
    ),
    "not ASCII": replace_first("Cells crowd na\u00efvely against one another here today."),
    "'the slide has' stands in": lambda patch, slide: [
        sentences.__setitem__(0, f"The slide has {sentences[0]}")
        for sentences in [*patch.values(), *slide.values()]
    ],
}


@pytest.mark.parametrize("message", FAULTS)
def test_the_check_finds(message):
    bank = copy.deepcopy(read_bank(DEMO))
    FAULTS[message](bank["levels"]["patch"], bank["levels"]["slide"])
    _, problems = check_bank(
        bank, attributes=15 if "not 15" in message else None, tokenizer=Tokenizer()
    )
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize("name", ["opensrh", "tcga"])
def test_the_shipped_banks_pass_with_the_tokens_of_clip(name):
    """Counts, duplicates, frames, invisible things, and at most 77 tokens by CLIP's own vocabulary."""
    open_clip = pytest.importorskip("open_clip")
    vocabulary = os.path.join(os.path.dirname(open_clip.__file__), "bpe_simple_vocab_16e6.txt.gz")
    bank = read_bank(os.path.join(ROOT, f"attributes/{name}.json"))
    found, problems = check_bank(bank, 128, Tokenizer(read_merges(vocabulary)), sentences=4)
    assert problems == {}
    assert found[0].endswith("1536 sentences") and re.search(
        r"longest sentence: (2|3)\d tokens of 77", found[-1]
    )


def test_near_duplicates_within_and_across_levels_are_told_with_both_places_and_end_in_an_error(
    tmp_path, monkeypatch, capsys
):
    bank, path = read_bank(DEMO), tmp_path / "bank.json"
    original = bank["levels"]["patch"]["crowded nuclei"][0]
    for level, name in (("patch", "sparse nuclei"), ("slide", next(iter(bank["levels"]["slide"])))):
        bank["levels"][level][name][1] = f"Certainly, {original}"
    path.write_text(json.dumps(bank))
    monkeypatch.setattr(sys, "argv", ["describe.py", "check", str(path), "--vocab", "bytes"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert "problems" in ended.value.code  # a message: the exit status is 1
    said = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("sentences alike")
    ]
    for level, name in (("patch", "sparse nuclei"), ("slide", next(iter(bank["levels"]["slide"])))):
        assert any(
            f"{level} / {name} / Certainly, {original}" in line
            and f"patch / crowded nuclei / {original}" in line
            for line in said
        ), said
    monkeypatch.setattr(
        sys, "argv", ["describe.py", "check", DEMO, "--vocab", "bytes", "--sentences", "4"]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0


def test_an_attribute_that_stands_twice_in_a_file_is_refused(tmp_path):
    path = tmp_path / "bank.json"
    path.write_text(open(DEMO).read().replace('"crowded nuclei":', '"sparse nuclei":', 1))
    with pytest.raises(
        ValueError, match="'sparse nuclei' stands twice"
    ):  # JSON would drop the first without a word
        read_bank(str(path))


def test_unstained_tissue_has_no_stain_words():
    bank = read_bank(DEMO) | {"tissue": "stimulated Raman histology of nothing"}
    bank["levels"]["patch"]["crowded nuclei"][0] = "Purple dots are piled up until no gap is left."
    assert any("has no 'Purple'" in problem for problem in check_bank(bank)[1])


def test_a_bank_of_another_form_is_refused_by_name(tmp_path):
    for content, message in (
        ("{", "is not JSON"),
        ("[]", '"levels"'),
        ('{"levels": {"patch": {}}}', '"levels"'),
        (json.dumps({"levels": {level: {} for level in LEVELS}}), "patch must be"),
        (json.dumps({"levels": {level: {"a": "b"} for level in LEVELS}}), "patch / a"),
    ):
        path = tmp_path / "bank.json"
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read_bank(str(path))


# ----------------------------------------------------------------------------------------------------------- tokenizer


def test_without_merges_every_letter_is_a_token():
    tokenizer = Tokenizer()
    assert len(tokenizer.vocabulary) == 514
    ids = tokenizer.encode("ab a")
    assert ids == [tokenizer.vocabulary[s] for s in ("a", "b</w>", "a</w>")]


def test_merges_apply_in_their_order():
    tokenizer = Tokenizer([("l", "o"), ("lo", "w</w>"), ("e", "r</w>")])
    symbols = {i: s for s, i in tokenizer.vocabulary.items()}
    ids = tokenizer.encode("Low  lower\nLO'S")
    assert [symbols[i] for i in ids] == ["low</w>", "lo", "w", "er</w>", "l", "o</w>", "'", "s</w>"]


def test_long_text_is_cut_and_keeps_its_end():
    tokenizer = Tokenizer()
    tokens = tokenizer(["a" * 100, "b"], context=10)
    start, end = tokenizer.vocabulary["<start_of_text>"], tokenizer.vocabulary["<end_of_text>"]
    assert tokens[0].tolist() == [start, *[tokenizer.vocabulary["a"]] * 8, end]
    assert tokens[1].tolist() == [start, tokenizer.vocabulary["b</w>"], end, 0, 0, 0, 0, 0, 0, 0]


def test_other_than_ascii_is_refused():
    with pytest.raises(ValueError, match="only ASCII"):
        Tokenizer().encode("5 \u00b5m")


# ------------------------------------------------------------------------------------------------------------- vectors


def test_a_bank_vector_is_the_equation(clip_file, tmp_path):
    bank, tower = read_bank(DEMO), text_tower(load_clip(clip_file))
    vectors = encode_bank(bank, tower, Tokenizer(), batch=50)
    for level in LEVELS:
        assert vectors[level].shape == (14, 64)
        for row, sentences in zip(vectors[level], bank["levels"][level].values()):
            each = [
                F.normalize(tower(Tokenizer()([s], tower.context))[0], dim=0) for s in sentences
            ]
            torch.testing.assert_close(row, F.normalize(sum(each) / 4, dim=0), atol=1e-5, rtol=0)
    save_bank(str(tmp_path / "bank.pt"), bank, vectors)
    saved = torch.load(tmp_path / "bank.pt", weights_only=True)
    assert saved["attributes"]["patch"][:2] == ["sparse nuclei", "crowded nuclei"]
    assert torch.equal(saved["vectors"]["slide"], vectors["slide"])


def test_a_bank_is_encoded_in_batches_no_longer_than_their_longest_sentence():
    """Which is what bounds the memory, and most of the time: sentences have some 20 tokens of the context's 77."""
    shapes = []

    class Tower:
        context = 77

        def __call__(self, tokens):
            shapes.append(tuple(tokens.shape))
            assert (tokens == len(Tokenizer().vocabulary) - 1).any(dim=1).all(), (
                "an end token was cut off"
            )
            return torch.nn.functional.one_hot(tokens[:, 1], 514).float()

    bank = {
        "levels": {
            level: {"a": ["b" * 10, "c" * 20], "d": ["e", "f" + "!" * 29]} for level in LEVELS
        }
    }
    encode_bank(bank, Tower(), Tokenizer(), batch=4)
    assert shapes == [(4, 32)] * 3


def test_captions_name_only_what_is_clear():
    import numpy as np

    rng = np.random.default_rng(0)
    said = {caption([0.9, 0.5, 0.9, 0.9, 0.5, 0.5, 0.9], rng) for _ in range(50)}
    assert all(
        any(p in s for p in ("crowded nuclei", "many cells", "high cellularity")) for s in said
    )
    assert caption([0.5] * 7, rng) == "tissue"
