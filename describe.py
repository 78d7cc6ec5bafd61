"""The language: a bank of sentences, its check, CLIP's tokenizer, the bank as vectors, and a small CLIP for the demo.

    python describe.py check attributes/demo.json              measure what a program can about a bank, fail with the
    offending lines python describe.py encode attributes/demo.json --clip runs/demo/clip.pt --out bank.pt
    python describe.py demo runs/demo/clip.pt                  train the demo's CLIP on captioned demo tissue (about a
    minute)

A bank file is JSON: {"name", "tissue", "levels": {"patch": {attribute: [sentences]}, "slide": {...}, "patient":
{...}}}, and optionally "truth": {attribute: "+factor" or "-factor"} where the factors behind the images are known.
"""

import argparse
import gzip
import html
import itertools
import json
import os
import re
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import FACTORS, render
from losses import LEVELS
from model import CLIP_MEAN, CLIP_STD, ModifiedResNet, TextTower, load_state, text_tower

START, END = "<start_of_text>", "<end_of_text>"


# ------------------------------------------------------------------------------------------------------------ the bank


def read_bank(path):
    """A bank file -> its dict. Raises ValueError naming the file and what is wrong with its form; `check` measures its
    content."""
    try:
        with open(path, encoding="utf-8") as file:
            bank = json.load(file)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    levels = bank.get("levels") if isinstance(bank, dict) else None
    if not isinstance(levels, dict) or set(levels) != set(LEVELS):
        raise ValueError(f"{path}: \"levels\" must hold {', '.join(LEVELS)} and nothing else")
    for level, attributes in levels.items():
        if not isinstance(attributes, dict) or not attributes:
            raise ValueError(f"{path}: the level {level} must be {{attribute: [sentences]}} and not empty")
        for name, sentences in attributes.items():
            if not isinstance(sentences, list) or not sentences or not all(isinstance(s, str) for s in sentences):
                raise ValueError(f"{path}: {level} / {name}: must be a list of sentences")
    return bank


STOP_WORDS = frozenset(re.findall(r"\w+", """a an the of and or in on with to is are at by from as that this its it be
    their than while for into over through each where which no not but have has within across between around"""))
INVISIBLE = re.compile(
    r"\b(ph|acidity|(mi(cro-?)?)?rnas?|dna|gen(e|es|etic\w*|om\w*)|muta\w*|wild-?type|methyl\w*|idh\w*|egfr|tert|1p/?19q|"
    r"codelet\w*|ki-?67|mib-?1|p53|gfap|\w*kines?|interleukins?|receptors?|hormon\w*|enzym\w*|antibod\w*|"
    r"immuno(histo|stain)\w*|serum|oxygen\w*|hypoxi\w*|metaboli\w*|glucose|signal+ing|pathway|expression|biomarkers?|"
    r"prognos\w*|survival|outcome|recurren\w*|therap\w*|treat\w*|symptom\w*|headaches?|seizures?|age|sex|male|female|"
    r"smok\w*|mri|radiolog\w*|enhanc\w*|temperature|electr\w*)\b", re.I)
STAIN_WORDS = re.compile(r"\b(pink\w*|purple\w*|blue\w*|violet|magenta|red(dish)?|\w*eosin\w*|\w*sophil\w*|"
                         r"ha?ematoxylin\w*|h(yper|ypo)chroma\w*|stain\w*|h&e|colou?r\w*)\b", re.I)


def _words(text):
    return re.findall(r"[a-z0-9]+", text.lower())


def _content(text):
    return frozenset(_words(text)) - STOP_WORDS


def _alike(texts, threshold):
    """Pairs of texts whose content words overlap (Jaccard) by at least the threshold: [(i, j, overlap)]."""
    sets = [_content(text) for text in texts]
    column = {word: i for i, word in enumerate(sorted(set().union(*sets)))}
    present = np.zeros((len(sets), len(column)), np.float32)
    for row, words in enumerate(sets):
        present[row, [column[w] for w in words]] = 1
    shared, size = present @ present.T, present.sum(axis=1)
    overlap = shared / np.maximum(size[:, None] + size - shared, 1)
    return [(i, j, overlap[i, j]) for i, j in zip(*np.nonzero(np.triu(overlap >= threshold, 1)))]


