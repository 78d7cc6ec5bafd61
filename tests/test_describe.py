"""The bank file, its check, the tokenizer, and the bank's vectors."""

import copy
import json
import os
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

from demo.tissue import FACTORS
from describe import (
    Tokenizer,
    encode_bank,
    main,
    open_bank,
    read_bank_file,
    read_merges,
    save_bank,
    tokenizer_of,
)
from losses import LEVELS
from model import text_tower
from tools.bank import check_bank
from tools.weights import load_clip

DEMO = os.path.join(ROOT, "demo/attributes.json")


def test_the_demo_bank_passes_and_its_truth_is_known():
    bank = read_bank_file(DEMO)
    found, problems = check_bank(bank, attributes=14, tokenizer=Tokenizer())
    assert problems == {}
    assert found[0].endswith("168 sentences")
    assert {t[1:] for t in bank["truth"].values()} == set(FACTORS)
    assert set(bank["truth"]) == {name for level in LEVELS for name in bank["levels"][level]}


def replace_first(sentence):
    return lambda patch, slide: patch["crowded nuclei"].__setitem__(0, sentence)


def frame_everything(patch, slide):
    for sentences in [*patch.values(), *slide.values()]:
        sentences[0] = f"The slide has {sentences[0]}"


FAULTS = {  # what the check must say: what we do to the demo bank
    "14 attributes, not 15": lambda patch, slide: None,
    "patch / crowded nuclei: 3 sentences": lambda patch, slide: patch["crowded nuclei"].pop(),
    "names alike (1.00): patch / crowded nuclei ~ slide / nuclei, crowded": lambda patch, slide: (
        slide.update({"nuclei, crowded": slide.popitem()[1]})
    ),
    "sentences alike (1.00)": lambda patch, slide: patch["sparse nuclei"].__setitem__(
        0, patch["crowded nuclei"][0].upper()
    ),
    "restates its name": replace_first("There are very crowded nuclei here."),
    "restates its name: patch / crowded nuclei: crowded nuclei": replace_first("crowded nuclei"),
    "under 6 words": replace_first("Cells huddle wall to wall."),
    "over 40 words": replace_first("one " * 41),
    "no image shows 'IDH'": replace_first(
        "Densely set tumour cells with an IDH defect throughout."
    ),
    "tokens, over 77": replace_first(
        "Closely assembled neighbouring elements overlap, press together, "
        "and obliterate the intervening background entirely."
    ),
    "not ASCII": replace_first("Cells crowd na\u00efvely against one another here today."),
    "not ASCII: patch / crowded nuclei: H&amp;E": replace_first(
        "H&amp;E shows cells wall to wall."
    ),
    "'the slide has' occurs in": frame_everything,
}


@pytest.mark.parametrize("message", FAULTS)
def test_the_check_finds(message):
    bank = copy.deepcopy(read_bank_file(DEMO))
    FAULTS[message](bank["levels"]["patch"], bank["levels"]["slide"])
    _, problems = check_bank(
        bank, attributes=15 if "not 15" in message else None, tokenizer=Tokenizer()
    )
    assert any(message in problem for problem in problems), problems


@pytest.mark.parametrize("name", ["opensrh", "tcga"])
def test_the_shipped_banks_pass_with_the_tokens_of_clip(name):
    """Counts, duplicates, frames, words for what no image shows, and at most 77 CLIP tokens."""
    open_clip = pytest.importorskip("open_clip")
    vocabulary = os.path.join(os.path.dirname(open_clip.__file__), "bpe_simple_vocab_16e6.txt.gz")
    bank = read_bank_file(os.path.join(ROOT, f"attributes/{name}.json"))
    found, problems = check_bank(bank, 128, Tokenizer(read_merges(vocabulary)), sentences=4)
    assert problems == {}
    assert found[0].endswith("1536 sentences") and re.search(
        r"longest sentence: (2|3)\d tokens of 77", found[-1]
    )


