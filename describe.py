"""The language: a bank of sentences, its check, the model that writes one, CLIP's tokenizer, and the bank as vectors.

    python describe.py check attributes/demo.json        measure what a program can, fail with the offending lines
    python describe.py generate --tissue "H&E of colorectal cancer" --endpoint http://localhost:11434/v1 --model NAME
                                                         have a language model write bank.json; again to go on
    python describe.py encode attributes/demo.json --clip runs/demo/clip.pt --out bank.pt
    python describe.py demo runs/demo/clip.pt            train the demo's CLIP on captioned demo tissue (a minute)

A bank file is JSON: {"name", "tissue", "levels": {"patch": {attribute: [sentences]}, "slide": {...}, "patient":
{...}}}, and optionally "truth": {attribute: "+factor" or "-factor"} where the factors behind the images are known.
"""

import argparse
import gzip
import html
import http.client
import importlib.util
import itertools
import json
import os
import re
import time
import urllib.error
import urllib.request
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from losses import LEVELS
from model import ACTIVATIONS, text_tower
from tools.weights import CLIPS, load_clip, published

START, END = "<start_of_text>", "<end_of_text>"


# ------------------------------------------------------------------------------------------------------------ the bank


def read_bank(path, partial=False):
    """A bank file -> its dict. Raises ValueError naming the file and what is wrong with its form; `check` measures its
    content. partial: while it is being written, a level or an attribute may be empty."""

    def unique(pairs):  # JSON would silently keep the last of two attributes of one name
        if repeated := [
            name for name, times in Counter(name for name, _ in pairs).items() if times > 1
        ]:
            raise ValueError(f"{path}: {repeated[0]!r} stands twice in one level")
        return dict(pairs)

    try:
        with open(path, encoding="utf-8") as file:
            bank = json.load(file, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    levels = bank.get("levels") if isinstance(bank, dict) else None
    if not isinstance(levels, dict) or set(levels) != set(LEVELS):
        raise ValueError(f'{path}: "levels" must hold {", ".join(LEVELS)} and nothing else')
    for level, attributes in levels.items():
        if not isinstance(attributes, dict) or not (attributes or partial):
            raise ValueError(
                f"{path}: the level {level} must be {{attribute: [sentences]}} and not empty"
            )
        for name, sentences in attributes.items():
            if (
                not isinstance(sentences, list)
                or not all(isinstance(s, str) for s in sentences)
                or (not sentences and not partial)
            ):
                raise ValueError(f"{path}: {level} / {name}: must be a list of sentences")
    return bank


STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """a an the of and or in on with to is are at by from as that this its it be
    their than while for into over through each where which no not but have has within across between around""",
    )
)
INVISIBLE = re.compile(
    r"\b(ph|acidity|(mi(cro-?)?)?rnas?|dna|gen(e|es|etic\w*|om\w*)|muta\w*|wild-?type|methyl\w*|idh\w*|egfr|tert|1p/?19q|"
    r"codelet\w*|ki-?67|mib-?1|p53|gfap|\w*kines?|interleukins?|receptors?|hormon\w*|enzym\w*|antibod\w*|"
    r"immuno(histo|stain)\w*|serum|oxygen\w*|hypoxi\w*|metaboli\w*|glucose|signal+ing|pathway|expression|biomarkers?|"
    r"prognos\w*|survival|outcome|recurren\w*|therap\w*|treat\w*|symptom\w*|headaches?|seizures?|age|sex|male|female|"
    r"smok\w*|mri|radiolog\w*|enhanc\w*|temperature|electr\w*)\b",
    re.I,
)
STAIN_WORDS = re.compile(
    r"\b(pink\w*|purple\w*|blue\w*|violet|magenta|red(dish)?|\w*eosin\w*|\w*sophil\w*|"
    r"ha?ematoxylin\w*|h(yper|ypo)chroma\w*|stain\w*|h&e|colou?r\w*)\b",
    re.I,
)


def _words(text):
    return re.findall(r"[a-z0-9]+", text.lower())


def _frames(text):
    return {" ".join(_words(text)[i : i + 3]) for i in range(len(_words(text)) - 2)}


def _plain(text):
    """Printable ASCII without HTML entities: what every tokenizer reads alike."""
    return (
        text.isascii()
        and text.isprintable()
        and all(html.unescape(t) == t for t in (text, text.lower()))
    )


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


