"""The house's rules: imports point downwards, files stay short, importing effseg stays light."""

import ast
import json
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "effseg"
ORDER = [
    {"errors", "allocator", "distributed"},
    {"resources"},
    {"data"},
    {"models"},
    {"losses"},
    {"metrics"},
    {"inference"},
    {"training", "export"},
    {"report"},
    {"benchmark"},
    {"commands"},
    {"cli"},
]
RANK = {part: rank for rank, parts in enumerate(ORDER) for part in parts}
SIBLINGS = {"data", "models", "metrics"}
"""These do not import each other, except for these; nor do losses and metrics:"""
SHARED = {
    "effseg.data.classes",
    "effseg.data.download",
    "effseg.data.files",
    "effseg.data.listing",
    "effseg.data.sample",
    "effseg.models.boxes",
}
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in FILES}


def part_of(module):
    return module.split(".")[1]


def imports(path):
    """Return what a file imports: modules of effseg, and names of effseg itself."""
    modules, names = set(), set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module and node.module.split(".")[0] == "effseg":
                for alias in node.names:
                    full = f"{node.module}.{alias.name}"
                    if full in MODULES:
                        modules.add(full)
                    elif node.module == "effseg":
                        names.add(alias.name)
                    else:
                        modules.add(node.module)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "effseg":
                    names.add(alias.name)
                elif alias.name.startswith("effseg."):
                    modules.add(alias.name)
    return modules, names


def test_the_walk_sees_the_package():
    assert {"effseg.errors", "effseg.data.sources.voc", "effseg.models.bifpn", "effseg.cli"} <= set(
        MODULES
    )
    assert "effseg.models.layers" in imports(PACKAGE / "models" / "bifpn.py")[0]
    assert {part_of(name) for name in MODULES if name != "effseg"} <= set(RANK)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_downwards(path):
    me = module_name(path)
    modules, _ = imports(path)
    if me == "effseg":
        return
    for other in modules:
        assert other in MODULES, f"{me} imports {other}, which is not there"
        mine, theirs = part_of(me), part_of(other)
        if mine == theirs:
            continue
        assert RANK[theirs] < RANK[mine], f"{me} imports {other}: imports point downwards"
        if {mine, theirs} <= SIBLINGS or {mine, theirs} == {"losses", "metrics"}:
            assert other in SHARED, f"{me} imports {other}: these packages stay apart"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_nobody_imports_the_public_names(path):
    if path == PACKAGE / "__init__.py":
        return
    _, names = imports(path)
    allowed = {"__version__"} if path == PACKAGE / "cli.py" else set()
    assert names <= allowed, f"{path.name}: import from the module that defines it"


def test_no_cycles():
    graph = {}
    for name, path in MODULES.items():
        package = path.name == "__init__.py"
        # A package's own __init__ may gather its modules; they must not go back through it.
        graph[name] = {m for m in imports(path)[0] if not (package and m == name)}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other: {' -> '.join(error.args[1])}")


def test_files_stay_short():
    lengths = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    assert {name: lines for name, lines in lengths.items() if lines > 400} == {}


def test_no_drawer_for_odds_and_ends():
    names = {path.stem for path in FILES}
    assert names.isdisjoint({"utils", "util", "helpers", "helper", "common", "misc"})


def loaded_by(statement):
    code = f"import sys, json; {statement}; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300
    )
    return {name.split(".")[0] for name in json.loads(done.stdout)}


@pytest.mark.parametrize("statement", ["import effseg", "import effseg.models.registry"])
def test_import_is_light(statement):
    # matplotlib is not in the list: torchmetrics imports it for its plots.
    heavy = {"albumentations", "lightning", "pytorch_lightning", "jsonargparse", "tensorboard"}
    assert loaded_by(statement) & heavy == set()
