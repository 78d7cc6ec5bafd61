"""The attribute-text bank: encode it, read it, have a language model write it.

    python describe.py check demo/attributes.json --vocab bytes
    python describe.py generate --tissue "lung, H&E" --endpoint http://localhost:11434/v1 --model M
    python describe.py encode demo/attributes.json --clip runs/cache/clip.pt --out bank.pt

A bank file is JSON: {"name": ..., "tissue": ..., "levels": {"patch": {attribute: [sentences]},
"slide": {...}, "patient": {...}}}. It may hold "truth", {attribute: "+factor" or "-factor"}, where
the factors behind the images are known, and "shows", {level: what an image of it shows}.
"""

import argparse
import functools
import gzip
import http.client
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

# ---------------------------------------------------------------------------------- the vectors


@torch.no_grad()
def encode_bank(content, tower, tokenizer, batch=64):
    """One unit vector per attribute, {level: t_l [K_l, D]}, in the order of the file.

        t = norm(mean_j norm(TextEncoder(sentence_j)))

    content: of a bank file. tower: a frozen text tower. batch: sentences in memory at a time.
    """
    levels = content["levels"]
    attributes = [sentences for names in levels.values() for sentences in names.values()]
    texts = [text for sentences in attributes for text in sentences]
    encoded = []
    for start in tqdm(range(0, len(texts), batch), desc="bank", unit="batch", leave=False):
        tokens = tokenizer(texts[start : start + batch], tower.context)  # [batch, context]
        longest = int(tokens.argmax(dim=1).max()) + 1  # the end token has the largest id
        encoded.append(F.normalize(tower(tokens[:, :longest]), dim=1))  # padding only costs time
    parts = torch.cat(encoded).split([len(sentences) for sentences in attributes])
    vectors = F.normalize(torch.stack([part.mean(dim=0) for part in parts]), dim=1)
    return dict(zip(levels, vectors.split([len(names) for names in levels.values()])))


def open_bank(path, state, vocab="", levels=LEVELS):
    """The names of a bank's attributes, {level: [names]}, and their vectors, {level: [K_l, D]}.

    path: a bank.pt, taken as it is, or a bank file, encoded with the text tower in a CLIP's state
    dict. vocab: as in `read_merges`. levels: those wanted. Raises ValueError, with the path.
    """
    if path.endswith(".pt"):
        saved = read_whole(path, "encode the bank again")
        if "vectors" not in saved:
            raise ValueError(f"{path} is no bank.pt: encode the bank again")
        if saved.get("rotated") is not None:
            print(f"note: {path} is rotated, a control: its words mean nothing")
        attributes, bank = saved["attributes"], saved["vectors"]
    else:
        content = read_bank_file(path)
        attributes = {level: list(names) for level, names in content["levels"].items()}
        bank = encode_bank(content, text_tower(state), tokenizer_of(state, vocab))
    for level in levels:
        if level not in bank:
            raise ValueError(f"{path} has {', '.join(bank)}, and not the level {level}: add it")
    return {at: attributes[at] for at in levels}, {at: bank[at] for at in levels}


def rotate(bank, seed):
    """A control without meaning: all vectors {level: [K_l, D]} turned by one random rotation.

    All angles among them stay. The rotation (or reflection) is uniform over all: the Q of a
    Gaussian matrix, with the signs of R's diagonal.
    """
    D = next(iter(bank.values())).shape[1]
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64))
    turn = q * r.diagonal().sign()
    return {level: (t.double() @ turn).float() for level, t in bank.items()}


def save_bank(path, content, bank, rotated=None):
    """Writes bank.pt: {"name", "attributes": {level: [names]}, "vectors": {level: [K_l, D]},
    "rotated": the seed of `rotate`, or None}."""
    attributes = {level: list(names) for level, names in content["levels"].items()}
    saved = {"name": content.get("name", ""), "attributes": attributes, "vectors": bank}
    saved["rotated"] = rotated
    write_whole(os.fspath(path), lambda file: torch.save(saved, file))


