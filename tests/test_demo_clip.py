"""The demo's CLIP: its words, captions, training and file."""

import json
import os
import random
import re
import sys
from collections import Counter
from itertools import pairwise, product

import numpy as np
import pytest
import torch
from conftest import ROOT

import describe
from demo import clip
from demo.clip import GRAMMAR, caption, learn_merges, train_demo_clip
from demo.prepare import TOLD
from demo.tissue import FACTORS
from describe import WORD, Tokenizer, encode_bank, open_bank, read_bank_file, tokenizer_of
from model import image_tower, text_tower
from tools.weights import load_clip

DEMO = os.path.join(ROOT, "demo/attributes.json")
JOINERS = (" and ", ", ", ". ")
POLES = list(product(FACTORS, (-1, 1)))


def statements(factor, sign):
    """Everything a caption can say about a low (-1) or high (1) factor, without fillers."""
    phrases = GRAMMAR["phrases"][factor]
    mine, others = phrases["high"], phrases["low"]
    if sign < 0:
        mine, others = others, mine
    return {frame.format(a, b) for frame in GRAMMAR["frames"] for a in mine for b in others}


def words_of(text):
    return re.findall("[a-z]+", text.lower())


def runs(text, n):
    """Every run of n consecutive words of a text."""
    words = words_of(text)
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def bank_sentences():
    levels = read_bank_file(DEMO)["levels"].values()
    return [
        text for attributes in levels for sentences in attributes.values() for text in sentences
    ]


# --------------------------------------------------------------------------------- words as tokens


def naive_merges(texts):
    """learn_merges done naively: the tokenizer splits all words again after every merge."""
    counts = Counter(word for text in texts for word in WORD.findall(text.lower()))
    merges = []
    while True:
        tokenizer = Tokenizer(merges)
        pairs = Counter()
        for word, count in counts.items():
            for pair in pairwise(tokenizer.split(word)):
                pairs[pair] += count
        if not pairs:
            return merges
        merges.append(max(pairs, key=pairs.get))


def test_merges_make_each_word_one_token():
    texts = [*GRAMMAR["phrases"]["fibres"]["high"], *GRAMMAR["fillers"], "banana", "aaaa", "it's"]
    merges = learn_merges(texts)
    tokenizer = Tokenizer(merges)
    for word in WORD.findall(" ".join(texts)):
        assert tokenizer.split(word) == [f"{word}</w>"]
    assert len(tokenizer.vocabulary) == 514 + len(merges)  # no two pairs merge into the same symbol


def test_merges_are_those_of_splitting_all_words_anew():
    texts = [*GRAMMAR["phrases"]["vessels"]["high"], "banana bandana", "aaaa aaa", "Lumen lumens"]
    assert learn_merges(texts) == naive_merges(texts)


def test_the_most_frequent_pair_is_first():
    assert learn_merges(["ab ab ab", "cd cd"]) == [("a", "b</w>"), ("c", "d</w>")]
    assert learn_merges(["a b"]) == []  # a single letter is already a token


# ------------------------------------------------------------------------------------ the captions


def test_captions_have_all_words_of_the_bank_and_of_the_classes():
    """The words of the bank's sentences: the names of its attributes are never encoded."""
    known = set(words_of(json.dumps(GRAMMAR)))
    with open(os.path.join(ROOT, "demo/classes.json"), encoding="utf-8") as file:
        prompts = json.load(file).values()
    for text in [*bank_sentences(), *map(" ".join, prompts)]:
        assert set(words_of(text)) <= known, text


def test_no_caption_holds_a_sentence_of_the_bank():
    """No statement contains all but two words of a bank sentence in a row."""
    said = [text for pole in POLES for text in statements(*pole)]
    held = {n: set().union(*(runs(text, n) for text in said)) for n in range(5, 14)}
    for sentence in bank_sentences():
        n = len(words_of(sentence)) - 2
        assert not runs(sentence, n) & held[n], sentence


def test_no_statement_can_mean_two_things():
    said = [text for pole in POLES for text in statements(*pole)]
    assert len(said) == len(set(said))


@pytest.fixture
def no_fillers(monkeypatch):
    monkeypatch.setitem(GRAMMAR, "fillers", ["", ""])


def joined(text, first, second):
    """Whether a text is a statement from first, a joiner, and a statement from second."""
    for joiner in JOINERS:
        for one in first:
            if text.startswith(one + joiner) and text.removeprefix(one + joiner) in second:
                return True
    return False


