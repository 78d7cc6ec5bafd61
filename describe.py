"""The attribute-text bank: encode it, read it, have a language model write it.

    python describe.py check demo/attributes.json --vocab bytes
    python describe.py generate bank.json --tissue "lung, H&E" --endpoint http://... --model M
    python describe.py encode demo/attributes.json --clip runs/cache/clip.pt --out bank.pt

A bank file is JSON: {"name": ..., "tissue": ..., "levels": {"patch": {attribute: [sentences]},
"slide": {...}, "patient": {...}}}. It may also hold "truth", {attribute: "+factor" or "-factor"},
for tissue whose factors are known, and "shows", {level: what its images show}.
"""

import argparse
import functools
import gzip
import importlib.util
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from itertools import pairwise

import torch
import torch.nn.functional as F
from tqdm import tqdm

from losses import LEVELS
from model import ACTIVATIONS, text_tower
from tools.bank import check_bank, is_plain
from tools.processes import user_errors
from tools.runs import read_whole, write_json, write_whole
from tools.weights import CLIPS, load_clip, published


@torch.no_grad()
def encode_bank(content, tower, tokenizer, batch=64):
    """One unit vector per attribute, {level: t_l [K_l, D]}, in the order of the file.

        t = norm(mean_j norm(TextEncoder(sentence_j)))

    content: what a bank file holds. tower: a frozen CLIP text tower. tokenizer: a Tokenizer.
    """
    levels = content["levels"]
    sentences_of = [said for attributes in levels.values() for said in attributes.values()]
    texts = [text for sentences in sentences_of for text in sentences]
    encoded = []
    for start in tqdm(range(0, len(texts), batch), desc="bank", unit="batch", leave=False):
        tokens = tokenizer(texts[start : start + batch], tower.context)  # [batch, context], cut
        longest = int(tokens.argmax(dim=1).max()) + 1  # the end token has the largest id
        encoded.append(F.normalize(tower(tokens[:, :longest]), dim=1))  # padding only costs time
    parts = torch.cat(encoded).split([len(sentences) for sentences in sentences_of])
    vectors = F.normalize(torch.stack([part.mean(dim=0) for part in parts]), dim=1)
    return dict(zip(levels, vectors.split([len(attributes) for attributes in levels.values()])))


def open_bank(path, state, vocab="", levels=LEVELS):
    """The names of a bank's attributes, {level: [names]}, and their vectors, {level: [K_l, D]}.

    path: a bank.pt, or a bank file to encode with the CLIP in state. vocab: as in read_merges().
    """
    if path.endswith(".pt"):
        saved = read_whole(path, remedy="encode the bank again")
        if "vectors" not in saved:
            raise ValueError(f"{path} is not a bank.pt: encode the bank again")
        if saved.get("rotated") is not None:
            print(f"note: {path} is a rotated control: its words mean nothing")
        attributes, bank = saved["attributes"], saved["vectors"]
    else:
        content = read_bank_file(path)
        attributes = {level: list(names) for level, names in content["levels"].items()}
        bank = encode_bank(content, text_tower(state), tokenizer_of(state, vocab))
    for level in levels:
        if level not in bank:
            raise ValueError(f"{path} has {', '.join(bank)}, but no level {level}: add it")
    return {at: attributes[at] for at in levels}, {at: bank[at] for at in levels}


def rotate(bank, seed):
    """A null control: one random rotation of all vectors, which keeps their angles."""
    D = next(iter(bank.values())).shape[1]
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64))
    turn = q * r.diagonal().sign()  # uniform over all rotations and reflections
    return {level: (t.double() @ turn).float() for level, t in bank.items()}


def save_bank(path, content, bank, rotated=None):
    """Writes bank.pt, which `open_bank` reads. rotated: the seed given to `rotate`, or None."""
    saved = {"name": content.get("name", ""), "vectors": bank, "rotated": rotated}
    saved["attributes"] = {level: list(names) for level, names in content["levels"].items()}
    write_whole(os.fspath(path), lambda file: torch.save(saved, file))


