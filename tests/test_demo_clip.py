"""The demo's CLIP: its captions, its training, its file."""

import os
import sys

import numpy as np
import torch

from demo.clip import FRAMES, PHRASES, caption, main, train_demo_clip
from demo.tissue import FACTORS
from model import image_tower, text_tower
from tools.weights import load_clip


def test_captions_name_only_what_is_clear():
    rng = np.random.default_rng(0)
    factors = dict.fromkeys(FACTORS, 0.5) | {"cellularity": 0.9, "necrosis": 0.1}
    said = " ".join(caption(list(factors.values()), rng) for _ in range(200))
    for phrase in [*PHRASES["cellularity"][1], *PHRASES["necrosis"][0]]:
        assert phrase in said
    for phrase in ["few cells", "dead pale area", *PHRASES["vessels"][1]]:
        assert phrase not in said
    assert caption([0.5] * 7, rng) == "tissue"


def test_captions_have_one_or_two_parts():
    rng = np.random.default_rng(0)
    clear = [0.9] * 7
    phrases = [phrase for _, high in PHRASES.values() for phrase in high]
    counts = set()
    for _ in range(200):
        text = caption(clear, rng)
        counts.add(sum(text.count(phrase) for phrase in phrases))
    assert counts == {1, 2}
    assert all(frame.count("{}") == 1 for frame in FRAMES)


def test_the_file_is_a_clip_of_two_towers_in_one_space(clip_file):
    state = load_clip(clip_file)
    assert state["activation"] == "quickgelu"
    with torch.no_grad():
        z = image_tower(state)(torch.rand(2, 3, 64, 64))
        t = text_tower(state)(torch.tensor([[512, 65, 513]]))
    assert z.shape == (2, 64) and t.shape == (1, 64)


def test_training_moves_both_towers_and_is_repeatable(tmp_path, clip_file):
    """A seed gives the same weights; a step more gives others."""
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


def test_the_command_writes_into_a_new_folder(tmp_path, monkeypatch):
    asked = {}
    monkeypatch.setattr("demo.clip.train_demo_clip", lambda path, **options: asked.update(options))
    out = tmp_path / "new" / "clip.pt"
    monkeypatch.setattr(sys, "argv", ["clip.py", str(out), "--steps", "2", "--seed", "7"])
    main()
    assert asked == {"steps": 2, "seed": 7}
    assert out.parent.is_dir()