def test_all_that_is_wrong_with_a_text_is_told_in_one_go():
    bank = read_bank_file(DEMO)
    bank["levels"]["patch"]["crowded nuclei"][0] = "IDH na\u00efve"
    _, problems = check_bank(bank)
    place = "patch / crowded nuclei: IDH na\u00efve"
    messages = ("not ASCII", "under 6 words", "restates its name", "no image shows 'IDH'")
    assert list(problems) == [f"{message}: {place}" for message in messages]
    assert all(places == [("patch", "crowded nuclei")] for places in problems.values())


def check(monkeypatch, *arguments):
    """How `describe.py check` exits: 0, or the message that comes with status 1."""
    monkeypatch.setattr(sys, "argv", ["describe.py", "check", *arguments, "--vocab", "bytes"])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_near_duplicates_within_and_across_levels_are_told_with_both_places_and_end_in_an_error(
    tmp_path, monkeypatch, capsys
):
    bank = read_bank_file(DEMO)
    original = bank["levels"]["patch"]["crowded nuclei"][0]
    copies = [("patch", "sparse nuclei"), ("slide", next(iter(bank["levels"]["slide"])))]
    for level, name in copies:
        bank["levels"][level][name][1] = f"Certainly, {original}"
    path = tmp_path / "bank.json"
    path.write_text(json.dumps(bank))
    assert "problems" in check(monkeypatch, str(path))
    said = [line for line in capsys.readouterr().out.splitlines() if "sentences alike" in line]
    for level, name in copies:
        pair = [f"{level} / {name} / Certainly, {original}", f"patch / crowded nuclei / {original}"]
        assert any(all(place in line for place in pair) for line in said), said
    assert check(monkeypatch, DEMO, "--sentences", "4") == 0


def test_an_attribute_that_stands_twice_in_a_file_is_refused(tmp_path):
    path = tmp_path / "bank.json"
    path.write_text(open(DEMO).read().replace('"crowded nuclei":', '"sparse nuclei":', 1))
    with pytest.raises(ValueError, match="'sparse nuclei' appears twice"):
        read_bank_file(str(path))  # JSON would silently drop the first


def test_unstained_tissue_has_no_stain_words():
    bank = read_bank_file(DEMO) | {"tissue": "stimulated Raman histology of nothing"}
    bank["levels"]["patch"]["crowded nuclei"][0] = "Purple dots are piled up until no gap is left."
    assert any("has no 'Purple'" in problem for problem in check_bank(bank)[1])


FORMS = {  # what the error must say: a malformed file
    "is not JSON": b"{",
    "is not JSON: 'utf-8'": b"\xff\xfe{}",
    '"levels"': b"[]",
    '"levels" must hold {level: ': b'{"levels": {}}',
    "patch must be": json.dumps({"levels": {level: {} for level in LEVELS}}).encode(),
    "patch / a": json.dumps({"levels": {level: {"a": "b"} for level in LEVELS}}).encode(),
}


@pytest.mark.parametrize("message", FORMS)
def test_a_bank_of_another_form_is_refused_by_name(message, tmp_path):
    path = tmp_path / "bank.json"
    path.write_bytes(FORMS[message])
    with pytest.raises(ValueError, match=rf"bank\.json.*{message}"):
        read_bank_file(str(path))


# --------------------------------------------------------------------------------- the tokenizer


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


# ----------------------------------------------------------------------------------- the vectors


def test_a_bank_vector_is_the_equation(clip_file, tmp_path):
    bank, state = read_bank_file(DEMO), load_clip(clip_file)
    tower, tokenizer = text_tower(state), tokenizer_of(state)
    vectors = encode_bank(bank, tower, tokenizer, batch=50)
    for level in LEVELS:
        assert vectors[level].shape == (14, 64)
        for row, sentences in zip(vectors[level], bank["levels"][level].values()):
            each = [F.normalize(tower(tokenizer([s], tower.context))[0], dim=0) for s in sentences]
            torch.testing.assert_close(row, F.normalize(sum(each) / 4, dim=0), atol=1e-5, rtol=0)