def check_bank(bank, attributes=None, tokenizer=None, context=77, sentences=None, only=None):
    """Everything about a bank that a program can measure. Returns (lines of findings, {line of a problem: the (level,
    attribute)s it is about}); no problems: it passes.

    attributes, sentences: how many each level and each attribute must have. tokenizer: to count tokens; a sentence
    must fit the context with its start and end. only: the (level, attribute) whose texts are read one by one, if the
    others were before.
    """
    named = [(level, name) for level in LEVELS for name in bank["levels"][level]]
    said = [(level, name, s) for level, name in named for s in bank["levels"][level][name]]
    if sentences is None:
        sentences = Counter(len(bank["levels"][level][name]) for level, name in named).most_common(
            1
        )[0][0]
    problems = {
        f"{level}: {len(bank['levels'][level])} attributes, not {attributes}": []
        for level in LEVELS
        if attributes and len(bank["levels"][level]) != attributes
    }
    for level, name in named:
        number = len(bank["levels"][level][name])
        if number != sentences:
            problems[f"{level} / {name}: {number} sentences, not {sentences}"] = [(level, name)]
    for i, j, overlap in _alike([name for _, name in named], 0.75):
        line = f"names alike ({overlap:.2f}): {' / '.join(named[i])} ~ {' / '.join(named[j])}"
        problems[line] = [named[i], named[j]]
    for i, j, overlap in _alike([s for *_, s in said], 0.6):
        line = f"sentences alike ({overlap:.2f}): {' / '.join(said[i])} ~ {' / '.join(said[j])}"
        problems[line] = [said[i][:2], said[j][:2]]
    longest, raman = 0, "raman" in bank.get("tissue", "").lower()
    for level, name, text in [
        *((*place, place[1]) for place in named),
        *said,
    ]:  # names are looked at as sentences are
        if only not in (None, (level, name)):
            continue
        wrong, length = [], len(_words(text))
        if not _plain(text):
            wrong.append("not ASCII")
        elif tokenizer:
            tokens = len(tokenizer.encode(text)) + 2
            longest = max(longest, tokens)
            wrong += [f"{tokens} tokens, at most {context}"] if tokens > context else []
        if text == name:
            wrong += ["a name has 1 to 8 words"] if not 1 <= length <= 8 else []
        else:
            wrong += ["under 6 words"] if length < 6 else []
            wrong += (
                ["over 40 words"] if length > 40 else []
            )  # some 60 tokens, for when they are not counted
            wrong += ["restates its name"] if len(_content(text) - _content(name)) < 4 else []
        wrong += (
            [f"no image shows {unseen.group()!r}"] if (unseen := INVISIBLE.search(text)) else []
        )
        wrong += (
            [f"unstained tissue has no {s.group()!r}"]
            if raman and (s := STAIN_WORDS.search(text))
            else []
        )
        problems |= {f"{what}: {level} / {name}: {text}": [(level, name)] for what in wrong}
    frames = Counter(frame for *_, s in said for frame in _frames(s))
    for frame, count in frames.items():
        if count > max(16, 0.1 * len(said)):  # a few sentences have no boilerplate yet
            line = f"{frame!r} stands in {count / len(said):.0%} of the sentences"
            problems[line] = [(level, name) for level, name, s in said if frame in _frames(s)]
    frame, count = frames.most_common(1)[0] if frames else ("none", 0)
    found = [
        f"{bank.get('name', '?')} ({bank.get('tissue', '?')}): {len(said)} sentences",
        *(
            f"  {level}: {len(bank['levels'][level])} attributes x {sentences} sentences"
            for level in LEVELS
        ),
        f"  commonest three words: {frame!r} in {count / max(1, len(said)):.1%} of the sentences",
        f"  longest sentence: {longest} tokens of {context}"
        if tokenizer
        else "  tokens not counted",
    ]
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
        symbols = (
            bytes_
            + [b + "</w>" for b in bytes_]
            + ["".join(pair) for pair in merges]
            + [START, END]
        )
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
                width = 2 if tuple(symbols[i : i + 2]) == best else 1
                merged.append("".join(symbols[i : i + width]))
                i += width
            symbols = merged
        return symbols

    def encode(self, text):
        """Text -> token ids, without start and end. Raises ValueError for what may be read otherwise elsewhere: other
        characters than printable ASCII, and HTML entities."""
        plain = html.unescape(html.unescape(text))
        for found in re.findall(r"[^\t\n\f\r -~]|&#?\w+;", f"{text}\n{plain}"):
            entity = found.lower() if found.isupper() else found
            if found[0] != "&" or html.unescape(entity) != entity:
                raise ValueError(
                    f"only ASCII can be tokenized, and no HTML entity: not the {found!r} in {text!r}"
                )
        text = " ".join(plain.split()).lower()
        words = re.findall(
            rf"{START}|{END}|'s|'t|'re|'ve|'m|'ll|'d|[a-z]+|[0-9]|[^\sa-z0-9]+", text
        )
        return [
            self.vocabulary[s]
            for word in words
            for s in ([word] if word in (START, END) else self.split(word))
        ]

    def __call__(self, texts, context):
        """Texts -> [n, context] int64, zero-padded; what is too long is cut, its end token kept."""
        tokens = torch.zeros(len(texts), context, dtype=torch.long)
        for row, text in zip(tokens, texts):
            ids = [self.vocabulary[START], *self.encode(text)][: context - 1] + [
                self.vocabulary[END]
            ]
            row[: len(ids)] = torch.tensor(ids)
        return tokens