def check_bank(bank, attributes=None, tokenizer=None, context=77):
    """Everything about a bank that a program can measure. Returns (lines of findings, lines of problems); no problems:
    it passes.

    attributes: how many each level must have. tokenizer: to count tokens; a sentence must fit the context with its
    start and end.
    """
    named = [(level, name) for level in LEVELS for name in bank["levels"][level]]
    said = [(level, name, s) for level, name in named for s in bank["levels"][level][name]]
    number = Counter(len(bank["levels"][level][name]) for level, name in named).most_common(1)[0][0]
    problems = []
    for level in LEVELS:
        if attributes and len(bank["levels"][level]) != attributes:
            problems.append(f"{level}: {len(bank['levels'][level])} attributes, not {attributes}")
    for level, name in named:
        if len(bank["levels"][level][name]) != number:
            problems.append(f"{level} / {name}: {len(bank['levels'][level][name])} sentences, most have {number}")
    for i, j, overlap in _alike([name for _, name in named], 0.75):
        problems.append(f"names alike ({overlap:.2f}): {' / '.join(named[i])} ~ {' / '.join(named[j])}")
    for i, j, overlap in _alike([s for *_, s in said], 0.6):
        problems.append(f"sentences alike ({overlap:.2f}): {' / '.join(said[i])} ~ {' / '.join(said[j])}")
    longest = 0
    for level, name, sentence in said:
        where = f"{level} / {name}: {sentence}"
        if not sentence.isascii():
            problems.append(f"not ASCII: {where}")
        elif tokenizer:
            length = len(tokenizer.encode(sentence)) + 2
            longest = max(longest, length)
            if length > context:
                problems.append(f"{length} tokens, at most {context}: {where}")
        if len(_words(sentence)) < 6:
            problems.append(f"under 6 words: {where}")
        if len(_content(sentence) - _content(name)) < 4:
            problems.append(f"restates its name: {where}")
        if unseen := INVISIBLE.search(f"{name}. {sentence}"):
            problems.append(f"no image shows {unseen.group()!r}: {where}")
        if "raman" in bank.get("tissue", "").lower() and (stain := STAIN_WORDS.search(f"{name}. {sentence}")):
            problems.append(f"unstained tissue has no {stain.group()!r}: {where}")
    frames = Counter(f for *_, s in said for f in {" ".join(_words(s)[i:i + 3]) for i in range(len(_words(s)) - 2)})
    problems += [f"{f!r} stands in {count / len(said):.0%} of the sentences" for f, count in frames.items()
                 if count > 0.1 * len(said)]
    frame, count = frames.most_common(1)[0] if frames else ("none", 0)
    found = [f"{bank.get('name', '?')} ({bank.get('tissue', '?')}): {len(said)} sentences",
             *(f"  {level}: {len(bank['levels'][level])} attributes x {number} sentences" for level in LEVELS),
             f"  commonest three words: {frame!r} in {count / len(said):.1%} of the sentences",
             f"  longest sentence: {longest} tokens of {context}" if tokenizer else "  tokens not counted"]
    return found, problems


# -------------------------------------------------------------------------------------------------- tokens and vectors


