"""The demo's CLIP: small, and trained on captioned demo tissue."""

import argparse
import os

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from demo.tissue import FACTORS, render
from describe import Tokenizer
from model import CLIP_MEAN, CLIP_STD, ModifiedResNet, TextTower

# What the captions name: four of the seven factors, low and high. The others (pleomorphism, elongation, fibres) the
# demo's CLIP never hears of, as a real CLIP never heard of much that a pathologist sees.
PHRASES = {
    "cellularity": (
        ("sparse nuclei", "few cells", "low cellularity"),
        ("crowded nuclei", "many cells", "high cellularity"),
    ),
    "nuclear_size": (
        ("small nuclei", "tiny nuclei", "little nuclear area"),
        ("large nuclei", "big nuclei", "swollen nuclei"),
    ),
    "vessels": (
        ("no vessels", "without vessels", "avascular tissue"),
        ("many vessels", "vessel rings", "rich in vessels"),
    ),
    "necrosis": (
        ("no necrosis", "viable tissue", "no dead area"),
        ("necrosis", "dead pale area", "necrotic tissue"),
    ),
}
FRAMES = (
    "{}",
    "a patch with {}",
    "the slide has {}",
    "{} across the field",
    "there is {}",
    "tissue with {}",
    "{} in all slides of the patient",
    "{} everywhere",
    "mostly {}",
    "here we see {} in the tissue",
    "{}, more than usual",
    "the case shows {}",
)


def caption(factors, rng):
    """A sentence or two about the captioned factors that are clearly low or high in this patch."""
    clear = [f for f in PHRASES if abs(factors[FACTORS.index(f)] - 0.5) > 0.15]
    chosen = rng.permutation(clear)[: rng.integers(1, 3)]
    said = [
        rng.choice(FRAMES).format(rng.choice(PHRASES[f][int(factors[FACTORS.index(f)] > 0.5)]))
        for f in chosen
    ]
    return rng.choice((" and ", ", ", ". ")).join(said) or "tissue"


def train_demo_clip(
    path, steps=300, patches=3072, batch=128, seed=0, size=64, width=16, dim=64, lr=2e-3
):
    """Train a small CLIP on generic captioned tissue: random factors, neutral stain, no patients. Writes its state
    dict to `path`."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    factors = rng.random((patches, len(FACTORS)))
    images = np.stack(
        [render(f, rng, size=size) for f in tqdm(factors, desc="captioned tissue", unit="patch")]
    )
    images = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    images = (images - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)
    tokenizer = Tokenizer()
    image = ModifiedResNet((1, 1, 1, 1), width, dim, size).to(memory_format=torch.channels_last)
    text = TextTower(len(tokenizer.vocabulary), 77, 64, 2, dim, "quickgelu")
    scale = torch.nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))
    parameters = [*image.parameters(), *text.parameters(), scale]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    bar = tqdm(range(steps), desc="demo CLIP", unit="step")
    for _ in bar:
        rows = rng.choice(patches, batch, replace=False)
        tokens = tokenizer([caption(factors[r], rng) for r in rows], text.context)
        tokens = tokens[
            :, : int((tokens != 0).sum(dim=1).max())
        ]  # more padding changes nothing and costs time
        x = images[rows]
        x = x.flip(-1) if rng.random() < 0.5 else x
        x = x.rot90(int(rng.integers(4)), (-2, -1)).contiguous(memory_format=torch.channels_last)
        z, t = F.normalize(image(x), dim=1), F.normalize(text(tokens), dim=1)
        logits = scale.exp().clamp(max=100) * z @ t.T
        target = torch.arange(batch)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.2f}")
    state = {f"visual.{name}": value for name, value in image.state_dict().items()}
    state |= text.state_dict() | {"logit_scale": scale.detach()}
    torch.save({"state_dict": state, "activation": "quickgelu"}, path + ".part")
    os.replace(path + ".part", path)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", help="file to write")
    parser.add_argument(
        "--steps", type=int, default=300, help="more steps know more of the captioned factors"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    train_demo_clip(args.out, steps=args.steps, seed=args.seed)


if __name__ == "__main__":
    main()
