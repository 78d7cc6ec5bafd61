"""`describe.py generate` against a stub of an OpenAI-compatible endpoint that misbehaves as real
ones do."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT

from describe import ask, generate, main, prompt_for, read_bank_file, take_reply
from losses import LEVELS
from tools.bank import check_bank

KEY = "sk-nobody-may-see-this"
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]


def word(number):
    """A different word for every number, so the stub never repeats itself."""
    return "".join(SYLLABLES[number // 70**place % 70] for place in (2, 1, 0))


class Model:
    """A language model that obeys every prompt, unless spoil(number, reply) changes its reply."""

    def __init__(self, spoil=lambda number, reply: reply):
        self.prompts, self.said, self.spoil = [], 0, spoil

    def words(self, number):
        self.said += number
        return " ".join(word(n) for n in range(self.said - number, self.said))

    def __call__(self, prompt):
        self.prompts.append(prompt)
        attributes = int(re.search(r"Name (\d+) attributes", prompt).group(1))
        sentences = int(re.search(r"Write (\d+) sentences", prompt).group(1))
        reply = {
            self.words(3): [self.words(9) for _ in range(sentences)] for _ in range(attributes)
        }
        return self.spoil(len(self.prompts), json.dumps(reply))


def respond(handler, status, content, **headers):
    handler.send_response(status)
    for name, value in {"Content-Length": len(content), **headers}.items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    handler.wfile.write(content)


@contextlib.contextmanager
def serve(handle):
    """Serves handle(handler) on 127.0.0.1. Yields its URL and the headers of each request."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            requests.append({"path": self.path, **self.headers})
            with contextlib.suppress(OSError):  # the client may have left
                handle(self)

        do_GET = do_POST

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()


def endpoint(model, faults=()):
    """Serves a model; the first requests meet faults instead: functions of the handler."""
    faults = list(faults)

    def handle(handler):
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        if faults:
            return faults.pop(0)(handler)
        message = {"content": model(body["messages"][-1]["content"])}
        respond(handler, 200, json.dumps({"choices": [{"message": message}]}).encode())

    return serve(handle)


def status(code, **headers):
    return lambda handler: respond(handler, code, f"not for {KEY}".encode(), **headers)


FAULTS = {
    "too many requests": status(429),
    "server error": status(500),
    "overloaded": status(503),
    "request time-out": status(408),
    "hang": lambda handler: time.sleep(5),
    "drop": lambda handler: handler.connection.shutdown(socket.SHUT_RDWR),
    "half": lambda handler: respond(handler, 200, b'{"choices": [', Content_Length=1000),
    "html": lambda handler: respond(handler, 200, b"<html>the proxy is tired</html>"),
    "empty": lambda handler: respond(handler, 200, b'{"choices": []}'),
}


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


# --------------------------------------------------------------------------------- the connection


@pytest.mark.parametrize("fault", FAULTS)
def test_a_temporary_failure_is_asked_again(fault):
    with endpoint(lambda prompt: "yes, " + prompt, [FAULTS[fault]] * 2) as (url, requests):
        assert ask(url + "/", "m", "please", timeout=0.3, pauses=(0, 0)) == "yes, please"
    assert [request["path"] for request in requests] == ["/v1/chat/completions"] * 3