# ---------------------------------------------------------------------------- CLIP's tokenizer

START = "<start_of_text>"
END = "<end_of_text>"
WORD = re.compile(rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+")
VOCABULARY = (  # address and SHA-256
    "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
    "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
)


def join_pair(symbols, pair):
    """The symbols of a word, with every such pair of neighbours merged into one."""
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
    `vocabulary`, {symbol: id}, holds 256 bytes, the same at the end of a word, the merges, start
    and end. The end token has the largest id.
    """

    def __init__(self, merges=()):
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = range(256, 512 - len(printable))  # characters that stand for the other bytes
        single = [chr(code) for code in [*printable, *others]]
        last = [symbol + "</w>" for symbol in single]
        symbols = [*single, *last, *map("".join, merges), START, END]
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
        """The token ids of a text, without start and end. Raises ValueError for anything but plain
        ASCII, which tokenizers read differently."""
        text = re.sub(r"[\t\n\f\r]", " ", text)
        if not is_plain(text):
            raise ValueError(f"only ASCII can be tokenized, and no HTML entity: not {text!r}")
        ids = []
        for word in WORD.findall(text.lower()):
            symbols = [word] if word in (START, END) else self.split(word)
            ids += [self.vocabulary[symbol] for symbol in symbols]
        return ids

    def __call__(self, texts, context):
        """The tokens of n texts, [n, context] int64, zero-padded; a cut text keeps its end."""
        tokens = torch.zeros(len(texts), context, dtype=torch.long)
        for row, text in zip(tokens, texts):
            ids = [self.vocabulary[START], *self.encode(text)]
            ids = [*ids[: context - 1], self.vocabulary[END]]
            row[: len(ids)] = torch.tensor(ids)
        return tokens


def read_merges(path=""):
    """The merges in bpe_simple_vocab_16e6.txt.gz of CLIP: the file at path, or an installed
    open_clip's, or a download. "bytes": no merges. Raises ValueError for another file."""
    if path == "bytes":
        return []
    package = importlib.util.find_spec("open_clip")
    if not path and package:
        copy = os.path.join(os.path.dirname(package.origin), os.path.basename(VOCABULARY[0]))
        path = copy if os.path.exists(copy) else ""
    with gzip.open(published(*VOCABULARY, path), "rt", encoding="utf-8") as file:
        title, *lines = file.read().split("\n")
    return [tuple(line.split()) for line in lines[: 49408 - 512 - 2]]  # CLIP took no more of them


def tokenizer_of(state, vocab=""):
    """The Tokenizer of a CLIP's state, of its own merges or of CLIP's (see `read_merges`)."""
    tokenizer = Tokenizer(state["merges"] if "merges" in state else read_merges(vocab))
    tokens, size = len(state["token_embedding.weight"]), len(tokenizer.vocabulary)
    if size != tokens:
        raise ValueError(f"this text tower has {tokens} tokens, its tokenizer {size}")
    return tokenizer


# -------------------------------------------------------------------------------- the bank file


def read_bank_file(path, partial=False):
    """The content of a bank file, a dict. Raises ValueError for another form.

    partial: it is still being written, so a level or an attribute may be empty.
    """
    content = read_json(path)
    levels = content.get("levels") if isinstance(content, dict) else None
    if not isinstance(levels, dict) or not levels:
        raise ValueError(f'{path}: "levels" must hold {{level: {{attribute: [sentences]}}}}')
    for level, attributes in levels.items():
        if not isinstance(attributes, dict) or not (attributes or partial):
            raise ValueError(f"{path}: level {level} must be {{attribute: [sentences]}}, not empty")
        for name, sentences in attributes.items():
            if sentences or not partial:
                check_sentences(path, f"{level} / {name}", sentences)
    return content


def read_json(path):
    """What a JSON file holds. Raises ValueError, with the path, where a name appears twice."""

    def unique(pairs):  # JSON would silently keep the last of two values of one name
        for name, times in Counter(name for name, _ in pairs).items():
            if times > 1:
                raise ValueError(f"{path}: {name!r} appears twice in one place")
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


# ------------------------------------------------------------ the bank, written by a language model

SHOWS = {  # what to look at, unless the bank's own "shows" says it, as for another level
    "patch": "one high-power field: cells, nuclei, cytoplasm, matrix and the walls of single "
    "vessels",
    "slide": "one whole slide at low power: architecture, density, vessels, necrosis, borders, "
    "infiltration",
    "patient": "all slides of a patient side by side: how they differ, overall grade, growth and "
    "extent, what recurs",
}
PROMPT = """You are a pathologist who describes what {tissue} looks like, so that an image model can
learn from it.
{task}

Rules:
- Only what an eye sees in these images at that magnification: no molecules, genes, laboratory
  values, clinical facts, treatment or outcome; colours only where there is a stain. Plain ASCII.
{refused}
Reply with {form} and nothing else."""
NAMES = """Name {count} attributes that can be seen in {shows}.
Each is 2 to 6 words in lower case. Cover normal and abnormal, common and rare, in contrasts where
there is one (sparse nuclei, crowded nuclei). No two mean the same, and none repeats or rephrases
one of these, which are taken:
{listed}"""
SENTENCES = """For each attribute below write {count} sentences on how it looks in {shows}.
They state the same finding in different ways, in this order: its form; a comparison with a related
or opposite finding; its arrangement in space; a plain summary for a lay reader. Each has 8 to 25
words and does not lean on those of the attribute's name. No two begin alike or share a frame such
as "the image shows". The attributes:
{listed}"""
TYPOGRAPHY = str.maketrans("\u2018\u2019\u201c\u201d\u2010\u2011\u2013\u2014", "''''----")


def generate(
    path, answer, tissue=None, levels=LEVELS, attributes=128, sentences=4, batch=8, tokenizer=None
):
    """Lets a model fill a bank file; returns True when it is complete.

    answer: prompt -> reply. The file is saved after every reply, and all depends on it alone, so an
    interrupted call goes on where it stopped. Raises ValueError for a file about another tissue,
    RuntimeError when four replies in a row bring nothing.
    """
    content = begin(path, tissue, levels)
    done = sum(1 + bool(said) for level in levels for said in content["levels"][level].values())
    bar = tqdm(total=2 * attributes * len(levels), initial=done, leave=False)
    idle = 0  # replies in a row that brought nothing

    def request(level, names, count):
        """Asks once, for `count` names or for sentences of some names, and saves what passes."""
        nonlocal idle
        bar.set_description(f"{level} {'sentences' if names else 'names'}")
        reply = answer(prompt_for(content, level, names, count))
        taken = take_reply(content, level, names, reply, count, tokenizer)
        bar.update(taken)
        write_json(path, content)
        idle = 0 if taken else idle + 1
        if idle == 4:
            raise RuntimeError(
                f"{path}: four replies in a row brought nothing. Refused:\n"
                + "\n".join(content["refused"])
                + "\nTake a better model or a smaller --batch, or edit the file."
            )

    for level in levels:
        here = content["levels"][level]
        while len(here) < attributes:
            request(level, None, min(batch, attributes - len(here)))
        while missing := [name for name in here if not here[name]]:
            request(level, missing[:batch], sentences)
    bar.close()
    content.pop("refused", None)
    write_json(path, content)
    written = content["levels"].values()
    return all(len(here) >= attributes and all(here.values()) for here in written)


def begin(path, tissue, levels):
    """The content of a bank file to fill, new or begun. Raises ValueError if it does not fit."""
    name = os.path.basename(path).removesuffix(".json")
    content = {"name": name, "tissue": tissue, "levels": {level: {} for level in LEVELS}}
    if os.path.exists(path):
        content = read_bank_file(path, partial=True)
    for level in levels:
        content["levels"].setdefault(level, {})
        if level not in SHOWS | content.get("shows", {}):
            raise ValueError(
                f"{path} must say what a {level} shows, as "
                f'"shows": {{"{level}": "one region at low power: ..."}}'
            )
    if not content.get("tissue"):
        raise ValueError(f"{path} says no tissue: name one with --tissue, or in the file")
    if tissue not in (None, content["tissue"]):
        raise ValueError(
            f"{path} is about {content['tissue']!r}, not {tissue!r}: name another --out"
        )
    return content


def prompt_for(content, level, names, count):
    """The prompt that asks for `count` new names of a level, or sentences for each of `names`."""
    shows = (SHOWS | content.get("shows", {}))[level]
    if names:
        task = SENTENCES.format(count=count, shows=shows, listed="\n".join(names))
        form = f"a JSON object {{attribute as spelled above: [{count} strings]}}"
    else:
        levels = content["levels"].items()
        taken = "\n".join(f"{at}: {', '.join(have) or 'none'}" for at, have in levels)
        task = NAMES.format(count=count, shows=shows, listed=taken)
        form = f"a JSON array of {count} strings"
    lines = content.get("refused", [])[:30]
    refused = "".join(f"- Refused in your last reply: {line}\n" for line in lines)
    return PROMPT.format(tissue=content["tissue"], refused=refused, task=task, form=form)


def take_reply(content, level, names, reply, count, tokenizer=None):
    """How many attributes a reply added: those that pass `check_bank`.

    The faults of the others are listed in content["refused"], which the next prompt quotes.
    """
    refused = content["refused"] = []
    reply = reply.rpartition("</think>")[2]
    first, last = "{}" if names else "[]"  # code fences and talk are outside the brackets
    try:
        found = json.loads(reply[reply.find(first) : reply.rfind(last) + 1])
    except (ValueError, RecursionError):
        refused.append(f"not the JSON asked for: {reply[:80]!r}")
        return 0
    here = content["levels"][level]
    if names:
        found = {tidy(name).lower(): said for name, said in found.items()}
        proposed = {name: texts_in(found.get(name.lower()))[:count] for name in names}
    else:
        new = [name.lower() for name in texts_in(found)]
        refused += [f"{level} / {name}: is taken" for name in dict.fromkeys(new) if name in here]
        new = [name for name in dict.fromkeys(new) if name not in here]
        proposed = {name: [] for name in new[:count]}
    taken = 0
    for name, said in proposed.items():
        here[name] = said
        expected = count if names else 0
        _, problems = check_bank(content, None, tokenizer, sentences=expected, only=(level, name))
        faults = [line for line, places in problems.items() if (level, name) in places]
        refused += faults
        if not faults:
            taken += 1
        elif names:
            here[name] = []
        else:
            del here[name]
    return taken


def texts_in(found):
    """The strings of a list, tidied; none if it is no list."""
    return [tidy(x) for x in found if isinstance(x, str)] if isinstance(found, list) else []


def tidy(text):
    """A text with plain quotes and dashes, and single blanks."""
    return " ".join(text.translate(TYPOGRAPHY).split())


def ask(endpoint, model, prompt, key="", timeout=600, tries=3, wait=2):
    """The reply of a model behind an OpenAI-compatible chat endpoint.

    Temporary failures (429, 5xx, time-outs, lost connections, half an answer) are retried after
    wait, 2 wait, ... seconds, or as Retry-After says. Raises ConnectionError, never with the key.
    """
    key = "".join(key.split())  # urllib would show the key if it complained about a line break
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": prompt}]}).encode()
    headers = {"Content-Type": "application/json", "User-Agent": "hlss"}
    request = urllib.request.Request(endpoint.rstrip("/") + "/chat/completions", body, headers)
    if key:  # unredirected: a redirect must not carry it elsewhere
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    for attempt in range(1, tries + 1):
        final, after = attempt == tries, ""
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                reply = json.loads(response.read().decode())["choices"][0]["message"]["content"]
                return reply if isinstance(reply, str) else ""
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {error.read()[:300].decode(errors='replace')}"
            after = error.headers.get("Retry-After", "")
            final |= error.code < 500 and error.code not in (408, 429)
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            reason = f"{type(error).__name__} {error}"
        reason = f"{endpoint}: {reason.replace(key, '***') if key else reason}"
        if final:
            raise ConnectionError(f"{reason} (request {attempt} of at most {tries})")
        pause = min(int(after), 600) if after.isdecimal() else wait * 2 ** (attempt - 1)
        tqdm.write(f"{reason}: again in {pause} s")
        time.sleep(pause)


# ---------------------------------------------------------------------------------- the commands


def run_check(args):
    """`check`: prints what a program can measure; exits with 1 if there are problems."""
    content = read_bank_file(args.bank)
    tokenizer = Tokenizer(read_merges(args.vocab)) if args.vocab else None
    findings, problems = check_bank(content, args.attributes, tokenizer, sentences=args.sentences)
    print("\n".join([*findings, *problems]))
    raise SystemExit(f"{args.bank}: {len(problems)} problems" if problems else 0)


def run_generate(args):
    """`generate`: has a model fill a bank file, or go on with it."""
    tokenizer = Tokenizer(read_merges(args.vocab)) if args.vocab else None
    answer = functools.partial(ask, args.endpoint, args.model, key=os.getenv("OPENAI_API_KEY", ""))
    counts = (args.attributes, args.sentences, args.batch)
    try:
        complete = generate(args.bank, answer, args.tissue, args.levels, *counts, tokenizer)
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"{error}\nThe same command goes on from {args.bank}") from error
    if complete:
        run_check(args)
    print(f"{args.bank} is not complete: the same command without --levels goes on with it")


