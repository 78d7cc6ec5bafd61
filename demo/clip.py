"""The demo's CLIP, a small one: trained in a minute or two on captioned demo tissue.

captions.json has phrases for low and high values of each factor, frames to put them in, and
fillers. The bank's sentences use the same words but are new to it, as with real CLIPs.
"""

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from demo.tissue import FACTORS, STAIN_SPREAD, render
from describe import WORD, Tokenizer, join_pair
from model import CLIP_MEAN, CLIP_STD, ModifiedResNet, TextTower
from tools.runs import write_whole

GRAMMAR = json.loads(Path(__file__).with_name("captions.json").read_text("utf-8"))
CLEAR = 0.15  # a factor is low or high if it is this far from 0.5


def learn_merges(texts):
    """Byte pairs to merge, in order, until each word is one token (Sennrich et al. 2016)."""
    counts = Counter(word for text in texts for word in WORD.findall(text.lower()))
    words = {(*word[:-1], f"{word[-1]}</w>"): count for word, count in counts.items()}
    merges = []
    while True:
        pairs = Counter()
        for symbols, count in words.items():
            for pair in pairwise(symbols):
                pairs[pair] += count
        if not pairs:
            return merges
        merges.append(max(pairs, key=pairs.get))
        words = {tuple(join_pair(symbols, merges[-1])): count for symbols, count in words.items()}


def caption(signs, rng):
    """A caption of one or two clear factors, or just "tissue"; and what it says, [7].

    signs: a patch's, [7]: -1 low, 1 high, 0 not clear. Factors not mentioned are 0 in the result.
    """
    clear = np.flatnonzero(signs).tolist()
    said = np.zeros_like(signs)
    parts = []
    for f in rng.sample(clear, min(len(clear), rng.randint(1, 2))):
        said[f] = signs[f]
        phrases = GRAMMAR["phrases"][FACTORS[f]]
        low, high = rng.choice(phrases["low"]), rng.choice(phrases["high"])
        frame = rng.choice(GRAMMAR["frames"])
        parts.append(frame.format(high, low) if signs[f] > 0 else frame.format(low, high))
    words = rng.choice((" and ", ", ", ". ")).join(parts).split() or ["tissue"]
    for filler in rng.sample(GRAMMAR["fillers"], rng.randint(0, 2)):
        words.insert(rng.randint(0, len(words)), filler)
    return " ".join(words), said


def train_demo_clip(
    path, steps=400, patches=3072, batch=128, seed=0, factors=FACTORS, size=64, width=16, dim=64
):
    """Trains a small CLIP on patches with random factors and stain, and saves it.

    The loss is UniCL's (Yang et al. 2022): CLIP's, but a caption matches every patch that it is
    true of. factors: what captions mention. size: pixels. width: of the image tower's stem.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    words = random.Random(seed)

    # Data. Captions are drawn anew in every step.
    values = rng.random((patches, len(FACTORS)))
    signs = np.sign(values - 0.5) * (np.abs(values - 0.5) > CLEAR)
    signs *= np.isin(FACTORS, factors)
    images = []
    for row in tqdm(values, desc="captioned tissue", unit="patch"):
        images.append(render(row, rng, rng.normal((1, 1, 0), STAIN_SPREAD), size))
    images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    images = (images - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)

    # Model: two towers and the scale of their similarity.
    phrases = [
        text for pole in GRAMMAR["phrases"].values() for side in pole.values() for text in side
    ]
    merges = learn_merges([*phrases, *GRAMMAR["frames"], *GRAMMAR["fillers"], "tissue and"])
    tokenizer = Tokenizer(merges)
    image = ModifiedResNet((1, 1, 1, 1), width, dim, size).to(memory_format=torch.channels_last)
    text = TextTower(len(tokenizer.vocabulary), 77, 64, 2, 1, dim, "quickgelu")
    scale = torch.nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))
    parameters = [*image.parameters(), *text.parameters(), scale]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps, pct_start=0.1)

    bar = tqdm(range(steps), desc="demo CLIP", unit="step")
    for _ in bar:
        # Batch: patches, all flipped and rotated the same way, and two captions of each.
        rows = rng.choice(patches, batch, replace=False)
        texts, said = zip(*[caption(signs[row], words) for row in [*rows, *rows]])
        tokens = tokenizer(texts, text.context)
        length = (tokens != 0).sum(dim=1)
        x = images[rows].flip(-1) if rng.random() < 0.5 else images[rows]
        x = x.rot90(int(rng.integers(4)), (-2, -1)).contiguous(memory_format=torch.channels_last)

        # Forward: a patch must find the captions that are true of it, and a caption its patches.
        z = F.normalize(image(x), dim=1)  # [batch, D]
        t = torch.empty(len(texts), dim)  # [2 batch, D]
        for part in length.argsort().chunk(8):  # of similar length, since padding costs time
            t[part] = text(tokens[part, : length[part].max()])
        t = F.normalize(t, dim=1)
        logits = scale.exp().clamp(max=100) * z @ t.T
        said = np.stack(said)  # [2 batch, 7]
        agree = signs[rows] @ said.T  # on how many factors the caption is right about a patch
        true = torch.from_numpy(agree == np.abs(said).sum(axis=1)).float()  # [patches, captions]
        loss = F.cross_entropy(logits, true / true.sum(dim=1, keepdim=True))
        loss = loss / 2 + F.cross_entropy(logits.T, (true / true.sum(dim=0)).T) / 2

        # Backward and step.
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.2f}")

    state = image.state_dict(prefix="visual.") | text.state_dict()
    state["logit_scale"] = scale.detach()
    checkpoint = {"state_dict": state, "activation": "quickgelu", "merges": merges}
    write_whole(path, lambda file: torch.save(checkpoint, file))