class Tokenizer:
    """CLIP's byte-pair tokenizer for ASCII text. Without merges every letter is a token, which is what the demo's CLIP
    uses.

    merges: pairs of symbols, the most frequent first. `vocabulary` is {symbol: id}: 256 bytes, the same as the last of
    a word, the merges, start and end; so the end token has the largest id.
    """

    def __init__(self, merges=()):
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        bytes_ = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
        symbols = bytes_ + [b + "</w>" for b in bytes_] + ["".join(pair) for pair in merges] + [START, END]
        self.vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
        self.rank = {pair: i for i, pair in enumerate(merges)}

    def split(self, word):
        """One word -> its symbols: the pair that was merged first in training is merged first, until none is left."""
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            pairs = list(itertools.pairwise(symbols))
            best = min(pairs, key=lambda pair: self.rank.get(pair, float("inf")))
            if best not in self.rank:
                break
            merged, i = [], 0
            while i < len(symbols):
                width = 2 if tuple(symbols[i:i + 2]) == best else 1
                merged.append("".join(symbols[i:i + width]))
                i += width
            symbols = merged
        return symbols

    def encode(self, text):
        """Text -> token ids, without start and end. Raises ValueError for text that is not ASCII."""
        text = " ".join(html.unescape(html.unescape(text)).split()).lower()
        if not text.isascii():
            foreign = next(c for c in text if not c.isascii())
            raise ValueError(f"only ASCII can be tokenized, not the {foreign!r} in {text!r}")
        words = re.findall(rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+", text)
        return [self.vocabulary[s] for word in words for s in ([word] if word in (START, END) else self.split(word))]

    def __call__(self, texts, context):
        """Texts -> [n, context] int64, zero-padded; what is too long is cut, its end token kept."""
        tokens = torch.zeros(len(texts), context, dtype=torch.long)
        for row, text in zip(tokens, texts):
            ids = [self.vocabulary[START], *self.encode(text)][:context - 1] + [self.vocabulary[END]]
            row[:len(ids)] = torch.tensor(ids)
        return tokens


def read_merges(path):
    """The merges in CLIP's bpe_simple_vocab_16e6.txt.gz: all that its 49,408 ids leave room for."""
    with gzip.open(path, "rt", encoding="utf-8") as file:
        return [tuple(line.split()) for line in file.read().split("\n")[1:49408 - 512 - 2 + 1]]


@torch.no_grad()
def encode_bank(bank, tower, tokenizer, batch=256):
    """Sentences -> one unit vector an attribute: t = norm(mean_j norm(TextEncoder(sentence_j))).

    bank: as `read_bank`. tower: frozen text tower. Returns {level: [K_l, D]} in the order of the file.
    """
    vectors = {}
    for level in LEVELS:
        attributes = bank["levels"][level]
        sentences = [s for name in attributes for s in attributes[name]]
        tokens = tokenizer(sentences, tower.context)
        encoded = torch.cat([F.normalize(tower(part), dim=1) for part in tokens.split(batch)])
        means = [part.mean(dim=0) for part in encoded.split([len(attributes[name]) for name in attributes])]
        vectors[level] = F.normalize(torch.stack(means), dim=1)
    return vectors


def save_bank(path, bank, vectors):
    """Write bank.pt: {"name", "attributes": {level: [names]}, "vectors": {level: [K_l, D]}}."""
    attributes = {level: list(bank["levels"][level]) for level in LEVELS}
    torch.save({"name": bank["name"], "attributes": attributes, "vectors": vectors}, path)


# ----------------------------------------------------------------------------------------------------- the demo's CLIP

# What the captions name: four of the seven factors, low and high. The others (pleomorphism, elongation, fibres) the
# demo's CLIP never hears of, as a real CLIP never heard of much that a pathologist sees.
PHRASES = {
    "cellularity": (("sparse nuclei", "few cells", "low cellularity"),
                    ("crowded nuclei", "many cells", "high cellularity")),
    "nuclear_size": (("small nuclei", "tiny nuclei", "little nuclear area"),
                     ("large nuclei", "big nuclei", "swollen nuclei")),
    "vessels": (("no vessels", "without vessels", "avascular tissue"),
                ("many vessels", "vessel rings", "rich in vessels")),
    "necrosis": (("no necrosis", "viable tissue", "no dead area"),
                 ("necrosis", "dead pale area", "necrotic tissue")),
}
FRAMES = ("{}", "a patch with {}", "the slide has {}", "{} across the field", "there is {}", "tissue with {}",
          "{} in all slides of the patient", "{} everywhere", "mostly {}", "here we see {} in the tissue",
          "{}, more than usual", "the case shows {}")


def caption(factors, rng):
    """A sentence or two about the captioned factors that are clearly low or high in this patch."""
    clear = [f for f in PHRASES if abs(factors[FACTORS.index(f)] - 0.5) > 0.15]
    chosen = rng.permutation(clear)[:rng.integers(1, 3)]
    said = [rng.choice(FRAMES).format(rng.choice(PHRASES[f][int(factors[FACTORS.index(f)] > 0.5)])) for f in chosen]
    return rng.choice((" and ", ", ", ". ")).join(said) or "tissue"


def train_demo_clip(path, steps=300, patches=3072, batch=128, seed=0, size=64, width=16, dim=64, lr=2e-3):
    """Train a small CLIP on generic captioned tissue: random factors, neutral stain, no patients. Writes its state
    dict to `path`."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    factors = rng.random((patches, len(FACTORS)))
    images = np.stack([render(f, rng, size=size) for f in tqdm(factors, desc="captioned tissue", unit="patch")])
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
        tokens = tokens[:, :int((tokens != 0).sum(dim=1).max())]  # more padding changes nothing and costs time
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
    torch.save(state, path + ".part")
    os.replace(path + ".part", path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="measure a bank file, fail with the offending lines")
    check.add_argument("bank", help="a bank file (JSON)")
    check.add_argument("--attributes", type=int, help="how many attributes each level must have (the paper: 128)")
    check.add_argument("--vocab", help="count tokens: CLIP's bpe_simple_vocab_16e6.txt.gz, or 'bytes' (the demo's)")
    encode = commands.add_parser("encode", help="a bank file and a CLIP -> bank.pt")
    encode.add_argument("bank", help="a bank file (JSON)")
    encode.add_argument("--clip", required=True, help="a CLIP state dict; its text tower is used")
    encode.add_argument("--vocab", help="CLIP's bpe_simple_vocab_16e6.txt.gz; without it every letter is a token")
    encode.add_argument("--out", default="bank.pt", help="file to write")
    demo = commands.add_parser("demo", help="train the demo's CLIP on captioned demo tissue")
    demo.add_argument("out", help="file to write")
    demo.add_argument("--steps", type=int, default=300, help="more steps know more of the captioned factors")
    demo.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.command == "check":
        tokenizer = Tokenizer(() if args.vocab == "bytes" else read_merges(args.vocab)) if args.vocab else None
        found, problems = check_bank(read_bank(args.bank), args.attributes, tokenizer)
        print("\n".join([*found, *problems]))
        raise SystemExit(f"{args.bank}: {len(problems)} problems" if problems else 0)
    if args.command == "encode":
        bank = read_bank(args.bank)
        tokenizer = Tokenizer(read_merges(args.vocab) if args.vocab else ())
        vectors = encode_bank(bank, text_tower(load_state(args.clip)), tokenizer)
        save_bank(args.out, bank, vectors)
        print(f"{args.out}: " + ", ".join(f"{level} {tuple(v.shape)}" for level, v in vectors.items()))
    if args.command == "demo":
        os.makedirs(os.path.dirname(os.path.abspath(args.out)), exist_ok=True)
        train_demo_clip(args.out, steps=args.steps, seed=args.seed)


if __name__ == "__main__":
    main()