def run_encode(args):
    """`encode`: writes a bank.pt."""
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
    commands = parser.add_subparsers(dest="command", required=True)

    def command(run, text):
        sub = commands.add_parser(run.__name__[4:], help=text)
        sub.set_defaults(run=run)
        return sub.add_argument

    flag = command(run_check, "measure a bank file")
    flag("bank", help="a bank file (JSON)")
    flag("--attributes", type=int, help="how many each level must have (the paper: 128)")
    flag("--sentences", type=int, help="how many each attribute must have (the paper: 4)")
    flag("--vocab", help="count tokens by: bpe_simple_vocab_16e6.txt.gz of CLIP, or 'bytes' (demo)")

    flag = command(run_generate, "have a language model write it")
    flag("--out", dest="bank", default="bank.json", help="the bank file, new or to be finished")
    flag("--tissue", help='what the images show, for instance "H&E of colorectal cancer"')
    flag("--endpoint", default="", help="an OpenAI-compatible API; OPENAI_API_KEY holds its key")
    flag("--model", help="the model's name there")
    flag("--levels", nargs="+", default=LEVELS, help="only these levels")
    flag("--attributes", type=int, default=128, help="how many each level gets (the paper: 128)")
    flag("--sentences", type=int, default=4, help="how many each attribute gets (the paper: 4)")
    flag("--batch", type=int, default=8, help="attributes a request; fewer if replies are cut off")
    flag("--vocab", help="count tokens as check does")

    flag = command(run_encode, "a bank file and a CLIP -> bank.pt")
    flag("bank", help="a bank file (JSON)")
    flag("--clip", required=True, help=f"a CLIP with a text tower: a file, or {', '.join(CLIPS)}")
    flag("--activation", choices=ACTIVATIONS, help="of the CLIP, if its file does not say")
    flag("--vocab", help="bpe_simple_vocab_16e6.txt.gz of CLIP (default: open_clip's, a download)")
    seed = "for a control without meaning: turn all vectors by a random rotation of this SEED"
    flag("--rotate", type=int, metavar="SEED", help=seed)
    flag("--out", default="bank.pt", help="file to write")
    args = parser.parse_args()
    if args.run is run_generate and not (args.model and re.match("https?://", args.endpoint)):
        parser.error("generate needs --endpoint http://... and --model")
    args.run(args)


if __name__ == "__main__":
    with user_errors():
        main()