def test_a_caption_says_what_it_says_that_it_says(no_fillers):
    """One statement for each factor it claims to describe, and nothing else."""
    rng = np.random.default_rng(0)
    words = random.Random(0)
    meaning = {pole: statements(*pole) for pole in POLES}
    counts = Counter()
    for _ in range(500):
        signs = rng.integers(-1, 2, 7)
        text, said = caption(signs, words)
        text = " ".join(text.split())
        named = np.flatnonzero(said)
        counts[len(named)] += 1
        assert np.array_equal(said[named], signs[named])
        parts = [meaning[FACTORS[f], said[f]] for f in named]
        if len(parts) == 2:
            assert joined(text, *parts) or joined(text, *parts[::-1]), text
        else:
            assert text in (parts[0] if parts else {"tissue"})
    assert set(counts) <= {0, 1, 2}
    assert min(counts[1], counts[2]) > 100


def test_what_is_not_clear_is_not_said():
    words = random.Random(0)
    for _ in range(50):
        text, said = caption(np.zeros(7), words)
        assert not said.any()
        assert "tissue" in text.split()
        assert set(text.split()) <= {"tissue", *GRAMMAR["fillers"]}


def test_fillers_add_at_most_two_words():
    lengths = {len(caption(np.zeros(7), random.Random(seed))[0].split()) for seed in range(50)}
    assert lengths == {1, 2, 3}


# -------------------------------------------------------------------------- training, and its file


def test_the_file_is_a_clip_of_two_towers_in_one_space(clip_file):
    state = load_clip(clip_file)
    assert state["activation"] == "quickgelu"
    tokens = tokenizer_of(state)(["crowded nuclei"], 77)
    assert (tokens != 0).sum() == 4  # start token, two words, end token
    with torch.no_grad():
        z = image_tower(state)(torch.rand(2, 3, 64, 64))
        t = text_tower(state)(tokens)
    assert z.shape == (2, 64) and t.shape == (1, 64)


def test_the_file_brings_its_own_words(clip_file):
    """It uses the tokenizer it was trained with, whatever --vocab names."""
    phrases = [
        text for pole in GRAMMAR["phrases"].values() for texts in pole.values() for text in texts
    ]
    merges = learn_merges([*phrases, *GRAMMAR["frames"], *GRAMMAR["fillers"], "tissue and"])
    state = load_clip(clip_file)
    assert state["merges"] == merges
    assert tokenizer_of(state, vocab="bytes").vocabulary == Tokenizer(merges).vocabulary
    tokenizer = tokenizer_of(state)
    for sentence in bank_sentences():
        words = words_of(sentence)
        assert tokenizer.encode(" ".join(words)) == [
            tokenizer.vocabulary[f"{w}</w>"] for w in words
        ]


def test_a_tokenizer_of_another_size_is_refused(clip_file):
    state = load_clip(clip_file)
    tokens = len(state["token_embedding.weight"])
    state["merges"] = state["merges"][:-1]
    with pytest.raises(ValueError, match=f"has {tokens} tokens, its tokenizer {tokens - 1}"):
        tokenizer_of(state)


def test_a_bank_is_encoded_with_the_words_of_the_file(clip_file, tmp_path, monkeypatch, capsys):
    out = str(tmp_path / "bank.pt")
    monkeypatch.setattr(
        sys, "argv", ["describe.py", "encode", DEMO, "--clip", clip_file, "--out", out]
    )
    describe.main()
    state = load_clip(clip_file)
    expected = encode_bank(read_bank_file(DEMO), text_tower(state), Tokenizer(state["merges"]))
    _, vectors = open_bank(out, {})
    for level, t in expected.items():
        torch.testing.assert_close(vectors[level], t, atol=1e-6, rtol=0)
    assert "quickgelu: patch (14, 64), slide (14, 64), patient (14, 64)" in capsys.readouterr().out


def test_training_moves_both_towers_and_is_repeatable(tmp_path, clip_file):
    """The same seed gives the same weights; one more step gives others."""
    states = {}
    for name, steps in (("again", 4), ("more", 5)):
        path = str(tmp_path / f"{name}.pt")
        train_demo_clip(path, steps=steps, patches=32, batch=8)
        states[name] = load_clip(path)
    first = load_clip(clip_file)
    for weight in ("visual.conv1.weight", "token_embedding.weight", "logit_scale"):
        assert torch.allclose(states["again"][weight], first[weight], atol=1e-4)
        assert not torch.equal(states["more"][weight], states["again"][weight])
    assert sorted(os.listdir(tmp_path)) == ["again.pt", "more.pt"]


@pytest.mark.parametrize("factors", [FACTORS, TOLD])
def test_captions_tell_of_the_factors_asked_for_alone(factors, tmp_path, monkeypatch):
    told = []

    def listen(signs, rng):
        text, said = caption(signs, rng)
        told.append(said)
        return text, said

    monkeypatch.setattr(clip, "caption", listen)
    train_demo_clip(str(tmp_path / "clip.pt"), steps=3, patches=32, batch=32, factors=factors)
    assert np.array_equal(np.any(told, axis=0), np.isin(FACTORS, factors))
