"""What a program can measure about a bank's sentences: counts, lengths, duplicates, boilerplate.

`python describe.py check BANK` prints it, and `generate` asks again for what does not pass.
"""

import html
import re
from collections import Counter
from itertools import combinations


def words_of(text):
    return re.findall(r"[a-z0-9]+", text.lower())


# What does not count in a comparison; what no image of tissue shows; what needs a stain to be seen.
STOP_WORDS = words_of("""a an the of and or in on with to is are at by from as that this its it be
their than while for into over through each where which no not but have has within across between
around""")
INVISIBLE = re.compile(
    r"(?i)\b(ph|acidity|(mi(cro-?)?)?rnas?|dna|gen(e|es|etic\w*|om\w*)|muta\w*|wild-?type|"
    r"methyl\w*|idh\w*|egfr|tert|1p/?19q|codelet\w*|ki-?67|mib-?1|p53|gfap|\w*kines?|interleukins?|"
    r"receptors?|hormon\w*|enzym\w*|antibod\w*|immuno(histo|stain)\w*|serum|oxygen\w*|hypoxi\w*|"
    r"metaboli\w*|glucose|signal+ing|pathway|expression|biomarkers?|prognos\w*|survival|outcome|"
    r"recurren\w*|therap\w*|treat\w*|symptom\w*|headaches?|seizures?|age|sex|male|female|smok\w*|"
    r"mri|radiolog\w*|enhanc\w*|temperature|electr\w*)\b"
)
STAIN_WORDS = re.compile(
    r"(?i)\b(pink\w*|purple\w*|blue\w*|violet|magenta|red(dish)?|\w*eosin\w*|\w*sophil\w*|"
    r"ha?ematoxylin\w*|h(yper|ypo)chroma\w*|stain\w*|h&e|colou?r\w*)\b"
)
CONTEXT = 77  # tokens that CLIP's text tower reads


def content_of(text):
    return set(words_of(text)).difference(STOP_WORDS)


def frames_of(text):  # all runs of three words, each once: what boilerplate is made of
    words = words_of(text)
    return dict.fromkeys(" ".join(run) for run in zip(words, words[1:], words[2:]))


def is_plain(text):  # printable ASCII without HTML entities: all tokenizers read it alike
    entities = any(html.unescape(form) != form for form in (text, text.lower()))
    return text.isascii() and text.isprintable() and not entities


def faults_of_text(entry, tokens, unseen):
    """What is wrong with a name, (level, name), or a sentence, (level, name, sentence)."""
    text, is_name = entry[-1], len(entry) == 2
    length = len(words_of(text))
    rules = [
        (not is_plain(text), "not ASCII"),
        (tokens > CONTEXT, f"{tokens} tokens, over {CONTEXT}"),
        (is_name and not 1 <= length <= 8, "a name has 1 to 8 words"),
        (not is_name and length < 6, "under 6 words"),
        (not is_name and length > 40, "over 40 words"),  # about 60 tokens, when none are counted
        (not is_name and len(content_of(text) - content_of(entry[1])) < 4, "restates its name"),
    ]
    broken = [message for is_broken, message in rules if is_broken]
    found = {message: pattern.search(text) for message, pattern in unseen.items()}
    return broken + [f"{message} {hit.group()!r}" for message, hit in found.items() if hit]


def faults_of_counts(levels, attributes, sentences):
    """Problems, here and below: {line to print: [(level, name) that it concerns, ...]}."""
    problems = {}
    for level, names in levels.items():
        if attributes and len(names) != attributes:
            problems[f"{level}: {len(names)} attributes, not {attributes}"] = []
        for name, said in names.items():
            if len(said) != sentences:
                line = f"{level} / {name}: {len(said)} sentences, not {sentences}"
                problems[line] = [(level, name)]
    return problems


def near_duplicates(kind, entries, threshold):
    """Problems: pairs of names, or of sentences, that use much the same words."""
    problems = {}
    contents = [(entry, content_of(entry[-1])) for entry in entries]
    for (one, a), (other, b) in combinations(contents, 2):
        shared = len(a & b)
        overlap = shared / max(1, len(a) + len(b) - shared)  # words in both / in either
        if overlap >= threshold:
            line = f"{kind} alike ({overlap:.2f}): {' / '.join(one)} ~ {' / '.join(other)}"
            problems[line] = [one[:2], other[:2]]
    return problems


def check_bank(bank, attributes=None, tokenizer=None, sentences=None):
    """What a program can measure about a bank: lines to print, and problems (none if it passes).

    attributes: how many each level must have (default: any number). sentences: how many each
    attribute must have (default: the commonest number). tokenizer: counts tokens; each text must
    fit CLIP's context.
    """
    levels = bank["levels"]
    named = [(level, name) for level in levels for name in levels[level]]
    said = [(*entry, text) for entry in named for text in levels[entry[0]][entry[1]]]
    if sentences is None:
        sentences = Counter(len(levels[level][name]) for level, name in named).most_common(1)[0][0]
    problems = faults_of_counts(levels, attributes, sentences)
    problems |= near_duplicates("names", named, 0.75)
    problems |= near_duplicates("sentences", said, 0.6)

    unseen = {"no image shows": INVISIBLE}
    if "raman" in bank.get("tissue", "").lower():
        unseen["unstained tissue has no"] = STAIN_WORDS
    longest = 0
    for entry in named + said:
        counted = tokenizer and is_plain(entry[-1])
        tokens = len(tokenizer.encode(entry[-1])) + 2 if counted else 0  # with start and end
        longest = max(longest, tokens)
        for message in faults_of_text(entry, tokens, unseen):
            problems[f"{message}: {' / '.join(entry[:2])}: {entry[-1]}"] = [entry[:2]]

    frames = Counter(frame for *_, text in said for frame in frames_of(text))
    for frame, count in frames.items():
        if count > max(16, 0.1 * len(said)):  # a small bank has no boilerplate
            line = f"{frame!r} occurs in {count / len(said):.0%} of the sentences"
            problems[line] = [entry[:2] for entry in said if frame in frames_of(entry[-1])]
    frame, count = frames.most_common(1)[0] if frames else ("none", 0)
    findings = [
        f"{bank.get('name', '?')} ({bank.get('tissue', '?')}): {len(said)} sentences",
        *(f"  {at}: {len(levels[at])} attributes x {sentences} sentences" for at in levels),
        f"  commonest three words: {frame!r} in {count / max(1, len(said)):.1%} of the sentences",
        f"  longest sentence: {longest} tokens of {CONTEXT}" if longest else "  tokens not counted",
    ]
    return findings, problems
