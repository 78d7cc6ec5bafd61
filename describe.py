"""The attribute-text bank: read it, check it, have a language model write it, encode it.

    python describe.py check demo/attributes.json --vocab bytes
    python describe.py generate --tissue "lung, H&E" --endpoint http://localhost:11434/v1 --model M
    python describe.py encode demo/attributes.json --clip runs/cache/clip.pt --out bank.pt

A bank file is JSON: {"name": ..., "tissue": ..., "levels": {"patch": {attribute: [sentences]},
"slide": {...}, "patient": {...}}}. It may hold "truth", {attribute: "+factor" or "-factor"}, where
the factors behind the images are known. `python -m demo.clip OUT` trains the demo's CLIP.
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
from tools.runs import read_whole, write_whole
from tools.weights import CLIPS, load_clip, published

# -------------------------------------------------------------------------------- the bank file


def read_bank(path, partial=False):
    """The dict in a bank file. Raises ValueError for another form; `check_bank` judges the content.

    partial: it is being written still, so that a level or an attribute may be empty.
    """
    bank = read_json(path)
    levels = bank.get("levels") if isinstance(bank, dict) else None
    if not isinstance(levels, dict) or not levels:
        raise ValueError(f'{path}: "levels" must hold {{level: {{attribute: [sentences]}}}}')
    for level, attributes in levels.items():
        if not isinstance(attributes, dict) or not (attributes or partial):
            raise ValueError(f"{path}: level {level} must be {{attribute: [sentences]}}, not empty")
        for name, sentences in attributes.items():
            if sentences or not partial:
                check_sentences(path, f"{level} / {name}", sentences)
    return bank


def read_json(path):
    """What a JSON file holds. Raises ValueError, with the path, where a name stands twice."""

    def unique(pairs):  # JSON would silently keep the last of two values of one name
        for name, times in Counter(name for name, _ in pairs).items():
            if times > 1:
                raise ValueError(f"{path}: {name!r} stands twice in one place")
        return dict(pairs)

    try:
        with open(path, encoding="utf-8") as file:
            return json.load(file, object_pairs_hook=unique)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def check_sentences(path, name, sentences):
    """Raises ValueError unless these are the sentences of a name: strings in a list, not empty."""
    if not isinstance(sentences, list) or not sentences:
        raise ValueError(f"{path}: {name}: must be a list of sentences")
    if not all(isinstance(sentence, str) and sentence.strip() for sentence in sentences):
        raise ValueError(f"{path}: {name}: every sentence must be a text, and not empty")


# ------------------------------------------------------------- CLIP's tokenizer, and the vectors

START = "<start_of_text>"
END = "<end_of_text>"
WORD = re.compile(rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+")
VOCABULARY = (  # address and SHA-256
    "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
    "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
)


def join_pair(symbols, pair):
    """The symbols of a word, in which each such pair of neighbours has become one."""
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
    `vocabulary` is {symbol: id}: 256 bytes, the same as the last of a word, the merges, start and
    end; so the end token has the largest id.
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
        """The symbols of a word: of all neighbours, those that rank first are merged, and again."""
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            best = min(pairwise(symbols), key=lambda pair: self.rank.get(pair, len(self.rank)))
            if best not in self.rank:
                break
            symbols = join_pair(symbols, best)
        return symbols

    def encode(self, text):
        """The token ids of a text, without start and end. Raises ValueError for what another
        tokenizer may read otherwise: characters that are not printable ASCII, HTML entities."""
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


@torch.no_grad()
def encode_bank(bank, tower, tokenizer, batch=64):
    """One unit vector for each attribute, {level: [K_l, D]}, in the order of the file.

        t = norm(mean_j norm(TextEncoder(sentence_j)))

    bank: from `read_bank`. tower: a frozen text tower. batch: sentences in memory at a time.
    """
    levels = bank["levels"]
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
    """The attributes of a bank, {level: [names]}, and their unit vectors, {level: [K_l, D]}.

    path: a bank.pt, as it is, or a bank file, encoded with the text tower of a CLIP's state dict.
    vocab: for `read_merges`. levels: those wanted. Raises ValueError that names a file which is
    neither, or lacks a level.
    """
    if path.endswith(".pt"):
        bank = read_whole(path, "encode the bank again")
        if "vectors" not in bank:
            raise ValueError(f"{path} is no bank.pt: encode the bank again")
        if bank.get("rotated") is not None:
            print(f"note: {path} is rotated, a control: its words mean nothing")
        attributes, vectors = bank["attributes"], bank["vectors"]
    else:
        bank = read_bank(path)
        tower = text_tower(state)
        attributes = {level: list(names) for level, names in bank["levels"].items()}
        vectors = encode_bank(bank, tower, tokenizer_of(state, vocab))
    missing = [level for level in levels if level not in vectors]
    if missing:
        raise ValueError(f"{path} has {', '.join(vectors)}, and not the level {missing[0]}: add it")
    attributes = {level: attributes[level] for level in levels}
    return attributes, {level: vectors[level] for level in levels}


def rotate(vectors, seed):
    """A control that knows no words: all vectors of a bank {level: [K_l, D]}, turned by one random
    rotation (or reflection) of the D dimensions, so that all angles among them stay.

    It is uniform over all of them: the Q of a Gaussian matrix, with the signs of R's diagonal.
    """
    D = next(iter(vectors.values())).shape[1]
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(D, D, generator=generator, dtype=torch.float64))
    turn = q * r.diagonal().sign()
    return {level: (t.double() @ turn).float() for level, t in vectors.items()}


def save_bank(path, bank, vectors, rotated=None):
    """Write bank.pt: {"name", "attributes": {level: [names]}, "vectors": {level: [K_l, D]},
    "rotated": the seed of `rotate`, or None}."""
    attributes = {level: list(names) for level, names in bank["levels"].items()}
    saved = {"name": bank.get("name", ""), "attributes": attributes, "vectors": vectors}
    saved["rotated"] = rotated
    write_whole(os.fspath(path), lambda file: torch.save(saved, file))


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


def next_prompt(bank, levels=LEVELS, attributes=128, sentences=4, batch=8):
    """What to ask next: (level, names, prompt), or None when all is written.

    names: the attributes, at most `batch`, to write sentences for; None: it asks for new ones. All
    depends on the bank alone, so that an interrupted run goes on where it stopped.
    """
    shows = SHOWS | bank.get("shows", {})
    refused = [f"- Refused in your last reply: {line}\n" for line in bank.get("refused", [])[:30]]
    for level in levels:
        here = bank["levels"][level]
        names = [name for name in here if not here[name]][:batch]
        if len(here) < attributes:
            names = None
            count = min(batch, attributes - len(here))
            taken = [f"{at}: {', '.join(have) or 'none'}" for at, have in bank["levels"].items()]
            task = NAMES.format(count=count, shows=shows[level], listed="\n".join(taken))
            form = f"a JSON array of {count} strings"
        elif names:
            task = SENTENCES.format(count=sentences, shows=shows[level], listed="\n".join(names))
            form = f"a JSON object {{attribute as spelled above: [{sentences} strings]}}"
        else:
            continue
        context = {"tissue": bank["tissue"], "refused": "".join(refused)}
        return level, names, PROMPT.format(**context, task=task, form=form)
    return None


def take_reply(bank, level, names, reply, attributes=128, sentences=4, tokenizer=None):
    """How many attributes a reply brought into the bank: those that pass `check_bank`. The faults
    of the others stand in bank["refused"]. level, names: from `next_prompt`."""
    bank["refused"] = []
    reply = reply.rpartition("</think>")[2]
    first, last = "{}" if names else "[]"  # code fences and talk stand outside the brackets
    try:
        answer = json.loads(reply[reply.find(first) : reply.rfind(last) + 1])
    except (ValueError, RecursionError):
        bank["refused"].append(f"not the JSON asked for: {reply[:80]!r}")
        return 0
    if names:
        proposed = new_sentences(names, answer, sentences)
    else:
        proposed = new_names(bank, level, answer, attributes)
        sentences = 0  # which come later
    here = bank["levels"][level]
    taken = 0
    for name, texts in proposed.items():
        here[name] = texts
        _, problems = check_bank(bank, None, tokenizer, sentences=sentences, only=(level, name))
        faults = [line for line, places in problems.items() if (level, name) in places]
        bank["refused"] += faults
        if not faults:
            taken += 1
        elif names:
            here[name] = []
        else:
            del here[name]
    return taken


def new_names(bank, level, answer, attributes):
    """{name: []} of the names in an answer that are new to the level, until it has enough."""
    here = bank["levels"][level]
    names = dict.fromkeys(tidy(name).lower() for name in answer if isinstance(name, str))
    bank["refused"] += [f"{level} / {name}: is taken" for name in names if name in here]
    new = [name for name in names if name not in here]
    return {name: [] for name in new[: attributes - len(here)]}


def new_sentences(names, answer, sentences):
    """{name: [sentences]} of the names asked for, in whatever case the answer spells them."""
    answer = {name.strip().lower(): texts for name, texts in answer.items()}
    proposed = {}
    for name in names:
        texts = answer.get(name.lower())
        texts = texts if isinstance(texts, list) else []
        proposed[name] = [tidy(text) for text in texts if isinstance(text, str)][:sentences]
    return proposed


def tidy(text):  # with ' and - for what models type instead
    return " ".join(text.translate(TYPOGRAPHY).split())


def ask(endpoint, model, prompt, key="", timeout=600, tries=8, wait=2):
    """The reply to a prompt of a model behind an OpenAI-compatible chat endpoint.

    What may pass (429, 5xx, time-outs, lost connections, half an answer) is asked again after wait,
    2 wait, 4 wait ... seconds, or as Retry-After says. Raises ConnectionError if that is no help.
    """
    key = "".join(key.split())  # urllib's complaint about a line break in a header would show it
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": prompt}]}).encode()
    headers = {"Content-Type": "application/json", "User-Agent": "hlss"}
    request = urllib.request.Request(endpoint.rstrip("/") + "/chat/completions", body, headers)
    if key:  # unredirected: a redirect must not carry it elsewhere
        request.add_unredirected_header("Authorization", f"Bearer {key}")
    for attempt in range(tries):
        status = 0
        pause = min(wait * 2**attempt, 60)
        try:
            try:
                response = urllib.request.urlopen(request, timeout=timeout)
            except urllib.error.HTTPError as error:
                response = error  # a response all the same
            with response:
                status = response.status
                text = response.read().decode()
            if status == 200:
                content = json.loads(text)["choices"][0]["message"]["content"]
                return content if isinstance(content, str) else ""
            reason = f"HTTP {status} {text[:300]}"
            after = response.headers.get("Retry-After", "")
            pause = min(int(after), 600) if after.isdecimal() else pause
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            reason = f"{type(error).__name__} {error}"
        reason = f"{endpoint}: {reason.replace(key, '***') if key else reason}"
        if attempt + 1 == tries or (200 < status < 500 and status not in (408, 429)):
            raise ConnectionError(f"{reason} (request {attempt + 1} of at most {tries})")
        tqdm.write(f"{reason}: again in {pause} s")
        time.sleep(pause)


def generate(
    path, answer, tissue=None, levels=LEVELS, attributes=128, sentences=4, batch=8, tokenizer=None
):
    """Whether a bank file is whole, after a model (answer: prompt -> reply) wrote it or went on.

    The file is saved after every reply. Raises ValueError for a file about another tissue,
    RuntimeError when four replies in a row bring nothing.
    """
    name = os.path.basename(path).removesuffix(".json")
    bank = {"name": name, "tissue": tissue, "levels": {level: {} for level in LEVELS}}
    if os.path.exists(path):
        bank = read_bank(path, partial=True)
    for level in levels:
        bank["levels"].setdefault(level, {})
        if level not in SHOWS | bank.get("shows", {}):
            line = f'"shows": {{"{level}": "one region at low power: ..."}}'
            raise ValueError(f"{path} must say what a {level} shows, as {line}")
    if not bank.get("tissue"):
        raise ValueError(f"{path} says no tissue: name one with --tissue, or in the file")
    if tissue not in (None, bank["tissue"]):
        raise ValueError(f"{path} is about {bank['tissue']!r}, not {tissue!r}: name another --out")
    idle = 0  # replies in a row that brought nothing
    done = sum(1 + bool(said) for level in levels for said in bank["levels"][level].values())
    bar = tqdm(total=2 * attributes * len(levels), initial=done, leave=False)
    while step := next_prompt(bank, levels, attributes, sentences, batch):
        level, names, prompt = step
        bar.set_description(f"{level} {'sentences' if names else 'names'}")
        taken = take_reply(bank, level, names, answer(prompt), attributes, sentences, tokenizer)
        bar.update(taken)
        if next_prompt(bank, levels, attributes, sentences, batch) is None:
            del bank["refused"]
        write_whole(path, lambda file: file.write(f"{json.dumps(bank, indent=1)}\n".encode()))
        idle = 0 if taken else idle + 1
        if idle == 4:
            reason = f"{path}: four replies in a row brought nothing. Refused:"
            remedy = "Take a better model or a smaller --batch, or edit the file."
            raise RuntimeError("\n".join([reason, *bank["refused"], remedy]))
    bar.close()
    return next_prompt(bank, bank["levels"], attributes, sentences) is None


# ---------------------------------------------------------------------------------- the commands


def run_check(args):
    bank = read_bank(args.bank)
    tokenizer = Tokenizer(read_merges(args.vocab)) if args.vocab else None
    findings, problems = check_bank(bank, args.attributes, tokenizer, sentences=args.sentences)
    print("\n".join([*findings, *problems]))
    raise SystemExit(f"{args.bank}: {len(problems)} problems" if problems else 0)


def run_generate(args):
    tokenizer = Tokenizer(read_merges(args.vocab)) if args.vocab else None
    answer = functools.partial(ask, args.endpoint, args.model, key=os.getenv("OPENAI_API_KEY", ""))
    counts = (args.attributes, args.sentences, args.batch)
    try:
        whole = generate(args.bank, answer, args.tissue, args.levels, *counts, tokenizer)
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"{error}\nThe same command goes on from {args.bank}") from error
    if whole:
        run_check(args)
    print(f"{args.bank} is not whole yet: the same command without --levels goes on with it")


def run_encode(args):
    state = load_clip(args.clip, args.activation)
    bank = read_bank(args.bank)
    _, vectors = open_bank(args.bank, state, args.vocab, bank["levels"])
    if args.rotate is not None:
        vectors = rotate(vectors, args.rotate)
    save_bank(args.out, bank, vectors, args.rotate)
    shapes = ", ".join(f"{level} {tuple(t.shape)}" for level, t in vectors.items())
    print(f"{args.out}, {args.clip}, {state['activation']}: {shapes}")


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(dest="command", required=True)

    flag = commands.add_parser("check", help="measure a bank file").add_argument
    flag("bank", help="a bank file (JSON)")
    flag("--attributes", type=int, help="how many each level must have (the paper: 128)")
    flag("--sentences", type=int, help="how many each attribute must have (the paper: 4)")
    flag("--vocab", help="count tokens by: bpe_simple_vocab_16e6.txt.gz of CLIP, or 'bytes' (demo)")

    flag = commands.add_parser("generate", help="have a language model write it").add_argument
    flag("--out", dest="bank", default="bank.json", help="the bank file, new or to be finished")
    flag("--tissue", help='what the images show, for instance "H&E of colorectal cancer"')
    flag("--endpoint", default="", help="an OpenAI-compatible API; OPENAI_API_KEY holds its key")
    flag("--model", help="the model's name there")
    flag("--levels", nargs="+", default=LEVELS, help="only these levels")
    flag("--attributes", type=int, default=128, help="how many each level gets (the paper: 128)")
    flag("--sentences", type=int, default=4, help="how many each attribute gets (the paper: 4)")
    flag("--batch", type=int, default=8, help="attributes a request; fewer if replies are cut off")
    flag("--vocab", help="count tokens as check does")

    flag = commands.add_parser("encode", help="a bank file and a CLIP -> bank.pt").add_argument
    flag("bank", help="a bank file (JSON)")
    flag("--clip", required=True, help=f"a CLIP with a text tower: a file, or {', '.join(CLIPS)}")
    flag("--activation", choices=ACTIVATIONS, help="of the CLIP, where its file does not say it")
    flag("--vocab", help="bpe_simple_vocab_16e6.txt.gz of CLIP (default: open_clip's, a download)")
    seed = "for a control without meaning: turn all vectors by a random rotation of this SEED"
    flag("--rotate", type=int, metavar="SEED", help=seed)
    flag("--out", default="bank.pt", help="file to write")
    args = parser.parse_args()
    if args.command == "generate" and not (args.model and re.match("https?://", args.endpoint)):
        parser.error("generate needs --endpoint http://... and --model")
    commands = {"check": run_check, "generate": run_generate, "encode": run_encode}
    commands[args.command](args)


if __name__ == "__main__":
    with user_errors():
        main()