def test_a_bank_pt_is_what_was_saved_and_needs_no_clip(tmp_path):
    bank, path = read_bank_file(DEMO), str(tmp_path / "bank.pt")
    vectors = {level: F.normalize(torch.randn(14, 8), dim=1) for level in LEVELS}
    save_bank(path, bank, vectors)
    attributes, again = open_bank(path, state={})
    assert attributes["patch"][:2] == ["sparse nuclei", "crowded nuclei"]
    assert all(torch.equal(again[level], vectors[level]) for level in LEVELS)
    assert os.listdir(tmp_path) == ["bank.pt"]


def test_a_rotated_bank_has_the_same_angles_and_other_vectors(
    clip_file, tmp_path, monkeypatch, capsys
):
    """It keeps how the words relate to each other and loses what they say about an image."""
    banks = []
    for rotate in ([], ["--rotate", "0"], ["--rotate", "0"], ["--rotate", "1"]):
        path = str(tmp_path / "bank.pt")
        command = ["describe.py", "encode", DEMO, "--clip", clip_file, "--out", path, *rotate]
        monkeypatch.setattr(sys, "argv", command)
        main()
        attributes, vectors = open_bank(path, {})
        assert list(vectors) == list(LEVELS)
        assert ("a rotated control" in capsys.readouterr().out) == bool(rotate)
        banks.append(torch.cat(list(vectors.values())))
    plain, rotated, again, other = banks
    torch.testing.assert_close(rotated @ rotated.T, plain @ plain.T, rtol=0, atol=1e-5)  # angles
    assert torch.equal(rotated, again)
    for different in (plain, other):
        assert ((rotated - different).norm(dim=1) > 0.5).all()


def test_a_bank_file_is_encoded_with_the_clip(clip_file):
    state = load_clip(clip_file)
    attributes, vectors = open_bank(DEMO, state)
    expected = encode_bank(read_bank_file(DEMO), text_tower(state), Tokenizer(state["merges"]))
    for level in LEVELS:
        assert len(attributes[level]) == 14
        assert torch.equal(vectors[level], expected[level])


def test_one_flipped_byte_in_a_bank_pt_is_found(tmp_path):
    path = tmp_path / "bank.pt"
    vectors = {level: torch.arange(2000.0).view(2, 1000) for level in LEVELS}
    save_bank(path, {"levels": {level: {"a": [], "b": []} for level in LEVELS}}, vectors)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # in a tensor, which torch.load does not check
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"bank\.pt is damaged.* encode the bank again"):
        open_bank(str(path), {})


@pytest.mark.parametrize("content", ["nothing", "half", "text", "another dict", "a list"])
def test_another_file_than_a_bank_pt_is_refused_by_name(content, tmp_path):
    path = tmp_path / "other.pt"
    save_bank(path, read_bank_file(DEMO), {level: torch.eye(14) for level in LEVELS})
    if content == "nothing":
        path.unlink()
    elif content == "half":
        path.write_bytes(path.read_bytes()[:1000])
    elif content == "text":
        path.write_text("sparse nuclei")
    else:
        torch.save({"a": 1} if content == "another dict" else ["a"], path)
    with pytest.raises(ValueError, match=r"other\.pt is .*: encode the bank again"):
        open_bank(str(path), state={})


def test_a_bank_is_encoded_in_batches_no_longer_than_their_longest_sentence():
    """This bounds memory and saves most of the time: sentences fill some 20 of 77 tokens."""
    shapes = []

    class Tower:
        context = 77

        def __call__(self, tokens):
            shapes.append(tuple(tokens.shape))
            end = len(Tokenizer().vocabulary) - 1
            assert (tokens == end).any(dim=1).all(), "an end token was cut off"
            return torch.nn.functional.one_hot(tokens[:, 1], 514).float()

    bank = {
        "levels": {
            level: {"a": ["b" * 10, "c" * 20], "d": ["e", "f" + "!" * 29]} for level in LEVELS
        }
    }
    encode_bank(bank, Tower(), Tokenizer(), batch=4)
    assert shapes == [(4, 32)] * 3