def test_the_pauses_double(monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with endpoint(None, [status(503)] * 3) as (url, _), pytest.raises(ConnectionError, match="503"):
        ask(url, "m", "please")
    assert pauses == [2, 4]


@pytest.mark.parametrize("code", [400, 401, 404])
def test_a_lasting_failure_is_not_asked_again_and_the_key_is_not_shown(code):
    refused = pytest.raises(ConnectionError, match=rf"HTTP {code} not for \*\*\*$")
    with endpoint(None, [status(code)]) as (url, requests), refused:
        ask(url, "m", "please", key=KEY)
    assert [request["Authorization"] for request in requests] == [f"Bearer {KEY}"]


def test_a_redirect_does_not_carry_the_key_away():
    refused = pytest.raises(ConnectionError, match="404")
    with serve(status(404)) as (elsewhere, stolen):
        away = status(302, Location=elsewhere)
        with endpoint(None, [away]) as (url, _), refused:
            ask(url, "m", "please", key=KEY)
    assert len(stolen) == 1 and "Authorization" not in stolen[0]


# --------------------------------------------------------------------------------------- the bank


def written(path, model, tissue="H&E of nothing", **options):
    """The bank of a model that writes 6 attributes per level, 4 per request: two requests each."""
    generate(str(path), model, tissue, **{"attributes": 6, "batch": 4} | options)
    return read_bank_file(path)


def sizes(path):
    levels = read_bank_file(path, partial=True)["levels"]
    return [len(levels[level]) for level in LEVELS]


def test_an_obedient_model_writes_a_bank_that_passes(tmp_path):
    model = Model()
    bank = written(tmp_path / "bank.json", model)
    assert set(bank) == {"name", "tissue", "levels"}
    assert check_bank(bank, attributes=6, sentences=4)[1] == {}
    assert len(model.prompts) == 3 * 2
    assert os.listdir(tmp_path) == ["bank.json"]
    assert written(tmp_path / "bank.json", model=None) == bank, "a full bank asks nothing"


def test_a_prompt_names_the_tissue_and_all_attributes_that_are_taken(tmp_path):
    model = Model()
    levels = written(tmp_path / "bank.json", model)["levels"]
    taken = [*levels["patch"], *levels["slide"], *list(levels["patient"])[:4]]
    assert all(text in model.prompts[-1] for text in ["H&E of nothing", *taken])


def first(pattern, text, replies=1):
    """Spoils the first replies: text replaces the first match of the pattern."""
    return lambda number, reply: (
        reply if number > replies else re.sub(pattern, text, reply, count=1)
    )


NAME, SENTENCE = r'"[^"]*"(?=:)', r'(?<=\[)"[^"]*", '
SPOILED = {  # the complaint in the next prompt: how a reply is spoiled
    "not the JSON asked for": first(".*", "Sorry, no."),
    "not the JSON asked for: '{\"": first("]}$", ""),
    "not the JSON asked for: '{\"b": first(SENTENCE, '{"plain": "A rim of cells."}, '),
    "names alike (1.00)": first(NAME, f'"{word(41)} {word(40)} {word(39)}"'),  # of the second name
    "rim of cells: is taken": first(NAME, '"Rim of cells"', replies=2),
    "no image shows 'mirna'": first(NAME, '"raised miRNA"'),
    "a name has 1 to 8 words": first(NAME, '"one two three four five six seven eight nine"'),
    "3 sentences, not 4": first(SENTENCE, ""),
    "sentences alike (1.00)": first(r'("[^"]*"), "[^"]*"', r"\1, \1"),
    "under 6 words": first(SENTENCE, '"Too short for anyone.", '),
    "over 40 words": first(SENTENCE, f'"{" ".join(map(word, range(9000, 9041)))}", '),
    "not ASCII": first(SENTENCE, '"A na\u00efve cell has neither a rim nor a nucleus.", '),
    "no image shows 'cytokines'": first(SENTENCE, '"Spots of cytokines are strewn all over.", '),
}


@pytest.mark.parametrize("complaint", SPOILED)
def test_what_the_check_refuses_is_asked_again_with_the_reason(complaint, tmp_path):
    model = Model(SPOILED[complaint])
    bank = written(tmp_path / "bank.json", model)
    assert check_bank(bank, attributes=6, sentences=4)[1] == {}
    complained = [number for number, prompt in enumerate(model.prompts, 1) if complaint in prompt]
    assert complained in ([2], [3]), "asked once with the reason, and not later"


def test_boilerplate_is_refused_once_it_shows():
    """Up to 16 sentences may share a frame; from the 17th on, it is refused."""
    bank = {"tissue": "H&E", "levels": {level: {} for level in LEVELS}}
    reply = json.loads(Model()(prompt_for(bank, "patch", 6, 4)))
    framed = {name: ["The image shows " + text for text in said] for name, said in reply.items()}
    refused = take_reply(bank, "patch", json.dumps(framed), 6, 4)
    assert len(bank["levels"]["patch"]) == 4 and len(refused) == 2
    assert all("'the image shows' occurs in" in line for line in refused)


@pytest.mark.parametrize("dress", ["```json\n%s\n```", "Sure!\n%s\nMore?", "<think>{1}</think>%s"])
def test_fences_talk_and_thoughts_around_the_json_do_not_matter(dress, tmp_path):
    model = Model(lambda number, reply: dress % reply)
    written(tmp_path / "bank.json", model)
    assert len(model.prompts) == 6


def test_typographic_quotes_and_what_is_too_much_are_mended_not_refused(tmp_path):
    curly = "The cell\u2019s \u201crim\u201d is thin \u2013 almost unseen by anyone."
    model = Model(lambda number, reply: reply.replace("[", f'["{curly}", ', number == 1))
    bank = written(tmp_path / "bank.json", model, batch=9)
    assert len(model.prompts) == 3
    first = next(iter(bank["levels"]["patch"].values()))
    assert first[0] == "The cell's 'rim' is thin - almost unseen by anyone." and len(first) == 4


def test_more_attributes_than_the_level_needs_are_left(tmp_path):
    helpful = Model()
    written(tmp_path / "bank.json", lambda prompt: helpful(prompt.replace("Name 4", "Name 9")))
    assert sizes(tmp_path / "bank.json") == [6, 6, 6] and len(helpful.prompts) == 3


def test_a_model_that_never_obeys_is_given_up_and_another_one_goes_on(tmp_path):
    model = Model(lambda number, reply: "no" if number > 2 else reply)
    with pytest.raises(RuntimeError, match=r"bank\.json: four replies in a row .*'no'"):
        written(tmp_path / "bank.json", model)
    assert len(model.prompts) == 2 + 4
    model.spoil = lambda number, reply: reply
    written(tmp_path / "bank.json", model)
    assert len(model.prompts) == 2 + 4 + 4


def test_a_crash_while_the_file_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    def crash(descriptor):
        if len(model.prompts) == 2:
            raise OSError("no space left")

    model = Model()
    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match=r"bank\.json cannot be written \(no space left\)"):
        written(tmp_path / "bank.json", model)
    assert os.listdir(tmp_path) == ["bank.json"]
    assert sizes(tmp_path / "bank.json") == [4, 0, 0]