VOCABULARY = (
    "https://github.com/openai/CLIP/raw/main/clip/bpe_simple_vocab_16e6.txt.gz",
    "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a",
)


def read_merges(path=""):
    """The merges in CLIP's bpe_simple_vocab_16e6.txt.gz: all that its 49,408 ids leave room for. Without a path, the
    copy of an installed open_clip, or a download. Raises ValueError for another file."""
    if not path and (installed := importlib.util.find_spec("open_clip")):
        copy = os.path.join(os.path.dirname(installed.origin), os.path.basename(VOCABULARY[0]))
        path = copy if os.path.exists(copy) else ""
    with gzip.open(published(*VOCABULARY, path), "rt", encoding="utf-8") as file:
        return [tuple(line.split()) for line in file.read().split("\n")[1 : 49408 - 512 - 2 + 1]]


def tokenizer_of(tower, vocab=""):
    """The Tokenizer that a text tower was trained with: CLIP's, or the demo's of bytes. ValueError for neither."""
    tokenizer = Tokenizer(read_merges(vocab) if tower.vocabulary > 514 else ())
    if len(tokenizer.vocabulary) != tower.vocabulary:
        raise ValueError(
            f"this text tower has {tower.vocabulary} tokens, CLIP's {len(tokenizer.vocabulary)}"
        )
    return tokenizer


@torch.no_grad()
def encode_bank(bank, tower, tokenizer, batch=64):
    """Sentences -> one unit vector an attribute: t = norm(mean_j norm(TextEncoder(sentence_j))).

    bank: as `read_bank`. tower: frozen text tower. Returns {level: [K_l, D]} in the order of the file. Memory is that
    of one batch of sentences.
    """
    attributes = [sentences for level in LEVELS for sentences in bank["levels"][level].values()]
    texts = [s for sentences in attributes for s in sentences]
    encoded = []
    for start in tqdm(range(0, len(texts), batch), desc="bank", unit="batch", leave=False):
        tokens = tokenizer(texts[start : start + batch], tower.context)
        tokens = tokens[
            :, : int(tokens.argmax(dim=1).max()) + 1
        ]  # to the last end token: more padding only costs time
        encoded.append(F.normalize(tower(tokens), dim=1))
    means = [
        part.mean(dim=0)
        for part in torch.cat(encoded).split([len(sentences) for sentences in attributes])
    ]
    vectors = F.normalize(torch.stack(means), dim=1).split(
        [len(bank["levels"][level]) for level in LEVELS]
    )
    return dict(zip(LEVELS, vectors))


def open_bank(path, state, vocab=""):
    """A bank file, encoded with the text tower of a CLIP's state dict, or a bank.pt, as it is -> {level: [names]},
    {level: [K_l, D]}. vocab: a path for `read_merges`; a CLIP of bytes, as the demo's, needs none."""
    if path.endswith(".pt"):
        saved = torch.load(path, weights_only=True)
        return saved["attributes"], saved["vectors"]
    bank, tower = read_bank(path), text_tower(state)
    vectors = encode_bank(bank, tower, tokenizer_of(tower, vocab))
    return {level: list(bank["levels"][level]) for level in LEVELS}, vectors


