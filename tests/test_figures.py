"""The README's pictures are those that docs/figures.py draws, and they show what the code does."""

import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import ROOT

DOCS = Path(ROOT, "docs")
sys.path.insert(0, str(DOCS))
import figures  # noqa: E402


@pytest.mark.parametrize("name", ["method", "study"])
def test_a_picture_is_drawn_as_it_is_kept(name):
    """Except for the pixels of tissue, which processors round differently."""
    without_pixels = re.compile(r"base64,[^\"]*")
    drawn = getattr(figures, name)()
    kept = (DOCS / f"{name}.svg").read_text()
    assert without_pixels.sub("", drawn) == without_pixels.sub("", kept)
    assert "prefers-color-scheme: dark" in kept
    ElementTree.fromstring(kept)
    assert len(kept) < 120_000


def test_the_masks_are_the_positives_of_the_losses():
    ids = np.array([0, 0, 1, 1, 1])
    mask = figures.positives(ids)
    for i in range(5):
        for j in range(5):
            assert mask[i, j] == (i != j and ids[i] == ids[j])


def test_the_batch_has_two_of_each():
    addresses, ids = figures.thumbnails()
    assert len(addresses) == len(set(addresses)) == 16
    assert [len(np.unique(column)) for column in ids.T] == [8, 4, 2]
