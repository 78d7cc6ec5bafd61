"""What the README tells people to type is understood by the programs it names, and the files that it names exist."""

import argparse
import importlib
import os
import re
import shlex
import sys

import pytest
from conftest import ROOT

with open(os.path.join(ROOT, "README.md")) as _file:
    README = _file.read()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.S)
LINES = [line for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
COMMANDS = [
    line.split("#")[0].split("&&")[-1].strip() for line in LINES if re.search(r"\b\w+\.py\b", line)
]
COMMANDS = [
    command.replace("$objective", "hlss").replace("$seed", "0").split("; done")[0]
    for command in COMMANDS
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood(command, monkeypatch):
    words = shlex.split(command)
    script = next(i for i, word in enumerate(words) if word.endswith(".py"))
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *arguments, **options):
        parse(self, *arguments, **options)  # exits with 2 on a flag that is not there
        raise SystemExit(0)

    monkeypatch.setattr(sys, "argv", words[script:])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(os.path.basename(words[script])[:-3]).main()
    assert stop.value.code == 0, command


def test_there_are_commands_and_their_files_exist():
    assert len(COMMANDS) >= 8
    for path in re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(
        r"`((?:attributes|tests)/[\w./]+)`", README
    ):
        assert os.path.exists(os.path.join(ROOT, path)), path


def test_the_two_commands_are_what_ci_runs():
    with open(os.path.join(ROOT, ".ci/run")) as file:
        ci = file.read()
    for part in (
        "python3 -m venv .venv",
        "pip install -q -r requirements-dev.txt",
        ".venv/bin/python -m pytest -q",
    ):
        assert part in README
        assert part in ci
