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
    """A language model that obeys every prompt. `spoil` may change a reply: (number, reply) ->
    reply."""

    def __init__(self, spoil=lambda number, reply: reply):
        self.prompts, self.said, self.spoil = [], 0, spoil

    def words(self, number):
        self.said += number
        return " ".join(word(n) for n in range(self.said - number, self.said))

    def __call__(self, prompt):
        self.prompts.append(prompt)
        if count := re.search(r"^Name (\d+) attributes", prompt, re.M):
            reply = [self.words(3) for _ in range(int(count.group(1)))]
        else:
            count = int(re.search(r"write (\d+) sentences", prompt).group(1))
            names = re.search(r"The attributes:\n(.*?)\n\n", prompt, re.S).group(1).split("\n")
            reply = {name: [self.words(9) for _ in range(count)] for name in names}
        return self.spoil(len(self.prompts), json.dumps(reply))


@contextlib.contextmanager
def endpoint(model, faults=()):
    """Serves `model` on 127.0.0.1. The first requests meet the faults instead, which are functions
    of the handler. Yields the URL and the requests: (path, headers)."""
    faults, requests = list(faults), []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append((self.path, dict(self.headers)))
            if faults:
                faults.pop(0)(self)
            else:
                send(
                    self,
                    200,
                    {"choices": [{"message": {"content": model(body["messages"][-1]["content"])}}]},
                )

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    ).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()


def send(handler, status, content, **headers):
    content = json.dumps(content).encode()
    handler.send_response(status)
    for name, value in {"Content-Length": len(content), **headers}.items():
        handler.send_header(name.replace("_", "-"), str(value))
    handler.end_headers()
    handler.wfile.write(content)


def hang(handler):
    time.sleep(20)


def drop(handler):
    handler.connection.shutdown(socket.SHUT_RDWR)


