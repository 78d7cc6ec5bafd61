"""The README and docs/ are true: the commands parse, the files exist, the code is the code."""

import argparse
import importlib
import inspect
import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from conftest import ROOT

README = Path(ROOT, "README.md").read_text()
PAGES = [README, *(page.read_text() for page in sorted(Path(ROOT, "docs").glob("*.md")))]


def commands():
    """Every call of one of our programs in a bash block: (module, arguments)."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", "".join(PAGES), re.S):
        block = block.replace("\\\n", " ")
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
        parse(self, *arguments, **options)  # exits with 2 on an unknown flag
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
        "tools.cohort",
        "tools.report",
    } <= modules


def test_the_files_that_it_names_exist():
    for page, folder in zip(PAGES, ["", "docs", "docs"]):
        links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page)
        names = re.findall(r"`((?:attributes|demo|docs|tests|tools)/[\w./]+)`", page)
        for path in [os.path.join(folder, link) for link in links] + names:
            assert os.path.exists(os.path.join(ROOT, path)), path


def test_a_link_to_a_heading_finds_it():
    headings = re.findall(r"^#+ (.*)$", "\n".join(PAGES), re.M)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    for anchor in re.findall(r"\]\([^)#:]*#([^)]+)\)", "".join(PAGES)):
        assert anchor in anchors


def test_the_training_step_is_that_of_the_loop():
    """The same lines in the same order, apart from comments."""
    (block,) = re.findall(r"```python\n(z, projections.*?)```", README, re.S)
    source = [line.partition("#")[0].strip() for line in Path(ROOT, "train.py").open()]
    place = 0
    for line in block.splitlines():
        place = source.index(line.partition("#")[0].strip(), place) + 1


def test_the_demos_output_is_of_its_objective():
    """The shown banner is of what `python train.py` trains; the numbers: docs/RESULTS.md."""
    config = importlib.import_module("train").parse_config([])
    assert f"\n{config.objective} from step 0 on 1 x cpu" in README
    assert f"--align {config.align}\n" in README


def test_the_two_commands_are_what_ci_runs():
    ci = Path(ROOT, ".ci/run").read_text()
    parts = ("python3 -m venv .venv", "pip install -q -r requirements-dev.txt")
    for part in (*parts, ".venv/bin/python -m pytest -q"):
        assert part in README
        assert part in ci


def test_the_first_path_names_functions_that_exist():
    """`Read it in 45 minutes` gives their right files and numbers of lines."""
    rows = re.findall(r"^\| \[(\w+)\.py\]\(\w+\.py\) \| (.*?) \| (\d+) \|$", README, re.M)
    assert len(rows) == 6
    for module, functions, lines in rows:
        code = importlib.import_module(module)
        path = [getattr(code, name) for name in re.findall(r"`(\w+)`", functions)]
        found = sum(len(inspect.getsource(function).splitlines()) for function in path)
        assert abs(found - int(lines)) < 10, (module, found)