def test_another_tissue_is_refused(tmp_path):
    written(tmp_path / "bank.json", Model(), levels=["patch"])
    with pytest.raises(ValueError, match=r"bank\.json is about H&E of nothing, not SRH: name"):
        written(tmp_path / "bank.json", None, "SRH")


# ------------------------------------------------------------------------------------ the command


def command(out, *flags):
    script = os.path.join(ROOT, "describe.py")
    return [script, *f"generate {out} --attributes 6 --batch 4 --tissue H&E".split(), *flags]


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs the command: (how it exits, everything it prints)."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")  # key files often end in a line break
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    def run(*words):
        monkeypatch.setattr(sys, "argv", command(*words))
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, "".join(capfd.readouterr())

    return run


def test_killed_between_replies_it_goes_on_and_pays_for_nothing_twice(run, tmp_path):
    """kill -9 during the second request, which quotes the faults of the first reply: the next run
    starts with exactly that request."""
    out, reached, release = tmp_path / "bank.json", threading.Event(), threading.Event()
    model, asked = Model(SPOILED["3 sentences, not 4"]), []

    def answer(prompt):
        asked.append(prompt)
        if len(asked) == 2:
            reached.set()
            release.wait(30)
        return model(prompt)

    with endpoint(answer) as (url, _):
        words = command(out, "--model", "m", "--endpoint", url)
        process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL)
        assert reached.wait(60)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        paid = read_bank_file(out, partial=True)["levels"]["patch"]
        ended, printed = run(out, "--model", "m", "--endpoint", url)
        release.set()
    assert ended == 0 and "72 sentences" in printed and KEY not in printed + out.read_text()
    assert "3 sentences, not 4" in asked[1] and asked[1] == asked[2]
    assert len(asked) == 1 + 1 + 6 - 1, "one refused in part, one killed, and none twice"
    assert len(paid) == 3 and paid.items() <= read_bank_file(out)["levels"]["patch"].items()


@pytest.mark.parametrize("code, tries", [(401, 1), (500, 3)])
def test_it_ends_with_an_error_when_the_endpoint_does(run, code, tries, tmp_path):
    with endpoint(None, [status(code)] * tries) as (url, requests):
        ended, printed = run(tmp_path / "bank.json", "--model", "m", "--endpoint", url)
    assert f"HTTP {code} not for ***" in ended and "The same command resumes from" in ended
    assert len(requests) == tries and KEY not in ended + printed


def test_it_must_be_told_whom_to_ask(run, tmp_path):
    ended, printed = run(tmp_path / "bank.json")
    assert ended == 2 and "arguments are required: --endpoint, --model" in printed
    ended, printed = run(tmp_path / "bank.json", "--model", "m", "--endpoint", "localhost:1/v1")
    assert "unknown url type: localhost" in ended


def test_one_level_alone_is_written_and_the_others_later(run, tmp_path):
    out = tmp_path / "bank.json"
    with endpoint(Model()) as (url, requests):
        flags = ["--model", "m", "--endpoint", url]
        assert run(out, *flags, "--levels", "slide")[0] == 0
        assert list(read_bank_file(out)["levels"]) == ["slide"]
        assert run(out, *flags)[0] == 0
    assert sizes(out) == [6, 6, 6] and len(requests) == 6