def read_bank_file(path, partial=False):
    """The content of a bank file. partial: it is being written, so a level may be empty."""
    content = read_json(path)
    levels = content.get("levels") if isinstance(content, dict) else None
    if not isinstance(levels, dict) or not levels:
        raise ValueError(f'{path}: "levels" must hold {{level: {{attribute: [sentences]}}}}')
    for level, attributes in levels.items():
        if not isinstance(attributes, dict) or not (attributes or partial):
            raise ValueError(f"{path}: level {level} must be {{attribute: [sentences]}}, not empty")
        for name, sentences in attributes.items():
            check_sentences(path, f"{level} / {name}", sentences)
    return content


def read_json(path):
    """A JSON file's contents. Raises ValueError, with the path, if a name appears twice."""

    def unique(pairs):  # json silently keeps the last value of a repeated name
        for name, times in Counter(name for name, _ in pairs).items():
            if times > 1:
                raise ValueError(f"{path}: {name!r} appears twice in one object")
        return dict(pairs)

    try:
        with open(path, encoding="utf-8-sig") as file:
            return json.load(file, object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def check_sentences(path, name, sentences):
    """Raises ValueError unless these are sentences: a list of strings, none of them empty."""
    good = isinstance(sentences, list) and all(isinstance(x, str) and x.strip() for x in sentences)
    if not sentences or not good:
        raise ValueError(f"{path}: {name}: must be a list of sentences, none of them empty")


# ---------------------------------------------------------------------------- CLIP's tokenizer

START = "<start_of_text>"
END = "<end_of_text>"
WORD = re.compile(rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+")
VOCABULARY = "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz"
CHECKSUM = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"  # its SHA-256


def join_pair(symbols, pair):
    """The symbols of a word, with every occurrence of the pair merged into one."""
    joined = []
    for symbol in symbols:
        if joined and (joined[-1], symbol) == pair:
            joined[-1] += symbol
        else:
            joined.append(symbol)
    return joined


class Tokenizer:
    """CLIP's byte-pair tokenizer (Radford et al. 2021), for ASCII text.

    merges: pairs of symbols, the most frequent first; without any, every letter is a token.
    """

    def __init__(self, merges=()):
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = range(256, 512 - len(printable))  # characters that stand for the other bytes
        single = [chr(code) for code in [*printable, *others]]
        ending = [symbol + "</w>" for symbol in single]  # those that end a word
        symbols = [*single, *ending, *map("".join, merges), START, END]
        self.vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.split = functools.cache(self.split)  # words recur

    def split(self, word):
        """The symbols of a word: merge the best-ranked pair until none is left."""
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            best = min(pairwise(symbols), key=lambda pair: self.rank.get(pair, len(self.rank)))
            if best not in self.rank:
                break
            symbols = join_pair(symbols, best)
        return symbols

    def encode(self, text):
        """The token ids of a text, without start and end. Raises ValueError unless it is ASCII."""
        text = re.sub(r"[\t\n\f\r]", " ", text)
        if not is_plain(text):
            raise ValueError(f"only ASCII without HTML entities can be tokenized, not {text!r}")
        ids = []
        for word in WORD.findall(text.lower()):
            symbols = [word] if word in (START, END) else self.split(word)
            ids += [self.vocabulary[symbol] for symbol in symbols]
        return ids

    def __call__(self, texts, context):
        """The tokens of n texts, [n, context] int64, zero-padded; truncation keeps END."""
        tokens = torch.zeros(len(texts), context, dtype=torch.long)
        for row, text in zip(tokens, texts):
            ids = [self.vocabulary[START], *self.encode(text)][: context - 1]
            row[: len(ids) + 1] = torch.tensor([*ids, self.vocabulary[END]])
        return tokens


def read_merges(path=""):
    """CLIP's merges, from a file, an installed open_clip or a download; none for "bytes"."""
    if path == "bytes":
        return []
    package = importlib.util.find_spec("open_clip")
    if package and not path:
        path = os.path.join(os.path.dirname(package.origin), os.path.basename(VOCABULARY))
    with gzip.open(published(VOCABULARY, CHECKSUM, path), "rt", encoding="utf-8") as file:
        title, *lines = file.read().split("\n")
    return [tuple(line.split()) for line in lines[: 49408 - 512 - 2]]  # CLIP uses only these


def tokenizer_of(state, vocab=""):
    """The Tokenizer for a CLIP's state dict: its own merges, or CLIP's (see `read_merges`)."""
    tokenizer = Tokenizer(state["merges"] if "merges" in state else read_merges(vocab))
    tokens, size = len(state["token_embedding.weight"]), len(tokenizer.vocabulary)
    if size != tokens:
        raise ValueError(f"this text tower has {tokens} tokens, its tokenizer {size}")
    return tokenizer


# ------------------------------------------------------------ the bank, written by a language model

SHOWS = {  # what an image shows; a bank's own "shows" overrides it, or adds another level
    "patch": "one high-power field: cells, nuclei, cytoplasm, matrix and walls of single vessels",
    "slide": "one whole slide at low power: architecture, density, vessels, necrosis, infiltration",
    "patient": "all slides of a patient side by side: how they differ, grade, extent, what recurs",
}
TYPOGRAPHY = str.maketrans("\u2018\u2019\u201c\u201d\u2010\u2011\u2013\u2014", "''''----")


def generate(path, answer, tissue, levels=LEVELS, attributes=128, sentences=4, batch=8):
    """Has a model write attributes and their sentences into a bank file until its levels are full.

    answer: prompt -> reply. An interrupted call resumes from the file, saved after every reply.
    """
    content = {"name": os.path.basename(path), "tissue": tissue, "levels": {}}
    if os.path.exists(path):
        content = read_bank_file(path, partial=True)
    if content.setdefault("tissue", tissue) != tissue:
        raise ValueError(f"{path} is about {content['tissue']}, not {tissue}: name another file")
    for level in levels:
        content["levels"].setdefault(level, {})
        if level not in SHOWS | content.get("shows", {}):
            raise ValueError(f'{path} must say what a {level} shows, as "shows": {{level: text}}')
    for level in levels:
        here, idle = content["levels"][level], 0  # idle: replies in a row that added nothing
        while len(here) < attributes:
            before = len(here)
            reply = answer(prompt_for(content, level, min(batch, attributes - before), sentences))
            content["refused"] = take_reply(content, level, reply, attributes - before, sentences)
            write_json(path, content)
            print(f"{level}: {len(here)} of {attributes} attributes", flush=True)
            idle = idle + 1 if len(here) == before else 0
            if idle == 4:
                raise RuntimeError(
                    f"{path}: four replies in a row added nothing ({content['refused']}): "
                    "try a better model or a smaller --batch"
                )
    content.pop("refused", None)
    write_json(path, content)


def prompt_for(content, level, count, sentences):
    """The prompt that asks for `count` new attributes of a level, with their sentences."""
    shows = (SHOWS | content.get("shows", {}))[level]
    taken = [f"{at}: {', '.join(names)}" for at, names in content["levels"].items()]
    refused = [f"Refused in your last reply: {line}" for line in content.get("refused", [])[:30]]
    lines = "\n".join([*taken, *refused])
    return f"""You are a pathologist who describes what {content["tissue"]} looks like, so that an
image model can learn from it. Name {count} attributes that can be seen in {shows}.
- Each is 2 to 6 words in lower case. Cover normal and abnormal, common and rare, in opposite pairs
  where possible (sparse nuclei, crowded nuclei). None may mean the same as another, new or taken.
- Write {sentences} sentences for each, which state the same finding in different ways: its form; a
  comparison with a related or opposite finding; its arrangement in space; a plain summary for a lay
  reader. Use 8 to 25 words, few of them from the attribute, and no frame like "the image shows".
- Only what the eye sees in these images at that magnification: no molecules, genes, laboratory
  values, clinical facts, treatment or outcome; colours only where there is a stain. Plain ASCII.
Reply with a JSON object {{attribute: [{sentences} strings]}} and nothing else. These are taken:
{lines}"""


def take_reply(content, level, reply, most, sentences):
    """Adds the attributes of a reply that pass `check_bank`; returns the faults of the rest."""
    reply = reply.rpartition("</think>")[2].translate(TYPOGRAPHY)
    try:  # code fences and talk are outside the braces
        found = json.loads(reply[reply.find("{") : reply.rfind("}") + 1])
        proposed = {name.lower(): [text.strip() for text in said] for name, said in found.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return [f"not the JSON asked for: {reply[:80]!r}"]
    here = content["levels"][level]
    refused = [f"{level} / {name}: is taken" for name in proposed if name in here]
    for name in [name for name in proposed if name not in here][:most]:
        here[name] = proposed[name][:sentences]
        _, problems = check_bank(content, sentences=sentences)
        faults = [line for line, places in problems.items() if (level, name) in places]
        if faults:
            refused += faults
            del here[name]
    return refused


def ask(endpoint, model, prompt, key="none", timeout=600, pauses=(2, 4)):
    """The reply of a model behind an OpenAI-compatible chat endpoint.

    Asks again after each pause, in seconds, if the failure may be temporary. Raises
    ConnectionError, which never shows the key.
    """
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": prompt}]}).encode()
    headers = {"Content-Type": "application/json", "User-Agent": "hlss"}
    request = urllib.request.Request(endpoint.rstrip("/") + "/chat/completions", body, headers)
    request.add_unredirected_header("Authorization", f"Bearer {key}")  # a redirect drops it
    for pause in (*pauses, None):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                return str(json.load(response)["choices"][0]["message"]["content"])
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.read(300).decode(errors='replace')}"
            final = error.code < 500 and error.code not in (408, 429)
        except Exception as error:  # whatever urllib and json make of a broken reply
            reason, final = f"{type(error).__name__} {error}", False
        reason = reason.replace(key, "***")
        if final or pause is None:
            raise ConnectionError(f"{endpoint}: {reason}")
        print(f"{endpoint}: {reason}: retrying in {pause} s", flush=True)
        time.sleep(pause)


# ---------------------------------------------------------------------------------- the commands


def run_check(args):
    content = read_bank_file(args.bank)
    tokenizer = Tokenizer(read_merges(args.vocab)) if args.vocab else None
    findings, problems = check_bank(content, args.attributes, tokenizer, args.sentences)
    print("\n".join([*findings, *problems]))
    raise SystemExit(f"{args.bank}: {len(problems)} problems" if problems else 0)


def run_generate(args):
    key = "".join(os.getenv("OPENAI_API_KEY", "").split()) or "none"  # urllib prints bad keys
    answer = functools.partial(ask, args.endpoint, args.model, key=key)
    counts = (args.attributes, args.sentences, args.batch)
    try:
        generate(args.bank, answer, args.tissue, args.levels, *counts)
    except (OSError, RuntimeError) as error:
        raise SystemExit(f"{error}\nThe same command resumes from {args.bank}") from error
    run_check(args)


def run_encode(args):
    state = load_clip(args.clip, args.activation)
    content = read_bank_file(args.bank)
    _, bank = open_bank(args.bank, state, args.vocab, content["levels"])
    if args.rotate is not None:
        bank = rotate(bank, args.rotate)
    save_bank(args.out, content, bank, args.rotate)
    shapes = ", ".join(f"{level} {tuple(t.shape)}" for level, t in bank.items())
    print(f"{args.out}, {args.clip}, {state['activation']}: {shapes}")


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(required=True)

    def command(run, text):
        sub = commands.add_parser(run.__name__[4:], help=text)
        sub.set_defaults(run=run)
        sub.add_argument("bank", help="the bank file (JSON)")
        sub.add_argument("--vocab", help="CLIP's bpe_simple_vocab_16e6.txt.gz, or 'bytes'")
        return sub.add_argument

    flag = command(run_check, "check a bank file")
    flag("--attributes", type=int, help="how many each level must have (the paper: 128)")
    flag("--sentences", type=int, help="how many each attribute must have (the paper: 4)")

    flag = command(run_generate, "have a language model write a bank file, or continue one")
    flag("--tissue", required=True, help='what the images show, like "H&E of colorectal cancer"')
    flag("--endpoint", required=True, help="an OpenAI-compatible API; key: $OPENAI_API_KEY")
    flag("--model", required=True, help="the API's name for the model")
    flag("--levels", nargs="+", default=LEVELS, help="only these levels")
    flag("--attributes", type=int, default=128, help="how many each level gets (the paper: 128)")
    flag("--sentences", type=int, default=4, help="how many each attribute gets (the paper: 4)")
    flag("--batch", type=int, default=8, help="attributes per call: fewer if replies break off")

    flag = command(run_encode, "a bank file and a CLIP -> bank.pt")
    flag("--clip", required=True, help=f"a CLIP with a text tower: a file, or {', '.join(CLIPS)}")
    flag("--activation", choices=ACTIVATIONS, help="if the CLIP's file does not say")
    flag("--rotate", type=int, metavar="SEED", help="a null control: rotate all vectors")
    flag("--out", default="bank.pt", help="file to write")
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    with user_errors():
        main()
