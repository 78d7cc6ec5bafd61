"""The demo's CLIP: small, and trained in a minute on captioned demo tissue, into one file."""

import argparse
import os

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from demo.tissue import FACTORS, render
from describe import Tokenizer
from model import CLIP_MEAN, CLIP_STD, ModifiedResNet, TextTower, write_whole

# What the captions name: four of the seven factors, low and high. The others (pleomorphism,
# elongation, fibres) the demo's CLIP never hears of, as a real CLIP never heard of much that a
# pathologist sees.
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
    """A text on one or two of the captioned factors that are clearly low or high; else "tissue".

    factors: of one patch, seven numbers in [0, 1], as FACTORS.
    """
    value = dict(zip(FACTORS, factors))
    clear = [factor for factor in PHRASES if abs(value[factor] - 0.5) > 0.15]
    chosen = rng.permutation(clear)[: rng.integers(1, 3)]
    parts = []
    for factor in chosen:
        low, high = PHRASES[factor]
        frame = rng.choice(FRAMES)
        phrase = rng.choice(high if value[factor] > 0.5 else low)
        parts.append(frame.format(phrase))
    link = rng.choice((" and ", ", ", ". "))
    return link.join(parts) if parts else "tissue"


def train_demo_clip(
    path, steps=300, patches=3072, batch=128, seed=0, size=64, width=16, dim=64, lr=2e-3
):
    """Write the state dict of a small CLIP, trained on tissue of random factors, neutral in stain.

    patches: how many, of size x size pixels; there are no patients. width: channels of the image
    tower's stem. dim: D, of the embedding. The loss is CLIP's (Radford et al. 2021).
    """
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)

    # Data. Captions are made anew in every step.
    factors = rng.random((patches, len(FACTORS)))
    bar = tqdm(factors, desc="captioned tissue", unit="patch")
    images = np.stack([render(f, rng, size=size) for f in bar])  # [patches, S, S, 3] uint8
    images = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    images = (images - torch.tensor(CLIP_MEAN).view(3, 1, 1)) / torch.tensor(CLIP_STD).view(3, 1, 1)

    # Model: two towers and the scale of their similarity.
    tokenizer = Tokenizer()
    image = ModifiedResNet((1, 1, 1, 1), width, dim, size).to(memory_format=torch.channels_last)
    text = TextTower(len(tokenizer.vocabulary), 77, 64, 2, dim, "quickgelu")
    scale = torch.nn.Parameter(torch.tensor(np.log(1 / 0.07), dtype=torch.float32))
    parameters = [*image.parameters(), *text.parameters(), scale]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)

    bar = tqdm(range(steps), desc="demo CLIP", unit="step")
    for _ in bar:
        # Batch: patches, flipped and turned at random as one, and their captions.
        rows = rng.choice(patches, batch, replace=False)
        tokens = tokenizer([caption(factors[row], rng) for row in rows], text.context)
        longest = int((tokens != 0).sum(dim=1).max())  # more padding only costs time
        x = images[rows]
        if rng.random() < 0.5:
            x = x.flip(-1)
        x = x.rot90(int(rng.integers(4)), (-2, -1)).contiguous(memory_format=torch.channels_last)

        # Forward: each patch must find its caption in the batch, and each caption its patch.
        z = F.normalize(image(x), dim=1)  # [batch, D]
        t = F.normalize(text(tokens[:, :longest]), dim=1)  # [batch, D]
        logits = scale.exp().clamp(max=100) * z @ t.T
        target = torch.arange(batch)
        loss = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2

        # Backward and step.
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.2f}")

    state = {f"visual.{name}": value for name, value in image.state_dict().items()}
    state |= text.state_dict() | {"logit_scale": scale.detach()}
    checkpoint = {"state_dict": state, "activation": "quickgelu"}
    write_whole(path, lambda file: torch.save(checkpoint, file))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", help="file to write")
    parser.add_argument("--steps", type=int, default=300, help="more of them teach more factors")
    parser.add_argument("--seed", type=int, default=0, help="of tissue, captions and weights")
    args = parser.parse_args()
    os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
    train_demo_clip(args.out, steps=args.steps, seed=args.seed)


if __name__ == "__main__":
    main()