def save_bank(path, bank, vectors):
    """Write bank.pt: {"name", "attributes": {level: [names]}, "vectors": {level: [K_l, D]}}."""
    attributes = {level: list(bank["levels"][level]) for level in LEVELS}
    torch.save({"name": bank["name"], "attributes": attributes, "vectors": vectors}, path)


# --------------------------------------------------------------------------------------- the bank, by a language model

SHOWS = {
    "patch": "one high-power field: cells, nuclei, cytoplasm, matrix and the walls of single vessels",
    "slide": "one whole slide at low power: architecture, density, vessels, necrosis, borders, infiltration",
    "patient": "all slides of a patient side by side: how they differ, overall grade, growth and extent, what recurs",
}
PROMPT = """You are a pathologist who describes what {tissue} looks like, so that an image model can learn from it.
{task}

Rules:
- Only what an eye sees in these images at that magnification: no molecules, genes, laboratory values, clinical facts,
  treatment or outcome; colours only where there is a stain. Plain ASCII.
{refused}
Reply with {form} and nothing else."""
NAMES = """Name {count} attributes that can be seen in {shows}.
Each is 2 to 6 words in lower case. Cover normal and abnormal, common and rare, in contrasts where there is one (sparse
nuclei, crowded nuclei). No two mean the same, and none repeats or rephrases one of these, which are taken:
{listed}"""
SENTENCES = """For each attribute below write {count} sentences on how it looks in {shows}.
They state the same finding in different ways, in this order: its form; a comparison with a related or opposite
finding; its arrangement in space; a plain summary for a lay reader. Each has 8 to 25 words and does not lean on those
of the attribute's name. No two begin alike or share a frame such as "the image shows". The attributes:
{listed}"""
PLAIN = str.maketrans(
    "\u2018\u2019\u201c\u201d\u2010\u2011\u2013\u2014", "''''----"
)  # what models type for ' and -


def next_prompt(bank, levels=LEVELS, attributes=128, sentences=4, batch=8):
    """What to ask next: (level, attributes to write sentences for or None to ask for attributes, prompt); None when
    all is written. It depends on the bank alone, so that an interrupted run goes on where it stopped."""
    for level in levels:
        here = bank["levels"][level]
        names = [name for name in here if not here[name]][:batch]
        if len(here) < attributes:
            names, count = None, min(batch, attributes - len(here))
            listed = "\n".join(
                f"{at}: {', '.join(taken) or 'none'}" for at, taken in bank["levels"].items()
            )
            task = NAMES.format(count=count, shows=SHOWS[level], listed=listed)
            form = f"a JSON array of {count} strings"
        elif names:
            task = SENTENCES.format(count=sentences, shows=SHOWS[level], listed="\n".join(names))
            form = f"a JSON object {{attribute as spelled above: [{sentences} strings]}}"
        else:
            continue
        refused = "".join(
            f"- Refused in your last reply: {line}\n" for line in bank.get("refused", [])[:30]
        )
        return (
            level,
            names,
            PROMPT.format(tissue=bank["tissue"], task=task, refused=refused, form=form),
        )
    return None


def take_reply(bank, level, names, reply, attributes=128, sentences=4, tokenizer=None):
    """Move what passes `check_bank` from a reply into the bank, one attribute after the other, and note in
    bank["refused"] what does not. level, names: as asked by `next_prompt`. Returns how many attributes were taken."""
    here, taken, refused = bank["levels"][level], 0, []
    reply = reply.rpartition("</think>")[2]
    first, last = "{}" if names else "[]"
    try:  # code fences and talk stand outside the outermost brackets
        answer = json.loads(reply[reply.find(first) : reply.rfind(last) + 1])
    except (ValueError, RecursionError):
        answer, refused = [], [f"not the JSON asked for: {reply[:80]!r}"]
    if names:
        answer = {name.strip().lower(): texts for name, texts in dict(answer).items()}
        answer = {name: answer.get(name.lower()) for name in names if not refused}
    else:
        answer = {
            " ".join(name.translate(PLAIN).lower().split()): []
            for name in answer
            if isinstance(name, str)
        }
        refused += [f"{level} / {name}: is taken" for name in answer if name in here]
        answer = dict(
            [item for item in answer.items() if item[0] not in here][: attributes - len(here)]
        )
    for name, texts in answer.items():
        texts = texts if isinstance(texts, list) else []
        here[name] = [" ".join(s.translate(PLAIN).split()) for s in texts if isinstance(s, str)][
            :sentences
        ]
        number = sentences if names else 0
        _, problems = check_bank(bank, tokenizer=tokenizer, sentences=number, only=(level, name))
        found = [line for line, places in problems.items() if (level, name) in places]
        if found and names:
            here[name] = []
        elif found:
            del here[name]
        refused += found
        taken += not found
    bank["refused"] = refused
    return taken


