"""The demo's CLIP: small, and trained in a minute or two on captioned demo tissue, into one file.

captions.json holds the language: for each factor phrases for low and for high values,
frames that phrases stand in, and fillers. These are words of the demo's bank. Its sentences are
not, so that the CLIP must read sentences that it never saw, as a real one does.
"""

import argparse
import json
import os
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
from tools.processes import user_errors
from tools.runs import write_whole

GRAMMAR = json.loads(Path(__file__).with_name("captions.json").read_text("utf-8"))
CLEAR = 0.15  # a factor is low or high if it is this far from 0.5


def learn_merges(texts):
    """Byte pairs to merge until each word of the texts is one token (Sennrich et al. 2016): a list
    of pairs for `Tokenizer`, the most frequent first."""
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
    """A caption of one or two factors that are clearly low or high, or "tissue"; and its meaning.

    signs: [7], of one patch: -1 where a factor is low, 1 where it is high, 0 where it is not told.
    What it says is the same, but 0 for the factors that it does not name. rng: random.Random.
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
    """Write a small CLIP: {"state_dict", "activation", "merges"}, trained on single patches of
    tissue of random factors and stain.

    factors: those that captions tell of. size: pixels of a patch. width: channels of the image
    tower's stem. dim: D, of the embedding. The loss is that of Yang et al. 2022 (UniCL): CLIP's,
    where each caption belongs to all patches that it is true of, and not to one alone.
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    words = random.Random(seed)

    # Data. Captions are made anew in every step.
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
        # Batch: patches, flipped and turned at random as one, and two captions of each.
        rows = rng.choice(patches, batch, replace=False)
        texts, said = zip(*[caption(signs[row], words) for row in [*rows, *rows]])
        tokens = tokenizer(texts, text.context)
        length = (tokens != 0).sum(dim=1)
        x = images[rows]
        if rng.random() < 0.5:
            x = x.flip(-1)
        x = x.rot90(int(rng.integers(4)), (-2, -1)).contiguous(memory_format=torch.channels_last)

        # Forward: each patch must find the captions that are true of it, and each caption those.
        z = F.normalize(image(x), dim=1)  # [batch, D]
        t = torch.empty(len(texts), dim)  # [2 batch, D]
        for part in length.argsort().chunk(8):  # of like length: padding only costs time
            t[part] = text(tokens[part, : length[part].max()])
        t = F.normalize(t, dim=1)
        logits = scale.exp().clamp(max=100) * z @ t.T
        said = np.stack(said)  # [2 batch, 7]
        agree = signs[rows] @ said.T  # in how many factors a patch is as the caption says
        true = torch.from_numpy(agree == np.abs(said).sum(axis=1)).float()  # [patches, captions]
        loss = F.cross_entropy(logits, true / true.sum(dim=1, keepdim=True))
        loss = loss / 2 + F.cross_entropy(logits.T, (true / true.sum(dim=0)).T) / 2

        # Backward and step.
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.2f}")

    state = {f"visual.{name}": value for name, value in image.state_dict().items()}
    state |= text.state_dict() | {"logit_scale": scale.detach()}
    checkpoint = {"state_dict": state, "activation": "quickgelu", "merges": merges}
    write_whole(path, lambda file: torch.save(checkpoint, file))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("out", help="file to write")
    flag("--steps", type=int, default=400, help="more of them teach more")
    flag("--seed", type=int, default=0, help="of tissue, captions and weights")
    told = "what captions tell of; the others the CLIP never hears of"
    flag("--factors", nargs="+", choices=FACTORS, default=FACTORS, help=told)
    args = parser.parse_args()
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    train_demo_clip(args.out, steps=args.steps, seed=args.seed, factors=args.factors)


if __name__ == "__main__":
    with user_errors():
        main()
