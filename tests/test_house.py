"""The code stays one that a reader can walk through: file sizes, and which file imports which."""

import ast
import sys
from pathlib import Path

import pytest
from conftest import ROOT

STAGES = [Path(ROOT, f"{name}.py") for name in "losses data model describe train evaluate".split()]
ROOMS = [*Path(ROOT, "demo").glob("*.py"), *Path(ROOT, "tools").glob("*.py")]
# What each file may import of ours.
MAY_IMPORT = {
    "losses": set(),
    "data": {"losses"},
    "model": {"losses", "tools.runs", "tools.weights"},
    "describe": {"losses", "model", "tools.bank", "tools.runs", "tools.weights"},
    "evaluate": {"losses", "data", "model", "describe", "tools.runs"}
    | {"tools.processes", "tools.report", "tools.weights"},
    "train": {"losses", "data", "model", "describe", "evaluate", "demo.prepare", "tools.runs"}
    | {"tools.processes", "tools.report", "tools.weights"},
    "tools.runs": set(),
    "tools.bank": set(),
    "tools.weights": {"tools.runs"},
    "tools.processes": set(),
    "tools.cohort": {"data"},
    "tools.report": {"data", "tools.cohort", "tools.processes", "tools.runs"},
    "demo.tissue": {"data", "tools.runs"},
    "demo.clip": {"demo.tissue", "describe", "model", "tools.runs"},
    "demo.prepare": {"demo.tissue", "demo.clip"},
    "demo.truth": {"demo.tissue", "describe", "evaluate"},
    "demo.real": {"data", "evaluate", "tools.report"},
    "demo.study": {"losses", "data", "model", "describe", "evaluate"}
    | {"tools.runs", "tools.weights"}
    | {"demo.tissue", "demo.clip", "demo.prepare", "demo.truth"},
}
RUNTIME = {"torch", "torchvision", "numpy", "PIL", "tqdm"}


def lines(path):
    return len(path.read_text().splitlines())


def module(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path):
    """All modules that a file imports, at any place."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module in ("demo", "tools"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found


def test_the_sizes():
    """Lines after `ruff format`, which CI checks. These are ceilings, not goals."""
    print("\n".join(f"{lines(path):5} {module(path)}" for path in [*STAGES, *ROOMS]))
    assert max(lines(path) for path in STAGES) <= 600
    assert sum(lines(path) for path in STAGES) <= 2750
    assert sum(lines(path) for path in ROOMS) <= 2150


@pytest.mark.parametrize("path", [*STAGES, *ROOMS], ids=module)
def test_imports_point_one_way_and_to_five_packages(path):
    if path.name == "__init__.py":
        assert lines(path) == 0
        return
    found = imports(path)
    ours = {name for name in found if name in MAY_IMPORT}
    assert ours <= MAY_IMPORT[module(path)] | {"tools.processes"}  # user_errors, for every command
    others = {name.split(".")[0] for name in found - ours}
    assert others <= RUNTIME | set(sys.stdlib_module_names)


def test_no_circle_is_allowed():
    done = set()
    while len(done) < len(MAY_IMPORT):
        ready = {name for name, known in MAY_IMPORT.items() if known <= done} - done
        assert ready, set(MAY_IMPORT) - done
        done |= ready