def half(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')


def status(code, **headers):
    return lambda handler: send(handler, code, {"error": f"not for {KEY}"}, **headers)


def html(handler):
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(b"<html>the proxy is tired</html>")


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


# --------------------------------------------------------------------------------- the connection


@pytest.mark.parametrize(
    "fault",
    [
        status(429),
        status(500),
        status(503),
        status(408),
        hang,
        drop,
        half,
        html,
        lambda handler: send(handler, 200, {"choices": []}),
    ],
)
def test_what_may_pass_is_asked_again(fault):
    start = time.monotonic()
    with endpoint(lambda prompt: "yes, " + prompt, [fault, fault]) as (url, requests):
        assert ask(url + "/", "m", "please", timeout=0.3, wait=0.01) == "yes, please"
    assert [path for path, _ in requests] == ["/v1/chat/completions"] * 3
    assert time.monotonic() - start < 10, "the hung socket was waited for"


def test_the_pauses_double_and_retry_after_is_heeded(monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    late = status(429, Retry_After="Fri, 31 Dec 1999 23:59:59 GMT")
    for faults in ([drop, late], [status(503), status(429, Retry_After=7)]):
        with endpoint(lambda prompt: "yes", faults) as (url, _):
            assert ask(url, "m", "please") == "yes"
    assert pauses == [2, 4, 2, 7]


def test_what_cannot_pass_is_not_asked_again_and_the_key_is_never_shown(capfd):
    for code in (400, 401, 404):
        with (
            endpoint(None, [status(code)]) as (url, requests),
            pytest.raises(ConnectionError, match=f"HTTP {code} .*not for \\*\\*\\*") as caught,
        ):
            ask(url, "m", "please", key=KEY, wait=0.01)
        assert len(requests) == 1 and requests[0][1]["Authorization"] == f"Bearer {KEY}"
        assert KEY not in str(caught.value)
    with (
        endpoint(None, [status(500)] * 3) as (url, requests),
        pytest.raises(ConnectionError, match="HTTP 500"),
    ):
        ask(
            url, "m", "please", key=KEY + "\n", tries=3, wait=0.01
        )  # key files often end in a line break
    assert len(requests) == 3
    assert KEY not in "".join(capfd.readouterr())


def test_a_redirect_does_not_carry_the_key_away():
    seen = []

    class Thief(BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(dict(self.headers))
            send(self, 404, {})

        def log_message(self, *_):
            pass

    thief = ThreadingHTTPServer(("127.0.0.1", 0), Thief)
    threading.Thread(
        target=thief.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    ).start()
    away = status(302, Location=f"http://127.0.0.1:{thief.server_port}/")
    with endpoint(None, [away]) as (url, _), pytest.raises(ConnectionError, match="404"):
        ask(url, "m", "please", key=KEY)
    thief.shutdown()
    thief.server_close()
    assert len(seen) == 1 and "Authorization" not in seen[0]


# --------------------------------------------------------------------------------------- the bank


def made(path, model, **options):
    return generate(
        str(path),
        model,
        "H&E of nothing",
        **{"attributes": 6, "sentences": 4, "batch": 4} | options,
    )


def test_an_obedient_model_writes_a_bank_that_passes(tmp_path):
    model = Model()
    assert made(tmp_path / "bank.json", model)
    bank = read_bank_file(tmp_path / "bank.json")
    assert set(bank) == {"name", "tissue", "levels"} and bank["name"] == "bank"
    assert check_bank(bank, attributes=6, sentences=4)[1] == {}
    assert len(model.prompts) == 3 * (2 + 2)  # 4 and 2 names, then the sentences of 4 and 2
    assert os.listdir(tmp_path) == ["bank.json"]
    for prompt in model.prompts:
        assert "H&E of nothing" in prompt
    for level, number in (("patch", 0), ("slide", 4), ("patient", 8)):
        taken = [
            name for before in LEVELS[: LEVELS.index(level)] for name in bank["levels"][before]
        ]
        assert all(
            name in model.prompts[number] for name in taken
        )  # so the names of other levels do not come again
        assert all(
            name in model.prompts[number + 1] for name in [*taken, *list(bank["levels"][level])[:4]]
        )
    assert made(tmp_path / "bank.json", None), "a whole bank asks nothing"


def replies(change):
    """Spoils replies with sentences: changes what the model says about the first attribute."""

    def spoil(number, reply):
        if number != 3:
            return reply
        said = json.loads(reply)
        first = next(iter(said))
        said[first] = change(said[first])
        return json.dumps(said)

    return spoil


# What the next prompt must complain of: how a reply is spoiled (1 has names, 3 has sentences).
SPOILED = {
    "not the JSON asked for": lambda number, reply: (
        "I am sorry, I cannot." if number in (1, 3) else reply
    ),
    "not the JSON asked for: '[\"": lambda number, reply: reply[:-9] if number == 1 else reply,
    "names alike": lambda number, reply: (
        json.dumps([*json.loads(reply)[:-1], " ".join(json.loads(reply)[0].split()[::-1])])
        if number == 1
        else reply
    ),
    "is taken": lambda number, reply: (
        json.dumps(["bababa babade babadi", *json.loads(reply)[1:]]) if number < 3 else reply
    ),
    "no image shows 'mirna'": lambda number, reply: (
        json.dumps(["raised miRNA", *json.loads(reply)[1:]]) if number == 1 else reply
    ),
    "a name has 1 to 8 words": lambda number, reply: (
        json.dumps(["one two three four five six seven eight nine", ""]) if number == 1 else reply
    ),
    "3 sentences, not 4": replies(lambda said: said[:3]),
    "0 sentences, not 4": replies(lambda said: {"morphology": said[0]}),
    "1 sentences, not 4": replies(lambda said: [said[0], None, 3, said[1:]]),
    "sentences alike (1.00)": replies(lambda said: [*said[:3], said[0]]),
    "under 6 words": replies(lambda said: [*said[:3], "Too short for anyone."]),
    "over 40 words": replies(
        lambda said: [*said[:3], " ".join(said) + " " + " ".join(map(word, range(9000, 9010)))]
    ),
    "not ASCII": replies(lambda said: [*said[:3], said[3] + " na\u00efve"]),
    "no image shows 'cytokines'": replies(lambda said: [*said[:3], said[3] + " cytokines"]),
}


@pytest.mark.parametrize("complaint", SPOILED)
def test_what_the_check_finds_is_asked_again_with_the_reason(complaint, tmp_path):
    model = Model(SPOILED[complaint])
    assert made(tmp_path / "bank.json", model)
    assert check_bank(read_bank_file(tmp_path / "bank.json"), attributes=6, sentences=4)[1] == {}
    complained = [number for number, prompt in enumerate(model.prompts, 1) if complaint in prompt]
    assert complained and complained[0] in (2, 3, 4), model.prompts
    assert complaint not in model.prompts[-1]


@pytest.mark.parametrize(
    "dress",
    [
        "```json\n{}\n```",
        "Sure! Here you are:\n\n{}\n\nAnything else?",
        "<think>[1] or {{2}}?</think>\n{}",
    ],
)
def test_fences_talk_and_thoughts_around_the_json_do_not_matter(dress, tmp_path):
    model = Model(lambda number, reply: dress.replace("{{2}}", "{2}").replace("{}", reply))
    assert made(tmp_path / "bank.json", model) and len(model.prompts) == 12


def test_quotes_dashes_and_a_sentence_too_many_are_mended_not_refused(tmp_path):
    model = Model(
        replies(
            lambda said: [
                "The cell\u2019s  \u201crim\u201d is thin \u2013 almost unseen by anyone.",
                *said,
            ]
        )
    )
    assert made(tmp_path / "bank.json", model) and len(model.prompts) == 12
    first = next(iter(read_bank_file(tmp_path / "bank.json")["levels"]["patch"].values()))
    assert first[0] == "The cell's 'rim' is thin - almost unseen by anyone." and len(first) == 4


def test_more_names_than_asked_for_are_left(tmp_path):
    model = Model(
        lambda number, reply: (
            json.dumps([*json.loads(reply), "some more", "and more"]) if number == 2 else reply
        )
    )
    assert made(tmp_path / "bank.json", model)
    assert [len(names) for names in read_bank_file(tmp_path / "bank.json")["levels"].values()] == [
        6,
        6,
        6,
    ]


def test_boilerplate_is_refused_once_it_shows():
    """Up to 16 sentences may share a frame; from the 17th on, it is refused."""
    bank = {"tissue": "H&E", "levels": {level: {} for level in LEVELS}}
    framed = Model(
        lambda number, reply: json.dumps(
            {n: ["The image shows " + s for s in said] for n, said in json.loads(reply).items()}
        )
    )
    bank["levels"]["patch"] = {word(n): [] for n in range(9000, 9006)}
    names = list(bank["levels"]["patch"])
    reply = framed(prompt_for(bank, "patch", names, 4))
    assert take_reply(bank, "patch", names, reply, 4) == 4
    assert (
        all("'the image shows' stands in" in line for line in bank["refused"])
        and len(bank["refused"]) == 2
    )


def test_a_model_that_never_obeys_is_given_up(tmp_path):
    model = Model(lambda number, reply: "no" if number > 3 else reply)
    with pytest.raises(RuntimeError, match=r"bank\.json: four replies in a row"):
        made(tmp_path / "bank.json", model)
    assert len(model.prompts) == 7
    assert made(tmp_path / "bank.json", Model(lambda number, reply: reply)), (
        "and another one goes on"
    )


def test_a_crash_while_the_file_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    def crash(descriptor):
        if len(model.prompts) == 3:
            raise OSError("no space left")

    model = Model()
    monkeypatch.setattr(os, "fsync", crash)
    with pytest.raises(OSError, match=r"bank\.json cannot be written \(no space left\)"):
        made(tmp_path / "bank.json", model)
    assert os.listdir(tmp_path) == ["bank.json"]
    monkeypatch.undo()
    assert [
        len(names)
        for names in read_bank_file(tmp_path / "bank.json", partial=True)["levels"].values()
    ] == [6, 0, 0]
    assert made(tmp_path / "bank.json", model)


def test_another_tissue_or_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"bank\.json says no tissue"):
        generate(str(tmp_path / "bank.json"), None)
    made(tmp_path / "bank.json", Model(), levels=["patch"])
    with pytest.raises(ValueError, match="is about 'H&E of nothing', not 'SRH'"):
        generate(str(tmp_path / "bank.json"), None, "SRH")


# ------------------------------------------------------------------------------------ the command


def command(out, *flags):
    return [
        os.path.join(ROOT, "describe.py"),
        "generate",
        "--out",
        str(out),
        "--attributes",
        "6",
        "--batch",
        "4",
        *flags,
    ]


@pytest.fixture
def run(monkeypatch, capfd):
    """Runs the command: (how it exits, stdout, stderr)."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    def run(out, *flags):
        monkeypatch.setattr(sys, "argv", command(out, *flags))
        try:
            ended = main()
        except SystemExit as end:
            ended = end.code
        return ended, *capfd.readouterr()

    return run


def test_killed_between_answers_it_goes_on_and_pays_for_nothing_twice(run, tmp_path):
    """kill -9 during the seventh request (the third was refused): the next run starts with exactly
    that request and repeats no other."""
    out, reached = tmp_path / "bank.json", threading.Event()
    flags = ["--tissue", "H&E of nothing", "--model", "m"]
    model = Model(replies(lambda said: said[:3]))

    def stop_at_seven(prompt):
        if len(model.prompts) == 6 and not reached.is_set():
            model.asked = prompt
            reached.set()
            time.sleep(30)
        return model(prompt)

    with endpoint(stop_at_seven) as (url, requests):
        process = subprocess.Popen(
            [sys.executable, *command(out, *flags, "--endpoint", url)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        assert reached.wait(60)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        part = read_bank_file(out, partial=True)
        before = list(model.prompts)
        assert any("3 sentences, not 4" in prompt for prompt in before)
        ended, stdout, stderr = run(out, *flags, "--endpoint", url)
    assert ended == 0 and "72 sentences" in stdout
    assert model.prompts[6] == model.asked
    assert len(set(model.prompts)) == len(model.prompts) and len(requests) == len(model.prompts) + 1
    bank = read_bank_file(out)
    for level in LEVELS:  # the results of the first run are still there
        assert all(
            bank["levels"][level][n] == said for n, said in part["levels"][level].items() if said
        )
    assert KEY not in stdout + stderr + out.read_text()


def test_it_ends_with_an_error_when_the_endpoint_does(run, tmp_path):
    with endpoint(Model(), [status(401)]) as (url, _):
        ended, stdout, stderr = run(
            tmp_path / "bank.json", "--tissue", "H&E", "--model", "m", "--endpoint", url
        )
    assert "HTTP 401" in ended and "goes on from" in ended
    assert KEY not in ended + stdout + stderr


@pytest.mark.parametrize(
    "flags", [[], ["--endpoint", "http://x"], ["--endpoint", "localhost:1/v1", "--model", "m"]]
)
def test_flags_that_do_not_say_whom_to_ask_are_refused(run, flags, tmp_path):
    ended, _, stderr = run(tmp_path / "bank.json", "--tissue", "H&E", *flags)
    assert ended == 2 and "needs --endpoint" in stderr


def test_some_levels_alone_leave_a_bank_that_is_not_whole(run, tmp_path):
    out = tmp_path / "bank.json"
    flags = ["--tissue", "H&E", "--model", "m", "--levels", "slide"]
    with endpoint(Model()) as (url, _):
        ended, stdout, _ = run(out, *flags, "--endpoint", url)
    assert ended is None and "is not complete" in stdout
    levels = read_bank_file(out, partial=True)["levels"]
    assert [len(levels[level]) for level in LEVELS] == [0, 6, 0]