def ask(endpoint, model, prompt, key="", timeout=600, tries=8, wait=2):
    """A prompt -> the reply of a model behind an OpenAI-compatible chat endpoint.

    What may pass (429, 5xx, time-outs, lost connections, half an answer) is asked again after wait, 2 wait, 4 wait ...
    seconds, or what Retry-After says. Raises ConnectionError when that has not helped or cannot help.
    """
    key = "".join(
        key.split()
    )  # urllib's complaint about a line break in a header would show the key
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": prompt}]}).encode()
    headers = {"Content-Type": "application/json", "User-Agent": "hlss"}
    request = urllib.request.Request(endpoint.rstrip("/") + "/chat/completions", body, headers)
    if key:
        request.add_unredirected_header(
            "Authorization", f"Bearer {key}"
        )  # a redirect must not carry it elsewhere
    for attempt in itertools.count():
        pause, status = min(wait * 2**attempt, 60), 0
        try:
            try:
                response = urllib.request.urlopen(request, timeout=timeout)
            except urllib.error.HTTPError as error:
                response = error  # a response all the same
            with response:
                status, text = response.status, response.read().decode()
            if status == 200:
                content = json.loads(text)["choices"][0]["message"]["content"]
                return content if isinstance(content, str) else ""
            reason, after = f"HTTP {status} {text[:300]}", response.headers.get("Retry-After", "")
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
    """Have a bank file written, or go on with it; it is saved after every reply. Returns whether it is whole.

    answer: prompt -> reply, or None to stop there. Raises ValueError for a file about another tissue, RuntimeError
    when four replies in a row bring nothing.
    """
    name = os.path.basename(path).removesuffix(".json")
    bank = {"name": name, "tissue": tissue, "levels": {at: {} for at in LEVELS}}
    bank = read_bank(path, partial=True) if os.path.exists(path) else bank
    if not bank.get("tissue"):
        raise ValueError(f"{path} says no tissue: name one with --tissue, or in the file")
    if tissue not in (None, bank["tissue"]):
        raise ValueError(f"{path} is about {bank['tissue']!r}, not {tissue!r}: name another --out")
    counts, idle = (attributes, sentences), 0
    done = sum(1 + bool(texts) for level in levels for texts in bank["levels"][level].values())
    with tqdm(total=2 * attributes * len(levels), initial=done, leave=False) as bar:
        while step := next_prompt(bank, levels, *counts, batch):
            level, names, prompt = step
            bar.set_description(f"{level} {'sentences' if names else 'names'}")
            if (reply := answer(prompt)) is None:
                break
            taken = take_reply(bank, level, names, reply, *counts, tokenizer)
            if next_prompt(bank, levels, *counts, batch) is None:
                del bank["refused"]
            with open(path + ".part", "w", encoding="utf-8") as file:
                file.write(json.dumps(bank, indent=1) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(path + ".part", path)
            bar.update(taken)
            idle = 0 if taken else idle + 1
            if idle == 4:
                raise RuntimeError(
                    f"{path}: four replies in a row brought nothing. Take a better model or a smaller "
                    "--batch, or edit the file. Refused:\n" + "\n".join(bank["refused"])
                )
    return next_prompt(bank, LEVELS, *counts) is None


def run_generate(args, tokenizer, error):
    """`generate` as its flags say: by an endpoint, or one step by hand. Returns whether the bank is whole."""
    if args.from_reply:
        with open(args.from_reply, encoding="utf-8") as file:
            replies = [file.read()]
    elif not args.print_prompts and not (
        args.endpoint.startswith(("http://", "https://")) and args.model
    ):
        error("needs --endpoint http://... and --model, or --print-prompts, or --from-reply")

    def answer(prompt):
        if args.print_prompts:
            print(prompt)
            return None
        if args.from_reply:
            return replies.pop() if replies else None
        return ask(args.endpoint, args.model, prompt, os.environ.get("OPENAI_API_KEY", ""))

    try:
        whole = generate(
            args.bank,
            answer,
            args.tissue,
            args.levels,
            args.attributes,
            args.sentences,
            args.batch,
            tokenizer,
        )
    except (ConnectionError, RuntimeError, ValueError) as reason:
        raise SystemExit(
            f"{reason}\nThe same command goes on from what is in {args.bank}"
        ) from reason
    if not whole and not args.print_prompts:
        print(
            f"{args.bank} is not whole yet: --print-prompts shows what is asked next and what was refused"
        )
    return whole


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="measure a bank file, fail with the offending lines")
    check.add_argument("bank", help="a bank file (JSON)")
    check.add_argument(
        "--attributes", type=int, help="how many attributes each level must have (the paper: 128)"
    )
    check.add_argument(
        "--sentences", type=int, help="how many each attribute must have (the paper: 4)"
    )
    check.add_argument(
        "--vocab", help="count tokens: CLIP's bpe_simple_vocab_16e6.txt.gz, or 'bytes' (the demo's)"
    )
    write = commands.add_parser(
        "generate", help="have a language model write a bank file; run again to go on with it"
    )
    write.add_argument(
        "--out", dest="bank", default="bank.json", help="the bank file, made or gone on with"
    )
    write.add_argument(
        "--tissue", help='what the images show, for instance "H&E of colorectal cancer"'
    )
    write.add_argument(
        "--endpoint",
        default="",
        help="an OpenAI-compatible API, as http://localhost:11434/v1; the "
        "environment variable OPENAI_API_KEY holds its key, if it needs one",
    )
    write.add_argument("--model", help="the model's name there")
    write.add_argument(
        "--levels", nargs="+", choices=LEVELS, default=LEVELS, help="write these alone"
    )
    write.add_argument(
        "--attributes", type=int, default=128, help="how many each level gets (the paper: 128)"
    )
    write.add_argument(
        "--sentences", type=int, default=4, help="how many each attribute gets (the paper: 4)"
    )
    write.add_argument(
        "--batch", type=int, default=8, help="attributes a request; fewer if replies are cut off"
    )
    write.add_argument("--vocab", help="as for check")
    write.add_argument(
        "--print-prompts", action="store_true", help="print what is asked next, for use by hand"
    )
    write.add_argument(
        "--from-reply", metavar="FILE", help="read the reply to what --print-prompts printed"
    )
    encode = commands.add_parser("encode", help="a bank file and a CLIP -> bank.pt")
    encode.add_argument("bank", help="a bank file (JSON)")
    encode.add_argument(
        "--clip", required=True, help="a CLIP with a text tower: a file, or " + ", ".join(CLIPS)
    )
    encode.add_argument(
        "--activation", choices=ACTIVATIONS, help="of the CLIP, where its file does not say it"
    )
    encode.add_argument(
        "--vocab", help="CLIP's bpe_simple_vocab_16e6.txt.gz (default: open_clip's, or a download)"
    )
    encode.add_argument("--out", default="bank.pt", help="file to write")
    args = parser.parse_args()
    if args.command in ("check", "generate"):
        tokenizer = (
            Tokenizer(() if args.vocab == "bytes" else read_merges(args.vocab))
            if args.vocab
            else None
        )
        if args.command == "generate" and not run_generate(args, tokenizer, write.error):
            return
        found, problems = check_bank(
            read_bank(args.bank), args.attributes, tokenizer, sentences=args.sentences
        )
        print("\n".join([*found, *problems]))
        raise SystemExit(f"{args.bank}: {len(problems)} problems" if problems else 0)
    if args.command == "encode":
        state = load_clip(args.clip, args.activation)
        _, vectors = open_bank(args.bank, state, args.vocab)
        save_bank(args.out, read_bank(args.bank), vectors)
        print(
            f"{args.out}, {args.clip}, {state['activation']}: "
            + ", ".join(f"{level} {tuple(v.shape)}" for level, v in vectors.items())
        )


if __name__ == "__main__":
    main()
