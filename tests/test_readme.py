"""The README's commands are understood by the programs that they name; its files exist."""

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


def commands():
    """Every call of one of our programs in a bash block: (module, its arguments)."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", README, re.S):
        block = block.replace("\\\n", " ").replace("$objective", "hlss").replace("$seed", "0")
        for command in re.split(r"\n|;|&&", block):
            words = shlex.split(command, comments=True)
            for place, word in enumerate(words):
                if word.endswith(".py") and "/" not in word:
                    found.append((word.removesuffix(".py"), words[place + 1 :]))
                if word == "-m" and words[place + 1].startswith(("demo.", "tools.")):
                    found.append((words[place + 1], words[place + 2 :]))
    return found


@pytest.mark.parametrize(("module", "arguments"), commands())
def test_a_command_is_understood(module, arguments, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self, *arguments, **options):
        parse(self, *arguments, **options)  # exits with 2 on a flag that is not there
        raise SystemExit(0)

    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(module).main()
    assert stop.value.code == 0, arguments


def test_there_are_commands_of_every_stage_and_room():
    modules = {module for module, _ in commands()}
    assert {
        "train",
        "evaluate",
        "describe",
        "demo.truth",
        "tools.cohort",
        "tools.report",
    } <= modules


def test_the_files_that_it_names_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    names = re.findall(r"`((?:attributes|demo|docs|tests|tools)/[\w./]+)`", README)
    for path in links + names:
        assert os.path.exists(os.path.join(ROOT, path)), path


def test_the_two_commands_are_what_ci_runs():
    with open(os.path.join(ROOT, ".ci/run")) as file:
        ci = file.read()
    parts = ("python3 -m venv .venv", "pip install -q -r requirements-dev.txt")
    for part in (*parts, ".venv/bin/python -m pytest -q"):
        assert part in README
        assert part in ci
